"""What there is to see for one finding: its picture (the notebook's own), and a table where names or tokens say more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from aprlab.errors import BROKEN
from aprlab.inference.session import Session
from aprlab.lab import finding_figures as pictures
from aprlab.onion.file_case import FileCase
from aprlab.onion.verdict import Finding, short
from aprlab.widgets.drawing import png

_SIZE = (11, 3.9)  # inches; two axes side by side


@dataclass(frozen=True)
class Evidence:
    """Something to look at.

    Attributes:
        caption: what to see in it.
        image: PNG, or empty.
        columns, rows: a table, or empty.
    """

    caption: str
    image: bytes = b""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()


def of_file(case: FileCase, finding: Finding, others: Sequence[Finding], prompt: str) -> Evidence:
    """For a finding of two files."""
    if case.ref is None:
        return facts(finding)
    image = png(lambda axes: pictures.of_file(finding, case, axes, others=others, prompt=prompt), _SIZE, columns=2)
    if finding.layer != "naming":
        return Evidence(pictures.caption(finding), image)
    found = [match for match in case.matches if match.true in finding.tensors]
    rows = tuple((m.piece.name, case.expected_name(m.true or ""), m.true or "", m.by) for m in found)
    return Evidence(pictures.caption(finding), image, ("in the file", "should be", "is (GGUF)", "known by"), rows)


def of_runs(healthy: Session, other: Session, finding: Finding, prompt: str) -> Evidence:
    """For a finding of two sessions, or of two files whose tensors are sound."""
    image = png(lambda axes: pictures.of_run(finding, healthy, other, axes, prompt=prompt), _SIZE, columns=2)
    rows = _tokens(healthy, other, prompt) if finding.layer == "tokenizer" else ()
    columns = ("position", "healthy", "other", "") if rows else ()
    return Evidence(pictures.caption(finding, run=True), image, columns, rows)


def facts(finding: Finding) -> Evidence:
    """The finding's own figures as a table."""
    rows = tuple((key, short(value)) for key, value in finding.evidence.items())
    return Evidence(finding.mechanism, columns=("figure", "value"), rows=rows)


def _tokens(healthy: Session, other: Session, prompt: str) -> tuple[tuple[object, ...], ...]:
    """The prompt's tokens on both sides; empty where they agree."""
    sides = []
    for session in (healthy, other):
        try:
            ids = session.prompt_tokens(prompt, raw=session.wants_raw)
            sides.append([f"{n} {session.tokenizer.decode([n])!r}" for n in ids])
        except (*BROKEN, KeyError) as error:
            sides.append([str(error)])
    if sides[0] == sides[1]:
        return ()
    return tuple((n, a, b, "" if a == b else "differs") for n, (a, b) in enumerate(zip_longest(*sides, fillvalue="")))


__all__ = ["Evidence", "facts", "of_file", "of_runs"]
