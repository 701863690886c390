"""Weights of importance: what such a quantiser leaves is no fault, and a fault in what it leaves is still found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, file_with

from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion.block_marks import unlikely
from aprlab.onion.layers.dtype import kept_by_importance
from aprlab.onion.peeling import peel
from aprlab.onion.row_errors import beyond, row_errors
from aprlab.quants import REGISTRY, types

NAME = "blk.0.ffn_up.weight"


def weighted(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Q4_0 as ggml writes it with importance (`make_qx_quants`): of 19 scales the one of least weighted error; uint8 (bytes,)."""
    blocks, w = x.reshape(-1, 32), np.broadcast_to(weights, x.shape).reshape(-1, 32)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)][:, None]
    best, scale, numbers = np.full(len(blocks), -1.0), np.zeros(len(blocks)), np.zeros(blocks.shape, np.int64)
    for step in range(-9, 10):
        found = np.clip(np.rint(-(8 + 0.1 * step) / largest * blocks), -8, 7)
        over, under = (w * blocks * found).sum(axis=1), (w * found * found).sum(axis=1)
        better = (under > 0) & (over * over > best * under)
        least = np.maximum(under, 1e-300)
        best[better], scale[better] = (over * over / least)[better], (over / least)[better]
        numbers[better] = found[better]
    raw = np.zeros((len(blocks), 18), np.uint8)
    raw[:, :2] = scale.astype(np.float16)[:, None].view(np.uint8)
    codes = (numbers + 8).astype(np.uint8)
    raw[:, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return raw.reshape(-1)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, np.ndarray, np.ndarray]:
    """A matrix on no grid, its weights of importance over twelve decades, and its bytes as Q4_0 by them."""
    rng = np.random.default_rng(3)
    with open_model(REF) as model:
        tensor = model.tensors[NAME]
        x = tensor.dequantise() + rng.standard_normal(tensor.shape).astype(np.float32) * np.float32(0.002)
    of = Tensor(NAME, types.F32, x.shape, x.view(np.uint8).reshape(-1), tensor.origin)
    weights = 10.0 ** rng.uniform(-6, 6, x.shape[1])
    return of, weights, weighted(x, weights)


def test_its_rows_are_beyond_the_bound_and_kept(pair: tuple[Tensor, np.ndarray, np.ndarray]) -> None:
    of, weights, raw = pair
    rows = row_errors(of, types.Q4_0, raw)
    assert rows is not None
    assert len(beyond(rows, types.F32, types.Q4_0)) > 0
    columns = kept_by_importance(of, types.Q4_0, raw)
    assert columns is not None
    assert np.median(np.log10(weights[columns])) > np.median(np.log10(weights)) + 2  # they are those that count


def _exchanged(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    b[[7, 9]] = b[[9, 7]]


def _scaled_row(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    b["d"][11] = (b["d"][11].astype(np.float32) * 1.2).astype(np.float16)


def _scaled(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    b["d"] = (b["d"].astype(np.float32) * 1.05).astype(np.float16)


def _zero_row(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    b[5] = np.zeros(1, b.dtype)


def _columns_moved(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    b[:] = weighted(np.ascontiguousarray(np.roll(x, 1, axis=1)), w).view(b.dtype).reshape(b.shape)


def _nibbles(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    b["qs"] = b["qs"] >> 4 | b["qs"] << 4


def _noise(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    noise = np.random.default_rng(1).standard_normal(x.shape) * 0.5 * x.std()
    b[:] = weighted((x + noise).astype(np.float32), w).view(b.dtype).reshape(b.shape)


def _columns_gone(b: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    some = x.copy()
    some[:, 32:64] = 0
    b[:] = weighted(some, w).view(b.dtype).reshape(b.shape)


DAMAGE: list[Callable[[np.ndarray, np.ndarray, np.ndarray], None]] = [
    _exchanged, _scaled_row, _scaled, _zero_row, _columns_moved, _nibbles, _noise, _columns_gone,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_after_it_is_found(damage: Callable[..., None], pair: tuple[Tensor, np.ndarray, np.ndarray]) -> None:
    of, weights, raw = pair
    b = np.array(raw).view(REGISTRY[types.Q4_0].layout).reshape(of.rows, -1)
    with np.errstate(all="ignore"):
        damage(b, of.dequantise(), weights)
    assert kept_by_importance(of, types.Q4_0, b.reshape(-1).view(np.uint8)) is None


def test_a_file_of_it_is_equivalent_and_has_its_marks(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)

    def uneven(tensor: Tensor) -> Tensor:
        raw = weighted(tensor.dequantise().astype(np.float64), 10.0 ** rng.uniform(-3, 3, tensor.cols))
        return Tensor(tensor.name, types.Q4_0, tensor.shape, raw, tensor.origin)

    names = [f"blk.{layer}.{part}.weight" for layer in range(4) for part in ("ffn_up", "attn_q", "attn_output")]
    path = file_with(tmp_path / "uneven.gguf", dict.fromkeys(names, uneven))
    with open_model(path) as model:
        assert unlikely(model.tensors.values()) == []
    verdict = peel(REF, path, fast=True)
    assert [f for f in verdict.findings if not f.harmless] == [], str(verdict)
