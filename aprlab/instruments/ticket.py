"""Small instruments of the ticket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aprlab.instruments.garbage_detector import is_garbage


def norm(weights: np.ndarray) -> bool:
    """Whether these can be a norm's weights ``(n,)``: finite, and not all one value, zero least of all.

    Nothing is said of the mean: 4.62 is right for Qwen's output_norm.
    """
    return weights.ndim == 1 and bool(np.isfinite(weights).all()) and bool(np.ptp(weights) > 0)


def all_hold(checks: Sequence[bool]) -> bool:
    """Whether there are checks and every one of them holds."""
    return len(checks) > 0 and all(checks)


def garbage(text: str) -> bool:
    """See `aprlab.instruments.garbage_detector.is_garbage`."""
    return is_garbage(text)[0]


GARBAGE_STATUS = 3


def status(text: str) -> int:
    """Exit status for an answer: 0, or `GARBAGE_STATUS` where it is garbage."""
    return GARBAGE_STATUS if garbage(text) else 0


def fixture(shape: tuple[int, ...]) -> np.ndarray:
    """float32 values to test decoders and layouts with: `shape` as asked for, no two values alike."""
    values = np.random.default_rng(20260130).normal(size=shape).astype(np.float32)
    return values + np.arange(values.size, dtype=np.float32).reshape(shape) / values.size


def better(before: float, after: float) -> bool:
    """Whether a repair that moved the distance from `before` to `after` stays in the running: it did something.

    Nearer or farther is asked of sets only: of two faults that mask each other, each mended alone makes things worse.
    """
    return after != before
