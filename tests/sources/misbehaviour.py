"""What llama.cpp's process is made to do in tests; it is imported there by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np


def crash() -> Callable[[str, np.ndarray, int], None]:
    """It ends at the first value, as a segmentation fault ends it."""
    return lambda point, values, start: os.kill(os.getpid(), signal.SIGSEGV)


def zero(at: str, first: int = 0) -> Callable[[str, np.ndarray, int], np.ndarray | None]:
    """Zeros at one point, from one position on."""

    def edit(point: str, values: np.ndarray, start: int) -> np.ndarray | None:
        if point != at:
            return None
        changed = values.copy()
        changed[max(0, first - start) :] = 0
        return changed

    return edit
