"""Bytes: the right tensor in the right type, and other bytes than it should have. Layout, block fields or values?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from aprlab.errors import AprlabError
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.layers._changes import changed_values
from aprlab.onion.layers._misreads import explained_by_misreading
from aprlab.onion.layers.blocks import (
    differing,
    expected_bytes,
    explained_by_fields,
    explained_by_order,
    explained_by_values,
)
from aprlab.onion.layers.layer import Layer
from aprlab.onion.samples import sample
from aprlab.onion.words import Mechanism
from aprlab.quants import quant
from aprlab.quants.check import first_bad_block
from aprlab.quants.types import WHOLE_NUMBERS, TensorType

LEAST = 64  # values of a norm; fewer may be the same by chance


class WeightsLayer(Layer):
    """Every tensor that differs gets the cheapest explanation that reproduces its bytes; else, what is known."""

    name: ClassVar[str] = "weights"
    kinds: ClassVar[tuple[str, ...]] = ("bytes",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        if case.ref is None:
            return _trained([d for match in case.matches if (d := alone(match)) is not None], case)
        settled = {id(d.match) for d in case.deviations if d.kind == "encoding" or (d.match and d.match.by == "span")}
        found = []
        for match in sorted(case.matches, key=lambda m: m.piece.size):  # what explains a small one is tried on the large
            if match.of is None or match.equal or match.kind is None or id(match) in settled:
                continue
            d = explain_bytes(case, match)
            if d is not None:
                found.append(d)
        return _shifted(found)

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        if (filled := draft.refill(deviation)) is not None:
            slot, good = filled
            slot.kind = good.type if slot.kind is None or not slot.kind.fits(slot.shape, len(good.raw)) else slot.kind


def explain_bytes(case: FileCase, match: TensorMatch) -> Deviation | None:
    """What happened to the bytes of one piece; None where nothing did."""
    assert match.of is not None
    assert case.ref is not None
    raw, true = match.piece.raw, match.true or ""
    expected = expected_bytes(case, match)
    good = match.of if expected is None or match.kind is None else case.healthy(match.of, match.kind)
    evidence: dict[str, Any] = {"type": match.kind.name if match.kind else None}

    def found(cause: Mechanism, sure: float = 1.0) -> Deviation:
        return Deviation("bytes", true, None, good, cause, match, evidence, sure)

    if len(raw) < match.piece.size:
        evidence |= {"bytes": len(raw), "expected_bytes": match.piece.size}
        return found(Mechanism("container.tensor-cut-off"))
    if not raw.any():
        return found(Mechanism("weights.all-zeros", {"part": _part(true)}))
    others = [name for name in case.ref.by_hash.get(match.piece.hash, []) if name != true]
    if others:
        evidence["bytes_of"] = others[0]
        told = (d.cause for d in case.deviations if d.match is match and d.code == "naming.layers-shifted")
        good = match.of  # bytes in the reference's own encoding: then the file was not re-encoded
        return found(next(told, None) or _bytes_of(true, others))
    if expected is None:
        return found(changed_values(match, evidence, None) or Mechanism("weights.values-differ"), 0.7)
    if len(expected) == len(raw) and np.array_equal(expected, raw):
        return None
    evidence |= differing(match, expected)
    cause = transformed(case, match, expected, evidence)
    if cause is None and len(expected) == len(raw):
        cause = changed_values(match, evidence, expected)
    return found(cause) if cause is not None else found(*unexplained(match, evidence))


def transformed(
    case: FileCase, match: TensorMatch, expected: np.ndarray, evidence: dict[str, Any]
) -> Mechanism | None:
    """The known transform that gives exactly these bytes: an order of rows, an edit of fields, a transform of values."""
    if "expected_bytes" in evidence:
        return None  # no order of rows and no edit of fields makes a tensor longer or shorter
    if evidence.get("differing_blocks", 1 << 60) * 2 < evidence.get("of_blocks", 0):
        return explained_by_order(case, match, expected) or explained_by_fields(match, expected)
    # Transforms that failed on six tensors of a type are not tried on its other hundred.
    vain = case.attempts.unexplained
    if vain.get(match.kind, 0) >= 6:
        return None
    cause = explained_by_order(case, match, expected) or explained_by_fields(match, expected)
    if cause is None and len(match.shape) == 2:
        cause = explained_by_values(case, match) or explained_by_misreading(case, match)
    if cause is None:
        vain[match.kind] = vain.get(match.kind, 0) + 1
    return cause


def unexplained(match: TensorMatch, evidence: dict[str, Any]) -> tuple[Mechanism, float]:
    """Cause and confidence for bytes that nothing known reproduces: where they are and what they look like."""
    blocks, of = evidence.get("differing_blocks", 0), evidence.get("of_blocks", 0)
    fields, ranges = evidence.get("fields", []), evidence.get("ranges", [])
    if "expected_bytes" in evidence:
        sizes = {"found": evidence["bytes"], "expected": evidence["expected_bytes"]}
        return Mechanism("layout.size-differs", sizes), 0.8
    if blocks == 1 and len(fields) == 1:
        return Mechanism("weights.field-of-one-block", {"field": fields[0]}), 1.0
    if len(ranges) == 1 and evidence["differing_bytes"] > 1 and blocks * 2 < max(of, 2):
        return Mechanism("weights.range-overwritten"), 1.0
    if blocks * 2 < of:
        count = evidence["differing_bytes"]
        if of == 1:
            return Mechanism("weights.bytes-changed-in-one-block", {"bytes": count}), 0.9
        return Mechanism("weights.bytes-changed", {"bytes": count, "blocks": blocks, "of": of}), 0.9
    if fields and len(fields) < 3 and blocks:
        share = "every-block" if blocks == of else "most-blocks"  # counts: evidence
        return Mechanism(f"decode.fields-changed-in-{share}", {"fields": fields}), 0.8
    corr = 0.0 if match.correlation is None else match.correlation
    if corr > 0.3:
        return Mechanism("weights.values-changed", {"correlation": round(corr, 2)}), 0.7
    return Mechanism("weights.values-unlike"), 0.6


def _bytes_of(true: str, others: list[str]) -> Mechanism:
    """A tensor with the bytes of others (which share theirs); the same part of another layer is told by both numbers."""
    part, same = _part(true), [name for name in others if _part(name) == _part(true)]
    if not true.startswith("blk.") or not same:
        return Mechanism("weights.bytes-of-another-tensor", {"part": part, "other": _part(others[0])})
    layer = int(true.split(".")[1])
    other = min((int(name.split(".")[1]) for name in same), key=lambda n: abs(n - layer))
    return Mechanism("weights.bytes-of-another-layer", {"part": part, "layer": layer, "other": other})


def _shifted(found: list[Deviation]) -> list[Deviation]:
    """Copies of the same part, all from as many layers away, as one cause: the part was shifted."""
    groups: dict[tuple[str, int], list[Deviation]] = {}
    for d in found:
        if d.code == "weights.bytes-of-another-layer":
            by = int(d.cause.parameters["layer"]) - int(d.cause.parameters["other"])
            groups.setdefault((d.cause.parameters["part"], by), []).append(d)
    for (part, by), group in groups.items():
        if len(group) > 1:
            cause = Mechanism("weights.layers-shifted", {"part": part, "by": by})
            for d in group:
                d.cause = cause
    return found


def _part(name: str) -> str:
    """`blk.3.attn_q.bias` -> `attn_q.bias`."""
    return ".".join(name.split(".")[2:]) if name.startswith("blk.") else name


def alone(match: TensorMatch) -> Deviation | None:
    """Without a reference: what no healthy weight is, NaN, zeros, constants."""
    if match.kind is None or match.true is None:
        return None
    raw, true = match.piece.raw, match.true

    def found(cause: Mechanism, sure: float, **evidence: Any) -> Deviation:
        return Deviation("bytes", true, None, None, cause, match, evidence, sure)

    if len(raw) < match.piece.size:
        return found(Mechanism("container.tensor-cut-off"), 1.0)
    if not raw.any():
        return found(Mechanism("weights.all-zeros", {"part": _part(true)}), 0.9)
    bad = _not_finite(raw[match.kind.tensor_bytes :], match.kind)
    if bad is not None:
        return found(Mechanism("weights.scales-not-finite"), 0.9, block=bad, type=match.kind.name)
    value = _constant_norm(match)
    if value is not None:
        return found(Mechanism("weights.constant", {"part": _part(true), "value": value}), 0.7)
    size = _implausible_size(match)
    if size is not None:
        return found(Mechanism("weights.implausible-size"), 0.7, rms=size, type=match.kind.name)
    return None


def _not_finite(raw: np.ndarray, kind: TensorType) -> int | None:
    try:
        return first_bad_block(raw, quant(kind))
    except (AprlabError, ValueError):
        return None


def _constant_norm(match: TensorMatch) -> float | None:
    """The one value of a norm whose values are all the same, as before any training."""
    p, kind = match.piece, match.kind
    if len(p.shape) != 1 or p.shape[0] < LEAST or kind is None or not (match.true or "").endswith("norm.weight"):
        return None
    values = sample(p.raw, kind, p.shape)
    return float(values.flat[0]) if values is not None and (values == values.flat[0]).all() else None


def _trained(found: list[Deviation], case: FileCase) -> list[Deviation]:
    """Without norms of one value where every norm has one: a model that was never trained is no broken one."""
    norms = sum((match.true or "").endswith("norm.weight") for match in case.matches)
    untrained = sum(d.code == "weights.constant" for d in found) == norms
    return [d for d in found if d.code != "weights.constant"] if untrained else found


def _implausible_size(match: TensorMatch) -> float | None:
    """The root mean square of a matrix, where no trained weight has such a one."""
    assert match.kind is not None
    if len(match.piece.shape) < 2 or match.kind in WHOLE_NUMBERS:
        return None
    values = sample(match.piece.raw, match.kind, match.piece.shape)
    if values is None:
        return None
    size = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
    return None if 1e-5 < size < 10 else size


__all__ = ["WeightsLayer", "explain_bytes"]
