"""What a run may lose when weights are held in other types: the run's own figures count in the verdict."""

from __future__ import annotations

import numpy as np

from aprlab.onion.file_case import FileCase
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism
from aprlab.tracing.golden_rule import Golden, GoldenOutcome

_PRODUCTS = 7  # of a layer: each adds its weights' error to the residual stream once
_ROOM = 2.0  # errors add up less evenly than independent ones
_TOKENS = 0.1  # nats; a token may change where two were nearly equal, not where the distributions are further apart


def allowed(case: FileCase, golden: Golden) -> tuple[float, float]:
    """Largest relative l2 distance and mean KL divergence (nats) of the logits that the weights' own losses explain.

    Independent relative errors e of all products add up to about ``e * sqrt(products)``; logits that far off, in every
    entry, cost half the square of that in KL.
    """
    assert case.ref is not None
    lost = [float(d.evidence.get("rel_l2", 0.0)) for d in case.deviations if d.kind == "encoding"]
    products = _PRODUCTS * case.ref.model.config.block_count + 2
    distance = _ROOM * max(lost, default=0.0) * float(np.sqrt(products))
    size = float(np.sqrt(np.mean(golden.logits.astype(np.float64) ** 2)))
    return distance, _ROOM * (distance * size) ** 2 / 2


def cost_finding(case: FileCase, golden: Golden, outcome: GoldenOutcome) -> Finding | None:
    """The finding that a run costs more than holding weights in other types allows; None where it does not."""
    distance, kl = allowed(case, golden)
    most = kl if outcome.tokens else min(kl, _TOKENS)
    if outcome.bitwise or (outcome.distance <= distance and outcome.kl <= most):
        return None
    evidence = outcome.to_json() | {"distance_allowed": distance, "kl_allowed": most}
    distances, kls = (outcome.distance, distance), (outcome.kl, most)
    (far, far_allowed), (nats, nats_allowed) = ([float(f"{x:.3g}") for x in pair] for pair in (distances, kls))
    cause = Mechanism(
        "forward.costs-too-much", {"distance": far, "allowed": far_allowed, "kl": nats, "kl_allowed": nats_allowed}
    )
    return Finding("forward", None, [], cause, evidence, 0.8, ambiguous=True)


__all__ = ["allowed", "cost_finding"]
