"""Block types, 32 values at a time: how the bytes of each become integers and scales, in vectors.

Three functions know the layouts, and everything else (decode, mat-vec in both contracts) is written on top of them:

* `integers(kind, w, at, j)`: values ``32j … 32j + 31`` of the block at byte `at` of `w`, as i8x32 in order, before
  any scale; symmetric types have their offset taken off already.
* `factors(kind, w, at, j)`: ``(low, high, plus)`` so that value = low * integer + plus for the first 16 of them,
  high * integer + plus for the others; all three exact in float32, but for nothing: products of a half and few bits.
* `steps(...)` for K types: the integer scales themselves and the block's float scale, for contract ``q8``.

`kind` is a marker (see `KINDS`) whose numba type names the block type, so that each kernel is compiled once a type.
Layouts are ggml's, from its public C structures; field offsets are next to each function.
"""

# The functions that the overloads return are compiled by numba: no docstrings, no annotations inside.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types as nb
from numba.extending import intrinsic, overload, typeof_impl

from aprlab.kernels.simd.vectors import (
    Marker,
    band,
    bits_to_bytes,
    bor,
    load_half,
    load_i8x16,
    load_i8x32,
    load_u32,
    nibbles,
    shl,
    shr,
    splat_i8,
    sub,
)
from aprlab.quants.types import TensorType, by_name


@dataclass(frozen=True, slots=True)
class Kind:
    """A block type as an argument of a kernel: no bits, only a numba type of its own."""

    type: TensorType


KINDS = {
    t: Kind(t)
    for t in map(by_name, ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F32", "F16", "BF16"])
}
_MARKERS = {kind: Marker("block", kind.type.name) for kind in KINDS.values()}
FLOATS = ("F32", "F16", "BF16")
OFFSET = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}  # types with a `plus`
TWO_SCALES = {"Q2_K", "Q3_K", "Q6_K"}  # one scale for 16 values; the others have one for 32


@typeof_impl.register(Kind)
def _typeof_kind(value: Kind, context: Any) -> Marker:
    return _MARKERS[value]


def _constant(doc: str, number: Callable[[TensorType], int]) -> Any:
    def constant(typingctx: Any, kind: Any) -> Any:
        value = number(by_name(kind.value))

        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return context.get_constant(nb.int64, value)

        return nb.int64(kind), emit

    constant.__doc__ = doc
    return intrinsic(constant)


# Options of code that only other compiled code calls. Entries for Python and C would cost a fifth of the time to compile.
INLINE = {
    "forceinline": True, "boundscheck": False, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
K_TYPES = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}

elements = _constant("Values in one block.", lambda t: t.block_elements)
size = _constant("Bytes of one block.", lambda t: t.block_bytes)
has_plus = _constant("1 where the type has minima or offsets to add.", lambda t: int(t.name in OFFSET))


def _by_kind(stub: Callable[..., Any], table: dict[str, Callable[..., Any]]) -> None:
    """Make calls of `stub(kind, …)` inside kernels go to `table[kind]`."""
    @overload(stub, jit_options=INLINE, strict=False)
    def choose(kind, w, at, j):
        return table[kind.value]


# -- integers -----------------------------------------------------------------------------------------------------------


def integers(kind, w, at, j):
    """See the module. Only for kernels."""
    raise NotImplementedError


def _q4_0(kind, w, at, j):  # d f16, qs[16]
    return sub(nibbles(load_i8x16(w, at + 2)), splat_i8(8))


def _q4_1(kind, w, at, j):  # d f16, m f16, qs[16]
    return nibbles(load_i8x16(w, at + 4))


def _q5_0(kind, w, at, j):  # d f16, qh u32, qs[16]
    low = nibbles(load_i8x16(w, at + 6))
    unset = bits_to_bytes(load_u32(w, at + 2) ^ 0xFFFFFFFF)  # where the fifth bit is 0, take 16 off: set the upper bits
    return bor(low, band(unset, splat_i8(0xF0)))


def _q5_1(kind, w, at, j):  # d f16, m f16, qh u32, qs[16]
    return bor(nibbles(load_i8x16(w, at + 8)), band(bits_to_bytes(load_u32(w, at + 4)), splat_i8(16)))


def _q8_0(kind, w, at, j):  # d f16, qs[32]
    return load_i8x32(w, at + 2)


def _q2_k(kind, w, at, j):  # scales[16], qs[64], d f16, dmin f16; a byte holds values i, i + 32, i + 64, i + 96
    return band(shr(load_i8x32(w, at + 16 + 32 * (j // 4)), 2 * (j % 4)), splat_i8(3))


def _q3_k(kind, w, at, j):  # hmask[32], qs[64], scales[12], d f16
    low = band(shr(load_i8x32(w, at + 32 + 32 * (j // 4)), 2 * (j % 4)), splat_i8(3))
    high = band(shl(shr(load_i8x32(w, at), j), 2), splat_i8(4))
    return sub(bor(low, high), splat_i8(4))


def _q4_k(kind, w, at, j):  # d f16, dmin f16, scales[12], qs[128]; 32 bytes hold two groups, low nibbles first
    return band(shr(load_i8x32(w, at + 16 + 32 * (j // 2)), 4 * (j % 2)), splat_i8(15))


def _q5_k(kind, w, at, j):  # d f16, dmin f16, scales[12], qh[32], qs[128]
    low = band(shr(load_i8x32(w, at + 48 + 32 * (j // 2)), 4 * (j % 2)), splat_i8(15))
    high = band(shl(shr(load_i8x32(w, at + 16), j), 4), splat_i8(16))
    return bor(low, high)


def _q6_k(kind, w, at, j):  # ql[128], qh[64], scales[16], d f16; halves of 128 values: 64 of ql, 32 of qh
    half, part = j // 4, j % 4
    low = band(shr(load_i8x32(w, at + 64 * half + 32 * (part % 2)), 4 * (part // 2)), splat_i8(15))
    high = band(shl(shr(load_i8x32(w, at + 128 + 32 * half), 2 * part), 4), splat_i8(0x30))
    return sub(bor(low, high), splat_i8(32))


_by_kind(
    integers,
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
    },
)

ZERO_POINT = {"Q4_0": 8, "Q5_0": 16, "Q6_K": 32}  # what was taken off their bits


# -- integer scales of the K types: (low, high, minimum) ----------------------------------------------------------------


def steps(kind, w, at, j):
    """(scale of values 0-15, of 16-31, minimum of 0-15, of 16-31) of group j, integers. Only for kernels."""
    raise NotImplementedError


def _q2_k_steps(kind, w, at, j):
    low, high = nb_int(w[at + 2 * j]), nb_int(w[at + 2 * j + 1])
    return low & 15, high & 15, low >> 4, high >> 4


def nb_int(x):
    """A byte as int64. Only for kernels."""
    raise NotImplementedError


@overload(nb_int, jit_options={"forceinline": True})
def _nb_int(x):
    return lambda x: nb.int64(x)


def _q3_k_scale(w, at, i):  # 16 scales of 6 bits: low nibbles in bytes 0-7, upper pairs of bits in bytes 8-11
    raise NotImplementedError


@overload(_q3_k_scale, jit_options={"forceinline": True})
def _q3_k_scale_overload(w, at, i):
    def scale(w, at, i):
        low = (nb_int(w[at + 96 + i % 8]) >> (4 * (i // 8))) & 15
        high = (nb_int(w[at + 104 + i % 4]) >> (2 * (i // 4))) & 3
        return (low | (high << 4)) - 32

    return scale


def _q3_k_steps(kind, w, at, j):
    return _q3_k_scale(w, at, 2 * j), _q3_k_scale(w, at, 2 * j + 1), 0, 0


def _q4_k_steps(kind, w, at, j):  # eight scales and eight minima of six bits in twelve bytes, four bytes at a time
    a, b = load_u32(w, at + 4), load_u32(w, at + 8)
    if j < 4:
        scale, minimum = (a >> (8 * j)) & 63, (b >> (8 * j)) & 63
    else:
        c, shift = load_u32(w, at + 12), 8 * (j - 4)
        scale = ((c >> shift) & 15) | ((a >> (shift + 2)) & 48)
        minimum = ((c >> (shift + 4)) & 15) | ((b >> (shift + 2)) & 48)
    return scale, scale, minimum, minimum


def signed_byte(x):
    """A byte as a signed int64. Only for kernels."""
    raise NotImplementedError


@overload(signed_byte, jit_options={"forceinline": True})
def _signed_byte(x):
    return lambda x: nb.int64(nb.int8(x))


def _q6_k_steps(kind, w, at, j):
    return signed_byte(w[at + 192 + 2 * j]), signed_byte(w[at + 193 + 2 * j]), 0, 0


_by_kind(
    steps,
    {"Q2_K": _q2_k_steps, "Q3_K": _q3_k_steps, "Q4_K": _q4_k_steps, "Q5_K": _q4_k_steps, "Q6_K": _q6_k_steps},
)


# -- float scales -------------------------------------------------------------------------------------------------------


def heads(kind, w, at, j):
    """(d, dmin or m) of the block at `at`, float32; 0 where the type has no second. Only for kernels."""
    raise NotImplementedError


def _heads(d: int, m: int | None) -> Callable[..., Any]:
    if m is None:
        return lambda kind, w, at, j: (load_half(w, at + d), nb.float32(0))
    return lambda kind, w, at, j: (load_half(w, at + d), load_half(w, at + m))


_by_kind(
    heads,
    {
        "Q4_0": _heads(0, None),
        "Q4_1": _heads(0, 2),
        "Q5_0": _heads(0, None),
        "Q5_1": _heads(0, 2),
        "Q8_0": _heads(0, None),
        "Q2_K": _heads(80, 82),
        "Q3_K": _heads(108, None),
        "Q4_K": _heads(0, 2),
        "Q5_K": _heads(0, 2),
        "Q6_K": _heads(208, None),
    },
)


def factors(kind, w, at, j):
    """See the module. Only for kernels."""
    raise NotImplementedError


def _plain_factors(kind, w, at, j):
    d, m = heads(kind, w, at, j)
    return d, d, m, m


def _k_factors(kind, w, at, j):
    d, m = heads(kind, w, at, j)
    low, high, minimum_low, minimum_high = steps(kind, w, at, j)
    return (
        d * nb.float32(low),
        d * nb.float32(high),
        -(m * nb.float32(minimum_low)),
        -(m * nb.float32(minimum_high)),
    )


_by_kind(
    factors,
    {
        **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), _plain_factors),
        **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), _k_factors),
    },
)
