"""How sure a ranking is: healthy, one fault of the catalogue, several of them, or none of these.

The likelihood of the text is no proof by itself: a fault that is not in the catalogue has neighbours that are, and one of eighty
sets always fits best. So the bits by which a set beats the null are discounted by what was measured on made answers, of known
faults, of faults left out of the catalogue, of healthy runs and of random words (docs/evidence.md, `docs/make/calibration.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.forensics.answer_scoring import Suspect

# What is believed before a text is read. Sets of several that were not tried are none of these.
PRIORS = {"healthy": 0.05, "fault": 0.50, "compound": 0.20, "none": 0.25}
# Measured; see above. A set's weight is 2 ** (DISCOUNT * bits that it saves); that of none of these is as if it saved TOLL bits
# and, of the text's bits under the null, the share RATE.
DISCOUNT, TOLL, RATE = 0.5, 6.0, 0.3

_WORDS = {"healthy": "healthy", "fault": "one fault of the catalogue", "compound": "several of them", "none": "none of these"}


@dataclass(frozen=True, slots=True)
class Posterior:
    """Chances that add up to 1.

    Attributes:
        healthy: nothing is broken.
        fault: it is one fault of the catalogue.
        compound: several of them at once, among those sets that were tried.
        none: none of these.
        sets: the sets of faults by their chance, likeliest first.
    """

    healthy: float
    fault: float
    compound: float
    none: float
    sets: tuple[tuple[tuple[str, ...], float], ...]

    @property
    def answer(self) -> str:
        """The likeliest: ``healthy``, ``fault``, ``compound`` or ``none``."""
        chances = {name: getattr(self, name) for name in PRIORS}
        return max(chances, key=lambda name: chances[name])

    @property
    def words(self) -> str:
        """All four in words, likeliest first."""
        chances = sorted(((getattr(self, name), words) for name, words in _WORDS.items()), reverse=True)
        return ", ".join(f"{words} {_percent(chance)}" for chance, words in chances)

    def to_json(self) -> dict[str, Any]:
        """Plain data; of the sets those with a chance of a thousandth and more."""
        return {"answer": self.answer} | {name: round(getattr(self, name), 4) for name in PRIORS} | {
            "sets": [[list(faults), round(chance, 4)] for faults, chance in self.sets if chance >= 0.001]
        }  # fmt: skip


def _percent(chance: float) -> str:
    return "< 1 %" if chance < 0.005 else "> 99 %" if chance > 0.995 else f"{chance:.0%}".replace("%", " %")


def posterior(
    null: float,
    healthy: float,
    suspects: Sequence[Suspect],
    *,
    discount: float = DISCOUNT,
    toll: float = TOLL,
    rate: float = RATE,
) -> Posterior:
    """What to believe of a text.

    Args:
        null, healthy: its bits where nothing is known of the cause, and under the healthy model.
        suspects: the sets that were tried; those whose likelihood is not known are left out.
        discount, toll, rate: see the constants of their names.
    """
    tried = [s for s in suspects if s.bits is not None]
    singles = max(1, sum(len(s.faults) == 1 for s in tried))
    pairs = sum(len(s.faults) > 1 for s in tried)
    none = PRIORS["none"] + (0 if pairs else PRIORS["compound"])
    weights = [np.log2(none) + discount * (toll + rate * null), np.log2(PRIORS["healthy"]) + discount * (null - healthy)]
    for suspect in tried:
        assert suspect.bits is not None
        alone = len(suspect.faults) == 1
        prior = PRIORS["fault"] / singles if alone else PRIORS["compound"] / pairs
        weights.append(np.log2(prior) + discount * (null - suspect.bits))
    found = np.exp2(np.array(weights) - max(weights))
    found /= found.sum()
    sets = sorted(zip((s.faults for s in tried), map(float, found[2:]), strict=True), key=lambda each: -each[1])
    fault = sum(chance for faults, chance in sets if len(faults) == 1)
    compound = sum(chance for faults, chance in sets if len(faults) > 1)
    return Posterior(float(found[1]), fault, compound, float(found[0]), tuple(sets))
