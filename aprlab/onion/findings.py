"""Deviations as findings: one for each fault of the catalogue that explains some, then one for each cause that is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aprlab.faults import Fault
from aprlab.onion.fault_search import Explanation
from aprlab.onion.file_case import Deviation, FileCase, by_cause, tensors_of
from aprlab.onion.fixes import Fix
from aprlab.onion.layers import OWNERS
from aprlab.onion.verdict import LAYERS, Finding, Word, known

# Tensors that one side alone has; findings about nothing else come first, whatever else is wrong.
ONE_SIDED = {"naming.biases-missing", "naming.tensors-missing", "naming.unknown-tensor", "naming.unknown-name"}


def report(case: FileCase, explanation: Explanation) -> tuple[list[Finding], list[Fix]]:
    """Findings in the order of the layers, and a fix for each that is not harmless."""
    groups: list[tuple[Finding, list[Deviation]]] = []
    spent: set[int] = set()
    for fault in explanation.faults:
        work = [d for d in explanation.covers.get(fault.id, []) if id(d) not in spent]
        if work:
            spent |= {id(d) for d in work}
            groups.append((_explained(case, explanation, fault, work), work))
    left = [d for d in case.deviations if id(d) not in spent]
    groups += [(_part(group), group) for name in LAYERS for group in _layer(left, name)]
    fixes = [Fix(f, [d for d in work if not d.harmless]) for f, work in groups if not f.harmless]
    order = {name: n for n, name in enumerate(LAYERS)}
    groups.sort(key=lambda group: (not {d.code for d in group[1]} <= ONE_SIDED, order[group[0].layer]))
    return [finding for finding, _ in groups], fixes


def _layer(deviations: list[Deviation], name: str) -> list[list[Deviation]]:
    return by_cause(d for d in deviations if d.layer == name)


def _part(group: list[Deviation]) -> Finding:
    return OWNERS[group[0].kind].explain(group)


def _explained(case: FileCase, explanation: Explanation, fault: Fault, work: list[Deviation]) -> Finding:
    """What a fault of the catalogue has done, with the causes it is made of."""
    parts = [_part(group) for name in LAYERS for group in _layer(work, name)]
    evidence: dict[str, Any] = {"mechanisms": [part.cause for part in parts]}
    for part in parts[:1]:
        evidence |= part.evidence
    if fault.id in explanation.same:
        evidence["leaves_the_same_file_as"] = explanation.same[fault.id]
    if fault.section != "C" or fault.post is None:
        evidence["reproduces_the_file" if case.ref is not None else "rule_holds_for_all_tensors"] = explanation.complete
    sure = 1.0 if explanation.complete else 0.9
    if case.ref is None and all(d.kind in ("config", "tokenizer") for d in work):
        sure = min(sure, *(d.confidence for d in work), 1.0)  # a convention of such models proves nothing
    harmless = all(d.harmless for d in work)
    return Finding(fault.layer, fault.id, tensors_of(work), known(fault), evidence, sure, harmless=harmless)


def word_alone(findings: Sequence[Finding], health: str) -> Word:
    """The verdict on one file without a reference.

    Args:
        findings: of the layers, of the strict reader and of the run.
        health: the state of the run, see `aprlab.onion.health`; ``unproved`` where there was none.
    """
    bad = [f for f in findings if not f.harmless and f.layer != "forward"]
    if health == "broken" or any(f.confidence >= 1.0 for f in bad):
        return "broken"
    if bad or health == "suspect":
        return "suspect"
    return "healthy" if health == "healthy" else "unproved"


def word_of(findings: Sequence[Finding], *, comparable: bool) -> Word:
    """The verdict that findings amount to."""
    if not comparable:
        return "not-comparable"
    bad = [f for f in findings if not f.harmless]
    if not bad:
        return "equivalent" if findings else "same"
    return "ambiguous" if all(f.ambiguous for f in bad) else "broken"


__all__ = ["ONE_SIDED", "report", "word_alone", "word_of"]
