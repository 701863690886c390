"""Names: what a tensor is called, and what it is by content."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from aprlab.model import names
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.config import LAYERS_LIMIT
from aprlab.model.tensor import Tensor
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.file_match import match_up
from aprlab.onion.layers.layer import Layer
from aprlab.onion.words import Mechanism

_UNKNOWN = 256  # unknown tensors that are searched for missing ones; of more, none is a fused one
_TELLING = 16  # bytes


class NamingLayer(Layer):
    """Which tensor is which. Content first: a hash finds a tensor under another's name."""

    name: ClassVar[str] = "naming"
    kinds: ClassVar[tuple[str, ...]] = ("name", "missing", "extra")
    shown: ClassVar[tuple[str, ...]] = ("name",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        case.matches = match_up(case)
        found: list[Deviation] = []
        written = Counter(match.piece.name for match in case.matches)
        rounds = _rounds(case)
        for match in case.matches:
            p, true = match.piece, match.true
            if true is None:
                twice = written[p.name] > 1
                cause = Mechanism("container.listed-twice" if twice else "naming.unknown-tensor")
                found.append(Deviation("extra", p.stated or p.name, p.name, None, cause, match))
                continue
            expected = case.expected_name(true)
            if p.name != expected:
                cause = rounds.get(true) or wrong_name(case, match)
                found.append(Deviation("name", true, p.name, expected, cause, match, {"found_by": match.by}))
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
        first, second = sorted((names.layer_of(true), names.layer_of(p.stated)), key=int)
        return Mechanism("naming.layers-exchanged", {"first": first, "second": second})
    first, second = sorted(t.replace("blk.N.", "").rpartition(".")[0] for t in (a, b))
    return Mechanism("naming.modules-exchanged", {"first": first, "second": second})


def _rounds(case: FileCase) -> dict[str, Mechanism]:
    """Tensors that went round in a circle of more than two layers, each with the circle that it belongs to.

    Where one of them is a copy and so nobody's own, the circle was never closed: all were shifted.
    """
    moves: dict[str, dict[int, int]] = {}  # template -> layer by content -> layer by name
    copies = set()
    for m in case.matches:
        if m.true is None or m.piece.stated is None or not m.true.startswith("blk."):
            continue
        template = names.template_of(m.true)
        if template != m.true and template == names.template_of(m.piece.stated):
            moves.setdefault(template, {})[int(names.layer_of(m.true))] = int(names.layer_of(m.piece.stated))
            if case.ref is not None and not m.equal and m.piece.hash in case.ref.by_hash:
                copies.add(m.true)
    found: dict[str, Mechanism] = {}
    for template, move in moves.items():
        for circle in _circles(move):
            members = [template.replace("N", str(layer), 1) for layer in circle]
            cause = Mechanism("naming.layers-rotated", {"layers": circle})
            if copies & set(members):
                by = Counter(move[layer] - layer for layer in circle).most_common(1)[0][0]
                cause = Mechanism("naming.layers-shifted", {"part": template.replace("blk.N.", ""), "by": by})
            found |= dict.fromkeys(members, cause)
    return found


def _circles(move: dict[int, int]) -> list[list[int]]:
    """Circles of more than two in a mapping, each from its lowest member on, in the order in which content went."""
    left, found = set(move), []
    for start in sorted(move):
        circle, at = [], start
        while at in left:
            left.discard(at)
            circle.append(at)
            at = move[at]
        if len(circle) > 2 and at == start:
            found.append(circle)
    return found


def _missing(case: FileCase) -> list[Deviation]:
    """Tensors that the reference (or the config) has and the file has not."""
    have = {m.true for m in case.matches}
    if case.ref is not None:
        expected: dict[str, Tensor | None] = dict(case.ref.tensors)
    elif case.file.unrun is not None:
        expected = {}  # nobody here knows what such a model must have
    else:
        layers = case.file.config["block_count"]
        layers = layers if isinstance(layers, int) and 0 < layers <= LAYERS_LIMIT else 0
        kind = case.file.config["architecture"]
        kind = kind if str(kind) in ARCHITECTURES else "qwen2"
        expected = dict.fromkeys(names.inventory(layers, separate_output=False, architecture=kind))
    unknown = [m.piece for m in case.matches if m.true is None and m.piece.size <= 1 << 20]
    held = [(piece.name, piece.raw.tobytes()) for piece in unknown] if len(unknown) <= _UNKNOWN else []
    found = []
    for name, tensor in expected.items():
        if name in have:
            continue
        cause = Mechanism("naming.biases-missing" if name.endswith(".bias") else "naming.tensors-missing")
        d = Deviation("missing", name, None, tensor, cause)
        if tensor is not None and (inside := _inside(tensor, held)) is not None:
            d.evidence["its_bytes_stand_in"] = inside
        found.append(d)
    return found


def _inside(tensor: Tensor, others: list[tuple[str, bytes]]) -> str | None:
    """Name of a tensor nobody knows that holds all bytes of `tensor` in a row; a few bytes are anywhere by chance."""
    if not others or tensor.nbytes < _TELLING or not any(tensor.nbytes < len(raw) for _, raw in others):
        return None
    wanted = tensor.raw.tobytes()
    if not any(wanted):
        return None
    return next((name for name, raw in others if len(wanted) < len(raw) and wanted in raw), None)


__all__ = ["NamingLayer", "wrong_name"]
