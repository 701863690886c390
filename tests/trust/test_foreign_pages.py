"""Names, tokens, answers and paths from outside are text on every page that aprlab makes, whatever marks are in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CONFIG
from made import bpe_data, made_model, write_gguf

from aprlab.cli.app import run_cli
from aprlab.forensics.ranking import forensics
from aprlab.formats import open_model
from aprlab.gates.running import run as run_gates
from aprlab.lab import notebooks, sweeps
from aprlab.lab.notebooks import Step
from aprlab.lab.sweep_matrix import SweepCell
from aprlab.onion.peeling import peel
from aprlab.tracing import comparisons
from aprlab.tracing.traces import trace

ONE_LAYER = replace(CONFIG, block_count=1)
# Closes an attribute, a tag and a raw text, opens a tag of its own; a formula, Rich's markup, ANSI, a mark of direction.
HOSTILE = "\"'></script></style></textarea><pwn onpwn=1>&lt;$$x=1$$[b]\x1b[31m\u202e"
NAME = "'\"><pwn onpwn=1>&lt;$$x=1$$[b]\x1b[31m"  # as good a name of a file as any: no stroke


class Marks(HTMLParser):
    """What a browser would make of a page: its tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.words += [value or "" for name, value in attrs if name in ("title", "alt", "data-key", "aria-label")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def obeyed(page: str, shown: bool = True) -> list[str]:
    """What is wrong with a page: a foreign mark that is obeyed, or (where it must be there) not shown."""
    seen = Marks(page)
    found = [f"tag {tag}" for tag in seen.tags if tag.startswith("pwn")]
    found += [f"attribute {name}" for name in seen.attributes if name.startswith("on")]
    found += [f"link {link[:40]}" for link in seen.links if link.lower().startswith(("javascript:", "vbscript:"))]
    if shown and "<pwn onpwn=1>" not in "".join(seen.words):
        found.append("the foreign text is not there")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(NAME)


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """A file that runs: its name, its title, its tokens, its template and a part of its answers are hostile."""
    data = bpe_data("qwen2", extra=400)
    tokens = [f"{token}{HOSTILE}" if token.startswith("[PAD") else token for token in data.tokens]
    data = replace(data, tokens=tokens, chat_template="{{ messages[0]['content'] }}")
    return write_gguf(made_model(ONE_LAYER, data), folder / f"{NAME}.gguf", general__name=HOSTILE)


@pytest.fixture(scope="module")
def strange(folder: Path) -> Path:
    """A file with a tensor that nobody knows, under a hostile name."""
    model = made_model(ONE_LAYER)
    extra = model.tensors["blk.0.ffn_up.weight"]
    tensors = {**model.tensors, HOSTILE: extra.replace(name=HOSTILE)}
    return write_gguf(replace(model, tensors=tensors), folder / f"{NAME}2.gguf")


def test_the_check_sees_marks() -> None:
    """The mutants: a page that escapes nothing, one that forgets attributes, one that says nothing."""
    assert "tag pwn" in obeyed(f"<td>{HOSTILE}</td>")
    assert "attribute onpwn" in obeyed(f'<td title="{"x" + chr(34) + " onpwn=1 "}">&lt;pwn onpwn=1></td>')
    assert obeyed("<td>nothing</td>") == ["the foreign text is not there"]
    assert obeyed('<a href="JavaScript:1">x</a>', shown=False) == ["link JavaScript:1"]


# ── what a notebook shows ─────────────────────────────────────────────────────────────────────────────────────────


CARDS: dict[str, Callable[[Path, Path], Any]] = {
    "model": lambda runs, strange: open_model(strange),
    "tensor": lambda runs, strange: open_model(strange).tensors[HOSTILE],
    "models next to each other": lambda runs, strange: comparisons.compare_models(open_model(runs), open_model(strange)),
    "arrays": lambda runs, strange: comparisons.compare_arrays(np.arange(5.0), np.arange(5.0) + 1, HOSTILE),
    "verdict": lambda runs, strange: peel(None, strange, deadline=0),
    "verdict, two files": lambda runs, strange: peel(runs, strange),
    "verdict on an engine": lambda runs, strange: peel(runs, engines=["reference", "reference+rope-norm"]),
    "gates": lambda runs, strange: run_gates(runs, strange, ids=["F-APR-FORMAT-001", "I-2"]),
    "forensics": lambda runs, strange: forensics(runs, HOSTILE, faults=["rope-norm"], prompt="Hi"),
    "trace": lambda runs, strange: trace(open_model(runs), HOSTILE, raw=True),
}
# in these no foreign text has a place
SILENT = ("verdict on an engine", "gates", "trace")


@pytest.mark.parametrize("what", CARDS)
def test_cards(what: str, runs: Path, strange: Path) -> None:
    card = CARDS[what](runs, strange)
    assert obeyed(card._repr_html_(), shown=what not in SILENT) == []


# ── what the command line writes ──────────────────────────────────────────────────────────────────────────────────

VERBS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "peel": lambda runs, strange, out: ["peel", str(strange), "--deadline", "0", "--out", str(out)],
    "peel, two files": lambda runs, strange, out: ["peel", str(runs), str(strange), "--out", str(out)],
    "verify": lambda runs, strange, out: ["verify", str(runs), str(runs), "--out", str(out)],
}


@pytest.mark.parametrize("what", VERBS)
def test_reports(what: str, runs: Path, strange: Path, tmp_path: Path) -> None:
    assert run_cli(VERBS[what](runs, strange, tmp_path / NAME)) in (0, 3, 4)
    pages = list((tmp_path / NAME).rglob("*.html"))
    assert len(pages) == 1
    for page in pages:
        assert obeyed(page.read_text(encoding="utf-8")) == [], page.name
    for data in (tmp_path / NAME).rglob("*.json"):
        json.loads(data.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(word))


def _step(**changes: Any) -> Step:
    return Step(
        NAME, HOSTILE, {HOSTILE: False}, HOSTILE, HOSTILE, figure='"><pwn onpwn=1>', traceback=f"<b>{HOSTILE}", **changes
    )  # fmt: skip


def test_index_pages(tmp_path: Path) -> None:
    (tmp_path / "n.ipynb").write_text("{}")
    cell = SweepCell(tmp_path / "n.ipynb", {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}, NAME)
    for page in (
        notebooks.index_page([_step()], {HOSTILE: HOSTILE}),
        sweeps.index_page([sweeps.CellOutcome(cell, _step(), False)], 2, HOSTILE),
    ):
        assert obeyed(page) == []


def test_the_page_of_a_notebook(runs: Path, strange: Path, tmp_path: Path) -> None:
    """What cells print, raise and show, as `investigate` makes a page of it: text is text, a card's marks are escaped."""
    import nbformat

    verdict = peel(runs, strange)
    v4 = nbformat.v4
    error = v4.new_output("error", ename="E", evalue=HOSTILE, traceback=[f"\x1b[31m{HOSTILE}"])
    outputs = [
        v4.new_output("stream", name="stdout", text=HOSTILE), v4.new_output("stream", name="stderr", text=HOSTILE), error,
        v4.new_output("execute_result", data={"text/plain": str(verdict), "text/html": verdict._repr_html_()}),
        v4.new_output("display_data", data={"text/plain": HOSTILE}),
    ]  # fmt: skip
    cells = [v4.new_code_cell(f"x = {HOSTILE!r}", outputs=[output]) for output in outputs]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / f"{NAME}.ipynb")
    notebooks._write_page(tmp_path / f"{NAME}.ipynb", tmp_path / "page.html")
    assert obeyed((tmp_path / "page.html").read_text(encoding="utf-8")) == []


# ── widgets ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _pages_of(view: Any) -> str:
    """All HTML in a view: its own pages, and those of ipywidgets."""
    found, waiting = [], [view]
    while waiting:
        widget = waiting.pop()
        waiting += getattr(widget, "children", ())
        found += [getattr(widget, name) for name in ("html", "value") if isinstance(getattr(widget, name, None), str)
                  and "HTML" in type(widget).__name__ + "HTML" * hasattr(widget, "html")]  # fmt: skip
    return "\n".join(found)


def test_widgets(runs: Path, strange: Path) -> None:
    from aprlab import widgets

    tensors, blocks = widgets.tensor_browser(runs, strange), widgets.block_microscope(strange, tensor=HOSTILE)
    tensors.browser.work.wait()
    tensors.browser.choose(HOSTILE)
    onion = widgets.onion_explorer({HOSTILE: runs})
    onion.onion.choose(model=HOSTILE, candidate=str(strange), faults=(), prompt=HOSTILE)
    onion.onion.run()
    onion.onion.work.wait()
    traces = widgets.trace_explorer(runs, ["rope-norm"])
    traces.explorer.choose(prompt="Hi")
    traces.explorer.run()
    traces.explorer.work.wait()
    for view in (tensors, blocks, onion, traces):
        view.refresh()
        assert obeyed(_pages_of(view), shown=view is not traces) == [], type(view).__name__
