"""Errors: each has a code that is written where it is raised; the page of codes is made from the source."""

import ast
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pages import page_script

from aprlab.conversion import convert, export
from aprlab.errors import AprlabError, FormatError, NumericError, UsageError
from aprlab.faults import convert_with
from aprlab.formats import gguf, open_model
from aprlab.inference import Session
from aprlab.quants import types

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
    return page_script("errors")


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
    assert made.broken_rules(sites) == [], "\n".join(made.broken_rules(sites))


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
        ("def f(x):\n    code = 'room.rule'\n    if x:\n        code = x\n    raise UsageError('no', code=code)", "without"),
        ("def f():\n    raise UsageError('no', code=code)\n    code = 'room.rule'", "without a literal code"),
        ("def f():\n    a, code = 1, 'Rule'\n    raise UsageError('no', code=code)", "not of the form"),
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
        "def f(x):\n    said, code = 'no', 'room.a'\n    if x:\n        code = 'room.b'\n    raise UsageError(said, code=code)",
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
    local = "def f(n):\n    said = f'{n} is gone'\n    raise UsageError(said, code='room.rule')\n"
    assert "| {n} is gone |" in page(_CLASSES + local)
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


# ── the codes of broken files and bad requests ────────────────────────────────────────────────────────────────────


def code_of(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The code of the error that a call raises."""
    with pytest.raises(AprlabError) as caught:
        call(*arguments, **options)
    return caught.value.code


def test_the_same_rule_has_the_same_code_in_every_format(tiny: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    convert(tiny, tmp_path / "whole.apr")
    for whole in (tiny, tmp_path / "whole.apr", folders["f16"] / "model.safetensors"):
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(whole.read_bytes()[:20])
        assert code_of(open_model, cut) == "reading.truncated", whole
        assert code_of(open_model, tmp_path / f"nowhere{whole.suffix}") == "reading.unreadable", whole
        assert code_of(convert, tiny, tmp_path / "whole.apr") == "writing.output-exists"
        assert code_of(convert, whole, whole, force=True) == "writing.output-is-input", whole


def test_each_broken_rule_has_its_own_code(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert code_of(open_model, tmp_path / "empty") == "identity.empty"
    raw = bytearray(tiny.read_bytes())
    raw[4] = 9
    (tmp_path / "version.gguf").write_bytes(raw)
    assert code_of(open_model, tmp_path / "version.gguf") == "gguf.unsupported-version"
    header = gguf.read_header(tiny)
    row = header.infos[0]
    assert code_of(gguf.tensor_type, header, replace(row, code=99)) == "gguf.unknown-type"
    assert code_of(gguf.tensor_type, header, replace(row, code=types.APR_Q4.code)) == "gguf.unknown-type"
    assert code_of(gguf.tensor_type, header, replace(row, code=types.Q4_K.code, ne=(255, 2))) == "gguf.row-not-whole-blocks"
    assert code_of(types.by_code, 99) == "quants.unknown-type-code"
    assert code_of(convert_with, tiny, tmp_path / "x.apr", ["GH-19"]) == "faults.unknown"
    assert code_of(convert_with, tiny, tmp_path / "x.apr", ["kv-stale"]) == "faults.not-for-files"
    assert code_of(convert_with, tiny, tmp_path / "x.apr", ["GH-438"]) == "faults.changes-nothing"
    assert code_of(Session, open_model(tiny), engine="abacus") == "engines.unknown"
    assert code_of(Session(open_model(tiny)).generate, "") == "session.empty-prompt"


def test_an_error_that_is_passed_on_keeps_its_code_and_gains_a_place(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    tensor = model.tensor("blk.2.attn_k.bias")
    values = tensor.dequantise()
    values[5] = 70_000.0
    model.tensors[tensor.name] = tensor.replace(raw=values.view(np.uint8))
    with pytest.raises(NumericError) as caught:
        export(model, tmp_path / "out", format="safetensors", dtype="f16")
    assert (caught.value.code, caught.value.tensor) == ("quants.out-of-range", tensor.name)


def test_an_error_without_a_code_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="code"):
        AprlabError("no")  # type: ignore[call-arg]
