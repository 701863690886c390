"""An engine with some operations taken from another: the repair of a run."""

from __future__ import annotations

import numpy as np

from aprlab.engines.base import Array, Cache, Engine
from aprlab.model.config import ModelConfig
from aprlab.model.rope import RopeScaling
from aprlab.onion.shadow import Group, template_of


class MixedEngine(Engine):
    """The broken engine with some operations taken from the sound one: the repair of a run."""

    def __init__(self, broken: Engine, sound: Engine, groups: set[Group]) -> None:
        super().__init__(broken.model, broken.threads)
        self.broken, self.sound, self.groups = broken, sound, groups
        self.name = broken.name  # type: ignore[misc]
        self.contract = broken.contract
        self._sound_cache = any(op in ("positions", "attend") for op, _, _ in groups)

    def _pick(self, op: str, what: str, count: int) -> Engine:
        stage = "prefill" if count > 1 else "decode"
        return self.sound if (op, template_of(what), stage) in self.groups else self.broken

    def from_numpy(self, x: np.ndarray) -> Array:
        return self.broken.from_numpy(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return self.broken.to_numpy(x)

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        return (self.sound if self._sound_cache else self.broken).new_cache(config, capacity)

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        return self._pick("embed", weight, len(tokens)).embed(tokens, weight)

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self._pick("norm", weight, len(x)).norm(x, weight, eps)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self._pick("matmul", weight, len(x)).matmul(x, weight, bias)

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        engine = self._pick("rope", f"{x.shape[1]} heads", len(x))
        return engine.rope(x, positions, theta, style, scaling, factors)

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        return self._pick("attend", f"layer {layer}", len(q)).attend(q, k, v, cache, layer, positions)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._pick("swiglu", "", len(gate)).swiglu(gate, up)

    def add(self, a: Array, b: Array) -> Array:
        return self._pick("add", "", len(a)).add(a, b)

    def memory(self) -> dict[str, int]:
        return self.broken.memory()

    def warm(self) -> None:
        self.broken.warm()
