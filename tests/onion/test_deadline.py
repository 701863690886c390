"""The search in one file alone ends with its deadline: what was not tried is said, and such a file is never healthy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aprlab import paths
from aprlab.cli.app import run_cli
from aprlab.errors import UsageError
from aprlab.faults import convert_with
from aprlab.onion import blind_search
from aprlab.onion.clock import Budget
from aprlab.onion.peeling import peel

REF = paths.embedded_model()


def test_no_time_at_all_is_said_and_is_not_healthy() -> None:
    verdict = peel(None, REF, deadline=0, threads=1)
    assert (verdict.verdict, verdict.exit_code, verdict.findings) == ("unproved", 4, [])
    assert "not every fault" in verdict.not_looked_at["forward"]
    assert verdict.health["conversation"]["nats"] < verdict.health["conversation"]["limit"]  # health is looked at all the same


def test_the_command_says_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_with(REF, tmp_path / "b.apr", ["q4k-d-dmin"])
    found = {}
    for deadline in ("0", "60"):
        assert run_cli(["peel", str(tmp_path / "b.apr"), "--json", "--deadline", deadline]) in (3, 4)
        found[deadline] = json.loads(capsys.readouterr().out)
    assert "the 0 s of the deadline were over" in found["0"]["not_looked_at"]["forward"] and found["60"]["not_looked_at"] == {}
    assert found["60"]["findings"][0]["fault"] == "q4k-d-dmin"


@pytest.mark.parametrize("runs", [1, 4])
def test_no_run_begins_after_the_deadline(runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over after so many runs; the one that the search needs for its own start is the only other."""
    convert_with(REF, tmp_path / "b.apr", ["swapped-k-v", "q4k-d-dmin"])
    done: list[float] = []
    measure = blind_search.nats
    monkeypatch.setattr(blind_search, "nats", lambda *args: done.append(measure(*args)) or done[-1])
    monkeypatch.setattr(Budget, "over", property(lambda self: len(done) >= runs))
    verdict = peel(None, tmp_path / "b.apr", threads=1)
    assert 1 <= len(done) <= runs + 1
    assert verdict.exit_code and "were over" in verdict.not_looked_at["forward"]


def test_next_to_a_reference_the_catalogue_is_left_out_and_the_rest_stands(tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["swapped-k-v"])
    verdict = peel(REF, tmp_path / "b.apr", deadline=0, threads=1)
    assert (verdict.verdict, verdict.faults) == ("broken", [])
    assert {f.code for f in verdict.findings} == {"naming.modules-exchanged"} and verdict.repair is not None
    assert "not every fault of the catalogue" in verdict.not_looked_at["catalogue"]
    assert "not every fault of the catalogue" in str(verdict)
    whole = peel(REF, tmp_path / "b.apr", fast=True)
    assert (whole.faults, "catalogue" in whole.not_looked_at) == (["swapped-k-v"], False)


@pytest.mark.parametrize("deadline", [-1.0, float("nan")])
def test_a_deadline_is_a_time(deadline: float) -> None:
    with pytest.raises(UsageError, match="deadline"):
        peel(None, REF, deadline=deadline)


def test_a_budget_counts_work() -> None:
    budget = Budget(1e9)
    assert not budget.over and budget.in_words == "" and 0 <= budget.spent < 1e9
    budget.leave_out("a")
    budget.leave_out("a")
    assert budget.in_words == "the 1e+09 s of the deadline were over: a"
    assert Budget(0).over
