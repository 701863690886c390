"""Fused matrix times vector on quantised blocks, contract ``f32``: weights as decoded, times float32 activations.

A row's sum depends on nothing but that row and x: not on threads, tasks or neighbours. Types with minima decode each
weight exactly before it is multiplied; symmetric types take their scale out of a group of 16 or 32 products.
"""

# mypy: ignore-errors

from __future__ import annotations

from numba import njit, prange
from numba.extending import overload

from aprlab.simd.blocks import FLOATS, OFFSET, elements, factors, integers, size
from aprlab.simd.decode import INLINE, LOADERS, OPTIONS
from aprlab.simd.vectors import (
    add,
    fma,
    halves_f32,
    hsum,
    load_f32x8,
    mul,
    splat_f32,
    widen0,
    widen1,
    widen2,
    widen3,
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
                a = fma(isa, load(w, at + i * step), load_f32x8(x, o + i), a)
                b = fma(isa, load(w, at + (i + 8) * step), load_f32x8(x, o + i + 8), b)
                c = fma(isa, load(w, at + (i + 16) * step), load_f32x8(x, o + i + 16), c)
                d = fma(isa, load(w, at + (i + 24) * step), load_f32x8(x, o + i + 24), d)
            total = hsum(add(add(a, b), add(c, d)))
            for i in range(count // 32 * 32, count):
                total += load_one(w, at + i * step) * x[o + i]
            return total

        return floats

    if kind.value in OFFSET:

        def with_plus(isa, kind, w, at, x, o, count):
            a = b = c = d = splat_f32(0)
            for block in range(count // elements(kind)):
                start = at + block * size(kind)
                for j in range(elements(kind) // 32):
                    q = integers(isa, kind, w, start, j)
                    low, high, plus_low, plus_high = factors(isa, kind, w, start, j)
                    l, h, pl, ph = splat_f32(low), splat_f32(high), splat_f32(plus_low), splat_f32(plus_high)
                    i = o + block * elements(kind) + 32 * j
                    a = fma(isa, fma(isa, l, widen0(q), pl), load_f32x8(x, i), a)
                    b = fma(isa, fma(isa, l, widen1(q), pl), load_f32x8(x, i + 8), b)
                    c = fma(isa, fma(isa, h, widen2(q), ph), load_f32x8(x, i + 16), c)
                    d = fma(isa, fma(isa, h, widen3(q), ph), load_f32x8(x, i + 24), d)
            return hsum(add(add(a, b), add(c, d)))

        return with_plus

    def symmetric(isa, kind, w, at, x, o, count):
        a = b = splat_f32(0)
        for block in range(count // elements(kind)):
            start = at + block * size(kind)
            for j in range(elements(kind) // 32):
                q = integers(isa, kind, w, start, j)
                low, high, plus_low, plus_high = factors(isa, kind, w, start, j)
                i = o + block * elements(kind) + 32 * j
                first = fma(isa, widen1(q), load_f32x8(x, i + 8), mul(widen0(q), load_f32x8(x, i)))
                second = fma(isa, widen3(q), load_f32x8(x, i + 24), mul(widen2(q), load_f32x8(x, i + 16)))
                a = fma(isa, splat_f32(low), first, a)
                b = fma(isa, splat_f32(high), second, b)
        return hsum(add(a, b))

    return symmetric


@njit(**OPTIONS)
def matvec_serial(isa, kind, w, row_bytes, x, out):
    """out[r] = row r of `w` (uint8, 1-D, rows of `row_bytes`) · x; float32, 1-D."""
    for r in range(out.size):
        out[r] = row_dot(isa, kind, w, r * row_bytes, x, 0, x.size)


@njit(parallel=True, **OPTIONS)
def matvec_parallel(isa, kind, w, row_bytes, x, out, tasks):
    """`matvec_serial` with the rows in `tasks` parts."""
    for task in prange(tasks):
        for r in range(task * out.size // tasks, (task + 1) * out.size // tasks):
            out[r] = row_dot(isa, kind, w, r * row_bytes, x, 0, x.size)
