"""Fused matrix times few vectors on repacked weights: eight rows side by side, products of bytes, both contracts.

A row of a quantised matrix leaves little to share: every block of 32 brings its own scale, and every sum ends across
lanes. So a matrix is repacked once (`pack`): eight rows are interleaved, four bytes of each, lane r of a vector belongs
to row r, and scales, sums and conversions are done for eight rows at a time. No bit is added and none is lost.

The products are those of unsigned weights with signed bytes of activations, exact in integers:

* contract ``q8``: the activations of `aprlab.kernels.simd.q8`, one byte each;
* contract ``f32``: three bytes each. All values of a block (32, or 256 for K types) become integers k = x / 2^e with one
  e a block, |k| < 2^23, in balanced digits of base 256; the digits are multiplied on their own and put together once a
  block. A value moves by 2^(e - 1) at most, 1.01 * 2^-23 of the block's largest, and a block is rounded as often as one
  product of floats. `docs/kernels.md` derives what that does to a sum; `split` says which activations this does not suit:
  they go through plain float products.

Tokens come in tiles (`TILE_F32`, `TILE_Q8`), for which weights are unpacked once; one token is a tile of its own. With AVX-512
tiles take two packed groups at once, sixteen rows in the lanes of one register. What comes out for a token is the same, bit for
bit, whichever: the sum of one row depends on nothing but that row and its x.
"""

# mypy: ignore-errors

from __future__ import annotations

import math

import numpy as np
from numba import float32
from numba.extending import overload

from aprlab.kernels.simd import isa as isas
from aprlab.kernels.simd.blocks import K_TYPES, OFFSET, ZERO_POINT, elements, size
from aprlab.kernels.simd.decode import FLAT, INLINE, OPTIONS
from aprlab.kernels.simd.isa import AVX512
from aprlab.kernels.simd.kernel_cache import njit
from aprlab.kernels.simd.q8 import _buffers, _round_rows
from aprlab.kernels.simd.vectors import (
    absolute,
    add,
    band,
    bor,
    dot2,
    each_add,
    each_fma,
    each_scaled,
    each_store,
    each_sub,
    each_zero,
    fma,
    hmax,
    hsum,
    load_f32x8,
    load_f32x16,
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
    pair_word,
    pairs_add,
    pairs_close,
    pairs_factor,
    pairs_factor_signed,
    pairs_load,
    pairs_one,
    pairs_zero,
    prefetch,
    round_even,
    sar,
    shl,
    shr,
    splat_f32,
    splat_i8,
    splat_i32,
    store_i8x8,
    store_i16x8,
    store_u16,
    store_u32,
    sub,
    to_f32,
    totals_value,
    totals_zero,
)
from aprlab.quants.types import TensorType

ROWS = 8  # rows side by side

# -- layout -------------------------------------------------------------------------------------------------------------
#
# The fields of a block, each (how many, bytes, where it begins in the file's block): eight rows' halves, then eight rows'
# words, … Mostly that is the file's order; halves of Q6_K lie by themselves, so that memory is read from front to back. Fifth
# bits of 32 values in one word (Q5_0, Q5_1) also change places: bit 4 s + k, of value 4 s + k, goes to bit s of byte k.
FIELDS = {
    "Q4_0": ((1, 2, 0), (4, 4, 2)),  # d, qs
    "Q4_1": ((2, 2, 0), (4, 4, 4)),  # d, m, qs
    "Q5_0": ((1, 2, 0), (1, 0, 2), (4, 4, 6)),  # d, qh, qs; 0 marks the fifth bits
    "Q5_1": ((2, 2, 0), (1, 0, 4), (4, 4, 8)),
    "Q4_K": ((2, 2, 0), (35, 4, 4)),  # d, dmin, scales, qs
    "Q5_K": ((2, 2, 0), (43, 4, 4)),  # d, dmin, scales, qh, qs
    "Q6_K": (
        (16, 4, 0), (8, 4, 128), (2, 4, 192),  # ql, qh, scales of the first 128 values
        (16, 4, 64), (8, 4, 160), (2, 4, 200), (1, 2, 208),  # and of the others; d
    ),
}  # fmt: skip
SPANS = {"Q4_0": 8, "Q4_1": 8, "Q4_K": 8, "Q5_0": 4, "Q5_1": 4, "Q5_K": 4, "Q6_K": 2}
"""Steps of four values whose products stay within 16 bits, zero point taken off: 4 * span * |weight| * 128 / 2 < 2^15."""


def _span(isa, kind):
    """Steps of four values that are summed before a factor: all that share one where sums have 32 bits from the start (VNNI)."""
    if isa.value == AVX512.name:
        return 4 if kind.value == "Q6_K" else 8
    return SPANS[kind.value]


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
    """`FIELDS` of a type as `pack` needs them: int64 (n, 3)."""
    return np.array(FIELDS[type_.name], np.int64)


@njit(**OPTIONS)
def pack(fields, block_bytes, w, row_bytes, out):
    """`w` uint8, 1-D, rows of `row_bytes` in whole eights, into `out` uint8 of the same length. One kernel for all types."""
    for start in range(0, w.size, block_bytes * ROWS):
        group, block = start // (row_bytes * ROWS), start % (row_bytes * ROWS) // ROWS
        to = start
        for n in range(fields.shape[0]):
            count, width = fields[n, 0], fields[n, 1]
            at = group * row_bytes * ROWS + block + fields[n, 2]
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
    half = at + 208 * j
    low = band(shr(load_i8x32(p, half + 256 * (n % 2) + 32 * s), 4 * (n // 2)), splat_i8(15))
    bits = load_i8x32(p, half + 512 + 32 * s)
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
# `tile` has no values that matter, see `aprlab.kernels.simd.vectors`; digits and zeros lie as `pairs_add` and `pairs_load` say.

ONE_F32, TILE_F32 = ((0, 0, 0),), ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0))
ONE_Q8, TILE_Q8 = ((0,),), ((0,), (0,), (0,), (0,))


def _start(isa, kind, tile, zeros, unit):
    """Running sums at the beginning of a span."""
    raise NotImplementedError


@overload(_start, jit_options=INLINE, strict=False)
def _start_overload(isa, kind, tile, zeros, unit):
    if kind.value in ZERO_POINT:
        return lambda isa, kind, tile, zeros, unit: pairs_load(isa, tile, zeros, unit)
    return lambda isa, kind, tile, zeros, unit: pairs_zero(isa, tile)


def _group(isa, kind, tile, totals, p, at, j, n, digits, zeros, i, low, high):
    """The 32 products of group j; `low` and `high` are the factors of their halves. i: where its activations begin."""
    raise NotImplementedError


@overload(_group, jit_options=INLINE, strict=False)
def _group_overload(isa, kind, tile, totals, p, at, j, n, digits, zeros, i, low, high):
    span = _span(isa, kind)
    if span == 8:

        def eight(isa, kind, tile, totals, p, at, j, n, digits, zeros, i, low, high):
            c = _start(isa, kind, tile, zeros, i // 32)
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

        def four(isa, kind, tile, totals, p, at, j, n, digits, zeros, i, low, high):
            c = _start(isa, kind, tile, zeros, i // 16)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 0), digits, i)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 1), digits, i + 4)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 2), digits, i + 8)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 3), digits, i + 12)
            totals = pairs_close(isa, totals, c, low)
            c = _start(isa, kind, tile, zeros, i // 16 + 1)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 4), digits, i + 16)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 5), digits, i + 20)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 6), digits, i + 24)
            c = pairs_add(isa, c, _weights(kind, p, at, j, n, 7), digits, i + 28)
            return pairs_close(isa, totals, c, high)

        return four

    def two(isa, kind, tile, totals, p, at, j, n, digits, zeros, i, low, high):
        c = _start(isa, kind, tile, zeros, i // 8)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 0), digits, i)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 1), digits, i + 4)
        totals = pairs_close(isa, totals, c, low)
        c = _start(isa, kind, tile, zeros, i // 8 + 1)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 2), digits, i + 8)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 3), digits, i + 12)
        totals = pairs_close(isa, totals, c, low)
        c = _start(isa, kind, tile, zeros, i // 8 + 2)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 4), digits, i + 16)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 5), digits, i + 20)
        totals = pairs_close(isa, totals, c, high)
        c = _start(isa, kind, tile, zeros, i // 8 + 3)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 6), digits, i + 24)
        c = pairs_add(isa, c, _weights(kind, p, at, j, n, 7), digits, i + 28)
        return pairs_close(isa, totals, c, high)

    return two


# -- eight rows ---------------------------------------------------------------------------------------------------------


def eight_rows(isa, kind, tile, p, at, digits, zeros, scale, sums, count):
    """The eight rows packed at byte `at` of `p` times a tile of `count` values a token: f32x8 for each. For kernels.

    `p` may be a tuple (array, bytes): then also the eight rows so many bytes behind, and f32x16 for each.
    """
    raise NotImplementedError


@overload(eight_rows, jit_options=INLINE, strict=False)
def _eight_rows(isa, kind, tile, p, at, digits, zeros, scale, sums, count):
    if kind.value in K_TYPES:
        block = _block_6 if kind.value == "Q6_K" else _block_minima

        def large(isa, kind, tile, p, at, digits, zeros, scale, sums, count):
            total, minima = each_zero(tile, p), each_zero(tile, p)
            for b in range(count // 256):
                start = at + ROWS * size(kind) * b
                total, minima = block(isa, kind, tile, p, start, digits, zeros, scale, sums, b, total, minima)
            return each_sub(total, minima)

        return large

    plus = kind.value in OFFSET

    def small(isa, kind, tile, p, at, digits, zeros, scale, sums, count):
        total, one = each_zero(tile, p), pairs_one(isa)
        for b in range(count // 32):
            start = at + ROWS * size(kind) * b
            for line in range(0, ROWS * size(kind), 64):
                prefetch(p, start + AHEAD + line)
            dots = _group(isa, kind, tile, totals_zero(tile, p), p, start, 0, 0, digits, zeros, 32 * b, one, one)
            total = each_scaled(total, load_half8(p, start), scale, b, totals_value(tile, dots))
            if plus:
                total = each_fma(total, load_half8(p, start + 16), sums, b)
        return total

    return small


AHEAD = 4096
"""Bytes from what is being multiplied to what memory is asked for; by itself the processor does not see fields a block apart."""


@njit(**FLAT)
def _ask(kind, p, at, part):
    """Ask memory for an eighth of a block, AHEAD of the one at `at`."""
    for line in range(0, size(kind), 64):
        prefetch(p, at + AHEAD + size(kind) * part + line)


@njit(**FLAT)
def _byte(x, i):
    """Byte i of each lane of i32x8, as f32x8."""
    return to_f32(band(shr(x, 8 * i), splat_i32(255)))


@njit(**FLAT)
def _block_minima(isa, kind, tile, p, at, digits, zeros, scale, sums, block, total, minima):  # Q4_K, Q5_K
    a, b, c = load_i32x8(p, at + 32), load_i32x8(p, at + 64), load_i32x8(p, at + 96)
    six, four, two = splat_i32(0x3F3F3F3F), splat_i32(0x0F0F0F0F), splat_i32(0x30303030)
    # first four scales and minima of each row, then the last four
    steps, lows, o = band(a, six), band(b, six), 8 * block
    dots, low = totals_zero(tile, p), each_zero(tile, p)
    for half in range(2):
        low = each_fma(low, _byte(lows, 0), sums, o)
        low = each_fma(low, _byte(lows, 1), sums, o + 1)
        low = each_fma(low, _byte(lows, 2), sums, o + 2)
        low = each_fma(low, _byte(lows, 3), sums, o + 3)
        for j in range(4 * half, 4 * half + 4, 2):
            i = 256 * block + 32 * j
            _ask(kind, p, at, j)
            f = pairs_factor(isa, steps, 0)
            dots = _group(isa, kind, tile, dots, p, at, j, 0, digits, zeros, i, f, f)
            _ask(kind, p, at, j + 1)
            f = pairs_factor(isa, steps, 1)
            dots = _group(isa, kind, tile, dots, p, at, j, 1, digits, zeros, i + 32, f, f)
            steps = shr(steps, 16)
        steps, o = bor(band(c, four), band(shr(a, 2), two)), o + 4
        lows = bor(band(shr(c, 4), four), band(shr(b, 2), two))
    total = each_scaled(total, load_half8(p, at), scale, block, totals_value(tile, dots))
    return total, each_scaled(minima, load_half8(p, at + 16), scale, block, low)


@njit(**FLAT)
def _block_6(isa, kind, tile, p, at, digits, zeros, scale, sums, block, total, minima):
    dots = totals_zero(tile, p)
    for j in range(0, 8, 4):  # halves of 128 values; a word of scales is for two groups, 16 values each
        o, steps = 256 * block + 32 * j, load_i32x8(p, at + 768 + 208 * j)
        _ask(kind, p, at, j)
        f, g = pairs_factor_signed(isa, steps, 0), pairs_factor_signed(isa, steps, 1)
        dots = _group(isa, kind, tile, dots, p, at, j, 0, digits, zeros, o, f, g)
        _ask(kind, p, at, j + 1)
        f, g = pairs_factor_signed(isa, steps, 2), pairs_factor_signed(isa, steps, 3)
        dots = _group(isa, kind, tile, dots, p, at, j, 1, digits, zeros, o + 32, f, g)
        steps = load_i32x8(p, at + 800 + 208 * j)
        _ask(kind, p, at, j + 2)
        f, g = pairs_factor_signed(isa, steps, 0), pairs_factor_signed(isa, steps, 1)
        dots = _group(isa, kind, tile, dots, p, at, j, 2, digits, zeros, o + 64, f, g)
        _ask(kind, p, at, j + 3)
        f, g = pairs_factor_signed(isa, steps, 2), pairs_factor_signed(isa, steps, 3)
        dots = _group(isa, kind, tile, dots, p, at, j, 3, digits, zeros, o + 96, f, g)
    return each_scaled(total, load_half8(p, at + 1664), scale, block, totals_value(tile, dots)), minima


# -- activations --------------------------------------------------------------------------------------------------------

_REACH = 1 + 2.0**-7  # so that 2^23 over this is below 127 (1 + 256 + 256^2), what three balanced digits reach
_LEAST, _MOST = float32(2.0**-90), float32(2.0**100)
SPIKE = float32(2.0**-12)


@njit(**FLAT)
def split(x, block, tile, n, digits, scale, sums, whole):
    """x (cols,) in blocks of `block`, as token n of a tile: into three digits, a scale a block, and sums of 32.

    ``x = scale * k`` with ``k = d0 + 256 d1 + 65536 d2`` rounded to nearest, digits in -128 … 127. The scale is a power of
    two such that the block's largest value takes 22 or 23 bits and the sign. Sums are of 32 values of x, over the scale
    where `whole`. Digits are laid out as `pairs_add` needs them, scales and sums as [block][token].

    Returns False, with nothing useful in the arrays, where plain float products are called for: a block holds NaN or
    infinity, its largest value is outside 2^-90 … 2^100, or that is more than 2^12 times the mean of the others.
    """
    tokens, count = len(tile), len(tile) * 3
    for b in range(x.size // block):
        high, size_ = splat_f32(0), splat_f32(0)
        for i in range(b * block, b * block + block, 8):
            a = absolute(load_f32x8(x, i))
            high, size_ = maximum(high, a), add(size_, a)
        largest, total = hmax(high), hsum(size_)
        factor = step = float32(0)
        if total != 0:  # NaN too
            if not (total < _MOST) or largest < _LEAST or total - largest < float32(block) * SPIKE * largest:
                return False
            _, exponent = math.frexp(largest * _REACH)
            factor = float32(math.ldexp(1.0, 23 - exponent))
            step = float32(math.ldexp(1.0, exponent - 23))
        scale[b * tokens + n] = step
        for i in range(b * block, b * block + block, 32):
            around = splat_f32(0)
            for o in range(i, i + 32, 8):
                scaled = mul(load_f32x8(x, o), splat_f32(factor))
                around = add(around, scaled)
                k = round_even(scaled)
                at = count * o + 12 * n
                store_i8x8(digits, at, 4 * count, k)
                k = sar(add(k, splat_i32(128)), 8)
                store_i8x8(digits, at + 4, 4 * count, k)
                store_i8x8(digits, at + 8, 4 * count, sar(add(k, splat_i32(128)), 8))
            sums[i // 32 * tokens + n] = hsum(around) if whole else hsum(around) * step
    return True


def _zero_points(isa, kind, count, digits, zeros):
    """What sums of unsigned weights start at, so that they end as those of signed ones: - zero point * digits, in pairs.

    `count` digits of tokens lie side by side. For kernels.
    """
    raise NotImplementedError


@overload(_zero_points, jit_options=INLINE, strict=False)
def _zero_points_overload(isa, kind, count, digits, zeros):
    zero, span = ZERO_POINT.get(kind.value), _span(isa, kind)
    if zero is None:
        return lambda isa, kind, count, digits, zeros: None

    def start(isa, kind, count, digits, zeros):
        for place in range(zeros.size):
            first = place // count * span * count + place % count
            a = b = 0
            for at in range(4 * first, 4 * (first + span * count), 4 * count):
                a += np.int64(digits[at]) + np.int64(digits[at + 1])
                b += np.int64(digits[at + 2]) + np.int64(digits[at + 3])
            zeros[place] = pair_word(isa, -zero * a, -zero * b)

    return start


def _unit(isa, kind):
    """Activations that share a starting value."""
    raise NotImplementedError


@overload(_unit, jit_options=INLINE, strict=False)
def _unit_overload(isa, kind):
    values = 4 * _span(isa, kind)
    return lambda isa, kind: values


def _whole(kind):
    """Whether minima are multiplied with sums of integers."""
    raise NotImplementedError


@overload(_whole, jit_options=INLINE, strict=False)
def _whole_overload(kind):
    answer = kind.value in K_TYPES
    return lambda kind: answer


@njit(**FLAT)
def _tiles(isa, kind, tile, count, cols):
    """Empty (digits, zeros, scale, sums) for `count` tokens in whole tiles, one behind the other."""
    m = -(-count // len(tile)) * len(tile) * cols
    each = m * len(tile[0])
    return (
        np.empty(each, np.int8),
        np.empty(each // _unit(isa, kind), np.int32),
        np.empty(m // elements(kind), np.float32),
        np.empty(m // 32, np.float32),
    )


@njit(**FLAT)
def _of_tile(isa, kind, tile, t, cols, digits, zeros, scale, sums):
    """What belongs to the tile that token t begins."""
    m = t * cols
    each = m * len(tile[0])
    return digits[each:], zeros[each // _unit(isa, kind) :], scale[m // elements(kind) :], sums[m // 32 :]


@njit(**FLAT)
def _prepare_f32(isa, kind, tile, x, refused):
    """(digits, zeros, scale, sums, number refused) of x (T, cols); refused[t] = 1 where `split` said no to token t.

    The last tile is filled up with its last token.
    """
    count, cols = x.shape
    tokens, odd = len(tile), 0
    digits, zeros, scale, sums = _tiles(isa, kind, tile, count, cols)
    for t in range(-(-count // tokens) * tokens):
        row = min(t, count - 1)
        d, _, c, s = _of_tile(isa, kind, tile, t // tokens * tokens, cols, digits, zeros, scale, sums)
        if not split(x[row], elements(kind), tile, t % tokens, d, c, s, _whole(kind)):
            refused[row] = 1
            odd += 1
    _zero_points(isa, kind, tokens * 3, digits, zeros)
    return digits, zeros, scale, sums, odd


@njit(**FLAT)
def _prepare_q8(isa, kind, tile, x):
    """As `_prepare_f32`, of activations rounded to 8 bits: one digit, none refused."""
    count, cols = x.shape
    tokens = len(tile)
    digits, zeros, scale, sums = _tiles(isa, kind, tile, count, cols)
    q, d, s = _buffers(kind, x)
    _round_rows(kind, x, q, d, s)
    for t in range(-(-count // tokens) * tokens):
        row, n = min(t, count - 1), t % tokens
        places, _, steps, whole = _of_tile(isa, kind, tile, t - n, cols, digits, zeros, scale, sums)
        for i in range(0, cols, 4):
            store_u32(places, tokens * i + 4 * n, load_u32(q[row], i))
        for b in range(d.shape[1]):
            steps[b * tokens + n] = d[row, b]
        for b in range(cols // 32):  # of K types the first half of a row of s, if they have minima at all
            whole[b * tokens + n] = s[row, b]
    _zero_points(isa, kind, tokens, digits, zeros)
    return digits, zeros, scale, sums


# -- matrices -----------------------------------------------------------------------------------------------------------

_NEAR = 1 << 17  # bytes of a matrix that all tiles are multiplied with in turn: they stay in a second-level cache


def _sixteens(isa, kind, tile, p, row_bytes, digits, zeros, scale, sums, cols, bias, out, first, last, t):
    """As many rows from `first` on as can be taken in sixteens, of the tile that token t begins; returns the row after them."""
    raise NotImplementedError


@overload(_sixteens, jit_options=INLINE, strict=False)
def _sixteens_overload(isa, kind, tile, p, row_bytes, digits, zeros, scale, sums, cols, bias, out, first, last, t):
    wide = isa.value == AVX512.name and isas.supported(AVX512)
    if not wide or len(tile) == 1:  # one token waits for memory
        return lambda isa, kind, tile, p, row_bytes, digits, zeros, scale, sums, cols, bias, out, first, last, t: first

    def taken(isa, kind, tile, p, row_bytes, digits, zeros, scale, sums, cols, bias, out, first, last, t):
        (count, rows), flat, r = out.shape, out.reshape(-1), first
        while r + 2 * ROWS <= min(last, rows):
            y = eight_rows(isa, kind, tile, (p, ROWS * row_bytes), r * row_bytes, digits, zeros, scale, sums, cols)
            if bias.size:
                y = each_add(y, load_f32x16(bias, r))
            each_store(flat, t * rows + r, rows, y, count - t)
            r += 2 * ROWS
        return r

    return taken


@njit(**FLAT)
def _rows(isa, kind, tile, p, row_bytes, digits, zeros, scale, sums, cols, bias, out, first, last):
    """Rows first … last - 1 into out (T, rows); first is a multiple of eight."""
    (count, rows), flat, spare = out.shape, out.reshape(-1), np.empty(ROWS * len(tile), np.float32)
    near = max(_NEAR // row_bytes // (2 * ROWS), 1) * 2 * ROWS
    for low in range(first, last, near):
        high = min(low + near, last)
        for t in range(0, count, len(tile)):
            d, z, c, s = _of_tile(isa, kind, tile, t, cols, digits, zeros, scale, sums)
            rest = _sixteens(isa, kind, tile, p, row_bytes, d, z, c, s, cols, bias, out, low, high, t)
            for r in range(rest, high, ROWS):
                y = eight_rows(isa, kind, tile, p, r * row_bytes, d, z, c, s, cols)
                if r + ROWS <= rows:
                    if bias.size:
                        y = each_add(y, load_f32x8(bias, r))
                    each_store(flat, t * rows + r, rows, y, count - t)
                else:
                    each_store(spare, 0, ROWS, y, count - t)
                    for n in range(min(len(tile), count - t)):
                        for i in range(rows - r):
                            out[t + n, r + i] = spare[ROWS * n + i] + (bias[r + i] if bias.size else float32(0))


@njit(**OPTIONS)
def packed_f32(isa, kind, p, row_bytes, x, bias, out, refused, first, last):
    """`aprlab.kernels.simd.matmul_f32.matmul_f32` of a packed matrix, token by token; `first` is a multiple of eight.

    Tokens whose `refused` (T,) becomes 1 are left to `matmul_f32` (see `split`). Returns how many; it depends on nothing but x.
    """
    digits, zeros, scale, sums, odd = _prepare_f32(isa, kind, ONE_F32, x, refused)
    _rows(isa, kind, ONE_F32, p, row_bytes, digits, zeros, scale, sums, x.shape[1], bias, out, first, last)
    return odd


@njit(**OPTIONS)
def packed_f32_tiles(isa, kind, p, row_bytes, x, bias, out, refused, first, last):
    """`packed_f32`, four tokens at a time: for prompts."""
    digits, zeros, scale, sums, odd = _prepare_f32(isa, kind, TILE_F32, x, refused)
    _rows(isa, kind, TILE_F32, p, row_bytes, digits, zeros, scale, sums, x.shape[1], bias, out, first, last)
    return odd


@njit(**OPTIONS)
def packed_q8(isa, kind, p, row_bytes, x, bias, out, refused, first, last):
    """`packed_f32` in contract q8: activations rounded to 8 bits first; none are refused."""
    digits, zeros, scale, sums = _prepare_q8(isa, kind, ONE_Q8, x)
    _rows(isa, kind, ONE_Q8, p, row_bytes, digits, zeros, scale, sums, x.shape[1], bias, out, first, last)
    return 0


@njit(**OPTIONS)
def packed_q8_tiles(isa, kind, p, row_bytes, x, bias, out, refused, first, last):
    """`packed_q8`, four tokens at a time: for prompts."""
    digits, zeros, scale, sums = _prepare_q8(isa, kind, TILE_Q8, x)
    _rows(isa, kind, TILE_Q8, p, row_bytes, digits, zeros, scale, sums, x.shape[1], bias, out, first, last)
    return 0


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
def _prepare_16(x, refused):
    count, n = x.shape
    flat, low, high = x.reshape(-1), np.empty(count * n, np.int16), np.empty(count * n, np.int16)
    scale, odd = np.empty(count * n // 32, np.float32), 0
    for t in range(count):
        if not split_16(flat, t * n, t * n + n, low, high, scale):
            refused[t] = 1
            odd += 1
    return low, high, scale, odd


@njit(**OPTIONS)
def q8_0_f32(isa, kind, w, row_bytes, x, bias, out, refused, first, last):
    """`packed_f32` of Q8_0, whose matrix is not packed."""
    d0, d1, scale, odd = _prepare_16(x, refused)
    cols = x.shape[1]
    for r in range(first, last):
        plus = bias[r] if bias.size else float32(0)
        for t in range(out.shape[0]):
            if refused[t]:
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
    return odd
