"""Run a notebook as a job: strict parameters in, executed notebook, HTML page and findings out.

papermill only warns about a parameter that the notebook does not have, and runs with the default; here that is an
error before anything runs, and so is a value of another type than the default's.
"""

from __future__ import annotations

import html
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aprlab import engines, paths
from aprlab.display.page import page
from aprlab.errors import AprlabError, UsageError
from aprlab.formats.writing import drafted, write_json, write_text
from aprlab.lab import live_pages
from aprlab.version import __version__

TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


# nbconvert's page without the scripts that it would load from elsewhere
_PAGE = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in ("html_head_js_requirejs", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
) + "{% block data_png scoped %}{{ output | aprlab_figure }}{% endblock %}"


class NotebookError(AprlabError):
    """A cell failed. The executed notebook, up to that cell and with its traceback, is at `path`."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Run:
    """What a finished run left: the executed notebook, its HTML page, the JSON it wrote and that JSON's content."""

    notebook: Path
    page: Path
    report: Path
    findings: dict[str, Any]


def find_notebook(name: str | Path) -> Path:
    """A path as it is; a bare name (``00_golden_rule``) from the project's notebooks."""
    if Path(name).suffix == ".ipynb":
        path = Path(name)
        known = ""
    else:
        folder = paths.notebooks_dir()
        path = folder / f"{name}.ipynb"
        known = f"; known: {', '.join(sorted(p.stem for p in folder.glob('*.ipynb')))}"
    if not path.is_file():
        raise UsageError(f"there is no notebook {str(name)!r}{known}", code="lab.unknown-notebook")
    return path


def _papermill() -> Any:
    """papermill, without the grammars of internationalised addresses that jsonschema builds where it can: four seconds."""
    unwanted = "rfc3987_syntax"
    absent = unwanted not in sys.modules
    if absent:
        sys.modules[unwanted] = None  # type: ignore[assignment]
    try:
        import papermill
    finally:
        if absent:
            del sys.modules[unwanted]
    _write_once(papermill.engines)
    return papermill


_ENGINE = "aprlab"  # papermill's word for what runs a notebook


@cache
def _write_once(engines: Any) -> None:
    """Add an engine to papermill that writes the notebook when it has ended, however it did, and not around each cell."""

    class OnceWritten(engines.NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            path, nb_man.output_path = nb_man.output_path, None
            try:
                super().execute_managed_notebook(nb_man, kernel_name, **options)
            finally:
                nb_man.output_path = path

    engines.papermill_engines.register(_ENGINE, OnceWritten)


def check_parameters(notebook: str | Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as they may be given to the notebook (an int where a float is wanted becomes one).

    Raises:
        UsageError: a name that the notebook does not declare in its cell tagged `parameters`, or a value whose type
            is not exactly the declared one. A NumPy scalar is not a Python number: papermill cannot save it. Or an `engine`
            that there is not.
    """
    papermill = _papermill()
    path = find_notebook(notebook)
    declared = papermill.inspect_notebook(str(path))
    checked: dict[str, Any] = {}
    for name, value in parameters.items():
        if name not in declared:
            raise UsageError(
                f"{path.stem} has no parameter {name!r}; it has: {', '.join(declared) or 'none'}", code="lab.unknown-parameter"
            )
        wanted = declared[name]["inferred_type_name"]
        if wanted not in TYPES:
            raise UsageError(
                f"{path.stem}: parameter {name!r} is declared as {wanted!r}, not as one of {', '.join(TYPES)}",
                code="lab.parameter-declared",
            )  # fmt: skip
        if wanted == "float" and type(value) is int:
            value = float(value)
        if type(value) is not TYPES[wanted]:
            raise UsageError(
                f"{path.stem}: parameter {name!r} must be {wanted}, got {type(value).__name__} {value!r}",
                code="lab.parameter-type",
            )
        if name == "engine":
            engines.parse(str(value))
        checked[name] = value
    return checked


def check_types(namespace: Mapping[str, Any]) -> None:
    """Called by a notebook behind its parameters: papermill alone takes a value of any type, and fails somewhere below.

    Args:
        namespace: ``globals()`` of the notebook; what its parameters are declared as is in its annotations.

    Raises:
        UsageError: a parameter that is not of its declared type.
    """
    annotations = namespace.get("__annotations__") or {}
    if not annotations and callable(namespace.get("__annotate__")):  # Python 3.14 keeps them unevaluated
        annotations = namespace["__annotate__"](1)
    for name, annotation in annotations.items():
        value, declared = namespace.get(name), TYPES.get(annotation) if isinstance(annotation, str) else annotation
        if declared is None or declared not in TYPES.values():
            continue
        if type(value) is declared or (declared is float and type(value) is int):
            continue
        raise UsageError(
            f"parameter {name!r} must be {declared.__name__}, got {type(value).__name__} {value!r}", code="lab.parameter-type"
        )


def run_notebook(
    name: str | Path, parameters: Mapping[str, Any] | None = None, out: str | Path = "reports", *, progress: bool = False
) -> Run:
    """Execute a notebook of the project (or any by path) and leave its results in the folder `out`.

    Leaves ``NAME.ipynb`` (executed), ``NAME.html`` (one page that needs no network) and ``NAME.json`` (the findings,
    written by the notebook itself through `write_findings`; the notebook's parameter `out` is set for it).

    Args:
        name: a bare name such as ``00_golden_rule``, or the path of a notebook.
        parameters: name -> value; each must be declared in the notebook's cell `parameters`, with the same type.
        out: the folder; it is made if it does not exist.
        progress: show a progress bar.

    Returns:
        Paths of the three files, and the findings.

    Raises:
        UsageError: unknown notebook or parameter, a parameter of the wrong type, an `out` that cannot be a folder, or is
            the notebook's own.
        NotebookError: a cell failed, the kernel died, or the notebook wrote no findings; notebook and page up to there
            are left.
    """
    source = find_notebook(name)
    parameters = check_parameters(source, {**(parameters or {}), "out": str(Path(out).resolve())})
    folder = reports_folder(out)
    executed, page, report = (folder / f"{source.stem}{suffix}" for suffix in (".ipynb", ".html", ".json"))
    if executed.exists() and executed.samefile(source):
        raise UsageError(
            "the report would replace the notebook itself; name another folder", code="lab.report-replaces-notebook", path=folder
        )
    for stale in (executed, page, report):  # an old result must never be taken for this run's
        stale.unlink(missing_ok=True)
    with ThreadPoolExecutor(1, "aprlab-page") as pool:
        pool.submit(_exporter)  # while the kernel starts
        failure = _executed(source, executed, parameters, progress, folder)
    _write_page(executed, page)
    if failure:
        raise NotebookError(failure, code="lab.notebook-failed", path=executed)
    try:
        findings = json.loads(report.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotebookError(f"ran to its end but wrote no {report.name}", code="lab.no-findings", path=executed) from None
    return Run(executed, page, report, findings)


def _executed(source: Path, executed: Path, parameters: dict[str, Any], progress: bool, folder: Path) -> str:
    """`execute`, of which `executed` is whole or not there."""
    with drafted(executed, force=True) as draft:  # papermill writes it several times, never whole in one step
        failure = execute(source, draft, parameters, progress, folder)
        there, here = (json.dumps(str(path), ensure_ascii=False).encode() for path in (draft, executed))
        draft.write_bytes(draft.read_bytes().replace(there, here))  # papermill notes where it wrote
    return failure


def reports_folder(out: str | Path) -> Path:
    """`out`, made where it is not there yet; raises UsageError where it cannot be a folder."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be a folder for reports: {error.strerror}", code="lab.no-reports-folder", path=folder) from None
    return folder


@dataclass(frozen=True, slots=True)
class Step:
    """One notebook of a walk: how it ended.

    Attributes:
        name: of the notebook, and of its files.
        title: its first heading.
        checks: claim -> whether it holds.
        failure: empty where it ran to its end, else the failing cell and its error in one line.
        headline: the result in one line, where the notebook has put one into its findings.
        figure: its key figure as PNG bytes in base64, '' where it drew none: that of the cell tagged ``key-figure``,
            else the first.
        traceback: of the failing cell, as text.
    """

    name: str
    title: str
    checks: dict[str, bool]
    failure: str
    headline: str = ""
    figure: str = ""
    traceback: str = ""

    @property
    def holds(self) -> bool:
        """It ran to its end and all its checks hold."""
        return not self.failure and all(self.checks.values())

    @property
    def verdict(self) -> str:
        """In a few words."""
        held = f"{sum(self.checks.values())} of {len(self.checks)} checks hold"
        return f"failed: {self.failure}" if self.failure else held


def notebook_names() -> list[str]:
    """The walk: all notebooks of the project, in order."""
    return sorted(path.stem for path in paths.notebooks_dir().glob("*.ipynb"))


def walk(
    names: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    out: str | Path = "reports",
    *,
    optional: Mapping[str, Any] | None = None,
    progress: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Run several notebooks, one after another, and leave ``index.html`` with their verdicts, next to their results.

    A notebook that fails does not stop the others. The page is rewritten after each of them.

    Args:
        names: which; none means all, in order.
        parameters: each goes to the notebooks that declare it.
        out: the folder for everything.
        optional: likewise, but it is no error when no notebook declares one.
        progress: a bar per notebook.
        on_step: called when a notebook has ended.

    Raises:
        UsageError: an unknown notebook, a parameter that none of them declares, a value of another type; nothing was run.
    """
    papermill = _papermill()
    chosen = list(dict.fromkeys(names)) or notebook_names()
    declared = {name: papermill.inspect_notebook(str(find_notebook(name))) for name in chosen}
    given, asked = {**(optional or {}), **(parameters or {})}, dict(parameters or {})
    for key in asked:
        if not any(key in known for known in declared.values()):
            known = sorted({name for cells in declared.values() for name in cells})
            raise UsageError(
                f"no notebook of {', '.join(chosen)} has a parameter {key!r}; they have: {', '.join(known)}",
                code="lab.unknown-parameter",
            )  # fmt: skip
    mine = {name: check_parameters(name, {k: v for k, v in given.items() if k in declared[name]}) for name in chosen}
    steps: list[Step] = []
    for name in chosen:
        steps.append(_step(name, mine[name], Path(out), progress))
        write_text(Path(out) / "index.html", index_page(steps, given))
        if on_step is not None:
            on_step(steps[-1])
    return steps


def _step(name: str, parameters: Mapping[str, Any], out: Path, progress: bool) -> Step:
    failure = ""
    try:
        run_notebook(name, parameters, out, progress=progress)
    except NotebookError as error:
        failure = error.message
    return read_step(find_notebook(name).stem, out, failure)


def read_step(name: str, out: Path, failure: str = "") -> Step:
    """A finished run, read back from `out`: from the executed notebook and its findings.

    Args:
        name: the notebook's bare name.
        out: the folder of the run.
        failure: why it failed, in one line; '' if it did not.
    """
    report, executed = out / f"{name}.json", json.loads((out / f"{name}.ipynb").read_text(encoding="utf-8"))
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    headline = str(found.get("headline", ""))
    title = _title(executed, name)
    return Step(name, title, found.get("checks", {}), failure, headline, key_figure(executed), _traceback(executed))


def _title(notebook: Mapping[str, Any], otherwise: str) -> str:
    """The first heading; a notebook that failed begins with papermill's notice of it."""
    texts = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return next((text.splitlines()[0].removeprefix("# ") for text in texts if text.startswith("# ")), otherwise)


def key_figure(notebook: Mapping[str, Any]) -> str:
    """PNG in base64: of the cell tagged ``key-figure``, or the first of a notebook without one; '' where nothing was drawn."""
    drawn = [
        ("key-figure" in cell["metadata"].get("tags", []), "".join(output["data"]["image/png"]))
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    tagged = any("key-figure" in cell["metadata"].get("tags", []) for cell in notebook["cells"])
    chosen = [picture for key, picture in drawn if key or not tagged]
    return "".join(chosen[0].split()) if chosen else ""


def _traceback(notebook: Mapping[str, Any]) -> str:
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                return _COLOURS.sub("", "\n".join(output["traceback"]))
    return ""


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def section(step: Step, folder: str = "") -> str:
    """One notebook's part of a page: heading, verdict, links, key figure, checks, and the traceback where it failed."""
    claims = "".join(
        f"<li>{'' if holds else '<b>does not hold:</b> '}{html.escape(claim)}</li>" for claim, holds in step.checks.items()
    )
    files = [f"{step.name}.html", f"{step.name}.ipynb", *([f"{step.name}.json"] if step.checks else [])]
    links = " · ".join(f'<a href="{html.escape(quote(folder + file))}">{html.escape(file)}</a>' for file in files)
    headline = f"<p><strong>{html.escape(step.headline)}</strong></p>" if step.headline else ""
    alt = html.escape(f"key figure of {step.name}")
    there = html.escape(quote(f"{folder}{step.name}.html"))
    picture = f"data:image/png;base64,{html.escape(step.figure)}"
    figure = f'<a href="{there}"><img alt="{alt}" src="{picture}"></a>' if step.figure else ""
    trace = traceback(step)
    word = "yes" if step.holds else "no"
    return (
        f'<section id="{html.escape(step.name)}" class="{word}"><h2>{html.escape(step.title)}</h2>{headline}'
        f"<p>{html.escape(step.verdict)}<br>{links}</p>{trace}{figure}<ul>{claims}</ul></section>"
    )


def traceback(step: Step) -> str:
    """The traceback of a step that failed, to be folded away; '' of one that did not."""
    return f"<details open><summary>traceback</summary><pre>{html.escape(step.traceback)}</pre></details>" if step.failure else ""


def index_page(steps: Sequence[Step], parameters: Mapping[str, Any]) -> str:
    """One HTML page about the notebooks that have run: model, date and versions, conclusions, key figures, checks, links."""
    held = sum(step.holds for step in steps)
    shown = ", ".join(f"{key} {value!r}" for key, value in parameters.items() if value != "") or "defaults"
    named = (str(parameters.get(key) or "") for key in ("model", "reference", "candidate"))
    models = " and ".join(Path(name).name for name in named if name) or "the embedded model"
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    versions = f"aprlab {__version__}, Python {platform.python_version()}, NumPy {metadata.version('numpy')}"
    conclusion = steps[0].headline or steps[0].verdict if len(steps) == 1 else f"{held} of {len(steps)} notebooks hold"
    head = f"<h1>{html.escape(models)}</h1><p><strong>{html.escape(conclusion)}</strong></p><p>{made} · {versions}</p>"
    asked = f"<p>Run with <code>{html.escape(shown)}</code>.</p>"
    return page(f"aprlab: {models}, {made}", head, asked, contents(steps), *(section(step) for step in steps))


def contents(steps: Sequence[Step]) -> str:
    """A list of links to the sections of a page, each with its conclusion; '' of one alone."""
    if len(steps) < 2:
        return ""
    lines = "".join(
        f'<li><a href="#{html.escape(quote(step.name))}">{html.escape(step.title)}</a>: '
        f"{html.escape(step.headline or step.verdict)}</li>"
        for step in steps
    )
    return f"<nav><ul>{lines}</ul></nav>"


def execute(source: Path, executed: Path, parameters: dict[str, Any], progress: bool, folder: Path) -> str:
    """Run `source` in `folder`, into `executed`; the failing cell and its error in one line, or nothing when all cells ran.

    Raises:
        UsageError: `executed` cannot be written.
    """
    papermill = _papermill()
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    options: dict[str, Any] = {
        "engine_name": _ENGINE,
        "kernel_name": "python3",
        "progress_bar": progress,
        "log_output": False,
        "cwd": str(folder),
    }
    options["extra_arguments"] = ["--IPKernelApp.log_level=50"]  # the kernel's own warnings are not ours to show
    settings = {"MPLBACKEND": None, "TQDM_DISABLE": "1"}  # agg would make inline figures vanish; bars are no output
    kept = {key: os.environ.get(key) for key in settings}
    try:
        _set_environment(settings)
        papermill.execute_notebook(str(source), str(executed), parameters=parameters, **options)
    except PapermillExecutionError as error:
        return f"cell {error.exec_count} failed: {error.ename}: {error.evalue}".splitlines()[0]
    except DeadKernelError as error:
        return f"the kernel ended: {error}"
    except OSError as error:  # papermill may have got half of the notebook written
        executed.unlink(missing_ok=True)
        raise UsageError(f"cannot be written: {error.strerror or error}", code="writing.cannot-write", path=executed) from None
    finally:
        _set_environment(kept)
    return ""


def _set_environment(settings: Mapping[str, str | None]) -> None:
    """Set variables for the kernel to inherit; None removes one."""
    for key, value in settings.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@cache
def _exporter() -> Any:
    """What makes pages of notebooks. It has made one, so that nothing is left to be imported: that is half of a page's time."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True)
    exporter.raw_template = _PAGE
    exporter.register_filter("aprlab_figure", live_pages.figure_html)
    cells = [nbformat.v4.new_markdown_cell("*a*"), nbformat.v4.new_code_cell("a")]
    exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    return exporter


def _write_page(executed: Path, page: Path) -> None:
    """One HTML page with its figures inside; nothing in it is fetched from anywhere."""
    body, _ = _exporter().from_filename(str(executed))
    write_text(page, live_pages.with_script(body))


def write_findings(notebook: str, findings: Mapping[str, Any], out: str | Path) -> Path | None:
    """Called by a notebook at its end: write ``NOTEBOOK.json`` into `out`, or nothing if `out` is ''.

    Args:
        notebook: the notebook's bare name.
        findings: plain JSON only (no NaN, no NumPy), so that every report can be read again.
        out: the folder.

    Returns:
        The path of the file; None if nothing was written.
    """
    if not str(out):
        return None
    path = Path(out) / f"{notebook}.json"
    json.dumps(findings, allow_nan=False)  # raises where the findings are more than plain JSON
    write_json(path, {"notebook": notebook, **findings})
    return path
