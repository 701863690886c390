"""Marks that encoders leave in blocks, and what it means where they are missing. No reference is needed, and no decoding.

An encoder scales each block so that its largest number uses the whole range of its field: in Q4_K and Q5_K the largest of the
eight scales is 63, and so is the largest minimum; in Q8_0 some number is 127 or -127; in Q6_K the scale of largest size is
-128. Faults of files that lose bits, read fields elsewhere or exchange them destroy that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from aprlab.model.tensor import Tensor
from aprlab.quants import REGISTRY, types
from aprlab.quants.kquants import Q4_K, Q5_K
from aprlab.quants.types import TensorType

BLOCKS = 2048  # of a tensor that are looked at: evenly spread

# Mark -> the least and the largest value of it in healthy files. Measured on all matrices of the embedded model, of the real
# 0.5B (both ggml's encoder), and of the embedded model encoded anew by this project's: the shares were 1.0 in each; the mean
# of scales of groups 4..7 over that of groups 0..3 was 0.98 to 1.03, the median of dmin over d 7.8 to 8.2.
NULLS: dict[str, tuple[float, float]] = {
    "largest-scale-63": (0.95, 1.0),
    "largest-minimum-63": (0.95, 1.0),
    "late-over-early-scales": (0.8, 1.25),
    "late-over-early-minima": (0.8, 1.25),
    "paired-scales-equal": (0.0, 0.5),
    "dmin-over-d": (1.5, 60.0),
    "dmin-not-zero": (0.5, 1.0),
    "largest-number-127": (0.95, 1.0),
    "largest-scale-128": (0.95, 1.0),
    "nibbles-alike": (0.0, 0.25),
}


@dataclass(frozen=True)
class Mark:
    """One mark of a type, over all matrices of that type.

    Attributes:
        name: a key of `NULLS`.
        type: of the matrices.
        value: what was measured.
        blocks: how many blocks were looked at.
    """

    name: str
    type: TensorType
    value: float
    blocks: int

    @property
    def likely(self) -> bool:
        """Whether a healthy file may have this value."""
        low, high = NULLS[self.name]
        return low <= self.value <= high

    def __str__(self) -> str:
        low, high = NULLS[self.name]
        return f"{self.type.name} {self.name} {self.value:.3g} (healthy: {low:g} to {high:g})"


def marks_of(tensors: Iterable[Tensor]) -> list[Mark]:
    """All marks of the matrices among `tensors`, one of each kind for each type; fewer than 64 blocks tell nothing."""
    by_type: dict[TensorType, list[np.ndarray]] = {}
    for tensor in tensors:
        if len(tensor.shape) == 2 and tensor.type in _MEASURES:
            blocks = tensor.raw.reshape(-1, tensor.type.block_bytes)
            step = max(1, len(blocks) // BLOCKS)
            part = np.ascontiguousarray(blocks[::step])
            by_type.setdefault(tensor.type, []).append(part[part.any(axis=1)])
    marks = []
    for kind, parts in by_type.items():
        b = np.concatenate(parts).reshape(-1).view(REGISTRY[kind].layout)
        if len(b) >= 64:
            with np.errstate(all="ignore"):
                marks += [Mark(name, kind, value, len(b)) for name, value in _MEASURES[kind](b).items()]
    return marks


def unlikely(tensors: Iterable[Tensor]) -> list[Mark]:
    """Marks that no healthy file has."""
    return [mark for mark in marks_of(tensors) if not mark.likely]


def _k4(b: np.ndarray, quant: Q4_K | Q5_K) -> dict[str, float]:
    scales, minima = quant.unpack_scales(b["scales"])
    d, dmin = b["d"].astype(np.float64).reshape(-1), b["dmin"].astype(np.float64).reshape(-1)
    found = {
        "largest-scale-63": float((scales.max(axis=1) == 63).mean()),
        "largest-minimum-63": float((minima.max(axis=1) == 63).mean()),
        "late-over-early-scales": float(scales[:, 4:].mean() / scales[:, :4].mean()),
        "late-over-early-minima": float(minima[:, 4:].mean() / minima[:, :4].mean()),
        "paired-scales-equal": float((scales[:, 0::2] == scales[:, 1::2]).all(axis=1).mean()),
        "dmin-not-zero": float((dmin != 0).mean()),
        "nibbles-alike": _nibbles(b["qs"]),
    }
    if (both := (d > 0) & (dmin > 0)).any():
        found["dmin-over-d"] = float(np.median(dmin[both] / d[both]))
    return found


def _nibbles(qs: np.ndarray) -> float:
    """How far the histograms of low and of high nibbles are apart: l1 distance of the shares, 0 to 2."""
    low, high = np.bincount((qs & 15).reshape(-1), minlength=16), np.bincount((qs >> 4).reshape(-1), minlength=16)
    return float(np.abs(low - high).sum() / qs.size)


def _q8(b: np.ndarray) -> dict[str, float]:
    return {"largest-number-127": float((np.abs(b["qs"].astype(np.int16)).max(axis=1) >= 127).mean())}


def _q6k(b: np.ndarray) -> dict[str, float]:
    scales = b["scales"].astype(np.int16)
    return {"largest-scale-128": float((np.abs(scales).max(axis=1) >= 127).mean())}


_MEASURES = {
    types.Q4_K: lambda b: _k4(b, REGISTRY[types.Q4_K]),  # type: ignore[arg-type]
    types.Q5_K: lambda b: _k4(b, REGISTRY[types.Q5_K]),  # type: ignore[arg-type]
    types.Q8_0: _q8,
    types.Q6_K: _q6k,
}

__all__ = ["NULLS", "Mark", "marks_of", "unlikely"]
