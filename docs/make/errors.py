"""Make `docs/errors.md`, every error by its code: `python docs/make/errors.py [docs/errors.md]`.

Nothing is imported: the page is read out of the source with `ast`. An error is made by calling one of the classes that
descend from `AprlabError`, with a literal ``code="room.rule"``. Four forms need no literal at the call itself:

* a *maker*, a function that makes the error with a `code` that it was given: its callers give the literal;
* a function that has only literals for its variable `code`;
* a class whose own `__init__` gives the literal to its base;
* an error passed on with more words: ``except FormatError as error: raise FormatError(…, code=error.code)``, of the same
  class, so that one code stays one class.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aprlab"
PAGE = ROOT / "docs" / "errors.md"
BASE = "AprlabError"
FORM = re.compile(r"[a-z0-9]+(\.[a-z0-9-]+)+")

Function = ast.FunctionDef | ast.AsyncFunctionDef

_HEAD = """\
# Errors

Every error that aprlab raises on purpose has a `code`, one for each rule that can be broken. The code is stable; the
message is for people and may be reworded at any time. Programs look at the code:

    try:
        model = aprlab.open_model(path)
    except aprlab.AprlabError as error:
        print(error.code, error.to_json())

`error.to_json()` gives `code`, `message`, `path`, `tensor` and `offset`; the last three are null where they are not known.
A verb with `--json` prints the same object on standard output when it fails.
A code always has the same class, and the class gives the exit status of the command line. `{…}` is filled in.

This page is generated from the code (`python docs/make/errors.py`).
"""


@dataclass(frozen=True)
class Kind:
    """A class of errors."""

    name: str
    exit_code: int
    bases: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """A place where an error is made; `code` is None where no literal code is found."""

    code: str | None
    kind: str
    message: str
    module: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.kind}, {self.code}: {self.message}"


@dataclass(frozen=True)
class Maker:
    """A function that makes an error of `kind` with the `code` that its caller gives."""

    name: str
    kind: str
    module: str
    function: Function
    template: str


@dataclass
class Source:
    """One module: its tree, for each node the node around it, and the calls in it."""

    name: str
    tree: ast.Module

    def __post_init__(self) -> None:
        self.around = {inner: outer for outer in ast.walk(self.tree) for inner in ast.iter_child_nodes(outer)}
        self.calls = [node for node in self.around if isinstance(node, ast.Call)]

    def enclosing(self, node: ast.AST) -> Iterator[ast.AST]:
        """What is around a node, the nearest first."""
        while (found := self.around.get(node)) is not None:
            yield found
            node = found

    @property
    def room(self) -> str:
        """The package that the module lies in."""
        return self.name.rpartition(".")[0]


# ── reading the source ────────────────────────────────────────────────────────────────────────────────────────────


def read_package(package: Path = PACKAGE) -> list[Source]:
    """Every module of a package, by its dotted name."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def error_kinds(sources: Iterable[Source]) -> dict[str, Kind]:
    """`AprlabError` and all that descends from it, by name."""
    classes = {n.name: n for source in sources for n in source.around if isinstance(n, ast.ClassDef)}
    kinds: dict[str, Kind] = {}

    def add(name: str) -> Kind | None:
        if name in kinds or name not in classes:
            return kinds.get(name)
        bases = tuple(base for base in map(_last_name, classes[name].bases) if base)
        known = [kind for kind in map(add, bases) if kind is not None]
        if name != BASE and not known:
            return None
        status = known[0].exit_code if known else 1
        for line in classes[name].body:
            if isinstance(line, ast.Assign) and _last_name(line.targets[0]) == "exit_code":
                status = ast.literal_eval(line.value)
        kinds[name] = Kind(name, status, bases)
        return kinds[name]

    for name in classes:
        add(name)
    return kinds


def error_sites(sources: Sequence[Source]) -> list[Site]:
    """Every place of the package where an error gets its code, or should."""
    kinds = error_kinds(sources)
    fixed = {node.name for source in sources for node in _fixed_classes(source, kinds)}
    sites: list[Site] = []
    makers: list[Maker] = []
    for source in sources:
        for call in source.calls:
            name = _last_name(call.func) or ""
            if owner := _base_call(source, call, kinds):
                name = owner
            elif name not in kinds or name in fixed:
                continue
            given = _argument(call, "code")
            maker = _maker(source, call, name, given)
            if maker is not None:
                makers.append(maker)
            elif not _passed_on(source, call, name, given):
                sites += _sites(source, call, name, given, _message(source, call.args[0] if call.args else None, call))
    for source in sources:
        sites += _sites_of_makers(source, makers)
    return sorted(sites, key=lambda site: (site.module, site.line))


def _sites_of_makers(source: Source, makers: Sequence[Maker]) -> Iterator[Site]:
    for call in source.calls:
        name = _last_name(call.func)
        inside = any(isinstance(outer, ast.ClassDef) for outer in source.enclosing(call)) or isinstance(call.func, ast.Attribute)
        known = [m for m in makers if m.name == name and (m.module == source.name or (inside and _room(m.module) == source.room))]
        known = [m for m in known if m.module == source.name] or known
        if not known:
            continue
        maker = known[0]
        names = [a.arg for a in maker.function.args.args if a.arg not in ("self", "cls")]
        given = _argument(call, "code", names) or _default(maker.function, "code")
        message = _message(source, _argument(call, names[0], names), call)
        text = maker.template.replace("{" + names[0] + "}", message)
        yield from _sites(source, call, maker.kind, given, text)


def _sites(source: Source, call: ast.Call, kind: str, given: ast.expr | None, message: str) -> list[Site]:
    codes = _literals(given)
    if isinstance(given, ast.Name):
        values = [_literals(value) for value in _assigned(source, call, given.id)]
        codes = list(dict.fromkeys(itertools.chain.from_iterable(values))) if all(values) else []
        message = message if len(codes) == 1 else _hole(call.args[0])
    return [Site(code, kind, message, source.name, call.lineno) for code in codes or [None]]


def _assigned(source: Source, node: ast.AST, name: str) -> list[ast.expr]:
    """What the function around `node` assigns to a variable above it, in the order of lines."""
    function = _function(source, node)
    found = []
    for line in ast.walk(function) if function is not None else ():
        if isinstance(line, ast.Assign) and line.lineno < node.lineno:
            target, value = line.targets[0], line.value
            pairs = (
                zip(target.elts, value.elts, strict=True)
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                else [(target, value)]
            )
            found += [(line.lineno, given) for known, given in pairs if _last_name(known) == name]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def _literals(node: ast.expr | None) -> list[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp) and (yes := _literals(node.body)) and (no := _literals(node.orelse)):
        return [*yes, *no]
    return []


def _room(module: str) -> str:
    return module.rpartition(".")[0]


def _last_name(node: ast.expr) -> str | None:
    """`b` of ``a.b`` or ``b``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _argument(call: ast.Call, name: str, positions: list[str] | None = None) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    at = positions.index(name) if positions and name in positions else len(call.args)
    return call.args[at] if at < len(call.args) else None


def _default(function: Function, name: str) -> ast.expr | None:
    listed = function.args
    pairs = list(zip(reversed(listed.args), reversed(listed.defaults), strict=False))
    pairs += [(a, d) for a, d in zip(listed.kwonlyargs, listed.kw_defaults, strict=True) if d is not None]
    return next((default for argument, default in pairs if argument.arg == name), None)


def _function(source: Source, node: ast.AST) -> Function | None:
    return next((f for f in source.enclosing(node) if isinstance(f, Function)), None)


def _maker(source: Source, call: ast.Call, kind: str, given: ast.expr | None) -> Maker | None:
    """The function around a call whose `code` is that function's own parameter."""
    function = _function(source, call)
    if function is None or not isinstance(given, ast.Name) or function.name == "__init__":
        return None
    if given.id != "code" or "code" not in [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]:
        return None
    return Maker(function.name, kind, source.name, function, _message(source, call.args[0], call))


def _passed_on(source: Source, call: ast.Call, kind: str, given: ast.expr | None) -> bool:
    """Whether the code is that of a caught error of the same class."""
    if not (isinstance(given, ast.Attribute) and given.attr == "code" and isinstance(given.value, ast.Name)):
        return False
    handlers = [h for h in source.enclosing(call) if isinstance(h, ast.ExceptHandler) and h.name == given.value.id]
    return bool(handlers) and handlers[0].type is not None and _last_name(handlers[0].type) == kind


def _fixed_classes(source: Source, kinds: dict[str, Kind]) -> Iterator[ast.ClassDef]:
    """Classes of errors whose own `__init__` calls that of their base."""
    for call in source.calls:
        if _base_call(source, call, kinds):
            yield next(c for c in source.enclosing(call) if isinstance(c, ast.ClassDef))


def _base_call(source: Source, call: ast.Call, kinds: dict[str, Kind]) -> str | None:
    """The class whose `__init__` this call of ``super().__init__`` is in; None for anything else."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"):
        return None
    owner = next((c for c in source.enclosing(call) if isinstance(c, ast.ClassDef)), None)
    return owner.name if owner is not None and owner.name in kinds and owner.name != BASE else None


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _message(source: Source, node: ast.expr | None, at: ast.Call) -> str:
    """A message as it stands in the source; what is filled in is ``{name}``, or ``{…}`` where it is more than a name."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(source, part, at) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _message(source, node.value, at) if isinstance(node.value, ast.Constant) else _hole(node.value)
    if isinstance(node, ast.IfExp):
        return f"{_message(source, node.body, at)} / {_message(source, node.orelse, at)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _message(source, node.left, at) + _message(source, node.right, at)
    if isinstance(node, ast.Name):
        wholes = [n.value for n in source.tree.body if isinstance(n, ast.Assign) and _last_name(n.targets[0]) == node.id]
        for value in reversed([*wholes, *_assigned(source, at, node.id)]):
            if isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp):
                return _message(source, value, at)
            break
    return _hole(node)


def _hole(node: ast.expr | None) -> str:
    return "{" + (_last_name(node) or "…" if node is not None else "…") + "}"


# ── rules and page ────────────────────────────────────────────────────────────────────────────────────────────────


def broken_rules(sites: Iterable[Site]) -> list[str]:
    """What is wrong with the codes, one line each: none, not of the form, one for two classes."""
    found = []
    classes: dict[str, Site] = {}
    for site in sites:
        if site.code is None:
            found.append(f"{site.module}:{site.line}: {site.kind} without a literal code: {site.message}")
            continue
        if not FORM.fullmatch(site.code):
            found.append(f"{site.module}:{site.line}: {site.code!r} is not of the form room.rule")
        first = classes.setdefault(site.code, site)
        if first.kind != site.kind:
            found.append(
                f"{site.module}:{site.line}: {site.code!r} is a {site.kind}, but a {first.kind} in {first.module}:{first.line}"
            )
    return found


def page(sources: Sequence[Source]) -> str:
    """The whole of `docs/errors.md`."""
    kinds = error_kinds(sources)
    by_code: dict[str, list[Site]] = {}
    for site in error_sites(sources):
        if site.code is not None:
            by_code.setdefault(site.code, []).append(site)
    parts, prefix = [_HEAD], ""
    for code, sites in sorted(by_code.items()):
        if code.split(".")[0] != prefix:
            prefix = code.split(".")[0]
            parts += [f"\n## {prefix}\n", "| code | class | exit status | message | module |", "|---|---|---|---|---|"]
        messages = "<br>".join(sorted({_cell(site.message) for site in sites}))
        modules = "<br>".join(sorted({f"`{site.module}`" for site in sites}))
        parts.append(f"| `{code}` | {sites[0].kind} | {kinds[sites[0].kind].exit_code} | {messages} | {modules} |")
    parts.append(f"\n{len(by_code)} codes.\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    for sign in ("\\", "|", "<", ">", "*", "[", "]"):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


if __name__ == "__main__":
    modules = read_package()
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(modules), encoding="utf-8")
    for line in broken_rules(error_sites(modules)):
        print(line, file=sys.stderr)
