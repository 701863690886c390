"""The notebook runner: strict about parameters, honest about failures."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from aprlab import lab
from aprlab.errors import UsageError

PARAMETERS = 'model: str = ""  # file\nout: str = ""\ncount: int = 3  # how many\nscale: float = 0.5\nloud: bool = False'


def write(folder: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    notebook.cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *(new_code_cell(cell) for cell in cells)]
    path = folder / "sample.ipynb"
    nbformat.write(notebook, path)
    return path


def test_parameters_are_checked_by_name_and_type(tmp_path: Path) -> None:
    path = write(tmp_path)
    given = {"model": "a", "count": 5, "scale": 2, "loud": True}
    checked = lab.check_parameters(path, given)
    assert checked == given
    assert type(checked["scale"]) is float


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"modle": "a"}, "no parameter 'modle'; it has: model, out, count, scale, loud"),
        ({"count": "5"}, "'count' wants int, got str"),
        ({"count": True}, "'count' wants int, got bool"),
        ({"count": 2.0}, "'count' wants int, got float"),
        ({"loud": 1}, "'loud' wants bool, got int"),
        ({"count": np.int64(5)}, "'count' wants int, got int64"),
        ({"scale": np.float64(5)}, "'scale' wants float, got float64"),
        ({"model": Path("a")}, "'model' wants str"),
        ({"model": None}, "'model' wants str, got NoneType"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(tmp_path: Path, parameters: dict, message: str) -> None:
    path = write(tmp_path, "raise RuntimeError('it ran')")
    with pytest.raises(UsageError, match=message):
        lab.run_notebook(path, parameters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_undeclared_type_is_the_notebooks_fault(tmp_path: Path) -> None:
    path = write(tmp_path, parameters="count = 3\nout: str = ''")
    with pytest.raises(UsageError, match="declared as 'None'"):
        lab.check_parameters(path, {"count": 3})


def test_an_unknown_notebook_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no notebook '99_nothing'; known: .*00_golden_rule"):
        lab.run_notebook("99_nothing")


def test_a_run_leaves_notebook_page_and_findings(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "print(f'count is {count}')",
        "from aprlab import lab\nlab.write_findings('sample', {'count': count, 'model': model}, out)",
    )
    run = lab.run_notebook(path, {"count": 8, "model": "m"}, tmp_path / "out")
    assert run.findings == {"notebook": "sample", "count": 8, "model": "m"}
    assert json.loads(run.report.read_text()) == run.findings
    assert "count is 8" in nbformat.read(run.notebook, 4).cells[2].outputs[0].text
    page = run.page.read_text()
    assert "count is 8" in page
    for fetched in ("<script src", "<link", "@import", "import(", "<iframe"):
        assert fetched not in page
    assert nbformat.read(path, 4).cells[1].outputs == []  # the source stays as it was


def test_a_failing_cell_leaves_its_notebook_and_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sample.json").write_text('{"stale": true}')
    path = write(tmp_path, "x = 1", "assert x == 2, 'one is not two'", "print('never')")
    with pytest.raises(lab.NotebookError, match="AssertionError: one is not two") as caught:
        lab.run_notebook(path, {}, out)
    assert caught.value.exit_code == 1
    assert "one is not two" in (out / "sample.ipynb").read_text()
    assert "one is not two" in (out / "sample.html").read_text()
    assert not (out / "sample.json").exists()


def test_a_notebook_without_findings_has_failed(tmp_path: Path) -> None:
    with pytest.raises(lab.NotebookError, match=r"wrote no sample\.json"):
        lab.run_notebook(write(tmp_path, "1 + 1"), {}, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), np.float32(1)])
def test_findings_are_plain_json(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        lab.write_findings("sample", {"x": value}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_no_findings_are_written() -> None:
    assert lab.write_findings("sample", {"x": 1}, "") is None
