"""Which form of an operation in the catalogue gives the outputs that a shadow saw: one fault, then two on top of each other."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np

from aprlab import engines as all_engines
from aprlab.engines.base import Cache, Engine
from aprlab.engines.choice import is_small
from aprlab.errors import BROKEN
from aprlab.faults import Fault
from aprlab.faults.apply import for_other_engines, misread
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.shadow import Call, Group, Shadow
from aprlab.quants import REGISTRY, Quant
from aprlab.quants.types import TensorType

_KEPT: list[tuple[Model, tuple[object, ...], dict[tuple[str, ...], Engine | None]]] = []


def kept_engines(model: Model, *key: object) -> dict[tuple[str, ...], Engine | None]:
    """Engines with faults of the catalogue over a small model, kept for the next suspect; none are kept of large ones.

    Args:
        model, key: what they are over, and how they are made: kind, threads, contract.
    """
    if not is_small(model):
        return {}
    for known, made, kept in _KEPT:
        if known is model and made == key:
            return kept
    _KEPT[:] = [(model, key, {})]
    return _KEPT[0][2]


class OperationSearch:
    """Faults of the catalogue around a healthy engine of the same kind: do its operations give what was seen?

    Args:
        a: the reference.
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
        self._engines = kept_engines(a.model, kind, self.threads, a.engine.contract)
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
                if not same_values(out, call.out, call):
                    quick.add(group)
                    if group not in self.wrong:
                        return quick, set()  # it changes what is as it should be
                if group in quick and not same_values(out, given_by_candidate(call), call):
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
                if not same_values(self._again(engine, call, None), given_by_candidate(call), call):
                    return False
        return all(same_values(out, given_by_candidate(call), call) for call, out in self._every(engine))

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
            if not same_values(out, call.out, call):
                touched.add(call.group)
                if call.group not in self.wrong:
                    return touched, set()
            if not same_values(out, given_by_candidate(call), call):
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
                    q, k, v, layer, positions = call.args
                    at = np.arange(cache.length, cache.length + len(positions), dtype=np.int64)
                    return np.asarray(engine.to_numpy(engine.attend(q, k, v, cache, layer, at)))
                return np.asarray(engine.to_numpy(getattr(engine, call.op)(*call.args)))
        except BROKEN:
            return None


def given_by_candidate(call: Call) -> np.ndarray | None:
    """What the suspected side gave; None where it refused."""
    return call.out if call.difference is None else call.other


def same_values(out: np.ndarray | None, want: np.ndarray | None, call: Call) -> bool:
    if out is None or want is None:
        return out is want
    return out.shape == want.shape and np.array_equal(out, want, equal_nan=True)


def find_pair(guesses: OperationSearch, chosen: Sequence[Fault], pool: Sequence[Fault]) -> tuple[Fault, Fault] | None:
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
