"""Two scores for the same rows: upstream's as it is, and one that counts nothing that was not done.

Upstream's rules are restated here from its record: points of a category are ``round(passed / rows × maximum)``, the score
is ``100 · log10(1 + 9 · points / 1000)``, crashes and time-outs cost points, and a closed gateway makes it zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from aprlab.faults import upstream
from aprlab.qualification.playbook import AREAS, ASKS, FORMATS

PASS, FAIL, ERROR, CRASH, TIMEOUT, MEMORY, SKIP = "pass", "fail", "error", "crash", "timeout", "out of memory", "not run"
OUTCOMES = (PASS, FAIL, ERROR, CRASH, TIMEOUT, MEMORY, SKIP)
LATE = "the time was up"  # the note of a row that was not reached
BROKEN = (ERROR, CRASH, TIMEOUT, MEMORY)  # the software failed, whatever the model can do
PENALTY = {CRASH: 20, MEMORY: 20, TIMEOUT: 10}
GRADES = (
    (97, "A+"), (93, "A"), (90, "A-"), (87, "B+"), (83, "B"), (80, "B-"), (77, "C+"), (73, "C"), (70, "C-"), (67, "D+"),
    (63, "D"), (60, "D-"),
)  # fmt: skip
QUALIFIES, PRODUCTION = 70, 90
SURE = 80.0  # the lower end of the interval that a release needs: 16 scenarios without a failure reach it
Z = 1.959963984540054  # two-sided 95 %


@dataclass(slots=True)
class ScenarioRow:
    """One scenario in one format: what was asked, what came back, what the oracles say.

    Attributes:
        scenario, area, kind, format: which; the format of a conversion is ``a→b``.
        outcome: one of `OUTCOMES`.
        prompt, text, stop, tokens: question and answer.
        words: what each oracle said: oracle, passed, said.
        note: why it was not run, or how it broke.
        figures: measured numbers.
        seconds, cpu: of the wall, of the processor.
        details: whatever else a conversion or a gate reports.
    """

    scenario: str
    area: str
    kind: str
    format: str
    outcome: str
    prompt: str = ""
    text: str = ""
    stop: str = ""
    tokens: list[int] = field(default_factory=list)
    words: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


# ── upstream's ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class UpstreamScore:
    """Upstream's score of some rows.

    Attributes:
        areas: area -> (passed, rows, points, maximum).
        penalty: points taken off for crashes and time-outs.
        points, score, grade: of 1000, of 100, in letters.
        bound: the score that the same rows would get if all of them passed: what this playbook can reach at all.
        closed: gateways that do not hold; any of them makes points and score zero.
    """

    areas: dict[str, tuple[int, int, int, int]]
    penalty: int
    points: int
    score: float
    grade: str
    bound: float
    closed: tuple[str, ...]

    @property
    def qualifies(self) -> bool:
        """70 and more."""
        return self.score >= QUALIFIES

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"qualifies": self.qualifies, "production": self.score >= PRODUCTION}


def grade(score: float) -> str:
    """The letter of a score."""
    return next((letter for least, letter in GRADES if score >= least), "F")


def upstream_score(rows: Iterable[ScenarioRow]) -> UpstreamScore:
    """Rows under upstream's rules: a row that was not run counts as one that did not pass, an area without rows is 0."""
    kept = list(rows)
    areas: dict[str, tuple[int, int, int, int]] = {}
    bound = 0
    for area, maximum in upstream.CATEGORIES.items():
        mine = [row for row in kept if row.area == area]
        passed = sum(row.outcome == PASS for row in mine)
        points = upstream.category_points(passed, len(mine), maximum) if mine else 0
        areas[area] = (passed, len(mine), points, maximum)
        bound += maximum if mine else 0
    penalty = sum(PENALTY.get(row.outcome, 0) for row in kept)
    closed = gateways(kept)
    points = 0 if closed else max(0, sum(a[2] for a in areas.values()) - penalty)
    score = upstream.score(points)
    return UpstreamScore(areas, penalty, points, score, grade(score), upstream.score(bound), closed)


def gateways(rows: Sequence[ScenarioRow]) -> tuple[str, ...]:
    """Those of G0 to G4 that do not hold."""
    asked = [row for row in rows if row.kind in ASKS and row.outcome in (PASS, FAIL)]
    garbage = sum(any(w["oracle"] == "garbage" and w["passed"] is False for w in row.words) for row in asked)
    loads = [row for row in rows if row.kind == "load"]
    holds = {
        "G0 integrity": not any(row.outcome == FAIL for row in loads),
        "G1 load": not any(row.outcome in BROKEN for row in loads),
        "G2 inference": any(row.tokens for row in asked) or not any(row.kind in ASKS for row in rows),
        "G3 no crash": not any(row.outcome in (CRASH, MEMORY) for row in rows),
        "G4 garbage": not asked or garbage / len(asked) <= 0.25,
    }
    return tuple(name for name, good in holds.items() if not good)


def ticket_rows() -> list[ScenarioRow]:
    """The rows behind the ticket's 83/200: all in QUAL, 10 of 24 passed.

    Its table has 22 (ten questions, twelve conversions). 83 points, though, come out of ten passes for 24 rows and for no
    other number, so there were two more that did not pass; nothing is known of them.
    """
    asked = [ScenarioRow(f"scenario-{n}", "QUAL", "ask", "gguf", PASS, tokens=[1]) for n in range(1, 11)]
    names = [f"{a}→{b} ({d})" for d in ("cpu", "gpu") for a in FORMATS for b in FORMATS if a != b]
    converted = [ScenarioRow(f"conversion {n}", "QUAL", "convert", n, FAIL) for n in names]
    unknown = [ScenarioRow(f"unknown-{n}", "QUAL", "?", "", FAIL) for n in (1, 2)]
    return asked + converted + unknown


def rows_for(points: int, passed: int, maximum: int = 200) -> list[int]:
    """The numbers of rows for which `passed` of them give `points`."""
    return [n for n in range(passed, 1000) if upstream.category_points(passed, n, maximum) == points]


# ── this project's ────────────────────────────────────────────────────────────────────────────────────────────────


def wilson(passed: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, both ends in 0..1; no trials give (0, 1)."""
    if not 0 <= passed <= of:
        raise ValueError(f"{passed} of {of}")
    if of == 0:
        return 0.0, 1.0
    share, z2 = passed / of, Z * Z
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    reach = Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return 0.0 if passed == 0 else middle - reach, 1.0 if passed == of else middle + reach


FIT, UNFIT, THIN = "fit for release", "not fit for release", "not enough evidence"
NEEDED = ("QUAL", "STAB", "COMP", "REGR")  # areas without which a converted model cannot be approved


@dataclass(frozen=True, slots=True)
class OwnScore:
    """This project's score: the share of the scenarios run that passed, in every format in which they were run.

    Attributes:
        passed, run, skipped: scenarios.
        score: 100 × passed / run; None where nothing was run.
        interval: Wilson's 95 % interval of it. Scenarios count, not rows: the same question in three formats is one trial.
        areas: area -> (passed, run, skipped), empty ones left out.
        verdict: `FIT`, `UNFIT` or `THIN`.
        blockers: what forbids a release, most severe first; empty at `FIT`.
        missing: what was not tried.
        own: scenarios that the model gets wrong in the same words in every format in which they were run.
    """

    passed: int
    run: int
    skipped: int
    score: float | None
    interval: tuple[float, float]
    areas: dict[str, tuple[int, int, int]]
    verdict: str
    blockers: tuple[str, ...]
    missing: tuple[str, ...]
    own: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The verdict and its reasons, for a release manager."""
        if self.score is None:
            return f"{self.verdict}: nothing was run"
        low, high = self.interval
        seen = f"{self.passed} of {self.run} scenarios pass, {self.score:.1f} % (95 % interval {low:.0f} to {high:.0f})"
        reasons = [*self.blockers[:3], *([f"and {len(self.blockers) - 3} more"] if len(self.blockers) > 3 else []), *self.missing]
        return f"{self.verdict}: {seen}" + (f"; {'; '.join(reasons)}" if reasons else "")


def own_score(rows: Iterable[ScenarioRow]) -> OwnScore:
    """The project's score and verdict."""
    groups: dict[str, list[ScenarioRow]] = {}
    for row in rows:
        groups.setdefault(row.scenario, []).append(row)
    passed: list[str] = []
    run: list[str] = []
    skipped: list[str] = []
    blockers: list[tuple[int, str]] = []
    own: list[str] = []
    areas: dict[str, list[int]] = {}
    for name, mine in groups.items():
        tried = [row for row in mine if row.outcome != SKIP]
        counts = areas.setdefault(mine[0].area, [0, 0, 0])
        if not tried:
            skipped.append(name)
            counts[2] += 1
            continue
        run.append(name)
        counts[1] += 1
        bad = [row for row in tried if row.outcome != PASS]
        if not bad:
            passed.append(name)
            counts[0] += 1
        elif (reason := _blocks(tried, bad)) is not None:
            blockers.append(reason)
        else:
            own.append(name)
    score = 100 * len(passed) / len(run) if run else None
    low, high = (100 * end for end in wilson(len(passed), len(run)))
    missing = [f"no scenario of {area} ({AREAS[area]}) was run" for area in NEEDED if areas.get(area, [0, 0])[1] == 0]
    if late := sum(row.note == LATE for mine in groups.values() for row in mine):
        missing.append(f"{late} rows were not reached in time")
    if score is not None and high < PRODUCTION:
        blockers.append((9, f"even the upper end of the interval is below {PRODUCTION}"))
    blockers.sort(key=lambda item: item[0])
    if blockers:
        verdict = UNFIT
    elif score is None or missing or score < PRODUCTION or low < SURE:
        verdict = THIN
        if score is not None and (score < PRODUCTION or low < SURE):
            missing.append(f"a release needs {PRODUCTION} and a lower end of {SURE:.0f}")
    else:
        verdict = FIT
    return OwnScore(
        len(passed), len(run), len(skipped), score, (low, high), {a: (c[0], c[1], c[2]) for a, c in areas.items()}, verdict,
        tuple(text for _, text in blockers), tuple(missing), tuple(own),
    )  # fmt: skip


def _blocks(tried: Sequence[ScenarioRow], bad: Sequence[ScenarioRow]) -> tuple[int, str] | None:
    """Why a scenario that did not pass forbids a release, with its rank; None for a model's own wrong answer."""
    row = bad[0]
    where = f"{row.scenario} ({', '.join(r.format for r in bad)})"
    for rank, outcome in enumerate(BROKEN):
        if any(r.outcome == outcome for r in bad):
            return rank, f"{where}: {outcome}"
    if row.kind == "convert":
        return 4, f"conversion {row.format} is not golden"
    if row.kind == "gate":
        return 4, f"gate {row.prompt} fails"
    if any(w["oracle"] == "garbage" and w["passed"] is False for r in bad for w in r.words):
        return 5, f"{where}: garbage"
    if len({r.text for r in tried}) > 1:
        return 6, f"{where}: the answer depends on the format"
    if row.area in ("STAB", "REGR", "PERF"):
        return 7, f"{where}: {AREAS[row.area]}"
    return None


__all__ = [
    "BROKEN", "CRASH", "ERROR", "FAIL", "FIT", "GRADES", "LATE", "MEMORY", "NEEDED", "OUTCOMES", "PASS", "PENALTY", "SKIP",
    "SURE", "THIN", "TIMEOUT", "UNFIT", "OwnScore", "ScenarioRow", "UpstreamScore", "gateways", "grade", "own_score", "rows_for",
    "ticket_rows", "upstream_score", "wilson",
]  # fmt: skip
