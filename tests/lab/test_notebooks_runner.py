"""The notebook runner: strict about parameters, honest about failures."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import nbclient.exceptions
import nbformat
import numpy as np
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import aprlab.lab
from aprlab import gates, paths
from aprlab.cli.app import run_cli
from aprlab.errors import UsageError
from aprlab.lab import notebooks as lab
from aprlab.lab import sweeps as sweep

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
        ({"count": "5"}, "'count' must be int, got str"),
        ({"count": True}, "'count' must be int, got bool"),
        ({"count": 2.0}, "'count' must be int, got float"),
        ({"loud": 1}, "'loud' must be bool, got int"),
        ({"count": np.int64(5)}, "'count' must be int, got int64"),
        ({"scale": np.float64(5)}, "'scale' must be float, got float64"),
        ({"model": Path("a")}, "'model' must be str"),
        ({"model": None}, "'model' must be str, got NoneType"),
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


def test_a_notebook_is_never_replaced_by_its_own_report(tmp_path: Path) -> None:
    path = write(tmp_path, "1 + 1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample.ipynb").symlink_to(path)
    for out in (tmp_path, tmp_path / "out"):
        with pytest.raises(UsageError, match="would replace the notebook itself"):
            lab.run_notebook(path, {}, out)
    assert nbformat.read(path, 4).cells[1].source == "1 + 1"


def test_a_kernel_that_dies_is_a_failure_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(source: str, executed: str, **options: object) -> None:
        Path(executed).write_text(Path(source).read_text())
        raise nbclient.exceptions.DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(lab, "_write_page", lambda executed, page: None)
    with pytest.raises(lab.NotebookError, match="the kernel ended: Kernel died"):
        lab.run_notebook(write(tmp_path, "1 + 1"), {}, tmp_path / "out")


def test_reports_are_written_whole_or_not_at_all() -> None:
    for module in (lab, sweep, gates):
        assert not re.search(r"\.write_text\(|\.read_text\(\)", inspect.getsource(module)), module.__name__


def test_a_folder_for_reports_that_cannot_be(tmp_path: Path) -> None:
    assert lab.reports_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be a folder for reports: File exists"):
        lab.reports_folder(tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), np.float32(1)])
def test_findings_are_plain_json(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        lab.write_findings("sample", {"x": value}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_no_findings_are_written() -> None:
    assert lab.write_findings("sample", {"x": 1}, "") is None


# -- the walk ----------------------------------------------------------------------------------------------------------


def write_as(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    write(folder, *cells, parameters=parameters).rename(folder / f"{name}.ipynb")
    notebook = nbformat.read(folder / f"{name}.ipynb", 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"# All about <{name}>\n\nand more"))
    nbformat.write(notebook, folder / f"{name}.ipynb")


FINDINGS = "from aprlab import lab\nlab.write_findings('{name}', {{'checks': {{'count < 5': count < 5}}}}, out)"


def test_a_walk_goes_on_after_a_failure_and_indexes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rest in (("a", ["assert count < 5, 'too many'"]), ("b", [])):
        write_as(tmp_path, name, FINDINGS.format(name=name), *rest)
    write_as(tmp_path, "c", "1 / 0", parameters='out: str = ""\nfault: str = ""')
    monkeypatch.setattr(lab.paths, "notebooks_dir", lambda: tmp_path)
    seen: list[str] = []
    steps = lab.walk((), {"count": 9}, tmp_path / "out", optional={"nobody": 1}, on_step=lambda step: seen.append(step.name))
    assert seen == [step.name for step in steps] == ["a", "b", "c"]
    assert [step.verdict for step in steps[:2]] == ["failed: cell 4 failed: AssertionError: too many", "0 of 1 checks hold"]
    assert "ZeroDivisionError" in steps[2].failure
    assert not any(step.holds for step in steps)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "0 of 3 notebooks hold" in page
    assert page.count("does not hold:</b> count &lt; 5") == 2
    assert page.count("<pre>") == 2  # the tracebacks of those that failed
    assert "division by zero" in page
    assert "\x1b" not in page
    assert "All about &lt;a&gt;" in page
    assert "<h1>the embedded model</h1><p><strong>0 of 3 notebooks hold</strong></p>" in page
    assert re.search(r"<p>\d{4}-\d\d-\d\d · aprlab [\d.]+\S*, Python [\d.]+\S*, NumPy", page)
    assert '<li><a href="#b">All about &lt;b&gt;</a>: 0 of 1 checks hold</li>' in page
    assert page.count('<section id="') == 3
    for link in ("a.html", "b.json", "c.ipynb"):
        assert f'href="{link}"' in page
        assert (tmp_path / "out" / link).is_file()
    for fetched in ("<script", "<link", "@import", "http"):
        assert fetched not in page


def test_a_walk_with_an_unknown_parameter_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as(tmp_path, "a", "1 / 0")
    monkeypatch.setattr(lab.paths, "notebooks_dir", lambda: tmp_path)
    for names, parameters, message in (
        (["a"], {"cuont": 3}, "has a parameter 'cuont'; they have: count, loud, model, out, scale"),
        (["a"], {"count": "3"}, "must be int"),
        (["a", "z"], {}, "no notebook 'z'"),
    ):
        with pytest.raises(UsageError, match=message):
            lab.walk(names, parameters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_walk_takes_a_notebook_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, parameters: object, out: Path, *, progress: bool) -> None:
        (out / "sample.ipynb").write_text(Path(name).read_text())
        lab.write_findings("sample", {"checks": {"it ran": True}}, out)

    monkeypatch.setattr(lab, "run_notebook", run)
    (tmp_path / "out").mkdir()
    (step,) = lab.walk([str(write(tmp_path, "1 + 1"))], {}, tmp_path / "out")
    assert (step.name, step.holds) == ("sample", True)
    assert 'href="sample.html"' in (tmp_path / "out" / "index.html").read_text()


def test_a_walk_that_holds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as(tmp_path, "b", FINDINGS.format(name="b"))
    monkeypatch.setattr(lab.paths, "notebooks_dir", lambda: tmp_path)
    (step,) = lab.walk(["b"], {}, tmp_path / "out")
    assert (step.holds, step.verdict, step.title) == (True, "1 of 1 checks hold", "All about <b>")
    assert "<strong>1 of 1 checks hold</strong>" in (tmp_path / "out" / "index.html").read_text()


def test_investigate_with_a_fault_or_a_candidate_is_notebook_07_or_07b(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    asked: list[tuple[list[str], dict[str, object]]] = []

    def walk(names: list[str], parameters: dict[str, object], out: Path, **options: object) -> list[lab.Step]:
        asked.append((list(names), dict(parameters)))
        return []

    monkeypatch.setattr(aprlab.lab, "walk", walk)
    for options in (["--fault", "gh-191,lost-v-biases"], ["--candidate", str(tiny)],
                    ["--model", str(tiny), "--candidate", str(tiny)], [], ["--only", "02_dtype,04_forward_pass"]):
        assert run_cli(["investigate", "--out", str(tmp_path), *options]) == 0
    assert asked == [
        (["07_peel"], {"fault": "GH-191,lost-v-biases"}),
        (["07b_one_file"], {"candidate": str(tiny), "fault": ""}),
        (["07_peel"], {"model": str(tiny), "candidate": str(tiny), "fault": ""}),
        (["00_golden_rule"], {}),
        (["02_dtype", "04_forward_pass"], {}),
    ]
    for options, message in (
        (["--fault", "GH-19O"], "unknown fault"),
        (["--fault", "GH-191", "--candidate", str(tiny)], "which of them"),
        (["--candidate", "none.apr"], "there is no such file"),
        (["--only", ""], "names no notebook"),
        (["--only", " ,"], "names no notebook"),
    ):
        assert run_cli(["investigate", *options]) == 2
        assert message in capsys.readouterr().err
    assert len(asked) == 5


@pytest.mark.parametrize("value", ["many", 3.5, True, None])
def test_a_parameter_of_another_type_is_refused_in_the_notebook_itself(value: object) -> None:
    """papermill puts a cell behind the parameters; whatever it holds, the next cell says what is wrong in one line."""
    scope: dict[str, object] = {}
    exec(compile('tokens: int = 12  # how many\nshare: float = 0.5\nname: str = ""', "cell", "exec", dont_inherit=True), scope)
    lab.check_types(scope)
    scope["share"] = 1
    lab.check_types(scope)
    scope["tokens"] = value
    with pytest.raises(UsageError, match=f"parameter 'tokens' must be int, got {type(value).__name__}"):
        lab.check_types(scope)


def test_every_notebook_checks_its_parameters_before_it_works() -> None:
    for path in paths.notebooks_dir().glob("*.ipynb"):
        sources = [cell["source"] for cell in nbformat.read(path, 4).cells if cell["cell_type"] == "code"]
        working = [s for s in sources[1:] if not all(line.startswith(("import ", "from ")) for line in s.splitlines() if line)]
        assert working[0].startswith("lab.check_types(globals())\n"), path.name
