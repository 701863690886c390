"""Onion explorer: break a model on purpose, watch the layers being checked, see why, repair it finding by finding."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aprlab.engines import AUTO, choose
from aprlab.errors import BROKEN, AprlabError, UsageError
from aprlab.faults import FAULTS, Fault, convert_with, session_with
from aprlab.formats import leftovers, open_model
from aprlab.formats.writing import check_output
from aprlab.formats.writing import drafted as drafted_file
from aprlab.inference.session import Session
from aprlab.lab.pairs import given_for
from aprlab.model.model import Model
from aprlab.onion.file_case import Deviation, FileCase, by_cause
from aprlab.onion.fixes import Fix, drafted
from aprlab.onion.peeling import examine
from aprlab.onion.references import reference_of
from aprlab.onion.repairs import write_repaired
from aprlab.onion.run_peeling import examine_sessions
from aprlab.onion.verdict import Finding, Verdict
from aprlab.published import QUESTION
from aprlab.tracing.golden_rule import MAX_TOKENS
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.evidence import Evidence, facts, of_file, of_runs
from aprlab.widgets.models.files import known_files

Form = Literal["file", "reader"]
STAGES: dict[Form, dict[str, str]] = {
    "file": {
        "instruments": "are the instruments sound?", "open": "open both files", "naming": "names",
        "container": "counts, spans, order", "dtype": "types", "layout": "layout", "weights": "values",
        "config": "config", "tokenizer": "tokenizer",
        "hypotheses": "which known fault gives exactly these bytes?", "reference run": "what does the healthy file say?",
        "strict": "does the strict reader open it?",
        "run": "where do the runs diverge?", "repair": "repair, run again, drop what was not needed",
    },
    "reader": {
        "instruments": "are the instruments sound?", "config": "config", "tokenizer": "tokenizer",
        "golden": "what does the healthy reader say?", "forward": "each operation on the same input",
        "hypotheses": "which known fault computes this?", "run": "where do the runs diverge?",
        "repair": "repair, run again, drop what was not needed",
    },
}  # fmt: skip


@dataclass
class Stage:
    """One step of the work: ``waiting``, ``running`` or ``done``; `found` says what, in words, once it is known."""

    name: str
    words: str
    state: str = "waiting"
    found: list[str] = field(default_factory=list)
    clean: bool | None = None


@dataclass(frozen=True)
class SideAnswer:
    """What a side says with some of its findings repaired. `refusal` is why it says nothing."""

    repaired: tuple[str, ...]
    text: str
    refusal: str = ""


class OnionExplorer(Observable):
    """Choose, run, look, repair.

    Attributes:
        files: label -> path of the healthy models there are.
        model: label of the one chosen.
        form: where the fault enters: in the ``file`` that is written, or in the ``reader`` of a healthy one.
        faults: ids, each on top of the one before.
        candidate: a file of the user's own instead of faults, or ''.
        prompt: what is asked.
        stages, verdict: of the last run.
        healthy: what the healthy side answers.
        saved: what became of the last `save`, in words.
        answers: what the other one answered, with nothing repaired, then with each choice of repairs that was tried.
        repaired: labels of the repairs that are applied now.
        evidence: of the finding looked at, or None.
    """

    def __init__(self, files: Mapping[str, str | Path] | None = None, *, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.files = known_files(files)
        self.model = next(iter(self.files))
        self.form: Form = "file"
        self.faults: tuple[str, ...] = ("GH-191",)
        self.candidate, self.prompt, self.max_tokens = "", QUESTION, max_tokens
        leftovers.sweep_temporary("aprlab-onion-")
        self._folder = leftovers.claimed_folder("aprlab-onion-")
        weakref.finalize(self, leftovers.release_folder, self._folder)
        self._forget()

    def _forget(self) -> None:
        self.stages: list[Stage] = [Stage(name, words) for name, words in STAGES[self.form].items()]
        self.verdict: Verdict | None = None
        self.healthy: SideAnswer | None = None
        self.answers: list[SideAnswer] = []
        self.repaired: tuple[str, ...] = ()
        self.evidence: Evidence | None = None
        self.shown: int = -1
        self.saved = ""
        self._repairs: list[Fix] = []
        self._case: FileCase | None = None
        self._sessions: tuple[Session, Session] | None = None
        self._build: Callable[[Sequence[Fix]], Session | AprlabError] | None = None

    # -- choosing

    @property
    def choices(self) -> list[Fault]:
        """The faults that can enter at this place, in the order of the catalogue."""
        seam = "file_seam" if self.form == "file" else "run_seam"
        return [fault for fault in FAULTS.values() if getattr(fault, seam) is not None]

    def choose(
        self, *, model: str | None = None, form: Form | None = None, faults: Iterable[str] | None = None,
        candidate: str | None = None, prompt: str | None = None,
    ) -> None:  # fmt: skip
        """What to run next. Faults that cannot enter at `form` are dropped when it changes, and refused when they are given."""
        self.work.free()
        if model is not None:
            if model not in self.files and Path(model).is_file():
                self.files[model] = Path(model)
            if model not in self.files:
                known = ", ".join(self.files)
                raise UsageError(
                    f"no model and no file {model!r}; the reference is still {self.model!r}; there are: {known}",
                    code="widgets.no-such-model",
                )
            self.model = model
        if form is not None:
            if form not in STAGES:
                raise UsageError(f"unknown form {form!r}; known: {', '.join(STAGES)}", code="widgets.unknown-form")
            self.form = form
        possible = {fault.id for fault in self.choices}
        if faults is not None:
            wanted = tuple(faults)
            for id in wanted:
                if id not in possible:
                    raise UsageError(f"fault {id!r} does not enter in the {self.form}", code="widgets.fault-not-for-form")
            self.faults = wanted
        else:
            self.faults = tuple(id for id in self.faults if id in possible)
        if candidate is not None:
            self.candidate = candidate.strip()
        if prompt is not None:
            self.prompt = prompt
        self._forget()
        self.changed()

    # -- running

    def run(self) -> None:
        """Break it, peel it, ask both sides; in the background, `stages` show how far it is."""
        self.work.free()
        if self.candidate and self.form != "file":
            raise UsageError("a file of your own is looked at as a file", code="widgets.own-file-is-a-file")
        if self.candidate and self.faults:
            raise UsageError(
                f"a file of your own and chosen faults ({', '.join(self.faults)}): the suspect is one or the other; "
                "clear its path, or press 'no faults'",
                code="widgets.own-file-and-faults",
            )
        self._forget()
        self.work.start("making the other side", self._run)

    def _run(self) -> None:
        reference = reference_of(self.files[self.model]).model
        if self.form == "file":
            self._run_file(reference)
        else:
            self._run_reader(reference)
        for stage in self.stages:
            stage.state = "done" if stage.state == "running" else stage.state
        if self._build is not None:
            self.work.tell("asking both sides", 0.97)
            assert self._sessions is not None
            self.healthy = self._ask((), self._healthy)
            self.answers = [self._answer(())]

    def _run_file(self, reference: Model) -> None:
        path = Path(self.candidate) if self.candidate else self._folder / f"{'+'.join(self.faults) or 'healthy'}.apr"
        if not self.candidate:
            convert_with(reference, path, self.faults, force=True, **given_for([FAULTS[id] for id in self.faults]))
        self.verdict, self._case, self._repairs = examine(
            self.files[self.model], path, prompt=self.prompt, max_tokens=self.max_tokens, progress=self._on_stage
        )
        engine = choose(AUTO, reference)
        healthy = Session(reference, engine=engine)
        case = self._case
        if case is not None:

            def build(some: Sequence[Fix]) -> Session | AprlabError:
                model = drafted(case, some)
                return model if isinstance(model, AprlabError) else Session(model, engine=engine)

            self._build = build
            self._sessions = (healthy, healthy)

    def _run_reader(self, reference: Model) -> None:
        engine = choose(AUTO, reference)
        healthy = Session(reference, engine=engine)
        other = session_with(reference, self.faults, engine)
        self.verdict, self._repairs, build = examine_sessions(healthy, other, prompt=self.prompt, progress=self._on_stage)
        self._sessions, self._build = (healthy, other), build

    def _on_stage(self, name: str, found: Sequence[Deviation] | None) -> None:
        """From `peel`: a stage begins (None), or a layer has ended and found this."""
        at = next((n for n, stage in enumerate(self.stages) if stage.name == name), None)
        if at is None:  # a stage without a description is still a stage
            self.stages.append(Stage(name, name))
            at = len(self.stages) - 1
        stage = self.stages[at]
        if found is None:
            for before in self.stages[:at]:
                before.state = "done"
            stage.state = "running"
        else:
            stage.state, stage.clean = "done", all(d.harmless for d in found)
            stage.found = [f"{len(group)} × {group[0].mechanism}" for group in by_cause(found)]
        self.work.tell(stage.words, 0.05 + 0.9 * at / len(self.stages))

    @property
    def refusal(self) -> str:
        """Why the suspect could not be looked into, in words."""
        if self.form != "file" or self.verdict is None or self._case is not None or not self.findings:
            return ""
        return f"{Path(self.candidate).name or 'the file'} is refused: {self.findings[0].mechanism}"

    # -- looking

    @property
    def findings(self) -> list[Finding]:
        """Of the verdict."""
        return [] if self.verdict is None else self.verdict.findings

    def look(self, number: int) -> None:
        """Open the figure of a finding, by its place in `findings`; again closes it."""
        if not 0 <= number < len(self.findings):
            raise UsageError(f"finding {number} of {len(self.findings)}", code="widgets.no-such-finding")
        if number == self.shown:
            self.shown, self.evidence = -1, None
            self.changed()
            return
        finding = self.findings[number]
        self.work.start("drawing", lambda: self._look(number, finding))

    def _look(self, number: int, finding: Finding) -> None:
        if self._case is not None and finding.layer not in ("config", "tokenizer"):
            found = of_file(self._case, finding, self.findings, self.prompt)
        else:
            found = self._runs(finding)
        self.shown, self.evidence = number, found

    def _runs(self, finding: Finding) -> Evidence:
        if self._sessions is None or self._build is None:
            return facts(finding)
        healthy, other = self._sessions
        if self.form == "file":
            others = [fix for fix in self._repairs if fix.finding is not finding]
            built = self._build(others)  # everything else repaired, so that the figure shows this finding alone
            if isinstance(built, AprlabError):
                return facts(finding)
            other = built
        return of_runs(healthy, other, finding, self.prompt)

    # -- repairing

    @property
    def repairs(self) -> list[str]:
        """Labels of what can be repaired."""
        return [fix.label for fix in self._repairs if self.form == "reader" or fix.possible]

    def repair(self, label: str) -> None:
        """Apply a repair, or take it back, and ask again in the background."""
        if label not in self.repairs:
            known = ", ".join(self.repairs) or "none"
            raise UsageError(f"no repair {label!r}; there are: {known}", code="widgets.no-such-repair")
        kept = [known for known in self.repairs if (known in self.repaired) != (known == label)]
        self.work.start("asking again", lambda: self._apply(tuple(kept)))

    def _apply(self, labels: tuple[str, ...]) -> None:
        found = self._answer(labels)
        self.repaired = labels
        self.answers = [answer for answer in self.answers if answer.repaired != labels] + [found]

    def _answer(self, labels: tuple[str, ...]) -> SideAnswer:
        known = next((answer for answer in self.answers if answer.repaired == labels), None)
        if known is not None:
            return known
        build, chosen = self._build, [fix for fix in self._repairs if fix.label in labels]
        assert build is not None
        return self._ask(labels, lambda: build(chosen))

    def _healthy(self) -> Session:
        assert self._sessions is not None
        return self._sessions[0]

    def _ask(self, labels: tuple[str, ...], make: Callable[[], Session | AprlabError]) -> SideAnswer:
        try:
            session = make()
            if isinstance(session, AprlabError):
                return SideAnswer(labels, "", session.message)
            return SideAnswer(labels, session.generate(self.prompt, max_tokens=self.max_tokens, raw=session.wants_raw).text)
        except AprlabError as error:
            return SideAnswer(labels, "", error.message)
        except BROKEN as error:
            return SideAnswer(labels, "", f"{type(error).__name__}: {error}")

    @property
    def can_save(self) -> bool:
        """A file was examined, and repairs are applied."""
        return self.form == "file" and self._case is not None and bool(self.repaired)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the file with the repairs that are applied now, in the background; `saved` says what became of it.

        Args:
            path: the new file; ``.gguf``, or another name for the suspect's own format.
            force: replace an existing file, never one of the two sides.

        Raises:
            UsageError: nothing is repaired, or the file is there already, or is one of the two sides.
        """
        self.work.free()
        if not self.can_save:
            raise UsageError("nothing is repaired yet: apply a repair first", code="widgets.nothing-repaired")
        output = Path(str(path).strip() or "fixed.apr")
        case = self._case
        assert case is not None
        check_output(output, [case.file.path, self.files[self.model]], force=force)
        self.saved = ""
        self.work.start(f"writing {output.name}", lambda: self._save(case, output, force))

    def _save(self, case: FileCase, output: Path, force: bool) -> None:
        model = drafted(case, [fix for fix in self._repairs if fix.label in self.repaired])
        if isinstance(model, AprlabError):
            raise model
        with drafted_file(output, force=force) as draft:
            write_repaired(case.file, model, draft)
            open_model(draft).close()  # what the strict reader refuses is not kept
        like = "says what the reference says" if self.restored else "does not yet say what the reference says"
        self.saved = f"{output}: written, {output.stat().st_size:,} bytes; with these repairs it {like}"

    @property
    def answer(self) -> SideAnswer | None:
        """With the repairs that are applied now."""
        return next((answer for answer in self.answers if answer.repaired == self.repaired), None)

    @property
    def restored(self) -> bool:
        """The other side says what the healthy one says."""
        now = self.answer
        return now is not None and self.healthy is not None and not now.refusal and now.text == self.healthy.text


__all__ = ["STAGES", "OnionExplorer", "SideAnswer", "Stage"]
