"""The notebook of a case: short cells that find the fault again, the telling figure first, no path but names next to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat

from aprlab.errors import UsageError

FINDINGS = "findings"  # tag of the last cell, whose output is the findings as JSON
FIGURE = "key-figure"  # tag of the cell with the telling figure

_FILES = (
    """\
from pathlib import Path

from IPython.display import JSON

from aprlab import figures
from aprlab.lab import pairs
from aprlab.onion.verdict import plain

pair = pairs.Files(Path(reference) if reference else None, Path(candidate), engine=engine or None)
verdict = pair.peel(prompt)
with figures.style():
    pair.telling(verdict, prompt)
""",
    "verdict",
    """\
answers = pair.answers(verdict, prompt, max_tokens)
for label, text in answers.items():
    print(f"{label:10} {text!r}")
""",
    """\
named = ", ".join(f.fault or f.mechanism for f in verdict.findings if not f.harmless) or "nothing is wrong"
JSON(plain({"conclusion": f"{verdict.verdict}: {named}", "next": verdict.next_step, "answers": answers, **verdict.to_json()}))
""",
)
_SOURCES = (
    """\
from IPython.display import JSON

import aprlab
from aprlab import figures
from aprlab.lab import case_figures
from aprlab.onion.verdict import plain

verdict = aprlab.peel(model, sources=sources, prompt=prompt)
with figures.style():
    case_figures.of_sources(model, sources, prompt)
""",
    "verdict",
    """\
named = ", ".join(f.fault or f.mechanism for f in verdict.findings if not f.harmless) or "nothing is wrong"
JSON(plain({"conclusion": f"{verdict.verdict}: {named}", "next": "", **verdict.to_json()}))
""",
)
_GARBAGE = (
    """\
from IPython.display import JSON

from aprlab import figures
from aprlab.forensics.ranking import forensics
from aprlab.lab import case_figures
from aprlab.onion.verdict import plain

found = forensics(model, saw, prompt=prompt, raw=raw, engine=engine)
with figures.style():
    case_figures.of_ranking(found)
""",
    "found",
    """\
print("seen    ", repr(found.saw))
print("healthy ", repr(found.healthy.text))
for faults, score, text, why in found.rows(5):
    print(f"{score} {faults:36} {text}")
""",
    'JSON(plain({"next": "", **found.to_json()}))',
)
KINDS = {"two": _FILES, "one": _FILES, "source": _SOURCES, "garbage": _GARBAGE}
_COMMENTS = {
    "reference": "a file that is known to be good; empty: the candidate is judged alone",
    "candidate": "the file that is judged",
    "model": "the model, next to this notebook",
    "sources": "programs that run it",
    "saw": "what the broken program said",
    "raw": "whether the prompt goes in without the chat template",
    "engine": "engine that runs the files",
    "prompt": "what is asked",
    "max_tokens": "maximum length of the answers",
}


def case_notebook(kind: str, parameters: Mapping[str, Any]) -> nbformat.NotebookNode:
    """A notebook that is not executed yet; its first cell is a heading that `concluded` replaces.

    Args:
        kind: one of `KINDS`.
        parameters: of its second cell; each is a literal with a comment.

    Raises:
        UsageError: another kind.
    """
    if kind not in KINDS:
        raise UsageError(f"a case of {kind!r}; there are: {', '.join(KINDS)}", code="case.unknown-kind")
    cells = [nbformat.v4.new_markdown_cell("# Case")]
    lines = [f"{name}: {_kind(value)} = {_literal(value)}  # {_COMMENTS[name]}" for name, value in parameters.items()]
    cells.append(nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]}))
    sources = KINDS[kind]
    for n, source in enumerate(sources):
        tags = [FIGURE] if n == 0 else [FINDINGS] if n == len(sources) - 1 else []
        cells.append(nbformat.v4.new_code_cell(source.rstrip("\n"), metadata={"tags": tags} if tags else {}))
    for n, cell in enumerate(cells):
        cell["id"] = f"case-{n}"
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def concluded(notebook: nbformat.NotebookNode, title: str, conclusion: str, files: Sequence[str], again: str) -> None:
    """Put the answer above everything else, and the cells into the order in which they are read: the figure comes first.

    Args:
        notebook: executed; changed in place.
        title: of the case, in plain words; it is shown as it is.
        conclusion: one sentence.
        files: what has to lie next to the notebook to run it again.
        again: the command that makes such a case.
    """
    needed = ", ".join(_code(name) for name in files)
    notebook.cells[0].source = (
        f"# {_words(title)}\n\n**{_words(conclusion)}**\n\n"
        f"To run it again, put {needed} next to this notebook; `aprlab case open` says whether they are the same files. "
        f"Made by {_code(again)}."
    )


def findings_of(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """What the last cell gave out; the cell's output is taken out of the notebook, as it is in the case's JSON."""
    (cell,) = [cell for cell in notebook.cells if FINDINGS in cell.metadata.get("tags", [])]
    (found,) = [output.data["application/json"] for output in cell.outputs if "application/json" in output.get("data", {})]
    notebook.cells.remove(cell)
    return dict(found)


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else type(value).__name__


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _words(text: str) -> str:
    """Text that Markdown shows as it is: nothing of a file name or a finding becomes markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+!|~$&" else letter for letter in " ".join(text.split()))


def _code(text: str) -> str:
    """A piece of code in Markdown, whatever backquotes it has."""
    fence = "`" * (max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


__all__ = ["FIGURE", "FINDINGS", "KINDS", "case_notebook", "concluded", "findings_of"]
