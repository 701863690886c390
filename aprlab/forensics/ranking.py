"""From a garbage sentence to the bug: which fault makes a healthy model say it?

Every fault that a run can have is switched on in turn over one healthy model, alone or in growing sets, and its answer is
compared with the text from the bug report.
"""

from __future__ import annotations

import html
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, UsageError
from aprlab.faults import FAULTS, run_faults, session_with
from aprlab.forensics.answer_runs import HealthyRun, collect_after, healthy_session
from aprlab.forensics.answer_scoring import AnswerScorer, Suspect
from aprlab.inference.session import Session
from aprlab.model.model import Model

# What samplers make of logits that are not numbers: id -> how. The last id of the vocabulary comes on top.
FLOODS = {0: "an argmax by '>'", 38: "top-p within top-k 40", 39: "top-k 40", 49: "top-k 50"}
LAST_ID = "an argmax for which NaN equals everything"
FITS = 0.35  # a score below explains nothing; texts that no fault says reach 0.19 on the embedded model


@dataclass
class Forensics:
    """The ranking. `suspects` come best first; those that could not run come last, with their reason.

    `engine` ran them all, where `engine_asked` was asked for.
    """

    saw: str
    saw_tokens: list[int]
    prompt: str
    healthy: Suspect
    suspects: list[Suspect] = field(repr=False)
    seconds: float = 0.0
    engine: str = ""
    engine_asked: str = ""

    @property
    def best(self) -> Suspect | None:
        """The best explanation, or None where nothing fits."""
        first = self.suspects[0] if self.suspects else None
        return first if first is not None and first.match is not None and first.match.score >= FITS else None

    @property
    def margin(self) -> float:
        """How far the best set is above the best one that shares no fault with it."""
        if not self.suspects or self.suspects[0].match is None:
            return 0.0
        first = self.suspects[0]
        rivals = (s.match.score for s in self.suspects[1:] if s.match is not None and not set(s.faults) & set(first.faults))
        assert first.match is not None
        return first.match.score - max(rivals, default=0.0)

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if self.healthy.match is not None and self.healthy.match.prefix == 1:
            return "that is what the healthy model says"
        if self.best is None:
            return "nothing fits"
        assert self.best.match is not None
        return f"{' + '.join(self.best.faults)} fits best ({self.best.match.score:.2f}, {self.margin:.2f} above the next other)"

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json` and reports."""
        return {
            "saw": self.saw, "saw_tokens": self.saw_tokens, "prompt": self.prompt, "conclusion": self.conclusion,
            "engine": self.engine, "engine_asked": self.engine_asked,
            "healthy": self.healthy.to_json(), "suspects": [s.to_json() for s in self.suspects], "seconds": self.seconds,
        }  # fmt: skip

    def rows(self, limit: int = 12) -> list[tuple[str, str, str, str]]:
        """The best as (faults, score, output, why), all text."""
        return [
            (" + ".join(s.faults), f"{s.match.score:.2f}", repr(s.text) + ("…" if s.cut else ""), s.match.why)
            for s in self.suspects[:limit]
            if s.match is not None
        ]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("faults", "score", "output", "why"))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<p>{html.escape(self.conclusion)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


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
    progress: Callable[[Suspect], None] | None = None,
) -> Forensics:
    """Rank faults by how well they explain a text.

    Args:
        model: a healthy model, opened or as a path, or a session over one.
        saw: the garbage, as text or as token ids; empty where the model said nothing at all.
        prompt, raw, system: what was asked, as for `generate`.
        depth: 1 tries single faults, 2 also pairs, and so on: each round adds a fault to the `width` best sets so far.
        width: see `depth`.
        faults: ids to try, or sets of them to be tried together, ``rope-norm+split-specials``; without it all that a run
            can have, one by one.
        engine, threads: which engine runs; see `aprlab.engines.create`.
        progress: called after each set.

    Raises:
        UsageError: a fault is unknown, the prompt cannot be used.
    """
    started = time.process_time()
    session = healthy_session(model, engine, threads)
    tokens = session.tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
    length = len(tokens) * 5 // 4 + 4  # a model may spell in more tokens what the tokenizer says in fewer
    healthy_run = HealthyRun.of(session, prompt, length, raw=raw, system=system)
    scorer = AnswerScorer(saw, healthy_run.surprise(), session.tokenizer)
    first = replace(healthy_run.healthy, match=scorer.judge(healthy_run.healthy))
    cost = healthy_run.cost(session, scorer.saw)
    units = [tuple(unit.split("+")) for unit in (run_faults() if faults is None else faults)]
    for id in itertools.chain.from_iterable(units):
        if id not in FAULTS:
            raise UsageError(f"unknown fault {id!r} (`aprlab faults` lists them)", code="faults.unknown")

    tried: dict[frozenset[str], Suspect] = {}
    beam: list[tuple[str, ...]] = [()]
    for _ in range(depth):
        for chosen in _grown(beam, units):
            if frozenset(chosen) in tried:
                continue
            suspect = _try(healthy_run, chosen, scorer, cost)
            tried[frozenset(chosen)] = suspect
            if progress is not None:
                progress(suspect)
        beam = [s.faults for s in ranked(tried.values()) if s.match is not None][:width]
    text = saw if isinstance(saw, str) else session.tokenizer.decode(tokens)
    spent, used = time.process_time() - started, session.engine
    return Forensics(
        text, tokens, prompt, first, ranked(tried.values()), spent, used.spec, engine_asked=used.asked or used.spec
    )


def _grown(beam: list[tuple[str, ...]], units: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Every set of the beam with one more unit; ids stay in catalogue order, so that a set has one spelling."""
    order = {id: n for n, id in enumerate(FAULTS)}
    for chosen in beam:
        for unit in units:
            if not set(unit) & set(chosen):
                yield tuple(sorted((*chosen, *unit), key=order.__getitem__))


def _try(healthy_run: HealthyRun, faults: tuple[str, ...], scorer: AnswerScorer, cost: float) -> Suspect:
    """One run; `cost` is the healthy model's of the text.

    A set that cannot run says why; that is an answer, too (the reader refuses, NaN, no template).
    """
    started = time.process_time()
    broken = None
    try:
        broken = session_with(healthy_run.session, faults)
        said = healthy_run.answer_of(broken, faults, scorer.telling)
        match = scorer.judge(said, cost - healthy_run.cost(broken, scorer.saw))
        return replace(said, match=match, seconds=time.process_time() - started)
    except AprlabError as error:
        return replace(not_numbers(healthy_run, faults, scorer, error), seconds=time.process_time() - started)
    finally:
        if broken is not None:
            broken.engine.close()
            del broken
            collect_after(healthy_run.session.model)


def not_numbers(healthy_run: HealthyRun, faults: tuple[str, ...], scorer: AnswerScorer, error: AprlabError) -> Suspect:
    """A set that could not run. Where its logits are no numbers, programs went on and said one token forever: the flood that fits
    the text best, if one of them is the text's; an answer of healthy tokens is never taken for one."""
    if error.code != "session.logits-not-finite":
        return Suspect(faults, "", (), None, error.message)
    floods = FLOODS | {healthy_run.session.config.vocab_size - 1: LAST_ID}
    for id, how in floods.items():
        if set(scorer.saw) == {id} or (scorer.text and _is_flood(healthy_run, id, scorer.text)):
            tokens = (id,) * len(scorer.saw)
            said = Suspect(faults, scorer.text or healthy_run.session.tokenizer.decode(tokens), tokens, None)
            return replace(said, match=scorer.judge(said), cut=f"its logits are no numbers; this is what {how} makes of them")
    return Suspect(faults, "", (), None, error.message)


def _is_flood(healthy_run: HealthyRun, id: int, text: str) -> bool:
    """Whether a text is one token over and over, which the tokenizer may have cut in longer pieces."""
    piece = healthy_run.session.tokenizer.decode([id])
    return bool(piece) and len(text) > len(piece) and text == piece * (len(text) // len(piece))


def ranked(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Best first; equal scores: fewer faults first; then what could not run."""
    return sorted(suspects, key=lambda s: (s.match is None, -(s.match.score if s.match else 0), len(s.faults)))
