"""IEEE arithmetic as PTX defines it, on NumPy arrays: rounding modes, fused multiply-add, conversions, canonical
NaNs.

The trick throughout: compute in float64, *round to odd* there, then round once to the narrow type. A value rounded to
odd with at least two spare bits rounds on to the same result as the exact value would, in every mode (Boldo &
Melquiond 2008). All functions take and return arrays or NumPy scalars of any shape; float16 and bfloat16 travel as
their uint16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Value = Any  # an ndarray or a NumPy scalar

NAN32 = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
MODES = ("rn", "rz", "rm", "rp")
_TIE_SHIFT, _TIE = 35, np.int64(-(2**63))  # the 29 bits below a float32 mantissa, when they say "exactly half way"
_TINY32 = 2.0**-126


def bits(value: Value, dtype: Any) -> Value:
    """The same bits as another type of the same width."""
    return value.view(dtype) if value.ndim else np.asarray(value).view(dtype)[()]


def canonical(value: Value) -> Value:
    """float32 with every NaN replaced by PTX's 0x7fffffff. One pass when there is none: a sum is NaN if a term is."""
    total = value if value.ndim == 0 else np.add.reduce(value, axis=None)
    if total == total:
        return value  # infinities of both signs are no NaN, but take the second look
    return np.where(np.isnan(value), NAN32, value) if value.ndim else NAN32 if np.isnan(value) else value


def flush(value: Value) -> Value:
    """`.ftz`: float32 subnormals become zeros of their sign."""
    out: Value = np.where(np.abs(value) < np.float32(_TINY32), np.copysign(np.float32(0), value), value)
    return out[()]


def saturate(value: Value) -> Value:
    """`.sat`: clamp to [0, 1], NaN → +0."""
    one, zero = value.dtype.type(1), value.dtype.type(0)
    return np.where(value > zero, np.where(value < one, value, one), zero)[()]


def two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """float64 a + b as rounded sum and exact error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Value, b: Value) -> tuple[Value, Value]:
    """float64 a · b as rounded product and exact error (Dekker), for exponents away from the ends."""
    split = np.float64(2**27 + 1)
    ah = a * split
    ah = ah - (ah - a)
    bh = b * split
    bh = bh - (bh - b)
    al, bl = a - ah, b - bh
    product = a * b
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def round_to_odd(total: Value, error: Value) -> Value:
    """float64 nearest `total` with its exact `error` → the value rounded to odd."""
    inexact = (error != 0) & np.isfinite(error)
    if not inexact.any():
        return total
    pattern = bits(total, np.int64)
    outward = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return bits(np.where(inexact & (pattern & 1 == 0), pattern + outward, pattern)[()], np.float64)


def narrow32(value: Value, mode: str = "rn") -> Value:
    """float64 (exact, or rounded to odd) → float32 in a rounding mode."""
    out = value.astype(np.float32)
    if mode == "rn":
        return out
    return _steer(out, out.astype(np.float64) - value, mode, np.isfinite(value))


def _steer(nearest: Value, excess: Value, mode: str, finite: Value) -> Value:
    """Turn round-to-nearest into another mode, given nearest − exact (only its sign counts)."""
    infinity = nearest.dtype.type(np.inf)
    zero = nearest.dtype.type(0)
    if mode == "rz":
        wrong, goal = (excess > 0) == (nearest > 0), zero
        wrong = wrong & (excess != 0)
    elif mode == "rm":
        wrong, goal = excess > 0, -infinity
    else:
        wrong, goal = excess < 0, infinity
    return np.where(wrong & finite, np.nextafter(nearest, goal), nearest)[()]


def _zero_sign(result: Value, a: Value, b: Value, mode: str) -> Value:
    """Rounding down makes an exact zero sum negative unless both terms are +0."""
    if mode != "rm":
        return result
    return np.where((result == 0) & (np.signbit(a) | np.signbit(b)), -result.dtype.type(0), result)[()]


def add32(a: Value, b: Value, mode: str = "rn") -> Value:
    if mode == "rn":
        return canonical(a + b)
    wide = a.astype(np.float64), b.astype(np.float64)
    return canonical(_zero_sign(narrow32(round_to_odd(*two_sum(*wide)), mode), a, b, mode))


def mul32(a: Value, b: Value, mode: str = "rn") -> Value:
    if mode == "rn":
        return canonical(a * b)
    return canonical(narrow32(a.astype(np.float64) * b.astype(np.float64), mode))


def fma32(a: Value, b: Value, c: Value, mode: str = "rn") -> Value:
    """a · b + c rounded once. The product is exact in float64; the sum is too, or nearly always rounds on correctly:

    only a float64 sum that looks like a float32 tie, or a subnormal result, takes the exact road.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    c64 = c.astype(np.float64)
    if mode != "rn":
        sign_probe = np.signbit(product)
        out = narrow32(round_to_odd(*two_sum(product, c64)), mode)
        if mode == "rm":
            out = np.where((out == 0) & (sign_probe | np.signbit(c)), np.float32(-0.0), out)[()]
        return canonical(out)
    if product.ndim and (c64.ndim == 0 or c64.shape == product.shape):
        total = np.add(product, c64, out=product)
    else:
        total = product + c64
    out = total.astype(np.float32)
    least = np.abs(out).min() if out.ndim else abs(out)  # NaN if there is one
    if total.ndim:
        pattern = total.view(np.int64)
        pattern <<= _TIE_SHIFT  # the sum itself is not needed any more
        suspect = pattern == _TIE
    else:
        suspect = bits(total, np.int64) << _TIE_SHIFT == _TIE
    if least > _TINY32 and not suspect.any():
        return out
    product = a.astype(np.float64) * b.astype(np.float64)
    return canonical(round_to_odd(*two_sum(product, c64)).astype(np.float32))


def div32(a: Value, b: Value, mode: str = "rn") -> Value:
    out = a / b
    if mode != "rn":
        wide, b64 = out.astype(np.float64), b.astype(np.float64)
        overflowed = np.isinf(out) & np.isfinite(a) & (b != 0)
        # The remainder of a rounded quotient is exact in float64: 48 bits of product, and a is close to it. A
        # quotient that
        # overflowed or underflowed is judged by the float64 quotient instead, which is far finer there.
        excess = wide - a.astype(np.float64) / b64
        excess = np.where(np.abs(out) < np.float32(_TINY32), excess, np.sign(wide * b64 - a) * np.sign(b64))
        excess = np.where(overflowed, wide, excess)
        out = _steer(out, excess, mode, np.isfinite(a) & np.isfinite(b) & (b != 0))
    return canonical(out)


def sqrt32(a: Value, mode: str = "rn") -> Value:
    out = np.sqrt(a)
    if mode != "rn":
        wide = out.astype(np.float64)
        out = _steer(out, wide * wide - a, mode, np.isfinite(a) & (a > 0))
    return canonical(out)


def add64(a: Value, b: Value, mode: str = "rn") -> Value:
    total, error = two_sum(a, b)
    if mode == "rn":
        return total
    finite = np.isfinite(a) & np.isfinite(b)
    excess = np.where(np.isinf(total), total, -error)
    return _zero_sign(_steer(total, excess, mode, finite), a, b, mode)


def mul64(a: Value, b: Value, mode: str = "rn") -> Value:
    if mode == "rn":
        return a * b
    return by_fractions(lambda x, y: x * y, mode, a, b, nearest=a * b)


def fma64(a: Value, b: Value, c: Value, mode: str = "rn") -> Value:
    """Exact by the algorithm of Boldo & Melquiond; elements near the ends of the exponent range go through fractions."""
    plain = a * b + c
    if mode != "rn":
        return by_fractions(lambda x, y, z: x * y + z, mode, a, b, c, nearest=plain)
    high, low = two_product(a, b)
    th, tl = two_sum(c, low)
    vh, vl = two_sum(high, th)
    out = vh + round_to_odd(*two_sum(tl, vl))
    sizes = [np.abs(value) for value in (a, b, a * b, c)]
    safe = np.logical_and.reduce(np.broadcast_arrays(*[(s < 2.0**900) & (s > 2.0**-450) for s in sizes[:2]]))
    safe = safe & (sizes[2] < 2.0**900) & (sizes[2] > 2.0**-800) & (sizes[3] < 2.0**900)
    safe = safe & ((sizes[3] == 0) | (sizes[3] > 2.0**-800)) & (np.abs(out) > 2.0**-900)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    if np.all(safe | ~finite):
        return np.where(safe, out, plain)[()]
    exact = by_fractions(lambda x, y, z: x * y + z, mode, a, b, c, nearest=plain)
    return np.where(safe, out, exact)[()]


def by_fractions(law: Callable[..., Fraction], mode: str, *terms: Value, nearest: Value) -> Value:
    """Element by element with exact rationals: slow and beyond doubt. `nearest` supplies zeros, infinities and NaNs."""
    arrays = np.broadcast_arrays(*terms, nearest)
    out = np.array(arrays[-1], dtype=np.float64)
    for place in np.ndindex(out.shape):
        numbers = [float(array[place]) for array in arrays[:-1]]
        if not all(np.isfinite(numbers)):
            continue
        try:
            exact = law(*map(Fraction, numbers))
        except ZeroDivisionError:
            continue
        if exact == 0:
            if mode == "rm" and len(numbers) == 3 and not (out[place] == 0 and not np.signbit(out[place])):
                out[place] = -0.0
            continue
        out[place] = _round_fraction(exact, mode)
    return out[()]


def _round_fraction(exact: Fraction, mode: str) -> float:
    try:
        value = float(exact)
    except OverflowError:
        value = float("inf") if exact > 0 else float("-inf")
    excess = (1 if value > 0 else -1) if np.isinf(value) else (Fraction(value) > exact) - (Fraction(value) < exact)
    return float(_steer(np.float64(value), np.float64(excess), mode, np.bool_(True))) if mode != "rn" else value


# ---- float16 and bfloat16, as uint16 bits ----------------------------------------


def half_to_32(pattern: Value) -> Value:
    return bits(pattern, np.float16).astype(np.float32)


def bfloat_to_32(pattern: Value) -> Value:
    return bits(pattern.astype(np.uint32) << np.uint32(16), np.float32)


def narrow_half(value: Value, mode: str = "rn") -> Value:
    """float64 (exact, or rounded to odd) → float16 bits; NaN becomes 0x7fff."""
    out = value.astype(np.float16)
    if mode != "rn":
        out = _steer(out, out.astype(np.float64) - value, mode, np.isfinite(value))
    return np.where(np.isnan(out), np.uint16(0x7FFF), bits(out, np.uint16))[()]


def narrow_bfloat(value: Value, mode: str = "rn") -> Value:
    """float64 (exact, or rounded to odd) → bfloat16 bits; NaN becomes 0x7fff."""
    # float32 rounded to odd has 16 spare bits, so the second step sees what it must.
    down = narrow32(value, "rz")
    odd = np.where((down.astype(np.float64) != value) & np.isfinite(value), bits(down, np.uint32) | 1, bits(down, np.uint32))
    low, high = odd & np.uint32(0xFFFF), odd >> np.uint32(16)
    negative = odd >> np.uint32(31) == 1
    if mode == "rn":
        up = (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
    elif mode == "rz":
        up = np.zeros_like(low, dtype=bool)
    else:
        up = (low != 0) & (negative if mode == "rm" else ~negative)
    out = (high + (up & np.isfinite(value))).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), out)[()]


# ---- conversions ----------------------------------------

_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integral(value: Value, mode: str) -> Value:
    """`.rni`, `.rzi`, `.rmi`, `.rpi`: to an integral value of the same float type."""
    return _INTEGRAL[mode](value)


def float_to_int(value: Value, dtype: np.dtype[Any], mode: str) -> Value:
    """Float → integer as PTX has it: rounded, clamped to the range, NaN → 0."""
    whole = to_integral(value.astype(np.float64), mode)
    info = np.iinfo(dtype)
    top = 2.0 ** (info.bits - (info.kind == "i"))  # first float above the range
    inside = (whole >= float(info.min)) & (whole < top)
    out = np.where(inside, whole, 0.0).astype(dtype)
    out = np.where(whole >= top, dtype.type(info.max), out)
    return np.where(whole < float(info.min), dtype.type(info.min), out)[()]


def int_to_64(value: Value) -> Value:
    """Integer → float64, exact or rounded to odd."""
    if value.dtype.itemsize < 8:
        return value.astype(np.float64)
    low = (value & value.dtype.type(0xFFFFFFFF)).astype(np.float64)
    high = (value >> value.dtype.type(32)).astype(np.float64) * 2.0**32
    return round_to_odd(*two_sum(high, low))


def int_to_float64(value: Value, mode: str) -> Value:
    """Integer → float64 in a rounding mode."""
    if mode == "rn" or value.dtype.itemsize < 8:
        return value.astype(np.float64)
    low = (value & value.dtype.type(0xFFFFFFFF)).astype(np.float64)
    high = (value >> value.dtype.type(32)).astype(np.float64) * 2.0**32
    return add64(high, low, mode)
