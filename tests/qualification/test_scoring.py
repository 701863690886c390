"""Both scores: the ticket's figures out of its own rows, and laws of this project's."""

from __future__ import annotations

import math
import random

import pytest

from aprlab.qualification import report, scoring
from aprlab.qualification.scoring import CRASH, ERROR, FAIL, FIT, MEMORY, PASS, SKIP, THIN, TIMEOUT, UNFIT, ScenarioRow

AREAS = ("QUAL", "PERF", "STAB", "COMP", "EDGE", "REGR")


def row(
    name: str, outcome: str = PASS, area: str = "QUAL", format: str = "gguf", text: str = "x", kind: str = "ask"
) -> ScenarioRow:  # fmt: skip
    return ScenarioRow(name, area, kind, format, outcome, prompt=name, text=text, tokens=[1])


def many(count: int, area: str = "QUAL", outcome: str = PASS) -> list[ScenarioRow]:
    return [row(f"{area}-{outcome}-{n}", outcome, area) for n in range(count)]


def everywhere(each: int) -> list[ScenarioRow]:
    return [r for area in AREAS for r in many(each, area)]


def test_the_tickets_figures_come_out_of_its_own_rows() -> None:
    rows = scoring.ticket_rows()
    assert (sum(r.outcome == PASS for r in rows), sum(r.kind == "convert" for r in rows), len(rows)) == (10, 12, 24)
    score = scoring.upstream_score(rows)
    assert score.areas["QUAL"] == (10, 24, 83, 200)
    assert [score.areas[a][2] for a in AREAS[1:]] == [0] * 5
    assert (score.points, round(score.score, 1), score.grade, score.qualifies) == (83, 24.2, "F", False)
    assert scoring.rows_for(83, 10) == [24], "no other number of rows gives 83"
    assert round(score.bound, 1) == 44.7
    assert round(scoring.upstream_score(report.what_if(rows)).score, 1) == 44.7
    own = scoring.own_score(rows)
    assert (own.passed, own.run, own.verdict) == (10, 24, UNFIT)


def test_grades_and_the_points_they_take() -> None:
    assert [scoring.grade(s) for s in (100, 97, 96.9, 90, 89.99, 70, 60, 59.9, 0)] == [
        "A+", "A+", "A", "A-", "B+", "C-", "D-", "F", "F",
    ]  # fmt: skip
    for wanted in (70, 85, 90):
        points = report.points_for(wanted)
        assert scoring.upstream.score(points) >= wanted > scoring.upstream.score(points - 1)


def test_upstream_counts_what_was_not_run_as_failed_and_takes_off_for_crashes() -> None:
    assert scoring.upstream_score(everywhere(2)).score == pytest.approx(100)
    assert scoring.upstream_score([*many(1), *many(1, outcome=SKIP)]).areas["QUAL"] == (1, 2, 100, 200)
    rows = everywhere(3)
    rows[0].outcome = TIMEOUT
    assert (scoring.upstream_score(rows).penalty, scoring.upstream_score(rows).points) == (10, 1000 - 67 - 10)
    assert scoring.upstream_score([]).score == 0


@pytest.mark.parametrize(
    ("change", "closed"),
    [
        (ScenarioRow("l", "STAB", "load", "gguf", FAIL), "G0 integrity"),
        (ScenarioRow("l", "STAB", "load", "gguf", ERROR), "G1 load"),
        (row("c", CRASH), "G3 no crash"),
        (row("m", MEMORY), "G3 no crash"),
    ],
)
def test_a_closed_gateway_makes_zero(change: ScenarioRow, closed: str) -> None:
    score = scoring.upstream_score([*everywhere(3), change])
    assert (score.closed, score.points, score.score, score.grade) == ((closed,), 0, 0, "F")


def test_inference_and_garbage_are_gateways() -> None:
    mute = [ScenarioRow("a", "QUAL", "ask", "gguf", ERROR)]
    assert scoring.upstream_score(mute).closed == ("G2 inference",)
    rows = many(8)
    for n in range(3):
        assert scoring.upstream_score(rows).closed == ()
        rows[n].words = [{"oracle": "garbage", "passed": False, "said": "helf"}]
    assert scoring.upstream_score(rows).closed == ("G4 garbage",)


def test_wilson_against_its_equation() -> None:
    """Both ends solve |share − p| = z·sqrt(p(1 − p)/n)."""
    for passed, of in ((0, 7), (3, 7), (7, 7), (49, 50), (1, 2)):
        share = passed / of
        for p in scoring.wilson(passed, of):
            assert 0 <= p <= 1
            if 0 < p < 1:
                assert abs(share - p) == pytest.approx(scoring.Z * math.sqrt(p * (1 - p) / of), abs=1e-7)
        assert scoring.wilson(passed, of)[0] <= share <= scoring.wilson(passed, of)[1]
    assert scoring.wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="3 of 2"):
        scoring.wilson(3, 2)
    assert report.interval_by_count([10, 20])[10][1] < report.interval_by_count([10, 20])[20][1]
    assert report.least_for_release() == 16


def test_own_score_has_no_use_for_empty_areas_and_rows_not_run() -> None:
    quick = scoring.own_score(many(10))
    assert (quick.score, quick.areas, quick.verdict) == (100, {"QUAL": (10, 10, 0)}, THIN)
    assert "no scenario of COMP (conversions) was run" in quick.missing
    assert round(quick.interval[0]) == 72
    skipped = scoring.own_score([*many(10), *many(5, "PERF", SKIP)])
    assert (skipped.score, skipped.interval, skipped.skipped) == (quick.score, quick.interval, 5)
    assert scoring.own_score([]).score is None
    assert scoring.own_score([]).verdict == THIN
    assert scoring.own_score(many(3, outcome=SKIP)).sentence == "not enough evidence: nothing was run"


def test_what_was_not_reached_in_time_is_missing_evidence() -> None:
    late = row("QUAL-pass-0", SKIP, format="apr")
    late.note = scoring.LATE
    own = scoring.own_score([*everywhere(4), late])
    assert (own.run, own.score, own.verdict) == (24, 100, THIN)
    assert own.missing == ("1 rows were not reached in time",)


def test_a_scenario_in_three_formats_is_one_trial() -> None:
    once = scoring.own_score(everywhere(4))
    rows = [row(f"{area}{n}", PASS, area, format) for area in AREAS for format in ("gguf", "apr", "st") for n in range(4)]
    thrice = scoring.own_score(rows)
    assert (thrice.run, thrice.interval) == (once.run, once.interval) == (24, once.interval)


def test_fit_for_release() -> None:
    own = scoring.own_score(everywhere(4))
    assert (own.verdict, own.blockers, own.missing) == (FIT, (), ())
    assert own.sentence.startswith("fit for release: 24 of 24 scenarios pass, 100.0 %")


def test_a_models_own_wrong_answer_is_none_of_the_conversions() -> None:
    wrong = [row("hard", FAIL, "QUAL", f, "5") for f in ("gguf", "apr")]
    own = scoring.own_score([*everywhere(8), *wrong])
    assert (own.own, own.verdict, own.blockers) == (("hard",), FIT, ())
    assert own.score == pytest.approx(100 * 48 / 49)
    wrong[1].text = "helf"
    own = scoring.own_score([*everywhere(8), *wrong])
    assert (own.verdict, own.own) == (UNFIT, ())
    assert own.blockers == ("hard (gguf, apr): the answer depends on the format",)
    wrong[0].outcome = PASS
    assert scoring.own_score([*everywhere(8), *wrong]).blockers == ("hard (apr): the answer depends on the format",)


@pytest.mark.parametrize("outcome", [ERROR, CRASH, TIMEOUT, MEMORY])
def test_broken_software_forbids_a_release(outcome: str) -> None:
    own = scoring.own_score([*everywhere(20), row("x", outcome, "EDGE")])
    assert (own.verdict, own.blockers) == (UNFIT, (f"x (gguf): {outcome}",))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("p", FAIL, "COMP", "a→b", kind="convert"), "conversion a→b is not golden"),
        (row("F-X", FAIL, "REGR", kind="gate"), "gate F-X fails"),
        (row("s", FAIL, "STAB"), "s (gguf): stability"),
        (row("r", FAIL, "REGR", kind="serial"), "r (gguf): known bugs"),
    ],
)
def test_what_else_forbids_a_release(bad: ScenarioRow, said: str) -> None:
    own = scoring.own_score([*everywhere(20), bad])
    assert (own.verdict, own.blockers) == (UNFIT, (said,))
    bad.outcome = PASS
    assert scoring.own_score([*everywhere(20), bad]).verdict == FIT


def test_garbage_forbids_a_release_and_quality_that_is_surely_low_too() -> None:
    bad = row("g", FAIL)
    bad.words = [{"oracle": "garbage", "passed": False, "said": "helf"}]
    assert scoring.own_score([*everywhere(20), bad]).blockers == ("g (gguf): garbage",)
    low = scoring.own_score([*everywhere(4), *many(24, outcome=FAIL)])
    assert low.verdict == UNFIT
    assert "upper end" in low.blockers[0]
    middling = scoring.own_score([*everywhere(4), *many(3, outcome=FAIL)])
    assert (middling.verdict, middling.blockers) == (THIN, ())


def test_the_order_of_rows_does_not_matter() -> None:
    rows = [*everywhere(3), *many(2, outcome=FAIL), row("x", CRASH), row("y", TIMEOUT, "STAB")]
    told = scoring.own_score(rows).to_json()
    random.Random(3).shuffle(rows)
    again = scoring.own_score(rows).to_json()
    assert set(told.pop("own")) == set(again.pop("own"))
    assert told == again
