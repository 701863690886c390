"""The tensors of a Qwen2 model, by its config."""

from __future__ import annotations

from aprlab.model.config import ModelConfig


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a forward pass asks for, by GGUF name, with its shape (NumPy order, rows first)."""
    e, f, v = config.embedding_length, config.feed_forward_length, config.vocab_size
    q, k = config.head_count * config.head_dim, config.head_count_kv * config.head_dim
    layer = {
        "attn_norm.weight": (e,),
        "attn_q.weight": (q, e), "attn_q.bias": (q,),
        "attn_k.weight": (k, e), "attn_k.bias": (k,),
        "attn_v.weight": (k, e), "attn_v.bias": (k,),
        "attn_output.weight": (e, q),
        "ffn_norm.weight": (e,),
        "ffn_gate.weight": (f, e), "ffn_up.weight": (f, e), "ffn_down.weight": (e, f),
    }  # fmt: skip
    layers = {f"blk.{n}.{name}": shape for n in range(config.block_count) for name, shape in layer.items()}
    return {"token_embd.weight": (v, e), **layers, "output_norm.weight": (e,), output_weight(config): (v, e)}


def output_weight(config: ModelConfig) -> str:
    """GGUF name of the matrix that makes logits."""
    return "token_embd.weight" if config.tied_embeddings else "output.weight"
