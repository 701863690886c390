"""Blind search: a file that opens and talks nonsense, no reference, and the catalogue's own faults, undone one by one.

Most faults of files only move things about: names, rows, nibbles, fields. Such a fault, applied often enough, gives back
what it was applied to; so its inverse is the fault itself, applied once less. Nothing is undone that does not come back bit
for bit. Each inverse is tried in memory, and a run decides: does the model find short plain answers likely again?
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.errors import BROKEN, AprlabError
from aprlab.faults import FAULTS, Fault
from aprlab.formats import apr
from aprlab.inference.session import Session
from aprlab.instruments.garbage_detector import surprise
from aprlab.model import names
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.block_marks import unlikely
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.fixes import Fix, ddmin, drafted
from aprlab.onion.verdict import Finding, known
from aprlab.onion.words import Mechanism
from aprlab.tracing.golden_rule import best_engine

TEXTS = (("What is 2+2?", "2 + 2 equals 4."), ("What is the capital of France?", "The capital of France is Paris."))
HEALTH = 2.0  # nats a token of `TEXTS`; the embedded model has 0.01, the real 0.5B 0.2, and garbage more than 4
GAIN = 0.5  # an inverse must take that share of the nats away to be kept as a step towards health
ORDER = 12  # a permutation of nibbles or of a head's rows comes back after fewer applications than that
DEADLINE = 60.0  # seconds
THETAS, EPSILONS = (1e6, 1e4, 5e5), (1e-6, 1e-5)

Progress = Callable[[str, float], None]


def nats(model: Model | AprlabError, engine: str | None = None, threads: int | None = None) -> float:
    """Nats a token that a model spends on short plain answers; infinite where it does not run or is not finite."""
    if isinstance(model, AprlabError):
        return float("inf")
    try:
        session = Session(model, engine=engine or best_engine(model), threads=threads)
        with np.errstate(all="ignore"):
            found = float(np.mean([surprise(answer, session, prompt) for prompt, answer in TEXTS]))
    except BROKEN:
        return float("inf")
    return found if np.isfinite(found) else float("inf")


@dataclass(eq=False)
class Inverse:
    """A fault of the catalogue, undone: what it did as deviations, which the layers know how to repair."""

    fault: Fault
    deviations: list[Deviation]

    def fix(self, evidence: dict[str, Any]) -> Fix:
        """The fix, with a finding that names the fault."""
        tensors = list(dict.fromkeys(d.tensor for d in self.deviations if d.kind != "config"))
        finding = Finding(self.fault.layer, self.fault.id, tensors, known(self.fault), evidence, 0.9)
        return Fix(finding, self.deviations)


def inverses(case: FileCase, model: Model) -> Iterator[Inverse]:
    """Every fault of the catalogue that can be undone bit for bit in this file; cheapest evidence first."""
    strange = bool(unlikely(model.tensors.values()))
    order = sorted(FAULTS.values(), key=lambda fault: (fault.layer != "decode") if strange else (fault.layer == "decode"))
    for fault in order:
        if fault.seams is None or fault.layer in ("container", "dtype", "tokenizer"):
            continue  # the size law and the file itself tell those
        try:
            seams = fault.seams(healthy_seams(apr.DIALECTS["aprender"]))
            found = [*_moved(case, model, seams, fault), *_renamed(case, seams)]
        except (*BROKEN, LookupError, ArithmeticError):
            continue
        if found:
            yield Inverse(fault, found)
    yield from _numbers(case)


def _moved(case: FileCase, model: Model, seams: Seams, fault: Fault) -> list[Deviation]:
    """Tensors whose bytes the fault moved about, as they were before; [] where it lost any."""
    found = []
    for match in case.matches:
        tensor = model.tensors.get(match.true or "")
        if tensor is None:
            continue
        before = undone(seams.tensor, tensor)
        if before is None:
            return []
        if before is not tensor:
            cause = Mechanism("catalogue.fault", {"fault": fault.id})
            found.append(_bytes(match, before, cause))
    return found


def _bytes(match: Any, before: Tensor, cause: Mechanism) -> Deviation:
    deviation = Deviation("bytes", before.name, None, before, Mechanism("weights.values-differ"), match)
    deviation.evidence["undone"] = cause.parameters["fault"]
    return deviation


def undone(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    """What `change` made `tensor` of: `tensor` itself where it leaves it alone, None where there is no way back."""
    last, now = tensor, change(tensor)
    if now is tensor or (now.type is tensor.type and now.shape == tensor.shape and np.array_equal(now.raw, tensor.raw)):
        return tensor
    for _ in range(ORDER):
        if now.type is not tensor.type or now.shape != tensor.shape:
            return None
        if np.array_equal(now.raw, tensor.raw):
            return last
        last, now = now, change(now)
    return None


def _renamed(case: FileCase, seams: Seams) -> list[Deviation]:
    """Tensors under each other's names; [] where the fault renames to something that is no name of this model's."""
    healthy = {match.true: match for match in case.matches if match.true is not None}
    found = []
    for name, match in healthy.items():
        back = names.to_gguf(seams.name(name))
        if back is None or back == name:
            continue
        again = names.to_gguf(seams.name(back))
        if again != name or back not in healthy:
            return []  # not an exchange
        deviation = Deviation("name", back, name, back, Mechanism("naming.unknown-name"), match)
        found.append(deviation)
    return found


def _numbers(case: FileCase) -> Iterator[Inverse]:
    """Other values of numbers of the config that leave every shape as it is."""
    config = case.file.config
    for field, id, values in (("rope_theta", "rope-theta", THETAS), ("rms_norm_eps", "wrong-eps", EPSILONS)):
        for value in values:
            other = float(np.float32(value))
            if isinstance(config[field], float) and config[field] != other:
                cause = Mechanism("config.value-differs", {"field": field, "found": config[field], "expected": other})
                yield Inverse(FAULTS[id], [Deviation("config", field, config[field], other, cause, confidence=0.9)])


def blind_search(
    case: FileCase, fixes: Sequence[Fix], *, engine: str | None = None, threads: int | None = None,
    deadline: float = DEADLINE, progress: Progress | None = None,
) -> list[Fix]:  # fmt: skip
    """Fixes that bring a file that opens, but finds plain text unlikely, back to health; [] where none do.

    Args:
        case: without a reference.
        fixes: those that are known already; they are applied first.
        engine, threads: for the runs.
        deadline: seconds after which no further inverse is tried.
        progress: called with the id of each fault and the nats that its inverse leaves.
    """
    end = time.monotonic() + deadline
    known_fixes = [fix for fix in fixes if fix.possible]
    base = drafted(case, known_fixes)
    if isinstance(base, AprlabError):
        return []
    start = best = nats(base, engine, threads)
    kept: list[tuple[Inverse, Fix]] = []
    while best > HEALTH:
        round_ = _best_step(case, base, [*known_fixes, *(fix for _, fix in kept)], engine, threads, end, progress)
        if round_ is None or round_[1] > best * (1 - GAIN):
            return []
        inverse, best = round_
        kept.append((inverse, inverse.fix({"nats_before": start, "nats_after": best})))
        made = drafted(case, [*known_fixes, *(fix for _, fix in kept)])
        if isinstance(made, AprlabError) or len(kept) > 3:
            return []
        base = made
    return ddmin(
        [fix for _, fix in kept], lambda some: nats(drafted(case, [*known_fixes, *some]), engine, threads) <= HEALTH
    )


def _best_step(
    case: FileCase, base: Model, fixes: list[Fix], engine: str | None, threads: int | None, end: float, progress: Progress | None
) -> tuple[Inverse, float] | None:
    """The inverse that leaves the fewest nats; the search ends with the first that restores health."""
    best: tuple[Inverse, float] | None = None
    taken = {fix.finding.fault for fix in fixes}
    for inverse in inverses(case, base):
        if inverse.fault.id in taken:
            continue
        left = nats(drafted(case, [*fixes, inverse.fix({})]), engine, threads)
        if progress is not None:
            progress(inverse.fault.id, left)
        if best is None or left < best[1]:
            best = inverse, left
        if left <= HEALTH or time.monotonic() > end:
            break
    return best


__all__ = ["HEALTH", "TEXTS", "Inverse", "blind_search", "inverses", "nats", "undone"]
