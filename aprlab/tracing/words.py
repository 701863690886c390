"""From activations to words: what each layer would say, what a difference costs at each position, an answer token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprlab.errors import UsageError
from aprlab.inference.session import Session
from aprlab.model.inventory import output_weight
from aprlab.tracing.comparisons import kl_divergence, log_softmax
from aprlab.tracing.traces import Trace


@dataclass(frozen=True, eq=False)
class WordsByLayer:
    """The likeliest token of each layer at each position: ids and probabilities, ``(layers, positions)``."""

    ids: np.ndarray
    probabilities: np.ndarray


def logit_lens(session: Session, trace: Trace, last: int | None = None) -> WordsByLayer:
    """The output head on the residual stream after each layer: what the model would say if it ended there.

    Args:
        session: its final norm and output weight are used.
        trace: of `session`, with ``layers.*.out``.
        last: only so many positions, from the end.

    Returns:
        A row for each layer; where logits are no numbers, the probability is nan.
    """
    engine, config = session.engine, session.config
    ids, likely = [], []
    for n in range(config.block_count):
        stream = np.ascontiguousarray(trace[f"layers.{n}.out"].values[-(last or 0) :])
        normed = engine.norm(engine.from_numpy(stream), "output_norm.weight", config.rms_norm_eps)
        logits = engine.to_numpy(engine.matmul(normed, output_weight(config)))
        with np.errstate(invalid="ignore"):
            logs = log_softmax(logits)
        best = logs.argmax(axis=1)
        ids.append(best)
        likely.append(np.exp(logs[np.arange(len(best)), best]))
    return WordsByLayer(np.array(ids), np.array(likely))


def position_kl(a: Trace, b: Trace) -> np.ndarray:
    """Kullback-Leibler divergence of b's next token from a's at each position, in nats: float64 ``(positions,)``.

    nan where b's logits are no numbers.

    Raises:
        UsageError: the traces have other tokens, or logits at other positions.
    """
    p, q = a["logits"].values, b["logits"].values
    if list(a.tokens) != list(b.tokens) or p.shape != q.shape:
        raise UsageError("KL by position needs the same tokens and positions on both sides", code="trace.unlike-logits")
    with np.errstate(invalid="ignore"):
        return kl_divergence(log_softmax(p), log_softmax(q))


def answer_steps(session: Session, prompt: str, max_tokens: int = 12) -> list[tuple[str, float]]:
    """A greedy answer token by token: the text of each token, and the probability that the model gave it.

    The token that ends an answer is not part of it. nan where logits are no numbers.
    """
    ids = session.prompt_tokens(prompt, raw=session.wants_raw)
    tokens = list(session.generate(prompt, max_tokens=max_tokens, raw=session.wants_raw).tokens)
    if not tokens:
        return []
    with np.errstate(invalid="ignore"):
        logs = log_softmax(session.follow(ids, tokens))
    return [(session.tokenizer.decode([id]), float(np.exp(logs[n, id]))) for n, id in enumerate(tokens)]


__all__ = ["WordsByLayer", "answer_steps", "logit_lens", "position_kl"]
