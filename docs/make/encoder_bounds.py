"""Measure what ggml's encoders lose, for `aprlab/quants/bounds.py`: `python docs/make/encoder_bounds.py`.

Needs the wheel `xllamacpp`, whose shared library exports `ggml_quantize_chunk`. Rows of 256 values, the shortest that
every type can hold (longer ones lose less at worst), from distributions with light and with heavy tails. Printed is, for
each type, the largest relative l2 error of a row, which is what `LOST` holds, and the largest error of a value as a share of
the largest value of its block, which is what `PEAK` holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xllamacpp

from aprlab.quants import can_decode, dequantise, types
from aprlab.quants.types import TensorType

ROWS, COLS = 400, 256
ENCODED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip


def library() -> ctypes.CDLL:
    """ggml, as the wheel has it."""
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(path))


def distributions(rows: int = ROWS, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Rows as weights may be: float32 (rows, COLS) under a name."""
    rng = np.random.default_rng(seed)
    shape = rows, COLS
    yield "normal", (rng.standard_normal(shape) * 0.03).astype(np.float32)
    yield "uniform", rng.uniform(-0.05, 0.05, shape).astype(np.float32)
    yield "laplace", (rng.laplace(size=shape) * 0.02).astype(np.float32)
    yield "student", (rng.standard_t(3, shape) * 0.02).astype(np.float32)
    outliers = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 15, 1) * 0.02
    yield "outliers", outliers.astype(np.float32)
    columns = rng.standard_normal(shape) * np.exp(rng.standard_normal(COLS)) * 0.02
    yield "columns", columns.astype(np.float32)


def encoded(ggml: ctypes.CDLL, x: np.ndarray, kind: TensorType) -> np.ndarray:
    """`x`, float32 (rows, cols), as ggml writes it without knowing which inputs matter: uint8 (rows, row bytes)."""
    out = np.zeros((len(x), kind.row_bytes(x.shape[1])), np.uint8)
    even = np.ones(x.shape[1], np.float32)  # some types demand weights of importance
    needed = bool(ggml.ggml_quantize_requires_imatrix(ctypes.c_int(kind.code)))
    ggml.ggml_quantize_init(ctypes.c_int(kind.code))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    size = ggml.ggml_quantize_chunk(
        ctypes.c_int(kind.code), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(0),
        ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), ctypes.c_void_p(even.ctypes.data if needed else None),
    )  # fmt: skip
    assert size == out.nbytes, kind
    return out


def row_errors(ggml: ctypes.CDLL, x: np.ndarray, kind: TensorType) -> np.ndarray:
    """Relative l2 error of each row after encoding and decoding: float64 (rows,)."""
    y = dequantise(encoded(ggml, x, kind), kind, x.shape).astype(np.float64)
    return np.linalg.norm(y - x, axis=1) / np.linalg.norm(x.astype(np.float64), axis=1)


def peaks(ggml: ctypes.CDLL, x: np.ndarray, kind: TensorType) -> np.ndarray:
    """Largest error of a value in each block, as a share of the block's largest value: float64 (blocks,)."""
    y = dequantise(encoded(ggml, x, kind), kind, x.shape)
    off, size = (np.abs(v.astype(np.float64)).reshape(-1, kind.block_elements).max(axis=1) for v in (y - x, x))
    return off / size


def main() -> None:
    """Print the tables `LOST` and `PEAK`."""
    ggml = library()
    for name in ENCODED:
        kind = types.by_name(name)
        assert can_decode(kind), kind
        found = {label: float(row_errors(ggml, x, kind).max()) for label, x in distributions()}
        worst = max(found, key=lambda label: found[label])
        print(f'    "{name}": {found[worst]:.4f},  # {worst}; normal {found["normal"]:.4f}', flush=True)
    for name in ENCODED:
        kind = types.by_name(name)
        print(f'    "{name}": {max(float(peaks(ggml, x, kind).max()) for _, x in distributions()):.3f},', flush=True)


if __name__ == "__main__":
    main()
