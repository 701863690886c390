"""The figures that a table of statistics may have, measured chunk by chunk, and compared with the table's own.

Memory does not grow with the tensor. Percentiles are not computed but checked: how many values lie below the printed number
says whether it can be that percentile, under any of the usual definitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash

from aprlab.instruments.statistics_tables import Figure, TableRow
from aprlab.instruments.summary_statistics import SAMPLE

ROUNDING = 2.0**-22  # relative: a figure that went through float32 once, and the order of a sum
OF_SPREAD = 1e-6  # of the standard deviation: what the order of a long sum does to a mean
CHECKSUMS = ("bits-sum-32", "bits-sum-64", "bits-xor")  # order-blind; a column `checksum` may be any of them


@dataclass(slots=True)
class MeasuredFigures:
    """Figures of float32 values that arrive in chunks.

    Attributes:
        percentiles: those to check, figure -> printed number.
        hashed: whether the values are hashed, too (then chunks must come in row order).
        below, upto: figure -> how many finite values are below the printed number (allowing for its digits), and not above it.
    """

    percentiles: Mapping[str, Figure] = field(default_factory=dict)
    hashed: bool = False
    count: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    min: float = math.inf
    max: float = -math.inf
    bits: int = 0
    xor: int = 0
    below: dict[str, int] = field(default_factory=dict)
    upto: dict[str, int] = field(default_factory=dict)
    _hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    def add(self, values: np.ndarray) -> None:
        """Take a chunk: float32, any shape, contiguous."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        words = flat.view(np.uint32)
        self.bits += int(words.sum(dtype=np.uint64))
        self.xor ^= int(np.bitwise_xor.reduce(words))
        if self.hashed:
            self._hash.update(words.data)
        self.count += flat.size
        least, most = float(flat.min()), float(flat.max())
        if not (math.isfinite(least) and math.isfinite(most)):  # a NaN goes through both
            nan = int(np.isnan(flat).sum())
            flat, before = flat[np.isfinite(flat)], flat.size
            self.nan, self.inf = self.nan + nan, self.inf + before - flat.size - nan
            if not flat.size:
                return
            least, most = float(flat.min()), float(flat.max())
        self.min, self.max = min(self.min, least), max(self.max, most)
        self.zeros += int(flat.size - np.count_nonzero(flat))
        wide = flat.astype(np.float64)
        self.total += float(wide.sum())
        self.squares += float(wide @ wide)
        for name, printed in self.percentiles.items():
            slack = printed.half_unit + ROUNDING * abs(printed.value)
            self.below[name] = self.below.get(name, 0) + int(np.count_nonzero(flat < np.float32(printed.value - slack)))
            self.upto[name] = self.upto.get(name, 0) + int(np.count_nonzero(flat <= np.float32(printed.value + slack)))

    @property
    def finite(self) -> int:
        """How many values are finite."""
        return self.count - self.nan - self.inf

    @property
    def mean(self) -> float:
        """Of the finite values; NaN where there are none."""
        return self.total / self.finite if self.finite else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation of the finite values."""
        return max(self.squares / self.finite - self.mean**2, 0.0) ** 0.5 if self.finite else math.nan

    @property
    def hash(self) -> str:
        """XXH3-64 of the values, as `fingerprint` gives it."""
        return self._hash.hexdigest()

    def checksum(self, kind: str) -> int:
        """One of `CHECKSUMS`: the values' 32-bit patterns summed modulo 2^32 or 2^64, or combined by exclusive or."""
        return {"bits-sum-32": self.bits & 0xFFFFFFFF, "bits-sum-64": self.bits & (1 << 64) - 1, "bits-xor": self.xor}[kind]

    def figures(self) -> dict[str, float]:
        """Everything that is a number and no percentile."""
        finite = max(self.finite, 1)
        return {
            "count": self.count, "mean": self.mean, "std": self.std, "variance": self.std**2, "min": self.min, "max": self.max,
            "sum": self.total, "l2": self.squares**0.5, "zeros": self.zeros, "zero_fraction": self.zeros / finite,
            "nan": self.nan, "inf": self.inf,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Agreement:
    """A row of a table compared with measured values.

    Attributes:
        agree, differ: figures.
        residual: the largest distance of a figure of the values (mean, spread, extremes), in standard deviations of the values.
        checksum: which of `CHECKSUMS` the printed checksum is, or ''.
        exact: whether a checksum or a hash of the values agrees: the same values to the last bit, but for their order.
    """

    agree: tuple[str, ...]
    differ: tuple[str, ...]
    residual: float
    checksum: str = ""
    exact: bool = False

    @property
    def whole(self) -> bool:
        """All figures agree, and there was one."""
        return bool(self.agree) and not self.differ


def agreement(row: TableRow, measured: MeasuredFigures, *, sampled: bool = False, raw: str = "") -> Agreement:
    """Compare a row with what was measured; every figure within the digits that were printed.

    Args:
        row, measured: the table's row, and the figures of the values; percentiles were checked against this row.
        sampled: whether the table's percentiles of large tensors are those of a sample.
        raw: hash of the blocks, where the table's is to be compared.
    """
    agree: list[str] = []
    differ: list[str] = []
    have, spread, residual, checksum = measured.figures(), measured.std, 0.0, ""
    for name, printed in row.figures.items():
        if name == "checksum":
            checksum = next((kind for kind in CHECKSUMS if measured.checksum(kind) == int(printed.value)), "")
            good = bool(checksum)
        elif name in have:
            distance = abs(have[name] - printed.value)
            good = bool(distance <= _slack(name, printed, have[name], measured)) or have[name] == printed.value
            if name in ("mean", "std", "min", "max") and spread:
                residual = max(residual, distance / spread) if math.isfinite(distance) else math.inf
        else:
            good = _is_percentile(name, measured, sampled=sampled)
        (agree if good else differ).append(name)
    exact = bool(checksum)
    if "values" in row.hashes and measured.hashed:
        exact = row.hashes["values"] == measured.hash
        (agree if exact else differ).append("values")
    if "raw" in row.hashes and raw:
        (agree if row.hashes["raw"] == raw else differ).append("raw")
    return Agreement(tuple(agree), tuple(differ), residual, checksum, exact)


def _slack(name: str, printed: Figure, value: float, measured: MeasuredFigures) -> float:
    """By how much two figures may differ that are the same."""
    if name in ("count", "zeros", "nan", "inf"):
        return 0.0
    slack = printed.half_unit + ROUNDING * abs(value)
    if name in ("mean", "std"):
        slack += OF_SPREAD * measured.std
    elif name == "sum":
        slack += OF_SPREAD * measured.std * measured.count
    return slack


def _is_percentile(name: str, measured: MeasuredFigures, *, sampled: bool) -> bool:
    """Whether the printed number lies where that percentile does: between its neighbours in rank, whichever way it is defined."""
    share, last = float(name[1:]) / 100, measured.finite - 1
    if last < 0 or name not in measured.below:
        return False
    rank, slack = share * last, 0.0
    if sampled and measured.finite > SAMPLE:
        slack = 6 * measured.finite * math.sqrt(share * (1 - share) / SAMPLE)
    return measured.below[name] <= math.ceil(rank) + 1 + slack and measured.upto[name] >= math.floor(rank) - slack


def screen(row: TableRow, sample: MeasuredFigures) -> str:
    """Which figure of `row` a sample of the values already refutes; '' where it may still be the row.

    The extremes of a sample lie within those of the whole. Its spread is known well enough only where it is far off.
    """
    figures = row.figures
    for name, sign in (("min", 1), ("max", -1)):
        if name in figures and sample.finite:
            printed, here = figures[name], getattr(sample, name)
            if sign * (printed.value - here) > printed.half_unit + ROUNDING * abs(here):
                return name
    for name in ("nan", "inf"):
        if name in figures and getattr(sample, name) > figures[name].value:
            return name
    return ""
