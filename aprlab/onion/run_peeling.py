"""`peel` for two engines or sessions on one model: what the second does otherwise than the first.

Operation by operation on the same input, prompt against decoding, position 0 against later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aprlab.engines.base import Engine
from aprlab.engines.delegating import BorrowedEngine
from aprlab.errors import BROKEN, AprlabError, UsageError
from aprlab.faults import FAULTS, session_with
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.onion.clock import Clock
from aprlab.onion.fixes import Fix, search
from aprlab.onion.instrument_check import tested
from aprlab.onion.mixed_engine import MixedEngine
from aprlab.onion.references import reference_of
from aprlab.onion.run_comparison import compare_runs
from aprlab.onion.run_parts import (
    RunPart,
    config_parts,
    cost_parts,
    loop_parts,
    operation_parts,
    tokenizer_data_parts,
    tokenizer_parts,
)
from aprlab.onion.shadow import shadow
from aprlab.onion.verdict import Finding, Verdict, Word
from aprlab.onion.words import Mechanism, refused
from aprlab.tracing.golden_rule import MAX_TOKENS, Golden, GoldenOutcome


def side(model: Model, spec: str | Session, threads: int | None = None) -> Session:
    """A session by name: an engine, or an engine with faults, ``reference+rope-norm``."""
    if isinstance(spec, Session):
        return spec
    name, *faults = spec.split("+")
    return session_with(model, faults, name, threads) if faults else Session(model, engine=name, threads=threads)


def peel_engines(
    model: str | Path | Model | None, specs: Sequence[str] | Sequence[Session], *, fast: bool, threads: int | None, prompt: str,
    max_tokens: int = MAX_TOKENS, progress: Callable[[str, Any], None] | None = None,
) -> Verdict:  # fmt: skip
    """`peel` for two engines on one model; the first is the reference."""
    if len(specs) != 2 or (model is None and not all(isinstance(s, Session) for s in specs)):
        raise UsageError("two engines and one model are needed", code="peel.two-engines-needed")
    if model is None:
        a, b = specs
        assert isinstance(a, Session)
        assert isinstance(b, Session)
    else:
        shared = model if isinstance(model, Model) else reference_of(model).model
        a = side(shared, specs[0], threads)
        try:
            b = side(shared, specs[1], threads)
        except UsageError:
            raise
        except AprlabError as error:
            finding = Finding("config", None, [], refused(error, "config.does-not-run"), {"tensor": error.tensor})
            return Verdict("broken", [finding], title=str(specs[1]))
    return peel_sessions(a, b, fast=fast, prompt=prompt, max_tokens=max_tokens, progress=progress)


def peel_sessions(
    a: Session, b: Session, *, fast: bool = False, prompt: str, max_tokens: int = MAX_TOKENS,
    progress: Callable[[str, Any], None] | None = None,
) -> Verdict:  # fmt: skip
    """What b does otherwise than a, on the same model."""
    return examine_sessions(a, b, fast=fast, prompt=prompt, max_tokens=max_tokens, progress=progress)[0]


def examine_sessions(
    a: Session, b: Session, *, fast: bool = False, prompt: str, max_tokens: int = MAX_TOKENS,
    progress: Callable[[str, Any], None] | None = None,
) -> tuple[Verdict, list[Fix], Callable[[Sequence[Fix]], Session]]:  # fmt: skip
    """`peel_sessions`, with the fixes, and what gives b with some of them."""
    clock = Clock(progress)
    with clock("instruments"):
        instruments, broken = tested()
    title = f"{b.engine.spec} against {a.engine.spec} on {a.model.path.name}"
    if broken:
        return Verdict("not-comparable", broken, instruments=instruments, seconds=clock, title=title), [], lambda some: b
    if a.engine.contract != b.engine.contract:
        contracts = {"first": a.engine.contract, "second": b.engine.contract}
        finding = Finding("instrument", None, [], Mechanism("instrument.contracts-differ", contracts))
        return Verdict("not-comparable", [finding], instruments=instruments, seconds=clock, title=title), [], lambda some: b
    with clock("config"):
        parts = config_parts(a, b)
    with clock("tokenizer"):
        words = [*tokenizer_data_parts(a, b), *tokenizer_parts(b)]
    with clock("golden"):
        golden = golden_for(a, prompt, max_tokens)
    exact = a.engine.name == b.engine.name
    if not (fast and parts):
        with clock("forward"):
            seen = shadow(a, b.engine, golden.ids, len(golden.prompt_ids), exact=exact)
        with clock("hypotheses"):
            parts += operation_parts(a, b, seen)
            parts += cost_parts(a, b, golden.ids[0])
            parts += loop_parts(a, b, golden.prompt_ids)
    parts += words
    findings = [part.finding for part in parts]
    bad = [part for part in parts if not part.finding.harmless]
    word: Word = "broken" if bad else "equivalent" if findings or not exact else "same"
    verdict = Verdict(word, findings, instruments=instruments, seconds=clock, title=title)
    fixes, fixed = _fixes(a, b, bad)
    if fast:
        return verdict, fixes, fixed
    with clock("run"):
        try:
            verdict.first_divergence = compare_runs(a, b, golden.ids, len(golden.prompt_ids))
        except BROKEN as error:
            verdict.first_divergence = {"point": "none", "refuses": str(error)}
    with clock("repair"):
        if fixes:
            verdict.repair = search(fixes, lambda some: _measured(golden, fixed, some), cost=not exact).repair
    return verdict, fixes, fixed


def _measured(golden: Golden, fixed: Callable[[Sequence[Fix]], Session], some: Sequence[Fix]) -> GoldenOutcome:
    try:
        return golden.measure(fixed(some))
    except AprlabError as error:
        return golden.measure(error)


def _fixes(a: Session, b: Session, bad: list[RunPart]) -> tuple[list[Fix], Callable[[Sequence[Fix]], Session]]:
    """A fix for each part that is bad, and what gives b with some of them."""
    parts = {id(part.finding): part for part in bad}

    def fixed(some: Sequence[Fix]) -> Session:
        chosen = [parts[id(m.finding)] for m in some]
        groups = {g for part in chosen for g in part.groups}
        engine: Engine = MixedEngine(b.engine, a.engine, groups) if groups else b.engine
        config = replace(b.config, **{k: v for part in chosen for k, v in part.config.items()})
        data, sound = b.model.tokenizer, a.model.tokenizer
        names = [name for part in chosen if not part.config for name in part.data]
        data = replace(data, **{name: getattr(sound, name) for name in names})
        tokenizer = b.tokenizer
        speech = [p for p in bad if p.tokenizer]
        if names or any(p.tokenizer for p in chosen):
            tokenizer = Qwen2Tokenizer(data)
            for part in speech:
                if part not in chosen and part.finding.fault is not None:
                    prompt = FAULTS[part.finding.fault].prompt
                    tokenizer = prompt(tokenizer) if prompt is not None else tokenizer
        loop = type(a) if any(p.loop for p in chosen) else type(b)
        return _session(loop, engine, config, tokenizer, data)

    return [Fix(part.finding, []) for part in bad], fixed


def _session(loop: type[Session], engine: Engine, config: ModelConfig, tokenizer: Qwen2Tokenizer, data: Any) -> Session:
    """A session over parts that are already at hand; its template comes from `data`."""
    model = replace(engine.model, make_config=lambda: config, make_tokenizer=lambda: data)
    return loop(BorrowedEngine(engine, model), config=config, tokenizer=tokenizer)


_RUNS: list[tuple[Session, str, int, Golden]] = []


def golden_for(a: Session, prompt: str, max_tokens: int = MAX_TOKENS) -> Golden:
    """The reference's answer, prompt at once and then token by token; the last is remembered."""
    for session, asked, length, golden in _RUNS:
        if session is a and (asked, length) == (prompt, max_tokens):
            return golden
    golden = Golden(a, engine=a.engine.spec, threads=a.engine.threads, prompt=prompt, max_tokens=max_tokens, serial=True)
    _RUNS[:] = [(a, prompt, max_tokens, golden)]
    return golden
