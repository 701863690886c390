"""Answers under faults, each compared with the healthy one token by token and cut off as soon as the rest would add nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.engines.base import Array, Engine
from aprlab.engines.choice import is_small
from aprlab.engines.delegating import DelegatingEngine
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.likelihood import DEAREST, TextCost
from aprlab.formats import open_model
from aprlab.inference.sampling import Sampling
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.tracing.comparisons import kl_divergence, log_softmax

FLOOR = 2.0**-20  # no token is taken to be rarer than this: the healthy model's tail is noise
LEAST_TOKENS = 4  # tokens of an answer before it may be left
NEAR = 1000  # the likeliest of so many tokens is near; the 1.5B's 151,936 have 151 such
ROUNDING = 2e-5  # of the largest logit: what the same pass differs by where it was cut into other pieces
_HEADS = ("output.weight", "token_embd.weight")  # both are multiplied for logits only


def divergence(healthy: np.ndarray, other: np.ndarray) -> float:
    """Bits by which the distribution of `other` misses that of `healthy`: logits ``(vocab,)`` both, not all finite ones Inf."""
    with np.errstate(all="ignore"):
        found = float(kl_divergence(log_softmax(healthy), log_softmax(other)) / np.log(2))
    return max(0.0, found) if np.isfinite(found) else float("inf")


FirstStep = Callable[[np.ndarray], str]  # is given the logits of the first step; why the answer is left there, or ''


class _Told(Sampling):
    """Chooses the tokens that it is told, whatever the logits say."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        object.__setattr__(self, "_left", iter(tokens))

    def choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        return next(self._left)  # type: ignore[attr-defined]


def decodes_otherwise(session: Session) -> bool:
    """Whether one token after another may give other values than all at once: another loop, cache or attention."""
    kinds = type(session).__mro__
    if kinds[: kinds.index(Session)]:  # a loop of its own
        return True
    engine: Engine = session.engine
    while isinstance(engine, DelegatingEngine):
        own = type(engine)
        if own.new_cache is not DelegatingEngine.new_cache or own.attend is not DelegatingEngine.attend:
            return True
        engine = engine.inner
    return False


def told_logits(session: Session, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
    """Logits ``(T, V)`` of an answer that is told, row t before its token t.

    In one pass, but step by step where the cache or the loop is what is broken, since then a pass over several tokens is not
    what the program did; there the rows end where the context or the answer ends.
    """
    if not decodes_otherwise(session):
        return session.follow(prompt, text)
    session.forget()
    told = session.generate(prompt, max_tokens=len(text), keep_logits=True, sampling=_Told(text))
    assert told.logits is not None
    return told.logits[: len(text)]


class _AnswerDecided(Exception):
    """The rest of an answer would add nothing."""


class AnswerFollower:
    """Follows an answer token by token, and stops when the rest would add nothing. `cut` then says why.

    There are two reasons to leave. The answer is the healthy one: the prompt and the first step gave the healthy logits
    but for rounding, and so will every later step. Or it leads elsewhere: its first `LEAST_TOKENS` tokens, spelled out, hold
    none of the text's telling tokens, and none of those has been near so far, among the `NEAR`-th part that is likeliest.
    """

    def __init__(self, telling: Sequence[int], run: HealthyRun, broken: Session, first: FirstStep | None = None) -> None:
        self.first, self.at_first = first, ""
        self.telling, self.run, self.tokenizer = np.array(telling, np.int64), run, broken.tokenizer
        self.to_numpy = broken.engine.to_numpy
        self.tokens: list[int] = []
        self.passes = self.alike = 0
        self.best: int | None = None  # the best rank of any telling token so far, 0 the likeliest of all
        self.near = 1
        self.moved = 0.0
        self.silent = False
        self.cut = ""

    def on_matmul(self, y: Array, x: Array, weight: str, bias: str | None = None) -> None:
        """Called after each product; those with the output's weight are the logits of a pass, of all its positions."""
        if weight in _HEADS:
            self.on_logits(self.to_numpy(y)[-1])

    def on_logits(self, logits: np.ndarray) -> None:
        """Called with the logits of each pass: float32 ``(vocab,)`` of its last position."""
        if not self.passes and self.first is not None:
            self.at_first = self.first(logits)
        if self.passes < len(self.run.logits) and self.tokens == list(self.run.healthy.tokens[: self.passes]):
            healthy = self.run.logits[self.passes]
            self.alike += bool(np.abs(logits - healthy).max() <= ROUNDING * np.abs(healthy).max())
            self.moved = max(self.moved, divergence(healthy, logits))
        self.passes += 1
        if self.telling.size:
            rank = int((~(logits <= logits[self.telling].max())).sum())  # what is no number is near nothing
            self.best = rank if self.best is None else min(self.best, rank)
            self.near = max(1, logits.size // NEAR)

    def on_token(self, token: int, piece: str) -> None:
        """Called with each token."""
        self.tokens.append(token)
        if self.at_first:
            self.cut = self.at_first
            raise _AnswerDecided
        if self.passes == self.alike == 2 and self.tokenizer is self.run.session.tokenizer:
            self.silent, self.cut = True, "the healthy logits in two passes, but for rounding"
            raise _AnswerDecided
        far = self.best is not None and self.best >= self.near and len(self.tokens) >= LEAST_TOKENS
        spelled = self.run.session.tokenizer.encode(self.tokenizer.decode(self.tokens), parse_special=False)
        if far and not set(self.telling) & set(spelled):
            self.cut = f"no telling token was nearer than rank {self.best}"
            raise _AnswerDecided


@dataclass(frozen=True)
class HealthyRun:
    """What all runs share: the healthy session, what was asked, the healthy answer and its logits."""

    session: Session
    prompt: str
    length: int
    options: dict[str, Any]
    healthy: Suspect
    logits: np.ndarray

    @classmethod
    def of(cls, session: Session, prompt: str, length: int, **options: Any) -> HealthyRun:
        answer = session.generate(prompt, max_tokens=length, keep_logits=True, **options)
        assert answer.logits is not None
        return cls(session, prompt, length, options, Suspect((), answer.text, tuple(answer.tokens), None), answer.logits)

    def surprise(self) -> np.ndarray:
        """Every token's surprise in bits under the healthy model, at most that of `FLOOR`: float64 ``(vocab,)``."""
        x = self.logits.astype(np.float64)
        p = np.exp(x - x.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True)).mean(0)  # over the steps
        return -np.log2(np.maximum(p, FLOOR))

    def cost(self, session: Session, text: Sequence[int]) -> TextCost:
        """What `text` costs as an answer of `session`."""
        rows = told_logits(session, session.prompt_tokens(self.prompt, **self.options), text)
        cost = TextCost.of(rows, text[: len(rows)])
        rest = DEAREST * (len(text) - len(rows))  # the context ended, or an end was told before the text's
        return replace(cost, bits=tuple(bits + rest for bits in cost.bits))

    def answer_of(
        self, broken: Session, faults: tuple[str, ...], telling: Sequence[int] = (), first: FirstStep | None = None
    ) -> Suspect:
        """What `broken` answers; without `telling` tokens only silence cuts it short, or what `first` makes of the first step."""
        follower = AnswerFollower(telling, self, broken, first)
        started = time.process_time()
        try:
            with broken.engine.hooked("matmul", follower.on_matmul):
                answer = broken.generate(self.prompt, max_tokens=self.length, on_token=follower.on_token, **self.options)
            text, tokens = answer.text, tuple(answer.tokens)
        except _AnswerDecided:
            tokens = self.healthy.tokens if follower.silent else tuple(follower.tokens)
            text = broken.tokenizer.decode(tokens)
        return Suspect(faults, text, tokens, None, None, follower.cut, follower.moved, time.process_time() - started)


def healthy_session(model: Model | str | Path | Session, engine: str | None, threads: int | None) -> Session:
    """A session as given, or over a model as given."""
    if isinstance(model, Session):
        return model
    return Session(model if isinstance(model, Model) else open_model(model), engine=engine, threads=threads)


def collect_after(model: Model) -> None:
    """After a broken engine: it may hold gigabytes in cycles. A small one's few wait for the collector's own time, since a
    full collection looks at everything that the program holds."""
    if not is_small(model):
        gc.collect()
