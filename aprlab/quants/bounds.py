"""How much a type may lose: bounds on the error of one row, kept as data where ggml's encoder had to be asked.

A float rounds each value by itself, so its bound is one of arithmetic. Blocks share scales, and how much they lose
depends on the values: `LOST` is the largest relative l2 error that ggml's encoders showed on rows of several
distributions, written by `docs/make/encoder_bounds.py`. Two types (AprQ4, AprQ8) are not ggml's and follow from arithmetic.
"""

from __future__ import annotations

import math

import numpy as np

from aprlab.errors import UnsupportedError
from aprlab.quants import types
from aprlab.quants.types import TensorType

# Type -> largest relative l2 error of a row. The distribution that showed it, and the largest of normal values, behind it.
LOST: dict[str, float] = {
    "Q4_0": 0.1910,  # outliers; normal 0.1001
    "Q4_1": 0.1301,  # outliers; normal 0.0795
    "Q5_0": 0.1088,  # outliers; normal 0.0500
    "Q5_1": 0.0616,  # outliers; normal 0.0395
    "Q8_0": 0.0133,  # outliers; normal 0.0065
    "Q2_K": 0.3712,  # columns; normal 0.3015
    "Q3_K": 0.2353,  # outliers; normal 0.1642
    "Q4_K": 0.1336,  # outliers; normal 0.0811
    "Q5_K": 0.0631,  # outliers; normal 0.0421
    "Q6_K": 0.0395,  # outliers; normal 0.0203
    "IQ1_S": 0.9058,  # outliers; normal 0.5438
    "IQ1_M": 0.6795,  # outliers; normal 0.5022
    "IQ2_XXS": 0.9173,  # outliers; normal 0.3885
    "IQ2_XS": 0.6882,  # student; normal 0.3356
    "IQ2_S": 0.6657,  # student; normal 0.2845
    "IQ3_XXS": 0.3632,  # student; normal 0.2093
    "IQ3_S": 0.3346,  # outliers; normal 0.1526
    "IQ4_NL": 0.1485,  # outliers; normal 0.0835
    "IQ4_XS": 0.1504,  # outliers; normal 0.0844
    "TQ1_0": 0.9456,  # outliers; normal 0.9357
    "TQ2_0": 0.9456,  # outliers; normal 0.9357
    "MXFP4": 0.2299,  # outliers; normal 0.1364
    "AprQ4": 0.2183,  # Q4_0's, with a step of max|x| / 7 instead of / 8
}
MARGIN = 1.25  # other data, other encoders of the same type, weights of importance

# Type -> largest error of one value, as a share of the largest value of its block.
PEAK: dict[str, float] = {
    "Q4_0": 0.137,
    "Q4_1": 0.108,
    "Q5_0": 0.058,
    "Q5_1": 0.050,
    "Q8_0": 0.004,
    "Q2_K": 0.402,
    "Q3_K": 0.248,
    "Q4_K": 0.108,
    "Q5_K": 0.060,
    "Q6_K": 0.028,
    "IQ1_S": 1.013,
    "IQ1_M": 0.977,
    "IQ2_XXS": 0.880,
    "IQ2_XS": 0.849,
    "IQ2_S": 0.644,
    "IQ3_XXS": 0.769,
    "IQ3_S": 0.323,
    "IQ4_NL": 0.144,
    "IQ4_XS": 0.148,
    "TQ1_0": 0.500,
    "TQ2_0": 0.500,
    "MXFP4": 0.250,
    "AprQ4": 0.143,  # a step of max|x| / 7, half of it, twice over where it is clipped
}
PEAK_MARGIN = 2.5  # weights of importance that spread over an order of magnitude double it

# What a line through a row and its reference has for a slope: 1 + k * e², e the relative l2 error. Encoders shrink values
# (Q6_K: -2.4) or enlarge them (IQ3_S: +1.3) by so much, the reference's or the file's; what is left over is noise.
SLOPE = (-3.2, 2.0)

# Largest relative error of one rounded value, and the largest error of values too small to be normal numbers.
ROUNDED: dict[TensorType, tuple[float, float]] = {
    types.F32: (2.0**-24, 2.0**-150),
    types.F16: (2.0**-11, 2.0**-25),
    types.BF16: (2.0**-8, 2.0**-134),
}
_HALF_STEP = 2.0**-25  # of a float16 scale that is no normal number
_LARGEST_CODE = 4096  # what a scale is multiplied by at most: Q6_K's 127 * 32, IQ4_XS's 127 * 32


def row_limits(kind: TensorType, norms: np.ndarray, columns: int, peak: float) -> np.ndarray:
    """Largest l2 error that holding each row as `kind` may cost, float64 (rows,).

    Args:
        kind: the type.
        norms: l2 norms of the rows, float64 (rows,).
        columns: length of a row.
        peak: largest absolute value of the whole tensor, which AprQ8's one scale depends on.

    Raises:
        UnsupportedError: no bound is known for the type.
    """
    root = math.sqrt(columns)
    if kind in ROUNDED:
        relative, least = ROUNDED[kind]
        return norms * relative + root * least
    if kind is types.APR_Q8:
        return np.full(len(norms), root * peak / 127 / 2 * (1 + 1e-5))
    if kind.name not in LOST:
        raise UnsupportedError(f"no bound is known for tensor type {kind}", code="quants.no-bound")
    return norms * LOST[kind.name] * MARGIN + root * smallest_error(kind)


def pair_limits(before: TensorType, after: TensorType, norms: np.ndarray, columns: int, peak: float) -> np.ndarray:
    """Largest l2 distance of two encodings of one source, float64 (rows,): what both may lose; arguments as `row_limits`."""
    return sum((row_limits(kind, norms, columns, peak) for kind in (before, after)), np.zeros(len(norms)))


def value_limit(kind: TensorType) -> float:
    """Largest error of one value, as a share of the largest value of its block; inf where a block says nothing about it.

    Raises:
        UnsupportedError: no bound is known for the type.
    """
    if kind in ROUNDED:
        return ROUNDED[kind][0]
    if kind is types.APR_Q8:
        return math.inf
    if kind.name not in PEAK:
        raise UnsupportedError(f"no bound is known for tensor type {kind}", code="quants.no-bound")
    return PEAK[kind.name] * PEAK_MARGIN


def smallest_error(kind: TensorType) -> float:
    """Error of a value that is too small for the scales of this type."""
    return ROUNDED[kind][1] if kind in ROUNDED else _HALF_STEP * min(_LARGEST_CODE, 2**kind.bits * 32)


__all__ = [
    "LOST", "MARGIN", "PEAK", "PEAK_MARGIN", "ROUNDED", "SLOPE", "pair_limits", "row_limits", "smallest_error", "value_limit",
]  # fmt: skip
