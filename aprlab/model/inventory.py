"""The tensors of a model, by its config."""

from __future__ import annotations

from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.config import ModelConfig
from aprlab.model.rope import FACTORS


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a forward pass asks for, by GGUF name, with its shape (NumPy order, rows first)."""
    size = {
        "E": config.embedding_length, "F": config.feed_forward_length, "V": config.vocab_size, "D": config.head_dim,
        "Q": config.head_count * config.head_dim, "K": config.head_count_kv * config.head_dim,
    }  # fmt: skip
    rows = [(gguf, tuple(size[letter] for letter in letters)) for gguf, _, letters in ARCHITECTURES[config.architecture].rows]
    before, layer, after = rows[:1], rows[1:-2], rows[-2:-1]
    layers = {
        name.replace("N", str(n), 1): shape for n in range(config.block_count) for name, shape in layer
    }
    head = {output_weight(config): (size["V"], size["E"])}
    factors = {FACTORS: (config.head_dim // 2,)} if config.rope_factors else {}
    return {**dict(before), **layers, **dict(after), **head, **factors}


def output_weight(config: ModelConfig) -> str:
    """GGUF name of the matrix that makes logits."""
    return "token_embd.weight" if config.tied_embeddings else "output.weight"
