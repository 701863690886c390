"""The kill matrix as a page of Markdown, and as data for a figure."""

from __future__ import annotations

from aprlab.gates.catalogue import GATES
from aprlab.gates.matrix import KILL, PASS, REFUSED, VOID, KillMatrix

_SIGN = {KILL: "✗", REFUSED: "–", PASS: "", VOID: "?"}
_PAGE = """\
# The kill matrix

Which gate kills which fault. Every fault of the catalogue, in each form it has (*file*: a file with the fault, read by
healthy code; *run*: a healthy file, read or run by code with the fault), is compared by every gate with the embedded
model. A test computes this table anew: every fault has to die at some gate, every gate has to kill something, and the
healthy conversion has to pass them all.
Answers are cut at six tokens here: with longer ones the two text gates, GR-1 and GR-3, kill more.

✗ the gate looked and said no; – the gate could not look, since the strict reader refuses the file (I-3 is the gate that
counts this as a kill); ? the gate rests on an instrument that failed its own test, and says nothing. *Upstream* counts
how many of upstream's ten checks pass, with its own reader; – where not even that could load the file.

| gate | asserts | kills |
|---|---|---|
{gates}

{rows} rows, {faults} faults. Upstream's ten checks say no in {upstream} of the {loaded} rows that its reader loads.

| fault | form | layer | {heads} | upstream |
|---|---|---|{lines}|---|
{table}

![The same as a figure](kill-matrix.svg)

Faults that need what the embedded model has not (other types, rows that no 256-block divides) are tried on a sibling
made from it (`aprlab.gates.sibling`). This page is generated: `python docs/make/kill_matrix.py`.
"""


def short(gate: str) -> str:
    """A gate's name at the head of a column."""
    plain = gate.removeprefix("F-").replace("ROSETTA-", "").replace("APR-", "")
    return plain.replace("GOLDEN-RULE-00", "GR-") if "GOLDEN" in plain else plain.removesuffix("-001")


def figure_cells(matrix: KillMatrix) -> dict[str, list[str]]:
    """What `aprlab.figures.kill_plot` draws: fault (and form) -> the word of each gate, in order."""
    return {f"{row.fault} ({row.form})": [row.cells[id] for id in GATES] for row in matrix.rows}


def markdown(matrix: KillMatrix) -> str:
    """`docs/kill-matrix.md`."""
    gates = [f"| {id} | {gate.assertion} | {len(matrix.kills(id))} |" for id, gate in GATES.items()]
    table = []
    for row in [*matrix.control, *matrix.rows]:
        passed = f"{sum(row.upstream.values())}/10" if row.upstream else "–"
        cells = " | ".join(_SIGN[row.cells[id]] for id in GATES)
        table.append(f"| {row.fault or 'none (healthy)'} | {row.form} | {row.layer} | {cells} | {passed} |")
    return _PAGE.format(
        gates="\n".join(gates), rows=len(matrix.rows), faults=len({row.fault for row in matrix.rows}),
        upstream=len(matrix.upstream_kills()), loaded=sum(bool(row.upstream) for row in matrix.rows),
        heads=" | ".join(short(id) for id in GATES), lines="|".join("---" for _ in GATES), table="\n".join(table),
    )  # fmt: skip
