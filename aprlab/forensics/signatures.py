"""Every fault has its own signature: what a model says under each of them, and how well a fault is recognised by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, UsageError
from aprlab.faults import run_faults, session_with
from aprlab.forensics.answer_runs import HealthyRun, collect_after, healthy_session
from aprlab.forensics.answer_scoring import AnswerScorer, Suspect
from aprlab.inference.session import Session
from aprlab.model.model import Model

PROMPTS = ("What is 2+2?", "What is 3+4?", "What is the capital of France?")


@dataclass(frozen=True, slots=True)
class Recognition:
    """How often a fault was recognised by an answer to another prompt.

    Attributes:
        first, third: times that it came first, or among the first three.
        counted: how often it was tried.
        instead: the fault that came first most often in its place; '' where none did.
    """

    first: int
    third: int
    counted: int
    instead: str = ""


@dataclass
class Signatures:
    """What a model says to several prompts under each fault, and how well a signature is recognised.

    Attributes:
        prompts: what was asked.
        healthy: the healthy answers, in the order of the prompts.
        said: fault id -> answers, in the order of the prompts.
        why_not: fault id -> why it could not run.
        moved: fault id -> bits by which the distribution of a next token moved at most (see `Suspect.moved`).
        known: fault id -> how well it is recognised, by another answer to another prompt; faults that a text cannot
            show are not among them.
        followed: whether the likelihood of the text itself took part in that.
        alone: the shares that came first and among the first three by their answers alone.
    """

    prompts: list[str]
    healthy: list[str]
    said: dict[str, list[str]]
    why_not: dict[str, str]
    moved: dict[str, float]
    known: dict[str, Recognition] = field(default_factory=dict)
    followed: bool = False
    alone: tuple[float, float] = (0.0, 0.0)

    @property
    def silent(self) -> list[str]:
        """Faults under which every answer is the healthy one: a text gate is blind to them."""
        return [id for id, texts in self.said.items() if texts == self.healthy]

    @property
    def counted(self) -> int:
        """How many times a fault was looked for by another answer of its own."""
        return sum(known.counted for known in self.known.values())

    @property
    def top1(self) -> float:
        """The share of those where it came first."""
        return _rates(self.known)[0]

    @property
    def top3(self) -> float:
        """The share of those where it came among the first three."""
        return _rates(self.known)[1]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("prompts", "healthy", "said", "why_not", "silent", "top1", "top3", "counted", "followed")
        known = {id: [k.first, k.third, k.counted, k.instead] for id, k in self.known.items()}
        moved = {id: bits if math.isfinite(bits) else None for id, bits in self.moved.items()}
        return {name: getattr(self, name) for name in names} | {"alone": list(self.alone), "moved": moved, "known": known}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signatures:
        """What `to_json` gave."""
        names = ("prompts", "healthy", "said", "why_not", "followed")
        moved = {id: math.inf if bits is None else bits for id, bits in data["moved"].items()}
        known = {id: Recognition(*k) for id, k in data["known"].items()}
        return cls(**{name: data[name] for name in names}, moved=moved, known=known, alone=tuple(data["alone"]))


def _rates(known: dict[str, Recognition]) -> tuple[float, float]:
    counted = max(sum(k.counted for k in known.values()), 1)
    return sum(k.first for k in known.values()) / counted, sum(k.third for k in known.values()) / counted


def fault_signatures(
    model: Model | str | Path | Session,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_tokens: int = 12,
    faults: Iterable[str] | None = None,
    follow: bool = False,
    engine: str | None = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Signatures:
    """Run every fault on every prompt and measure how specific the signatures are.

    Args:
        model: a healthy model.
        prompts: at least two.
        max_tokens: length of each answer.
        faults: ids; all that a run can have without it.
        follow: rank as `forensics` does, by the likelihood of the text, too. That is a pass for each pair of faults and
            prompts: affordable for a tiny model; without it answers alone are compared.
        engine, threads: which engine runs; see `aprlab.engines.create`.
        progress: called with each fault's id.
    """
    if len(prompts) < 2:
        raise UsageError(
            "at least two prompts are needed: a signature is recognised by another answer", code="forensics.too-few-prompts"
        )
    session = healthy_session(model, engine, threads)
    runs = [HealthyRun.of(session, prompt, max_tokens) for prompt in prompts]
    texts = [run.healthy.text for run in runs]
    answers: dict[str, list[Suspect]] = {}
    why_not: dict[str, str] = {}
    for id in run_faults() if faults is None else faults:
        if progress is not None:
            progress(id)
        try:
            broken = session_with(session, [id])
            answers[id] = [run.answer_of(broken, (id,)) for run in runs]
            broken.engine.close()
        except AprlabError as error:
            why_not[id] = error.message
        collect_after(session.model)

    audible = {id: given for id, given in answers.items() if [a.text for a in given] != texts}
    scorers = {
        (id, n): AnswerScorer(answer.text, runs[n].surprise(), session.tokenizer)
        for id, given in audible.items()
        for n, answer in enumerate(given)
        if answer.text != texts[n]
    }
    known = {id: _recognition(id, scorers, answers, {}) for id in audible}
    alone = _rates(known)
    if follow:
        gains = _gains(session, runs, list(answers), scorers)
        known = {id: _recognition(id, scorers, answers, gains) for id in audible}
    said = {id: [a.text for a in given] for id, given in answers.items()}
    moved = {id: round(max(a.moved for a in given), 6) for id, given in answers.items()}
    return Signatures(list(prompts), texts, said, why_not, moved, known, follow, alone)


Scorers = dict[tuple[str, int], AnswerScorer]  # fault, number of the prompt: for its answer
Gains = dict[tuple[str, int, str, int], float]  # candidate, its prompt, fault whose text it is, prompt of that


def _gains(session: Session, runs: list[HealthyRun], candidates: list[str], scorers: Scorers) -> Gains:
    """By how many bits a token each candidate makes each text likelier, as an answer to each other prompt."""
    gains: Gains = {}
    texts = {key: scorer.saw for key, scorer in scorers.items()}
    sound = {(n, *key): run.cost(session, saw).mean for n, run in enumerate(runs) for key, saw in texts.items()}
    for candidate in candidates:
        broken = session_with(session, [candidate])
        for prompt, run in enumerate(runs):
            for (id, n), scorer in scorers.items():
                if n != prompt:
                    gains[candidate, prompt, id, n] = sound[prompt, id, n] - run.cost(broken, scorer.saw).mean
        broken.engine.close()
        collect_after(session.model)
    return gains


def _recognition(
    id: str, scorers: Scorers, answers: dict[str, list[Suspect]], gains: Gains
) -> Recognition:  # fmt: skip
    """Ties count half, rounded down."""
    first = third = counted = 0
    instead: Counter[str] = Counter()
    for (whose, n), scorer in scorers.items():
        for prompt in range(len(answers[id])) if whose == id else ():
            if prompt == n:
                continue
            scores = {
                other: scorer.judge(given[prompt], gains.get((other, prompt, id, n))).score for other, given in answers.items()
            }
            better = [other for other, score in scores.items() if score > scores[id]]
            rank = len(better) + sum(score == scores[id] for other, score in scores.items() if other != id) // 2
            first, third, counted = first + (rank < 1), third + (rank < 3), counted + 1
            if rank:
                instead[max(scores, key=lambda other: (scores[other], other != id))] += 1
    return Recognition(first, third, counted, instead.most_common(1)[0][0] if instead else "")
