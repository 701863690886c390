"""The search for the smallest set of faults that would have written this file.

One fault, several side by side, or two on top of each other.
Which fault was really at work is never looked up, since nothing here can know it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from aprlab.faults import FAULTS, Fault
from aprlab.onion.clock import Budget
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.file_simulation import Key, SimulatedFile, Simulator
from aprlab.quants.types import TensorType


@dataclass
class Explanation:
    """Faults that explain deviations.

    Attributes:
        faults: in the order of the catalogue.
        covers: fault id -> deviations that are its work.
        same: fault id -> ids that would have left the same file.
        complete: together they reproduce the file, all of it.
        verified: tensors whose bytes were compared with what the faults would have written.
        tried: sets of faults that were tried.
    """

    faults: list[Fault] = field(default_factory=list)
    covers: dict[str, list[Deviation]] = field(default_factory=dict)
    same: dict[str, list[str]] = field(default_factory=dict)
    complete: bool = False
    verified: int = 0
    tried: int = 0


class FaultSearch(Simulator):
    """Tries faults of the catalogue on one case; arguments as for `Simulator`, and `limit`: after it none is tried."""

    def __init__(
        self, case: FileCase, target: TensorType | None, settled: set[int], budget: float = 8.0, limit: Budget | None = None
    ) -> None:
        super().__init__(case, target, settled, budget)
        self.limit = limit
        self._marked: dict[str, tuple[set[str], set[str]]] = {}

    def explain(self, most: int = 2) -> Explanation:
        """The smallest set of faults that explains the file."""
        found = Explanation()
        if not self.open:
            found.complete = True
            return found
        possible = [f for f in FAULTS.values() if f.seams is not None and self._may(f)]
        candidates = [f for f in self._in_time(possible) if self._compatible(f)]
        exact = [f for f in self._in_time(candidates) if self.reproduces([f])]
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

    def _in_time(self, faults: Iterable[Fault]) -> Iterator[Fault]:
        """These faults, as long as there is time; that some were left out is remembered."""
        for fault in faults:
            if self.limit is not None and self.limit.over:
                self.limit.leave_out("not every fault of the catalogue was tried on the file")
                return
            yield fault

    def _compatible(self, fault: Fault) -> bool:
        """Whether a few small tensors allow a fault at all: it must not change what is as it should be."""
        self.tried += 1
        out = self.outcome([fault], self.probes)
        if out is None:
            return True  # it needs the whole list of tensors
        for key, value in out.plain.items():
            if key[1] in self.ref.tensors and key not in self.open and self.actual.plain.get(key) != value:
                return False
        for key in out.content:
            known = key[1] in self.ref.tensors and key[1] not in out.untouched and key in self.actual.content
            if known and key not in self.open and ("size", key[1]) in self.actual.plain and not self.agree(out, key):
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
        return bool(self._kinds[id(fault)] & self._open_kinds)

    @cached_property
    def _open_kinds(self) -> set[str]:
        """Kinds of decision that came out wrong."""
        return {what for what, _ in self.open}

    @cached_property
    def _kinds(self) -> dict[int, set[str]]:
        return {}

    def _cover(self, found: Explanation, candidates: list[Fault]) -> None:
        """Faults whose whole footprint is in the file, as few as cover what is open."""
        left, holders = set(self.open), []
        for fault in self._in_time(candidates):
            if not self._holds_on_probes(fault):
                continue
            marks = self.footprint(fault)
            if marks is not None and marks[1] and self._nearly(*marks):
                holders.append((fault, marks[1]))
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

    def _nearly(self, touched: set[Key], held: set[Key]) -> bool:
        """Whether the file has all that a fault leaves, but for a few tensors whose values were changed by themselves."""
        lacking = touched - held
        tensors = sum(what == "bytes" for what, _ in touched)
        return all(what == "bytes" and who in self.changed for what, who in lacking) and 4 * len(lacking) <= tensors

    def _marks(self, fault: Fault) -> tuple[set[str], set[str]]:
        """Probes whose bytes a fault by itself changes, and those of them that it changes into what is found."""
        if fault.id not in self._marked:
            out = self.outcome([fault], self.probes)
            touched: set[str] = set()
            held: set[str] = set()
            if out is not None:
                touched = {w for _, w in out.content if w not in out.untouched and w in self.ref.tensors}
                held = {w for w in touched if ("bytes", w) in self.actual.content and self.agree(out, ("bytes", w))}
            self._marked[fault.id] = touched, held
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
            if time.process_time() > self.deadline or (self.limit is not None and self.limit.over):
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
        return self._open_kinds <= kinds

    def _fits(self, f: Fault, g: Fault) -> bool:
        """Whether the probes allow a pair: where one of the two alone changes bytes, they are what it alone makes of them."""
        (touch_f, held_f), (touch_g, held_g) = self._marks(f), self._marks(g)
        for who in self.probes:
            if ("bytes", who) not in self.actual.content or (who in touch_f and who in touch_g):
                continue
            if who in touch_f | touch_g:
                if who not in held_f | held_g:
                    return False
            elif ("bytes", who) in self.open:
                return False
        return True

    def _share(self, found: Explanation) -> None:
        """Each deviation to the fault whose work it is: the one that alone gives what is found, else any that touches it."""
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
            keys |= {k for k in changed if not strict or after.plain.get(k) == self.actual.plain.get(k)}
            keys |= {("bytes", w) for _, w in after.content if w in before.untouched and w not in after.untouched}
        return [d for d in self.case.deviations if _keys_of(d) & keys and not self._by_itself(d, alone)]

    def _by_itself(self, d: Deviation, out: SimulatedFile | None) -> bool:
        """Whether a tensor's values were changed otherwise than a fault would have changed them."""
        key = ("bytes", d.tensor)
        if d.kind != "bytes" or d.tensor not in self.changed or out is None or key not in out.content:
            return False
        return key in self.actual.content and not self.agree(out, key)


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
    return {(kind, who) for kind in kinds.get(d.kind, ())}


__all__ = ["Explanation", "FaultSearch"]
