"""The command `aprlab`: start, options of all verbs, errors. The verbs are listed in `aprlab.cli.verbs`.

Nothing heavy is imported before the verb that needs it runs, so that `aprlab --version` answers at once. Results go to
standard output, everything else (load line, progress, errors) to standard error. An error is one line and an exit
status: 1 failed, 2 bad input or usage, 130 interrupted; some verbs have more (docs/commands.md).
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from aprlab.cli import output, sigbus
from aprlab.cli.registry import Debug, Debugging, MachineReader, PlainGroup, Verb, VerbGroup, build, reset
from aprlab.cli.streams import fill_standard_streams
from aprlab.cli.verbs import GROUPS, VERBS
from aprlab.errors import AprlabError, UsageError

# typer's own usage error, wherever its click comes from (older ones import the package, newer ones carry a copy)
_ClickUsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130


def _version(value: bool) -> None:
    if value:
        from aprlab.version import __version__

        output.say(f"aprlab {__version__}")
        raise typer.Exit


def frame(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Debug = False,
) -> None:
    """Find out why a converted model answers garbage: GGUF against APR, layer by layer."""


def app_of(groups: tuple[VerbGroup, ...] = GROUPS, verbs: tuple[Verb, ...] = VERBS) -> typer.Typer:
    """The command with these verbs; with all of them where nothing is said."""
    made = typer.Typer(
        name="aprlab",
        cls=PlainGroup,
        help=frame.__doc__,
        epilog="aprlab VERB --help shows an example of each.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(frame)
    build(made, groups, verbs)
    return made


def _app_for(words: Sequence[str]) -> typer.Typer:
    """The command with the verb that a command line begins with; with all of them where it begins otherwise.

    Help and mistakes know all verbs; to make all of them takes as long as reading a model's header.
    """
    named = words[0] if words else ""
    verbs = tuple(verb for verb in VERBS if named and named in (verb.within or verb.name, verb.alias))
    if verbs or list(words) == ["--version"]:
        return app_of(tuple(each for each in GROUPS if each.name == named), verbs)
    return app_of()


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run, and leave with the right exit status."""
    fill_standard_streams()
    try:
        status = run_cli(args)
    except Exception as error:  # a bug: its message may hold anything that was in a file
        output.show_stack(error)
        status = 1
    if status == _INTERRUPTED:
        logging.disable()  # asyncio reports interrupted tasks when the interpreter ends
    sys.exit(status)


def run_cli(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (sys.argv without one) and return its exit status; prints at most one line of error."""
    reset()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer in Chinese must not end an ASCII terminal's session
    sigbus.install()
    previous = signal.signal(signal.SIGTERM, _terminate)  # so that `finally` and `with` clean up on SIGTERM, too
    words = sys.argv[1:] if args is None else list(args)
    try:
        status = _app_for(words)(args=words, standalone_mode=False)
        sys.stdout.flush()
        if status == _INTERRUPTED:  # typer's way to say it
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 1  # as typer does where it sees this first
    except (KeyboardInterrupt, typer.Abort, AprlabError, _ClickException, OSError, MemoryError) as error:
        return _explain(error, words)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _explain(error: BaseException, words: Sequence[str]) -> int:
    """One line for the user, or the stack; the error as JSON where --json was given; the exit status for the shell."""
    if isinstance(error, _ClickUsageError) and not error.format_message():  # type: ignore[attr-defined]
        return 2  # no arguments at all: typer has printed the help
    found = _as_ours(error)
    if Debugging.on and isinstance(error, AprlabError | OSError | MemoryError):
        output.show_stack(error)
    else:
        output.complain(str(found))
    # a word that typer does not know ends its reading before it comes to --json
    if MachineReader.reads or (isinstance(error, _ClickUsageError) and "--json" in words):
        try:
            output.say_json(found.to_json())
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt | typer.Abort) else found.exit_code


def _as_ours(error: BaseException) -> AprlabError:
    """What ended a command line, with a code and an exit status."""
    if isinstance(error, AprlabError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return AprlabError("interrupted", code="cli.interrupted")
    if isinstance(error, _ClickUsageError):
        context, message = getattr(error, "ctx", None), error.format_message()  # type: ignore[attr-defined]
        hint = f" (see: {context.command_path} --help)" if context else ""
        return UsageError(f"{message}{hint}", code="cli.usage")
    if isinstance(error, OSError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        return AprlabError(str(error.strerror or error), code="cli.system", path=name or None)
    if isinstance(error, MemoryError):
        return AprlabError(str(error) or "MemoryError", code="cli.out-of-memory")
    return AprlabError(str(error) or type(error).__name__, code="cli.failed")
