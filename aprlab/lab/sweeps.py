"""A sweep: notebooks over models × faults × engines, or over any other of their parameters, many runs at once.

Each combination of the matrix (`aprlab.lab.sweep_matrix`) is a *cell*: one notebook with one set of parameters, in a folder
of its own. A cell that is done is not run again, so an interrupted sweep goes on where it stopped. Cells run in processes on
this machine, or on a Dask cluster; files come back with the result, so that the workers need no folder in common.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from aprlab.display.page import page
from aprlab.formats.leftovers import sweep_temporary, temporary_folder
from aprlab.formats.writing import write_json, write_text, write_whole
from aprlab.lab import notebooks as lab
from aprlab.lab.sweep_matrix import SweepCell, read_matrix
from aprlab.workers import THREAD_LIMITS, check_jobs, results, threads_each

TEMPORARY = "aprlab-sweep-"  # folders in TMPDIR
RECORD = "cell.json"  # written last: a folder that has it is done
_ALONE = threading.Lock()  # papermill changes the process's folder, `lab` and `_limited` its environment


@dataclass(frozen=True)
class CellResult:
    """What became of a cell: `failure` is empty where the notebook ran to its end; `files` are what it left."""

    id: str
    failure: str
    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class CellOutcome:
    """A cell with the step that it left behind; `skipped` where an earlier run had done it."""

    cell: SweepCell
    step: lab.Step
    skipped: bool

    @property
    def holds(self) -> bool:
        """It ran to its end and all its checks hold."""
        return self.step.holds


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run_cell(cell: SweepCell, source: bytes | None = None, threads: int | None = None) -> CellResult:
    """Run one cell in a temporary folder and bring its files back; a failing notebook is a result, not an error.

    Threads of one process wait for each other here: a cell runs alone in its process.

    Args:
        cell: the run.
        source: the notebook's content, for a worker that may not have the file; None: it is read from the path.
        threads: for the kernel's libraries; None leaves them as they are.
    """
    with temporary_folder(TEMPORARY) as folder:
        notebook = folder / cell.notebook.name
        notebook.write_bytes(cell.notebook.read_bytes() if source is None else source)
        out, failure = folder / "out", ""
        with _ALONE, _limited(threads):
            try:
                lab.run_notebook(notebook, cell.parameters, out)
            except lab.NotebookError as error:
                failure = error.message
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
        portable = {name: content.replace(str(folder).encode(), b"FOLDER") for name, content in files.items()}
        return CellResult(cell.id, failure, portable)


@contextmanager
def _limited(threads: int | None) -> Iterator[None]:
    names = THREAD_LIMITS if threads is not None else ()
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(threads) for name in names})
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sweep(
    matrix: str | Path,
    out: str | Path = "reports/sweep",
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    progress: bool = False,
    on_cell: Callable[[CellOutcome], None] | None = None,
) -> list[CellOutcome]:
    """Run every cell of a matrix that is not done yet, and leave ``index.html`` over all of them in `out`.

    Args:
        matrix: the file, see `read_matrix`.
        out: a folder; each cell gets one in it.
        jobs: processes at a time on this machine; the processor's threads are shared out among them.
        scheduler: address of a Dask scheduler (``tcp://host:8786``) that runs the cells instead. Its workers need aprlab
            and the files that parameters name, under the same paths.
        progress: a bar on standard error.
        on_cell: called when a cell has ended, or was found done.

    Raises:
        UsageError, FormatError: the matrix is not right, `jobs` below 1, no cluster at that address; nothing was run.
        AprlabError: a process was killed from outside; what is done is kept.
    """
    from tqdm import tqdm

    check_jobs(jobs)
    sweep_temporary(TEMPORARY)
    cells, folder = read_matrix(matrix), lab.reports_folder(out)
    done = {cell.id: outcome for cell in cells if (outcome := _done(cell, folder)) is not None}
    outcomes = dict(done)

    def publish(*news: CellOutcome) -> None:
        page = index_page([outcomes[cell.id] for cell in cells if cell.id in outcomes], len(cells), Path(matrix).name)
        write_text(folder / "index.html", page)
        for outcome in news:
            if on_cell is not None:
                on_cell(outcome)

    if done:
        publish(*done.values())
    by_id = {cell.id: cell for cell in cells}
    missing = [cell for cell in cells if cell.id not in done]
    keys = {cell.id: cell.key for cell in missing}  # of what will be run; it may have changed by the end of the run
    with tqdm(total=len(cells), initial=len(done), disable=not progress, unit="run") as bar:
        for result in _results(missing, jobs, scheduler):
            cell = by_id[result.id]
            bar.set_postfix_str(cell.id[:40])
            outcomes[cell.id] = _keep(cell, keys[cell.id], result, folder)
            publish(outcomes[cell.id])
            bar.update()
    return [outcomes[cell.id] for cell in cells]


def _results(cells: Sequence[SweepCell], jobs: int, scheduler: str | None) -> Iterator[CellResult]:
    """The results as they come; each notebook's content goes along to a cluster."""
    threads = threads_each(jobs) if jobs > 1 and scheduler is None else None
    parts = [(cell, cell.notebook.read_bytes() if scheduler else None, threads) for cell in cells]
    yield from results(_run_part, parts, jobs=jobs, scheduler=scheduler, names=[cell.id for cell in cells])


def _run_part(part: tuple[SweepCell, bytes | None, int | None]) -> CellResult:
    cell, source, threads = part
    return run_cell(cell) if source is None and threads is None else run_cell(cell, source, threads)


def _keep(cell: SweepCell, key: str, result: CellResult, folder: Path) -> CellOutcome:
    """Write what a cell left; the record comes last, so that a folder with a record is whole."""
    place = folder / cell.id
    shutil.rmtree(place, ignore_errors=True)
    lab.reports_folder(place)
    for name, content in result.files.items():
        write_whole(place / name, content)
    step = lab.read_step(cell.notebook.stem, place, result.failure)
    record = {"key": key, "notebook": cell.notebook.stem, "axes": dict(cell.axes), "parameters": dict(cell.parameters)}
    record |= {"holds": step.holds} | {
        name: value for name, value in asdict(step).items() if name in ("failure", "checks", "headline")
    }
    write_json(place / RECORD, record)
    return CellOutcome(cell, step, skipped=False)


def _done(cell: SweepCell, folder: Path) -> CellOutcome | None:
    """The outcome of an earlier run of this very cell; None where there is none, it failed, or something has changed."""
    place = folder / cell.id
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if record["key"] != cell.key or record["failure"] or not record["holds"]:
            return None
        return CellOutcome(cell, lab.read_step(cell.notebook.stem, place), skipped=True)
    except (OSError, ValueError, KeyError):
        return None


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────


def index_page(outcomes: Sequence[CellOutcome], total: int, title: str) -> str:
    """One page: a table of all runs with verdict and headline, then each that does not hold with traceback and figure."""
    held, axes = sum(o.holds for o in outcomes), list(dict.fromkeys(name for o in outcomes for name in o.cell.axes))
    waiting = f", {total - len(outcomes)} not run yet" if total > len(outcomes) else ""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("notebook", *axes, "verdict", "files"))
    rows = []
    for o in outcomes:
        values = [o.step.name, *(_shown(o.cell.axes.get(name, "")) for name in axes)]
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        said = f"<br>{html.escape(o.step.headline)}" if o.step.headline else ""
        word = html.escape(o.step.verdict) if o.holds else f"<b>no:</b> {html.escape(o.step.verdict)}"
        rows.append(f'<tr class="{"yes" if o.holds else "no"}">{cells}<td>{word}{said}</td><td>{_links(o)}</td></tr>')
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    head = f"<h1>{held} of {len(outcomes)} runs hold{waiting}</h1><p>Matrix <code>{html.escape(title)}</code>.</p>"
    failing = [
        lab.section(o.step, f"{o.cell.id}/").replace("<h2>", f"<h2>{html.escape(o.cell.id)}: ", 1)
        for o in outcomes
        if not o.holds
    ]
    return page(f"aprlab: {title}", head, table, *failing)


def _shown(value: object) -> str:
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _links(outcome: CellOutcome) -> str:
    name, folder = outcome.step.name, quote(outcome.cell.id)
    files = [
        (f"{name}.html", "page"),
        (f"{name}.ipynb", "notebook"),
        *([(f"{name}.json", "JSON")] if outcome.step.checks else []),
    ]
    return " ".join(f'<a href="{folder}/{quote(file)}">{word}</a>' for file, word in files)
