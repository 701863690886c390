"""Write docs/gates.md, the codes of gates and stages and the schema of their JSON: `python docs/make/gates_page.py`."""

from __future__ import annotations

from pathlib import Path

from aprlab.formats.writing import write_text
from aprlab.gates import GATES, STAGES
from aprlab.gates.words import TEMPLATES
from aprlab.instruments import INSTRUMENTS
from aprlab.instruments.fingerprints import FINDINGS
from aprlab.tracing.comparisons import DIFFERENCES

PAGE = Path(__file__).resolve().parents[1] / "gates.md"
_TEXT = """\
# Gates, stages, instruments: codes and JSON

`aprlab gates REF CAND` compares a candidate with its reference, `aprlab check FILE` looks at one file in ten stages,
`aprlab fingerprint` and `aprlab diff` compare files tensor by tensor. Which gate kills which fault is measured in
[kill-matrix.md](kill-matrix.md).

Everything that they say has a **code**, which is stable, and **parameters**. The sentence is made of both for people, and
may be reworded at any time: look at the code.

## Gates and the instruments that they measure with

A gate gets the instruments that it names and no other. Where one of them fails its self-test the gate is void: it says
nothing. A test puts every faulty instrument of the catalogue in its place and demands that the gate's word changes.

| gate | asserts | measures with |
|---|---|---|
{gates}

Exhibits, which measure nothing here and are shown in notebook 05: {exhibits}.
The stages of `check` use `norm`, the comparison of two traces is `trace`, and the data of the self-test are made by
`fixture`.

The ten stages: {stages}.

## JSON

Each of the four verbs takes `--json` and prints one object with `"schema": 2`. A later schema may add keys; the number
changes when a key changes its meaning or goes.

* `gates`: a list `gates`, each with `id`, `passed` (true, false, or null for void), `code`, `parameters`, `figure` (words),
  `assertion`, `refused`; `engine`, on which both sides ran, and `engine_asked`.
* `check`: `engine` (empty where none could be made), `engine_asked`, and a list `stages`, each with `stage`, `ok`, `code`,
  `parameters`, `detail` (words).
* `diff`: `title`, `equal`, `summary` (words), `first` (index of the first row that differs, or null), `columns`, and a list
  `rows`, each with `what`, `code`, `finding` (words), `a`, `b`, `equal`.
* `fingerprint`: the same; each row has `name`, `code`, `equal`, and the hashes and statistics of the tensor or, with two
  files, `finding` (words) and, for a tensor of both, `a`, `b` and what each measure alone says.

Numbers in `parameters` that are not finite are the words `nan`, `inf`, `-inf`. Where a reader refused, `error` is the code
of its error ([errors.md](errors.md)) and `message` is quoted for people.

## Codes of `diff` and `fingerprint`

| code | words |
|---|---|
{differences}

## Codes of `gates` and `check`

Names in braces are parameters. A part in square brackets is left out where its parameter is null.

| code | words |
|---|---|
{codes}

This page is generated: `python docs/make/gates_page.py`.
"""


def page() -> str:
    """The page as the code has it."""
    instruments = {g.id: ", ".join(f"`{name}`" for name in g.rests_on) or "all, by their self-test" for g in GATES.values()}
    return _TEXT.format(
        gates="\n".join(f"| {g.id} | {g.assertion} | {instruments[g.id]} |" for g in GATES.values()),
        exhibits=", ".join(f"`{i.name}`" for i in INSTRUMENTS.values() if i.exhibit),
        stages="; ".join(STAGES),
        differences="\n".join(f"| `{code}` | {said} |" for code, said in (DIFFERENCES | FINDINGS).items()),
        codes="\n".join(f"| `{code}` | {template} |" for code, template in TEMPLATES.items()),
    )


if __name__ == "__main__":
    write_text(PAGE, page())
