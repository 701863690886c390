"""A model as the Hugging Face hub keeps it: a folder of SafeTensors with config.json, tokenizer.json and two more.

Reading follows llama.cpp's converter where the two worlds differ: tokens that only pad the vocabulary are called
``[PADn]`` and unused, added tokens that look like ``<|this|>`` are control tokens whatever their flag says, special ids
come from tokenizer_config.json first and from config.json next. Writing gives what `transformers` loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats import safetensors
from aprlab.formats.reading import json_object, read_bytes
from aprlab.model import keys, names, rope
from aprlab.model.architecture import ARCHITECTURES, architecture_of, of_model_type
from aprlab.model.config import ModelConfig, TokenizerData, check_config
from aprlab.model.content import drop_pages
from aprlab.model.model import Model
from aprlab.model.row_order import as_halves, as_pairs, reordered
from aprlab.model.tensor import Origin, Tensor
from aprlab.model.vocabulary import CONTROL, GPT2_WORDS, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, first_token
from aprlab.quants import types

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"
WRITTEN = (SINGLE, CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION)
READ = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, INDEX)  # next to the weights
JSON_LIMIT = 64 * 2**20  # the largest text file that is read at all; Qwen2's tokenizer.json has 7 MB


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def open_model(path: str | Path) -> Model:
    """Open a folder with SafeTensors, or one .safetensors file with its companions next to it.

    Raises:
        UsageError: a folder without a model.
        FormatError: shards, index, names, config or tokenizer break their rules; the file that does is named.
        UnsupportedError: a kind that is known and not handled (other architectures, quantised checkpoints, scaled RoPE…).
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    headers = _headers(path)
    tensors: dict[str, Tensor] = {}
    for header in headers:
        for entry in header.entries:
            gguf = names.to_gguf(entry.name)
            if gguf is None:
                example = names.from_gguf("blk.0.attn_q.weight")
                raise FormatError(f"unknown tensor name; names look like {example!r}", code="names.unknown-tensor",
                                  path=header.path, tensor=entry.name, offset=entry.start)  # fmt: skip
            raw = header.file[entry.start : entry.stop]
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the folder; a missing one is an error that names it."""
    return json_object(_read_text(path), "the file", path)


def _read_text(path: Path) -> str:
    """A text file of the folder, of a size that one may have."""
    try:
        return read_bytes(path, JSON_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"is not UTF-8 ({error.reason})", code="reading.not-utf8", path=path, offset=error.start
        ) from None
    except FileNotFoundError:
        said = "is missing; a SafeTensors model needs it next to its weights"
        raise UsageError(said, code="huggingface.missing-file", path=path) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="reading.unreadable", path=path) from None


def _headers(path: Path) -> list[safetensors.SafetensorsHeader]:
    """The weight files, each checked against the index where there is one."""
    if not path.is_dir():
        return [safetensors.read_header(path)]
    if (path / SINGLE).is_file():
        return [safetensors.read_header(path / SINGLE)]
    if (path / INDEX).is_file():
        return _shards(path / INDEX)
    loose = sorted(p.name for p in path.glob("*.safetensors"))
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
    if output.type is not embedding.type or not _same(output.raw, embedding.raw):
        raise FormatError("tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight",
                          code="huggingface.tied-head-differs", path=output.origin.path, tensor=output.origin.name)  # fmt: skip
    del tensors["output.weight"]
    return ["lm_head.weight is a copy of the embedding, which config.json ties; it is left out"]


def _same(a: np.ndarray, b: np.ndarray, step: int = 1 << 24) -> bool:
    """Whether two views on files hold the same bytes, looked at in parts."""
    if a.size != b.size:
        return False
    for at in range(0, a.size, step):
        x, y = a[at : at + step], b[at : at + step]
        same = np.array_equal(x, y)
        drop_pages(x)
        drop_pages(y)
        if not same:
            return False
    return True


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


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def tokenizer(folder: Path, raw_config: dict[str, Any], tensors: dict[str, Tensor]) -> TokenizerData:
    """The tokenizer data of tokenizer.json, padded to the rows of the embedding as llama.cpp's converter does."""
    path = folder / TOKENIZER
    raw = read_json(path)
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    model = raw.get("model")
    if not isinstance(model, dict):
        raise FormatError("has no model", code="huggingface.no-tokenizer-model", path=path)
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError("the tokenizer is not plain byte-level BPE", code="tokenizer.unsupported-model", path=path)
    pre = _pre_tokenizer(raw, bool(model.get("ignore_merges")), path)
    added = _added(raw, path)
    by_id = _by_id(model.get("vocab"), added, path)
    if "token_embd.weight" not in tensors:
        raise FormatError("has no tensor 'model.embed_tokens.weight'", code="model.missing-tensor", path=folder)
    rows = tensors["token_embd.weight"].shape[0]
    if max(by_id) >= rows:
        raise FormatError(
            f"token {max(by_id)} has no row in an embedding of {rows}", code="huggingface.token-without-row", path=path
        )
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(rows)]
    token_types = [UNUSED if id not in by_id else added.get(by_id[id], (id, NORMAL))[1] for id in range(rows)]
    ids = {token: id for id, token in by_id.items()}
    special = {name: _special(name, settings, raw_config, ids, folder) for name in ("bos", "eos", "pad")}
    add_bos = settings.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise FormatError(
            f"add_bos_token is {add_bos!r}, not true or false", code="huggingface.bad-value", path=folder / TOKENIZER_CONFIG
        )
    return TokenizerData(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_types=token_types,
        merges=_merges(model.get("merges"), path),
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
        add_bos=add_bos,
        chat_template=_chat_template(folder, settings),
    )


def _pre_tokenizer(raw: dict[str, Any], whole_words: bool, path: Path) -> str:
    """The name ggml has for the way text is cut into words; the patterns must be known to the letter."""
    normalizer, cutter = raw.get("normalizer"), raw.get("pre_tokenizer")
    patterns = _patterns(cutter)
    known = [name for name, cut in PRE_TOKENIZERS.items() if patterns == cut.patterns and whole_words == cut.whole_words]
    if not known:
        raise UnsupportedError(
            f"the pre-tokenizer {_short(cutter)} is not one that is known", code="tokenizer.unsupported-pre-tokenizer", path=path
        )
    kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    if kind != ("NFC" if PRE_TOKENIZERS[known[0]].nfc else None):
        expected = "NFC" if PRE_TOKENIZERS[known[0]].nfc else "none"
        raise UnsupportedError(
            f"the normalizer is {_short(normalizer)}; {known[0]} has {expected}",
            code="tokenizer.unsupported-normalizer", path=path,
        )  # fmt: skip
    return known[0]


def _patterns(cutter: Any) -> tuple[str, ...]:
    """The patterns that a pre-tokenizer of tokenizer.json cuts by, one after the other; () for one of another kind."""
    parts = cutter.get("pretokenizers") if isinstance(cutter, dict) else None
    found: list[str] = []
    for part in parts if isinstance(parts, list) else []:
        match part:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if not part.get("invert"):
                found.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                found.append(r"\p{N}")
            case {"type": "ByteLevel"}:
                found += [GPT2_WORDS] if part.get("use_regex", True) else []
            case _:
                return ()
    return tuple(found)


def _added(raw: dict[str, Any], path: Path) -> dict[str, tuple[int, int]]:
    """Added token -> id and ggml's type."""
    listed = raw.get("added_tokens", [])
    found: dict[str, tuple[int, int]] = {}
    for item in listed if isinstance(listed, list) else [None]:
        if not (isinstance(item, dict) and isinstance(item.get("content"), str) and type(item.get("id")) is int):
            raise FormatError(f"added_tokens holds {_short(item)}", code="huggingface.bad-added-token", path=path)
        if any(item.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
            what = f"added token {item['content']!r} strips or needs whole words"
            raise UnsupportedError(f"{what}, which ggml cannot express", code="huggingface.unsupported-added-token", path=path)
        marked = item["content"].startswith("<|") and item["content"].endswith("|>")
        found[item["content"]] = item["id"], CONTROL if item.get("special") or marked else USER_DEFINED
    return found


def _by_id(vocab: Any, added: dict[str, tuple[int, int]], path: Path) -> dict[int, str]:
    """Id -> token, of the vocabulary and of what was added to it; no id and no token twice."""
    if not isinstance(vocab, dict) or not vocab or not all(type(id) is int and 0 <= id < 2**31 for id in vocab.values()):
        raise FormatError("the vocabulary is not a map of tokens to ids", code="huggingface.bad-vocabulary", path=path)
    ids = {**vocab, **{token: id for token, (id, _) in added.items()}}
    for token, (id, _) in added.items():
        if vocab.get(token, id) != id:
            raise FormatError(
                f"token {token!r} is {vocab[token]} in the vocabulary and {id} among the added tokens",
                code="huggingface.token-with-two-ids", path=path,
            )  # fmt: skip
    by_id = {id: token for token, id in ids.items()}
    if len(by_id) != len(ids):
        twice = next(token for token, id in ids.items() if by_id[id] != token)
        raise FormatError(
            f"tokens {twice!r} and {by_id[ids[twice]]!r} have the same id {ids[twice]}",
            code="huggingface.duplicate-id", path=path,
        )  # fmt: skip
    return by_id


def _merges(listed: Any, path: Path) -> list[str]:
    """Merges as GGUF has them, ``"left right"``; tokenizer.json has had both that and pairs."""
    if not isinstance(listed, list):
        raise FormatError("the model has no merges", code="huggingface.no-merges", path=path)
    merges = [" ".join(m) if isinstance(m, list) and len(m) == 2 and all(isinstance(p, str) for p in m) else m for m in listed]
    for merge in merges:
        if not isinstance(merge, str) or merge.count(" ") != 1:
            raise FormatError(f"merge {_short(merge)} is not a pair", code="tokenizer.bad-merge", path=path)
    return merges


def _special(name: str, settings: dict[str, Any], raw_config: dict[str, Any], ids: dict[str, int], folder: Path) -> int | None:
    """Id of a special token: by its text in tokenizer_config.json, else by number in config.json."""
    token = settings.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
        if not isinstance(token, str) or token not in ids:
            raise FormatError(
                f"{name}_token {token!r:.60} is not a token of {TOKENIZER}",
                code="huggingface.unknown-special-token", path=folder / TOKENIZER_CONFIG,
            )  # fmt: skip
        return ids[token]
    number = raw_config.get(f"{name}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if number is not None and type(number) is not int:
        raise FormatError(f"{name}_token_id is {number!r}, not a token id", code="huggingface.bad-value", path=folder / CONFIG)
    return number


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template in its own file first, as transformers has it, else in tokenizer_config.json."""
    if (folder / TEMPLATE).is_file():
        return _read_text(folder / TEMPLATE)
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), found)
    if found is not None and not isinstance(found, str):
        raise FormatError(
            "the chat template is not text, nor is there one called 'default'",
            code="huggingface.bad-value", path=folder / TOKENIZER_CONFIG,
        )  # fmt: skip
    return found


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
    scaling = None if config.rope_scaling is None else rope.to_huggingface(config.rope_scaling)
    if factors is not None:
        scaling = rope.llama3_of(factors, config.rope_theta)
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    ids = {key: id for key, id in ids.items() if id is not None}
    return {
        CONFIG: {
            "architectures": [kind.class_name],
            "attention_dropout": 0.0,
            **ids,
            **head,
            "hidden_act": "silu",
            "hidden_size": config.embedding_length,
            "initializer_range": 0.02,
            "intermediate_size": config.feed_forward_length,
            "max_position_embeddings": config.context_length,
            "model_type": kind.model_types[0],
            "num_attention_heads": config.head_count,
            "num_hidden_layers": config.block_count,
            "num_key_value_heads": config.head_count_kv,
            "rms_norm_eps": _shortest(config.rms_norm_eps),
            **({} if scaling is None else {"rope_scaling": scaling}),
            "rope_theta": _shortest(config.rope_theta),
            "tie_word_embeddings": config.tied_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            **({"use_sliding_window": False} if kind.name.startswith("qwen") else {}),
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
