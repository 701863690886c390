"""Keys and tensors that change numbers are used or refused by name; what is harmless is carried. llama.cpp is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import variant

from aprlab.conversion import convert
from aprlab.errors import AprlabError, UnsupportedError
from aprlab.formats import gguf, open_model
from aprlab.formats.gguf_record import keys_of
from aprlab.formats.identity import FILE_ONLY
from aprlab.inference import Session
from aprlab.model import Origin, Tensor, keys
from aprlab.quants import types

# Values that change numbers, and values under which the same key changes nothing.
CHANGING: dict[str, Any] = {
    "qwen2.vocab_size": 839, "qwen2.rope.dimension_count": 16, "qwen2.attention.value_length": 16,
    "qwen2.attention.causal": False, "qwen2.attention.scale": 0.5,
    "qwen2.attention.clamp_kqv": 8.0, "qwen2.attention.max_alibi_bias": 8.0, "qwen2.rope.scaling.type": "longrope",
    "qwen2.rope.scaling.attn_factor": 1.1,
    "qwen2.attn_logit_softcapping": 50.0, "qwen2.final_logit_softcapping": 30.0, "qwen2.logit_scale": 0.0625,
    "qwen2.residual_scale": 0.2, "qwen2.embedding_scale": 12.0, "qwen2.use_parallel_residual": True,
    "qwen2.tensor_data_layout": "Meta AI original pth", "qwen2.expert_count": 8, "qwen2.expert_used_count": 2,
    "qwen2.pooling_type": 1, "qwen2.attention.sliding_window_pattern": 6, "qwen2.nobody.knows": 1,
    "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_sep_token": True,
    "tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.nobody_knows": 1, "tokenizer.ggml.eot_token_id": 19, "general.type": "adapter",
}  # fmt: skip
# Keys that say that the file is no model of this kind at all.
SOMETHING_ELSE = {
    "general.type": "identity.lora-adapter", "qwen2.expert_count": "identity.mixture-of-experts",
    "qwen2.rope.scaling.type": "config.unsupported-rope-scaling",
}  # fmt: skip
YARN = ("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor")  # matter with YaRN only: tests/model/test_rope.py
HARMLESS: dict[str, Any] = {
    "qwen2.vocab_size": 840, "qwen2.rope.dimension_count": 32, "qwen2.attention.value_length": 32,
    "qwen2.attention.key_length": 32, "qwen2.attention.causal": True, "qwen2.attention.sliding_window": 512,
    "qwen2.rope.scaling.type": "none", "qwen2.rope.scaling.factor": 1.0, "qwen2.rope.scale_linear": 1.0,
    "qwen2.rope.scaling.finetuned": True, "qwen2.rope.scaling.original_context_length": 512,
    "qwen2.attention.layer_norm_epsilon": 1e-5, "qwen2.expert_count": 0, "qwen2.use_parallel_residual": False,
    "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.eot_token_id": 834, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.fim_pre_token_id": 5,
    "tokenizer.chat_template.tool_use": "{{ messages }}", "general.description": "a healthy model", "general.nobody.knows": 7,
    "somebody.elses": "note", "llama.attention.causal": False, "quantize.imatrix.file": "calibration.dat",
}  # fmt: skip


def numbered(name: str, shape: tuple[int, ...]) -> Tensor:
    values = np.linspace(0.5, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return Tensor(name, types.F32, shape, values.reshape(-1).view(np.uint8), Origin(Path("made"), name, 0))


def answer(path: Path) -> tuple[list[int], np.ndarray]:
    """Greedy tokens of a raw prompt, and the logits that they were chosen from."""
    done = Session(open_model(path)).generate("What is 2+2?", max_tokens=4, raw=True, keep_logits=True)
    assert done.logits is not None
    return done.tokens, done.logits


@pytest.mark.parametrize("key", CHANGING)
def test_a_value_that_changes_numbers_is_refused_by_name(tiny: Path, tmp_path: Path, key: str) -> None:
    path = variant(tiny, tmp_path / "v.gguf", keys={key: CHANGING[key]})
    model = open_model(path)
    with pytest.raises(UnsupportedError, match=key) as caught:
        _ = model.config, model.tokenizer
    assert caught.value.code == SOMETHING_ELSE.get(key, "keys.not-handled")
    assert caught.value.offset == gguf.read_header(path).fields[key].offset
    if caught.value.code in FILE_ONLY:  # kept as it is on the way into another format, and refused there, too
        convert(path, tmp_path / "out.apr")
        assert keys_of(open_model(tmp_path / "out.apr"))[key] == CHANGING[key]
        with pytest.raises(UnsupportedError, match=key):
            answer(tmp_path / "out.apr")
        return
    with pytest.raises(UnsupportedError, match=key):  # never dropped on the way into another format
        convert(path, tmp_path / "out.apr")
    assert not (tmp_path / "out.apr").exists()


@pytest.mark.parametrize("key", HARMLESS)
def test_a_harmless_key_changes_nothing(tiny: Path, tmp_path: Path, key: str) -> None:
    tokens, logits = answer(variant(tiny, tmp_path / "v.gguf", keys={key: HARMLESS[key]}))
    expected, healthy = answer(tiny)
    assert tokens == expected
    assert np.array_equal(logits, healthy)


def test_every_rule_is_tried() -> None:
    ruled = {f"qwen2.{key}" for key, rule in keys.ARCHITECTURE_KEYS.items() if rule.reason}
    ruled |= {key for key, rule in keys.TOKENIZER_KEYS.items() if rule.reason}
    of_yarn = {f"qwen2.rope.scaling.{key}" for key in YARN}
    assert ruled - {"tokenizer.ggml.precompiled_charsmap"} - of_yarn <= set(CHANGING)


EXTRA = {
    "blk.0.attn_q_norm.weight": (32,), "blk.3.attn_k_norm.weight": (32,), "rope_freqs.weight": (16,), "output.bias": (840,),
    "blk.1.attn_q.weight.lora_a": (4, 256), "blk.0.attn_output.bias": (256,), "nobody.knows": (3,),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRA)
def test_a_tensor_that_the_forward_pass_leaves_out_is_refused_by_name(tiny: Path, tmp_path: Path, name: str) -> None:
    path = variant(tiny, tmp_path / "v.gguf", tensors={name: numbered(name, EXTRA[name])})
    with pytest.raises(UnsupportedError, match=name) as caught:
        Session(open_model(path))
    assert caught.value.code == "forward.foreign-tensor"


def test_one_layer_less_than_there_is(tiny: Path, tmp_path: Path) -> None:
    layers = open_model(tiny).config.block_count
    path = variant(tiny, tmp_path / "v.gguf", keys={"qwen2.block_count": layers - 1})
    with pytest.raises(UnsupportedError, match=f"layer {layers - 1}, but block_count is {layers - 1}"):
        Session(open_model(path))


@pytest.mark.parametrize("more", [20, -5])
def test_tokens_and_rows_agree(tiny: Path, tmp_path: Path, more: int) -> None:
    data = open_model(tiny).tokenizer
    tokens = [*data.tokens, *(f"<more {n}>" for n in range(more))] if more > 0 else data.tokens[:more]
    kinds = [*data.token_types, *[4] * max(more, 0)][: len(tokens)]
    both = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    path = variant(tiny, tmp_path / "v.gguf", keys=both)
    with pytest.raises(AprlabError, match=f"840 rows for {840 + more} tokens") as caught:
        _ = open_model(path).tokenizer
    assert caught.value.code == "gguf.tokens-and-rows"


@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "kormo"])
def test_other_names_of_the_same_cut(tiny: Path, tmp_path: Path, pre: str) -> None:
    tokens, logits = answer(variant(tiny, tmp_path / "v.gguf", keys={"tokenizer.ggml.pre": pre}))
    expected, healthy = answer(tiny)
    assert tokens == expected
    assert np.array_equal(logits, healthy)


@pytest.mark.peer
def test_llama_cpp_loads_what_is_accepted_and_answers_alike(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from peer import llama_says

    healthy = llama_says(tiny)
    assert "refused" not in healthy
    unheard_of = {key: value for key, value in HARMLESS.items() if key != "qwen2.vocab_size"}
    assert llama_says(variant(tiny, tmp_path / "all.gguf", keys=unheard_of)) == healthy
    for alias in ("deepseek-r1-qwen", "kormo"):
        assert llama_says(variant(tiny, tmp_path / "pre.gguf", keys={"tokenizer.ggml.pre": alias})) == healthy


@pytest.mark.peer
def test_what_llama_cpp_refuses_is_refused(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from peer import llama_says

    name = "rope_freqs.weight"
    refused = {
        "tensor": variant(tiny, tmp_path / "t.gguf", tensors={name: numbered(name, (16,))}),
        "lost": variant(tiny, tmp_path / "l.gguf", tensors={"blk.1.ffn_up.weight": None}),
        "layers": variant(tiny, tmp_path / "n.gguf", keys={"qwen2.block_count": 3}),
        "tokens": variant(tiny, tmp_path / "k.gguf", keys={"tokenizer.ggml.tokens": open_model(tiny).tokenizer.tokens[:-5]}),
        "theta": variant(tiny, tmp_path / "f.gguf", keys={"qwen2.rope.freq_base": 1_000_000}),
        "pre": variant(tiny, tmp_path / "p.gguf", keys={"tokenizer.ggml.pre": "nobody"}),
    }
    for what, path in refused.items():
        assert "refused" in llama_says(path), what
        with pytest.raises(AprlabError):
            Session(open_model(path))
