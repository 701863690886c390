"""What was done to a value of a file, and by how much: a list moved round, cut off, in another order; a text; a number."""

from __future__ import annotations

from typing import Any

from aprlab.formats.raw import MISSING, Wrong
from aprlab.onion.words import Mechanism


def difference(name: str, value: Any, expected: Any) -> tuple[Mechanism, dict[str, Any]]:
    """What was done to a field, and figures."""

    def cause(mechanism: str, **parameters: Any) -> Mechanism:
        return Mechanism(f"tokenizer.{mechanism}", {"field": name, **parameters})

    if value == MISSING:
        return cause("missing"), {}
    if isinstance(value, Wrong):
        return cause("wrong-kind", found=str(value)), {}
    if expected == MISSING:
        return cause("unexpected"), {}
    if isinstance(value, list) and isinstance(expected, list):
        evidence: dict[str, Any] = {"entries": len(value), "expected_entries": len(expected)}
        if len(value) == len(expected):
            differ = [n for n, (a, b) in enumerate(zip(value, expected, strict=True)) if a != b]
            evidence |= {"differing": len(differ), "first": differ[0]}
            if (shift := rotation(value, expected)) is not None:
                return cause("rotated", by=shift), evidence
            if sorted(map(str, value)) == sorted(map(str, expected)):
                return cause("reordered"), evidence
            return cause("entries-differ", differing=len(differ), of=len(expected)), evidence
        if not value:
            return cause("lost"), evidence
        return cause("cut-off" if value == expected[: len(value)] else "count-differs"), evidence
    if isinstance(value, str) and isinstance(expected, str) and len(expected) > 40:
        return cause("field-differs"), {"characters": len(value), "expected_characters": len(expected)}
    return cause("value-differs", found=value, expected=expected), {}


def rotation(value: list[Any], expected: list[Any]) -> int | None:
    """By how many places `expected` was moved round to give `value`; None where it was not. Linear in their length."""
    count = len(value)
    if not count or count != len(expected):
        return None
    # Knuth, Morris and Pratt: `expected` is sought in two copies of `value`, from the second place on.
    border = [0] * count
    at = 0
    for n in range(1, count):
        while at and expected[n] != expected[at]:
            at = border[at - 1]
        at += expected[n] == expected[at]
        border[n] = at
    at = 0
    for n in range(1, 2 * count - 1):
        item = value[n % count]
        while at and item != expected[at]:
            at = border[at - 1]
        at += item == expected[at]
        if at == count:
            return n - count + 1
    return None


__all__ = ["difference", "rotation"]
