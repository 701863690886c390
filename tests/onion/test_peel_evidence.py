"""All faults alone, pairs of them, healthy variants: the figures that `docs/peel.md` promises."""

from __future__ import annotations

from pathlib import Path

import peel_evidence as evidence
import pytest


def _judge(rows: list[evidence.Row], least: float) -> None:
    missed = [str(row) for row in rows if not row.named]
    assert len(rows) - len(missed) >= least * len(rows), missed
    healed = [str(row) for row in rows if not row.mended]
    assert len(rows) - len(healed) >= least * len(rows), healed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


def test_every_file_fault_is_named(folder: Path) -> None:
    rows = [row for id in evidence.file_faults() if (row := evidence.file_row(folder, (id,))) is not None]
    assert len(rows) >= 60
    _judge(rows, 0.98)


def test_every_run_fault_is_named() -> None:
    rows = [row for id in evidence.run_faults() if (row := evidence.run_row((id,))) is not None]
    assert len(rows) >= 40
    _judge(rows, 0.98)


def test_pairs_are_named(folder: Path) -> None:
    rows = list(evidence.pairs(folder))
    assert len(rows) >= 60
    _judge(rows, 0.90)


def test_no_false_alarm(folder: Path) -> None:
    found = {name: verdict.verdict for name, verdict in evidence.healthy(folder)}
    same = {"as it is", "other dialect", "zstd", "lz4", "metadata in another order"}
    assert found == {name: "same" if name in same else "equivalent" for name in found}
    assert len(found) > len(same)
