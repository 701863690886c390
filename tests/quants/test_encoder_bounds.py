"""Bounds of encoders: what `docs/make/encoder_bounds.py` measured is what ggml's encoders lose, and ours stay within."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pages
import pytest

from aprlab.errors import UnsupportedError
from aprlab.quants import bounds, can_encode, dequantise, quantise, types

SCRIPT = Path(__file__).parents[2] / "docs" / "make" / "encoder_bounds.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("xllamacpp")
    return pages.script(SCRIPT)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0"])
def test_bounds_are_what_ggml_shows(script: ModuleType, name: str) -> None:
    ggml, kind = script.library(), types.by_name(name)
    found = max(float(script.row_errors(ggml, x, kind).max()) for _, x in script.distributions())
    assert found == pytest.approx(bounds.LOST[name], rel=1e-2)
    other = max(float(script.row_errors(ggml, x, kind).max()) for _, x in script.distributions(rows=50, seed=9))
    assert other <= bounds.LOST[name] * bounds.MARGIN


@pytest.mark.peer
def test_every_type_that_ggml_writes_has_a_bound(script: ModuleType) -> None:
    assert set(script.ENCODED) | {"AprQ4"} == set(bounds.LOST)


BLOCKED = [t for t in types.TYPES if t.name in bounds.LOST and can_encode(t)]


@pytest.mark.parametrize("kind", [*BLOCKED, types.APR_Q8, types.F16, types.BF16], ids=str)
def test_our_encoders_stay_within_the_limits(kind: types.TensorType) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((40, 256)) * 10.0 ** rng.integers(-6, 2, (40, 1))).astype(np.float32)
    x = np.clip(x, -100, 100)
    y = dequantise(quantise(x, kind).reshape(-1), kind, x.shape).astype(np.float64)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    error = np.linalg.norm(y - x, axis=1)
    limits = bounds.row_limits(kind, norms, 256, float(np.abs(x).max()))
    assert (error <= limits).all(), (error / limits).max()
    if kind is not types.APR_Q8:
        wrong = np.linalg.norm(y * 1.5 - x, axis=1)
        assert (wrong[norms > 0.1] > limits[norms > 0.1]).all(), "a limit that nothing breaks is none"


def test_a_type_without_a_bound_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no bound"):
        bounds.row_limits(types.Q8_1, np.ones(1), 32, 1.0)
