"""Cases: garbage that somebody reported, with what was asked, how, and what is known of the cause.

A case is a small JSON object, documented in docs/evidence.md. Several cases of one model are ranked together: each fault is
switched on once and asks every prompt, so that what a fault costs to set up is paid once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.faults import FAULTS, run_faults
from aprlab.forensics.answer_runs import healthy_session
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.bench import FaultBench, Question
from aprlab.forensics.logprob_evidence import Figures, figures_suspects
from aprlab.forensics.outcome import Forensics, ranked
from aprlab.forensics.search import search
from aprlab.formats.reading import read_bytes
from aprlab.inference.session import Session
from aprlab.model.model import Model

TEMPLATES = ("file", "chatml-without-system", "none")  # how the prompt goes in: by the file's template, by bare ChatML, as it is
LONGEST = 24  # tokens of an answer that are compared at most
FILE_LIMIT = 16 << 20  # bytes of a file of cases
MOST = 500  # cases of a file
TEXT_LIMIT = 20_000  # characters of a prompt or an answer; ids of an answer


@dataclass(frozen=True)
class Case:
    """One reported answer.

    Attributes:
        id: a short name.
        prompt: what was asked; '' where nobody said.
        text: the answer; '' where only token ids are known.
        token_ids: exact ids, where they were published.
        template: one of `TEMPLATES`.
        system: the system message, or None.
        model: which published model it is, as in data/models.toml; '' for another one.
        cause: ids of the faults that the thread names; empty where the cause is open.
        certainty: how sure that is: ``certain``, ``high``, ``medium``, ``low`` or ``open``; ``found`` where no thread names the
            cause but a search found it.
        url: where it was reported.
        note: what has to be known to judge it.
        comment: where we think that the thread is wrong.
        response: a server's answer with log-probabilities, as JSON: then the figures are the evidence, and not the text.
    """

    id: str
    prompt: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    template: str = "file"
    system: str | None = None
    model: str = ""
    cause: tuple[str, ...] = ()
    certainty: str = "open"
    url: str = ""
    note: str = ""
    comment: str = ""
    response: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UsageError(
                f"case {self.id}: template {self.template!r}; known: {', '.join(TEMPLATES)}", code="cases.unknown-template"
            )
        if not self.text and not self.token_ids and self.response is None:
            raise UsageError(f"case {self.id}: neither a text nor token ids", code="cases.no-answer")
        for id in self.cause:
            if id not in FAULTS:
                raise UsageError(f"case {self.id}: unknown fault {id!r}", code="faults.unknown")

    @property
    def saw(self) -> str | list[int]:
        """What was seen: ids where they are known."""
        return list(self.token_ids) if self.token_ids else self.text

    @property
    def question(self) -> Question:
        """What the bench is asked."""
        return Question(self.id, self.prompt, self.token_ids or self.text, self.template, self.system, LONGEST)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Case:
        """From JSON: the fields above, or the keys of public collections of garbage.

        Those are ``output`` or ``output_decoded`` for the text, ``mode`` (chat, raw) for the template, and ``system``
        with the word ``none`` for ChatML without a system message.
        """
        if not isinstance(data, Mapping) or "prompt" not in data:
            raise UsageError("a case is an object with at least a prompt and a text", code="cases.no-prompt")
        text = data.get("text") or data.get("output_decoded") or data.get("output") or ""
        cause = data.get("cause")
        system = data.get("system")
        token_ids = data.get("token_ids") or ()
        _want(data, all(not isinstance(data.get(name), Mapping | list) for name in _WORDS), f"{', '.join(_WORDS)} are text")
        _want(data, system is None or isinstance(system, str), "system is text, or null")
        listed = isinstance(cause, list | str) and all(isinstance(id, str) for id in cause)
        _want(data, cause is None or listed, "cause is a list of faults")
        ids = isinstance(token_ids, list | tuple) and all(type(id) is int and 0 <= id < 1 << 31 for id in token_ids)
        _want(data, ids, "token_ids is a list of ids")
        response = data.get("response")
        _want(data, response is None or isinstance(response, Mapping), "response is an object: what a server answered")
        longest = max(len(str(data["prompt"])), len(str(text)), len(token_ids), len(system or ""))
        _want(data, longest <= TEXT_LIMIT, f"more than {TEXT_LIMIT} characters or ids in one entry")
        bare = isinstance(system, str) and system.strip().lower() in ("none", "-", "")
        template = data.get("template")
        if template is None:
            raw = str(data.get("mode", "")).lower().startswith("raw")
            template = "none" if raw else "chatml-without-system" if bare else "file"
        return cls(
            str(data.get("id", "case")), str(data["prompt"]), str(text), tuple(token_ids), str(template),
            None if bare else system, str(data.get("model", "")),
            tuple(cause) if isinstance(cause, list) else (), str(data.get("certainty", "open")), str(data.get("url", "")),
            str(data.get("note", "")), str(data.get("comment", "")), response,
        )  # fmt: skip


# Entries of a case that are text; a number stands for its digits.
_WORDS = ("id", "prompt", "text", "output", "output_decoded", "template", "mode", "model", "certainty", "url", "note", "comment")


def _want(data: Mapping[str, Any], holds: bool, rule: str) -> None:
    if not holds:
        raise UsageError(f"case {str(data.get('id', 'case'))[:60]!r}: {rule}", code="cases.entry")


def read_cases(path: str | Path) -> list[Case]:
    """Cases of a JSON file: one object, a list of them, or an object with a list ``cases``.

    Raises:
        UsageError: there is no such file, it holds none or more than `MOST`, or a case lacks something.
        FormatError: it is not JSON, or larger than `FILE_LIMIT`.
    """
    path = Path(path)
    try:
        data = json.loads(read_bytes(path, FILE_LIMIT))
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", code="cases.cannot-read", path=path) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON: {error}", code="cases.not-json", path=path) from None
    rows = data if isinstance(data, list) else data.get("cases", [data]) if isinstance(data, Mapping) else [data]
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST:
        many = f"{len(rows)} cases" if isinstance(rows, list) else "no list of cases"
        raise UsageError(f"holds {many}; one to {MOST} are taken", code="cases.count", path=path)
    try:
        return [Case.of_json(row) for row in rows]
    except AprlabError as error:
        error.path = error.path or path
        raise


# ── ranking several at once ───────────────────────────────────────────────────────────────────────────────────────


def rank_cases(
    model: Model | str | Path | Session,
    cases: Sequence[Case],
    *,
    faults: Iterable[str] | None = None,
    depth: int = 1,
    width: int = 4,
    engine: str | None = "auto",
    threads: int | None = None,
    journal: str | Path | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Forensics]:
    """Rank faults for each case, all cases of one model together.

    Args:
        model: a healthy model of which the cases are.
        cases: what was seen.
        faults: ids or sets, ``a+b``; without it every single fault that a run can have.
        depth, width, journal, jobs, scheduler: how far and where to search, see `aprlab.forensics.search.search`.
        engine, threads: which engine runs.
        progress: called after each set with its name and its seconds of processor time.

    Returns:
        Case id -> ranking.
    """
    if len({case.id for case in cases}) < len(cases):
        raise UsageError("two cases have one id", code="cases.id-twice")
    faults = None if faults is None else list(faults)
    session = healthy_session(model, engine, threads)
    by_figures = _rank_figures(session, [case for case in cases if case.response is not None], faults, progress)
    cases = [case for case in cases if case.response is None]
    if not cases:
        return by_figures
    bench = FaultBench(session, [case.question for case in cases])

    def show(chosen: tuple[str, ...], found: dict[str, Suspect]) -> None:
        if progress is not None:
            progress("+".join(chosen), sum(suspect.seconds for suspect in found.values()))

    return by_figures | search(
        bench, faults, depth=depth, width=width, journal=journal, jobs=jobs, scheduler=scheduler, progress=show
    )  # fmt: skip


def _rank_figures(
    session: Session, cases: Sequence[Case], faults: Iterable[str] | None, progress: Callable[[str, float], None] | None
) -> dict[str, Forensics]:
    """Rankings of the cases that have a server's log-probabilities."""
    found, chosen = {}, list(run_faults() if faults is None else faults)
    for case in cases:
        started = time.process_time()
        try:
            figures = Figures.of_json(case.response, session, LONGEST)
        except AprlabError as error:
            raise type(error)(f"case {case.id}: {error.message}", code=error.code) from None
        healthy, tried = figures_suspects(session, figures, case.prompt, case.template, case.system, chosen, progress)
        spent, used = time.process_time() - started, session.engine
        found[case.id] = Forensics(
            figures.text, list(figures.tokens), case.prompt, healthy, ranked(tried), spent, used.spec, used.asked or used.spec
        )
    return found


# ── how a ranking meets what is known ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the true cause came in a ranking.

    Attributes:
        rank: of the best of the causes: 1 and how many sets score better, a level one counting half (rounded down); 0 where
            none of the causes could run, or none is known. Sets whose logits are no numbers are one explanation: which of them
            lost the numbers, a flood cannot say.
        level: how many other sets have the same score.
        first: the set that came first, and its score.
        score: of the best cause.
    """

    rank: int
    level: int
    first: str
    first_score: float
    score: float


def standing(found: Forensics, cause: Sequence[str]) -> Standing:
    """Rank of the best set that consists of nothing but true causes."""
    scored = [(s.match.score, s.faults) for s in found.suspects if s.match is not None]
    first = scored[0] if scored else (0.0, ())
    true = [score for score, faults in scored if set(faults) <= set(cause)]
    if not true:
        return Standing(0, 0, " + ".join(first[1]), first[0], 0.0)
    best = max(true)
    floods = {s.faults for s in found.suspects if s.flood is not None}
    drowned = any(s.faults in floods and set(s.faults) <= set(cause) and s.match.score == best for s in found.suspects if s.match)
    rivals = sum(
        score == best and not set(faults) <= set(cause) and not (drowned and faults in floods) for score, faults in scored
    )
    better = sum(score > best for score, _ in scored)
    level = sum(score == best and not set(faults) <= set(cause) for score, faults in scored)
    return Standing(better + 1 + rivals // 2, level, " + ".join(first[1]), first[0], best)
