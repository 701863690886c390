"""A repair gives the healthy file back, or nothing: judged by a run and by the gates, and never a guess unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import shallow, unpadded, variant

from aprlab import paths
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert
from aprlab.conversion.seams import Seams
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, convert_with, file_faults
from aprlab.formats import gguf, open_model
from aprlab.gates import repairs
from aprlab.gates.repairs import attempt, repair
from aprlab.lab.pairs import given_for
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants import types

REF = paths.embedded_model()
OPTIONS: dict[str, Any] = {"threads": 1, "max_tokens": 4}


def historic(seams: Seams) -> Seams:
    """Files with faults carry no record of their source; their healthy twin must not either."""
    return replace(seams, metadata=lambda metadata: {k: v for k, v in metadata.items() if k != "source_metadata"})


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Model]:
    """The healthy file, by what it is converted with; made, opened and asked once."""
    folder, made = tmp_path_factory.mktemp("healthy"), dict[str, Model]()

    def model(given: dict[str, Any]) -> Model:
        if (key := repr(sorted(given.items()))) not in made:
            path = folder / f"{len(made)}.apr"
            convert(REF, path, seams=historic, **given)
            made[key] = open_model(path)
        return made[key]

    return model


# Decoded for good to a type that holds the values: nothing to repair, or repaired in the types that the file has now.
EQUIVALENT = {"GH-438-apr", "default-dequantise", "unknown-to-f32", "unknown-to-f32-warned"}
RE_ENCODED = {"double-reversal"}


@pytest.mark.parametrize("id", file_faults())
def test_the_repaired_file_is_the_healthy_one_byte_for_byte(
    id: str, healthy: Callable[[dict[str, Any]], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = given_for([FAULTS[id]])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_with(REF, tmp_path / "broken.apr", [id], **given)
    except UsageError as error:
        assert error.code == "faults.changes-nothing"
        pytest.skip("not for this model")
    right = healthy(given)
    monkeypatch.setattr(repairs, "_gates", lambda *args: [])  # a test of its own below; bytes are compared here
    monkeypatch.setattr(repairs, "MAX_TOKENS", 4)
    outcome = attempt(tmp_path / "broken.apr", tmp_path / "fixed.apr", right, **OPTIONS)
    if outcome.written is None:
        assert outcome.code == "repair.nothing-found" and id in EQUIVALENT, outcome.headline
        assert not (tmp_path / "fixed.apr").exists()
        return
    assert outcome.exit_code == 0 and {change.certainty for change in outcome.changes} == {"exact"}
    if id in RE_ENCODED:
        assert outcome.judged["verdict"] == "equivalent"
        return
    assert outcome.judged["verdict"] == "same"
    assert (tmp_path / "fixed.apr").read_bytes() == right.path.read_bytes()


@pytest.mark.parametrize("id", ["GH-190", "lost-v-biases"])
def test_every_gate_judges_the_repaired_file(id: str, tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", [id])
    outcome = attempt(tmp_path / "b.apr", tmp_path / "f.apr", REF, **OPTIONS)
    assert outcome.exit_code == 0 and len(outcome.judged["gates"]) == 15 and all(outcome.judged["gates"].values())


@pytest.mark.parametrize("mutant", ["gates", "run", "peel"])
def test_what_does_not_pass_is_not_written(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A repair that damages a weight on its way: whichever judge is left sees it, and no file is there."""
    convert_with(REF, tmp_path / "b.apr", ["GH-190"])
    write = repairs.write_repaired

    def damaging(file: Any, model: Model, output: Path) -> None:
        tensor = model.tensors["output_norm.weight"]
        values = tensor.dequantise() * np.float32("nan" if mutant == "run" else 0.01)
        bad = Tensor(tensor.name, types.F32, tensor.shape, values.view(np.uint8), Origin(file.path, tensor.name, -1))
        write(file, replace(model, tensors={**model.tensors, tensor.name: bad}), output)

    monkeypatch.setattr(repairs, "write_repaired", damaging)
    for name in {"_gates", "_run", "_peeled"} - {{"gates": "_gates", "run": "_run", "peel": "_peeled"}[mutant]}:
        monkeypatch.setattr(repairs, name, lambda outcome, *args, **options: outcome.judged.update(verdict="same") or [])
    command = ["repair", str(tmp_path / "b.apr"), "-o", str(tmp_path / "f.apr"), "--reference", str(REF)]
    assert run_cli(command) == 3
    assert "nothing written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.apr"]
    with pytest.raises(UsageError) as refused:
        repair(tmp_path / "b.apr", tmp_path / "f.apr", REF)
    assert refused.value.code == "repair.still-broken"


def test_a_healthy_file_is_left_alone(tmp_path: Path, capsys) -> None:
    assert run_cli(["repair", str(REF), "-o", str(tmp_path / "f.gguf"), "--reference", str(REF)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "nothing to repair" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "nobody", "rope_freqs.weight"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_tensor_that_nobody_understands_is_not_deleted(name: str, alone: bool, tmp_path: Path) -> None:
    values = np.linspace(0.5, 1.5, 32, dtype=np.float32)
    extra = Tensor(name, types.F32, (32,), values.view(np.uint8), Origin(REF, name, -1))
    variant(REF, tmp_path / "b.gguf", tensors={name: extra})
    outcome = attempt(tmp_path / "b.gguf", tmp_path / "f.gguf", None if alone else REF, **OPTIONS)
    assert outcome.written is None and outcome.exit_code != 0 and outcome.code == "repair.not-understood"
    assert name in outcome.headline and not (tmp_path / "f.gguf").exists()


def _rows(tensor: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    rows = change(tensor.raw.reshape(tensor.shape[0], -1))
    return tensor.replace(shape=(len(rows), tensor.cols), content=np.ascontiguousarray(rows).reshape(-1))


GGUF_FAULTS: dict[str, Callable[[Model], dict[str, Any]]] = {
    "theta": lambda m: {"keys": {"qwen2.rope.freq_base": 500.0}},
    "heads": lambda m: {"keys": {"qwen2.attention.head_count_kv": 4}},
    "eos": lambda m: {"keys": {"tokenizer.ggml.eos_token_id": 7}},
    "norm": lambda m: {"tensors": {"output_norm.weight": _scaled(m, "output_norm.weight")}},
    "last row lost": lambda m: {"tensors": {"token_embd.weight": _rows(m.tensors["token_embd.weight"], lambda x: x[:-1])}},
    "extra row": lambda m: {
        "tensors": {"token_embd.weight": _rows(m.tensors["token_embd.weight"], lambda x: np.r_[x, x[:1]])}
    },
}


def _scaled(model: Model, name: str) -> Tensor:
    tensor = model.tensors[name]
    return tensor.replace(content=(tensor.dequantise() * np.float32(3)).view(np.uint8).reshape(-1))


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_a_repaired_gguf_keeps_its_keys_and_is_the_healthy_file(fault: str, tmp_path: Path) -> None:
    keys = {"somebody.else": "kept", "general.description": "a file of its own"}
    healthy = variant(REF, tmp_path / "healthy.gguf", keys=keys)
    broken = variant(healthy, tmp_path / "broken.gguf", **GGUF_FAULTS[fault](open_model(healthy)))
    outcome = attempt(broken, tmp_path / "fixed.gguf", REF, **OPTIONS)
    assert outcome.exit_code == 0, outcome.headline
    assert gguf.read_header(tmp_path / "fixed.gguf").fields["somebody.else"].value == "kept"
    assert (tmp_path / "fixed.gguf").read_bytes() == healthy.read_bytes()


def test_a_directory_is_repaired_into_a_directory(tmp_path: Path) -> None:
    from aprlab.conversion.converter import export

    export(REF, tmp_path / "hf", format="safetensors", dtype="f32")
    model = open_model(tmp_path / "hf")
    export(replace(model, tensors={**model.tensors, "output_norm.weight": _scaled(model, "output_norm.weight")}),
           tmp_path / "broken", format="safetensors", dtype="f32")  # fmt: skip
    outcome = attempt(tmp_path / "broken", tmp_path / "fixed", tmp_path / "hf", **OPTIONS)
    assert outcome.exit_code == 0, outcome.headline
    for path in (tmp_path / "hf").iterdir():
        assert (tmp_path / "fixed" / path.name).read_bytes() == path.read_bytes(), path.name
    assert attempt(tmp_path / "hf", tmp_path / "again", tmp_path / "hf", **OPTIONS).code == "repair.nothing-found"
    assert not (tmp_path / "again").exists()


def test_a_guess_that_makes_a_healthy_file_worse_is_not_written(tmp_path: Path) -> None:
    """F16 norms are lawful; a look at their values once took them for BF16, and rewrote them."""
    norm = open_model(REF).tensors["output_norm.weight"]
    half = norm.replace(type=types.F16, content=norm.dequantise().astype(np.float16).view(np.uint8))
    variant(REF, tmp_path / "h.gguf", tensors={norm.name: half})
    outcome = attempt(tmp_path / "h.gguf", tmp_path / "f.gguf", **OPTIONS)
    assert outcome.written is None and not (tmp_path / "f.gguf").exists()


def test_a_guess_is_called_a_guess(tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", ["GH-190", "rope-norm"])
    outcome = attempt(tmp_path / "b.apr", tmp_path / "f.apr", **OPTIONS)
    said = {(change.what, change.certainty, change.source) for change in outcome.changes}
    assert ("naming/GH-190", "exact", "file") in said
    assert {(c, s) for what, c, s in said if what != "naming/GH-190"} == {("guess", "convention")}
    assert outcome.verdict.to_json()["repair"]["proof"]["changes"][0]["certainty"] in ("exact", "guess")


@pytest.mark.parametrize(("header_too", "alone"), [(True, True), (False, False)])
def test_data_without_padding_is_laid_out_again_bit_for_bit(header_too: bool, alone: bool, tmp_path: Path) -> None:
    unpadded(REF, tmp_path / "b.gguf", header_too=header_too)
    outcome = attempt(tmp_path / "b.gguf", tmp_path / "f.gguf", None if alone else REF, threads=1)
    assert (outcome.verdict.verdict, outcome.exit_code) == ("broken", 0), outcome.headline
    assert [f.code for f in outcome.verdict.findings] == ["container.unpadded"]
    assert [(change.certainty, change.source) for change in outcome.changes] == [("exact", "file")]
    assert (tmp_path / "f.gguf").read_bytes() == REF.read_bytes()


def test_a_layout_is_repaired_in_a_model_that_nothing_is_known_of(tmp_path: Path) -> None:
    """How such a model should speak nobody knows; the same tensors laid out again are the same model."""
    shallow(REF, tmp_path / "m.gguf")
    unpadded(tmp_path / "m.gguf", tmp_path / "b.gguf", header_too=True)
    outcome = attempt(tmp_path / "b.gguf", tmp_path / "f.gguf", threads=1, deadline=0)
    assert outcome.written is not None and outcome.judged["verdict"] == "unproved", outcome.headline
    assert (tmp_path / "f.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
