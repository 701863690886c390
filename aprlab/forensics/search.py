"""The search: sets of faults, judged one by one, grown from the best; in this process, in several, or on a cluster.

What was judged goes into a journal at once, so that a search that is cut goes on where it stopped.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aprlab import workers
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, run_faults
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.bench import FaultBench, Question
from aprlab.forensics.journal import Journal
from aprlab.forensics.outcome import Forensics, ranked

OnJudged = Callable[[tuple[str, ...], dict[str, Suspect]], None]  # a set, and what it makes of each question
Tried = dict[str, dict[frozenset[str], Suspect]]  # by question
_ALONE = threading.Lock()  # a cluster's worker may have several threads, a bench has one cache


@dataclass(frozen=True)
class _Part:
    """What a worker is given: where the bench comes from, and one set of faults."""

    model: str
    questions: tuple[Question, ...]
    engine: str | None
    threads: int | None
    faults: tuple[str, ...]
    ids: tuple[str, ...]


@lru_cache(maxsize=1)
def _bench(model: str, questions: tuple[Question, ...], engine: str | None, threads: int | None) -> FaultBench:
    return FaultBench(model, questions, engine, threads)


def judge_part(part: _Part) -> tuple[tuple[str, ...], dict[str, Suspect]]:
    """One set of faults, in another process; its bench stays for the next."""
    with _ALONE:
        bench = _bench(part.model, part.questions, part.engine, part.threads)
        return part.faults, bench.judge(part.faults, part.ids)


def units_of(faults: Iterable[str] | None) -> list[tuple[str, ...]]:
    """Sets to begin with, ``a+b`` for two at once; every single fault that a run can have where none are given."""
    units = [tuple(unit.split("+")) for unit in (run_faults() if faults is None else faults)]
    for id in itertools.chain.from_iterable(units):
        if id not in FAULTS:
            raise UsageError(f"unknown fault {id!r} (`aprlab faults` lists them)", code="faults.unknown")
    return units


def search(
    bench: FaultBench,
    faults: Iterable[str] | None = None,
    *,
    depth: int = 1,
    width: int = 4,
    journal: str | Path | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: OnJudged | None = None,
) -> dict[str, Forensics]:
    """Judge sets of faults for every question of a bench.

    Args:
        bench: the model and the questions.
        faults: as for `units_of`.
        depth: 1 tries them as given, 2 also pairs, and so on: each round adds one to the `width` best sets so far, of each
            question; best in turn by the likelihood of the text and by the score.
        width: see `depth`.
        journal: a file that takes what was judged, line by line; what is in it already is not judged again.
        jobs: processes on this machine; each opens the model.
        scheduler: address of a Dask cluster that judges instead.
        progress: called after each set, and at once for what the journal has.

    Returns:
        Question -> ranking.

    Raises:
        UsageError: an unknown fault; several processes for a model that is not a file; a journal of something else.
    """
    started = time.process_time()
    workers.check_jobs(jobs)
    units = units_of(faults)
    tried: Tried = {id: {} for id in bench.questions}
    book = Journal.opened(journal, bench) if journal is not None else None
    try:
        if book is not None:
            for id, suspect in book.kept:
                tried[id][frozenset(suspect.faults)] = suspect
        beams: dict[str, list[tuple[str, ...]]] = {id: [()] for id in bench.questions}
        for _ in range(depth):
            wanted = _wanted(beams, units, tried, progress)
            for chosen, found in _judged(bench, wanted, jobs, scheduler):
                for id, suspect in found.items():
                    tried[id][frozenset(chosen)] = suspect
                if book is not None:
                    book.add(found)
                if progress is not None:
                    progress(chosen, found)
            beams = {id: best_of(tried[id].values(), width) for id in tried}
    finally:
        if book is not None:
            book.close()
    return {id: bench.outcome(id, list(suspects.values()), time.process_time() - started) for id, suspects in tried.items()}


def _wanted(
    beams: dict[str, list[tuple[str, ...]]], units: Sequence[tuple[str, ...]], tried: Tried, progress: OnJudged | None
) -> dict[tuple[str, ...], list[str]]:
    """The sets of a round that are not judged yet, each with the questions that it is for."""
    wanted: dict[tuple[str, ...], list[str]] = {}
    kept: dict[tuple[str, ...], dict[str, Suspect]] = {}
    for id, beam in beams.items():
        for chosen in grown(beam, units):
            known = tried[id].get(frozenset(chosen))
            if known is None:
                wanted.setdefault(chosen, []).append(id)
            else:
                kept.setdefault(chosen, {})[id] = known
    for chosen, found in kept.items() if progress is not None else ():
        if progress is not None and chosen not in wanted:
            progress(chosen, found)
    return {chosen: list(dict.fromkeys(ids)) for chosen, ids in wanted.items()}


def _judged(
    bench: FaultBench, wanted: dict[tuple[str, ...], list[str]], jobs: int, scheduler: str | None
) -> Iterator[tuple[tuple[str, ...], dict[str, Suspect]]]:
    if (jobs == 1 and scheduler is None) or not wanted:
        yield from ((chosen, bench.judge(chosen, ids)) for chosen, ids in wanted.items())
        return
    engine, path = bench.session.engine, bench.session.model.path
    if not Path(path).is_file():
        raise UsageError("other processes open the model again, and it is no file", code="forensics.not-a-file")
    threads = None if scheduler is not None else workers.threads_each(jobs)
    questions, model = tuple(bench.questions.values()), str(Path(path).resolve())
    parts = [_Part(model, questions, engine.spec, threads, chosen, tuple(ids)) for chosen, ids in wanted.items()]
    yield from workers.results(
        judge_part, parts, jobs=jobs, scheduler=scheduler, files=[model], names=["+".join(part.faults) for part in parts]
    )


def grown(beam: Iterable[tuple[str, ...]], units: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Every set of the beam with one more unit; ids stay in catalogue order, so that a set has one spelling."""
    order = {id: n for n, id in enumerate(FAULTS)}
    for chosen in beam:
        for unit in units:
            if not set(unit) & set(chosen):
                yield tuple(sorted((*chosen, *unit), key=order.__getitem__))


def best_of(suspects: Iterable[Suspect], width: int) -> list[tuple[str, ...]]:
    """The sets that grow: in turn the best by likelihood and the best by score."""
    ran = [s for s in suspects if s.match is not None]
    by_score = [s.faults for s in ranked(ran)]
    by_likelihood = [s.faults for s in sorted(ran, key=lambda s: float("inf") if s.bits is None else s.bits)]
    turns = itertools.chain.from_iterable(zip(by_likelihood, by_score, strict=True))
    return list(dict.fromkeys(turns))[:width]
