"""Tables of a few states: which of them holds for each row and column, as text with a sign and a colour.

The same role has the same colour everywhere: what is as it should be, what is wrong, what could not be said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aprlab.display.html import Cell, table
from aprlab.errors import UsageError

TONES = ("good", "bad", "open", "mild", "")


@dataclass(frozen=True)
class StateTable:
    """A table that shows itself in a notebook, and as text with columns elsewhere.

    Attributes:
        rows: label -> a state for each column.
        columns: their headings.
        tones: state -> ``good``, ``bad``, ``open`` (cannot be said), ``mild`` (not the point) or '' (no colour).
        title: above the table.

    Raises:
        UsageError: no rows, a row of another length, a state without a tone, an unknown tone.
    """

    rows: Mapping[str, Sequence[str]]
    columns: Sequence[str]
    tones: Mapping[str, str]
    title: str = ""
    corner: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for label, states in self.rows.items():
            if len(states) != len(self.columns):
                raise UsageError(f"{label}: {len(states)} states for {len(self.columns)} columns", code="display.states-count")
            for state in states:
                if self.tones.get(state) not in TONES:
                    known = ", ".join(self.tones)
                    raise UsageError(f"{label}: no tone for state {state!r}; known: {known}", code="display.unknown-state")
        if not self.rows:
            raise UsageError("a table of states needs a row", code="display.states-count")

    def _repr_html_(self) -> str:
        rows = [[label, *(Cell(state, self.tones[state]) for state in states)] for label, states in self.rows.items()]
        return table((self.corner, *self.columns), rows, caption=self.title)

    def __repr__(self) -> str:
        lines = [[self.corner, *self.columns], *([label, *states] for label, states in self.rows.items())]
        widths = [max(len(line[n]) for line in lines) for n in range(len(self.columns) + 1)]
        text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return f"{self.title}\n{text}" if self.title else text


__all__ = ["StateTable"]
