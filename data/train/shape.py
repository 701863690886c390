"""The shape of aprlab-tiny and the type of every tensor; no dependency at all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Qwen2's hyperparameters under GGUF's names."""

    block_count: int = 8
    context_length: int = 512
    embedding_length: int = 256
    feed_forward_length: int = 512
    head_count: int = 8
    head_count_kv: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    vocab_size: int = 840

    @property
    def head_dim(self) -> int:
        return self.embedding_length // self.head_count

    def more_bits(self, layer: int) -> bool:
        """llama.cpp's `use_more_bits`: the layers whose attn_v and ffn_down get Q6_K in a Q4_K_M file."""
        n = self.block_count
        return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2

    def type_of(self, name: str) -> str:
        """Type of the tensor `name` in the Q4_K_M mix."""
        if name.endswith(("norm.weight", ".bias")):
            return "F32"
        if name == "output.weight":
            return "Q6_K"
        if name.endswith(("attn_v.weight", "ffn_down.weight")) and self.more_bits(int(name.split(".")[1])):
            return "Q6_K"
        return "Q4_K"
