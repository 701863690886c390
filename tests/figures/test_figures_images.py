"""A few figures as pictures, after the tests of their artists: what only the eye would notice (order of layers, colours).

Texts are left out and the tolerance is wide, since fonts and layout differ a little between versions of matplotlib. New
pictures: ``pytest --mpl-generate-path=tests/figures/baseline tests/figures/test_figures_images.py``, then look at them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from aprlab import figures

pytest.importorskip("pytest_mpl")
image = pytest.mark.mpl_image_compare(
    baseline_dir=str(Path(__file__).with_name("baseline")),
    tolerance=12,
    remove_text=True,
    style=str(figures.STYLE),
    savefig_kwargs={"dpi": 40, "bbox_inches": None, "metadata": {"Software": None}},
)


@image
def test_tensor_map() -> Figure:
    kinds = ("attn_q.weight", "attn_q.bias", "ffn_down.weight")
    cells = {"token_embd.weight": "fine"} | {f"blk.{n}.{kind}": "fine" for n in range(6) for kind in kinds}
    cells |= {f"blk.{n}.attn_q.bias": "lost" for n in range(6)} | {"blk.2.ffn_down.weight": "other"}
    return figures.tensor_map(cells, ("fine", "lost", "other")).figure


@image
def test_error_map() -> Figure:
    errors = np.outer(np.arange(1, 7), 10.0 ** -np.arange(8)) / 10
    errors[:, 0], errors[3, 4] = 0, np.inf  # equal at position 0, one cell that is not finite
    return figures.error_map(errors, range(6), range(8), xlabel="position").figure


@image
def test_distance_bars() -> Figure:
    return figures.distance_bars({"both": 0.9, "one": 1.1, "other": 0.6, "none": 0.0}, xlabel="distance").figure
