"""Panel "prove": gates, stages, the self-test of the instruments, qualification."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aprlab.cli import output as out
from aprlab.cli.options import Candidate, FaultyInstruments, ModelFile, Prompts, Reference, Reports, Scheduler, ids
from aprlab.errors import AprlabError, UsageError

if TYPE_CHECKING:
    from aprlab.qualification.certificate import Certificate
    from aprlab.qualification.runner import Qualification
    from aprlab.qualification.scoring import ScenarioRow


def gates(
    ref: Reference,
    cand: Candidate,
    prompt: Prompts = None,
    max_tokens: int = 12,
    engine: str = "auto",
    fault: FaultyInstruments = None,
    requantised: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="CAND was re-encoded to TYPE on purpose: `convert --quantize`.", show_default=False),
    ] = None,
    as_json: bool = False,
) -> int:
    """Compare a converted file with its source: the six gates of the ticket, I-1 to I-5, and four more."""
    from aprlab.gates import PROMPTS
    from aprlab.gates import run as run_gates

    results = run_gates(
        ref, cand, engine=engine, prompts=prompt or PROMPTS, max_tokens=max_tokens, replaced=_replaced(fault),
        requantised=requantised,
    )  # fmt: skip
    if as_json:
        out.say_json(results.to_json())
    else:
        words = {True: "pass", False: "FAIL", None: "void"}
        rows = [(r.id, words[r.passed], r.figure, r.assertion) for r in results]
        columns = ("gate", "", "measured", "asserts")
        out.say_table(f"{cand} against {ref}", columns, rows, prose=("measured", "asserts"))
    if any(r.passed is False for r in results):
        return 3
    return 4 if any(r.passed is None for r in results) else 0


def verify(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="What it was converted from; a directory, too.", show_default=False)
    ],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The converted file.", show_default=False)],
    reports: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write report.html, certificate.json, junit.xml and summary.md here."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=64, metavar="N", help="Let both read so much of the shipped text.",
            show_default="as much as the model's size allows, 9,000 at most",
        ),
    ] = None,
    modelfile: Annotated[
        Path | None, typer.Option("--modelfile", metavar="FILE", help="Check this Modelfile of Ollama's, too.")
    ] = None,
    scheduler: Scheduler = None,
    engine: str = "auto",
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """Certify a converted model, or not: file, tensors, prompts, and a text that both read."""
    from aprlab.formats.writing import check_output
    from aprlab.lab import reports_folder
    from aprlab.qualification import certificate, certificate_page

    if not model.exists():
        raise UsageError("there is no such file", code="cli.no-such-file", path=model)
    fresh = reports is not None and not reports.exists()
    if reports is not None:
        reports_folder(reports)
        for name in certificate_page.NAMES:  # refused before the work, not after it
            check_output(reports / name, [source, model], force=True)
    with out.progress(4 + (modelfile is not None), "check") as bar:

        def show(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        try:
            found = certificate.verify(
                source, model, engine=engine, threads=threads, tokens=tokens, modelfile=modelfile, scheduler=scheduler,
                progress=show,
            )
        except AprlabError:
            if reports is not None and fresh:
                with suppress(OSError):  # nothing was written, and nothing will be
                    reports.rmdir()
            raise
    if as_json:
        out.say_json(found.to_json())
    else:
        _say_certificate(found, certificate_page.TENSOR_COLUMNS, certificate_page.tensor_cells(found))
    for path in [] if reports is None else certificate_page.write(found, reports):
        out.note(path)
    return found.exit_code


def _say_certificate(found: Certificate, columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> None:
    """The checks, the tensors by type, and the verdict."""
    heads = ("check", "", "what must hold", "found")
    out.say_table(f"{found.model} against {found.source}", heads, found.rows(), prose=heads[2:])
    if found.tensors:
        out.say_table("tensors", columns, cells, right=columns[2:])
    out.say(f"{found.verdict}: {found.sentence}")


def check(file: ModelFile, engine: str = "auto", as_json: bool = False) -> int:
    """Check one file in ten stages, from the tokenizer to the next token, each computed again in float64."""
    from aprlab.gates import ten_stages

    results = ten_stages.check(file, engine=engine)
    if as_json:
        out.say_json(ten_stages.to_json(results))
    else:
        rows = [(n, r.name, "pass" if r.ok else "FAIL", r.detail) for n, r in enumerate(results, 1)]
        good, of = ten_stages.passed(results)
        out.say_table(f"{file}: {good}/{of}", ("no.", "stage", "", "found"), rows, prose=("found",), right=("no.",))
    return 0 if all(r.ok for r in results) else 3


def selftest(fault: FaultyInstruments = None, as_json: bool = False) -> int:
    """Test the instruments: each must tell a pair known to differ from a pair known to be equal."""
    from aprlab.instruments import selftest as test

    results = test(_replaced(fault))
    if as_json:
        out.say_json([asdict(r) for r in results])
    else:
        rows = [(r.name, "pass" if r.ok else "FAIL", r.detail) for r in results]
        out.say_table(f"{len(results)} instruments", ("instrument", "", "found"), rows, prose=("found",))
    return int(not all(r.ok for r in results))


def _replaced(listed: str | None) -> dict[str, Any]:
    """Faulty instruments of the catalogue, by the name of the one that each replaces."""
    from aprlab.faults import by_id

    chosen = [by_id(id) for id in ids(listed)]
    for fault in chosen:
        if fault.instrument is None:
            raise UsageError(
                f"fault {fault.id!r} is not a fault of an instrument; give it to `convert` or `run`",
                code="cli.not-an-instrument-fault",
            )
    return {fault.replaces: fault.instrument for fault in chosen}


# -- qualification ------------------------------------------------------------------------------------------------------


def qualify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF or APR file, or a directory with SafeTensors.")],
    playbook: Annotated[str, typer.Option(metavar="NAME|FILE", help="quick, full, embedded, or a YAML file.")] = "full",
    formats: Annotated[
        str | None,
        typer.Option(metavar="F[,F…]", help="gguf, apr, safetensors.", show_default="the playbook's own"),
    ] = None,
    engine: str = "auto",
    threads: int | None = None,
    memory: Annotated[
        int | None, typer.Option(metavar="MIB", min=1, help="Address space of a child; needing more is a result, too.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, metavar="X", help="Start nothing new after this time; the next run continues.")
    ] = None,
    reports: Reports = Path("reports"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run everything again, also what an earlier run finished.", show_default=False)
    ] = False,
    as_json: bool = False,
) -> int:
    """Run a model through a playbook in every format: two scores, the ticket's gates, every prompt and answer."""
    from aprlab import lab
    from aprlab.qualification import playbook as playbooks
    from aprlab.qualification import report, runner

    book = playbooks.load(playbook)
    chosen = tuple(ids(formats)) if formats is not None else book.formats
    stem = lab.reports_folder(reports) / f"qualify-{report_name(model)}-{book.name}"
    journal = stem.with_name(stem.name + ".jsonl")
    if fresh:
        journal.unlink(missing_ok=True)
    with out.progress(runner.count(book, chosen), "row") as bar:

        def show(row: ScenarioRow) -> None:
            bar.set_postfix_str(out.printable(f"{row.scenario} ({row.format})"))
            bar.update()

        found = runner.qualify(
            model, book, formats=chosen, engine=engine, threads=threads, journal=journal, on_row=show,
            minutes=minutes, memory=None if memory is None else memory << 20,
        )  # fmt: skip
    written = report.write(found, stem)
    if as_json:
        out.say_json(found.to_json())
    else:
        _show_qualification(found)
        for path in written:
            out.say(path)
    if found.resumed:
        out.note(f"{found.resumed} of {len(found.rows)} rows are an earlier run's (--fresh runs them again)")
    return report.STATUS[found.own.verdict]


def report_name(model: Path) -> str:
    """What a model is called in the names of its reports; a directory's dots are part of its name."""
    return model.resolve().name if model.is_dir() else model.stem


def _show_qualification(found: Qualification) -> None:
    from aprlab.qualification import report

    own, upstream = found.own, found.upstream
    out.say_table("by area", report.AREA_COLUMNS, report.area_rows(found), right=report.AREA_COLUMNS[1:])
    failed = [(r.scenario, r.format, r.outcome, report.reason(r)) for r in found.rows if r.outcome not in ("pass", "not run")]
    if failed:
        out.say_table("what did not pass", ("scenario", "format", "", "why"), failed, prose=("why",))
    closed = f", closed: {', '.join(upstream.closed)}" if upstream.closed else ""
    out.say(f"upstream's score: {upstream.score:.1f} ({upstream.grade}), at most {upstream.bound:.1f} with these rows{closed}")
    out.say(f"this project's:   {own.sentence}")
