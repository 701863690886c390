"""Statistics of a tensor's values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprlab.errors import UsageError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SAMPLE = 1 << 20  # percentiles of larger tensors are of about so many values, evenly spaced


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of the finite values of an array, in float64; None where there are none.

    `percentiles` are those of `PERCENTILES`. `total` is the order-blind sum that upstream called a checksum.
    """

    count: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    percentiles: tuple[float, ...]
    zeros: int
    nan: int
    inf: int
    total: float


def statistics(values: np.ndarray) -> Statistics:
    """Mean, standard deviation, extremes, percentiles, and how many values are zero, NaN, infinite; never of nothing."""
    flat = np.asarray(values).reshape(-1)
    if not flat.size:
        raise UsageError("statistics of nothing: the array is empty", code="instruments.nothing-measured")
    nan, inf = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
    finite = flat[np.isfinite(flat)] if nan or inf else flat
    if not finite.size:
        return Statistics(flat.size, None, None, None, None, (), 0, nan, inf, float("nan"))
    sample = finite[:: max(1, finite.size // SAMPLE)]
    mean = float(np.mean(finite, dtype=np.float64))
    variance = float(np.mean(np.square(finite - np.float32(mean), dtype=np.float64))) - (mean - float(np.float32(mean))) ** 2
    return Statistics(
        flat.size, mean, max(variance, 0.0) ** 0.5, float(finite.min()), float(finite.max()),
        tuple(float(p) for p in np.percentile(sample, PERCENTILES)),
        int(finite.size - np.count_nonzero(finite)), nan, inf, mean * finite.size,
    )  # fmt: skip
