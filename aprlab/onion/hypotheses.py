"""The catalogue as hypotheses: would a converter with exactly these faults have written exactly this file?

Each file fault is tried at its own seam on the reference's tensors; it counts only where name, label, dims and bytes
come out as they stand in the file. Which fault was really at work is never looked up, since nothing here can know it.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from aprlab.conversion.provenance import describe
from aprlab.conversion.recode import chunks_of, re_encoded
from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, Fault
from aprlab.formats import apr
from aprlab.formats.raw import CONFIG_FIELDS, TOKENIZER_FIELDS, Seen, meaning
from aprlab.model.tensor import Tensor
from aprlab.onion.layers.base import Case, Deviation
from aprlab.quants.types import TensorType

Key = tuple[str, str]  # what, of which tensor or field


@dataclass(frozen=True, eq=False)
class _Content:
    """The bytes of a simulated tensor, made when asked for; remembers whose they are."""

    source: str
    tensor: Tensor | None
    healthy: bool
    make: Callable[[], Tensor]

    def __call__(self) -> Iterator[Any]:
        return chunks_of(self.tensor if self.tensor is not None else self.make())()


_KEPT = 1 << 20  # bytes


def _held(raw: np.ndarray) -> Callable[[], Iterator[Any]]:
    """Bytes of the file as a content."""
    return lambda: iter([np.ascontiguousarray(raw).data])


@dataclass
class Outcome:
    """What a set of faults would have written, as keys; `content` holds bytes that are compared only on demand."""

    plain: dict[Key, Any] = field(default_factory=dict)
    content: dict[Key, Callable[[], Iterator[Any]]] = field(default_factory=dict)
    untouched: set[str] = field(default_factory=set)  # tensors whose bytes are the healthy ones, by identity


@dataclass
class Explanation:
    """Faults that explain deviations.

    Attributes:
        faults: in the order of the catalogue.
        covers: fault id -> deviations that are its work.
        same: fault id -> ids that would have left the very same file.
        complete: together they reproduce the file, all of it.
        verified: tensors whose bytes were held against what the faults would have written.
        tried: sets of faults that were tried.
    """

    faults: list[Fault] = field(default_factory=list)
    covers: dict[str, list[Deviation]] = field(default_factory=dict)
    same: dict[str, list[str]] = field(default_factory=dict)
    complete: bool = False
    verified: int = 0
    tried: int = 0


# What the container layer finds has no seam in the converter: these edits were made to the finished file.
CONTAINER_IDS = {
    "the offset is": "offset-shifted",
    "the index is not sorted": "unsorted-index",
    "the file is cut off": "truncated",
    "bytes of two tensors overlap": "overlapping-tensors",
}


class Hypotheses:
    """Tries faults of the catalogue against one case.

    Args:
        case: with matches and deviations of all file layers.
        target: the type that a healthy converter was asked to re-encode to, None for none.
        settled: identities of deviations that the container explains; their bytes are not asked about again.
        budget: seconds of CPU for bytes; what could not be verified in time lowers no claim but is told.
    """

    def __init__(self, case: Case, target: TensorType | None, settled: set[int], budget: float = 8.0) -> None:
        assert case.ref is not None
        self.settled = settled
        self.case, self.ref, self.target = case, case.ref, target
        self.deadline = time.process_time() + budget
        self.dialect = case.seen.dialect
        self.tried = self.verified = 0
        self._made: dict[str, Tensor] = {}
        self._agree: dict[tuple[int, Key], bool] = {}
        self._marked: dict[str, tuple[set[str], set[str]]] = {}

    # -- the two sides -----------------------------------------------------------------------------------------

    def _healthy(self, tensor: Tensor) -> Tensor:
        if self.target is None:
            return tensor
        if tensor.name not in self._made:
            out = re_encoded(tensor, self.target)
            self._made[tensor.name] = tensor if out is tensor else self.case.healthy(tensor, out.type)
        return self._made[tensor.name]

    @cached_property
    def base_seams(self) -> Seams:
        """A healthy converter."""
        return replace(healthy_seams(self.dialect), tensor=self._healthy)

    @cached_property
    def base_metadata(self) -> dict[str, Any]:
        """What a healthy converter would have written, as the files of the day had it: without a record of the source."""
        found = describe(replace_format(self.ref.model), list(self.ref.tensors.values()), self.dialect)
        return {key: value for key, value in found.items() if key != "source_metadata"}

    @cached_property
    def seen(self) -> Outcome:
        """The file as it stands."""
        out = Outcome()
        extra = 0
        shaken = {id(d.match): d for d in self.case.deviations if d.what == "span"}
        cut = {id(d.match) for d in self.case.deviations if d.what == "bytes" and id(d) in self.settled}
        for match in self.case.matches:
            p = match.piece
            who = match.true
            if who is None:
                who, extra = f"+{p.name}", extra + 1
            out.plain["name", who] = p.name
            out.plain["code", who] = p.code
            out.plain["shape", who] = p.shape
            out.plain["size", who] = p.size
            raw = shaken[id(match)].due.raw if id(match) in shaken else p.raw
            if id(match) not in cut:
                out.content["bytes", who] = _held(raw)
                if match.equal or match.by == "span":
                    out.untouched.add(who)
        out.plain |= {("config", name): _hashable(self.case.seen.config[name]) for name in CONFIG_FIELDS}
        out.plain |= {("tokenizer", name): _hashable(self.case.seen.tokenizer[name]) for name in TOKENIZER_FIELDS}
        return out

    def outcome(self, faults: Sequence[Fault], only: set[str] | None = None) -> Outcome | None:
        """What these faults would have written; None where they cannot. `only` looks at some tensors (and no lists)."""
        out = Outcome()
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
                    kept = whole or t.nbytes < _KEPT or not t.content.at_hand
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
        apart = Seen(self.case.seen.path, "apr", self.dialect, [], metadata, [])
        found: dict[Key, Any] = {("config", name): _hashable(apart.config[name]) for name in CONFIG_FIELDS}
        return found | {("tokenizer", name): _hashable(apart.tokenizer[name]) for name in TOKENIZER_FIELDS}

    def _add(self, out: Outcome, plans: list[apr.Plan]) -> None:
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
    def base(self) -> Outcome:
        """What a healthy converter would have written."""
        out = self.outcome([])
        assert out is not None
        return out

    @cached_property
    def open(self) -> set[Key]:
        """Keys in which the file is not what a healthy converter would have written."""
        return self.difference(self.base)

    def difference(self, out: Outcome) -> set[Key]:
        """Keys in which an outcome is not the file; bytes are compared where neither side is known to be healthy."""
        keys = {k for k in out.plain.keys() | self.seen.plain.keys() if out.plain.get(k) != self.seen.plain.get(k)}
        for key in out.content.keys() & self.seen.content.keys():
            if not self.agree(out, key):
                keys.add(key)
        return keys

    def agree(self, out: Outcome, key: Key) -> bool:
        """Whether the bytes of one tensor are those of the file, to the last one."""
        who = key[1]
        if who in out.untouched and who in self.seen.untouched and self.target is None:
            return True
        if who in out.untouched and who in self.seen.untouched and len(self.ref.tensors[who].shape) == 1:
            return True
        if out.plain["size", who] != self.seen.plain["size", who]:
            return False
        content = out.content[key]
        tensor = content.tensor if isinstance(content, _Content) else None
        memo = (id(tensor), key)
        if who in out.untouched and memo in self._agree:
            return self._agree[memo]
        wanted = np.concatenate([np.frombuffer(part, np.uint8) for part in self.seen.content[key]()])
        at, equal = 0, True
        for chunk in out.content[key]():
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
        if out.plain.keys() != self.seen.plain.keys():
            return False
        if any(out.plain[k] != v for k, v in self.seen.plain.items()):
            return False
        keys = sorted(out.content.keys() & self.seen.content.keys(), key=lambda k: out.plain["size", k[1]])
        late = 0
        for key in keys:
            if time.process_time() > self.deadline and late > 8:
                break
            if key[1] not in out.untouched or key[1] not in self.seen.untouched:
                late += 1
            if not self.agree(out, key):
                return False
        return True

    def _probed(self, faults: Sequence[Fault]) -> Outcome | None:
        """The outcome, unless a few small tensors already say no: then None, before the large ones are touched."""
        probe = self.outcome(faults, self.probes)
        if probe is None:
            return None
        for key in probe.content:
            if key[1] in probe.untouched or key not in self.seen.content or key[1] not in self.ref.tensors:
                continue
            like = all(probe.plain.get((w, key[1])) == self.seen.plain.get((w, key[1])) for w in ("size", "shape"))
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
        for name, tensor in sorted(self.ref.tensors.items(), key=lambda item: item[1].nbytes):
            chosen.setdefault((("bytes", name) in self.open, tensor.type, held.get(name), len(tensor.shape)), name)
        return set(chosen.values())

    def footprint(self, fault: Fault) -> tuple[set[Key], set[Key]] | None:
        """What a fault changes in a healthy file, and what of that stands in this file as it would have left it."""
        out = self.outcome([fault])
        if out is None:
            return None
        keys = out.plain.keys() | self.base.plain.keys()
        touched = {k for k in keys if out.plain.get(k) != self.base.plain.get(k)}
        held = {k for k in touched if out.plain.get(k) == self.seen.plain.get(k)}
        for key in out.content:
            if key[1] in out.untouched or key[1] not in self.ref.tensors:
                continue
            if key in self.seen.content and time.process_time() < self.deadline:
                touched.add(key)
                if self.agree(out, key):
                    held.add(key)
                elif key not in self.open:
                    break  # it would have changed what is as it was
        return touched, held

    # -- searching ---------------------------------------------------------------------------------------------

    def explain(self, most: int = 2) -> Explanation:
        """The smallest set of faults that explains the file."""
        found = Explanation()
        if not self.open:
            found.complete = True
            return found
        candidates = [f for f in FAULTS.values() if f.seams is not None and self._may(f) and self._compatible(f)]
        exact = [f for f in candidates if self.reproduces([f])]
        if exact:
            # Of several that leave the same file, the one that is at home with this type says more.
            asked = self.target.name.lower().replace("_", "") if self.target is not None else None
            exact.sort(key=lambda f: str(f.given.get("quantize", "")).replace("_", "") != asked)
            found.faults, found.complete = [exact[0]], True
            found.same = {exact[0].id: [f.id for f in exact[1:]]} if exact[1:] else {}
        else:
            self._cover(found, candidates)
            if not found.complete and most > 1:
                self._pairs(found, candidates)
        self._share(found)
        found.verified, found.tried = self.verified, self.tried
        return found

    def _compatible(self, fault: Fault) -> bool:
        """Whether a few small tensors allow a fault at all: it must not change what is as it should be."""
        self.tried += 1
        out = self.outcome([fault], self.probes)
        if out is None:
            return True  # it needs the whole list of tensors
        for key, value in out.plain.items():
            if key[1] in self.ref.tensors and key not in self.open and self.seen.plain.get(key) != value:
                return False
        for key in out.content:
            known = key[1] in self.ref.tensors and key[1] not in out.untouched and key in self.seen.content
            if known and key not in self.open and ("size", key[1]) in self.seen.plain and not self.agree(out, key):
                return False
        return True

    def _may(self, fault: Fault) -> bool:
        """Whether a fault touches any decision that came out wrong here; by kind of decision, not by value."""
        assert fault.seams is not None
        if id(fault) not in self._kinds:
            after = fault.seams(self.base_seams)
            kinds = set()
            for seam, touched in _TOUCHES.items():
                if getattr(after, seam) is not getattr(self.base_seams, seam):
                    kinds |= touched
            self._kinds[id(fault)] = kinds
        return bool(self._kinds[id(fault)] & {what for what, _ in self.open})

    @cached_property
    def _kinds(self) -> dict[int, set[str]]:
        return {}

    def _cover(self, found: Explanation, candidates: list[Fault]) -> None:
        """Faults whose whole footprint stands in the file, as few as cover what is open."""
        left, holders = set(self.open), []
        for fault in candidates:
            if not self._holds_on_probes(fault):
                continue
            marks = self.footprint(fault)
            if marks is not None and marks[0] and marks[0] == marks[1]:
                holders.append((fault, marks[0]))
        while holders and left:
            fault, marks_ = max(holders, key=lambda pair: (len(pair[1] & left), -len(pair[1])))
            if not marks_ & left:
                break
            found.faults.append(fault)
            equal = [f.id for f, m in holders if f is not fault and m == marks_]
            if equal:
                found.same[fault.id] = equal
            left -= marks_
            holders = [(f, m) for f, m in holders if f is not fault]
        found.complete = not left
        found.faults.sort(key=lambda f: list(FAULTS).index(f.id))

    def _marks(self, fault: Fault) -> tuple[set[str], set[str]]:
        """Probes whose bytes a fault by itself changes, and those of them that it changes into what is seen."""
        if fault.id not in self._marked:
            out = self.outcome([fault], self.probes)
            names_ = set() if out is None else {w for _, w in out.content if w not in out.untouched and w in self.ref.tensors}
            held = {w for w in names_ if out is not None and ("bytes", w) in self.seen.content and self.agree(out, ("bytes", w))}
            self._marked[fault.id] = names_, held
        return self._marked[fault.id]

    def _holds_on_probes(self, fault: Fault) -> bool:
        touched, held = self._marks(fault)
        return touched == held

    def _pairs(self, found: Explanation, candidates: list[Fault]) -> None:
        """Two faults on top of each other, where neither stands alone: both orders."""
        known = {f.id for f in found.faults}
        # Of two faults on top of each other, one is alone at work where the other has no business: there it shows.
        worth = {f.id: len(self._marks(f)[1]) + (f.id in known) for f in candidates}
        pairs = sorted(itertools.permutations(candidates, 2), key=lambda p: -sum(worth[f.id] for f in p))
        for pair in pairs:
            if time.process_time() > self.deadline:
                return
            if not (self._new(pair) and self._fits(*pair)):
                continue
            if self.reproduces(pair):
                found.faults = sorted(pair, key=lambda f: list(FAULTS).index(f.id))
                found.complete, found.same = True, {}
                return

    def _new(self, pair: Sequence[Fault]) -> bool:
        """Whether two faults between them touch every kind of decision that is open."""
        kinds = self._kinds[id(pair[0])] | self._kinds[id(pair[1])]
        return {what for what, _ in self.open} <= kinds

    def _fits(self, f: Fault, g: Fault) -> bool:
        """Whether the probes allow a pair: where one of the two alone changes bytes, they are what it alone makes of them."""
        (touch_f, held_f), (touch_g, held_g) = self._marks(f), self._marks(g)
        for who in self.probes:
            if ("bytes", who) not in self.seen.content or (who in touch_f and who in touch_g):
                continue
            if who in touch_f | touch_g:
                if who not in held_f | held_g:
                    return False
            elif ("bytes", who) in self.open:
                return False
        return True

    def _share(self, found: Explanation) -> None:
        """Each deviation to the fault whose work it is: to the one that alone gives what is seen, else to any that touches it."""
        spent: set[int] = set()
        for strict in (True, False):
            for fault in sorted(found.faults, key=lambda f: len(found.covers.get(f.id, []))):
                work = [d for d in self._work(fault, found.faults, strict=strict) if id(d) not in spent]
                found.covers[fault.id] = [*found.covers.get(fault.id, []), *work]
                spent |= {id(d) for d in work}
        for fault in [f for f in found.faults if not found.covers[f.id]]:
            # All that it touched, another has touched as well: it gets what that other can spare.
            touched = {id(d) for d in self._work(fault, found.faults, strict=False)}
            for owner in found.faults:
                given = [d for d in found.covers[owner.id] if id(d) in touched]
                if given and len(given) < len(found.covers[owner.id]):
                    found.covers[fault.id] += given
                    found.covers[owner.id] = [d for d in found.covers[owner.id] if id(d) not in touched]

    def _work(self, fault: Fault, faults: list[Fault], *, strict: bool) -> list[Deviation]:
        """The deviations that are a fault's work: what it alone changes, or what is missing when it is left out."""
        alone = self.outcome([fault])
        others = self.outcome([f for f in faults if f is not fault])
        full = self.outcome(faults)
        keys: set[Key] = set()
        for before, after in ((self.base, alone),) if strict else ((self.base, alone), (others, full)):
            if before is None or after is None:
                continue
            all_ = before.plain.keys() | after.plain.keys()
            changed = {k for k in all_ if before.plain.get(k) != after.plain.get(k)}
            keys |= {k for k in changed if not strict or after.plain.get(k) == self.seen.plain.get(k)}
            keys |= {("bytes", w) for _, w in after.content if w in before.untouched and w not in after.untouched}
        return [d for d in self.case.deviations if _keys_of(d) & keys]


_TOUCHES = {
    "name": {"name"},
    "code": {"code"},
    "dims": {"shape"},
    "tensor": {"bytes", "size", "shape", "code"},
    "metadata": {"config", "tokenizer"},
    "plans": {"name", "code", "shape", "size", "bytes"},
}


def _keys_of(d: Deviation) -> set[Key]:
    """The keys that a deviation speaks of."""
    who = d.tensor
    if d.match is not None:
        who = d.match.true if d.match.true is not None else f"+{d.match.piece.name}"
    kinds: dict[str, tuple[str, ...]] = {
        "name": ("name",), "type": ("code", "size"), "dims": ("shape",), "bytes": ("bytes", "size"),
        "encoding": ("bytes", "size", "code"), "missing": ("name",), "extra": ("name",), "config": ("config",),
        "tokenizer": ("tokenizer",),
    }  # fmt: skip
    return {(kind, who) for kind in kinds.get(d.what, ())}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def replace_format(model: Any) -> Any:
    """The model as one without a GGUF header to record: `describe` would read and hash the whole file for it."""
    import copy

    other = copy.copy(model)
    other.format = "apr"
    other.metadata = {key: value for key, value in model.metadata.items() if isinstance(value, str)}
    return other


def explain(case: Case, budget: float = 6.0) -> Explanation:
    """Faults of the catalogue that explain a case, the container's own first."""
    sealed = _container(case)
    settled = {id(d) for work in sealed.values() for d in work}
    found = Explanation(complete=True)
    if case.ref is not None and case.seen.format == "apr":
        # Re-encoded on purpose, or by a fault? The explanation that leaves nothing open wins; the fault if it is whole.
        tries = [None] if case.target is None else [None, case.target]
        matrices = [m for m in case.matches if m.of is not None and len(m.of.shape) > 1]
        re_encoded_ = case.target is not None and 2 * sum(m.kind is case.target for m in matrices) > len(matrices)
        results = []
        for target in tries:
            share = budget / len(tries)
            results.append(Hypotheses(case, target, settled, share).explain(2 if (target is not None) == re_encoded_ else 1))
            if results[-1].complete:
                break
        found = next((r for r in results if r.complete), max(results, key=lambda r: len(r.faults)))
    if case.ref is None and case.seen.format == "apr":
        found = _alone(case)
    found.faults += [FAULTS[id] for id in sealed]
    found.covers |= sealed
    return found


def _alone(case: Case) -> Explanation:
    """Without a reference: faults whose rule for names or labels gives every name or label of the file."""
    found = Explanation(complete=True)
    healthy = healthy_seams(case.seen.dialect)
    known = [m for m in case.matches if m.true is not None]
    rules: dict[str, Callable[[Seams], bool]] = {
        "name": lambda s: all(s.name(m.true) == m.piece.name for m in known if m.true is not None),
        "type": lambda s: all(m.kind is not None and s.code(m.kind) == m.piece.code for m in known),
    }
    for what, holds in rules.items():
        work = [d for d in case.deviations if d.what == what]
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


def _container(case: Case) -> dict[str, list[Deviation]]:
    """Ids of edits of the finished file, with the deviations that they leave."""
    covers: dict[str, list[Deviation]] = {}
    for words, id in CONTAINER_IDS.items():
        work = [d for d in case.deviations if d.layer == "container" and d.how.startswith(words)]
        if not work:
            continue
        lost = [d for d in case.deviations if d.layer == "container" and d.what == "bytes"]
        if id == "truncated" and "offset-shifted" in covers and len(lost) == 0:
            covers["offset-shifted"] += work  # the last tensor now ends beyond the file: no second fault
            continue
        if id == "truncated":
            work += lost
        if id == "overlapping-tensors":
            over = {d.match.piece.offset for d in work if d.match is not None}
            work += [d for d in case.deviations if d.what == "bytes" and d.match is not None and d.match.piece.offset in over]
        covers[id] = work
    return covers


__all__ = ["Explanation", "Hypotheses", "explain"]
