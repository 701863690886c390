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
from aprlab.engines.choice import is_small
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

TEXTS = (("What is 2+2?", "2 + 2 equals 4."), ("What is the capital of France?", "The capital of France is Paris."))
HEALTH = 2.0  # nats a token of `TEXTS`; garbage has more
HEALTH_SMALL = 0.01  # of models as small as the embedded one, which knows these answers by heart: 0.002, re-encoded too
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
        session = Session(model, engine=engine, threads=threads)
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


def inverses(case: FileCase, model: Model | None) -> Iterator[Inverse]:
    """Every fault of the catalogue that can be undone bit for bit in this file; cheapest evidence first.

    Without a model (the file does not open, since shapes are not those of the names) only renamings are left.
    """
    strange = model is not None and bool(unlikely(model.tensors.values()))
    order = sorted(FAULTS.values(), key=lambda fault: (fault.layer != "decode") if strange else (fault.layer == "decode"))
    for fault in order:
        if fault.seams is None or fault.layer in ("container", "dtype", "tokenizer"):
            continue  # the size law and the file itself tell those
        try:
            seams = fault.seams(healthy_seams(apr.DIALECTS["aprender"]))
            found = [*(_moved(case, model, seams, fault) if model is not None else []), *_renamed(case, seams)]
        except (*BROKEN, LookupError, ArithmeticError):
            continue
        if found:
            yield Inverse(fault, found)
    if model is not None:
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
        return _misnamed(case, known_fixes, engine, threads)
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


def _misnamed(case: FileCase, fixes: list[Fix], engine: str | None, threads: int | None) -> list[Fix]:
    """The exchange of names by which a file opens whose shapes are not those of its names; [] where none restores health."""
    others = [fix for fix in fixes if any(d.kind != "dims" for d in fix.deviations)]
    for inverse in inverses(case, None):
        model = drafted(case, [*others, inverse.fix({})])
        left = nats(model, engine, threads)
        if isinstance(model, Model) and left <= (HEALTH_SMALL if is_small(model) else HEALTH):
            return [inverse.fix({"nats_before": float("inf"), "nats_after": left})]
    return []


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
    tensors = _tensors(case)
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
        elif "paired-scales-equal" in marks and marks["paired-scales-equal"].value > 0.95:
            fault, cause = "q4k-one-scale", Mechanism("decode.one-scale-for-two")
        if cause is not None:
            said = {"marks": [str(mark) for mark in marks.values()], "type": kind.name}
            finding = Finding("decode", fault if kind is types.Q4_K else None, concerned, cause, said, 0.9)
            found.append(Fix(finding, [Deviation("bytes", name, None, None, cause) for name in concerned]))
    return found or _copied_head(case, tensors)


def _tensors(case: FileCase) -> list[Tensor]:
    """The file's tensors under the types that they have, those that obey the size law."""
    return [
        Tensor(m.true, m.kind, m.piece.shape, m.piece.raw, Origin(case.file.path, m.piece.name, m.piece.offset))
        for m in case.matches
        if m.true is not None and m.kind is not None and m.kind.fits(m.piece.shape, len(m.piece.raw))
    ]


def unlike_any_encoder(case: FileCase) -> list[Fix]:
    """Types whose blocks no known encoder makes, in a model that also finds plain text unlikely: each alone proves nothing."""
    tensors = _tensors(case)
    marks = unlikely(tensors)
    if not marks or not HEALTH < nats(drafted(case, [])) < np.inf:
        return []
    found = []
    for kind in dict.fromkeys(mark.type for mark in marks):
        concerned = [t.name for t in tensors if t.type is kind and len(t.shape) == 2]
        cause = Mechanism("decode.marks-missing", {"type": kind.name})
        finding = Finding("decode", None, concerned, cause, {"marks": [str(m) for m in marks if m.type is kind]}, 0.8)
        found.append(Fix(finding, [Deviation("bytes", name, None, None, cause) for name in concerned]))
    return found


def _copied_head(case: FileCase, tensors: list[Tensor]) -> list[Fix]:
    """An output head with the embedding's very bytes, in a model that then finds plain text less likely than chance."""
    have = {tensor.name: tensor for tensor in tensors}
    head, embedding = have.get("output.weight"), have.get("token_embd.weight")
    if head is None or embedding is None or not np.array_equal(head.raw, embedding.raw):
        return []
    left = nats(drafted(case, []))
    if not np.log(head.rows) < left < np.inf:
        return []
    cause = Mechanism("weights.bytes-of-another-tensor", {"part": "output.weight", "other": "token_embd.weight"})
    evidence = {"nats": left, "nats_of_chance": float(np.log(head.rows))}
    finding = Finding("weights", "tied-lm-head", ["output.weight"], cause, evidence, 0.9)
    return [Fix(finding, [Deviation("bytes", "output.weight", None, None, cause)])]


# What is gone tells the fault where it is all that is gone: codes and parts of all findings -> id.
_GONE: dict[frozenset[tuple[str, str]], str] = {
    frozenset({("weights.all-zeros", f"attn_{part}.bias")}): f"lost-{part}-biases" for part in "qkv"
} | {
    frozenset(("weights.all-zeros", f"attn_{part}.bias") for part in "qkv"): "lost-qkv-biases",
    frozenset({("weights.all-zeros", "output.weight")}): "zero-lm-head",
    frozenset({("naming.biases-missing", "")}): "missing-biases",
    frozenset({("naming.tensors-missing", "")}): "dropped-tensor",
    frozenset({("naming.biases-missing", ""), ("naming.unknown-tensor", "")}): "fused-biases",
    frozenset({("container.listed-twice", "")}): "duplicate-tensor",
}


def named_by_what_is_gone(case: FileCase, findings: Sequence[Finding]) -> None:
    """Give findings without an id the fault of which they are all that is to be seen; in place."""
    found = [finding for finding in findings if not finding.harmless]
    if any(finding.fault is not None for finding in found):
        return
    id = _GONE.get(frozenset((finding.code, str(finding.parameters.get("part", ""))) for finding in found))
    layers = case.file.config["block_count"]
    everywhere = all(len(finding.tensors) % layers == 0 for finding in found) if isinstance(layers, int) and layers else False
    if id is None or (id.endswith("biases") and not everywhere and id != "fused-biases"):
        return
    if id == "dropped-tensor" and sum(len(finding.tensors) for finding in found) != 1:
        return
    if id == "fused-biases" and not all(
        "qkv" in name for f in found if f.code == "naming.unknown-tensor" for name in f.tensors
    ):
        return
    for finding in found:
        finding.fault, finding.layer = id, FAULTS[id].layer
        finding.confidence = min(finding.confidence, 0.9)


def without_reference(
    case: FileCase, findings: list[Finding], fixes: list[Fix], engine: str | None, threads: int | None
) -> tuple[list[Finding], list[Fix]]:
    """What blocks and a run tell where no reference does: information that is gone, and faults that can be undone."""
    gone_for_good = any(not fix.possible and fix.finding.layer != "weights" for fix in fixes)
    more = lost_information(case)
    if not more and not gone_for_good:
        more = blind_search(case, fixes, engine=engine, threads=threads) or unlike_any_encoder(case)
    if not more:
        named_by_what_is_gone(case, findings)
    settled = {name for fix in more for name in fix.finding.tensors}
    renamed = any(d.kind == "name" for fix in more for d in fix.deviations)
    vague = [
        fix for fix in fixes
        if set(fix.finding.tensors) <= settled and (not fix.possible or (renamed and fix.finding.layer == "layout"))
    ]  # fmt: skip
    gone = {id(fix.finding) for fix in vague}
    kept = [finding for finding in findings if id(finding) not in gone]
    return [*kept, *(fix.finding for fix in more)], [*(fix for fix in fixes if fix not in vague), *more]


__all__ = [
    "HEALTH", "TEXTS", "Inverse", "blind_search", "inverses", "lost_information", "named_by_what_is_gone", "nats", "undone",
    "unlike_any_encoder", "without_reference",
]  # fmt: skip
