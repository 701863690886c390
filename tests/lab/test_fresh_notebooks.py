"""A notebook to begin with: its parameters are what was given, whatever the path is called."""

from __future__ import annotations

import ast

import nbformat
import pytest

from aprlab.errors import UsageError
from aprlab.forensics import ranking
from aprlab.lab.fresh_notebooks import fresh

PATHS = ["broken.apr", '../we\'ird "quoted" \\ back.gguf', "new\nline.gguf", "日本 $x$ [bold].gguf"]


def parameters(text: str) -> dict[str, object]:
    (cell,) = [c for c in nbformat.reads(text, 4).cells if "parameters" in c.metadata.get("tags", [])]
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS)
def test_the_paths_are_filled_in_and_nothing_else_is_changed(path: str) -> None:
    empty, _ = fresh("one")
    text, stem = fresh("two", reference=path, candidate="x.apr")
    assert parameters(text) == parameters(empty) | {"reference": path, "candidate": "x.apr"}
    assert stem == "peel-x"
    assert "/" not in fresh("one", candidate=path)[1]
    assert not [out for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code" for out in cell.outputs]


@pytest.mark.parametrize("path", ["", *PATHS])
def test_a_notebook_for_a_sentence(path: str) -> None:
    text, _ = fresh("garbage", reference=path)
    code = nbformat.reads(text, 4).cells[1].source
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    opened = next(call for call in calls if ast.unparse(call.func) == "aprlab.open_model").args[0]
    assert ast.unparse(opened) == "aprlab.embedded_model()" if not path else ast.literal_eval(opened) == path


def test_the_notebook_for_a_sentence_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(ranking, "forensics", lambda model, saw, prompt: seen.append(saw))
    code = nbformat.reads(fresh("garbage")[0], 4).cells[1].source
    exec(compile(code.replace('saw = ""', 'saw = "helf"', 1), "cell", "exec"), {})
    assert seen == ["helf"]


def test_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="two, one, garbage"):
        fresh("three")
