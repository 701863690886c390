"""Attention that sees a window of the last positions alone: what files say of it, and which positions are hidden.

A window of W lets position p see p - W + 1 … p, itself included, as transformers has it. A window as long as the context is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError

GGUF_KEY = "attention.sliding_window"  # behind the architecture
ALL_LAYERS = 28  # transformers' default of max_window_layers, for a Qwen that does not say it


def from_gguf(value: Any, context_length: int) -> int | None:
    """The window under `GGUF_KEY`; None where there is none, and for 0."""
    return _bounded(value, context_length) if value else None


def from_huggingface(raw: Mapping[str, Any], context_length: int, path: Path | None = None) -> int | None:
    """The window of a config.json, where every layer has it; see `first_layer` for one that only some have.

    Raises FormatError, at `path`, for a value that is no number of positions.
    """
    if raw.get("use_sliding_window") is False or first_layer(raw, path) > 0:
        return None
    found = raw.get("sliding_window")
    return None if found is None else _bounded(found, context_length, path)


def first_layer(raw: Mapping[str, Any], path: Path | None = None) -> int:
    """The first layer of a config.json whose attention is bounded: Qwen leaves the first ones alone."""
    if raw.get("use_sliding_window") is not True:
        return 0
    first = raw.get("max_window_layers", ALL_LAYERS)
    if type(first) is not int or first < 0:
        raise FormatError(f"'max_window_layers' is {first!r:.60}", code="window.bad-value", path=path)
    return first


def _bounded(value: Any, context_length: int, path: Path | None = None) -> int | None:
    if type(value) is not int or value < 1:
        said = f"sliding_window is {value!r:.60}; a number of positions is expected"
        raise FormatError(said, code="window.bad-value", path=path)
    return value if value < context_length else None


def hidden(seen: int, positions: np.ndarray, window: int | None, first: int = 0) -> np.ndarray:
    """Which of the positions ``first … first + seen - 1`` each of `positions` does not see: bool ``(T, seen)``."""
    others = first + np.arange(seen)
    ahead = others > positions[:, None]
    return ahead if window is None else ahead | (others <= positions[:, None] - window)


__all__ = ["ALL_LAYERS", "GGUF_KEY", "first_layer", "from_gguf", "from_huggingface", "hidden"]
