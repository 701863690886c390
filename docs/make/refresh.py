"""Run the notebooks again in place and write the README's figure: `python docs/make/refresh.py [NOTEBOOK…]`.

Outputs are committed because nbval compares with them; timings, ids and versions are left out, so that a second run
changes nothing.
"""

from __future__ import annotations

import ast
import base64
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from aprlab import paths

WIDGET = "application/vnd.jupyter.widget-view+json"  # lives as long as its kernel
DOCS = Path(__file__).resolve().parents[1]


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs of a cell with neighbouring pieces of one stream joined: a slow machine cuts them in other places."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            whole.append(output)
    return whole


def collapse(cell: nbformat.NotebookNode, *, front: bool) -> None:
    """Imports, and the bookkeeping at the end, are closed to begin with: a click opens them. The front door shows no code."""
    statements = ast.parse(cell.source).body
    imports = all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements)
    if front or imports or cell.source.startswith(("checks ", "findings ")):
        cell.metadata["jupyter"] = {"source_hidden": True}


def run_in_place(path: Path) -> None:
    """Execute with the defaults; keep outputs and counts, drop what differs from run to run."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, kernel_name="python3", record_timing=False, timeout=600, store_widget_state=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            collapse(cell, front=path.stem == "index")
            cell.outputs = joined([output for output in cell.outputs if WIDGET not in output.get("data", {})])
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"  # as JupyterLab writes it
    nbformat.write(notebook, path)


def key_figure(notebook: Path) -> bytes:
    """The picture of the cell that is tagged `key-figure`, as PNG."""
    (cell,) = [c for c in nbformat.read(notebook, 4).cells if "key-figure" in c.metadata.get("tags", [])]
    (png,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(png)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)
    os.environ["TQDM_DISABLE"] = "1"
    for file in [Path(name) for name in sys.argv[1:]] or sorted(paths.notebooks_dir().glob("*.ipynb")):
        run_in_place(file)
    (DOCS / "where-it-breaks.png").write_bytes(key_figure(paths.notebooks_dir() / "index.ipynb"))
