"""From a garbage sentence to the bug: which fault makes a healthy model say it?

Every fault that a run can have is switched on in turn over one healthy model, alone or in growing sets, and its answer is
compared with the text from the bug report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from aprlab.forensics.answer_runs import healthy_session
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.bench import FaultBench, Question
from aprlab.forensics.outcome import FITS, Forensics, ranked
from aprlab.forensics.search import search, units_of
from aprlab.inference.session import Session
from aprlab.model.model import Model

ONE = "text"  # the only question of `forensics`, in its journal


def forensics(
    model: Model | str | Path | Session,
    saw: str | Sequence[int],
    *,
    prompt: str = "What is 2+2?",
    raw: bool = False,
    system: str | None = None,
    depth: int = 1,
    width: int = 4,
    faults: Iterable[str] | None = None,
    engine: str | None = "auto",
    threads: int | None = None,
    journal: str | Path | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[Suspect], None] | None = None,
) -> Forensics:
    """Rank faults by how well they explain a text.

    Args:
        model: a healthy model, opened or as a path, or a session over one.
        saw: the garbage, as text or as token ids; empty where the model said nothing at all.
        prompt, raw, system: what was asked, as for `generate`.
        depth, width, journal, jobs, scheduler: how far and where to search, see `aprlab.forensics.search.search`.
        faults: ids to try, or sets of them to be tried together, ``rope-norm+split-specials``; without it all that a run
            can have, one by one.
        engine, threads: which engine runs; see `aprlab.engines.create`.
        progress: called after each set.

    Raises:
        UsageError: a fault is unknown, the prompt cannot be used, the journal is about something else.
    """
    units = ["+".join(unit) for unit in units_of(faults)]
    session = healthy_session(model, engine, threads)
    tokens = session.tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
    length = len(tokens) * 5 // 4 + 4  # a model may spell in more tokens what the tokenizer says in fewer
    question = Question(ONE, prompt, saw if isinstance(saw, str) else tuple(saw), "none" if raw else "file", system, length)

    def show(faults: tuple[str, ...], found: dict[str, Suspect]) -> None:
        if progress is not None:
            progress(found[ONE])

    bench = FaultBench(session, [question])
    return search(
        bench, units, depth=depth, width=width, journal=journal, jobs=jobs, scheduler=scheduler, progress=show
    )[ONE]  # fmt: skip


__all__ = ["FITS", "Forensics", "forensics", "ranked"]
