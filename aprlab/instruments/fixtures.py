"""Data to test with: the self-test of the other instruments is made of it."""

from __future__ import annotations

import numpy as np


def fixture(shape: tuple[int, ...]) -> np.ndarray:
    """float32 values to test decoders and layouts with: `shape` as asked for, no two values alike."""
    values = np.random.default_rng(20260130).normal(size=shape).astype(np.float32)
    return values + np.arange(values.size, dtype=np.float32).reshape(shape) / values.size
