"""One file that opens and talks nonsense: the catalogue's faults are undone, a run decides, and what is gone is said."""

from __future__ import annotations

import json
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
from aprlab.gates import attempt, repairs
from aprlab.instruments.fingerprints import fingerprint
from aprlab.lab.pairs import given_for, named
from aprlab.onion import blind_search, health, inverses
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import Verdict

REF = paths.embedded_model()


def historic(seams: Seams) -> Seams:
    return replace(seams, metadata=lambda metadata: {k: v for k, v in metadata.items() if k != "source_metadata"})


@pytest.mark.parametrize("id", ["swapped-k-v", "q4k-d-dmin", "q5k-layout", "aprq4-relabelled"])
def test_a_fault_is_named_and_undone_bit_for_bit_without_a_reference(
    id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(repairs, "_gates", lambda *args: [])  # test_repairs.py has them; bytes are compared here
    given = given_for([FAULTS[id]])
    convert(REF, tmp_path / "healthy.apr", seams=historic, **given)
    convert_with(REF, tmp_path / "b.apr", [id], **given)
    outcome = attempt(tmp_path / "b.apr", tmp_path / "f.apr", threads=1)
    assert (outcome.verdict.verdict, outcome.verdict.faults) == ("broken", [id])
    assert outcome.exit_code == 0, outcome.headline
    assert (tmp_path / "f.apr").read_bytes() == (tmp_path / "healthy.apr").read_bytes()
    evidence = outcome.verdict.findings[0].evidence
    assert evidence["nats_after"] < health.limits_of("embedded", 4.8).talk[0] < evidence["nats_before"]


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
    back = inverses.undone(change, broken)
    assert back is not None and not np.array_equal(broken.raw, tensor.raw) and np.array_equal(back.raw, tensor.raw)


@pytest.mark.parametrize("id", ["q4k-min-lost", "q4k-scale-bits", "scales-flushed"])
def test_what_loses_bits_does_not_come_back(id: str) -> None:
    seams = FAULTS[id].seams
    assert seams is not None
    change = seams(healthy_seams(apr.DIALECTS["aprender"])).tensor
    tensor = next(t for t in open_model(REF).tensors.values() if t.type.name == "Q4_K")
    assert inverses.undone(change, tensor) is None or np.array_equal(change(tensor).raw, tensor.raw)


def test_repair_alone_of_a_healthy_file_writes_nothing(tmp_path: Path) -> None:
    from aprlab.gates.repairs import repair

    with pytest.raises(UsageError) as refused:
        repair(REF, tmp_path / "f.gguf", threads=1)
    assert refused.value.code == "repair.nothing-found" and list(tmp_path.iterdir()) == []


# ── what is named by a run, by marks, by the catalogue's own converters ───────────────────────────────────────────────


def judged(id: str, folder: Path) -> Verdict:
    convert_with(REF, folder / "b.apr", id.split("+"), **given_for([FAULTS[part] for part in id.split("+")]))
    return peel(None, folder / "b.apr", threads=1)


@pytest.mark.parametrize(
    "id",
    ["swapped-layers", "q4k-scales-plain", "scales-floored", "rope-norm", "mha-dims", "wrong-eps", "template-doubled",
     "offset-shifted", "unknown-to-f32", "dims-swapped", "wrong-norm"],
)  # fmt: skip
def test_a_fault_is_named_without_a_reference(id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "examine", lambda session, tell: health.Health())  # what it says is not asked here
    verdict = judged(id, tmp_path)
    assert id in named(verdict), str(verdict)
    assert {f.layer for f in verdict.findings if f.fault == id} == {FAULTS[id].layer}
    assert verdict.exit_code != 0


def test_a_few_tokens_that_gain_by_an_exchange_prove_nothing(tmp_path: Path) -> None:
    """AprQ4 blocks happen to speak better in the mean with layers 1 and 2 exchanged, and most tokens are less certain."""
    convert(REF, tmp_path / "q.apr", quantize="aprq4")
    verdict = peel(None, tmp_path / "q.apr", threads=1)
    undone = verdict.health["undone"]
    assert undone["swapped-layers"] < (1 - blind_search.GAIN) * undone["as it is"]
    assert verdict.verdict == "healthy" and all(f.harmless for f in verdict.findings)


def test_a_transposition_is_named_and_not_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run says that the transposed values speak; the bytes before the second encoding are gone."""
    verdict = judged("transposed-embedding", tmp_path)
    assert verdict.faults == ["transposed-embedding"] and verdict.findings[0].evidence["exact"] is False
    assert run_cli(["repair", str(tmp_path / "b.apr"), "-o", str(tmp_path / "f.apr")]) == 3
    assert "cannot be repaired without a reference" in capsys.readouterr().err
    assert not (tmp_path / "f.apr").exists()


def test_two_faults_are_both_found_where_one_cannot_be_undone(tmp_path: Path) -> None:
    verdict = judged("swapped-k-v+q4k-min-lost", tmp_path)
    assert set(verdict.faults) == {"swapped-k-v", "q4k-min-lost"}


def test_decoded_blocks_are_told_from_trained_floats(tmp_path: Path) -> None:
    verdict = judged("default-dequantise", tmp_path)
    assert (verdict.verdict, verdict.faults) == ("healthy", ["default-dequantise"])
    assert all(f.harmless for f in verdict.findings)
    with open_model(tmp_path / "b.apr") as model:
        rng = np.random.default_rng(3)
        tensors = {
            name: t if len(t.shape) < 2 else t.replace(content=(
                t.dequantise() + rng.normal(0, 1e-3, t.shape).astype(np.float32)).view(np.uint8).reshape(-1))
            for name, t in model.tensors.items()
        }  # fmt: skip
        assert peel(None, model.with_changes(tensors=tensors), threads=1).findings == []


# ── a published table in place of a reference ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "healthy.json"
    path.write_text(json.dumps({"fingerprints": [print_.row() for print_ in fingerprint(REF)]}, default=str))
    return path


def test_a_table_names_the_tensors_that_differ(statistics: Path, tmp_path: Path) -> None:
    assert peel(None, REF, fast=True, statistics=statistics).findings == []
    name = "blk.2.attn_v.bias"
    with open_model(REF) as model:
        tensor = model.tensors[name]
        changed = (tensor.dequantise() * np.float32(1.01)).view(np.uint8)
        verdict = peel(None, model.with_changes(tensors={**model.tensors, name: tensor.replace(content=changed)}),
                       fast=True, statistics=statistics)  # fmt: skip
    assert [(f.code, f.tensors) for f in verdict.findings] == [("weights.statistics-differ", [name])]
    assert verdict.compared["statistics"] == statistics.name and verdict.exit_code == 4


def test_a_table_knows_a_tensor_under_another_name(statistics: Path, tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["swapped-gate-up"])
    found = peel(None, tmp_path / "b.apr", fast=True, statistics=statistics).findings
    assert {f.code for f in found} == {"weights.statistics-differ"}
    first = found[0].tensors[0]
    other = first.replace("ffn_gate", "ffn_up") if "ffn_gate" in first else first.replace("ffn_up", "ffn_gate")
    assert found[0].evidence["agrees_with"] == other != first
    with pytest.raises(UsageError) as refused:
        peel(REF, REF, statistics=statistics)
    assert refused.value.code == "peel.two-references"
