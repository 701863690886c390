"""Metadata keys: each one is used, known to be harmless (with the reason), or refused by name.

A key that is ignored is a number that silently came out otherwise: RoPE scaling, attention that is not causal, a sliding
window. So every key of the namespaces that a runtime reads (``qwen2.*`` and the like, ``tokenizer.*``, the configuration of
APR and Hugging Face) has a row here. Keys outside of them describe the file; ggml does not read them when it computes.

Sources: ggml's ``llama-model.cpp`` and ``llama-vocab.cpp`` (which keys are read, and what they default to), gguf-py's
``constants.py`` (which keys exist).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.model import rope, window
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.config import ModelConfig

# Read into `ModelConfig` or `TokenizerData`; what they hold is checked where they are read. A star stands for the architecture.
USED = frozenset(
    {
        "general.architecture", "general.alignment", "*.block_count", "*.context_length", "*.embedding_length",
        "*.feed_forward_length", "*.attention.head_count", "*.attention.head_count_kv", "*.attention.key_length",
        "*.rope.freq_base", "*.attention.layer_norm_rms_epsilon",
        *(f"*.{key}" for key in (*rope.GGUF_KEYS, window.GGUF_KEY) if key != "rope.scaling.attn_factor"),
        "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template",
    }
)  # fmt: skip
_OF_SENTENCEPIECE = ("tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix")  # used where the tokenizer is one


def starred(key: str) -> str:
    """`key` with a star for the architecture that it begins with, e.g. ``*.block_count``."""
    first, dot, rest = key.partition(".")
    return f"*.{rest}" if dot and first in ARCHITECTURES else key


@dataclass(frozen=True, slots=True)
class KeyProblem:
    """A key whose value changes what a model computes, and that this project does not apply.

    Attributes:
        key: as in the file.
        value: as in the file.
        reason: what a runtime would do with it.
    """

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"key {self.key!r} is {_shown(self.value)}: {self.reason}, which is not handled"


Neutral = Callable[[Any, ModelConfig], bool]


@dataclass(frozen=True, slots=True)
class _KeyRule:
    neutral: Neutral  # whether this value changes nothing
    reason: str  # what any other value does


def _is(*values: Any) -> Neutral:
    return lambda value, config: any((type(value) is type(v) and value == v) or _same(value, v) for v in values)


def _same(a: Any, b: Any) -> bool:
    """Equal numbers, whatever their width; a bool is no number."""
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and not isinstance(a, bool) and not isinstance(b, bool) and float(a) == float(b)


def _anything(value: Any, config: ModelConfig) -> bool:
    return True


def _head_dim(value: Any, config: ModelConfig) -> bool:
    return _same(value, config.head_dim)


def _without_yarn(*values: Any) -> Neutral:
    """Of YaRN: one of `values`, or anything where `rope.scaling.type` does not ask for it."""
    usual = _is(*values)
    return lambda value, config: config.rope_scaling is None or config.rope_scaling.kind != "yarn" or usual(value, config)


# Behind the architecture and a dot; a key without a row is refused, whatever it holds.
ARCHITECTURE_KEYS: dict[str, _KeyRule] = {
    "vocab_size": _KeyRule(lambda value, config: _same(value, config.vocab_size), "the embedding has another number of rows"),
    "rope.dimension_count": _KeyRule(_head_dim, "only a part of each head is rotated"),
    "attention.value_length": _KeyRule(_head_dim, "values have a length of their own"),
    "attention.causal": _KeyRule(_is(True), "every position sees every other"),
    "attention.sliding_window_pattern": _KeyRule(_is(0, 1), "some layers see only a window of the last positions"),
    "attention.scale": _KeyRule(
        lambda value, config: isinstance(value, float) and bool(np.float32(value) == np.float32(config.head_dim**-0.5)),
        "attention scores are scaled by another factor than 1/√head_dim",
    ),
    "attention.clamp_kqv": _KeyRule(_is(0.0), "queries, keys and values are clamped"),
    "attention.max_alibi_bias": _KeyRule(_is(0.0), "attention has ALiBi biases"),
    "attention.layer_norm_epsilon": _KeyRule(_anything, ""),  # of LayerNorm, which Qwen2 does not have
    "rope.scaling.attn_factor": _KeyRule(  # YaRN applies it; llama.cpp does so always
        lambda value, config: _same(value, 1.0) or (config.rope_scaling is not None and config.rope_scaling.kind == "yarn"),
        "queries and keys are made longer or shorter",
    ),
    "rope.scaling.finetuned": _KeyRule(_anything, ""),  # says how the model was trained; nothing computes with it
    "rope.scaling.yarn_log_multiplier": _KeyRule(_without_yarn(0.0), "YaRN lengthens queries and keys in another way"),
    "rope.scaling.yarn_ext_factor": _KeyRule(_without_yarn(1.0, -1.0), "YaRN is applied in part"),
    "rope.scaling.yarn_attn_factor": _KeyRule(_without_yarn(1.0), "YaRN lengthens queries and keys in another way"),
    "attn_logit_softcapping": _KeyRule(_is(0.0), "attention scores are soft-capped"),
    "final_logit_softcapping": _KeyRule(_is(0.0), "logits are soft-capped"),
    "logit_scale": _KeyRule(_is(1.0, 0.0), "logits are scaled"),
    "residual_scale": _KeyRule(_is(1.0, 0.0), "the residual stream is scaled"),
    "embedding_scale": _KeyRule(_is(1.0, 0.0), "embeddings are scaled"),
    "use_parallel_residual": _KeyRule(_is(False), "attention and feed forward run in parallel"),
    "tensor_data_layout": _KeyRule(_is("reference"), "rows of Q and K are permuted"),
    "expert_count": _KeyRule(_is(0), "the feed forward is a mixture of experts"),
    "expert_used_count": _KeyRule(_is(0), "the feed forward is a mixture of experts"),
    "pooling_type": _KeyRule(_is(0), "the model gives pooled embeddings, not tokens"),
}

# Of ``tokenizer.*``; a key without a row is refused, whatever it holds.
TOKENIZER_KEYS: dict[str, _KeyRule] = {
    "tokenizer.ggml.scores": _KeyRule(_anything, ""),  # of SentencePiece; byte-level BPE uses merges
    "tokenizer.ggml.token_type_count": _KeyRule(_anything, ""),  # of BERT
    "tokenizer.ggml.add_eos_token": _KeyRule(_is(False), "an end token is put behind every prompt"),
    "tokenizer.ggml.add_sep_token": _KeyRule(_is(False), "a separator is put behind every prompt"),
    "tokenizer.ggml.add_space_prefix": _KeyRule(_is(False), "a space is put in front of every prompt"),
    "tokenizer.ggml.remove_extra_whitespaces": _KeyRule(_is(False), "runs of spaces in a prompt become one"),
    "tokenizer.ggml.precompiled_charsmap": _KeyRule(lambda value, config: len(value) == 0, "prompts are normalised by a table"),
    "tokenizer.ggml.unknown_token_id": _KeyRule(_anything, ""),  # byte-level BPE knows every text
    "tokenizer.ggml.separator_token_id": _KeyRule(_anything, ""),  # of BERT
    "tokenizer.ggml.seperator_token_id": _KeyRule(_anything, ""),  # as gguf-py spelt it
    "tokenizer.ggml.cls_token_id": _KeyRule(_anything, ""),  # of BERT
    "tokenizer.ggml.mask_token_id": _KeyRule(_anything, ""),  # of BERT
    "tokenizer.ggml.prefix_token_id": _KeyRule(_anything, ""),  # fill-in-the-middle prompts, which are not made here
    "tokenizer.ggml.suffix_token_id": _KeyRule(_anything, ""),
    "tokenizer.ggml.middle_token_id": _KeyRule(_anything, ""),
    "tokenizer.huggingface.json": _KeyRule(_anything, ""),  # a copy; ggml does not read it
    "tokenizer.rwkv.world": _KeyRule(_anything, ""),  # ggml reads it for RWKV only
    "tokenizer.chat_templates": _KeyRule(_anything, ""),  # names of the alternatives below
}
_HARMLESS = re.compile(
    r"tokenizer\.chat_template\.\w+"  # alternatives by name; the default one is `tokenizer.chat_template`
    r"|tokenizer\.ggml\.fim_(pre|suf|mid|pad|rep|sep)_token_id"  # fill-in-the-middle
)
# Tokens at which llama.cpp ends an answer, apart from the end of sequence: harmless only where they are known as ends already.
END_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# The types that llama.cpp reads keys as; it refuses a file in which one of them has any other, an int32 for a uint32 too.
_TYPES: dict[str, str] = {
    **dict.fromkeys((
        "general.file_type", "*.block_count", "*.context_length", "*.embedding_length", "*.feed_forward_length",
        "*.attention.head_count", "*.attention.head_count_kv", "*.attention.key_length",
        "*.attention.value_length", "*.rope.dimension_count", "*.rope.scaling.original_context_length",
        "*.expert_count", "*.expert_used_count", "*.pooling_type", "tokenizer.ggml.token_type_count",
        *(f"tokenizer.ggml.{name}_token_id" for name in (
            "bos", "eos", "eot", "eom", "unknown", "padding", "mask", "prefix", "suffix", "middle", "fim_pre", "fim_suf",
            "fim_mid", "fim_pad", "fim_rep", "fim_sep",
        )),
    ), "uint32"),
    **dict.fromkeys((
        "*.rope.freq_base", "*.attention.layer_norm_rms_epsilon", "*.rope.scaling.factor", "*.rope.scale_linear",
        "*.rope.scaling.attn_factor", "*.rope.scaling.yarn_beta_fast", "*.rope.scaling.yarn_beta_slow",
    ), "float32"),
    **dict.fromkeys((
        "*.attention.causal", "*.rope.scaling.finetuned",
        *(f"tokenizer.ggml.{name}" for name in (
            "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces",
        )),
    ), "bool"),
    **dict.fromkeys((
        "general.architecture", "general.name", "*.rope.scaling.type", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    ), "string"),
    "tokenizer.ggml.tokens": "array[string]", "tokenizer.ggml.merges": "array[string]",
    "tokenizer.ggml.token_type": "array[int32]",
}  # fmt: skip


# What llama.cpp reads as one number or as an array of one number for each layer (int32 or uint32, exactly as many).
PER_LAYER = frozenset({"*.attention.head_count", "*.attention.head_count_kv", "*.feed_forward_length"})
# What llama.cpp takes where a key of the architecture is missing; `Architecture.defaults` are those that are no fault.
DEFAULTS = {"rope.freq_base": 10_000.0}


def one_number(key: str, value: Any, layers: Any) -> Any:
    """The number that all layers share, of an array with one for each; any other value as it is.

    Args:
        key: as in the file.
        value: of the key.
        layers: `block_count`, as the file has it.
    """
    if starred(key) not in PER_LAYER or not isinstance(value, np.ndarray) or str(value.dtype) not in ("int32", "uint32"):
        return value
    alike = len(value) > 0 and len(value) == layers and bool((value == value[0]).all())
    return int(value[0]) if alike else value


def gguf_type(key: str) -> str | None:
    """The one GGUF value type that llama.cpp reads this key as, e.g. ``uint32``; None where it does not read it."""
    return _TYPES.get(starred(key))


# Of config.json and of APR's metadata, which has Hugging Face's names: key -> rule.
HUGGINGFACE_KEYS: dict[str, _KeyRule] = {
    "hidden_act": _KeyRule(_is("silu"), "another activation than SiLU"),
    "quantization_config": _KeyRule(_is(None), "weights are quantised in a way of their own"),
    "partial_rotary_factor": _KeyRule(_is(1.0), "only a part of each head is rotated"),
    "final_logit_softcapping": _KeyRule(_is(0.0), "logits are soft-capped"),
    "attn_logit_softcapping": _KeyRule(_is(0.0), "attention scores are soft-capped"),
    "logit_scale": _KeyRule(_is(1.0), "logits are scaled"),
    "residual_multiplier": _KeyRule(_is(1.0), "the residual stream is scaled"),
    "embedding_multiplier": _KeyRule(_is(1.0), "embeddings are scaled"),
    "num_experts": _KeyRule(_is(0), "the feed forward is a mixture of experts"),
    "is_decoder": _KeyRule(_is(True, False), ""),
    "attention_bias": _KeyRule(  # Qwen2 has its three biases whatever this says
        lambda value, config: value is False or config.architecture == "qwen2", "attention has biases"
    ),
    "mlp_bias": _KeyRule(_is(False), "the feed forward has biases"),
    "layer_types": _KeyRule(
        lambda value, config: isinstance(value, list)
        and all(kind == f"{'full' if config.sliding_window is None else 'sliding'}_attention" for kind in value),
        "some layers have another attention",
    ),
}


def gguf_problems(fields: Mapping[str, Any], config: ModelConfig) -> Iterator[KeyProblem]:
    """Keys of a GGUF file that change numbers and are not applied, in the order of the file.

    Args:
        fields: key -> value, arrays as NumPy's or as sequences of strings.
        config: what was read of them.
    """
    prefix = f"{config.architecture}."
    for key, value in fields.items():
        if starred(key) in USED or _HARMLESS.fullmatch(key) or key in END_KEYS:
            continue
        if key in _OF_SENTENCEPIECE and fields.get("tokenizer.ggml.model") == "llama":
            continue
        if key.startswith(prefix):
            rule = ARCHITECTURE_KEYS.get(key.removeprefix(prefix))
        elif key.startswith("tokenizer."):
            rule = TOKENIZER_KEYS.get(key)
        elif key == "general.type":
            rule = _KeyRule(_is("model"), "the file is something else than a model")
        else:
            continue  # describes the file
        if rule is None:
            yield KeyProblem(key, value, "nothing is known of this key")
        elif not rule.neutral(value, config):
            yield KeyProblem(key, value, rule.reason)


def huggingface_problems(raw: Mapping[str, Any], config: ModelConfig) -> Iterator[KeyProblem]:
    """The same of a config.json, or of the metadata of an APR file."""
    for key, rule in HUGGINGFACE_KEYS.items():
        if raw.get(key) is not None and not rule.neutral(raw[key], config):
            yield KeyProblem(key, raw[key], rule.reason)
    first = window.first_layer(raw)
    if raw.get("sliding_window") is not None and 0 < first < config.block_count:
        yield KeyProblem("max_window_layers", first, "the layers from there on see only a window of the last positions")
    chunks = raw.get("dual_chunk_attention_config")
    if chunks is not None:  # of Qwen2.5-1M: as others up to so many positions, in chunks beyond
        upto = chunks.get("original_max_position_embeddings") if isinstance(chunks, dict) else None
        if type(upto) is not int or upto < config.context_length:
            yield KeyProblem("dual_chunk_attention_config", upto, "beyond so many positions attention is in chunks")
    for key in ("rope_scaling", "rope_parameters"):
        kind = rope.kind_of(raw.get(key))
        if kind == "llama3" and not ARCHITECTURES[config.architecture].rope_factors:
            yield KeyProblem(key, kind, "each rotary frequency is divided by a factor of its own")


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else f"{value}" if isinstance(value, int | float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
