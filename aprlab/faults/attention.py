"""E, continued: faults inside attention, and of the numbers that it is given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from aprlab.conversion.seams import Seams
from aprlab.engines.base import Array, Cache, Engine
from aprlab.engines.delegating import DelegatingEngine
from aprlab.faults.base import Fault, lines
from aprlab.model.config import ModelConfig
from aprlab.model.rope import RopeScaling


class PlainAttention(DelegatingEngine):
    """Grouped attention in NumPy; a fault overrides one of its steps. As it stands it is healthy.

    Keys and values are in the cache of the engine below, written by that engine's own attention, so that the two may take
    turns on one cache.
    """

    prompt_end = 0  # where the last pass of several positions ended
    _next = 0

    def stored(self, part: Array, layer: int, end: int, kv_heads: int) -> np.ndarray:
        """The first `end` positions of a cache's keys or values, ``(end, Hkv, D)``, from whichever layout an engine has."""
        if getattr(part, "ndim", 3) == 5:  # jit's keys: (layers, Hkv, blocks, D, 8)
            runs = part[layer].swapaxes(-1, -2)
            return np.ascontiguousarray(runs.reshape(kv_heads, -1, runs.shape[-1])[:, :end].swapaxes(0, 1))
        if getattr(part, "ndim", 3) == 4:  # (layers, Hkv, capacity, D)
            return np.ascontiguousarray(part[layer, :, :end].swapaxes(0, 1))
        rows = self.to_numpy(part)[layer, :end]  # the kernels': (layers, capacity, Hkv * D)
        return np.ascontiguousarray(rows.reshape(end, kv_heads, -1))

    def keys(self, stored: np.ndarray) -> np.ndarray:
        """Step: keys as they come out of the cache, ``(n, Hkv, D)``."""
        return stored

    def visible(self, stored: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Step: the keys or values that these positions see, ``(n, Hkv, D)``."""
        return stored

    def scores(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Step: scaled products, ``(Hkv, group, T, n)``."""
        return queries @ keys.swapaxes(-1, -2) * np.float32(1 / math.sqrt(queries.shape[-1]))

    def soften(self, scores: np.ndarray) -> np.ndarray:
        """Step: softmax over the last axis."""
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        queries, (count, heads, size), kv_heads = self.to_numpy(q), q.shape, k.shape[1]
        self.inner.attend(q, k, v, cache, layer, positions)  # only to fill the cache
        start, end = int(positions[0]), int(positions[-1]) + 1
        if count > 1 or start == 0:
            self.prompt_end = end
        elif layer == 0 and start != self._next:  # another engine ran the prompt
            self.prompt_end = start
        self._next = end
        keys, values = (self.visible(self.stored(part, layer, end, kv_heads), positions) for part in (cache.k, cache.v))
        keys, values = self.keys(keys).transpose(1, 0, 2)[:, None], values.transpose(1, 0, 2)[:, None]  # (Hkv, 1, n, D)
        grouped = queries.reshape(count, kv_heads, heads // kv_heads, size).transpose(1, 2, 0, 3)  # (Hkv, group, T, D)
        scores = self.scores(grouped, keys)
        scores[..., np.arange(end) > positions[:, None]] = -np.inf
        mixed = (self.soften(scores) @ values).transpose(2, 0, 1, 3)  # (T, Hkv, group, D)
        return self.from_numpy(np.ascontiguousarray(mixed.reshape(count, heads * size), np.float32))


class HalfScores(PlainAttention):
    """The product of query and key in float16, before it is scaled down."""

    def scores(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half = (queries @ keys.swapaxes(-1, -2)).astype(np.float16)
        return half.astype(np.float32) * np.float32(1 / math.sqrt(queries.shape[-1]))


def four_bits(x: np.ndarray, group: int = 32) -> np.ndarray:
    """float32 ``(…, D)`` rounded to 16 levels between the least and the greatest of each run of `group` values."""
    run = math.gcd(group, x.shape[-1])
    parts = x.reshape(*x.shape[:-1], -1, run)
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    step = (high - low) / np.float32(15)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.where(step > 0, np.rint((parts - low) / step), np.float32(0))
    return (low + levels * step).reshape(x.shape)


class FourBitKeys(PlainAttention):
    """Cached keys have four bits."""

    def keys(self, stored: np.ndarray) -> np.ndarray:
        return four_bits(stored)


class SlotZero(PlainAttention):
    """While decoding, the prompt's keys and values are all in slot 0, where the last one written is left; its other slots are
    zeros. Passes of several positions do not read them back."""

    def visible(self, stored: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if len(positions) > 1 or positions[0] == 0:
            return stored
        seen, end = stored.copy(), self.prompt_end
        seen[0], seen[1:end] = stored[end - 1], 0
        return seen


ZERO_ROWS = 2048  # upstream's longest context


class ZeroPrefix(PlainAttention):
    """So many rows of zeros before the real ones: each adds exp(0) to every softmax."""

    def soften(self, scores: np.ndarray) -> np.ndarray:
        most = np.maximum(scores.max(-1, keepdims=True), 0)
        weights = np.exp(scores - most)
        return weights / (weights.sum(-1, keepdims=True) + ZERO_ROWS * np.exp(-most))


class NoRope(DelegatingEngine):
    """Queries and keys are not rotated."""

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        return self.from_numpy(np.array(self.to_numpy(x), np.float32))


class Thirds(DelegatingEngine):
    """The fused output of Q, K and V cut into three equal parts, although K and V are narrower.

    A part that is too short for its place is filled up with zeros, one that is too long is cut off.
    """

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.fused: tuple[str, np.ndarray] = ("", np.zeros((0, 0), np.float32))

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        found = re.fullmatch(r"(blk\.\d+)\.attn_([qkv])\.weight", weight)
        if found is None:
            return self.inner.matmul(x, weight, bias)
        layer, which = found[1], "qkv".index(found[2])
        own = self.to_numpy(self.inner.matmul(x, weight, bias))
        if which == 0 or self.fused[0] != layer or len(self.fused[1]) != len(own):
            parts = [self.inner.matmul(x, f"{layer}.attn_{p}.weight", bias and f"{layer}.attn_{p}.bias") for p in "qkv"]
            self.fused = layer, np.concatenate([self.to_numpy(part) for part in parts], axis=1)
        third = self.fused[1].shape[1] // 3
        part = self.fused[1][:, which * third : (which + 1) * third][:, : own.shape[1]]
        out = np.zeros_like(own)
        out[:, : part.shape[1]] = part
        return self.from_numpy(out)


# ── head sizes ────────────────────────────────────────────────────────────────────────────────────────────────────

_HEADS, _KV_HEADS = ("num_heads", "num_attention_heads"), ("num_kv_heads", "num_key_value_heads")


def halve_heads(config: ModelConfig) -> ModelConfig:
    """Twice as many heads, half as wide."""
    return replace(
        config, head_count=2 * config.head_count, head_count_kv=2 * config.head_count_kv, head_dim=config.head_dim // 2
    )


def _present(known: Iterable[str], found: Mapping[str, Any]) -> str:
    """The one of these keys that is there; a generator turns `next`'s StopIteration into another error."""
    for key in known:
        if key in found:
            return key
    raise KeyError(*known)


def write_halved_heads(s: Seams) -> Seams:
    """The same in a file."""

    def changed(metadata: dict[str, Any]) -> dict[str, Any]:
        found = s.metadata(metadata)
        heads, kv_heads = (_present(known, found) for known in (_HEADS, _KV_HEADS))
        head_dim = found.get("head_dim", found["hidden_size"] // found[heads])
        return {**found, heads: 2 * found[heads], kv_heads: 2 * found[kv_heads], "head_dim": head_dim // 2}

    return replace(s, metadata=changed)


FAULTS = (
    Fault(
        "head-dim-halved", "head_dim halved: twice as many heads, half as wide", "config", "E",
        lines(
            "No config.json was next to the file, so head_dim was guessed, and 64 was tried before 128.",
            "A 1.5B (12 heads on 2 of size 128) was run as 24 on 4 of size 64: all products of shapes are right.",
            "RoPE's pairs, the softmax scale and the heads are wrong; the 0.5B, whose heads are 64 wide, was right.",
        ),
        "First difference at layers.0.q_rope; q, k and v are the same numbers in another shape.",
        seams=write_halved_heads, config=halve_heads,
    ),
    Fault(
        "no-rope", "No rotary embedding", "forward", "E",
        lines(
            "The GPU path went from projection to attention without RoPE.",
            "Attention cannot tell one order of the words from another.",
            "Position 0 needs no rotation, so a test with a single token passes.",
        ),
        "layers.0.q_rope equals q: position 0 exact, wrong from position 1 on.",
        engine=NoRope,
    ),
    Fault(
        "kq-fp16", "Query times key in float16, before scaling", "forward", "E",
        lines(
            "The scores were computed in float16 and scaled by 1/sqrt(D) afterwards (llama.cpp #7805, #8412).",
            "Qwen2's K biases make products beyond 65504: infinite, then NaN in the softmax, then a flood of one letter.",
            "Models with small keys only lose digits: the embedded one answers as ever, the 1.5B says NaN at once.",
        ),
        "layers.0.attn off by a few thousandths; where a product passes 65504, NaN from there on.",
        engine=HalfScores,
    ),
    Fault(
        "kv-q4", "Cached keys in four bits", "forward", "E",
        lines(
            "The cache keeps keys in groups of 32 with 16 levels each (llama.cpp #21385, transformers #35185).",
            "Qwen2's K biases are a hundred times its other keys, so they use up the range of their groups.",
            "Other models lose a little quality, Qwen2 all of it.",
        ),
        "q, k and v equal, attention wrong at every position.",
        engine=FourBitKeys,
    ),
    Fault(
        "kv-slot-zero", "All keys and values of the prompt written to slot 0", "forward", "E",
        lines(
            "The position of a batch was the same for all of its tokens: 0.",
            "The prompt's own pass attends to what it has at hand and is right; decoding reads back one token and zeros.",
            "The first token of the answer is correct.",
        ),
        "Prefill exact; in decode, attention sees the prompt's last token at position 0 and zeros after it.",
        engine=SlotZero,
    ),
    Fault(
        "kv-zero-prefix", "A cache's worth of zero rows in front of the real ones", "forward", "E",
        lines(
            "The buffer for the longest context was put in front of the new keys, and all of it took part.",
            "Every zero row has a score of 0 and a value of 0: it takes a share of the softmax and gives nothing.",
            "All outputs of attention have the right direction and are too small.",
        ),
        "layers.0.attn is the right vector times a factor below 1, another one for each head and position.",
        engine=ZeroPrefix,
    ),
    Fault(
        "qkv-thirds", "Fused Q, K, V cut into three equal parts", "forward", "E",
        lines(
            "The width of each part was taken as out/3.",
            "With grouped queries Q is wider than K and V, so K and V begin inside Q.",
            "A model with as many kv heads as query heads is right.",
        ),
        "layers.0.q: the end of every row is zero; k and v are values of q and of each other.",
        engine=Thirds,
    ),
)  # fmt: skip
