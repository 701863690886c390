"""The fast CPU engine: kernels compiled by numba, on the quantised blocks as they lie in the file.

One token goes through fused mat-vec kernels; many tokens through tiles of decoded rows and BLAS. Nothing is decoded
ahead: memory is the file's pages, the cache, and one tile.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import ThreadpoolController

from aprlab.engines.base import Cache, Engine
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.model import Model, ModelConfig, Tensor
from aprlab.simd import isa as isas
from aprlab.simd import kernels
from aprlab.types import F32

_TILE_VALUES = 1 << 20  # decoded values of a tile: 4 MiB
_PARALLEL_VALUES = 1 << 14  # below this, handing work to threads costs more than it saves


class JitEngine(Engine):
    """numba kernels with explicit SIMD.

    Args:
        model: the weights.
        threads: threads of kernels and BLAS; None takes every core this process may use.
        simd: instruction set by name (`aprlab.simd.isa.NAMES`); None takes `APRLAB_SIMD`, else the best one here.

    Raises:
        UsageError: more threads than numba was started with, or an instruction set that cannot run here.
    """

    name: ClassVar[str] = "jit"
    contract = "f32"

    def __init__(self, model: Model, threads: int | None = None, simd: str | None = None) -> None:
        super().__init__(model, threads)
        self.isa = isas.choose(simd)
        self.tasks = kernels.check_threads(threads)
        self._weights: dict[str, tuple[kernels.Kind, np.ndarray, int]] = {}
        self._decoded: dict[str, np.ndarray] = {}  # whole matrices of types without a kernel
        self._vectors: dict[str, np.ndarray] = {}
        self._turns: dict[tuple[float, int], tuple[np.ndarray, np.ndarray]] = {}
        self._tile = np.empty(0, np.float32)
        self._blas = ThreadpoolController()

    # -- weights -------------------------------------------------------------------------------------------------

    def _matrix(self, tensor: Tensor) -> tuple[kernels.Kind, np.ndarray, int]:
        """(kind, read-only bytes 1-D, bytes a row); types without a kernel are decoded once, to float32."""
        found = self._weights.get(tensor.name)
        if found is None:
            kind = kernels.KINDS.get(tensor.type)
            if kind is None or type(tensor) is not Tensor:  # a subclass may decode in its own way
                raw = self._decoded[tensor.name] = tensor.dequantise().reshape(-1).view(np.uint8)
                kind, row_bytes = kernels.KINDS[F32], 4 * tensor.cols
            else:
                raw, row_bytes = tensor.raw, tensor.type.row_bytes(tensor.cols)
            found = self._weights[tensor.name] = kind, kernels.frozen(raw), row_bytes
        return found

    def _vector(self, name: str, length: int) -> np.ndarray:
        found = self._vectors.get(name)
        if found is None:
            found = self._vectors[name] = np.ascontiguousarray(self.vector(name, length).dequantise(), np.float32)
        return found

    def memory(self) -> dict[str, int]:
        """Bytes of decoded weights (types without a kernel, vectors), of the tile, of the rotary tables."""
        kept = (*self._decoded.values(), *self._vectors.values())
        return {
            "weights": sum(w.nbytes for w in kept),
            "tile": self._tile.nbytes,
            "rotary": sum(c.nbytes + s.nbytes for c, s in self._turns.values()),
        }

    def close(self) -> None:
        """Forget decoded weights and buffers."""
        for held in (self._weights, self._decoded, self._vectors, self._turns):
            held.clear()
        self._tile = np.empty(0, np.float32)

    # -- moving in and out ---------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        if config.head_dim % 8:
            raise UnsupportedError(f"heads of {config.head_dim} values: engine 'jit' needs a multiple of 8")
        room = -(-capacity // 8) * 8
        keys = np.zeros((config.block_count, config.head_count_kv, room // 8, config.head_dim, 8), np.float32)
        values = np.zeros((config.block_count, config.head_count_kv, room, config.head_dim), np.float32)
        return Cache(keys, values, capacity)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def embed(self, tokens: np.ndarray, weight: str) -> np.ndarray:
        tensor = self.matrix(weight)
        kind, raw, row_bytes = self._matrix(tensor)
        out = np.empty((len(tokens), tensor.cols), np.float32)
        kernels.embed_rows(self.isa, kind, raw, row_bytes, tokens, out)
        return out

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        out = np.empty_like(x)
        kernels.rms_norm(_plain(x), self._vector(weight, x.shape[-1]), float(eps), out)
        return out

    def matmul(self, x: np.ndarray, weight: str, bias: str | None = None) -> np.ndarray:
        tensor = self.matrix(weight, x.shape[-1])
        count, rows = x.shape[0], tensor.rows
        plus = None if bias is None else self._vector(bias, rows)
        y = np.empty((count, rows), np.float32)
        if count <= self._fused_until(tensor):
            for t in range(count):
                self._matvec(tensor, x[t], y[t])
        else:
            self._tiled(tensor, _plain(x), y)
        if plus is not None:
            y += plus
        return y

    def _fused_until(self, tensor: Tensor) -> int:
        """Largest number of tokens for which one mat-vec a token beats decoding and BLAS."""
        return 4

    def _matvec(self, tensor: Tensor, x: np.ndarray, y: np.ndarray) -> None:
        kind, raw, row_bytes = self._matrix(tensor)
        if self.tasks > 1 and tensor.size >= _PARALLEL_VALUES:
            kernels.matvec_parallel(self.isa, kind, raw, row_bytes, x, y, self.tasks)
        else:
            kernels.matvec_serial(self.isa, kind, raw, row_bytes, x, y)

    def _tiled(self, tensor: Tensor, x: np.ndarray, y: np.ndarray) -> None:
        """Rows are decoded tile by tile and multiplied by BLAS."""
        kind, raw, row_bytes = self._matrix(tensor)
        cols, step = tensor.cols, max(16, _TILE_VALUES // tensor.cols // 16 * 16)
        if self._tile.size < step * cols:
            self._tile = np.empty(step * cols, np.float32)
        with self._blas.limit(limits=self.tasks, user_api="blas"):
            for first in range(0, tensor.rows, step):
                last = min(first + step, tensor.rows)
                part = raw[first * row_bytes : last * row_bytes]
                tile = self._tile[: (last - first) * cols]
                if self.tasks > 1:
                    kernels.decode_parallel(self.isa, kind, part, tile.size, tile, self.tasks)
                else:
                    kernels.decode_serial(self.isa, kind, part, tile.size, tile)
                np.matmul(x, tile.reshape(last - first, cols).T, out=y[:, first:last])

    def rope(self, x: np.ndarray, positions: np.ndarray, theta: float, style: str) -> np.ndarray:
        if style not in ("neox", "norm"):
            raise UnsupportedError(f"rotary style {style!r}; known: 'neox' (halves), 'norm' (adjacent pairs)")
        start, count = int(positions[0]), len(positions)
        cos, sin = self._rotary(float(theta), x.shape[-1] // 2, start + count)
        out = np.empty_like(x)
        kernels.rotate(_plain(x), cos, sin, start, style == "neox", out)
        return out

    def _rotary(self, theta: float, half: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 ``(at least end, D/2)``, computed in double; kept and grown by doubling."""
        found = self._turns.get((theta, half))
        if found is None or len(found[0]) < end:
            angles = np.arange(max(256, 1 << (end - 1).bit_length()))[:, None] * theta ** (-np.arange(half) / half)
            found = self._turns[theta, half] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return found

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Cache, layer: int, positions: np.ndarray
    ) -> np.ndarray:
        (count, heads, size), kv_heads = q.shape, k.shape[1]
        if heads % kv_heads:
            raise FormatError(f"{heads} query heads do not share {kv_heads} key/value heads evenly")
        start = int(positions[0])
        keys, values = cache.k[layer], cache.v[layer]
        kernels.store_keys_values(_plain(k), _plain(v), keys, values, start)
        capacity = values.shape[1]
        out = np.empty((count, heads * size), np.float32)
        args = (
            self.isa, q.reshape(-1), keys.reshape(-1), values.reshape(-1), heads, kv_heads, size, capacity, start,
            out.reshape(-1),
        )  # fmt: skip
        if self.tasks == 1 or count * (start + count) < 256:
            kernels.attend_serial(*args)
        elif count == 1:
            kernels.attend_one_parallel(*args, self.tasks)
        else:
            kernels.attend_parallel(*args, self.tasks)
        return out

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        out = np.empty(gate.shape, np.float32)
        flat = gate.reshape(-1), up.reshape(-1), out.reshape(-1)
        if self.tasks > 1 and gate.size >= _PARALLEL_VALUES:
            kernels.swiglu_parallel(self.isa, *flat, self.tasks)
        else:
            kernels.swiglu_serial(self.isa, *flat)
        return out

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b


def _plain(x: np.ndarray) -> np.ndarray:
    """C-contiguous float32, as the kernels are compiled for; a copy only where it has to be."""
    return np.ascontiguousarray(x, np.float32)
