"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprlab.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest (the lowest id among equals); else logits are divided by it.
        top_p: sample among the fewest tokens whose probabilities sum to this.
        seed: of NumPy's PCG64; the same seed gives the same text from the same logits. None takes a fresh one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature}: a number from 0 up is needed", code="sampling.temperature")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: a number above 0 and up to 1 is needed", code="sampling.top-p")

    def choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        """A token id, from finite logits ``(V,)``."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64)
        scaled = (scaled - scaled.max()) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        p = np.exp(scaled[order])
        p /= p.sum()
        kept = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1  # the one that crosses the line is in
        p = p[:kept] / p[:kept].sum()
        return int(order[rng.choice(len(p), p=p)])
