"""All faults alone, pairs of them, healthy variants: the figures that `docs/peel.md` promises."""

from __future__ import annotations

from pathlib import Path

import peel_evidence as evidence
import pytest
from noise import noise

from aprlab.onion import explanation
from aprlab.onion.file_case import Deviation, FileCase


def _judge(rows: list[evidence.Row], least: float) -> None:
    missed = [str(row) for row in rows if not row.named]
    assert len(rows) - len(missed) >= least * len(rows), missed
    healed = [str(row) for row in rows if not row.repaired]
    assert len(rows) - len(healed) >= least * len(rows), healed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def file_rows(folder: Path) -> list[evidence.Row]:
    """Every file fault alone."""
    return list(evidence.file_singles(folder))


@pytest.fixture(scope="module")
def run_rows() -> dict[str, evidence.Row]:
    """Every run fault alone."""
    rows = {id: evidence.run_row((id,)) for id in evidence.run_faults()}
    return {id: row for id, row in rows.items() if row is not None}


def test_every_file_fault_is_named(file_rows: list[evidence.Row]) -> None:
    assert len(file_rows) >= 60
    _judge(file_rows, 0.98)


def test_no_verdict_hangs_on_wording(file_rows: list[evidence.Row], folder: Path) -> None:
    """Every fourth fault."""
    some = file_rows[::4]
    with noise():
        noisy = [evidence.file_row(folder, row.put) for row in some]
    assert [row and row.essence for row in noisy] == [row.essence for row in some]


def test_no_verdict_on_a_run_hangs_on_wording(run_rows: dict[str, evidence.Row]) -> None:
    """Every eighth fault."""
    plain = dict(list(run_rows.items())[::8])
    assert len(plain) >= 5
    with noise():
        noisy = {id: evidence.run_row((id,)) for id in plain}
    assert {id: row and row.essence for id, row in noisy.items()} == {id: row.essence for id, row in plain.items()}


def test_noise_shows_a_decision_by_wording(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: edits of the finished file are known by how their sentences begin, as they once were."""

    def by_words(case: FileCase) -> dict[str, list[Deviation]]:
        work = [d for d in case.deviations if d.mechanism.startswith("the file is cut off")]
        return {"truncated": work} if work else {}

    monkeypatch.setattr(explanation, "_edits", by_words)
    plain = evidence.file_row(folder, ("truncated",))
    with noise():
        noisy = evidence.file_row(folder, ("truncated",))
    assert plain is not None and noisy is not None
    assert plain.verdict.faults == ["truncated"]
    assert noisy.essence != plain.essence


def test_every_run_fault_is_named(run_rows: dict[str, evidence.Row]) -> None:
    assert len(run_rows) >= 40
    _judge(list(run_rows.values()), 0.98)


def test_pairs_are_named(folder: Path) -> None:
    rows = list(evidence.pairs(folder, files=14, runs=8))  # three times as many: python tests/onion/peel_evidence.py
    assert len(rows) == 22
    _judge(rows, 0.90)


def test_no_false_alarm(folder: Path) -> None:
    found = {name: verdict.verdict for name, verdict in evidence.healthy(folder)}
    same = {"as it is", "other dialect", "zstd", "lz4", "metadata in another order"}
    assert found == {name: "same" if name in same else "equivalent" for name in found}
    assert len(found) > len(same)
