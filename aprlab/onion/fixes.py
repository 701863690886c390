"""Repair as proof: fix, run again, and leave out every fix that was not needed.

A finding that cannot be fixed so that the golden rule holds again was no explanation. The search is over sets, since
two faults can mask each other: fixing one alone may make the answer worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aprlab.errors import AprlabError
from aprlab.model.model import Model
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.layers import OWNERS
from aprlab.onion.verdict import Finding, Repair
from aprlab.tracing.golden_rule import GoldenOutcome


@dataclass(eq=False)
class Fix:
    """What fixes one finding: its deviations, each by the layer that owns its kind."""

    finding: Finding
    deviations: list[Deviation]

    @property
    def label(self) -> str:
        """The finding's own: `naming/GH-190`, or the cause where no id is known."""
        return self.finding.label

    @property
    def possible(self) -> bool:
        """Whether it is known what should be there instead."""
        return all(d.fixable for d in self.deviations)


def drafted(case: FileCase, fixes: Sequence[Fix]) -> Model | AprlabError:
    """The file with these fixes as a model, or what a strict reader says to it."""
    draft = Draft(case)
    work = [d for fix in fixes for d in fix.deviations if d.fixable]
    for deviation in sorted(work, key=lambda d: d.kind != "span"):  # where bytes stand, before what they should be
        OWNERS[deviation.kind].repair(draft, deviation)
    try:
        model = draft.model()
        _ = model.config, model.tokenizer
        return model
    except AprlabError as error:
        return error


def ddmin(items: Sequence[Any], holds: Callable[[Sequence[Any]], bool]) -> list[Any]:
    """A smallest part of `items` for which `holds` is true, by delta debugging: no single item can be left out.

    `holds(items)` must be true. Zeller and Hildebrandt's algorithm, on sets of what is needed.
    """
    kept, parts = list(items), 2
    if holds([]):
        return []
    while len(kept) >= 2:
        size = -(-len(kept) // parts)
        chunks = [kept[n : n + size] for n in range(0, len(kept), size)]
        for n, chunk in enumerate(chunks):
            rest = [item for m, other in enumerate(chunks) if m != n for item in other]
            if holds(chunk):
                kept, parts = chunk, 2
                break
            if len(chunks) > 2 and holds(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(kept):
                break
            parts = min(len(kept), 2 * parts)
    return kept


@dataclass
class Search:
    """What the search found, and the runs before and after."""

    repair: Repair | None
    before: GoldenOutcome
    after: GoldenOutcome


def search(fixes: Sequence[Fix], measure: Callable[[Sequence[Fix]], GoldenOutcome], *, cost: bool) -> Search:
    """The smallest set of fixes under which the golden rule holds again.

    Args:
        fixes: all there are.
        measure: runs the golden rule with some of them.
        cost: the file is held in other types on purpose, so that logits can only be those of the fully fixed file.
    """
    order = {id(m): n for n, m in enumerate(fixes)}
    runs: dict[tuple[int, ...], GoldenOutcome] = {}

    def run(some: Sequence[Fix]) -> GoldenOutcome:
        key = tuple(sorted(order[id(m)] for m in some))
        if key not in runs:
            runs[key] = measure([fixes[n] for n in key])
        return runs[key]

    before, full = run([]), run(fixes)

    def holds(some: Sequence[Fix]) -> bool:
        out = run(some)
        if out.error is not None or not out.ids or not out.text:
            return False
        if not cost:
            return out.bitwise and out.tokens
        if full.bitwise:
            return out.bitwise and out.tokens == full.tokens
        same = (out.chosen, out.tokens, out.distance) == (full.chosen, full.tokens, full.distance)
        return full.logits is not None and same

    if full.error is not None or (not cost and not (full.bitwise and full.says_the_same)) or (cost and not holds(fixes)):
        return Search(None, before, full)
    kept = ddmin(fixes, holds)
    proof: dict[str, Any] = {"before": before.to_json(), "after": run(kept).to_json(), "sets_run": 0}
    if len(kept) > 1:
        alone = {m.label: run([m]).to_json() for m in kept}
        proof["one_at_a_time"] = alone
        worse = [m.label for m in kept if before.distance < run([m]).distance < float("inf")]
        if worse:
            proof["masking"] = worse  # fixing one of these alone takes the logits further from the truth
    unneeded = [m.label for m in fixes if all(m is not k for k in kept)]
    if unneeded:
        proof["not_needed_for_the_answer"] = unneeded
    minimal = all(not holds([m for m in kept if m is not left]) for left in kept)
    proof["sets_run"] = len(runs)
    return Search(Repair([m.label for m in kept], minimal, proof), before, run(kept))


__all__ = ["Fix", "Search", "ddmin", "drafted", "search"]
