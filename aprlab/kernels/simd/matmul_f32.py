"""Fused matrix times few vectors on quantised blocks, contract ``f32``: weights as decoded, times float32 activations.

A row's sum depends on nothing but that row and x: not on threads, tasks or neighbours. Types with minima decode each
weight exactly before it is multiplied; symmetric types take their scale out of a group of 16 or 32 products.
"""

# mypy: ignore-errors

from __future__ import annotations

from numba import float32
from numba.extending import overload

from aprlab.kernels.simd.blocks import FLOATS, K_TYPES, OFFSET, factors, integers, size
from aprlab.kernels.simd.decode import FLAT, INLINE, LOADERS, OPTIONS
from aprlab.kernels.simd.isa import AVX512
from aprlab.kernels.simd.kernel_cache import njit
from aprlab.kernels.simd.vectors import (
    add,
    f32x16,
    fma,
    fold,
    hsum,
    load_f32x8,
    load_f32x16,
    mul,
    splat_f32,
    splat_f32x16,
    widen0,
    widen1,
    widen2,
    widen3,
    widen_high,
    widen_low,
)


def row_dot(isa, kind, w, at, x, o, count):
    """Dot product of a row at byte `at` of `w` with `x[o : o + count]`. Only for kernels."""
    raise NotImplementedError


@overload(row_dot, jit_options=INLINE, strict=False)
def _row_dot(isa, kind, w, at, x, o, count):
    if kind.value in FLOATS:
        load, load_one = LOADERS[kind.value]

        def floats(isa, kind, w, at, x, o, count):
            step = size(kind)
            a = b = c = d = splat_f32(0)
            for i in range(0, count // 32 * 32, 32):
                a = fma(load(w, at + i * step), load_f32x8(x, o + i), a)
                b = fma(load(w, at + (i + 8) * step), load_f32x8(x, o + i + 8), b)
                c = fma(load(w, at + (i + 16) * step), load_f32x8(x, o + i + 16), c)
                d = fma(load(w, at + (i + 24) * step), load_f32x8(x, o + i + 24), d)
            total = hsum(add(add(a, b), add(c, d)))
            for i in range(count // 32 * 32, count):
                total += load_one(w, at + i * step) * x[o + i]
            return total

        return floats

    wide = isa.value == AVX512.name
    if kind.value in OFFSET:
        group, empty = (_with_plus_wide, _two_wide) if wide else (_with_plus, _four)
    else:
        group, empty = (_symmetric_wide, _two_wide) if wide else (_symmetric, _two)

    def small(isa, kind, w, at, x, o, count):
        sums = empty()
        for block in range(count // 32):
            sums = group(kind, w, at + block * size(kind), 0, x, o + 32 * block, sums)
        return total(sums)

    def large(isa, kind, w, at, x, o, count):
        sums = empty()
        for block in range(count // 256):
            start, i = at + block * size(kind), o + 256 * block
            for j in range(0, 8, 4):  # four by hand, so that shifts and positions of scales are constants
                sums = group(kind, w, start, j, x, i + 32 * j, sums)
                sums = group(kind, w, start, j + 1, x, i + 32 * j + 32, sums)
                sums = group(kind, w, start, j + 2, x, i + 32 * j + 64, sums)
                sums = group(kind, w, start, j + 3, x, i + 32 * j + 96, sums)
        return total(sums)

    return large if kind.value in K_TYPES else small


# A group is 32 values; it adds its products to a few running sums, which stay in registers.


@njit(**FLAT)
def _two():
    return splat_f32(0), splat_f32(0)


@njit(**FLAT)
def _four():
    return splat_f32(0), splat_f32(0), splat_f32(0), splat_f32(0)


@njit(**FLAT)
def _two_wide():
    return splat_f32x16(0), splat_f32x16(0)


def total(sums):
    """The sum of all lanes of `sums`. Only for kernels."""
    raise NotImplementedError


@overload(total, jit_options=INLINE)
def _total(sums):
    if sums[0] == f32x16:
        return lambda sums: hsum(add(fold(sums[0]), fold(sums[1])))
    if len(sums) == 2:
        return lambda sums: hsum(add(sums[0], sums[1]))
    return lambda sums: hsum(add(add(sums[0], sums[1]), add(sums[2], sums[3])))


@njit(**FLAT)
def _with_plus(kind, w, start, j, x, i, sums):
    a, b, c, d = sums
    q = integers(kind, w, start, j)
    low, high, plus_low, plus_high = factors(kind, w, start, j)
    s, t, m, n = splat_f32(low), splat_f32(high), splat_f32(plus_low), splat_f32(plus_high)
    a = fma(fma(s, widen0(q), m), load_f32x8(x, i), a)
    b = fma(fma(s, widen1(q), m), load_f32x8(x, i + 8), b)
    c = fma(fma(t, widen2(q), n), load_f32x8(x, i + 16), c)
    d = fma(fma(t, widen3(q), n), load_f32x8(x, i + 24), d)
    return a, b, c, d


@njit(**FLAT)
def _with_plus_wide(kind, w, start, j, x, i, sums):
    a, b = sums
    q = integers(kind, w, start, j)
    low, high, plus_low, plus_high = factors(kind, w, start, j)
    first = fma(splat_f32x16(low), widen_low(q), splat_f32x16(plus_low))
    second = fma(splat_f32x16(high), widen_high(q), splat_f32x16(plus_high))
    return fma(first, load_f32x16(x, i), a), fma(second, load_f32x16(x, i + 16), b)


@njit(**FLAT)
def _symmetric(kind, w, start, j, x, i, sums):
    a, b = sums
    q = integers(kind, w, start, j)
    low, high, _, _ = factors(kind, w, start, j)
    first = fma(widen1(q), load_f32x8(x, i + 8), mul(widen0(q), load_f32x8(x, i)))
    second = fma(widen3(q), load_f32x8(x, i + 24), mul(widen2(q), load_f32x8(x, i + 16)))
    return fma(splat_f32(low), first, a), fma(splat_f32(high), second, b)


@njit(**FLAT)
def _symmetric_wide(kind, w, start, j, x, i, sums):
    a, b = sums
    q = integers(kind, w, start, j)
    low, high, _, _ = factors(kind, w, start, j)
    first, second = mul(widen_low(q), load_f32x16(x, i)), mul(widen_high(q), load_f32x16(x, i + 16))
    return fma(splat_f32x16(low), first, a), fma(splat_f32x16(high), second, b)


@njit(**OPTIONS)
def matmul_f32(isa, kind, w, row_bytes, x, bias, out, refused, first, last):
    """Rows first … last - 1 of out (T, rows) = x (T, cols) times the transpose of `w`, plus `bias` (rows,) unless that is empty.

    `w` is uint8, 1-D, rows of `row_bytes`. A row of w is read once for all T, which should be few. Returns 0: no row of x is
    refused (see `aprlab.kernels.simd.packed`).
    """
    flat = x.reshape(-1)
    cols = x.shape[1]
    for r in range(first, last):
        plus = bias[r] if bias.size else float32(0)
        for t in range(x.shape[0]):
            out[t, r] = row_dot(isa, kind, w, r * row_bytes, flat, t * cols, cols) + plus
    return 0
