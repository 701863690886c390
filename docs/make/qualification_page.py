"""Make `docs/qualification.md` from the JSON beside it: `python docs/make/qualification_page.py docs/qualification.md`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from aprlab.faults import upstream
from aprlab.formats.writing import write_text
from aprlab.published import known_models
from aprlab.qualification import scoring
from aprlab.qualification.oracles import ORACLES
from aprlab.qualification.playbook import AREAS
from aprlab.qualification.report import cells, least_for_release, points_for, reason, recorded
from aprlab.qualification.runner import Qualification
from aprlab.qualification.scoring import SKIP

_TABLE = ("model", "its score", "passed", "answers", "conversions", "playbook", "upstream's score of our rows", "this project's",
          "95 % interval", "rows", "answers", "conversions", "verdict")  # fmt: skip
_PAGE = """\
# Qualification

`aprlab qualify MODEL` runs a model through a playbook, in each format, and writes a page and JSON with every prompt and every
answer to `reports/`. `--playbook quick` has the ticket's ten scenarios, `full` has what a release needs, `embedded` is the same
for the embedded model. Notebook `08_qualification` explains it step by step.

## The ticket's table, with this project's results

The first columns are the ticket's (its harness, its converter); the others were measured with this project:
{runs}.

{table}

A size without measured rows has not been run through a playbook here; the files of the 3B, 7B and 14B were not
available. [sizes](sizes.md) shows the cost of converting, checking and running files of their true sizes and type
mixes, filled with random blocks; random weights cannot answer questions.

{notes}

## Why the ticket's score was 24.2, and could not have been more than 44.7

Upstream's score adds up six areas, {maxima}. An area gives `round(passed / rows × maximum)`, and the score is
`100 · log10(1 + 9 · points / 1000)`. All rows of the quick playbook are filed under QUAL. Ten passes of 24 rows give 83 points,
and no other number of rows does: the table's 22, and two that nothing is known about. 83 points of 1000 give {score:.1f}. If all 24
had passed, QUAL would have given 200 points, which is {bound:.1f}: the other five areas had no rows at all. Scores of
70, 85 and 90 take {needed} points.

The twelve conversions could not pass: each test compared the whole standard output, which includes the run time in seconds.

## This project's score

* A *scenario* is one trial. It passes if it passes in every format in which it was run; the same question in three formats is
  not counted three times.
* Score: 100 × scenarios passed / scenarios run. An area without scenarios does not count; what was not run (a
  format that was not requested, llama.cpp not installed) is listed, and does not lower the score.
* The interval is Wilson's for that share. Ten of ten means no more than "at least 72 %"; 80 % needs {least} of {least}.
* Verdict: **fit for release** (score at least {production}, lower end at least {sure:.0f}, no blocker, and scenarios in
  {areas}), **not fit for release** (a blocker, which is named), **not enough evidence** (neither, or rows that were
  not reached in time).
* Blockers: a crash, a hang, an error, running out of memory; a conversion that is not golden or a gate that fails; garbage; an
  answer that depends on the format; a failed scenario for stability, a known bug, or speed and memory. A *wrong answer
  that is the same in every format* is the model's own: it lowers the score, and is listed as such.

## Child processes

Scenarios run in a child process, one per format. A child that crashes, exceeds its time limit or runs out of memory
(`--memory MIB` sets a limit) is a result of the scenario in which it happened; the next scenario gets a new child. Finished rows
are kept in `reports/qualify-MODEL-PLAYBOOK.jsonl`, and an interrupted run resumes from there (`--fresh` discards them); another
model, playbook or engine starts over, and errors are tried again. `--minutes N` starts nothing new after that time; conversions
and gates come first. Exit status: 0 fit, 3 not fit, 4 not enough evidence, 2 bad input.

## Playbooks

A playbook is a YAML file; every error in it is reported with its line number before anything runs.

| key | what it is |
|---|---|
| `name`, `title`, `about` | of the playbook |
| `formats` | list of `gguf`, `apr`, `safetensors`; `--formats` overrides it |
| `golden` | list of prompts for both sides of a conversion, and of the gates |
| `engine` | what runs the model, as on the command line: `jit`, `jit:q8`; `auto` (the default) takes one by the model and the machine; `--engine` overrides it |
| `defaults` | settings of all scenarios: `max_tokens` (24), `timeout` (300 s), `system`, `temperature` (0), `seed` (0), `stop` |
| `scenarios` | list, as below |

| key of a scenario | what it is |
|---|---|
| `id`, `area`, `why` | name; one of {areas_all}; a remark |
| `ask`, `complete` or `talk` | a user's message; raw text to continue; a list of messages with `role` and `content` |
| `do` | instead: `load`, `serial` (tokens together, one by one), `speed`, `memory`, `convert` (`from`, `to`), `gate` (`gate`) |
| `expect` | list of oracles, all of which must hold |
| `fill` | `text` and `times`: that many copies of the text are put before the prompt |
| `repeat`, `restart` | ask that many times, with other prompts in between; ask again in a fresh process: the tokens must be the same every time |
| `max_tokens`, `timeout`, `system`, `temperature`, `seed`, `stop` | as in `defaults` |

| oracle | holds when |
|---|---|
{oracles}

A conversion starts from its real source (APR to GGUF from the APR file, and so on; SafeTensors are written as f32, so that no
value changes), and is compared by tokens, logits and every value of every tensor; the printed text is not used.

This page is generated from the JSON in `docs/qualification/`: `python docs/make/qualification_page.py docs/qualification.md`.
"""  # noqa: E501


def markdown(found: Sequence[Qualification]) -> str:
    """`docs/qualification.md` from recorded qualifications."""
    lines = [f"| {' | '.join(_TABLE)} |", "|" + "---|" * len(_TABLE)]
    notes: list[str] = []
    others = list(found)
    for model in known_models().values():
        mine = [q for q in found if q.model["file"] == model.file]
        for n, q in enumerate(mine or [None]):
            ticket = (model.title, "24.2 (F)", "10/22", "10/10", "0/12") if n == 0 else ("",) * 5
            lines.append(_line(ticket, q))
            if q is not None:
                others.remove(q)
                notes.append(_note(model.title, q))
    for q in others:
        lines.append(_line((f"{q.model['file']} (not the ticket's)", "", "", "", ""), q))
        notes.append(_note(q.model["file"], q))
    rows = scoring.ticket_rows()
    score = scoring.upstream_score(rows)
    needed = [f"{points_for(least)}" for least in (70, 85, 90)]
    told = "; ".join(
        f"{q.model['file']} with playbook `{q.playbook['name']}` ({q.playbook['digest']}), engine `{q.engine}`, formats "
        f"{', '.join(q.formats)}, {sum(r.cpu for r in q.rows):.0f} s of processor time for answers and conversions"
        for q in found
    )
    return _PAGE.format(
        runs=told or "nothing yet", table="\n".join(lines), notes="\n".join(notes), score=score.score, bound=score.bound,
        maxima=", ".join(f"{a} {m}" for a, m in upstream.CATEGORIES.items()), needed=f"{needed[0]}, {needed[1]} and {needed[2]}",
        least=least_for_release(), production=scoring.PRODUCTION, sure=scoring.SURE, areas=", ".join(scoring.NEEDED),
        areas_all=", ".join(f"`{a}` ({t})" for a, t in AREAS.items()),
        oracles="\n".join(f"| `{name}` | {_first(oracle.judge.__doc__)} |" for name, oracle in ORACLES.items()),
    )  # fmt: skip


def _first(text: str | None) -> str:
    return " ".join((text or "").split())


def _line(ticket: Sequence[str], q: Qualification | None) -> str:
    if q is None:
        mine = ("not run", *[""] * 7)
    else:
        c = cells(q)
        keys = ("upstream", "own", "interval", "rows", "answers", "conversions", "verdict")
        mine = (q.playbook["name"], *(c[key] for key in keys))
    return f"| {' | '.join((*ticket, *mine))} |"


def _note(title: str, q: Qualification) -> str:
    """What did not pass, and what was not run."""
    own = q.own
    parts = [f"* {title}, `{q.playbook['name']}`: {own.sentence}."]
    for name in own.own:
        tried = [r for r in q.rows if r.scenario == name and r.outcome != SKIP]
        row = tried[0]
        text = " ".join(row.text.split())[:80].replace("`", "'").replace("|", "\\|")
        where = ", ".join(r.format for r in tried)
        parts.append(f"  * the model's own: `{name}` ({where}), {reason(row)} (`{text}`)".replace("\n", " "))
    skipped: dict[str, list[str]] = {}
    for row in q.rows:
        if row.outcome == SKIP:
            skipped.setdefault(f"as {row.format}" if row.note == scoring.LATE else row.note, []).append(row.scenario)
    parts += [f"  * not run, {why}: {', '.join(names)}" for why, names in skipped.items()]
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_text(target, markdown(recorded(target.parent / "qualification")))
