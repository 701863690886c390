"""Log-probabilities as evidence: the likeliest tokens that a broken server gave at each step, and which fault gives them.

A text says which token won; the figures say by how much, and over which others. So they are compared as distributions: by how
many bits a step the figures differ from what the model gives under a fault, after the same prompt and the same tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, UsageError
from aprlab.faults import session_with
from aprlab.faults.text import CHATML
from aprlab.forensics.answer_runs import collect_after
from aprlab.forensics.answer_scoring import AnswerScore, Suspect
from aprlab.inference.session import Session
from aprlab.inference.template import render
from aprlab.sources.server_answers import AnswerReader
from aprlab.tracing.comparisons import log_softmax

SAME = 0.005  # bits a step: four times what llama-server's rounding does on the real 0.5B (0.0012 was seen, not more)
HALF = 0.5  # bits a step at which a fault explains the figures half
LEAST = 2.0**-30  # no chance is taken to be smaller: a figure that the model holds for impossible costs 30 bits


@dataclass(frozen=True)
class Figures:
    """What a server said of its steps.

    Attributes:
        text: its answer.
        tokens: ids of the answer, as far as they and their figures are known.
        tops: by step, natural log-probabilities by id; as many as `tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    tops: tuple[Mapping[int, float], ...]

    @classmethod
    def of_json(cls, response: Any, session: Session, most: int) -> Figures:
        """Of an answer that was kept as JSON, at most so many steps.

        Raises:
            UsageError: it has no log-probabilities.
            UnsupportedError, FormatError: it is no answer of a server, or one of another vocabulary.
        """
        answer = AnswerReader(session.tokenizer, "response").read(response)
        tokens: list[int] = []
        tops: list[Mapping[int, float]] = []
        for step in answer.steps[:most]:
            if not step.top or step.token is None:
                break
            tokens.append(step.token)
            tops.append(step.top)
        if not tokens:
            said = "the response has no log-probabilities of its first token; ask the server for them (logprobs, top_logprobs)"
            raise UsageError(said, code="cases.no-logprobs")
        return cls(answer.text, tuple(tokens), tuple(tops))

    def misfit(self, logits: np.ndarray) -> float:
        """Bits a step by which the figures differ from logits ``(steps, V)``: the Kullback-Leibler divergence of the tokens
        that are listed, and of all others together."""
        with np.errstate(all="ignore"):
            plain = log_softmax(logits).astype(np.float64)
        bits = 0.0
        for top, row in zip(self.tops, plain, strict=True):
            ids = np.array(list(top), np.int64)
            theirs, ours = np.exp(np.array(list(top.values()))), np.exp(row[ids])
            p, q = (np.append(x, max(0.0, 1.0 - x.sum())) for x in (theirs, ours))
            q = np.maximum(np.where(np.isfinite(q), q, 0), LEAST)
            bits += float(np.sum(p * np.log2(np.maximum(p, LEAST) / q)))
        return max(0.0, bits / len(self.tops))


def figures_suspects(
    session: Session, figures: Figures, prompt: str, template: str, system: str | None, faults: Iterable[str],
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Suspect, list[Suspect]]:
    """The healthy model and each set of faults, judged by the figures; none of them in order.

    Args:
        session: healthy.
        prompt, template, system: what was asked, as in a case.
        faults: ids or sets, ``a+b``.
        progress: called after each set with its name and its seconds.
    """
    sound = figures.misfit(session.follow(prompt_ids(session, prompt, template, system), figures.tokens))
    healthy = Suspect((), figures.text, figures.tokens, _score(sound, sound, whole=sound <= SAME))
    found = []
    for unit in faults:
        started, chosen = time.process_time(), tuple(unit.split("+"))
        found.append(_tried(session, chosen, figures, (prompt, template, system), sound))
        if progress is not None:
            progress(unit, time.process_time() - started)
    return healthy, found


def prompt_ids(session: Session, prompt: str, template: str, system: str | None) -> list[int]:
    """What a session makes of a case's prompt: by its template, as it is, or in bare ChatML."""
    if template != "chatml-without-system":
        return session.prompt_tokens(prompt, raw=template == "none", system=system)
    turns = [{"role": "system", "content": system}] if system is not None else []
    return session.raw_tokens(render(CHATML, [*turns, {"role": "user", "content": prompt}]))


def _tried(session: Session, faults: tuple[str, ...], figures: Figures, asked: tuple[Any, ...], sound: float) -> Suspect:
    started = time.process_time()
    try:
        broken = session_with(session, faults)
    except AprlabError as error:
        return Suspect(faults, "", (), None, error.message)
    try:
        logits = broken.follow(prompt_ids(broken, *asked), figures.tokens)
        if not np.isfinite(logits).all():
            return Suspect(faults, "", (), None, "logits are not finite")
        match = _score(figures.misfit(logits), sound)
        said = tuple(int(token) for token in logits.argmax(-1))
    except AprlabError as error:
        return Suspect(faults, "", (), None, error.message)
    finally:
        broken.engine.close()
        collect_after(session.model)
    return Suspect(faults, broken.tokenizer.decode(said), said, match, seconds=time.process_time() - started)


def _score(misfit: float, sound: float, *, whole: bool = False) -> AnswerScore:
    """1 where the figures are those of the model, half where they are `HALF` bits a step off; nothing for what leaves the healthy
    model's misfit as it is."""
    score = math.exp2(-misfit / HALF) if whole or misfit < sound - SAME else 0.0
    return AnswerScore(score, 0.0, 0.0, float(whole), 0.0, sound - misfit, (), misfit)


__all__ = ["Figures", "figures_suspects", "prompt_ids"]
