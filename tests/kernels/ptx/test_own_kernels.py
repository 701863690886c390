"""The package's own kernels, as shipped: dequantisation bit for bit with `gguf`, mat-vecs within rounding, all of
them clean.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from aprlab.kernels.cuda.compile import shipped_ptx
from aprlab.kernels.ptx import Machine, parse

TYPES = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210), "f16": (1, 2), "bf16": (1, 2),
}  # fmt: skip


def blocks(name: str, values: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks with finite scales."""
    elements, nbytes = TYPES[name]
    n = values // elements
    if name == "f16":
        return rng.standard_normal(n).astype(np.float16).view(np.uint8)
    if name == "bf16":
        return (rng.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    raw = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    places = {"q6_k": [208], "q4_0": [0], "q5_0": [0], "q8_0": [0]}.get(name, [0, 2])
    for at in places:
        raw[:, at : at + 2] = (rng.standard_normal(n) * 0.1).astype(np.float16)[:, None].view(np.uint8).reshape(n, 2)
    return raw.reshape(-1)


@pytest.fixture(scope="module")
def dequantise() -> Machine:
    return Machine(parse(shipped_ptx("dequantise")))


@pytest.mark.parametrize("name", list(TYPES))
def test_dequantisation_is_bit_for_bit(dequantise: Machine, name: str) -> None:
    raw = blocks(name, 256 * 21, np.random.default_rng(list(name.encode())))
    want = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, name.upper())).reshape(-1)
    for checks in (False, True):
        out, halves = np.full(want.size, np.nan, np.float32), np.zeros(want.size, np.uint16)
        quads = want.size // 4
        report = dequantise.launch(f"dequantise_{name}_f32", -(-quads // 256), 256, [raw, out, quads], checks=checks)
        np.testing.assert_array_equal(out.view(np.uint32), want.view(np.uint32))
        assert report.clean
        assert report.exact
        report = dequantise.launch(f"dequantise_{name}_f16", -(-quads // 256), 256, [raw, halves, quads], checks=checks)
        np.testing.assert_array_equal(halves, want.astype(np.float16).view(np.uint16))
        assert report.clean
