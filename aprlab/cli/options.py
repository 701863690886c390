"""The options that several verbs share, each declared once: single ones as types, and groups (see `aprlab.cli.registry`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from aprlab.cli import output
from aprlab.cli.registry import group, set_machine
from aprlab.errors import UsageError

# -- single options -----------------------------------------------------------------------------------------------------

ModelFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A GGUF or APR file, or a directory with SafeTensors.", show_default=False)
]
Source = Annotated[Path, typer.Argument(metavar="IN", help="The model to read.", show_default=False)]
Reference = Annotated[Path, typer.Argument(metavar="REF", help="The reference: a file known to be good.", show_default=False)]
Candidate = Annotated[Path, typer.Argument(metavar="CAND", help="The candidate: the file to judge.", show_default=False)]
Prompt = Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What the model is asked.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="What is asked; may be repeated.", show_default=False),
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.", show_default=False)]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System prompt.", show_default="the chat template's own"),
]
FaultIds = Annotated[
    str | None,
    typer.Option("--fault", metavar="ID[,ID…]", help="Put these faults in, see `aprlab faults`.", show_default=False),
]
FaultyInstruments = Annotated[
    str | None,
    typer.Option("--fault", metavar="ID[,ID…]", help="Replace instruments by faulty ones.", show_default=False),
]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline", metavar="SECONDS", show_default="90",
        help="Longest search for what explains a file, by runs or in the catalogue; what is left untried then is said.",
    ),
]  # fmt: skip
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler", metavar="ADDRESS", show_default=False,
        help="Let the workers of this Dask cluster do it; they need the files under the same paths.",
    ),
]  # fmt: skip
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for each tensor.", show_default=False)]
Reports = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for the reports.")]

# -- groups -------------------------------------------------------------------------------------------------------------

_Engine = Annotated[
    str | None,
    typer.Option(
        "--engine", "-e", metavar="ENGINE", show_default="auto",
        help="Engine that runs the model: auto, reference, jit, cuda or ptx; jit:q8 rounds activations to 8 bits.",
    ),
]  # fmt: skip
_Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", "-e", metavar="ENGINE[+FAULT…]", show_default="auto",
        help="Once: the engine that runs the files. Twice, with one file: the two engines to compare.",
    ),
]  # fmt: skip
_OldEngine = Annotated[str | None, typer.Option("--backend", "-b", hidden=True)]  # what --engine was called
_Telling = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say which engine is taken, and why.", show_default=False)
]  # fmt: skip
_Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, metavar="N", help="CPU threads.", show_default="the engine's choice"),
]


@group("engine", "threads")
def ENGINE(
    engine: _Engine = None, threads: _Threads = None, backend: _OldEngine = None, verbose: _Telling = False
) -> dict[str, Any]:
    """Which engine runs the model, and on how many threads."""
    return {**_engine(engine, backend, verbose), "threads": threads}


@group("engine")
def ENGINE_ALONE(engine: _Engine = None, backend: _OldEngine = None, verbose: _Telling = False) -> dict[str, Any]:
    """Which engine runs the model, where the number of threads is the engine's choice."""
    return _engine(engine, backend, verbose)


def _engine(engine: str | None, backend: str | None, verbose: bool = False) -> dict[str, Any]:
    if engine is not None and backend is not None:
        raise UsageError("--backend is the old name of --engine: give one of them", code="cli.engine-twice")
    chosen = engine if backend is None else backend
    _tell_choices(verbose)
    return {"engine": None if chosen is None else _known(chosen)}


@group("engines", "threads")
def ENGINES(
    engine: _Engines = None, threads: _Threads = None, backend: _OldEngine = None, verbose: _Telling = False
) -> dict[str, Any]:
    """One engine that runs the files, or two to compare."""
    _tell_choices(verbose)
    chosen = [*(engine or []), *([] if backend is None else [backend])]
    for name in chosen:
        _known(name.split("+")[0])
    return {"engines": chosen, "threads": threads}


def _known(name: str) -> str:
    """Refused here, and not only where it would be used."""
    from aprlab import engines

    return engines.known(name)


class _Teller(logging.Handler):
    """What is logged, each line once, as a note."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._told:
            self._told.add(line)
            output.note(line)


def _tell_choices(verbose: bool) -> None:
    """From now on, choices of engines are noted, or not."""
    log = logging.getLogger("aprlab.engines")
    for handler in [each for each in log.handlers if isinstance(each, _Teller)]:  # of a command line before this one
        log.removeHandler(handler)
    if verbose:
        log.addHandler(_Teller())
        log.setLevel(logging.INFO)


@group("output", "force")
def OUTPUT(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="What to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.", show_default=False)] = False,
) -> dict[str, Any]:
    """A file that is written whole or not at all."""
    return {"output": output, "force": force}


@group("force")
def FORCE(
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.", show_default=False)] = False,
) -> dict[str, Any]:
    """For verbs whose output is optional."""
    return {"force": force}


@group("as_json")
def JSON(
    as_json: Annotated[
        bool,
        typer.Option("--json", callback=set_machine, is_eager=True, help="Print JSON instead.", show_default=False),
    ] = False,
) -> dict[str, Any]:
    """For programs."""
    return {"as_json": as_json}


@group("max_tokens")
def LENGTH(
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Stop an answer after this many tokens.")
    ] = None,
) -> dict[str, Any]:
    """How long an answer may be."""
    return {"max_tokens": max_tokens}


@group("sampling")
def SAMPLING(
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling.")] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, metavar="X", help="0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", min=0.0, max=1.0, metavar="X", help="Sample from the likeliest tokens with this total."),
    ] = 1.0,
) -> dict[str, Any]:
    """How the next token is chosen."""
    from aprlab.inference import Sampling

    return {"sampling": Sampling(temperature, top_p, seed)}


def ids(listed: str | None) -> list[str]:
    """The parts of a list with commas, without blanks around them."""
    return [id for part in (listed or "").split(",") if (id := part.strip())]


def numbers(listed: str) -> list[int]:
    """Token ids of a list with commas; raises UsageError where a part is no whole number."""
    try:
        return [int(part) for part in ids(listed)]
    except ValueError:
        raise UsageError(f"{listed:.60}: token ids are whole numbers with commas between", code="cli.bad-tokens") from None
