"""One file that opens and talks nonsense: the catalogue's faults are undone, a run decides, and what is gone is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprlab import paths
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert
from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, convert_with
from aprlab.formats import apr, open_model
from aprlab.gates import attempt
from aprlab.onion import blind_search
from aprlab.onion.peeling import peel

REF = paths.embedded_model()


def historic(seams: Seams) -> Seams:
    return replace(seams, metadata=lambda metadata: {k: v for k, v in metadata.items() if k != "source_metadata"})


@pytest.mark.parametrize("id", ["swapped-k-v", "permuted-qk", "q4k-d-dmin", "q4k-nibble-pairs"])
def test_a_fault_is_named_and_undone_bit_for_bit_without_a_reference(id: str, tmp_path: Path) -> None:
    convert(REF, tmp_path / "healthy.apr", seams=historic)
    convert_with(REF, tmp_path / "b.apr", [id])
    outcome = attempt(tmp_path / "b.apr", tmp_path / "f.apr", threads=1)
    assert (outcome.verdict.verdict, outcome.verdict.faults) == ("broken", [id])
    assert outcome.exit_code == 0, outcome.headline
    assert (tmp_path / "f.apr").read_bytes() == (tmp_path / "healthy.apr").read_bytes()
    evidence = outcome.verdict.findings[0].evidence
    assert evidence["nats_after"] < blind_search.HEALTH_SMALL < evidence["nats_before"]


@pytest.mark.parametrize(("id", "says"), [("q4k-min-lost", "minimum of every block is zero"), ("q4k-scale-bits", "top bits")])
def test_what_is_gone_is_named_and_refused(id: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_with(REF, tmp_path / "b.apr", [id])
    verdict = peel(None, tmp_path / "b.apr", threads=1)
    assert verdict.faults == [id] and says in str(verdict.findings[0])
    assert run_cli(["repair", str(tmp_path / "b.apr"), "-o", str(tmp_path / "f.apr")]) == 3
    said = capsys.readouterr().err
    assert "cannot be repaired without a reference" in said and says in said
    assert not (tmp_path / "f.apr").exists()


def test_a_healthy_file_is_not_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*args: object) -> object:
        raise AssertionError

    monkeypatch.setattr(blind_search, "inverses", never)
    assert peel(None, REF, threads=1).findings == []
    convert_with(REF, tmp_path / "b.apr", ["swapped-k-v"])
    with pytest.raises(AssertionError):  # the broken one is
        peel(None, tmp_path / "b.apr", threads=1)


def test_an_inverse_that_does_not_help_is_no_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the run as a judge, the first inverse would be believed."""
    convert_with(REF, tmp_path / "b.apr", ["lost-k-biases"])
    found = [f.fault for f in peel(None, tmp_path / "b.apr", threads=1).findings]
    assert "permuted-qk" not in found and "swapped-k-v" not in found


@pytest.mark.parametrize("id", ["q4k-nibbles-exchanged", "q4k-d-dmin", "q4k-nibble-pairs"])
def test_a_permutation_comes_back(id: str) -> None:
    seams = FAULTS[id].seams
    assert seams is not None
    change = seams(healthy_seams(apr.DIALECTS["aprender"])).tensor
    tensor = next(t for t in open_model(REF).tensors.values() if t.type.name == "Q4_K")
    broken = change(tensor)
    back = blind_search.undone(change, broken)
    assert back is not None and not np.array_equal(broken.raw, tensor.raw) and np.array_equal(back.raw, tensor.raw)


@pytest.mark.parametrize("id", ["q4k-min-lost", "q4k-scale-bits", "scales-flushed"])
def test_what_loses_bits_does_not_come_back(id: str) -> None:
    seams = FAULTS[id].seams
    assert seams is not None
    change = seams(healthy_seams(apr.DIALECTS["aprender"])).tensor
    tensor = next(t for t in open_model(REF).tensors.values() if t.type.name == "Q4_K")
    assert blind_search.undone(change, tensor) is None or np.array_equal(change(tensor).raw, tensor.raw)


def test_repair_alone_of_a_healthy_file_writes_nothing(tmp_path: Path) -> None:
    from aprlab.gates.repairs import repair

    with pytest.raises(UsageError) as refused:
        repair(REF, tmp_path / "f.gguf", threads=1)
    assert refused.value.code == "repair.nothing-found" and list(tmp_path.iterdir()) == []
