"""What a run may lose when weights are held in other types: the run's own figures count in the verdict.

How far the logits may be off, and what that may cost in KL divergence, depends on the model and on the pair of types. So it
is measured: the reference answers again, with random errors of exactly the size that each row of its weights has lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aprlab.engines.base import Array, Engine
from aprlab.engines.delegating import BorrowedEngine
from aprlab.errors import BROKEN
from aprlab.inference.session import Session
from aprlab.onion.file_case import FileCase, TensorMatch
from aprlab.onion.row_errors import RowErrors, row_errors
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism
from aprlab.tracing.golden_rule import Golden, GoldenOutcome

_RUNS = 3  # with random errors; they differ by a factor of two among themselves
_ROOM = 3.0  # times as far off as random errors: those of an encoder have something in common
_FLOOR = (2e-4, 1e-6)  # distance and KL (nats) that another order of float32 sums makes


class NoisyEngine(BorrowedEngine):
    """A healthy engine whose weights seem to have lost what a file's have: the same size of error in each row, at random.

    A row w with the error d gives ``(w + d) · x``; of a d that points anywhere, ``d · x`` has the standard deviation
    ``|d| |x| / √columns``.

    Args:
        inner: the reference's engine.
        errors: GGUF name -> what was lost, row by row.
        seed: of the random errors.
    """

    def __init__(self, inner: Engine, errors: Mapping[str, RowErrors], seed: int) -> None:
        super().__init__(inner, inner.model)
        self.errors, self.random = errors, np.random.default_rng(seed)

    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        out = self.inner.embed(tokens, weight)
        lost = self.errors.get(weight)
        return out if lost is None else self._with(out, lost.lengths[tokens][:, None] / np.sqrt(lost.columns))

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        out = self.inner.norm(x, weight, eps)
        lost = self.errors.get(weight)
        return out if lost is None else self._with(out, np.abs(self.to_numpy(out)) * lost.rel_l2)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        out = self.inner.matmul(x, weight, bias)
        lost = self.errors.get(weight)
        if lost is not None:
            sizes = np.linalg.norm(self.to_numpy(x).astype(np.float64), axis=1)
            out = self._with(out, sizes[:, None] * lost.lengths[None] / np.sqrt(lost.columns))
        lost = None if bias is None else self.errors.get(bias)
        return out if lost is None else self._with(out, lost.lengths / np.sqrt(lost.columns))

    def _with(self, x: Array, size: np.ndarray) -> Array:
        """x with normal errors of these standard deviations, which broadcast to its shape."""
        values = self.to_numpy(x)
        return self.from_numpy((values + self.random.standard_normal(values.shape) * size).astype(np.float32))


def losses(case: FileCase) -> dict[str, RowErrors]:
    """What each tensor has lost that the file holds otherwise than the reference, row by row."""
    found = {}
    for match in case.matches:
        errors = None if match.equal or match.of is None or match.kind is None else _errors(match)
        if errors is not None and np.isfinite(errors.dd).all() and errors.dd.any():
            assert match.true is not None
            found[match.true] = errors
    return found


def _errors(match: TensorMatch) -> RowErrors | None:
    if match.rows is None and match.of is not None and match.kind is not None:
        match.rows = row_errors(match.of, match.kind, match.piece.raw)
    return match.rows


def allowed(case: FileCase, golden: Golden) -> tuple[float, float]:
    """Largest relative l2 distance and mean KL divergence (nats) of the logits that the weights' own losses explain.

    As far as random errors of the same size take the reference's answer, the furthest of `_RUNS`, times `_ROOM`.
    """
    lost, most = losses(case), list(_FLOOR)
    for seed in range(_RUNS if lost else 0):
        engine = NoisyEngine(golden.session.engine, lost, seed)
        try:
            outcome = golden.measure(Session(engine, config=golden.session.config, tokenizer=golden.session.tokenizer))
        except BROKEN:
            return float("inf"), float("inf")
        if outcome.error is not None or not np.isfinite(outcome.distance):
            return float("inf"), float("inf")
        most = [max(most[0], outcome.distance * _ROOM), max(most[1], outcome.kl * _ROOM**2)]
    return most[0], most[1]


def measured(outcome: GoldenOutcome, golden: Golden, limits: tuple[float, float] | None = None) -> dict[str, Any]:
    """What the run cost, for `Verdict.cost`: the outcome, how many tokens are the reference's, and what is allowed."""
    agree = golden.steps
    if not outcome.bitwise:
        agree = sum(a == b for a, b in zip(outcome.chosen, golden.chosen, strict=False))
    found = outcome.to_json() | {"same_token": agree, "steps": golden.steps}
    return found if limits is None else found | {"distance_allowed": limits[0], "kl_allowed": limits[1]}


def cost_finding(cost: Mapping[str, Any]) -> Finding | None:
    """The finding that a run costs more than holding weights in other types allows; None where it does not.

    Where tokens differ within what is allowed, the finding is harmless, and says so.

    Args:
        cost: from `measured`, with limits.
    """
    near = {key: float(f"{cost[key]:.3g}") for key in ("distance", "distance_allowed", "kl", "kl_allowed")}
    if not cost["bitwise"] and (cost["distance"] > cost["distance_allowed"] or cost["kl"] > cost["kl_allowed"]):
        figures = {"distance": near["distance"], "allowed": near["distance_allowed"],
                   "kl": near["kl"], "kl_allowed": near["kl_allowed"]}  # fmt: skip
        return Finding("forward", None, [], Mechanism("forward.costs-too-much", figures), dict(cost), 0.8, ambiguous=True)
    if cost["tokens"]:
        return None
    steps = {"differ": cost["steps"] - cost["same_token"], "of": cost["steps"]}
    steps |= {"kl": near["kl"], "kl_allowed": near["kl_allowed"]}
    return Finding("forward", None, [], Mechanism("forward.answer-differs", steps), {}, harmless=True)


__all__ = ["NoisyEngine", "allowed", "cost_finding", "losses", "measured"]
