"""Writes the GGUF: float weights of `train.py`, quantised by aprlab's own encoders in llama.cpp's Q4_K_M mix.

`python export.py work aprlab-tiny-q4_k_m.gguf` where `work` holds weights.npz and tokenizer.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import corpus
import gguf
import numpy as np
import vocabulary
from shape import Shape
from tokenizers import Tokenizer

from aprlab import quants
from aprlab.model import names
from aprlab.quants import types


def write(weights: dict[str, np.ndarray], tokenizer: Tokenizer, path: Path) -> None:
    """`weights`: GGUF name -> float32, NumPy order. Keys, their order and the tensors' order are llama.cpp's."""
    s = Shape()
    out = gguf.GGUFWriter(path, "qwen2")
    out.add_type("model")
    out.add_name("aprlab-tiny")
    out.add_basename("aprlab-tiny")
    out.add_size_label(f"{sum(w.size for w in weights.values()) / 1e6:.1f}M")
    out.add_license("apache-2.0")
    out.add_block_count(s.block_count)
    out.add_context_length(s.context_length)
    out.add_embedding_length(s.embedding_length)
    out.add_feed_forward_length(s.feed_forward_length)
    out.add_head_count(s.head_count)
    out.add_head_count_kv(s.head_count_kv)
    out.add_rope_freq_base(s.rope_theta)
    out.add_layer_norm_rms_eps(s.rms_norm_eps)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    tokens, token_types, merges = vocabulary.tables(tokenizer)
    assert len(tokens) == s.vocab_size
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(tokens)
    out.add_token_types(token_types)
    out.add_token_merges(merges)
    out.add_eos_token_id(tokens.index("<|im_end|>"))
    out.add_pad_token_id(tokens.index("<|endoftext|>"))
    out.add_bos_token_id(tokens.index("<|endoftext|>"))
    out.add_add_bos_token(False)
    out.add_chat_template(corpus.CHAT_TEMPLATE)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    inventory = list(names.inventory(s.block_count))
    if set(inventory) != set(weights):
        raise SystemExit(f"weights and inventory differ: {set(inventory) ^ set(weights)}")
    # llama.cpp's order: what stands outside the layers first, each layer together
    inventory.sort(key=lambda n: int(n.split(".")[1]) if n.startswith("blk.") else -1)
    for name in inventory:
        w, kind = np.ascontiguousarray(weights[name], dtype=np.float32), types.by_name(s.type_of(name))
        if kind is types.F32:
            out.add_tensor(name, w)
        else:
            raw = quants.quantise(w, kind).reshape(w.shape[0], -1)
            out.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(kind.code))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("gguf", type=Path)
    args = parser.parse_args()
    with np.load(args.work / "weights.npz") as stored:
        weights = dict(stored)
    part = args.gguf.with_suffix(".part")
    write(weights, Tokenizer.from_file(str(args.work / "tokenizer.json")), part)
    part.replace(args.gguf)
    print(args.gguf, args.gguf.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
