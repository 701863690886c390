"""`peel` for sources: each operation of each program judged on its own inputs, the fault named, the name proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.architectures import points as all_points
from aprlab.engines.contracts import Contract
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.clock import Clock
from aprlab.onion.declarations import Mistake, misdeclared
from aprlab.onion.foreign_naming import Named, fitting_contract, marks, names
from aprlab.onion.foreign_shadow import Judges, Operation, distance, shadow_of
from aprlab.onion.instrument_check import tested
from aprlab.onion.printout_peeling import compare_printout
from aprlab.onion.server_peeling import judge_server
from aprlab.onion.source_run import run_with
from aprlab.onion.source_weights import OtherWeights, check_shape, other_weights
from aprlab.onion.verdict import Finding, Repair, Verdict, Word, known
from aprlab.onion.words import Mechanism
from aprlab.sources import source as source_of
from aprlab.sources.base import Source
from aprlab.sources.choice import Spec
from aprlab.sources.eval_callback import PrintoutSource
from aprlab.sources.servers import ServerSource
from aprlab.tracing.traces import Point, Trace

_UNLIKE = ("instrument.declared-otherwise", "instrument.other-weights")  # what was compared is not what was said
_SHOWN = 400  # characters of an answer
ANSWERED = 4  # tokens of the answer that are run one by one, after the prompt


def peel_sources(
    model: str | Path | Model, sources: Sequence[Spec], *, prompt: str | Sequence[int], threads: int | None = None,
    progress: Callable[[str, Any], None] | None = None,
) -> Verdict:  # fmt: skip
    """What each of the sources does otherwise than float64 under its own contract, on `model`.

    Args:
        model: the file that is believed to be right; a source that is there already may run another one.
        sources: one or more programs, by name or there already; those made here are closed again.
        prompt: a text, or token ids; some tokens of its answer follow one by one.

    Raises:
        UsageError: no sources, or one that runs a model of other numbers.
    """
    if not sources:
        raise UsageError("at least one source is needed", code="peel.no-sources")
    clock = Clock(progress)
    with clock("instruments"):
        instruments, broken = tested()
    opened = model if isinstance(model, Model) else open_model(model)
    labels = [_label(spec) for spec in sources]
    title = f"{' and '.join(labels)} on {Path(opened.path).name}"
    verdict = Verdict("not-comparable", broken, instruments=instruments, seconds=clock, title=title)
    if broken:
        return verdict
    answers: dict[str, int] = {}
    made: tuple[list[int], int | None] | None = None
    for n, spec in enumerate(sources):
        with made_source(spec, opened, threads) as source:
            check_shape(source, opened)
            label = labels[n] if labels.count(labels[n]) == 1 else f"{labels[n]} ({source.contract})"
            if source.recorded is not None:
                tokens, asked = source.recorded
            elif not isinstance(source, PrintoutSource):
                with clock("tokens"):
                    made = made if made is not None else tokens_for(opened, prompt, threads)
                tokens, asked = made
            if isinstance(source, PrintoutSource):
                with clock(f"compare {source.name}"):
                    tokens = _judge_printout(verdict, source, label, opened, prompt, threads)
                asked = len(tokens)
                continue
            with clock(f"run {source.name}"):
                first, given = _answered(verdict, source, opened, tokens, asked, prompt, threads)
            if first is not None:
                answers[label] = first
            if given is not None:
                _judge(verdict, source, label, given, opened, clock)
    verdict.verdict = _word(verdict.findings)
    verdict.health |= {"next token": answers, "tokens": len(tokens), "prompt": asked}
    return verdict


def _answered(
    verdict: Verdict, source: Source, model: Model, tokens: list[int], asked: int | None, prompt: str | Sequence[int],
    threads: int | None,
) -> tuple[int | None, Trace | None]:  # fmt: skip
    """The likeliest next token, where it is known, and the trace of a source that has one; a server is judged at once."""
    if isinstance(source, ServerSource):
        return _judge_server(verdict, source, model, tokens[:asked], prompt, threads), None
    given = source.run(tokens, prompt=asked)
    return (int(np.argmax(given["logits"].values[-1])) if "logits" in given else None), given


def _word(findings: Sequence[Finding]) -> Word:
    bad = [f for f in findings if not f.harmless]
    if any(f.code in _UNLIKE for f in bad):
        return "not-comparable"
    little = any(f.code == "forward.server-text-alone" for f in findings)
    return "broken" if bad else "unproved" if little else "equivalent"


def _label(spec: Spec) -> str:
    if isinstance(spec, str | Source):
        return spec if isinstance(spec, str) else spec.name
    return spec.engine.name if isinstance(spec, Session) else type(spec).__name__


@contextmanager
def made_source(spec: Spec, model: Model, threads: int | None) -> Iterator[Source]:
    """The source; closed again if it was made here."""
    name, ours = (spec.split(",")[0], True) if isinstance(spec, str) else ("", False)
    if "+" in name:  # an engine of ours with faults of the catalogue
        engine, *faults = name.split("+")
        spec = session_with(model, faults, engine, threads)
    made = source_of(spec, model, threads=threads)
    try:
        yield made
    finally:
        if ours:
            made.close()


def tokens_for(model: Model, prompt: str | Sequence[int], threads: int | None) -> tuple[list[int], int]:
    """The ids that sources are run on: the prompt's, and some of the answer; and how many the prompt has."""
    session = Session(model, threads=threads)
    ids = session.prompt_tokens(prompt, raw=isinstance(prompt, str) and session.wants_raw)
    room = model.config.context_length - len(ids)
    answer = session.generate(ids, max_tokens=min(ANSWERED, room)).tokens if room > 0 else []
    session.engine.close()
    return [*ids, *answer], len(ids)


# ── one source ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge(verdict: Verdict, source: Source, label: str, given: Trace, model: Model, clock: Clock) -> None:
    """Findings about one source, with proofs, added to the verdict."""
    judges = Judges(model, source.contract)
    with clock("shadow"):
        operations = shadow_of(given, judges, model.config)
    if not operations:
        raise UsageError(f"{label} gives no point at a position that can be compared", code="trace.nothing-to-compare")
    wrong = [o for o in operations if not o.fits]
    if not wrong:
        return
    if source.recorded is not None:
        with clock("declarations"):
            mistaken = misdeclared(given, judges, model.config)
        if mistaken:
            verdict.findings += [_declaration_finding(label, mistake) for mistake in mistaken]
            return
    with clock("weights"):
        weights = other_weights(operations, judges, model.config, source.file)
    if weights is not None:
        verdict.first_divergence = verdict.first_divergence or {"source": label, "point": wrong[0].point, **_figures(wrong[0])}
        verdict.findings.append(_weights_finding(label, weights))
        return
    with clock("contract"):
        other = fitting_contract([o for o in wrong if o.alone], judges)
    if other is not None:
        contract, fit = other
        verdict.findings.append(_contract_finding(label, source.contract, contract, fit))
        wrong = [o for o in wrong if o not in fit]
        operations = [o for o in operations if o not in fit]
        judges.contract, judges.simulated = contract, judges.by(contract)
    if not wrong:
        return
    first = wrong[0]
    if verdict.first_divergence is None:
        verdict.first_divergence = {"source": label, "point": first.point, **_figures(first)}
    with clock("names"):
        named = names(operations, judges, model.config)
    chained = [o for o in wrong if not o.alone]
    found = [(one, _finding(label, one)) for one in named]
    if chained:
        cause = Mechanism("forward.between-points", {"steps": _steps(chained)})
        found.append((Named(_steps(chained), chained), Finding("forward", None, [], cause, _evidence(label, chained), 0.8)))
    verdict.findings += [finding for _, finding in found]
    with clock("proof"):
        proof = _proof(source, given, judges, model, [one for one, _ in found])
    verdict.repair = Repair([finding.label for _, finding in found], False, proof)


def _judge_server(
    verdict: Verdict, source: ServerSource, model: Model, ids: list[int], prompt: str | Sequence[int], threads: int | None
) -> int | None:
    """Findings about a server, added to the verdict; what it answered is noted. The first token, where it is known."""
    text = prompt if isinstance(prompt, str) and model.tokenizer.chat_template is not None else None
    case = judge_server(source, model, list(ids), text, threads)
    verdict.findings += case.findings
    said = [f"{request}: {answer.text[:_SHOWN]}" for request, answer in case.answers.items()]
    verdict.health["answers"] = {**verdict.health.get("answers", {}), source.name: said}
    if case.parts_at is not None and verdict.first_divergence is None:
        verdict.first_divergence = {"source": source.name, "point": f"step {case.parts_at} of the answer"}
    if case.proof and verdict.repair is None:
        verdict.repair = Repair([finding.label for finding in case.findings], False, case.proof)
    firsts = [answer.steps[0].token for answer in case.answers.values() if answer.steps]
    return firsts[0] if firsts else None


def _judge_printout(
    verdict: Verdict, source: PrintoutSource, label: str, model: Model, prompt: str | Sequence[int], threads: int | None
) -> list[int]:
    """Findings about a printout, added to the verdict; the ids that were run."""
    run = compare_printout(source, model, prompt, threads)
    first = run.first
    facts: dict[str, Any] = {"source": label, "contract": str(source.contract)}
    values = sum(len(one.printed.at) for one in run.compared)
    figures = {"tensors": len(run.compared), "values": values, "sums": sum(one.printed.sum is not None for one in run.compared)}
    if first is None:
        cause = Mechanism("forward.printout-agrees", figures)
        verdict.findings.append(Finding("forward", None, [], cause, facts, harmless=True))
        return run.ids
    verdict.first_divergence = verdict.first_divergence or {"source": label, "point": first.printed.point, **first.figures}
    facts |= {"agree_before_it": len(run.compared) - 1, "introduced_at": {"point": first.printed.point, **first.figures}}
    facts["not_judged"] = "the values that were not printed, and all that comes after"
    names = list(dict.fromkeys(form.fault or form.name for form in run.named))
    form = run.named[0] if run.named else None
    if form is not None and form.fault is not None:
        fault = FAULTS[form.fault]
        more = {"computes_the_same_as": names[1:]} if names[1:] else {}
        verdict.findings.append(Finding(fault.layer, fault.id, [], known(fault), facts | more | form.parameters, 0.8))
        return run.ids
    point, line = first.printed.point, first.printed.line
    cause = Mechanism("forward.printout-differs", {"point": point, "line": line, "before": len(run.compared) - 1})
    if form is not None:
        details = "".join(f", {key} {value}" for key, value in form.parameters.items())
        cause = Mechanism("forward.printout-as-form", {"point": point, "line": line, "form": form.name, "details": details})
        facts |= {"computes_the_same_as": names[1:]} if names[1:] else {}
    verdict.findings.append(Finding("forward", None, [], cause, facts, 0.8))
    return run.ids


def _declaration_finding(label: str, mistake: Mistake) -> Finding:
    parameters = {"declared": mistake.declared, "found": mistake.found}
    evidence = {"source": label, "off": mistake.off, "off_as_declared": mistake.off_as_declared}
    return Finding("instrument", None, [], Mechanism("instrument.declared-otherwise", parameters), evidence)


def _weights_finding(label: str, found: OtherWeights) -> Finding:
    layer = found.cause.code.partition(".")[0]
    return Finding(layer, None, [], found.cause, {"source": label, **found.evidence}, 1.0 if layer == "instrument" else 0.8)


def _contract_finding(label: str, declared: Contract, found: Contract, fit: list[Operation]) -> Finding:
    parameters = {"steps": _steps(fit), "declared": str(declared), "found": str(found)}
    return Finding("forward", None, [], Mechanism("forward.contract-differs", parameters), _evidence(label, fit), harmless=True)


def _finding(label: str, one: Named) -> Finding:
    evidence = _evidence(label, one.operations)
    form = one.form
    if form is None:
        evidence["looks_like"] = marks(one.operations[0])
        return Finding("forward", None, [], Mechanism("forward.step-differs", {"steps": one.steps}), evidence, 0.8)
    if one.same:
        evidence["computes_the_same_as"] = one.same
    if form.fault is not None:
        fault = FAULTS[form.fault]
        evidence["steps"] = one.steps
        return Finding(fault.layer, fault.id, [], known(fault), evidence | form.parameters)
    details = "".join(f", {key} {value}" for key, value in form.parameters.items())
    parameters = {"steps": one.steps, "form": form.name, "details": details}
    return Finding("forward", None, [], Mechanism("forward.step-as-form", parameters), evidence)


def _steps(operations: Sequence[Operation]) -> list[str]:
    return list(dict.fromkeys(o.step for o in operations))


def _figures(operation: Operation) -> dict[str, Any]:
    at = int(np.flatnonzero(operation.wrong)[0])
    allowed = max(float(operation.allowed[at]), float(operation.rounding[at]))
    return {"position": int(operation.rows[at]), "off": float(operation.off[at]), "allowed": allowed}


def _evidence(label: str, operations: list[Operation]) -> dict[str, Any]:
    """Where one thing is wrong: layers, positions, how far."""
    first = operations[0]
    layers = sorted({o.layer for o in operations if o.layer is not None})
    facts: dict[str, Any] = {"source": label, "introduced_at": {"point": first.point, **_figures(first)}}
    facts["calls"] = len(operations)
    if layers:
        facts["layers"] = f"{layers[0]}…{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else layers
    if len(first.rows) > 1:
        facts["position_0_right"] = all(not o.wrong[o.rows == 0].any() for o in operations)
    return facts


# ── proof ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _proof(source: Source, given: Trace, judges: Judges, model: Model, found: list[Named]) -> dict[str, Any]:
    """The right values written where it is wrong restore the logits; the faults in our engine give the source's logits."""
    config, tokens = model.config, given.tokens
    if "logits" not in given:
        return {}
    positions = given["logits"].positions
    theirs = given["logits"].values
    right = run_with(judges, config, tokens)
    proof: dict[str, Any] = {"before": _agreement(theirs, right["logits"][positions])}
    wrong = {o.point for one in found for o in one.operations}
    if source.can.injection and source.can.reruns:
        rows = np.arange(len(tokens), dtype=np.int64)
        shapes = all_points(config)
        inject = {
            point: Point(point, right[point].reshape(-1, *shapes[point]), rows, "contract", str(judges.contract))
            for point in wrong
        }
        again = source.run(tokens, "logits", prompt=given.prompt, inject=inject)["logits"].values
        proof["with the right values injected"] = _agreement(again, right["logits"][positions])
    if all(one.form is not None for one in found):
        forms = {o.point: one.form for one in found for o in one.operations if one.form is not None}
        ours = run_with(judges, config, tokens, forms, given.prompt or 0)["logits"][positions]
        proof["with the fault in our engine"] = _agreement(theirs, ours)
    return proof


def _agreement(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    same = np.argmax(a, axis=-1) == np.argmax(b, axis=-1)
    return {"likeliest token equal": f"{int(same.sum())} of {len(same)}", "logits off": float(np.median(distance(a, b, b)))}
