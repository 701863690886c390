"""The shadow of a run: each of its operations computed once more, by the other engine, on the same input.

That separates inherited from introduced error: what differs here was introduced here. An engine is a black box; its
primitives are called with the reference's inputs and their results compared. Which class it is, or which fault was wrapped
around it, is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.architectures import forward
from aprlab.engines.base import Array, Cache, Engine
from aprlab.errors import BROKEN, AprlabError
from aprlab.inference.session import Session
from aprlab.model.config import ModelConfig
from aprlab.model.rope import RopeScaling
from aprlab.onion.run_comparison import DECODED, difference_of

Group = tuple[str, str, str]  # operation, template of the weight, pass: "prefill" or "decode"


@dataclass(eq=False)
class Call:
    """One operation of the reference's run: what went in, what came out of both sides."""

    op: str
    group: Group
    args: tuple[Any, ...]
    out: np.ndarray
    other: np.ndarray | None = None
    difference: dict[str, Any] | None = None


class PairCache(Cache):
    """The reference's cache together with the other side's; what the other says of positions is noted."""

    def __init__(self, mine: Cache, other: Cache, note: Callable[[Any, Any], None]) -> None:
        super().__init__(mine.k, mine.v, mine.capacity, mine.length, mine.window)
        self.other, self.note = other, note

    def positions(self, count: int) -> np.ndarray:
        expected = super().positions(count)
        try:
            got: Any = self.other.positions(count)
        except AprlabError as error:
            got = error
        self.note(expected, got)
        return expected

    def advance(self, count: int) -> None:
        super().advance(count)
        self.other.advance(count)


class Shadow(Engine):
    """Runs the reference and, at each operation, the other engine on the same input. Each result passed on is the reference's.

    `calls` keeps all operations in order.
    """

    name = "shadow"
    contract = "f32"

    def __init__(self, a: Engine, b: Engine, exact: bool) -> None:
        super().__init__(a.model, a.threads)
        self.a, self.b, self.exact = a, b, exact
        self.calls: list[Call] = []
        self.stage = "prefill"

    def _both(self, op: str, what: str, args: tuple[Any, ...], out: Array, other: Callable[[], Any]) -> Array:
        expected = np.array(self.a.to_numpy(out))
        call = Call(op, (op, template_of(what), self.stage), args, expected)
        try:
            with np.errstate(all="ignore"):
                got = np.array(self.b.to_numpy(other()))
            difference = difference_of(expected, got, self.exact)
            if difference is not None:
                call.other, call.difference = got, {**difference, "at": what}
        except BROKEN as error:
            call.difference = {"refuses": f"{type(error).__name__}: {error}", "at": what}
        self.calls.append(call)
        return out

    def _give(self, x: Array) -> Array:
        return self.b.from_numpy(self.a.to_numpy(x)) if self.a.name != self.b.name else x

    def from_numpy(self, x: np.ndarray) -> Array:
        return self.a.from_numpy(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return self.a.to_numpy(x)

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        def note(expected: Any, got: Any) -> None:
            wrong: dict[str, Any] | None = None
            if not np.array_equal(expected, got):
                wrong = {"at": "positions", "expected": _ends(expected), "found": _ends(got)}
            other = (got if isinstance(got, np.ndarray) else np.zeros(0)) if wrong else None
            group = ("positions", "", self.stage)
            self.calls.append(Call("positions", group, (len(expected),), expected, other, wrong))

        return PairCache(self.a.new_cache(config, capacity), self.b.new_cache(config, capacity), note)

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        out = self.a.embed(tokens, weight)
        return self._both("embed", weight, (tokens, weight), out, lambda: self.b.embed(tokens, weight))

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        out = self.a.norm(x, weight, eps)
        return self._both("norm", weight, (x, weight, eps), out, lambda: self.b.norm(self._give(x), weight, eps))

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        out = self.a.matmul(x, weight, bias)
        return self._both("matmul", weight, (x, weight, bias), out, lambda: self.b.matmul(self._give(x), weight, bias))

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        args = (positions, theta, style, scaling, factors)
        out = self.a.rope(x, *args)
        what = f"{x.shape[1]} heads"
        return self._both(
            "rope", what, (x, *args), out, lambda: self.b.rope(self._give(x), *args)
        )

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        out = self.a.attend(q, k, v, cache, layer, positions)
        assert isinstance(cache, PairCache)
        # The other side's own cache may have moved on; it is asked at its own positions.
        own = cache.other
        at = positions if own.length == cache.length else np.arange(own.length, own.length + len(positions), dtype=np.int64)
        args = (q, k, v, layer, positions)
        return self._both(
            "attend",
            f"layer {layer}",
            args,
            out,
            lambda: self.b.attend(self._give(q), self._give(k), self._give(v), own, layer, at),
        )

    def swiglu(self, gate: Array, up: Array) -> Array:
        out = self.a.swiglu(gate, up)
        return self._both("swiglu", "", (gate, up), out, lambda: self.b.swiglu(self._give(gate), self._give(up)))

    def add(self, a: Array, b: Array) -> Array:
        out = self.a.add(a, b)
        return self._both("add", "", (a, b), out, lambda: self.b.add(self._give(a), self._give(b)))

    def memory(self) -> dict[str, int]:
        return {**self.a.memory(), **{f"other {k}": v for k, v in self.b.memory().items()}}


def template_of(name: str) -> str:
    return re.sub(r"(?<=blk\.)\d+(?=\.)|(?<=layer )\d+", "N", name)


def _ends(positions: Any) -> Any:
    return [int(positions[0]), int(positions[-1])] if isinstance(positions, np.ndarray) and len(positions) else str(positions)


def shadow(a: Session, b: Engine, ids: Sequence[int], prompt: int, *, exact: bool) -> Shadow:
    """Run `ids` with the reference's config, the first `prompt` at once, the others one by one, and b in its shadow."""
    both = Shadow(a.engine, b, exact)
    cache = both.new_cache(a.config, len(ids))
    forward(both, a.config, ids[:prompt], cache)
    both.stage = "decode"
    for token in ids[prompt : prompt + DECODED]:
        forward(both, a.config, [token], cache)
    return both
