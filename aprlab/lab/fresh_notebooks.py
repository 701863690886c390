"""A notebook to begin with, for what somebody has: two files, one file, or a sentence of garbage."""

from __future__ import annotations

import json
import re
from pathlib import PurePath

import nbformat

from aprlab.errors import UsageError
from aprlab.lab.notebooks import find_notebook

KINDS = ("two", "one", "garbage")

GARBAGE = """\
import aprlab
from aprlab.forensics.ranking import forensics

model = aprlab.open_model(MODEL)  # a healthy file of the same model
saw = ""  # what the broken program said, as much of it as there is
prompt = "What is 2+2?"  # what it was asked
forensics(model, saw, prompt=prompt) if saw else "put the sentence into `saw` and run the cell again"
"""


def fresh(kind: str, *, reference: str = "", candidate: str = "") -> tuple[str, str]:
    """A notebook without outputs as text, and a name for it without a suffix.

    Args:
        kind: ``two`` files, ``one`` file, or ``garbage``, a sentence.
        reference, candidate: paths to be filled in, as seen from the notebook's folder.

    Raises:
        UsageError: another kind.
    """
    if kind == "garbage":
        return _garbage(reference or candidate), "garbage"
    if kind not in KINDS:
        raise UsageError(f"a notebook for {kind!r}; there is one for: {', '.join(KINDS)}", code="lab.unknown-kind-of-notebook")
    notebook = nbformat.read(find_notebook("07_peel"), 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in (("reference", reference), ("candidate", candidate)):
                cell.source = cell.source.replace(f'\n{name}: str = ""', f"\n{name}: str = {_literal(value)}")
    stem = re.sub(r"[^\w.-]+", "_", PurePath(candidate or reference).stem)
    return nbformat.writes(notebook), f"peel-{stem}" if stem else f"peel-{kind}"


def _garbage(model: str) -> str:
    cells = [
        nbformat.v4.new_markdown_cell(
            "# Which bug says this sentence?\n\nEach fault of the catalogue is switched on in a healthy model and asked the same "
            "question; those whose words come nearest to what was seen come first."
        ),
        nbformat.v4.new_code_cell(GARBAGE.replace("MODEL", _literal(model) if model else "aprlab.embedded_model()", 1)),
    ]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}))


def _literal(text: str) -> str:
    """A Python string on one line, double-quoted as in the notebooks (JSON's escapes are Python's)."""
    return json.dumps(text, ensure_ascii=False)


__all__ = ["KINDS", "fresh"]
