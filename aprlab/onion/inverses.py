"""Faults of the catalogue, undone in a file that is there without a reference.

Most faults of files only move things about: names, labels, rows, nibbles, fields, numbers. Such a fault has an inverse that
gives back every bit. A few others (a transposition that was encoded again) can be undone up to what the encoding lost:
enough for a run to say that this is what happened, not for a repair. Nothing here says that a fault was at work; a run does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.errors import BROKEN, AprlabError
from aprlab.faults import FAULTS, Fault
from aprlab.formats import apr
from aprlab.model import names
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.block_marks import unlikely
from aprlab.onion.file_case import Deviation, FileCase, TensorMatch
from aprlab.onion.fixes import Fix
from aprlab.onion.layers.config import EPSILONS
from aprlab.onion.samples import LIKELY, bytes_of_rows, sample_rows
from aprlab.onion.verdict import Finding, known
from aprlab.onion.words import Mechanism
from aprlab.quants import dequantise, quantise, types
from aprlab.quants.types import TensorType

ORDER = 12  # a permutation of a head's rows comes back after fewer applications than that
TRANSPOSED: dict[str, tuple[str, ...]] = {  # by fault, the matrices; GH-202 did it to all
    "transposed-embedding": ("token_embd.weight",), "lm-head-transposed": ("output.weight",), "GH-202": (),
}  # fmt: skip
FEW = 16  # rows of a matrix that tell whether an inverse is worth all of them
CHUNK = 1 << 14  # blocks whose bits are in memory at once
THETAS = (1e6, 1e4, 5e5)
HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)


@dataclass(eq=False)
class Inverse:
    """A fault of the catalogue, undone: what it did as deviations, which the layers know how to repair.

    Attributes:
        fault: of the catalogue.
        deviations: with what should be there instead.
        exact: the fault, applied to that, gives the file's own bytes again; else only nearly.
        replaces: kinds of deviation that were found before and are no cause of their own beside this one.
    """

    fault: Fault
    deviations: list[Deviation]
    exact: bool = True
    replaces: tuple[str, ...] = ()

    def trial(self) -> Fix:
        """What is run to see whether it helps."""
        return Fix(self._finding({}), self.deviations)

    def fix(self, evidence: dict[str, Any], sure: float = 0.9) -> Fix:
        """The fix, with a finding that names the fault; one that is not exact can be no repair."""
        deviations = self.deviations
        if not self.exact:
            deviations = [Deviation(d.kind, d.tensor, d.found, None, d.cause, d.match) for d in deviations]
        return Fix(self._finding({**evidence, "exact": self.exact}, sure), deviations)

    def _finding(self, evidence: dict[str, Any], sure: float = 0.9) -> Finding:
        tensors = list(dict.fromkeys(d.tensor for d in self.deviations if d.kind != "config"))
        return Finding(self.fault.layer, self.fault.id, tensors, known(self.fault), evidence, sure)


def inverses(
    case: FileCase, model: Model | None, suggested: Sequence[str] = (), ruled_out: Sequence[str] = ()
) -> Iterator[Inverse]:
    """Every fault of the catalogue that can be undone in this file; cheapest evidence first, inexact ones last.

    Args:
        case: without a reference.
        model: the file opened; None where it does not open, since shapes are not those of the names: then renamings and
            transpositions are left.
        suggested: ids that come first.
        ruled_out: ids that marks speak against.
    """
    reversed_ = any(d.code == "layout.dims-reversed" for d in case.deviations)
    if reversed_:
        yield from _transposed_and_reversed(case)
    first = [] if model is None or reversed_ else [id for id in suggested if id in TRANSPOSED]
    yield from _transposed(case, first)
    strange = model is not None and bool(unlikely(model.tensors.values()))

    def late(fault: Fault) -> tuple[bool, bool]:
        return fault.id not in suggested, (fault.layer != "decode") if strange else (fault.layer == "decode")

    for fault in sorted(FAULTS.values(), key=late):
        if fault.seams is None or fault.layer in ("container", "tokenizer") or fault.id in TRANSPOSED:
            continue  # the size law and the file itself tell those; what was encoded again has its own way back
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a faulty converter says while it works
                found = _done(case, model, fault)
        except (*BROKEN, LookupError, ArithmeticError):
            continue
        if found:
            # Shapes that are not those of the names are no cause of their own where the names are wrong.
            yield Inverse(fault, found, replaces=("dims",) if model is None else ())
    if model is not None:
        yield from _heads(case)
        yield from _numbers(case)
        yield from _one_less(case, model)
        yield from _transposed(case, [id for id in TRANSPOSED if id not in first and id not in ruled_out])


def _done(case: FileCase, model: Model | None, fault: Fault) -> list[Deviation]:
    """What a fault did to this file if it was at work, whatever it touches."""
    seams, healthy = _seams(fault)
    found = _renamed(case, seams) if seams.name is not healthy.name else []
    if model is not None and seams.tensor is not healthy.tensor:
        found += _moved(case, model, seams, fault)
    if model is not None and seams.code is not healthy.code:
        found += _relabelled(case, seams)
    return found


def _seams(fault: Fault) -> tuple[Seams, Seams]:
    """The seams of a conversion with this fault, and those without: a decision that it leaves alone is the same function."""
    assert fault.seams is not None
    healthy = healthy_seams(apr.DIALECTS["aprender"])
    return fault.seams(healthy), healthy


def reordered(case: FileCase, model: Model) -> Iterator[Inverse]:
    """Faults of the fields of blocks whose inverse takes every odd mark of blocks away; few rows tell which are worth all."""
    few = [_few_rows(tensor) for tensor in model.tensors.values() if len(tensor.shape) == 2 and tensor.type.quantised]
    for fault in FAULTS.values():
        if fault.seams is None or fault.layer != "decode":
            continue
        change = _seams(fault)[0].tensor
        try:
            before = [undone(change, tensor) for tensor in few]
            known_ = [tensor for tensor in before if tensor is not None]
            if len(known_) < len(few) or unlikely(known_) or all(a is b for a, b in zip(before, few, strict=True)):
                continue
            found = _done(case, model, fault)
        except (*BROKEN, LookupError, ArithmeticError):
            continue
        if found:
            yield Inverse(fault, found)


def _few_rows(tensor: Tensor) -> Tensor:
    """Some rows of a matrix, evenly spread."""
    rows = sample_rows(tensor.rows, FEW)
    return tensor.replace(shape=(len(rows), tensor.cols), content=bytes_of_rows(tensor.raw, tensor.type, tensor.rows, rows))


def exchanges(case: FileCase) -> Iterator[Inverse]:
    """Renamings alone: a file that speaks well may still have two parts of it under each other's names."""
    for fault in FAULTS.values():
        if fault.seams is not None and fault.layer == "naming":
            found = _renamed(case, _seams(fault)[0])
            if found:
                yield Inverse(fault, found)


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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
            found.append(_bytes(match, before, fault))
    return found


def _bytes(match: TensorMatch, before: Tensor, fault: Fault) -> Deviation:
    deviation = Deviation("bytes", before.name, None, before, Mechanism("weights.values-differ"), match)
    deviation.evidence["undone"] = fault.id
    return deviation


def undone(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    """What `change` made `tensor` of: `tensor` itself where it leaves it alone, None where there is no way back.

    A fault that only moves things about gives back what it was applied to, applied often enough; or its bits are moved
    back one by one. Either way `change` of the result is the file's tensor, byte for byte.
    """
    last, now = tensor, change(tensor)
    if now is tensor or (now.type is tensor.type and now.shape == tensor.shape and np.array_equal(now.raw, tensor.raw)):
        return tensor
    for _ in range(ORDER):
        if now.type is not tensor.type or now.shape != tensor.shape:
            return None
        if np.array_equal(now.raw, tensor.raw):
            return last
        last, now = now, change(now)
    return _bits_moved_back(change, tensor)


def _bits_moved_back(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    """The tensor that `change`, which only moves bits within each block, made into `tensor`; None for any other change."""
    kind = tensor.type
    if not kind.quantised or kind.tensor_bytes or len(tensor.shape) != 2:
        return None
    order = _bit_order(change, tensor.name, kind, tensor.origin)
    if order is None:
        return None
    blocks = tensor.raw.reshape(-1, kind.block_bytes)
    out = np.empty_like(blocks)
    for start in range(0, len(blocks), CHUNK):
        some = np.unpackbits(blocks[start : start + CHUNK], axis=1, bitorder="little")
        out[start : start + CHUNK] = np.packbits(some[:, order], axis=1, bitorder="little")
    before = tensor.replace(content=out.reshape(-1))
    return before if np.array_equal(change(before).raw, tensor.raw) else None


def _bit_order(change: Callable[[Tensor], Tensor], name: str, kind: TensorType, origin: Origin) -> np.ndarray | None:
    """For each bit of a block where `change` puts it, int64 ``(bits,)``; asked with blocks of one bit each."""
    count = 8 * kind.block_bytes
    single = np.packbits(np.eye(count, dtype=np.uint8), axis=1, bitorder="little")
    probe = Tensor(name, kind, (count, kind.block_elements), single.reshape(-1), origin)
    with np.errstate(all="ignore"):
        after = change(probe)
    if after.type is not kind or after.shape != probe.shape:
        return None
    moved = np.unpackbits(after.raw.reshape(count, -1), axis=1, bitorder="little")
    if not ((moved.sum(axis=0) == 1).all() and (moved.sum(axis=1) == 1).all()):
        return None
    return moved.argmax(axis=1)


# ── names, labels, numbers ────────────────────────────────────────────────────────────────────────────────────────


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
        found.append(Deviation("name", back, name, back, Mechanism("naming.unknown-name"), match))
    return found


def _relabelled(case: FileCase, seams: Seams) -> list[Deviation]:
    """Tensors whose label is lawful, and is what the fault writes for another type of the same size."""
    found = []
    written: dict[int, list[TensorType]] = {}
    for other in LIKELY:
        written.setdefault(seams.code(other), []).append(other)
    for match in case.matches:
        p, kind = match.piece, match.kind
        if kind is None or match.true is None or match.open_kinds or seams.code(kind) != kind.code:
            continue
        others = [t for t in written.get(p.code, ()) if t is not kind and t.fits(p.shape, p.size)]
        if len(others) == 1 and others[0].code != p.code:
            cause = Mechanism("dtype.code-of-another-type", {"type": others[0].name, "label": p.code, "means": kind.name})
            found.append(Deviation("type", match.true, p.code, others[0], cause, match))
    return found


def _numbers(case: FileCase) -> Iterator[Inverse]:
    """Other values of numbers of the config that leave every shape as it is."""
    config = case.file.config
    for name, id, values in (("rope_theta", "rope-theta", THETAS), ("rms_norm_eps", "wrong-eps", EPSILONS)):
        for value in values:
            other = float(np.float32(value))
            if isinstance(config[name], float) and config[name] != other:
                yield Inverse(FAULTS[id], [_number(case, name, other)])


def _heads(case: FileCase) -> Iterator[Inverse]:
    """Other head counts and sizes with the same products; the fault must lead from them to those of the file."""
    config = case.file.config
    fields = ("head_count", "head_count_kv", "head_dim")
    have = [config[name] for name in fields]
    if not all(isinstance(value, int) and value > 0 for value in have):
        return
    rows, rows_kv = have[0] * have[2], have[1] * have[2]
    for size in HEAD_SIZES:
        if size == have[2] or rows % size or rows_kv % size or (rows // size) % (rows_kv // size):
            continue
        changed = dict(zip(fields, (rows // size, rows_kv // size, size), strict=True))
        id_ = "head-dim-halved" if size == 2 * have[2] else "head-dim-guessed"
        yield Inverse(FAULTS[id_], [_number(case, name, value) for name, value in changed.items()])


def _number(case: FileCase, name: str, value: Any) -> Deviation:
    found = case.file.config[name]
    cause = Mechanism("config.value-differs", {"field": name, "found": found, "expected": value})
    return Deviation("config", name, found, value, cause, confidence=0.9)


# ── what comes back only nearly ───────────────────────────────────────────────────────────────────────────────────


def _transposed(case: FileCase, ids: Iterable[str]) -> Iterator[Inverse]:
    """Matrices whose data were transposed and encoded again under their own shape."""
    for id_ in ids:
        found = list(_each_transposed(case, FAULTS[id_], None, TRANSPOSED[id_]))
        if found:
            yield Inverse(FAULTS[id_], found, exact=False)


def _one_less(case: FileCase, model: Model) -> Iterator[Inverse]:
    """Norms from whose weights the one is taken that a converter may have added; the digits that it cost stay lost."""
    fault, found = FAULTS["norm-plus-one"], []
    for match in case.matches:
        tensor = model.tensors.get(match.true or "")
        if tensor is None or not tensor.name.endswith("norm.weight"):
            continue
        try:
            held = quantise(tensor.dequantise() - np.float32(1), tensor.type).reshape(-1)
        except AprlabError:  # values that are no numbers: no fault of this kind
            return
        found.append(_bytes(match, tensor.replace(content=held), fault))
    if found:
        yield Inverse(fault, found, exact=False)


def _transposed_and_reversed(case: FileCase) -> Iterator[Inverse]:
    """Matrices that are their own transposes, shape and data."""
    wrong = [d for d in case.deviations if d.code == "layout.dims-reversed"]
    found = list(_each_transposed(case, FAULTS["double-reversal"], {id(d.match): d.expected for d in wrong}))
    dims = [Deviation("dims", d.tensor, d.found, d.expected, d.cause, d.match) for d in wrong]
    yield Inverse(FAULTS["double-reversal"], [*dims, *found], exact=False, replaces=("dims",))


def _each_transposed(
    case: FileCase, fault: Fault, shapes: dict[int, tuple[int, ...]] | None, only: Sequence[str] = ()
) -> Iterator[Deviation]:
    """Every matrix (or only these) with its values transposed, kept as F16.

    Args:
        shapes: by match, shapes that are stated in reverse; with them a tensor is the transpose of what it says it is.
    """
    for match in case.matches:
        p = match.piece
        if match.true is None or match.kind is None or len(p.shape) != 2 or (only and match.true not in only):
            continue
        if not match.kind.fits(p.shape, len(p.raw)):
            continue
        try:
            values = dequantise(p.raw, match.kind, p.shape)
            with np.errstate(all="ignore"):
                back = values.T if shapes is not None else values.reshape(p.shape[::-1]).T
                held = quantise(np.ascontiguousarray(np.clip(back, -6e4, 6e4)), types.F16).reshape(-1)
        except AprlabError:
            continue
        shape = shapes.get(id(match), p.shape[::-1]) if shapes is not None else p.shape
        yield _bytes(match, Tensor(match.true, types.F16, shape, held, Origin(case.file.path, p.name, -1)), fault)


__all__ = ["THETAS", "TRANSPOSED", "Inverse", "exchanges", "inverses", "reordered", "undone"]
