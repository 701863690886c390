"""Types that neither the label nor the size law tells: each possible one is run, and the model that speaks has the right ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from aprlab.onion.clock import Budget
from aprlab.onion.file_case import FileCase, TensorMatch
from aprlab.onion.fixes import Fix, drafted
from aprlab.onion.health import nats
from aprlab.onion.layers.dtype import wrong_label
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism
from aprlab.quants.types import TensorType

MOST = 12  # readings that are run
BETTER = 0.5  # of the nats of the second best reading; so much less, and there is no doubt


def settle_open_types(
    case: FileCase, engine: str | None = None, threads: int | None = None, budget: Budget | None = None
) -> float | None:
    """Give pieces of an unknown type the one with which the model speaks; in place.

    Args:
        case: without a reference.
        engine, threads: for the runs.
        budget: when it is over before all readings were run, the types stay open, and the budget is told.

    Returns:
        The nats of that reading, None where nothing was open or no reading stands out.
    """
    groups: dict[tuple[int, tuple[TensorType, ...]], list[TensorMatch]] = {}
    for match in case.matches:
        if match.kind is None and match.open_kinds:
            groups.setdefault((match.piece.code, match.open_kinds), []).append(match)
    readings = list(itertools.islice(_readings(groups), MOST + 1))
    if not 0 < len(readings) <= MOST:
        return None
    scores: list[float] = []
    for reading in readings:
        if budget is not None and budget.over:
            budget.leave_out(f"types that the bytes leave open were not all run ({len(scores)} of {len(readings)} readings)")
            _take(case, groups, None)
            return None
        _take(case, groups, reading)
        scores.append(nats(drafted(case, [_all_known(case)]), engine, threads))
    order = np.argsort(scores, kind="stable")
    best, second = scores[order[0]], scores[order[1]] if len(order) > 1 else np.inf
    if not np.isfinite(best) or not best < BETTER * second:
        _take(case, groups, None)
        return None
    _take(case, groups, readings[order[0]])
    return best


def _readings(groups: dict[tuple[int, tuple[TensorType, ...]], list[TensorMatch]]) -> Iterator[tuple[TensorType, ...]]:
    """One type for each group, in every combination."""
    if groups:
        yield from itertools.product(*(kinds for _, kinds in groups))


def _take(
    case: FileCase, groups: dict[tuple[int, tuple[TensorType, ...]], list[TensorMatch]], reading: tuple[TensorType, ...] | None
) -> None:
    """Let every piece of each group be of the reading's type (None: open again), with the deviations that follow."""
    open_ = {id(match) for matches in groups.values() for match in matches}
    case.deviations = [d for d in case.deviations if d.kind != "type" or id(d.match) not in open_]
    for n, matches in enumerate(groups.values()):
        for match in matches:
            match.kind = None if reading is None else reading[n]
            if (deviation := wrong_label(match)) is not None:
                case.deviations.append(deviation)


def _all_known(case: FileCase) -> Fix:
    """All that the layers know how to fix, as one."""
    cause = Mechanism("weights.values-differ")
    return Fix(Finding("weights", None, [], cause), [d for d in case.deviations if d.fixable])


__all__ = ["settle_open_types"]
