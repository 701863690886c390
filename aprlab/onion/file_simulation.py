"""What a converter with some faults of the catalogue would have written, and whether that is the file.

Each fault is tried at its own seam on the reference's tensors. Names, labels, dims, config and tokenizer are compared at
once, bytes only where they are asked for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from aprlab.conversion.recode import Recoded, chunks_of, re_encoded
from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.errors import AprlabError
from aprlab.faults import Fault
from aprlab.formats import apr
from aprlab.formats.raw import CONFIG_FIELDS, TOKENIZER_FIELDS, Seen, meaning
from aprlab.model.tensor import Tensor
from aprlab.onion.file_case import FileCase
from aprlab.onion.looks import FLOATS
from aprlab.onion.samples import sample_rows
from aprlab.quants.types import TensorType

Key = tuple[str, str]  # what, of which tensor or field
_CHANGED = (
    "weights.scaled", "weights.negated", "weights.offset", "weights.rows-zero", "weights.not-finite",
    "weights.columns-permuted", "weights.values-changed-in-rows", "weights.field-",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Content:
    """The bytes of a simulated tensor, made when asked for; remembers whose they are."""

    source: str
    tensor: Tensor | None
    healthy: bool
    make: Callable[[], Tensor]

    @property
    def made(self) -> Tensor:
        """The tensor; anew, where it is not kept."""
        return self.tensor if self.tensor is not None else self.make()

    def __call__(self) -> Iterator[Any]:
        return chunks_of(self.made)()


def _may_be(tensor: Tensor, raw: np.ndarray) -> bool:
    """Whether a few rows are those of these bytes, where bytes have to be made: then all of them cost much more."""
    content, kind = tensor.content, tensor.type
    if content.at_hand or kind.tensor_bytes:
        return True
    size = kind.row_bytes(content.shape[-1] if isinstance(content, Recoded) else tensor.cols)
    if len(raw) != content.nbytes or len(raw) % size:
        return True
    rows = sample_rows(len(raw) // size, _SAMPLE)
    try:
        return np.array_equal(content.some(rows, size), raw.reshape(-1, size)[rows])
    except AprlabError:
        return True  # whoever makes all rows is told where


_SAMPLE = 4  # rows by which a tensor is judged first
_KEPT = 1 << 20  # bytes


def _held(raw: np.ndarray) -> Callable[[], Iterator[Any]]:
    """Bytes of the file as a content."""
    return lambda: iter([np.ascontiguousarray(raw).data])


@dataclass
class SimulatedFile:
    """What a set of faults would have written, as keys; `content` holds bytes that are compared only on demand."""

    plain: dict[Key, Any] = field(default_factory=dict)
    content: dict[Key, Callable[[], Iterator[Any]]] = field(default_factory=dict)
    untouched: set[str] = field(default_factory=set)  # tensors whose bytes are the healthy ones, by identity


class Simulator:
    """Writes the file as faults of the catalogue would have, and compares it with the file that there is.

    Args:
        case: with matches and deviations of all file layers.
        target: the type that a healthy converter was asked to re-encode to, None for none.
        settled: identities of deviations that the container explains; their bytes are not asked about again.
        budget: seconds of CPU for bytes; what could not be verified in time lowers no claim, but is counted.
    """

    def __init__(self, case: FileCase, target: TensorType | None, settled: set[int], budget: float = 8.0) -> None:
        assert case.ref is not None
        self.settled = settled
        self.case, self.ref, self.target = case, case.ref, target
        self.deadline = time.process_time() + budget
        self.dialect = case.file.dialect
        self.tried = self.verified = 0
        self._made: dict[str, Tensor] = {}
        self._agree: dict[tuple[int, Key], bool] = {}

    # -- the two sides -----------------------------------------------------------------------------------------

    def _healthy(self, tensor: Tensor) -> Tensor:
        if tensor.name not in self._made:
            self._made[tensor.name] = self.case.healthy(tensor, self._kind(tensor))
        return self._made[tensor.name]

    def _kind(self, tensor: Tensor) -> TensorType:
        """The type that a healthy converter gives a tensor here.

        SafeTensors is all floats, whichever the writer chose, and ggml wants vectors in F32, whatever they were in SafeTensors:
        neither is a fault.
        """
        vector = len(tensor.shape) < 2
        if self.case.file.format == "safetensors" or (vector and tensor.type in FLOATS):
            return self._held.get(tensor.name) or self._usual[vector] or tensor.type
        return tensor.type if self.target is None or vector else re_encoded(tensor, self.target).type

    @cached_property
    def _held(self) -> dict[str, TensorType]:
        """Tensor -> the float type that the file holds it in; by its label where the dtype layer was not asked."""
        found: dict[str, TensorType] = {}
        for m in self.case.matches:
            kind = m.kind or next(iter(m.piece.fitting()), None)
            if m.true is not None and kind in FLOATS:
                found[m.true] = kind
        return found

    @cached_property
    def _usual(self) -> dict[bool, TensorType | None]:
        """The float type that most vectors (True) and most matrices (False) of the file have; None where none has one."""
        kinds: dict[bool, list[TensorType]] = {True: [], False: []}
        for name, kind in self._held.items():
            kinds[len(self.ref.tensors[name].shape) < 2].append(kind)
        return {vector: max(FLOATS, key=those.count) if those else None for vector, those in kinds.items()}

    @cached_property
    def base_seams(self) -> Seams:
        """A healthy converter."""
        return replace(healthy_seams(self.dialect), tensor=self._healthy)

    @cached_property
    def base_metadata(self) -> dict[str, Any]:
        """What a healthy converter would have written, as the files of the day had it: without a record of the source."""
        return apr.metadata_of(self.ref.model, list(self.ref.tensors.values()), self.dialect)

    @cached_property
    def actual(self) -> SimulatedFile:
        """The file as written."""
        out = SimulatedFile()
        extra = 0
        shaken = {id(d.match): d for d in self.case.deviations if d.kind == "span"}
        cut = {id(d.match) for d in self.case.deviations if d.kind == "bytes" and id(d) in self.settled}
        for match in self.case.matches:
            p = match.piece
            who = match.true
            if who is None:
                who, extra = f"+{p.name}", extra + 1
            out.plain["name", who] = p.name
            out.plain["code", who] = p.code
            out.plain["shape", who] = p.shape
            out.plain["size", who] = p.size
            raw = shaken[id(match)].expected.raw if id(match) in shaken else p.raw
            if id(match) not in cut:
                out.content["bytes", who] = _held(raw)
                if match.equal or match.by == "span":
                    out.untouched.add(who)
        out.plain |= {("config", name): _hashable(self.case.file.config[name]) for name in CONFIG_FIELDS}
        out.plain |= {("tokenizer", name): _hashable(self.case.file.tokenizer[name]) for name in TOKENIZER_FIELDS}
        if self.case.file.format != "apr":
            # Other formats write a value otherwise (or leave it out) and mean the same: the layers have compared those.
            known = {(d.kind, d.tensor) for d in self.case.deviations}
            out.plain |= {key: value for key, value in self._base_fields.items() if key not in known}
        return out

    @cached_property
    def changed(self) -> set[str]:
        """Tensors whose values were changed in a way that figures tell: by a scale, in some rows, in their columns."""
        return {d.tensor for d in self.case.deviations if d.kind == "bytes" and d.code.startswith(_CHANGED)}

    def outcome(self, faults: Sequence[Fault], only: set[str] | None = None) -> SimulatedFile | None:
        """What these faults would have written; None where they cannot. `only` looks at some tensors (and no lists)."""
        out = SimulatedFile()
        seams = self.base_seams
        for fault in faults:
            seams = fault.seams(seams) if fault.seams is not None else seams
        plans: list[apr.Plan] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for tensor in self.ref.tensors.values():
                    if only is not None and tensor.name not in only:
                        continue
                    t = seams.tensor(tensor)
                    whole = t is self._healthy(tensor)
                    # What a fault makes of a large tensor is made again when it is asked for, and not kept.
                    kept = whole or t.nbytes < _KEPT
                    content = _Content(tensor.name, t if kept else None, whole, partial(seams.tensor, tensor))
                    plans.append(apr.Plan(seams.name(t.name), seams.code(t.type), seams.dims(t.shape), t.nbytes, content))
                plans = seams.plans(plans) if only is None else plans
                metadata = seams.metadata(dict(self.base_metadata)) if only is None else {}
        except (AprlabError, ValueError, KeyError, StopIteration, IndexError):
            return None
        self._add(out, plans)
        if only is None:
            out.plain |= self._fields(metadata)
        return out

    def _fields(self, metadata: dict[str, Any]) -> dict[Key, Any]:
        """Config and tokenizer as this metadata has them; what no fault touched is looked at once."""
        base = self.base_metadata
        if metadata.keys() == base.keys() and all(metadata[key] is value for key, value in base.items()):
            return self._base_fields
        return self._made_fields(metadata)

    @cached_property
    def _base_fields(self) -> dict[Key, Any]:
        return self._made_fields(self.base_metadata)

    def _made_fields(self, metadata: dict[str, Any]) -> dict[Key, Any]:
        apart = Seen(self.case.file.path, "apr", self.dialect, [], metadata, [])
        found: dict[Key, Any] = {("config", name): _hashable(apart.config[name]) for name in CONFIG_FIELDS}
        return found | {("tokenizer", name): _hashable(apart.tokenizer[name]) for name in TOKENIZER_FIELDS}

    def _add(self, out: SimulatedFile, plans: list[apr.Plan]) -> None:
        """Plans under the name of the tensor that they are: by content first, as the naming layer does it."""
        stated = [meaning(plan.name, self.dialect.naming)[0] for plan in plans]
        who: dict[int, str] = {}
        spent: set[str] = set()

        def claim(n: int, name: str | None) -> None:
            if n not in who and name is not None and name not in spent and name in self.ref.tensors:
                who[n] = name
                spent.add(name)

        sources = [plan.chunks.source if isinstance(plan.chunks, _Content) else None for plan in plans]
        for n, source in enumerate(sources):  # those under their own name first
            claim(n, source if stated[n] == source else None)
        for n, source in enumerate(sources):
            claim(n, source)
        for n, name in enumerate(stated):
            claim(n, name)
        for n, plan in enumerate(plans):
            w = who.get(n, f"+{plan.name}")
            shape = plan.dims if self.dialect.dims == "rows" else plan.dims[::-1]
            out.plain |= {("name", w): plan.name, ("code", w): plan.code, ("shape", w): tuple(shape), ("size", w): plan.nbytes}
            out.content["bytes", w] = plan.chunks
            if isinstance(plan.chunks, _Content) and plan.chunks.source == w and plan.chunks.healthy:
                out.untouched.add(w)

    # -- comparing ---------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> SimulatedFile:
        """What a healthy converter would have written."""
        out = self.outcome([])
        assert out is not None
        return out

    @cached_property
    def open(self) -> set[Key]:
        """Keys in which the file is not what a healthy converter would have written."""
        return self.difference(self.base)

    def difference(self, out: SimulatedFile) -> set[Key]:
        """Keys in which an outcome is not the file; bytes are compared where neither side is known to be healthy."""
        keys = {k for k in out.plain.keys() | self.actual.plain.keys() if out.plain.get(k) != self.actual.plain.get(k)}
        for key in out.content.keys() & self.actual.content.keys():
            if not self.agree(out, key):
                keys.add(key)
        return keys

    def agree(self, out: SimulatedFile, key: Key) -> bool:
        """Whether the bytes of one tensor are those of the file, to the last one."""
        who = key[1]
        if who in out.untouched and who in self.actual.untouched and self.target is None:
            return True
        if who in out.untouched and who in self.actual.untouched and len(self.ref.tensors[who].shape) == 1:
            return True
        if out.plain["size", who] != self.actual.plain["size", who]:
            return False
        content = out.content[key]
        tensor = content.tensor if isinstance(content, _Content) else None
        memo = (id(tensor), key)
        if who in out.untouched and memo in self._agree:
            return self._agree[memo]
        (wanted,) = (np.frombuffer(part, np.uint8) for part in self.actual.content[key]())  # the file's, see `_held`
        chunks = content
        if isinstance(content, _Content):
            if not _may_be(made := content.made, wanted):
                return False
            chunks = chunks_of(made)
        at, equal = 0, True
        for chunk in chunks():
            part = np.frombuffer(chunk, np.uint8)
            if not np.array_equal(part, wanted[at : at + len(part)]):
                equal = False
                break
            at += len(part)
        self.verified += equal
        if who in out.untouched:
            self._agree[memo] = equal
        return equal

    def reproduces(self, faults: Sequence[Fault]) -> bool:
        """Whether these faults would have written this file: cheap keys first, then bytes, small tensors first."""
        self.tried += 1
        out = self._probed(faults)
        if out is None:
            return False
        if out.plain.keys() != self.actual.plain.keys():
            return False
        if any(out.plain[k] != v for k, v in self.actual.plain.items()):
            return False
        keys = sorted(out.content.keys() & self.actual.content.keys(), key=lambda k: out.plain["size", k[1]])
        late = 0
        for key in keys:
            if time.process_time() > self.deadline and late > 8:
                break
            if key[1] not in out.untouched or key[1] not in self.actual.untouched:
                late += 1
            if not self.agree(out, key):
                return False
        return True

    def _probed(self, faults: Sequence[Fault]) -> SimulatedFile | None:
        """The outcome, unless a few small tensors already say no: then None, before the large ones are touched."""
        probe = self.outcome(faults, self.probes)
        if probe is None:
            return None
        for key in probe.content:
            if key[1] in probe.untouched or key not in self.actual.content or key[1] not in self.ref.tensors:
                continue
            like = all(probe.plain.get((w, key[1])) == self.actual.plain.get((w, key[1])) for w in ("size", "shape"))
            if like and not self.agree(probe, key):
                # Only lists (plans) could still put it right, and those do not change bytes of tensors that stay.
                return None
        return self.outcome(faults)

    @cached_property
    def probes(self) -> set[str]:
        """The smallest tensors whose bytes are in question, one of each kind, in the source and in the file; and one of
        each kind that is as it was."""
        held = {m.true: m.kind for m in self.case.matches}
        chosen: dict[tuple[Any, ...], str] = {}
        for name, tensor in sorted(self.ref.tensors.items(), key=lambda item: (item[0] in self.changed, item[1].nbytes)):
            chosen.setdefault((("bytes", name) in self.open, tensor.type, held.get(name), len(tensor.shape)), name)
        return set(chosen.values())

    def footprint(self, fault: Fault) -> tuple[set[Key], set[Key]] | None:
        """What a fault changes in a healthy file, and what of that is in this file as it would have left it."""
        out = self.outcome([fault])
        if out is None:
            return None
        keys = out.plain.keys() | self.base.plain.keys()
        touched = {k for k in keys if out.plain.get(k) != self.base.plain.get(k)}
        held = {k for k in touched if out.plain.get(k) == self.actual.plain.get(k)}
        # A wrong label belongs to the bytes that it is wrong for: where the size is another, the label is not this fault's.
        held -= {
            (what, who) for what, who in held
            if what == "code" and out.plain.get(("size", who)) != self.actual.plain.get(("size", who))
        }  # fmt: skip
        for key in out.content:
            if key[1] in out.untouched or key[1] not in self.ref.tensors:
                continue
            if key in self.actual.content and time.process_time() < self.deadline:
                touched.add(key)
                if self.agree(out, key):
                    held.add(key)
                elif key not in self.open:
                    break  # it would have changed what is as it was
        return touched, held


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


__all__ = ["Key", "SimulatedFile", "Simulator"]
