"""The catalogue's explanation of a case: faults of the converter, edits of the finished file, rules that hold for all tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.faults import FAULTS
from aprlab.onion.clock import Budget
from aprlab.onion.fault_search import Explanation, FaultSearch
from aprlab.onion.field_faults import faults_of_fields
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.quants import can_encode

# What the container layer finds has no seam in the converter: these edits were made to the finished file.
_EDITS = {
    "offset-shifted": ("container.offset-too-small", "container.offset-too-large"),
    "unsorted-index": ("container.index-unsorted",),
    "truncated": ("container.truncated",),
    "overlapping-tensors": ("container.overlap",),
}


def explain(case: FileCase, budget: float = 6.0, limit: Budget | None = None) -> Explanation:
    """Faults of the catalogue that explain a case, the converter's before edits of the finished file.

    Args:
        case: with the deviations of all layers.
        budget: seconds of CPU for comparing bytes.
        limit: after it no further fault is tried next to a reference; what was left out is remembered there.
    """
    edits = _edits(case)
    settled = {id(d) for work in edits.values() for d in work}
    if case.ref is None:
        found = _rules(case) if case.file.format == "apr" else Explanation(complete=True)
        decoded = [d for d in case.deviations if d.code == "dtype.values-on-a-grid"]
        if decoded:
            found.faults.append(FAULTS["default-dequantise"])
            found.covers["default-dequantise"] = decoded
        for fault, work in faults_of_fields(case).items():
            found.faults.append(FAULTS[fault])
            found.covers[fault] = work
    elif _only_one_source(case):
        found = Explanation(complete=True)
    else:
        found = _search(case, settled, budget, limit)
    found.faults += [FAULTS[id] for id in edits]
    found.covers |= edits
    return found


def _only_one_source(case: FileCase) -> bool:
    """Whether nothing but other encodings of the reference's source was found: no converter has made those of the reference."""
    return all(d.harmless for d in case.deviations) and any(d.code == "dtype.one-source" for d in case.deviations)


def _search(case: FileCase, settled: set[int], budget: float, limit: Budget | None) -> Explanation:
    """Re-encoded on purpose, or by a fault? The explanation that leaves nothing open wins; the fault if it is whole."""
    # What cannot be encoded cannot be simulated either; its tensors were compared row by row.
    tries = [None] if case.target is None or not can_encode(case.target) else [None, case.target]
    if case.file.format == "safetensors":
        tries = [case.target]  # nothing but floats can be written to it: that is no fault
    matrices = [m for m in case.matches if m.of is not None and len(m.of.shape) > 1]
    mostly = case.target is not None and 2 * sum(m.kind is case.target for m in matrices) > len(matrices)
    results: list[Explanation] = []
    for target in tries:
        most = 2 if (target is not None) == mostly else 1
        results.append(FaultSearch(case, target, settled, budget / len(tries), limit).explain(most))
        if results[-1].complete:
            return results[-1]
    return max(results, key=lambda r: len(r.faults))


def _rules(case: FileCase) -> Explanation:
    """Without a reference: faults whose rule for names or labels gives every name or label of the file."""
    found = Explanation(complete=True)
    healthy = healthy_seams(case.file.dialect)
    known = [m for m in case.matches if m.true is not None]
    rules: dict[str, Callable[[Seams], bool]] = {
        "name": lambda s: all(s.name(m.true) == m.piece.name for m in known if m.true is not None),
        "type": lambda s: all(m.kind is not None and s.code(m.kind) == m.piece.code for m in known),
    }
    for what, holds in rules.items():
        work = [d for d in case.deviations if d.kind == what]
        if not work:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits = [f for f in FAULTS.values() if f.seams is not None and holds(f.seams(healthy))]
        if fits:
            found.faults.append(fits[0])
            found.covers[fits[0].id] = work
            if fits[1:]:
                found.same[fits[0].id] = [f.id for f in fits[1:]]
    return found


def _edits(case: FileCase) -> dict[str, list[Deviation]]:
    """Ids of edits of the finished file, with the deviations that they leave."""
    covers: dict[str, list[Deviation]] = {}
    for id, codes in _EDITS.items():
        work = [d for d in case.deviations if d.code in codes]
        if not work:
            continue
        lost = [d for d in case.deviations if d.layer == "container" and d.kind == "bytes"]
        if id == "truncated" and "offset-shifted" in covers and len(lost) == 0:
            covers["offset-shifted"] += work  # the last tensor now ends beyond the file: no second fault
            continue
        if id == "truncated":
            work += lost
        if id == "overlapping-tensors":
            over = {d.match.piece.offset for d in work if d.match is not None}
            work += [d for d in case.deviations if d.kind == "bytes" and d.match is not None and d.match.piece.offset in over]
        covers[id] = work
    return covers


__all__ = ["explain"]
