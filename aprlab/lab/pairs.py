"""Two sides to hold against each other, however they come: two files, a fault put into a file, a fault put into an engine.

Everything that notebook 07 shows comes from a `Pair`. What is wrong is found by `peel`, which does not know how a pair was made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab import paths
from aprlab.engines import choose
from aprlab.errors import BROKEN, AprlabError, UsageError, reason
from aprlab.faults import Fault, by_id, convert_with, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.lab import finding_figures
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.file_case import FileCase
from aprlab.onion.fixes import Fix, drafted
from aprlab.onion.lost_information import tensors_of
from aprlab.onion.peeling import examine
from aprlab.onion.run_peeling import examine_sessions
from aprlab.onion.verdict import Finding, Verdict
from aprlab.published import QUESTION
from aprlab.tracing.comparisons import layer_errors
from aprlab.tracing.traces import replay, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ErrorMaps:
    """Relative l2 error of each step of each layer, float64 ``(layers, steps)``; 0 is equal bit for bit.

    Attributes:
        steps: names of the columns.
        total: in the candidate's own run: inherited and introduced.
        alone: of each step on the reference's inputs: introduced.
    """

    steps: list[str]
    total: np.ndarray
    alone: np.ndarray

    @property
    def guilty(self) -> list[str]:
        """Steps that introduce an error in any layer."""
        return [step for step, column in zip(self.steps, self.alone.T, strict=True) if column.any()]


class Pair(ABC):
    """A reference and a candidate.

    Attributes:
        reference_name, candidate_name: each in a few words, without folders.
        faults: ids of what was put in on purpose; empty if that is not known.
    """

    reference_name: str
    candidate_name: str
    faults: tuple[str, ...] = ()

    @abstractmethod
    def peel(self, prompt: str = QUESTION) -> Verdict:
        """The verdict; the other methods may be asked after it."""

    @abstractmethod
    def picture(
        self, finding: Finding, *, others: Sequence[Finding] = (), prompt: str = QUESTION, axes: Sequence[Axes] | None = None
    ) -> tuple[Axes, Axes]:
        """Two axes about one finding, see `aprlab.lab.finding_figures`."""

    def caption(self, finding: Finding) -> str:
        """What to see in `picture`."""
        return finding_figures.caption(finding)

    def draws(self, finding: Finding) -> bool:
        """Whether `picture` has more to show than words."""
        return True

    @abstractmethod
    def sessions(self, verdict: Verdict) -> dict[str, Session | str]:
        """``reference``, ``candidate`` and, if a repair was found, ``repaired``; for a side that cannot run, the reason."""

    def answers(self, verdict: Verdict, prompt: str = QUESTION, max_tokens: int = 12) -> dict[str, str]:
        """What each of `sessions` says, greedily; in angle brackets, why a side says nothing."""
        said: dict[str, str] = {}
        for label, session in self.sessions(verdict).items():
            if isinstance(session, str):
                said[label] = f"<{session}>"
                continue
            try:
                said[label] = session.generate(prompt, max_tokens=max_tokens, raw=session.wants_raw).text
            except BROKEN as error:
                said[label] = f"<{reason(error)}>"
        return said

    def error_maps(self, verdict: Verdict, prompt: str = QUESTION) -> ErrorMaps | None:
        """Inherited and introduced error of the candidate; None if one side cannot run, or there is only one."""
        sides = self.sessions(verdict)
        a, b = sides.get("reference"), sides.get("candidate")
        if not isinstance(a, Session) or not isinstance(b, Session):
            return None
        try:
            sound = trace(a, prompt, raw=a.wants_raw)
            steps, alone = layer_errors(sound, replay(b, sound))
            return ErrorMaps(steps, layer_errors(sound, trace(b, sound.tokens))[1], alone)
        except BROKEN:
            return None

    def telling(self, verdict: Verdict, prompt: str = QUESTION) -> Axes:
        """The picture to show first: of the first finding that does harm; without one, what shows that all is well.

        That is the agreement of the two runs after each layer, or marks of healthy blocks where there is one file alone.
        """
        harmful = [finding for finding in verdict.findings if not finding.harmless]
        if harmful:
            return self.picture(harmful[0], others=verdict.findings, prompt=prompt)[0]
        sides = {label: side for label, side in self.sessions(verdict).items() if isinstance(side, Session)}
        reference = sides.pop("reference", None)
        if reference is not None and sides:
            return finding_figures.of_agreement(reference, sides, prompt)
        return finding_figures.of_marks(self.candidate_tensors())[0]

    def candidate_tensors(self) -> list[Tensor]:
        """The candidate's tensors, where they can be read; after `peel`."""
        return []

    def named(self, verdict: Verdict) -> set[str]:
        """Faults of the catalogue that the verdict names, including those that leave the same file."""
        return named(verdict)


def named(verdict: Verdict) -> set[str]:
    """Faults of the catalogue that a verdict names, including those that leave the same file."""
    found = set(verdict.faults)
    for finding in verdict.findings:
        found |= set(finding.evidence.get("leaves_the_same_file_as", ()))
    return found


class Files(Pair):
    """Two files, or one and what is known of its kind."""

    def __init__(self, reference: Path | None, candidate: Path, *, engine: str | None = None, faults: Sequence[str] = ()) -> None:
        self.reference, self.candidate, self.engine, self.faults = reference, candidate, engine, tuple(faults)
        self.reference_name = "none: the candidate is judged alone" if reference is None else reference.name
        self.candidate_name = candidate.name
        self._case: FileCase | None = None
        self._fixes: list[Fix] = []

    def peel(self, prompt: str = QUESTION) -> Verdict:
        verdict, self._case, self._fixes = examine(self.reference, self.candidate, engine=self.engine, prompt=prompt)
        return verdict

    def picture(
        self, finding: Finding, *, others: Sequence[Finding] = (), prompt: str = QUESTION, axes: Sequence[Axes] | None = None
    ) -> tuple[Axes, Axes]:
        if self._case is None or self._case.ref is None:
            return finding_figures.of_alone(finding, self._case, axes, others=others)
        return finding_figures.of_file(finding, self._case, axes, others=others, prompt=prompt)

    @property
    def _alone(self) -> bool:
        return self._case is None or self._case.ref is None

    def caption(self, finding: Finding) -> str:
        return finding_figures.caption_alone(finding) if self._alone else super().caption(finding)

    def draws(self, finding: Finding) -> bool:
        return not self._alone or (self._case is not None and bool(finding.tensors))

    def candidate_tensors(self) -> list[Tensor]:
        return [] if self._case is None else tensors_of(self._case)

    def tensors(self) -> dict[str, Tensor]:
        """The candidate's tensors under the types that they have, by GGUF name; after `peel`."""
        return {tensor.name: tensor for tensor in self.candidate_tensors()}

    def sessions(self, verdict: Verdict) -> dict[str, Session | str]:
        case = self._case
        if case is None:
            return {"candidate": verdict.findings[0].mechanism}
        sides: dict[str, Session | str] = {}
        if case.ref is not None:
            sides["reference"] = self._session(case.ref.model)
        sides["candidate"] = self._session(drafted(case, []))
        if verdict.repair is not None:
            sides["repaired"] = self._session(drafted(case, [m for m in self._fixes if m.label in verdict.repair.set]))
        return sides

    def _session(self, model: Model | AprlabError) -> Session | str:
        if isinstance(model, AprlabError):
            return model.message
        try:
            return Session(model, engine=self.engine)
        except BROKEN as error:
            return reason(error)


class Engines(Pair):
    """Two engines on one model, of which the second has faults."""

    def __init__(self, model: Model, faults: Sequence[str], *, engine: str | None = None) -> None:
        name = choose(engine, model).spec
        self.faults = tuple(faults)
        self.reference_name, self.candidate_name = f"engine {name}", f"another engine {name}"
        self._a = Session(model, engine=name)
        self._b = session_with(model, faults, engine=name)
        self._fixes: list[Fix] = []

    def peel(self, prompt: str = QUESTION) -> Verdict:
        verdict, self._fixes, self._repaired = examine_sessions(self._a, self._b, prompt=prompt)
        return verdict

    def picture(
        self, finding: Finding, *, others: Sequence[Finding] = (), prompt: str = QUESTION, axes: Sequence[Axes] | None = None
    ) -> tuple[Axes, Axes]:
        return finding_figures.of_run(finding, self._a, self._b, axes, prompt=prompt)

    def caption(self, finding: Finding) -> str:
        return finding_figures.caption(finding, run=True)

    def sessions(self, verdict: Verdict) -> dict[str, Session | str]:
        sides: dict[str, Session | str] = {"reference": self._a, "candidate": self._b}
        if verdict.repair is not None:
            sides["repaired"] = self._repaired([m for m in self._fixes if m.label in verdict.repair.set])
        return sides


DEFAULT_FAULT = "lost-qkv-biases"  # of notebook 07; left as it is beside a candidate, it is nobody's choice


def pair(
    model: str | Path = "",
    reference: str | Path = "",
    candidate: str | Path = "",
    fault: str = "",
    *,
    folder: str | Path,
    engine: str = "",
) -> Pair:
    """The two sides that the parameters of notebook 07 ask for; an empty one counts as not given.

    Args:
        model: GGUF file that faults are put into, and the reference where none is named; without it the embedded model.
        reference: the reference file.
        candidate: the candidate file. With neither reference nor model it is judged alone.
        fault: ids of the catalogue, comma-separated, if there is no candidate; `DEFAULT_FAULT` beside one is no
            choice, and the candidate is taken. Faults that files can have go into a file; if one of them is an
            engine's only, all go into an engine.
        folder: where a faulty file is written.
        engine: runs both sides; empty or ``auto``: the one that the rule has for the model.

    Raises:
        UsageError: neither a candidate nor a fault, or both; a fault that measurements have; faults of which some are
            for files and others for engines only; whatever `convert_with` and `session_with` raise.
    """
    if candidate and fault == DEFAULT_FAULT:
        fault = ""
    chosen = [by_id(id) for id in fault.split(",") if id.strip()]
    if bool(candidate) == bool(chosen):
        raise UsageError(
            "either a candidate or a fault is needed" if not candidate else "a candidate and a fault: which of them?",
            code="lab.candidate-or-fault",
        )  # fmt: skip
    name = engine or None
    if candidate:
        trusted = reference or model
        return Files(Path(trusted) if trusted else None, Path(candidate), engine=name)
    if reference:
        raise UsageError(
            "a fault is put into the model, so the model is the reference; give it as `model`", code="lab.fault-needs-model"
        )
    source = Path(model) if model else paths.embedded_model()
    _refuse_rulers(chosen)
    ids = [f.id for f in chosen]
    if all(f.file_seam for f in chosen):
        return _with_faulty_file(source, chosen, Path(folder), name)
    if all(f.run_seam for f in chosen):
        return Engines(open_model(source), ids, engine=name)
    alone = {
        form: [f.id for f in chosen if not getattr(f, other)] for form, other in (("file", "run_seam"), ("engine", "file_seam"))
    }
    raise UsageError(
        f"{', '.join(alone['file'])} can be in a file only, {', '.join(alone['engine'])} in an engine only",
        code="lab.faults-of-two-forms",
    )  # fmt: skip


def patient(
    candidate: str | Path = "", fault: str = "", *, folder: str | Path, engine: str = "", model: str | Path = ""
) -> Files:  # fmt: skip
    """One file to judge alone, as the parameters of notebook 07b ask for it.

    Args:
        candidate: the file; empty: the model with `fault` in it.
        fault: ids of the catalogue, comma-separated; not looked at beside a candidate.
        folder: where a faulty file is written.
        engine: runs the file; empty: chosen by its size.
        model: a healthy file that the fault is put into; empty: the embedded one.

    Raises:
        UsageError: neither a candidate nor a fault, or whatever `convert_with` raises.
    """
    if candidate:
        return Files(None, Path(candidate), engine=engine or None)
    chosen = [by_id(id) for id in fault.split(",") if id.strip()]
    if not chosen:
        raise UsageError("either a candidate or a fault is needed", code="lab.candidate-or-fault")
    path, ids = Path(folder) / "patient.apr", [f.id for f in chosen]
    convert_with(Path(model) if model else paths.embedded_model(), path, ids, **given_for(chosen))
    return Files(None, path, engine=engine or None, faults=ids)


def given_for(chosen: Sequence[Fault]) -> dict[str, Any]:
    """Options of a conversion so that all these faults can show: types that the source may not have.

    Raises:
        UsageError: two of them need different ones.
    """
    given: dict[str, Any] = {}
    for f in chosen:
        for key, value in f.given.items():
            if given.setdefault(key, value) != value:
                ids = ", ".join(f.id for f in chosen)
                raise UsageError(
                    f"faults {ids} need different types: {key} {given[key]} and {value}", code="faults.types-disagree"
                )
    return given


def _refuse_rulers(chosen: Sequence[Fault]) -> None:
    for f in chosen:
        if f.instrument is not None:
            raise UsageError(
                f"fault {f.id!r} is a fault of a measurement: see notebook 05_instruments, or `aprlab selftest --fault {f.id}`",
                code="faults.instrument",
            )  # fmt: skip


def _with_faulty_file(source: Path, chosen: Sequence[Fault], folder: Path, engine: str | None) -> Pair:
    """The source against its faulty conversion; where a fault needs other types, against the healthy conversion to them."""
    ids, given = [f.id for f in chosen], given_for(chosen)
    candidate = folder / "candidate.apr"
    convert_with(source, candidate, ids, **given)
    reference = source
    if given:
        reference = folder / "reference.apr"
        convert_with(source, reference, [], **given)
    return Files(reference, candidate, engine=engine, faults=ids)


__all__ = ["DEFAULT_FAULT", "Engines", "ErrorMaps", "Files", "Pair", "given_for", "named", "pair", "patient"]
