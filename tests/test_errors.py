"""Errors: each has a code that is written where it is raised; the page of codes is made from the source."""

import ast
import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aprlab.errors import AprlabError, FormatError, NumericError, UsageError

ROOT = Path(__file__).parents[1]

_CLASSES = """
class AprlabError(Exception):
    exit_code = 1
class UsageError(AprlabError):
    exit_code = 2
class FormatError(AprlabError):
    exit_code = 2
"""


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The program that makes the page."""
    spec = importlib.util.spec_from_file_location("make_errors", ROOT / "docs" / "make" / "errors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(made: ModuleType) -> list[Any]:
    """The modules of aprlab."""
    return made.read_package()


def broken(made: ModuleType, text: str) -> list[str]:
    """What the rules say of a package of one module."""
    return made.broken_rules(made.error_sites([made.Source("aprlab.room.part", ast.parse(_CLASSES + text))]))


# ── the package ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_error_has_a_literal_code_of_one_class(made: ModuleType, package: list[Any]) -> None:
    sites = made.error_sites(package)
    assert len(sites) > 400
    assert made.broken_rules(sites) == []


def test_the_page_is_current(made: ModuleType, package: list[Any]) -> None:
    found = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert found == made.page(package), "run: python docs/make/errors.py"


def test_the_classes_are_those_that_python_knows(made: ModuleType, package: list[Any]) -> None:
    from aprlab.kernels.cuda.compile import CompileError
    from aprlab.kernels.ptx.machine import KernelFault
    from aprlab.lab.notebooks import NotebookError

    kinds = made.error_kinds(package)
    for kind in (AprlabError, FormatError, UsageError, NumericError, CompileError, KernelFault, NotebookError):
        assert kinds[kind.__name__].exit_code == kind.exit_code
    assert not {"Exception", "ValueError"} & set(kinds)


# ── the rules fail where they must ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('raise UsageError("no")', "without a literal code: no"),
        ('raise errors.UsageError("no", path=1)', "without a literal code"),
        ('problems.append(FormatError("no"))', "without a literal code"),
        ("raise UsageError('no', code=made_up())", "without a literal code"),
        ("raise UsageError('no', code=f'room.{rule}')", "without a literal code"),
        ('raise UsageError("no", code="Room.Rule")', "not of the form"),
        ('raise UsageError("no", code="rule")', "not of the form"),
        ('raise UsageError("no", code="room.rule\\n")', "not of the form"),
        ('raise UsageError("a", code="room.rule" if x else "room rule")', "not of the form"),
        ('a = UsageError("a", code="room.rule")\nb = FormatError("b", code="room.rule")', "is a FormatError, but a UsageError"),
        ("def fail(text, code):\n    return UsageError(text, code=code)\nraise fail('no')", "without a literal code: no"),
        ("def fail(text, *, code):\n    return UsageError(text, code=code)\nraise fail('no', code=x)", "without a literal code"),
        ("class A:\n    def fail(self, text, code='Bad'):\n        return UsageError(text, code=code)\nA().fail('no')", "not of"),
        (
            "def deep(code):\n    def fail(text):\n        return UsageError(text, code=code)\n    return fail",
            "without a literal",
        ),
        ("try: x()\nexcept FormatError as e: raise UsageError(e.message, code=e.code)", "without a literal code"),
        ("try: x()\nexcept (A, UsageError) as e: raise UsageError(e.message, code=e.code)", "without a literal code"),
        ("raise UsageError(e.message, code=e.code)", "without a literal code"),
        ("class Own(UsageError):\n    def __init__(self):\n        super().__init__('no')", "Own without a literal code: no"),
        ("class Own(UsageError): pass\nraise Own('no')", "Own without a literal code"),
    ],
)
def test_what_breaks_a_rule_is_found(made: ModuleType, text: str, says: str) -> None:
    (line,) = broken(made, text)
    assert says in line


@pytest.mark.parametrize(
    "text",
    [
        'raise UsageError("no", code="room.rule")',
        'raise UsageError("a", code="room.rule")\nraise UsageError("b", code="room.rule", path=1)',
        'raise UsageError("a", code="room.one" if x else "room.two-or-3")',
        "def fail(text, code):\n    return UsageError(text, code=code)\nraise fail('no', 'room.rule')",
        "def fail(text, *keys, code):\n    return UsageError(text, code=code)\nraise fail('no', 1, 2, code='room.rule')",
        "class A:\n    def fail(self, text, code='room.rule'):\n        return UsageError(text, code=code)\nA().fail('no')",
        "try: x()\nexcept UsageError as e: raise UsageError(e.message, code=e.code, path=1)",
        "class Own(UsageError):\n    def __init__(self):\n        super().__init__('no', code='room.own')\nraise Own()",
        "raise ValueError('not ours')",
    ],
)
def test_what_keeps_the_rules_is_left_alone(made: ModuleType, text: str) -> None:
    assert broken(made, text) == []


def test_the_page_changes_with_code_class_status_message_and_module(made: ModuleType) -> None:
    def page(text: str, module: str = "aprlab.room.part") -> str:
        return made.page([made.Source(module, ast.parse(text))])

    text = _CLASSES + '_WHY = "because"\nraise UsageError(f"{n} of {len(x)} | {_WHY}", code="room.rule")\n'
    first = page(text)
    assert "| `room.rule` | UsageError | 2 | {n} of {…} \\| {_WHY} | `aprlab.room.part` |" in first
    changed = [
        page(text.replace("room.rule", "room.law")),
        page(text.replace("raise UsageError", "raise FormatError")),
        page(text.replace("exit_code = 2", "exit_code = 3")),
        page(text.replace(" of ", " out of ")),
        page(text, "aprlab.room.other"),
    ]
    assert len({first, *changed}) == 6
    assert "| because |" in page(_CLASSES + '_WHY = "because"\nraise UsageError(_WHY, code="room.rule")\n')
    maker = "def fail(text, code):\n    return UsageError(f'line {n}: {text}', code=code)\n"
    assert "| line {n}: gone |" in page(_CLASSES + maker + "raise fail('gone', 'room.rule')\n")


# ── an error for programs ─────────────────────────────────────────────────────────────────────────────────────────


def test_an_error_in_json() -> None:
    error = FormatError("is torn", code="room.torn", path=Path("a") / "b.apr", tensor="blk.0.attn_q.weight", offset=64)
    expected = {"code": "room.torn", "message": "is torn", "path": "a/b.apr", "tensor": "blk.0.attn_q.weight", "offset": 64}
    assert error.to_json() == expected == json.loads(json.dumps(error.to_json()))
    bare = UsageError("no", code="room.rule").to_json()
    assert bare == {"code": "room.rule", "message": "no", "path": None, "tensor": None, "offset": None}
    assert pickle.loads(pickle.dumps(error)).to_json() == expected
