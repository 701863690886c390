"""Fused matrix times few vectors on quantised blocks, contract ``f32``: weights as decoded, times float32 activations.

A row's sum depends on nothing but that row and x: not on threads, tasks or neighbours. Types with minima decode each
weight exactly before it is multiplied; symmetric types take their scale out of a group of 16 or 32 products.
"""

# mypy: ignore-errors

from __future__ import annotations

from numba import float32, njit, prange
from numba.extending import overload

from aprlab.simd.blocks import FLOATS, OFFSET, elements, factors, integers, size
from aprlab.simd.decode import FLAT, INLINE, LOADERS, OPTIONS
from aprlab.simd.isa import AVX512
from aprlab.simd.vectors import (
    add,
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
        return _with_plus_wide if wide else _with_plus
    return _symmetric_wide if wide else _symmetric


def _with_plus(isa, kind, w, at, x, o, count):
    a = b = c = d = splat_f32(0)
    for block in range(count // elements(kind)):
        start = at + block * size(kind)
        for j in range(elements(kind) // 32):
            q = integers(kind, w, start, j)
            low, high, plus_low, plus_high = factors(kind, w, start, j)
            s, t, m, n = splat_f32(low), splat_f32(high), splat_f32(plus_low), splat_f32(plus_high)
            i = o + block * elements(kind) + 32 * j
            a = fma(fma(s, widen0(q), m), load_f32x8(x, i), a)
            b = fma(fma(s, widen1(q), m), load_f32x8(x, i + 8), b)
            c = fma(fma(t, widen2(q), n), load_f32x8(x, i + 16), c)
            d = fma(fma(t, widen3(q), n), load_f32x8(x, i + 24), d)
    return hsum(add(add(a, b), add(c, d)))


def _with_plus_wide(isa, kind, w, at, x, o, count):
    a = b = splat_f32x16(0)
    for block in range(count // elements(kind)):
        start = at + block * size(kind)
        for j in range(elements(kind) // 32):
            q = integers(kind, w, start, j)
            low, high, plus_low, plus_high = factors(kind, w, start, j)
            i = o + block * elements(kind) + 32 * j
            first = fma(splat_f32x16(low), widen_low(q), splat_f32x16(plus_low))
            second = fma(splat_f32x16(high), widen_high(q), splat_f32x16(plus_high))
            a = fma(first, load_f32x16(x, i), a)
            b = fma(second, load_f32x16(x, i + 16), b)
    return hsum(add(fold(a), fold(b)))


def _symmetric(isa, kind, w, at, x, o, count):
    a = b = splat_f32(0)
    for block in range(count // elements(kind)):
        start = at + block * size(kind)
        for j in range(elements(kind) // 32):
            q = integers(kind, w, start, j)
            low, high, _, _ = factors(kind, w, start, j)
            i = o + block * elements(kind) + 32 * j
            first = fma(widen1(q), load_f32x8(x, i + 8), mul(widen0(q), load_f32x8(x, i)))
            second = fma(widen3(q), load_f32x8(x, i + 24), mul(widen2(q), load_f32x8(x, i + 16)))
            a = fma(splat_f32(low), first, a)
            b = fma(splat_f32(high), second, b)
    return hsum(add(a, b))


def _symmetric_wide(isa, kind, w, at, x, o, count):
    a = b = splat_f32x16(0)
    for block in range(count // elements(kind)):
        start = at + block * size(kind)
        for j in range(elements(kind) // 32):
            q = integers(kind, w, start, j)
            low, high, _, _ = factors(kind, w, start, j)
            i = o + block * elements(kind) + 32 * j
            a = fma(splat_f32x16(low), mul(widen_low(q), load_f32x16(x, i)), a)
            b = fma(splat_f32x16(high), mul(widen_high(q), load_f32x16(x, i + 16)), b)
    return hsum(add(fold(a), fold(b)))


@njit(**FLAT)
def _rows(isa, kind, w, row_bytes, x, bias, out, first, last):
    flat = x.reshape(-1)
    cols = x.shape[1]
    for r in range(first, last):
        plus = bias[r] if bias.size else float32(0)
        for t in range(x.shape[0]):
            out[t, r] = row_dot(isa, kind, w, r * row_bytes, flat, t * cols, cols) + plus


@njit(**OPTIONS)
def matmul_f32_serial(isa, kind, w, row_bytes, x, bias, out):
    """out (T, rows) = x (T, cols) times the transpose of `w`, plus `bias` (rows,) or nothing where that is empty.

    `w` is uint8, 1-D, rows of `row_bytes`. A row of w is read once for all T, which should be few.
    """
    _rows(isa, kind, w, row_bytes, x, bias, out, 0, out.shape[1])


@njit(parallel=True, **OPTIONS)
def matmul_f32_parallel(isa, kind, w, row_bytes, x, bias, out, tasks):
    """`matmul_f32_serial` with the rows of w in `tasks` parts."""
    for task in prange(tasks):
        rows = out.shape[1]
        _rows(isa, kind, w, row_bytes, x, bias, out, task * rows // tasks, (task + 1) * rows // tasks)
