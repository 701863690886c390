"""From any format to any other: values and tokens stay; bad requests, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprlab.conversion.converter import convert, export
from aprlab.errors import NumericError, UsageError
from aprlab.formats import huggingface_files, open_model
from aprlab.inference.session import Generation, Session
from aprlab.published import ANSWER, QUESTION
from aprlab.quants import types
from aprlab.quants.types import TensorType

DTYPES = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16}


@pytest.fixture(scope="module")
def due(tiny: Path) -> Generation:
    """What the embedded model answers."""
    return Session(open_model(tiny)).generate(QUESTION)


def gguf_to_apr(source: Path, out: Path) -> Any:
    return convert(source, out / "m.apr")


def gguf_to_safetensors(source: Path, out: Path) -> Any:
    return export(source, out / "m", format="safetensors")


def to_gguf(source: Path, out: Path) -> Any:
    return convert(source, out / "m.gguf")


def apr_to_gguf(source: Path, out: Path) -> Any:
    return export(source, out / "m.gguf")


PAIRS = {
    ("gguf", "apr"): gguf_to_apr,
    ("gguf", "safetensors"): gguf_to_safetensors,
    ("apr", "gguf"): apr_to_gguf,
    ("apr", "safetensors"): gguf_to_safetensors,
    ("safetensors", "gguf"): to_gguf,
    ("safetensors", "apr"): gguf_to_apr,
}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_six_ordered_pairs_keep_values_and_tokens(
    pair: tuple[str, str], tiny: Path, folders: dict[str, Path], due: Generation, tmp_path: Path
) -> None:
    """Without a change of type every value survives each of the six ways, and so do config, tokenizer and answer."""
    if pair[0] == "apr":
        convert(tiny, tmp_path / "source.apr")
    source = {"gguf": tiny, "apr": tmp_path / "source.apr", "safetensors": folders["f32"]}[pair[0]]
    report = PAIRS[pair](source, tmp_path)
    a, b = open_model(source), open_model(report.output)
    assert (a.format, b.format) == pair
    assert (a.config, a.tokenizer) == (b.config, b.tokenizer)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        np.testing.assert_array_equal(tensor.dequantise(), b.tensor(name).dequantise())
    assert all(cost.relative == 0 for cost in report.costs)
    got = Session(b).generate(QUESTION)
    assert (got.prompt_tokens, got.tokens, got.text) == (due.prompt_tokens, due.tokens, ANSWER)


@pytest.mark.parametrize("suffix", ["gguf", "apr"])
def test_vectors_become_f32_and_matrices_what_was_asked(suffix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = convert(folders["bf16"], tmp_path / f"a.{suffix}")
    assert plain.types_out == {"BF16": 58, "F32": 41} and [c.relative for c in plain.costs] == [0]
    if suffix == "apr":
        report = convert(folders["bf16"], tmp_path / "b.apr", quantize="q8_0")
        assert report.types_out == {"Q8_0": 58, "F32": 41}
        assert 0.001 < next(c for c in report.costs if c.type_out == "Q8_0").relative < 0.01  # 127 steps to the largest of 32
        return
    mixed = convert(folders["bf16"], tmp_path / f"c.{suffix}", quantize="Q4_K_M")
    assert mixed.types_out == {"Q4_K": 49, "F32": 41, "Q6_K": 9}  # what llama.cpp's mix made of the embedded model
    assert Session(open_model(tmp_path / f"c.{suffix}")).generate(QUESTION).text == ANSWER


def test_gguf_to_gguf_keeps_all_but_the_types(tiny: Path, tmp_path: Path) -> None:
    report = convert(tiny, tmp_path / "a.gguf", quantize="q8_0")
    a, b = open_model(tiny), open_model(tmp_path / "a.gguf")
    assert report.types_out == {"Q8_0": 58, "F32": 41} and list(a.tensors) == list(b.tensors)
    changed = {k for k in a.metadata if k != "general.file_type" and str(a.metadata[k]) != str(b.metadata[k])}
    assert not changed and b.metadata["general.file_type"] == 7 and a.metadata.keys() == b.metadata.keys()
    convert(tiny, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == tiny.read_bytes()


@pytest.mark.peer
def test_llama_cpp_reads_a_gguf_made_of_safetensors(tiny: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Header, tokenizer and weights are made here, and the log-probabilities are those of the source in float32."""
    pytest.importorskip("xllamacpp")
    from peer import log_softmax, logprobs, serve

    convert(folders["f32"], tmp_path / "m.gguf")
    session = Session(open_model(tiny))
    ids = session.chat_tokens(QUESTION)
    logits = session.generate(ids, max_tokens=1, keep_logits=True).logits
    assert logits is not None
    theirs = logprobs(serve(tmp_path / "m.gguf"), ids, session.config.vocab_size)
    np.testing.assert_allclose(log_softmax(logits[0]), theirs, atol=1e-3)


def test_bad_words(tiny: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    for options, message in (
        ({"format": "pickle"}, "unknown format 'pickle'; known: gguf, safetensors"),
        ({"format": "safetensors", "dtype": "q4_0"}, "unknown dtype 'q4_0'; known: f32, f16, bf16"),
        ({"dtype": "f16"}, "dtype is for SafeTensors"),
    ):
        with pytest.raises(UsageError, match=message):
            export(tiny, tmp_path / "x", **options)
    with pytest.raises(UsageError, match="export --format safetensors"):
        convert(tiny, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="are for APR"):
        convert(tiny, tmp_path / "x.gguf", compress="zstd")
    with pytest.raises(UsageError, match="holds the input"):
        export(folders["f32"], folders["f32"], format="safetensors", force=True)
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_is_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for force in (False, True):
        with pytest.raises(UsageError, match=r"exists already|holds 'thesis\.tex'"):
            export(tiny, out, format="safetensors", force=force)
    assert (out / "thesis.tex").read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (out / "thesis.tex").unlink()
    export(tiny, out, format="safetensors")  # an empty folder may be filled
    with pytest.raises(UsageError, match="exists already"):
        export(tiny, out, format="safetensors", dtype="f16")
    export(tiny, out, format="safetensors", dtype="f16", force=True)
    assert open_model(out).by_type() == {"F16": 99}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in out.iterdir()) == sorted(huggingface_files.WRITTEN)
    assert (out / "config.json").stat().st_mode & 0o777 == 0o644
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        export(tiny, file, format="safetensors", force=True)


def test_an_interrupted_export_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    def stop(nbytes: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(nbytes)
        if len(seen) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny, tmp_path / "out", format="safetensors", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_half_precision_cannot_hold_is_refused_by_tensor(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    tensor = model.tensor("blk.2.attn_k.bias")
    values = tensor.dequantise()
    values[5] = 70_000.0
    model.tensors[tensor.name] = tensor.replace(raw=values.view(np.uint8))
    with pytest.raises(NumericError, match=r"tensor 'blk\.2\.attn_k\.bias'.*65504"):
        export(model, tmp_path / "out", format="safetensors", dtype="f16")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "out", format="safetensors", dtype="bf16")
    assert isinstance(DTYPES["bf16"], TensorType)
