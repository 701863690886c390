"""The container: seals (CRC), spans, order of the index, tensors that stand twice."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from aprlab.formats import apr
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.layers.base import Case, Deviation, Layer, Match

# What the strict reader says about things that are looked at again below, with figures; the rest is passed on as it is.
_AGAIN = ("stands there twice", "is not sorted", "is not a multiple of", "overlaps tensor", "needs bytes", "footer CRC",
          "its writer wrote", "header CRC")  # fmt: skip


class Container(Layer):
    """Arithmetic on the index; nothing is decoded."""

    name: ClassVar[str] = "container"

    def suspect(self, case: Case) -> list[Deviation]:
        found: list[Deviation] = []
        if case.seen.box is not None:
            found += [*_seals(case.seen.box), *_order(case.seen.box), *_spans(case)]
        for problem in case.seen.problems:
            if case.seen.box is not None and not any(words in problem.message for words in _AGAIN):
                where = {"offset": problem.offset, "tensor": problem.tensor}
                found.append(Deviation(self.name, "seal", "", None, None, problem.message, evidence=where))
        return found


def _seal(how: str, **evidence: Any) -> Deviation:
    return Deviation("container", "seal", "", None, None, how, evidence=evidence)


def _seals(box: apr.Container) -> list[Deviation]:
    found = []
    head = box.image[: apr.HEADER_SIZE].tobytes()
    stored = int.from_bytes(head[40:44], "little")
    if stored != (due := apr.header_crc(head)):
        found.append(_seal("the header was changed after it was written", stored=f"{stored:08x}", due=f"{due:08x}"))
    for problem in box.problems:
        if problem.message.startswith("footer CRC"):
            found.append(_seal("bytes were changed after the file was written: its seal is broken", crc=problem.message))
    end = max((box.data_offset + e.offset + e.size for e in box.entries), default=0)
    if end > len(box.image):
        cut = [e.name for e in box.entries if box.data_offset + e.offset + e.size > len(box.image)]
        found.append(
            _seal("the file is cut off: the index asks for bytes beyond its end", bytes=len(box.image), wanted=end,
                  missing_bytes=end - len(box.image), tensors=len(cut))
        )  # fmt: skip
    elif any(problem.message.startswith("its writer wrote") for problem in box.problems):
        found.append(_seal("the file is shorter or longer than its writer made it", bytes=len(box.image)))
    return found


def _order(box: apr.Container) -> list[Deviation]:
    listed = [entry.name for entry in box.entries]
    if not box.flags & apr.FLAGS["row_major"] or listed == sorted(listed):
        return []
    hit = sum(_binary_search(listed, name) for name in listed)
    return [_seal("the index is not sorted", found_by_binary_search=hit, of=len(listed))]


def _binary_search(listed: list[str], name: str) -> bool:
    low, high = 0, len(listed)
    while low < high:
        middle = (low + high) // 2
        if listed[middle] == name:
            return True
        low, high = (middle + 1, high) if listed[middle] < name else (low, middle)
    return False


def _spans(case: Case) -> list[Deviation]:
    """Spans off the grid, over each other, or (where a reference tells) beside the bytes they mean."""
    box = case.seen.box
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
            found.append(_at(match, "data do not start on a multiple of 64 bytes", offset=entry.offset))
            known.add(id(match))
    for before, after in itertools.pairwise(rows):
        match = by_entry[after.at]
        if after.offset < before.offset + before.size and id(match) not in known:
            over = before.offset + before.size - after.offset
            found.append(_at(match, "bytes of two tensors overlap", with_=before.name, bytes=over))
    return found


def _at(match: Match, how: str, **evidence: Any) -> Deviation:
    d = Deviation("container", "seal", match.true or match.piece.name, None, None, how, match, evidence)
    return d


def _moved(case: Case) -> list[Deviation]:
    """Tensors whose true bytes stand elsewhere in the data: the offset is wrong, not the data."""
    found: list[Deviation] = []
    box = case.seen.box
    for match in case.matches:
        if match.place is None or match.of is None or box is None:
            continue
        shift, p = match.place - match.piece.start, match.piece
        raw = box.image[match.place : match.place + p.size]
        good = Tensor(match.of.name, match.of.type, match.of.shape, raw,
                      Origin(box.path, p.name, match.place if box.compression is None else -1))  # fmt: skip
        how = f"the offset is {abs(shift)} bytes too {'small' if shift > 0 else 'large'}: the right bytes stand there"
        found.append(Deviation("container", "span", match.of.name, p.start, good, how, match, {"shift": -shift}))
    return found
