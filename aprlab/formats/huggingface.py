"""A model as the Hugging Face hub keeps it: a folder of SafeTensors with config.json, tokenizer.json and two more.

Reading follows llama.cpp's converter where the two worlds differ: tokens that only pad the vocabulary are called
``[PADn]`` and unused, added tokens that look like ``<|this|>`` are control tokens whatever their flag says, special ids
come from tokenizer_config.json first and from config.json next. Writing gives what `transformers` loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats import safetensors
from aprlab.formats.huggingface_files import (
    CONFIG,
    GENERATION,
    INDEX,
    INDEX_SUFFIX,
    SINGLE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    folder_of,
    quantised,
    read_json,
)  # fmt: skip
from aprlab.formats.huggingface_tokenizer import tokenizer
from aprlab.formats.reading import exists
from aprlab.model import keys, names, rope, window
from aprlab.model.architecture import ARCHITECTURES, architecture_of, of_model_type
from aprlab.model.config import ModelConfig, TokenizerData, check_config
from aprlab.model.model import Model
from aprlab.model.remote import url_of
from aprlab.model.row_order import as_halves, as_pairs, reordered
from aprlab.model.tensor import Origin, Tensor
from aprlab.model.vocabulary import CONTROL, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, first_token
from aprlab.quants import types

# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def open_model(path: str | Path) -> Model:
    """Open a folder with SafeTensors, or one .safetensors file with its companions next to it.

    Raises:
        UsageError: a folder without a model.
        FormatError: shards, index, names, config or tokenizer break their rules; the file that does is named.
        UnsupportedError: a kind that is known and not handled (other architectures, quantised checkpoints, scaled RoPE…).
    """
    path = Path(path)
    folder = folder_of(path)
    if exists(folder / CONFIG) and (found := quantised(read_json(folder / CONFIG))) is not None:
        raise UnsupportedError("; ".join(found), code="identity.quantised-checkpoint", path=path)  # before its own dtypes are met
    headers = _headers(path)
    tensors: dict[str, Tensor] = {}
    for header in headers:
        for entry in header.entries:
            gguf = names.to_gguf(entry.name)
            if gguf is None:
                example = names.from_gguf("blk.0.attn_q.weight")
                raise FormatError(f"unknown tensor name; names look like {example!r}", code="names.unknown-tensor",
                                  path=header.path, tensor=entry.name, offset=entry.start)  # fmt: skip
            raw = header.content(entry)
            tensors[gguf] = Tensor(gguf, entry.type, entry.shape, raw, Origin(header.path, entry.name, entry.start))
    raw_config = read_json(folder / CONFIG)
    _as_gguf_has_them(raw_config, tensors, folder / CONFIG)
    warnings = _tie(raw_config, tensors, folder / CONFIG)
    shards = f" in {len(headers)} shards" if len(headers) > 1 else ""
    metadata = {**raw_config, **{f"safetensors.{key}": text for h in headers for key, text in h.metadata.items()}}
    for key in ("name", "license"):
        if f"safetensors.{key}" in metadata:
            metadata.setdefault(key, metadata[f"safetensors.{key}"])
    return Model(
        path=path,
        format="safetensors",
        dialect=f"hugging face{shards}",
        tensors=tensors,
        metadata=metadata,
        make_config=lambda: config(raw_config, tensors, folder / CONFIG),
        make_tokenizer=lambda: tokenizer(folder, raw_config, tensors),
        warnings=warnings,
        header={"files": [h.path.name for h in headers], "data_offset": headers[0].data_offset},
    )


def look(path: str | Path, meaning: Callable[[str], str | None]) -> tuple[list[tuple[Tensor, str | None]], Model]:
    """A model whose tensors have names or shapes that `open_model` refuses, for those who look for what is wrong with it.

    Container, config.json and tokenizer have to be sound: nothing is known without them.

    Args:
        path: as `open_model`'s.
        meaning: the GGUF name that a name as written stands for, None where it stands for none.

    Returns:
        All tensors in file order, rows as written, each with the name that it stands for; and the model of those that stand for
        one, its embedding of the rows that config.json gives it.

    Raises:
        FormatError, UnsupportedError: as `open_model`.
    """
    path = Path(path)
    folder = folder_of(path)
    found: list[tuple[Tensor, str | None]] = []
    known: dict[str, Tensor] = {}
    for header in _headers(path):
        for entry in header.entries:
            name = meaning(entry.name)
            raw = header.content(entry)
            tensor = Tensor(name or entry.name, entry.type, entry.shape, raw, Origin(header.path, entry.name, entry.start))
            found.append((tensor, name))
            if name is not None:
                known.setdefault(name, tensor)
    raw_config = read_json(folder / CONFIG)
    for key in ("hidden_size", "vocab_size"):
        if type(raw_config.get(key)) is not int:
            raise FormatError(f"{key!r} is {raw_config.get(key)!r:.60}", code="huggingface.bad-value", path=folder / CONFIG)
    shape = raw_config["vocab_size"], raw_config["hidden_size"]
    at = Origin(path, "model.embed_tokens.weight", -1)
    embedding = Tensor("token_embd.weight", types.F32, shape, np.zeros(0, np.uint8), at)
    stated = {**known, "token_embd.weight": embedding}
    model = Model(
        path=path, format="safetensors", dialect="hugging face", tensors=known, metadata=raw_config,
        make_config=lambda: config(raw_config, stated, folder / CONFIG),
        make_tokenizer=lambda: tokenizer(folder, raw_config, stated),
    )  # fmt: skip
    return found, model


def _as_gguf_has_them(raw: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """What llama.cpp's converter changes: rows of Q and K in adjacent pairs, and Llama 3's scaling as a tensor.

    A config that makes no sense changes nothing here; `config` says what is wrong with it.
    """
    kind = next((known for known in ARCHITECTURES.values() if raw.get("model_type") in known.model_types), None)
    if kind is None:
        return
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    for name, tensor in list(tensors.items()):
        if names.template_of(name) not in kind.permuted:
            continue
        count = heads if name.endswith("attn_q.weight") else kv_heads
        head_dim, rest = divmod(tensor.rows, count) if type(count) is int and count > 0 else (0, 1)
        if rest == 0 and head_dim % 2 == 0:
            tensors[name] = reordered(tensor, as_pairs(tensor.rows // head_dim, head_dim))
    scaling = _scaling(raw)
    if kind.rope_factors and isinstance(scaling, dict) and rope.kind_of(scaling) == "llama3":
        q = tensors.get("blk.0.attn_q.weight")
        theta = raw.get("rope_theta", scaling.get("rope_theta"))
        if q is not None and type(heads) is int and heads > 0 and isinstance(theta, int | float):
            factors = rope.llama3_factors(scaling, float(theta), q.rows // heads)
            origin = Origin(path, "rope_scaling", -1)
            tensors[rope.FACTORS] = Tensor(rope.FACTORS, types.F32, factors.shape, factors.view(np.uint8), origin)


def _scaling(raw: dict[str, Any]) -> Any:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _headers(path: Path) -> list[safetensors.SafetensorsHeader]:
    """The weight files, each checked against the index where there is one."""
    if path.name.endswith(INDEX_SUFFIX) and url_of(path) is not None:
        return _shards(path)
    if folder_of(path) != path:
        return [safetensors.read_header(path)]
    if exists(path / SINGLE):
        return [safetensors.read_header(path / SINGLE)]
    if exists(path / INDEX):
        return _shards(path / INDEX)
    loose = sorted(p.name for p in path.glob("*.safetensors"))  # none of a URL, which cannot be listed
    if len(loose) == 1:
        return [safetensors.read_header(path / loose[0])]
    found = f"; it has {', '.join(loose[:3])}" if loose else ""
    raise UsageError(
        f"is a directory, not a model file, and without {SINGLE} or {INDEX}{found}", code="huggingface.no-weights", path=path
    )


def _shards(index: Path) -> list[safetensors.SafetensorsHeader]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise FormatError("weight_map is not a map of tensor names to files", code="huggingface.bad-weight-map", path=index)
    headers = []
    for file in dict.fromkeys(listed.values()):
        if Path(file).name != file or file in ("", ".", "..") or "\0" in file or "\\" in file or len(file.encode()) > 255:
            said = f"weight_map names {file!r:.80}, which is not a file next to it"
            raise FormatError(said, code="huggingface.bad-shard-name", path=index)
        header = safetensors.read_header(index.parent / file)
        there = {entry.name for entry in header.entries}
        expected = {name for name, where in listed.items() if where == file}
        if there != expected:
            name = min(there ^ expected)
            says = f"{INDEX} does not give it to this file" if name in there else f"is not in {file}, where {INDEX} has it"
            raise FormatError(says, code="huggingface.shards-disagree", path=header.path, tensor=name)
        headers.append(header)
    return headers


def _tie(raw: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Make tensors and `tie_word_embeddings` agree: transformers lets the flag win, whatever lm_head.weight holds."""
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise FormatError(f"tie_word_embeddings is {tied!r}, not true or false", code="huggingface.bad-value", path=path)
    output, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if not tied and output is None:
        raise FormatError(
            "tie_word_embeddings is false, but there is no lm_head.weight", code="huggingface.untied-without-head", path=path
        )
    if not tied or output is None or embedding is None:
        return []
    if not output.at_hand:  # a difference would be found by reading both, the largest there are
        del tensors["output.weight"]
        return ["lm_head.weight is left out, since config.json ties it to the embedding; by URL they are not compared"]
    if output.type is not embedding.type or not output.same_bytes(embedding):
        raise FormatError("tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight",
                          code="huggingface.tied-head-differs", path=output.origin.path, tensor=output.origin.name)  # fmt: skip
    del tensors["output.weight"]
    return ["lm_head.weight is a copy of the embedding, which config.json ties; it is left out"]


_NUMBERS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads", "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}  # fmt: skip


def config(raw: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> ModelConfig:
    """The config of a config.json. transformers has a default for nearly every key; here a missing one raises."""

    def need(key: str, kind: type | tuple[type, ...], within: dict[str, Any] | None = None) -> Any:
        value = (raw if within is None else within).get(key)
        if value is None:
            raise FormatError(f"has no {key!r}", code="huggingface.missing-key", path=path)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(f"{key!r} is {value!r:.60}", code="huggingface.bad-value", path=path)
        return value

    kind = of_model_type(need("model_type", str), path)
    scaling = _scaling(raw)
    number = {field: need(key, int) for field, key in _NUMBERS.items()}
    if any(not 0 <= value < 2**31 for value in number.values()):
        raise FormatError(f"a number is out of range: {number}", code="config.out-of-range", path=path)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError("has no tensor 'model.embed_tokens.weight'", code="model.missing-tensor", path=path.parent)
    expected = (number["vocab_size"], number["embedding_length"])
    if embedding.shape != expected:
        raise FormatError(f"has shape {embedding.shape}, config.json says {expected}",
                          code="model.tensor-shape", path=embedding.origin.path, tensor=embedding.origin.name)  # fmt: skip
    head_dim = number["embedding_length"] // max(number["head_count"], 1)
    if kind.name == "qwen3" or raw.get("head_dim") is not None:  # transformers would take 128 for a Qwen3 that does not say
        head_dim = need("head_dim", int)
    theta = need("rope_theta", int | float, scaling if "rope_theta" in scaling else None)  # type: ignore[arg-type]
    floats = []
    for key, value in (("rope_theta", theta), ("rms_norm_eps", need("rms_norm_eps", int | float))):  # type: ignore[arg-type]
        if not abs(value) <= 3.4e38:
            raise FormatError(f"{key!r} is {value!r:.60}, more than a float32 can hold", code="config.out-of-range", path=path)
        floats.append(float(np.float32(value)))
    found = ModelConfig(
        architecture=kind.name,
        **number,
        head_dim=head_dim,
        rope_theta=floats[0],
        rope_type=kind.rope_type,  # as GGUF has it: transformers turns halves always, and the rows are in that order
        rms_norm_eps=floats[1],
        tied_embeddings="output.weight" not in tensors,
        rope_scaling=_rope_scaling(scaling, number["context_length"], path),
        rope_factors=rope.FACTORS in tensors,
        sliding_window=window.from_huggingface(raw, number["context_length"], path),
    )
    for problem in keys.huggingface_problems(raw, found):
        raise UnsupportedError(str(problem), code="keys.not-handled", path=path)
    return check_config(found, path)


def config_of(raw: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> ModelConfig:
    """The config of a model that is in memory.

    Args:
        raw: what its config.json would hold.
        shapes: of its embedding, of its output where that is a matrix of its own, and of ``blk.0.attn_q.weight``: GGUF names.
        path: for messages.
    """
    nothing = np.zeros(0, np.uint8)
    tensors = {name: Tensor(name, types.F32, shape, nothing, Origin(path, name, -1)) for name, shape in shapes.items()}
    _as_gguf_has_them(raw, tensors, path)
    return config(raw, tensors, path)


def _rope_scaling(said: Any, context_length: int, path: Path) -> rope.RopeScaling | None:
    try:
        return rope.from_huggingface(said, context_length)
    except AprlabError as error:
        error.path = path
        raise


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def companions(
    config: ModelConfig, tok: TokenizerData, dtype: str, eog: list[int], factors: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """The JSON files next to the weights, by name.

    `dtype` is PyTorch's word for the weights' type, `eog` the ids that end an answer, `factors` the values of `rope.FACTORS`.
    """
    kind = architecture_of(config.architecture)
    if config.rope_type != kind.rope_type:
        raise UnsupportedError(
            f"rope_type is {config.rope_type!r}; a {kind.title} always has {kind.rope_type!r}",
            code="conversion.rope-type",
        )  # fmt: skip
    usual = config.head_dim * config.head_count == config.embedding_length and kind.name != "qwen3"
    head: dict[str, Any] = {} if usual else {"head_dim": config.head_dim}
    if kind.name != "qwen2":
        head["attention_bias"] = False
    bounded = config.sliding_window is not None
    scaling = None if config.rope_scaling is None else rope.to_huggingface(config.rope_scaling)
    if factors is not None:
        scaling = rope.llama3_of(factors, config.rope_theta)
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    ids = {key: id for key, id in ids.items() if id is not None}
    return {
        CONFIG: {
            "architectures": ["MistralForCausalLM" if bounded and kind.name == "llama" else kind.class_name],
            "attention_dropout": 0.0,
            **ids,
            **head,
            "hidden_act": "silu",
            "hidden_size": config.embedding_length,
            "initializer_range": 0.02,
            "intermediate_size": config.feed_forward_length,
            "max_position_embeddings": config.context_length,
            "model_type": "mistral" if bounded and kind.name == "llama" else kind.model_types[0],
            "num_attention_heads": config.head_count,
            "num_hidden_layers": config.block_count,
            "num_key_value_heads": config.head_count_kv,
            "rms_norm_eps": _shortest(config.rms_norm_eps),
            **({} if scaling is None else {"rope_scaling": scaling}),
            "rope_theta": _shortest(config.rope_theta),
            "tie_word_embeddings": config.tied_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            **({"sliding_window": config.sliding_window} if bounded else {}),
            **({"use_sliding_window": bounded} if kind.name.startswith("qwen") else {}),
            **({"max_window_layers": 0} if bounded and kind.name.startswith("qwen") else {}),
            "vocab_size": config.vocab_size,
        },
        GENERATION: {**ids, "eos_token_id": eog, "do_sample": False},
        TOKENIZER: tokenizer_json(tok),
        TOKENIZER_CONFIG: _tokenizer_config(tok),
    }


def as_hugging_face_has_it(tensor: Tensor, config: ModelConfig) -> Tensor:
    """The tensor with its rows in Hugging Face's order: the way back of what reading does."""
    if names.template_of(tensor.name) not in ARCHITECTURES[config.architecture].permuted:
        return tensor
    return reordered(tensor, as_halves(tensor.rows // config.head_dim, config.head_dim))


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: what the model's authors wrote."""
    return float(str(np.float32(value)))


def _pads(tok: TokenizerData) -> set[int]:
    """Ids that only pad the vocabulary, as llama.cpp's converter fills it up."""
    return {id for id, (token, kind) in enumerate(zip(tok.tokens, tok.token_types, strict=True))
            if kind == UNUSED and token == f"[PAD{id}]"}  # fmt: skip


def foreign_tokens(tok: TokenizerData) -> list[int]:
    """Ids of a type that tokenizer.json cannot say: they come back as ordinary tokens."""
    pads = _pads(tok)
    return [id for id, kind in enumerate(tok.token_types) if kind not in (NORMAL, CONTROL, USER_DEFINED) and id not in pads]


def tokenizer_json(tok: TokenizerData) -> dict[str, Any]:
    """tokenizer.json as the models' authors publish it; what only pads the vocabulary is left out."""
    if tok.model != "gpt2" or tok.pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"tokenizer {tok.model!r} with pre-tokeniser {tok.pre!r}; only known byte-level ones can be written",
            code="huggingface.foreign-tokenizer",
        )  # fmt: skip
    pads = _pads(tok)
    added = {id: kind for id, kind in enumerate(tok.token_types) if kind in (CONTROL, USER_DEFINED)}
    rest = [id for id in range(len(tok.tokens)) if id not in pads and id not in added]
    # Added tokens get their ids by following the vocabulary; where they do not, they have to be in it.
    if rest != list(range(len(rest))) or sorted(added) != list(range(len(rest), len(rest) + len(added))):
        rest = [id for id in range(len(tok.tokens)) if id not in pads]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    known = PRE_TOKENIZERS[tok.pre]
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in known.patterns
    ]
    post: dict[str, Any] = byte_level
    start = first_token(tok)
    if start is not None:
        bos = tok.tokens[start]
        first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {
            "type": "TemplateProcessing", "single": first, "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [start], "tokens": [bos]}},
        }  # fmt: skip
        post = {"type": "Sequence", "processors": [byte_level, template]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": tok.tokens[id], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": kind == CONTROL} for id, kind in added.items()
        ],
        "normalizer": {"type": "NFC"} if known.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": post,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": known.whole_words,
            "vocab": {tok.tokens[id]: id for id in rest}, "merges": tok.merges,
        },
    }  # fmt: skip


def _tokenizer_config(tok: TokenizerData) -> dict[str, Any]:
    text = {name: None if id is None else tok.tokens[id]
            for name, id in (("eos_token", tok.eos_token_id), ("pad_token", tok.pad_token_id))}  # fmt: skip
    added = [(id, kind) for id, kind in enumerate(tok.token_types) if kind in (CONTROL, USER_DEFINED)]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    found = {
        "add_bos_token": tok.add_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id): {"content": tok.tokens[id], **flags, "special": kind == CONTROL} for id, kind in added},
        # Qwen2 has no first token of a text; the id that GGUF calls so is in config.json.
        "bos_token": None if (start := first_token(tok)) is None else tok.tokens[start],
        "chat_template": tok.chat_template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        **text,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer" if PRE_TOKENIZERS[tok.pre].nfc else "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    return {key: value for key, value in found.items() if value is not None or key in ("bos_token", "unk_token")}


def write_companions(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write the JSON files as transformers would: two spaces, UTF-8, a newline at the end."""
    for name, value in files.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
