"""Exercises: patients whose fault is not told. The fault is chosen at run time by a seed; the source knows hashes alone.

A patient has a `Pair`, so that everything that notebook 07 does can be done with it. An answer is right if it is the fault that
was put in, or one that leaves the same file, as `peel` says.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aprlab import paths
from aprlab.display.html import Cell
from aprlab.errors import BROKEN, UsageError, reason
from aprlab.faults import FAULTS, Fault, by_id
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.lab.pairs import Engines, Files, Pair, pair, patient
from aprlab.onion.verdict import Verdict
from aprlab.published import QUESTION

QUESTIONS = (QUESTION, "What is the capital of France?")
# number -> how it is met, and what it may have: hashes of ids, so that reading this file tells nothing
FORMS = {1: "two files", 2: "two files", 3: "one file", 4: "a program", 5: "a sentence"}
_POOLS: dict[int, tuple[str, ...]] = {
    1: ("2656d2559afa71cd", "09ebf41930d6c835", "357906d264c9c192"),
    2: ("1efe00a5959baf2a", "e8648b0e8e7494dc", "4c5f8dc014d9ed29", "5c02703395c9633a"),
    3: ("41f35390efc0c5d2", "46b3decf206347e7", "f83de48ea1d26074", "27274ebc61b6982a"),
    4: ("9fc6dbbd88bc2a3b", "7cad425e6d9f47d0", "c3643fb481298f51"),
    5: ("f4c72a48c3e9ab32", "cad6ff7585e7c8b1", "88ae78af061e45ba", "9bf738d631f580cb"),
}
_LAYERS = {
    "naming": "the names under which a reader looks for tensors",
    "container": "the container: counts, offsets, order",
    "dtype": "the types that the file gives its tensors",
    "layout": "the order of values in memory",
    "decode": "what is inside the blocks of a quantised type",
    "weights": "the values of some tensors",
    "config": "the config",
    "tokenizer": "the tokenizer or the template",
    "forward": "an operation of the forward pass",
}


@dataclass(frozen=True)
class AnswerCheck:
    """What was said of an answer: `right` is None where there is none yet."""

    right: bool | None
    words: str

    def __str__(self) -> str:
        return self.words

    def _repr_html_(self) -> str:
        tone = "open" if self.right is None else "good" if self.right else "bad"
        return f"<div>{Cell(self.words, tone).html()}</div>"


class Hints:
    """Hints that open one inside the other: each is read before the next can be seen."""

    def __init__(self, hints: Sequence[str]) -> None:
        self.hints = list(hints)

    def __str__(self) -> str:
        return f"{len(self.hints)} hints; a cell shows them one by one"

    def _repr_html_(self) -> str:
        inside = ""
        for n, hint in reversed(list(enumerate(self.hints, 1))):
            summary = f'<summary style="cursor:pointer">hint {n} of {len(self.hints)}</summary>'
            inside = f'<details style="margin-left:1em">{summary}<p>{html.escape(hint)}</p>{inside}</details>'
        return inside


class Exercise:
    """One patient.

    Attributes:
        number, seed: which one.
        form: how it is met: ``two files``, ``one file``, ``a program``, ``a sentence``.
        pair: the two sides; of one file alone the reference is missing, as it is for the reader.
    """

    def __init__(self, number: int, seed: int, folder: str | Path) -> None:
        self.number, self.seed, self.form = number, seed, FORMS[number]
        self._fault = chosen(number, seed)
        self.pair = _made(self.form, self._fault, Path(folder))
        self._verdict: Verdict | None = None

    def ask(self, question: str = QUESTION, max_tokens: int = 12) -> dict[str, str]:
        """What the sides say, ``reference`` where there is one, and ``candidate``; in angle brackets, why one says nothing."""
        if isinstance(self.pair, Engines):
            return self.pair.answers(Verdict("broken", []), question, max_tokens)
        assert isinstance(self.pair, Files)
        sides = {"reference": self.pair.reference, "candidate": self.pair.candidate}
        return {label: _said(path, question, max_tokens) for label, path in sides.items() if path is not None}

    def peel(self) -> Verdict:
        """The solution, with proof; run once."""
        if self._verdict is None:
            self._verdict = self.pair.peel()
        return self._verdict

    @property
    def hints(self) -> Hints:
        """From the place to the mark to the first letter, never the name."""
        layer, id = self._fault.layer, self._fault.id
        rivals = sum(fault.layer == layer for fault in FAULTS.values())
        return Hints([
            f"Look at {_LAYERS[layer]}.",
            " ".join(self._fault.mark.split()),
            f"The catalogue has {rivals} faults of the layer {layer}; this one's id begins with {id[0]!r}, ends with {id[-1]!r}.",
        ])  # fmt: skip

    def check(self, answer: str) -> AnswerCheck:
        """Whether a fault of the catalogue is the one.

        Raises:
            UsageError: there is no such fault.
        """
        if not answer.strip():
            return AnswerCheck(None, "no answer yet: give the id of a fault (`aprlab faults` lists them)")
        said = by_id(answer.strip())
        if said.id == self._fault.id:
            return AnswerCheck(True, f"{said.id}: that is the fault. {said.title}.")
        if self.form != "a sentence" and said.layer == self._fault.layer and said.id in self.pair.named(self.peel()):
            return AnswerCheck(True, f"{said.id}: that leaves the same file as the fault that was put in.")
        near = "The layer is right." if said.layer == self._fault.layer else "Another layer."
        return AnswerCheck(False, f"{said.id}: no. {near}")


def exercise(number: int, seed: int = 1, *, folder: str | Path) -> Exercise:
    """A patient.

    Args:
        number: 1 to 5, see `FORMS`.
        seed: another seed may be another fault.
        folder: where its file is written.

    Raises:
        UsageError: there is no such exercise.
    """
    if number not in FORMS:
        raise UsageError(f"exercise {number}: there are {', '.join(map(str, FORMS))}", code="exercises.unknown")
    return Exercise(number, seed, folder)


def digest(number: int, id: str) -> str:
    """What `_POOLS` has of a fault."""
    return hashlib.sha256(f"aprlab exercise {number}: {id}".encode()).hexdigest()[:16]


def pool(number: int) -> list[Fault]:
    """The faults that a patient may have, in the order of the pool."""
    known = {digest(number, id): fault for id, fault in FAULTS.items()}
    return [known[each] for each in _POOLS[number]]


def _said(path: Path, question: str, max_tokens: int) -> str:
    """What a file says; in angle brackets, why it says nothing."""
    try:
        with open_model(path) as model:
            session = Session(model)
            return session.generate(question, max_tokens=max_tokens, raw=session.wants_raw).text
    except BROKEN as error:
        return f"<{reason(error)}>"


def chosen(number: int, seed: int) -> Fault:
    """The fault of a patient."""
    some = pool(number)
    return some[int.from_bytes(hashlib.sha256(f"{number}, {seed}".encode()).digest()[:4], "big") % len(some)]


def _made(form: str, fault: Fault, folder: Path) -> Pair:
    if form == "one file":
        return patient(fault=fault.id, folder=folder)
    if form == "two files":
        return pair(fault=fault.id, folder=folder)
    return Engines(open_model(paths.embedded_model()), [fault.id])


__all__ = ["FORMS", "QUESTIONS", "AnswerCheck", "Exercise", "Hints", "chosen", "digest", "exercise", "pool"]
