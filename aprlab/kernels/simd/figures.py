"""Figures of many values in one pass, where NumPy goes over memory five times."""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from aprlab.kernels.simd.kernel_cache import njit

_EXPONENT = np.uint32(0x7F800000)  # all of it set: NaN or infinite
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=True)
def summed(values, bits, shift):
    """Of float32 `values` and their `bits` (uint32), both 1-D and fewer than 2^32.

    Returns:
        How many are not finite, how many are zero, and in float64 the sums of ``v - shift`` and of its square, taken in any
        order; the sums mean something only where all values are finite.
    """
    bad = zeros = np.uint32(0)
    first = second = 0.0
    for i in range(values.size):
        bad = np.uint32(bad + np.uint32((bits[i] & _EXPONENT) == _EXPONENT))
    for i in range(values.size):
        zeros = np.uint32(zeros + np.uint32((bits[i] & _MAGNITUDE) == np.uint32(0)))
    for i in range(values.size):
        wide = np.float64(values[i]) - shift
        first += wide
        second += wide * wide
    return bad, zeros, first, second
