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
from dataclasses import dataclass, field
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

    def __init__(self, saw: Sequence[int], surprise: np.ndarray, tokenizer: Qwen2Tokenizer) -> None:
        if not saw:
            raise UsageError("the text that was seen is empty")
        self.saw, self.surprise, self.tokenizer = list(saw), surprise, tokenizer

    def judge(self, tokens: Sequence[int]) -> Match:
        """How well `tokens` explain the text."""
        said = list(tokens)
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
        saw: the garbage, as text or as token ids.
        prompt, raw, system: what was asked, as for `generate`.
        depth: 1 tries single faults, 2 also pairs, and so on: each round adds a fault to the `width` best sets so far.
        width: see `depth`.
        faults: ids to try; all that a run can have without it.
        engine, threads: which engine runs.
        progress: called after each set.

    Raises:
        UsageError: the text is empty, a fault is unknown, the prompt cannot be used.
    """
    started = time.perf_counter()
    opened = model if isinstance(model, Model) else Model.open(model)
    healthy = Session(opened, engine=engine, threads=threads)
    tokens = healthy.tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
    options: dict[str, Any] = {"raw": raw, "system": system}
    length = len(tokens) + 4
    first, surprise = surprise_of(healthy, prompt, length, **options)
    ear = Ear(tokens, surprise, healthy.tokenizer)
    first = Suspect((), first.text, first.tokens, ear.judge(first.tokens))
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
        match = ear.judge(answer.tokens)
        return Suspect(faults, answer.text, tuple(answer.tokens), match, seconds=time.perf_counter() - started)
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
