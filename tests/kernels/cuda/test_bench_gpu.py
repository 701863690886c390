"""The script for a GPU, rehearsed: every step is in the record, a step that fails stops no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pages import script

from aprlab.kernels.cuda import verify

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    module = script(SCRIPT)
    monkeypatch.setattr(verify, "cases", lambda: iter([verify.add_case()]))
    monkeypatch.setattr(module, "SMALL", ((4, 256),))
    monkeypatch.setattr(module, "SMALL_BYTES", 1)
    monkeypatch.setattr(module, "tiny_logits", lambda make: {"f32": "0"})
    return module


def test_a_rehearsal_leaves_a_record_of_every_step_and_says_that_it_is_one(bench, monkeypatch, tmp_path, capsys) -> None:
    def speed(path, make, tokens, prompts):
        raise MemoryError("no room")

    monkeypatch.setattr(bench, "speed", speed)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--rehearse", "--output", str(tmp_path / "r.json")])
    monkeypatch.setattr(verify, "TIMED_BYTES", verify.TIMED_BYTES)  # the script sets it
    bench.main()
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["rehearsal"] is True and "no" in record["machine"]["device"]
    assert [case["as_the_machine"] for case in record["cases"]] == [True]
    assert len(record["matvecs"]) == 18 and record["copy"]["bytes_a_second"] > 0
    assert record["embedded"] == {"failed": "MemoryError: no room"}
    said = capsys.readouterr().out
    assert "1 of 1 cases passed; bit for bit as on the PTX machine: 1, others 0" in said
