"""Architectures: one straight forward pass each, and the door that finds the one that a config names.

What they are made of (tensors, names, conventions) is data in `aprlab.model.architecture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from aprlab.architectures import llama, qwen2, qwen3
from aprlab.architectures.inputs import Tap, check, points
from aprlab.engines.base import Array, Cache, Engine
from aprlab.model.architecture import ARCHITECTURES, architecture_of
from aprlab.model.config import ModelConfig

PASSES: dict[str, ModuleType] = {"qwen2": qwen2, "qwen3": qwen3, "llama": llama}
assert PASSES.keys() == ARCHITECTURES.keys()


def forward(
    engine: Engine,
    config: ModelConfig,
    tokens: Sequence[int] | np.ndarray,
    cache: Cache,
    tap: Tap | None = None,
    *,
    last_only: bool = False,
) -> Array:
    """Logits of `tokens` by the forward pass of the config's architecture; see `aprlab.architectures.qwen2.forward`."""
    run = PASSES[architecture_of(config.architecture).name].forward
    logits: Array = run(engine, config, tokens, cache, tap, last_only=last_only)
    return logits


__all__ = ["PASSES", "Tap", "check", "forward", "points"]
