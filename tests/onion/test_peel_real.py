"""The most telling faults on the real 0.5B, whose types and shapes the embedded model does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprlab.faults import convert_with
from aprlab.onion.peeling import peel

TELLING = [
    "GH-190", "GH-186", "unknown-to-f32", "dims-swapped", "swapped-gate-up", "lost-qkv-biases", "q5-high-bits", "rope-theta",
]  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("id", TELLING)
def test_named_and_repaired(real_05b: Path, tmp_path: Path, id: str) -> None:
    convert_with(real_05b, tmp_path / "broken.apr", [id])
    verdict = peel(real_05b, tmp_path / "broken.apr", max_tokens=4)  # the answer is eight tokens long; four tell as much
    names = {id for f in verdict.findings for id in (f.fault, *f.evidence.get("leaves_the_same_file_as", []))}
    assert verdict.verdict == "broken"
    assert id in names
    assert verdict.repair is not None
    assert verdict.repair.minimal
    assert all(verdict.repair.proof["after"][key] for key in ("ids", "tokens", "text"))
