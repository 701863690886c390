"""From a garbage sentence to the bug: which fault makes a healthy model say what somebody saw?

Every fault that a run can have is switched on in turn over one healthy model, alone or in growing sets, and its answer
is held against the text from the bug report. Agreement is counted in information: a token that both texts share weighs
as many bits as the healthy model is surprised by it, so that a shared ` helf` tells much and a shared full stop nothing.
To that comes how many bits likelier the fault makes the text itself.
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

from aprlab.engines.base import Array, Engine
from aprlab.engines.wrapped import Wrapped
from aprlab.errors import AprlabError, UsageError
from aprlab.faults import FAULTS, run_faults, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model
from aprlab.tracing.comparisons import log_softmax
from aprlab.tracing.golden_rule import is_small

FLOOR = 2.0**-20  # no token is taken to be rarer than this: the healthy model's tail is noise
TELLING = 8.0  # bits of surprise from which on a token tells something
FITS = 0.35  # a score below explains nothing; texts that no fault says reach 0.19 on the embedded model
# Parts of the score and what they weigh; those of the answer, then that of the text itself under the fault.
WEIGHTS = {"tokens": 0.315, "pairs": 0.175, "prefix": 0.105, "rhythm": 0.105, "gain": 0.3}
GAIN = 8.0  # bits a token that count as a full explanation
DEAREST = 14.0  # bits that a token costs at most: less likely is as good as impossible, whichever fault it is


@dataclass(frozen=True, slots=True)
class Match:
    """How well one output explains the text.

    Attributes:
        score: 0 to 1; 1 means the same tokens in the same order.
        tokens: share of the text's information that the output's tokens hold, in any order.
        pairs: the same for neighbouring tokens.
        prefix: share of the text's tokens that the output begins with.
        rhythm: likeness of the repetition: how often the token of one, two, … four steps before comes again.
        gain: by how many bits a token the fault makes the text likelier than the healthy model does; None where that was
            not measured, and then the other parts make the whole score.
        shared: tokens that both have and that surprise the healthy model by 8 bits or more, as text.
    """

    score: float
    tokens: float
    pairs: float
    prefix: float
    rhythm: float
    gain: float | None
    shared: tuple[str, ...]

    @property
    def why(self) -> str:
        """The score in words."""
        if self.prefix == 1:
            return "the same words, in the same order"
        parts = [f"shares {', '.join(map(repr, self.shared))}"] if self.shared else ["shares no rare token"]
        if self.prefix:
            parts.append(f"begins alike for {self.prefix:.0%}")
        parts += [f"order {self.pairs:.0%}", f"rhythm {self.rhythm:.0%}"]
        if self.gain is not None:
            parts.append(f"{abs(self.gain):.1f} bits a token {'likelier' if self.gain >= 0 else 'less likely'} than healthy")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Suspect:
    """One set of faults and what the model said under it.

    Attributes:
        faults: ids.
        text, tokens: the answer; empty where it could not run.
        match: how well it explains the text; None where it could not run.
        error: why it could not run.
        cut: why the answer was not heard to its end; '' where it was.
        moved: by how many bits the next token's distribution moved, at most, while the answer was still the healthy one
            (Kullback-Leibler divergence from the healthy distribution); what a gate on logits sees.
        seconds: processor time.
    """

    faults: tuple[str, ...]
    text: str
    tokens: tuple[int, ...]
    match: Match | None
    error: str | None = None
    cut: str = ""
    moved: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        row: dict[str, Any] = {
            "faults": list(self.faults), "text": self.text, "tokens": list(self.tokens), "error": self.error, "cut": self.cut,
            "moved": round(self.moved, 6) if np.isfinite(self.moved) else None,
        }  # fmt: skip
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
            (" + ".join(s.faults), f"{s.match.score:.2f}", repr(s.text) + ("…" if s.cut else ""), s.match.why)
            for s in self.suspects[:limit]
            if s.match is not None
        ]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("faults", "score", "output", "why"))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<p>{html.escape(self.conclusion)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Ear:
    """Judges outputs against one text. `surprise` is the healthy model's, in bits, by token id: float64 ``(vocab,)``.

    Attributes:
        saw: ids of the text; the end of an answer where it is empty.
        telling: those that surprise the healthy model most.
    """

    def __init__(self, saw: str | Sequence[int], surprise: np.ndarray, tokenizer: Qwen2Tokenizer) -> None:
        self.text = saw if isinstance(saw, str) else None
        ids = tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
        # A model that ended at once said one thing, and it is a voice like others: the end.
        self.end = [] if ids else [min(tokenizer.eog)]
        self.saw, self.surprise, self.tokenizer = ids or self.end, surprise, tokenizer
        self.telling = sorted({t for t in self.saw if surprise[t] >= max(TELLING, 0.9 * surprise[self.saw].max())})

    def judge(self, answer: Suspect, gain: float | None = None) -> Match:
        """How well an answer explains the text; `gain` as in `Match`.

        A pasted text is tokenised as text, which need not give the ids that a model chose one by one; so the answer's
        text goes the same way, and the better of both counts. Reports drop line ends, and blanks around an answer: where
        the pasted text has none, the answer is read without them, too.
        """
        best = self._judge(list(answer.tokens) or self.end, gain)
        if self.text is None or not self.text:
            return best
        shown = answer.text if "\n" in self.text else "".join(answer.text.splitlines()).strip()
        for text in dict.fromkeys((answer.text, shown)):
            if text.startswith(self.text):
                return replace(best, score=1.0, prefix=1.0)
            again = self._judge(self.tokenizer.encode(text, parse_special=False), gain)
            best = max(best, again, key=lambda match: match.score)
        return best

    def _judge(self, said: list[int], gain: float | None) -> Match:
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
        weighed = parts if gain is None else {**parts, "gain": min(1.0, max(0.0, gain / GAIN))}
        total = sum(WEIGHTS[name] for name in weighed)
        rare = sorted((t for t in shared if self.surprise[t] >= TELLING), key=lambda t: -self.surprise[t])
        score = 1.0 if prefix == len(self.saw) else sum(WEIGHTS[name] * value for name, value in weighed.items()) / total
        return Match(float(score), **parts, gain=gain, shared=tuple(self.tokenizer.decode([t]) for t in rare[:5]))

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


# ── one run ───────────────────────────────────────────────────────────────────────────────────────────────────────

HEARD = 4  # tokens of an answer before it may be left
NEAR = 1000  # the likeliest of so many tokens is near; the 1.5B's 151,936 have 151 such
ROUNDING = 2e-5  # of the largest logit: what the same pass differs by where it was cut into other pieces
_HEADS = ("output.weight", "token_embd.weight")  # both are multiplied for logits only


def divergence(healthy: np.ndarray, other: np.ndarray) -> float:
    """Bits by which the distribution of `other` misses that of `healthy`: logits ``(vocab,)`` both, not all finite ones Inf."""
    with np.errstate(all="ignore"):
        p, q = log_softmax(healthy), log_softmax(other)
        found = float((np.exp(p) * (p - q)).sum() / np.log(2))
    return max(0.0, found) if np.isfinite(found) else float("inf")


class _Enough(Exception):
    """The rest of an answer would tell nothing new."""


class _Overheard(Wrapped):
    """An engine whose logits somebody sees on their way: float32 ``(vocab,)`` of each pass's last position."""

    def __init__(self, inner: Engine, see: Callable[[np.ndarray], None]) -> None:
        super().__init__(inner)
        self._see = see

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y = self.inner.matmul(x, weight, bias)
        if weight in _HEADS:
            self._see(self.to_numpy(y)[-1])
        return y


class _Listener:
    """Follows an answer token by token, and leaves when it has heard enough. `cut` then says why.

    There are two reasons to leave. The answer is the healthy one: the prompt and the first step gave the healthy logits
    but for rounding, and so will every later step. Or it leads elsewhere: its first `HEARD` tokens, spelled out, hold none
    of the text's telling tokens, and none of those has been near so far, among the `NEAR`-th part that is likeliest.
    """

    def __init__(self, telling: Sequence[int], bench: Bench, tokenizer: Qwen2Tokenizer) -> None:
        self.telling, self.bench, self.tokenizer = np.array(telling, np.int64), bench, tokenizer
        self.tokens: list[int] = []
        self.passes = self.alike = 0
        self.best: int | None = None  # the best rank of any telling token so far, 0 the likeliest of all
        self.near = 1
        self.moved = 0.0
        self.silent = False
        self.cut = ""

    def see(self, logits: np.ndarray) -> None:
        """Called with the logits of each pass."""
        if self.passes < len(self.bench.logits) and self.tokens == list(self.bench.healthy.tokens[: self.passes]):
            healthy = self.bench.logits[self.passes]
            self.alike += bool(np.abs(logits - healthy).max() <= ROUNDING * np.abs(healthy).max())
            self.moved = max(self.moved, divergence(healthy, logits))
        self.passes += 1
        if self.telling.size:
            rank = int((logits > logits[self.telling].max()).sum())
            self.best = rank if self.best is None else min(self.best, rank)
            self.near = max(1, logits.size // NEAR)

    def heard(self, token: int, piece: str) -> None:
        """Called with each token."""
        self.tokens.append(token)
        if self.passes == self.alike == 2 and self.tokenizer is self.bench.session.tokenizer:
            self.silent, self.cut = True, "the healthy logits in two passes, but for rounding"
            raise _Enough
        far = self.best is not None and self.best >= self.near and len(self.tokens) >= HEARD
        spelled = self.bench.session.tokenizer.encode(self.tokenizer.decode(self.tokens), parse_special=False)
        if far and not set(self.telling) & set(spelled):
            self.cut = f"no telling token was nearer than rank {self.best}"
            raise _Enough


@dataclass(frozen=True)
class Bench:
    """What all runs share: the healthy session, what was asked, the healthy answer and its logits."""

    session: Session
    prompt: str
    length: int
    options: dict[str, Any]
    healthy: Suspect
    logits: np.ndarray

    @classmethod
    def of(cls, session: Session, prompt: str, length: int, **options: Any) -> Bench:
        answer = session.generate(prompt, max_tokens=length, keep_logits=True, **options)
        assert answer.logits is not None
        return cls(session, prompt, length, options, Suspect((), answer.text, tuple(answer.tokens), None), answer.logits)

    def surprise(self) -> np.ndarray:
        """Every token's surprise in bits under the healthy model, at most that of `FLOOR`: float64 ``(vocab,)``."""
        x = self.logits.astype(np.float64)
        p = np.exp(x - x.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True)).mean(0)  # over the steps
        return -np.log2(np.maximum(p, FLOOR))

    def cost(self, session: Session, text: Sequence[int]) -> float:
        """Bits a token that `text` costs as an answer, `DEAREST` at most for each."""
        x = session.follow(session.prompt_tokens(self.prompt, **self.options), text)
        with np.errstate(all="ignore"):
            bits = -log_softmax(x)[np.arange(len(text)), list(text)] / np.log(2)
        return float(np.minimum(np.where(np.isfinite(bits), bits, DEAREST), DEAREST).mean())

    def hear(self, broken: Session, faults: tuple[str, ...], telling: Sequence[int] = ()) -> Suspect:
        """What `broken` answers; without `telling` tokens only silence cuts it short."""
        listener = _Listener(telling, self, broken.tokenizer)
        engine = broken.engine
        broken.engine = _Overheard(engine, listener.see)
        started = time.process_time()
        try:
            answer = broken.generate(self.prompt, max_tokens=self.length, on_token=listener.heard, **self.options)
            text, tokens = answer.text, tuple(answer.tokens)
        except _Enough:
            tokens = self.healthy.tokens if listener.silent else tuple(listener.tokens)
            text = broken.tokenizer.decode(tokens)
        finally:
            broken.engine = engine
        return Suspect(faults, text, tokens, None, None, listener.cut, listener.moved, time.process_time() - started)


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
    engine: str = "reference",
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
        engine, threads: which engine runs.
        progress: called after each set.

    Raises:
        UsageError: a fault is unknown, the prompt cannot be used.
    """
    started = time.process_time()
    session = healthy_session(model, engine, threads)
    tokens = session.tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
    length = len(tokens) * 5 // 4 + 4  # a model may spell in more tokens what the tokenizer says in fewer
    bench = Bench.of(session, prompt, length, raw=raw, system=system)
    ear = Ear(saw, bench.surprise(), session.tokenizer)
    first = replace(bench.healthy, match=ear.judge(bench.healthy))
    cost = bench.cost(session, ear.saw)
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
            suspect = _try(bench, chosen, ear, cost)
            tried[frozenset(chosen)] = suspect
            if progress is not None:
                progress(suspect)
        beam = [s.faults for s in _ranked(tried.values()) if s.match is not None][:width]
    text = saw if isinstance(saw, str) else session.tokenizer.decode(tokens)
    return Forensics(text, tokens, prompt, first, _ranked(tried.values()), time.process_time() - started)


def healthy_session(model: Model | str | Path | Session, engine: str, threads: int | None) -> Session:
    """A session as given, or over a model as given."""
    if isinstance(model, Session):
        return model
    return Session(model if isinstance(model, Model) else open_model(model), engine=engine, threads=threads)


def _grown(beam: list[tuple[str, ...]], units: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Every set of the beam with one more unit; ids stay in catalogue order, so that a set has one spelling."""
    order = {id: n for n, id in enumerate(FAULTS)}
    for chosen in beam:
        for unit in units:
            if not set(unit) & set(chosen):
                yield tuple(sorted((*chosen, *unit), key=order.__getitem__))


def _try(bench: Bench, faults: tuple[str, ...], ear: Ear, cost: float) -> Suspect:
    """One run; `cost` is the healthy model's of the text.

    A set that cannot run says why; that is an answer, too (the reader refuses, NaN, no template).
    """
    started = time.process_time()
    broken = None
    try:
        broken = session_with(bench.session, faults)
        said = bench.hear(broken, faults, ear.telling)
        match = ear.judge(said, cost - bench.cost(broken, ear.saw))
        return replace(said, match=match, seconds=time.process_time() - started)
    except AprlabError as error:
        return Suspect(faults, "", (), None, error.message, seconds=time.process_time() - started)
    finally:
        if broken is not None:
            broken.engine.close()
            del broken
            sweep_up(bench.session.model)


def sweep_up(model: Model) -> None:
    """After a broken engine: it may hold gigabytes in cycles. A small one's few wait for the collector's own time, since a
    full collection looks at everything that the program holds."""
    if not is_small(model):
        gc.collect()


def _ranked(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Best first; equal scores: fewer faults first; then what could not run."""
    return sorted(suspects, key=lambda s: (s.match is None, -(s.match.score if s.match else 0), len(s.faults)))
