"""The reference engine: float32 activations and weights, plain NumPy; the one to read, and the one to compare others with.

Weights are dequantised by blocks of rows. Where memory allows, the result is kept, since decoding with NumPy costs far
more than multiplying; else every pass decodes each block again and memory stays small.
"""

from __future__ import annotations

import math

import numpy as np
import psutil

from aprlab.engines.base import Cache, Engine, is_small
from aprlab.engines.blas import blas_threads
from aprlab.errors import FormatError, UnsupportedError
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling, frequencies
from aprlab.model.tensor import Tensor
from aprlab.model.window import hidden

_BLOCK_BYTES = 8 << 20  # float32 bytes decoded at a time
_QUERY_BLOCK = 128  # queries per block of attention scores: bounds them to 128 * group * positions floats a head


class ReferenceEngine(Engine):
    """NumPy, float32.

    Args:
        model: the weights.
        threads: threads of NumPy's BLAS during a product; None leaves its own default. A small model gets one: its
            products gain nothing from a second, and a BLAS thread that waits for another burns a whole core.
        cache_weights: keep dequantised weights (True), decode them again each time (False), or decide by what they
            need against the memory that is free now (None): they are kept if they take at most half of it.
    """

    name = "reference"
    contract = "f32"

    def __init__(self, model: Model, threads: int | None = None, cache_weights: bool | None = None) -> None:
        super().__init__(model, threads)
        self._blas_threads = 1 if is_small(model) else threads
        if cache_weights is None:
            cache_weights = 4 * sum(t.size for t in self._cacheable()) <= psutil.virtual_memory().available // 2
        self.cache_weights = cache_weights
        self._kept: dict[str, np.ndarray] = {}
        self._vectors: dict[tuple[str, int], np.ndarray] = {}

    # -- weights -------------------------------------------------------------------------------------------------

    def _cacheable(self) -> list[Tensor]:
        """The matrices that are multiplied by; the embedding is among them only where it is the output too."""
        tied = "output.weight" not in self.model.tensors
        return [t for name, t in self.model.tensors.items() if len(t.shape) == 2 and (tied or name != "token_embd.weight")]

    def _matrix(self, tensor: Tensor) -> np.ndarray:
        """float32 ``(rows, cols)``, kept for the next time."""
        if tensor.name not in self._kept:
            whole = np.empty(tensor.shape, np.float32)
            for rows in _row_blocks(tensor):
                whole[rows] = tensor.dequantise(rows)
            self._kept[tensor.name] = whole
        return self._kept[tensor.name]

    def _vector(self, name: str, length: int) -> np.ndarray:
        if (name, length) not in self._vectors:
            self._vectors[name, length] = self.vector(name, length).dequantise()
        return self._vectors[name, length]

    def warm(self) -> None:
        """Decode every weight that will be kept."""
        if self.cache_weights:
            for tensor in self._cacheable():
                self._matrix(tensor)

    def memory(self) -> dict[str, int]:
        """Bytes of dequantised weights."""
        return {"weights": sum(w.nbytes for w in (*self._kept.values(), *self._vectors.values()))}

    def close(self) -> None:
        """Forget the dequantised weights."""
        self._kept.clear()
        self._vectors.clear()

    # -- moving in and out ---------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        shape = (config.block_count, config.head_count_kv, capacity, config.head_dim)
        return Cache(np.empty(shape, np.float32), np.empty(shape, np.float32), capacity, window=config.sliding_window)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def embed(self, tokens: np.ndarray, weight: str) -> np.ndarray:
        return self.matrix(weight).dequantise(tokens)

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)  # (T, 1); double, as ggml sums it
        scale = (1 / np.sqrt(mean + eps)).astype(np.float32)
        return x * scale * self._vector(weight, x.shape[-1])

    def matmul(self, x: np.ndarray, weight: str, bias: str | None = None) -> np.ndarray:
        tensor = self.matrix(weight, x.shape[-1])
        with blas_threads(self._blas_threads):
            if self.cache_weights:
                y = x @ self._matrix(tensor).T  # (T, cols) @ (cols, rows)
            else:
                y = np.empty((x.shape[0], tensor.rows), np.float32)
                for rows in _row_blocks(tensor):
                    np.matmul(x, tensor.dequantise(rows).T, out=y[:, rows])
                    tensor.release(rows)
        return y if bias is None else y + self._vector(bias, tensor.rows)

    def rope(
        self, x: np.ndarray, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        half = x.shape[-1] // 2
        divisors = None if factors is None else self._vector(factors, half)
        angles = positions[:, None] * frequencies(theta, half, scaling, divisors)  # float64 (T, D/2)
        length = 1.0 if scaling is None else scaling.length
        cos, sin = ((f(angles) * length).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))  # (T, 1, D/2)
        if style == "neox":
            first, second = slice(0, half), slice(half, 2 * half)
        elif style == "norm":
            first, second = slice(0, None, 2), slice(1, None, 2)
        else:
            raise UnsupportedError(
                f"rotary style {style!r}; known: 'neox' (halves), 'norm' (adjacent pairs)", code="engines.unknown-rotary-style"
            )
        a, b = x[..., first], x[..., second]
        turned = np.empty_like(x)
        turned[..., first] = a * cos - b * sin
        turned[..., second] = a * sin + b * cos
        return turned

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Cache, layer: int, positions: np.ndarray) -> np.ndarray:
        (count, heads, size), kv_heads = q.shape, k.shape[1]
        group, rest = divmod(heads, kv_heads)
        if rest:
            raise FormatError(
                f"{heads} query heads do not share {kv_heads} key/value heads evenly", code="config.heads-not-shared"
            )
        start, end = int(positions[0]), int(positions[-1]) + 1
        cache.k[layer, :, start:end] = k.transpose(1, 0, 2)  # (Hkv, T, D)
        cache.v[layer, :, start:end] = v.transpose(1, 0, 2)

        y = np.empty((count, kv_heads, group, size), np.float32)
        for first in range(0, count, _QUERY_BLOCK):
            block = slice(first, min(first + _QUERY_BLOCK, count))
            seen = start + block.stop  # no query of this block looks at a later position
            keys, values = cache.k[layer, :, None, :seen], cache.v[layer, :, None, :seen]  # (Hkv, 1, n, D)
            queries = q[block].reshape(-1, kv_heads, group, size).transpose(1, 2, 0, 3)  # (Hkv, group, t, D)
            with blas_threads(self._blas_threads):
                scores = queries @ keys.swapaxes(-1, -2) * np.float32(1 / math.sqrt(size))  # (Hkv, group, t, n)
            scores[..., hidden(seen, positions[block], cache.window)] = -np.inf  # nothing looks ahead
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            with blas_threads(self._blas_threads):
                y[block] = (scores @ values).transpose(2, 0, 1, 3)  # (t, Hkv, group, D)
        return y.reshape(count, heads * size)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right 0
            return gate / (1 + np.exp(-gate)) * up

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b


def _row_blocks(tensor: Tensor) -> list[slice]:
    """Slices that together are all rows, about `_BLOCK_BYTES` of float32 each."""
    step = max(1, _BLOCK_BYTES // (4 * tensor.cols))
    return [slice(row, min(row + step, tensor.rows)) for row in range(0, tensor.rows, step)]
