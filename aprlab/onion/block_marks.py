"""Marks that encoders leave in blocks, and what it means where they are missing. No reference is needed, and no decoding.

An encoder scales each block so that its largest number uses the whole range of its field: in Q4_K and Q5_K the largest of the
eight scales is 63, and so is the largest minimum; in Q8_0 some number is 127 or -127; in Q6_K the scale of largest size is
-128. Faults of files that lose bits, read fields elsewhere or exchange them destroy that. What healthy files have is in
`data/block-marks.toml`, with where it was measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.model.tensor import Tensor
from aprlab.quants import REGISTRY, types
from aprlab.quants.types import TensorType

BLOCKS = 2048  # of a tensor that are looked at: evenly spread
LEAST = 64  # blocks of a type; fewer tell nothing
SMALLEST_NORMAL = np.float16(2.0**-14)  # of float16


@cache
def nulls() -> dict[str, tuple[float, float]]:
    """Mark -> the least and the largest value of it that a healthy file may have."""
    with open(paths.data_dir() / "block-marks.toml", "rb") as file:
        return {name: (row["healthy"][0], row["healthy"][1]) for name, row in tomllib.load(file)["marks"].items()}


def measured(name: str, kind: TensorType) -> tuple[float, float] | None:
    """The least and the largest value of a mark that was measured on healthy files of a type; None where none was."""
    with open(paths.data_dir() / "block-marks.toml", "rb") as file:
        pair = tomllib.load(file)["marks"][name].get("measured", {}).get(kind.name)
    return None if pair is None else (pair[0], pair[1])


@dataclass(frozen=True)
class Mark:
    """One mark of a type, over all matrices of that type.

    Attributes:
        name: a key of `nulls`.
        type: of the matrices.
        value: what was measured.
        blocks: how many blocks were looked at.
    """

    name: str
    type: TensorType
    value: float
    blocks: int

    @property
    def healthy(self) -> tuple[float, float]:
        """The least and the largest value of a healthy file."""
        return nulls()[self.name]

    @property
    def likely(self) -> bool:
        """Whether a healthy file may have this value."""
        low, high = self.healthy
        return low <= self.value <= high

    def __str__(self) -> str:
        low, high = self.healthy
        return f"{self.type.name} {self.name} {self.value:.3g} (healthy: {low:g} to {high:g})"


def marks_of(tensors: Iterable[Tensor], least: int = LEAST) -> list[Mark]:
    """All marks of the matrices among `tensors`, one of each kind for each type; fewer than `least` blocks tell nothing."""
    marks = []
    for kind, b in sampled(tensors).items():
        if len(b) >= least:
            with np.errstate(all="ignore"):
                found = _scale_marks(b) | (_MEASURES[kind](b, REGISTRY[kind]) if kind in _MEASURES else {})
            marks += [Mark(name, kind, value, len(b)) for name, value in found.items()]
    return marks


def sampled(tensors: Iterable[Tensor]) -> dict[TensorType, np.ndarray]:
    """By type, blocks of its matrices as a structured array ``(n,)``, evenly spread; without those that are all zero bytes."""
    by_type: dict[TensorType, list[np.ndarray]] = {}
    for tensor in tensors:
        layout = REGISTRY[tensor.type].layout if tensor.type in REGISTRY else None
        if len(tensor.shape) != 2 or layout is None or "d" not in (layout.names or ()) or not tensor.type.quantised:
            continue
        blocks = tensor.raw.reshape(-1, tensor.type.block_bytes)
        step = max(1, len(blocks) // BLOCKS)
        part = np.ascontiguousarray(blocks[::step])
        by_type.setdefault(tensor.type, []).append(part[part.any(axis=1)])
    return {kind: np.concatenate(parts).reshape(-1).view(REGISTRY[kind].layout) for kind, parts in by_type.items()}


def unlikely(tensors: Iterable[Tensor]) -> list[Mark]:
    """Marks that no healthy file has."""
    return [mark for mark in marks_of(tensors) if not mark.likely]


# ── what is measured ──────────────────────────────────────────────────────────────────────────────────────────────


def _scale_marks(b: np.ndarray) -> dict[str, float]:
    """Of the float16 fields of any type: zero where the numbers vary, or at the smallest normal number, as no encoder has it."""
    halves = [b[name].reshape(-1) for name in b.dtype.names or () if b.dtype[name] == np.float16]
    field = next(name for name in ("qs", "ql") if name in (b.dtype.names or ()))
    numbers = b[field].reshape(len(b), -1)
    vary = numbers.max(axis=1) != numbers.min(axis=1)
    return {
        "zero-scale-with-numbers": float(((b["d"].reshape(-1) == 0) & vary).mean()),
        "scale-at-smallest-normal": float(max((np.abs(half) == SMALLEST_NORMAL).mean() for half in halves)),
    }


def _six_bit_scales(b: np.ndarray, quant: Any) -> dict[str, float]:
    scales, minima = quant.unpack_scales(b["scales"])
    d, dmin = b["d"].astype(np.float64).reshape(-1), b["dmin"].astype(np.float64).reshape(-1)
    found = {
        "largest-scale-63": _share(scales.max(axis=1) == 63),
        "largest-minimum-63": _share(minima.max(axis=1) == 63),
        "late-over-early-scales": float(scales[:, 4:].mean() / scales[:, :4].mean()),
        "late-over-early-minima": float(minima[:, 4:].mean() / minima[:, :4].mean()),
        "paired-scales-equal": _share((scales[:, 0::2] == scales[:, 1::2]).all(axis=1)),
        "late-scales-are-early-minima": _share((scales[:, 4:] == minima[:, :4]).all(axis=1)),
        "dmin-not-zero": _share(dmin != 0),
        "nibbles-alike": _nibbles(b["qs"]),
    }
    if (both := (d > 0) & (dmin > 0)).any():
        found["dmin-over-d"] = float(np.median(dmin[both] / d[both]))
    return found


def _share(holds: np.ndarray) -> float:
    return float(holds.mean())


def _nibbles(qs: np.ndarray) -> float:
    """How far the histograms of low and of high nibbles are apart: l1 distance of the shares, 0 to 2."""
    low, high = np.bincount((qs & 15).reshape(-1), minlength=16), np.bincount((qs >> 4).reshape(-1), minlength=16)
    return float(np.abs(low - high).sum() / qs.size)


def _q8(b: np.ndarray, quant: Any) -> dict[str, float]:
    return {"largest-number-127": _share(np.abs(b["qs"].astype(np.int16)).max(axis=1) >= 127)}


def _q6k(b: np.ndarray, quant: Any) -> dict[str, float]:
    scales = b["scales"].astype(np.int16)
    return {"largest-scale-128": _share(np.abs(scales).max(axis=1) >= 127)}


def _lowest(b: np.ndarray, quant: Any) -> dict[str, float]:
    """Q4_0, Q5_0: the value of largest size is the lowest number, 0."""
    numbers = quant.unpack(b) if "qh" in (b.dtype.names or ()) else quant.unpack_nibbles(b["qs"])
    return {"lowest-number-present": _share((numbers == 0).any(axis=1))}


def _both_ends(b: np.ndarray, quant: Any) -> dict[str, float]:
    """Q4_1, Q5_1: the smallest value is number 0, the largest the top one."""
    high = "qh" in (b.dtype.names or ())
    numbers = quant.unpack(b) if high else quant.unpack_nibbles(b["qs"])
    return {"both-ends-present": _share((numbers == 0).any(axis=1) & (numbers == (31 if high else 15)).any(axis=1))}


_MEASURES: dict[TensorType, Callable[[np.ndarray, Any], dict[str, float]]] = {
    types.Q4_K: _six_bit_scales, types.Q5_K: _six_bit_scales, types.Q8_0: _q8, types.Q6_K: _q6k,
    types.Q4_0: _lowest, types.Q5_0: _lowest, types.Q4_1: _both_ends, types.Q5_1: _both_ends,
}  # fmt: skip

__all__ = ["Mark", "marks_of", "measured", "nulls", "sampled", "unlikely"]
