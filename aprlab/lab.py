"""Run a notebook as a job: strict parameters in, executed notebook, HTML page and findings out.

papermill only warns about a parameter that the notebook does not have, and runs with the default; here that is an
error before anything runs, and so is a value of another type than the default's.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprlab import paths
from aprlab.errors import AprlabError, UsageError

TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


# nbconvert's page without the scripts that it would load from elsewhere
_PAGE = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in ("html_head_js_requirejs", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
)


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
        raise UsageError(f"there is no notebook {str(name)!r}{known}")
    return path


def check_parameters(notebook: str | Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as they may be given to the notebook (an int where a float is wanted becomes one).

    Raises:
        UsageError: a name that the notebook does not declare in its cell tagged `parameters`, or a value whose type
            is not exactly the declared one. A NumPy scalar is not a Python number: papermill cannot save it.
    """
    import papermill

    path = find_notebook(notebook)
    declared = papermill.inspect_notebook(str(path))
    checked: dict[str, Any] = {}
    for name, value in parameters.items():
        if name not in declared:
            raise UsageError(f"{path.stem} has no parameter {name!r}; it has: {', '.join(declared) or 'none'}")
        wanted = declared[name]["inferred_type_name"]
        if wanted not in TYPES:
            raise UsageError(f"{path.stem}: parameter {name!r} is declared as {wanted!r}, not as one of {', '.join(TYPES)}")
        if wanted == "float" and type(value) is int:
            value = float(value)
        if type(value) is not TYPES[wanted]:
            raise UsageError(f"{path.stem}: parameter {name!r} wants {wanted}, got {type(value).__name__} {value!r}")
        checked[name] = value
    return checked


def run_notebook(
    name: str | Path, parameters: Mapping[str, Any] | None = None, out: str | Path = "reports", *, progress: bool = False
) -> Run:
    """Execute a notebook of the project (or any by path) and leave its results in the folder `out`.

    Leaves ``NAME.ipynb`` (executed), ``NAME.html`` (one page that needs no network) and ``NAME.json`` (the findings,
    written by the notebook itself through `write_findings`; the notebook's parameter `out` is set for it).

    Raises:
        UsageError: unknown notebook or parameter, a parameter of the wrong type, or an `out` that cannot be a folder.
        NotebookError: a cell failed, or the notebook wrote no findings; notebook and page up to there are left.
    """
    source, folder = find_notebook(name), Path(out)
    parameters = check_parameters(source, {**(parameters or {}), "out": str(folder.resolve())})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be a folder for reports: {error.strerror}", path=folder) from None
    executed, page, report = (folder / f"{source.stem}{suffix}" for suffix in (".ipynb", ".html", ".json"))
    for stale in (executed, page, report):  # an old result must never be taken for this run's
        stale.unlink(missing_ok=True)
    failure = _execute(source, executed, parameters, progress)
    _write_page(executed, page)
    if failure:
        raise NotebookError(failure, path=executed)
    try:
        findings = json.loads(report.read_text())
    except FileNotFoundError:
        raise NotebookError(f"ran to its end but wrote no {report.name}", path=executed) from None
    return Run(executed, page, report, findings)


@dataclass(frozen=True, slots=True)
class Step:
    """One notebook of a walk: how it ended. `failure` is empty where it ran to its end; `checks` is what it claims."""

    name: str
    title: str
    checks: dict[str, bool]
    failure: str

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
    """Run several notebooks, one after another, and leave ``index.html`` with their verdicts beside their results.

    A notebook that fails does not stop the others. The page is written anew after each of them.

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
    import papermill

    chosen = list(dict.fromkeys(names)) or notebook_names()
    declared = {name: papermill.inspect_notebook(str(find_notebook(name))) for name in chosen}
    given, asked = {**(optional or {}), **(parameters or {})}, dict(parameters or {})
    for key in asked:
        if not any(key in known for known in declared.values()):
            known = sorted({name for cells in declared.values() for name in cells})
            raise UsageError(f"no notebook of {', '.join(chosen)} has a parameter {key!r}; they have: {', '.join(known)}")
    mine = {name: check_parameters(name, {k: v for k, v in given.items() if k in declared[name]}) for name in chosen}
    steps: list[Step] = []
    for name in chosen:
        steps.append(_step(name, mine[name], Path(out), progress))
        (Path(out) / "index.html").write_text(index_page(steps, given), encoding="utf-8")
        if on_step is not None:
            on_step(steps[-1])
    return steps


def _step(name: str, parameters: Mapping[str, Any], out: Path, progress: bool) -> Step:
    failure = ""
    try:
        run_notebook(name, parameters, out, progress=progress)
    except NotebookError as error:
        failure = error.message
    report, source = out / f"{name}.json", json.loads(find_notebook(name).read_text(encoding="utf-8"))
    checks = json.loads(report.read_text()).get("checks", {}) if report.is_file() else {}
    title = "".join(source["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
    return Step(name, title, checks, failure)


_INDEX = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>aprlab: the walk</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em;color:#222}
section{border-left:.3em solid #0072b2;padding:.1em 1em;margin:1.2em 0;break-inside:avoid}
section.no{border-color:#d55e00}h2{font-size:1.1em;margin:.2em 0}ul{margin:.3em 0;padding-left:1.2em}
b{color:#d55e00}code{overflow-wrap:anywhere}@media print{body{margin:0}a{color:inherit}}
</style></head><body>"""


def index_page(steps: Sequence[Step], parameters: Mapping[str, Any]) -> str:
    """One HTML page about the notebooks that have run: verdict, checks, links beside it. It fetches nothing."""
    held = sum(step.holds for step in steps)
    shown = ", ".join(f"{key} {value!r}" for key, value in parameters.items() if value != "") or "defaults"
    parts = [_INDEX, f"<h1>{held} of {len(steps)} notebooks hold</h1><p>Run with <code>{html.escape(shown)}</code>.</p>"]
    for step in steps:
        claims = "".join(
            f"<li>{'' if holds else '<b>does not hold:</b> '}{html.escape(claim)}</li>" for claim, holds in step.checks.items()
        )
        files = [f"{step.name}.html", f"{step.name}.ipynb", *([f"{step.name}.json"] if step.checks else [])]
        links = " · ".join(f'<a href="{html.escape(file)}">{html.escape(file)}</a>' for file in files)
        parts.append(
            f'<section class="{"yes" if step.holds else "no"}"><h2>{html.escape(step.title)}</h2>'
            f"<p>{html.escape(step.verdict)}<br>{links}</p><ul>{claims}</ul></section>"
        )
    return "\n".join([*parts, "</body></html>\n"])


def _execute(source: Path, executed: Path, parameters: dict[str, Any], progress: bool) -> str:
    """Run `source` into `executed`; the failing cell and its error in one line, or nothing when all cells ran."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    options: dict[str, Any] = {
        "kernel_name": "python3",
        "progress_bar": progress,
        "log_output": False,
        "cwd": str(executed.parent),
    }
    options["extra_arguments"] = ["--IPKernelApp.log_level=50"]  # the kernel's own warnings are not ours to show
    settings = {"MPLBACKEND": None, "TQDM_DISABLE": "1"}  # agg would make inline figures vanish; bars are no output
    kept = {key: os.environ.get(key) for key in settings}
    try:
        _set_environment(settings)
        papermill.execute_notebook(str(source), str(executed), parameters=parameters, **options)
    except PapermillExecutionError as error:
        return f"cell {error.exec_count} failed: {error.ename}: {error.evalue}".splitlines()[0]
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


def _write_page(executed: Path, page: Path) -> None:
    """One HTML page with its figures inside; nothing in it is fetched from anywhere."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True)
    exporter.raw_template = _PAGE
    body, _ = exporter.from_filename(str(executed))
    page.write_text(body, encoding="utf-8")


def write_findings(notebook: str, findings: Mapping[str, Any], out: str | Path) -> Path | None:
    """Called by a notebook at its end: write ``NOTEBOOK.json`` into `out`, or nothing where `out` is empty.

    Only plain JSON is taken (no NaN, no NumPy): a report that cannot be read again is none.
    """
    if not str(out):
        return None
    path = Path(out) / f"{notebook}.json"
    text = json.dumps({"notebook": notebook, **findings}, indent=1, ensure_ascii=False, allow_nan=False)
    temporary = path.with_suffix(".json.part")
    temporary.write_text(text + "\n", encoding="utf-8")
    shutil.move(temporary, path)
    return path
