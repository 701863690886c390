"""What gates say: a code with its parameters; the figure for people is made of both by `aprlab.gates.words`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aprlab.display.html import Cell, table
from aprlab.gates.words import words

SCHEMA = 2  # of the JSON of `gates` and `check`; see docs/gates.md


class GateFinding(NamedTuple):
    """What a gate found when it looked: whether its assertion holds, and which figure shows why."""

    passed: bool
    code: str
    parameters: dict[str, Any]


def holds(code: str, **parameters: Any) -> GateFinding:
    """The assertion holds."""
    return GateFinding(True, code, parameters)


def fails(code: str, **parameters: Any) -> GateFinding:
    """The assertion does not hold."""
    return GateFinding(False, code, parameters)


@dataclass(frozen=True, slots=True)
class GateResult:
    """What one gate says.

    Attributes:
        id, assertion: of the gate.
        passed: None where the gate rests on an instrument that failed its own test, or needs a run of a model that cannot
            be run: no statement.
        code: of the figure, such as ``gate.logits-differ``; listed in docs/gates.md.
        parameters: the figure's numbers and names.
        refused: the candidate was refused by the strict reader before the gate could look.
    """

    id: str
    passed: bool | None
    code: str
    assertion: str
    parameters: dict[str, Any] = field(default_factory=dict)
    refused: bool = False

    @property
    def figure(self) -> str:
        """What was measured, or why the candidate could not even be measured, in words."""
        return words(self.code, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {n: getattr(self, n) for n in ("id", "passed", "code", "figure", "assertion", "refused")}
        return plain | {"parameters": plain_data(self.parameters)}


class GateResults(list[GateResult]):
    """What all gates say; a table in a notebook.

    Attributes:
        engine, engine_asked: which engine ran both sides, and what was asked for.
    """

    engine: str = ""
    engine_asked: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the version of its schema."""
        engine = {"engine": self.engine, "engine_asked": self.engine_asked}
        return {"schema": SCHEMA, **engine, "gates": [result.to_json() for result in self]}

    def _repr_html_(self) -> str:
        tones = {True: "good", False: "bad", None: "open"}
        said = {True: "passed", False: "failed", None: "void"}
        rows = [[r.id, Cell("refused" if r.refused else said[r.passed], tones[r.passed]), r.figure, r.assertion] for r in self]
        held = sum(r.passed is True for r in self)
        caption = Cell(f"{held} of {len(self)} gates passed", "good" if held == len(self) else "bad")
        return table(("gate", "", "figure", "what must hold"), rows, caption=caption)


def plain_data(value: Any) -> Any:
    """Parameters as JSON has them: tuples as lists, numbers that are not finite as words."""
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
