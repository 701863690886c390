"""One file without a reference: words that are true, and tests of health that their faults fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from variants import variant

from aprlab import gates, paths
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert
from aprlab.faults import convert_with
from aprlab.formats import open_model, raw
from aprlab.onion import health
from aprlab.onion.layers.tokenizer import rotation
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import EXIT

REF = paths.embedded_model()
ONE_FILE = {"healthy", "suspect", "broken", "unproved", "not-comparable"}


def test_a_healthy_file_has_its_figures_in_the_verdict() -> None:
    verdict = peel(None, REF)
    assert (verdict.verdict, verdict.exit_code, verdict.findings) == ("healthy", 0, [])
    assert verdict.compared == {"reference": None, "candidate": REF.name}
    assert verdict.alone
    assert "alone (no reference)" in str(verdict).splitlines()[0]
    figures = verdict.to_json()["health"]
    assert figures["kind"] == "embedded"
    assert figures["conversation"]["nats"] < figures["conversation"]["limit"]
    assert len(figures["text"]["by_position"]) == 4
    assert figures["prefill beside decode"]["rel_l2"] < 1e-5
    assert figures["answers"]["What is 2+2?"] == "2 + 2 equals 4."


def test_fast_never_says_healthy() -> None:
    verdict = peel(None, REF, fast=True)
    assert (verdict.verdict, verdict.exit_code, verdict.health) == ("unproved", 4, {})


@pytest.mark.parametrize("fault", ["swapped-k-v", "lost-qkv-biases", "q4k-nibbles-exchanged"])
def test_garbage_is_never_healthy(fault: str, tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", [fault])
    verdict = peel(None, tmp_path / "b.apr")
    assert verdict.verdict in ("broken", "suspect"), str(verdict)
    assert verdict.exit_code == EXIT[verdict.verdict] != 0
    assert any(not f.harmless for f in verdict.findings)


def test_a_silent_fault_is_suspect(tmp_path: Path) -> None:
    """Gate and up exchanged: the embedded model still answers rightly, but with a hundred times the surprise."""
    convert_with(REF, tmp_path / "b.apr", ["swapped-gate-up"])
    verdict = peel(None, tmp_path / "b.apr")
    assert verdict.verdict in ("suspect", "broken"), str(verdict)


def test_an_unknown_kind_is_neither_healthy_nor_broken_for_what_it_says(tmp_path: Path) -> None:
    """Of a model with few layers nobody here knows how well it should speak: that it does not proves nothing."""
    layers = [name for name in open_model(REF).tensors if name.startswith("blk.") and int(name.split(".")[1]) > 1]
    path = variant(REF, tmp_path / "c.gguf", keys={"qwen2.block_count": 2}, tensors=dict.fromkeys(layers))
    verdict = peel(None, path)
    assert verdict.health["kind"] is None
    assert verdict.verdict in ("unproved", "suspect"), str(verdict)
    assert verdict.exit_code == 4


def test_a_test_that_is_not_passed_is_said_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "limits_of", lambda kind, bits: health.Limits(talk=(0.0001, 0.9)))
    verdict = peel(None, REF, deadline=0)  # the figures are there before the search for a cause
    assert verdict.verdict == "suspect"
    assert verdict.findings[0].code == "forward.language"
    monkeypatch.setattr(health, "limits_of", lambda kind, bits: health.Limits(talk=(0.0001, 0.0002)))
    assert peel(None, REF, deadline=0).verdict == "broken"


def test_unlike_logits_together_and_one_by_one_are_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SERIAL_TOLERANCE", 1e-12)
    verdict = peel(None, REF)
    assert (verdict.verdict, [f.code for f in verdict.findings]) == ("suspect", ["forward.serial"])


# ── what the strict reader refuses ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("keys", "rule", "layer", "word"),
    [
        ({"qwen2.attention.layer_norm_rms_epsilon": 0.0}, "config.out-of-range", "config", "broken"),
        ({"qwen2.attention.head_count": 0}, "config.out-of-range", "config", "broken"),
        ({"qwen2.rope.scaling.type": "longrope"}, "config.unsupported-rope-scaling", "config", "unproved"),
        ({"qwen2.attention.causal": False}, "keys.not-handled", "config", "unproved"),
        ({"tokenizer.chat_template": "{% if %}"}, "template.fails", "tokenizer", "broken"),
        ({"tokenizer.ggml.token_type": [1, 3]}, "tokenizer.token-types-count", "tokenizer", "broken"),
    ],
)
def test_what_run_refuses_is_a_finding_under_its_own_code(
    keys: dict[str, object], rule: str, layer: str, word: str, tmp_path: Path
) -> None:
    path = variant(REF, tmp_path / "c.gguf", keys=keys)
    alone = peel(None, path)
    assert (alone.verdict, alone.findings[0].layer) == (word, layer), str(alone)
    assert alone.findings[0].parameters["rule"] == rule
    pair = peel(REF, path)
    assert pair.exit_code != 0
    assert any(f.layer == layer and not f.harmless for f in pair.findings), str(pair)


def test_a_file_of_another_kind_is_unproved_alone_and_not_comparable_in_a_pair(tmp_path: Path) -> None:
    path = variant(REF, tmp_path / "c.gguf", keys={"general.architecture": "gemma"})
    for ref, word in ((None, "unproved"), (REF, "not-comparable")):
        verdict = peel(ref, path)
        assert (verdict.verdict, verdict.exit_code) == (word, 4)


def test_a_context_without_room_is_never_equivalent(tmp_path: Path) -> None:
    path = variant(REF, tmp_path / "c.gguf", keys={"qwen2.context_length": 1})
    for ref in (None, REF):
        verdict = peel(ref, path)
        assert (verdict.verdict, verdict.findings[0].code) == ("broken", "config.context-too-short")


def test_zero_and_one_are_no_flags() -> None:
    assert raw.flag(0) != False and raw.flag(1) != True  # noqa: E712
    assert raw.whole(True) != 1 and raw.whole(False) != 0
    assert isinstance(raw.number(10**400), raw.Wrong)
    assert isinstance(raw.number(float("nan")), raw.Wrong)
    assert isinstance(raw.texts(["a", 1]), raw.Wrong)
    assert isinstance(raw.wholes([1, True]), raw.Wrong)
    assert hash(raw.text(["x"])) == hash(raw.text(["y"]))


def test_a_rotation_is_found_in_linear_work() -> None:
    for shift in (1, 5, 49_999):
        made = list(range(50_000))
        assert rotation(made[-shift:] + made[:-shift], made) == shift
    assert rotation(["a"] * 100_000, ["a"] * 99_999 + ["b"]) is None
    assert rotation([1, 2, 1, 2], [2, 1, 2, 1]) == 1
    assert rotation([1, 2], [2, 2]) is None


# ── opened models ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_opened_models_stand_on_both_sides(tmp_path: Path) -> None:
    convert(REF, tmp_path / "c.apr")
    with open_model(REF) as a, open_model(tmp_path / "c.apr") as b:
        assert peel(a, b).verdict == "same"
        assert peel(None, b).verdict == "healthy"
        assert all(r.passed for r in gates.run(a, b, prompts=["What is 2+2?"], max_tokens=4))
        name = "output_norm.weight"
        values = -b.tensors[name].dequantise()
        b.tensors[name] = b.tensors[name].replace(raw=np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1))
        changed = peel(a, b)
        assert (changed.verdict, changed.findings[0].tensors) == ("broken", [name])
        failed = [r for r in gates.run(a, b, prompts=["What is 2+2?"], max_tokens=4) if r.passed is False]
        assert failed, "what was changed in memory counts"


# ── the command line ──────────────────────────────────────────────────────────────────────────────────────────────


def test_only_healthy_ends_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {word for word, code in EXIT.items() if code == 0} == {"same", "equivalent", "healthy"}
    assert run_cli(["peel", str(REF)]) == 0
    assert "alone (no reference): healthy" in capsys.readouterr().out
    assert run_cli(["peel", str(REF), "--fast"]) == 4
    convert(REF, tmp_path / "v.apr", seams=lambda s: replace(s, metadata=lambda m: {**s.metadata(m), "rms_norm_eps": 0}))
    assert run_cli(["peel", str(tmp_path / "v.apr")]) == 3


def test_one_norm_of_ones_is_suspect_and_a_model_without_training_is_not(tmp_path: Path) -> None:
    model = open_model(REF)
    norms = [name for name in model.tensors if name.endswith("norm.weight")]
    ones = {n: model.tensors[n].replace(content=np.ones(model.tensors[n].shape, np.float32).view(np.uint8)) for n in norms}
    one = peel(None, variant(REF, tmp_path / "one.gguf", tensors={"output_norm.weight": ones["output_norm.weight"]}), fast=True)
    assert [(f.code, f.tensors) for f in one.findings] == [("weights.constant", ["output_norm.weight"])]
    all_ = peel(None, variant(REF, tmp_path / "all.gguf", tensors=ones), fast=True)
    assert "weights.constant" not in {f.code for f in all_.findings}


def test_norms_that_are_no_numbers_are_a_finding_and_no_crash(tmp_path: Path) -> None:
    tensor = open_model(REF).tensors["blk.2.attn_norm.weight"]
    swapped = tensor.replace(content=tensor.raw.view("<u4").byteswap().view(np.uint8))
    verdict = peel(None, variant(REF, tmp_path / "x.gguf", tensors={tensor.name: swapped}), threads=1)
    assert verdict.verdict == "broken" and "weights.scales-not-finite" in {f.code for f in verdict.findings}
