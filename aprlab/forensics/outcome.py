"""What a search gives: sets of faults in order, how sure that is, and the words for it."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.posterior import Posterior

FITS = 0.35  # a score below explains nothing; texts that no fault says reach 0.19 on the embedded model


@dataclass(repr=False)
class Forensics:
    """The ranking. `suspects` come best first; those that could not run come last, with their reason.

    `engine` ran them all, where `engine_asked` was asked for. `posterior` says how sure it is, or that it is none of these;
    `null_bits` is what the text costs where nothing is known of its cause.
    """

    saw: str
    saw_tokens: list[int]
    prompt: str
    healthy: Suspect
    suspects: list[Suspect] = field(repr=False)
    seconds: float = 0.0
    engine: str = ""
    engine_asked: str = ""
    posterior: Posterior | None = None
    null_bits: float = 0.0

    @property
    def best(self) -> Suspect | None:
        """The best explanation, or None where nothing fits: the first by its score, or a set that the text itself makes more
        likely than all the rest."""
        first = self.suspects[0] if self.suspects else None
        if first is not None and first.match is not None and first.match.score >= FITS:
            return first
        return self.likely

    @property
    def likely(self) -> Suspect | None:
        """The set that is likelier than everything else together, none of these included; None where there is none."""
        if self.posterior is None or not self.posterior.sets or self.posterior.sets[0][1] < 0.5:
            return None
        return next(s for s in self.suspects if s.faults == self.posterior.sets[0][0])

    @property
    def nearest(self) -> Suspect | None:
        """The set under which the text is likeliest, whether it fits or not; None where that was measured for none."""
        measured = [(s.bits, s) for s in self.suspects if s.bits is not None]
        return min(measured, key=lambda each: each[0])[1] if measured else None

    @property
    def margin(self) -> float:
        """How far the best set is above the best one that shares no fault with it."""
        if not self.suspects or self.suspects[0].match is None:
            return 0.0
        first = self.suspects[0]
        rivals = (s.match.score for s in self.suspects[1:] if s.match is not None and not set(s.faults) & set(first.faults))
        assert first.match is not None
        return first.match.score - max(rivals, default=0.0)

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if self.healthy.match is not None and self.healthy.match.prefix == 1:
            return "that is what the healthy model says"
        if self.best is None:
            return "nothing fits"
        assert self.best.match is not None
        if self.best.match.score < FITS:
            return f"{' + '.join(self.best.faults)} makes the text likely, but says something else ({self.best.match.score:.2f})"
        return f"{' + '.join(self.best.faults)} fits best ({self.best.match.score:.2f}, {self.margin:.2f} above the next other)"

    @property
    def belief(self) -> str:
        """How sure that is, in one line; '' where it was not measured."""
        if self.posterior is None:
            return ""
        near = self.nearest
        if self.posterior.answer != "none" or near is None or near.bits is None:
            return self.posterior.words
        each = near.bits / max(1, len(self.saw_tokens))
        return f"{self.posterior.words}; nearest by likelihood: {' + '.join(near.faults)}, {each:.1f} bits a token"

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json` and reports."""
        return {
            "saw": self.saw, "saw_tokens": self.saw_tokens, "prompt": self.prompt, "conclusion": self.conclusion,
            "posterior": self.posterior.to_json() if self.posterior is not None else None, "null_bits": round(self.null_bits, 3),
            "engine": self.engine, "engine_asked": self.engine_asked,
            "healthy": self.healthy.to_json(), "suspects": [s.to_json() for s in self.suspects], "seconds": self.seconds,
        }  # fmt: skip

    def rows(self, limit: int = 12) -> list[tuple[str, str, str, str]]:
        """The best as (faults, score, output, why), all text."""
        return [
            (" + ".join(s.faults), f"{s.match.score:.2f}", repr(s.text) + ("…" if s.cut else ""), s.match.why)
            for s in self.suspects[:limit]
            if s.match is not None
        ]

    def __repr__(self) -> str:
        return f"<Forensics of {self.saw!r}: {self.conclusion}{'; ' if self.belief else ''}{self.belief}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("faults", "score", "output", "why"))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        belief = f"<p>{html.escape(self.belief)}</p>" if self.belief else ""
        saw = f"<p>{html.escape(repr(self.saw))}: {html.escape(self.conclusion)}</p>"
        return f"{saw}{belief}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def ranked(suspects: Iterable[Suspect]) -> list[Suspect]:
    """Best first; equal scores: fewer faults first; then what could not run."""
    return sorted(suspects, key=lambda s: (s.match is None, -(s.match.score if s.match else 0), len(s.faults)))
