"""Bytes: the right tensor in the right type, and other bytes than it should have. Layout, block fields or values?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from aprlab.errors import AprlabError
from aprlab.onion.layers.base import Case, Deviation, Layer, Match, sample
from aprlab.onion.layers.blocks import differing, due_bytes, explained_by_fields, explained_by_order, explained_by_values
from aprlab.quants.check import first_bad_block
from aprlab.quants.types import TensorType


class Weights(Layer):
    """Every tensor that differs gets the cheapest explanation that reproduces its bytes; else, what is known."""

    name: ClassVar[str] = "weights"

    def suspect(self, case: Case) -> list[Deviation]:
        if case.ref is None:
            return alone(case)
        settled = {id(d.match) for d in case.deviations if d.what == "encoding" or (d.match and d.match.by == "span")}
        found = []
        for match in sorted(case.matches, key=lambda m: m.piece.size):  # what explains a small one is tried on the large
            if match.of is None or match.equal or match.kind is None or id(match) in settled:
                continue
            d = explain_bytes(case, match)
            if d is not None:
                found.append(d)
        return found


def explain_bytes(case: Case, match: Match) -> Deviation | None:
    """What happened to the bytes of one piece; None where nothing did."""
    assert match.of is not None
    assert case.ref is not None
    raw, true = match.piece.raw, match.true or ""
    due = due_bytes(case, match)
    good = match.of if due is None or match.kind is None else case.healthy(match.of, match.kind)
    evidence: dict[str, Any] = {"type": match.kind.name if match.kind else None}

    def bytes_(layer: str, how: str, sure: float = 1.0) -> Deviation:
        return Deviation(layer, "bytes", true, None, good, how, match, evidence, sure)

    if len(raw) < match.piece.size:
        evidence |= {"bytes": len(raw), "due_bytes": match.piece.size}
        return bytes_("container", "the file ends before the tensor does")
    if not raw.any():
        return bytes_("weights", f"{_part(true)}: all zeros")
    others = [name for name in case.ref.by_hash.get(match.piece.hash, []) if name != true]
    if others:
        evidence["bytes_of"] = others[0]
        return bytes_("weights", f"{_part(true)}: holds the bytes of {_part(others[0])}")
    if due is None:
        return bytes_("weights", "values differ", 0.7)
    if len(due) == len(raw) and np.array_equal(due, raw):
        return None
    evidence |= differing(match, due)
    few = evidence.get("differing_blocks", 1 << 60) * 2 < evidence.get("of_blocks", 0)
    # Transforms that failed on six tensors of a type are not tried on its other hundred.
    vain: dict[TensorType | None, int] = case.notes.setdefault("vain", {})
    if not few and vain.get(match.kind, 0) < 6:
        if (how := explained_by_order(case, match, due)) is not None:
            return bytes_("layout", how)
        if (how := explained_by_fields(match, due)) is not None:
            return bytes_("decode", how)
        if len(match.shape) == 2 and (how := explained_by_values(case, match)) is not None:
            return bytes_("layout", how)
        vain[match.kind] = vain.get(match.kind, 0) + 1
    elif few and (how := explained_by_fields(match, due)) is not None:
        return bytes_("decode", how)
    return bytes_(*unexplained(match, evidence))


def unexplained(match: Match, evidence: dict[str, Any]) -> tuple[str, str, float]:
    """Layer and words for bytes that nothing known reproduces: where they are and what they look like."""
    blocks, of = evidence.get("differing_blocks", 0), evidence.get("of_blocks", 0)
    fields, ranges = evidence.get("fields", []), evidence.get("ranges", [])
    if "due_bytes" in evidence:
        return "layout", f"{evidence['bytes']} bytes where {evidence['due_bytes']} are due", 0.8
    if blocks == 1 and len(fields) == 1:
        return "weights", f"field {fields[0]!r} of one block changed", 1.0
    if len(ranges) == 1 and evidence["differing_bytes"] > 1 and blocks * 2 < max(of, 2):
        return "weights", "one range of bytes overwritten", 1.0
    if blocks * 2 < of:
        where = f"in {blocks} of {of} blocks" if of > 1 else "in one block"
        return "weights", f"{evidence['differing_bytes']} bytes changed {where}", 0.9
    if fields and len(fields) < 3 and blocks:
        which = f"field{'s' if len(fields) > 1 else ''} {', '.join(map(repr, fields))}"
        return "decode", f"{which} changed in {'every block' if blocks == of else 'most blocks'}", 0.8  # counts: evidence
    corr = 0.0 if match.correlation is None else match.correlation
    if corr > 0.3:
        return "weights", f"values changed throughout (correlation {corr:.2f})", 0.7
    return "weights", "values unlike the reference's throughout", 0.6


def _part(name: str) -> str:
    """`blk.3.attn_q.bias` -> `attn_q.bias`."""
    return ".".join(name.split(".")[2:]) if name.startswith("blk.") else name


def alone(case: Case) -> list[Deviation]:
    """Without a reference: what no healthy weight is, NaN, zeros, constants."""
    found = []
    for match in case.matches:
        if match.kind is None or match.true is None:
            continue
        raw = match.piece.raw
        if len(raw) < match.piece.size:
            how = "the file ends before the tensor does"
            found.append(Deviation("container", "bytes", match.true, None, None, how, match))
            continue
        if not raw.any():
            how = f"{_part(match.true)}: all zeros"
            found.append(Deviation("weights", "bytes", match.true, None, None, how, match, confidence=0.9))
            continue
        bad = _not_finite(raw[match.kind.tensor_bytes :], match.kind)
        if bad is not None:
            how = "scales that are not finite numbers"
            evidence = {"block": bad, "type": match.kind.name}
            found.append(Deviation("weights", "bytes", match.true, None, None, how, match, evidence, 0.9))
            continue
        d = _magnitude(match)
        if d is not None:
            found.append(d)
    return found


def _not_finite(raw: np.ndarray, kind: TensorType) -> int | None:
    from aprlab.quants import quant

    try:
        return first_bad_block(raw, quant(kind))
    except (AprlabError, ValueError):
        return None


def _magnitude(match: Match) -> Deviation | None:
    """A matrix whose values are of a size that no trained weight has."""
    assert match.kind is not None
    if len(match.piece.shape) < 2:
        return None
    values = sample(match.piece.raw, match.kind, match.piece.shape)
    if values is None:
        return None
    size = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    if 1e-5 < size < 10:
        return None
    how = "values of a size that no trained weight has"
    return Deviation("weights", "bytes", match.true or "", None, None, how, match, {"rms": size, "type": match.kind.name}, 0.7)
