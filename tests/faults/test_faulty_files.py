"""Making a broken file: it needs no source, nothing is left behind, and the command line says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from differences import box
from faulty_runs import QUESTION, answer

from aprlab.cli.app import run_cli
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, convert_with, session_with
from aprlab.model.model import Model


def test_a_broken_file_needs_no_source(model: Model, broken: Callable[[str], Path]) -> None:
    """No record of the source is left in it, and its footer is that of its writer: nothing but the fault is wrong."""
    assert "source_metadata" not in box(broken("GH-191")).metadata
    assert not box(broken("GH-191")).problems
    assert not [p for p in box(broken("overlapping-tensors")).problems if "CRC" in str(p)]


def test_nothing_is_left_and_nothing_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.apr"
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"x\.apr"):
        convert_with(tiny, out, ["GH-191"])
    with pytest.raises(UsageError, match="changes nothing here"):
        convert_with(tiny, out, ["GH-438"], force=True)
    assert out.read_bytes() == b"precious"
    report = convert_with(tiny, out, ["GH-191", "GH-190"], force=True)
    assert report.output == out
    assert report.bytes_out == out.stat().st_size
    assert [note.split(":")[0] for note in report.notes] == ["fault GH-191", "fault GH-190"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.apr"]
    with pytest.raises(UsageError, match="must not be compressed"):
        convert_with(tiny, tmp_path / "y.apr", ["truncated"], compress="lz4")


def test_dialect_realizar_can_be_broken_too(model: Model, tmp_path: Path) -> None:
    convert_with(model, tmp_path / "x.apr", ["GH-191", "rope-norm", "head-dim-guessed"], dialect="realizar")
    found = box(tmp_path / "x.apr")
    assert {entry.code for entry in found.entries} == {0, 8, 9}
    assert found.metadata["rope_type"] == 0
    assert found.metadata["num_attention_heads"] == model.config.head_count // 2
    with pytest.raises(UsageError, match="it needs the dialect aprender"):
        convert_with(model, tmp_path / "y.apr", ["raw-names"], dialect="realizar")


def test_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["faults"]) == 0
    assert f"{len(FAULTS)} faults" in capsys.readouterr().out
    assert run_cli(["faults", "--json"]) == 0
    assert [fault["id"] for fault in json.loads(capsys.readouterr().out)] == list(FAULTS)
    assert run_cli(["faults", "GH-370", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] == "layout"
    assert run_cli(["faults", "lost-v-biases"]) == 0
    assert "optional" in capsys.readouterr().out
    assert run_cli(["faults", "lost-bias"]) == 2
    assert "lost-qkv-biases" in capsys.readouterr().err

    out = str(tmp_path / "x.apr")
    assert run_cli(["convert", str(tiny), "-o", out, "--fault", "GH-191, GH-190", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reversible"] is False
    assert run_cli(["run", str(tiny), "-p", QUESTION, "-n", "6", "--fault", "byte-level-text,lost-qkv-biases", "--json"]) == 0
    wrong = json.loads(capsys.readouterr().out)
    assert wrong["text"] == answer(session_with(tiny, ["lost-qkv-biases", "byte-level-text"]), max_tokens=6)
