"""Config and tokenizer in the metadata of an APR file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats.apr.layout import CONFIG_KEYS, ROPE_TYPES, WHOLE, Dialect
from aprlab.model import keys as known_keys
from aprlab.model import rope, window
from aprlab.model.architecture import architecture_of
from aprlab.model.config import ModelConfig, TokenizerData, check_config
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants.types import TensorType


def _config_value(metadata: dict[str, Any], name: str, path: Path) -> tuple[str, Any]:
    """Key and value of a config field under any of its keys; two keys that disagree, or none, are an error."""
    keys, default = CONFIG_KEYS[name]
    found = {key: metadata[key] for key in keys if metadata.get(key) is not None}
    if not found:
        raise FormatError(
            f"metadata has no {keys[0]!r}; upstream would assume {default}, which is refused here",
            code="apr.missing-key", path=path,
        )  # fmt: skip
    if len({json.dumps(v) for v in found.values()}) > 1:
        raise FormatError(f"metadata keys disagree: {found}", code="apr.keys-disagree", path=path)
    return next(iter(found.items()))


def _whole(metadata: dict[str, Any], name: str, path: Path) -> int:
    key, value = _config_value(metadata, name, path)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise FormatError(f"metadata key {key!r} is {value!r:.60}, not a whole number in range", code="apr.bad-value", path=path)
    return value


def _float32(metadata: dict[str, Any], name: str, path: Path) -> float:
    key, value = _config_value(metadata, name, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 3.4e38:
        raise FormatError(
            f"metadata key {key!r} is {value!r:.60}, not a number that a float32 can hold", code="apr.bad-value", path=path
        )
    return float(np.float32(value))  # every writer has an f32 there; 1e-6 and its f32 neighbour are the same value


def config(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> ModelConfig:
    """The config of an APR file; a missing key raises and names the default that upstream would assume."""
    _, architecture = _config_value(metadata, "architecture", path)
    kind = architecture_of(str(architecture), path)
    number = {name: _whole(metadata, name, path) for name in WHOLE}
    _, style = _config_value(metadata, "rope_type", path)
    if not isinstance(style, int) or style not in ROPE_TYPES:
        raise FormatError(
            f"metadata key 'rope_type' is {style!r}; 0 (NORM) and 2 (NEOX) are known", code="apr.unknown-rope-type", path=path
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError("has no tensor 'token_embd.weight'", code="model.missing-tensor", path=path)
    if embedding.shape != (number["vocab_size"], number["embedding_length"]):
        raise FormatError(
            f"has shape {embedding.shape}, but vocab_size is {number['vocab_size']} and hidden_size {number['embedding_length']}",
            code="model.tensor-shape", path=path, tensor=embedding.origin.name,
        )  # fmt: skip
    # Neither writer always has it, and both define it so; a wrong one shows in the shapes of Q and K.
    head_dim = number["embedding_length"] // max(number["head_count"], 1)
    if metadata.get("head_dim") is not None:
        head_dim = _whole(metadata, "head_dim", path)
    found = ModelConfig(
        architecture=str(architecture),
        **number,
        head_dim=head_dim,
        rope_theta=_float32(metadata, "rope_theta", path),
        rope_type=ROPE_TYPES[style],
        rms_norm_eps=_float32(metadata, "rms_norm_eps", path),
        tied_embeddings="output.weight" not in tensors,
        rope_scaling=_rope_scaling(metadata, number["context_length"], path),
        rope_factors=kind.rope_factors and rope.FACTORS in tensors,
        sliding_window=window.from_huggingface(metadata, number["context_length"], path),
    )
    for problem in known_keys.huggingface_problems(metadata, check_config(found, path)):
        raise UnsupportedError(f"metadata {problem}", code="keys.not-handled", path=path)
    return found


def _rope_scaling(metadata: dict[str, Any], context_length: int, path: Path) -> rope.RopeScaling | None:
    """As config.json says it, under either of its keys."""
    try:
        said = metadata.get("rope_scaling")
        return rope.from_huggingface(metadata.get("rope_parameters") if said is None else said, context_length)
    except AprlabError as error:
        error.path = path
        raise


def tokenizer(metadata: dict[str, Any], path: Path) -> TokenizerData:
    """The tokenizer data of an APR file; a missing key raises and names it."""

    def need(key: str, kind: type, default: str) -> Any:
        value = metadata.get(key)
        if value is None:
            raise FormatError(f"metadata has no {key!r}; {default}, which is refused here", code="apr.missing-key", path=path)
        if not isinstance(value, kind):
            raise FormatError(
                f"metadata key {key!r} is a {type(value).__name__}, not a {kind.__name__}", code="apr.bad-value", path=path
            )
        return value

    def strings(key: str, default: str) -> list[str]:
        value = need(key, list, default)
        if not set(map(type, value)) <= {str}:
            raise FormatError(f"metadata key {key!r} holds something that is not text", code="apr.bad-value", path=path)
        return value

    def identity(key: str) -> int | None:
        value = metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise FormatError(f"metadata key {key!r} is {value!r}, not a token id", code="apr.bad-value", path=path)
        return value

    tokens = strings("tokenizer.vocabulary", "upstream would print token numbers")
    token_types = need("tokenizer.token_type", list, "upstream would take every token for ordinary text")
    if len(token_types) != len(tokens):
        raise FormatError(
            f"{len(tokens)} tokens, but {len(token_types)} token types", code="tokenizer.token-types-count", path=path
        )
    if not set(map(type, token_types)) <= {int}:
        raise FormatError(
            "metadata key 'tokenizer.token_type' holds something that is not a number", code="apr.bad-value", path=path
        )
    model_key = "tokenizer.model" if "tokenizer.model" in metadata else "tokenizer.model_type"
    template = metadata.get("chat_template", metadata.get("tokenizer.chat_template"))
    if template is not None and not isinstance(template, str):
        raise FormatError("the chat template is not text", code="apr.bad-value", path=path)
    model = need(model_key, str, "upstream would guess it from the vocabulary")
    return TokenizerData(
        model=model,
        pre=need("tokenizer.pre_type", str, "upstream would split text as GPT-2 does"),
        tokens=tokens,
        token_types=token_types,
        merges=[] if model == "llama" else strings("tokenizer.merges", "upstream would cut text into single bytes"),
        bos_token_id=identity("tokenizer.bos_token_id"),
        eos_token_id=identity("tokenizer.eos_token_id"),
        pad_token_id=identity("tokenizer.padding_token_id"),
        add_bos=_flag(metadata, "tokenizer.add_bos_token", path),
        chat_template=template,
        scores=_scores(metadata, len(tokens), path) if model == "llama" else None,
        add_space_prefix=_flag(metadata, "tokenizer.add_space_prefix", path),
    )


def _flag(metadata: dict[str, Any], key: str, path: Path) -> bool | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"metadata key {key!r} is {value!r:.60}, not true or false", code="apr.bad-value", path=path)
    return value


_LARGEST = 3.4028235e38  # float32's


def _scores(metadata: dict[str, Any], count: int, path: Path) -> list[float]:
    """One number for each token of a SentencePiece vocabulary."""
    found = metadata.get("tokenizer.scores")
    numbers = [s for s in found if isinstance(s, int | float) and not isinstance(s, bool)] if isinstance(found, list) else []
    if not isinstance(found, list) or not len(found) == len(numbers) == count:
        raise FormatError(
            f"metadata key 'tokenizer.scores' is not one number for each of {count} tokens",
            code="tokenizer.scores-count", path=path,
        )  # fmt: skip
    if not all(abs(score) <= _LARGEST for score in numbers):
        raise FormatError(
            "metadata key 'tokenizer.scores' has a score that is no float32", code="tokenizer.score-not-finite", path=path
        )
    return [float(score) for score in numbers]


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def metadata_of(model: Model, tensors: list[Tensor], dialect: Dialect) -> dict[str, Any]:
    """The APR metadata of `model` with `tensors` as they will be written, but for where it comes from."""
    config, tok = model.config, model.tokenizer
    metadata: dict[str, Any] = {
        "model_type": config.architecture,
        "name": text_of(model, "general.name", "name"),
        "license": text_of(model, "general.license", "license"),
        "original_format": model.format,
        "param_count": sum(t.size for t in tensors),
        "quantization": _quantization(tensors),
    }
    rope_types = {name: number for number, name in ROPE_TYPES.items()}
    for field_name, key in dialect.keys.items():
        value = getattr(config, field_name)
        metadata[key] = rope_types[value] if field_name == "rope_type" else value
    metadata["tied_embeddings"] = config.tied_embeddings
    metadata["rope_scaling"] = None if config.rope_scaling is None else rope.to_huggingface(config.rope_scaling)
    if config.sliding_window is not None:
        metadata["sliding_window"] = config.sliding_window
    metadata["chat_template"] = tok.chat_template
    metadata |= {
        "tokenizer.model": tok.model,
        "tokenizer.pre_type": tok.pre,
        "tokenizer.vocab_size": len(tok.tokens),
        "tokenizer.bos_token_id": tok.bos_token_id,
        "tokenizer.eos_token_id": tok.eos_token_id,
        "tokenizer.padding_token_id": tok.pad_token_id,
        "tokenizer.add_bos_token": tok.add_bos,
        "tokenizer.add_space_prefix": tok.add_space_prefix,
        "tokenizer.scores": tok.scores,
        "tokenizer.token_type": tok.token_types,
        "tokenizer.vocabulary": tok.tokens,
        "tokenizer.merges": tok.merges,
    }
    return {key: value for key, value in metadata.items() if value is not None}


# GGUF key -> the key of an APR file's metadata under which upstream looks for the same list.
SHARED_LISTS = {
    "tokenizer.ggml.tokens": "tokenizer.vocabulary",
    "tokenizer.ggml.merges": "tokenizer.merges",
    "tokenizer.ggml.token_type": "tokenizer.token_type",
}


def file_only_metadata(model: Model, tensors: list[Tensor], record: dict[str, Any]) -> dict[str, Any]:
    """The APR metadata of a model that has no config here: what describes it; all of its keys are in `record`.

    Args:
        model: a GGUF file, or an APR file made of one.
        tensors: as they will be written.
        record: what is kept of the GGUF file, with its keys as ``[key, type, value]``.
    """
    keys = {key: value for key, _, value in record["kv"]}
    architecture = keys.get("general.architecture")
    found: dict[str, Any] = {
        "model_type": architecture,
        "architecture": architecture,
        "tensor_names": "gguf",
        "name": keys.get("general.name"),
        "license": keys.get("general.license"),
        "original_format": model.format,
        "param_count": sum(t.size for t in tensors),
        "quantization": _quantization(tensors),
        "chat_template": keys.get("tokenizer.chat_template"),
    }
    for key, shared in SHARED_LISTS.items():
        if key in keys:
            value = model.metadata[key] if model.format == "gguf" else model.metadata[shared]
            found[shared] = value.tolist() if isinstance(value, np.ndarray) else list(value)
    return {key: value for key, value in found.items() if value is not None}


def text_of(model: Model, *keys: str) -> str | None:
    """The first of these metadata keys that holds a text."""
    for key in keys:
        if isinstance(value := model.metadata.get(key), str):
            return value
    return None


def _quantization(tensors: list[Tensor]) -> dict[str, Any] | None:
    """The type that holds most bytes, as upstream's typed key needs it."""
    sizes: dict[TensorType, int] = {}
    for tensor in tensors:
        if tensor.type.quantised:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    if not sizes:
        return None
    most = max(sizes, key=lambda kind: sizes[kind])
    symmetric = most.name in ("Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q3_K", "AprQ4", "AprQ8")
    return {"quant_type": most.name, "bits": int(most.bits), "block_size": most.block_elements, "symmetric": symmetric}
