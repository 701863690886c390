"""What a layer is: it suspects, explains, and says how what it found is repaired."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase, tensors_of
from aprlab.onion.verdict import Finding


class Layer(ABC):
    """One skin of the onion.

    Attributes:
        name: as in `aprlab.onion.verdict.LAYERS`.
        kinds: kinds of deviation that this layer explains and repairs; every kind has one layer.
        shown: those of them whose found and expected values are short enough to be evidence.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    shown: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def suspect(self, case: FileCase) -> list[Deviation]:
        """What is not as it should be."""

    def explain(self, group: list[Deviation]) -> Finding:
        """One finding for deviations of one cause; the id of the catalogue is found elsewhere."""
        first = group[0]
        evidence: dict[str, Any] = {"count": len(group)} if len(group) > 1 else {}
        evidence |= first.evidence
        if first.kind in self.shown:
            evidence |= {"found": _brief(first.found), "expected": _brief(first.expected)}
        return Finding(
            first.layer, None, tensors_of(group), first.cause, evidence, min(d.confidence for d in group),
            harmless=all(d.harmless for d in group), ambiguous=any(d.ambiguous for d in group),
        )  # fmt: skip

    @abstractmethod
    def repair(self, draft: Draft, deviation: Deviation) -> None:
        """Fix one deviation of a kind of this layer in a draft; nothing where another fix took its tensor out."""


def _brief(value: Any) -> Any:
    if isinstance(value, list):
        return f"{len(value)} entries"
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int | float | str) and len(str(value)) < 80 else str(value)[:80]


__all__ = ["Layer"]
