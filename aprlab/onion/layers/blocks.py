"""Where two runs of blocks differ: bytes, ranges, blocks, fields. What the layers of bytes have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aprlab.errors import AprlabError
from aprlab.onion.file_case import FileCase, TensorMatch
from aprlab.onion.words import Mechanism
from aprlab.quants import REGISTRY, quantise, types
from aprlab.quants.base import bits, up
from aprlab.quants.types import TensorType

_BLOCKS = 64  # that an edit of fields is tried on first
_WHOLE = 1 << 14  # values up to which a transform is compared with every byte; beyond, after the first, against stripes


def differing(match: TensorMatch, expected: np.ndarray) -> dict[str, Any]:
    """Bytes, ranges, blocks and fields in which a piece differs from `expected` (raw bytes of the same type)."""
    assert match.kind is not None
    raw = match.piece.raw
    if len(raw) != len(expected):
        return {"bytes": len(raw), "expected_bytes": len(expected)}
    width, head = match.kind.block_bytes, match.kind.tensor_bytes
    wrong = raw != expected
    count = int(np.count_nonzero(wrong))
    if not count:
        return {"differing_bytes": 0}
    by_block = wrong[head:].reshape(-1, width)
    blocks = np.flatnonzero(by_block.any(axis=1))
    first, last, ranges = ranges_of(wrong)
    found: dict[str, Any] = {
        "differing_bytes": count, "of_bytes": len(raw), "differing_blocks": len(blocks), "of_blocks": len(by_block),
        "fields": sorted(fields_at(by_block.any(axis=0), match.kind)), "first_offset": first, "last_offset": last,
    }  # fmt: skip
    if len(ranges) <= RANGES:
        found["ranges"] = ranges
        if match.piece.offset >= 0:
            found["file_offset"] = match.piece.offset + first
    if len(blocks) <= 8:
        found["blocks"] = blocks.tolist()
        per_row = match.shape[-1] // match.kind.block_elements
        found["rows"] = sorted({int(b) // per_row for b in blocks})
    return found


RANGES = 8  # more than so many are not listed one by one


def ranges_of(wrong: np.ndarray) -> tuple[int, int, list[list[int]]]:
    """First and last true place of ``bool (n,)``, and its ranges, gaps of up to 64 bridged; more than `RANGES` end the search."""
    step, first, last = 1 << 20, -1, -1
    ranges: list[list[int]] = []
    for start in range(0, len(wrong), step):
        at = np.flatnonzero(wrong[start : start + step]) + start
        if not len(at):
            continue
        first, last = int(at[0]) if first < 0 else first, int(at[-1])
        if len(ranges) > RANGES:
            continue
        jumps = np.flatnonzero(np.diff(at) > 64)[: RANGES + 1]
        for a, b in zip(at[np.r_[0, jumps + 1]], at[np.r_[jumps, len(at) - 1]], strict=True):
            if ranges and a - ranges[-1][1] < 64:
                ranges[-1][1] = int(b) + 1
            else:
                ranges.append([int(a), int(b) + 1])
    return first, last, ranges


def fields_at(hit: np.ndarray, kind: TensorType) -> set[str]:
    """Names of the fields of a block that ``bool (block_bytes,)`` falls into."""
    layout = REGISTRY[kind].layout
    found = set()
    for name in layout.names or ():
        dtype, offset = layout.fields[name][:2]  # type: ignore[index]
        if hit[offset : offset + dtype.itemsize].any():
            found.add(name)
    return found


def expected_bytes(case: FileCase, match: TensorMatch) -> np.ndarray | None:
    """The bytes the piece should have in the type it is held in; None where that cannot be encoded."""
    assert match.of is not None
    if match.kind is None:
        return None
    try:
        return case.healthy(match.of, match.kind).raw
    except AprlabError:
        return None


Transform = Callable[[np.ndarray], np.ndarray]  # values (rows, cols) -> values, as many


def value_transforms(case: FileCase, match: TensorMatch) -> dict[str, Transform]:
    """What has been done to data needlessly: code -> a function of the values, float32 (rows, cols), to (rows, cols)."""
    rows, cols = match.shape if len(match.shape) == 2 else (1, match.shape[0])

    def as_rows(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x).reshape(rows, cols)

    found: dict[str, Transform] = {}
    if len(match.shape) == 2:
        found["layout.transposed"] = lambda x: as_rows(x.T)
        found["layout.transposed-back"] = lambda x: as_rows(x.reshape(cols, rows).T)
        found["layout.columns-reversed"] = lambda x: as_rows(x[:, ::-1])
    return found


def row_orders(case: FileCase, match: TensorMatch) -> dict[str, np.ndarray]:
    """Orders into which rows have been brought needlessly: code -> source row of each row."""
    rows = match.shape[0]
    found = {"layout.rows-reversed": np.arange(rows)[::-1]}
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    part = (match.true or "").split(".")[-2] if "." in (match.true or "") else ""
    config = case.expected_config or case.file.config
    if part in heads and isinstance(n := config.get(heads[part]), int) and n > 0 and rows % (2 * n) == 0:
        size = rows // n
        llama = np.arange(rows).reshape(n, 2, size // 2).swapaxes(1, 2).reshape(-1)
        found["layout.rows-permuted-for-llama"] = llama
        found["layout.rows-permuted-from-llama"] = np.argsort(llama)
    return found


def explained_by_order(case: FileCase, match: TensorMatch, expected: np.ndarray) -> Mechanism | None:
    """The order of rows that gives exactly these bytes; a rotation has its distance."""
    if len(match.piece.raw) != len(expected) or match.kind is None or match.kind.tensor_bytes:
        return None
    rows = match.shape[0] if len(match.shape) == 2 else len(expected) // match.kind.block_bytes
    unit = "rows" if len(match.shape) == 2 else "values"
    a, b = match.piece.raw.reshape(rows, -1), expected.reshape(rows, -1)
    for name, order in row_orders(case, match).items() if len(match.shape) == 2 else ():
        if np.array_equal(a[0], b[order[0]]) and np.array_equal(a, b[order]):
            return Mechanism(name)
    where = _rows_like(b, a[0]) if rows <= 1 << 18 else []
    for shift in where:
        if shift and np.array_equal(a, np.roll(b, -int(shift), axis=0)):
            return Mechanism(f"layout.{unit}-rotated", {"by": min(-shift % rows, -shift, key=abs)})
    if where and not np.array_equal(a, b):  # a row that is nowhere else is in no order of these rows
        kind = np.dtype((np.void, a.shape[1]))
        mine, theirs = (np.ascontiguousarray(x).view(kind).reshape(-1) for x in (a, b))
        if np.array_equal(np.sort(mine), np.sort(theirs)):
            if (heads := _heads_reordered(case, match, a, b)) is not None:
                return heads
            return Mechanism(f"layout.{unit}-reordered", {"moved": int((mine != theirs).sum()), "of": rows})
    return None


def _rows_like(rows: np.ndarray, row: np.ndarray) -> list[int]:
    """Numbers of the rows that are `row`, byte for byte; most are told by their first bytes."""
    near = np.flatnonzero((rows[:, :_HEAD] == row[:_HEAD]).all(axis=1))
    found: list[int] = near[(rows[near] == row).all(axis=1)].tolist()
    return found


_HEAD = 16  # bytes of a row that are compared first
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv", "attn_v": "head_count_kv"}


def _heads_reordered(case: FileCase, match: TensorMatch, a: np.ndarray, b: np.ndarray) -> Mechanism | None:
    """Whole heads in another order, uint8 (rows, row bytes) each: which head's rows stand in which place."""
    module = (match.true or "").split(".")[-2] if "." in (match.true or "") else ""
    count = (case.expected_config or case.file.config).get(_HEADS.get(module, ""))
    if not isinstance(count, int) or count < 2 or len(a) % count:
        return None
    mine, theirs = ([head.tobytes() for head in x.reshape(count, -1)] for x in (a, b))
    at = {head: n for n, head in enumerate(theirs)}
    if len(at) < count or set(mine) != at.keys():
        return None
    moved = [f"{at[head]} in place of {n}" for n, head in enumerate(mine) if at[head] != n]
    return Mechanism("layout.heads-reordered", {"heads": moved, "of": count})


def explained_by_values(case: FileCase, match: TensorMatch) -> Mechanism | None:
    """The transform of the reference's values that, encoded again, gives exactly these bytes."""
    if match.of is None or match.kind is None or match.kind.tensor_bytes:
        return None
    cols = match.shape[-1]
    # What explained one tensor is tried first on the next; what failed on three of a type is not tried on a fourth.
    worked, failed = case.attempts.worked, case.attempts.failed
    if failed.get(match.kind, 0) >= 3 and not worked:
        return None
    transforms = value_transforms(case, match)
    x = match.of.dequantise().reshape(-1, cols)
    for name in sorted(transforms, key=lambda name: -worked.get(name, 0)):
        y = transforms[name](x)
        stripes = _stripes(len(y), max(1, (1 << 15) // cols), 0 if not worked.get(name) else y.size)
        try:
            for start, stop in [(0, 2), *stripes]:
                part = quantise(np.ascontiguousarray(y[start:stop]), match.kind)
                got = match.piece.raw.reshape(len(y), -1)[start:stop]
                if not np.array_equal(part.reshape(len(part), -1), got):
                    break
            else:
                worked[name] = worked.get(name, 0) + 1
                return Mechanism(name)
        except AprlabError:
            continue
    failed[match.kind] = failed.get(match.kind, 0) + 1
    return None


def _stripes(rows: int, step: int, size: int) -> list[tuple[int, int]]:
    """Stripes of rows: all of them, or four thin ones spread over a large tensor."""
    if size <= _WHOLE:
        return [(n, n + step) for n in range(0, rows, step)]
    return [(int(n), int(n) + 2) for n in np.unique(np.linspace(0, max(rows - 2, 0), 4).astype(int))]


def explained_by_fields(match: TensorMatch, expected: np.ndarray) -> Mechanism | None:
    """The edit of block fields that gives exactly these bytes."""
    if match.kind is None or len(match.piece.raw) != len(expected):
        return None
    layout = REGISTRY[match.kind].layout
    names = layout.names or ()
    head = match.kind.tensor_bytes
    few = head + _BLOCKS * match.kind.block_bytes
    for name, edit in _FIELD_EDITS.items():
        for end in (few, len(expected)):  # a few blocks are enough for most edits
            raw = np.array(expected[head:end], np.uint8)
            if not edit(raw.view(layout), names, match.kind) or not np.array_equal(raw, match.piece.raw[head:end]):
                break
        else:
            return Mechanism(name)
    return None


def _exchange(b: np.ndarray, names: tuple[str, ...], kind: TensorType) -> bool:
    if "dmin" not in names:
        return False
    b["d"], b["dmin"] = b["dmin"].copy(), b["d"].copy()
    return True


def _no_min(b: np.ndarray, names: tuple[str, ...], kind: TensorType) -> bool:
    field = next((name for name in ("dmin", "m") if name in names), None)
    if field is not None:
        b[field] = 0
    return field is not None


def _nibbles(b: np.ndarray, names: tuple[str, ...], kind: TensorType) -> bool:
    field = next((name for name in ("qs", "ql") if name in names and b[name].dtype == np.uint8), None)
    if field is None or kind in (types.Q2_K, types.Q3_K):
        return False
    b[field] = bits(b[field], 4, 4) | up(b[field], 4)
    return True


def _flush(b: np.ndarray, names: tuple[str, ...], kind: TensorType) -> bool:
    halfs = [name for name in ("d", "dmin", "m") if name in names and b[name].dtype == np.float16]
    for name in halfs:
        small = (np.abs(b[name].astype(np.float32)) < 2.0**-14) & (b[name] != 0)
        b[name] = np.where(small, np.float16(0), b[name])
    return bool(halfs)


_FIELD_EDITS: dict[str, Callable[[np.ndarray, tuple[str, ...], TensorType], bool]] = {
    "decode.scales-exchanged": _exchange,
    "decode.minimum-zero": _no_min,
    "decode.nibbles-exchanged": _nibbles,
    "decode.subnormals-flushed": _flush,
}
