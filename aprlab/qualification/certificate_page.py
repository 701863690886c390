"""A certificate on paper: an HTML page, JSON, JUnit XML for a CI job, Markdown for its summary."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from aprlab.display.html import table
from aprlab.display.page import page
from aprlab.display.plain_text import json_text
from aprlab.formats.writing import write_text
from aprlab.qualification.certificate import Certificate
from aprlab.version import __version__

NAMES = ("report.html", "certificate.json", "junit.xml", "summary.md")


def write(found: Certificate, folder: Path) -> list[Path]:
    """Write all four into `folder`, each whole or not at all; returns their paths."""
    texts = (html_page(found), certificate_json(found), junit(found), markdown(found))
    for name, text in zip(NAMES, texts, strict=True):
        write_text(folder / name, text)
    return [folder / name for name in NAMES]


def tensor_cells(found: Certificate) -> list[tuple[str, ...]]:
    """The tensors by change of type, fit for a table."""
    return [
        (
            row["before"], row["after"], str(row["tensors"]), str(row["equal"]), f"{row['rel_l2']:.3g}",
            f"{row['worst_row']:.3g}", "" if row["bound"] is None else f"{row['bound']:.3g}",
        )
        for row in found.tensors
    ]  # fmt: skip


TENSOR_COLUMNS = ("source", "model", "tensors", "bit for bit", "rel. l2 error", "worst row", "bound of a row")


def html_page(found: Certificate) -> str:
    """One page that fetches nothing."""
    tone = "" if found.exit_code == 0 else " class=no"
    parts = [
        f"<h1>{html.escape(found.verdict)}</h1>",
        f"<section{tone}><p>{html.escape(found.sentence)}</p>"
        f"<p><code>{html.escape(found.model)}</code> against <code>{html.escape(found.source)}</code></p></section>",
        f'<div class="scroll">{found._repr_html_()}</div>',
    ]
    if found.tensors:
        parts.append(f'<h2>Tensors</h2><div class="scroll">{table(TENSOR_COLUMNS, [list(r) for r in tensor_cells(found)])}</div>')
    if found.by_layer:
        layers = [[layer, f"{error:.3g}"] for layer, error in found.by_layer.items()]
        parts.append(f"<details><summary>By layer</summary>{table(('layer', 'largest rel. l2 error'), layers)}</details>")
    parts.append(f"<h2>What differs</h2>{found.peeled._repr_html_()}")
    parts.append(f"<p>aprlab {__version__}, engine {html.escape(found.engine or 'none')}, {found.seconds:.1f} s</p>")
    return page(f"{Path(found.model).name}: {found.verdict}", *parts)


def certificate_json(found: Certificate) -> str:
    """JSON with a line for each key."""
    return "{\n" + ",\n".join(f" {json_text(key)}: {json_text(value)}" for key, value in found.to_json().items()) + "\n}\n"


def junit(found: Certificate) -> str:
    """One test case for each check, as CI servers read them."""
    counted = {
        "tests": len(found.checks), "failures": sum(c.passed is False for c in found.checks),
        "skipped": sum(c.passed is None for c in found.checks), "errors": 0, "time": round(found.seconds, 3),
    }  # fmt: skip
    suite = ElementTree.Element("testsuite", {"name": "aprlab verify", **{key: str(value) for key, value in counted.items()}})
    for check in found.checks:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "aprlab.verify", "name": check.id, "time": "0"})
        if check.passed is not True:
            kind = "failure" if check.passed is False else "skipped"
            ElementTree.SubElement(case, kind, {"message": _xml(check.figure), "type": check.code} if kind == "failure" else {
                "message": _xml(check.figure)})  # fmt: skip
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Text without the characters that XML does not have."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def markdown(found: Certificate) -> str:
    """A summary for a CI job's page."""
    lines = [
        f"## {found.verdict}: {_cell(Path(found.model).name)}", "", found.sentence, "",
        f"Source: {_cell(found.source)}", "", *_grid(("check", "", "what must hold", "found"), found.rows()),
    ]  # fmt: skip
    if found.tensors:
        lines += ["", *_grid(TENSOR_COLUMNS, tensor_cells(found))]
    return "\n".join([*lines, "", f"aprlab {__version__}, engine {found.engine or 'none'}, {found.seconds:.1f} s", ""])


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(columns), _line(["---"] * len(columns)), *(_line([_cell(cell) for cell in row]) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text from a file, which must not become markup."""
    plain = " ".join(text.split())
    return html.escape(plain, quote=False).replace("|", "\\|").replace("`", "'").replace("[", "\\[")


__all__ = ["NAMES", "html_page", "junit", "markdown", "write"]
