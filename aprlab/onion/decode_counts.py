"""How often a forward pass decodes each weight: wasted work shows here, not in the values."""

from __future__ import annotations

from collections import Counter

from aprlab.architectures import forward
from aprlab.engines.base import Engine
from aprlab.model.config import ModelConfig
from aprlab.model.decode_hooks import decode_hook


def decodings(engine: Engine, config: ModelConfig, token: int) -> dict[str, int]:
    """How often a second pass over one token decodes each weight that a first pass has decoded already.

    An engine that keeps its decoded weights decodes nothing again; the decodings of any decoder count.
    """
    counts: Counter[str] = Counter()
    forward(engine, config, [token], engine.new_cache(config, 2))
    with decode_hook(lambda name: counts.update((name,))):
        forward(engine, config, [token], engine.new_cache(config, 2))
    return dict(counts)
