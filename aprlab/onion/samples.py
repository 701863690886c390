"""A look at the values of a tensor: a few rows, decoded, and how alike two of them are."""

from __future__ import annotations

import numpy as np

from aprlab.errors import AprlabError
from aprlab.formats import apr
from aprlab.formats.raw import Piece
from aprlab.model.tensor import Tensor
from aprlab.quants import dequantise, types
from aprlab.quants.types import TensorType

SAMPLE_ROWS = 8
ALIKE = 0.8  # correlation of decoded values from which on two tensors are one; unrelated weights stay below 0.1


def sample_rows(rows: int, most: int = SAMPLE_ROWS) -> np.ndarray:
    """At most `most` row numbers spread over a tensor, first and last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.int64))


def bytes_of_rows(raw: np.ndarray, kind: TensorType, rows: int, chosen: np.ndarray) -> np.ndarray:
    """Bytes of a tensor that has the chosen ones of these `rows` alone, uint8; with the bytes that are the whole tensor's."""
    return np.concatenate([raw[: kind.tensor_bytes], raw[kind.tensor_bytes :].reshape(rows, -1)[chosen].reshape(-1)])


def sample(raw: np.ndarray, kind: TensorType, shape: tuple[int, ...]) -> np.ndarray | None:
    """Decoded values of a few rows, float32 (rows, cols); None where the bytes are missing or cannot be decoded."""
    if not kind.fits(shape, len(raw)):
        return None
    cols = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64)) if len(shape) > 1 else 1
    chosen = sample_rows(rows)
    try:
        return dequantise(bytes_of_rows(raw, kind, rows, chosen), kind, (len(chosen), cols))
    except AprlabError:
        return None


def correlation(a: np.ndarray | SampledValues, b: np.ndarray | SampledValues) -> float:
    """Cosine of two arrays of one shape, in float64; 0 where either is zero or not finite."""
    x, y = (side if isinstance(side, SampledValues) else SampledValues(side) for side in (a, b))
    with np.errstate(all="ignore"):
        found = float(x.values @ y.values) / float(x.norm * y.norm or np.nan)
    return found if np.isfinite(found) else 0.0


class SampledValues:
    """Values that are correlated with many others: float64 in one row, and their norm."""

    __slots__ = ("norm", "values")

    def __init__(self, values: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            self.values = values.astype(np.float64).reshape(-1)
            self.norm = np.linalg.norm(self.values)


_SAMPLES: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}


def reference_sample(tensor: Tensor) -> np.ndarray | None:
    """Decoded rows of a reference's tensor, remembered while its bytes live."""
    kept = _SAMPLES.get(id(tensor.raw))
    if kept is None or kept[0] is not tensor.raw:
        if len(_SAMPLES) > 4096:
            _SAMPLES.clear()
        kept = _SAMPLES[id(tensor.raw)] = (tensor.raw, sample(tensor.raw, tensor.type, tensor.shape))
    return kept[1]


# Types that Qwen2 files come in, without those that cannot be decoded here.
LIKELY: tuple[TensorType, ...] = (
    types.F32, types.F16, types.BF16, types.Q8_0, types.Q4_K, types.Q5_K, types.Q6_K, types.Q4_0, types.Q4_1, types.Q5_0,
    types.Q5_1, types.Q3_K, types.Q2_K, types.APR_Q4, types.APR_Q8,
)  # fmt: skip


def kinds_for(piece: Piece, tensor: Tensor) -> list[TensorType]:
    """Types the bytes can be by the size law, the reference's own and the labelled ones first."""
    label = [t for t in apr.candidates(piece.code) if t.fits(tensor.shape, piece.size)]
    own = [tensor.type] if tensor.type.fits(tensor.shape, piece.size) else []
    rest = [t for t in LIKELY if t.fits(tensor.shape, piece.size)]
    return list(dict.fromkeys([*own, *label, *rest]))


__all__ = [
    "ALIKE", "LIKELY", "SampledValues", "bytes_of_rows", "correlation", "kinds_for", "reference_sample", "sample", "sample_rows",
]  # fmt: skip
