"""A printout of llama.cpp's tensors compared with our own run, in the order of the graph: the first that is another, and why.

Of each tensor a printout has a few values and the sum. They are compared with what the model gives under the declared contract,
within the digits printed and within what the contract's rounding does to a run; nothing else of a tensor has been looked at, and
nothing that comes after the first difference can be judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprlab.architectures import forward
from aprlab.engines.base import Array
from aprlab.errors import UsageError
from aprlab.inference.session import Session
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.onion.foreign_forms import Form, forms, instead, tried
from aprlab.onion.foreign_shadow import ORDERS, UNIT, Judges, Operation, TraceShadow
from aprlab.onion.server_peeling import NUMBERS
from aprlab.onion.server_run import RUNS
from aprlab.sources.eval_callback import Printed, PrintoutSource
from aprlab.tracing.traces import Trace

# Steps of a layer that have the same input: where one of them is another, the others can still be judged.
SIBLINGS = ({"q", "k", "v"}, {"gate", "up"})
LARGEST = 1 << 25  # values of a matrix up to which names are looked for: an output head takes a second for each form
FEW = 4  # positions
TAIL = 4  # one printed value may be so many times further off than they are on average


@dataclass(frozen=True)
class Compared:
    """One printed tensor next to ours.

    Attributes:
        off, allowed: of the printed values, as root of the mean square.
        worst, worst_allowed: of the one value that is furthest off for what it may be.
        sum_off, sum_allowed: of the sum; 0 where it was not printed.
    """

    printed: Printed
    off: float
    allowed: float
    worst: float
    worst_allowed: float
    sum_off: float
    sum_allowed: float

    @property
    def fits(self) -> bool:
        return self.off <= self.allowed and self.worst <= self.worst_allowed and self.sum_off <= self.sum_allowed

    @property
    def figures(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {
            "line": self.printed.line, "values": len(self.printed.at), "off": self.off, "allowed": self.allowed,
            "furthest": self.worst, "furthest_allowed": self.worst_allowed,
        }  # fmt: skip
        if self.printed.sum is not None:
            found |= {"sum_off": self.sum_off, "sum_allowed": self.sum_allowed}
        return found


@dataclass
class PrintoutRun:
    """A run next to the printout, up to the first tensor that is another.

    Attributes:
        compared: those that were compared, in the order of the pass.
        operations: that end in the first one that is another and, where it has any, in its siblings (until then: those of the
            last one); their values are the printed ones, NaN elsewhere.
        named: forms that give what was printed there.
    """

    ids: list[int]
    compared: list[Compared] = field(default_factory=list)
    operations: list[tuple[Compared, Operation]] = field(default_factory=list)
    named: list[Form] = field(default_factory=list)

    @property
    def first(self) -> Compared | None:
        """The first tensor that is another, None where all are as they should be."""
        return next((one for one in self.compared if not one.fits), None)


class _Parted(Exception):
    """The rest of the pass says no more."""


def compare_printout(source: PrintoutSource, model: Model, prompt: str | Sequence[int], threads: int | None) -> PrintoutRun:
    """Run the prompt, and compare tensor by tensor.

    Raises:
        UsageError: the printout is of another number of tokens than the prompt has.
    """
    judges = Judges(model, source.contract)
    run = PrintoutRun(prompt_of(source, model, prompt, threads))
    printed = {tensor.point: tensor for tensor in source.tensors}
    shadow = TraceShadow(judges, Trace({}, run.ids, "none", str(source.contract), model.config, {}))

    def tap(point: str, x: Array) -> Array:
        shadow.tap(point, x)
        if point in printed:
            ways = [_rows(np.asarray(way), printed[point]) for way in x.ways]
            run.compared.append(_compare(printed[point], *ways))
            one = run.compared[-1], _operation(shadow, point, printed[point], x.ways, len(run.ids))
            if not run.operations or run.operations[0][0].fits:
                kept = [old for old in run.operations if _siblings(old[0].printed.point, point)]
                run.operations = [*kept, one] if one[0].fits else [one, *kept]
            else:
                run.operations.append(one)
        if run.first is not None and not _goes_on(run.first.printed.point, point, printed):
            raise _Parted
        return x

    try:
        with np.errstate(all="ignore"):
            forward(shadow, model.config, run.ids, shadow.new_cache(model.config, len(run.ids)), tap)
    except _Parted:
        run.named = _names(run, judges, model.config)
    return run


def _siblings(a: str, b: str) -> bool:
    """Whether two points of one layer have the same input."""
    (*at, step), (*there, other) = a.split("."), b.split(".")
    return at == there and any({step, other} <= steps for steps in SIBLINGS)


def _goes_on(first: str, point: str, printed: Mapping[str, Printed]) -> bool:
    """Whether a printed sibling of the first tensor that is another comes after this point."""
    order = list(printed)
    return point in printed and any(_siblings(first, name) for name in order[order.index(point) + 1 :])


def prompt_of(source: PrintoutSource, model: Model, prompt: str | Sequence[int], threads: int | None) -> list[int]:
    """The ids that were run: those that the text lists, else the prompt's, of as many as were printed and with these rows."""
    session = Session(model, threads=threads)
    tried: list[list[int]] = [list(source.ids)] if source.ids else []
    if not isinstance(prompt, str):
        tried.append([int(id) for id in prompt])
    elif not source.ids:
        tried.append(session.raw_tokens(prompt))  # as the program does it
        tried += [session.chat_tokens(prompt)] if not session.wants_raw else []
    session.engine.close()
    fitting = [ids for ids in tried if len(ids) == source.count and max(ids) < model.config.vocab_size]
    if not fitting:
        has = " or ".join(str(len(ids)) for ids in tried)
        said = f"holds a run of {source.count} tokens, the prompt has {has}; give the prompt that was run (--prompt)"
        raise UsageError(said, code="printout.other-prompt", path=source.file)
    embed = next((t for t in source.tensors if t.point == "embed"), None)
    if embed is not None and len(fitting) > 1:
        table = model.tensor("token_embd.weight")
        fitting.sort(key=lambda ids: float(np.abs(table.dequantise(np.array(ids)).reshape(-1)[embed.at] - embed.values).sum()))
    return fitting[0]


def _rows(way: np.ndarray, printed: Printed) -> np.ndarray:
    """Of a way ``(T, …)`` what was printed: all positions, or the last one; ``(P, …)`` in the printed shape."""
    return np.asarray(way[-printed.shape[0] :], np.float64).reshape(printed.shape)


def _compare(printed: Printed, exact: np.ndarray, simulated: np.ndarray, single: np.ndarray) -> Compared:
    with np.errstate(all="ignore"):
        rounding, order = (_by_position(way - exact) for way in (simulated, single))
        size = np.sqrt(np.mean(np.square(exact)))
        slack = np.maximum(RUNS * rounding, ORDERS * np.maximum(order, UNIT * size))  # (P,): of one value
        row = printed.at // max(1, exact[0].size)
        each = slack[row]
        delta = np.abs(simulated.reshape(-1)[printed.at] - printed.values)
        off = _finite(np.sqrt(np.mean(np.square(delta)))) if delta.size else 0.0
        allowed = (float(np.sqrt(np.mean(np.square(each)))) if delta.size else 0.0) + printed.half
        share = delta / (TAIL * each + printed.half)
        at = int(np.argmax(np.where(np.isfinite(share), share, np.inf))) if delta.size else 0
        worst = (_finite(delta[at]), float(TAIL * each[at] + printed.half)) if delta.size else (0.0, 0.0)
        return Compared(printed, off, allowed, *worst, *_sums(printed, exact, simulated, slack))


def _by_position(difference: np.ndarray) -> np.ndarray:
    """Root of the mean square at each position, at least that of most positions."""
    each = np.sqrt(np.mean(np.square(difference.reshape(len(difference), -1)), axis=1))
    return np.asarray(np.maximum(each, np.median(each)))


def _finite(x: Any) -> float:
    return float(x) if np.isfinite(x) else float("inf")


def _sums(printed: Printed, exact: np.ndarray, simulated: np.ndarray, slack: np.ndarray) -> tuple[float, float]:
    """How far the sum is off, and may be: rounding, and float32 sums of so many values one after another.

    What rounding does to the values of one position adds up as it does in our own run; it may be alike at all positions, since
    attention sums the same values at each.
    """
    if printed.sum is None:
        return 0.0, 0.0
    flat = simulated.reshape(-1)
    parts = np.cumsum(flat)
    adding = 4 * abs(float(np.cumsum(flat.astype(np.float32))[-1]) - parts[-1])
    adding += UNIT * float(np.abs(parts).max()) * flat.size**0.5
    each = np.abs((simulated - exact).reshape(len(exact), -1).sum(axis=1))
    typical = float(np.sqrt(np.mean(each**2)))
    columns = flat.size / len(slack)
    alike = columns if len(slack) < FEW else columns**0.5  # from few sums nothing is known of how errors of a row go together
    rounded = np.maximum(RUNS * np.maximum(each, typical), slack * alike).sum()
    return _finite(abs(parts[-1] - printed.sum)), float(adding + rounded + printed.half)


# ── the name ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _operation(shadow: TraceShadow, point: str, printed: Printed, ways: Sequence[np.ndarray], count: int) -> Operation:
    """The operation on our own inputs, which are the program's as far as was looked: all tensors before it agree."""
    op, args = shadow.last
    shape = ways[0].shape if ways[0].ndim > 1 else (len(ways[0]), 1)
    rows = np.arange(count - printed.shape[0], count)
    given = np.full(int(np.prod(printed.shape)), np.nan, np.float32)
    given[printed.at] = printed.values
    none = np.zeros(len(rows))
    exact, simulated = (np.asarray(way[-len(rows) :], np.float64) for way in ways[:2])
    given = given.reshape(len(rows), *shape[1:])
    return Operation(point, op, args, given, rows, exact, simulated, none, none, none, True, count)


def _names(run: PrintoutRun, judges: Judges, config: ModelConfig) -> list[Form]:
    """Forms of the operation that give the printed values and the sum; a fault of the catalogue gives those of siblings, too."""
    (first, operation), *others = run.operations
    if operation.op == "matmul" and judges.model.tensor(operation.args[1]).size > LARGEST:
        return []
    found = []
    for form in (*forms(operation, judges, config), *_numbers(operation)):
        beside = others if form.fault is not None else []
        if _gives(form, first, operation, judges) and all(_gives(form, one, other, judges) for one, other in beside):
            found.append(form)
    return found


def _gives(form: Form, compared: Compared, operation: Operation, judges: Judges) -> bool:
    shape = compared.printed.shape
    ways: list[np.ndarray] = []
    for engine in (judges.simulated, judges.exact, judges.single):  # most forms are nowhere near, by the first of them
        way = tried(form, engine, operation)
        if way is None:
            return False
        ways.append(np.asarray(way, np.float64).reshape(shape))
        if len(ways) == 1 and not _near(compared.printed, ways[0]):
            return False
    return _compare(compared.printed, ways[1], ways[0], ways[2]).fits


def _near(printed: Printed, values: np.ndarray) -> bool:
    """Whether the printed values are those to a tenth."""
    with np.errstate(all="ignore"):
        ours = values.reshape(-1)[printed.at]
        return bool(np.linalg.norm(ours - printed.values) <= 0.1 * np.linalg.norm(ours) + printed.half * len(ours))


def _numbers(operation: Operation) -> list[Form]:
    """Bases and epsilons that programs take for the model's; from six values of a row none can be fitted."""
    known = {"norm": ("eps", "rms_norm_eps", "norm-eps"), "rope": ("theta", "rope_theta", "rope-theta")}
    name, key, form = known.get(operation.op, ("", "", ""))
    return [Form(form, instead(**{name: value}), parameters={name: value}) for value in NUMBERS.get(key, ())]


__all__ = ["Compared", "PrintoutRun", "compare_printout", "prompt_of"]
