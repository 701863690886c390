"""How likely a text is under a fault, whatever the program's temperature was, and under no fault that we know.

All in bits: how many it takes to spell the text for somebody who believes the hypothesis. A program's temperature is seldom
reported, so each of a small grid is as likely as the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aprlab.tracing.comparisons import log_softmax

TEMPERATURES = (0.0, 0.5, 1.0)  # 0 is greedy
SLIP = 0.05  # share of tokens at which a program's rounding, or a copied text, leaves the path; also what garbles a sampled one
DEAREST = 14.0  # bits that a token costs at most in `TextCost.mean`: less likely is as good as impossible, whichever fault it is
REPEATS = 0.75  # share that the null gives to tokens that the text has had


@dataclass(frozen=True, slots=True)
class TextCost:
    """What a text costs under one hypothesis.

    Attributes:
        mean: bits a token at temperature 1, each `DEAREST` at most.
        bits: of the whole text, at each of `TEMPERATURES`.
        rank: of the first token, 0 the likeliest.
    """

    mean: float
    bits: tuple[float, ...]
    rank: int

    @classmethod
    def of(cls, logits: np.ndarray, tokens: Sequence[int]) -> TextCost:
        """Of logits ``(T, V)``, row t before token t of `tokens`."""
        with np.errstate(all="ignore"):
            plain = log_softmax(logits).astype(np.float64) / np.log(2)
            here = -plain[np.arange(len(tokens)), list(tokens)]
        here = np.where(np.isfinite(here), here, np.inf)
        uniform = SLIP / logits.shape[-1]
        bits = []
        for temperature in TEMPERATURES:
            if temperature == 0:
                hit = logits.argmax(-1) == np.array(tokens)
                chance = (1 - SLIP) * hit + SLIP * np.exp2(-here)
            elif temperature == 1:
                chance = np.exp2(-here)
            else:
                with np.errstate(all="ignore"):
                    scaled = log_softmax(logits / np.float32(temperature)).astype(np.float64)
                    chance = np.exp(scaled[np.arange(len(tokens)), list(tokens)])
            chance = np.where(np.isfinite(chance), chance, 0) * (1 - SLIP) + uniform
            bits.append(float(-np.log2(chance).sum()))
        first = int((logits[0] > logits[0][tokens[0]]).sum())
        return cls(float(np.minimum(here, DEAREST).mean()), tuple(bits), first)


def first_step(logits: np.ndarray, tokens: Sequence[int], rest: float) -> TextCost:
    """Of the first step alone, logits ``(V,)``; `rest` bits are what the rest of the text is taken to cost."""
    cost = TextCost.of(logits[None], tokens[:1])
    mean = (cost.mean + DEAREST * (len(tokens) - 1)) / len(tokens)
    return TextCost(mean, tuple(bits + rest for bits in cost.bits), cost.rank)


def spoken(bits: Sequence[float], tokens: int) -> tuple[float, ...]:
    """`bits` of a text that a greedy run says word for word, whatever its ids are taken to be."""
    return (min(bits[0], -tokens * float(np.log2((1 - SLIP) ** 2))), *bits[1:])


def chosen_from(choices: int) -> tuple[float, ...]:
    """Bits of a text that is one of so many that a program can only say."""
    return (float(np.log2(choices)),) * len(TEMPERATURES)


def marginal(bits: Sequence[float]) -> float:
    """Bits of a text whose temperature is unknown: `bits` are those of `TEMPERATURES`."""
    least = min(bits)
    if not math.isfinite(least):
        return least
    return least - math.log2(sum(2.0 ** (least - each) for each in bits) / len(bits))


def null_bits(tokens: Sequence[int], surprise: np.ndarray) -> list[float]:
    """Bits of each token where nothing is known of the cause.

    Half as the healthy model's vocabulary has it (`surprise`, bits by token id), half any token at all; and garbage repeats
    itself, so tokens that were there get their share.
    """
    found: list[float] = []
    for n, token in enumerate(tokens):
        new = 0.5 * 2.0 ** -float(surprise[token]) + 0.5 / surprise.size
        repeated = REPEATS if n else 0.0
        again = sum(earlier == token for earlier in tokens[:n]) / n if n else 0.0
        found.append(-float(np.log2(repeated * again + (1 - repeated) * new)))
    return found
