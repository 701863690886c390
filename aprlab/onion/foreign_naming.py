"""Which form of an operation gives what another program computed: the fault, or what can be said where none does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import FLOATS, Contract
from aprlab.model.config import ModelConfig
from aprlab.onion.foreign_forms import Form, again, forms, tried
from aprlab.onion.foreign_shadow import FUSED, ORDERS, UNIT, Judges, Operation, chained, distance, wrong

ROUGH = 0.1  # a form that is further off than this at most positions is not looked at again


@dataclass(eq=False)
class Named:
    """A fault that was found.

    Attributes:
        steps: points without their layers that it concerns, e.g. ``q_rope``.
        operations: those that are wrong.
        form: what gives the trace's values; None where nothing known does.
        same: names of other forms that give the same values.
    """

    steps: list[str]
    operations: list[Operation]
    form: Form | None = None
    same: list[str] = field(default_factory=list)


def gives(form: Form, operation: Operation, judges: Judges, engine: ContractEngine | None = None) -> bool:
    """Whether a form gives what the trace holds, within what the contract's rounding does to that form."""
    engine = engine if engine is not None else judges.simulated
    ways = [True, False] if operation.op == "attend" and engine.half_sums else [engine.half_sums]
    kept = engine.half_sums
    try:
        for halves in ways:
            engine.half_sums = halves
            if _gives(form, operation, judges, engine):
                return True
    finally:
        engine.half_sums = kept
    return False


def _gives(form: Form, operation: Operation, judges: Judges, engine: ContractEngine) -> bool:
    values = tried(form, engine, operation)
    if values is None:
        return False
    off = distance(operation.given, values, values)
    if not np.median(off) <= ROUGH:
        return False
    single, exact = tried(form, judges.single, operation), tried(form, judges.exact, operation)
    if single is None or exact is None:
        return False
    order, rounding = distance(single, exact, exact), distance(values, exact, exact)
    allowed = ORDERS * np.maximum(order, max(UNIT, float(np.median(order))))
    more = chained(operation.op, engine.rules, alone=False)  # ties are settled where an operation is judged, not for each form
    if engine.rules.values != "f32" and form.compute is not again:
        more = max(more, FUSED)  # a form changes a value that is rounded already, and it is rounded again
    with np.errstate(invalid="ignore"):  # of an operation without values there is no rounding
        allowed = np.maximum(allowed, more * rounding)
    if operation.op == "attend":
        allowed = np.maximum(allowed, operation.rounding)
    return not wrong(off, allowed, rounding).any()


# ── another contract ──────────────────────────────────────────────────────────────────────────────────────────────


def fitting_contract(wrong_ones: Sequence[Operation], judges: Judges) -> tuple[Contract, list[Operation]] | None:
    """The contract under which most of the operations that do not fit the declared one do, and those; None where none does.

    A contract holds for all operations of a kind. So one that leaves most of a kind's wrong steps wrong is none: it meets a
    few of them by chance.
    """
    best: tuple[Contract, list[Operation]] | None = None
    probes = {operation.step: operation for operation in wrong_ones}
    for contract in _contracts(judges.contract, {operation.op for operation in wrong_ones}):
        engine, plain = judges.by(contract), Form("as it is", again)
        steps = {step for step, operation in probes.items() if gives(plain, operation, judges, engine)}
        kinds = {probes[step].op for step in steps}
        touched = [step for step, operation in probes.items() if operation.op in kinds]
        if 2 * len(steps) <= len(touched) or (best is not None and len(steps) <= len({o.step for o in best[1]})):
            continue
        fit = [o for o in wrong_ones if o.step in steps and gives(plain, o, judges, engine)]
        if 2 * len(fit) > sum(o.op in kinds for o in wrong_ones):
            best = contract, fit
        if len(fit) == len(wrong_ones):
            return best
    return best


def explained_by_contract(operation: Operation, judges: Judges) -> bool:
    """Whether another contract than the declared one gives an operation."""
    plain = Form("as it is", again)
    return any(gives(plain, operation, judges, judges.by(contract)) for contract in _contracts(judges.contract, {operation.op}))


def _contracts(declared: Contract, operations: set[str]) -> list[Contract]:
    """Others that could explain it, the nearest to the declared one first."""
    activations = (*FLOATS, "q8") if "matmul" in operations else (declared.activations,)
    caches = FLOATS if "attend" in operations else (declared.cache,)
    flashes = (False, True) if "attend" in operations else (declared.flash,)
    found = [
        Contract(a, c, f, v)
        for v, a, c, f in product(FLOATS, activations, caches, flashes)
        if v == "f32" or a in (v, "q8")  # values of a type are not rounded to another float again
    ]
    names = ("activations", "cache", "flash", "values")
    return sorted(
        (c for c in found if c != declared), key=lambda c: sum(getattr(c, name) != getattr(declared, name) for name in names)
    )


# ── a fault ───────────────────────────────────────────────────────────────────────────────────────────────────────


def names(operations: Sequence[Operation], judges: Judges, config: ModelConfig) -> list[Named]:
    """The faults that give what is wrong, the one that explains most first; then what nothing explains, step by step.

    Args:
        operations: all of the trace; only those whose inputs are the trace's own can be named.
    """
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        if not operation.fits and operation.alone:
            groups.setdefault(operation.step, []).append(operation)
    right = {o.step: o for o in reversed(operations) if o.fits and o.alone}
    found: dict[tuple[str, str], tuple[Form, set[str]]] = {}
    for step, wrong_ones in groups.items():
        fitting = _fitting(wrong_ones, right.get(step), judges, config)
        if not fitting and any(not o.wrong.all() for o in wrong_ones):  # the rest of the positions may be computed rightly
            fitting = _fitting([where_wrong(o) for o in wrong_ones], None, judges, config)
        for form in fitting:
            key = form.name, str(sorted(form.parameters.items()))
            found.setdefault(key, (form, set()))[1].add(step)
    sound = [(form, steps) for form, steps in found.values() if _leaves(form, set(groups), right, judges)]
    return _cover(sound, groups)


def _fitting(wrong_ones: list[Operation], right: Operation | None, judges: Judges, config: ModelConfig) -> list[Form]:
    """Forms that give all the wrong ones, and the right one of the same step, too."""
    first, others = wrong_ones[0], [o for o in wrong_ones[1:] if o is not wrong_ones[-1]]
    found = []
    for form in forms(first, judges, config):
        if not gives(form, first, judges):
            continue
        last = wrong_ones[-1]
        mates = {(f.name, str(f.parameters)): f for f in forms(last, judges, config)} if last is not first else {}
        mate = mates.get((form.name, str(form.parameters)), form)
        if not gives(mate, last, judges):
            continue
        middle = others[len(others) // 2 : len(others) // 2 + 1]
        if not all(gives(form, o, judges) for o in middle if form.fault is not None):
            continue
        if form.fault is not None and right is not None and not gives(form, right, judges):
            continue  # a fault of the catalogue says itself where it is; it changes what is as it should be
        found.append(form)
    return found


def where_wrong(operation: Operation) -> Operation:
    """The operation at those positions alone at which it is wrong."""
    at = np.flatnonzero(operation.wrong)
    assert operation.exact is not None
    parts = ("given", "rows", "exact", "simulated", "off", "allowed", "rounding")
    return replace(operation, **{name: getattr(operation, name)[at] for name in parts})


def _leaves(form: Form, wrong_steps: set[str], right: dict[str, Operation], judges: Judges) -> bool:
    """Whether a fault of the catalogue leaves all other steps as they are."""
    if form.engine is None:
        return True
    others = [o for step, o in right.items() if step not in wrong_steps and step != "logits"]
    return all(gives(form, o, judges) for o in others)


def _cover(sound: list[tuple[Form, set[str]]], groups: dict[str, list[Operation]]) -> list[Named]:
    left, chosen = set(groups), []
    rest = list(sound)
    while left and rest:
        form, steps = max(rest, key=lambda pair: (len(pair[1] & left), pair[0].fault is not None, -len(pair[1])))
        if not steps & left:
            break
        same = [f.name for f, s in rest if f is not form and s & left == steps & left and f.name != form.name]
        here = [step for step in groups if step in steps & left]
        chosen.append(Named(here, [o for step in here for o in groups[step]], form, list(dict.fromkeys(same))))
        left -= steps
        rest = [(f, s) for f, s in rest if f is not form]
    return chosen + [Named([step], groups[step]) for step in groups if step in left]


# ── what is known where nothing gives it ──────────────────────────────────────────────────────────────────────────


def marks(operation: Operation) -> dict[str, Any]:
    """What an unexplained difference looks like: plain facts, the most telling first."""
    assert operation.simulated is not None
    given, expected = operation.given.astype(np.float64), operation.simulated.astype(np.float64)
    bad = np.flatnonzero(operation.wrong)
    rows = operation.rows[bad]
    facts: dict[str, Any] = {"positions": _span(rows) if len(rows) < len(operation.rows) else "all"}
    if not np.isfinite(given[bad]).all():
        return {**facts, "not_finite": int((~np.isfinite(given)).sum())}
    x, y = given[bad].reshape(len(bad), -1), expected[bad].reshape(len(bad), -1)
    delta, size = x - y, float(np.abs(y).max()) or 1.0
    with np.errstate(all="ignore"):
        if not x.any():
            facts["zeros"] = True
        elif len(bad) > 1 and np.abs(delta - delta[0]).max() < 1e-3 * np.abs(delta).max():
            facts["constant_added"] = True
        factor = float(np.vdot(x, y) / (np.vdot(y, y) or 1.0))
        if np.linalg.norm(x - factor * y) < 1e-3 * np.linalg.norm(x) and x.any():
            facts["scaled_by"] = round(factor, 6)
        if np.allclose(np.sort(x, axis=1), np.sort(y, axis=1), atol=1e-3 * size):
            facts["permuted"] = True
        elif np.allclose(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1), rtol=1e-3):
            facts["norm_kept"] = True
    each = np.abs(delta).max(0)
    channels = np.flatnonzero(each > 1e-3 * each.max())
    if len(channels) <= max(1, x.shape[1] // 16):
        facts["channels"] = channels.tolist()
    if given.ndim == 3:
        heads = np.flatnonzero(each.reshape(given.shape[1:]).max(1) > 1e-3 * each.max())
        if len(heads) < given.shape[1]:
            facts["heads"] = heads.tolist()
    return facts


def _span(rows: np.ndarray) -> str:
    whole = np.array_equal(rows, np.arange(rows[0], rows[-1] + 1))
    return f"{rows[0]}…{rows[-1]}" if whole and len(rows) > 1 else ", ".join(map(str, rows[:8].tolist()))
