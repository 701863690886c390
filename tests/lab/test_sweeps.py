"""Sweeps: everything is checked before anything runs, what is done is not run again, failures stay visible."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from aprlab import lab, workers
from aprlab.cli.app import run_cli
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.lab import sweeps as sweep
from aprlab.lab.sweep_matrix import SweepCell

PARAMETERS = """\
model: str = ""  # file
fault: str = ""  # id
count: int = 3  # how many
loud: bool = False  # yes
out: str = ""  # folder"""
FINDINGS = """\
from aprlab import lab
if fault == "bad":
    raise ValueError(f"no {fault} ones")
lab.write_findings("sample", {"headline": f"{fault} it is", "checks": {"count < 5": count < 5}}, out)"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    notebook = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(FINDINGS)]
    notebook.cells = [new_markdown_cell("# A <sample>"), *cells]
    nbformat.write(notebook, tmp_path / "sample.ipynb")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "matrix.yaml"
    path.write_text(text)
    return path


def test_every_combination_in_order_but_for_the_excluded(folder: Path) -> None:
    (folder / "a.gguf").write_text("a")
    text = """\
notebooks: [sample.ipynb]
parameters: {loud: true}
matrix:
  model: ["", a.gguf]
  fault: [x, GH-191]
  count: [1, 2]
exclude:
  - {model: a.gguf, fault: x}
  - {count: 2, fault: GH-191}
"""
    cells = sweep.read_matrix(write(folder, text))
    points = [("", "x", 1), ("", "x", 2), ("", "GH-191", 1), ("a.gguf", "GH-191", 1)]
    assert [tuple(cell.axes.values()) for cell in cells] == points
    assert {cell.parameters["model"] for cell in cells} == {"", str(folder / "a.gguf")}
    assert all(cell.parameters["loud"] is True for cell in cells)
    assert len({cell.id for cell in cells}) == 4
    assert cells[3].id.startswith("sample_model=a_fault=GH-191_count=1_")
    assert [cell.id for cell in sweep.read_matrix(folder / "matrix.yaml")] == [cell.id for cell in cells]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("notebooks: [sample.ipynb]\nmatrxi:\n  count: [1]\n", "line 2: unknown key 'matrxi'; known: notebooks, parameters"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  cuont: [1]\n", "line 3: sample has no parameter 'cuont'; it has: model, fault"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count:\n    - 1\n    - '2'\n", "line 5: .*'count' must be int, got str"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: [1, true]\n", "line 3: .*'count' must be int, got bool"),
        ("notebooks: [sample.ipynb]\nparameters:\n  loud: 1\n", "line 3: .*'loud' must be bool, got int"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: 3\n", "line 3: 'count' must be a list of at least one value, not int"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: []\n", "line 3: 'count' must be a list"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  fault: [null]\n", "line 3: 'fault' must be a word or a number, not nothing"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  fault: [[a]]\n", "line 3: 'fault' must be a word or a number, not list"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  out: [x]\n", "line 3: 'out' is set by the sweep"),
        ("notebooks: [sample.ipynb]\nparameters: {count: 1}\nmatrix:\n  count: [1]\n", "line 4: 'count' is under"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  model: [a.gguf]\n", "line 3: there is no file 'a.gguf'"),
        ("notebooks:\n  - sample.ipynb\n  - 99_nothing\n", "line 3: there is no notebook '99_nothing'"),
        ("notebooks: [sample.ipynb, sample.ipynb]\n", "line 1: notebook 'sample.ipynb' again"),
        ("notebooks: sample.ipynb\n", "line 1: 'notebooks' must be a list"),
        ("matrix:\n  count: [1]\n", "line 1: 'notebooks' must be a list"),
        ("- sample.ipynb\n", "line 1: expected a mapping with notebooks"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: [1, 1]\n", "line 2: the same run twice"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: [1]\nexclude:\n  - {count: 2}\n", "line 5: excludes nothing"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: [1]\nexclude:\n  - {cuont: 1}\n", "line 5: 'cuont' is not an axis"),
        ("notebooks: [sample.ipynb]\nmatrix:\n  count: [1]\nexclude:\n  - {count: 1}\n", "nothing is left to run"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line_before_anything_runs(folder: Path, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        sweep.sweep(write(folder, text), folder / "out")
    assert not (folder / "out").exists()


def test_no_jobs_and_no_cluster_are_refused(folder: Path) -> None:
    matrix = write(folder, "notebooks: [sample.ipynb]\n")
    with pytest.raises(UsageError, match="jobs 0"):
        sweep.sweep(matrix, folder / "out", jobs=0)


def test_a_sweep_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = write(folder, "notebooks: [sample.ipynb]\nmatrix:\n  fault: [good, bad]\n")
    out = folder / "out"
    assert run_cli(["sweep", str(matrix), "--out", str(out)]) == 1
    assert [line[:5].strip() for line in capsys.readouterr().out.splitlines()[:2]] == ["yes", "NO"]
    good, bad = sweep.read_matrix(matrix)
    assert {path.name for path in (out / good.id).iterdir()} == {"sample.ipynb", "sample.html", "sample.json", "cell.json"}
    assert "no bad ones" in (out / bad.id / "sample.ipynb").read_text()  # a failing run leaves its notebook
    assert json.loads((out / bad.id / "cell.json").read_text())["failure"].endswith("ValueError: no bad ones")
    page = (out / "index.html").read_text()
    assert "1 of 2 runs hold" in page
    assert "good it is" in page
    assert page.count("<pre>") == 1
    assert "raise ValueError(f&quot;no {fault} ones&quot;)" in page  # the traceback
    assert "\x1b" not in page
    for link in (f"{good.id}/sample.json", f"{bad.id}/sample.html"):
        assert f'href="{sweep.quote(link)}"' in page
        assert (out / link).is_file()
    for fetched in ("<script", "<link", "@import", "http"):
        assert fetched not in page

    ran: list[str] = []

    def run_cell(cell: SweepCell) -> sweep.CellResult:
        ran.append(cell.id)
        files = {path.name: path.read_bytes() for path in (out / good.id).iterdir() if path.name != "cell.json"}
        return sweep.CellResult(cell.id, "", files)

    monkeypatch.setattr(sweep, "run_cell", run_cell)
    outcomes = sweep.sweep(matrix, out)
    assert ran == [bad.id]  # what failed is tried again, what is done is not
    assert [(outcome.skipped, outcome.holds) for outcome in outcomes] == [(True, True), (False, True)]
    assert all(outcome.skipped for outcome in sweep.sweep(matrix, out))
    assert ran == [bad.id]
    notebook = nbformat.read(folder / "sample.ipynb", 4)
    notebook.cells[2].source += "\n"
    nbformat.write(notebook, folder / "sample.ipynb")
    sweep.sweep(matrix, out)
    assert ran == [bad.id, good.id, bad.id]  # another notebook is another run
    assert sorted(path.name for path in out.iterdir()) == sorted(["index.html", good.id, bad.id])


def test_a_cell_changes_with_the_file_that_it_names(folder: Path) -> None:
    model = folder / "a.gguf"
    model.write_text("a")
    matrix = write(folder, "notebooks: [sample.ipynb]\nmatrix:\n  model: [a.gguf]\n")
    (before,) = sweep.read_matrix(matrix)
    key = before.key
    os.utime(model, ns=(1, 1))
    (after,) = sweep.read_matrix(matrix)
    assert after.id == before.id
    assert after.key != key


def test_what_changes_while_it_runs_is_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_cell(cell: SweepCell) -> sweep.CellResult:
        source = cell.notebook.read_bytes()
        if not ran:
            cell.notebook.write_bytes(source + b"\n")  # saved by somebody in the middle of the run
        ran.append(cell.id)
        return sweep.CellResult(cell.id, "", {"sample.ipynb": source, "sample.json": b'{"checks": {"a": true}}'})

    monkeypatch.setattr(sweep, "run_cell", run_cell)
    matrix = write(folder, "notebooks: [sample.ipynb]\n")
    assert [[o.skipped for o in sweep.sweep(matrix, folder / "out")] for _ in range(3)] == [[False], [False], [True]]
    assert len(ran) == 2


def test_a_cell_runs_alone_in_its_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[bool] = []

    def run(notebook: Path, parameters: object, out: Path) -> None:
        out.mkdir()
        alone.append(sweep._ALONE.locked())

    monkeypatch.setattr("aprlab.lab.notebooks.run_notebook", run)
    (cell,) = sweep.read_matrix(write(folder, "notebooks: [sample.ipynb]\n"))
    assert sweep.run_cell(cell, threads=1).failure == ""
    assert alone == [True]
    assert not sweep._ALONE.locked()


def test_a_killed_process_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Pool:
        def __init__(self, *args: object, **options: object) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None: ...

        def submit(self, *args: object) -> Future:
            future: Future = Future()
            future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
            return future

        def shutdown(self, **options: object) -> None: ...

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    matrix = write(folder, "notebooks: [sample.ipynb]\nmatrix:\n  fault: [good, bad]\n")
    with pytest.raises(AprlabError, match="a worker process was killed; run again"):
        sweep.sweep(matrix, folder / "out", jobs=2)
    assert run_cli(["sweep", str(matrix), "--out", str(folder / "out"), "--jobs", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("aprlab: a worker process was killed")


def check_two(outcomes: list[sweep.CellOutcome], out: Path) -> None:
    assert [outcome.cell.axes["fault"] for outcome in outcomes] == ["good", "bad"]
    assert [outcome.holds for outcome in outcomes] == [True, False]
    assert "ValueError: no bad ones" in outcomes[1].step.failure
    assert "ValueError" in outcomes[1].step.traceback
    assert "1 of 2 runs hold" in (out / "index.html").read_text()


def test_two_processes(folder: Path) -> None:
    matrix = write(folder, "notebooks: [sample.ipynb]\nmatrix:\n  fault: [good, bad]\n")
    check_two(sweep.sweep(matrix, folder / "out", jobs=2), folder / "out")


def test_a_dask_cluster_of_two_workers(folder: Path) -> None:
    distributed = pytest.importorskip("distributed")
    matrix = write(folder, "notebooks: [sample.ipynb]\nmatrix:\n  fault: [good, bad]\n")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        outcomes = sweep.sweep(matrix, folder / "out", scheduler=cluster.scheduler_address)
    check_two(outcomes, folder / "out")


def test_a_scheduler_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    matrix = write(folder, "notebooks: [sample.ipynb]\n")
    with pytest.raises(UsageError, match="no Dask scheduler at 'nonsense://"):
        sweep.sweep(matrix, folder / "out", scheduler="nonsense://here:1")


def test_a_step_is_read_from_what_a_run_left(folder: Path) -> None:
    picture = nbformat.v4.new_output("display_data", {"image/png": "Zmlyc3Q=\n", "text/plain": "<Figure>"})
    other = nbformat.v4.new_output("display_data", {"image/png": "a2V5", "text/plain": "<Figure>"})
    notebook = nbformat.read(folder / "sample.ipynb", 4)
    notebook.cells += [new_code_cell("1", outputs=[picture]), new_code_cell("2", outputs=[other])]
    nbformat.write(notebook, folder / "sample.ipynb")
    assert lab.read_step("sample", folder).figure == "Zmlyc3Q="
    notebook.cells[-1].metadata["tags"] = ["key-figure"]
    nbformat.write(notebook, folder / "sample.ipynb")
    step = lab.read_step("sample", folder)
    assert (step.figure, step.title, step.checks, step.traceback) == ("a2V5", "A <sample>", {}, "")
    assert 'src="data:image/png;base64,a2V5"' in lab.section(step)
