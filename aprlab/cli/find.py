"""Panel "find": which fault it is, where it is, and a repaired file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from aprlab.cli import output as out
from aprlab.cli.options import Deadline, ModelFile, Prompt, Prompts, Raw, Scheduler, System, ids
from aprlab.display.plain_text import printable
from aprlab.errors import UsageError
from aprlab.published import QUESTION

# -- the onion ----------------------------------------------------------------------------------------------------------


def peel(
    files: Annotated[
        list[Path], typer.Argument(metavar="[REF] CAND", help="The reference, if there is one, and the candidate.")
    ],
    engines: list[str],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source", metavar="NAME[,KEY=VALUE…]", show_default=False,
            help="Judge this program on one MODEL (reference, llama.cpp, transformers, mine.yaml, http://…); may be repeated.",
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Stop at the first layer that finds something; run nothing.", show_default=False)
    ] = False,
    reports: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also write the verdict here, as JSON and HTML.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--reference-statistics", metavar="FILE", show_default=False,
            help="A published table of figures (JSON, CSV) of a healthy file's tensors, where there is no reference.",
        ),
    ] = None,
    deadline: Deadline = 90.0,
    prompt: Prompt = QUESTION,
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """Find which layer of a file (or of an engine) is broken, in which tensors and how, and prove it by repair."""
    from aprlab.display.page import page
    from aprlab.formats.writing import check_output, write_json, write_text
    from aprlab.onion import peeling

    choice = _peel_choice(files, engines) if source is None else _source_choice(files, engines, source)
    stem = "-".join(file.stem for file in files)
    if reports is not None:
        from aprlab.lab import reports_folder  # brings notebooks and figures with it

        for kind in ("json", "html"):  # refused before the work, not after it
            check_output(reports_folder(reports) / f"{stem}.{kind}", files, force=True)
    reference, candidate = ([None, *files] if len(files) == 1 else files)[:2]
    if "engines" in choice or "sources" in choice:
        reference, candidate = candidate, None
    if statistics is not None and candidate is not None:
        choice["statistics"] = statistics
    with _followed("peel") as progress:
        choice |= {"fast": fast, "threads": threads, "prompt": prompt, "deadline": deadline, "progress": progress}
        verdict = peeling.peel(reference, candidate, **choice)
    found = verdict.to_json()
    if reports is not None:
        write_json(reports / f"{stem}.json", found)
        write_text(reports / f"{stem}.html", page(stem, verdict._repr_html_()))
    if as_json:
        out.say_json(found)
    else:
        out.say(verdict)
    return verdict.exit_code


@contextmanager
def _followed(verb: str) -> Iterator[Callable[[str, object], None]]:
    """What is called at each stage, and shows it on the terminal's progress line."""
    with out.progress(None, "step", verb) as bar:

        def show(stage: str, found: object) -> None:
            if found is None:
                bar.set_postfix_str(printable(stage))
                bar.update()

        yield show


def _peel_choice(files: list[Path], engines: list[str]) -> dict[str, Any]:
    """One file or two with at most one engine, or one file with two: the only rule. Raises UsageError elsewhere."""
    if len(files) == 1 and len(engines) == 2:
        return {"engines": engines}
    if len(files) not in (1, 2) or len(engines) > 1:
        raise UsageError(
            f"[REF] CAND with at most one --engine, or one MODEL with two: not {len(files)} files and {len(engines)} engines",
            code="cli.files-and-engines",
        )
    if engines and "+" in engines[0]:
        raise UsageError(
            f"--engine {engines[0]}: an engine with faults is compared with another one on one MODEL: --engine A --engine B",
            code="cli.faulty-engine-alone",
        )
    return {"engine": engines[0] if engines else "auto"}


def _source_choice(files: list[Path], engines: list[str], sources: list[str]) -> dict[str, Any]:
    """One model, and programs to judge on it; raises UsageError elsewhere."""
    if len(files) != 1 or engines:
        said = f"--source judges programs on one MODEL, without --engine: not {len(files)} files and {len(engines)} engines"
        raise UsageError(said, code="cli.files-and-sources")
    return {"sources": sources}


def repair(
    file: ModelFile,
    output: Path,
    reference: Annotated[
        Path | None, typer.Option(metavar="REF", help="A good file of the same model.", show_default=False)
    ] = None,
    deadline: Deadline = 90.0,
    prompt: Prompt = QUESTION,
    engine: str = "auto",
    threads: int | None = None,
    force: bool = False,
    as_json: bool = False,
) -> int:
    """Repair a broken file: names, labels, dims and config from the file itself, lost bytes from a reference."""
    from aprlab.gates import attempt

    with _followed("repair") as progress:
        options = {"engine": engine, "threads": threads, "prompt": prompt, "deadline": deadline, "progress": progress}
        outcome = attempt(file, output, reference, force=force, **options)
    if as_json:
        out.say_json(outcome.verdict.to_json())
        return outcome.exit_code
    if outcome.code == "repair.nothing-found":
        out.note(f"{file}: {outcome.headline}")
        return outcome.exit_code
    out.say(outcome.verdict)
    for change in outcome.changes:
        out.say(f"  {change}")
    out.note(outcome.headline)
    return outcome.exit_code


# -- the catalogue ------------------------------------------------------------------------------------------------------


def faults(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Show all about this one.", show_default=False)] = None,
    as_json: bool = False,
) -> None:
    """List the faults that `convert` and `run` can be given, or show one."""
    from aprlab.faults import FAULTS, by_id
    from aprlab.faults.catalogue import forms

    if id is None:
        if as_json:
            out.say_json([fault.to_json() for fault in FAULTS.values()])
            return
        rows = [(f.id, f.layer, forms(f), "silent" if f.silent else "", f.title) for f in FAULTS.values()]
        out.say_table(f"{len(FAULTS)} faults", ("id", "layer", "enters", "", "title"), rows, prose=("title",))
        return
    fault = by_id(id)
    if as_json:
        out.say_json(fault.to_json())
        return
    facts = {"title": fault.title, "layer": fault.layer, "enters": forms(fault)}
    facts |= {"story": " ".join(fault.story.split()), "mark": " ".join(fault.mark.split())}
    facts["silent"] = "yes, short answers stay right" if fault.silent else "no"
    if fault.needs:
        given = " ".join(f"--{key} {value}" for key, value in fault.given.items())
        facts["needs"] = f"{fault.needs}{f' (convert {given})' if given else ''}"
    out.say_table(fault.id, ("", " "), list(facts.items()), prose=(" ",))


# -- from garbage to a fault --------------------------------------------------------------------------------------------


def forensics(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A healthy GGUF or APR file.", show_default=False)],
    saw: Annotated[
        str | None, typer.Option("--saw", metavar="TEXT", help="What the broken model said.", show_default=False)
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics", metavar="TABLE", show_default=False,
            help="Statistics of its tensors as a program published them (JSON, CSV): which faulty decoder has these figures?",
        ),
    ] = None,
    case: Annotated[
        Path | None,
        typer.Option("--case", metavar="CASE", help="Cases as JSON, ranked together (docs/evidence.md).", show_default=False),
    ] = None,
    prompt: Prompt = QUESTION,
    raw: Raw = False,
    system: System = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Also try pairs: each of the best with every other.", show_default=False)
    ] = False,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, max=5, metavar="N", help="Sets of up to this many faults.")
    ] = None,
    width: Annotated[int, typer.Option("--width", min=1, metavar="N", help="How many of the best sets grow.")] = 4,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="ID,ID+ID", help="Try only these faults or sets.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="JOURNAL", show_default=False,
            help="Keep what was tried in this file, and go on from it where it is there already.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Processes at a time on this machine.")] = 1,
    scheduler: Scheduler = None,
    engine: str = "auto",
    threads: int | None = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="How many rows to print.")] = 12,
    as_json: bool = False,
) -> None:
    """Rank the faults that would make a healthy model say a given garbage sentence, or give such statistics."""
    if sum(given is not None for given in (saw, statistics, case)) != 1:
        raise UsageError("forensics needs one of --saw, --statistics and --case", code="cli.saw-or-statistics")
    if statistics is not None:
        return _explain_statistics(file, statistics, as_json)
    chosen = None if only is None else ids(only)
    rounds = depth if depth is not None else 2 if pairs else 1
    how = {"depth": rounds, "width": width, "journal": resume, "jobs": jobs, "scheduler": scheduler}
    how |= {"engine": engine, "threads": threads}
    if case is not None:
        return _rank_cases(file, case, chosen, how, top, as_json)
    assert saw is not None
    return _rank_text(file, saw, chosen, how | {"prompt": prompt, "raw": raw, "system": system}, top, as_json)


def _rank_text(file: Path, saw: str, chosen: list[str] | None, options: dict[str, Any], top: int, as_json: bool) -> None:
    from aprlab.faults import run_faults
    from aprlab.forensics import ranking
    from aprlab.forensics.answer_scoring import Suspect

    count = len(chosen if chosen is not None else run_faults())
    with out.progress(count * (1 + options["width"] * (options["depth"] - 1)), "set", "faults") as bar:

        def show(suspect: Suspect) -> None:
            bar.set_postfix_str(" + ".join(suspect.faults))
            bar.update()

        found = ranking.forensics(file, saw, faults=chosen, progress=show, **options)
    if as_json:
        out.say_json(found.to_json())
        return
    out.say(f"saw      {found.saw!r}  {found.saw_tokens}")
    out.say(f"healthy  {found.healthy.text!r}")
    rows = [(score, faults, text, why) for faults, score, text, why in found.rows(top)]
    out.say_table("", ("score", "faults", "says", "why"), rows, prose=("says", "why"))
    failed = sum(s.match is None for s in found.suspects)
    if failed:
        out.note(f"{failed} of {len(found.suspects)} sets could not run (refused or not a number)")
    out.say(found.conclusion)
    out.say(found.belief)


def _explain_statistics(file: Path, table: Path, as_json: bool) -> None:
    from aprlab.forensics.statistics import explain_statistics

    with out.progress(file.stat().st_size if file.is_file() else None, "B", file.name, scale=True) as bar:
        found = explain_statistics(file, table, progress=bar.update)
    if as_json:
        out.say_json(found.to_json())
        return
    columns = ("tensor", "type", "figures that agree", "figures that differ", "explained by")
    rows = [
        (row.name, row.type, len(row.agree), ", ".join(row.differ), " or ".join(e.name for e in row.explained) or row.other)
        for row in found.differing
    ]
    if rows:
        out.say_table("", columns, rows, prose=columns[3:], right=columns[2:3])
    if found.left_out:
        out.note(f"columns left out, as their meaning is not known: {', '.join(found.left_out)}")
    for answer in found.types:
        out.say(answer.words)
    out.say(found.conclusion)


def _rank_cases(
    file: Path, path: Path, chosen: list[str] | None, options: dict[str, Any], top: int, as_json: bool
) -> None:
    from aprlab.faults import run_faults
    from aprlab.forensics.cases import rank_cases, read_cases, standing

    cases = read_cases(path)
    count = len(chosen if chosen is not None else run_faults())
    with out.progress(count * (1 + options["width"] * (options["depth"] - 1)), "set", "faults") as bar:

        def show(unit: str, seconds: float) -> None:
            bar.set_postfix_str(unit)
            bar.update()

        found = rank_cases(file, cases, faults=chosen, progress=show, **options)
    if as_json:
        out.say_json({id: each.to_json() for id, each in found.items()})
        return
    for case in cases:
        each = found[case.id]
        rows = [(score, faults, text, why) for faults, score, text, why in each.rows(top)]
        out.say_table(f"{case.id}: {each.saw!r}", ("score", "faults", "says", "why"), rows, prose=("says", "why"))
        where = standing(each, case.cause)
        known = f"; {' + '.join(case.cause)} comes {where.rank}." if case.cause and where.rank else ""
        out.say(f"{each.conclusion}{known}")
        out.say(each.belief)


def signatures(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A healthy GGUF or APR file.", show_default=False)],
    prompt: Prompts = None,
    max_tokens: int = 12,
    follow: Annotated[
        bool, typer.Option("--follow", help="Also rank by the likelihood of the texts (slow).", show_default=False)
    ] = False,
    engine: str = "auto",
    threads: int | None = None,
    as_json: bool = False,
) -> None:
    """Show what a model says under every fault (at least two prompts), and how well each fault is recognised by it."""
    from aprlab.faults import run_faults
    from aprlab.forensics.answer_runs import healthy_session
    from aprlab.forensics.signatures import PROMPTS, fault_signatures

    session = healthy_session(file, engine, threads)
    with out.progress(len(run_faults()), "fault", "faults") as bar:
        found = fault_signatures(
            session, prompt or PROMPTS, max_tokens=max_tokens, follow=follow,
            progress=lambda id: bar.update(),
        )  # fmt: skip
    if as_json:
        out.say_json({"engine": session.engine.spec, "engine_asked": session.engine.asked, **found.to_json()})
        return
    rows = [(id, *map(repr, texts)) for id, texts in {"(healthy)": found.healthy, **found.said}.items()]
    columns = ("fault", *(f"answer {n}" for n in range(1, len(rows[0]))))
    out.say_table("", columns, rows, prose=columns[1:])
    for id, reason in found.why_not.items():
        out.note(f"{id:24} could not run: {reason}")
    out.say(f"silent on these prompts: {', '.join(found.silent) or 'none'}")
    out.say(
        f"recognised by another answer: {found.top1:.0%} first, {found.top3:.0%} among the first three, of {found.counted}"
    )
