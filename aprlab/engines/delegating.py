"""An engine that passes everything on to another; a fault overrides the one primitive that it breaks."""

from __future__ import annotations

import numpy as np

from aprlab.engines.base import Array, Cache, Engine
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling


class DelegatingEngine(Engine):
    """Passes every primitive on to `inner`, any engine."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner.model, inner.threads)
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]  # what it is called and how it rounds is the inner one's business
        self.contract, self.asked = inner.contract, inner.asked

    def from_numpy(self, x: np.ndarray) -> Array:
        return self.inner.from_numpy(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return self.inner.to_numpy(x)

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        return self.inner.new_cache(config, capacity)

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        return self.inner.embed(tokens, weight)

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self.inner.norm(x, weight, eps)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self.inner.matmul(x, weight, bias)

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        return self.inner.rope(x, positions, theta, style, scaling, factors)

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        return self.inner.attend(q, k, v, cache, layer, positions)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self.inner.swiglu(gate, up)

    def add(self, a: Array, b: Array) -> Array:
        return self.inner.add(a, b)

    def memory(self) -> dict[str, int]:
        return self.inner.memory()

    def warm(self) -> None:
        self.inner.warm()

    def close(self) -> None:
        self.inner.close()


class BorrowedEngine(DelegatingEngine):
    """Another session's engine, with a model of its own in view; warming and closing it is the owner's business."""

    def __init__(self, inner: Engine, model: Model) -> None:
        super().__init__(inner)
        self.model = model

    def warm(self) -> None:
        pass

    def close(self) -> None:
        pass
