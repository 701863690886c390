"""The exam: forensics on garbage that other people's programs really gave.

`python docs/make/exam.py` runs all cases of data/evidence.json whose model is here and writes the record data/exam.json;
`python docs/make/exam.py --page` writes the table of docs/evidence.md from it. `--model NAME` runs those of one model, `--only
ID,…` only these faults; without it all run faults that are not silent. `--journal FILE` keeps what was judged, so that an exam
that is cut goes on where it stopped; `--jobs N` and `--scheduler ADDRESS` as `aprlab forensics` has them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aprlab import paths
from aprlab.faults import run_faults
from aprlab.forensics.cases import Case, rank_cases, read_cases, standing
from aprlab.forensics.ranking import FITS
from aprlab.formats.writing import write_text
from aprlab.published import known_models

RECORD = paths.data_dir() / "exam.json"
PAGE = Path(__file__).resolve().parents[1] / "evidence.md"
BEGIN, END = "<!-- exam: made by docs/make/exam.py -->", "<!-- end of exam -->"
SINGLE = 2  # causes at most of a case that counts as having one: the fault, and what makes its text of NaN
KEPT = 5  # suspects of each case in the record


def run(
    names: Iterable[str], only: list[str] | None, engine: str, chosen: list[str] | None = None, journal: str | None = None,
    **where: Any,
) -> dict[str, Any]:  # fmt: skip
    """The record of all cases of these models, or of the chosen ones; `journal` is kept for each model in a file of its own."""
    cases = [c for c in read_cases(paths.data_dir() / "evidence.json") if chosen is None or c.id in chosen]
    record = kept()
    for name in names:
        path = paths.models_dir() / known_models()[name].file
        mine = [case for case in cases if case.model == name]
        if not path.is_file() or not mine:
            print(f"{name}: {'not here' if mine else 'no cases'}", file=sys.stderr)
            continue
        spent: list[float] = []

        def show(unit: str, seconds: float, spent: list[float] = spent) -> None:
            spent.append(seconds)
            print(f"{unit} {seconds:.1f}", file=sys.stderr)

        units = only or [id for id, fault in run_faults().items() if not fault.silent]
        found = rank_cases(
            path, mine, faults=units, engine=engine, journal=journal and f"{journal}-{name}.jsonl", **where,
            progress=show,
        )  # fmt: skip
        record["seconds"][name] = round(sum(spent))  # of processor time, of the sets
        for case in mine:
            record["cases"][case.id] = row(case, found[case.id])
    return record


def kept() -> dict[str, Any]:
    """The record so far; an empty one where nothing ran yet."""
    if not RECORD.exists():
        return {"cases": {}, "seconds": {}}
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def row(case: Case, found: Any) -> dict[str, Any]:
    """One case of the record."""
    where = standing(found, case.cause)
    healthy = found.healthy.match.score if found.healthy.match is not None else 0.0
    sets = found.posterior.sets if found.posterior is not None else ()
    chance = max((chance for faults, chance in sets if set(faults) <= set(case.cause)), default=0.0)
    likely = " + ".join(found.likely.faults) if found.likely is not None else ""
    return {
        "rank": where.rank, "level": where.level, "score": round(where.score, 3), "first": where.first,
        "first_score": round(where.first_score, 3), "margin": round(found.margin, 3), "healthy": round(healthy, 3),
        "sets": len(found.suspects), "chance": round(chance, 3), "likely": likely, **believed(found),
        "flood": bool(found.suspects) and found.suspects[0].flood is not None,
        "suspects": [[" + ".join(s.faults), round(s.match.score, 3), s.text[:60]] for s in found.suspects[:KEPT] if s.match],
    }  # fmt: skip


def believed(found: Any) -> dict[str, Any]:
    """How sure the ranking is, and how near the nearest comes: bits a token of the text under it, and its first token's rank."""
    near, tokens = found.nearest, max(1, len(found.saw_tokens))
    if near is None or near.bits is None or found.posterior is None:
        return {}
    chances = {name: chance for name, chance in found.posterior.to_json().items() if name != "sets"}
    nearest = [" + ".join(near.faults), round(near.bits / tokens, 2), near.first_rank]
    return {"posterior": chances, "nearest": nearest, "null": round(found.null_bits / tokens, 2)}


def table(record: dict[str, Any], cases: list[Case]) -> str:
    """The table, and the shares that came first, by how sure the cause is."""
    if not record["cases"]:
        return "*No run is recorded yet.*"
    heads = ("case", "model", "the thread says", "certainty", "we say", "score", "rank of the cause", "of", "none of these",
             "our comment")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in cases:
        if case.id in record["cases"]:
            r = record["cases"][case.id]
            said = f"`{r['first']}`" if r["first_score"] >= FITS else f"nothing fits (nearest `{r['first']}`)"
            if r.get("flood"):
                said = f"the numbers were lost ({r['level'] + 1} of the faults do that)"
            elif r["first_score"] < FITS and r.get("likely"):
                said = f"`{r['likely']}` (by likelihood)"
            causes = ", ".join(f"`{id}`" for id in case.cause) or "open"
            size = case.model.rsplit("-", 1)[1]
            said_first = f"{r['first_score']:.2f}"
            cells = (f"[{case.id}]({case.url})", size, causes, case.certainty, said, said_first, rank(case, r), str(r["sets"]),
                     f"{r['posterior']['none']:.2f}" if "posterior" in r else "–", case.comment)  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *shares(record, cases)])


def fits(r: dict[str, Any]) -> bool:
    """Whether the cause explains the text: it says much of it, or makes it likelier than everything else together."""
    return bool(r["score"] >= FITS or r.get("chance", 0.0) >= 0.5)


def rank(case: Case, r: dict[str, Any]) -> str:
    """The rank of the cause in words."""
    if not case.cause:
        return "–"
    if not r["rank"]:
        return "could not run"
    if not fits(r):
        return f"does not fit ({r['score']:.2f})"
    return f"{r['rank']} (level with {r['level']} more)" if r["level"] else str(r["rank"])


def shares(record: dict[str, Any], cases: list[Case]) -> list[str]:
    """How often the cause came first, and among the first three."""
    ran = [case for case in cases if case.id in record["cases"]]
    sure = [c for c in ran if c.certainty in ("certain", "high") and "compound" not in c.note]
    compound = [c for c in ran if c.cause and "compound" in c.note and c.certainty != "found"]
    own = [c for c in ran if c.certainty == "found"]
    opened = [c for c in ran if c.certainty == "open"]
    lines = []
    groups = ("one cause, certain or high", sure), ("compound", compound), ("found here, and then in upstream's source", own)
    for what, group in groups:
        fitting = [record["cases"][c.id] for c in group if fits(record["cases"][c.id])]
        first = sum(r["rank"] == 1 for r in fitting)
        third = sum(0 < r["rank"] <= 3 for r in fitting)
        lines.append(f"* {what}: first in {first} of {len(group)}, among the first three in {third}.")
    claimed = [c.id for c in opened if record["cases"][c.id]["first_score"] >= FITS or record["cases"][c.id].get("likely")]
    lines.append(f"* open: {len(claimed)} of {len(opened)} claimed{': ' + ', '.join(claimed) if claimed else ''}.")
    return lines


def write_page(record: dict[str, Any]) -> None:
    """Put the table into docs/evidence.md."""
    text = PAGE.read_text(encoding="utf-8")
    made = f"{BEGIN}\n{table(record, read_cases(paths.data_dir() / 'evidence.json'))}\n{END}"
    new, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)
    assert count == 1, f"{PAGE} has no place for the table"
    write_text(PAGE, new)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--model", action="append")
    parser.add_argument("--only")
    parser.add_argument("--cases", help="only these, by id")
    parser.add_argument("--engine", default="jit")
    parser.add_argument("--journal", metavar="FILE", help="beginning of the journals' names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scheduler", metavar="ADDRESS")
    given = parser.parse_args()
    if not given.page:
        made = run(given.model or list(known_models()), given.only.split(",") if given.only else None, given.engine,
                   given.cases.split(",") if given.cases else None, given.journal,
                   jobs=given.jobs, scheduler=given.scheduler)  # fmt: skip
        write_text(RECORD, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
    else:
        made = kept()
    write_page(made)
