"""Weights of importance (an imatrix): columns that the quantiser was told matter, told by the errors that it left.

Such a quantiser lets columns that hardly count go wrong, in all rows alike, and keeps those that count within what its type
loses. So a tensor whose rows are beyond their bound is compared again in the columns that count, if its errors have that
form: the same columns in one half of the rows as in the other, the rest still the reference's values. What was done to the
file after that shows in the columns that count.
"""

from __future__ import annotations

import numpy as np

from aprlab.errors import AprlabError
from aprlab.model.tensor import Tensor
from aprlab.onion.samples import bytes_of_rows, sample_rows
from aprlab.quants import dequantise
from aprlab.quants.bounds import LOST
from aprlab.quants.types import TensorType

IMPORTANCE = 2.0  # what the columns that count may lose in a row, in bounds of the type: heavy tails take scales from them
_ROWS = 256  # sampled, evenly spread; of fewer than 16 columns say nothing
_LEAST_ROWS = 16
_SHARE, _LEAST = 0.25, 0.1  # of the columns: those with the least errors are compared; so many at least within the type's bound
_AGREE = 0.3  # correlation of the logarithms of the columns' errors between two halves of the rows
_STILL = 0.2  # correlation of a column with the reference's, however little it counts
_FAINT = 0.01  # of the row's mean square: so small a column may be lost in every encoding


def columns_that_count(of: Tensor, kind: TensorType, raw: np.ndarray) -> np.ndarray | None:
    """Numbers of the columns of a matrix that its quantiser kept, int64; None where errors are not those of importance.

    Args:
        of: the reference's tensor, of two axes.
        kind: a block type.
        raw: uint8, all bytes of the file's tensor.
    """
    if kind.name not in LOST or len(of.shape) != 2 or of.rows < _LEAST_ROWS or kind.tensor_bytes:
        return None
    rows = sample_rows(of.rows, _ROWS)
    try:
        a = np.concatenate([of.dequantise(slice(row, row + 1)).reshape(1, -1) for row in rows.tolist()])
        b = dequantise(bytes_of_rows(raw, kind, of.rows, rows), kind, a.shape)
    except AprlabError:
        return None
    size = (a.astype(np.float64) ** 2).mean(axis=1, keepdims=True)
    live = size[:, 0] > 0
    if live.sum() < _LEAST_ROWS or not np.isfinite(b).all():
        return None
    a, b = a[live].astype(np.float64), b[live].astype(np.float64)
    off = (b - a) ** 2 / size[live]
    halves = [np.log(np.median(part, axis=0) + 1e-12) for part in (off[0::2], off[1::2])]
    each = off.mean(axis=0)
    counting = np.flatnonzero((each <= np.quantile(each, _SHARE)) & (each <= LOST[kind.name] ** 2))
    weight = (a * a / size[live]).mean(axis=0)
    with np.errstate(all="ignore"):
        agree = np.corrcoef(*halves)[0, 1]
        still = (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    told = agree >= _AGREE and len(counting) >= _LEAST * of.cols and (still[weight > _FAINT] >= _STILL).all()
    return counting if told else None


__all__ = ["IMPORTANCE", "columns_that_count"]
