"""The verb `qualify`; importing this adds it to `aprlab.cli.app`.

Exit status: 0 fit for release, 3 not fit, 4 not enough evidence, 2 bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aprlab.cli.app import Debug, Json, Threads, _console, _ids, _print_json, _table, app

if TYPE_CHECKING:
    from aprlab.qualification.runner import Qualification
    from aprlab.qualification.scoring import ScenarioRow


@app.command(epilog="Example: aprlab qualify model.gguf --playbook full --formats gguf,apr --backend jit")
def qualify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF or APR file, or a SafeTensors folder.")],
    playbook: Annotated[str, typer.Option(metavar="NAME|FILE", help="quick, full, embedded, or a YAML file.")] = "full",
    formats: Annotated[
        str | None, typer.Option(metavar="F[,F…]", help="gguf, apr, safetensors; the playbook's own without it.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", "--engine", "-b", metavar="ENGINE", help="By the model's size without it.")
    ] = None,
    threads: Threads = None,
    memory: Annotated[
        int | None, typer.Option(metavar="MIB", min=1, help="Most address space of a child; more is a result, too.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin nothing new after these; the next run goes on from there.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where page, JSON and journal go.")] = Path("reports"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again, also what an earlier run has finished.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Put a model through a playbook in every format; two scores, the ticket's gates, every prompt and answer."""
    from tqdm import tqdm

    from aprlab import engines, lab
    from aprlab.formats import open_model
    from aprlab.qualification import playbook as playbooks
    from aprlab.qualification import report, runner
    from aprlab.tracing.golden_rule import best_engine

    book = playbooks.load(playbook)
    chosen = tuple(_ids(formats)) if formats is not None else book.formats
    if backend is None:
        with open_model(model) as opened:
            backend = best_engine(opened)
    engines.known(backend)
    stem = lab.reports_folder(out) / f"qualify-{_called(model)}-{book.name}"
    journal = stem.with_name(stem.name + ".jsonl")
    if fresh:
        journal.unlink(missing_ok=True)
    with tqdm(total=runner.count(book, chosen), unit="row", leave=False, disable=None) as bar:

        def show(row: ScenarioRow) -> None:
            bar.set_postfix_str(f"{row.scenario} ({row.format})")
            bar.update()

        found = runner.qualify(
            model, book, formats=chosen, engine=backend, threads=threads, journal=journal, on_row=show,
            minutes=minutes, memory=None if memory is None else memory << 20,
        )  # fmt: skip
    page, data = report.write(found, stem)
    if as_json:
        _print_json(found.to_json())
    else:
        _show(found)
        print(page)
        print(data)
    if found.resumed:
        print(f"{found.resumed} of {len(found.rows)} rows are an earlier run's (--fresh runs them again)", file=sys.stderr)
    return report.STATUS[found.own.verdict]


def _called(model: Path) -> str:
    """How a model is called in the names of its reports; a folder's dots are part of its name."""
    return model.resolve().name if model.is_dir() else model.stem


def _show(found: Qualification) -> None:
    from aprlab.qualification import report

    console = _console()
    own, upstream = found.own, found.upstream
    console.print(_table("by area", report.AREA_COLUMNS, report.area_rows(found), right=report.AREA_COLUMNS[1:]))
    failed = [(r.scenario, r.format, r.outcome, report.reason(r)) for r in found.rows if r.outcome not in ("pass", "not run")]
    if failed:
        console.print(_table("what did not pass", ("scenario", "format", "", "why"), failed))
    closed = f", closed: {', '.join(upstream.closed)}" if upstream.closed else ""
    print(f"upstream's score: {upstream.score:.1f} ({upstream.grade}), at most {upstream.bound:.1f} with these rows{closed}")
    print(f"this project's:   {own.sentence}")


__all__ = ["qualify"]
