"""The launch table: for every kernel its module, its threads a block, and functions that make whole launches of it.

Both ways to run a kernel, a GPU and the PTX machine, take their launches from here and nowhere else. Pointers are opaque:
whatever the device made. Lengths are elements, `tokens` is the number of positions T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from aprlab.errors import UnsupportedError
from aprlab.quants import types
from aprlab.quants.types import TensorType

PACKED: Final = (types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0, types.Q4_K, types.Q5_K, types.Q6_K)
"""Types with mat-vec kernels of both contracts; their activations are prepared first."""
PLAIN: Final = (types.F16, types.BF16, types.F32)
"""Types whose mat-vec takes float32 activations as they are, under either contract."""
DEQUANTISED: Final = (*PACKED, types.F16, types.BF16)
HEAD_DIMS: Final = (32, 64, 96, 128, 256)
CONTRACTS: Final = ("f32", "q8")
NULL: Final = 0

ROWS_A_BLOCK: Final = 8
STEP_VALUES: Final = 2048
STEP_BYTES: Final = {"f32": 36 * 16 * 16, "q8": 12 * 16 * 16}
"""Bytes that `prepare` (f32) and `quantise` (q8) write for each 2,048 activations, begun ones whole."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One entry: where it stands, its block, and its parameters by kind (``p`` pointer, ``u`` uint32, ``f`` float32)."""

    entry: str
    module: str
    threads: int
    parameters: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. `arguments` go with `kernel.parameters`; `shared` is dynamic shared memory in bytes: these kernels use none."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    shared: int = 0

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads of a block, x first."""
        return self.kernel.threads, 1, 1


def _table() -> dict[str, Kernel]:
    kernels = [
        Kernel("prepare", "matvec", 128, "ppu"),
        Kernel("quantise", "matvec_q8", 128, "ppu"),
        Kernel("rms_norm", "qwen2", 256, "pppuf"),
        Kernel("rope_neox", "qwen2", 128, "pppuu"),
        Kernel("rope_norm", "qwen2", 128, "pppuu"),
        Kernel("remember", "qwen2", 256, "pppppu"),
        Kernel("swiglu", "qwen2", 256, "pppu"),
        Kernel("add", "qwen2", 256, "pppu"),
        Kernel("argmax", "qwen2", 256, "ppu"),
        *(Kernel(f"attend_{size}", "qwen2", 128, "pppppuf") for size in HEAD_DIMS),
    ]
    for kind in (*PACKED, *PLAIN):
        name = kind.name.lower()
        kernels.append(Kernel(f"embed_{name}", "dequantise", 256, "pppu"))
        kernels.append(Kernel(f"matvec_{name}", "matvec", 64, "ppppuu"))
        if kind in PACKED:
            kernels.append(Kernel(f"matvec_{name}_q8", "matvec_q8", 64, "ppppuu"))
        if kind in DEQUANTISED:
            kernels += [Kernel(f"dequantise_{name}_{to}", "dequantise", 256, "ppu") for to in ("f32", "f16")]
    return {kernel.entry: kernel for kernel in kernels}


KERNELS: Final = _table()


def _launch(entry: str, grid: Sequence[int], *arguments: Any) -> Launch:
    kernel = KERNELS[entry]
    assert len(arguments) == len(kernel.parameters), entry
    x, y, z = [*grid, 1, 1][:3]
    return Launch(kernel, (x, y, z), arguments)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def padded(nbytes: int) -> int:
    """Bytes a buffer of weights needs on the device: staging copies whole 16-byte pieces."""
    return _blocks(nbytes, 16) * 16


def prepared_bytes(contract: str, tokens: int, cols: int) -> int:
    """Bytes of prepared activations ``(tokens, cols)``."""
    return tokens * _blocks(cols, STEP_VALUES) * STEP_BYTES[_contract(contract)]


def _contract(contract: str) -> str:
    if contract not in CONTRACTS:
        raise UnsupportedError(
            f"unknown activation contract {contract!r}; known: {', '.join(CONTRACTS)}", code="cuda.unknown-contract"
        )
    return contract


def _of(kind: TensorType, known: tuple[TensorType, ...], what: str) -> str:
    if kind not in known:
        raise UnsupportedError(
            f"there is no {what} kernel for {kind.name}; there are for {', '.join(t.name for t in known)}",
            code="cuda.no-kernel-for-type",
        )  # fmt: skip
    return kind.name.lower()


def _quads(values: int, what: str) -> int:
    quads, rest = divmod(values, 4)
    if rest:
        raise UnsupportedError(f"{what} of {values} values: the kernels make four at a time", code="cuda.values-not-quads")
    return quads


# ---- one function a kernel -----------------------------------------------------------------------------------------


def dequantise(kind: TensorType, w: Any, y: Any, values: int, to: str = "f32") -> Launch:
    """w: blocks of `values` values -> y: float32 or float16 (`to`) ``(values,)``."""
    if to not in ("f32", "f16"):
        raise UnsupportedError(f"cannot dequantise to {to!r}; known: f32, f16", code="cuda.unknown-target-type")
    quads = _quads(values, "a run")
    return _launch(f"dequantise_{_of(kind, DEQUANTISED, 'dequantise')}_{to}", [_blocks(quads, 256)], w, y, quads)


def embed(kind: TensorType, w: Any, ids: Any, y: Any, tokens: int, cols: int) -> Launch:
    """w ``(vocabulary, cols)``, ids int32 ``(tokens,)`` -> y float32 ``(tokens, cols)``; a negative id gives zeros."""
    quads = _quads(cols, "a row")
    return _launch(f"embed_{_of(kind, (*PACKED, *PLAIN), 'embed')}", [_blocks(quads, 256), tokens], w, ids, y, quads)


def prepare(contract: str, x: Any, out: Any, tokens: int, cols: int) -> Launch:
    """x float32 ``(tokens, cols)`` -> out: `prepared_bytes` bytes that the mat-vec kernels of `contract` read."""
    if cols % 32:
        raise UnsupportedError(
            f"rows of {cols} values: quantised mat-vec kernels take whole blocks of 32", code="cuda.rows-not-whole-blocks"
        )
    if _contract(contract) == "f32":
        return _launch("prepare", [_blocks(cols, STEP_VALUES), tokens], x, out, cols)
    return _launch("quantise", [_blocks(cols, 128), tokens], x, out, cols)


def matvec(
    kind: TensorType, contract: str, w: Any, x: Any, bias: Any, y: Any, tokens: int, rows: int, cols: int
) -> Launch:
    """w ``(rows, cols)``, padded, times x (prepared for packed types, float32 for plain ones), plus bias ``(rows,)`` or NULL.

    y: float32 ``(tokens, rows)``.
    """
    entry = f"matvec_{_of(kind, (*PACKED, *PLAIN), 'mat-vec')}"
    if kind in PACKED and _contract(contract) == "q8":
        entry += "_q8"
    return _launch(entry, [_blocks(rows, ROWS_A_BLOCK), tokens], w, x, bias, y, rows, cols)


def rms_norm(x: Any, weight: Any, y: Any, tokens: int, n: int, eps: float) -> Launch:
    """x, y float32 ``(tokens, n)``, weight ``(n,)``."""
    return _launch("rms_norm", [tokens], x, weight, y, n, eps)


def rope(style: str, x: Any, table: Any, y: Any, tokens: int, heads: int, head_dim: int) -> Launch:
    """x, y float32 ``(tokens, heads, head_dim)``, table float32 ``(tokens, head_dim / 2, 2)``: cosine and sine."""
    if style not in ("neox", "norm"):
        raise UnsupportedError(
            f"rotary style {style!r}; known: 'neox' (halves), 'norm' (adjacent pairs)", code="engines.unknown-rotary-style"
        )
    half = head_dim // 2
    return _launch(f"rope_{style}", [_blocks(half, 128), tokens, heads], x, table, y, heads, half)


def remember(k: Any, v: Any, positions: Any, k_cache: Any, v_cache: Any, tokens: int, n: int) -> Launch:
    """k, v float32 ``(tokens, n)`` into one layer's caches ``(capacity, n)`` at positions int32 ``(tokens,)``."""
    return _launch("remember", [_blocks(n, 256), tokens], k, v, positions, k_cache, v_cache, n)


def attend(
    q: Any, k_cache: Any, v_cache: Any, positions: Any, y: Any, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> Launch:
    """q, y float32 ``(tokens, heads, head_dim)``; one layer's caches ``(capacity, kv_heads, head_dim)``."""
    if head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise UnsupportedError(
            f"there is no attention kernel for heads of {head_dim}; there are for {known}", code="cuda.no-attention-kernel"
        )
    scale = float(np.float32(1 / np.sqrt(head_dim)))
    return _launch(f"attend_{head_dim}", [heads, tokens], q, k_cache, v_cache, positions, y, heads // kv_heads, scale)


def swiglu(gate: Any, up: Any, y: Any, n: int) -> Launch:
    """gate, up, y float32 ``(n,)``."""
    return _launch("swiglu", [_blocks(n, 256)], gate, up, y, n)


def add(a: Any, b: Any, y: Any, n: int) -> Launch:
    """a, b, y float32 ``(n,)``."""
    return _launch("add", [_blocks(n, 256)], a, b, y, n)


def argmax(x: Any, ids: Any, tokens: int, n: int) -> Launch:
    """x float32 ``(tokens, n)`` -> ids int32 ``(tokens,)``: the first of the largest, -1 where a row holds a NaN."""
    return _launch("argmax", [tokens], x, ids, n)
