"""Peel: which layer is broken, in which tensors, by which mechanism, and the proof by repair.

Two files, or one file and what is known of its kind, or two engines on one file. Instruments first, then the layers
from the cheap end, then the runs, then the smallest repair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab.engines import AUTO, choose, parse
from aprlab.errors import BROKEN, AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats.identity import FILE_ONLY, file_only, identify
from aprlab.formats.raw import Reference, Seen, from_model, look
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion import opening, run_cost
from aprlab.onion.clock import DEADLINE, Budget, Clock, Progress
from aprlab.onion.explanation import explain
from aprlab.onion.fault_search import Explanation
from aprlab.onion.file_case import FileCase
from aprlab.onion.file_only import judge_file_only
from aprlab.onion.findings import report, word_alone, word_of
from aprlab.onion.fixes import Fix, drafted, search
from aprlab.onion.instrument_check import tested
from aprlab.onion.layers import FILE_LAYERS
from aprlab.onion.references import reference_of
from aprlab.onion.run_comparison import compare_runs
from aprlab.onion.verdict import LAYERS, Finding, Repair, Verdict
from aprlab.onion.vocabulary_rows import aligned
from aprlab.onion.words import Mechanism, refused
from aprlab.published import QUESTION
from aprlab.tracing.golden_rule import MAX_TOKENS, Golden, GoldenOutcome

if TYPE_CHECKING:
    from aprlab.sources.choice import Spec

# What two files need is loaded with this module; what other questions need as well (one file, engines, sources) when asked.
_TRIED_WITHOUT = 32  # fixes, each of which is left out once to see whether it is needed; of more, all are kept


def peel(
    ref: str | Path | Model | None,
    cand: str | Path | Model | None = None,
    *,
    engines: Sequence[str] | Sequence[Session] | None = None,
    sources: Sequence[Spec] | None = None,
    fast: bool = False,
    engine: str | None = "auto",
    threads: int | None = None,
    prompt: str = QUESTION,
    max_tokens: int = MAX_TOKENS,
    statistics: str | Path | None = None,
    deadline: float = DEADLINE,
    progress: Progress | None = None,
) -> Verdict:
    """Find out what is wrong with a file, with an engine, or with any program that leaves a trace.

    Args:
        ref: the reference, a file or an opened model; None to judge `cand` alone: by the size law, statistics, what is
            known of its model, and a run (see `aprlab.onion.health`).
        cand: the candidate, GGUF or APR, however broken; or an opened model.
        engines: two engines to compare on one model instead, by name (``jit``, or with faults of the
            catalogue, ``reference+rope-norm``), or two sessions.
        sources: one or more programs to judge on one model instead, each by itself: names (``llama.cpp,flash=on``,
            ``reference``, ``reference+rope-norm``), sessions, or sources that are there already.
        fast: stop at the first layer that finds something, and run nothing; one file alone is then never ``healthy``.
        engine: runs both files under the golden rule; see `aprlab.engines.create`.
        threads: for the engines.
        prompt, max_tokens: of the golden rule.
        statistics: a published table of figures of a healthy file's tensors, in place of a reference.
        deadline: seconds for the search for an explanation of one file alone by runs; what was not tried then is in
            `Verdict.not_looked_at`, and the file is never ``healthy``.
        progress: see `Progress`; an error that it raises ends the work.

    Raises:
        UsageError: there is no such file, neither two files nor two engines are given, or statistics beside a reference.
        FormatError, UnsupportedError: the *reference* cannot be read; a broken candidate is a finding, not an error.
    """
    if engines is not None:
        from aprlab.onion.run_peeling import peel_engines

        return peel_engines(
            ref if ref is not None else cand, engines, fast=fast, threads=threads, prompt=prompt, max_tokens=max_tokens,
            progress=progress,
        )  # fmt: skip
    if sources is not None:
        judged = ref if ref is not None else cand
        if judged is None:
            raise UsageError("sources are judged on a model: give one", code="source.no-model")
        from aprlab.onion.source_peeling import peel_sources

        return peel_sources(judged, sources, prompt=prompt, threads=threads, progress=progress)
    options: dict[str, Any] = {"engine": engine, "threads": threads, "prompt": prompt, "max_tokens": max_tokens}
    return examine(ref, cand, fast=fast, progress=progress, statistics=statistics, deadline=deadline, **options)[0]


def examine(
    ref: str | Path | Model | None,
    cand: str | Path | Model | None,
    *,
    fast: bool = False,
    engine: str | None = "auto",
    threads: int | None = None,
    prompt: str = QUESTION,
    max_tokens: int = MAX_TOKENS,
    statistics: str | Path | None = None,
    deadline: float = DEADLINE,
    progress: Progress | None = None,
) -> tuple[Verdict, FileCase | None, list[Fix]]:
    """`peel` for files, with the case and the fixes that `repair` needs."""
    if cand is None:
        raise UsageError("two files are needed, or one and two engines", code="peel.two-files-needed")
    if ref is not None and statistics is not None:
        raise UsageError("a table of statistics takes the place of a reference: give one of them", code="peel.two-references")
    parse(engine)
    if not deadline >= 0:
        raise UsageError(f"a deadline of {deadline:g} seconds", code="peel.deadline")
    asked = _Asked(engine, threads, prompt, max_tokens, fast, deadline)
    clock = Clock(progress)
    with clock("instruments"):
        instruments, broken = tested()
    verdict = Verdict("not-comparable", broken, instruments=instruments, seconds=clock, **_sides(ref, cand))
    verdict.engine_asked = engine or AUTO
    if broken:
        return verdict, None, []
    with clock("open"):
        reference = None if ref is None else reference_of(ref)
        file = _taken_apart(cand, reference)
        if not isinstance(file, Seen):
            _unreadable(verdict, *file)
            return verdict, None, []
        rows: list[Finding] = []
        if reference is not None and file.unrun is None:
            reference, rows = aligned(file, reference)
    _layers(case := FileCase(file, reference), clock, verdict, fast)
    if reference is None and file.unrun is None:
        _more_alone(case, clock, asked, verdict, statistics)
    with clock("hypotheses"):
        other = _other_model(case)
        nothing = other or not case.deviations or file.unrun is not None
        explanation = Explanation() if nothing else _explained(case, asked, verdict)
    verdict.findings, fixes = report(case, explanation)
    verdict.findings[:0] = rows
    if other is not None:
        verdict.findings = [other, *verdict.findings]
        return verdict, case, []
    model = cand if isinstance(cand, Model) else None
    if file.unrun is not None:
        judge_file_only(case, verdict, model)
        return verdict, case, []
    if reference is None:
        fixes = _judge_alone(case, verdict, fixes, clock, asked, model)
    else:
        fixes = _judge_pair(case, verdict, fixes, clock, asked, model)
    return verdict, case, fixes


def _explained(case: FileCase, asked: _Asked, verdict: Verdict) -> Explanation:
    """The catalogue's explanation; next to a reference what the deadline left untried is said in the verdict."""
    if case.ref is None:
        return explain(case)
    found = explain(case, limit=asked.budget)
    if asked.budget.left_out:
        verdict.not_looked_at["catalogue"] = asked.budget.in_words
    return found


def _more_alone(case: FileCase, clock: Clock, asked: _Asked, verdict: Verdict, statistics: str | Path | None) -> None:
    """What one file alone is asked besides its layers: a published table, and types that only a run can tell; in place."""
    from aprlab.instruments.statistics_tables import read_statistics
    from aprlab.onion.open_types import settle_open_types
    from aprlab.onion.published_statistics import statistics_deviations

    if statistics is not None:
        with clock("statistics"):
            table = read_statistics(statistics)
            verdict.compared["statistics"] = table.path.name
            case.deviations += statistics_deviations(case, table)
    if not asked.fast:
        with clock("open types"):
            settle_open_types(case, asked.engine, asked.threads, asked.budget)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is run, and how."""

    engine: str | None
    threads: int | None
    prompt: str
    max_tokens: int
    fast: bool
    deadline: float

    @cached_property
    def budget(self) -> Budget:
        """Of the search for an explanation; begins when it is first asked for."""
        return Budget(self.deadline)

    def engine_for(self, model: Model) -> str:
        return choose(self.engine, model, threads=self.threads).spec


def _sides(ref: str | Path | Model | None, cand: str | Path | Model) -> dict[str, Any]:
    """Title of a verdict, and what it says was compared with what."""
    name = _name(cand)
    if ref is None:
        return {"title": f"{name}, alone (no reference)", "compared": {"reference": None, "candidate": name}}
    other = _name(ref)
    return {"title": f"{other} against {name}", "compared": {"reference": other, "candidate": name}}


def _name(side: str | Path | Model) -> str:
    return (side.path if isinstance(side, Model) else Path(side)).name


def _taken_apart(cand: str | Path | Model, reference: Reference | None) -> Seen | tuple[AprlabError, bool]:
    """The candidate taken apart; or why nothing more can be read of it, and whether it is a model that was damaged."""
    unrun = None if reference is None else file_only(reference.model)
    comparable = ("identity.unpadded", *(FILE_ONLY if reference is None or unrun is not None else ()))
    try:
        if isinstance(cand, Model):
            error, damaged = file_only(cand), False
        else:
            what = identify(cand)
            error, damaged = (what.error if Path(cand).exists() else None), what.kind == "damaged"
        if error is not None and error.code not in comparable:
            return error, damaged
        file = from_model(cand) if isinstance(cand, Model) else look(Path(cand))
    except (FormatError, UnsupportedError) as error:
        return error, isinstance(error, FormatError)
    if unrun is not None and file.unrun is None:  # judged as what the reference is
        file.unrun = unrun
        for piece in file.pieces:
            piece.stated, piece.naming = piece.name, "raw"
    return file


def _layers(case: FileCase, clock: Clock, verdict: Verdict, fast: bool) -> None:
    """Every layer in turn, the cheap ones first; fast: up to the first that finds something."""
    if fast:
        verdict.not_looked_at["forward"] = "nothing is run with --fast"
    for n, layer in enumerate(FILE_LAYERS, 1):
        with clock(layer.name):
            found = list(layer.suspect(case))
        case.deviations += found
        clock.progress(layer.name, found)
        if fast and any(not d.harmless for d in case.deviations):
            left = dict.fromkeys((later.name for later in FILE_LAYERS[n:]), f"--fast ends at the first finding ({layer.name})")
            verdict.not_looked_at = left | verdict.not_looked_at
            break


# ── one file ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge_alone(
    case: FileCase, verdict: Verdict, fixes: list[Fix], clock: Clock, asked: _Asked, model: Model | None
) -> list[Fix]:  # fmt: skip
    """Without a reference: the strict reader, then a run; the verdict is completed in place. Returns the fixes left."""
    from aprlab.onion import health
    from aprlab.onion.blind_search import without_reference

    if not asked.fast:
        with clock("blind search"):
            verdict.findings, fixes = without_reference(
                case, verdict.findings, fixes, asked.engine, asked.threads, clock.progress, verdict.health, asked.budget
            )
        if asked.budget.left_out:
            verdict.not_looked_at["forward"] = asked.budget.in_words
    with clock("strict"):
        opened = opening.opened(case.file, prompt=asked.prompt, max_tokens=asked.max_tokens, model=model)
        known_cause = opened.refusal is None or opening.explained(opened, case, verdict.findings, fixes)
    bad = [f for f in verdict.findings if not f.harmless]
    convention = all(f.confidence < 1.0 and f.layer in ("config", "tokenizer") for f in bad)
    if not known_cause or (opened.refusal is not None and convention):  # it explains the refusal, which proves it
        verdict.findings.insert(0, opening.finding(opened))
    if not known_cause and isinstance(opened.error, UnsupportedError):
        verdict.verdict = "unproved"
        return []
    if opened.refusal is not None or asked.fast:
        verdict.verdict = word_alone(verdict.findings, "unproved")
        if fixes and not asked.fast and known_cause:
            verdict.repair = _alone(case, fixes, clock, asked)
        return fixes if known_cause else []
    assert opened.model is not None
    with clock("health"):
        found = health.Health("broken")
        try:
            verdict.engine = asked.engine_for(opened.model)
            session = Session(opened.model, engine=verdict.engine, threads=asked.threads, tokenizer=opened.tokenizer)
        except BROKEN as error:
            refusal = error if isinstance(error, AprlabError) else FormatError(str(error), code="onion.does-not-run")
            found.fail("broken", refused(refusal, "forward.refused"), 1.0)
        else:
            found = health.examine(session, lambda test: clock.progress(f"health: {test}", None))
    verdict.findings += found.findings
    verdict.health = {**found.figures, **verdict.health}
    # Where the search was cut short, something that a run can tell was not looked at.
    state = "unproved" if verdict.not_looked_at and found.state == "healthy" else found.state
    verdict.verdict = word_alone(verdict.findings, state)
    if fixes:
        verdict.repair = _alone(case, fixes, clock, asked)
    return fixes


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────

_GOLDEN: dict[tuple[int, str, str, int, int | None], tuple[Reference, Golden]] = {}


def golden_of(reference: Reference, engine: str, threads: int | None, prompt: str, max_tokens: int) -> Golden:
    """The reference's answer, remembered with the reference itself."""
    key = (id(reference), engine, prompt, max_tokens, threads)
    if key not in _GOLDEN or _GOLDEN[key][0] is not reference:
        if len(_GOLDEN) >= 2:  # the sessions hold weights
            _GOLDEN.clear()
        golden = Golden(reference.model, engine=engine, threads=threads, prompt=prompt, max_tokens=max_tokens)
        _GOLDEN[key] = (reference, golden)
    return _GOLDEN[key][1]


def _unreadable(verdict: Verdict, error: AprlabError, damaged: bool) -> None:
    """A file of which nothing more can be read: a damaged model, or something else that is no model we know."""
    evidence = {"offset": error.offset, "tensor": error.tensor}
    verdict.findings = [Finding("container", None, [], refused(error, "container.unreadable"), evidence)]
    verdict.verdict = "broken" if damaged else "not-comparable"
    verdict.not_looked_at = dict.fromkeys((n for n in LAYERS if n not in ("container", "instrument")), "the file is refused")


def _other_model(case: FileCase) -> Finding | None:
    """Whether the two are different models: then every comparison of tensors would be noise."""
    if case.ref is None:
        return None
    sizes = {name: tensor.size for name, tensor in case.ref.tensors.items()}
    alike = sum(math.prod(m.piece.shape) == sizes[m.true] for m in case.matches if m.true is not None)
    equal = sum(m.equal and len(m.shape) > 1 for m in case.matches)  # vectors of ones or zeros are alike in all models
    if 2 * alike >= min(len(sizes), len(case.matches)) > 0 or 10 * equal >= sum(len(p.shape) > 1 for p in case.file.pieces) > 0:
        return None  # tensors are missing or changed, and the findings name them
    evidence = {"tensors_alike": alike, "of": len(sizes), "matrices_equal": equal}
    return Finding("naming", None, [], Mechanism("naming.other-model"), evidence)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge_pair(
    case: FileCase, verdict: Verdict, fixes: list[Fix], clock: Clock, asked: _Asked, model: Model | None
) -> list[Fix]:  # fmt: skip
    """Beside a reference: the strict reader, then both runs; the verdict is completed in place. Returns the fixes left."""
    assert case.ref is not None
    golden = None
    if not asked.fast:
        with clock("reference run"):
            verdict.engine = asked.engine_for(case.ref.model)
            golden = golden_of(case.ref, verdict.engine, asked.threads, asked.prompt, asked.max_tokens)
    with clock("strict"):
        shared = None if golden is None else golden.session.tokenizer
        opened = opening.opened(case.file, prompt=asked.prompt, max_tokens=asked.max_tokens, model=model, known=shared)
        known_cause = opened.refusal is None or opening.explained(opened, case, verdict.findings, fixes)
    if not known_cause:
        alone = all(f.harmless for f in verdict.findings)
        verdict.findings.insert(0, opening.finding(opened))
        unknown = isinstance(opened.error, UnsupportedError) and (alone or opened.error.code == "forward.foreign-tensor")
        verdict.verdict = word_of(verdict.findings, comparable=not unknown)
        return []
    verdict.verdict = word_of(verdict.findings, comparable=True)
    if golden is not None:
        _run(case, verdict, fixes, clock, golden, opened)
    return fixes


def _run(
    case: FileCase, verdict: Verdict, fixes: list[Fix], clock: Clock, golden: Golden, opened: opening.Opened
) -> None:  # fmt: skip
    """Golden rule before and after, first divergence, smallest repair; the verdict is completed in place."""
    assert case.ref is not None
    cost = any(m.of is not None and m.kind is not None and m.kind is not m.of.type for m in case.matches)
    as_is = _as_it_is(case, opened)
    with clock("run"):
        if isinstance(as_is, Model) and case.deviations:  # equal files are run once more below, under the golden rule
            verdict.first_divergence = first_divergence(golden, as_is)
    with clock("repair"):
        possible = [m for m in fixes if m.possible]

        def measure(some: Sequence[Fix]) -> GoldenOutcome:
            return golden.measure(drafted(case, some) if some else as_is)

        found = search(possible, measure, cost=cost)
        if fixes:
            verdict.repair = found.repair
            return
        before = found.before
        if before.error is None:
            verdict.cost = run_cost.measured(before, golden)
        if verdict.findings:
            verdict.findings[0].evidence["cost"] = before.to_json()
        if before.error is not None or not np.isfinite(before.distance):
            message = before.error or "logits are not finite"
            cause = Mechanism("forward.refused", {"rule": "golden.does-not-run", "message": message})
            verdict.findings.insert(0, Finding("forward", None, [], cause, before.to_json()))
            verdict.verdict = "broken"
        elif not before.says_the_same and not cost:
            # Every byte and number agrees, and the runs do not: then one of the runs is not to be trusted.
            what = Finding("instrument", None, [], Mechanism("instrument.unequal-runs"), before.to_json(), 0.5)
            verdict.findings, verdict.verdict = [what, *verdict.findings], "ambiguous"
        elif cost:
            _judge_cost(case, verdict, golden, before)
        elif not verdict.findings and not before.bitwise:
            what = Finding("instrument", None, [], Mechanism("instrument.unequal-runs"), before.to_json(), 0.5)
            verdict.findings, verdict.verdict = [what], "ambiguous"


def _judge_cost(case: FileCase, verdict: Verdict, golden: Golden, before: GoldenOutcome) -> None:
    """What the run of a re-encoded file lost, and whether its types explain that; the verdict is completed in place."""
    verdict.cost = run_cost.measured(before, golden, run_cost.allowed(case, golden))
    found = run_cost.cost_finding(verdict.cost)
    if found is None:
        return
    if found.harmless:
        verdict.findings.append(found)
    else:
        verdict.findings, verdict.verdict = [found, *verdict.findings], "ambiguous"


def _as_it_is(case: FileCase, opened: opening.Opened) -> Model | AprlabError:
    """The file under the golden rule before anything is fixed: what the strict reader has of it, or why it refuses.

    Bytes that are the reference's are read from the reference's file, where config and tokenizer are as the strict
    reader has them: one copy in memory serves both sides.
    """
    if opened.error is not None:
        return opened.error
    assert opened.model is not None
    draft = drafted(case, [])
    if isinstance(draft, AprlabError):
        return opened.model
    alike = draft.config == opened.model.config and draft.tokenizer == opened.model.tokenizer
    return draft if alike else opened.model


def first_divergence(golden: Golden, model: Model) -> dict[str, Any] | None:
    """The first trace point at which a candidate leaves the reference, on the reference's own prompt ids."""
    try:
        return compare_runs(golden.session, golden.session_of(model), golden.ids)
    except BROKEN:
        return None


def _alone(case: FileCase, fixes: list[Fix], clock: Clock, asked: _Asked) -> Repair | None:
    """Without a reference: the fixed file must open and answer in finite numbers; what it answers is shown."""
    possible = [m for m in fixes if m.possible]
    if not possible:
        return None
    with clock("repair"):
        model = drafted(case, possible)
        if isinstance(model, AprlabError):
            return None
        before = drafted(case, [])
        try:
            session = Session(model, engine=asked.engine_for(model), threads=asked.threads)
            answer = session.generate(asked.prompt, max_tokens=MAX_TOKENS, raw=session.wants_raw)
        except BROKEN as error:
            return Repair([m.label for m in possible], False, {"after": f"does not run: {error}"})
        proof = {"before": str(before) if isinstance(before, AprlabError) else "opens", "after": "opens", "answer": answer.text}
        few = possible if len(possible) <= _TRIED_WITHOUT else []
        needed = [m for m in few if isinstance(drafted(case, [o for o in possible if o is not m]), AprlabError)]
        kept = needed or possible
        return Repair([m.label for m in kept], bool(needed), proof)


__all__ = ["examine", "golden_of", "peel"]
