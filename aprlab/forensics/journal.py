"""A search's journal: one line of JSON for each set that was judged for a question, after one that says what they are about.

A line is written whole and at once, so that what a search has done outlives it. A journal of another model, engine, question or
of a fault that has changed since is refused by name: its lines would be true of something else.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from aprlab.cluster import token_of
from aprlab.errors import FormatError, UsageError
from aprlab.faults import FAULTS, Fault
from aprlab.faults.base import FILE_SEAMS, RUN_SEAMS
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.bench import FaultBench
from aprlab.formats.reading import read_bytes

KIND = "aprlab forensics"
VERSION = 1
LIMIT = 1 << 30  # bytes


class Journal:
    """An open journal. `kept` are the judgements that it held when it was opened, of the questions that are asked."""

    def __init__(self, file: IO[str], kept: list[tuple[str, Suspect]]) -> None:
        self._file, self.kept = file, kept

    @classmethod
    def opened(cls, path: str | Path, bench: FaultBench) -> Journal:
        """The journal at `path`, begun where there is none.

        Raises:
            UsageError: it is about something else, or cannot be written.
            FormatError: it is no journal, or a line in its middle is broken.
        """
        path = Path(path)
        rows, whole = _rows(path)
        asked = {id: _digest(repr(question)) for id, question in bench.questions.items()}
        kept: list[tuple[str, Suspect]] = []
        known: set[str] = set()
        then: dict[str, str] = {}
        if rows:
            _check_head(path, rows[0], bench)
            then |= rows[0]["faults"]
        for number, row in enumerate(rows[1:], 2):
            try:
                if "also" in row:
                    then |= row["also"]
                elif "question" in row:
                    known.add(row["question"])
                    _check_question(path, row, asked)
                elif row["for"] in asked:
                    kept.append((row["for"], Suspect.from_json(row)))
                    _check_faults(path, row, then)
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"line {number}: not a judgement ({error})", code="journal.line", path=path) from None
        try:
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise UsageError(f"cannot write it: {error.strerror}", code="journal.cannot-write", path=path) from None
        if rows:
            os.truncate(path, whole)  # without a last line that was cut
        journal = cls(file, kept)
        if not rows:
            os.truncate(path, 0)
            journal._write(_head(bench))
        elif new := {id: digest for id, digest in _digests().items() if id not in then}:
            journal._write({"also": new})  # faults that came into the catalogue since
        for id, digest in asked.items():
            if id not in known:
                journal._write({"question": id, "digest": digest, "asked": bench.questions[id].prompt})
        return journal

    def add(self, found: dict[str, Suspect]) -> None:
        """What a set makes of these questions."""
        for id, suspect in found.items():
            self._write({"for": id, **suspect.to_json()})

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and how many bytes they are without a last one that was cut; none where there is no file or an empty one."""
    if not path.exists():
        return [], 0
    try:
        data = read_bytes(path, LIMIT)
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", code="journal.cannot-read", path=path) from None
    whole = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FormatError(f"line {number}: not JSON ({error})", code="journal.not-json", path=path) from None
        if not isinstance(row, dict):
            raise FormatError(f"line {number}: not an object", code="journal.not-json", path=path)
        rows.append(row)
    if data and (not rows or rows[0].get("journal") != KIND or rows[0].get("version") != VERSION):
        raise FormatError(f"is no journal of `forensics` (version {VERSION})", code="journal.not-one", path=path)
    return rows, whole


def _head(bench: FaultBench) -> dict[str, Any]:
    own = {"model": _model(bench), "engine": bench.session.engine.spec, "faults": _digests()}
    return {"journal": KIND, "version": VERSION} | own


def _digests() -> dict[str, str]:
    return {id: fault_digest(fault) for id, fault in FAULTS.items() if fault.instrument is None}


def _model(bench: FaultBench) -> dict[str, str]:
    """Its name, and its size and ends, or its inventory where it is no file."""
    model = bench.session.model
    path = str(model.path)
    if Path(path).is_file():
        return {"name": Path(path).name, "is": token_of(path)}
    inventory = [(name, tensor.type.name, tensor.shape) for name, tensor in model.tensors.items()]
    return {"name": Path(path).name, "is": f"inventory {_digest(repr(inventory))}"}


def _check_head(path: Path, head: dict[str, Any], bench: FaultBench) -> None:
    own, there = _head(bench), head.get("model")
    if there != own["model"]:
        name, here = there.get("name") if isinstance(there, dict) else there, own["model"]["name"]
        detail = f"{name}, not {here}" if name != here else f"a {name} with other bytes"
        raise UsageError(f"is a journal of another model: {detail}; name another file", code="journal.other-model", path=path)
    if head.get("engine") != own["engine"]:
        raise UsageError(
            f"is a journal of another engine: {head.get('engine')}, not {own['engine']}; name another file",
            code="journal.other-engine", path=path,
        )  # fmt: skip
    if not isinstance(head.get("faults"), dict):
        raise FormatError("line 1: does not say which faults it knows", code="journal.line", path=path)


def _check_question(path: Path, row: dict[str, Any], asked: dict[str, str]) -> None:
    id = row["question"]
    if id in asked and row["digest"] != asked[id]:
        raise UsageError(
            f"is a journal of another case {id!r}: prompt, template or answer differ; name another file",
            code="journal.other-case", path=path,
        )  # fmt: skip


def _check_faults(path: Path, row: dict[str, Any], then: dict[str, str]) -> None:
    for id in row["faults"]:
        if id not in FAULTS or then[id] != fault_digest(FAULTS[id]):
            what = "has changed since" if id in FAULTS else "is in no catalogue"
            raise UsageError(
                f"is a journal of other faults: {id!r} {what}; name another file", code="journal.other-faults", path=path
            )


def fault_digest(fault: Fault) -> str:
    """Of the source that a fault is made in: it is another one when that changes."""
    forms = [getattr(fault, seam) for seam in (*RUN_SEAMS, *FILE_SEAMS) if getattr(fault, seam) is not None]
    return _digest("".join(_source(getattr(form, "__module__", "")) for form in forms))


@cache
def _source(module: str) -> str:
    file = getattr(import_module(module), "__file__", None) if module else None
    return _digest(Path(file).read_text(encoding="utf-8")) if file else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
