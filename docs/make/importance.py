"""What importance weights (an imatrix) do to marks and errors: `python docs/make/importance.py`; needs `xllamacpp`.

ggml's own encoder gets one weight for each column, spread log-uniformly over ± so many decades, then also with 30 % of the
columns at weight zero. Encoded are matrices of the embedded model (with noise, so that they are on no grid) and of heavier
tails. Printed is, for each type and spread: the worst row and value in the type's own largest, tensors that are beyond the
bounds, those of them that are accepted because the columns that count are right, and the marks of blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from encoder_bounds import library

from aprlab import paths
from aprlab.formats import open_model
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.block_marks import marks_of
from aprlab.onion.layers.dtype import kept_by_importance
from aprlab.onion.row_errors import beyond, row_errors, tilted
from aprlab.quants import bounds, types
from aprlab.quants.types import TensorType

KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SPREADS = ((0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (6.0, 0.0), (6.0, 0.3))  # decades to either side, share of zeros


def weighted(ggml: ctypes.CDLL, x: np.ndarray, kind: TensorType, weights: np.ndarray) -> np.ndarray:
    """`x`, float32 (rows, columns), as ggml writes it with one weight for each column: uint8 (bytes,)."""
    out = np.zeros((len(x), kind.row_bytes(x.shape[1])), np.uint8)
    ggml.ggml_quantize_init(ctypes.c_int(kind.code))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    size = ggml.ggml_quantize_chunk(
        ctypes.c_int(kind.code), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(0),
        ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), ctypes.c_void_p(weights.ctypes.data),
    )  # fmt: skip
    assert size == out.nbytes, kind
    return out.reshape(-1)


def importance(columns: int, decades: float, zeros: float, rng: np.random.Generator) -> np.ndarray:
    """One weight for each column, float32 (columns,)."""
    spread = 10.0 ** rng.uniform(-decades, decades, columns)
    return np.where(rng.random(columns) < zeros, 0, spread).astype(np.float32)


def matrices(rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Float32 (rows, columns) under a name."""
    with open_model(paths.embedded_model()) as model:
        for name, tensor in model.tensors.items():
            if len(tensor.shape) == 2 and name.startswith("blk.0.") and tensor.cols % 256 == 0:
                noise = rng.standard_normal(tensor.shape).astype(np.float32)
                yield name, tensor.dequantise() + noise * np.float32(0.002)
    shape = 256, 1024
    yield "normal", (rng.standard_normal(shape) * 0.03).astype(np.float32)
    yield "student", (rng.standard_t(3, shape) * 0.02).astype(np.float32)
    yield "columns", (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[1])) * 0.02).astype(np.float32)


def main() -> None:
    """Print the table."""
    ggml, rng = library(), np.random.default_rng(1)
    held = dict(matrices(rng))
    for kind in map(types.by_name, KINDS):
        for decades, zeros in SPREADS:
            worst, spike, off, accepted, made = 0.0, 0.0, 0, 0, []
            for name, x in held.items():
                raw = weighted(ggml, x, kind, importance(x.shape[1], decades, zeros, rng))
                origin = Origin(Path(name), name, -1)
                of = Tensor(name, types.F32, x.shape, x.view(np.uint8).reshape(-1), origin)
                made.append(Tensor(name, kind, x.shape, raw, origin))
                rows = row_errors(of, kind, raw)
                assert rows is not None
                worst = max(worst, float(rows.relative.max()) / bounds.LOST[kind.name])
                spike = max(spike, float(rows.spike.max()) / bounds.PEAK[kind.name])
                if len(beyond(rows, types.F32, kind)) or len(tilted(rows)):
                    off += 1
                    accepted += kept_by_importance(of, kind, raw) is not None
            marks = {mark.name: round(mark.value, 3) for mark in marks_of(made)}
            told = {name: value for name, value in marks.items() if name.startswith(("largest", "lowest", "both"))}
            print(f"{kind.name} ±{decades:g}{' zeros' if zeros else ''}: row {worst:.2f}, value {spike:.2f}, "
                  f"beyond {off} of {len(held)}, accepted {accepted}, {told}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
