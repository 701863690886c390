"""The container: checksums, spans, order of the index, duplicate tensors."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from aprlab.formats import apr
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.layers.layer import Layer
from aprlab.onion.words import Mechanism, refused
from aprlab.quants import types

# Rules that the reader of APR files finds broken and that are looked at again below, with figures; the rest is passed on.
_AGAIN = (
    "reading.duplicate-tensor", "apr.index-not-sorted", "reading.unaligned-tensor", "reading.tensors-overlap",
    "reading.tensor-beyond-end", "apr.footer-crc", "apr.body-length", "apr.header-crc",
)  # fmt: skip
# GGUF data that is all there, and laid out as no reader of ggml's has it: it is laid out again.
LAID_OUT = {"gguf.gap": "container.gap", "identity.unpadded": "container.unpadded"}


class ContainerLayer(Layer):
    """Arithmetic on the index; nothing is decoded."""

    name: ClassVar[str] = "container"
    kinds: ClassVar[tuple[str, ...]] = ("seal", "span")
    shown: ClassVar[tuple[str, ...]] = ("span",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        box = case.file.box
        if box is None:
            return [_seal(Mechanism(LAID_OUT[problem.code]), tensor=problem.tensor, offset=problem.offset)
                    for problem in case.file.problems if problem.code in LAID_OUT]  # fmt: skip
        found = [*_seals(box), *_order(box), *_spans(case)]
        for problem in case.file.problems:
            if problem.code not in _AGAIN:
                found.append(_seal(refused(problem, "container.refused"), offset=problem.offset, tensor=problem.tensor))
        return found

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        if deviation.kind == "seal":
            draft.seals.pop(id(deviation))
        else:
            draft.refill(deviation)


def _seal(cause: Mechanism, **evidence: Any) -> Deviation:
    return Deviation("seal", "", None, None, cause, evidence=evidence)


def _seals(box: apr.Container) -> list[Deviation]:
    found = []
    head = box.image[: apr.HEADER_SIZE].tobytes()
    stored, expected = int.from_bytes(head[40:44], "little"), apr.header_crc(head)
    problems = {problem.code: problem for problem in box.problems}
    if stored != expected:
        cause = Mechanism("container.header-changed")
        found.append(_seal(cause, stored=f"{stored:08x}", expected=f"{expected:08x}"))
    if "apr.footer-crc" in problems:
        found.append(_seal(Mechanism("container.checksum"), crc=problems["apr.footer-crc"].message))
    end = max((box.data_offset + e.offset + e.size for e in box.entries), default=0)
    if end > len(box.image):
        cut = [e.name for e in box.entries if box.data_offset + e.offset + e.size > len(box.image)]
        found.append(
            _seal(Mechanism("container.truncated"), bytes=len(box.image), wanted=end,
                  missing_bytes=end - len(box.image), tensors=len(cut))
        )  # fmt: skip
    elif "apr.body-length" in problems:
        found.append(_seal(Mechanism("container.length-differs"), bytes=len(box.image)))
    return found


def _order(box: apr.Container) -> list[Deviation]:
    listed = [entry.name for entry in box.entries]
    if not box.flags & apr.FLAGS["row_major"] or listed == sorted(listed):
        return []
    hit = sum(_binary_search(listed, name) for name in listed)
    return [_seal(Mechanism("container.index-unsorted"), found_by_binary_search=hit, of=len(listed))]


def _binary_search(listed: list[str], name: str) -> bool:
    low, high = 0, len(listed)
    while low < high:
        middle = (low + high) // 2
        if listed[middle] == name:
            return True
        low, high = (middle + 1, high) if listed[middle] < name else (low, middle)
    return False


def _spans(case: FileCase) -> list[Deviation]:
    """Spans off the grid, over each other, or (where a reference tells) off the bytes they mean."""
    box = case.file.box
    assert box is not None
    found: list[Deviation] = []
    moved = _moved(case)
    found += moved
    known = {id(d.match) for d in moved}
    rows = sorted((e for e in box.entries if e.size), key=lambda e: e.offset)
    by_entry = {m.piece.at: m for m in case.matches}
    for entry in box.entries:
        match = by_entry[entry.at]
        if entry.offset % apr.ALIGNMENT and id(match) not in known:
            found.append(_at(match, "container.misaligned", offset=entry.offset))
            known.add(id(match))
    for before, after in itertools.pairwise(rows):
        match = by_entry[after.at]
        if after.offset < before.offset + before.size and id(match) not in known:
            over = before.offset + before.size - after.offset
            found.append(_at(match, "container.overlap", with_=before.name, bytes=over))
    return found


def _at(match: TensorMatch, code: str, **evidence: Any) -> Deviation:
    return Deviation("seal", match.true or match.piece.name, None, None, Mechanism(code), match, evidence)


def _moved(case: FileCase) -> list[Deviation]:
    """Tensors whose true bytes are elsewhere in the data: the offset is wrong, not the data."""
    found: list[Deviation] = []
    box = case.file.box
    if case.ref is None and box is not None:
        return _all_shifted(case, box)
    for match in case.matches:
        if match.place is None or match.of is None or box is None:
            continue
        shift, p = match.place - match.piece.start, match.piece
        raw = box.image[match.place : match.place + p.size]
        good = Tensor(match.of.name, match.of.type, match.of.shape, raw,
                      Origin(box.path, p.name, match.place if box.compression is None else -1))  # fmt: skip
        cause = Mechanism(f"container.offset-too-{'small' if shift > 0 else 'large'}", {"bytes": abs(shift)})
        found.append(Deviation("span", match.of.name, p.start, good, cause, match, {"shift": -shift}))
    return found


def _all_shifted(case: FileCase, box: apr.Container) -> list[Deviation]:
    """Without a reference: spans that fill the data without a gap, all as many bytes too far on, so that the last ends beyond."""
    rows = sorted((m for m in case.matches if m.piece.size), key=lambda m: m.piece.start)
    shift = rows[0].piece.start - box.data_offset if rows else 0
    if shift <= 0:
        return []
    at = box.data_offset
    for match in rows:
        at += -(at - box.data_offset) % apr.ALIGNMENT
        if match.piece.start != at + shift:
            return []
        at += match.piece.size
    if not at <= len(box.image) < at + shift:
        return []
    found = []
    for match in rows:
        p = match.piece
        place = p.start - shift
        p.raw, p.place, match.place = box.image[place : place + p.size], place, place
        kind = next(iter(p.fitting()), types.F32)
        good = Tensor(match.true or p.name, kind, p.shape, p.raw,
                      Origin(box.path, p.name, place if box.compression is None else -1))  # fmt: skip
        cause = Mechanism("container.offset-too-large", {"bytes": shift})
        found.append(Deviation("span", match.true or p.name, p.start, good, cause, match, {"shift": shift}))
    return found


__all__ = ["LAID_OUT", "ContainerLayer"]
