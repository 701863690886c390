"""How verbs are declared, and how the command is made of them.

A verb is a name, a panel, a function and groups of options. The function's parameters are its options: those that are
`Annotated` are its own, the others come from a group, under the same name. A group is a function, too: its parameters are
options, declared once, and it returns a dict of values for the verbs that share them.
"""

from __future__ import annotations

import builtins
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

PANELS = ("look", "convert", "find", "prove", "tell", "machine room")  # of the help, in this order


@dataclass(frozen=True)
class OptionGroup:
    """Options that several verbs share.

    Attributes:
        collect: takes the options, returns values by name.
        gives: the names.
    """

    collect: Callable[..., dict[str, Any]]
    gives: tuple[str, ...]


def group(*gives: str) -> Callable[[Callable[..., dict[str, Any]]], OptionGroup]:
    """Make a `OptionGroup` of a function that returns a dict with these keys."""
    return lambda collect: OptionGroup(collect, gives)


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: what is typed.
        panel: one of `PANELS`.
        run: does it; returns the exit status, None for 0. Its docstring is the help.
        example: what its help shows, after ``aprlab``.
        groups: where options come from that are not its own.
        exits: exit statuses with a meaning of this verb's own.
        within: the name of the command group that it belongs to: ``ptx``, ``gpu``.
        alias: an old name of this verb, which still works and is not shown.
    """

    name: str
    panel: str
    run: Callable[..., int | None]
    example: str
    groups: tuple[OptionGroup, ...] = ()
    exits: Mapping[int, str] = field(default_factory=dict)
    within: str = ""
    alias: str = ""

    @property
    def path(self) -> str:
        """What is typed after ``aprlab``: ``inspect``, ``ptx run``."""
        return f"{self.within} {self.name}".strip()


@dataclass(frozen=True)
class VerbGroup:
    """A name with verbs of its own under it."""

    name: str
    panel: str
    help: str
    example: str


# -- how errors are shown: --debug is of every verb, before it or after it ------------------------------------------------


class Debugging:
    """Whether errors show their stack."""

    on = False


class MachineReader:
    """Whether a program reads what is printed: --json was given."""

    reads = False


def reset() -> None:
    """At the start of a command line: `Debugging` as the environment has it, no --json yet."""
    Debugging.on = bool(os.environ.get("APRLAB_DEBUG"))
    MachineReader.reads = False


def _set_debug(value: bool) -> bool:
    Debugging.on = Debugging.on or value
    return value


def set_machine(value: bool) -> bool:
    """Keep that --json was given, for errors."""
    MachineReader.reads = MachineReader.reads or value
    return value


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the stack of an error.", show_default=False)]


# -- from verbs to the command ------------------------------------------------------------------------------------------


def build(app: typer.Typer, groups: tuple[VerbGroup, ...], verbs: tuple[Verb, ...]) -> None:
    """Add all of them to `app`, panel by panel."""
    inside = {each.name: _nested(each) for each in groups}
    for panel in PANELS:
        for verb in verbs:
            if verb.panel == panel:
                _add(inside[verb.within] if verb.within else app, verb)
        for each in groups:
            if each.panel == panel:
                app.add_typer(inside[each.name], name=each.name, rich_help_panel=panel)


def _nested(each: VerbGroup) -> typer.Typer:
    epilog = f"Example: aprlab {each.example}"
    made = typer.Typer(name=each.name, cls=PlainGroup, help=each.help, epilog=epilog, no_args_is_help=True)

    @made.callback()
    def frame(debug: Debug = False) -> None:
        pass

    return made


def _add(app: typer.Typer, verb: Verb) -> None:
    function = command_of(verb)
    settings: dict[str, Any] = {"help": getdoc(verb.run), "epilog": f"Example: aprlab {verb.example}"}
    panel = None if verb.within else verb.panel
    app.command(verb.name, cls=PlainCommand, rich_help_panel=panel, **settings)(function)
    if verb.alias:
        app.command(verb.alias, cls=PlainCommand, hidden=True, **settings)(function)


class PlainCommand(TyperCommand):
    """A command that takes words and paths as they are; typer asks pydantic, whose import is a third of a short verb's start."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _taken_plainly(self, super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The same of the options before a verb."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _taken_plainly(self, super().get_params(ctx))


def _taken_plainly(command: Any, parameters: Sequence[Any]) -> list[Any]:
    kinds = getattr(inspect.unwrap(command.callback), "__annotations__", {})
    for parameter in parameters:
        if "process_value" not in vars(parameter):
            kind = _kind(kinds.get(parameter.name))
            parameter.process_value = partial(_value_of, parameter, kind, parameter.process_value)
    return list(parameters)


def _kind(annotation: Any) -> Any:
    """What an option is declared as, whether or not it may be left out: ``str`` of ``Annotated[str | None, …]``."""
    declared = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    parts = [part for part in get_args(declared) if part is not NoneType]
    return parts[0] if get_origin(declared) is UnionType and len(parts) == 1 else declared


def _value_of(parameter: Any, kind: Any, process: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    """The value of an option: as it is where there is nothing to convert and nothing to refuse, else as typer makes it."""
    if value is None and not parameter.required:
        read: Any = () if parameter.multiple or parameter.nargs == -1 else None
    elif kind in (bool, int, float) and value is parameter.default and type(value) is kind:
        read = value
    elif kind in (str, Path) and isinstance(value, str) and _is_plain(value, kind):
        read = kind(value)
    else:
        return process(context, value)
    return read if parameter.callback is None else parameter.callback(context, parameter, read)


def _is_plain(word: str, kind: type) -> bool:
    """Whether a word is UTF-8, and the name of no file that is there and cannot be read: typer has words for those."""
    try:
        word.encode()
        return kind is str or os.access(word, os.R_OK) or not os.path.lexists(word)
    except ValueError:  # half a character, or a NUL in a name
        return False


def command_of(verb: Verb) -> Callable[..., None]:
    """The function that typer calls: all options of the verb and of its groups, and ``--debug``."""
    own, shared = _options(verb)
    options = {parameter.name: parameter for parameter in (*own.values(), *(p for each in shared.values() for p in each))}
    wants = signature(verb.run).parameters

    def command(**given: Any) -> None:
        values = {name: given[name] for name in own}
        for each in verb.groups:
            found = each.collect(**{parameter.name: given[parameter.name] for parameter in _parameters(each.collect)})
            # None: not given on the command line, so that the verb's own default holds
            values |= {name: found[name] for name in each.gives if not _left_out(found[name], wants[name])}
        status = verb.run(**values)
        if status:
            raise typer.Exit(status)

    ordered = _ordered(verb, own, shared)
    assert len(ordered) == len(options), f"{verb.path}: two options have one name"
    ordered.append(Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug))
    command.__name__ = verb.run.__name__
    command.__doc__ = verb.run.__doc__
    command.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in ordered}
    return command


def _left_out(value: Any, parameter: Parameter) -> bool:
    return value is None and parameter.default is not Parameter.empty


def _options(verb: Verb) -> tuple[dict[str, Parameter], dict[int, list[Parameter]]]:
    """The verb's own options by name, and those of each of its groups by the group's place."""
    own = {each.name: each for each in _parameters(verb.run) if get_origin(each.annotation) is Annotated}
    given = [name for each in verb.groups for name in each.gives]
    ignored = set(given) - set(signature(verb.run).parameters)
    assert not ignored, f"{verb.path}: {', '.join(sorted(ignored))} would be shown and ignored"
    for name in signature(verb.run).parameters:
        assert (name in own) + given.count(name) == 1, f"{verb.path}: {name} is an option of its own, or of one group"
    assert verb.panel in PANELS, verb.panel
    defaults = {p.name: p.default for p in signature(verb.run).parameters.values() if p.default is not Parameter.empty}
    return own, {n: [_with_default(p, defaults) for p in _parameters(each.collect)] for n, each in enumerate(verb.groups)}


def _ordered(verb: Verb, own: dict[str, Parameter], shared: dict[int, list[Parameter]]) -> list[Parameter]:
    """In the order of the function's parameters; a group's options come where the first of its values is used."""
    ordered: list[Parameter] = []
    for name in signature(verb.run).parameters:
        if name in own:
            ordered.append(own[name])
            continue
        place = next(n for n, each in enumerate(verb.groups) if name in each.gives)
        ordered += shared.pop(place, [])
    return [each.replace(kind=Parameter.KEYWORD_ONLY) for each in ordered]


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """With their annotations worked out, which typer does only where it finds them itself."""
    names = _Names({**vars(builtins), **function.__globals__})
    hints = get_type_hints(function, localns=names, include_extras=True)
    return [each.replace(annotation=hints[each.name]) for each in signature(function).parameters.values()]


class _Names(dict[str, Any]):
    """What annotations may name; a name that only type checkers import is any object."""

    def __missing__(self, name: str) -> Any:
        return object


def _with_default(parameter: Parameter, defaults: Mapping[str, Any]) -> Parameter:
    """A group's option that shows the default of this verb (the option itself stays None where it is not given)."""
    default = defaults.get(parameter.name)
    if parameter.default is not None or default is None:
        return parameter
    kind, info = get_args(parameter.annotation)
    if not isinstance(info, OptionInfo):
        return parameter
    info = copy(info)
    info.show_default = str(default)
    return parameter.replace(annotation=Annotated[kind, info])
