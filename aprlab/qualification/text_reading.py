"""Two models read one text: how far apart their next tokens are, with intervals, and how far apart they may be.

The text is shipped. It is read in windows that each begin anew, and once in one long window. What is allowed comes from three
sides (the source, the source with random errors of known size, the candidate): see `foretold`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.architectures import forward
from aprlab.engines.base import Engine, weights
from aprlab.inference.session import Session
from aprlab.instruments.shares import Share
from aprlab.model.config import ModelConfig
from aprlab.onion import health
from aprlab.onion.row_errors import RowErrors
from aprlab.onion.run_cost import NoisyEngine
from aprlab.tracing.comparisons import kl_divergence, log_softmax

TOKENS = 8192  # of the text, at most
WINDOW = 512  # positions that are read in one go; each window starts anew
NOISY = 256  # positions over which `foretold` measures
LONG = 2048  # positions of the one long window
WINDOWS = 64  # at most: a context of one token would make thousands
STEP = 128  # positions whose logits are in memory at once
BLOCK = 32  # positions that count as one draw: neighbours in a text are not independent
Z = 1.96  # of a 95 % interval

# What a side may cost, in weights × positions: 2.5e10 of them take a second of one core. So a model of 0.5 billion weights reads
# some 5,000 positions and one of 1.5 billion 1,700; at least LEAST are read.
BUDGET = 2.6e12
LEAST = 1024


def certificate_text() -> str:
    """The shipped text: languages, code, mathematics, tables, conversations."""
    more = (paths.data_dir() / "certificate-text.txt").read_text(encoding="utf-8").partition("== text\n")[2]
    return f"{more}\n{health.parts()[0]}"


def affordable(session: Session, tokens: int | None) -> tuple[int, int]:
    """Positions that are read in windows, and in the one long window: of `tokens`, else as many as the model's size allows."""
    total = tokens if tokens is not None else max(LEAST, min(TOKENS + LONG, int(BUDGET / max(1, weights(session.model)))))
    return total - min(LONG, total // 3), min(LONG, total // 3)


def windows(session: Session, tokens: int) -> list[list[int]]:
    """The text as token ids, `tokens` at most, in windows of one length that fit the context.

    They are taken from all over the text where not all of it is read: its languages and its code are far apart.
    """
    ids = session.tokenizer.encode(certificate_text(), parse_special=False)
    size = min(WINDOW, session.config.context_length, len(ids), tokens)
    whole = [ids[n : n + size] for n in range(0, len(ids) - size + 1, size)]
    count = min(len(whole), tokens // size, WINDOWS)
    return [whole[n * len(whole) // count] for n in range(count)]


def long_window(session: Session, tokens: int) -> list[int]:
    """The beginning of the text in one go, as much of it as the context and `tokens` allow."""
    ids = session.tokenizer.encode(certificate_text(), parse_special=False)
    return ids[: min(session.config.context_length, tokens)]


@dataclass
class Reading:
    """Two models reading one text: KL divergence (nats) and whether the likeliest token is the same, for each position.

    Attributes:
        kl: float64 (windows, positions).
        same: bool (windows, positions).
    """

    kl: np.ndarray
    same: np.ndarray


@dataclass(frozen=True, slots=True)
class TextShare:
    """One window, for a worker: `share` has the two files and no tensors."""

    share: Share
    engine: str
    ids: tuple[int, ...]


def read(a: Session, b: Session, texts: Sequence[Sequence[int]]) -> Reading:
    """Both read windows of one length; a window where logits are not finite is infinitely far off."""
    return _together([_read_one(a, b, ids) for ids in texts])


def read_by(workers: Any, share: Share, engine: str, texts: Sequence[Sequence[int]]) -> Reading:
    """As `read`, by the workers of a cluster, each a window at a time."""
    return _together(workers.map(read_share, [TextShare(share, engine, tuple(ids)) for ids in texts]))


def read_share(part: TextShare) -> tuple[np.ndarray, np.ndarray]:
    """What a worker does of `read`: KL divergence and agreement of one window."""
    return _read_one(*_sessions(part.share, part.engine, part.share.versions()), part.ids)


@lru_cache(maxsize=1)
def _sessions(share: Share, engine: str, versions: tuple[tuple[int, int], ...]) -> tuple[Session, Session]:
    """Kept from one window to the next: their weights are laid out anew for the engine."""
    a, b = (Session(model, engine=engine, threads=1) for model in share.models())
    return a, b


def _together(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Reading:
    kl, same = (np.array(part) for part in zip(*rows, strict=True))
    return Reading(kl, same)


def _read_one(a: Session, b: Session, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    steps = _steps((a.engine, b.engine), (a.config, b.config), ids)
    kl, same = (np.concatenate(part) for part in zip(*steps, strict=True))
    return kl, same


def _steps(
    engines: tuple[Engine, Engine], configs: tuple[ModelConfig, ModelConfig], ids: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    sides = [(e, c, e.new_cache(c, len(ids))) for e, c in zip(engines, configs, strict=True)]
    for start in range(0, len(ids), STEP):
        some_ids = list(ids[start : start + STEP])
        x, y = (e.to_numpy(forward(e, config, some_ids, cache)) for e, config, cache in sides)
        rows = min(x.shape[1], y.shape[1])  # rows of vocabulary that pad one side alone are left out
        x, y = x[:, :rows], y[:, :rows]
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            yield np.full(len(x), np.inf), np.zeros(len(x), bool)
            continue
        p, q = log_softmax(x), log_softmax(y)
        equal = (x == y).all(axis=-1)
        yield np.where(equal, 0.0, kl_divergence(p, q)), np.argmax(x, -1) == np.argmax(y, -1)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (windows, positions) values, and a 95 % interval: blocks of neighbours count as one draw."""
    size = min(BLOCK, values.shape[1])
    whole = values[:, : values.shape[1] // size * size].reshape(-1, size).astype(np.float64)
    means = whole.mean(axis=1)
    mean = float(means.mean())
    spread = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 and np.isfinite(mean) else float("inf")
    return mean, mean - Z * spread, mean + Z * spread


# ── what is allowed ───────────────────────────────────────────────────────────────────────────────────────────────


def foretold(session: Session, errors: Mapping[str, RowErrors], ids: Sequence[int]) -> float | None:
    """What weights that are off by so much cost, nats: KL divergence of the source from itself with random errors of that size.

    Args:
        session: the source.
        errors: of each tensor that is held in another type, row by row; see `aprlab.onion.run_cost.losses`.
        ids: a text, of which the first `NOISY` positions are read.

    Returns:
        The mean; None where errors are not finite, or so large that nothing can be said.
    """
    noisy = NoisyEngine(session.engine, errors, seed=0)
    steps = _steps((session.engine, noisy), (session.config, session.config), ids[:NOISY])
    cost = float(np.concatenate([kl for kl, _ in steps]).mean())
    return cost if np.isfinite(cost) else None


__all__ = [
    "LEAST", "LONG", "TOKENS", "WINDOW", "Reading", "affordable", "certificate_text", "foretold", "interval", "long_window",
    "read", "read_by", "windows",
]  # fmt: skip
