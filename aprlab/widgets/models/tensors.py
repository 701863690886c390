"""Tensor browser: every tensor of one or two files in a table to be sorted and filtered, and one of them looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.errors import UsageError
from aprlab.instruments.fingerprints import Fingerprint, compare_fingerprints, fingerprint
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.files import Side

_REPORT_EVERY = 1 << 26  # bytes that are compared between two words about it
COLUMNS = ("name", "status", "type", "other type", "shape", "bytes")
STATUSES = ("same", "bytes", "type", "shape", "unreadable", "only here", "only there")


@dataclass(frozen=True)
class TensorRow:
    """One tensor. `status` is one of `STATUSES`, or '' where there is only one file."""

    name: str
    status: str
    type: str
    other: str
    shape: tuple[int, ...]
    nbytes: int

    def cell(self, column: str) -> Any:
        """The value under a heading."""
        return {
            "name": self.name, "status": self.status, "type": self.type, "other type": self.other, "shape": self.shape,
            "bytes": self.nbytes,
        }[column]  # fmt: skip


@dataclass(frozen=True)
class TensorDetail:
    """A tensor looked at: its fingerprint on each side, the values of a sample of its rows, and how they compare."""

    name: str
    prints: dict[str, Fingerprint]
    values: dict[str, np.ndarray]
    words: str


class TensorBrowser(Observable):
    """Two files (or one) as a table. Two are compared in the background (not where `compare` is
    False), and have no statuses until that has ended.

    Attributes:
        sides: one or two.
        order, descending: the column it is sorted by ('' is the order of the file).
        text: part of a name to look for; several words must all be there.
        statuses: only these; empty means all.
        chosen: name of the tensor that is looked at, or ''.
        detail: of it, once it has been computed.
    """

    SAMPLE = 1 << 22  # values of each side that a histogram is made of

    def __init__(self, *sides: Side, compare: bool = True) -> None:
        super().__init__()
        self._show(sides, compare)

    def open(self, reference: str, suspect: str = "") -> None:
        """Look at other files; what is not a file or cannot be read is refused, and the files stay as they were.

        Raises:
            UsageError, FormatError, UnsupportedError: as `Side.open`.
        """
        self.work.free()
        self._show(Side.open_all([reference, *([suspect] if suspect.strip() else [])]), True)
        self.changed()

    def _show(self, sides: Sequence[Side], compare: bool) -> None:
        if not 1 <= len(sides) <= 2:
            raise UsageError(f"{len(sides)} files: one or two are shown", code="widgets.number-of-files")
        self.sides = tuple(sides)
        self.order, self.descending = "", False
        self.text, self.statuses = "", frozenset[str]()
        self.chosen = ""
        self.detail: TensorDetail | None = None
        self.all = self._rows(lambda name: "")
        if len(sides) == 2 and compare:
            self.work.start("comparing both files", self._compare)

    def _compare(self) -> None:
        here, there = self.sides
        total = sum(here.nbytes_of(name) for name in here.names) or 1
        seen = reported = 0

        def status(name: str) -> str:
            nonlocal seen, reported
            if seen - reported >= _REPORT_EVERY:
                self.work.tell(f"comparing {name}", seen / total)
                reported = seen
            seen += here.nbytes_of(name)
            return self._status(here, there, name)

        self.all = self._rows(status)

    def _rows(self, status: Callable[[str], str]) -> list[TensorRow]:
        here = self.sides[0]
        there = self.sides[1] if len(self.sides) == 2 else None
        names = [*here.names, *(name for name in (there.names if there else []) if name not in here.names)]
        rows = []
        for name in names:
            home = here if name in here.names else there
            assert home is not None
            other = there.type_of(name) if there else ""
            rows.append(TensorRow(name, status(name), here.type_of(name), other, home.shape_of(name), home.nbytes_of(name)))
        return rows

    @staticmethod
    def _status(here: Side, there: Side, name: str) -> str:
        if name not in here.names or name not in there.names:
            return "only there" if name not in here.names else "only here"
        a, b = here.tensors.get(name), there.tensors.get(name)
        if a is None or b is None:
            return "unreadable"
        if a.type != b.type:
            return "type"
        if a.shape != b.shape:
            return "shape"
        return "same" if np.array_equal(a.raw, b.raw) else "bytes"

    @property
    def rows(self) -> list[TensorRow]:
        """What is shown now."""
        words = self.text.lower().split()
        kept = [row for row in self.all if all(word in row.name.lower() for word in words)]
        if self.statuses:
            kept = [row for row in kept if row.status in self.statuses]
        if self.order:
            kept.sort(key=lambda row: row.cell(self.order), reverse=self.descending)
        return kept

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by status, in the order of `STATUSES`; only what there is."""
        found = {status: sum(row.status == status for row in self.all) for status in STATUSES}
        return {status: count for status, count in found.items() if count}

    def sort(self, column: str) -> None:
        """By this column; again: the other way round; a third time: the order of the file."""
        if column not in COLUMNS:
            raise UsageError(f"no column {column!r}; there are: {', '.join(COLUMNS)}", code="widgets.unknown-column")
        if self.order != column:
            self.order, self.descending = column, False
        elif not self.descending:
            self.descending = True
        else:
            self.order, self.descending = "", False
        self.changed()

    def filter(self, text: str | None = None, statuses: set[str] | frozenset[str] | None = None) -> None:
        """Set either filter."""
        if text is not None:
            self.text = text
        if statuses is not None:
            self.statuses = frozenset(statuses)
        self.changed()

    def choose(self, name: str) -> None:
        """Look at one tensor: its fingerprints and values are computed in the background."""
        self._known(name)
        self.work.start(f"decoding {name}", lambda: self.look(name))

    def _known(self, name: str) -> None:
        if name not in {row.name for row in self.all}:
            raise UsageError(f"no tensor {name!r}", code="widgets.no-such-tensor")

    def look(self, name: str) -> None:
        """`choose`, here and now."""
        self._known(name)
        prints, values = {}, {}
        held = [side for side in self.sides if name in side.tensors]
        for n, side in enumerate(held):
            self.work.tell(f"decoding {name} of {side.label}", n / len(held))
            tensor = side.tensors[name]
            prints[side.label] = fingerprint(tensor)[0]
            rows = np.unique(
                np.linspace(0, tensor.rows - 1, max(1, min(tensor.rows, self.SAMPLE // tensor.cols))).astype(np.int64)
            )
            values[side.label] = tensor.dequantise(rows) if len(tensor.shape) > 1 else tensor.dequantise()
        words = ""
        if len(prints) == 2:
            a, b = prints.values()
            words = str(compare_fingerprints([a], [b], name).rows[0]["finding"])
            words = {"same": "the same bytes and values", "values": "other values", "blocks": "other blocks, the same values"}[
                words
            ]
        elif not prints:
            words = "no type that its label has ever meant fits its size: it cannot be decoded"
        self.chosen, self.detail = name, TensorDetail(name, prints, values, words)


__all__ = ["COLUMNS", "STATUSES", "TensorBrowser", "TensorDetail", "TensorRow"]
