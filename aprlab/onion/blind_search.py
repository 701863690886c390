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
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.block_marks import unlikely
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.fixes import Fix, ddmin, drafted
from aprlab.onion.verdict import Finding, known
from aprlab.onion.words import Mechanism
from aprlab.quants import types
from aprlab.tracing.golden_rule import best_engine, is_small

TEXTS = (("What is 2+2?", "2 + 2 equals 4."), ("What is the capital of France?", "The capital of France is Paris."))
HEALTH = 2.0  # nats a token of `TEXTS`; garbage has more
HEALTH_SMALL = 0.03  # of models as small as the embedded one, which knows these answers by heart: 0.002, re-encoded 0.003
GAIN, GAIN_SMALL = 0.5, 0.9  # an inverse must take that share of the nats away to be kept as a step towards health
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
    health, gain = (HEALTH_SMALL, GAIN_SMALL) if is_small(base) else (HEALTH, GAIN)
    start = best = nats(base, engine, threads)
    kept: list[tuple[Inverse, Fix]] = []

    def run(fixes: Sequence[Fix]) -> float:
        return nats(drafted(case, [*known_fixes, *fixes]), engine, threads)

    while best > health:
        round_ = _best_step(inverses(case, base), [fix for _, fix in kept], run, health, end, progress)
        if round_ is None or round_[1] > best * (1 - (gain if best < HEALTH else GAIN)):
            return []
        inverse, best = round_
        kept.append((inverse, inverse.fix({"nats_before": start, "nats_after": best})))
        made = drafted(case, [*known_fixes, *(fix for _, fix in kept)])
        if isinstance(made, AprlabError) or len(kept) > 3:
            return []
        base = made
    return ddmin([fix for _, fix in kept], lambda some: run(some) <= health) if kept else []


def _best_step(
    tried: Iterator[Inverse], kept: list[Fix], run: Callable[[Sequence[Fix]], float], health: float, end: float,
    progress: Progress | None,
) -> tuple[Inverse, float] | None:  # fmt: skip
    """The inverse that leaves the fewest nats; the search ends with the first that restores health."""
    best: tuple[Inverse, float] | None = None
    taken = {fix.finding.fault for fix in kept}
    for inverse in tried:
        if inverse.fault.id in taken:
            continue
        left = run([*kept, inverse.fix({})])
        if progress is not None:
            progress(inverse.fault.id, left)
        if best is None or left < best[1]:
            best = inverse, left
        if left <= health or time.monotonic() > end:
            break
    return best


# ── what no inverse brings back ───────────────────────────────────────────────────────────────────────────────────


def lost_information(case: FileCase) -> list[Fix]:
    """What blocks show to be gone for good; a fix that is not possible without a reference."""
    tensors = [
        Tensor(m.true, m.kind, m.piece.shape, m.piece.raw, Origin(case.file.path, m.piece.name, m.piece.offset))
        for m in case.matches
        if m.true is not None and m.kind is not None and m.kind.fits(m.piece.shape, len(m.piece.raw))
    ]
    found = []
    for kind in (types.Q4_K, types.Q5_K):
        marks = {mark.name: mark for mark in unlikely(tensors) if mark.type is kind}
        concerned = [t.name for t in tensors if t.type is kind]
        late = [marks[name] for name in ("late-over-early-scales", "late-over-early-minima") if name in marks]
        fault, cause = None, None
        if "dmin-not-zero" in marks and marks["dmin-not-zero"].value == 0:
            fault, cause = "q4k-min-lost", Mechanism("decode.minimum-zero")
        elif len(late) == 2 and all(mark.value < 0.6 for mark in late):
            fault, cause = "q4k-scale-bits", Mechanism("decode.scale-bits-lost")
        if cause is not None:
            said = {"marks": [str(mark) for mark in marks.values()], "type": kind.name}
            finding = Finding("decode", fault if kind is types.Q4_K else None, concerned, cause, said, 0.9)
            found.append(Fix(finding, [Deviation("bytes", name, None, None, cause) for name in concerned]))
    return found


__all__ = ["HEALTH", "TEXTS", "Inverse", "blind_search", "inverses", "lost_information", "nats", "undone"]
