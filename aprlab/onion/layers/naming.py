"""Names: what a tensor is called, and what it is by content."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from aprlab.model import names
from aprlab.model.config import LAYERS_LIMIT
from aprlab.model.tensor import Tensor
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.file_match import match_up
from aprlab.onion.layers.layer import Layer
from aprlab.onion.words import Mechanism


class NamingLayer(Layer):
    """Which tensor is which. Content first: a hash finds a tensor under another's name."""

    name: ClassVar[str] = "naming"
    kinds: ClassVar[tuple[str, ...]] = ("name", "missing", "extra")
    shown: ClassVar[tuple[str, ...]] = ("name",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        case.matches = match_up(case)
        found: list[Deviation] = []
        written = Counter(match.piece.name for match in case.matches)
        for match in case.matches:
            p, true = match.piece, match.true
            if true is None:
                twice = written[p.name] > 1
                cause = Mechanism("container.listed-twice" if twice else "naming.unknown-tensor")
                found.append(Deviation("extra", p.stated or p.name, p.name, None, cause, match))
                continue
            expected = case.expected_name(true)
            if p.name != expected:
                evidence = {"found_by": match.by}
                found.append(Deviation("name", true, p.name, expected, wrong_name(case, match), match, evidence))
        return [*found, *_missing(case)]

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        if deviation.kind == "missing":
            draft.added[deviation.tensor] = deviation.expected
        elif deviation.kind == "extra":
            draft.drop(deviation)
        elif (slot := draft.slot(deviation)) is not None:
            slot.stated = deviation.tensor


def wrong_name(case: FileCase, match: TensorMatch) -> Mechanism:
    """What happened to a name that is not the expected one."""
    p, true = match.piece, match.true
    assert true is not None
    if p.stated == true:
        return Mechanism("naming.other-generation", {"found": p.naming, "expected": case.file.dialect.naming})
    if p.stated is None:
        return Mechanism("naming.unknown-name")
    a, b = names.template_of(true), names.template_of(p.stated)
    if a == b:
        first, second = sorted((true.split(".")[1], p.stated.split(".")[1]), key=int)
        return Mechanism("naming.layers-exchanged", {"first": first, "second": second})
    first, second = sorted(t.replace("blk.N.", "").rpartition(".")[0] for t in (a, b))
    return Mechanism("naming.modules-exchanged", {"first": first, "second": second})


def _missing(case: FileCase) -> list[Deviation]:
    """Tensors that the reference (or the config) has and the file has not."""
    have = {m.true for m in case.matches}
    if case.ref is not None:
        expected: dict[str, Tensor | None] = dict(case.ref.tensors)
    else:
        layers = case.file.config["block_count"]
        layers = layers if isinstance(layers, int) and 0 < layers <= LAYERS_LIMIT else 0
        expected = dict.fromkeys(names.inventory(layers, separate_output=False))
    unknown = [m for m in case.matches if m.true is None]
    found = []
    for name, tensor in expected.items():
        if name in have:
            continue
        cause = Mechanism("naming.biases-missing" if name.endswith(".bias") else "naming.tensors-missing")
        d = Deviation("missing", name, None, tensor, cause)
        if tensor is not None and (inside := _inside(tensor, unknown)) is not None:
            d.evidence["its_bytes_stand_in"] = inside
        found.append(d)
    return found


def _inside(tensor: Tensor, others: list[TensorMatch]) -> str | None:
    """Name of an unknown tensor that holds all bytes of `tensor` in a row."""
    wanted = tensor.raw.tobytes()
    for match in others:
        if len(wanted) < match.piece.size <= 1 << 20 and any(wanted) and wanted in match.piece.raw.tobytes():
            return match.piece.name
    return None


__all__ = ["NamingLayer", "wrong_name"]
