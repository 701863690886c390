"""Peel: which layer is broken, in which tensors, by which mechanism, and the proof by repair.

Two files, or one file and what is known of its kind, or two engines on one file. Instruments first, then the layers
from the cheap end, then the runs, then the smallest repair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aprlab.errors import BROKEN, AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats.raw import Reference, look
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.blind_search import blind_search, lost_information, named_by_what_is_gone, unlike_any_encoder
from aprlab.onion.clock import Clock, Progress
from aprlab.onion.explanation import explain
from aprlab.onion.fault_search import Explanation
from aprlab.onion.file_case import FileCase
from aprlab.onion.findings import report, word_of
from aprlab.onion.fixes import Fix, drafted, search
from aprlab.onion.instrument_check import tested
from aprlab.onion.layers import FILE_LAYERS
from aprlab.onion.references import reference_of
from aprlab.onion.run_comparison import compare_runs
from aprlab.onion.run_peeling import peel_engines
from aprlab.onion.verdict import Finding, Repair, Verdict, Word
from aprlab.onion.words import Mechanism, refused
from aprlab.published import QUESTION
from aprlab.tracing.golden_rule import MAX_TOKENS, Golden, GoldenOutcome, best_engine


def peel(
    ref: str | Path | Model | None,
    cand: str | Path | None = None,
    *,
    engines: Sequence[str] | Sequence[Session] | None = None,
    fast: bool = False,
    engine: str | None = None,
    threads: int | None = None,
    prompt: str = QUESTION,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> Verdict:
    """Find out what is wrong with a file, or with an engine.

    Args:
        ref: the reference file; None to judge `cand` by the size law, statistics and what is known of its model.
        cand: the candidate, GGUF or APR, however broken.
        engines: two engines to compare on one model instead, by name (``jit``, or with faults of the
            catalogue, ``reference+rope-norm``), or two sessions.
        fast: stop at the first layer that finds something, and run nothing.
        engine: runs both files under the golden rule; None takes the compiled one for real models where it is there.
        threads: for the engines.
        prompt, max_tokens: of the golden rule.
        progress: see `Progress`; an error that it raises ends the work.

    Raises:
        UsageError: there is no such file, or neither two files nor two engines are given.
        FormatError, UnsupportedError: the *reference* cannot be read; a broken candidate is a finding, not an error.
    """
    if engines is not None:
        return peel_engines(
            ref if ref is not None else cand, engines, fast=fast, threads=threads, prompt=prompt, max_tokens=max_tokens,
            progress=progress,
        )  # fmt: skip
    options: dict[str, Any] = {"engine": engine, "threads": threads, "prompt": prompt, "max_tokens": max_tokens}
    return examine(ref, cand, fast=fast, progress=progress, **options)[0]


def examine(
    ref: str | Path | Model | None,
    cand: str | Path | None,
    *,
    fast: bool = False,
    engine: str | None = None,
    threads: int | None = None,
    prompt: str = QUESTION,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> tuple[Verdict, FileCase | None, list[Fix]]:
    """`peel` for files, with the case and the fixes that `repair` needs."""
    if cand is None:
        raise UsageError("two files are needed, or one and two engines", code="peel.two-files-needed")
    cand = Path(cand)
    clock = Clock(progress)
    with clock("instruments"):
        instruments, broken = tested()
    title = cand.name if ref is None else f"{Path(getattr(ref, 'path', ref)).name} against {cand.name}"  # type: ignore[arg-type]
    if broken:
        return Verdict("not-comparable", broken, instruments=instruments, seconds=clock, title=title), None, []
    with clock("open"):
        reference = None if ref is None else reference_of(ref)
        try:
            file = look(cand)
        except (FormatError, UnsupportedError) as error:
            return _unreadable(error, instruments, clock, title), None, []
    case = FileCase(file, reference)
    for layer in FILE_LAYERS:
        with clock(layer.name):
            found = list(layer.suspect(case))
        case.deviations += found
        clock.progress(layer.name, found)
        if fast and any(not d.harmless for d in case.deviations):
            break
    with clock("hypotheses"):
        other = _other_model(case)
        explanation = Explanation() if other or not case.deviations else explain(case)
    findings, fixes = report(case, explanation)
    if other is not None:
        findings, fixes = [other, *findings], []
    elif reference is None and not fast:
        with clock("blind search"):
            findings, fixes = _without_reference(case, findings, fixes, engine, threads, progress)
    word = word_of(findings, comparable=other is None)
    verdict = Verdict(word, findings, instruments=instruments, seconds=clock, title=title)
    if fast or other is not None:
        return verdict, case, fixes
    if reference is not None:
        _run(case, verdict, fixes, clock, engine, threads, prompt, max_tokens)
    elif fixes:
        verdict.repair = _alone(case, fixes, clock, engine, threads, prompt)
    return verdict, case, fixes


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


def _unreadable(error: AprlabError, instruments: dict[str, Any], clock: Clock, title: str) -> Verdict:
    """A file of which nothing more can be read: broken, or of a kind that is not handled."""
    evidence = {"offset": error.offset, "tensor": error.tensor}
    finding = Finding("container", None, [], refused(error, "container.unreadable"), evidence)
    word: Word = "not-comparable" if isinstance(error, UnsupportedError) else "broken"
    return Verdict(word, [finding], instruments=instruments, seconds=clock, title=title)


def _other_model(case: FileCase) -> Finding | None:
    """Whether the two are different models: then every comparison of tensors would be noise."""
    if case.ref is None:
        return None
    sizes = {name: tensor.size for name, tensor in case.ref.tensors.items()}
    alike = sum(math.prod(m.piece.shape) == sizes[m.true] for m in case.matches if m.true is not None)
    if 2 * alike >= len(sizes):
        return None
    evidence = {"tensors_alike": alike, "of": len(sizes)}
    return Finding("naming", None, [], Mechanism("naming.other-model"), evidence)


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(
    case: FileCase, verdict: Verdict, fixes: list[Fix], clock: Clock, engine: str | None, threads: int | None, prompt: str,
    max_tokens: int,
) -> None:  # fmt: skip
    """Golden rule before and after, first divergence, smallest repair; the verdict is completed in place."""
    assert case.ref is not None
    with clock("reference run"):
        name = engine if engine is not None else best_engine(case.ref.model)
        golden = golden_of(case.ref, name, threads, prompt, max_tokens)
    cost = any(m.of is not None and m.kind is not None and m.kind is not m.of.type for m in case.matches)
    with clock("run"):
        as_is = drafted(case, [])
        if isinstance(as_is, Model) and case.deviations:  # equal files are run once more below, under the golden rule
            verdict.first_divergence = first_divergence(golden, as_is)
    with clock("repair"):
        possible = [m for m in fixes if m.possible]

        def measure(some: Sequence[Fix]) -> GoldenOutcome:
            return golden.measure(drafted(case, some))

        found = search(possible, measure, cost=cost)
        if fixes:
            verdict.repair = found.repair
        elif verdict.findings:
            price = found.before.to_json()
            verdict.findings[0].evidence["cost"] = price
        elif not (found.before.bitwise and found.before.says_the_same):
            # Every byte and number agrees, and the runs do not: then one of the runs is not to be trusted.
            what = Finding("instrument", None, [], Mechanism("instrument.unequal-runs"), found.before.to_json(), 0.5)
            verdict.findings, verdict.verdict = [what], "ambiguous"


def first_divergence(golden: Golden, model: Model) -> dict[str, Any] | None:
    """The first trace point at which a candidate leaves the reference, on the reference's own prompt ids."""
    try:
        return compare_runs(golden.session, golden.session_of(model), golden.ids)
    except BROKEN:
        return None


def _without_reference(
    case: FileCase, findings: list[Finding], fixes: list[Fix], engine: str | None, threads: int | None, progress: Progress | None
) -> tuple[list[Finding], list[Fix]]:  # fmt: skip
    """What blocks and a run tell where no reference does: information that is gone, and faults that can be undone."""
    gone_for_good = any(not fix.possible and fix.finding.layer != "weights" for fix in fixes)
    more = lost_information(case)
    if not more and not gone_for_good:
        more = blind_search(case, fixes, engine=engine, threads=threads) or unlike_any_encoder(case)
    if not more:
        named_by_what_is_gone(case, findings)
    if more and progress is not None:
        progress("blind search", [d for fix in more for d in fix.deviations])
    settled = {name for fix in more for name in fix.finding.tensors}
    renamed = any(d.kind == "name" for fix in more for d in fix.deviations)
    vague = [
        fix for fix in fixes
        if set(fix.finding.tensors) <= settled and (not fix.possible or (renamed and fix.finding.layer == "layout"))
    ]  # fmt: skip
    gone = {id(fix.finding) for fix in vague}
    kept = [finding for finding in findings if id(finding) not in gone]
    return [*kept, *(fix.finding for fix in more)], [*(fix for fix in fixes if fix not in vague), *more]


def _alone(case: FileCase, fixes: list[Fix], clock: Clock, engine: str | None, threads: int | None, prompt: str) -> Repair | None:
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
            name = engine if engine is not None else best_engine(model)
            session = Session(model, engine=name, threads=threads)
            answer = session.generate(prompt, max_tokens=MAX_TOKENS, raw=session.wants_raw)
        except BROKEN as error:
            return Repair([m.label for m in possible], False, {"after": f"does not run: {error}"})
        proof = {"before": str(before) if isinstance(before, AprlabError) else "opens", "after": "opens", "answer": answer.text}
        needed = [m for m in possible if isinstance(drafted(case, [o for o in possible if o is not m]), AprlabError)]
        kept = needed or possible
        return Repair([m.label for m in kept], bool(needed), proof)


__all__ = ["examine", "peel"]
