"""Peel: which layer is broken, in which tensors, by which mechanism, and the proof by repair.

Two files, or one file and what is known of its kind, or two engines on one file. Instruments first, then the layers
from the cheap end, then the runs, then the smallest repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aprlab.errors import BROKEN, AprlabError, FormatError, UnsupportedError
from aprlab.formats.raw import Reference, look
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.clock import Clock, Progress
from aprlab.onion.hypotheses import Explanation, explain
from aprlab.onion.instrument_check import tested
from aprlab.onion.layers import FILE_LAYERS, Case, Deviation
from aprlab.onion.layers.base import tensors_of
from aprlab.onion.references import reference_of
from aprlab.onion.repairs import Mend, drafted, search
from aprlab.onion.run_comparison import compare_runs
from aprlab.onion.run_peeling import peel_engines
from aprlab.onion.verdict import LAYERS, Finding, Mended, Verdict, Word
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
        ref: the file that is believed; None to judge `cand` by the size law, statistics and what is known of its model.
        cand: the file that is suspected, GGUF or APR, however broken.
        engines: two engines to hold against each other on one model instead, by name (``jit``, or with faults of the
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
) -> tuple[Verdict, Case | None, list[Mend]]:
    """`peel` for files, with the case and the mends that `repair` needs."""
    from aprlab.errors import UsageError

    if cand is None:
        raise UsageError("two files are needed, or one and two engines")
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
            seen = look(cand)
        except (FormatError, UnsupportedError) as error:
            return _unreadable(error, instruments, clock, title), None, []
    case = Case(seen, reference)
    for layer in FILE_LAYERS:
        with clock(layer.name):
            found = list(layer.suspect(case))
        case.deviations += found
        clock.progress(layer.name, found)
        if fast and any(not d.harmless for d in case.deviations):
            break
    with clock("hypotheses"):
        strange = _other_model(case)
        explanation = Explanation() if strange or not case.deviations else explain(case)
    findings, mends = told(case, explanation)
    if strange is not None:
        findings, mends = [strange, *findings], []
    word = _word(findings, strange=strange is not None)
    verdict = Verdict(word, findings, instruments=instruments, seconds=clock, title=title)
    if fast or strange is not None:
        return verdict, case, mends
    if reference is not None:
        _run(case, verdict, mends, clock, engine, threads, prompt, max_tokens)
    elif mends:
        verdict.repair = _alone(case, mends, clock, engine, threads, prompt)
    return verdict, case, mends


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
    finding = Finding("container", None, [], error.message, evidence)
    word: Word = "not-comparable" if isinstance(error, UnsupportedError) else "broken"
    return Verdict(word, [finding], instruments=instruments, seconds=clock, title=title)


def _other_model(case: Case) -> Finding | None:
    """Whether the two are different models: then every comparison of tensors would be noise."""
    if case.ref is None:
        return None
    sizes = {name: tensor.size for name, tensor in case.ref.tensors.items()}
    alike = 0
    for match in case.matches:
        if match.true is not None:
            n = 1
            for length in match.piece.shape:
                n *= length
            alike += n == sizes[match.true]
    if 2 * alike >= len(sizes):
        return None
    mechanism = "these are not two files of one model"
    return Finding("naming", None, [], mechanism, {"tensors_alike": alike, "of": len(sizes)})


# ── findings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def told(case: Case, explanation: Explanation) -> tuple[list[Finding], list[Mend]]:
    """Deviations as findings: one for each fault of the catalogue, then one for each mechanism that is left."""
    by_layer = {layer.name: layer for layer in FILE_LAYERS}
    findings: list[Finding] = []
    mends: list[Mend] = []
    spent: set[int] = set()
    for fault in explanation.faults:
        work = [d for d in explanation.covers.get(fault.id, []) if id(d) not in spent]
        if not work:
            continue
        spent |= {id(d) for d in work}
        by = {name: [d for d in work if d.layer == name] for name in LAYERS}
        parts = [by_layer.get(name, by_layer["weights"]).explain(case, some) for name, some in by.items()]
        told_ = [part for group in parts for part in group]
        evidence: dict[str, Any] = {"found": [part.mechanism for part in told_]}
        for part in told_[:1]:
            evidence |= part.evidence
        if fault.id in explanation.same:
            evidence["leaves_the_same_file_as"] = explanation.same[fault.id]
        if fault.section != "C" or fault.post is None:
            evidence["reproduces_the_file" if case.ref is not None else "rule_holds_for_all_tensors"] = explanation.complete
        harmless = all(d.harmless for d in work)
        sure = 1.0 if explanation.complete else 0.9
        finding = Finding(fault.layer, fault.id, tensors_of(work), fault.title, evidence, sure, harmless=harmless)
        findings.append(finding)
        if not harmless:
            mends.append(Mend(finding, [d for d in work if not d.harmless]))
    for name in LAYERS:
        left = [d for d in case.deviations if id(d) not in spent and d.layer == name]
        layer = by_layer.get(name) or by_layer["weights"]
        groups: dict[str, list[Deviation]] = {}
        for d in left:
            groups.setdefault(d.how, []).append(d)
        for finding, work in zip(layer.explain(case, left), groups.values(), strict=True):
            findings.append(finding)
            if not finding.harmless:
                mends.append(Mend(finding, work))
    order = {name: n for n, name in enumerate(LAYERS)}
    findings.sort(key=lambda f: (_is_missing(f), order[f.layer]))
    return findings, mends


def _is_missing(finding: Finding) -> int:
    """Tensors that only one side has come first, whatever else is wrong."""
    return 0 if "not in the file" in finding.mechanism or "that no Qwen2 model has" in finding.mechanism else 1


def _word(findings: Sequence[Finding], *, strange: bool) -> Word:
    if strange:
        return "not-comparable"
    bad = [f for f in findings if not f.harmless]
    if not bad:
        return "equivalent" if findings else "same"
    return "ambiguous" if all(f.ambiguous for f in bad) else "broken"


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(
    case: Case, verdict: Verdict, mends: list[Mend], clock: Clock, engine: str | None, threads: int | None, prompt: str,
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
        possible = [m for m in mends if m.possible]

        def measure(some: Sequence[Mend]) -> GoldenOutcome:
            return golden.measure(drafted(case, some))

        found = search(possible, measure, cost=cost)
        if mends:
            verdict.repair = found.mended
        elif verdict.findings:
            price = found.before.to_json()
            verdict.findings[0].evidence["cost"] = price
        elif not (found.before.bitwise and found.before.says_the_same):
            # Every byte and number agrees, and the runs do not: then one of the runs is not to be trusted.
            what = Finding("instrument", None, [], "equal files gave unequal runs", found.before.to_json(), 0.5)
            verdict.findings, verdict.verdict = [what], "ambiguous"


def first_divergence(golden: Golden, model: Model) -> dict[str, Any] | None:
    """The first trace point at which a candidate leaves the reference, on the reference's own prompt ids."""
    try:
        return compare_runs(golden.session, golden.session_of(model), golden.ids)
    except BROKEN:
        return None


def _alone(case: Case, mends: list[Mend], clock: Clock, engine: str | None, threads: int | None, prompt: str) -> Mended | None:
    """Without a reference: the mended file must open and answer in finite numbers; what it answers is shown."""
    possible = [m for m in mends if m.possible]
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
            return Mended([m.label for m in possible], False, {"after": f"does not run: {error}"})
        proof = {"before": str(before) if isinstance(before, AprlabError) else "opens", "after": "opens", "answer": answer.text}
        needed = [m for m in possible if isinstance(drafted(case, [o for o in possible if o is not m]), AprlabError)]
        kept = needed or possible
        return Mended([m.label for m in kept], bool(needed), proof)


__all__ = ["examine", "peel", "reference_of", "tested"]
