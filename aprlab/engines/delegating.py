"""An engine that passes everything on to another; a fault overrides the one primitive that it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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


class SharingEngine(BorrowedEngine):
    """Another session's engine for every weight that two models have in common, one of its own for the others.

    What is in common is not read, laid out or kept in memory a second time. The two engines are alike, so that results are to the
    last bit those of an engine that has all weights to itself.

    Args:
        inner: the other session's, over a model that has the same tensors under the names in `common`.
        model: in view.
        common: names of tensors, see `Model.in_common`.
        make: gives an engine over `model` that is like `inner`; called when a weight is needed that is not in common.
    """

    def __init__(self, inner: Engine, model: Model, common: Iterable[str], make: Callable[[], Engine]) -> None:
        super().__init__(inner, model)
        self.common, self._make = frozenset(common), make
        self._own: Engine | None = None

    @property
    def own(self) -> Engine:
        """The engine of what is not in common; made when it is first needed."""
        if self._own is None:
            self._own = self._make()
        return self._own

    @property
    def whole(self) -> bool:
        """Whether the model has nothing but what is in common, and all of it: then every pass is one of the other session's."""
        return self.model.tensors.keys() == self.inner.model.tensors.keys() == self.common

    def _with(self, *weights: str | None) -> Engine:
        return self.inner if all(name is None or name in self.common for name in weights) else self.own

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        return self._with(weight).embed(tokens, weight)

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self._with(weight).norm(x, weight, eps)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self._with(weight, bias).matmul(x, weight, bias)

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        return self._with(factors).rope(x, positions, theta, style, scaling, factors)

    def memory(self) -> dict[str, int]:
        """What it has to itself; the rest is the other session's."""
        return dict.fromkeys(self.inner.memory(), 0) if self._own is None else self._own.memory()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
