"""Exhibits: instruments of the ticket's history, shown in notebook 05 next to the faulty ones that were used then.

No gate and no verdict of this package is measured with them. They take the self-test like every other instrument,
since a faulty one of each is in the catalogue (section G).
"""

from __future__ import annotations

import numpy as np

from aprlab.errors import UsageError
from aprlab.instruments.predicates import garbage

GARBAGE_STATUS = 3


def spread(values: np.ndarray, reference: np.ndarray) -> float:
    """Ratio of the standard deviations of two activations over the same positions.

    Args:
        values, reference: ``(T, n)``, T positions first.

    Raises:
        UsageError: different shapes.
    """
    if values.shape != reference.shape:
        message = f"unlike positions: {values.shape} against {reference.shape}"
        raise UsageError(message, code="instruments.unlike-positions")
    return float(np.std(values, dtype=np.float64) / np.std(reference, dtype=np.float64))


def status(text: str) -> int:
    """Exit status for an answer: 0, or `GARBAGE_STATUS` where it is garbage."""
    return GARBAGE_STATUS if garbage(text) else 0


def better(before: float, after: float) -> bool:
    """Whether a repair is kept as a candidate: it changed the distance at all.

    Only whole sets are judged by nearer or farther: of two faults that mask each other, each repaired alone makes things worse.

    Args:
        before, after: distance from the reference, before and after the repair.
    """
    return after != before
