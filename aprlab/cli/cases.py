"""Panel "tell": a case that is handed over, and one that was received."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aprlab.cli import output as out
from aprlab.cli.options import Prompt, Raw
from aprlab.published import QUESTION

if TYPE_CHECKING:
    from aprlab.lab.case_reading import FileAtHand, ReadCase


def new(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="[REF] CAND", help="As for `peel`; with --saw or --source one MODEL.", show_default=False),
    ],
    saw: Annotated[
        str | None, typer.Option("--saw", metavar="TEXT", help="What a broken program said.", show_default=False)
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="NAME[,KEY=VALUE…]", help="A program to judge, as for `peel`.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of the case; DIR.zip is the same.", show_default="case-CAND"),
    ] = None,
    prompt: Prompt = QUESTION,
    raw: Raw = False,
    engine: str = "auto",
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Make a case to hand over: executed notebook, page, figure and JSON, as a folder and a zip; no paths, no model."""
    from aprlab.lab.case_folders import make_case, subject

    about = subject(files, saw=saw, sources=source or (), prompt=prompt, raw=raw, engine=engine)
    stem = re.sub(r"[^\w.-]+", "_", files[-1].stem) or "case"
    made = make_case(about, output or Path(f"case-{stem}"), force=force, progress=sys.stderr.isatty())
    if as_json:
        out.say_json(made.facts)
        return
    out.say(made.facts["title"])
    out.say(made.facts["conclusion"])
    for path in (made.folder / "case.html", made.folder / "case.ipynb", made.folder / "case.json", made.archive):
        out.say(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def open_(
    case: Annotated[Path, typer.Argument(metavar="CASE", help="The folder, or the zip.", show_default=False)],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE…]", help="Files at hand; else those of the same names here.", show_default=False),
    ] = None,
    as_json: bool = False,
) -> int:
    """Show what a case found, and whether the files at hand are the same; nothing of it is unpacked or run."""
    from aprlab.lab.case_reading import files_at_hand, read_case

    read = read_case(case)
    here = files_at_hand(read, files or ())
    differs = not read.whole or any(each.state == "other" for each in here)
    if as_json:
        out.say_json({**read.facts, "parts": read.parts, "at_hand": [each.to_json() for each in here]})
    else:
        _show(read, here)
    return int(differs)


def _show(read: ReadCase, here: list[FileAtHand]) -> None:
    facts = read.facts
    out.say(facts["title"])
    out.say(facts["conclusion"])
    versions = ", ".join(f"{name} {version}" for name, version in list(facts["versions"].items())[:3])
    out.say(f"made {facts['made']} with {versions}")
    for finding in _rows(facts["findings"].get("findings")):
        out.say(f"  {finding.get('layer')}: {finding.get('fault') or 'no known fault'}: {finding.get('mechanism')}")
    for line in facts["commands"]:
        out.say(f"  {line}")
    words = {"same": "the same file", "other": "ANOTHER FILE of that name", "not here": "not here"}
    rows = [(each.role, each.name, words[each.state]) for each in here]
    out.say_table("", ("", "file", "at hand"), rows)
    for name, state in read.parts.items():
        if state != "same":
            out.note(f"{name}: {'changed since the case was made' if state == 'other' else 'not in the case'}")


def _rows(findings: object) -> list[dict[str, object]]:
    """Findings of a JSON that somebody else wrote."""
    return [each for each in findings if isinstance(each, dict)] if isinstance(findings, list) else []
