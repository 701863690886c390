"""The kill matrix: every fault of the catalogue against every gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from aprlab import instruments
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.faults import FAULTS, OTHER_ARCHITECTURES, convert_with, session_with, upstream
from aprlab.faults.base import Fault
from aprlab.formats import open_model
from aprlab.formats.leftovers import temporary_folder
from aprlab.gates.catalogue import GATES
from aprlab.gates.evidence import CandidateFile, GateCase, ReferenceSide, RefusedCandidate
from aprlab.gates.running import PROMPTS, judge
from aprlab.gates.sibling_model import sibling
from aprlab.instruments.self_test import INSTRUMENTS, InstrumentSet
from aprlab.model.model import Model
from aprlab.tracing.traces import trace

MATRIX_TOKENS = 6  # of an answer in the kill matrix: what is garbage or other shows by then
KILL, REFUSED, PASS, VOID = "kill", "refused", "pass", "void"


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One fault in one form against all gates.

    Attributes:
        fault: id; '' for the healthy control.
        form: ``file``, ``run`` or ``instrument``.
        layer: of the fault.
        cells: gate id -> `KILL` (looked and said no), `REFUSED` (could not look: the strict reader refuses the file),
            `PASS`, `VOID` (rests on a failed instrument).
        upstream: upstream's ten checks, stage -> passed; empty where not even its reader could load the file.
        figures: gate id -> what was measured, in words.
        codes: gate id -> the figure's code.
    """

    fault: str
    form: str
    layer: str
    cells: dict[str, str]
    upstream: dict[str, bool]
    figures: dict[str, str] = field(repr=False)
    codes: dict[str, str] = field(repr=False)

    @property
    def killers(self) -> list[str]:
        """The gates that looked and said no."""
        return [id for id, cell in self.cells.items() if cell == KILL]


@dataclass(frozen=True)
class KillMatrix:
    """Gates × faults. `control` is the healthy conversion, for each source; it must pass everywhere."""

    rows: list[MatrixRow]
    control: list[MatrixRow]

    def kills(self, gate: str) -> list[MatrixRow]:
        """The rows that a gate kills."""
        return [row for row in self.rows if row.cells[gate] == KILL]

    def survivors(self) -> list[MatrixRow]:
        """Rows that no gate kills: there must be none."""
        return [row for row in self.rows if not row.killers]

    def idle(self) -> list[str]:
        """Gates that kill nothing: there must be none."""
        return [gate for gate in GATES if not self.kills(gate)]

    def upstream_kills(self) -> list[MatrixRow]:
        """Rows that one of upstream's ten checks rejects."""
        return [row for row in self.rows if row.upstream and not all(row.upstream.values())]


def kill_matrix(
    model: Model | str | Path,
    faults: Iterable[str | Fault] | None = None,
    *,
    engine: str | None = "auto",
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = MATRIX_TOKENS,
    progress: Callable[[str], None] = lambda id: None,
) -> KillMatrix:
    """Every fault, in each of its forms, against every gate.

    A fault that needs what `model` has not (other types, rows that are no multiple of 256) is tried on `sibling(model)`.

    Args:
        model: a healthy GGUF model; small, as everything is run on it.
        faults: ids or faults; without it all of the catalogue but those that need another architecture than Qwen2.
        progress: called with each fault's id before it is tried.
    """
    source = model if isinstance(model, Model) else open_model(model)
    every = [id for id in FAULTS if id not in OTHER_ARCHITECTURES] if faults is None else faults
    chosen = [FAULTS[f] if isinstance(f, str) else f for f in every]
    rows: list[MatrixRow] = []
    with temporary_folder() as folder:
        plain = MatrixBench(source, folder / "plain.apr", engine, prompts, max_tokens)
        other: MatrixBench | None = None
        for fault in chosen:
            progress(fault.id)
            for form in [f for f, seam in (("file", fault.file_seam), ("run", fault.run_seam)) if seam] or ["instrument"]:
                try:
                    rows.append(plain.row(fault, form, folder))
                except UnfitModel:
                    if other is None:
                        other = MatrixBench(sibling(source, folder), folder / "other.apr", engine, prompts, max_tokens)
                    rows.append(other.row(fault, form, folder))
        benches = [plain] if other is None else [plain, other]
        return KillMatrix(rows, [bench.control for bench in benches])


class UnfitModel(Exception):
    """The fault changes nothing in this model."""


class MatrixBench:
    """One healthy source with its reference, and its healthy conversion."""

    def __init__(self, source: Model, path: Path, engine: str | None, prompts: Sequence[str], max_tokens: int) -> None:
        self.source = source
        self.ref = ReferenceSide(source, None, engine, prompts, max_tokens, threads=1)  # small matrices: more threads only wait
        convert_with(source, path, [])
        self.healthy = CandidateFile(path)
        self.selftest = instruments.selftest()

    @cached_property
    def control(self) -> MatrixRow:
        return self._judge("", "file", "", GateCase(self.ref, self.healthy, tested=self.selftest))

    def row(self, fault: Fault, form: str, folder: Path) -> MatrixRow:
        """One fault in one form; raises `UnfitModel` where it changes nothing in this model."""
        try:
            case = self._case(fault, form, folder)
        except FormatError as error:  # the session itself refuses to start
            case = GateCase(self.ref, RefusedCandidate(self.healthy.path, error), tested=self.selftest)
        except UsageError as error:
            if error.code == "faults.changes-nothing":
                raise UnfitModel(fault.id) from None
            raise
        row = self._judge(fault.id, form, fault.layer, case)
        (folder / f"{fault.id}.apr").unlink(missing_ok=True)
        return row

    def _case(self, fault: Fault, form: str, folder: Path) -> GateCase:
        if fault.instrument is not None:
            tools = InstrumentSet({fault.replaces: fault.instrument})
            again = instruments.show(INSTRUMENTS[fault.replaces], fault.instrument)
            tested = [again if result.name == fault.replaces else result for result in self.selftest]
            return GateCase(self.ref, self.healthy, self.ref.session, instruments=tools, tested=tested)
        if form == "file":
            path = folder / f"{fault.id}.apr"
            convert_with(self.source, path, [fault], force=True)
            return GateCase(self.ref, CandidateFile(path), tested=self.selftest)
        given = session_with(self.ref.session, [fault])
        given.forget()  # bit for bit: the same tokens have to go through the same passes
        return GateCase(self.ref, self.healthy, given, tested=self.selftest)

    def _judge(self, id: str, form: str, layer: str, case: GateCase) -> MatrixRow:
        said = judge(case)
        cells = {r.id: VOID if r.passed is None else PASS if r.passed else REFUSED if r.refused else KILL for r in said}
        codes = {r.id: r.code for r in said}
        return MatrixRow(id, form, layer, cells, _upstream(case, form), {r.id: r.figure for r in said}, codes)


def _upstream(case: GateCase, form: str) -> dict[str, bool]:
    """Upstream's ten checks on the same candidate, read by upstream's own reader where it is a file."""
    try:
        written = [p.name for p in case.file.seen.pieces]
        session = upstream.session(case.file.path, threads=1) if form == "file" else case.session
        tokens = session.tokenizer.encode("Hello")
        logits = trace(session, tokens[:1], "logits", positions="last")["logits"].values[-1]
        return upstream.ten_checks(written, tokens, logits)
    except (AprlabError, ValueError, IndexError, KeyError, ZeroDivisionError):
        return {}
