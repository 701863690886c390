"""The committed notebooks are sound artefacts, and nbval would notice if they were not.

nbval compares only what is there: stripped outputs, a figure replaced by another, a misspelt tag or a rule of the
sanitiser without a replacement all pass in silence. So they are looked at here.
"""

from __future__ import annotations

import ast
import base64
import configparser
import copy
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import papermill
import pytest
from pages import script
from PIL import Image, ImageDraw

from aprlab import paths
from aprlab.lab import notebooks as lab

FOLDER = paths.notebooks_dir()
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TAGS = {"parameters", "key-figure", "nbval-ignore-output", "nbval-skip", "raises-exception"}
SAMPLES = {
    "address": "<function f at 0x7f0a1b2c3d4e>",
    "temporary-folder": "/tmp/aprlab-k3_9x.z/model.apr",
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell printed or returned, as text."""
    streams = [output.text for output in cell.outputs if output.output_type == "stream"]
    return streams + [output.data.get("text/plain", "") for output in cell.outputs if "data" in output]


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "00_golden_rule", "01_naming", "02_dtype", "03_q4k_kernel", "03b_third_layer", "03c_kernel_cost", "04_forward_pass",
        "05_instruments", "06_ticket_revisited", "07_peel", "07b_one_file", "08_qualification", "09_your_engine",
        "10_open_cases", "index",
    ]  # fmt: skip


def test_the_front_door_lists_every_notebook_and_the_readme_shows_its_picture() -> None:
    front = nbformat.read(FOLDER / "index.ipynb", 4)
    links = set(re.findall(r"\]\(([^)]+)\)", "".join(cell.source for cell in front.cells)))
    assert {path.name for path in NOTEBOOKS} - {"index.ipynb"} <= links
    assert all((FOLDER / link).exists() for link in links)
    (cell,) = [cell for cell in front.cells if "key-figure" in cell.metadata.get("tags", [])]
    (png,) = [output.data["image/png"] for output in cell.outputs if "data" in output]
    assert (FOLDER.parent / "docs" / "where-it-breaks.png").read_bytes() == base64.b64decode(png)


def test_each_notebook_leads_to_the_next_and_back() -> None:
    """As `docs/make/navigation.py` writes it, in the order of the front door's table."""
    text = "".join(cell.source for cell in nbformat.read(FOLDER / "index.ipynb", 4).cells if cell.cell_type == "markdown")
    order = ["index.ipynb", *re.findall(r"\]\((\w+\.ipynb)\)", text[text.index("## The notebooks") :])]
    for n, name in enumerate(order):
        links = re.findall(r"\]\((\w+\.ipynb)\)", nbformat.read(FOLDER / name, 4).cells[0].source.split("\n---\n")[-1])
        assert links == [*order[:1][: int(n > 0)], *order[max(n - 1, 1) : n], *order[n + 1 : n + 2]], name


def test_valid_small_and_run_from_top_to_bottom(path: Path, notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    shown = [cell for cell in cells if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    assert len(outputs) >= len(shown) // 2, "a notebook without outputs is compared with nothing"
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_outputs_say_nothing_about_the_machine(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        for text in texts(cell):
            assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users|var|opt)\b", text), text
            assert not re.search(r"\bat 0x[0-9a-f]{6,}", text), text  # as in `<f at 0x…>`; code may hold other numbers
            assert not re.search(r"\d\s?(s|ms|seconds|tokens/s)\b", text), text


def test_every_figure_is_there(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        drawn = "image/png" in {kind for output in cell.outputs for kind in output.get("data", {})}
        assert drawn == bool(re.search(r"(?<![\w.])figures\.\w+\(", cell.source)), cell.source


def test_every_figure_is_live_and_has_the_size_of_the_screen(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                size = output.metadata["image/png"]
                assert abs(picture.width - 2 * size["width"]) <= 1 and abs(picture.height - 2 * size["height"]) <= 1
                live = output.data["application/vnd.aprlab.figure+json"]
                words = output.data["text/plain"]
                titles = {axes["title"] for axes in live["axes"]}
                assert live["version"] == 1 and titles, cell.source
                assert all(title in words.replace("\\'", "'") for title in titles), cell.source


def test_imports_and_bookkeeping_are_closed_to_begin_with(path: Path, notebook: nbformat.NotebookNode) -> None:
    """As `docs/make/refresh.py` sets it; the front door shows no code at all."""
    for cell in code_cells(notebook):
        imports = all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in ast.parse(cell.source).body)
        closed = path.stem == "index" or imports or cell.source.startswith(("checks ", "findings "))
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == closed, cell.source


def test_cells_are_short_and_tags_are_known(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 15, cell.source
            assert "%" not in cell.source.lstrip()[:1], "magics are not Python"


def test_parameters_are_literals_with_type_and_comment(path: Path, notebook: nbformat.NotebookNode) -> None:
    (cell,) = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    declared = papermill.inspect_notebook(str(path))
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.AnnAssign)
        ast.literal_eval(statement.value)
        assert statement.annotation.id in lab.TYPES
        assert declared[statement.target.id]["help"], f"{statement.target.id} has no comment"
    assert {"model", "out"} <= declared.keys()


def test_it_ends_in_a_check_and_writes_its_findings(path: Path, notebook: nbformat.NotebookNode) -> None:
    last = code_cells(notebook)[-1].source
    assert isinstance(ast.parse(last).body[-1], ast.Assert)
    assert f'lab.write_findings("{path.stem}"' in last


def test_it_is_explained_in_prose(notebook: nbformat.NotebookNode) -> None:
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert words > 10 * len(code_cells(notebook))
    assert notebook.cells[0].source.startswith("# ")


def test_every_rule_of_the_sanitiser_bites() -> None:
    rules = configparser.ConfigParser()
    rules.read(FOLDER / "sanitize.cfg")
    assert set(rules.sections()) == set(SAMPLES)
    for name in rules.sections():
        assert rules[name]["replace"].strip(), f"nbval drops {name} in silence: its replacement is empty"
        assert re.search(rules[name]["regex"], SAMPLES[name]), name


@pytest.fixture(scope="module")
def comparing() -> ModuleType:
    """The notebooks' own `conftest.py`: what nbval compares with."""
    return script(FOLDER / "conftest.py")


class Cell:
    """As much of nbval's cell as its comparison asks for; it runs nothing."""

    skip_compare = ("metadata", "output_type", "name", "execution_count", "image/png")
    parent = property(lambda self: self)

    def __init__(self) -> None:
        self.colors = SimpleNamespace(FAIL="", ENDC="", OKBLUE="", OKGREEN="")
        self.comparison_traceback: list[str] = []

    def sanitize(self, text: str) -> str:
        return text

    def format_output_compare(self, *_: object) -> None:
        pass


def corruptions(outputs: list[nbformat.NotebookNode]) -> Iterator[tuple[str, list[nbformat.NotebookNode]]]:
    """Each output of a cell with one thing changed: a digit of its text, of its table, its picture's ink."""
    for n, output in enumerate(outputs):
        kinds = ["text"] if output.output_type == "stream" else [k for k in output.data if k in {*LOOKS, "text/plain"}]
        for kind in kinds:
            other = copy.deepcopy(outputs)
            if kind == "text":
                other[n].text = another_word(output.text)
            else:
                other[n].data[kind] = LOOKS.get(kind, another_word)(output.data[kind])
            yield kind, other


def another_word(text: str) -> str:
    digits = list(re.finditer(r"\d", text)) or list(re.finditer(r"\w", text))
    at = digits[-1].start()
    return text[:at] + ("7" if text[at] != "7" else "3") + text[at + 1 :]


def another_number_in_a_table(page: str) -> str:
    """The last digit between two tags, or the last letter of a table of words; attributes are not what a reader sees."""
    (*_, last) = re.finditer(r">[^<]*?(\d)[^<\d]*<", page) if re.search(r">[^<]*\d", page) else re.finditer(r"(\w)<", page)
    at = last.start(1)
    return page[:at] + ("7" if page[at] != "7" else "3") + page[at + 1 :]


def another_picture(png: str) -> str:
    """The same page with a black bar over a twentieth of it: a bar or a curve that was not there."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    width, height = picture.size
    picture.paste("black", (width // 3, height // 3, width // 3 + width // 10, height // 3 + height // 2))
    picture.save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


LOOKS = {"text/html": another_number_in_a_table, "image/png": another_picture}


def test_one_changed_number_or_picture_in_any_output_is_red(comparing: ModuleType, notebook: nbformat.NotebookNode) -> None:
    cell, tried = Cell(), Counter[str]()
    for source in code_cells(notebook):
        if not source.outputs or "nbval-ignore-output" in source.metadata.get("tags", []):
            continue
        assert comparing.compare_all(cell, source.outputs, source.outputs), source.source
        for kind, corrupted in corruptions(source.outputs):
            assert not comparing.compare_all(cell, corrupted, source.outputs), (kind, source.source)
            tried[kind] += 1
    assert tried["text"] + tried["text/plain"] >= 2


def test_a_picture_drawn_with_another_font_version_is_the_same(comparing: ModuleType) -> None:
    """Moved by one pixel, and a little paler: what a minor version of a library may do."""
    page = Image.new("L", (900, 400), 255)
    draw = ImageDraw.Draw(page)
    draw.text((100, 100), "a label of some length", fill=0)
    draw.line((50, 300, 850, 320), fill=80, width=2)
    moved = Image.new("L", page.size, 255)
    moved.paste(page, (1, 0))
    encoded = []
    for picture in (page, moved):
        picture.save(file := io.BytesIO(), "PNG")
        encoded.append(base64.b64encode(file.getvalue()).decode())
    assert comparing.look_alike(*encoded)


def _with_a_wrong_number(corruption: str) -> nbformat.NotebookNode:
    """The beginning of 00 with one figure of one output changed."""
    notebook = copy.deepcopy(nbformat.read(FOLDER / "00_golden_rule.ipynb", 4))
    stop = next(n for n, cell in enumerate(notebook.cells) if "convert(" in cell.source and cell.cell_type == "code")
    notebook.cells = notebook.cells[: stop + 1]
    (output,) = notebook.cells[stop].outputs
    if corruption == "text":
        changed = output.text.replace("49 tensors in", "48 tensors in")
        assert changed != output.text
        output.text = changed
    else:
        notebook.cells[stop].outputs = [*notebook.cells[stop].outputs]
        notebook.cells[stop].source += "\nfrom IPython.display import HTML, display\ndisplay(HTML('<b>1.23 MB</b>'))"
        data = {"text/html": "<b>4.56 MB</b>", "text/plain": "<IPython.core.display.HTML object>"}
        notebook.cells[stop].outputs.append(nbformat.v4.new_output("display_data", data))
    return notebook


def test_nbval_turns_red_for_a_wrong_number(tmp_path: Path) -> None:
    """Run by nbval itself: in each notebook the last cell fails, and no other."""
    last = {}
    for corruption in ("text", "html"):
        notebook = _with_a_wrong_number(corruption)
        nbformat.write(notebook, tmp_path / f"{corruption}.ipynb")
        last[corruption] = len(code_cells(notebook)) - 1
    for name in ("conftest.py", "sanitize.cfg"):
        shutil.copy(FOLDER / name, tmp_path)
    options = ["--nbval", "--nbval-sanitize-with", "sanitize.cfg", "-p", "no:cacheprovider", "-q", "-rf"]
    command = [sys.executable, "-m", "pytest", *options, *(f"{name}.ipynb" for name in last)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    failed = re.findall(r"^FAILED (\w+)\.ipynb::Cell (\d+)", done.stdout, re.M)
    assert failed == [(name, str(cell)) for name, cell in last.items()], done.stdout
