"""Blind search: a file without a reference that does not speak as it should, and the catalogue's own faults, undone one by one.

Marks and the file itself propose, see `aprlab.onion.inverses`; each proposal is tried in memory, and a run decides: is the
conversation as likely again as a healthy model finds it? There is one measure of that, `aprlab.onion.health.nats`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from aprlab.engines.choice import is_small
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS
from aprlab.model.model import Model
from aprlab.onion.block_marks import unlikely
from aprlab.onion.clock import DEADLINE, Budget, Progress
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.fixes import Fix, ddmin, drafted
from aprlab.onion.health import allowed, nats, spoken
from aprlab.onion.inverses import TRANSPOSED, Inverse, exchanges, inverses, reordered
from aprlab.onion.lost_information import lost_information, named_by_what_is_gone, tensors_of, unlike_any_encoder
from aprlab.onion.order_marks import OrderMark, order_marks
from aprlab.onion.verdict import Finding, known
from aprlab.onion.words import Mechanism

GAIN = 0.3  # share of the nats that a step must take away; exchanges of parts of healthy files take away none
BETTER = 0.93  # geometric mean of the share of each token's surprise that exchanged parts leave: healthy 1.09 to 1.5, others 0.87
_CERTAIN = 1e-9  # nats of a token; fewer are none
FIRST = 3  # answers of the conversation that a real model is asked for at each step; the whole decides
_LOST = ("weights.all-zeros", "container.tensor-cut-off", "tokenizer.missing", "tokenizer.missing-or-empty")
MOST = 3  # faults on top of each other


@dataclass
class BlindSearch:
    """Tries inverses of faults on one case.

    Attributes:
        case: without a reference.
        known: fixes that are known already; they are applied first.
        engine, threads: for the runs.
        progress: see `aprlab.onion.clock.Progress`; called for each fault with the nats that its inverse leaves.
        budget: when it is over, no further inverse is tried.
        tried: id of each fault that was undone -> the fewest nats that it left.
        cut: whether something was left untried.
    """

    case: FileCase
    known: list[Fix]
    engine: str | None = None
    threads: int | None = None
    progress: Progress | None = None
    budget: Budget = field(default_factory=lambda: Budget(DEADLINE))
    tried: dict[str, float] = field(default_factory=dict)
    cut: bool = False

    @property
    def stopped(self) -> bool:
        """Whether the time is over while something is left to try, which is remembered."""
        self.cut = self.cut or self.budget.over
        return self.cut

    @cached_property
    def base(self) -> Model | AprlabError:
        """The file with what is known to be wrong fixed."""
        return drafted(self.case, self.known)

    @cached_property
    def answers(self) -> int | None:
        """How much of the conversation is run at each step: all of it where that costs nothing."""
        return None if isinstance(self.base, Model) and is_small(self.base) else FIRST

    @cached_property
    def start(self) -> float:
        """Nats of the file as it is, what is known fixed."""
        return nats(self.base, self.engine, self.threads, self.answers)

    @cached_property
    def marks(self) -> list[OrderMark]:
        """Marks of order of the file."""
        return order_marks({t.name: t for t in tensors_of(self.case)})

    @cached_property
    def odd(self) -> list[OrderMark]:
        """Those that no healthy file has."""
        return [mark for mark in self.marks if not mark.likely]

    def model(self, steps: Sequence[Inverse]) -> Model | AprlabError:
        """The file with what is known fixed, and these undone."""
        gone = {kind for step in steps for kind in step.replaces}
        before = [fix for fix in self.known if not {d.kind for d in fix.deviations} & gone]
        return drafted(self.case, [*before, *(step.trial() for step in steps)])

    def run(self, steps: Sequence[Inverse], *, whole: bool = False) -> float:
        """Nats with these undone."""
        return nats(self.model(steps), self.engine, self.threads, None if whole else self.answers)

    def limit(self, steps: Sequence[Inverse] = ()) -> float:
        """Nats that are healthy for this file."""
        model = self.base if isinstance(self.base, Model) else self.model(steps)
        return allowed(model) if isinstance(model, Model) else 0.0

    def search(self) -> list[Inverse]:
        """The fewest inverses that bring the file back to health; [] where none do, or it is healthy."""
        if isinstance(self.base, Model) and self.start <= self.limit():
            return self._exchanged()
        found = self._steps([])
        if not found and not self.stopped and self.proposed:
            found = self._steps(self.proposed)
        return found or self._pair()

    def _steps(self, start: list[Inverse]) -> list[Inverse]:
        """One inverse after another, each of which takes nats away, from some that marks propose; [] without health."""
        kept = list(start)
        best = self.run(kept) if kept else self.start
        if kept:
            self.tried[" + ".join(step.fault.id for step in kept)] = best
        while not kept or best > self.limit(kept):
            step = self._best_step(kept)
            if step is None or not step[1] < best * (1 - GAIN) or len(kept) == MOST:
                return []
            kept, best = [*kept, step[0]], step[1]
        if self.answers is not None and self.run(kept, whole=True) > self.limit(kept):
            return []
        limit = self.limit(kept)
        return ddmin(kept, lambda some: self.run(some) <= limit)

    def _pair(self) -> list[Inverse]:
        """Two inverses of which neither helps alone: all pairs, in a model that is run in no time."""
        if self.answers is not None or not isinstance(self.base, Model):
            return []
        exact: list[Inverse] = []
        for inverse in () if self.stopped else inverses(self.case, self.base):
            if self.stopped:
                return []
            if inverse.exact and inverse.fault.layer != "config":
                exact.append(inverse)
        for pair in itertools.combinations(exact, 2):
            if self.stopped:
                break
            if self.run(pair) <= self.limit(pair):
                return list(pair)
        return []

    @cached_property
    def proposed(self) -> list[Inverse]:
        """What marks propose to undo, whether or not it helps alone: exchanges of names, and an order of fields of blocks."""
        wanted = {id_ for mark in self.odd for id_ in mark.suggests}
        found = [inverse for inverse in exchanges(self.case) if inverse.fault.id in wanted] if wanted else []
        if isinstance(self.base, Model) and unlikely(self.base.tensors.values()):
            for inverse in reordered(self.case, self.base):
                made = self.model([inverse])
                if isinstance(made, Model) and not unlikely(made.tensors.values()):
                    return [*found, inverse]
                if self.stopped:
                    break
        return found

    def _best_step(self, kept: list[Inverse]) -> tuple[Inverse, float] | None:
        """The inverse that leaves the fewest nats; the first that restores health ends the search."""
        best: tuple[Inverse, float] | None = None
        taken = {inverse.fault.id for inverse in kept}
        made = self.model(kept) if kept else self.base
        suggested = [id_ for mark in self.odd for id_ in mark.suggests]
        against = [id_ for mark in self.marks if mark.likely for id_ in mark.suggests if id_ in TRANSPOSED]
        for inverse in inverses(self.case, made if isinstance(made, Model) else None, suggested, against):
            if inverse.fault.id in taken:
                continue
            if self.stopped:
                break
            left = self._tried(inverse, kept)
            if best is None or left < best[1]:
                best = inverse, left
            if left <= self.limit([*kept, inverse]):
                break
        return best

    def _exchanged(self) -> list[Inverse]:
        """A file that speaks well, and better still with two parts of it exchanged: no healthy file does.

        A mean over certain answers hangs on a few tokens. So most tokens must be more certain as well: the geometric mean.
        """
        if self.answers is not None:
            return []  # a real model has too many tokens to ask for what marks do not propose
        before = spoken(self.base, self.engine, self.threads)
        for inverse in exchanges(self.case):
            if self.stopped:
                break
            after = spoken(self.model([inverse]), self.engine, self.threads)
            if before is None or after is None or after.shape != before.shape:
                continue
            self.tried[inverse.fault.id] = left = float(after.mean())
            with np.errstate(all="ignore"):
                ratio = float(np.exp(np.mean(np.log(np.maximum(after, _CERTAIN) / np.maximum(before, _CERTAIN)))))
            if left < self.start * (1 - GAIN) and ratio < BETTER:
                return [inverse]
        return []

    def _tried(self, inverse: Inverse, kept: Sequence[Inverse]) -> float:
        left = self.run([*kept, inverse])
        self.tried[inverse.fault.id] = min(left, self.tried.get(inverse.fault.id, math.inf))
        if self.progress is not None:
            self.progress(f"undone: {inverse.fault.id}, {left:.3g} nats", None)
        return left


# ── one file ──────────────────────────────────────────────────────────────────────────────────────────────────────


def without_reference(
    case: FileCase, findings: list[Finding], fixes: list[Fix], engine: str | None, threads: int | None,
    progress: Progress | None = None, record: dict[str, Any] | None = None, budget: Budget | None = None,
) -> tuple[list[Finding], list[Fix]]:  # fmt: skip
    """What blocks and a run tell where no reference does: information that is gone, and faults that can be undone.

    Args:
        case: the file.
        findings, fixes: of the layers.
        engine, threads, progress: as for `BlindSearch`.
        record: gets ``undone``: what each fault that was undone left of the nats.
        budget: of the search; is told what was left out. None is one of `DEADLINE`.
    """
    more = lost_information(case)
    budget = budget if budget is not None else Budget(DEADLINE)
    search = BlindSearch(case, [fix for fix in fixes if fix.possible], engine, threads, progress, budget)
    if more or any(_gone(fix) for fix in fixes):  # no run can be healthy again
        more += by_marks_alone(search, [*findings, *(fix.finding for fix in more)])
    else:
        undone = search.search()
        if undone:
            more = _proved(search, undone)
            replaced = {kind for inverse in undone for kind in inverse.replaces}
            findings, fixes = _without_kinds(findings, fixes, replaced)
        elif isinstance(search.base, Model) and search.start <= search.limit():
            _named_by_health(fixes)
        else:
            more = by_marks_alone(search, findings)
            if not any(fix.finding.layer == "decode" for fix in more):
                more += unlike_any_encoder(case, search.start)
    if not more:
        named_by_what_is_gone(case, findings)
    if search.cut:
        budget.leave_out(f"not every fault of the catalogue was undone to see whether that helps ({len(search.tried)} were)")
    if record is not None and search.tried:
        record["undone"] = {"as it is": search.start, **search.tried}
    return _settled(findings, fixes, more)


def _gone(fix: Fix) -> bool:
    """Whether a fix needs what the file does not have; odd values may be anything, and come back."""
    return any(d.code in _LOST or (d.kind == "missing" and not d.fixable) for d in fix.deviations)


def _proved(search: BlindSearch, undone: Sequence[Inverse]) -> list[Fix]:
    """Inverses that restore health, as fixes: proved where the file was not healthy before, and comes back bit for bit."""
    ill = search.start > search.limit()
    figures = {"nats_before": search.start, "nats_after": search.run(undone, whole=True)}
    return [
        step.fix(figures, 1.0 if ill and step.exact and step.fault.layer != "config" else 0.9 if ill else 0.7) for step in undone
    ]


def by_marks_alone(search: BlindSearch, findings: Sequence[Finding]) -> list[Fix]:
    """What marks say where no run can decide, since something else is broken as well."""
    taken = {finding.fault for finding in findings}
    marks = [str(mark) for mark in search.odd]
    found = [step.fix({"marks": marks}, 0.7) for step in search.proposed if step.fault.id not in taken]
    channels = [mark for mark in search.odd if mark.name == "channels-agree"]
    if channels and isinstance(search.base, Model) and not found and not findings:
        cause = Mechanism("layout.channels-disagree")
        names = [t.name for t in tensors_of(search.case) if t.name.endswith(("attn_q.weight", "attn_k.weight"))]
        finding = Finding("layout", None, names, cause, {"mark": str(channels[0])}, 0.7)
        found.append(Fix(finding, [Deviation("bytes", name, None, None, cause) for name in names]))
    return found


def _without_kinds(
    findings: list[Finding], fixes: list[Fix], kinds: Iterable[str]
) -> tuple[list[Finding], list[Fix]]:
    """Without the fixes of these kinds of deviation, and their findings: something else explains them."""
    gone = [fix for fix in fixes if {d.kind for d in fix.deviations} & set(kinds)]
    dropped = {id(fix.finding) for fix in gone}
    return [f for f in findings if id(f) not in dropped], [fix for fix in fixes if fix not in gone]


def _named_by_health(fixes: list[Fix]) -> None:
    """What the file speaks well after is what was wrong, no more: dims in reverse with the data as they should be."""
    for fix in fixes:
        finding = fix.finding
        if finding.fault is None and finding.code == "layout.dims-reversed":
            finding.fault, finding.cause = "dims-swapped", known(FAULTS["dims-swapped"])


def _settled(findings: list[Finding], fixes: list[Fix], more: list[Fix]) -> tuple[list[Finding], list[Fix]]:
    """Findings and fixes with `more`, which speak for their tensors where others had only noticed that something is odd."""
    settled = {name for fix in more for name in fix.finding.tensors}
    renamed = any(d.kind == "name" for fix in more for d in fix.deviations)
    vague = [
        fix for fix in fixes
        if fix.finding.tensors and set(fix.finding.tensors) <= settled
        and (not fix.possible or (renamed and fix.finding.layer == "layout"))
    ]  # fmt: skip
    gone = {id(fix.finding) for fix in vague}
    kept = [finding for finding in findings if id(finding) not in gone]
    return [*kept, *(fix.finding for fix in more)], [*(fix for fix in fixes if fix not in vague), *more]


__all__ = ["GAIN", "BlindSearch", "without_reference"]
