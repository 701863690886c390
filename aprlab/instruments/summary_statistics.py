"""Statistics of a tensor's values."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from aprlab.errors import UsageError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
PART = 1 << 18  # values that are looked at together: they stay in a core's cache
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
    figures = RunningFigures(flat.size)
    for start in range(0, flat.size, PART):
        figures.add(flat[start : start + PART])
    return figures.statistics()


def percentiles(ordered: np.ndarray) -> tuple[float, ...]:
    """`PERCENTILES` of finite values, 1-D and sorted, interpolated as NumPy does; one sort is a fifth of its cost."""
    at = np.array(PERCENTILES) / 100 * (ordered.size - 1)
    below = at.astype(np.int64)
    low, high = (ordered[np.minimum(i, ordered.size - 1)].astype(np.float64) for i in (below, below + 1))
    return tuple(map(float, low + (high - low) * (at - below)))


class RunningFigures:
    """`statistics` of values that come in parts.

    Args:
        size: how many values there will be.
        kernels: `aprlab.kernels.simd.kernels`, for sums in one pass; None for NumPy's.
    """

    def __init__(self, size: int, kernels: ModuleType | None = None) -> None:
        self.size, self._kernels = size, kernels
        self._stride = max(1, size // SAMPLE)
        self._count = self._nan = self._inf = self._zeros = 0
        self._mean = self._squares = 0.0
        self._least, self._most = float("inf"), float("-inf")
        self._sample, self._kept = np.empty(0), 0

    def add(self, values: np.ndarray) -> None:
        """The next values, float32 1-D; they are not kept."""
        if not values.size:
            return
        bad, zeros, mean, squares = self._sums(values)
        if bad:
            self._nan, self._inf = self._nan + int(np.isnan(values).sum()), self._inf + int(np.isinf(values).sum())
            return self.add(values[np.isfinite(values)])
        some = values[-self._count % self._stride :: self._stride]
        if not self._kept:
            self._sample = np.empty(-(-self.size // self._stride), values.dtype)
        self._sample[self._kept : self._kept + some.size] = some
        self._kept += some.size
        self._zeros += zeros
        self._least, self._most = min(self._least, float(values.min())), max(self._most, float(values.max()))
        apart, total = mean - self._mean, self._count + values.size
        self._squares += squares + apart * apart * self._count * values.size / total  # Chan, Golub and LeVeque
        self._mean += apart * values.size / total
        self._count = total

    def _sums(self, values: np.ndarray) -> tuple[int, int, float, float]:
        """How many are not finite, how many are zero; mean, and the sum of squares about it, if all are finite."""
        if self._kernels is not None:
            some = values[:: max(1, values.size // 256)]
            shift = float(np.add.reduce(some, dtype=np.float64)) / some.size  # near the mean: nothing cancels
            bad, zeros, first, second = self._kernels.summed(values, values.view(np.uint32), shift if np.isfinite(shift) else 0.0)
            return int(bad), int(zeros), shift + first / values.size, second - first * first / values.size
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            return bad, 0, 0.0, 0.0
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        wide -= mean
        return 0, int(values.size - np.count_nonzero(values)), mean, float(wide @ wide)

    def statistics(self) -> Statistics:
        """Of all that came."""
        if not self._count:
            return Statistics(self.size, None, None, None, None, (), 0, self._nan, self._inf, float("nan"))
        sample = self._sample[: self._kept]
        sample.sort()  # in place: a copy of it costs as much as half of this
        return Statistics(
            self.size, self._mean, (max(self._squares, 0.0) / self._count) ** 0.5, self._least, self._most,
            percentiles(sample),
            self._zeros, self._nan, self._inf, self._mean * self._count,
        )  # fmt: skip
