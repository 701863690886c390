"""What a fault would have made of a large tensor is not made where a few of its rows already say no."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aprlab.faults import convert_with, layout
from aprlab.onion.peeling import peel


def test_a_transposition_is_computed_only_where_rows_of_it_are_in_the_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, faults in (("other", ["GH-191", "q4k-min-lost"]), ("turned", ["transposed-embedding"])):
        convert_with(tiny, tmp_path / f"{name}.apr", faults)
    whole: list[int] = []
    turned = layout.turned

    def noted(values: np.ndarray) -> np.ndarray:
        whole.append(values.size)
        return turned(values)

    monkeypatch.setattr(layout, "turned", noted)
    assert peel(tiny, tmp_path / "other.apr", max_tokens=1).faults == ["GH-191", "q4k-min-lost"]
    assert not whole
    assert peel(tiny, tmp_path / "turned.apr", max_tokens=1).faults == ["transposed-embedding"]
    assert whole, "a name is given to what was computed to the last byte"
