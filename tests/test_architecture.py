"""The house as its source tells it: arrows between rooms go one way, nothing goes in circles, files and functions stay short.

Each rule is a function from a tree of files to a list of what breaks it, so that each can be shown a tree that does.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From left to right; a room imports from rooms on its left alone. `aprlab` itself lists what is public, of all of them.
ROOMS = (
    "errors", "in_use", "version", "paths", "published", "cluster", "workers", "display", "quants", "model", "formats",
    "conversion", "kernels", "engines", "architectures", "inference", "tracing", "sources", "instruments", "faults",
    "figures", "onion", "forensics", "gates", "lab", "qualification", "widgets", "cli", "aprlab", "__main__",
)  # fmt: skip
FILE_LINES, FUNCTION_LINES = 600, 60

Graph = dict[str, set[str]]


@cache
def parsed(path: Path) -> ast.Module:
    """A file's tree, to be read only."""
    return ast.parse(path.read_text(), str(path))


@cache
def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(root.glob("aprlab/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = parsed(path)
    return found


@cache
def nodes(root: Path) -> dict[str, list[ast.AST]]:
    """Everything in each module, in no order."""
    return {name: list(ast.walk(tree)) for name, tree in modules(root).items()}


def is_name(node: ast.AST, *names: str) -> bool:
    """Whether an expression is one of these names and nothing more."""
    return isinstance(node, ast.Name) and node.id in names


def statements(tree: ast.Module, types: bool = True) -> Iterator[ast.AST]:
    """Every statement, wherever it is; `types`: also those under ``if TYPE_CHECKING``, which are never loaded."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for part in ("orelse",) if for_types and not types else ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting += getattr(node, part, ())


def imports(name: str, some: Iterable[ast.AST], known: dict[str, ast.Module], package: bool) -> Iterator[str]:
    """Modules of this package that statements of a module import."""
    for node in some:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "aprlab")
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] == "aprlab":
                yield from (full if (full := f"{base}.{alias.name}") in known else base for alias in node.names)


@cache
def graph(root: Path, types: bool = True) -> Graph:
    """Module -> the modules that it imports, wherever in it; `types`: those that it names for types alone, too."""
    trees = modules(root)
    packages = {".".join(path.parent.relative_to(root).parts) for path in root.glob("aprlab/**/__init__.py")}
    return {
        name: set(imports(name, statements(tree, types), trees, name in packages)) - {name} for name, tree in trees.items()
    }


def room(module: str) -> str:
    """``aprlab.model.tensor`` -> ``model``."""
    return module.split(".")[1] if "." in module else module


def wrong_arrows(root: Path) -> list[str]:
    """Imports that go from left to right, and rooms that have no place in the order."""
    wrong = []
    for name, targets in graph(root).items():
        for target in sorted(targets):
            for each in (name, target):
                if room(each) not in ROOMS:
                    wrong.append(f"{each}: the room {room(each)!r} has no place in the order")
                    break
            else:
                if ROOMS.index(room(target)) > ROOMS.index(room(name)):
                    wrong.append(f"{name} imports {target}, to its right")
    return wrong


def circles(edges: Graph) -> list[str]:
    """Every set of nodes that reach each other."""
    reached: Graph = {}

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        left = list(edges.get(start, ()))
        while left:
            if (node := left.pop()) not in seen:
                seen.add(node)
                left += edges.get(node, ())
        return seen

    for node in edges:
        reached[node] = reach(node)
    found = {tuple(sorted(other for other in mine if node in reached.get(other, ()))) for node, mine in reached.items()}
    return [" <-> ".join(circle) for circle in sorted(found) if circle]


def module_circles(root: Path) -> list[str]:
    """Modules that load each other, directly or by way of others, at once or later."""
    return circles(graph(root, types=False))


def room_circles(root: Path) -> list[str]:
    """The same of rooms."""
    rooms: Graph = {}
    for name, targets in graph(root).items():
        rooms.setdefault(room(name), set()).update(room(target) for target in targets if room(target) != room(name))
    return circles(rooms)


def sources(root: Path) -> Iterator[Path]:
    """The package's and the tests' files, kernels excepted: those are long by nature."""
    for folder in ("aprlab", "tests"):
        for path in sorted(root.glob(f"{folder}/**/*.py")):
            if path.relative_to(root).parts[1] != "kernels":
                yield path


def long_files(root: Path) -> list[str]:
    """Files of 600 lines and more."""
    lengths = {path.relative_to(root): len(path.read_text().splitlines()) for path in sources(root)}
    return [f"{path} has {length} lines" for path, length in lengths.items() if length >= FILE_LINES]


def long_functions(root: Path) -> list[str]:
    """Functions of 60 lines and more, docstrings and all."""
    wrong = []
    for path in sources(root):
        for node in statements(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length >= FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(root)}: {node.name} has {length} lines")
    return wrong


def callable_modules(root: Path) -> list[str]:
    """Modules that turn themselves into something else: a class of `ModuleType`, or another `__class__` for one."""
    wrong = []
    for name, inside in nodes(root).items():
        for node in inside:
            bases = [ast.unparse(base).split(".")[-1] for base in node.bases] if isinstance(node, ast.ClassDef) else []
            targets = node.targets if isinstance(node, ast.Assign) else []
            if "ModuleType" in bases or any(isinstance(t, ast.Attribute) and t.attr == "__class__" for t in targets):
                wrong.append(f"{name}: line {getattr(node, 'lineno', 0)}")
    return wrong


def duplicate_classes(root: Path) -> list[str]:
    """Names that two classes of the package have, each at the top of a module."""
    places: dict[str, list[str]] = {}
    for name, tree in modules(root).items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    return [f"{name} in {' and '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def own_attributes(everything: list[ast.AST]) -> dict[ast.AST, set[str]]:
    """Each node inside a class -> what that class keeps in itself: its methods may set it on another object of theirs."""
    found: dict[ast.AST, set[str]] = {}
    for kind in everything:
        if isinstance(kind, ast.ClassDef):
            inside = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute)]
            kept = {node.attr for node in inside if is_name(node.value, "self") and isinstance(node.ctx, ast.Store)}
            found |= dict.fromkeys(inside, kept)
    return found


def reaching_in(root: Path) -> list[str]:
    """Places that change another object's inside, or ask for one exact class where an attribute should answer."""
    wrong = []
    for name, everything in nodes(root).items():
        kept = own_attributes(everything)
        for node in everything:
            if isinstance(node, ast.Attribute):
                own = is_name(node.value, "self", "cls") or (isinstance(node.value, ast.Name) and node.attr in kept.get(node, ()))
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                stored = not isinstance(node.ctx, ast.Load)
                bad = not own and ((private and stored) or node.attr == "__dict__")
            elif isinstance(node, ast.Call):
                setting = isinstance(node.func, ast.Attribute) and node.func.attr == "__setattr__" and bool(node.args)
                bad = setting and is_name(node.func.value, "object") and not is_name(node.args[0], "self")
            elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and is_name(node.left.func, "type"):
                right = ast.unparse(node.comparators[0]).split(".")[-1]
                is_class = right.isidentifier() and right[0].isupper() and not right.isupper()
                bad = is_class and isinstance(node.ops[0], ast.Is | ast.IsNot)
            else:
                continue
            if bad:
                wrong.append(f"{name}: line {node.lineno}: {ast.unparse(node)}")
    return wrong


RULES: tuple[Callable[[Path], list[str]], ...] = (
    wrong_arrows, room_circles, module_circles, long_files, long_functions, callable_modules, duplicate_classes,
    reaching_in,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[Path], list[str]]) -> None:
    broken = rule(ROOT)
    assert not broken, "\n" + "\n".join(broken)


# ── each rule sees what breaks it ─────────────────────────────────────────────────────────────────────────────────

SOUND = {
    "aprlab/__init__.py": "",
    "aprlab/errors.py": "class AprlabError(Exception): ...",
    "aprlab/model/__init__.py": "from aprlab.model.tensor import Tensor",
    "aprlab/model/tensor.py": "from aprlab.errors import AprlabError\nclass Tensor: ...",
    "aprlab/cli/__init__.py": "",
    "aprlab/cli/app.py": "def run():\n    from aprlab.model import Tensor\n",
    "aprlab/kernels/long.py": "def kernel():\n" + "    x = 1\n" * 700,
    "tests/test_model.py": "from aprlab.cli.app import run\n",
}


def tree(folder: Path, **changed: str) -> Path:
    """The sound tree with some files added or replaced; ``__`` in a name means a slash."""
    for name, text in {**SOUND, **{f"{key.replace('__', '/')}.py": text for key, text in changed.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_breaks_no_rule(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(tree(tmp_path)) == []


MUTANTS: list[tuple[Callable[[Path], list[str]], dict[str, str], str]] = [
    (wrong_arrows, {"aprlab__model__a": "from aprlab.cli import app"}, "aprlab.model.a imports aprlab.cli.app, to its right"),
    (wrong_arrows, {"aprlab__model__a": "def f():\n    import aprlab.cli.app"}, "aprlab.model.a imports aprlab.cli.app"),
    (wrong_arrows, {"aprlab__model__a": "if TYPE_CHECKING:\n    from aprlab.cli.app import run"}, "aprlab.cli.app, to its"),
    (wrong_arrows, {"aprlab__model__a": "def f():\n    from ..cli import app"}, "aprlab.model.a imports aprlab.cli.app"),
    (wrong_arrows, {"aprlab__errors": "from . import cli"}, "aprlab.errors imports aprlab.cli"),
    (wrong_arrows, {"aprlab__shed__a": "from aprlab import errors"}, "the room 'shed' has no place"),
    (wrong_arrows, {"aprlab__model__a": "from aprlab import shed", "aprlab__shed": ""}, "the room 'shed' has no place"),
    (room_circles, {"aprlab__errors": "from aprlab.model import Tensor"}, "errors <-> model"),
    (module_circles, {"aprlab__model__a": "from aprlab.model import b", "aprlab__model__b": "def f():\n    from .a import x"},
     "aprlab.model.a <-> aprlab.model.b"),
    (module_circles, {"aprlab__model__tensor": "from aprlab.model import Tensor"}, "aprlab.model <-> aprlab.model.tensor"),
    (long_files, {"aprlab__model__a": "x = 1\n" * 600}, "aprlab/model/a.py has 600 lines"),
    (long_files, {"tests__model__test_a": "x = 1\n" * 600}, "tests/model/test_a.py has 600 lines"),
    (long_functions, {"aprlab__model__a": "class A:\n    def f(self):\n" + "        x = 1\n" * 59}, "model/a.py: f has 60 lines"),
    (long_functions, {"tests__test_a": "async def f():\n" + "    x = 1\n" * 59}, "tests/test_a.py: f has 60 lines"),
    (callable_modules, {"aprlab__model__a": "import types\nclass M(types.ModuleType): ..."}, "aprlab.model.a: line 2"),
    (callable_modules, {"aprlab__model__a": "import sys\nsys.modules[__name__].__class__ = M"}, "aprlab.model.a: line 2"),
    (reaching_in, {"aprlab__model__a": "def f(x):\n    x._kept = None"}, "aprlab.model.a: line 2: x._kept"),
    (reaching_in, {"aprlab__model__a": "class A:\n    def f(self, x):\n        x._kept = None"}, "a: line 3: x._kept"),
    (reaching_in, {"aprlab__model__a": "def f(x):\n    del x.y._kept"}, "aprlab.model.a: line 2: x.y._kept"),
    (reaching_in, {"aprlab__model__a": "def f(x):\n    x.__dict__.update(a=1)"}, "aprlab.model.a: line 2: x.__dict__"),
    (reaching_in, {"aprlab__model__a": "object.__setattr__(tensor, 'a', 1)"}, "aprlab.model.a: line 1: object"),
    (reaching_in, {"aprlab__model__a": "def f(x):\n    return type(x) is not Tensor"}, "line 2: type(x) is not Tensor"),
    (duplicate_classes, {"aprlab__cli__a": "class Tensor: ..."}, "Tensor in aprlab.cli.a and aprlab.model.tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changed", "said"), MUTANTS, ids=[f"{r.__name__}-{n}" for n, (r, _, _) in enumerate(MUTANTS)])
def test_a_rule_sees_what_breaks_it(
    rule: Callable[[Path], list[str]], changed: dict[str, str], said: str, tmp_path: Path
) -> None:
    found = rule(tree(tmp_path, **changed))
    assert any(said in line for line in found), found


def test_every_rule_has_a_mutant() -> None:
    assert Counter(rule for rule, _, _ in MUTANTS).keys() == set(RULES)


def test_types_alone_make_an_arrow_but_no_circle_of_modules(tmp_path: Path) -> None:
    named = "if TYPE_CHECKING:\n    from aprlab.model.b import B\nelse:\n    B = None\n"
    root = tree(tmp_path, aprlab__model__a=named, aprlab__model__b="from aprlab.model import a")
    assert module_circles(root) == [] and "aprlab.model.b" in graph(root)["aprlab.model.a"]


def test_a_class_may_set_what_it_keeps_on_another_of_its_kind(tmp_path: Path) -> None:
    text = "class A:\n    def f(self):\n        self._kept = 1\n    def twin(self):\n        a = A()\n        a._kept = 2\n"
    assert reaching_in(tree(tmp_path, aprlab__model__a=text)) == []
