"""Repair as proof: mend, run again, and leave out every mend that was not needed.

A finding that cannot be mended so that the golden rule holds again was no explanation. The search is over sets, since
two faults can mask each other: mending one alone may make the answer worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, UsageError
from aprlab.model.model import Model
from aprlab.onion.layers.base import Case, Deviation, Draft
from aprlab.onion.verdict import Finding, Mended
from aprlab.tracing.golden_rule import GoldenOutcome


@dataclass(eq=False)
class Mend:
    """What puts one finding right: its deviations."""

    finding: Finding
    deviations: list[Deviation]

    @property
    def label(self) -> str:
        """`naming/GH-190`, or layer and mechanism where no id is known."""
        return f"{self.finding.layer}/{self.finding.fault or self.finding.mechanism}"

    @property
    def possible(self) -> bool:
        """Whether it is known what should stand there instead."""
        return all(d.due is not None or d.what in ("seal", "extra") for d in self.deviations)


def drafted(case: Case, mends: Sequence[Mend]) -> Model | AprlabError:
    """The file with these mends as a model, or what a strict reader says to it."""
    draft = Draft(case)
    work = [d for mend in mends for d in mend.deviations if d.due is not None or d.what in ("seal", "extra")]
    for deviation in sorted(work, key=lambda d: d.what != "span"):  # where bytes stand, before what they should be
        draft.mend(deviation)
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
    """What the search found, and every set that was run on the way."""

    mended: Mended | None
    before: GoldenOutcome
    after: GoldenOutcome


def search(mends: Sequence[Mend], measure: Callable[[Sequence[Mend]], GoldenOutcome], *, cost: bool) -> Search:
    """The smallest set of mends under which the golden rule holds again.

    Args:
        mends: all there are.
        measure: runs the golden rule with some of them.
        cost: the file is held in other types on purpose, so that logits can only be those of the fully mended file.
    """
    order = {id(m): n for n, m in enumerate(mends)}
    runs: dict[tuple[int, ...], GoldenOutcome] = {}

    def run(some: Sequence[Mend]) -> GoldenOutcome:
        key = tuple(sorted(order[id(m)] for m in some))
        if key not in runs:
            runs[key] = measure([mends[n] for n in key])
        return runs[key]

    before, full = run([]), run(mends)

    def holds(some: Sequence[Mend]) -> bool:
        out = run(some)
        if out.error is not None or not out.ids or not out.text:
            return False
        if not cost:
            return out.bitwise and out.tokens
        same = (out.chosen, out.tokens, out.distance) == (full.chosen, full.tokens, full.distance)
        return full.logits is not None and same

    if full.error is not None or (not cost and not (full.bitwise and full.says_the_same)) or (cost and not holds(mends)):
        return Search(None, before, full)
    kept = ddmin(mends, holds)
    proof: dict[str, Any] = {"before": before.to_json(), "after": run(kept).to_json(), "sets_run": 0}
    if len(kept) > 1:
        alone = {m.label: run([m]).to_json() for m in kept}
        proof["one_at_a_time"] = alone
        worse = [m.label for m in kept if before.distance < run([m]).distance < float("inf")]
        if worse:
            proof["masking"] = worse  # mending one of these alone takes the logits further from the truth
    unneeded = [m.label for m in mends if all(m is not k for k in kept)]
    if unneeded:
        proof["not_needed_for_the_answer"] = unneeded
    minimal = all(not holds([m for m in kept if m is not left]) for left in kept)
    proof["sets_run"] = len(runs)
    return Search(Mended([m.label for m in kept], minimal, proof), before, run(kept))


def repair(
    candidate: str | Path, output: str | Path, reference: str | Path | Model | None = None, *, force: bool = False, **options: Any
) -> Any:
    """Write the mended file, atomically; everything that was found is put right, needed for the answer or not.

    Args:
        candidate: the broken file.
        output: the APR file to write.
        reference: a sound file of the same model; without one, names, labels, dims, seals and config can be mended.
        force: replace an existing output.
        options: as for `peel`.

    Returns:
        The verdict on the broken file, its proof completed by `written`: the verdict on the file that was written.

    Raises:
        UsageError: nothing is broken, or something that was found cannot be put right.
    """
    from aprlab.conversion.converter import convert
    from aprlab.formats.writing import check_output
    from aprlab.onion.peeling import examine, peel

    sources = [Path(candidate)] + ([Path(reference)] if isinstance(reference, str | Path) else [])
    check_output(Path(output), sources, force=force)
    verdict, case, mends = examine(reference, candidate, **options)
    if not mends:
        raise UsageError(f"nothing to repair: the verdict is {verdict.verdict!r}", path=candidate)
    lost = [m.label for m in mends if not m.possible]
    model = drafted(case, mends) if case is not None else None
    if model is None or isinstance(model, AprlabError) or lost:
        why = f"cannot be put right without a reference: {', '.join(lost)}" if lost else f"still broken when mended: {model}"
        raise UsageError(why, path=candidate)
    convert(model, output, force=force)
    after = peel(reference, output, **options)
    if verdict.repair is None:
        from aprlab.onion.verdict import Mended as _Mended

        verdict.repair = _Mended([m.label for m in mends], False, {})
    verdict.repair.proof["written"] = {"file": str(output), "verdict": after.verdict}
    return verdict
