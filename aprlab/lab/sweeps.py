"""A sweep: notebooks over models × faults × engines, or over any other of their parameters, many runs at once.

The matrix is a YAML file, checked whole before anything runs. Each combination is a *cell*: one notebook with one set of
parameters, in a folder of its own. A cell that is done is not run again, so an interrupted sweep goes on where it
stopped. Cells run in processes on this machine, or on a Dask cluster; files come back with the result, so that the
workers need no folder in common.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aprlab.display.page import page
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats.writing import write_json, write_text, write_whole
from aprlab.lab import notebooks as lab
from aprlab.lab.yaml_files import LineOf, load
from aprlab.paths import cores

MOST_CELLS = 20_000  # runs of one matrix, before exclusions; a run takes seconds at least
KEYS = ("notebooks", "parameters", "matrix", "exclude")
RECORD = "cell.json"  # written last: a folder that has it is done
_PLAIN = (str, int, float, bool)
_ALONE = threading.Lock()  # papermill changes the process's folder, `lab` and `_limited` its environment


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a notebook and its parameters.

    Attributes:
        notebook: path of the notebook; its stem is its name.
        axes: the parameters that vary, in the order of the matrix.
        parameters: all parameters, the fixed ones included.
        id: name of its folder: readable, unique, the same in every run of the matrix.
    """

    notebook: Path
    axes: Mapping[str, Any]
    parameters: Mapping[str, Any]
    id: str

    @property
    def key(self) -> str:
        """Changes with the notebook's source, the parameters, and size or time of a file that a parameter names."""
        state: dict[str, Any] = {
            "notebook": hashlib.sha256(self.notebook.read_bytes()).hexdigest(),
            "parameters": self.parameters,
        }
        for name, value in self.parameters.items():
            if isinstance(value, str) and value and Path(value).is_file():
                seen = Path(value).stat()
                state[f"file {name}"] = [seen.st_size, seen.st_mtime_ns]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Result:
    """What became of a cell: `failure` is empty where the notebook ran to its end; `files` are what it left."""

    id: str
    failure: str
    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """A cell with the step that it left behind; `skipped` where an earlier run had done it."""

    cell: Cell
    step: lab.Step
    skipped: bool

    @property
    def holds(self) -> bool:
        """It ran to its end and all its checks hold."""
        return self.step.holds


# ── the matrix ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_matrix(path: str | Path) -> list[Cell]:
    """The cells of a matrix file, in order: notebooks outermost, then the axes as written.

    ::

        notebooks: [07_peel]                # names of the project's notebooks, or paths beside this file
        parameters: {prompt: What is 2+2?}  # the same for all runs
        matrix:                             # every combination is run
          fault: [GH-191, lost-qkv-biases]
          engine: [reference, jit]
        exclude:                            # but those that match one of these
          - {fault: GH-191, engine: jit}

    A relative path of a file (a parameter named model, reference or candidate) is meant from the folder of the matrix.

    Raises:
        UsageError, FormatError: with the line: an unknown key, a notebook that there is not, a parameter that one of the
            notebooks does not declare or whose type is another, an exclusion that excludes nothing, the same run twice.
    """
    path = Path(path)
    data, line_of = load(path)

    def refuse(message: str, *keys: str | int, code: str) -> FormatError:
        return FormatError(f"line {line_of(*keys)}: {message}", code=code, path=path)

    if not isinstance(data, dict):
        raise refuse(f"a mapping with {', '.join(KEYS)} is wanted, not {_kind(data)}", code="sweep.wrong-kind")
    for name in data:
        if name not in KEYS:
            raise refuse(f"unknown key {name!r}; known: {', '.join(KEYS)}", name, code="sweep.unknown-key")
    fixed, axes = (_mapping(data.get(part), part, refuse) for part in ("parameters", "matrix"))
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise refuse(f"{name!r} wants a list of at least one value, not {_kind(values)}", "matrix", name,
                         code="sweep.wrong-kind")  # fmt: skip
        if name in fixed:
            raise refuse(f"{name!r} stands under `parameters` as well", "matrix", name, code="sweep.axis-and-parameter")
    notebooks = _notebooks(data.get("notebooks"), path.parent, refuse)
    exclude = _exclusions(data.get("exclude"), axes, refuse)
    count = len(notebooks) * math.prod(map(len, axes.values()))
    if count * (1 + len(exclude)) > MOST_CELLS:  # counted before they are made
        rules = f" and {len(exclude)} exclusions" if exclude else ""
        raise refuse(f"{count} runs{rules} to look at; at most {MOST_CELLS} are taken", "matrix", code="sweep.too-many-runs")
    cells: list[Cell] = []
    used: set[int] = set()
    for notebook in notebooks:
        _check(notebook, fixed, axes, path.parent, line_of, path)
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            hit = [n for n, rule in enumerate(exclude) if all(_same(point[name], value) for name, value in rule.items())]
            used.update(hit)
            if not hit:
                cells.append(_cell(notebook, point, fixed, path.parent))
    for n in range(len(exclude)):
        if n not in used:
            raise refuse("excludes nothing", "exclude", n, code="sweep.excludes-nothing")
    if not cells:
        raise refuse("nothing is left to run", code="sweep.nothing-left")
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise refuse(f"the same run twice: {cell.id}", "matrix", code="sweep.same-run-twice")
        seen.add(cell.id)
    return cells


_Refuse = Callable[..., FormatError]


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _same(a: object, b: object) -> bool:
    """Equal and of one type: 1 is not true."""
    return type(a) is type(b) and a == b


def _mapping(value: Any, part: str, refuse: _Refuse) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse(f"{part!r} wants a mapping, not {_kind(value)}", part, code="sweep.wrong-kind")
    for name in value:
        if not isinstance(name, str):
            raise refuse(f"a parameter's name is a word, not {name!r}", part, name, code="sweep.wrong-kind")
        if name == "out":
            raise refuse("'out' is set by the sweep", part, name, code="sweep.out-is-set")
    return value


def _notebooks(value: Any, folder: Path, refuse: _Refuse) -> list[Path]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise refuse("'notebooks' wants a list of names", "notebooks", code="sweep.wrong-kind")
    found = []
    for n, name in enumerate(value):
        try:
            found.append(lab.find_notebook(folder / name if name.endswith(".ipynb") else name).resolve())
        except UsageError as error:
            raise refuse(error.message, "notebooks", n, code="sweep.unknown-notebook") from None
        if found[-1] in found[:-1]:
            raise refuse(f"notebook {name!r} again", "notebooks", n, code="sweep.same-notebook-twice")
    return found


def _exclusions(value: Any, axes: Mapping[str, list[Any]], refuse: _Refuse) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise refuse(f"'exclude' wants a list, not {_kind(value)}", "exclude", code="sweep.wrong-kind")
    for n, rule in enumerate(value):
        if not isinstance(rule, dict) or not rule:
            raise refuse(f"a mapping of axes to values is wanted, not {_kind(rule)}", "exclude", n, code="sweep.wrong-kind")
        for name in rule:
            if name not in axes:
                raise refuse(f"{name!r} is no axis of the matrix; there are: {', '.join(axes) or 'none'}", "exclude", n, name,
                             code="sweep.unknown-axis")  # fmt: skip
    return value


_FILES = ("model", "reference", "candidate")


def _absolute(parameters: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Parameters with the paths of files made absolute: a kernel runs in another folder."""
    return {
        name: str((folder / Path(value).expanduser()).resolve()) if name in _FILES and isinstance(value, str) and value else value
        for name, value in parameters.items()
    }


def _check(
    notebook: Path, fixed: Mapping[str, Any], axes: Mapping[str, list[Any]], folder: Path, line_of: LineOf, path: Path
) -> None:
    """Every value against what the notebook declares, by the strict rules of `lab.check_parameters`."""
    places = [(("parameters", name), name, value) for name, value in fixed.items()]
    places += [(("matrix", name, n), name, value) for name, values in axes.items() for n, value in enumerate(values)]  # type: ignore[misc]
    for keys, name, value in places:
        if type(value) not in _PLAIN:
            raise FormatError(
                f"line {line_of(*keys)}: {name!r} wants a word or a number, not {_kind(value)}",
                code="sweep.wrong-kind", path=path,
            )  # fmt: skip
        try:
            lab.check_parameters(notebook, {name: value})
        except UsageError as error:
            raise FormatError(f"line {line_of(*keys)}: {error.message}", code="sweep.bad-parameter", path=path) from None
        file = _absolute({name: value}, folder)[name]
        if name in _FILES and value and not Path(file).is_file():
            raise FormatError(f"line {line_of(*keys)}: there is no file {value!r}", code="sweep.no-such-file", path=path)


def _cell(notebook: Path, point: Mapping[str, Any], fixed: Mapping[str, Any], folder: Path) -> Cell:
    parameters = _absolute({**fixed, **point}, folder)
    words = [notebook.stem, *(f"{name}={Path(v).stem if name in _FILES else v}" for name, v in point.items() if v != "")]
    readable = re.sub(r"[^\w=.+-]+", "-", "_".join(words))[:80].strip("-.")
    digest = hashlib.sha256(json.dumps([notebook.stem, point, dict(fixed)], sort_keys=True).encode()).hexdigest()[:8]
    return Cell(notebook, dict(point), parameters, f"{readable}_{digest}")


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run_cell(cell: Cell, source: bytes | None = None, threads: int | None = None) -> Result:
    """Run one cell in a temporary folder and bring its files back; a failing notebook is a result, not an error.

    Threads of one process wait for each other here: a cell runs alone in its process.

    Args:
        cell: the run.
        source: the notebook's content, for a worker that may not have the file; None: it is read from the path.
        threads: for the kernel's libraries; None leaves them as they are.
    """
    with tempfile.TemporaryDirectory(prefix="aprlab-") as folder:
        notebook = Path(folder) / cell.notebook.name
        notebook.write_bytes(cell.notebook.read_bytes() if source is None else source)
        out, failure = Path(folder) / "out", ""
        with _ALONE, _limited(threads):
            try:
                lab.run_notebook(notebook, cell.parameters, out)
            except lab.NotebookError as error:
                failure = error.message
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
        return Result(cell.id, failure, {name: content.replace(folder.encode(), b"FOLDER") for name, content in files.items()})


@contextmanager
def _limited(threads: int | None) -> Iterator[None]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS") if threads is not None else ()
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
    on_cell: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
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

    if jobs < 1:
        raise UsageError(f"jobs {jobs}: at least 1 is needed", code="sweep.jobs")
    cells, folder = read_matrix(matrix), lab.reports_folder(out)
    done = {cell.id: outcome for cell in cells if (outcome := _done(cell, folder)) is not None}
    outcomes = dict(done)

    def publish(*news: Outcome) -> None:
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


def _results(cells: Sequence[Cell], jobs: int, scheduler: str | None) -> Iterator[Result]:
    """The results as they come."""
    if scheduler is not None:
        yield from _on_cluster(cells, scheduler)
    elif jobs == 1 or len(cells) < 2:
        yield from (run_cell(cell) for cell in cells)
    else:
        threads = max(1, cores() // jobs)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            try:
                futures: list[Future[Result]] = [pool.submit(run_cell, cell, None, threads) for cell in cells]
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                raise AprlabError(
                    "a worker process was killed; run again to go on from here", code="sweep.worker-killed"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _on_cluster(cells: Sequence[Cell], address: str) -> Iterator[Result]:
    try:
        distributed = import_module("distributed")
    except ImportError:
        raise UsageError(
            "a Dask scheduler needs the extra `cluster`: pip install 'aprlab[cluster]'", code="sweep.cluster-extra"
        ) from None
    try:
        client = distributed.Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"no Dask scheduler at {address!r}: {error}", code="sweep.no-scheduler") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise UsageError(f"the Dask scheduler at {address!r} has no workers", code="sweep.no-workers")
        futures = [
            client.submit(run_cell, cell, cell.notebook.read_bytes(), pure=False, key=f"aprlab-{cell.id}") for cell in cells
        ]
        yield from (future.result() for future in distributed.as_completed(futures, loop=client.loop))


def _keep(cell: Cell, key: str, result: Result, folder: Path) -> Outcome:
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
    return Outcome(cell, step, skipped=False)


def _done(cell: Cell, folder: Path) -> Outcome | None:
    """The outcome of an earlier run of this very cell; None where there is none, it failed, or something has changed."""
    place = folder / cell.id
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if record["key"] != cell.key or record["failure"] or not record["holds"]:
            return None
        return Outcome(cell, lab.read_step(cell.notebook.stem, place), skipped=True)
    except (OSError, ValueError, KeyError):
        return None


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────


def index_page(outcomes: Sequence[Outcome], total: int, title: str) -> str:
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


def _links(outcome: Outcome) -> str:
    name, folder = outcome.step.name, quote(outcome.cell.id)
    files = [
        (f"{name}.html", "page"),
        (f"{name}.ipynb", "notebook"),
        *([(f"{name}.json", "JSON")] if outcome.step.checks else []),
    ]
    return " ".join(f'<a href="{folder}/{quote(file)}">{word}</a>' for file, word in files)


__all__ = ["Cell", "Outcome", "Result", "index_page", "read_matrix", "run_cell", "sweep"]
