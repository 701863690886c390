"""How well one answer explains a text: agreement counted in information.

A token that both texts share weighs as many bits as the healthy model is surprised by it, so that a shared ` helf` says much and
a shared full stop nothing. Added to that is how many bits likelier a fault makes the text itself.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aprlab.forensics.likelihood import marginal
from aprlab.inference.tokenizer import Qwen2Tokenizer

TELLING = 8.0  # bits of surprise from which a token counts as evidence
# Parts of the score and what they weigh; those of the answer, then that of the text itself under the fault.
WEIGHTS = {"tokens": 0.315, "pairs": 0.175, "prefix": 0.105, "rhythm": 0.105, "gain": 0.3}
GAIN = 8.0  # bits a token that count as a full explanation


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How well one output explains the text.

    Attributes:
        score: 0 to 1; 1 means the same tokens in the same order.
        tokens: share of the text's information that the output's tokens hold, in any order.
        pairs: the same for neighbouring tokens.
        prefix: share of the text's tokens that the output begins with.
        rhythm: likeness of the repetition: how often the token of one, two, … four steps before comes again.
        gain: by how many bits a token the fault makes the text likelier than the healthy model does; None where that was
            not measured, and then the other parts make the whole score.
        shared: tokens that both have and that surprise the healthy model by 8 bits or more, as text.
        misfit: bits a step by which log-probabilities that were seen differ from the fault's; None where only a text was seen.
    """

    score: float
    tokens: float
    pairs: float
    prefix: float
    rhythm: float
    gain: float | None
    shared: tuple[str, ...]
    misfit: float | None = None

    @property
    def why(self) -> str:
        """The score in words."""
        if self.misfit is not None:
            return f"log-probabilities {self.misfit:.3f} bits a step off"
        if self.prefix == 1:
            return "the same words, in the same order"
        parts = [f"shares {', '.join(map(repr, self.shared))}"] if self.shared else ["shares no rare token"]
        if self.prefix:
            parts.append(f"begins alike for {self.prefix:.0%}")
        parts += [f"order {self.pairs:.0%}", f"rhythm {self.rhythm:.0%}"]
        if self.gain is not None:
            parts.append(f"{abs(self.gain):.1f} bits a token {'likelier' if self.gain >= 0 else 'less likely'} than healthy")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Suspect:
    """One set of faults and what the model said under it.

    Attributes:
        faults: ids.
        text, tokens: the answer; empty where it could not run.
        match: how well it explains the text; None where it could not run.
        error: why it could not run.
        cut: why the answer was not heard to its end; '' where it was.
        moved: by how many bits the next token's distribution moved, at most, while the answer was still the healthy one
            (Kullback-Leibler divergence from the healthy distribution); what a gate on logits sees.
        seconds: processor time.
        costs: bits that the text itself costs under these faults, at each of `likelihood.TEMPERATURES`; empty where unknown.
        first_rank: of the text's first token at the first step, 0 the likeliest; None where unknown.
        flood: the id that programs said forever where these faults' logits are no numbers; None where they are numbers. Which of
            such faults lost them, no text can say.
    """

    faults: tuple[str, ...]
    text: str
    tokens: tuple[int, ...]
    match: AnswerScore | None
    error: str | None = None
    cut: str = ""
    moved: float = 0.0
    seconds: float = 0.0
    costs: tuple[float, ...] = ()
    first_rank: int | None = None
    flood: int | None = None

    @property
    def bits(self) -> float | None:
        """Bits that the text costs at an unknown temperature; None where that is not known."""
        return marginal(self.costs) if self.costs else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        row: dict[str, Any] = {
            "faults": list(self.faults), "text": self.text, "tokens": list(self.tokens), "error": self.error, "cut": self.cut,
            "moved": round(self.moved, 6) if np.isfinite(self.moved) else None,
        }  # fmt: skip
        if self.match is not None:
            row |= {"score": self.match.score, "why": self.match.why, "shared": list(self.match.shared)}
            row["parts"] = {name: getattr(self.match, name) for name in WEIGHTS}
        row |= {"costs": [round(bits, 3) if np.isfinite(bits) else None for bits in self.costs], "first_rank": self.first_rank}
        row["flood"] = self.flood
        return row | {"seconds": round(self.seconds, 3)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Suspect:
        """What `to_json` gave, but for what it rounds."""
        match = AnswerScore(row["score"], **row["parts"], shared=tuple(row["shared"])) if "score" in row else None
        moved = float("inf") if row["moved"] is None else row["moved"]
        costs = tuple(float("inf") if bits is None else bits for bits in row["costs"])
        return cls(
            tuple(row["faults"]), row["text"], tuple(row["tokens"]), match, row["error"], row["cut"], moved, row["seconds"],
            costs, row["first_rank"], row["flood"],
        )  # fmt: skip


class AnswerScorer:
    """Judges outputs against one text. `surprise` is the healthy model's, in bits, by token id: float64 ``(vocab,)``.

    Attributes:
        saw: ids of the text; the end of an answer where it is empty.
        telling: those that surprise the healthy model most.
    """

    def __init__(self, saw: str | Sequence[int], surprise: np.ndarray, tokenizer: Qwen2Tokenizer) -> None:
        self.text = saw if isinstance(saw, str) else None
        ids = tokenizer.encode(saw, parse_special=False) if isinstance(saw, str) else list(saw)
        # A model that ended at once said one thing, and that is a signature like any other: the end.
        self.end = [] if ids else [min(tokenizer.eog)]
        self.saw, self.surprise, self.tokenizer = ids or self.end, surprise, tokenizer
        self.telling = sorted({t for t in self.saw if surprise[t] >= max(TELLING, 0.9 * surprise[self.saw].max())})

    def judge(self, answer: Suspect, gain: float | None = None) -> AnswerScore:
        """How well an answer explains the text; `gain` as in `AnswerScore`.

        A pasted text is tokenised as text, which need not give the ids that a model chose one by one; so the answer's
        text goes the same way, and the better of both counts. Reports drop line ends, and blanks around an answer: where
        the pasted text has none, the answer is read without them, too.
        """
        best = self._judge(list(answer.tokens) or self.end, gain)
        if self.text is None or not self.text:
            return best
        shown = answer.text if "\n" in self.text else "".join(answer.text.splitlines()).strip()
        for text in dict.fromkeys((answer.text, shown)):
            whole = self.text.rstrip("\ufffd") or self.text  # a character may be cut at its end
            if text.startswith(whole):
                return replace(best, score=1.0, prefix=1.0)
            again = self._judge(self.tokenizer.encode(text, parse_special=False), gain)
            best = max(best, again, key=lambda match: match.score)
        return best

    def _judge(self, said: list[int], gain: float | None) -> AnswerScore:
        shared = Counter(self.saw) & Counter(said)
        total = sum(self.surprise[t] for t in self.saw)
        found = float(sum(self.surprise[t] * n for t, n in shared.items()) / total)
        prefix = next((n for n, (a, b) in enumerate(zip(self.saw, said, strict=False)) if a != b), min(len(self.saw), len(said)))
        parts = {
            "tokens": found,
            "pairs": self._pairs(said) if len(self.saw) > 1 else found,
            "prefix": prefix / len(self.saw),
            "rhythm": _likeness(rhythm(self.saw), rhythm(said)) * min(1.0, 2 * found),  # an empty rhythm fits everything
        }
        weighed = parts if gain is None else {**parts, "gain": min(1.0, max(0.0, gain / GAIN))}
        total = sum(WEIGHTS[name] for name in weighed)
        rare = sorted((t for t in shared if self.surprise[t] >= TELLING), key=lambda t: -self.surprise[t])
        score = 1.0 if prefix == len(self.saw) else sum(WEIGHTS[name] * value for name, value in weighed.items()) / total
        return AnswerScore(float(score), **parts, gain=gain, shared=tuple(self.tokenizer.decode([t]) for t in rare[:5]))

    def _pairs(self, said: list[int]) -> float:
        def pairs(tokens: list[int]) -> Counter[tuple[int, int]]:
            return Counter(itertools.pairwise(tokens))

        def weight(pair: tuple[int, int]) -> float:
            return float(self.surprise[pair[0]] + self.surprise[pair[1]])

        mine = pairs(self.saw)
        return sum(weight(p) * n for p, n in (mine & pairs(said)).items()) / sum(weight(p) * n for p, n in mine.items())


def rhythm(tokens: Sequence[int], reach: int = 4) -> list[float]:
    """How often a token is the one of 1, 2, … `reach` steps before, each as a share; and the share of distinct tokens."""
    n = len(tokens)
    back = [sum(a == b for a, b in zip(tokens, tokens[d:], strict=False)) / max(n - d, 1) for d in range(1, reach + 1)]
    return [*back, len(set(tokens)) / max(n, 1)]


def _likeness(a: list[float], b: list[float]) -> float:
    return 1 - float(np.abs(np.array(a) - np.array(b)).mean())
