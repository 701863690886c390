"""`peel` on faults it was made for and on faults it was never shown; repair; the promise of the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aprlab import paths
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert, export
from aprlab.conversion.seams import Seams
from aprlab.errors import UsageError
from aprlab.faults import convert_with
from aprlab.formats import open_model
from aprlab.gates.repairs import repair
from aprlab.model.tensor import Tensor
from aprlab.onion.fixes import ddmin
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import LAYERS, SCHEMA, Verdict
from aprlab.onion.words import TEMPLATES

REF = paths.embedded_model()
KEYS = [
    "schema", "verdict", "compared", "engine", "engine_asked", "findings", "first_divergence", "repair", "health",
    "cost", "not_looked_at", "instruments", "seconds",
]  # fmt: skip


def broken(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """The embedded model as APR, its tensors changed on the way by a function that no catalogue knows."""

    def seams(s: Seams) -> Seams:
        return replace(s, tensor=lambda t: change(s.tensor(t)))

    convert(REF, tmp_path / "strange.apr", seams=seams)
    return tmp_path / "strange.apr"


def bytes_changed(name: str, edit: Callable[[np.ndarray], None]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        if tensor.name != name:
            return tensor
        raw = np.array(tensor.raw)
        edit(raw)
        return tensor.replace(raw=raw)

    return change


def only(verdict: Verdict, layer: str) -> None:
    assert verdict.verdict == "broken"
    assert verdict.exit_code == 3
    assert verdict.faults == [], "no id may be claimed for what the catalogue does not know"
    assert [f.layer for f in verdict.findings] == [layer]
    assert verdict.repair is not None
    assert verdict.repair.minimal


# ── what it has not been tuned on ─────────────────────────────────────────────────────────────────────────────────


def test_a_range_of_bytes_overwritten(tmp_path: Path) -> None:
    name = "blk.2.ffn_up.weight"

    def edit(raw: np.ndarray) -> None:
        raw[4321:5000] ^= 0x5A

    verdict = peel(REF, broken(tmp_path, bytes_changed(name, edit)))
    only(verdict, "weights")
    found = verdict.findings[0]
    assert found.tensors == [name]
    assert found.evidence["ranges"] == [[4321, 5000]]
    assert found.evidence["blocks"] == list(range(4321 // 144, 4999 // 144 + 1))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence["point"] == "layers.2.up"


def test_two_tensors_of_one_shape_exchanged(tmp_path: Path) -> None:
    with open_model(REF) as model:
        pair = ["blk.1.attn_output.weight", "blk.5.attn_output.weight"]
        raws = {pair[0]: model.tensors[pair[1]].raw, pair[1]: model.tensors[pair[0]].raw}
        verdict = peel(REF, broken(tmp_path, lambda t: t.replace(raw=np.array(raws[t.name])) if t.name in raws else t))
    only(verdict, "naming")
    assert sorted(verdict.findings[0].tensors) == pair
    assert verdict.findings[0].code == "naming.layers-exchanged"
    assert verdict.findings[0].parameters == {"first": "1", "second": "5"}
    assert "layers 1 and 5" in verdict.findings[0].mechanism


def test_one_field_of_one_block(tmp_path: Path) -> None:
    def edit(raw: np.ndarray) -> None:
        raw[7 * 144 + 1] ^= 0x04  # the high byte of d: another scale, still a number

    verdict = peel(REF, broken(tmp_path, bytes_changed("blk.3.attn_k.weight", edit)))
    only(verdict, "weights")
    assert verdict.findings[0].evidence["fields"] == ["d"]
    assert verdict.findings[0].evidence["blocks"] == [7]
    assert verdict.findings[0].cause.label == "weights.field-of-one-block(field=d)"
    assert "field 'd' of one block" in verdict.findings[0].mechanism


def test_one_bias_zeroed(tmp_path: Path) -> None:
    verdict = peel(REF, broken(tmp_path, bytes_changed("blk.4.attn_v.bias", lambda raw: raw.fill(0))))
    only(verdict, "weights")
    assert verdict.findings[0].tensors == ["blk.4.attn_v.bias"]
    assert verdict.findings[0].cause.label == "weights.all-zeros(part=attn_v.bias)"
    assert "all zeros" in verdict.findings[0].mechanism


def test_rows_of_the_embedding_rotated(tmp_path: Path) -> None:
    def turn(tensor: Tensor) -> Tensor:
        if tensor.name != "token_embd.weight":
            return tensor
        return tensor.replace(raw=np.ascontiguousarray(np.roll(tensor.blocks(), 3, axis=0)).reshape(-1))

    verdict = peel(REF, broken(tmp_path, turn))
    only(verdict, "layout")
    assert verdict.findings[0].cause.label == "layout.rows-rotated(by=3)"
    assert "rotated by 3" in verdict.findings[0].mechanism


def test_a_rotated_vocabulary(tmp_path: Path) -> None:
    def turn(metadata: dict) -> dict:  # type: ignore[type-arg]
        tokens = metadata["tokenizer.vocabulary"]
        return {**metadata, "tokenizer.vocabulary": tokens[-5:] + tokens[:-5]}

    convert(REF, tmp_path / "v.apr", seams=lambda s: replace(s, metadata=lambda m: turn(s.metadata(m))))
    verdict = peel(REF, tmp_path / "v.apr")
    only(verdict, "tokenizer")
    assert verdict.findings[0].code == "tokenizer.rotated"
    assert verdict.findings[0].parameters == {"field": "tokens", "by": 5}
    assert "rotated by 5" in verdict.findings[0].mechanism


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_same_and_its_json(tmp_path: Path) -> None:
    convert(REF, tmp_path / "good.apr")
    verdict = peel(REF, tmp_path / "good.apr")
    found = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert list(found) == KEYS
    assert (found["verdict"], found["findings"], found["repair"], found["first_divergence"]) == ("same", [], None, None)
    assert verdict.exit_code == 0
    assert all(state is True for state in found["instruments"].values())


def test_tensors_of_one_side_only_come_first(tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["rope-norm", "dropped-tensor"])
    found = peel(REF, tmp_path / "b.apr").to_json()
    assert [f["fault"] for f in found["findings"]] == ["dropped-tensor", "rope-norm"]
    for finding in found["findings"]:
        assert list(finding) == [
            "layer", "fault", "code", "parameters", "tensors", "mechanism", "evidence", "confidence", "harmless", "ambiguous",
        ]  # fmt: skip
        assert finding["layer"] in LAYERS
        assert finding["code"] in TEMPLATES
        assert {part["code"] for part in finding["evidence"]["mechanisms"]} <= TEMPLATES.keys()
    assert (found["schema"], found["repair"]["minimal"]) == (SCHEMA, True)
    assert set(found["repair"]["set"]) == {"naming/dropped-tensor", "config/rope-norm"}


def test_a_faulty_instrument_voids_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aprlab import instruments

    convert_with(REF, tmp_path / "b.apr", ["GH-190"])
    results = [replace(r, ok=n > 0) for n, r in enumerate(instruments.selftest())]
    monkeypatch.setattr(instruments, "selftest", lambda: results)
    verdict = peel(REF, tmp_path / "b.apr")
    assert (verdict.verdict, verdict.exit_code) == ("not-comparable", 4)
    assert [f.layer for f in verdict.findings] == ["instrument"]
    assert verdict.instruments[results[0].name] is not True


def test_a_file_cut_inside_its_index_is_a_finding(tmp_path: Path) -> None:
    convert(REF, tmp_path / "good.apr")
    (tmp_path / "cut.apr").write_bytes((tmp_path / "good.apr").read_bytes()[:3000])
    verdict = peel(REF, tmp_path / "cut.apr")
    assert verdict.verdict == "broken"
    assert verdict.findings[0].layer == "container"
    assert verdict.findings[0].code == "container.unreadable"
    assert verdict.findings[0].parameters["rule"] == "reading.truncated"


def test_fast_runs_nothing(tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["GH-190", "rope-norm"])
    verdict = peel(REF, tmp_path / "b.apr", fast=True)
    assert verdict.faults == ["GH-190"]
    assert verdict.repair is None
    assert "run" not in verdict.seconds


def test_two_faults_that_mask_each_other(tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["swapped-gate-up", "lost-v-biases"])
    verdict = peel(REF, tmp_path / "b.apr")
    assert verdict.repair is not None
    assert set(verdict.repair.set) == {"naming/swapped-gate-up", "weights/lost-v-biases"}
    assert verdict.repair.minimal
    proof = verdict.repair.proof
    assert proof["one_at_a_time"].keys() == set(verdict.repair.set)
    assert proof["masking"], "with these weights, repairing one of the two alone makes it worse"
    for name in proof["masking"]:
        assert proof["one_at_a_time"][name]["distance"] > proof["before"]["distance"]


# ── repair ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("faults", [["GH-186"], ["GH-190", "GH-191"]])
def test_repair_without_the_source(tmp_path: Path, faults: list[str]) -> None:
    convert_with(REF, tmp_path / "b.apr", faults)
    before = (tmp_path / "b.apr").read_bytes()
    repair(tmp_path / "b.apr", tmp_path / "fixed.apr")
    assert peel(REF, tmp_path / "fixed.apr").verdict == "same"
    assert (tmp_path / "b.apr").read_bytes() == before
    with pytest.raises(UsageError, match="exists"):
        repair(tmp_path / "b.apr", tmp_path / "fixed.apr")
    with pytest.raises(UsageError, match="nothing to repair") as refused:
        repair(tmp_path / "fixed.apr", tmp_path / "again.apr", REF)
    assert refused.value.code == "repair.nothing-found"
    assert not (tmp_path / "again.apr").exists()


def test_repair_needs_the_source_for_lost_bytes(tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["lost-qkv-biases"])
    with pytest.raises(UsageError, match="without a reference") as refused:
        repair(tmp_path / "b.apr", tmp_path / "fixed.apr")
    assert refused.value.code == "repair.needs-a-reference"
    repair(tmp_path / "b.apr", tmp_path / "fixed.apr", REF)
    assert peel(REF, tmp_path / "fixed.apr").verdict == "same"


def test_ddmin_finds_the_smallest_set() -> None:
    for size in range(1, 9):
        items = list(range(8))
        wanted = {(3 * n + 1) % 8 for n in range(size)}
        asked: list[frozenset[int]] = []

        def holds(some: object, wanted: set[int] = wanted, asked: list[frozenset[int]] = asked) -> bool:
            asked.append(frozenset(some))  # type: ignore[call-overload]
            return wanted <= asked[-1]

        assert set(ddmin(items, holds)) == wanted
    assert ddmin([1, 2], lambda some: True) == []


# ── command line ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_exit_codes_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_with(REF, tmp_path / "b.apr", ["GH-190"])
    assert run_cli(["peel", str(REF), str(tmp_path / "b.apr"), "--json", "--out", str(tmp_path)]) == 3
    found = json.loads(capsys.readouterr().out)
    assert list(found) == KEYS
    assert found["findings"][0]["fault"] == "GH-190"
    kept = next(tmp_path.glob("*.json"))
    assert json.loads(kept.read_text())["verdict"] == "broken"
    assert "GH-190" in next(tmp_path.glob("*.html")).read_text()
    assert run_cli(["repair", str(tmp_path / "b.apr"), "-o", str(tmp_path / "f.apr")]) == 0
    assert run_cli(["peel", str(REF), str(tmp_path / "f.apr")]) == 0
    assert run_cli(["peel", str(REF), str(tmp_path / "none.apr")]) == 2


def test_two_engines(capsys: pytest.CaptureFixture[str]) -> None:
    engines = ["--engine", "reference", "--engine", "reference+rope-norm+gqa-modulo"]
    assert run_cli(["peel", *engines, str(REF), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert {f["fault"] for f in found["findings"]} == {"rope-norm", "gqa-modulo"}
    assert found["repair"]["minimal"] is True
    assert found["first_divergence"]["point"] == "layers.0.q_rope"
    assert found["first_divergence"]["position_0_equal"] is True


@pytest.mark.parametrize(("ref", "cand"), [("bf16", "f32"), ("f32", "bf16"), ("f16", "f32")])
def test_a_model_that_was_rounded_on_its_way_is_the_same_model(ref: str, cand: str, tiny, tmp_path) -> None:
    for dtype in {ref, cand}:
        export(tiny, tmp_path / dtype, format="safetensors", dtype=dtype)
    verdict = peel(tmp_path / ref, tmp_path / cand)
    assert verdict.verdict == "equivalent", str(verdict)
    assert {f.layer for f in verdict.findings} == {"dtype"} and all("rounded to" in f.mechanism for f in verdict.findings)
    assert {f.code for f in verdict.findings} <= {"dtype.file-rounded", "dtype.reference-rounded"}
    assert 0 < max(f.evidence["rel_l2"] for f in verdict.findings) < 0.01


@pytest.mark.parametrize("second", ["q4k-min-lost", "q4k-nibble-pairs", "q4k-nibbles-exchanged"])
def test_a_wrong_label_over_wrong_values_is_still_read_as_the_right_type(second: str, tiny, tmp_path) -> None:
    """Byte 8 makes legal AprQ4 of Q4_K, and the values are not the reference's: what they look like has to tell."""
    convert_with(tiny, tmp_path / "b.apr", ["GH-191", second])
    verdict = peel(tiny, tmp_path / "b.apr")
    assert {f.fault for f in verdict.findings} == {"GH-191", second}
    assert verdict.repair is not None and verdict.repair.proof["after"]["bitwise"]
    repair(tmp_path / "b.apr", tmp_path / "fixed.apr", tiny)  # the README's example
    assert peel(tiny, tmp_path / "fixed.apr").verdict == "same"
