"""Exercises: patients that peel names, answers that are checked, sources that tell nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from pages import page_script

from aprlab import paths
from aprlab.errors import UsageError
from aprlab.faults import FAULTS
from aprlab.lab import exercises

FOLDER = paths.notebooks_dir() / "exercises"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_neither_the_source_nor_the_notebooks_name_a_solution() -> None:
    texts = [Path(exercises.__file__).read_text(), *(path.read_text() for path in NOTEBOOKS)]
    solutions = {fault.id for number in exercises.FORMS for fault in exercises.pool(number)}
    assert len(solutions) > 12
    for text in texts:
        assert not [id for id in solutions if re.search(rf"(?<![\w-]){re.escape(id)}(?![\w-])", text)]


def test_another_seed_may_be_another_fault_and_the_same_one_never_is() -> None:
    for number in exercises.FORMS:
        chosen = [exercises.chosen(number, seed).id for seed in range(30)]
        assert chosen == [exercises.chosen(number, seed).id for seed in range(30)]
        assert set(chosen) == {fault.id for fault in exercises.pool(number)}
        for id in chosen:
            assert exercises.digest(number, id) != exercises.digest(number % 5 + 1, id)


def test_a_patient_is_asked_named_and_answered(tmp_path: Path) -> None:
    patient = exercises.exercise(2, folder=tmp_path)
    fault = exercises.chosen(2, 1)
    said = patient.ask()
    assert said["reference"] == "2 + 2 equals 4." != said["candidate"]
    assert fault.id not in {path.stem for path in tmp_path.iterdir()}
    assert fault.id in patient.pair.named(patient.peel())
    right, none = patient.check(fault.id), patient.check(" ")
    assert (right.right, none.right) == (True, None)
    wrong = next(id for id, each in FAULTS.items() if each.layer != fault.layer and each.instrument is None)
    assert patient.check(wrong) == exercises.AnswerCheck(False, f"{wrong}: no. Another layer.")
    assert "✗" in patient.check(wrong)._repr_html_()
    with pytest.raises(UsageError, match="unknown fault"):
        patient.check("no-such-fault")


def test_hints_open_one_inside_the_other_and_do_not_tell(tmp_path: Path) -> None:
    patient = exercises.exercise(5, folder=tmp_path)
    page = patient.hints._repr_html_()
    assert page.count("<details") == len(patient.hints.hints) == 3
    assert page.endswith("</details></details></details>")
    places = [page.index(f"hint {n} of 3") for n in (1, 2, 3)]
    assert places == sorted(places)
    for number in exercises.FORMS:
        for fault in exercises.pool(number):
            assert fault.id not in fault.mark


def test_there_are_five() -> None:
    with pytest.raises(UsageError, match="exercise 6: there are 1, 2, 3, 4, 5"):
        exercises.exercise(6, folder="")
    assert [int(path.stem[0]) for path in NOTEBOOKS] == sorted(exercises.FORMS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_are_stripped_short_and_linked(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    links = re.findall(r"\]\(([^)]+\.ipynb)\)", notebook.cells[0].source)
    assert links[0] == "../index.ipynb"
    assert all((FOLDER / link).is_file() for link in links)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"]
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert len(cell.source.splitlines()) <= 15
        ast.parse(cell.source)
    assert f'lab.write_findings("{path.stem}"' in code[-1].source


def test_the_notebooks_are_what_the_program_writes() -> None:
    made = page_script("exercises")
    for n, path in enumerate(NOTEBOOKS):
        assert nbformat.read(path, 4) == made.notebook(n)
