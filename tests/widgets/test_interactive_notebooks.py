"""The interactive notebooks are committed without outputs: nbval then runs them and compares nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from aprlab import paths, widgets

FOLDER = paths.notebooks_dir() / "interactive"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_every_explorer_has_its_notebook() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(widgets.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stripped_short_and_explained(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert f"widgets.{path.stem}(" in code[0].source
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert len(cell.source.splitlines()) <= 15
        ast.parse(cell.source)
