"""What a qualification leaves: one HTML page that fetches nothing, the same as JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aprlab.display.page import page
from aprlab.display.plain_text import json_text
from aprlab.formats.writing import write_text
from aprlab.qualification import scoring
from aprlab.qualification.playbook import AREAS, ASKS
from aprlab.qualification.runner import Qualification
from aprlab.qualification.scoring import FIT, PASS, SKIP, THIN, UNFIT, ScenarioRow

STATUS = {FIT: 0, UNFIT: 3, THIN: 4}  # exit statuses
AREA_COLUMNS = ("area", "passed", "run", "not run", "upstream's points")


def area_rows(found: Qualification) -> list[tuple[str, ...]]:
    """Scenarios by area, next to upstream's points for its rows."""
    own, theirs = found.own, found.upstream
    rows: list[tuple[str, ...]] = []
    for area, title in AREAS.items():
        passed, run, skipped = own.areas.get(area, (0, 0, 0))
        points, maximum = theirs.areas[area][2:]
        rows.append((f"{area} {title}", str(passed), str(run), str(skipped), f"{points}/{maximum}"))
    return rows


def reason(row: ScenarioRow) -> str:
    """Why a row did not pass, in a line."""
    said = "; ".join(f"{w['oracle']}: {w['said']}" for w in row.words if w["passed"] is False)
    return said or row.note or "; ".join(f"{w['oracle']}: {w['said']}" for w in row.words)


def write(found: Qualification, stem: str | Path) -> tuple[Path, Path]:
    """Write ``STEM.html`` and ``STEM.json``, each whole or not at all; returns their paths."""
    stem = Path(stem)
    texts = {".html": qualification_page(found), ".json": _by_line(found.to_json())}
    paths = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        write_text(path, text)
        paths.append(path)
    return paths[0], paths[1]


def _by_line(data: dict[str, Any]) -> str:
    """JSON with a line per key, and one per row."""

    lines = [f" {json_text(key)}: {json_text(value)}" for key, value in data.items() if key != "rows"]
    rows = ",\n".join("  " + json_text(row) for row in data["rows"])
    return "{\n" + ",\n".join(lines) + ',\n "rows": [\n' + rows + "\n ]\n}\n"


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin:1.6em 0 .4em}
.verdict{border-left:.4em solid #0072b2;padding:.3em 1em;margin:1em 0}.no{border-color:#d55e00}.thin{border-color:#e69f00}
.scores{display:flex;flex-wrap:wrap;gap:1em}
.scores>div{flex:1 1 18em;border:1px solid #ccc;border-radius:.4em;padding:.4em 1em}
.scores strong{font-size:1.7em;display:block}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.25em .6em .25em 0;border-bottom:1px solid #ddd}td.n,th.n{text-align:right}
.wide{overflow-x:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0;background:#f6f6f6;padding:.3em .5em}
details{border-bottom:1px solid #ddd;padding:.2em 0}summary{cursor:pointer}
b.bad{color:#b34700}.small{color:#555;font-size:.9em}
@media print{body{margin:0;max-width:none}details>*{display:block}}
"""


def _e(text: object) -> str:
    return html.escape(str(text))


def _grid(columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    kind = ['class="n"' if n in numbers else "" for n in range(len(columns))]
    head = "".join(f"<th {k}>{_e(c)}</th>" for k, c in zip(kind, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {k}>{c if isinstance(c, _Html) else _e(c)}</td>" for k, c in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


class _Html(str):
    """Text that is markup already."""


def _sign(outcome: str) -> _Html:
    return _Html(_e(outcome) if outcome in (PASS, SKIP) else f'<b class="bad">{_e(outcome)}</b>')


def qualification_page(found: Qualification) -> str:
    """One HTML page: verdict, both scores, gates, conversions, and every prompt with every answer."""
    own, theirs, facts = found.own, found.upstream, found.model
    title = f"{facts['file']}: {own.verdict}"
    kind = {FIT: "", UNFIT: " no", THIN: " thin"}[own.verdict]
    parts = [f"<h1>{_e(facts['file'])}</h1>"]
    inventory = ", ".join(f"{n} {name}" for name, n in facts["by_type"].items())
    parts.append(
        f'<p class="small">Playbook {_e(found.playbook["name"])} ({_e(found.playbook["title"])}, '
        f"{_e(found.playbook['digest'])}); formats {_e(', '.join(found.formats))}; engine {_e(found.engine)}; "
        f"{facts['bytes']:,} bytes of tensors: {_e(inventory)}.</p>"
    )
    parts.append(f'<div class="verdict{kind}"><strong>{_e(own.verdict)}</strong><br>{_e(own.sentence)}.')
    if own.own:
        listed = _e(", ".join(own.own))
        parts.append(f"<br>The model's own wrong answers, the same in every format in which they were run: {listed}.")
    parts.append("</div>" + _scores(found))
    parts.append("<h2>By area</h2>" + _grid(AREA_COLUMNS, area_rows(found), range(1, 5)))
    gates = [row for row in found.rows if row.kind == "gate"]
    if gates:
        parts.append("<h2>Gates of the ticket, GGUF against APR</h2>")
        rows = [(r.prompt, _sign(r.outcome), r.words[0]["said"] if r.words else r.note, r.note) for r in gates]
        parts.append(_grid(("gate", "", "measured", "asserts"), rows))
    pairs = [row for row in found.rows if row.kind == "convert"]
    if pairs:
        parts.append("<h2>Conversions, each from its real source</h2>")
        held = [(r.format, _sign(r.outcome), "; ".join(w["said"] for w in r.words) or r.note) for r in pairs]
        parts.append(_grid(("from → to", "", "measured"), held))
    if timed := _times(found):
        parts.append("<h2>Speed and memory</h2>" + _grid(("format", "figure", "value"), timed, (2,)))
    parts.append("<h2>Every prompt and every answer</h2>" + "".join(_details(found)))
    if closed := theirs.closed:
        parts.append(f"<p>Upstream's gateways that are closed: {_e(', '.join(closed))}.</p>")
    return page(title, *parts, style=_STYLE)


def _scores(found: Qualification) -> str:
    own, theirs = found.own, found.upstream
    low, high = own.interval
    mine = "–" if own.score is None else f"{own.score:.1f} %"
    empty = [area for area, (_, rows, _, _) in theirs.areas.items() if not rows]
    bound = f" Areas without rows count as 0 ({', '.join(empty)}): all passing would give {theirs.bound:.1f}." if empty else ""
    return (
        f'<div class="scores"><div><strong>{mine}</strong>of the {own.run} scenarios run pass in every format; 95 % interval '
        f"{low:.0f} to {high:.0f} %; {own.skipped} not run, which cost nothing.<br><em>This project's score</em></div>"
        f"<div><strong>{theirs.score:.1f} ({theirs.grade})</strong>{theirs.points} of 1000 points on upstream's logarithmic scale"
        f"{f', {theirs.penalty} taken off for crashes and time-outs' if theirs.penalty else ''}.{_e(bound)}<br>"
        "<em>Upstream's score, as it is</em></div></div>"
    )


def _times(found: Qualification) -> list[tuple[str, str, str]]:
    seen: dict[tuple[str, str], float] = {}
    for row in found.rows:
        if row.kind in ("speed", "memory", "load", "serial"):
            seen |= {(row.format, name): value for name, value in row.figures.items()}
    return [(format, name.replace("_", " "), f"{value:.4g}") for (format, name), value in seen.items()]


def _details(found: Qualification) -> list[str]:
    groups: dict[str, list[ScenarioRow]] = {}
    for row in found.rows:
        if row.kind not in ("gate", "convert"):
            groups.setdefault(row.scenario, []).append(row)
    parts = []
    for name, rows in groups.items():
        outcomes = {row.outcome for row in rows}
        word = rows[0].outcome if len(outcomes) == 1 else ", ".join(f"{r.format} {r.outcome}" for r in rows)
        bad = bool(outcomes - {PASS, SKIP})
        label = f'<b class="bad">{_e(word)}</b>' if bad else _e(word)
        lines = [f"<details{' open' if bad else ''}><summary>{_e(rows[0].area)} {_e(name)}: {label}</summary>"]
        if rows[0].kind in ASKS:
            lines.append(f"<pre>{_e(_visible(rows[0].prompt))}</pre>")
        shown: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            what = _visible(row.text) if row.text else row.note
            said = "; ".join(f"{w['oracle']}: {w['said']}" for w in row.words)
            shown.setdefault((what, f"{row.outcome}; {said}" if said else row.outcome), []).append(row.format)
        for (text, said), formats in shown.items():
            lines.append(f'<p class="small">{_e(", ".join(formats))}: {_e(said)}</p>')
            lines += [f"<pre>{_e(text)}</pre>"] if text else []
        parts.append("\n".join([*lines, "</details>"]))
    return parts


def _visible(text: str) -> str:
    """Control characters as escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


# ── figures' data ─────────────────────────────────────────────────────────────────────────────────────────────────


def interval_by_count(counts: Sequence[int], failed: int = 0) -> dict[int, tuple[float, float, float]]:
    """How much `n` scenarios can say: n -> (score, low, high) in percent, with so many of them failed."""
    found = {}
    for n in counts:
        passed = max(0, n - failed)
        low, high = scoring.wilson(passed, n)
        found[n] = (100 * passed / n, 100 * low, 100 * high)
    return found


def least_for_release() -> int:
    """The number of scenarios, none failing, from which on the interval reaches what a release needs."""
    return next(n for n in range(1, 1000) if 100 * scoring.wilson(n, n)[0] >= scoring.SURE)


def what_if(rows: Sequence[ScenarioRow]) -> list[ScenarioRow]:
    """The rows as if all of them had passed."""
    return [replace(row, outcome=PASS) for row in rows]


def points_for(score: float) -> int:
    """Points of 1000 that upstream's scale needs for a score."""
    return math.ceil((10 ** (score / 100) - 1) / 9 * 1000 - 1e-9)


def recorded(folder: str | Path) -> list[Qualification]:
    """Qualifications kept as JSON in a folder, by size of the model, then by playbook."""
    from aprlab.qualification.runner import read

    found = [read(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda q: (q.model["parameters"], q.playbook["name"]))


def cells(found: Qualification) -> dict[str, Any]:
    """The columns of the ticket's table for one qualification."""
    asked = [row for row in found.rows if row.kind in ASKS and row.format == found.model["format"] and row.area == "QUAL"]
    pairs = [row for row in found.rows if row.kind == "convert" and row.outcome != SKIP]
    tried = [row for row in found.rows if row.outcome != SKIP]
    own, theirs = found.own, found.upstream
    return {
        "upstream": f"{theirs.score:.1f} ({theirs.grade})", "own": "–" if own.score is None else f"{own.score:.1f} %",
        "interval": f"{own.interval[0]:.0f} to {own.interval[1]:.0f}",
        "rows": f"{sum(r.outcome == PASS for r in tried)}/{len(tried)}",
        "answers": f"{sum(r.outcome == PASS for r in asked)}/{len(asked)}",
        "conversions": f"{sum(r.outcome == PASS for r in pairs)}/{len(pairs)}" if pairs else "not run",
        "verdict": own.verdict,
    }  # fmt: skip
