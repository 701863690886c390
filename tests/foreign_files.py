"""Tiny GGUF files of other architectures, written by gguf-py: sound files that this project does not run.

Each kind has the names, keys and types that llama.cpp's converter gives it; weights are random. gguf-py writes them, so
that nothing here trusts the project's own writer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

VOCABULARY, WIDTH, INNER, LAYERS = 48, 64, 96, 2

Fill = Callable[[gguf.GGUFWriter, Callable[..., None]], None]


def write(path: Path, kind: str, seed: int = 0, **options: object) -> Path:
    """A file of one of `KINDS` at `path`; `options` go to gguf-py's writer."""
    writer = gguf.GGUFWriter(path, kind, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)

    def tensor(name: str, *shape: int, as_: Kind = Kind.F32) -> None:
        values = (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        if as_ is Kind.F32:
            writer.add_tensor(name, values)
        elif as_ is Kind.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, as_), raw_dtype=as_)

    KINDS[kind](writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _numbers(writer: gguf.GGUFWriter, heads: int = 4, kv: int = 2) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)


def _sentencepiece(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁t{n}" for n in range(VOCABULARY - 3))])
    writer.add_token_scores([float(-n) for n in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3, *[1] * (VOCABULARY - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _layers(tensor: Callable[..., None], *, norms: tuple[str, ...] = ("attn_norm", "ffn_norm"), ffn: bool = True) -> None:
    for n in range(LAYERS):
        for norm in norms:
            tensor(f"blk.{n}.{norm}.weight", WIDTH)
        tensor(f"blk.{n}.attn_q.weight", WIDTH, WIDTH, as_=Kind.Q8_0)
        tensor(f"blk.{n}.attn_k.weight", WIDTH // 2, WIDTH, as_=Kind.Q4_0)
        tensor(f"blk.{n}.attn_v.weight", WIDTH // 2, WIDTH, as_=Kind.F16)
        tensor(f"blk.{n}.attn_output.weight", WIDTH, WIDTH, as_=Kind.Q5_1)
        if ffn:
            tensor(f"blk.{n}.ffn_gate.weight", INNER, WIDTH, as_=Kind.Q8_0)
            tensor(f"blk.{n}.ffn_up.weight", INNER, WIDTH, as_=Kind.Q4_1)
            tensor(f"blk.{n}.ffn_down.weight", WIDTH, INNER, as_=Kind.Q5_0)


def _falcon(writer: gguf.GGUFWriter, tensor: Callable[..., None]) -> None:
    _numbers(writer)
    _sentencepiece(writer)
    tensor("token_embd.weight", VOCABULARY, WIDTH, as_=Kind.Q8_0)
    for n in range(LAYERS):
        for part in ("attn_norm.weight", "attn_norm.bias", "attn_norm_2.weight", "attn_norm_2.bias"):
            tensor(f"blk.{n}.{part}", WIDTH)
        tensor(f"blk.{n}.attn_qkv.weight", 2 * WIDTH, WIDTH, as_=Kind.Q4_0)
        tensor(f"blk.{n}.attn_output.weight", WIDTH, WIDTH, as_=Kind.F16)
        tensor(f"blk.{n}.ffn_up.weight", INNER, WIDTH, as_=Kind.Q4_1)
        tensor(f"blk.{n}.ffn_down.weight", WIDTH, INNER, as_=Kind.Q5_0)
    tensor("output_norm.weight", WIDTH)
    tensor("output_norm.bias", WIDTH)
    tensor("output.weight", VOCABULARY, WIDTH, as_=Kind.Q8_0)


def _gemma(writer: gguf.GGUFWriter, tensor: Callable[..., None]) -> None:
    _numbers(writer)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_sliding_window(32)
    _sentencepiece(writer)
    tensor("token_embd.weight", VOCABULARY, WIDTH, as_=Kind.F16)
    _layers(tensor, norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"))
    tensor("output_norm.weight", WIDTH)


def _phi3(writer: gguf.GGUFWriter, tensor: Callable[..., None]) -> None:
    _numbers(writer)
    _sentencepiece(writer)
    tensor("rope_factors_long.weight", 8)
    tensor("rope_factors_short.weight", 8)
    tensor("token_embd.weight", VOCABULARY, WIDTH, as_=Kind.Q8_0)
    for n in range(LAYERS):
        tensor(f"blk.{n}.attn_norm.weight", WIDTH)
        tensor(f"blk.{n}.attn_qkv.weight", 2 * WIDTH, WIDTH, as_=Kind.Q4_0)
        tensor(f"blk.{n}.attn_output.weight", WIDTH, WIDTH, as_=Kind.Q8_0)
        tensor(f"blk.{n}.ffn_norm.weight", WIDTH)
        tensor(f"blk.{n}.ffn_up.weight", 2 * INNER, WIDTH, as_=Kind.Q5_0)
        tensor(f"blk.{n}.ffn_down.weight", WIDTH, INNER, as_=Kind.Q8_0)
    tensor("output_norm.weight", WIDTH)
    tensor("output.weight", VOCABULARY, WIDTH, as_=Kind.Q8_0)


def _qwen3moe(writer: gguf.GGUFWriter, tensor: Callable[..., None]) -> None:
    _numbers(writer)
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    _sentencepiece(writer)
    tensor("token_embd.weight", VOCABULARY, WIDTH, as_=Kind.Q8_0)
    _layers(tensor, ffn=False)
    for n in range(LAYERS):
        tensor(f"blk.{n}.attn_q_norm.weight", 16)
        tensor(f"blk.{n}.attn_k_norm.weight", 16)
        tensor(f"blk.{n}.ffn_gate_inp.weight", 3, WIDTH)
        tensor(f"blk.{n}.ffn_gate_exps.weight", 3, INNER, WIDTH, as_=Kind.Q8_0)  # three dimensions
        tensor(f"blk.{n}.ffn_up_exps.weight", 3, INNER, WIDTH, as_=Kind.Q4_0)
        tensor(f"blk.{n}.ffn_down_exps.weight", 3, WIDTH, INNER, as_=Kind.F16)
    tensor("output_norm.weight", WIDTH)
    tensor("output.weight", VOCABULARY, WIDTH, as_=Kind.Q8_0)


def _bert(writer: gguf.GGUFWriter, tensor: Callable[..., None]) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"t{n}" for n in range(VOCABULARY - 4))])
    writer.add_token_type_count(2)
    tensor("token_embd.weight", VOCABULARY, WIDTH, as_=Kind.F16)
    tensor("token_types.weight", 2, WIDTH)
    tensor("position_embd.weight", 64, WIDTH)
    for norm in ("token_embd_norm", *(f"blk.{n}.{x}" for n in range(LAYERS) for x in ("attn_output_norm", "layer_output_norm"))):
        tensor(f"{norm}.weight", WIDTH)
        tensor(f"{norm}.bias", WIDTH)
    for n in range(LAYERS):
        for part, rows, columns in (("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH, WIDTH), ("attn_v", WIDTH, WIDTH),
                                    ("ffn_up", INNER, WIDTH), ("ffn_down", WIDTH, INNER)):  # fmt: skip
            tensor(f"blk.{n}.{part}.weight", rows, columns, as_=Kind.Q8_0)
            tensor(f"blk.{n}.{part}.bias", rows)


def _invented(writer: gguf.GGUFWriter, tensor: Callable[..., None]) -> None:
    """Nothing in it is known to anybody: keys, names, a vector of two values, four dimensions, no tokenizer."""
    writer.add_string("oddity.colour", "blue")
    writer.add_array("oddity.numbers", [1.5, 2.5])
    writer.add_uint64("oddity.large", 2**40)
    tensor("first/of:all", 5, 64, as_=Kind.Q8_0)
    tensor("N.7.weird.N", 2)
    tensor("blk.0.new_part.weight", 2, 3, 4, 32, as_=Kind.Q4_0)
    tensor("model.layers.0.self_attn.q_proj.weight", 3, 32, as_=Kind.F16)
    tensor("no number here", 7)


KINDS: dict[str, Fill] = {
    "falcon": _falcon, "gemma2": _gemma, "phi3": _phi3, "qwen3moe": _qwen3moe, "bert": _bert, "oddity": _invented,
}  # fmt: skip
