"""Repair: the fixed file is written only where a run and every gate find it sound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import BROKEN, AprlabError, UsageError, reason
from aprlab.formats import open_model
from aprlab.formats.huggingface_files import WRITTEN
from aprlab.formats.writing import atomic_folder, check_output
from aprlab.formats.writing import drafted as drafted_file
from aprlab.gates.running import PROMPTS, run
from aprlab.inference.session import Session
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.model.model import Model
from aprlab.onion.file_case import FileCase
from aprlab.onion.fixes import Fix, drafted
from aprlab.onion.health import nats
from aprlab.onion.layers.container import LAID_OUT
from aprlab.onion.peeling import examine, peel
from aprlab.onion.repairs import Change, changes_of, not_understood, write_repaired
from aprlab.onion.verdict import Repair, Verdict, some

# Gates whose assertion holds whatever types the weights are kept in; asked of files that were re-encoded on purpose.
WHATEVER_TYPES = (
    "F-GOLDEN-RULE-002", "F-GOLDEN-RULE-003", "F-APR-FORMAT-001", "I-2", "I-3", "I-5", "A-SERIAL", "A-SELFTEST",
)  # fmt: skip
_UNKNOWN_KIND = ("forward.language-unknown", "forward.garbage")  # how it speaks, in a model that nothing is known of
MAX_TOKENS = 24  # of an answer that the garbage detector judges


@dataclass
class RepairOutcome:
    """What `attempt` did.

    Attributes:
        verdict: on the broken file; its proof is completed by what was written and how that was judged.
        written: the file or directory, None where nothing was written.
        changes: what was changed in it.
        left: why nothing was written, each reason a sentence; empty where the file was healthy.
        code: of the reason: ``repair.nothing-found``, ``repair.needs-a-reference``, ``repair.not-understood``,
            ``repair.still-broken``; None where a file was written.
        judged: what judged the written file, and what each said.
    """

    verdict: Verdict
    written: Path | None = None
    changes: list[Change] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    code: str | None = None
    judged: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 written, or nothing to repair; 3 broken and not repaired; 4 where no statement is possible."""
        if self.written is not None or self.code == "repair.nothing-found":
            return 0
        return self.verdict.exit_code or 3

    @property
    def headline(self) -> str:
        """What was done, on one line."""
        if self.written is not None:
            return f"{self.written}: {self.judged['verdict']}"
        if self.code == "repair.nothing-found":
            return f"nothing to repair, nothing written: the verdict is {self.verdict.verdict!r}"
        return f"nothing written: {'; '.join(self.left)}"


class _Unfit(Exception):
    """The draft was judged and did not pass; what was written of it is removed."""


def attempt(
    candidate: str | Path, output: str | Path, reference: str | Path | Model | None = None, *, force: bool = False, **options: Any
) -> RepairOutcome:
    """Repair a file, and write the result only where it opens, runs and passes.

    Args:
        candidate: the broken file, or Hugging Face directory.
        output: the file to write; for a directory also a directory.
        reference: a sound file of the same model, or a model; without one, what the file itself tells can be fixed, and
            what a run shows to be a fault of the catalogue that can be undone.
        force: replace an existing output.
        options: as for `peel`.

    Raises:
        UsageError: the output cannot be written, or is the candidate.
    """
    candidate, output = Path(candidate), Path(output)
    folder = candidate.is_dir() and output.suffix not in (".apr", ".gguf")
    if not folder:
        check_output(output, [candidate] + ([Path(reference)] if isinstance(reference, str | Path) else []), force=force)
    verdict, case, fixes = examine(reference, candidate, **options)
    outcome = RepairOutcome(verdict)
    if not fixes and verdict.exit_code == 0:
        outcome.code = "repair.nothing-found"
        return outcome
    model = _planned(outcome, case, fixes)
    if model is None or case is None:
        return _noted(outcome)
    try:
        if folder:
            _write_folder(outcome, case, model, output, force, options, fixes)
        else:
            with drafted_file(output, force=force) as draft:
                write_repaired(case.file, model, draft)
                _judge(outcome, case, draft, options, fixes)
        outcome.written, outcome.changes = output, changes_of(case, fixes)
    except _Unfit:
        outcome.code = "repair.still-broken"
    return _noted(outcome)


def _planned(outcome: RepairOutcome, case: FileCase | None, fixes: list[Fix]) -> Model | None:
    """The fixed model in memory; None where there is none, and the outcome says why."""
    if case is None or not fixes:
        foreign = any(f.parameters.get("rule") == "forward.foreign-tensor" for f in outcome.verdict.findings)
        outcome.code = "repair.not-understood" if foreign else "repair.still-broken"
        outcome.left = [f"the verdict is {outcome.verdict.verdict!r}: {finding}" for finding in outcome.verdict.findings[:3]]
        return None
    lost = [f"{fix.label} ({fix.finding.mechanism}: {some(fix.finding.tensors)})" for fix in fixes
            if not fix.possible or (case.ref is None and any(d.code == "container.overlap" for d in fix.deviations))]  # fmt: skip
    if lost:
        outcome.code = "repair.needs-a-reference"
        outcome.left = [f"cannot be repaired without a reference: {', '.join(lost)}"]
        return None
    if strange := not_understood(case, fixes):
        outcome.code = "repair.not-understood"
        outcome.left = [f"a repair would delete tensors that are not understood: {', '.join(strange)}"]
        return None
    model = drafted(case, fixes)
    if isinstance(model, AprlabError):
        outcome.code, outcome.left = "repair.still-broken", [f"still broken when fixed: {model.message}"]
        return None
    return model


def _noted(outcome: RepairOutcome) -> RepairOutcome:
    """The outcome, its verdict's proof completed by it."""
    verdict = outcome.verdict
    if verdict.repair is None:
        verdict.repair = Repair([change.what for change in outcome.changes], False, {})
    proof = verdict.repair.proof
    if outcome.written is None:
        proof |= {"written": None, "left": outcome.left, "code": outcome.code}
        return outcome
    proof["written"] = {"file": str(outcome.written), "verdict": outcome.judged["verdict"]}
    proof["judged_by"] = {key: value for key, value in outcome.judged.items() if key != "verdict"}
    proof["changes"] = [change.to_json() for change in outcome.changes]
    return outcome


def _write_folder(
    outcome: RepairOutcome, case: FileCase, model: Model, output: Path, force: bool, options: dict[str, Any], fixes: list[Fix]
) -> None:
    """A Hugging Face directory, judged in a folder of its own before it fills `output`: there are files that an export writes."""
    with atomic_folder(output, force=force, ours=WRITTEN.__contains__) as made:
        draft = made / ".draft"
        write_repaired(case.file, model, draft)
        _judge(outcome, case, draft, options, fixes)
        for path in sorted(draft.iterdir()):
            path.rename(made / path.name)
        draft.rmdir()


# ── judging ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge(outcome: RepairOutcome, case: FileCase, draft: Path, options: dict[str, Any], fixes: list[Fix]) -> None:
    """Raises `_Unfit` unless the draft opens, runs, is found sound by `peel` and passes the gates."""
    outcome.left = list(_run(outcome, draft, options, alone=case.ref is None))
    outcome.left = outcome.left or list(_peeled(outcome, case, draft, options, fixes))
    if not outcome.left and case.ref is None:
        outcome.left = list(_no_worse(outcome, case, draft, options))
    if not outcome.left and case.ref is not None and draft.is_file():
        outcome.left = list(_gates(outcome, case, case.ref.model, draft, options))
    if outcome.left:
        raise _Unfit


def _run(outcome: RepairOutcome, draft: Path, options: dict[str, Any], *, alone: bool) -> Iterable[str]:
    """What a run of the draft says: it opens strictly, is finite, and (where nothing else tells) its answers are no garbage."""
    try:
        with open_model(draft) as model:
            model.check_values()
            session = Session(model, engine=options.get("engine"), threads=options.get("threads"))
            answers = [
                session.generate(prompt, max_tokens=MAX_TOKENS, raw=session.wants_raw, keep_logits=True) for prompt in PROMPTS
            ]
    except BROKEN as error:
        yield f"the repaired file does not run: {reason(error)}"
        return
    if not all(np.isfinite(answer.logits).all() for answer in answers if answer.logits is not None):
        yield "the repaired file gives logits that are not finite"
    judged = [is_garbage(answer.text) for answer in answers] if alone else []
    if judged and all(bad for bad, _ in judged):
        yield f"the repaired file still answers garbage: {answers[0].text!r} ({judged[0][1]})"
    outcome.judged["run"] = [answer.text for answer in answers]


def _peeled(
    outcome: RepairOutcome, case: FileCase, draft: Path, options: dict[str, Any], fixes: list[Fix]
) -> Iterable[str]:
    """What `peel` says of the draft.

    Where the very same tensors, config and tokenizer were only laid out anew, how well the model speaks is no question of the
    repair: that nobody knows how such a model should speak does not stand against it.
    """
    after = peel(case.ref.model if case.ref is not None else None, draft, **options)
    outcome.judged["verdict"] = after.verdict
    laid_out = all(d.code in LAID_OUT.values() for fix in fixes for d in fix.deviations)
    unknown = after.verdict == "unproved" and all(f.code in _UNKNOWN_KIND for f in after.findings)
    if after.exit_code and not (laid_out and unknown):
        yield from (f"left in the repaired file: {finding}" for finding in after.findings[:3])
        yield f"the verdict on the repaired file is {after.verdict!r}"


def _no_worse(outcome: RepairOutcome, case: FileCase, draft: Path, options: dict[str, Any]) -> Iterable[str]:
    """Whether plain text is as likely as before the repair: a guess makes no better file of one that was healthy."""
    with open_model(draft) as model:
        before = nats(drafted(case, []), options.get("engine"), options.get("threads"))
        after = nats(model, options.get("engine"), options.get("threads"))
    outcome.judged["nats"] = {"before": before, "after": after}
    if after > before + 0.01:
        yield f"the repair makes plain text less likely: {after:.3g} nats a token instead of {before:.3g}"


def _gates(outcome: RepairOutcome, case: FileCase, model: Model, draft: Path, options: dict[str, Any]) -> Iterable[str]:
    """What the gates say of the draft; of one that is held in other types, those that hold whatever the types."""
    other = any(m.of is not None and m.kind is not None and m.kind is not m.of.type for m in case.matches)
    kept = outcome.judged["verdict"] != "same" and other
    said = run(model, draft, engine=options.get("engine"), ids=WHATEVER_TYPES if kept else None)
    outcome.judged["gates"] = {result.id: result.passed for result in said}
    yield from (f"gate {result.id}: {result.figure}" for result in said if result.passed is not True)


# ── the public verb ───────────────────────────────────────────────────────────────────────────────────────────────


def repair(
    candidate: str | Path, output: str | Path, reference: str | Path | Model | None = None, *, force: bool = False, **options: Any
) -> Verdict:
    """Write the fixed file, atomically; everything that was found is fixed, needed for the answer or not.

    Args:
        candidate: the broken file, or Hugging Face directory.
        output: the file to write, GGUF if its name ends in ``.gguf``; for a directory also a directory.
        reference: a sound file of the same model; without one, names, labels, dims, seals and config can be fixed.
        force: replace an existing output.
        options: as for `peel`.

    Returns:
        The verdict on the broken file, its proof completed by `written` (the verdict on the file that was written),
        `judged_by` and `changes`, each of which is `exact` or a `guess`.

    Raises:
        UsageError: nothing is broken, something that was found cannot be fixed, or the fixed file did not pass; nothing is
            written then.
    """
    outcome = attempt(candidate, output, reference, force=force, **options)
    if outcome.written is not None:
        return outcome.verdict
    said = outcome.headline.removeprefix("nothing written: ")
    match outcome.code:
        case "repair.nothing-found":
            raise UsageError(said, code="repair.nothing-found", path=candidate)
        case "repair.needs-a-reference":
            raise UsageError(said, code="repair.needs-a-reference", path=candidate)
        case "repair.not-understood":
            raise UsageError(said, code="repair.not-understood", path=candidate)
        case _:
            raise UsageError(said, code="repair.still-broken", path=candidate)


__all__ = ["RepairOutcome", "attempt", "repair"]
