"""Every row of a tensor compared with the reference's: streamed in parts, a few numbers a row are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from aprlab.errors import AprlabError
from aprlab.model.content import drop_pages
from aprlab.model.tensor import Tensor
from aprlab.quants import bounds, dequantise
from aprlab.quants.types import TensorType

_PART = 1 << 19  # values decoded at a time, on each side


@dataclass(frozen=True, eq=False)
class RowErrors:
    """Sums over each row of a (reference) and b (file), float64 (rows,) each.

    Attributes:
        aa, bb, ab: of products.
        dd: of squared differences; nan where the row holds values that are not finite.
        a, b: of the values.
        columns: length of a row.
        peak: largest absolute value of the reference.
        worst: largest absolute error beyond what rounding single values allows, 0 where none is; float types only.
        spike: largest error of a value, as a share of the largest value of its block in the reference.
    """

    aa: np.ndarray
    bb: np.ndarray
    ab: np.ndarray
    dd: np.ndarray
    a: np.ndarray
    b: np.ndarray
    columns: int
    peak: float
    worst: np.ndarray
    spike: np.ndarray

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.aa)

    @property
    def lengths(self) -> np.ndarray:
        """l2 norms of the errors of each row."""
        found: np.ndarray = np.sqrt(self.dd)
        return found

    @property
    def relative(self) -> np.ndarray:
        """Relative l2 error of each row: inf where values are not finite, or where the reference's row is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.sqrt(self.dd / self.aa)
        found = np.where(self.dd == 0, 0.0, found)
        return np.where(np.isnan(found), np.inf, found)

    @property
    def not_finite(self) -> np.ndarray:
        """Rows of the file that hold values that are not finite."""
        return np.flatnonzero(np.isnan(self.dd))

    @property
    def zero(self) -> np.ndarray:
        """Rows that are all zeros in the file, and not in the reference."""
        return np.flatnonzero((self.bb == 0) & (self.aa > 0))

    @property
    def rel_l2(self) -> float:
        """Relative l2 error of the whole tensor."""
        whole = float(self.aa.sum())
        total = float(self.dd.sum())
        return float("inf") if np.isnan(total) else float(np.sqrt(total / whole)) if whole else float(total > 0) * np.inf

    def of_rows(self, rows: np.ndarray) -> RowErrors:
        """The same of some rows, by number."""
        by_row = ("aa", "bb", "ab", "dd", "a", "b", "worst", "spike")
        return replace(self, **{name: getattr(self, name)[rows] for name in by_row})

    @property
    def line(self) -> tuple[float, float, float]:
        """Scale and offset of the straight line through all values, b = scale * a + offset, and their correlation."""
        sound = ~np.isnan(self.dd)
        n = int(sound.sum()) * self.columns
        if not n:
            return 0.0, 0.0, 0.0
        a, b, aa, bb, ab = (float(x[sound].sum()) / n for x in (self.a, self.b, self.aa, self.bb, self.ab))
        va, vb, cov = aa - a * a, bb - b * b, ab - a * b
        if va <= 1e-12 * aa or va <= 0:  # one constant: nothing but a scale can be found
            scale = ab / aa if aa else 0.0
            return scale, 0.0, 1.0 if aa * bb and ab * ab >= aa * bb * (1 - 1e-9) else 0.0
        scale = cov / va
        return scale, b - scale * a, cov / float(np.sqrt(va * vb)) if vb > 0 else 0.0


def row_errors(of: Tensor, kind: TensorType, raw: np.ndarray, columns: np.ndarray | None = None) -> RowErrors | None:
    """All rows of `raw`, bytes of type `kind`, against those of the reference's tensor `of`; of some `columns` alone, by number.

    None where the bytes are not all there, or cannot be decoded.
    """
    if not kind.fits(of.shape, len(raw)):
        return None
    allowed = _rounding(of.type, kind)
    sums: list[list[np.ndarray]] = []
    worst, spikes, peak = [], [], 0.0
    block, least = max(of.type.block_elements, kind.block_elements), max(map(bounds.smallest_error, (of.type, kind)))
    try:
        for a, b in _parts(of, kind, raw):
            a, b = (a, b) if columns is None else (a[:, columns], b[:, columns])
            with np.errstate(all="ignore"):
                d = b - a
                ok = np.isfinite(d).all(axis=1)
                dd = np.where(ok, _products(d, d), np.nan)
                sums.append([_products(a, a), _products(b, b), _products(a, b), dd, _sums(a), _sums(b)])
                peak = max(peak, float(np.abs(a).max(initial=0)))
                spikes.append(np.where(ok, _spike(np.abs(d), np.abs(a), block, least), np.inf))
                if allowed is not None:
                    beyond = np.abs(d) - (np.abs(a) * np.float32(allowed[0]) + np.float32(allowed[1]))
                    worst.append(np.where(ok, beyond.max(axis=1, initial=0), np.inf))
    except AprlabError:
        return None
    aa, bb, ab, dd, sa, sb = (np.concatenate(x) for x in zip(*sums, strict=True))
    excess = np.concatenate(worst) if worst else np.zeros(len(aa))
    width = of.cols if columns is None else len(columns)
    return RowErrors(aa, bb, ab, dd, sa, sb, width, peak, excess, np.concatenate(spikes))


def _spike(off: np.ndarray, size: np.ndarray, block: int, least: float) -> np.ndarray:
    """The worst block of each row: largest of `off` there, less `least`, by the largest of `size`; both (rows, columns)."""
    block = block if off.shape[1] % block == 0 else off.shape[1]
    worst, largest = (x.reshape(len(x), -1, block).max(axis=2) for x in (off, size))
    worst = np.maximum(worst - np.float32(least), 0)
    found: np.ndarray = np.where(worst > 0, worst / largest, 0).max(axis=1, initial=0).astype(np.float64)
    return found


def beyond(errors: RowErrors, before: TensorType, after: TensorType) -> np.ndarray:
    """Rows that lost more than holding them as `after` may cost: their numbers, int64, in order.

    A row of zeros, or with values that are not finite, is always beyond, and so is one with a value that is further off
    than its block allows. Where both types are plain floats, or the file's is, every single value has to be within what
    rounding allows.

    Raises:
        UnsupportedError: no bound is known for `after`.
    """
    if _rounding(before, after) is not None:
        return np.flatnonzero((errors.worst > 0) | np.isnan(errors.dd))
    limit = bounds.row_limits(after, np.sqrt(errors.aa), errors.columns, errors.peak)
    return np.flatnonzero(_over(errors, after, limit, bounds.value_limit(after)))


def beyond_both(errors: RowErrors, before: TensorType, after: TensorType) -> np.ndarray:
    """Rows further apart than two encodings of one source can be: what both types may lose, added up; as `beyond`.

    Raises:
        UnsupportedError: no bound is known for one of the types.
    """
    norms = np.sqrt(np.maximum(errors.aa, errors.bb))  # of the source, which is not there
    limit = bounds.pair_limits(before, after, norms, errors.columns, errors.peak)
    value = bounds.value_limit(after) + bounds.value_limit(before) * (1 + bounds.value_limit(after))
    return np.flatnonzero(_over(errors, after, limit, value))


def _over(errors: RowErrors, after: TensorType, limit: np.ndarray, value: float) -> np.ndarray:
    """Which rows are over the limits of a row and of a value, or lost: bool (rows,)."""
    norms = np.sqrt(errors.aa)
    bad = ~(np.sqrt(errors.dd) <= limit) | (errors.spike > value)
    least = bounds.row_limits(after, np.zeros_like(norms), errors.columns, errors.peak)
    bad[errors.zero] |= norms[errors.zero] > 2 * least[errors.zero]
    return bad


_TELLS = 8.0  # spreads from which on a row's slope is none of its tensor's; ggml's encoders stay below 6.1 on real weights
_TELLS_SHIFT = 25.0  # and its offset: encoders of 2 bits leave up to 10.2
_ROWS = 32  # fewer do not tell what spread is usual
_SPREAD = (0.5, 1.5)  # of the noise of a slope, in its unit: at least, and where too few rows tell
_SHIFT = 0.1  # what encoders shift all values by, as a share of the rms error


def tilted(errors: RowErrors) -> np.ndarray:
    """Rows whose values have another scale or offset than the reference's, though their error is within the bound.

    The line through a row and its reference has a slope of about 1 + k e², with e the row's relative error and k the
    encoder's (`bounds.SLOPE`), and noise of e / √columns; its offset likewise. So a row shows a scale of a few e / √columns.
    What all rows have in common is the encoder's, as far as it may be; beyond that, all rows are named.

    Returns:
        int64, in order.
    """
    with np.errstate(all="ignore"):
        e = np.sqrt(errors.dd / errors.aa)
        live = np.isfinite(e) & (e > 0)
        unit = e / np.sqrt(errors.columns)
        slope, shift = errors.ab / errors.aa - 1, (errors.b - errors.a) / np.sqrt(errors.dd)
    if not live.any():
        return np.zeros(0, np.int64)
    off, moved = np.zeros(len(e)), np.zeros(len(e))
    share = np.median(slope[live] / e[live] ** 2)
    off[live] = (slope[live] - share * e[live] ** 2) / unit[live]
    moved[live] = shift[live] - np.median(shift[live])
    far = (np.abs(off) > _TELLS * _spread(off[live])) | (np.abs(moved) > _TELLS_SHIFT * _spread(moved[live]))
    return np.flatnonzero(live if _tilted_throughout(errors, live & ~far) else far)


def _spread(x: np.ndarray) -> float:
    """Of most of these numbers, which have the middle 0: as a standard deviation, not moved by a few far ones."""
    return max(float(np.median(np.abs(x))) * 1.4826, _SPREAD[0]) if len(x) >= _ROWS else _SPREAD[1]


def _tilted_throughout(errors: RowErrors, live: np.ndarray) -> bool:
    """Whether scale or offset of all values of these rows together are none that encoders leave."""
    if not live.any():
        return False
    aa, ab, dd, shift = (float(x[live].sum()) for x in (errors.aa, errors.ab, errors.dd, errors.b - errors.a))
    count = int(live.sum()) * errors.columns
    square, noise = dd / aa, _TELLS / np.sqrt(count)
    low, high = bounds.SLOPE
    scale = ab / aa - 1
    if not low * square - noise * np.sqrt(square) <= scale <= high * square + noise * np.sqrt(square):
        return True
    return abs(shift) > (_SHIFT + noise) * np.sqrt(dd * count)


def _rounding(before: TensorType, after: TensorType) -> tuple[float, float] | None:
    """Relative and absolute error of single values, where the file's type rounds each by itself.

    Two floats of 16 bits may both have been rounded from one source, so both count.
    """
    if after not in bounds.ROUNDED:
        return None
    rounded = [bounds.ROUNDED[kind] for kind in (before, after) if kind in bounds.ROUNDED]
    return sum(x[0] for x in rounded) * (1 + 1e-3), sum(x[1] for x in rounded) * (1 + 1e-3)


def _parts(of: Tensor, kind: TensorType, raw: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decoded rows of both sides, float32 (rows, columns), part by part."""
    head, size = raw[: kind.tensor_bytes], kind.row_bytes(of.cols)
    step = max(1, _PART // of.cols)
    for start in range(0, of.rows, step):
        stop = min(start + step, of.rows)
        part = raw[kind.tensor_bytes + start * size : kind.tensor_bytes + stop * size]
        whole = np.concatenate([head, part]) if kind.tensor_bytes else part
        a = of.dequantise(slice(start, stop) if len(of.shape) > 1 else None).reshape(-1, of.cols)
        yield a, dequantise(whole, kind, (stop - start, of.cols))
        of.release(slice(start, stop))
        drop_pages(part)


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.einsum("ij,ij->i", x, y).astype(np.float64)
    return found


def _sums(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x.sum(axis=1, dtype=np.float64)
    return found


def ranges(rows: np.ndarray) -> str:
    """Numbers in order, as words: ``0–29, 77``; after six ranges, how many more numbers there are."""
    if not len(rows):
        return ""
    cuts = np.flatnonzero(np.diff(rows) > 1)
    starts, stops = rows[np.r_[0, cuts + 1]], rows[np.r_[cuts, len(rows) - 1]]
    shown = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts[:6], stops[:6], strict=True)]
    left = int((stops[6:] - starts[6:] + 1).sum())
    return ", ".join(shown) + (f" and {left} more" if left else "")


__all__ = ["RowErrors", "beyond", "beyond_both", "ranges", "row_errors", "tilted"]
