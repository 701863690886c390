"""From a garbage sentence to the bug: which fault makes a healthy model say what somebody saw?

Every fault that a run can have is switched on in turn over one healthy model, alone or in growing sets, and its answer
is held against the text from the bug report. Agreement is counted in information: a token that both texts share weighs
as many bits as the healthy model is surprised by it, so that a shared ` helf` tells much and a shared full stop nothing.
"""

from __future__ import annotations

import gc
import html
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, UsageError
from aprlab.model import Model
from aprlab.onion.faults import FAULTS, run_faults, session_with
from aprlab.qwen2.generate import Session
from aprlab.qwen2.tokenizer import Qwen2Tokenizer

FLOOR = 2.0**-20  # no token is taken to be rarer than this: the healthy model's tail is noise
FITS = 0.35  # a score below explains nothing; see `docs/voices.md` for what healthy and foreign texts reach
# Parts of the score and what they weigh. Order counts most: shared words alone do not make a voice.
WEIGHTS = {"tokens": 0.45, "pairs": 0.25, "prefix": 0.15, "rhythm": 0.15}


@dataclass(frozen=True, slots=True)
class Match:
    """How well one output explains the text.

    Attributes:
        score: 0 to 1; 1 means the same tokens in the same order.
        tokens: share of the text's information that the output's tokens hold, in any order.
        pairs: the same for neighbouring tokens.
        prefix: share of the text's tokens that the output begins with.
        rhythm: likeness of the repetition: how often the token of one, two, … four steps before comes again.
        shared: tokens that both have and that surprise the healthy model by 8 bits or more, as text.
    """

    score: float
    tokens: float
    pairs: float
    prefix: float
    rhythm: float
    shared: tuple[str, ...]

    @property
    def why(self) -> str:
        """The score in words."""
        if self.prefix == 1:
            return "the same tokens, in the same order"
        parts = [f"shares {', '.join(map(repr, self.shared))}"] if self.shared else ["shares no rare token"]
        if self.prefix:
            parts.append(f"begins alike for {self.prefix:.0%}")
        return "; ".join([*parts, f"order {self.pairs:.0%}", f"rhythm {self.rhythm:.0%}"])


@dataclass(frozen=True, slots=True)
class Suspect:
    """One set of faults and what the model said under it; `error` instead where it could not run."""

    faults: tuple[str, ...]
    text: str
    tokens: tuple[int, ...]
    match: Match | None
    error: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        row: dict[str, Any] = {"faults": list(self.faults), "text": self.text, "tokens": list(self.tokens), "error": self.error}
        if self.match is not None:
            row |= {"score": self.match.score, "why": self.match.why, "shared": list(self.match.shared)}
        return row | {"seconds": round(self.seconds, 3)}


@dataclass
class Forensics:
    """The ranking. `suspects` come best first; those that could not run come last, with their reason."""

    saw: str
    saw_tokens: list[int]
    prompt: str
    healthy: Suspect
    suspects: list[Suspect] = field(repr=False)
    seconds: float = 0.0

    @property
    def best(self) -> Suspect | None:
        """The best explanation, or None where nothing fits."""
        first = self.suspects[0] if self.suspects else None
        return first if first is not None and first.match is not None and first.match.score >= FITS else None

    @property
    def margin(self) -> float:
        """How far the best set stands above the best one that shares no fault with it."""
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
            "healthy": self.healthy.to_json(), "suspects": [s.to_json() for s in self.suspects], "seconds": self.seconds,
        }  # fmt: skip

    def rows(self, limit: int = 12) -> list[tuple[str, str, str, str]]:
        """The best as (faults, score, output, why), all text."""
        return [
            (" + ".join(s.faults), f"{s.match.score:.2f}", repr(s.text), s.match.why)
            for s in self.suspects[:limit]
            if s.match is not None
        ]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("faults", "score", "output", "why"))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<p>{html.escape(self.conclusion)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Ear:
    """Judges outputs against one text. `surprise` is the healthy model's, in bits, by token id: float64 ``(vocab,)``."""

    def __init__(self, saw: str | Sequence[int], surprise: np.ndarray, tokenizer: Qwen2Tokenizer) -> None:
        self.text = saw if isinstance(saw, str) else None
        ids = tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
        # A model that ended at once said one thing, and it is a voice like others: the end.
        self.end = [] if ids else [min(tokenizer.eog)]
        self.saw, self.surprise, self.tokenizer = ids or self.end, surprise, tokenizer

    def judge(self, answer: Suspect) -> Match:
        """How well an answer explains the text.

        A pasted text is tokenised as text, which need not give the ids that a model chose one by one; so the answer's
        text goes the same way, and the better of both counts.
        """
        best = self._judge(list(answer.tokens) or self.end)
        if self.text is None or not self.text:
            return best
        if answer.text.startswith(self.text):
            return replace(best, score=1.0, prefix=1.0)
        again = self._judge(self.tokenizer.encode(answer.text, parse_special=False))
        return max(best, again, key=lambda match: match.score)

    def _judge(self, said: list[int]) -> Match:
        shared = Counter(self.saw) & Counter(said)
        total = sum(self.surprise[t] for t in self.saw)
        found = float(sum(self.surprise[t] * n for t, n in shared.items()) / total)
        prefix = next((n for n, (a, b) in enumerate(zip(self.saw, said, strict=False)) if a != b), min(len(self.saw), len(said)))
        parts = {
            "tokens": found,
            "pairs": self._pairs(said) if len(self.saw) > 1 else found,
            "prefix": prefix / len(self.saw),
            "rhythm": _likeness(rhythm(self.saw), rhythm(said)) * min(1.0, 2 * found),  # an empty rhythm fits everything
        }
        rare = sorted((t for t in shared if self.surprise[t] >= 8), key=lambda t: -self.surprise[t])
        score = 1.0 if prefix == len(self.saw) else sum(WEIGHTS[name] * value for name, value in parts.items())
        return Match(float(score), **parts, shared=tuple(self.tokenizer.decode([t]) for t in rare[:5]))

    def _pairs(self, said: list[int]) -> float:
        def pairs(tokens: list[int]) -> Counter[tuple[int, int]]:
            return Counter(itertools.pairwise(tokens))

        def weight(pair: tuple[int, int]) -> float:
            return float(self.surprise[pair[0]] + self.surprise[pair[1]])

        mine = pairs(self.saw)
        return sum(weight(p) * n for p, n in (mine & pairs(said)).items()) / sum(weight(p) * n for p, n in mine.items())


def rhythm(tokens: Sequence[int], reach: int = 4) -> list[float]:
    """How often a token is the one of 1, 2, … `reach` steps before, each as a share; and the share of distinct tokens."""
    n = len(tokens)
    back = [sum(a == b for a, b in zip(tokens, tokens[d:], strict=False)) / max(n - d, 1) for d in range(1, reach + 1)]
    return [*back, len(set(tokens)) / max(n, 1)]


def _likeness(a: list[float], b: list[float]) -> float:
    return 1 - float(np.abs(np.array(a) - np.array(b)).mean())


def surprise_of(session: Session, prompt: str, max_tokens: int, **options: Any) -> tuple[Suspect, np.ndarray]:
    """The healthy answer, and every token's surprise in bits: the mean probability over its steps, from `FLOOR` up."""
    answer = session.generate(prompt, max_tokens=max_tokens, keep_logits=True, **options)
    assert answer.logits is not None
    x = answer.logits.astype(np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).mean(0)
    return Suspect((), answer.text, tuple(answer.tokens), None), -np.log2(np.maximum(p, FLOOR))


def forensics(
    model: Model | str | Path,
    saw: str | Sequence[int],
    *,
    prompt: str = "What is 2+2?",
    raw: bool = False,
    system: str | None = None,
    depth: int = 1,
    width: int = 4,
    faults: Iterable[str] | None = None,
    engine: str = "reference",
    threads: int | None = None,
    progress: Callable[[Suspect], None] | None = None,
) -> Forensics:
    """Rank faults by how well they explain a text.

    Args:
        model: a healthy model, opened or as a path.
        saw: the garbage, as text or as token ids; empty where the model said nothing at all.
        prompt, raw, system: what was asked, as for `generate`.
        depth: 1 tries single faults, 2 also pairs, and so on: each round adds a fault to the `width` best sets so far.
        width: see `depth`.
        faults: ids to try; all that a run can have without it.
        engine, threads: which engine runs.
        progress: called after each set.

    Raises:
        UsageError: a fault is unknown, the prompt cannot be used.
    """
    started = time.perf_counter()
    opened = model if isinstance(model, Model) else Model.open(model)
    healthy = Session(opened, engine=engine, threads=threads)
    tokens = healthy.tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
    options: dict[str, Any] = {"raw": raw, "system": system}
    length = len(tokens) * 5 // 4 + 4  # a model may spell in more tokens what the tokenizer says in fewer
    first, surprise = surprise_of(healthy, prompt, length, **options)
    ear = Ear(saw, surprise, healthy.tokenizer)
    first = replace(first, match=ear.judge(first))
    single = list(run_faults()) if faults is None else list(faults)
    for id in single:
        if id not in FAULTS:
            raise UsageError(f"unknown fault {id!r} (`aprlab faults` lists them)")

    tried: dict[frozenset[str], Suspect] = {}
    beam: list[tuple[str, ...]] = [()]
    for _ in range(depth):
        for chosen in _grown(beam, single):
            if frozenset(chosen) in tried:
                continue
            suspect = _try(opened, chosen, prompt, length, ear, engine, threads, options)
            tried[frozenset(chosen)] = suspect
            if progress is not None:
                progress(suspect)
        beam = [s.faults for s in _ranked(tried.values()) if s.match is not None][:width]
    text = saw if isinstance(saw, str) else healthy.tokenizer.decode(tokens)
    return Forensics(text, tokens, prompt, first, _ranked(tried.values()), time.perf_counter() - started)


def _grown(beam: list[tuple[str, ...]], single: list[str]) -> Iterator[tuple[str, ...]]:
    """Every set of the beam with one more fault; ids stay in catalogue order, so that a set has one spelling."""
    order = {id: n for n, id in enumerate(FAULTS)}
    for chosen in beam:
        for id in single:
            if id not in chosen:
                yield tuple(sorted((*chosen, id), key=order.__getitem__))


def _try(
    model: Model, faults: tuple[str, ...], prompt: str, length: int, ear: Ear, engine: str, threads: int | None, options: Any
) -> Suspect:
    """One run. A set that cannot run says why; that is an answer, too (the reader refuses, NaN, no template)."""
    started = time.perf_counter()
    session = None
    try:
        session = session_with(model, faults, engine, threads)
        answer = session.generate(prompt, max_tokens=length, **options)
        said = Suspect(faults, answer.text, tuple(answer.tokens), None)
        return replace(said, match=ear.judge(said), seconds=time.perf_counter() - started)
    except AprlabError as error:
        return Suspect(faults, "", (), None, error.message, time.perf_counter() - started)
    finally:
        if session is not None:
            session.engine.close()
            del session
            gc.collect()  # a broken model may hold gigabytes in cycles


def _ranked(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Best first; equal scores: fewer faults first; then what could not run."""
    return sorted(suspects, key=lambda s: (s.match is None, -(s.match.score if s.match else 0), len(s.faults)))


# ── voices ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Voices:
    """What a model says to several prompts under each fault, and how well a voice is known again.

    Attributes:
        prompts: what was asked.
        healthy: the healthy answers, in the order of the prompts.
        said: fault id -> answers (None where it could not run).
        why_not: fault id -> why it could not run.
        top1, top3: shares of (fault, prompt, other prompt) where the true fault comes first, or among the first three,
            when only the other prompt's answers of all faults are known.
        counted: how many such triples there were; faults that a text cannot show are not among them.
    """

    prompts: list[str]
    healthy: list[str]
    said: dict[str, list[str]]
    why_not: dict[str, str]
    top1: float
    top3: float
    counted: int

    @property
    def silent(self) -> list[str]:
        """Faults under which every answer is the healthy one: a text gate is blind to them."""
        return [id for id, texts in self.said.items() if texts == self.healthy]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("prompts", "healthy", "said", "why_not", "silent", "top1", "top3", "counted")
        return {name: getattr(self, name) for name in names}


def voices(
    model: Model | str | Path,
    prompts: Sequence[str] = ("What is 2+2?", "What is 3+4?", "What is the capital of France?"),
    *,
    max_tokens: int = 12,
    faults: Iterable[str] | None = None,
    engine: str = "reference",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Voices:
    """Run every fault on every prompt and measure how specific the voices are.

    Args:
        model: a healthy model.
        prompts: at least two.
        max_tokens: length of each answer.
        faults: ids; all that a run can have without it.
        engine, threads: which engine runs.
        progress: called with each fault's id.
    """
    if len(prompts) < 2:
        raise UsageError("at least two prompts are needed: a voice is known again by another answer")
    opened = model if isinstance(model, Model) else Model.open(model)
    session = Session(opened, engine=engine, threads=threads)
    healthy, surprises = [], []
    for prompt in prompts:
        suspect, surprise = surprise_of(session, prompt, max_tokens)
        healthy.append(suspect)
        surprises.append(surprise)
    answers: dict[str, list[Suspect]] = {}
    why_not: dict[str, str] = {}
    for id in run_faults() if faults is None else faults:
        if progress is not None:
            progress(id)
        try:
            broken = session_with(opened, [id], engine, threads)
            done = [broken.generate(prompt, max_tokens=max_tokens) for prompt in prompts]
            answers[id] = [Suspect((id,), g.text, tuple(g.tokens), None) for g in done]
            broken.engine.close()
        except AprlabError as error:
            why_not[id] = error.message
        gc.collect()
    said = {id: [a.text for a in given] for id, given in answers.items()}
    texts = [h.text for h in healthy]
    ranks = [
        rank
        for id, given in answers.items()
        for n, answer in enumerate(given)
        for other in range(len(prompts))
        if other != n and answer.text != texts[n] and said[id] != texts
        for rank in [_rank(Ear(answer.text, surprises[n], session.tokenizer), id, answers, other)]
    ]
    count = max(len(ranks), 1)
    top1, top3 = (sum(rank < limit for rank in ranks) / count for limit in (1, 3))
    return Voices(list(prompts), texts, said, why_not, top1, top3, len(ranks))


def _rank(ear: Ear, id: str, answers: dict[str, list[Suspect]], prompt: int) -> int:
    """How many faults explain the text better than `id`, by their answers to `prompt`; ties count half, rounded down."""
    scores = {other: ear.judge(given[prompt]).score for other, given in answers.items()}
    better = sum(score > scores[id] for score in scores.values())
    equal = sum(score == scores[id] for other, score in scores.items() if other != id)
    return better + equal // 2
