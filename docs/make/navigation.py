"""Write the line of links at the end of each notebook's first cell: `python docs/make/navigation.py`.

The order is that of the table in `notebooks/index.ipynb`.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

from aprlab import paths

MARK = "\n\n---\n"


def order(folder: Path) -> list[str]:
    """File names in the order of the index, which comes first."""
    text = "".join(cell.source for cell in nbformat.read(folder / "index.ipynb", 4).cells if cell.cell_type == "markdown")
    table = text[text.index("## The notebooks") :]
    return ["index.ipynb", *re.findall(r"\]\((\w+\.ipynb)\)", table)]


def title(name: str) -> str:
    """What the index calls it: number and subject."""
    return Path(name).stem.replace("_", " ")


def line(names: list[str], n: int) -> str:
    """Start, the one before, the one after."""
    before = [f"before: [{title(names[n - 1])}]({names[n - 1]})"] if n > 1 else []
    after = [f"next: [{title(names[n + 1])}]({names[n + 1]})"] if n + 1 < len(names) else []
    start = ["[Start here](index.ipynb)"] if n else []
    return " · ".join([*start, *before, *after])


def main(folder: Path) -> None:
    """Every notebook of the index; outputs stay as they are."""
    names = order(folder)
    for n, name in enumerate(names):
        notebook = nbformat.read(folder / name, 4)
        first = notebook.cells[0]
        first.source = first.source.split(MARK)[0] + MARK + line(names, n)
        nbformat.write(notebook, folder / name)


if __name__ == "__main__":
    main(paths.notebooks_dir())
