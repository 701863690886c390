"""Run gates on a candidate and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import instruments
from aprlab.conversion.converter import convert
from aprlab.errors import AprlabError, NumericError, UsageError
from aprlab.formats import open_model
from aprlab.formats.identity import file_only
from aprlab.formats.leftovers import temporary_folder
from aprlab.gates.catalogue import GATES, Gate
from aprlab.gates.evidence import CandidateFile, GateCase, ReferenceSide
from aprlab.gates.results import GateResult, GateResults
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.published import QUESTION

PROMPTS = (QUESTION, "Write a haiku about snow.")
MAX_TOKENS = 12


def run(
    ref: Model | str | Path,
    cand: Model | str | Path,
    session_ref: Session | None = None,
    session_cand: Session | None = None,
    *,
    engine: str | None = "auto",
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
    replaced: Mapping[str, Callable[..., Any]] | None = None,
    ids: Iterable[str] | None = None,
    requantised: str | None = None,
) -> GateResults:
    """Compare a candidate file with its reference; every gate speaks, whatever the others say.

    Args:
        ref: the reference.
        cand: the candidate's file, or an opened model: then the file that it came from, or, where it was changed since it
            was opened, a file that is written of it for the time of the comparison.
        session_ref, session_cand: to be asked instead of new ones over these files.
        engine: for those new ones, see `aprlab.engines.create`; both sides run on the same.
        prompts, max_tokens: what both are asked, greedily.
        requantised: the type that the candidate was re-encoded to on purpose. The gates then demand what a right
            re-encoding gives, byte for byte; F-ROSETTA-STATS-001 compares it with the source itself.
        replaced: instruments to be replaced (see `instruments.selftest`); gates that rest on one that fails are void.
        ids: only these gates.

    Raises:
        UsageError, FormatError, UnsupportedError: the reference cannot be read, or the engine is not to be had.
    """
    model = ref if isinstance(ref, Model) else open_model(ref)
    if not isinstance(cand, Model) and not Path(cand).is_file():
        raise UsageError("there is no such file", code="gates.no-such-file", path=cand)
    origin = None
    if requantised is not None:
        origin = ReferenceSide(model, session_ref, engine, prompts, max_tokens)
        model, session_ref = _requantised(model, requantised), None
    reference = ReferenceSide(model, session_ref, engine, prompts, max_tokens)
    if file_only(model) is None:
        _ = reference.session  # what the reference or its engine refuses is raised here: no fault of the candidate's
    tools = instruments.InstrumentSet(replaced)
    with temporary_folder() as folder:
        path = _file_of(cand, folder) if isinstance(cand, Model) else Path(cand)
        return judge(GateCase(reference, CandidateFile(path), session_cand, origin, tools), ids)


def _file_of(model: Model, folder: Path) -> Path:
    """The file that a model was opened from, where it still is what is there; else one that is written of it."""
    if model.path.is_file():
        try:
            there = open_model(model.path)
            alike = there.config == model.config and there.tokenizer == model.tokenizer
            if alike and there.tensors.keys() == model.tensors.keys() and all(
                (t.type, t.shape) == (model.tensors[n].type, model.tensors[n].shape)
                and np.array_equal(t.raw, model.tensors[n].raw)
                for n, t in there.tensors.items()
            ):
                return model.path
        except AprlabError:
            pass  # the file was changed under the model
    convert(model, folder / "candidate.apr")
    return folder / "candidate.apr"


def _requantised(model: Model, kind: str) -> Model:
    """What a right converter makes of a model that is re-encoded to `kind` on purpose."""
    with temporary_folder() as folder:  # the mapping outlives the name
        convert(model, folder / "requantised.apr", quantize=kind)
        return open_model(folder / "requantised.apr")


def judge(case: GateCase, ids: Iterable[str] | None = None) -> GateResults:
    """Every gate's word on a case, or only that of some; void where an instrument of the gate failed its self-test."""
    failed = instruments.void(case.selftest)
    said = GateResults()
    if case.unrun is None:  # else nothing is run, by no engine
        said.engine, said.engine_asked = case.ref.session.engine.spec, case.ref.engine.asked
    for gate in GATES.values() if ids is None else [GATES[id] for id in ids]:
        if broken := failed & set(gate.rests_on):
            said.append(GateResult(gate.id, None, "gate.void", gate.assertion, {"instruments": sorted(broken)}))
        elif gate.runs and case.unrun is not None:
            said.append(GateResult(gate.id, None, "gate.needs-a-run", gate.assertion, {"message": case.unrun.message}))
        else:
            said.append(ask(gate, case))
    return said


def ask(gate: Gate, case: GateCase) -> GateResult:
    """One gate's word on a case, measured with the case's instruments, whatever they are worth."""
    try:
        passed, code, parameters = gate.look(case, case.instruments.only(gate.rests_on))
    except NumericError as error:
        passed, code, parameters = False, "gate.not-finite", {"error": error.code, "message": error.message}
    except AprlabError as error:
        refusal = {"error": error.code, "message": error.message}
        return GateResult(gate.id, False, "gate.refused", gate.assertion, refusal, refused=True)
    return GateResult(gate.id, bool(passed), code, gate.assertion, parameters)
