"""A run by the declared contract, healthy or faulty: what a source should have given, and the proof of a fault's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aprlab.architectures import forward, points
from aprlab.engines.base import Array, Cache
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.delegating import DelegatingEngine
from aprlab.model.config import ModelConfig
from aprlab.model.rope import RopeScaling
from aprlab.onion.foreign_forms import Form, forms, tried
from aprlab.onion.foreign_shadow import Judges, Operation


class Noting(DelegatingEngine):
    """Remembers the last operation and what went in."""

    def __init__(self, inner: ContractEngine) -> None:
        super().__init__(inner)
        self.last: tuple[str, tuple[Any, ...]] = ("", ())

    def _noted(self, op: str, *args: Any) -> Array:
        plain = tuple(self.inner.to_numpy(a) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)
        self.last = op, plain
        return getattr(self.inner, op)(*args)

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        return self._noted("embed", tokens, weight)

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self._noted("norm", x, weight, eps)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self._noted("matmul", x, weight, bias)

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        scaled = () if scaling is None and factors is None else (scaling, factors)  # refused by the simulated engine
        return self._noted("rope", x, positions, theta, style, *scaled)

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        out = self.inner.attend(q, k, v, cache, layer, positions)
        self.last = "attend", (*(self.inner.to_numpy(x) for x in (q, k, v)), layer, positions)
        return out

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._noted("swiglu", gate, up)

    def add(self, a: Array, b: Array) -> Array:
        return self._noted("add", a, b)


def run_with(
    judges: Judges, config: ModelConfig, tokens: Sequence[int], faults: Mapping[str, Form] | None = None, prompt: int = 0
) -> dict[str, np.ndarray]:
    """Every point of a run by the declared contract, float32, all tokens at once.

    Args:
        faults: by point, the form that takes the operation's place.
        prompt: so many tokens went in at once, for faults that know the difference.
    """
    engine = Noting(judges.simulated)
    shapes, kept = points(config), {}
    rows = np.arange(len(tokens), dtype=np.int64)

    def tap(point: str, x: Array) -> Array:
        form = (faults or {}).get(point)
        if form is not None:
            op, args = engine.last
            zero, none = np.zeros((len(tokens), *shapes[point]), np.float32), np.zeros(len(tokens))
            here = Operation(point, op, args, zero, rows, None, None, none, none, none, prompt=prompt)
            values = tried(_remade(form, here, judges, config), judges.simulated, here)
            x = x if values is None else engine.from_numpy(values.reshape(x.shape))
        kept[point] = engine.to_numpy(x)
        return x

    with np.errstate(all="ignore"):
        forward(engine, config, tokens, engine.new_cache(config, len(tokens)), tap)
    return kept


def _remade(form: Form, operation: Operation, judges: Judges, config: ModelConfig) -> Form:
    """The same form made for another layer, where its parameters name tensors."""
    if not {"weight", "bias"} & form.parameters.keys():
        return form
    same = (f for f in forms(operation, judges, config) if (f.name, f.parameters) == (form.name, form.parameters))
    return next(same, form)
