"""Go's `text/template`, as far as chat templates need it: what Ollama makes of messages.

https://pkg.go.dev/text/template is the language. A template comes with somebody's file and is not trusted: there is no
way out of the data it is given, steps, depth and output are counted, and what is not handled is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aprlab.errors import FormatError

STEPS = 200_000  # nodes and commands that are evaluated
CHARACTERS = 1 << 20  # of output
DEPTH = 100  # blocks and parentheses inside each other

_TAG = re.compile(
    r"""\{\{(?P<left>-\ )?\s*(?P<body>(?:/\*.*?\*/|"(?:\\.|[^"\\])*"|`[^`]*`|(?!\}\}).)*?)\s*(?P<right>\ -)?\}\}""", re.S | re.X
)
_WORD = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>[+-]?\d+)|(?P<variable>\$\w*)|(?P<fields>(?:\.\w+)+)
    |(?P<name>[A-Za-z_]\w*)|(?P<mark>:=|[.|(),=]))""",
    re.X,
)


@dataclass
class Node:
    """A piece of a template: text, an action, or a block.

    Attributes:
        kind: ``text``, ``action``, ``if``, ``range``, ``with``, ``break`` or ``continue``.
        text: of a piece of text.
        names: variables that the pipeline is assigned to, with their ``$``.
        fresh: they are declared (``:=``), not set (``=``).
        pipeline: of an action or a block.
        body, other: of a block; `other` is what stands behind its ``else``.
    """

    kind: str
    text: str = ""
    names: tuple[str, ...] = ()
    fresh: bool = True
    pipeline: Pipeline | None = None
    body: list[Node] = field(default_factory=list)
    other: list[Node] = field(default_factory=list)


Word = tuple[str, Any]  # kind and value: string, number, variable, fields, name, dot, or a pipeline in parentheses
Command = list[Word]
Pipeline = list[Command]


def _wrong(message: str) -> FormatError:
    return FormatError(f"Go template: {message}", code="template.go")


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(template: str) -> list[Node]:
    """The nodes of a template; raises FormatError where it is broken or uses what is not handled."""
    pieces = list(_pieces(template))
    nodes, rest = _nodes(pieces, 0, 0)
    if rest < len(pieces):
        raise _wrong(f"{{{{ {pieces[rest][1]} }}}} closes nothing")
    return nodes


def _pieces(template: str) -> Iterator[tuple[bool, str]]:
    """Text and tags in turn: (is it a tag, its content), with what the trim marks ask for done."""
    at, trim = 0, False
    for found in _TAG.finditer(template):
        text = template[at : found.start()]
        if "{{" in text:
            break
        text = text.lstrip() if trim else text
        yield False, text.rstrip() if found["left"] else text
        if not found["body"].startswith("/*"):
            yield True, found["body"]
        at, trim = found.end(), found["right"] is not None
    rest = template[at:]
    if "{{" in rest:
        raise _wrong(f"a tag is not closed: {rest[rest.index('{{') :][:40]!r}")
    yield False, rest.lstrip() if trim else rest


def _nodes(pieces: Sequence[tuple[bool, str]], at: int, depth: int) -> tuple[list[Node], int]:
    """Nodes up to an ``else`` or ``end`` that is not theirs, and where that is."""
    if depth > DEPTH:
        raise _wrong(f"more than {DEPTH} blocks inside each other")
    found: list[Node] = []
    while at < len(pieces):
        tag, body = pieces[at]
        if not tag:
            if body:
                found.append(Node("text", body))
            at += 1
            continue
        word = body.split(None, 1)[0] if body else ""
        if word in ("else", "end"):
            return found, at
        if word in ("if", "range", "with"):
            node, at = _block(word, body[len(word) :], pieces, at + 1, depth)
            found.append(node)
            continue
        if word in ("define", "template", "block"):
            raise _wrong(f"{{{{ {word} }}}} is not handled")
        found.append(Node(word) if word in ("break", "continue") else _action("action", body))
        at += 1
    return found, at


def _block(kind: str, head: str, pieces: Sequence[tuple[bool, str]], at: int, depth: int) -> tuple[Node, int]:
    node = _action(kind, head)
    node.body, at = _nodes(pieces, at, depth + 1)
    if at == len(pieces):
        raise _wrong(f"{{{{ {kind}{head} }}}} has no end")
    tag = pieces[at][1].split(None, 1)
    if tag[0] == "end":
        return node, at + 1
    if len(tag) > 1:  # {{ else if … }} is a block of its own that shares the end
        word = tag[1].split(None, 1)[0]
        if word not in ("if", "with"):
            raise _wrong(f"{{{{ {pieces[at][1]} }}}} is not handled")
        inner, at = _block(word, tag[1][len(word) :], pieces, at + 1, depth + 1)
        node.other = [inner]
        return node, at
    node.other, at = _nodes(pieces, at + 1, depth + 1)
    if at == len(pieces) or pieces[at][1] != "end":
        raise _wrong(f"{{{{ {kind}{head} }}}} has no end")
    return node, at + 1


def _action(kind: str, text: str) -> Node:
    """An action or the head of a block: ``$a, $b := pipeline``."""
    words = _words(text)
    names: tuple[str, ...] = ()
    fresh = True
    marks = [n for n, word in enumerate(words) if word in (("mark", ":="), ("mark", "="))]
    if marks:
        names = tuple(str(word[1]) for word in words[: marks[0]] if word[0] == "variable")
        fresh, words = words[marks[0]][1] == ":=", words[marks[0] + 1 :]
    if not words:
        raise _wrong(f"{{{{ {text} }}}} says nothing")
    pipeline, rest = _pipeline(words, 0, 0)
    if rest < len(words):
        raise _wrong(f"{{{{ {text} }}}}: {words[rest][1]!r} is one too many")
    return Node(kind, names=names, fresh=fresh, pipeline=pipeline)


def _words(text: str) -> list[Word]:
    found, at, text = [], 0, text.strip()
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None or match.lastgroup is None:
            raise _wrong(f"{text[at : at + 20]!r} is not handled")
        # A field of what stands before it has no space between: (index .Messages 0).Content, $m.Role
        chained = match.lastgroup == "fields" and at > 0 and not text[at].isspace()
        found.append(("chain" if chained else match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


def _pipeline(words: Sequence[Word], at: int, depth: int) -> tuple[Pipeline, int]:
    """Commands between ``|``, up to a closing parenthesis or the end."""
    if depth > DEPTH:
        raise _wrong(f"more than {DEPTH} parentheses inside each other")
    commands: Pipeline = [[]]
    while at < len(words) and words[at] != ("mark", ")"):
        kind, value = words[at]
        if (kind, value) == ("mark", "|"):
            commands.append([])
        elif (kind, value) == ("mark", "("):
            inner, at = _pipeline(words, at + 1, depth + 1)
            if at == len(words):
                raise _wrong("a parenthesis is not closed")
            commands[-1].append(("pipeline", inner))
        elif (kind, value) == ("mark", "."):
            commands[-1].append(("dot", None))
        elif kind == "mark":
            raise _wrong(f"{value!r} is out of place")
        elif kind == "chain":
            if not commands[-1]:
                raise _wrong(f"{value!r} is out of place")
            commands[-1].append(("chain", (commands[-1].pop(), value)))
        else:
            commands[-1].append((kind, value))
        at += 1
    if not all(commands):
        raise _wrong("a pipeline has an empty part")
    return commands, at


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def _compared(name: str, x: Any, y: Any) -> bool:
    if type(x) is not type(y) or isinstance(x, (Mapping, list)):
        if name in ("eq", "ne") and (x is None or y is None):
            return (x is y) == (name == "eq")
        raise _wrong(f"{name}: {x!r:.40} and {y!r:.40} cannot be compared")
    return bool({"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name])


def shown(value: Any) -> str:
    """As Go prints it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "<no value>"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (Mapping, list)) else str(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        try:
            value = value.get(key) if isinstance(value, Mapping) else value[key]
        except (TypeError, IndexError, AttributeError):
            raise _wrong(f"index: there is no {key!r:.40}") from None
    return value


def _slice(value: Any, *ends: Any) -> Any:
    whole = isinstance(value, (str, list)) and all(isinstance(n, int) and 0 <= n <= len(value) for n in ends)
    if not whole or len(ends) > 2 or list(ends) != sorted(ends):
        raise _wrong(f"slice: {ends} are no places in it")
    return value[slice(*ends)] if len(ends) == 2 else value[ends[0] :] if ends else value


def _length(value: Any) -> int:
    if not isinstance(value, (str, list, Mapping)):
        raise _wrong(f"len of {value!r:.40}")
    return len(value.encode()) if isinstance(value, str) else len(value)


def _printf(form: str, *values: Any) -> str:
    given = iter(values)
    out: Callable[[re.Match[str]], str] = lambda m: "%" if m[1] == "%" else (  # noqa: E731
        json.dumps(next(given, None), ensure_ascii=False) if m[1] == "q" else shown(next(given, None))
    )
    if re.search(r"%(?![vsdq%])", form):
        raise _wrong(f"printf {form!r:.40} is not handled")
    return re.sub(r"%([vsdq%])", out, form)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": _length, "index": _index, "slice": _slice, "not": lambda x: not x,
    "eq": lambda x, *ys: any(_compared("eq", x, y) for y in ys),
    **{name: (lambda x, y, name=name: _compared(name, x, y)) for name in ("ne", "lt", "le", "gt", "ge")},
    "print": lambda *xs: "".join(map(shown, xs)), "println": lambda *xs: " ".join(map(shown, xs)) + "\n", "printf": _printf,
    "json": lambda x: json.dumps(x, ensure_ascii=False, separators=(",", ":"), sort_keys=False),
}  # fmt: skip
# Go and Python agree on what is true: false, 0, nil and what is empty are not.
_CONSTANTS = {"true": True, "false": False, "nil": None}


class _Execution:
    """One execution over `data`."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.out: list[str] = []
        self.size = self.steps = 0
        self.scopes: list[dict[str, Any]] = [{"$": data}]

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise _wrong(f"it does not come to an end within {STEPS} steps")

    def write(self, text: str) -> None:
        self.size += len(text)
        if self.size > CHARACTERS:
            raise _wrong(f"it writes more than {CHARACTERS} characters")
        self.out.append(text)

    def nodes(self, nodes: Sequence[Node], dot: Any) -> None:
        self.scopes.append({})
        try:
            for node in nodes:
                self.step()
                self.node(node, dot)
        finally:
            self.scopes.pop()

    def node(self, node: Node, dot: Any) -> None:
        if node.kind == "text":
            self.write(node.text)
        elif node.kind == "break":
            raise _Break
        elif node.kind == "continue":
            raise _Continue
        elif node.kind == "range":
            self.ranged(node, dot)
        else:
            value = self.pipeline(node.pipeline or [], dot)
            if node.kind == "action":
                self.assign(node, value) if node.names else self.write(shown(value))
                return
            self.scopes.append({})
            try:
                if node.names:
                    self.assign(node, value)
                self.nodes(node.body if value else node.other, value if node.kind == "with" and value else dot)
            finally:
                self.scopes.pop()

    def assign(self, node: Node, value: Any) -> None:
        name = node.names[0]
        if node.fresh:
            self.scopes[-1][name] = value
            return
        for scope in reversed(self.scopes):
            if name in scope:
                scope[name] = value
                return
        raise _wrong(f"{name} is set and was never declared")

    def ranged(self, node: Node, dot: Any) -> None:
        value = self.pipeline(node.pipeline or [], dot)
        if isinstance(value, int) and not isinstance(value, bool):
            value = range(value)
        if not isinstance(value, (list, Mapping, range, type(None))):
            raise _wrong(f"range over {value!r:.40}")
        items = sorted(value.items()) if isinstance(value, Mapping) else list(enumerate(value or ()))
        for key, item in items:
            self.step()
            pair = (item,) if len(node.names) == 1 else (key, item)
            self.scopes.append(dict(zip(node.names, pair, strict=False)))
            try:
                self.nodes(node.body, item)
            except _Continue:
                pass
            except _Break:
                break
            finally:
                self.scopes.pop()
        if not items:
            self.nodes(node.other, dot)

    def pipeline(self, pipeline: Pipeline, dot: Any) -> Any:
        value: list[Any] = []
        for command in pipeline:
            value = [self.command(command, dot, value)]
        return value[0]

    def command(self, command: Command, dot: Any, last: list[Any]) -> Any:
        self.step()
        (kind, name), arguments = command[0], command[1:]
        if kind != "name" or name in _CONSTANTS:
            if arguments or last:
                raise _wrong(f"{name!r:.40} is no function")
            return self.value(command[0], dot)
        if name in ("and", "or"):  # evaluated no further than needed
            result: Any = None
            for n, argument in enumerate([*arguments, *[("given", x) for x in last]]):
                result = self.value(argument, dot)
                if bool(result) == (name == "or") or n == len(arguments) + len(last) - 1:
                    return result
            raise _wrong(f"{name} of nothing")
        function = FUNCTIONS.get(str(name))
        if function is None:
            raise _wrong(f"the function {name} is not handled")
        try:
            return function(*[self.value(argument, dot) for argument in arguments], *last)
        except TypeError:
            raise _wrong(f"{name} does not take {len(arguments) + len(last)} such values") from None

    def value(self, word: Word, dot: Any) -> Any:
        kind, value = word
        match kind:
            case "given":
                return value
            case "dot":
                return dot
            case "string":
                return value[1:-1] if value[0] == "`" else _unquoted(value)
            case "number":
                return int(value)
            case "fields":
                return _fields(dot, value)
            case "variable":
                for scope in reversed(self.scopes):
                    if value in scope:
                        return scope[value]
                raise _wrong(f"{value} was never declared")
            case "chain":
                return _fields(self.value(value[0], dot), value[1])
            case "pipeline":
                return self.pipeline(value, dot)
            case _ if value in _CONSTANTS:
                return _CONSTANTS[value]
            case _:
                return self.command([word], dot, [])


def _unquoted(value: str) -> str:
    try:
        text: str = json.loads(value, strict=False)
    except ValueError:
        raise _wrong(f"{value:.40} is no string that is handled") from None
    return text


def _fields(value: Any, path: str) -> Any:
    """``.A.B`` of a value; what is missing is empty, as with Ollama's ``missingkey=zero``."""
    for name in path.split(".")[1:]:
        if not isinstance(value, (Mapping, type(None), str)):
            raise _wrong(f"{value!r:.40} has no field {name}")
        value = value.get(name, "") if isinstance(value, Mapping) else ""
    return value


def execute(nodes: Sequence[Node], data: Mapping[str, Any]) -> str:
    """What a template writes.

    Args:
        nodes: of `parse`.
        data: plain values; ``$`` and the first dot.

    Raises:
        FormatError: it does what is not handled, or too much of it.
    """
    run = _Execution(data)
    try:
        run.nodes(nodes, data)
    except (_Break, _Continue):
        raise _wrong("break or continue outside of range") from None
    return "".join(run.out)


def fields_of(nodes: Sequence[Node]) -> set[str]:
    """Names of the fields and variables that a template asks for."""
    found: set[str] = set()

    def of_word(kind: str, value: Any) -> None:
        if kind in ("fields", "variable"):
            found.update(str(value).lstrip("$").strip(".").split("."))
        elif kind == "chain":
            of_word(*value[0])
            found.update(value[1].strip(".").split("."))
        elif kind == "pipeline":
            of_pipeline(value)

    def of_pipeline(pipeline: Pipeline | None) -> None:
        for command in pipeline or []:
            for kind, value in command:
                of_word(kind, value)

    for node in nodes:
        of_pipeline(node.pipeline)
        found |= fields_of(node.body) | fields_of(node.other)
    return found - {""}


__all__ = ["Node", "execute", "fields_of", "parse"]
