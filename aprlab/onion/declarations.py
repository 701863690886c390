"""A dump that holds something else than its mapping declares: found by running the model, and trying what else it could be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprlab.model.config import ModelConfig
from aprlab.onion.foreign_shadow import Judges, distance
from aprlab.onion.source_run import run_with
from aprlab.tracing.traces import Point, Trace

UNLIKE, ALIKE = 0.3, 0.1  # relative l2: of two points of one model, and at most of a point under any contract


@dataclass(frozen=True)
class Mistake:
    """One wrong declaration.

    Attributes:
        declared: the point, as declared.
        found: what it is, in words of a mapping.
        off, off_as_declared: median distance from what the model gives there.
    """

    declared: str
    found: str
    off: float
    off_as_declared: float


def misdeclared(given: Trace, judges: Judges, config: ModelConfig) -> list[Mistake]:
    """Points that are nowhere near what the model gives there, and near what it gives elsewhere, or in another order.

    A fault that is real also leads away from the model, but not onto another of its points.
    """
    tokens = _other_tokens(given, judges)
    if tokens is not None:
        return [tokens]
    right = run_with(judges, config, given.tokens)
    found = []
    for point in given.points.values():
        expected = right[point.name].reshape(len(given.tokens), *point.values.shape[1:])
        as_declared = _median(point.values, expected[point.positions])
        if not as_declared > UNLIKE:
            continue
        tried = [(_median(values, other), what) for what, values, other in _readings(point, right, len(given.tokens))]
        off, what = min(tried, default=(np.inf, ""))
        if off < ALIKE:
            found.append(Mistake(point.name, what, off, as_declared))
    return found


def _median(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.median(distance(values, expected, expected)))


def _readings(point: Point, right: dict[str, np.ndarray], count: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What else an array could be: another point of its layer or the next, other positions, another order."""
    values, positions = point.values, point.positions
    size, own = values[0].size, right[point.name].reshape(count, -1)
    for name, array in right.items():
        if name != point.name and array[0].size == size and _near(name, point.name):
            yield name, values, array.reshape(count, *values.shape[1:])[positions]
    if len(positions) < count:
        for first in range(count - len(positions) + 1):
            if first != positions[0]:
                what = f"{point.name} at positions {first}…{first + len(positions) - 1}"
                yield what, values, own[first : first + len(positions)].reshape(values.shape)
    flat = values.reshape(-1)
    if values.ndim == 3 and len(positions) > 1:
        heads = flat.reshape(values.shape[1], len(positions), values.shape[2]).swapaxes(0, 1)
        yield f"{point.name}, layout heads-first", heads, own[positions].reshape(heads.shape)
    if len(positions) > 1:
        yield f"{point.name}, layout channels-first", flat.reshape(size, -1).T, own[positions]


def _near(name: str, declared: str) -> bool:
    """Of the same layer or a neighbour, or outside the layers."""
    numbers = [int(parts[1]) if len(parts := text.split(".")) == 3 else None for text in (name, declared)]
    a, b = numbers
    return a is None or b is None or abs(a - b) <= 1


def _other_tokens(given: Trace, judges: Judges) -> Mistake | None:
    """Where the embedding is that of other tokens than declared: which ones."""
    if "embed" not in given:
        return None
    point, declared = given["embed"], np.array(given.tokens)
    table = judges.model.tensor("token_embd.weight").dequantise()
    expected = table[declared[point.positions]]
    if not _median(point.values, expected) > UNLIKE:
        return None
    size = np.sum(np.square(table), axis=1)
    nearest = np.argmin(size - 2 * point.values @ table.T, axis=1)
    off = _median(point.values, table[nearest])
    if not off < ALIKE:
        return None
    return Mistake("tokens", f"a run of the tokens {nearest.tolist()}", off, _median(point.values, expected))
