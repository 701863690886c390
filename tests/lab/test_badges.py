"""Badges for an address: links to this repository's notebooks, an install line from the same address, no local paths."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
from pages import page_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    return page_script("badges")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "notebooks").mkdir()
    for name in ("index", "06_ticket_revisited"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_badges_lead_to_the_notebook_and_the_install_cell_to_the_same_address(made: ModuleType, checkout: Path) -> None:
    given = ["someone/aprlab", "--folder", str(checkout)]
    assert made.main(given) == 0
    first = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert made.main(given) == 0
    assert first == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}, "a second run changes nothing"
    for name in ("index", "06_ticket_revisited"):
        notebook = nbformat.read(checkout / "notebooks" / f"{name}.ipynb", 4)
        nbformat.validate(notebook)
        heading, _, line, _, *rest = notebook.cells[0].source.splitlines()
        assert heading.startswith("# ") and rest
        colab, binder = (urlsplit(link.split(")")[0]) for link in line.split("](")[2::2])
        assert (colab.netloc, colab.path) == (
            "colab.research.google.com", f"/github/someone/aprlab/blob/main/notebooks/{name}.ipynb"
        )  # fmt: skip
        assert (binder.netloc, binder.path) == ("mybinder.org", "/v2/gh/someone/aprlab/main")
        assert parse_qs(binder.query) == {"urlpath": [f"lab/tree/notebooks/{name}.ipynb"]}
        (cell,) = [cell for cell in notebook.cells if cell.id == made.INSTALL]
        ast.parse(cell.source)
        assert "aprlab @ git+https://github.com/someone/aprlab@main" in cell.source
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        assert str(checkout) not in json.dumps(notebook)
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("# aprlab\n\n[![Colab]") and readme.count("[![Binder]") == 1


def test_the_install_cell_does_nothing_where_aprlab_is(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("it installs")

    monkeypatch.setattr("subprocess.run", run)
    exec(made.install_cell("someone/aprlab", "main"), {})
    missing = made.install_cell("someone/aprlab", "main").replace('find_spec("aprlab")', 'find_spec("no_such_package_x")')
    with pytest.raises(AssertionError, match="it installs"):
        exec(missing, {})


@pytest.mark.parametrize("address", ["aprlab", "a b/c", "../../etc/x", 'x/y"; import os', "-a/b"])
def test_what_is_no_address_writes_nothing(made: ModuleType, checkout: Path, address: str) -> None:
    before = (checkout / "README.md").read_bytes()
    assert made.main(["--folder", str(checkout), "--", address]) == 2
    assert (checkout / "README.md").read_bytes() == before
