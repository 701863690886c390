"""How near the catalogue comes to garbage that nobody has explained: `python docs/make/open_cases.py JOURNAL` searches on.

The journal keeps what was tried; each run goes on from it (`--only`, `--depth`, `--width`, `--jobs`, `--scheduler` as `aprlab
forensics` has them; `--only ""` tries nothing new) and writes the record data/open-cases.json, for docs/evidence.md and notebook
10_open_cases.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

from aprlab import paths
from aprlab.faults import run_faults, session_with
from aprlab.faults.text import CHATML
from aprlab.forensics.answer_runs import told_logits
from aprlab.forensics.bench import with_template
from aprlab.forensics.cases import Case, rank_cases, read_cases
from aprlab.forensics.outcome import Forensics
from aprlab.formats import open_model
from aprlab.formats.writing import write_json
from aprlab.inference.session import Session
from aprlab.published import known_models

RECORD = paths.data_dir() / "open-cases.json"
MODEL = "qwen2.5-coder-1.5b"
OPEN = ("a3923-zombie", "a199-2T", "gold-15b-jan31-a", "gold-15b-jan31-b", "gh191-2p2")
KEPT = 12  # sets of each case in the record


def row(found: Forensics) -> dict[str, Any]:
    """One case: what was tried, and how near it came, in bits for each token of the text."""
    tokens = max(1, len(found.saw_tokens))
    measured = sorted((s for s in found.suspects if s.bits is not None), key=lambda s: s.bits or 0.0)
    assert found.healthy.bits is not None
    assert found.posterior is not None
    best = set(measured[0].faults)
    fewer = [s for s in measured if len(best) > 1 and set(s.faults) < best and len(s.faults) == len(best) - 1]
    return {
        "saw": found.saw, "tokens": found.saw_tokens, "prompt": found.prompt,
        "null": round(found.null_bits / tokens, 2), "healthy": [round(found.healthy.bits / tokens, 2), found.healthy.first_rank],
        "posterior": {name: chance for name, chance in found.posterior.to_json().items() if name != "sets"},
        "tried": {str(size): count for size, count in sorted(Counter(len(s.faults) for s in measured).items())},
        "could_not_run": sum(s.bits is None for s in found.suspects),
        "first_tokens": sum(s.first_rank == 0 for s in measured),
        "sets": ["+".join(s.faults) for s in measured],
        "nearest": [
            [list(s.faults), round((s.bits or 0.0) / tokens, 2), s.first_rank, s.text[:60], s.cut] for s in measured[:KEPT]
        ],
        "left_out": [[list(s.faults), round((s.bits or 0.0) / tokens, 2), s.text[:60]] for s in fewer],
        "best_score": [list(found.suspects[0].faults), round(found.suspects[0].match.score, 3)]
        if found.suspects and found.suspects[0].match is not None else None,
    }  # fmt: skip


def steps(session: Session, case: Case, found: Forensics) -> list[list[Any]]:
    """The text under the nearest set, token by token: what it is, and its rank in what could have come there, 0 the likeliest."""
    assert found.nearest is not None
    healthy = with_template(session, CHATML) if case.template == "chatml-without-system" else session
    broken = session_with(healthy, found.nearest.faults)
    prompt = broken.prompt_tokens(case.prompt, raw=case.template == "none", system=case.system)
    logits = told_logits(broken, prompt, found.saw_tokens)
    told = zip(logits, found.saw_tokens, strict=True)
    return [[session.tokenizer.decode([token]), int((row > row[token]).sum())] for row, token in told]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("journal")
    parser.add_argument("--only", help="sets, a+b,c; without it every fault that is not silent, alone")
    parser.add_argument("--cases", default=",".join(OPEN))
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scheduler", metavar="ADDRESS")
    given = parser.parse_args()
    everything = [id for id, fault in run_faults().items() if not fault.silent]
    units = everything if given.only is None else [unit for unit in given.only.split(",") if unit]
    cases = [case for case in read_cases(paths.data_dir() / "evidence.json") if case.id in given.cases.split(",")]
    started = time.process_time()
    found = rank_cases(
        paths.models_dir() / known_models()[MODEL].file, cases, faults=units, depth=given.depth, width=given.width, engine="jit",
        journal=given.journal, jobs=given.jobs, scheduler=given.scheduler,
        progress=lambda unit, s: print(f"{unit} {s:.1f} {time.process_time() - started:.0f}", file=sys.stderr),
    )  # fmt: skip
    session = Session(open_model(paths.models_dir() / known_models()[MODEL].file), engine="jit")
    rows = {case.id: row(found[case.id]) | {"steps": steps(session, case, found[case.id])} for case in cases}
    write_json(RECORD, {"model": MODEL, "cases": rows})


if __name__ == "__main__":
    main()
