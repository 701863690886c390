"""Run a notebook as a job: strict parameters in, executed notebook, HTML page and findings out.

papermill only warns about a parameter that the notebook does not have, and runs with the default; here that is an
error before anything runs, and so is a value of another type than the default's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
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
