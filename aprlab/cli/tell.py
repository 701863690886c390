"""Panel "tell": notebooks that are run and leave reports, sweeps, JupyterLab."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aprlab.cli import output as out
from aprlab.cli.options import Reports, Scheduler, ids
from aprlab.errors import UsageError
from aprlab.published import ANSWER, QUESTION

if TYPE_CHECKING:
    from aprlab.lab import Step


def investigate(
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME…]", help="Run these notebooks.",
            show_default="00_golden_rule; 07_peel with --fault or two files; 07b_one_file with --candidate alone",
        ),
    ] = None,
    walk: Annotated[bool, typer.Option("--all", help="Run every notebook, in order.", show_default=False)] = False,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A GGUF file.", show_default="the embedded model")
    ] = None,
    reports: Reports = Path("reports"),
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What is asked.", show_default=QUESTION)
    ] = None,
    expected: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="The right answer.", show_default="the embedded model's; any answer for another model"
        ),
    ] = None,
    engine: str = "auto",
    fault: Annotated[
        str | None,
        typer.Option(metavar="ID[,ID…]", help="Put these faults into the model, and find them again.", show_default=False),
    ] = None,
    candidate: Annotated[
        Path | None, typer.Option(
            metavar="FILE", help="A broken file, to compare with --model; alone without one.", show_default=False
        ),
    ] = None,
) -> int:
    """Check a model against the Golden Rule, or find a fault (--all: every notebook); leaves reports and an index page."""
    from aprlab import lab
    from aprlab.engines import AUTO

    parameters = _parameters(model, prompt, expected, engine, fault, candidate)
    optional = {"expected": ANSWER if model is None and prompt in (None, QUESTION) else ""}
    if engine == AUTO:  # the reports say which one it was
        del parameters["engine"]
        optional |= _taken(model)

    def show(step: Step) -> None:
        for claim, holds in step.checks.items():
            out.say(f"{'yes' if holds else 'NO':<4}{claim}")
        for kind in ("ipynb", "html", *(["json"] if step.checks else [])):
            out.say(reports / f"{step.name}.{kind}")
        if step.failure:
            out.complain(f"{reports / step.name}.ipynb: {step.failure}")

    alone = candidate is not None and model is None
    default = "07b_one_file" if alone else "00_golden_rule" if fault is None and candidate is None else "07_peel"
    names = [] if walk else ids(only if only is not None else default)
    if not walk and not names:
        raise UsageError("--only names no notebook; --all runs every one", code="cli.no-notebook")
    steps = lab.walk(names, parameters, reports, optional=optional, progress=sys.stderr.isatty(), on_step=show)
    out.say(reports / "index.html")
    return int(any(not step.holds for step in steps))


def _taken(model: Path | None) -> dict[str, str]:
    """The engine that the rule has for the model; the notebooks know the embedded model's."""
    from aprlab.engines import choose
    from aprlab.formats import open_model
    from aprlab.paths import embedded_model

    with open_model(model or embedded_model()) as opened:
        choice = choose(None, opened)
    return {} if model is None else {"engine": choice.spec}


def _parameters(
    model: Path | None, prompt: str | None, expected: str | None, engine: str, fault: str | None,
    candidate: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The notebooks' parameters; what is wrong with them is said here, in one line, and not in a notebook's cell."""
    from aprlab.formats import open_model

    if model is not None:
        open_model(model).close()
    if fault is not None and candidate is not None:
        raise UsageError(
            "--fault is put into the model, --candidate is broken already: which of them?", code="cli.fault-and-candidate"
        )
    if fault is not None:
        from aprlab.faults import by_id  # a tenth of a second

        fault = ",".join(by_id(id).id for id in ids(fault))
    if candidate is not None and not candidate.is_file():
        raise UsageError("there is no such file", code="cli.no-such-file", path=candidate)
    source, suspect = (None if path is None else str(path.resolve()) for path in (model, candidate))
    asked = {"model": source, "prompt": prompt, "expected": expected, "engine": engine, "candidate": suspect}
    asked["fault"] = "" if candidate is not None else fault
    return {name: value for name, value in asked.items() if value is not None}


def sweep(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.yaml", help="Notebooks and the values of their parameters.")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Runs at a time on this machine.")] = 1,
    reports: Reports = Path("reports/sweep"),
    scheduler: Scheduler = None,
) -> int:
    """Run notebooks over models × faults × engines; an interrupted sweep continues where it stopped."""
    from aprlab.lab import sweeps

    def show(outcome: Any) -> None:
        from tqdm import tqdm

        how = "done" if outcome.skipped else "yes" if outcome.holds else "NO"
        with tqdm.external_write_mode():
            out.say(f"{how:<5}{outcome.cell.id}: {outcome.step.verdict}", flush=True)

    outcomes = sweeps.sweep(matrix, reports, jobs=jobs, scheduler=scheduler, progress=sys.stderr.isatty(), on_cell=show)
    out.say(reports / "index.html")
    return int(any(not outcome.holds for outcome in outcomes))


def lab(
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Work on copies of the notebooks here.", show_default=False)
    ] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="Port of JupyterLab.", show_default="its own choice")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.", show_default=False)] = False,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION…]", help="Passed to jupyter lab.", show_default=False)
    ] = None,
) -> int:
    """Open JupyterLab in the project; without a checkout, on copies in ./aprlab-notebooks (changed ones are kept)."""
    from aprlab.lab.jupyter import open_lab

    return open_lab(folder, port, browser=not no_browser, more=more or [])[0]
