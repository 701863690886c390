"""The shadow of a trace that another program left: each of its operations computed again, three times, on its own inputs.

Exact (float64), by the declared contract (float64, rounded where the contract rounds), and in plain float32. The first says
what is right, the second what rounding makes of it, the third how far the order of float32 sums may go. So no tolerance is
set by hand: an operation is within its contract where it is as near to the second as the third is to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprlab.architectures import forward
from aprlab.engines.base import Array, Cache, Engine
from aprlab.engines.contract_engine import ContractEngine, Weights
from aprlab.engines.contracts import Contract
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling
from aprlab.tracing.traces import Point, Trace

ORDERS = 16  # other orders of the same float32 sums: at most so many times the deviation of one of them
CHAIN = 4  # of roundings that build on each other, some go either way: a simulation meets them to a quarter
# One kernel for all of attention rounds its probabilities, and takes them from an exponential that need be no better than that
# (torch's polynomial is off by 1e-4 where a half is off by 5e-4): two roundings where a simulation has one.
FUSED = 2
UNIT = 2.0**-23  # of float32: less cannot be seen in what it holds
ROUNDED_INSIDE = ("norm", "swiglu")  # element by element, once between their steps


class Streams:
    """One array computed in several ways; `plain` is the trace's own float32 where all of them are that."""

    def __init__(self, ways: Sequence[Any], plain: np.ndarray | None = None) -> None:
        self.ways, self.plain = list(ways), plain

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.ways[0].shape
        return shape

    def reshape(self, *shape: Any) -> Streams:
        return self.each(lambda x: x.reshape(*shape))

    def __getitem__(self, rows: slice) -> Streams:
        return self.each(lambda x: x[rows])

    def each(self, change: Callable[[Any], Any]) -> Streams:
        """The same done to each way."""
        return Streams([change(x) for x in self.ways], None if self.plain is None else change(self.plain))

    @property
    def values(self) -> np.ndarray:
        """float32: the trace's own, else what the contract gives."""
        return self.plain if self.plain is not None else np.asarray(self.ways[1], np.float32)


@dataclass(eq=False)
class Operation:
    """One operation of the trace, or several where points between them are missing.

    Attributes:
        point: name of the point it ends in.
        op: primitive of the engine that computes it.
        args: what goes in: float32 arrays, names of weights, numbers.
        given: the trace's values, float32 ``(P, …)``.
        rows: at which of the run's positions.
        exact, simulated: float64 of the same shape; dropped where the operation is within its contract.
        off: relative distance of `given` from `simulated`, by position.
        allowed: what float32 sums in another order may make of it, by position.
        rounding: what the contract's own rounding makes of it, by position.
    """

    point: str
    op: str
    args: tuple[Any, ...]
    given: np.ndarray
    rows: np.ndarray
    exact: np.ndarray | None
    simulated: np.ndarray | None
    off: np.ndarray
    allowed: np.ndarray
    rounding: np.ndarray
    alone: bool = True  # all points that go in are the trace's own
    prompt: int = 0  # so many positions went in at once, the others one by one; 0: all

    @property
    def step(self) -> str:
        """The point without its layer."""
        return self.point.split(".")[-1]

    @property
    def layer(self) -> int | None:
        """Number of the layer, None outside."""
        parts = self.point.split(".")
        return int(parts[1]) if len(parts) == 3 else None

    @property
    def wrong(self) -> np.ndarray:
        """By position: further off than the contract explains."""
        return wrong(self.off, self.allowed, self.rounding)

    @property
    def fits(self) -> bool:
        return not self.wrong.any()


def wrong(off: np.ndarray, allowed: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """By position, whether a distance is more than rounding explains.

    Simulated rounding is met to float32's order of sums, but a value that lies between two steps of the rounding may go
    either way: then a position is off by up to what the rounding does as a whole. That happens now and then, never at most
    positions.
    """
    tight = off <= allowed
    if np.mean(tight) >= 0.5:
        return ~(tight | (off <= rounding))
    return ~tight


def settled(
    given: np.ndarray, simulated: np.ndarray, exact: np.ndarray, before: Sequence[np.ndarray], allowed: np.ndarray,
    as_value: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """What the contract gives next to `given`: a value half-way between two steps of a rounding may become either.

    Args:
        given, simulated, exact: ``(P, …)``.
        before: `simulated` before its last rounding, once or several times: where roundings inside went either way. Empty
            where there is no such rounding, or where it is not known.
        allowed: by position, how far float32 sums may go, relative to the norm of `exact`.
        as_value: the last rounding.

    Returns:
        `simulated`, and where sums in another order may round to another value, the one nearest to `given`.
    """
    if not before:
        return simulated
    with np.errstate(all="ignore"):
        each = np.sqrt(np.mean(np.square(exact.reshape(len(exact), -1)), axis=1)) * allowed
        least, most = np.minimum.reduce(before), np.maximum.reduce(before)
        slack = np.maximum(each.reshape(-1, *(1,) * (exact.ndim - 1)), UNIT * np.abs(most))
        low, high = as_value(least - slack), as_value(most + slack)
        return np.where(low < high, np.clip(given, low, high), simulated)


def distance(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """l2 of ``a - b`` by position, over that of `scale`; inf where one is not finite and the other is not the same."""
    with np.errstate(all="ignore"):
        x, y, size = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (a, b, scale))
        alike = (np.isnan(x) & np.isnan(y)) | ((x == y) & np.isinf(x))
        norm = np.linalg.norm(np.where(np.isfinite(size), size, 0), axis=1)
        each = np.linalg.norm(np.where(alike, 0, x - y), axis=1) / np.where(norm > 0, norm, 1)
    return np.where(np.isfinite(each), each, np.inf)


@dataclass
class Judges:
    """The three ways over one model; weights are decoded once for all of them."""

    model: Model
    contract: Contract
    weights: Weights = field(init=False)
    exact: ContractEngine = field(init=False)
    simulated: ContractEngine = field(init=False)
    single: ContractEngine = field(init=False)

    def __post_init__(self) -> None:
        self.weights = Weights(self.model)
        self.exact = self.by(Contract())
        self.simulated = self.by(self.contract)
        self.single = ContractEngine(self.model, dtype=np.float32, weights=self.weights, exact_rope=False)

    def by(self, contract: Contract) -> ContractEngine:
        """Another contract, with the same decoded weights."""
        return ContractEngine(self.model, contract, weights=self.weights)

    @property
    def three(self) -> tuple[ContractEngine, ContractEngine, ContractEngine]:
        return self.exact, self.simulated, self.single


class TraceShadow(Engine):
    """Runs a forward pass whose every result is the trace's, and notes what each operation should have given.

    Args:
        judges: the ways to compute it.
        given: the trace; points and positions that it lacks are computed, each way from its own values.
    """

    name = "shadow of a trace"
    contract = "f32"

    def __init__(self, judges: Judges, given: Trace) -> None:
        super().__init__(judges.model)
        self.judges, self.given = judges, given
        self.operations: list[Operation] = []
        self._last: tuple[str, tuple[Any, ...], bool] = ("", (), True)
        self._second: np.ndarray | None = None
        self._either: list[np.ndarray] = []  # results before their last rounding, roundings inside led one way and the other

    def from_numpy(self, x: np.ndarray) -> Array:
        return Streams([judge.from_numpy(x) for judge in self.judges.three], x)

    def to_numpy(self, x: Array) -> np.ndarray:
        values: np.ndarray = x.values
        return values

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        caches = [judge.new_cache(config, capacity) for judge in self.judges.three]
        return Cache([c.k for c in caches], [c.v for c in caches], capacity, window=config.sliding_window)

    def memory(self) -> dict[str, int]:
        return {}

    @property
    def last(self) -> tuple[str, tuple[Any, ...]]:
        """The last operation, and what went in."""
        return self._last[:2]

    def _note(self, op: str, *args: Any) -> None:
        alone = all(arg.plain is not None for arg in args if isinstance(arg, Streams))
        self._last = (op, tuple(arg.values if isinstance(arg, Streams) else arg for arg in args), alone)

    def _ways(self, op: str, *args: Any) -> Streams:
        self._note(op, *args)
        ways = [[arg.ways[n] if isinstance(arg, Streams) else arg for arg in args] for n in range(3)]
        out = Streams([getattr(judge, op)(*way) for judge, way in zip(self.judges.three, ways, strict=True)])
        simulated = self.judges.simulated
        if op in ROUNDED_INSIDE and simulated.unrounded is not None:
            for simulated.lean in (-ORDERS * UNIT, ORDERS * UNIT, 0.0):
                getattr(simulated, op)(*ways[1])
                self._either.append(simulated.unrounded)
        return out

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        return self._ways("embed", tokens, weight)

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self._ways("norm", x, weight, eps)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        self._note("matmul", x, weight, bias)
        tensor, three = self.matrix(weight, x.shape[-1]), self.judges.three
        sides = [judge.side(way, tensor) for judge, way in zip(three, x.ways, strict=True)]
        products = self.judges.weights.products(tensor, sides)
        return Streams([judge.biased(y, bias) for judge, y in zip(three, products, strict=True)])

    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        scaled = () if scaling is None and factors is None else (scaling, factors)
        return self._ways("rope", x, positions, theta, style, *scaled)

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        self._note("attend", q, k, v, layer, positions)
        out = []
        for n, judge in enumerate(self.judges.three):
            own = Cache(cache.k[n], cache.v[n], cache.capacity, cache.length, cache.window)
            out.append(judge.attend(q.ways[n], k.ways[n], v.ways[n], own, layer, positions))
        simulated = self.judges.simulated
        if simulated.half_sums:  # for many queries at once ggml keeps its sums in float32: that is allowed, too
            simulated.half_sums = False
            own = Cache(cache.k[1], cache.v[1], cache.capacity, cache.length, cache.window)
            self._second = simulated.attend(q.ways[1], k.ways[1], v.ways[1], own, layer, positions)
            simulated.half_sums = True
        return Streams(out)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._ways("swiglu", gate, up)

    def add(self, a: Array, b: Array) -> Array:
        return self._ways("add", a, b)

    def _unrounded(self) -> list[np.ndarray]:
        found = self.judges.simulated.unrounded
        return [] if found is None else [found]

    def tap(self, point: str, x: Array) -> Array:
        """Compare a result with the trace's, and go on with the trace's."""
        second, either, self._second, self._either = self._second, self._either, None, []
        if point not in self.given:
            return x
        kept = self.given[point]
        count = len(x.ways[0])
        first = len(self.given.tokens) - count  # the head may be given its last position alone
        rows = kept.positions - first
        if not len(rows) or rows.min() < 0 or rows.max() >= count:
            return x
        op, args, alone = self._last
        exact, simulated, single = (way.reshape(x.shape)[rows] for way in x.ways)
        before = [part.reshape(x.shape)[rows] for part in either or self._unrounded() if part.size == x.ways[1].size]
        found = judged(point, op, args, kept.values, rows, exact, simulated, single, second, before, alone, self.judges.simulated)
        found.prompt = self.given.prompt or 0
        self.operations.append(found)
        whole = len(rows) == count and np.array_equal(rows, np.arange(count))
        if whole:
            return self.from_numpy(kept.values.reshape(x.shape))
        for way in x.ways:
            way[rows] = kept.values
        return Streams(x.ways)


def judged(
    point: str, op: str, args: tuple[Any, ...], given: np.ndarray, rows: np.ndarray, exact: np.ndarray, simulated: np.ndarray,
    single: np.ndarray, second: np.ndarray | None, before: Sequence[np.ndarray], alone: bool, engine: ContractEngine,
) -> Operation:  # fmt: skip
    """One operation with its distances, under the contract of an engine."""
    order = distance(single, exact, exact)
    allowed = ORDERS * np.maximum(order, max(UNIT, float(np.median(order))))
    off = distance(given, settled(given, simulated, exact, before, allowed, engine.as_value), exact)
    if second is not None:
        other = distance(given, second.reshape(simulated.shape) if len(rows) == len(second) else second[rows], exact)
        simulated, off = (second.reshape(simulated.shape), other) if np.median(other) < np.median(off) else (simulated, off)
    rounding = distance(simulated, exact, exact)
    allowed = np.maximum(allowed, chained(op, engine.rules, alone) * rounding)
    found = Operation(point, op, args, given, rows, exact, simulated, off, allowed, rounding, alone)
    if found.fits:
        found.exact = found.simulated = None
    return found


def chained(op: str, rules: Contract, alone: bool = True) -> float:
    """How much of the contract's rounding an operation may be off by, since it rounds more than once.

    Args:
        alone: whether it is one operation, of inputs that are the trace's own.
    """
    if op == "attend" and rules.flash and rules.values != "f32":
        return FUSED
    # halves of halves: probabilities, and in flash attention sums; angles; values between operations
    return 1 / CHAIN if op == "attend" or (rules.values != "f32" and (op == "rope" or not alone)) else 0.0


def shadow_of(given: Trace, judges: Judges, config: ModelConfig) -> list[Operation]:
    """Every operation of the trace that can be compared, in the order of the pass."""
    return shadow_and_values(given, judges, config)[0]


def shadow_and_values(given: Trace, judges: Judges, config: ModelConfig) -> tuple[list[Operation], Trace]:
    """The same, and what the contract gives at each point on the trace's own inputs, as a trace of the same positions."""
    shadow = TraceShadow(judges, given)
    cache = shadow.new_cache(config, len(given.tokens))
    last = "logits" in given and len(given["logits"].positions) == 1 and len(given.tokens) > 1
    contract, kept = str(judges.contract), {}

    def tap(point: str, x: Array) -> Array:
        expected = np.asarray(x.ways[1], np.float32)
        seen = len(shadow.operations)
        out = shadow.tap(point, x)
        if len(shadow.operations) > seen:
            rows, positions = shadow.operations[-1].rows, given[point].positions
            values = expected.reshape(len(expected), *given[point].values.shape[1:])[rows]
            kept[point] = Point(point, values, positions, "contract", contract)
        return out

    with np.errstate(all="ignore"):
        forward(shadow, config, given.tokens, cache, tap, last_only=last)
    return shadow.operations, Trace(kept, given.tokens, "contract", contract, config, {}, given.prompt)
