"""The run's cost counts: what types cannot explain is not equivalent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, as_type, file_with

from aprlab.onion import run_cost
from aprlab.onion.peeling import peel
from aprlab.quants import types


def f16(tmp_path: Path) -> Path:
    return file_with(tmp_path / "f16.gguf", {"blk.1.ffn_up.weight": lambda t: as_type(t, types.F16)})


def test_what_types_explain_is_equivalent(tmp_path: Path) -> None:
    verdict = peel(REF, f16(tmp_path), threads=1, max_tokens=3)
    assert verdict.verdict == "equivalent", str(verdict)
    cost = verdict.findings[0].evidence["cost"]
    assert 0 < cost["distance"] < 1e-2


def test_what_types_do_not_explain_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the layers measured a loss that is ten thousand times smaller than what the run shows."""
    whole = run_cost.allowed
    monkeypatch.setattr(run_cost, "allowed", lambda *x: tuple(np.array(whole(*x)) * 1e-4))
    verdict = peel(REF, f16(tmp_path), threads=1, max_tokens=3)
    assert (verdict.verdict, verdict.exit_code) == ("ambiguous", 4)
    assert verdict.findings[0].code == "forward.costs-too-much"
    assert verdict.findings[0].evidence["distance_allowed"] < verdict.findings[0].evidence["distance"]
