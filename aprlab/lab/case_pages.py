"""The page of a case: conclusion and figure, what was compared, then the cells of the notebook; nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import nbformat

from aprlab.display.html import facts as facts_line
from aprlab.display.html import size, table
from aprlab.display.page import REPORT_STYLE, page
from aprlab.lab.live_pages import figure_html


def case_page(notebook: nbformat.NotebookNode, facts: Mapping[str, Any]) -> str:
    """One page of HTML.

    Args:
        notebook: executed, of `case_notebooks`.
        facts: what case.json has.
    """
    head = f"<h1>{html.escape(facts['title'])}</h1><p><strong>{html.escape(facts['conclusion'])}</strong></p>"
    files = [[each["role"], each["name"], size(each["bytes"]), each["sha256"]] for each in facts["files"]]
    cells = [part for cell in notebook.cells if cell.cell_type == "code" for part in _cell(cell)]
    first = next((n for n, part in enumerate(cells) if "<img" in part), 0)
    telling, rest = cells[first : first + 1], [*cells[:first], *cells[first + 1 :]]
    commands = "".join(f"<pre>{html.escape(line)}</pre>" for line in facts["commands"])
    made = facts_line({"made": facts["made"], **facts["versions"], **facts["environment"]})
    return page(
        f"aprlab: {facts['title']}", head, *telling, table(("", "file", "size", "SHA-256"), files), commands, made,
        "<h2>The notebook</h2>", *rest, style=f"{REPORT_STYLE}b{{color:inherit}}",
    )  # fmt: skip


def _cell(cell: nbformat.NotebookNode) -> list[str]:
    """The parts of a cell: its code, folded, and what it gave out."""
    parts = [f"<details><summary>code</summary><pre>{html.escape(cell.source)}</pre></details>"]
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            parts.append(f"<pre>{html.escape(output.text)}</pre>")
        elif "image/png" in data:
            parts.append(figure_html(output, live=False))
        elif "text/html" in data:
            parts.append(f"<div>{data['text/html']}</div>")
        elif "text/plain" in data:
            parts.append(f"<pre>{html.escape(data['text/plain'])}</pre>")
    return parts


__all__ = ["case_page"]
