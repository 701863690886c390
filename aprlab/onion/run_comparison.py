"""Where two runs part: the first trace point at which one leaves the other, each running by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aprlab.architectures import forward, points
from aprlab.engines.base import Array
from aprlab.inference.session import Session
from aprlab.tracing.traces import Point, Recorder

CLOSE = 2e-4  # relative l2 that float32 sums in another order may differ by, one operation
DECODED = 3  # passes of one token after the prompt


class _RunsParted(Exception):
    """Ends a pass: nothing behind the first difference is asked for."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__(found)
        self.found = found


def compare_runs(a: Session, b: Session, ids: Sequence[int], prompt: int | None = None) -> dict[str, Any] | None:
    """The first trace point at which b leaves a, each running by itself; None where they agree to the end.

    The first `prompt` ids go in at once, the others one by one (None: all at once).

    Bit for bit between engines of one name; else within what another order of float32 sums can make.
    """
    exact = a.engine.name == b.engine.name
    compared = 0
    mine, theirs = a.engine.new_cache(a.config, len(ids)), b.engine.new_cache(b.config, len(ids))
    head = len(ids) if prompt is None else prompt
    passes = [list(ids[:head]), *([token] for token in ids[head : head + DECODED])]
    done = 0
    for some in passes:
        recorder = Recorder(a.engine, points(a.config))
        forward(a.engine, a.config, some, mine, recorder)
        expected = recorder.points(done + len(some))

        def watch(point: str, x: Array, expected: dict[str, Point] = expected, done: int = done) -> Array:
            nonlocal compared
            if point in expected:
                compared += 1
                difference = difference_of(expected[point].values, b.engine.to_numpy(x), exact)
                if difference is not None:
                    difference["first_position"] = difference.get("first_position", 0) + done
                    stage = "decode" if done else "prefill"
                    raise _RunsParted({"point": point, **difference, "pass": stage, "points_equal_before": compared - 1})
            return x

        try:
            forward(b.engine, b.config, some, theirs, watch)
        except _RunsParted as parted:
            return parted.found
        done += len(some)
    return None


def difference_of(want: np.ndarray, got: np.ndarray, exact: bool) -> dict[str, Any] | None:
    """Figures of a difference, or None where there is none; other shapes of the same numbers are no difference yet."""
    if want.size != got.size:
        return {"shape": list(got.shape), "expected_shape": list(want.shape)}
    a, b = want.reshape(len(want), -1), got.reshape(len(want), -1)
    if np.array_equal(a, b, equal_nan=True):
        return None
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        norm = np.linalg.norm(x, axis=-1)
        each = np.linalg.norm(x - y, axis=-1) / np.where(norm > 0, norm, 1)
        each = np.where(np.isfinite(each), each, np.inf)
        total = float(np.linalg.norm(x - y) / (np.linalg.norm(x) or 1.0))
    if not exact and np.isfinite(total) and total < CLOSE:
        return None
    wrong = np.flatnonzero(each > (0 if exact else CLOSE))
    flat = {"rel_l2": total if np.isfinite(total) else float("inf"), "first_position": int(wrong[0]) if len(wrong) else 0}
    return {**flat, "position_0_equal": bool(each[0] <= (0 if exact else CLOSE)), "positions_wrong": len(wrong), "of": len(each)}
