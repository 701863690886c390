"""What the verbs of the onion print; the verbs themselves stand in `aprlab.cli`, which imports this when one is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aprlab.cli.app import _console, _print_json, _table
from aprlab.errors import NumericError, UsageError

if TYPE_CHECKING:
    from aprlab.inference.session import Session


def show_faults(id: str | None, *, as_json: bool) -> None:
    """`aprlab faults`: the list, or all about one."""
    from aprlab.faults import FAULTS, by_id
    from aprlab.faults.catalogue import forms

    if id is not None:
        fault = by_id(id)
        if as_json:
            _print_json(fault.to_json())
            return
        facts = {"title": fault.title, "layer": fault.layer, "enters": forms(fault), "story": fault.story, "mark": fault.mark}
        facts["silent"] = "yes, short answers stay right" if fault.silent else "no"
        if fault.needs:
            given = " ".join(f"--{key} {value}" for key, value in fault.given.items())
            facts["needs"] = f"{fault.needs}{f' (convert {given})' if given else ''}"
        _console().print(_table(fault.id, ("", ""), list(facts.items())))
        return
    if as_json:
        _print_json([fault.to_json() for fault in FAULTS.values()])
        return
    rows = [(f.id, f.layer, forms(f), "silent" if f.silent else "", f.title) for f in FAULTS.values()]
    _console().print(_table(f"{len(FAULTS)} faults", ("id", "layer", "enters", "", "title"), rows))


def upstream_session(file: Path, reader: str, backend: str, threads: int | None, *, quiet: bool) -> Session:
    """The file as the reader of that day read it; what it made of each dtype byte and its load line on standard error."""
    from aprlab.faults import upstream

    if reader not in upstream.READERS:
        raise UsageError(f"unknown reader {reader!r}; known: {', '.join(upstream.READERS)}")
    session = upstream.session(file, engine=backend, threads=threads)
    if not quiet:
        for line in [*session.model.warnings, upstream.load_line(session.model, quantised=session.model.quantised > 0)]:
            print(line, file=sys.stderr)
    return session


def refuse_garbage(session: Session) -> None:
    """Upstream left with status 0 here; raises NumericError where a token was taken from logits that are no numbers."""
    lost = getattr(session.engine, "lost", 0)
    if lost:
        raise NumericError(f"{lost} tokens come from logits that are NaN or Inf, where upstream takes the last of equals")
