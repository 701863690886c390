"""What the verbs `peel` and `repair` print; the verbs themselves stand in `aprlab.cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from aprlab.cli.app import _print_json
from aprlab.display.page import page
from aprlab.errors import UsageError
from aprlab.formats.writing import check_output, write_json, write_text
from aprlab.lab.notebooks import reports_folder


def show_peel(
    files: list[Path], engines: list[str], *, fast: bool, backend: str | None, threads: int | None, prompt: str, out: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """`aprlab peel`: the verdict in words or JSON, and its exit status."""
    from aprlab.onion.peeling import peel

    stem = "-".join(file.stem for file in files)
    if out is not None:
        reports_folder(out)
        for kind in ("json", "html"):  # refused before the work, not after it
            check_output(out / f"{stem}.{kind}", files, force=True)
    options: dict[str, Any] = {"fast": fast, "threads": threads, "prompt": prompt}
    if engines:
        if len(engines) != 2 or len(files) != 1:
            raise UsageError("two engines are held against each other on one model: --engine A --engine B MODEL")
        verdict = peel(files[0], engines=engines, **options)
    else:
        if len(files) not in (1, 2):
            raise UsageError("one file or two: [REF] CAND")
        verdict = peel(files[0] if len(files) == 2 else None, files[-1], engine=backend, **options)
    found = verdict.to_json()
    if out is not None:
        write_json(out / f"{stem}.json", found)
        write_text(out / f"{stem}.html", page(stem, verdict._repr_html_()))
    if as_json:
        _print_json(found)
    else:
        print(verdict)
    return verdict.exit_code


def show_repair(
    candidate: Path, output: Path, reference: Path | None, *, force: bool, backend: str | None, threads: int | None, prompt: str,
    as_json: bool,
) -> int:  # fmt: skip
    """`aprlab repair`: what was mended, and the verdict on the file that was written."""
    from aprlab.onion.repairs import repair

    verdict = repair(candidate, output, reference, force=force, engine=backend, threads=threads, prompt=prompt)
    after = "same"
    if verdict.repair is not None:
        after = verdict.repair.proof["written"]["verdict"]
    if as_json:
        _print_json(verdict.to_json())
    else:
        print(verdict)
        print(f"{output}: {after}", file=sys.stderr)
    return 0 if after in ("same", "equivalent") else 3
