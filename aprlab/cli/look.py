"""Panel "look": what a file holds, what a model says, in what two files differ."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aprlab.cli import output
from aprlab.cli.options import FaultIds, ModelFile, Raw, Scheduler, System, ids, numbers
from aprlab.errors import NumericError, UsageError
from aprlab.published import QUESTION

if TYPE_CHECKING:
    from aprlab.inference import Sampling, Session
    from aprlab.model import Model
    from aprlab.sources import Source
    from aprlab.tracing import Trace
    from aprlab.tracing.comparisons import Comparison


# -- files --------------------------------------------------------------------------------------------------------------


def inspect(file: ModelFile, as_json: bool = False) -> None:
    """Show what a model file holds: header, config, tensors by type, every tensor."""
    from aprlab.formats import identify, open_model
    from aprlab.formats.gguf_record import keys_of
    from aprlab.formats.identity import file_only
    from aprlab.formats.unusual import unusual
    from aprlab.model.description import describe

    identity = identify(file)
    with open_model(file, identity) as model:
        keys = keys_of(model) if file_only(model) is not None else None
        found = {**describe(model, keys), "identity": identity.to_json()}
        found["unusual"] = [one.to_json() for one in unusual(model)]
    if as_json:
        output.say_json(found)
        return
    facts = {"format": f"{found['format']} ({found['dialect']})", **found["header"], **_facts(found)}
    output.say_table(found["path"], ("key", "value"), list(facts.items()), prose=("value",))
    kinds = [(name, row["tensors"], row["values"], row["bytes"]) for name, row in found["by_type"].items()]
    counted = ("tensors", "values", "bytes")
    total = ("total", *(sum(row[key] for row in found["by_type"].values()) for key in counted))
    output.say_table("inventory", ("type", *counted), [*kinds, total], right=counted)
    columns = ("name", "type", "shape", "offset", "bytes")
    rows = [
        [t["name"], t["type"], " × ".join(map(str, t["shape"])), "-" if t["offset"] is None else t["offset"], t["bytes"]]
        for t in found["tensors"]
    ]
    output.say_table("tensors (shapes rows first)", columns, rows, right=("offset", "bytes"))
    for problem in ("missing", "unexpected", "warnings"):
        for line in found[problem]:
            output.say(f"{problem}: {line}")
    for one in found["unusual"]:
        output.say(f"unusual: {one['says']}")


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    """Config and tokenizer of a description; the keys themselves where a model has no config here."""
    if "error" in found["config"]:
        return {"config": found["config"]["error"], **found["keys"]}
    return {**found["config"], **found["tokenizer"]}


def fingerprint(
    file: ModelFile,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="Compare with this file.", show_default=False)] = None,
    scheduler: Scheduler = None,
    as_json: bool = False,
) -> int:
    """Print hashes and statistics of every tensor; with OTHER, compare both files tensor by tensor."""
    from aprlab import instruments
    from aprlab.formats import open_model

    with open_model(file) as model:
        with _bytes_bar(file) as bar:
            prints = instruments.fingerprint(model, bar.update, scheduler=scheduler)
        if other is None:
            found = instruments.fingerprint_table(prints, str(file))
            matrix = next((t for t in model.tensors.values() if len(t.shape) == 2 and t.name.startswith("blk.")), None)
            turned = None if matrix is None else instruments.transposed_unseen(matrix)
            _show_comparison(found, as_json)
            if matrix is not None and turned is not None and not as_json:
                words = ", ".join(f"{what} {'sees it' if sees else 'blind'}" for what, sees in turned.items())
                output.say(f"{matrix.name} transposed: {words}")
            return 0
    with _bytes_bar(other) as bar:
        theirs = instruments.fingerprint(other, bar.update, scheduler=scheduler)
    return _show_comparison(instruments.compare_fingerprints(prints, theirs, f"{file} against {other}"), as_json)


def diff(
    file: ModelFile,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The file to compare it with.", show_default=False)],
    headers: Annotated[
        bool,
        typer.Option("--headers", help="Read no tensor, compare names, types, shapes, keys; URLs always so.", show_default=False),
    ] = False,
    scheduler: Scheduler = None,
    as_json: bool = False,
) -> int:
    """List what differs between two files: tensors, config, tokenizer."""
    from aprlab import instruments
    from aprlab.model.remote import url_of

    headers = headers or url_of(file) is not None or url_of(other) is not None
    if headers:
        output.note("only headers are compared; the bytes of tensors are not read")
    return _show_comparison(instruments.diff(file, other, headers=headers, scheduler=scheduler), as_json, only_differing=True)


def compare(
    file: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, F.npz.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The trace to compare it with.", show_default=False)],
    as_json: bool = False,
) -> int:
    """Compare two traces point by point; unlike tokens, positions or contracts are refused."""
    from aprlab.tracing import Trace
    from aprlab.tracing.comparisons import compare_traces

    return _show_comparison(compare_traces(Trace.load(file), Trace.load(other), f"{file} against {other}"), as_json)


def _bytes_bar(file: Path) -> Any:
    return output.progress(file.stat().st_size if file.is_file() else None, "B", file.name, scale=True)


def _show_comparison(found: Comparison, as_json: bool, *, only_differing: bool = False) -> int:
    from aprlab.instruments.fingerprints import SCHEMA
    from aprlab.tracing.comparisons import format_cell

    if as_json:
        output.say_json({"schema": SCHEMA, **found.to_dict()})
    else:
        rows = found.differing() if only_differing else found.rows
        if rows:
            cells = [[format_cell(row.get(c)) for c in found.columns] for row in rows]
            output.say_table(found.title, found.columns, cells)
        output.say(found.summary)
    return int(not found.equal)


# -- answers ------------------------------------------------------------------------------------------------------------


def run(
    file: ModelFile,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to ask.", show_default=False)],
    sampling: Sampling,
    max_tokens: int = 128,
    raw: Raw = False,
    system: System = None,
    engine: str = "auto",
    threads: int | None = None,
    trace: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Trace these points of the prompt, e.g. 'layers.*.out'.")
    ] = None,
    trace_out: Annotated[Path | None, typer.Option(metavar="F.npz", help="Keep the trace in this file.")] = None,
    fault: FaultIds = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Drop weights after use: for files larger than memory.", show_default=False)
    ] = False,
    reader: Annotated[
        str | None, typer.Option(metavar="NAME", help="Read the APR file as upstream did: upstream-2026-01-30.")
    ] = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Ask a model one question; the answer streams to the terminal."""
    from aprlab.formats.writing import check_output

    if trace_out is not None:
        if trace is None:
            raise UsageError("--trace-out needs --trace: which points should be kept?", code="cli.trace-out-without-trace")
        check_output(trace_out, [file], force=force)  # refused before the answer, not after it
    session = _session(file, engine, threads, fault, reader, quiet=as_json, stream=stream)
    with session.model:
        show = None if as_json else _stream
        answer = session.generate(prompt, max_tokens=max_tokens, raw=raw, system=system, sampling=sampling, on_token=show)
        if as_json:
            output.say_json(answer.to_json())
        else:
            output.say()
            _note_speed(len(answer.tokens), answer.stop, answer.timing)
        if trace is not None:
            _trace(session, answer.prompt_tokens, trace, trace_out, force)
        if reader is not None:
            _refuse_garbage(session)


def trace(
    file: ModelFile,
    output: Path,
    source: Annotated[
        str, typer.Option("--source", metavar="NAME[,KEY=VALUE…]", help="Program that runs it: auto, jit:q8, llama.cpp.")
    ] = "auto",
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to ask.")] = QUESTION,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="ID,ID…", help="Run these token ids instead.", show_default=False)
    ] = None,
    points: Annotated[str, typer.Option("--points", metavar="GLOB", help="Keep these points, e.g. 'layers.*.out'.")] = "*",
    raw: Raw = False,
    system: System = None,
    force: bool = False,
) -> None:
    """Run a prompt in any program and keep the named points of the pass, with positions and contract."""
    from aprlab import sources
    from aprlab.formats import open_model
    from aprlab.formats.writing import check_output

    check_output(output, [file], force=force)
    with open_model(file) as model, sources.source(source, model) as program:
        given = numbers(tokens) if tokens is not None else _prompt_ids(model, prompt, raw, system)
        found = program.run(given, points)
        found.save(output, force=force)
    _show_trace(found, program)


def _show_trace(found: Trace, program: Source) -> None:
    output.note(found)
    facts = f"contract {program.contract}: {len(found)} points, {len(found.tokens)} tokens"
    output.say(f"{program.name} {program.version}, {facts}")


def _prompt_ids(model: Model, prompt: str, raw: bool, system: str | None) -> list[int]:
    from aprlab.inference import Session

    session = Session(model, engine="reference", cache_weights=False)  # nothing is run: nothing is decoded
    return session.prompt_tokens(prompt, raw=raw or session.wants_raw, system=system)


def _session(
    file: Path, engine: str, threads: int | None, fault: str | None, reader: str | None, *, quiet: bool, stream: bool
) -> Session:
    """The file ready to answer, with its load line on standard error; with faults, or read as upstream read it."""
    from aprlab.engines import choose
    from aprlab.formats import open_model
    from aprlab.inference import Session

    if stream and (fault is not None or reader is not None):
        raise UsageError("--stream runs a healthy model; --fault and --reader change it", code="cli.stream-of-a-faulty-model")
    if reader is not None:
        if fault is not None:
            raise UsageError(
                "--reader and --fault do not go together: give the fault to `convert`", code="cli.reader-and-fault"
            )
        return _upstream_session(file, reader, engine, threads, quiet=quiet)
    model = open_model(file)
    choice = choose(engine, model, threads=threads, stream=stream)
    if not quiet:
        output.note(f"{model.load_line()}; engine {choice}")
    if fault is None:
        return Session(model, engine=choice, threads=threads, stream=stream)
    from aprlab.faults import session_with

    return session_with(model, ids(fault), engine=choice, threads=threads)


def _upstream_session(file: Path, reader: str, engine: str, threads: int | None, *, quiet: bool) -> Session:
    """The file as upstream's reader of that date read it; its reading of each dtype byte and its load line are noted."""
    from aprlab.faults import upstream

    if reader not in upstream.READERS:
        raise UsageError(f"unknown reader {reader!r}; known: {', '.join(upstream.READERS)}", code="cli.unknown-reader")
    session = upstream.session(file, engine=engine, threads=threads)
    if not quiet:
        for line in [*session.model.warnings, upstream.load_line(session.model, quantised=session.model.quantised > 0)]:
            output.note(line)
        output.note(f"engine {session.engine.spec}")
    return session


def _refuse_garbage(session: Session) -> None:
    """Upstream exits with status 0 here; raises NumericError where a token was taken from logits that are not numbers."""
    lost = getattr(session.engine, "lost", 0)
    if lost:
        raise NumericError(
            f"{lost} tokens come from logits that are NaN or Inf, where upstream takes the last of equals",
            code="cli.tokens-of-nan",
        )


def _trace(session: Session, tokens: list[int], points: str, out: Path | None, force: bool) -> None:
    """Run the prompt again with a trace; a line for each point on standard error, the values into `out`."""
    from aprlab.tracing.traces import trace

    found = trace(session, tokens, points)
    output.note(found)
    if out is not None:
        found.save(out, force=force)


def _stream(token: int, text: str) -> None:
    output.say(text, end="", flush=True)


def _note_speed(tokens: int, stop: str, timing: dict[str, float | None]) -> None:
    speed = timing["decode_tokens_per_second"]
    output.note(f"[{tokens} tokens, {stop}{'' if speed is None else f', {speed:.1f} tokens/s'}]")


def chat(
    file: ModelFile,
    sampling: Sampling,
    max_tokens: int = 512,
    system: System = None,
    engine: str = "auto",
    threads: int | None = None,
) -> None:
    """Talk with a model, line by line; /quit or Ctrl-D ends, Ctrl-C cuts an answer short."""
    from aprlab.engines import choose
    from aprlab.formats import open_model
    from aprlab.inference import Session

    with open_model(file) as model:
        choice = choose(engine, model, threads=threads)
        output.note(f"{model.load_line()}; engine {choice}")
        session = Session(model, engine=choice, threads=threads)
        messages: list[dict[str, str]] = []
        while (line := ask()) not in (None, "/quit"):
            if line:
                turn = [*messages, {"role": "user", "content": line}]
                answer = _reply(session.generate, turn, max_tokens=max_tokens, system=system, sampling=sampling)
                if answer is not None:
                    messages = [*turn, {"role": "assistant", "content": answer}]


def ask() -> str | None:
    """The next line of the user, None at the end of the input; raises UsageError where it is not UTF-8."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` its line editing and history)
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        line.encode()  # in some locales Python lets other bytes through, as surrogates
        return line
    except EOFError:
        return None
    except UnicodeError:
        raise UsageError("the input is not UTF-8", code="cli.input-not-utf8") from None


def _reply(generate: Callable[..., Any], messages: list[dict[str, str]], **options: Any) -> str | None:
    """Stream the answer; None where it was cut short or refused, and the conversation goes on without that turn."""
    try:
        text: str = generate(messages, on_token=_stream, **options).text
        return text
    except KeyboardInterrupt:
        output.say(" [cut short]", end="")
        return None
    except UsageError as error:
        output.complain(str(error))
        return None
    finally:
        output.say(flush=True)
