"""Write `docs/gallery`: the key figure of each notebook, small, with its title and a link: `python docs/make/gallery.py`.

The figures come out of the committed notebooks, so run it after `docs/make/refresh.py`; `tests/lab/test_gallery.py` compares.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from PIL import Image

from aprlab import paths

FOLDER = Path(__file__).resolve().parents[1] / "gallery"
WIDTH = 480  # pixels of a thumbnail
HEAD = """\
# Gallery

One figure of every notebook, as committed; a click opens the notebook. Larger, with all the prose: `aprlab lab`, or the pages
that `aprlab investigate --all` leaves in `reports/`. Made by `python docs/make/gallery.py`.

| | |
|---|---|
"""


@dataclass(frozen=True)
class Entry:
    """One notebook: its file, its first heading, what the index says of it, its figure as PNG."""

    name: str
    title: str
    words: str
    figure: bytes

    @property
    def stamp(self) -> str:
        """Of the figure, so that an old thumbnail is seen to be old."""
        return hashlib.sha256(self.figure).hexdigest()[:12]

    def line(self) -> str:
        """Its row of the page."""
        picture = f"[![{self.title}]({self.name}.png)](../../notebooks/{self.name}.ipynb)"
        return f"| {picture} | **[{self.title}](../../notebooks/{self.name}.ipynb)**<br>{self.words} <!-- {self.stamp} --> |\n"


def entries(folder: Path) -> Iterator[Entry]:
    """The notebooks that draw, in the order of the index, which comes first."""
    index = nbformat.read(folder / "index.ipynb", 4)
    text = "".join(cell.source for cell in index.cells if cell.cell_type == "markdown")
    rows = re.findall(r"\]\((\w+)\.ipynb\) \| (.+?) \|", text[text.index("## The notebooks") :])
    for name, words in [("index", "the front door: one model, converted six times"), *rows]:
        notebook = nbformat.read(folder / f"{name}.ipynb", 4)
        figure = _figure(notebook)
        if figure:
            title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
            yield Entry(name, title, words, figure)


def _figure(notebook: nbformat.NotebookNode) -> bytes:
    """Of the cell tagged `key-figure`, else the first; empty where nothing is drawn."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for some in ([cell for cell in cells if "key-figure" in cell.metadata.get("tags", [])], cells):
        for cell in some:
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output["data"]["image/png"])
    return b""


def thumbnail(figure: bytes) -> bytes:
    """A figure at `WIDTH`, in 256 colours."""
    picture = Image.open(io.BytesIO(figure)).convert("RGB")
    small = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    small.quantize(256, dither=Image.Dither.NONE).save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue()


def page(found: list[Entry]) -> str:
    """The Markdown page."""
    return HEAD + "".join(entry.line() for entry in found)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    found = list(entries(paths.notebooks_dir()))
    for old in FOLDER.glob("*.png"):
        old.unlink()
    for entry in found:
        (FOLDER / f"{entry.name}.png").write_bytes(thumbnail(entry.figure))
    (FOLDER / "README.md").write_text(page(found))
