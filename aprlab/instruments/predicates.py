"""Instruments that answer yes or no."""

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
