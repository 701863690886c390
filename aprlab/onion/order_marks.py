"""Marks of order that run through all layers of a trained model: which channel or module a row or a column belongs to.

Columns of Q and K have norms by residual channel, the same channels in every layer; the rows of up, more than those of gate,
follow the columns of down; biases of keys are larger than those of values; some channels of the embedding are larger than
others. A transposition, a permutation or an exchange of modules breaks that. What healthy files have is in
`data/order-marks.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.errors import AprlabError
from aprlab.model.tensor import Tensor
from aprlab.onion.samples import sample_rows

MOST = 12  # layers that are decoded: evenly spread
LEAST = 3  # layers; of fewer, nothing is said
ROWS = 4096  # of an embedding that are decoded: evenly spread


@cache
def _table() -> dict[str, Any]:
    with open(paths.data_dir() / "order-marks.toml", "rb") as file:
        marks: dict[str, Any] = tomllib.load(file)["marks"]
        return marks


@dataclass(frozen=True)
class OrderMark:
    """One mark of a model.

    Attributes:
        name: a key of `data/order-marks.toml`.
        value: what was measured, over the layers looked at.
    """

    name: str
    value: float

    @property
    def least(self) -> float:
        """The least value of a healthy file."""
        return float(_table()[self.name]["healthy"])

    @property
    def likely(self) -> bool:
        """Whether a healthy file may have this value."""
        return self.value >= self.least

    @property
    def suggests(self) -> tuple[str, ...]:
        """Ids of the faults that break it."""
        return tuple(_table()[self.name]["suggests"])

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} (healthy: at least {self.least:g})"


def order_marks(tensors: Mapping[str, Tensor]) -> list[OrderMark]:
    """All marks that these tensors, by GGUF name, have; what is missing, misshapen or not finite has none."""
    layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("blk.")})
    chosen = [layers[n] for n in sample_rows(len(layers), MOST)] if layers else []
    if len(chosen) < LEAST:
        return []
    norms = _Norms(tensors, chosen)
    with np.errstate(all="ignore"):
        found = {
            "channels-agree": _channels_agree(norms),
            "up-follows-down": _up_follows_down(norms),
            "keys-over-values": _keys_over_values(tensors, chosen),
            "embedding-has-channels": _has_channels(tensors.get("token_embd.weight")),
            "head-has-channels": _has_channels(tensors.get("output.weight")),
        }
    return [OrderMark(name, value) for name, value in found.items() if value is not None and np.isfinite(value)]


class _Norms:
    """Logarithms of norms of rows and columns, float64, each matrix decoded once."""

    def __init__(self, tensors: Mapping[str, Tensor], layers: list[int]) -> None:
        self.tensors, self.layers = tensors, layers
        self._kept: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}

    def of(self, layer: int, part: str, axis: int) -> np.ndarray | None:
        """Of the rows (axis 0) or the columns (axis 1) of ``blk.{layer}.{part}.weight``."""
        name = f"blk.{layer}.{part}.weight"
        if name not in self._kept:
            self._kept[name] = _both(self.tensors.get(name))
        pair = self._kept[name]
        return None if pair is None else pair[axis]


def _both(tensor: Tensor | None) -> tuple[np.ndarray, np.ndarray] | None:
    if tensor is None or len(tensor.shape) != 2:
        return None
    try:
        values = tensor.dequantise()
    except AprlabError:
        return None
    squares = np.square(values, dtype=np.float64)
    return tuple(0.5 * np.log(np.maximum(squares.mean(axis=axis), 1e-30)) for axis in (1, 0))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a - a.mean(), b - b.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _channels_agree(norms: _Norms) -> float | None:
    """Median, over Q and K of all layers, of the correlation of its columns' norms with the mean of the other layers'."""
    found = []
    for part in ("attn_q", "attn_k"):
        columns = [norms.of(layer, part, 1) for layer in norms.layers]
        if any(c is None or c.shape != columns[0].shape for c in columns):  # type: ignore[union-attr]
            return None
        all_ = np.stack(columns)  # type: ignore[arg-type]
        total = all_.sum(axis=0)
        found += [_correlation(one, total - one) for one in all_]
    return float(np.median(found))


def _up_follows_down(norms: _Norms) -> float | None:
    """How much more the rows of up go with the columns of down than those of gate do, in either direction; mean of layers."""
    found = []
    for layer in norms.layers:
        gate, up, down = norms.of(layer, "ffn_gate", 0), norms.of(layer, "ffn_up", 0), norms.of(layer, "ffn_down", 1)
        if gate is None or up is None or down is None or not gate.shape == up.shape == down.shape:
            return None
        found.append(abs(_correlation(up, down)) - abs(_correlation(gate, down)))
    return float(np.mean(found))


def _keys_over_values(tensors: Mapping[str, Tensor], layers: list[int]) -> float | None:
    """Median over the layers of ln(rms of K's bias / rms of V's bias)."""
    found = []
    for layer in layers:
        pair = [tensors.get(f"blk.{layer}.attn_{part}.bias") for part in "kv"]
        if any(t is None or t.type.quantised for t in pair):
            return None
        k, v = (float(np.square(t.dequantise(), dtype=np.float64).mean()) for t in pair if t is not None)
        if not (k > 0 and v > 0):
            return None
        found.append(0.5 * np.log(k / v))
    return float(np.median(found))


def _has_channels(tensor: Tensor | None) -> float | None:
    """ln of how much more the norms of the columns differ than those of as many random numbers would."""
    if tensor is None or len(tensor.shape) != 2 or tensor.rows <= tensor.cols:
        return None
    try:
        values = tensor.dequantise(sample_rows(tensor.rows, ROWS))
    except AprlabError:
        return None
    spread = 0.5 * np.log(np.maximum(np.square(values, dtype=np.float64).mean(axis=0), 1e-30)).std()
    return float(np.log(spread * np.sqrt(2 * len(values))))


__all__ = ["OrderMark", "order_marks"]
