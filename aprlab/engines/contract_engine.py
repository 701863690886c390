"""A contract, simulated: each operation in float64, rounded where the contract rounds, and nowhere else.

With no rounding at all it is the exact answer that other engines are judged by. In float32 it shows what plain float32
arithmetic may do. Neither is fast, and neither is meant to answer prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from aprlab.engines import roundings
from aprlab.engines.base import Cache, Engine
from aprlab.engines.contracts import Contract
from aprlab.errors import FormatError, UnsupportedError
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling, frequencies
from aprlab.model.tensor import Tensor
from aprlab.model.window import hidden

_BLOCK = 8 << 20  # values of a matrix decoded at a time
_KEPT = 32 << 20  # values of all matrices of a model up to which they are kept, decoded
_QUERIES = 128


class Weights:
    """A model's matrices, decoded once for several engines: kept where they are few, else given block by block."""

    def __init__(self, model: Model) -> None:
        self._small = sum(t.size for t in model.tensors.values()) <= _KEPT
        self._kept: dict[int, np.ndarray] = {}  # by the tensor's identity: a fault may have another of the same name
        self._held: list[Tensor] = []

    def products(self, tensor: Tensor, sides: Sequence[tuple[np.ndarray, np.dtype[Any], roundings.Rounding]]) -> list[np.ndarray]:
        """Each x ``(T, cols)`` times the transpose of the matrix, in its own dtype, its weights rounded in its own way."""
        out = [np.empty((len(x), tensor.rows), dtype) for x, dtype, _ in sides]
        step = max(1, _BLOCK // tensor.cols)
        for first in range(0, tensor.rows, step):
            rows = slice(first, min(first + step, tensor.rows))
            block = self._block(tensor, rows)
            for y, (x, dtype, rounding) in zip(out, sides, strict=True):
                np.matmul(x.astype(dtype, copy=False), rounding(block).astype(dtype).T, out=y[:, rows])
        return out

    def _block(self, tensor: Tensor, rows: slice) -> np.ndarray:
        if not self._small:
            block = tensor.dequantise(rows)
            tensor.release(rows)
            return block
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor.dequantise()
            self._held.append(tensor)  # so that nothing else gets its identity
        return self._kept[id(tensor)][rows]


class ContractEngine(Engine):
    """float64 (or float32) arithmetic with the roundings of one contract.

    Args:
        model: the weights.
        contract: what is rounded.
        dtype: of the arithmetic between the roundings.
        weights: decoded matrices to share.
        exact_rope: angles in float64; else as ggml has them, each the one before times a constant, in float32.

    `half_sums` says whether flash attention keeps its sums in the cache's type, as ggml does for few queries, and `scale_by` what
    the scores of attention are multiplied with besides; both may be changed. `unrounded` is the last operation's result before
    its last rounding, None where the contract keeps values in float32. `lean` is what part of itself a value gets before it is
    rounded: a little of it shows what would have been rounded the other way.
    """

    name = "contract"

    def __init__(
        self, model: Model, contract: Contract | None = None, *, dtype: type[np.floating[Any]] = np.float64,
        weights: Weights | None = None, exact_rope: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.rules = contract if contract is not None else Contract()
        self.contract, self.dtype, self.exact_rope = str(self.rules), np.dtype(dtype), exact_rope
        self.weights = weights if weights is not None else Weights(model)
        self.half_sums = self.rules.flash and self.rules.cache != "f32" and self.rules.values == "f32"
        self.scale_by, self.lean = 1.0, 0.0
        self.unrounded: np.ndarray | None = None
        self._value, self._store = roundings.FLOATS[self.rules.values], roundings.FLOATS[self.rules.cache]

    def over(self, model: Model) -> ContractEngine:
        """The same arithmetic over another model; decoded weights are shared."""
        return ContractEngine(model, self.rules, dtype=self.dtype.type, weights=self.weights, exact_rope=self.exact_rope)

    # -- moving in and out -----------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, self.dtype)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        shape = (config.block_count, config.head_count_kv, capacity, config.head_dim)
        return Cache(np.zeros(shape, self.dtype), np.zeros(shape, self.dtype), capacity, window=config.sliding_window)

    def memory(self) -> dict[str, int]:
        return {}

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def as_value(self, x: np.ndarray) -> np.ndarray:
        """A value as it leaves an operation."""
        if self.rules.values == "f32":
            return x
        return self._value((x + self.lean * np.abs(x) if self.lean else x).astype(np.float32)).astype(self.dtype)

    def _result(self, x: np.ndarray) -> np.ndarray:
        """The result of an operation: a value, and what it was before it became one."""
        self.unrounded = None if self.rules.values == "f32" else x
        return self.as_value(x)

    def embed(self, tokens: np.ndarray, weight: str) -> np.ndarray:
        return self._result(self.matrix(weight).dequantise(tokens).astype(self.dtype))

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + self.dtype.type(eps))
        w = self._value(self.vector(weight, x.shape[-1]).dequantise()).astype(self.dtype)
        return self._result(self.as_value(x * scale) * w)

    def side(self, x: np.ndarray, tensor: Tensor) -> tuple[np.ndarray, np.dtype[Any], roundings.Rounding]:
        """What `Weights.products` needs for x: as this contract rounds it for a weight of that type."""
        rounding = roundings.for_weight(self.rules.activations, tensor.type)
        plain = self.rules.activations == "f32" or rounding is roundings.f32
        return (x if plain else rounding(x.astype(np.float32))), self.dtype, self._value

    def biased(self, y: np.ndarray, bias: str | None) -> np.ndarray:
        """A product with its bias, as it leaves the operation."""
        return self._result(y if bias is None else y + self._value(self.vector(bias, y.shape[-1]).dequantise()))

    def matmul(self, x: np.ndarray, weight: str, bias: str | None = None) -> np.ndarray:
        tensor = self.matrix(weight, x.shape[-1])
        return self.biased(self.weights.products(tensor, [self.side(x, tensor)])[0], bias)

    def rope(
        self, x: np.ndarray, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        half = x.shape[-1] // 2
        length = 1.0 if scaling is None else scaling.length
        if self.exact_rope or scaling is not None or factors is not None:
            rates = frequencies(theta, half, scaling, None if factors is None else self.vector(factors, half).dequantise())
            angles = positions[:, None] * rates
        else:
            step = np.float32(theta) ** np.float32(-1 / half)
            rows = [positions.astype(np.float32)]
            for _ in range(half - 1):
                rows.append(rows[-1] * step)
            angles = np.stack(rows, axis=1)
        cos, sin = (self.as_value((f(angles) * length).astype(self.dtype)[:, None, :]) for f in (np.cos, np.sin))
        if style == "neox":
            first, second = slice(0, half), slice(half, 2 * half)
        elif style == "norm":
            first, second = slice(0, None, 2), slice(1, None, 2)
        else:
            said = f"rotary style {style!r}; known: 'neox' (halves), 'norm' (adjacent pairs)"
            raise UnsupportedError(said, code="engines.unknown-rotary-style")
        a, b = x[..., first], x[..., second]
        turned = np.empty_like(x)
        part = self.as_value  # of a sum of products, each is a value of its own
        turned[..., first], turned[..., second] = part(a * cos) - part(b * sin), part(a * sin) + part(b * cos)
        return self._result(turned)

    def _stored(self, x: np.ndarray) -> np.ndarray:
        return x if self.rules.cache == "f32" else self._store(x.astype(np.float32)).astype(self.dtype)

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Cache, layer: int, positions: np.ndarray
    ) -> np.ndarray:
        (count, heads, size), kv_heads = q.shape, k.shape[1]
        group, rest = divmod(heads, kv_heads)
        if rest:
            said = f"{heads} query heads do not share {kv_heads} key/value heads evenly"
            raise FormatError(said, code="config.heads-not-shared")
        start, end = int(positions[0]), int(positions[-1]) + 1
        cache.k[layer, :, start:end] = self._stored(k).transpose(1, 0, 2)
        cache.v[layer, :, start:end] = self._stored(v).transpose(1, 0, 2)
        y = np.empty((count, kv_heads, group, size), self.dtype)
        for first in range(0, count, _QUERIES):
            block = slice(first, min(first + _QUERIES, count))
            seen = start + block.stop
            keys, values = cache.k[layer, :, None, :seen], cache.v[layer, :, None, :seen]  # (Hkv, 1, n, D)
            asked = self._stored(q[block]).reshape(-1, kv_heads, group, size).transpose(1, 2, 0, 3)
            scores = asked @ keys.swapaxes(-1, -2)  # (Hkv, group, t, n)
            if not self.rules.flash:
                scores = self.as_value(scores)  # of separate operations, each has values
            scores = scores * self.dtype.type(self.scale_by / math.sqrt(size))
            if not self.rules.flash:
                scores = self.as_value(scores)
            scores[..., hidden(seen, positions[block], cache.window)] = -np.inf
            if self.half_sums:
                y[block] = _running_softmax(scores, values, self._store).transpose(2, 0, 1, 3)
                continue
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            total = scores.sum(-1, keepdims=True)
            if not self.rules.flash:
                scores = self._stored(scores / total)  # what meets halves in a product is rounded to halves
                total = np.ones_like(total)
            elif self.rules.values != "f32":
                scores = self._stored(scores)  # torch rounds before it divides
            y[block] = (scores @ values / total).transpose(2, 0, 1, 3)
        return self._result(y.reshape(count, heads * size))

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return self._result(self.as_value(gate / (1 + np.exp(-gate))) * up)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self._result(a + b)


def _running_softmax(scores: np.ndarray, values: np.ndarray, store: roundings.Rounding) -> np.ndarray:
    """Key by key, as ggml's flash attention goes: the sum of values is kept in the cache's type, its weight in float32.

    Args:
        scores: (Hkv, group, t, n), -inf where a query does not look.
        values: (Hkv, 1, n, D).
        store: to the cache's type.

    Returns:
        (Hkv, group, t, D).
    """
    highest = np.full(scores.shape[:-1], -np.inf)
    total = np.zeros(scores.shape[:-1])
    kept = np.zeros((*scores.shape[:-1], values.shape[-1]), np.float32)
    for n in range(scores.shape[-1]):
        score = scores[..., n]
        seen = np.isfinite(score)
        higher = seen & (score > highest)
        with np.errstate(invalid="ignore"):
            shrunk = np.where(higher, np.exp(highest - np.where(higher, score, 0)), 1.0)
            weight = np.where(higher, 1.0, np.where(seen, np.exp(score - np.where(seen, highest, 0)), 0.0))
        highest = np.where(higher, score, highest)
        kept = np.where(higher[..., None], store((kept * shrunk[..., None]).astype(np.float32)), kept)
        kept = np.where(seen[..., None], store((kept + values[:, :, n, None] * weight[..., None]).astype(np.float32)), kept)
        total = total * shrunk + weight
    return np.asarray(kept / total[..., None])
