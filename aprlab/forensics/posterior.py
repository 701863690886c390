"""How sure a ranking is: healthy, one fault of the catalogue, several of them, or none of these.

Two questions, one after the other. *Is it any of these at all?* A fault that is not in the catalogue has neighbours that
are, and of sixty sets one always fits best; so the likelihood of the text decides nothing by itself. What a right
explanation leaves of the text's bits, and what the best of wrong ones leaves, was measured on made answers: of known faults,
of faults left out of the catalogue, of healthy runs, and on random words (docs/evidence.md, `docs/make/calibration.py`).
*Then which?* By prior and likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aprlab.forensics.answer_scoring import Suspect

# What is believed before a text is read. Sets of several that were not tried are none of these.
PRIORS = {"healthy": 0.10, "fault": 0.45, "compound": 0.20, "none": 0.25}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured constants.

    Attributes:
        even, left, saved: the log-odds, at even priors, that the best set is a right explanation:
            ``even - left * share + saved * log2(1 + bits)``, where it leaves this share of the null's bits and saves so many.
        discount: a set's weight among the sets is its prior times ``2 ** (-discount * bits)``.
    """

    even: float
    left: float
    saved: float
    discount: float

    def log_odds(self, null: float, best: float) -> float:
        """See above, of the best set's and the null's bits."""
        share = min(2.0, best / max(null, 1e-9))
        return self.even - self.left * share + self.saved * math.log2(1 + max(0.0, null - best))


MEASURED = Calibration(even=2.62, left=4.82, saved=-0.03, discount=1.0)

_WORDS = {"healthy": "healthy", "fault": "one fault of the catalogue", "compound": "several of them", "none": "none of these"}


@dataclass(frozen=True, slots=True)
class Posterior:
    """Chances that add up to 1.

    Attributes:
        healthy: nothing is broken, or nothing that this prompt shows: sets that say the healthy words count here.
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


def _says_it(suspect: Suspect) -> bool:
    """Whether it says the text as far as it was seen."""
    return suspect.match is not None and suspect.match.prefix == 1


def posterior(null: float, healthy: Suspect, suspects: Sequence[Suspect], calibration: Calibration = MEASURED) -> Posterior:
    """What to believe of a text.

    Args:
        null: its bits where nothing is known of the cause.
        healthy: the healthy answer, with the text's likelihood.
        suspects: the sets that were tried; those whose likelihood is not known are left out.
        calibration: other constants.
    """
    assert healthy.bits is not None
    tried = [(s, s.bits) for s in suspects if s.bits is not None]
    singles = max(1, sum(len(s.faults) == 1 for s, _ in tried))
    several = sum(len(s.faults) > 1 for s, _ in tried)
    prior_none = PRIORS["none"] + (0 if several else PRIORS["compound"])
    best = min([healthy.bits, *(bits for _, bits in tried)])
    odds = calibration.log_odds(null, best) + math.log((1 - prior_none) / prior_none)
    none = 1 / (1 + math.exp(min(odds, 500.0)))

    def weight(prior: float, bits: float) -> float:
        return float(prior * 2.0 ** (-calibration.discount * (bits - best)))

    sound = weight(PRIORS["healthy"], healthy.bits)
    sets: list[tuple[tuple[str, ...], float]] = []
    for suspect, bits in tried:
        prior = PRIORS["fault"] / singles if len(suspect.faults) == 1 else PRIORS["compound"] / several
        if suspect.text == healthy.text or (_says_it(suspect) and _says_it(healthy)):
            sound += weight(prior, bits)
        else:
            sets.append((suspect.faults, weight(prior, bits)))
    total = (sound + sum(share for _, share in sets)) / (1 - none) or 1.0
    chances = sorted(((faults, share / total) for faults, share in sets), key=lambda each: -each[1])
    fault = sum(chance for faults, chance in chances if len(faults) == 1)
    compound = sum(chance for faults, chance in chances if len(faults) > 1)
    return Posterior(sound / total, fault, compound, 1 - sound / total - fault - compound, tuple(chances))
