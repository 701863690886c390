"""What a model gives step by step after a prompt, three ways, and how far a server's log-probabilities are from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aprlab.architectures import forward
from aprlab.engines.contracts import Contract
from aprlab.model.config import ModelConfig
from aprlab.onion.foreign_shadow import ORDERS, UNIT, Judges, TraceShadow
from aprlab.sources.server_answers import AnswerStep
from aprlab.tracing.comparisons import log_softmax
from aprlab.tracing.traces import Trace

RUNS = 4  # two runs that round alike, but add in another order, part by about what rounding does; 2.0 was seen, not more

_OTHERS = (
    Contract(), Contract("q8", "f16"), Contract("f16", "f16"), Contract("bf16", "bf16", values="bf16"),
    Contract("f16", "f16", values="f16"),
)  # fmt: skip


@dataclass(frozen=True)
class ExpectedSteps:
    """Log-probabilities after a prompt and each token of an answer, float64 ``(steps, V)`` each.

    Attributes:
        exact: in float64.
        simulated: by the declared contract.
        single: in plain float32.
        logits: of the declared contract, before they are normalised.
    """

    exact: np.ndarray
    simulated: np.ndarray
    single: np.ndarray
    logits: np.ndarray

    def off(self, step: int, top: Mapping[int, float]) -> float:
        """How far a server's figures are from the contract's: nats, as root of the mean square over the tokens it gives."""
        return distance_of(top, self.simulated[step])

    def allowed(self, step: int, top: Mapping[int, float]) -> float:
        """How far they may be: by the contract's rounding at this step or at most steps, and by the order of float32 sums."""
        at = [id for id, value in top.items() if np.isfinite(value)]
        rounding, order = (max(_rms(each[step, at]), typical) for each, typical in zip(self._parts, self._typical, strict=True))
        return max(RUNS * rounding, ORDERS * max(order, UNIT * self.exact.shape[1] ** 0.5))

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """What rounding does, and what the order of sums."""
        return self.simulated - self.exact, self.single - self.exact

    @cached_property
    def _typical(self) -> tuple[float, float]:
        """The same of the likeliest twenty, at the median step."""
        best = np.argsort(-self.exact, axis=1)[:, :20]
        halves = [[_rms(row[at]) for row, at in zip(each, best, strict=True)] for each in self._parts]
        return float(np.median(halves[0])), float(np.median(halves[1]))


def _rms(values: np.ndarray) -> float:
    """Root of the mean square; inf where one is not finite."""
    with np.errstate(all="ignore"):
        found = float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
    return found if np.isfinite(found) else float("inf")


def distance_of(top: Mapping[int, float], expected: np.ndarray) -> float:
    """Nats between a server's figures, those that are finite, and log-probabilities ``(V,)``; inf where it gives none."""
    given = {id: value for id, value in top.items() if np.isfinite(value)}
    if not given:
        return float("inf")
    return _rms(expected[list(given)] - np.array(list(given.values())))


def expected_steps(judges: Judges, config: ModelConfig, prompt: Sequence[int], answer: Sequence[int]) -> ExpectedSteps:
    """What the model gives after `prompt`, and after each token of `answer` but the last: ``len(answer)`` steps, at least one."""
    tokens = [*prompt, *answer[:-1]]
    shadow = TraceShadow(judges, Trace({}, tokens, "none", str(judges.contract), config, {}))
    with np.errstate(all="ignore"):
        logits = forward(shadow, config, tokens, shadow.new_cache(config, len(tokens)))
        ways = [np.asarray(way[len(prompt) - 1 :], np.float64) for way in logits.ways]
        exact, simulated, single = (log_softmax(way) for way in ways)
        return ExpectedSteps(exact, simulated, single, ways[1])


def fitting_other(
    judges: Judges, config: ModelConfig, prompt: Sequence[int], answer: Sequence[int], steps: Sequence[AnswerStep]
) -> Contract | None:
    """Another contract under which every step fits, or None."""
    for contract in _OTHERS:
        other = Judges(judges.model, contract)
        for some in ([0], [*answer, 0][: len(steps)]):  # most are told at the first step
            expected = expected_steps(other, config, prompt, some)
            if any(expected.off(n, steps[n].top) > expected.allowed(n, steps[n].top) for n in range(len(some))):
                break
        else:
            return contract
    return None


__all__ = ["RUNS", "ExpectedSteps", "distance_of", "expected_steps", "fitting_other"]
