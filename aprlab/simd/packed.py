"""Fused matrix times few vectors on repacked weights: eight rows side by side, products of bytes, both contracts.

A row of a quantised matrix leaves little to share: every block of 32 brings its own scale, and every sum ends across
lanes. So a matrix is repacked once (`pack`): eight rows are interleaved, four bytes of each, lane r of a vector belongs
to row r, and scales, sums and conversions are done for eight rows at a time. No bit is added and none is lost.

The products are those of unsigned weights with signed bytes of activations, exact in integers:

* contract ``q8``: the activations of `aprlab.simd.q8`, one byte each;
* contract ``f32``: three bytes each. All values of a block (32, or 256 for K types) become integers k = x / 2^e with one
  e a block, |k| < 2^23, in balanced digits of base 256; the digits are multiplied on their own and put together once a
  block. A value moves by 2^(e - 1) at most, 1.01 * 2^-23 of the block's largest, and a block is rounded as often as one
  product of floats. `docs/kernels.md` derives what that does to a sum; `split` says which activations this does not suit:
  they go through plain float products.

The sum of one row depends on nothing but that row and x.
"""

# mypy: ignore-errors

from __future__ import annotations

import math

import numpy as np
from numba import float32, njit, prange
from numba.extending import overload

from aprlab.simd.blocks import K_TYPES, OFFSET, ZERO_POINT, elements, size
from aprlab.simd.decode import FLAT, INLINE, OPTIONS
from aprlab.simd.q8 import _buffers, _round_rows
from aprlab.simd.vectors import (
    absolute,
    add,
    band,
    bor,
    dot2,
    fma,
    hmax,
    hsum,
    load_f32x8,
    load_half,
    load_half8,
    load_i8_as_i16x16,
    load_i8x32,
    load_i16x16,
    load_i32x8,
    load_u16,
    load_u32,
    maximum,
    mul,
    pairs_add,
    pairs_close,
    pairs_factor,
    pairs_factor_signed,
    pairs_load,
    pairs_one,
    pairs_zero,
    round_even,
    sar,
    shl,
    shr,
    splat_f32,
    splat_i8,
    splat_i32,
    store_f32x8,
    store_i8x8,
    store_i16x8,
    store_u16,
    store_u32,
    sub,
    to_f32,
    totals_value,
    totals_zero,
)
from aprlab.types import TensorType

ROWS = 8  # rows side by side

# -- layout -------------------------------------------------------------------------------------------------------------
#
# The fields of a block in the file's order, each (how many, bytes): eight rows' halves, then eight rows' words, … Fifth
# bits of 32 values in one word (Q5_0, Q5_1) also change places: bit 4 s + k, of value 4 s + k, goes to bit s of byte k.
FIELDS = {
    "Q4_0": ((1, 2), (4, 4)),  # d, qs
    "Q4_1": ((2, 2), (4, 4)),  # d, m, qs
    "Q5_0": ((1, 2), (1, 0), (4, 4)),  # d, qh, qs; 0 marks the fifth bits
    "Q5_1": ((2, 2), (1, 0), (4, 4)),
    "Q4_K": ((2, 2), (35, 4)),  # d, dmin, scales, qs
    "Q5_K": ((2, 2), (43, 4)),  # d, dmin, scales, qh, qs
    "Q6_K": ((52, 4), (1, 2)),  # ql, qh, scales, d
}
SPANS = {"Q4_0": 8, "Q4_1": 8, "Q4_K": 8, "Q5_0": 4, "Q5_1": 4, "Q5_K": 4, "Q6_K": 2}
"""Steps of four values whose products stay within 16 bits, zero point taken off: 4 * span * |weight| * 128 / 2 < 2^15."""


@njit(**FLAT)
def _turn(x):
    """32 bits: bit 4 s + k to bit 8 k + s."""
    out = 0
    for k in range(4):
        y = (x >> k) & 0x11111111
        y = (y | (y >> 3)) & 0x03030303
        y = (y | (y >> 6)) & 0x000F000F
        y = (y | (y >> 12)) & 0xFF
        out |= y << (8 * k)
    return out


def fields(type_: TensorType) -> np.ndarray:
    """`FIELDS` of a type as `pack` wants them: int64 (n, 2)."""
    return np.array(FIELDS[type_.name], np.int64)


@njit(**OPTIONS)
def pack(fields, block_bytes, w, row_bytes, out):
    """`w` uint8, 1-D, rows of `row_bytes` in whole eights, into `out` uint8 of the same length. One kernel for all types."""
    for start in range(0, w.size, block_bytes * ROWS):
        group, block = start // (row_bytes * ROWS), start % (row_bytes * ROWS) // ROWS
        at, to = group * row_bytes * ROWS + block, start
        for n in range(fields.shape[0]):
            count, width = fields[n, 0], fields[n, 1]
            for _ in range(count):
                if width == 4:
                    for r in range(ROWS):
                        store_u32(out, to + 4 * r, load_u32(w, at + r * row_bytes))
                elif width == 2:
                    for r in range(ROWS):
                        store_u16(out, to + 2 * r, load_u16(w, at + r * row_bytes))
                else:
                    for r in range(ROWS):
                        store_u32(out, to + 4 * r, _turn(load_u32(w, at + r * row_bytes)))
                at += width if width else 4
                to += ROWS * (width if width else 4)


# -- weights: four values of eight rows at a time -----------------------------------------------------------------------


def _weights(kind, p, at, j, n, s):
    """Four values, from 4 s on, of eight rows as unsigned bytes, a row a lane; the packed block is at `at`. For kernels.

    They are group j's, n = 0, of Q4_K and Q5_K group (j + n)'s with j even, of Q6_K group (j + n)'s with j = 0 or 4: n and s are
    constants where kernels are compiled, j need not be.
    """
    raise NotImplementedError


def _by_kind(stub, table):
    @overload(stub, jit_options=INLINE, strict=False)
    def choose(kind, p, at, j, n, s):
        return table[kind.value]


def _small_nibbles(offset):
    def nibbles(kind, p, at, j, n, s):
        return band(shr(load_i8x32(p, at + offset + 32 * (s % 4)), 4 * (s // 4)), splat_i8(15))

    return nibbles


def _small_fives(high, offset):
    def fives(kind, p, at, j, n, s):
        low = band(shr(load_i8x32(p, at + offset + 32 * (s % 4)), 4 * (s // 4)), splat_i8(15))
        bits = load_i8x32(p, at + high)
        bits = shl(bits, 4 - s) if s <= 4 else shr(bits, s - 4)
        return bor(low, band(bits, splat_i8(16)))

    return fives


def _q4_k(kind, p, at, j, n, s):
    return band(shr(load_i8x32(p, at + 128 + 128 * j + 32 * s), 4 * n), splat_i8(15))


def _q5_k(kind, p, at, j, n, s):
    low = band(shr(load_i8x32(p, at + 384 + 128 * j + 32 * s), 4 * n), splat_i8(15))
    bits = shl(shr(load_i8x32(p, at + 128 + 32 * s), j + n), 4)
    return bor(low, band(bits, splat_i8(16)))


def _q6_k(kind, p, at, j, n, s):
    low = band(shr(load_i8x32(p, at + 128 * j + 256 * (n % 2) + 32 * s), 4 * (n // 2)), splat_i8(15))
    bits = load_i8x32(p, at + 1024 + 64 * j + 32 * s)
    bits = shl(bits, 4 - 2 * n) if n < 3 else shr(bits, 2)
    return bor(low, band(bits, splat_i8(0x30)))


_by_kind(
    _weights,
    {
        "Q4_0": _small_nibbles(16),
        "Q4_1": _small_nibbles(32),
        "Q5_0": _small_fives(16, 48),
        "Q5_1": _small_fives(32, 64),
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
    },
)


# -- 32 products --------------------------------------------------------------------------------------------------------
#
# `digits` is a tuple of int8 arrays, lowest digit first, and `zeros` one of int16 arrays (see `_zero_points`).


def _start(isa, kind, zeros, i):
    """Running sums at the beginning of a span."""
    raise NotImplementedError


@overload(_start, jit_options=INLINE, strict=False)
def _start_overload(isa, kind, zeros, i):
    if kind.value in ZERO_POINT:
        return lambda isa, kind, zeros, i: pairs_load(isa, zeros, i)
    return lambda isa, kind, zeros, i: pairs_zero(isa, zeros)


def _group(isa, kind, totals, p, at, j, n, digits, zeros, i, low, high):
    """The 32 products of group j; `low` and `high` are the factors of their halves. i: where its activations begin."""
    raise NotImplementedError


@overload(_group, jit_options=INLINE, strict=False)
def _group_overload(isa, kind, totals, p, at, j, n, digits, zeros, i, low, high):
    span = SPANS[kind.value]
    if span == 8:

        def eight(isa, kind, totals, p, at, j, n, digits, zeros, i, low, high):
            c = _start(isa, kind, zeros, i // 16)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 0), digits, i)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 1), digits, i + 4)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 2), digits, i + 8)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 3), digits, i + 12)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 4), digits, i + 16)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 5), digits, i + 20)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 6), digits, i + 24)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 7), digits, i + 28)
            return pairs_close(isa, totals, c, low)

        return eight
    if span == 4:

        def four(isa, kind, totals, p, at, j, n, digits, zeros, i, low, high):
            c = _start(isa, kind, zeros, i // 8)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 0), digits, i)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 1), digits, i + 4)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 2), digits, i + 8)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 3), digits, i + 12)
            totals = pairs_close(isa, totals, c, low)
            c = _start(isa, kind, zeros, i // 8 + 2)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 4), digits, i + 16)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 5), digits, i + 20)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 6), digits, i + 24)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 7), digits, i + 28)
            return pairs_close(isa, totals, c, high)

        return four

    def two(isa, kind, totals, p, at, j, n, digits, zeros, i, low, high):
        c = _start(isa, kind, zeros, i // 4)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 0), digits, i)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 1), digits, i + 4)
        totals = pairs_close(isa, totals, c, low)
        c = _start(isa, kind, zeros, i // 4 + 2)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 2), digits, i + 8)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 3), digits, i + 12)
        totals = pairs_close(isa, totals, c, low)
        c = _start(isa, kind, zeros, i // 4 + 4)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 4), digits, i + 16)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 5), digits, i + 20)
        totals = pairs_close(isa, totals, c, high)
        c = _start(isa, kind, zeros, i // 4 + 6)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 6), digits, i + 24)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 7), digits, i + 28)
        return pairs_close(isa, totals, c, high)

    return two


# -- eight rows ---------------------------------------------------------------------------------------------------------


def eight_rows(isa, kind, p, at, digits, zeros, scale, sums, i, count):
    """Dot products f32x8 of the eight rows packed at byte `at` of `p` with activations i … i + count - 1. For kernels."""
    raise NotImplementedError


@overload(eight_rows, jit_options=INLINE, strict=False)
def _eight_rows(isa, kind, p, at, digits, zeros, scale, sums, i, count):
    if kind.value in K_TYPES:
        block = _block_6 if kind.value == "Q6_K" else _block_minima

        def large(isa, kind, p, at, digits, zeros, scale, sums, i, count):
            total, minima = splat_f32(0), splat_f32(0)
            for b in range(count // 256):
                start = at + ROWS * size(kind) * b
                total, minima = block(isa, kind, p, start, digits, zeros, scale, sums, i + 256 * b, total, minima)
            return sub(total, minima)

        return large

    plus = kind.value in OFFSET

    def small(isa, kind, p, at, digits, zeros, scale, sums, i, count):
        total = splat_f32(0)
        for b in range(count // 32):
            start, o = at + ROWS * size(kind) * b, i + 32 * b
            one = pairs_one(isa)
            dots = _group(isa, kind, totals_zero(digits), p, start, 0, 0, digits, zeros, o, one, one)
            d = mul(load_half8(p, start), splat_f32(scale[o // 32]))
            total = fma(d, totals_value(dots), total)
            if plus:
                total = fma(load_half8(p, start + 16), splat_f32(sums[o // 32]), total)
        return total

    return small


@njit(**FLAT)
def _byte(x, i):
    """Byte i of each lane of i32x8, as f32x8."""
    return to_f32(band(shr(x, 8 * i), splat_i32(255)))


@njit(**FLAT)
def _block_minima(isa, kind, p, at, digits, zeros, scale, sums, i, total, minima):  # Q4_K, Q5_K
    a, b, c = load_i32x8(p, at + 32), load_i32x8(p, at + 64), load_i32x8(p, at + 96)
    six, four, two = splat_i32(0x3F3F3F3F), splat_i32(0x0F0F0F0F), splat_i32(0x30303030)
    # first four scales and minima of each row, then the last four
    steps, lows, o = band(a, six), band(b, six), i // 32
    dots, low = totals_zero(digits), splat_f32(0)
    for half in range(2):
        low = fma(_byte(lows, 0), splat_f32(sums[o]), low)
        low = fma(_byte(lows, 1), splat_f32(sums[o + 1]), low)
        low = fma(_byte(lows, 2), splat_f32(sums[o + 2]), low)
        low = fma(_byte(lows, 3), splat_f32(sums[o + 3]), low)
        for j in range(4 * half, 4 * half + 4, 2):
            f = pairs_factor(isa, steps, 0)
            dots = _group(isa, kind, dots, p, at, j, 0, digits, zeros, i + 32 * j, f, f)
            f = pairs_factor(isa, steps, 1)
            dots = _group(isa, kind, dots, p, at, j, 1, digits, zeros, i + 32 * j + 32, f, f)
            steps = shr(steps, 16)
        steps, o = bor(band(c, four), band(shr(a, 2), two)), o + 4
        lows = bor(band(shr(c, 4), four), band(shr(b, 2), two))
    step = splat_f32(scale[i // 256])
    total = fma(mul(load_half8(p, at), step), totals_value(dots), total)
    return total, fma(mul(load_half8(p, at + 16), step), low, minima)


@njit(**FLAT)
def _block_6(isa, kind, p, at, digits, zeros, scale, sums, i, total, minima):
    dots = totals_zero(digits)
    for j in range(0, 8, 4):  # halves of 128 values; a word of scales is for two groups, 16 values each
        o, steps = i + 32 * j, load_i32x8(p, at + 1536 + 16 * j)
        f, g = pairs_factor_signed(isa, steps, 0), pairs_factor_signed(isa, steps, 1)
        dots = _group(isa, kind, dots, p, at, j, 0, digits, zeros, o, f, g)
        f, g = pairs_factor_signed(isa, steps, 2), pairs_factor_signed(isa, steps, 3)
        dots = _group(isa, kind, dots, p, at, j, 1, digits, zeros, o + 32, f, g)
        steps = load_i32x8(p, at + 1568 + 16 * j)
        f, g = pairs_factor_signed(isa, steps, 0), pairs_factor_signed(isa, steps, 1)
        dots = _group(isa, kind, dots, p, at, j, 2, digits, zeros, o + 64, f, g)
        f, g = pairs_factor_signed(isa, steps, 2), pairs_factor_signed(isa, steps, 3)
        dots = _group(isa, kind, dots, p, at, j, 3, digits, zeros, o + 96, f, g)
    step = mul(load_half8(p, at + 1664), splat_f32(scale[i // 256]))
    return fma(step, totals_value(dots), total), minima


# -- activations --------------------------------------------------------------------------------------------------------

_REACH = 1 + 2.0**-7  # so that 2^23 over this is below 127 (1 + 256 + 256^2), what three balanced digits reach
_LEAST, _MOST = float32(2.0**-90), float32(2.0**100)
SPIKE = float32(2.0**-12)


@njit(**FLAT)
def split(x, first, last, block, digits, scale, sums, whole):
    """x[first:last] in blocks of `block` -> digits (three int8 arrays), scale by block, sums by 32; indexed as x is.

    ``x = scale * k`` with ``k = d0 + 256 d1 + 65536 d2`` rounded to nearest, digits in -128 … 127. The scale is a power of
    two such that the block's largest value takes 22 or 23 bits and the sign. Sums are of 32 values of x, over the scale
    where `whole`.

    Returns False, with nothing of use in the arrays, where plain float products are called for: a block holds NaN or
    infinity, its largest value lies outside 2^-90 … 2^100, or that is more than 2^12 times the mean of the others.
    """
    for b in range(first // block, last // block):
        high, size_ = splat_f32(0), splat_f32(0)
        for i in range(b * block, b * block + block, 8):
            a = absolute(load_f32x8(x, i))
            high, size_ = maximum(high, a), add(size_, a)
        largest, total = hmax(high), hsum(size_)
        factor = float32(0)
        scale[b] = 0
        if total != 0:  # NaN too
            if not (total < _MOST) or largest < _LEAST or total - largest < float32(block) * SPIKE * largest:
                return False
            _, exponent = math.frexp(largest * _REACH)
            factor = float32(math.ldexp(1.0, 23 - exponent))
            scale[b] = float32(math.ldexp(1.0, exponent - 23))
        for i in range(b * block, b * block + block, 32):
            around = splat_f32(0)
            for o in range(i, i + 32, 8):
                scaled = mul(load_f32x8(x, o), splat_f32(factor))
                around = add(around, scaled)
                k = round_even(scaled)
                store_i8x8(digits[0], o, k)
                k = sar(add(k, splat_i32(128)), 8)
                store_i8x8(digits[1], o, k)
                store_i8x8(digits[2], o, sar(add(k, splat_i32(128)), 8))
            sums[i // 32] = hsum(around) if whole else hsum(around) * scale[b]
    return True


def _zero_points(kind, digit, zeros, first, last):
    """What sums of unsigned weights start at, so that they end as those of signed ones: - zero point * digits, in pairs."""
    raise NotImplementedError


@overload(_zero_points, jit_options=INLINE, strict=False)
def _zero_points_overload(kind, digit, zeros, first, last):
    zero, values = ZERO_POINT.get(kind.value), 4 * SPANS[kind.value]
    if zero is None:
        return lambda kind, digit, zeros, first, last: None

    def start(kind, digit, zeros, first, last):
        for unit in range(first // values, last // values):
            a = b = 0
            for i in range(unit * values, unit * values + values, 4):
                a += np.int64(digit[i]) + np.int64(digit[i + 1])
                b += np.int64(digit[i + 2]) + np.int64(digit[i + 3])
            zeros[2 * unit], zeros[2 * unit + 1] = -zero * a, -zero * b

    return start


def _unit(kind):
    """Activations that share a pair of starting values."""
    raise NotImplementedError


@overload(_unit, jit_options=INLINE, strict=False)
def _unit_overload(kind):
    values = 4 * SPANS[kind.value]
    return lambda kind: values


def _whole(kind):
    """Whether minima are multiplied with sums of integers."""
    raise NotImplementedError


@overload(_whole, jit_options=INLINE, strict=False)
def _whole_overload(kind):
    answer = kind.value in K_TYPES
    return lambda kind: answer


@njit(**FLAT)
def _thirds(x):
    """A 1-D array in three; numba hands no tuples to parallel code, so digits travel in one array."""
    n = x.size // 3
    return x[:n], x[n : 2 * n], x[2 * n :]


@njit(**FLAT)
def _prepare_f32(kind, x):
    """(digits, zeros, scale, sums, refused) of x (T, n); `refused` has bit t set where `split` said no to row t."""
    count, n = x.shape
    m, flat = count * n, x.reshape(-1)
    digits, zeros = np.empty(3 * m, np.int8), np.empty(6 * (m // _unit(kind)), np.int16)
    parts, starts = _thirds(digits), _thirds(zeros)
    scale, sums = np.empty(m // elements(kind), np.float32), np.empty(m // 32, np.float32)
    refused = 0
    for t in range(count):
        first, last = t * n, t * n + n
        if not split(flat, first, last, elements(kind), parts, scale, sums, _whole(kind)):
            refused |= 1 << t
            continue
        _zero_points(kind, parts[0], starts[0], first, last)
        _zero_points(kind, parts[1], starts[1], first, last)
        _zero_points(kind, parts[2], starts[2], first, last)
    return digits, zeros, scale, sums, refused


@njit(**FLAT)
def _prepare_q8(kind, x):
    """As `_prepare_f32`, of activations rounded to 8 bits: one digit."""
    n = x.shape[1]
    q, d, s = _buffers(kind, x)
    _round_rows(kind, x, q, d, s)
    sums = s
    if s.shape[1] != n // 32:  # of 16 each, of which Q4_K and Q5_K fill the first half and Q6_K needs none
        sums = np.ascontiguousarray(s[:, : n // 32])
    digit, zeros = q.reshape(-1), np.empty(2 * q.size // _unit(kind), np.int16)
    _zero_points(kind, digit, zeros, 0, q.size)
    return digit, zeros, d.reshape(-1), sums.reshape(-1), 0


# -- matrices -----------------------------------------------------------------------------------------------------------


@njit(**FLAT)
def _groups(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, cols, bias, out, first, last):
    """Eights of rows first … last - 1 into out (T, rows)."""
    rows, flat, spare = out.shape[1], out.reshape(-1), np.empty(ROWS, np.float32)
    for group in range(first, last):
        r = ROWS * group
        for t in range(out.shape[0]):
            if (refused >> t) & 1:
                continue
            y = eight_rows(isa, kind, p, r * row_bytes, digits, zeros, scale, sums, t * cols, cols)
            if r + ROWS <= rows:
                store_f32x8(flat, t * rows + r, add(y, load_f32x8(bias, r)) if bias.size else y)
            else:
                store_f32x8(spare, 0, y)
                for i in range(rows - r):
                    out[t, r + i] = spare[i] + (bias[r + i] if bias.size else float32(0))


@njit(**FLAT)
def _groups_f32(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, cols, bias, out, first, last):
    parts, starts = _thirds(digits), _thirds(zeros)
    _groups(isa, kind, p, row_bytes, parts, starts, scale, sums, refused, cols, bias, out, first, last)


@njit(**FLAT)
def _groups_q8(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, cols, bias, out, first, last):
    _groups(isa, kind, p, row_bytes, (digits,), (zeros,), scale, sums, refused, cols, bias, out, first, last)


@njit(**OPTIONS)
def packed_f32_serial(isa, kind, p, row_bytes, x, bias, out):
    """out (T, rows) = x (T, cols) times the transpose of a packed matrix, plus `bias` (rows,) or nothing where empty.

    T is 60 at most. Returns the rows of x that are left to `matmul_f32_serial`, as bits (see `split`).
    """
    digits, zeros, scale, sums, refused = _prepare_f32(kind, x)
    groups = (out.shape[1] + ROWS - 1) // ROWS
    _groups_f32(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, x.shape[1], bias, out, 0, groups)
    return refused


@njit(parallel=True, **OPTIONS)
def packed_f32_parallel(isa, kind, p, row_bytes, x, bias, out, tasks):
    """`packed_f32_serial` with the rows of the matrix in `tasks` parts."""
    digits, zeros, scale, sums, refused = _prepare_f32(kind, x)
    groups, cols = (out.shape[1] + ROWS - 1) // ROWS, x.shape[1]
    for task in prange(tasks):
        first, last = task * groups // tasks, (task + 1) * groups // tasks
        _groups_f32(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, cols, bias, out, first, last)
    return refused


@njit(**OPTIONS)
def packed_q8_serial(isa, kind, p, row_bytes, x, bias, out):
    """`packed_f32_serial` in contract q8: activations rounded to 8 bits first; none are refused."""
    digits, zeros, scale, sums, refused = _prepare_q8(kind, x)
    groups = (out.shape[1] + ROWS - 1) // ROWS
    _groups_q8(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, x.shape[1], bias, out, 0, groups)
    return refused


@njit(parallel=True, **OPTIONS)
def packed_q8_parallel(isa, kind, p, row_bytes, x, bias, out, tasks):
    """`packed_q8_serial` with the rows of the matrix in `tasks` parts."""
    digits, zeros, scale, sums, refused = _prepare_q8(kind, x)
    groups, cols = (out.shape[1] + ROWS - 1) // ROWS, x.shape[1]
    for task in prange(tasks):
        first, last = task * groups // tasks, (task + 1) * groups // tasks
        _groups_q8(isa, kind, p, row_bytes, digits, zeros, scale, sums, refused, cols, bias, out, first, last)
    return refused


# -- Q8_0 under contract f32 --------------------------------------------------------------------------------------------
#
# Bytes with a sign are no factor for the above, and need no unpacking: rows as they lie in the file, times activations in
# two digits of 16 bits, k = d0 + 32768 d1, |k| < 2^30.

_REACH_16, SPIKE_16 = 1 + 2.0**-14, float32(2.0**-19)


@njit(**FLAT)
def split_16(x, first, last, low, high, scale):
    """As `split`, by 32, into two int16 arrays `low` and `high`; values move by less than 2^-30 of the block's largest."""
    for b in range(first // 32, last // 32):
        top, size_ = splat_f32(0), splat_f32(0)
        for i in range(32 * b, 32 * b + 32, 8):
            a = absolute(load_f32x8(x, i))
            top, size_ = maximum(top, a), add(size_, a)
        largest, total = hmax(top), hsum(size_)
        factor = float32(0)
        scale[b] = 0
        if total != 0:
            if not (total < _MOST) or largest < _LEAST or total - largest < float32(32) * SPIKE_16 * largest:
                return False
            _, exponent = math.frexp(largest * _REACH_16)
            factor = float32(math.ldexp(1.0, 30 - exponent))
            scale[b] = float32(math.ldexp(1.0, exponent - 30))
        for i in range(32 * b, 32 * b + 32, 8):
            k = round_even(mul(load_f32x8(x, i), splat_f32(factor)))
            d1 = sar(add(k, splat_i32(16384)), 15)
            store_i16x8(high, i, d1)
            store_i16x8(low, i, sub(k, shl(d1, 15)))
    return True


@njit(**FLAT)
def _prepare_16(x):
    count, n = x.shape
    flat, low, high = x.reshape(-1), np.empty(count * n, np.int16), np.empty(count * n, np.int16)
    scale, refused = np.empty(count * n // 32, np.float32), 0
    for t in range(count):
        if not split_16(flat, t * n, t * n + n, low, high, scale):
            refused |= 1 << t
    return low, high, scale, refused


@njit(**FLAT)
def _rows_16(isa, w, row_bytes, d0, d1, scale, refused, cols, bias, out, first, last):
    for r in range(first, last):
        plus = bias[r] if bias.size else float32(0)
        for t in range(out.shape[0]):
            if (refused >> t) & 1:
                continue
            total, o, at = splat_f32(0), t * cols, r * row_bytes
            for b in range(o // 32, (o + cols) // 32):
                u, v = load_i8_as_i16x16(w, at + 2), load_i8_as_i16x16(w, at + 18)
                low = add(dot2(isa, u, load_i16x16(d0, 32 * b)), dot2(isa, v, load_i16x16(d0, 32 * b + 16)))
                high = add(dot2(isa, u, load_i16x16(d1, 32 * b)), dot2(isa, v, load_i16x16(d1, 32 * b + 16)))
                dots = fma(to_f32(high), splat_f32(32768), to_f32(low))
                total = fma(splat_f32(load_half(w, at) * scale[b]), dots, total)
                at += 34
            out[t, r] = hsum(total) + plus


@njit(**OPTIONS)
def q8_0_f32_serial(isa, kind, w, row_bytes, x, bias, out):
    """`packed_f32_serial` of Q8_0, whose matrix is not packed."""
    d0, d1, scale, refused = _prepare_16(x)
    _rows_16(isa, w, row_bytes, d0, d1, scale, refused, x.shape[1], bias, out, 0, out.shape[1])
    return refused


@njit(parallel=True, **OPTIONS)
def q8_0_f32_parallel(isa, kind, w, row_bytes, x, bias, out, tasks):
    """`q8_0_f32_serial` with the rows of the matrix in `tasks` parts."""
    d0, d1, scale, refused = _prepare_16(x)
    rows, cols = out.shape[1], x.shape[1]
    for task in prange(tasks):
        first, last = task * rows // tasks, (task + 1) * rows // tasks
        _rows_16(isa, w, row_bytes, d0, d1, scale, refused, cols, bias, out, first, last)
    return refused
