"""Architectures as data: the tensors, names and conventions of each. Their forward passes are in `aprlab.architectures`.

A row of a layer is one tensor: its GGUF name, its Hugging Face name, and its shape in letters (NumPy order, rows first):
E embedding, F feed forward, V vocabulary, D head, Q all query heads, K all key heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aprlab.errors import UnsupportedError

Row = tuple[str, str, str]  # GGUF name, Hugging Face name, shape


@dataclass(frozen=True, slots=True)
class Architecture:
    """What distinguishes one architecture from another, apart from the order of its steps.

    Attributes:
        name: GGUF's `general.architecture`.
        title: for people.
        model_types: what config.json calls it; the first is written.
        class_name: of transformers.
        rope_type: ``neox`` (halves) or ``norm`` (adjacent pairs); fixed by the name, GGUF has no key for it.
        layer: rows, with ``N`` for the layer.
        permuted: GGUF names whose rows Hugging Face has in another order: there a head's pairs are halves.
        rope_factors: whether it may have the tensor `rope.FACTORS`.
        defaults: key without prefix -> value that llama.cpp assumes where a file of this architecture lacks it.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    class_name: str
    rope_type: str
    layer: tuple[Row, ...]
    permuted: tuple[str, ...] = ()
    rope_factors: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every tensor, those outside of layers too; the head is there although tied models have none."""
        return (
            ("token_embd.weight", "model.embed_tokens.weight", "VE"), *self.layer,
            ("output_norm.weight", "model.norm.weight", "E"), ("output.weight", "lm_head.weight", "VE"),
        )  # fmt: skip


_EMBED_TO_QKV: tuple[Row, ...] = (
    ("blk.N.attn_norm.weight", "model.layers.N.input_layernorm.weight", "E"),
    ("blk.N.attn_q.weight", "model.layers.N.self_attn.q_proj.weight", "QE"),
    ("blk.N.attn_k.weight", "model.layers.N.self_attn.k_proj.weight", "KE"),
    ("blk.N.attn_v.weight", "model.layers.N.self_attn.v_proj.weight", "KE"),
)
_AFTER: tuple[Row, ...] = (
    ("blk.N.attn_output.weight", "model.layers.N.self_attn.o_proj.weight", "EQ"),
    ("blk.N.ffn_norm.weight", "model.layers.N.post_attention_layernorm.weight", "E"),
    ("blk.N.ffn_gate.weight", "model.layers.N.mlp.gate_proj.weight", "FE"),
    ("blk.N.ffn_up.weight", "model.layers.N.mlp.up_proj.weight", "FE"),
    ("blk.N.ffn_down.weight", "model.layers.N.mlp.down_proj.weight", "EF"),
)
_BIASES: dict[str, Row] = {
    "blk.N.attn_q.weight": ("blk.N.attn_q.bias", "model.layers.N.self_attn.q_proj.bias", "Q"),
    "blk.N.attn_k.weight": ("blk.N.attn_k.bias", "model.layers.N.self_attn.k_proj.bias", "K"),
    "blk.N.attn_v.weight": ("blk.N.attn_v.bias", "model.layers.N.self_attn.v_proj.bias", "K"),
}
_HEAD_NORMS: tuple[Row, ...] = (
    ("blk.N.attn_q_norm.weight", "model.layers.N.self_attn.q_norm.weight", "D"),
    ("blk.N.attn_k_norm.weight", "model.layers.N.self_attn.k_norm.weight", "D"),
)


def _with_biases(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Each bias behind its weight."""
    return tuple(each for row in rows for each in (row, *([_BIASES[row[0]]] if row[0] in _BIASES else [])))


ARCHITECTURES: dict[str, Architecture] = {
    known.name: known
    for known in (
        Architecture(
            "qwen2", "Qwen2", ("qwen2",), "Qwen2ForCausalLM", "neox", _with_biases(_EMBED_TO_QKV) + _AFTER
        ),
        Architecture(
            "qwen3", "Qwen3", ("qwen3",), "Qwen3ForCausalLM", "neox", _EMBED_TO_QKV + _HEAD_NORMS + _AFTER
        ),
        Architecture(  # Llama 2 and 3, SmolLM, and Mistral where no window bounds its attention
            "llama", "Llama", ("llama", "mistral"), "LlamaForCausalLM", "norm", _EMBED_TO_QKV + _AFTER,
            permuted=("blk.N.attn_q.weight", "blk.N.attn_k.weight"), rope_factors=True,
            defaults={"rope.freq_base": 10_000.0},  # of Llama 2, whose files do not say it
        ),
    )
}  # fmt: skip


def architecture_of(name: str, path: Path | None = None) -> Architecture:
    """The architecture that GGUF and APR call `name`; raises UnsupportedError for one without a forward pass here."""
    if name not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise UnsupportedError(
            f"architecture {name[:60]!r}; handled: {known}", code="config.unsupported-architecture", path=path
        )
    return ARCHITECTURES[name]


def of_model_type(model_type: str, path: Path | None = None) -> Architecture:
    """The architecture that config.json calls `model_type`; raises UnsupportedError for one that is not handled."""
    for known in ARCHITECTURES.values():
        if model_type in known.model_types:
            return known
    handled = ", ".join(repr(name) for known in ARCHITECTURES.values() for name in known.model_types)
    raise UnsupportedError(
        f"architecture {model_type[:60]!r}; handled: {handled}", code="config.unsupported-architecture", path=path
    )


__all__ = ["ARCHITECTURES", "Architecture", "Row", "architecture_of", "of_model_type"]
