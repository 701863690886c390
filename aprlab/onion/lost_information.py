"""What no inverse brings back: information that is gone from a file, by the marks it leaves; and what faults leave only that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aprlab.faults import FAULTS
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.block_marks import Mark, marks_of
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.fixes import Fix, drafted
from aprlab.onion.health import nats
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism
from aprlab.quants import types
from aprlab.quants.types import TensorType

_SURE = 0.9
_SOME = 0.05  # share of the blocks of a type from which on scales are flushed or raised; healthy files have none
_TELLING = 8  # distinct values of a vector from which on equal bytes are no chance


def lost_information(case: FileCase) -> list[Fix]:
    """What blocks and bytes show to be gone for good: fixes that are not possible without a reference."""
    tensors = tensors_of(case)
    marks = marks_of(tensors)
    found = [fix for kind in (types.Q4_K, types.Q5_K) for fix in _six_bits(tensors, marks, kind)]
    found = found or _subnormals(tensors, marks)
    return found or _copied_norms(tensors) or _copied_head(case, tensors)


def tensors_of(case: FileCase) -> list[Tensor]:
    """The file's tensors under the types that they have, those that obey the size law."""
    return [
        Tensor(m.true, m.kind, m.piece.shape, m.piece.raw, Origin(case.file.path, m.piece.name, m.piece.offset))
        for m in case.matches
        if m.true is not None and m.kind is not None and m.kind.fits(m.piece.shape, len(m.piece.raw))
    ]


def _gone(fault: str | None, layer: str, names: list[str], cause: Mechanism, evidence: dict[str, Any], sure: float) -> Fix:
    finding = Finding(layer, fault, names, cause, evidence, sure)
    return Fix(finding, [Deviation("bytes", name, None, None, cause) for name in names])


def _of_type(tensors: Sequence[Tensor], kind: TensorType) -> list[str]:
    return [t.name for t in tensors if t.type is kind and len(t.shape) == 2]


def _six_bits(tensors: list[Tensor], all_marks: list[Mark], kind: TensorType) -> list[Fix]:
    """Q4_K and Q5_K: minima, top bits or every other scale gone, or scales read from the wrong bytes."""
    marks = {mark.name: mark for mark in all_marks if mark.type is kind and not mark.likely}
    late = [marks[name] for name in ("late-over-early-scales", "late-over-early-minima") if name in marks]
    if "dmin-not-zero" in marks and marks["dmin-not-zero"].value == 0:
        fault, cause = "q4k-min-lost", Mechanism("decode.minimum-zero")
    elif "late-scales-are-early-minima" in marks and marks["late-scales-are-early-minima"].value > 0.95:
        fault, cause = "q4k-scales-plain", Mechanism("decode.minima-as-scales")
    elif len(late) == 2 and all(mark.value < 0.6 for mark in late):
        fault, cause = "q4k-scale-bits", Mechanism("decode.scale-bits-lost")
    elif "paired-scales-equal" in marks and marks["paired-scales-equal"].value > 0.95:
        fault, cause = "q4k-one-scale", Mechanism("decode.one-scale-for-two")
    else:
        return []
    said = {"marks": [str(mark) for mark in marks.values()], "type": kind.name}
    return [_gone(fault if kind is types.Q4_K else None, "decode", _of_type(tensors, kind), cause, said, _SURE)]


_HALVES = {
    "zero-scale-with-numbers": ("scales-flushed", "decode.subnormals-flushed"),
    "scale-at-smallest-normal": ("scales-floored", "decode.subnormals-raised"),
}


def _subnormals(tensors: list[Tensor], marks: list[Mark]) -> list[Fix]:
    """Scales that were too small for a float16 conversion written by hand: zero, or raised to the smallest normal number."""
    for name, (fault, code) in _HALVES.items():
        odd = [mark for mark in marks if mark.name == name and not mark.likely and mark.value > _SOME]
        if odd:
            concerned = [n for mark in odd for n in _of_type(tensors, mark.type)]
            return [_gone(fault, "decode", concerned, Mechanism(code), {"marks": [str(mark) for mark in odd]}, _SURE)]
    return []


def _copied_norms(tensors: list[Tensor]) -> list[Fix]:
    """Norms of a layer with each other's very bytes, in every layer: two trained vectors are never equal."""
    have = {tensor.name: tensor for tensor in tensors}
    concerned = []
    pairs = [(name, name.replace("attn_norm", "ffn_norm")) for name in have if name.endswith("attn_norm.weight")]
    for name, other in pairs:
        if other in have and np.array_equal(have[name].raw, have[other].raw):
            values = have[name].dequantise()
            if len(np.unique(values)) > _TELLING:
                concerned.append(name)
    if not concerned or len(concerned) < len(pairs):
        return []
    cause = Mechanism("weights.bytes-of-another-tensor", {"part": "attn_norm.weight", "other": "ffn_norm.weight"})
    return [_gone("wrong-norm", "weights", concerned, cause, {"layers": len(concerned)}, _SURE)]


def _copied_head(case: FileCase, tensors: list[Tensor]) -> list[Fix]:
    """An output head with the embedding's very bytes, in a model that then finds plain text less likely than chance."""
    have = {tensor.name: tensor for tensor in tensors}
    head, embedding = have.get("output.weight"), have.get("token_embd.weight")
    if head is None or embedding is None or not np.array_equal(head.raw, embedding.raw):
        return []
    left = nats(drafted(case, []))
    if not np.log(head.rows) < left < np.inf:
        return []
    cause = Mechanism("weights.bytes-of-another-tensor", {"part": "output.weight", "other": "token_embd.weight"})
    evidence = {"nats": left, "nats_of_chance": float(np.log(head.rows))}
    return [_gone("tied-lm-head", "weights", ["output.weight"], cause, evidence, _SURE)]


def unlike_any_encoder(case: FileCase, left: float) -> list[Fix]:
    """Types whose blocks no known encoder makes, in a model that also finds plain text unlikely: each alone proves nothing.

    Args:
        case: without a reference.
        left: nats of the conversation, above what is healthy.
    """
    tensors = tensors_of(case)
    marks = [mark for mark in marks_of(tensors) if not mark.likely]
    if not np.isfinite(left):
        return []
    found = []
    for kind in dict.fromkeys(mark.type for mark in marks):
        cause = Mechanism("decode.marks-missing", {"type": kind.name})
        said = {"marks": [str(m) for m in marks if m.type is kind]}
        found.append(_gone(None, "decode", _of_type(tensors, kind), cause, said, 0.8))
    return found


# ── names of what is gone ─────────────────────────────────────────────────────────────────────────────────────────

# What is gone tells the fault where it is all that is gone: codes and parts of all findings -> id.
_GONE: dict[frozenset[tuple[str, str]], str] = {
    frozenset({("weights.all-zeros", f"attn_{part}.bias")}): f"lost-{part}-biases" for part in "qkv"
} | {
    frozenset(("weights.all-zeros", f"attn_{part}.bias") for part in "qkv"): "lost-qkv-biases",
    frozenset({("weights.all-zeros", "output.weight")}): "zero-lm-head",
    frozenset({("weights.all-zeros", "attn_norm.weight")}): "zeroed-norm",
    frozenset({("naming.biases-missing", "")}): "missing-biases",
    frozenset({("naming.tensors-missing", "")}): "dropped-tensor",
    frozenset({("naming.biases-missing", ""), ("naming.unknown-tensor", "")}): "fused-biases",
    frozenset({("container.listed-twice", "")}): "duplicate-tensor",
}
_ONE = ("dropped-tensor", "zeroed-norm")  # faults of a single tensor


def named_by_what_is_gone(case: FileCase, findings: Sequence[Finding]) -> None:
    """Give findings without an id the fault of which they are all that is to be seen; in place."""
    found = [finding for finding in findings if not finding.harmless]
    if any(finding.fault is not None for finding in found):
        return
    id = _GONE.get(frozenset((finding.code, str(finding.parameters.get("part", ""))) for finding in found))
    layers = case.file.config["block_count"]
    everywhere = all(len(finding.tensors) % layers == 0 for finding in found) if isinstance(layers, int) and layers else False
    if id is None or (id.endswith("biases") and not everywhere and id != "fused-biases"):
        return
    if id in _ONE and sum(len(finding.tensors) for finding in found) != 1:
        return
    if id == "fused-biases" and not all(
        "qkv" in name for f in found if f.code == "naming.unknown-tensor" for name in f.tensors
    ):
        return
    for finding in found:
        finding.fault, finding.layer = id, FAULTS[id].layer
        finding.confidence = min(finding.confidence, 0.9)


__all__ = ["lost_information", "named_by_what_is_gone", "tensors_of", "unlike_any_encoder"]
