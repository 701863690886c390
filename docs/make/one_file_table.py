"""How well one broken file is judged without a reference: the table of `docs/peel.md`.

``python docs/make/one_file_table.py`` makes every file fault of the embedded model, gives `peel` that one file, and asks
`repair` for it. It prints the table; ``--healthy`` counts false alarms over the healthy variants of `tests/laws` instead.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, convert_with, file_faults
from aprlab.gates import attempt
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.lab.pairs import given_for
from aprlab.onion.peeling import peel

REF = paths.embedded_model()
ALIKE = "leaves_the_same_file_as"


def row(id: str, folder: Path) -> dict[str, object] | None:
    """One fault, judged alone; None where it is not for this model."""
    given = given_for([FAULTS[id]])
    broken, healthy, fixed = (folder / name for name in ("broken.apr", "healthy.apr", "fixed.apr"))
    fixed.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            convert_with(REF, broken, [id], force=True, **given)
        except AprlabError:
            return None
    convert(REF, healthy, force=True, **given, seams=lambda s: replace(
        s, metadata=lambda made: {k: v for k, v in made.items() if k != "source_metadata"}))  # fmt: skip
    started = time.perf_counter()
    outcome = attempt(broken, fixed, threads=1)
    verdict = outcome.verdict
    # Of a fault that no run can notice, a harmless finding is the right answer.
    found = [f for f in verdict.findings if not f.harmless or FAULTS[id].silent]
    names = {f.fault for f in found} | {other for f in found for other in f.evidence.get(ALIKE, [])}
    answer = outcome.judged.get("run")
    return {
        "fault": id, "verdict": verdict.verdict, "layer": FAULTS[id].layer in {f.layer for f in found}, "named": id in names,
        "written": outcome.written is not None, "bits": fixed.is_file() and fixed.read_bytes() == healthy.read_bytes(),
        "garbage": is_garbage(answer[0])[0] if isinstance(answer, list) else None, "silent": FAULTS[id].silent,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown, with totals and the names of those that were missed."""
    lines = ["| fault | verdict | layer | named | repaired bit for bit | s |", "|---|---|---|---|---|---|"]
    for r in rows:
        marks = ["yes" if r[key] else "no" for key in ("layer", "named", "bits")]
        lines.append(f"| `{r['fault']}` | {r['verdict']} | {' | '.join(marks)} | {r['seconds']:.1f} |")
    lines.append("")
    for key, words in (("layer", "right layer"), ("named", "named"), ("bits", "repaired bit for bit")):
        missed = ", ".join(f"`{r['fault']}`" for r in rows if not r[key])
        lines.append(f"* {words}: {sum(bool(r[key]) for r in rows)} of {len(rows)}; not: {missed or 'none'}")
    wrong = [r["fault"] for r in rows if r["written"] and not r["bits"]]
    lines.append(f"* written, and other bytes than the healthy file: {', '.join(f'`{id}`' for id in wrong) or 'none'}")
    quiet = [r["fault"] for r in rows if r["verdict"] in ("same", "healthy", "equivalent")]
    lines.append(f"* nothing found: {', '.join(f'`{id}`' for id in quiet) or 'none'}")
    return "\n".join(lines)


def healthy(folder: Path) -> None:
    """Verdicts on healthy variants; all but same, healthy and equivalent are false alarms."""
    sys.path[:0] = ["tests", "tests/laws"]
    from generator import healthy as variants

    alarms, count = [], 0
    for case in variants(REF):
        path = case.make(folder / f"v{count}.gguf")
        if path is None:
            continue
        count += 1
        verdict = peel(None, path, threads=1)
        print(case.name, verdict.verdict, file=sys.stderr, flush=True)
        if verdict.exit_code:
            alarms.append(case.name)
    print(f"{len(alarms)} false alarms over {count} healthy variants: {', '.join(alarms) or 'none'}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "--healthy" in sys.argv:
            healthy(folder)
            return
        rows = []
        for id in [argument for argument in sys.argv[1:] if argument in FAULTS] or file_faults():
            if (made := row(id, folder)) is not None:
                print(made, file=sys.stderr, flush=True)
                rows.append(made)
    print(table(rows))


if __name__ == "__main__":
    main()
