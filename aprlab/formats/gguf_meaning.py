"""What the keys of a GGUF file mean: config and tokenizer data, a missing or foreign key refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats.gguf_header import (
    VALUE_TYPES,
    Field,
    FieldView,
    Header,
    Strings,
)
from aprlab.model import keys, rope, window
from aprlab.model.architecture import Architecture, architecture_of
from aprlab.model.config import ModelConfig, TokenizerData, check_config
from aprlab.model.model import TokenizerReader
from aprlab.model.vocabulary import CONTROL, END_OF_GENERATION, NORMAL

_WITHOUT_PRE = (
    "; llama.cpp would cut text as 'default' does, which is not how the model learnt it. Convert the file again, or set the "
    "key: gguf_new_metadata.py --pre-tokenizer qwen2 FILE OUT"
)


def _key(header: Header, key: str, kind: type | tuple[type, ...]) -> Any:
    """A required key of the right Python type."""
    found = _shared(header, key)
    if found is None:
        more = _WITHOUT_PRE if key == "tokenizer.ggml.pre" else ""
        raise FormatError(f"has no key {key!r}{more}", code="gguf.missing-key", path=header.path)
    if not isinstance(found.value, kind) or (isinstance(found.value, bool) and kind is not bool):
        raise FormatError(
            f"key {key!r} is a {found.type_name}, which it cannot be",
            code="gguf.wrong-value-type", path=header.path, offset=found.offset,
        )  # fmt: skip
    return found.value


def _shared(header: Header, key: str) -> Field | None:
    """A field, of which an array with the same number for each layer is that number."""
    found = header.fields.get(key)
    if found is None or keys.starred(key) not in keys.PER_LAYER:
        return found
    one = keys.one_number(key, found.value, header.value(f"{key.partition('.')[0]}.block_count"))
    return found if one is found.value else Field(key, VALUE_TYPES.index("uint32"), one, None, found.offset)


def _check_types(header: Header, *, of_tokenizer: bool) -> None:
    """Every key that llama.cpp reads has the very type that it reads: it refuses an int32 where it expects a uint32."""
    for key in header.fields:
        found = _shared(header, key)
        assert found is not None
        expected = keys.gguf_type(key)
        if found.key.startswith("tokenizer.") is not of_tokenizer:
            continue
        if expected is not None and found.type_name != expected:
            raise FormatError(
                f"key {found.key!r} is a {found.type_name}, where llama.cpp expects {expected} and refuses anything else",
                code="gguf.wrong-value-type", path=header.path, offset=found.offset,
            )  # fmt: skip


def optional(header: Header, key: str, kind: type | tuple[type, ...]) -> Any:
    return None if key not in header.fields else _key(header, key, kind)


def config(header: Header) -> ModelConfig:
    """The config of a GGUF file; a missing key raises and names it."""
    kind = architecture_of(_key(header, "general.architecture", str), header.path)

    def need(key: str, type_: type) -> Any:
        if f"{kind.name}.{key}" not in header.fields and key in {**keys.DEFAULTS, **kind.defaults}:
            return {**keys.DEFAULTS, **kind.defaults}[key]
        return _key(header, f"{kind.name}.{key}", type_)

    number = {
        name: need(name, int) for name in ("block_count", "embedding_length", "feed_forward_length", "context_length")
    }
    heads, kv = need("attention.head_count", int), need("attention.head_count_kv", int)
    embedding = next((i for i in header.infos if i.name == "token_embd.weight"), None)
    if embedding is None:
        raise FormatError("has no tensor 'token_embd.weight'", code="model.missing-tensor", path=header.path)
    # The key length is optional in GGUF and defined as embedding_length / head_count.
    head_dim = optional(header, f"{kind.name}.attention.key_length", int)
    head_dim = head_dim or (number["embedding_length"] // heads if heads else 0)
    found = check_config(
        ModelConfig(
            architecture=kind.name,
            **number,
            head_count=heads,
            head_count_kv=kv,
            head_dim=head_dim,
            vocab_size=embedding.ne[-1],
            rope_theta=need("rope.freq_base", float),
            rope_type=kind.rope_type,  # not a key: GGUF fixes it by architecture
            rms_norm_eps=need("attention.layer_norm_rms_epsilon", float),
            tied_embeddings=all(i.name != "output.weight" for i in header.infos),
            rope_scaling=_rope_scaling(header, kind, number["context_length"]),
            rope_factors=kind.rope_factors and any(i.name == rope.FACTORS for i in header.infos),
            sliding_window=_window(header, kind, number["context_length"]),
        ),
        header.path,
    )
    _check_types(header, of_tokenizer=False)
    for problem in keys.gguf_problems(FieldView(header), found):
        at = header.fields[problem.key].offset
        raise UnsupportedError(str(problem), code="keys.not-handled", path=header.path, offset=at)
    return found


def _window(header: Header, kind: Architecture, context_length: int) -> int | None:
    key = f"{kind.name}.{window.GGUF_KEY}"
    return window.from_gguf(optional(header, key, int), context_length)


def _rope_scaling(header: Header, kind: Architecture, context_length: int) -> rope.RopeScaling | None:
    try:
        return rope.from_gguf(lambda key: FieldView(header).get(f"{kind.name}.{key}"), context_length)
    except AprlabError as error:
        key = f"{kind.name}.rope.scaling.type"
        at = header.fields[key].offset if key in header.fields else None
        raise type(error)(f"keys {kind.name}.rope.scaling.*: {error.message}" if at is None else f"key {key!r}: {error.message}",
                          code=error.code, path=header.path, offset=at) from None  # fmt: skip


def tokenizer(header: Header) -> TokenizerReader:
    """What reads the tokenizer data of a GGUF file; a missing key raises and names it."""
    return TokenizerReader(
        lambda: _tokenizer(header, list), glance=lambda: _tokenizer(header, lambda strings: cast("list[str]", strings.checked()))
    )


def _tokenizer(header: Header, listed: Callable[[Strings], list[str]]) -> TokenizerData:
    prefix = "tokenizer.ggml."
    _check_types(header, of_tokenizer=True)
    tokens = listed(_key(header, f"{prefix}tokens", Strings))
    numbers = optional(header, f"{prefix}token_type", np.ndarray)
    if numbers is None:
        # llama.cpp calls every token normal where nothing is said, and takes those that end an answer for control tokens.
        numbers = np.array([CONTROL if token in END_OF_GENERATION else NORMAL for token in tokens], np.int32)
    if numbers.dtype.kind not in "iu":
        raise FormatError(
            f"key '{prefix}token_type' holds {numbers.dtype.name}, no token types", code="gguf.wrong-value-type", path=header.path
        )
    token_types = numbers.tolist()
    if len(token_types) != len(tokens):
        raise FormatError(
            f"{len(tokens)} tokens but {len(token_types)} token types", code="tokenizer.token-types-count", path=header.path
        )
    for info in header.infos:
        if info.name == "token_embd.weight" and info.ne[-1] != len(tokens):
            raise FormatError(
                f"has {info.ne[-1]} rows for {len(tokens)} tokens; llama.cpp refuses such a file. Convert it again from its "
                "source, with the tokenizer that belongs to these weights",
                code="gguf.tokens-and-rows", path=header.path, tensor=info.name, offset=info.at,
            )  # fmt: skip
    for key in keys.END_KEYS:
        end = optional(header, key, int)
        if end is not None and not (0 <= end < len(tokens) and tokens[end] in END_OF_GENERATION):
            what = repr(tokens[end]) if 0 <= end < len(tokens) else "outside the vocabulary"
            raise UnsupportedError(
                f"key {key!r} ends answers at token {end} ({what}), which is not handled",
                code="keys.not-handled", path=header.path, offset=header.fields[key].offset,
            )  # fmt: skip
    model = _key(header, f"{prefix}model", str)
    pieces = model == "llama"  # SentencePiece: scores in place of merges, and nothing is cut into words
    pre = optional(header, f"{prefix}pre", str) if pieces else _key(header, f"{prefix}pre", str)
    return TokenizerData(
        model=model,
        pre=pre or "default",
        tokens=tokens,
        token_types=token_types,
        merges=[] if pieces else listed(_key(header, f"{prefix}merges", Strings)),
        bos_token_id=optional(header, f"{prefix}bos_token_id", int),
        eos_token_id=optional(header, f"{prefix}eos_token_id", int),
        pad_token_id=optional(header, f"{prefix}padding_token_id", int),
        add_bos=optional(header, f"{prefix}add_bos_token", bool),
        chat_template=optional(header, "tokenizer.chat_template", str),
        scores=_scores(header, f"{prefix}scores", len(tokens)) if pieces else None,
        add_space_prefix=optional(header, f"{prefix}add_space_prefix", bool),
    )


def _scores(header: Header, key: str, count: int) -> list[float]:
    """One float32 for each token of a SentencePiece vocabulary."""
    found = _key(header, key, np.ndarray)
    if found.dtype != np.float32 or len(found) != count:
        raise FormatError(
            f"key {key!r} holds {len(found)} values of {found.dtype.name} for {count} tokens",
            code="tokenizer.scores-count", path=header.path,
        )  # fmt: skip
    if not np.isfinite(found).all():
        token = int(np.flatnonzero(~np.isfinite(found))[0])
        raise FormatError(
            f"key {key!r}: the score of token {token} is {found[token]}, not a number that pieces can be compared by",
            code="tokenizer.score-not-finite", path=header.path,
        )  # fmt: skip
    return [float(score) for score in found]
