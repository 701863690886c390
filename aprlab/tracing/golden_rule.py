"""The golden rule, measured: does the other model say the same words, from the same logits?

The reference answers greedily once. Everybody else is shown that answer: if prompt ids, the token chosen at every step
and the logits it was chosen from agree, so do all greedy answers, and one pass per candidate is enough.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from aprlab.architectures import forward
from aprlab.engines import choose
from aprlab.engines.delegating import SharingEngine
from aprlab.errors import BROKEN, AprlabError, reason
from aprlab.inference.session import Session, conversation_text, session_beside
from aprlab.model.model import Model
from aprlab.tracing.comparisons import kl_divergence, log_softmax

MAX_TOKENS = 10
_PROBE = "Add 12 and 345:\n<|im_start|>x<|im_end|> naïve\n"  # digits, a line's end, specials, bytes beyond ASCII


@dataclass
class GoldenOutcome:
    """One candidate under the golden rule.

    Attributes:
        error: what refused to run, None where it ran.
        ids: its own prompt ids are the reference's, of a probe text too.
        tokens: it chooses the reference's tokens at every step, and ends where the reference ends.
        text: it prints them as the reference does.
        bitwise: its logits are the reference's, bit for bit.
        distance: relative l2 of its logits from the reference's; inf where it did not run.
        kl: mean Kullback-Leibler divergence over the steps, in nats.
        logits: float32 (steps, V); None where it did not run, and where its passes are the reference's own.
    """

    error: str | None = None
    ids: bool = False
    tokens: bool = False
    text: bool = False
    bitwise: bool = False
    distance: float = float("inf")
    kl: float = float("inf")
    chosen: list[int] = field(default_factory=list)
    logits: np.ndarray | None = field(default=None, repr=False)

    @property
    def says_the_same(self) -> bool:
        """Same prompt, same tokens, same text."""
        return self.error is None and self.ids and self.tokens and self.text

    def to_json(self) -> dict[str, Any]:
        """Without the logits."""
        if self.error is not None:
            return {"error": self.error}
        names = ("ids", "tokens", "text", "bitwise", "distance", "kl")
        return {name: getattr(self, name) for name in names}


class Golden:
    """The reference's answer, and how far others are from it.

    Args:
        reference: a session, or a model to make one over.
        engine, threads: for the candidates, and for the reference where a model is given; ``auto``: as the rule has it
            for the reference, for all of them.
        prompt: what is asked, through the chat template (raw where the file has none).
        max_tokens: length of the answer.
        serial: show the answer token by token, as it was made; else with the prompt in one pass.
    """

    def __init__(
        self, reference: Model | Session, *, engine: str | None = "auto", threads: int | None = None, prompt: str,
        max_tokens: int = MAX_TOKENS,
        serial: bool = False,
    ) -> None:  # fmt: skip
        self.threads, self.prompt, self.serial, self.max_tokens = threads, prompt, serial, max_tokens
        self._lends = isinstance(reference, Model)  # a session that was given may compute in a way of its own
        self.session = reference if isinstance(reference, Session) else _session(reference, engine, threads, prompt)
        # not chosen again for each candidate, which may have other types or fewer weights
        self.engine = choose(engine, self.session.model, threads=threads).spec
        self.prompt_ids, self.probe = _ids(self.session, prompt)
        answer = self.session.generate(self.prompt_ids, max_tokens=max_tokens, keep_logits=True)
        self.answer, self.text, self.stop = answer.tokens, answer.text, answer.stop
        assert answer.logits is not None
        self._said = np.argmax(answer.logits, axis=-1).tolist()  # what ended the answer included, if a token did
        self.ids = [*self.prompt_ids, *self.answer]
        self.steps = len(self.answer) + 1
        self.eog = self.session.tokenizer.eog

    @cached_property
    def logits(self) -> np.ndarray:
        """What candidates are compared with: float32 (steps, V); run when it is first needed."""
        return self._logits(self.session)

    @cached_property
    def chosen(self) -> list[int]:
        """The token of each step."""
        chosen: list[int] = np.argmax(self.logits, axis=-1).tolist()
        return chosen

    def _logits(self, session: Session) -> np.ndarray:
        """Logits of every step of the answer, the one that ends it included: float32 (steps, V)."""
        engine, config = session.engine, session.config
        cache = engine.new_cache(config, len(self.ids))
        if self.serial:
            passes = [self.prompt_ids, *([token] for token in self.answer)]
            rows = [np.array(engine.to_numpy(forward(engine, config, some, cache, last_only=True))) for some in passes]
            return np.concatenate(rows)

        def tap(point: str, x: Any) -> Any:  # the output head is asked for the answer's positions only
            return x[len(self.prompt_ids) - 1 :] if point == f"layers.{config.block_count - 1}.out" else x

        return np.array(engine.to_numpy(forward(engine, config, self.ids, cache, tap)))

    def session_of(self, model: Model) -> Session:
        """A session over a candidate, with the reference's tokenizer and laid-out weights as far as they are the same."""
        if self._lends:
            return session_beside(self.session, model, engine=self.engine, threads=self.threads)
        tokenizer = self.session.tokenizer if model.tokenizer == self.session.model.tokenizer else None
        return Session(model, engine=self.engine, threads=self.threads, tokenizer=tokenizer)

    def _stands_for(self, session: Session) -> bool:
        """Whether the reference's own pass is this session's, too: one engine gives one answer for one set of weights."""
        engine = session.engine
        return isinstance(engine, SharingEngine) and engine.whole and session.config == self.session.config

    def measure(self, model: Model | Session | AprlabError) -> GoldenOutcome:
        """A candidate under the rule; whatever it refuses is part of the outcome."""
        if isinstance(model, AprlabError):
            return GoldenOutcome(error=str(model.message))
        try:
            session = model if isinstance(model, Session) else self.session_of(model)
            ids, probe = _ids(session, self.prompt)
            if self._stands_for(session):
                return self._as_the_reference(session, ids, probe)
            logits = self._logits(session)
            loops = type(session) is type(self.session) or session.generate(ids, max_tokens=self.max_tokens).tokens == self.answer
        except BROKEN as error:
            return GoldenOutcome(error=f"{type(error).__name__}: {reason(error)}")
        return self.judge(session, ids, probe, logits, loops=loops)

    def _as_the_reference(self, session: Session, ids: list[int], probe: list[int]) -> GoldenOutcome:
        """The outcome of a session whose passes are the reference's own; only what is made of text is its own."""
        if self.stop != "eos":  # the last step has not been run yet
            return self.judge(session, ids, probe, self.logits)
        return GoldenOutcome(
            ids=self._same_ids(ids, probe), tokens=session.tokenizer.eog == self.eog, text=self._same_text(session),
            bitwise=True, distance=0.0, kl=0.0, chosen=self._said,
        )  # fmt: skip

    def judge(
        self, session: Session, ids: list[int], probe: list[int], logits: np.ndarray, *, loops: bool = True
    ) -> GoldenOutcome:  # fmt: skip
        """The outcome of what a session gave; `loops`: its own loop around these passes gives the answer, too."""
        if logits.shape != self.logits.shape:
            return GoldenOutcome(error=f"logits of shape {logits.shape}, not {self.logits.shape}")
        chosen = np.argmax(logits, axis=-1).tolist()
        ends = session.tokenizer.eog == self.eog
        finite = bool(np.isfinite(logits).all())
        bitwise = bool(np.array_equal(logits.view(np.uint32), self.logits.view(np.uint32)))
        apart = finite and not bitwise
        return GoldenOutcome(
            ids=self._same_ids(ids, probe),
            tokens=chosen == self.chosen and ends and finite and loops,
            text=self._same_text(session),
            bitwise=bitwise,
            distance=_relative(self.logits, logits) if apart else 0.0 if finite else float("inf"),
            kl=_kl(self.logits, logits) if apart else 0.0 if finite else float("inf"),
            chosen=chosen,
            logits=logits,
        )

    def _same_ids(self, ids: list[int], probe: list[int]) -> bool:
        return ids == self.prompt_ids and probe == self.probe

    def _same_text(self, session: Session) -> bool:
        return session.tokenizer.decode(self.ids) == self.session.tokenizer.decode(self.ids)


def _session(model: Model, engine: str | None, threads: int | None, prompt: str) -> Session:
    """A session that will be asked `prompt`: a child process applies the template while the engine is made ready."""

    def ahead() -> None:
        with contextlib.suppress(AprlabError):  # whoever needs the text is told
            conversation_text(model, [{"role": "user", "content": prompt}])

    with ThreadPoolExecutor(1, "aprlab-template") as pool:
        pool.submit(ahead)
        return Session(model, engine=engine, threads=threads)


def _ids(session: Session, prompt: str) -> tuple[list[int], list[int]]:
    """Prompt ids as this side makes them (raw where it has no template), and those of a probe text."""
    return session.prompt_tokens(prompt, raw=session.wants_raw), session.tokenizer.encode(_PROBE)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(x - y) / (np.linalg.norm(x) or 1.0))


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over steps of KL(a || b), nats, in float64."""
    return float(kl_divergence(log_softmax(a), log_softmax(b)).mean())


__all__ = ["MAX_TOKENS", "Golden", "GoldenOutcome"]
