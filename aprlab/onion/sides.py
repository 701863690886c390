"""Two engines (or sessions) on one model: operation by operation on the same input, so that inherited and introduced
error are told apart; prompt against decoding, position 0 against later ones.

An engine is a black box here. Its primitives are called with the reference's inputs and their results compared; which
class it is, or which fault somebody wrapped around it, is not looked at.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import engines as all_engines
from aprlab.architectures.qwen2 import forward
from aprlab.engines.base import Array, Cache, Engine
from aprlab.engines.wrapped import Wrapped
from aprlab.errors import BROKEN, AprlabError, UsageError
from aprlab.faults import FAULTS, Fault, session_with
from aprlab.faults.apply import for_other_engines, loop_of, misread
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.repairs import Mend, search
from aprlab.onion.verdict import Finding, Verdict, Word
from aprlab.quants import REGISTRY, Quant
from aprlab.quants.types import TensorType
from aprlab.tracing.golden_rule import MAX_TOKENS, Golden, Outcome, best_engine, is_small
from aprlab.tracing.traces import Point, Recorder

_CLOSE = 2e-4  # relative l2 that float32 sums in another order may differ by, one operation
_DECODED = 3  # passes of one token after the prompt
_TEXTS = (
    "What is 2+2?", "Add 12 and 345:\n\n  x = 7\r\n", "<|im_start|>user\nhello<|im_end|>\n", "naïve Übung, 你好", "don't   stop",
)  # fmt: skip


# ── where two runs part ───────────────────────────────────────────────────────────────────────────────────────────


def compare_runs(a: Session, b: Session, ids: Sequence[int], prompt: int | None = None) -> dict[str, Any] | None:
    """The first trace point at which b leaves a, each running by itself; None where they agree to the end.

    The first `prompt` ids go in at once, the others one by one (None: all at once).

    Bit for bit between engines of one name; else within what another order of float32 sums can make.
    """
    from aprlab.architectures.qwen2 import points

    exact = a.engine.name == b.engine.name
    found: list[dict[str, Any]] = []
    compared = 0
    mine, theirs = a.engine.new_cache(a.config, len(ids)), b.engine.new_cache(b.config, len(ids))
    head = len(ids) if prompt is None else prompt
    passes = [list(ids[:head]), *([token] for token in ids[head : head + _DECODED])]
    done = 0
    for some in passes:
        recorder = Recorder(a.engine, points(a.config))
        forward(a.engine, a.config, some, mine, recorder)
        due = recorder.points(done + len(some))

        def watch(point: str, x: Array, due: dict[str, Point] = due, done: int = done) -> Array:
            nonlocal compared
            if not found and point in due:
                compared += 1
                difference = _difference(due[point].values, b.engine.to_numpy(x), exact)
                if difference is not None:
                    difference["first_position"] = difference.get("first_position", 0) + done
                    stage = "decode" if done else "prefill"
                    found.append({"point": point, **difference, "pass": stage, "points_equal_before": compared - 1})
            return x

        forward(b.engine, b.config, some, theirs, watch)
        if found:
            return found[0]
        done += len(some)
    return None


def _difference(want: np.ndarray, got: np.ndarray, exact: bool) -> dict[str, Any] | None:
    """Figures of a difference, or None where there is none; other shapes of the same numbers are no difference yet."""
    if want.size != got.size:
        return {"shape": list(got.shape), "due_shape": list(want.shape)}
    a, b = want.reshape(len(want), -1), got.reshape(len(want), -1)
    if np.array_equal(a, b, equal_nan=True):
        return None
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        norm = np.linalg.norm(x, axis=-1)
        each = np.linalg.norm(x - y, axis=-1) / np.where(norm > 0, norm, 1)
        each = np.where(np.isfinite(each), each, np.inf)
        total = float(np.linalg.norm(x - y) / (np.linalg.norm(x) or 1.0))
    if not exact and np.isfinite(total) and total < _CLOSE:
        return None
    wrong = np.flatnonzero(each > (0 if exact else _CLOSE))
    flat = {"rel_l2": total if np.isfinite(total) else float("inf"), "first_position": int(wrong[0]) if len(wrong) else 0}
    return {**flat, "position_0_equal": bool(each[0] <= (0 if exact else _CLOSE)), "positions_wrong": len(wrong), "of": len(each)}


# ── the shadow ────────────────────────────────────────────────────────────────────────────────────────────────────

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


class _PairCache(Cache):
    """The reference's cache with the other side's beside it; what the other says of positions is noted."""

    def __init__(self, mine: Cache, other: Cache, note: Callable[[Any, Any], None]) -> None:
        super().__init__(mine.k, mine.v, mine.capacity, mine.length)
        self.other, self.note = other, note

    def positions(self, count: int) -> np.ndarray:
        due = super().positions(count)
        try:
            got: Any = self.other.positions(count)
        except AprlabError as error:
            got = error
        self.note(due, got)
        return due

    def advance(self, count: int) -> None:
        super().advance(count)
        self.other.advance(count)


class Shadow(Engine):
    """Runs the reference and, at each operation, the other engine on the very same input. What goes on is the reference's.

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
        due = np.array(self.a.to_numpy(out))
        call = Call(op, (op, _template(what), self.stage), args, due)
        try:
            with np.errstate(all="ignore"):
                got = np.array(self.b.to_numpy(other()))
            difference = _difference(due, got, self.exact)
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
        def note(due: Any, got: Any) -> None:
            wrong = None if np.array_equal(due, got) else {"at": "positions", "due": _ends(due), "seen": _ends(got)}
            other = got if isinstance(got, np.ndarray) else np.zeros(0)
            self.calls.append(Call("positions", ("positions", "", self.stage), (len(due),), due, other if wrong else None, wrong))

        return _PairCache(self.a.new_cache(config, capacity), self.b.new_cache(config, capacity), note)

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        out = self.a.embed(tokens, weight)
        return self._both("embed", weight, (tokens, weight), out, lambda: self.b.embed(tokens, weight))

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        out = self.a.norm(x, weight, eps)
        return self._both("norm", weight, (x, weight, eps), out, lambda: self.b.norm(self._give(x), weight, eps))

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        out = self.a.matmul(x, weight, bias)
        return self._both("matmul", weight, (x, weight, bias), out, lambda: self.b.matmul(self._give(x), weight, bias))

    def rope(self, x: Array, positions: np.ndarray, theta: float, style: str) -> Array:
        out = self.a.rope(x, positions, theta, style)
        what = f"{x.shape[1]} heads"
        return self._both(
            "rope", what, (x, positions, theta, style), out, lambda: self.b.rope(self._give(x), positions, theta, style)
        )

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        out = self.a.attend(q, k, v, cache, layer, positions)
        assert isinstance(cache, _PairCache)
        # The other side's own cache may stand elsewhere by now; it is asked at the positions that it believes in.
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


def _template(name: str) -> str:
    return re.sub(r"(?<=blk\.)\d+(?=\.)|(?<=layer )\d+", "N", name)


def _ends(positions: Any) -> Any:
    return [int(positions[0]), int(positions[-1])] if isinstance(positions, np.ndarray) and len(positions) else str(positions)


def shadow(a: Session, b: Engine, ids: Sequence[int], prompt: int, *, exact: bool) -> Shadow:
    """Run `ids` with the reference's config, the first `prompt` at once, the others one by one, and b in its shadow."""
    both = Shadow(a.engine, b, exact)
    cache = both.new_cache(a.config, len(ids))
    forward(both, a.config, ids[:prompt], cache)
    both.stage = "decode"
    for token in ids[prompt : prompt + _DECODED]:
        forward(both, a.config, [token], cache)
    return both


# ── hypotheses ────────────────────────────────────────────────────────────────────────────────────────────────────


_ENGINES: list[tuple[Model, tuple[object, ...], dict[tuple[str, ...], Engine | None]]] = []


def _kept_engines(model: Model, *key: object) -> dict[tuple[str, ...], Engine | None]:
    """Engines with faults of the catalogue over a small model, kept for the next suspect; none are kept of large ones.

    Args:
        model, key: what they are over, and how they are made: kind, threads, contract.
    """
    if not is_small(model):
        return {}
    for known, made, kept in _ENGINES:
        if known is model and made == key:
            return kept
    _ENGINES[:] = [(model, key, {})]
    return _ENGINES[0][2]


class _Guesses:
    """Faults of the catalogue around a healthy engine of the same kind: do its operations give what was seen?

    Args:
        a: the believed side.
        kind: engine to try them on, the suspected side's.
        seen: what was seen.
    """

    def __init__(self, a: Session, kind: str, seen: Shadow) -> None:
        self.model, self.config, self.kind, self.seen = a.model, a.config, kind, seen
        self.threads = a.engine.threads
        self.options = a.engine.alike
        self.healthy = a.engine if a.engine.name == kind else self._create(a.model)
        self.wrong = {c.group for c in seen.calls if c.difference is not None}
        self.most = 64 if is_small(a.model) else 2  # an engine may hold all weights, decoded
        self._engines = _kept_engines(a.model, kind, self.threads, a.engine.contract)
        # One operation of each sort, deep enough in the model that faults of some layers show: asked before all others.
        self.probes: dict[Group, list[Call]] = {}
        for call in seen.calls:
            if call.op not in ("attend", "positions"):
                self.probes.setdefault(call.group, []).append(call)
        for group, calls in self.probes.items():
            wrong = [c for c in calls if c.difference is not None][:2]
            chosen = {id(c): c for c in (*wrong, calls[0], calls[len(calls) // 2], calls[-1])}
            self.probes[group] = list(chosen.values())

    def _create(self, model: Model) -> Engine:
        return all_engines.create(self.kind, model, self.threads, **self.options)

    def engine(self, faults: Sequence[Fault]) -> Engine | None:
        """The healthy engine with these faults, None where they need another model."""
        key = tuple(f.id for f in faults)
        if key not in self._engines:
            if len(self._engines) >= self.most:
                self._engines.pop(next(iter(self._engines)))
            self._engines[key] = self._made(faults)
        return self._engines[key]

    def _made(self, faults: Sequence[Fault]) -> Engine | None:
        registry: Mapping[TensorType, Quant] = REGISTRY
        kinds = {t.type for t in self.model.tensors.values()}
        for fault in faults:
            if not fault.fits(self.model):
                return None
            registry = fault.registry(registry) if fault.registry is not None else registry
        runner = self.healthy
        if registry is not REGISTRY:
            if not any(registry.get(kind) is not REGISTRY.get(kind) for kind in kinds):
                return None
            if self.kind == "reference":
                wrong = misread(self.model, registry, as_floats=False)
            else:  # the way a session with these faults goes, so that the last bit can agree
                wrong = for_other_engines(self.model, [f for f in faults if f.registry is not None])
            runner = self._create(wrong)
        for fault in faults:
            runner = fault.engine(runner) if fault.engine is not None else runner
        return runner

    def touched(self, faults: Sequence[Fault]) -> tuple[set[Group], set[Group]]:
        """Groups in which these faults leave the healthy result, and those of them in which they give what was seen."""
        engine = self.engine(faults)
        if engine is None:
            return set(), set()
        quick, missed = set(), set()
        for group, calls in self.probes.items():
            for call in calls:
                out = self._again(engine, call, None)
                if not _equal(out, call.out, call):
                    quick.add(group)
                    if group not in self.wrong:
                        return quick, set()  # it changes what is as it should be
                if group in quick and not _equal(out, _seen_of(call), call):
                    missed.add(group)
        stateful = any(op in ("attend", "positions") for op, _, _ in self.wrong)
        if quick and quick <= missed and not stateful:
            return quick, set()
        if not quick and not stateful:
            return set(), set()
        return self._all(engine, skip=missed)

    def wholly(self, faults: Sequence[Fault]) -> bool:
        """These faults give everything that was seen, what was right included; the first that they do not give ends it."""
        engine = self.engine(faults)
        if engine is None:
            return False
        for group in sorted(self.probes, key=lambda group: group not in self.wrong):
            for call in self.probes[group]:
                if not _equal(self._again(engine, call, None), _seen_of(call), call):
                    return False
        return all(_equal(out, _seen_of(call), call) for call, out in self._every(engine))

    def _every(self, engine: Engine, skip: Container[Group] = ()) -> Iterator[tuple[Call, np.ndarray | None]]:
        """What this engine gives for each operation that was seen, one after the other with a cache of its own."""
        cache = engine.new_cache(self.config, sum(c.args[0] for c in self.seen.calls if c.op == "positions"))
        pending = 0
        for call in self.seen.calls:
            if call.op == "positions":
                cache.advance(pending)
                pending = call.args[0]
            if call.group not in skip:
                yield call, self._again(engine, call, cache)

    def _all(self, engine: Engine, skip: set[Group]) -> tuple[set[Group], set[Group]]:
        touched, missed = set(skip), set(skip)
        for call, out in self._every(engine, skip):
            if not _equal(out, call.out, call):
                touched.add(call.group)
                if call.group not in self.wrong:
                    return touched, set()
            if not _equal(out, _seen_of(call), call):
                missed.add(call.group)
        return touched, touched - missed

    def _again(self, engine: Engine, call: Call, cache: Cache | None) -> np.ndarray | None:
        try:
            with np.errstate(all="ignore"):
                if call.op == "positions":
                    assert cache is not None
                    return cache.positions(call.args[0])
                if call.op == "attend":
                    assert cache is not None
                    q, k, v, layer, due = call.args
                    at = np.arange(cache.length, cache.length + len(due), dtype=np.int64)
                    return np.asarray(engine.to_numpy(engine.attend(q, k, v, cache, layer, at)))
                return np.asarray(engine.to_numpy(getattr(engine, call.op)(*call.args)))
        except BROKEN:
            return None


def _seen_of(call: Call) -> np.ndarray | None:
    """What the suspected side gave; None where it refused."""
    return call.out if call.difference is None else call.other


def _equal(out: np.ndarray | None, want: np.ndarray | None, call: Call) -> bool:
    if out is None or want is None:
        return out is want
    return out.shape == want.shape and np.array_equal(out, want, equal_nan=True)


@dataclass(eq=False)
class _Part:
    """Something that differs between two sides, and how to put it right on the broken one."""

    finding: Finding
    groups: set[Group] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: bool = False
    data: tuple[str, ...] = ()
    loop: bool = False


class Mixed(Engine):
    """The broken engine with some operations taken from the sound one: the repair of a run."""

    def __init__(self, broken: Engine, sound: Engine, groups: set[Group]) -> None:
        super().__init__(broken.model, broken.threads)
        self.broken, self.sound, self.groups = broken, sound, groups
        self.name = broken.name  # type: ignore[misc]
        self.contract = broken.contract
        self._sound_cache = any(op in ("positions", "attend") for op, _, _ in groups)

    def _pick(self, op: str, what: str, count: int) -> Engine:
        stage = "prefill" if count > 1 else "decode"
        return self.sound if (op, _template(what), stage) in self.groups else self.broken

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

    def rope(self, x: Array, positions: np.ndarray, theta: float, style: str) -> Array:
        return self._pick("rope", f"{x.shape[1]} heads", len(x)).rope(x, positions, theta, style)

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


def _engine_parts(a: Session, b: Session, seen: Shadow) -> list[_Part]:
    """Findings about operations: faults of the catalogue that give what was seen, exactly; then what is left."""
    wrong = [c for c in seen.calls if c.difference is not None]
    groups = {c.group for c in wrong}
    parts: list[_Part] = []
    if not groups:
        return parts
    guesses = _Guesses(a, b.engine.name, seen)
    holders: list[tuple[Fault, set[Group]]] = []
    partial: list[Fault] = []
    for fault in FAULTS.values():
        if fault.engine is None and fault.registry is None:
            continue
        touched, held = guesses.touched([fault])
        if touched and touched == held:
            holders.append((fault, touched))
        elif touched and touched <= groups:
            partial.append(fault)
    left, chosen = set(groups), []
    while holders and left:
        fault, marks = max(holders, key=lambda pair: (len(pair[1] & left), -len(pair[1])))
        if not marks & left:
            break
        chosen.append((fault, marks, [f.id for f, m in holders if f is not fault and m == marks]))
        left -= marks
        holders = [(f, m) for f, m in holders if f is not fault]
    if left:
        own = [f for f, _, _ in chosen]
        pair = _pair(guesses, own, [*own, *(f for f, _ in holders), *partial])
        if pair is not None:
            chosen = [(f, guesses.touched([f])[0] or groups, []) for f in pair]
            left = set()
    for fault, marks, same in chosen:
        evidence = _figures([c for c in wrong if c.group in marks])
        if same:
            evidence["computes_the_same_as"] = same
        tensors = _weights([c for c in wrong if c.group in marks])
        parts.append(_Part(Finding(fault.layer, fault.id, tensors, fault.title, evidence), marks))
    if left:
        rest = [c for c in wrong if c.group in left]
        evidence = _figures(rest)
        layer, how = _guess_layer(a, b, rest)
        parts.append(_Part(Finding(layer, None, _weights(rest), how, evidence, 0.8), left))
    return parts


def _pair(guesses: _Guesses, chosen: Sequence[Fault], pool: Sequence[Fault]) -> tuple[Fault, Fault] | None:
    """Two faults on top of each other that give exactly what was seen; those that explain a part come first."""
    unique = list({f.id: f for f in pool}.values())
    own = {f.id for f in chosen}
    ranked = sorted(((f, g) for f in unique for g in unique if f is not g), key=lambda p: -sum(x.id in own for x in p))
    deadline = time.process_time() + 20
    for f, g in ranked:
        if time.process_time() > deadline:
            return None
        if guesses.wholly([f, g]):
            return f, g
    return None


def _figures(calls: list[Call]) -> dict[str, Any]:
    """Where operations differ on the same input: how many, the first, prompt or decoding, position 0 or later."""
    first = calls[0]
    found: dict[str, Any] = {
        "operations": sorted({c.op for c in calls}),
        "calls": len(calls),
        "introduced_at": {"operation": first.op, **(first.difference or {})},
        "in_prefill": any(c.group[2] == "prefill" for c in calls),
        "in_decode": any(c.group[2] == "decode" for c in calls),
    }
    zero = [
        c.difference["position_0_equal"] for c in calls if c.difference and "position_0_equal" in c.difference and len(c.out) > 1
    ]
    if zero:
        found["position_0_equal"] = all(zero)
    return found


def _weights(calls: list[Call]) -> list[str]:
    return list(dict.fromkeys(c.args[1] for c in calls if c.op in ("embed", "norm", "matmul")))


def _guess_layer(a: Session, b: Session, calls: list[Call]) -> tuple[str, str]:
    """Layer and words for operations that no known fault explains."""
    ops = {c.op for c in calls}
    kinds = {a.model.tensors[c.args[1]].type.name for c in calls if c.op in ("embed", "matmul") and c.args[1] in a.model.tensors}
    constant = [c for c in calls if c.op == "matmul" and c.other is not None and len(c.out) > 1 and _constant(c)]
    if constant and len(constant) == sum(c.op == "matmul" and len(c.out) > 1 for c in calls) and ops == {"matmul"}:
        return "weights", "products differ by one constant vector at every position: a bias"
    if ops <= {"embed", "matmul"}:
        return "decode", f"products with weights of type {', '.join(sorted(kinds))} differ on the same input"
    return "forward", f"{', '.join(sorted(ops))} differ{'s' if len(ops) == 1 else ''} on the same input"


def _constant(call: Call) -> bool:
    assert call.other is not None
    delta = call.other.astype(np.float64) - call.out
    scale = np.abs(delta).max() or 1.0
    return bool(np.abs(delta - delta[0]).max() < 1e-4 * scale)


# ── numbers and words ─────────────────────────────────────────────────────────────────────────────────────────────


def _config_parts(a: Session, b: Session) -> list[_Part]:
    """Fields of the config that differ, put together by the faults that set them so."""
    differ = {
        f.name: getattr(b.config, f.name) for f in fields(ModelConfig) if getattr(a.config, f.name) != getattr(b.config, f.name)
    }
    return _records(a.config, differ, "config", lambda fault: fault.config)


def _data_parts(a: Session, b: Session) -> list[_Part]:
    """Fields of the tokenizer data that differ."""
    left, right = a.model.tokenizer, b.model.tokenizer
    differ = {f.name: getattr(right, f.name) for f in fields(type(left)) if getattr(left, f.name) != getattr(right, f.name)}
    return _records(left, differ, "tokenizer", lambda fault: fault.tokenizer)


def _records(due: Any, differ: dict[str, Any], layer: str, seam: Callable[[Fault], Any]) -> list[_Part]:
    parts: list[_Part] = []
    left = dict(differ)
    for fault in FAULTS.values():
        change = seam(fault)
        if change is None or not left:
            continue
        try:
            after = change(due)
        except (AprlabError, ValueError):
            continue
        changed = {f.name: getattr(after, f.name) for f in fields(type(due)) if getattr(after, f.name) != getattr(due, f.name)}
        if changed and all(name in left and left[name] == value for name, value in changed.items()):
            found = {name: _brief(value) for name, value in changed.items()}
            evidence = {"seen": found, "due": {name: _brief(getattr(due, name)) for name in changed}}
            parts.append(_Part(Finding(fault.layer, fault.id, [], fault.title, evidence), data=tuple(changed)))
            for name in changed:
                left.pop(name)
    for name, value in left.items():
        evidence = {"seen": _brief(value), "due": _brief(getattr(due, name))}
        parts.append(_Part(Finding(layer, None, [], f"{name} differs", evidence), data=(name,)))
    for part in parts:
        if layer == "config":
            part.config = {name: getattr(due, name) for name in part.data}
    return parts


def _brief(value: Any) -> Any:
    return (
        f"{len(value)} entries"
        if isinstance(value, list)
        else (value if len(str(value)) < 80 else f"{len(str(value))} characters")
    )


def _behaviour(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """What a tokenizer does: ids of some texts, bytes of every token, ids that end an answer."""
    step = max(1, tokenizer.vocab_size // 5000)
    return {
        "encoding": [tokenizer.encode(text) for text in _TEXTS],
        "text of tokens": [tokenizer.token_bytes(n) for n in range(0, tokenizer.vocab_size, step)],
        "ends of answers": sorted(tokenizer.eog),
    }


def _speech_parts(b: Session) -> list[_Part]:
    """What the tokenizer does otherwise than its own data demand: encoding, printing, stopping."""
    sound = Qwen2Tokenizer(b.model.tokenizer)
    due, seen = _behaviour(sound), _behaviour(b.tokenizer)
    wrong = {name for name in due if due[name] != seen[name]}
    if not wrong:
        return []
    known = [f for f in FAULTS.values() if f.prompt is not None]
    guesses: list[tuple[list[Fault], dict[str, Any]]] = []
    for some in [[f] for f in known] + [[f, g] for f in known for g in known if f is not g]:
        tokenizer = sound
        for fault in some:
            assert fault.prompt is not None
            tokenizer = fault.prompt(tokenizer)
        guesses.append((some, _behaviour(tokenizer)))
        if guesses[-1][1] == seen:
            break
    exact = [some for some, did in guesses if did == seen]
    if exact:
        out = []
        for fault in exact[0]:
            assert fault.prompt is not None
            did = _behaviour(fault.prompt(sound))
            evidence = {"differs_in": sorted(name for name in due if did[name] != due[name])}
            out.append(_Part(Finding(fault.layer, fault.id, [], fault.title, evidence), tokenizer=True))
        return out
    return [_Part(Finding("tokenizer", None, [], f"{', '.join(sorted(wrong))} differ from what its data demand"), tokenizer=True)]


def fed(loop: type[Session], a: Session, ids: Sequence[int]) -> list[tuple[int, list[int]]]:
    """What a loop feeds to a sound engine for a prompt: position of the first token and tokens of each pass."""
    watched = _Fed(a.engine)
    session = loop(watched, config=a.config, tokenizer=a.tokenizer)
    session.generate(list(ids), max_tokens=_FED)
    return watched.passes


_FED = 4  # tokens of an answer for which a loop is watched


class _Fed(Wrapped):
    """Notes tokens and positions of every pass."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.passes: list[tuple[int, list[int]]] = []

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        self.passes.append((-1, np.asarray(tokens).tolist()))
        return super().embed(tokens, weight)

    def rope(self, x: Array, positions: np.ndarray, theta: float, style: str) -> Array:
        self.passes[-1] = (int(positions[0]), self.passes[-1][1])
        return super().rope(x, positions, theta, style)


def _loop_parts(a: Session, b: Session, ids: Sequence[int]) -> list[_Part]:
    """What the loop around the engine feeds otherwise, each pass being right in itself."""
    if type(b) is type(a):
        return []
    due, seen = fed(type(a), a, ids), fed(type(b), a, ids)
    if due == seen:
        return []
    known = [f for f in FAULTS.values() if f.session is not None]
    at = next((n for n, (x, y) in enumerate(zip(due, seen, strict=False)) if x != y), min(len(due), len(seen)))
    evidence = {"differs_at_pass": at, **{w: _pass(p[at]) for w, p in (("due", due), ("seen", seen)) if at < len(p)}}
    for some in [[f] for f in known] + [list(pair) for pair in itertools.permutations(known, 2)]:
        if fed(loop_of(some), a, ids) == seen:
            return [_Part(Finding(f.layer, f.id, [], f.title, evidence), loop=True) for f in some]
    how = "the loop feeds other tokens, or at other positions"
    return [_Part(Finding("forward", None, [], how, evidence), loop=True)]


def _pass(one: tuple[int, list[int]]) -> str:
    start, tokens = one
    return f"{len(tokens)} token{'s' * (len(tokens) != 1)} from position {start} on, the last {tokens[-1]}"


@contextmanager
def _counting(counts: dict[str, int]) -> Iterator[None]:
    """Count how often each tensor is decoded, by whatever decoder: an engine that keeps its weights does it once."""
    kinds, left = [Tensor], {}
    for kind in kinds:
        kinds += kind.__subclasses__()
        if "dequantise" in kind.__dict__:
            left[kind] = kind.dequantise

    def counted(plain: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def dequantise(self: Tensor, rows: slice | np.ndarray | None = None) -> np.ndarray:
            counts[self.name] = counts.get(self.name, 0) + 1
            return plain(self, rows)

        return dequantise

    try:
        for kind, plain in left.items():
            kind.dequantise = counted(plain)  # type: ignore[method-assign]
        yield
    finally:
        for kind, plain in left.items():
            kind.dequantise = plain  # type: ignore[method-assign]


def decodings(engine: Engine, config: ModelConfig, token: int) -> dict[str, int]:
    """How often a second pass over one token decodes each weight that a first pass has decoded already."""
    counts: dict[str, int] = {}
    forward(engine, config, [token], engine.new_cache(config, 2))
    with _counting(counts):
        forward(engine, config, [token], engine.new_cache(config, 2))
    return counts


def _cost_parts(a: Session, b: Session, token: int) -> list[_Part]:
    """Work done in vain: values right, weights decoded anew at every product."""
    try:
        mine, theirs = decodings(a.engine, a.config, token), decodings(b.engine, a.config, token)
    except BROKEN:
        return []
    more = sorted(name for name, count in theirs.items() if count > mine.get(name, 0))
    if not more:
        return []
    id = None
    for fault in FAULTS.values():
        if fault.engine is not None and fault.silent and fault.fits(a.model) and a.engine.name == b.engine.name:
            try:
                if decodings(fault.engine(a.engine), a.config, token) == theirs:
                    id = fault
                    break
            except BROKEN:
                continue
    evidence = {"decoded_again": len(more), "due": sum(mine.values())}
    layer, how = (id.layer, id.title) if id is not None else ("forward", "weights are decoded anew at every product")
    return [_Part(Finding(layer, id.id if id is not None else None, more, how, evidence, harmless=True))]


# ── both together ─────────────────────────────────────────────────────────────────────────────────────────────────


def side(model: Model, spec: str | Session, threads: int | None = None) -> Session:
    """A session by name: an engine, or an engine with faults, ``reference+rope-norm``."""
    if isinstance(spec, Session):
        return spec
    name, *faults = spec.split("+")
    return session_with(model, faults, name, threads) if faults else Session(model, engine=name, threads=threads)


def peel_engines(
    model: str | Path | Model | None, specs: Sequence[str] | Sequence[Session], *, fast: bool, threads: int | None, prompt: str,
    max_tokens: int = MAX_TOKENS, progress: Callable[[str, Any], None] | None = None,
) -> Verdict:  # fmt: skip
    """`peel` for two engines on one model; the first is believed."""
    from aprlab.onion.peeling import reference_of

    if len(specs) != 2 or (model is None and not all(isinstance(s, Session) for s in specs)):
        raise UsageError("two engines and one model are needed")
    if model is None:
        a, b = specs
        assert isinstance(a, Session)
        assert isinstance(b, Session)
    else:
        believed = model if isinstance(model, Model) else reference_of(model).model
        a = side(believed, specs[0], threads)
        try:
            b = side(believed, specs[1], threads)
        except UsageError:
            raise
        except AprlabError as error:
            finding = Finding("config", None, [], f"does not run: {error.message}", {"tensor": error.tensor})
            return Verdict("broken", [finding], title=str(specs[1]))
    return peel_sessions(a, b, fast=fast, prompt=prompt, max_tokens=max_tokens, progress=progress)


def peel_sessions(
    a: Session, b: Session, *, fast: bool = False, prompt: str, max_tokens: int = MAX_TOKENS,
    progress: Callable[[str, Any], None] | None = None,
) -> Verdict:  # fmt: skip
    """What b does otherwise than a, on the same model."""
    return examine_sessions(a, b, fast=fast, prompt=prompt, max_tokens=max_tokens, progress=progress)[0]


def examine_sessions(
    a: Session, b: Session, *, fast: bool = False, prompt: str, max_tokens: int = MAX_TOKENS,
    progress: Callable[[str, Any], None] | None = None,
) -> tuple[Verdict, list[Mend], Callable[[Sequence[Mend]], Session]]:  # fmt: skip
    """`peel_sessions`, with the mends, and what gives b with some of them."""
    from aprlab.onion.peeling import Clock, tested

    clock = Clock(progress)
    with clock("instruments"):
        instruments, broken = tested()
    title = f"{b.engine.name} against {a.engine.name} on {a.model.path.name}"
    if broken:
        return Verdict("not-comparable", broken, instruments=instruments, seconds=clock, title=title), [], lambda some: b
    if a.engine.contract != b.engine.contract:
        how = f"unlike activation contracts: {a.engine.contract!r} against {b.engine.contract!r}; compare like with like"
        finding = Finding("instrument", None, [], how)
        return Verdict("not-comparable", [finding], instruments=instruments, seconds=clock, title=title), [], lambda some: b
    with clock("config"):
        parts = _config_parts(a, b)
    with clock("tokenizer"):
        words = [*_data_parts(a, b), *_speech_parts(b)]
    with clock("golden"):
        golden = golden_for(a, prompt, max_tokens)
    exact = a.engine.name == b.engine.name
    if not (fast and parts):
        with clock("forward"):
            seen = shadow(a, b.engine, golden.ids, len(golden.prompt_ids), exact=exact)
        with clock("hypotheses"):
            parts += _engine_parts(a, b, seen)
            parts += _cost_parts(a, b, golden.ids[0])
            parts += _loop_parts(a, b, golden.prompt_ids)
    parts += words
    findings = [part.finding for part in parts]
    bad = [part for part in parts if not part.finding.harmless]
    word: Word = "broken" if bad else "equivalent" if findings or not exact else "same"
    verdict = Verdict(word, findings, instruments=instruments, seconds=clock, title=title)
    mends, mended = _mends(a, b, bad)
    if fast:
        return verdict, mends, mended
    with clock("run"):
        try:
            verdict.first_divergence = compare_runs(a, b, golden.ids, len(golden.prompt_ids))
        except BROKEN as error:
            verdict.first_divergence = {"point": "none", "refuses": str(error)}
    with clock("repair"):
        if mends:
            verdict.repair = search(mends, lambda some: _measured(golden, mended, some), cost=not exact).mended
    return verdict, mends, mended


def _measured(golden: Golden, mended: Callable[[Sequence[Mend]], Session], some: Sequence[Mend]) -> Outcome:
    try:
        return golden.measure(mended(some))
    except AprlabError as error:
        return golden.measure(error)


def _mends(a: Session, b: Session, bad: list[_Part]) -> tuple[list[Mend], Callable[[Sequence[Mend]], Session]]:
    """A mend for each part that is bad, and what gives b with some of them."""
    parts = {id(part.finding): part for part in bad}

    def mended(some: Sequence[Mend]) -> Session:
        chosen = [parts[id(m.finding)] for m in some]
        groups = {g for part in chosen for g in part.groups}
        engine: Engine = Mixed(b.engine, a.engine, groups) if groups else b.engine
        config = replace(b.config, **{k: v for part in chosen for k, v in part.config.items()})
        data, sound = b.model.tokenizer, a.model.tokenizer
        names = [name for part in chosen if not part.config for name in part.data]
        data = replace(data, **{name: getattr(sound, name) for name in names})
        tokenizer = b.tokenizer
        speech = [p for p in bad if p.tokenizer]
        if names or any(p.tokenizer for p in chosen):
            tokenizer = Qwen2Tokenizer(data)
            for part in speech:
                if part not in chosen and part.finding.fault is not None:
                    prompt = FAULTS[part.finding.fault].prompt
                    tokenizer = prompt(tokenizer) if prompt is not None else tokenizer
        loop = type(a) if any(p.loop for p in chosen) else type(b)
        return _session(loop, engine, config, tokenizer, data)

    return [Mend(part.finding, []) for part in bad], mended


def _session(loop: type[Session], engine: Engine, config: ModelConfig, tokenizer: Qwen2Tokenizer, data: Any) -> Session:
    """A session over parts that are already at hand; its template comes from `data`."""
    import copy

    session = loop(engine, config=config, tokenizer=tokenizer)
    session.model = copy.copy(session.model)
    session.model.__dict__["tokenizer"] = data
    return session


_RUNS: list[tuple[Session, str, int, Golden]] = []


def golden_for(a: Session, prompt: str, max_tokens: int = MAX_TOKENS) -> Golden:
    """The believed side's answer, prompt at once and then token by token; the last is remembered."""
    for session, asked, length, golden in _RUNS:
        if session is a and (asked, length) == (prompt, max_tokens):
            return golden
    golden = Golden(a, engine=a.engine.name, threads=a.engine.threads, prompt=prompt, max_tokens=max_tokens, serial=True)
    _RUNS[:] = [(a, prompt, max_tokens, golden)]
    return golden


__all__ = ["Shadow", "best_engine", "compare_runs", "peel_engines", "peel_sessions", "shadow", "side"]
