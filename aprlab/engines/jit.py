"""The fast CPU engine: kernels compiled by numba, on quantised blocks.

Tokens go through fused kernels, prompts four at a time. Where BLAS is faster (contract f32 without AVX-512, types that are not
packed), prompts go through tiles of decoded rows and BLAS, one thread and one tile at a time each. Nothing is decoded ahead.
Matrices of the common types are repacked, ahead by `warm` or when they are first multiplied with (eight rows interleaved, the
same bytes: `aprlab.kernels.simd.packed`), and the file's pages they came from are given back.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from aprlab.engines.base import Cache, Engine
from aprlab.engines.blas import blas_threads
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.kernels.simd import isa as isas
from aprlab.kernels.simd import kernels
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import output_weight
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling, frequencies
from aprlab.model.tensor import Tensor
from aprlab.model.window import hidden
from aprlab.quants.nonlinear import iq4_nl_as_q8_0
from aprlab.quants.types import BF16, F16, F32, Q8_0, by_name

_TILE_VALUES = 1 << 19  # most decoded values of a tile, 2 MiB: a quarter of that costs BLAS half its speed
CONTRACTS = ("f32", "q8")
FUSED = 4  # most tokens for which fused kernels beat decoding and BLAS, where they do not take tiles of tokens
_TOKENS = 256  # most tokens of one call: three bytes of each activation are kept meanwhile, a thread
_PARALLEL_VALUES = 1 << 14  # below this, handing work to threads costs more than it saves
_QUERIES = 64  # queries whose scores are in memory at once, where attention has a window
IQ4_NL = by_name("IQ4_NL")
_NONE = np.empty(0, np.float32)
Turn = tuple[float, int, RopeScaling | None, str | None]  # base, pairs, scaling, the tensor of factors


class JitEngine(Engine):
    """numba kernels with explicit SIMD.

    Args:
        model: the weights.
        threads: threads of kernels and BLAS; None takes every core this process may use.
        simd: instruction set by name (`aprlab.kernels.simd.isa.NAMES`); None takes `APRLAB_SIMD`, else the best one here.
        contract: ``f32`` multiplies by the activations as they are (`aprlab.kernels.simd.packed` says how exactly); ``q8`` rounds
            them to 8 bits first, exactly as llama.cpp does: faster, and needed to come near its numbers. Half and bfloat16
            weights then see activations rounded to their own type.
        repack: keep matrices in the order that fused kernels like best, in memory of their own; False for models that are
            larger than memory, which are then slower.

    Raises:
        UsageError: more threads than numba was started with, or an instruction set that cannot run here.
    """

    name: ClassVar[str] = "jit"
    contract = "f32"

    def __init__(
        self,
        model: Model,
        threads: int | None = None,
        simd: str | None = None,
        contract: str = "f32",
        repack: bool = True,
    ) -> None:
        super().__init__(model, threads)
        if contract not in CONTRACTS:
            raise UsageError(
                f"unknown activation contract {contract!r}; known: {', '.join(CONTRACTS)}", code="engines.unknown-contract"
            )
        self.contract, self.repack = contract, repack
        self.isa = isas.choose(simd)
        self.tasks = kernels.check_threads(threads)
        self._weights: dict[str, tuple[kernels.Kind, np.ndarray, int]] = {}
        self._packed: dict[str, np.ndarray] = {}
        self._entries: dict[tuple[Any, kernels.Kind], tuple[Callable[..., Any], int]] = {}  # compiled code, and where it is
        self._decoders: dict[kernels.Kind, Callable[..., Any]] = {}
        self._decoded: dict[str, np.ndarray] = {}  # whole matrices of types without a kernel
        self._vectors: dict[str, np.ndarray] = {}
        self._turns: dict[Turn, tuple[np.ndarray, np.ndarray]] = {}
        self._tiles: list[np.ndarray] = []  # one a thread, while none is at work
        self._touched = False
        self._pool = ThreadPoolExecutor(self.tasks, "aprlab-jit")
        self._packers = ThreadPoolExecutor(self.tasks, "aprlab-pack")  # of their own: tiles wait for one another in the other
        self._ahead: dict[str, Future[np.ndarray]] = {}

    # -- weights -------------------------------------------------------------------------------------------------

    def _matrix(self, tensor: Tensor) -> tuple[kernels.Kind, np.ndarray, int]:
        """(kind, read-only bytes 1-D, bytes a row); types without a kernel are decoded once, to float32 (IQ4_NL: to Q8_0)."""
        found = self._weights.get(tensor.name)
        if found is None:
            kind = kernels.KINDS.get(tensor.type)
            if tensor.type is IQ4_NL and tensor.content.as_stored:
                raw = self._decoded[tensor.name] = iq4_nl_as_q8_0(tensor.raw)
                kind, row_bytes = kernels.KINDS[Q8_0], Q8_0.row_bytes(tensor.cols)
                tensor.release()
            elif kind is None or not tensor.content.as_stored:  # decoded in another way
                raw = self._decoded[tensor.name] = tensor.dequantise().reshape(-1).view(np.uint8)
                kind, row_bytes = kernels.KINDS[F32], 4 * tensor.cols
            else:
                raw, row_bytes = tensor.raw, tensor.type.row_bytes(tensor.cols)
            found = self._weights[tensor.name] = kind, kernels.frozen(raw), row_bytes
        return found

    def _vector(self, name: str, length: int) -> np.ndarray:
        found = self._vectors.get(name)
        if found is None or found.size != length:  # `vector` says what is wrong with the length
            found = self._vectors[name] = np.ascontiguousarray(self.vector(name, length).dequantise(), np.float32)
        return found

    def _packed_matrix(self, tensor: Tensor) -> np.ndarray:
        """The matrix with eight rows side by side, `kernels.pack`; done once, ahead (`warm`) or here, by all threads."""
        if (ahead := self._ahead.pop(tensor.name, None)) is not None and not ahead.cancel():
            ahead.result()
        found = self._packed.get(tensor.name)
        if found is None:
            found = self._pack(tensor, self.tasks)
        return found

    def _pack(self, tensor: Tensor, tasks: int) -> np.ndarray:
        kind, raw, row_bytes = self._matrix(tensor)
        fields, step = kernels.fields(kind.type), kernels.ROWS * row_bytes
        out = np.empty(-(-raw.size // step) * step, np.uint8)
        whole = raw.size // step

        def part(task: int) -> None:
            span = slice(task * whole // tasks * step, (task + 1) * whole // tasks * step)
            kernels.pack(fields, kind.type.block_bytes, raw[span], row_bytes, out[span])

        if raw.size % step:  # rows of zeros fill up the last eight
            last = np.zeros(step, np.uint8)
            last[: raw.size % step] = raw[whole * step :]
            kernels.pack(fields, kind.type.block_bytes, kernels.frozen(last), row_bytes, out[whole * step :])
        part(0)  # alone, so that no two threads compile
        list(self._pool.map(part, range(1, tasks)))
        found = self._packed[tensor.name] = kernels.frozen(out)
        tensor.release()
        return found

    def memory(self) -> dict[str, int]:
        """Bytes of decoded weights (types without a kernel, vectors), of repacked ones, of tiles, of the rotary tables."""
        kept = (*self._decoded.values(), *self._vectors.values())
        return {
            "weights": sum(w.nbytes for w in kept),
            "packed": sum(w.nbytes for w in list(self._packed.values())),  # a copy: `warm` may still be adding
            "tiles": sum(t.nbytes for t in self._tiles),
            "rotary": sum(c.nbytes + s.nbytes for c, s in self._turns.values()),
        }

    def close(self) -> None:
        """Forget decoded weights and buffers, end the threads."""
        for pool in (self._packers, self._pool):
            pool.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._tiles.clear()
        for held in (self._weights, self._packed, self._decoded, self._vectors, self._turns):
            held.clear()

    def warm(self) -> None:
        """Load the kernels that this model's matrices need, by using them on the smallest of each type; begin to repack.

        Matrices are repacked in the file's order by other threads, while the caller goes on: a prompt waits for the one it needs.
        """
        matrices = sorted((t for t in self.model.tensors.values() if len(t.shape) == 2), key=lambda t: t.size)
        for tensor in {t.type: t for t in reversed(matrices)}.values():
            for count in (1, FUSED + 1):
                self.matmul(np.ones((count, tensor.cols), np.float32), tensor.name)
        if self.tasks > 1 and self.repack:
            rows_alone = {"token_embd.weight"} - {output_weight(self.model.config)}
            for tensor in self.model.tensors.values():
                kind = kernels.KINDS.get(tensor.type) if len(tensor.shape) == 2 and tensor.content.as_stored else None
                if kind is not None and kernels.packable(kind) and tensor.name not in rows_alone | self._packed.keys():
                    self._ahead[tensor.name] = self._packers.submit(self._pack, tensor, 1)

    # -- moving in and out ---------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        if config.head_dim % 8:
            raise UnsupportedError(
                f"heads of {config.head_dim} values: engine 'jit' needs a multiple of 8", code="engines.head-dim-not-of-eights"
            )
        room = -(-capacity // 8) * 8
        keys = np.zeros((config.block_count, config.head_count_kv, room // 8, config.head_dim, 8), np.float32)
        values = np.zeros((config.block_count, config.head_count_kv, room, config.head_dim), np.float32)
        return Cache(keys, values, capacity, window=config.sliding_window)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def embed(self, tokens: np.ndarray, weight: str) -> np.ndarray:
        tensor = self.matrix(weight)
        kind, raw, row_bytes = self._matrix(tensor)
        out = np.empty((len(tokens), tensor.cols), np.float32)
        kernels.embed_rows(kind, raw, row_bytes, tokens, out)
        return out

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        out = np.empty_like(x)
        kernels.rms_norm(_plain(x), self._vector(weight, x.shape[-1]), float(eps), out)
        return out

    def matmul(self, x: np.ndarray, weight: str, bias: str | None = None) -> np.ndarray:
        tensor = self.matrix(weight, x.shape[-1])
        x, y = _plain(x), np.empty((x.shape[0], tensor.shape[0]), np.float32)
        plus = _NONE if bias is None else self._vector(bias, tensor.shape[0])
        kind, raw, row_bytes = self._matrix(tensor)
        packs = kernels.packable(kind) and self.repack
        tiles = packs and (self.contract == "q8" or self.isa is isas.AVX512)  # else BLAS is faster
        if (len(x) > FUSED and not tiles) or (kernels.packable(kind) and not packs and self.contract == "q8"):
            self._tiled(tensor, x, y)
            return y if bias is None else np.add(y, plus, out=y)
        if packs:
            raw = self._packed_matrix(tensor)
        elif self.contract == "q8" and not kind.type.quantised:
            x = _rounded_to(kind, x)
        kernel = self._kernel(kind, tiles and len(x) > 2)
        for first in range(0, len(x), _TOKENS):
            part = slice(first, first + _TOKENS)
            refused = np.zeros(len(x[part]), np.uint8)
            if self._product(kernel, kind, raw, row_bytes, x[part], plus, y[part], refused):
                for t in first + np.flatnonzero(refused):  # not for integers: plain float products, on the file's own bytes
                    one = x[t : t + 1], plus, y[t : t + 1], refused
                    self._product(kernels.matmul_f32, kind, self._matrix(tensor)[1], row_bytes, *one)
        return y

    def _product(self, kernel: Any, kind: kernels.Kind, raw: np.ndarray, row_bytes: int, *arrays: np.ndarray) -> int:
        """kernel on x, bias, out and refused, in parallel where that pays; by way of its compiled code after the first time."""
        rows = arrays[2].shape[1]
        known = self._entries.get((kernel, kind))
        if known is None:
            args = self.isa, kind, raw, row_bytes, *arrays, 0, 0  # no rows
            kernel(*args)
            known = self._entries[kernel, kind] = kernels.entry(kernel, *args), kernels.address(kernel, *args)
        entry, address = known
        if self.tasks == 1 or rows * arrays[0].shape[1] < _PARALLEL_VALUES:
            return int(entry(self.isa, kind, raw, row_bytes, *arrays, 0, rows))
        return int(self._parallel(address, raw, row_bytes, *arrays, self.tasks))

    @cached_property
    def _parallel(self) -> Callable[..., Any]:
        """The compiled code of `kernels.product_parallel`."""
        none = np.empty((0, 0), np.float32)
        args = 0, kernels.frozen(np.empty(0, np.uint8)), 0, none, _NONE, none, np.empty(0, np.uint8), 0  # no part, no call
        kernels.product_parallel(*args)
        return kernels.entry(kernels.product_parallel, *args)

    def _kernel(self, kind: kernels.Kind, tiles: bool) -> Any:
        """The fused kernel of this engine's contract for a block type; plain floats have one for both contracts."""
        if self.repack and kernels.packable(kind):
            if self.contract == "q8":
                return kernels.packed_q8_tiles if tiles else kernels.packed_q8
            return kernels.packed_f32_tiles if tiles else kernels.packed_f32
        if kind.type is Q8_0 and self.contract == "f32":
            return kernels.q8_0_f32
        return kernels.matmul_q8 if self.contract == "q8" and kind.type.quantised else kernels.matmul_f32

    def _tiled(self, tensor: Tensor, x: np.ndarray, y: np.ndarray) -> None:
        """Rows are decoded tile by tile and multiplied by BLAS, each thread on tiles of its own.

        Neither numba's threads nor BLAS's own take part: the two spin against each other when used in turn.
        """
        kind, raw, row_bytes = self._matrix(tensor)
        (rows, cols) = tensor.shape
        step = _tile_rows(rows, cols)
        if self.contract == "q8":
            x = _rounded_to(kind, x)

        decode = self._decoders.get(kind)
        if decode is None:
            block = raw[: kind.type.block_bytes], kind.type.block_elements
            sample = kind, *block, np.empty(block[1], np.float32)
            kernels.decode(*sample)
            decode = self._decoders[kind] = kernels.entry(kernels.decode, *sample)

        def multiply(first: int) -> None:
            last = min(first + step, rows)
            try:
                buffer = self._tiles.pop()  # atomic
            except IndexError:
                buffer = _NONE
            if buffer.size < step * cols:
                buffer = np.empty(step * cols, np.float32)
            tile = buffer[: (last - first) * cols]
            decode(kind, raw[first * row_bytes : last * row_bytes], tile.size, tile)
            with np.errstate(over="ignore", invalid="ignore"):  # as the pass says itself, which other threads do not hear
                np.matmul(x, tile.reshape(last - first, cols).T, out=y[:, first:last])
            self._tiles.append(buffer)

        starts = range(0, rows, step)
        with blas_threads(1):
            if not self._touched:
                self._touch()
            if self.tasks == 1:
                for first in starts:
                    multiply(first)
            else:
                list(self._pool.map(multiply, starts))
        if tensor.name in self._packed:
            tensor.release()

    def _touch(self) -> None:
        """Let BLAS write all over its work space once, in as many threads as will use it.

        OpenBLAS multiplies some sizes of tiles at a third of its speed until it has had one larger product (measured: 5 and
        then 16 billion multiply-adds a second, see benchmarks/README.md); it costs 15 ms. Probably it prefetches where nothing
        was ever written, and the processor looks for pages that are not there.
        """
        self._touched = True
        one, other = np.ones((512, 384), np.float32), np.ones((768, 384), np.float32)
        meet = threading.Barrier(self.tasks)  # each at the same time, or one work space would serve them all

        def product(task: int) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                meet.wait(timeout=1)
            np.matmul(one, other.T)

        list(self._pool.map(product, range(self.tasks)))

    def rope(
        self, x: np.ndarray, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        if style not in ("neox", "norm"):
            raise UnsupportedError(
                f"rotary style {style!r}; known: 'neox' (halves), 'norm' (adjacent pairs)", code="engines.unknown-rotary-style"
            )
        start, count = int(positions[0]), len(positions)
        cos, sin = self._rotary((float(theta), x.shape[-1] // 2, scaling, factors), start + count)
        out = np.empty_like(x)
        kernels.rotate(_plain(x), cos, sin, start, style == "neox", out)
        return out

    def _rotary(self, turn: Turn, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 ``(at least end, D/2)``, computed in double; kept and grown by doubling."""
        found = self._turns.get(turn)
        if found is None or len(found[0]) < end:
            theta, half, scaling, factors = turn
            divisors = None if factors is None else self._vector(factors, half)
            angles = np.arange(max(256, 1 << (end - 1).bit_length()))[:, None] * frequencies(theta, half, scaling, divisors)
            length = 1.0 if scaling is None else scaling.length
            cos, sin = ((f(angles) * length).astype(np.float32) for f in (np.cos, np.sin))
            found = self._turns[turn] = cos, sin
        return found

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Cache, layer: int, positions: np.ndarray) -> np.ndarray:
        (count, heads, size), kv_heads = q.shape, k.shape[1]
        if heads % kv_heads:
            raise FormatError(
                f"{heads} query heads do not share {kv_heads} key/value heads evenly", code="config.heads-not-shared"
            )
        start = int(positions[0])
        keys, values = cache.k[layer], cache.v[layer]
        kernels.store_keys_values(_plain(k), _plain(v), keys, values, start)
        if cache.window is not None and int(positions[-1]) >= cache.window:
            return _attend_within(q, keys, values, positions, cache.window)
        capacity = values.shape[1]
        out = np.empty((count, heads * size), np.float32)
        args = (
            q.reshape(-1), keys.reshape(-1), values.reshape(-1), heads, kv_heads, size, capacity, start,
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
            kernels.swiglu_parallel(*flat, self.tasks)
        else:
            kernels.swiglu_serial(*flat)
        return out

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b


def _attend_within(q: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray, window: int) -> np.ndarray:
    """Attention to the last `window` positions, by BLAS: the kernels see all positions from the first on.

    q ``(T, H, D)``, keys ``(Hkv, positions / 8, D, 8)``, values ``(Hkv, positions, D)`` -> ``(T, H * D)``.
    """
    (count, heads, size), kv_heads = q.shape, len(keys)
    out = np.empty((count, kv_heads, heads // kv_heads, size), np.float32)
    for first in range(0, count, _QUERIES):
        block = slice(first, min(first + _QUERIES, count))
        start = max(0, int(positions[first]) + 1 - window) // 8
        stop = int(positions[block.stop - 1]) // 8 + 1
        k = keys[:, start:stop].transpose(0, 2, 1, 3).reshape(kv_heads, 1, size, -1)
        v = values[:, None, 8 * start : 8 * stop]
        asked = q[block].reshape(-1, kv_heads, heads // kv_heads, size).transpose(1, 2, 0, 3)  # (Hkv, group, t, D)
        with blas_threads(1):
            scores = asked @ k * np.float32(1 / math.sqrt(size))
            scores[..., hidden(scores.shape[-1], positions[block], window, 8 * start)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            out[block] = (scores @ v).transpose(2, 0, 1, 3)
    return out.reshape(count, heads * size)


def _tile_rows(rows: int, cols: int) -> int:
    """Rows of a tile: of 64 at least, in a number of tiles that two or four threads share evenly.

    The number of threads has no say, so that it cannot change a result.
    """
    parts = -(-rows * cols // _TILE_VALUES)
    parts = min(-(-parts // 4) * 4, max(1, rows // 64))
    return -(-rows // (16 * parts)) * 16


def _rounded_to(kind: kernels.Kind, x: np.ndarray) -> np.ndarray:
    """Contract q8's activations x ``(T, cols)`` for weights of `kind`, back in float32."""
    if kind.type is F32:
        return x
    if kind.type is F16:
        return x.astype(np.float16).astype(np.float32)
    if kind.type is BF16:  # to nearest, ties to even, in the upper half of the bits
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    out = np.empty_like(x)
    kernels.rounded(kind, x, out)
    return out


def _plain(x: np.ndarray) -> np.ndarray:
    """C-contiguous float32, as the kernels are compiled for; a copy only where it has to be."""
    return np.ascontiguousarray(x, np.float32)
