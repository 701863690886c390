"""Contract ``q8``: activations rounded to 8 bits, as ggml does; and products of the types that are not packed.

Products are summed in integers, which no order can change; scales come in once a block. Other types go through
`aprlab.kernels.simd.packed`. Three roundings of
activations exist, each for its block types, and each gives the integers and scales of ggml's x86 code bit for bit:

* Q8_0 (Q4_0, Q5_0, Q8_0): 32 values, ``d = max|x| / 127`` kept as a half, integers from ``x * (127 / max|x|)``;
* Q8_1 (Q4_1, Q5_1): the same, with ``s = d * sum`` kept as a half too;
* Q8_K (K types): 256 values, ``d = -max / 127`` in float32 where max is the value of largest magnitude.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import float32
from numba.extending import overload

from aprlab.kernels.simd.blocks import elements, heads, integers, steps
from aprlab.kernels.simd.decode import FLAT, INLINE, OPTIONS
from aprlab.kernels.simd.kernel_cache import njit
from aprlab.kernels.simd.vectors import (
    absolute,
    add,
    dot4,
    dot4_scaled,
    fma,
    half_round,
    hmax,
    hsum,
    hsum_i32,
    load_f32x8,
    load_i8x32,
    load_u8_as_i32x8,
    magnitude,
    maximum,
    mul,
    round_even,
    scale_halves,
    shr,
    splat_f32,
    splat_i32,
    store_i8x8,
    sub,
    to_f32,
    with_sign,
)

SIMPLE = ("Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1")


# -- activations --------------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def quantise_32(x, q, d, s, halves):
    """x (n,) -> q int8 (n,), d and s float32 (n / 32,): d is a half; s = d * sum(q), of a half with `halves` (Q8_1)."""
    for block in range(x.size // 32):
        i = 32 * block
        a, b = load_f32x8(x, i), load_f32x8(x, i + 8)
        c, e = load_f32x8(x, i + 16), load_f32x8(x, i + 24)
        largest = hmax(maximum(maximum(absolute(a), absolute(b)), maximum(absolute(c), absolute(e))))
        step = largest / float32(127)
        factor = splat_f32(float32(127) / largest if largest != 0 else float32(0))
        a8, b8 = round_even(mul(a, factor)), round_even(mul(b, factor))
        c8, e8 = round_even(mul(c, factor)), round_even(mul(e, factor))
        store_i8x8(q, i, 4, a8)
        store_i8x8(q, i + 8, 4, b8)
        store_i8x8(q, i + 16, 4, c8)
        store_i8x8(q, i + 24, 4, e8)
        total = float32(hsum_i32(add(add(a8, b8), add(c8, e8))))
        d[block] = half_round(step)
        s[block] = half_round(step * total) if halves else d[block] * total


@njit(**OPTIONS)
def quantise_256(x, q, d, sums):
    """x (n,) -> q int8 (n,), d float32 (n / 256,), sums of 16 integers each float32 (n / 16,)."""
    for block in range(x.size // 256):
        largest, value = float32(0), float32(0)
        for i in range(256 * block, 256 * block + 256):
            if abs(x[i]) > largest:
                largest, value = abs(x[i]), x[i]
        if largest == 0:
            d[block] = 0
            q[256 * block : 256 * block + 256] = 0
            sums[16 * block : 16 * block + 16] = 0
            continue
        factor = float32(-127) / value
        for i in range(256 * block, 256 * block + 256, 16):
            a = round_even(mul(load_f32x8(x, i), splat_f32(factor)))
            b = round_even(mul(load_f32x8(x, i + 8), splat_f32(factor)))
            store_i8x8(q, i, 4, a)
            store_i8x8(q, i + 8, 4, b)
            sums[i // 16] = float32(hsum_i32(add(a, b)))
        d[block] = float32(1) / factor


# -- rows ---------------------------------------------------------------------------------------------------------------


def row_dot_q8(isa, kind, w, at, q, d, s, count):
    """Dot product of a row at byte `at` of `w` with activations of `count` values. Only for kernels."""
    raise NotImplementedError


@overload(row_dot_q8, jit_options=INLINE, strict=False)
def _row_dot_q8(isa, kind, w, at, q, d, s, count):
    if kind.value == "Q8_0":

        def signed(isa, kind, w, at, q, d, s, count):
            total = splat_f32(0)
            for block in range(count // 32):
                v = integers(kind, w, at + 34 * block, 0)
                a = load_i8x32(q, 32 * block)
                dots = dot4(isa, splat_i32(0), magnitude(v), with_sign(isa, a, v))
                low, _ = heads(kind, w, at + 34 * block, 0)
                total = fma(splat_f32(low * d[block]), to_f32(dots), total)
            return hsum(total)

        return signed

    if kind.value == "Q3_K":

        def three(isa, kind, w, at, q, d, s, count):
            total = splat_f32(0)
            for block in range(count // 256):
                start = at + 110 * block
                dots = splat_i32(0)
                for j in range(8):
                    v = integers(kind, w, start, j)
                    a = with_sign(isa, load_i8x32(q, 256 * block + 32 * j), v)
                    low, high, _, _ = steps(kind, w, start, j)
                    dots = dot4_scaled(isa, dots, magnitude(v), a, scale_halves(isa, low, high))
                scale, _ = heads(kind, w, start, 0)
                total = fma(splat_f32(scale * d[block]), to_f32(dots), total)
            return hsum(total)

        return three

    if kind.value == "Q2_K":

        def two(isa, kind, w, at, q, d, s, count):
            total, minima = splat_f32(0), splat_f32(0)
            for block in range(count // 256):
                start = at + 84 * block
                dots = splat_i32(0)
                for j in range(8):
                    v = integers(kind, w, start, j)
                    low, high, _, _ = steps(kind, w, start, j)
                    factor = scale_halves(isa, low, high)
                    dots = dot4_scaled(isa, dots, v, load_i8x32(q, 256 * block + 32 * j), factor)
                scale, minimum = heads(kind, w, start, 0)
                total = fma(splat_f32(scale * d[block]), to_f32(dots), total)
                first = mul(to_f32(shr(load_u8_as_i32x8(w, start), 4)), load_f32x8(s, 16 * block))
                second = to_f32(shr(load_u8_as_i32x8(w, start + 8), 4))
                sums = fma(second, load_f32x8(s, 16 * block + 8), first)
                minima = fma(splat_f32(minimum * d[block]), sums, minima)
            return hsum(sub(total, minima))

        return two

    return None


def _round_rows(kind, x, q, d, s):
    """All rows of x to 8 bits, as `kind` needs them. Only for kernels."""
    raise NotImplementedError


@overload(_round_rows, jit_options=INLINE, strict=False)
def _round_rows_overload(kind, x, q, d, s):
    if kind.value in SIMPLE:
        halves = kind.value in ("Q4_1", "Q5_1")

        def simple(kind, x, q, d, s):
            for t in range(x.shape[0]):
                quantise_32(x[t], q[t], d[t], s[t], halves)

        return simple

    paired = kind.value in ("Q4_K", "Q5_K")  # their minima need sums of 32

    def k_type(kind, x, q, d, s):
        for t in range(x.shape[0]):
            quantise_256(x[t], q[t], d[t], s[t])
            if paired:
                for i in range(s.shape[1] // 2):
                    s[t, i] = s[t, 2 * i] + s[t, 2 * i + 1]

    return k_type


@njit(**OPTIONS)
def quantise_rows(kind, x, q, d, s):
    """x float32 (T, n) -> q int8 (T, n), d float32 (T, n / 32 or n / 256), s float32 (T, n / 32 or n / 16).

    For Q4_K and Q5_K the first n / 32 values of a row of s hold sums of 32; for the other K types all hold sums of 16.
    """
    _round_rows(kind, x, q, d, s)


@njit(**FLAT)
def _buffers(kind, x):
    """Empty q, d, s for `quantise_rows`."""
    count, n = x.shape
    large = elements(kind) == 256
    q = np.empty((count, n), np.int8)
    d = np.empty((count, n // (256 if large else 32)), np.float32)
    s = np.empty((count, n // (16 if large else 32)), np.float32)
    return q, d, s


@njit(**OPTIONS)
def matmul_q8(isa, kind, w, row_bytes, x, bias, out, refused, first, last):
    """`aprlab.kernels.simd.matmul_f32.matmul_f32` with x rounded to 8 bits first."""
    q, d, s = _buffers(kind, x)
    _round_rows(kind, x, q, d, s)
    for r in range(first, last):
        plus = bias[r] if bias.size else float32(0)
        for t in range(q.shape[0]):
            out[t, r] = row_dot_q8(isa, kind, w, r * row_bytes, q[t], d[t], s[t], q.shape[1]) + plus
    return 0


@njit(**OPTIONS)
def rounded(kind, x, out):
    """out (T, n) = what x (T, n) is once it was rounded to 8 bits for weights of `kind`."""
    q, d, s = _buffers(kind, x)
    _round_rows(kind, x, q, d, s)
    step = x.shape[1] // d.shape[1]
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[t, i] = float32(q[t, i]) * d[t, i // step]
