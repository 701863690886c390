"""Synthetic files: inventories of the five sizes against each other and against real files, mixes, values, a forward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from aprlab.cli.app import run_cli
from aprlab.conversion import mixes
from aprlab.conversion import synthetic as synth
from aprlab.conversion.converter import convert, export
from aprlab.errors import UnsupportedError, UsageError
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig
from aprlab.published import known_model, known_models
from aprlab.quants import types

SMALL = ModelConfig(
    architecture="qwen2", block_count=9, embedding_length=256, feed_forward_length=512, head_count=4, head_count_kv=2,
    head_dim=64, vocab_size=1200, context_length=128, rope_theta=1e6, rope_type="neox", rms_norm_eps=float(np.float32(1e-6)),
    tied_embeddings=False,
)  # fmt: skip

# Billions of parameters, and of those beside the embedding, as the models' cards have them.
CARDS = {
    "qwen2.5-coder-0.5b": (0.49, 0.36), "qwen2.5-coder-1.5b": (1.54, 1.31), "qwen2.5-coder-3b": (3.09, 2.77),
    "qwen2.5-coder-7b": (7.61, 6.53), "qwen2.5-coder-14b": (14.7, 13.1),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_inventories_agree_with_the_list_and_with_the_cards(name: str) -> None:
    known = known_model(name)
    config = synth.config_of(known)
    found = synth.counts(config)
    tensors, kinds = found["tensors"], known.tensors
    assert tensors["F32"] == kinds["float"] == 5 * config.block_count + 1
    assert sum(tensors.values()) - tensors["F32"] == kinds.get("quantised", 7 * config.block_count + 2)
    assert tensors == kinds.get("by_type", tensors)
    whole, inner = CARDS[name]
    digits = 1 if whole > 10 else 2
    # Cards count the tied embedding once; the published files of the small sizes hold it twice.
    tied = synth.counts(dataclasses.replace(config, tied_embeddings=known.config["tied_embeddings"]))
    assert round(tied["parameters"] / 1e9, digits) == pytest.approx(whole, abs=0.011 if digits == 2 else 0.11)
    assert round(tied["inner"] / 1e9, digits) == pytest.approx(inner, abs=0.011 if digits == 2 else 0.11)
    assert tied["inner"] == found["inner"]
    embedding = config.vocab_size * config.embedding_length
    assert tied["parameters"] - tied["inner"] == embedding * (1 if tied["parameters"] < 4e9 else 2)


def test_the_sizes_grow_together() -> None:
    """Bytes, inner parameters and bits a parameter of the five, from the smallest to the largest."""
    seen = [synth.counts(synth.config_of(known)) for known in known_models().values()]
    assert list(known_models()) == list(CARDS)
    for key in ("inner", "parameters"):
        values = [counts[key] for counts in seen]
        assert values == sorted(values)
    for counts in seen:
        bits = 8 * sum(counts["bytes"].values()) / counts["parameters"]
        assert 4.8 < bits < (6.3 if "Q5_0" in counts["tensors"] else 5.1)  # 896 columns hold no K blocks: the 0.5B is dearer
        assert counts["bytes"].keys() == counts["tensors"].keys()
    for name in list(CARDS)[1:]:
        assert known_model(name).tensors.get("by_type", {}).keys() <= {"Q4_K", "Q6_K", "F32"}


@pytest.mark.real
@pytest.mark.parametrize("size", ["05b", "15b"])
def test_the_real_files_tensor_by_tensor(size: str, request: pytest.FixtureRequest) -> None:
    """Names, order, shapes, types and every byte of data: the mix rules are llama.cpp's, not nearly."""
    path: Path = request.getfixturevalue(f"real_{size}")
    known = known_model(f"qwen2.5-coder-{size[0]}.{size[1]}b")
    config = synth.config_of(known)
    model = open_model(path)
    assert model.config == config
    listed = synth.inventory(config)
    assert list(listed) == list(model.tensors)
    assert listed == {name: (tensor.type, tensor.shape) for name, tensor in model.tensors.items()}
    counts = synth.counts(config)
    assert counts["tensors"] == model.by_type() and sum(counts["bytes"].values()) == model.nbytes
    assert path.stat().st_size == known.bytes
    by_layer = mixes.types_of({name: listed[name][1] for name in mixes.by_layer(listed)}, "q4_k_m")
    assert by_layer != {name: kind for name, (kind, _) in listed.items()}  # the order of counting matters, and shows


def test_more_bits_for_half_of_the_layers() -> None:
    assert [n for n in range(24) if mixes.use_more_bits(n, 24)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert [n for n in range(8) if mixes.use_more_bits(n, 8)] == [0, 3, 6, 7]
    shapes = synth.inventory(SMALL)
    for mix, value in (("q4_k_m", types.Q6_K), ("q4_k_s", types.Q5_K), ("q5_k_m", types.Q6_K), ("q5_k_s", types.Q5_K)):
        found = mixes.types_of({name: shape for name, (_, shape) in shapes.items()}, mix)
        assert found["blk.0.attn_v.weight"] is value and found["output.weight"] is types.Q6_K
        assert found["blk.3.attn_q.weight"] is mixes.MIXES[mix] and found["blk.3.attn_q.bias"] is types.F32
    with pytest.raises(UsageError, match="unknown mix 'q9_k_m'; known: q4_k_s"):
        mixes.types_of({}, "q9_k_m")
    with pytest.raises(UnsupportedError, match="row of 33 values"):
        mixes.fitting(types.Q4_K, (4, 33), "x")


@pytest.mark.parametrize("kind", [types.Q4_K, types.Q5_K, types.Q6_K, types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1,
                                  types.Q8_0, types.Q2_K, types.Q3_K, types.F32, types.F16, types.BF16], ids=str)  # fmt: skip
def test_random_blocks_decode_to_values_of_the_size_asked(kind: types.TensorType) -> None:
    from aprlab import quants

    raw = synth.Scale(kind, 0.02).blocks(160_000 // kind.block_elements, np.random.default_rng(3))
    values = quants.decode(raw.reshape(-1, kind.block_bytes), kind).astype(np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.1 * 0.02 and 0.9 < values.std() / 0.02 < 1.1
    if kind.quantised:  # no block is listed twice
        assert len({block.tobytes() for block in raw.reshape(-1, kind.block_bytes)}) == len(raw) // kind.block_bytes


def test_aprs_own_types_have_no_random_blocks() -> None:
    with pytest.raises(UnsupportedError, match="AprQ8"):
        synth.Scale(types.APR_Q8, 0.02)


@pytest.mark.parametrize("mix", ["aprq4", "aprq8"])
def test_no_file_of_a_type_that_gguf_does_not_have(mix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="APR's own"):
        synth.write(SMALL, tmp_path / "a.gguf", mix=mix)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mix", "label"), [("q4_k_m", 15), ("q8_0", 7), ("f16", 1)])
def test_a_file_that_everything_takes(mix: str, label: int, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    done = synth.write(SMALL, path, mix=mix, seed=7)
    assert done.bytes == path.stat().st_size
    model = open_model(path)
    model.check_values()
    assert model.metadata["general.file_type"] == label
    assert model.config == SMALL and model.by_type() == dict(sorted(done.by_type.items(), key=lambda i: (-i[1], i[0])))
    text = "def f(x): <|im_end|> Grüße"
    tokenizer = Qwen2Tokenizer(model.tokenizer)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    session = Session(model)
    answer = session.generate("hello", max_tokens=3, keep_logits=True)
    assert answer.logits is not None and np.isfinite(answer.logits).all() and 0.01 < answer.logits.std() < 100
    convert(path, tmp_path / "a.apr")
    assert export(tmp_path / "a.apr", tmp_path / "b.gguf").reversible
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_the_seed_and_nothing_else_makes_the_file(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synth.write(SMALL, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c and len(a) == len(c)
    tied = dataclasses.replace(SMALL, tied_embeddings=True)
    synth.write(tied, tmp_path / "tied", seed=1)
    one, other = open_model(tmp_path / "a"), open_model(tmp_path / "tied")
    assert "output.weight" not in other.tensors and other.tensor("token_embd.weight").type is types.Q6_K
    assert np.array_equal(one.tensor("blk.4.ffn_up.weight").raw, other.tensor("blk.4.ffn_up.weight").raw)


def test_the_vocabulary_is_as_large_as_the_real_one() -> None:
    data = synth.tokenizer(151_936)
    assert len(data.tokens) == len(set(data.tokens)) == 151_936 and len(data.merges) == 151_387
    assert data.tokens[151_645] == "<|im_end|>" and data.eos_token_id == 151_645 and data.bos_token_id == 151_643
    assert data.token_types.count(5) == 271 and data.tokens[-1] == "[PAD151935]"
    assert {data.tokens[n] for n, kind in enumerate(data.token_types) if kind == 4} == {"<tool_call>", "</tool_call>"}
    known = set(data.tokens)
    assert all(merge.replace(" ", "") in known for merge in data.merges)
    with pytest.raises(UnsupportedError, match="no room"):
        synth.tokenizer(277)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "config_of", lambda known, tied=None: SMALL)
    assert run_cli(["synth", "--like", "qwen2.5-coder-7b", "-o", str(tmp_path / "a.gguf")]) == 0
    assert "MB/s" in capsys.readouterr().out and open_model(tmp_path / "a.gguf").config == SMALL
    assert run_cli(["synth", "--like", "qwen2.5-coder-7b", "-o", str(tmp_path / "a.gguf")]) == 2
    assert run_cli(["synth", "--like", "qwen9", "-o", str(tmp_path / "b.gguf")]) == 2
    assert "exists already" in capsys.readouterr().err
