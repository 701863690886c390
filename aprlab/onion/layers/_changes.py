"""Changed values in figures: which rows, by what scale and offset, or in which order the columns stand."""

from __future__ import annotations

from typing import Any

import numpy as np

from aprlab.onion.file_case import TensorMatch
from aprlab.onion.layers.blocks import fields_at
from aprlab.onion.layers.dtype import strange_rows
from aprlab.onion.looks import FLOATS
from aprlab.onion.row_errors import RowErrors, ranges, row_errors
from aprlab.onion.samples import sample_rows
from aprlab.onion.words import Mechanism
from aprlab.quants import REGISTRY
from aprlab.quants.bounds import LOST, MARGIN, ROUNDED

_LEFT = 2e-3  # share up to which what a line leaves over is rounding, where blocks lose nothing
_ONE = 5e-5  # a scale that near to 1 is none: it would be shown as 1

_IN_ROWS = {
    "weights.scaled": "weights.scaled-in-rows",
    "weights.negated": "weights.negated-in-rows",
    "weights.offset": "weights.offset-in-rows",
    "weights.scaled-and-offset": "weights.scaled-and-offset-in-rows",
}


def changed_values(match: TensorMatch, evidence: dict[str, Any], expected: np.ndarray | None) -> Mechanism | None:
    """What happened to the values of a tensor, where figures tell; adds the figures to `evidence`.

    Args:
        match: with its reference and its type.
        evidence: gets ``scale``, ``offset``, ``correlation``, ``rel_l2`` and ``rows_changed``.
        expected: the bytes that it should have, None where they cannot be encoded.
    """
    of, kind = match.of, match.kind
    if of is None or kind is None:
        return None
    match.rows = row_errors(of, kind, match.piece.raw) if match.rows is None else match.rows
    errors = match.rows
    if errors is None:
        return None
    bad = _changed_rows(errors, match, expected)
    scale, offset, correlation = errors.line
    evidence |= {"scale": scale, "offset": offset, "correlation": correlation, "rel_l2": errors.rel_l2}
    evidence["rows_changed"] = f"{len(bad)} of {errors.rows}" + (f": {ranges(bad)}" if 0 < len(bad) < errors.rows else "")
    many = errors.rows > 1
    if len(errors.not_finite):
        return Mechanism("weights.not-finite", {"rows": ranges(errors.not_finite) if many else "0"})
    zero = np.intersect1d(errors.zero, bad)
    if len(zero) and len(zero) == len(bad) and len(zero) < errors.rows:
        return Mechanism("weights.rows-zero", {"rows": ranges(zero)})
    if kind.quantised and (cause := _scaled_field(match, expected)) is not None:
        return cause
    if len(bad) and (cause := _line(errors, bad, match)) is not None:
        if len(bad) == errors.rows:
            return cause
        return Mechanism(_IN_ROWS[cause.code], {"rows": ranges(bad), **cause.parameters})
    if expected is not None and (moved := _columns_moved(match, expected)) is not None:
        return moved
    if kind.quantised and expected is not None and not _fewer(errors, match, expected, bad):
        return None
    if 0 < len(bad) <= max(1, errors.rows // 2) and many:
        return Mechanism("weights.values-changed-in-rows", {"rows": ranges(bad)})
    return Mechanism("weights.values-changed", {"correlation": round(correlation, 2)})


def _fewer(errors: RowErrors, match: TensorMatch, expected: np.ndarray, bad: np.ndarray) -> bool:
    """Whether fewer rows were changed than have other bytes: then figures say more than fields of blocks."""
    return len(bad) < len(_rows_of_bytes(errors, match, expected))


def _rows_of_bytes(errors: RowErrors, match: TensorMatch, expected: np.ndarray) -> np.ndarray:
    """Rows with other bytes than they should have; all of them where the sizes differ."""
    raw = match.piece.raw
    if len(raw) != len(expected):
        return np.arange(errors.rows)
    return np.flatnonzero((raw.reshape(errors.rows, -1) != expected.reshape(errors.rows, -1)).any(axis=1))


def _changed_rows(errors: RowErrors, match: TensorMatch, expected: np.ndarray | None) -> np.ndarray:
    """Rows that are not the expected ones: by their bytes where those are known, else beyond the bound of the type."""
    of, kind, raw = match.of, match.kind, match.piece.raw
    assert of is not None
    assert kind is not None
    known = all(t.name in LOST or t in ROUNDED for t in (of.type, kind)) and kind is not of.type
    if expected is not None and len(expected) == len(raw) and not kind.tensor_bytes:
        found = _rows_of_bytes(errors, match, expected)
        if not known or 2 * len(found) <= errors.rows:
            return found
        # Not written by the encoder that we have: then only what the types cannot explain was changed.
        strange = strange_rows(match)
        return strange if len(strange) else found
    return strange_rows(match) if known else np.flatnonzero(errors.relative > 0)


def _line(errors: RowErrors, rows: np.ndarray, match: TensorMatch) -> Mechanism | None:
    """Scale and offset that give all values of these rows; None where no line does, or where it changes nothing."""
    chosen = errors.of_rows(rows)
    scale, offset, correlation = chosen.line
    kind = match.kind
    assert kind is not None
    rounded = ROUNDED[kind][0] if kind in ROUNDED else 0.0
    lost = max(LOST.get(kind.name, 0.0) * MARGIN, rounded, _LEFT)
    if match.apart and match.of is not None:
        lost += LOST.get(match.of.type.name, 0.0) * MARGIN
    count = max(len(rows) * chosen.columns, 1)
    left = float(np.sqrt(max(1 - correlation**2, 0)))  # what the line leaves over, as a share
    if correlation == 0 or left > lost:
        return None
    # Encoders shrink values a little; and a scale is known no better than what is left over allows.
    near = 2 * left**2 + 8 * left / np.sqrt(count) + _ONE
    by = float(f"{scale:.4g}")
    if abs(offset) > (_LEFT + 8 * left / np.sqrt(count)) * float(np.sqrt(chosen.bb.sum() / count)):
        more = float(f"{offset:.4g}")
        if abs(scale - 1) <= near:
            return Mechanism("weights.offset", {"offset": more})
        return Mechanism("weights.scaled-and-offset", {"by": by, "offset": more})
    if abs(scale - 1) <= near:
        return None
    return Mechanism("weights.negated") if abs(scale + 1) <= near else Mechanism("weights.scaled", {"by": by})


def _columns_moved(match: TensorMatch, expected: np.ndarray) -> Mechanism | None:
    """Columns of plain floats in another order, the same in every row."""
    kind, shape = match.kind, match.shape
    if kind not in FLOATS or len(shape) != 2 or len(expected) != len(match.piece.raw):
        return None
    size = kind.block_bytes
    a, b = (np.asarray(x).reshape(shape[0], shape[1], size) for x in (match.piece.raw, expected))
    some = sample_rows(shape[0], 16)  # enough to tell columns apart
    keys = [np.ascontiguousarray(x[some].transpose(1, 0, 2)).reshape(shape[1], -1) for x in (a, b)]
    mine, theirs = ([row.tobytes() for row in key] for key in keys)
    at = {key: n for n, key in enumerate(theirs)}
    if len(at) < shape[1] or set(mine) != at.keys():
        return None
    order = np.array([at[key] for key in mine])
    if (order == np.arange(shape[1])).all():
        return None
    step = max(1, (1 << 22) // (shape[1] * size))
    if not all(np.array_equal(a[n : n + step], b[n : n + step][:, order]) for n in range(0, shape[0], step)):
        return None
    return Mechanism("weights.columns-permuted", {"moved": int((order != np.arange(shape[1])).sum()), "of": shape[1]})


def _scaled_field(match: TensorMatch, expected: np.ndarray | None) -> Mechanism | None:
    """One float field of blocks, times one number in every block in which it changed."""
    kind, raw = match.kind, match.piece.raw
    assert kind is not None
    if expected is None or len(expected) != len(raw) or kind.tensor_bytes:
        return None
    layout = REGISTRY[kind].layout
    hit = (raw.reshape(-1, kind.block_bytes) != expected.reshape(-1, kind.block_bytes)).any(axis=0)
    fields = fields_at(hit, kind)
    if not fields or any(layout[name].kind != "f" or layout[name].shape for name in fields):
        return None
    factors = set()
    for name in fields:
        mine, theirs = (np.ascontiguousarray(x).view(layout)[name].astype(np.float64) for x in (raw, expected))
        where = (mine != theirs) & (theirs != 0)
        with np.errstate(all="ignore"):
            factor = mine[where] / theirs[where]
        middle = float(np.median(factor)) if len(factor) > 1 else float("nan")
        rounding = 2.0**-10 * np.abs(theirs[where]) * max(abs(middle), 1) + 2.0**-24
        if not np.isfinite(middle) or (np.abs(mine[where] - middle * theirs[where]) > rounding).any():
            return None
        factors.add(float(f"{middle:.3g}"))
    return Mechanism("weights.field-scaled", {"fields": sorted(fields), "by": factors.pop()}) if len(factors) == 1 else None


__all__ = ["changed_values"]
