"""The command `aprlab`: a thin face. Each verb is one small function that asks the library and prints.

Nothing heavy is imported before the verb that needs it runs, so that `aprlab --version` answers at once. Results go to
standard output, everything else (load line, progress, errors) to standard error. An error is one line and an exit
status: 1 failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aprlab.cli import sigbus as guard
from aprlab.errors import AprlabError, UsageError
from aprlab.published import ANSWER, QUESTION

if TYPE_CHECKING:
    from rich.console import Console

    from aprlab.conversion.report import ConversionReport
    from aprlab.inference.session import Session

# typer's own usage error, wherever its click comes from (older ones import the package, newer ones carry a copy)
_ClickUsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="aprlab",
    help="Find out why a converted model answers garbage: GGUF against APR, layer by layer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# -- the frame: start, options of all verbs, errors ----------------------------------------------------------------


_INTERRUPTED = 130


class _State:
    debug = False


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run, and leave with the right exit status."""
    status = run_cli(args)
    if status == _INTERRUPTED:
        logging.disable()  # of tasks that were cut short, asyncio tells at the interpreter's end
    sys.exit(status)


def run_cli(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (sys.argv without one) and return its exit status; prints at most one line of error."""
    _State.debug = bool(os.environ.get("APRLAB_DEBUG"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer in Chinese must not end an ASCII terminal's session
    guard.install()
    previous = signal.signal(signal.SIGTERM, _terminate)  # so that `finally` and `with` clean up on SIGTERM, too
    try:
        status = app(args=None if args is None else list(args), standalone_mode=False)
        sys.stdout.flush()
        if status == _INTERRUPTED:  # typer's way to say it
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 1  # as typer does where it sees this first
    except (AprlabError, _ClickException, OSError, MemoryError) as error:
        if _State.debug and not isinstance(error, _ClickException):
            raise
        return _explain(error)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _explain(error: BaseException) -> int:
    """One line for the user, the exit status for the shell."""
    if isinstance(error, AprlabError):
        return _say(str(error), error.exit_code)
    if isinstance(error, _ClickUsageError):
        context, message = getattr(error, "ctx", None), error.format_message()  # type: ignore[attr-defined]
        if not message:  # no arguments at all: typer has printed the help
            return 2
        hint = f" (see: {context.command_path} --help)" if context else ""
        return _say(f"{message}{hint}", 2)
    if isinstance(error, OSError):
        return _say(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 1)
    return _say(str(error) or type(error).__name__, getattr(error, "exit_code", 1))


def _say(message: str, status: int) -> int:
    print("aprlab:", " ".join(message.split()), file=sys.stderr)
    return status


def _console(*, error: bool = False) -> Console:
    """rich's console: colours on a terminal only, none with NO_COLOR; never folds what goes into a pipe."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(stderr=error, soft_wrap=not stream.isatty(), highlight=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _print_json(value: dict[str, Any] | list[Any]) -> None:
    """One line per key or entry, so that long lists of ids stay on theirs."""
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    else:
        lines = [json.dumps(item, ensure_ascii=False) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    print(opening + "\n " + ",\n ".join(lines) + "\n" + closing)


def _set_debug(value: bool) -> bool:
    _State.debug = _State.debug or value
    return value


def _version(value: bool) -> None:
    if value:
        from aprlab.version import __version__

        print(f"aprlab {__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the stack of an error.", show_default=False)]
ModelFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A GGUF or APR file, or a directory with SafeTensors.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="What to write.", show_default=False)]
Source = Annotated[Path, typer.Argument(metavar="IN", help="The model to read.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a line per tensor.", show_default=False)]
Backend = Annotated[str, typer.Option("--backend", "--engine", "-b", metavar="ENGINE", help="Engine: reference, jit, …")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads; the engine chooses without it.")]
Tokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Stop after so many tokens.")]
System = Annotated[str | None, typer.Option("--system", help="System prompt; the template's own without it.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
FaultIds = Annotated[
    str | None, typer.Option("--fault", metavar="ID[,ID…]", help="Go wrong on purpose, see `aprlab faults`.", show_default=False)
]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")]


@app.callback()
def frame(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Debug = False,
) -> None:
    """Find out why a converted model answers garbage: GGUF against APR, layer by layer."""


# -- files -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: aprlab inspect model.gguf --json")
def inspect(file: ModelFile, as_json: Json = False, debug: Debug = False) -> None:
    """Show what a model file holds: header, config, inventory by type, tensors."""
    from aprlab.formats import open_model
    from aprlab.model.description import describe

    with open_model(file) as model:
        seen = describe(model)
    if as_json:
        _print_json(seen)
        return
    console = _console()
    facts = {"format": f"{seen['format']} ({seen['dialect']})", **seen["header"], **seen["config"], **seen["tokenizer"]}
    console.print(_table(seen["path"], ("key", "value"), list(facts.items())))
    kinds = [(name, row["tensors"], row["values"], row["bytes"]) for name, row in seen["by_type"].items()]
    counted = ("tensors", "values", "bytes")
    total = ("total", *(sum(row[key] for row in seen["by_type"].values()) for key in counted))
    console.print(_table("inventory", ("type", *counted), [*kinds, total], right=counted))
    columns = ("name", "type", "shape", "offset", "bytes")
    rows = [
        [t["name"], t["type"], " × ".join(map(str, t["shape"])), "-" if t["offset"] is None else t["offset"], t["bytes"]]
        for t in seen["tensors"]
    ]
    console.print(_table("tensors (shapes rows first)", columns, rows, right=("offset", "bytes")))
    for problem in ("missing", "unexpected", "warnings"):
        for line in seen[problem]:
            console.print(f"{problem}: {line}", markup=False)


@app.command(epilog="Example: aprlab convert model.gguf -o model.apr --verbose")
def convert(
    source: Source,
    output: Output,
    quantize: Annotated[
        str | None, typer.Option(help="Re-encode the 2-D weights: q4k, q6k, q8_0, f16, f32, …, or a mix: q4_k_m, …")
    ] = None,
    dialect: Annotated[str, typer.Option(help="APR dialect: aprender or realizar.")] = "aprender",
    compress: Annotated[str | None, typer.Option(help="Compress the file: lz4 or zstd.")] = None,
    fault: FaultIds = None,
    verbose: Verbose = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert GGUF, APR or SafeTensors to APR, or to GGUF where OUT ends in .gguf; quantised blocks stay as they are."""
    from aprlab.conversion.converter import convert as run

    options: dict[str, Any] = {"quantize": quantize, "dialect": dialect, "compress": compress, "force": force}
    with _bar(source) as bar:
        if fault is None:
            report = run(source, output, progress=bar.update, **options)
        else:
            from aprlab.faults import convert_with

            report = convert_with(source, output, _ids(fault), progress=bar.update, **options)
    _print_report(report, verbose, as_json)


def _ids(listed: str) -> list[str]:
    return [id for part in listed.split(",") if (id := part.strip())]


@app.command(epilog="Example: aprlab export model.apr -o model.gguf; aprlab export model.gguf -o folder --format safetensors")
def export(
    source: Source,
    output: Output,
    format: Annotated[str, typer.Option(help="gguf, or safetensors: a directory that transformers loads.")] = "gguf",
    dtype: Annotated[str | None, typer.Option(help="Type of the weights in SafeTensors: f32 (exact), f16 or bf16.")] = None,
    verbose: Verbose = False,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export APR to GGUF, byte for byte the original where it came from one; or any model to SafeTensors."""
    from aprlab.conversion.converter import export as run

    with _bar(source) as bar:
        report = run(source, output, format=format, dtype=dtype, force=force, progress=bar.update)
    _print_report(report, verbose, as_json)


def _bar(source: Path) -> Any:
    """A progress bar in bytes on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    total = source.stat().st_size if source.is_file() else None
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None, desc=source.name)


def _print_report(report: ConversionReport, verbose: bool, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_json())
        return
    console = _console()
    if verbose:
        rows = [
            (line.name, line.written_as, " × ".join(map(str, line.shape)), line.type_in, line.type_out, line.nbytes)
            for line in report.lines
        ]
        console.print(_table("", ("tensor", "written as", "shape", "type in", "type out", "bytes"), rows, right=("bytes",)))
    kinds = sorted({*report.types_in, *report.types_out})
    counts = [(kind, report.types_in.get(kind, 0), report.types_out.get(kind, 0)) for kind in kinds]
    totals = [("tensors", sum(report.types_in.values()), report.tensors), ("bytes", report.bytes_in, report.bytes_out)]
    title = f"{report.source} to {report.output} ({report.dialect}), {report.seconds:.2f} s"
    console.print(_table(title, ("", "in", "out"), [*counts, *totals], right=("in", "out")))
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


# -- answers ---------------------------------------------------------------------------------------------------------


@app.command(epilog='Example: aprlab run model.apr -p "What is 2+2?" --trace "layers.*.out" --trace-out t.npz')
def run(
    file: ModelFile,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.", show_default=False)],
    max_tokens: Tokens = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    system: System = None,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    backend: Backend = "reference",
    threads: Threads = None,
    trace: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Trace these points of the prompt, e.g. 'layers.*.out'.")
    ] = None,
    trace_out: Annotated[Path | None, typer.Option(metavar="F.npz", help="Keep the trace in this file.")] = None,
    fault: FaultIds = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Forget weights once used: for files larger than memory.", show_default=False)
    ] = False,
    reader: Annotated[str | None, typer.Option(help="Read the APR file as upstream did: upstream-2026-01-30.")] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a model one question; the answer streams to the terminal."""
    from aprlab.formats.writing import check_output
    from aprlab.inference.session import Sampling

    if trace_out is not None:
        if trace is None:
            raise UsageError("--trace-out needs --trace: which points are to be kept?")
        check_output(trace_out, [file], force=force)  # refused before the answer, not after it
    sampling = Sampling(temperature, top_p, seed)
    session = _session(file, backend, threads, fault, reader, quiet=as_json, stream=stream)
    with session.model:
        show = None if as_json else _stream
        answer = session.generate(prompt, max_tokens=max_tokens, raw=raw, system=system, sampling=sampling, on_token=show)
        if as_json:
            _print_json(answer.to_json())
        else:
            print()
            _print_speed(len(answer.tokens), answer.stop, answer.timing)
        if trace is not None:
            _trace(session, answer.prompt_tokens, trace, trace_out, force)
        if reader is not None:
            from aprlab.cli.faults import refuse_garbage

            refuse_garbage(session)


def _session(
    file: Path, backend: str, threads: int | None, fault: str | None, reader: str | None, *, quiet: bool, stream: bool = False
) -> Session:
    """The file ready to answer, with its load line on standard error; with faults, or read as upstream read it."""
    from aprlab.formats import open_model
    from aprlab.inference.session import Session

    if stream and (fault is not None or reader is not None):
        raise UsageError("--stream runs a healthy model; --fault and --reader change it")
    if reader is not None:
        from aprlab.cli.faults import upstream_session

        if fault is not None:
            raise UsageError("--reader and --fault do not go together: give the fault to `convert`")
        return upstream_session(file, reader, backend, threads, quiet=quiet)
    model = open_model(file)
    if not quiet:
        print(model.load_line(), file=sys.stderr)
    if fault is None:
        return Session(model, engine=backend, threads=threads, stream=stream)
    from aprlab.faults import session_with

    return session_with(model, _ids(fault), engine=backend, threads=threads)


def _trace(session: Session, tokens: list[int], points: str, out: Path | None, force: bool) -> None:
    """Run the prompt once more, watched; a line a point to standard error, the values into `out`."""
    from aprlab.tracing.traces import trace

    seen = trace(session, tokens, points)
    print(seen, file=sys.stderr)
    if out is not None:
        seen.save(out, force=force)


def _stream(token: int, text: str) -> None:
    print(text, end="", flush=True)


def _print_speed(tokens: int, stop: str, timing: dict[str, float | None]) -> None:
    speed = timing["decode_tokens_per_second"]
    print(f"[{tokens} tokens, {stop}{'' if speed is None else f', {speed:.1f} tokens/s'}]", file=sys.stderr)


@app.command(epilog="Example: aprlab chat model.apr --system 'Answer in one word.'")
def chat(
    file: ModelFile,
    max_tokens: Tokens = 512,
    system: System = None,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    backend: Backend = "reference",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Talk with a model, line by line; /quit or Ctrl-D ends, Ctrl-C cuts an answer short."""
    from aprlab.formats import open_model
    from aprlab.inference.session import Sampling, Session

    sampling = Sampling(temperature, top_p, seed)
    with open_model(file) as model:
        print(model.load_line(), file=sys.stderr)
        session = Session(model, engine=backend, threads=threads)
        messages: list[dict[str, str]] = []
        while (line := _ask()) not in (None, "/quit"):
            if line:
                turn = [*messages, {"role": "user", "content": line}]
                answer = _reply(session, turn, max_tokens=max_tokens, system=system, sampling=sampling)
                if answer is not None:
                    messages = [*turn, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    """The next line of the user, None at the end of the input."""
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
        raise UsageError("the input is not UTF-8") from None


def _reply(session: Session, messages: list[dict[str, str]], **options: Any) -> str | None:
    """Stream the answer; None where it was cut short or refused, and the conversation goes on without that turn."""
    try:
        return session.generate(messages, on_token=_stream, **options).text
    except KeyboardInterrupt:
        print(" [cut short]", end="")
        return None
    except UsageError as error:
        _say(str(error), error.exit_code)
        return None
    finally:
        print(flush=True)


# -- the onion -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: aprlab faults GH-191")
def faults(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Tell all about this one.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the faults that `convert` and `run` can be given, or tell one's story."""
    from aprlab.cli.faults import show_faults

    show_faults(id, as_json=as_json)


@app.command(epilog="Example: aprlab peel model.gguf broken.apr --json")
def peel(
    files: Annotated[list[Path], typer.Argument(metavar="[REF] CAND", help="The file that is believed, the one suspected.")],
    engine: Annotated[
        list[str] | None, typer.Option(metavar="NAME[+FAULT…]", help="Twice: hold two engines against each other instead.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Stop at the first layer that finds something; run nothing.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Also keep the verdict here, as JSON and HTML.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What both sides are asked.")] = QUESTION,
    backend: Annotated[str | None, typer.Option(help="Engine that runs both files; chosen by size without it.")] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Say which layer of a file (or engine) is broken, where and how, and prove it by repair. Exit 3: broken, 4: open."""
    from aprlab.cli.peel import show_peel

    return show_peel(
        files, engine or [], fast=fast, backend=backend, threads=threads, prompt=prompt, out=out, as_json=as_json
    )


@app.command(epilog="Example: aprlab repair broken.apr -o fixed.apr --reference model.gguf")
def repair(
    file: ModelFile,
    output: Output,
    reference: Annotated[Path | None, typer.Option(metavar="REF", help="A sound file of the same model.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the mended file is asked.")] = QUESTION,
    backend: Annotated[str | None, typer.Option(help="Engine that runs the files; chosen by size without it.")] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Mend a broken file: names, labels, dims and config from the file itself, bytes from a reference."""
    from aprlab.cli.peel import show_repair

    return show_repair(
        file, output, reference, force=force, backend=backend, threads=threads, prompt=prompt, as_json=as_json
    )


# -- verbs that are command lines of their own -----------------------------------------------------------------------

_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _forward(context: typer.Context, module: str, app: str = "app") -> None:
    """Hand the rest of the command line to the `app` of `module`, which is imported only now."""
    from importlib import import_module

    status = getattr(import_module(module), app)(args=context.args, prog_name=context.command_path, standalone_mode=False)
    if isinstance(status, int) and status:
        raise typer.Exit(status)


@app.command(context_settings=_FORWARD, epilog="Example: aprlab ptx check kernel.ptx --entry NAME --help")
def ptx(context: typer.Context) -> None:
    """Run, step, profile and check anyone's PTX without a GPU (see: aprlab ptx --help)."""
    _forward(context, "aprlab.cli.ptx")


@app.command(context_settings=_FORWARD, epilog="Example: aprlab gpu verify")
def gpu(context: typer.Context) -> None:
    """Verify the CUDA kernels on this machine's GPU, compile them, list them (see: aprlab gpu --help)."""
    _forward(context, "aprlab.cli.gpu")


@app.command(context_settings=_FORWARD, epilog="Example: aprlab forensics model.gguf --saw '3,}, helf helf.How helf'")
def forensics(context: typer.Context) -> None:
    """Which fault makes a model say the garbage that somebody saw? (see: aprlab forensics --help)"""
    _forward(context, "aprlab.cli.forensics")


@app.command(context_settings=_FORWARD, epilog="Example: aprlab voices model.gguf")
def voices(context: typer.Context) -> None:
    """What a model says under every fault, and how specific that is (see: aprlab voices --help)."""
    _forward(context, "aprlab.cli.forensics", "voices_app")


# -- the lab ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: aprlab investigate --model model.gguf --only 00_golden_rule,02_dtype --out reports")
def investigate(
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME…]", help="Run these; 00_golden_rule without it, 07_peel with a fault or candidate."),
    ] = None,
    walk: Annotated[bool, typer.Option("--all", help="Run every notebook instead, in order.", show_default=False)] = False,
    model: Annotated[Path | None, typer.Option(metavar="FILE", help="A GGUF file; the embedded model without it.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the reports go.")] = Path("reports"),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help=f"What is asked; {QUESTION!r} without it.")] = None,
    expected: Annotated[
        str | None, typer.Option(help=f"The right answer; {ANSWER!r} for the embedded model, any answer for another.")
    ] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", metavar="ENGINE", help="Engine: reference, jit, …")] = None,
    fault: Annotated[
        str | None, typer.Option(metavar="ID[,ID…]", help="Put these into the model, and find them again.", show_default=False)
    ] = None,
    candidate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A broken file, to be held against --model.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> int:
    """Hold a model against the Golden Rule, or find a fault (--all: the whole walk); leaves reports and an index page."""
    from aprlab import engines, lab
    from aprlab.formats import open_model

    if backend is not None:
        engines.known(backend)
    if model is not None:
        open_model(model).close()  # a bad file is refused here, in one line, and not in a notebook's cell
    if fault is not None and candidate is not None:
        raise UsageError("--fault is put into the model, --candidate is broken already: which of them?")
    if fault is not None:
        from aprlab.faults import by_id

        fault = ",".join(by_id(id).id for id in _ids(fault))
    if candidate is not None and not candidate.is_file():
        raise UsageError("there is no such file", path=candidate)
    source, suspect = (None if path is None else str(path.resolve()) for path in (model, candidate))
    asked = {"model": source, "prompt": prompt, "expected": expected, "backend": backend, "candidate": suspect}
    asked["fault"] = "" if candidate is not None else fault
    parameters = {name: value for name, value in asked.items() if value is not None}
    optional = {"expected": ANSWER if model is None and prompt in (None, QUESTION) else ""}

    def show(step: lab.Step) -> None:
        for claim, holds in step.checks.items():
            print(f"{'yes' if holds else 'NO':<4}{claim}")
        for kind in ("ipynb", "html", *(["json"] if step.checks else [])):
            print(out / f"{step.name}.{kind}")
        if step.failure:
            _say(f"{out / step.name}.ipynb: {step.failure}", 1)

    default = "00_golden_rule" if fault is None and candidate is None else "07_peel"
    names = [] if walk else _ids(only if only is not None else default)
    if not walk and not names:
        raise UsageError("--only names no notebook; --all runs every one")
    steps = lab.walk(names, parameters, out, optional=optional, progress=sys.stderr.isatty(), on_step=show)
    print(out / "index.html")
    return int(any(not step.holds for step in steps))


@app.command(epilog="Example: aprlab sweep matrix.yaml --jobs 2 --out reports/sweep")
def sweep(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.yaml", help="Notebooks and the values of their parameters.")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Runs at a time on this machine.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the reports go; a sweep begun there goes on.")] = Path(
        "reports/sweep"
    ),
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Dask cluster instead.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> int:
    """Run notebooks over models × faults × engines; what is done is not run again. Exit 1: a run failed or does not hold."""
    from aprlab.lab import sweeps as module

    def show(outcome: module.CellOutcome) -> None:
        from tqdm import tqdm

        how = "done" if outcome.skipped else "yes" if outcome.holds else "NO"
        with tqdm.external_write_mode():
            print(f"{how:<5}{outcome.cell.id}: {outcome.step.verdict}", flush=True)

    outcomes = module.sweep(matrix, out, jobs=jobs, scheduler=scheduler, progress=sys.stderr.isatty(), on_cell=show)
    print(out / "index.html")
    return int(any(not outcome.holds for outcome in outcomes))


@app.command(epilog="Example: aprlab lab --no-browser --port 8890")
def lab(
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Work on copies of the notebooks there.", show_default=False)
    ] = None,
    port: Annotated[int | None, typer.Option(help="Of JupyterLab; its own choice without it.", show_default=False)] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only.", show_default=False)] = False,
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTION…]", help="Handed to jupyter lab as they are.")] = None,
    debug: Debug = False,
) -> int:
    """Open JupyterLab in the project; without a checkout, over copies in ./aprlab-notebooks (changed ones are kept)."""
    from aprlab.lab.jupyter import open_lab

    return open_lab(folder, port, browser=not no_browser, more=more or [])[0]


@app.command(epilog="Example: aprlab doctor --json")
def doctor(as_json: Json = False, debug: Debug = False) -> int:
    """Check Python, packages, threads, GPU, memory and the embedded model."""
    from dataclasses import asdict

    from aprlab.lab.doctor import checks

    console, seen = _console(), []
    styles = {"ok": "green", "note": "yellow", "fail": "bold red"}
    for check in checks():
        seen.append(check)
        if not as_json:
            console.print(f"[{styles[check.status]}]{check.status:<5}[/] {check.name}: ", end="")
            console.print(check.detail, markup=False)
    if as_json:
        _print_json([asdict(check) for check in seen])
    return int(any(check.status == "fail" for check in seen))


import aprlab.cli.files  # noqa: E402  (adds its verbs to `app`; it needs the options above)
import aprlab.cli.gates  # noqa: E402  (likewise)
import aprlab.cli.qualification  # noqa: E402, F401  (likewise)
