"""The tokenizer of a Hugging Face folder: tokenizer.json, or SentencePiece's tokenizer.model, and what stands beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats.huggingface_files import (
    CONFIG,
    PIECES,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_json,
    read_text,
    short,
)  # fmt: skip
from aprlab.formats.reading import exists
from aprlab.formats.sentencepiece_model import read_pieces
from aprlab.model.config import TokenizerData
from aprlab.model.tensor import Tensor
from aprlab.model.vocabulary import CONTROL, GPT2_WORDS, NORMAL, PRE_TOKENIZERS, SPACE, UNUSED, USER_DEFINED


def tokenizer(folder: Path, raw_config: dict[str, Any], tensors: dict[str, Tensor]) -> TokenizerData:
    """The tokenizer data of a folder, padded to the rows of the embedding as llama.cpp's converter does.

    Byte-level BPE is in tokenizer.json; SentencePiece's scores are in tokenizer.model alone.
    """
    path = folder / TOKENIZER
    settings = read_json(folder / TOKENIZER_CONFIG) if exists(folder / TOKENIZER_CONFIG) else {}
    pieces = exists(folder / PIECES)
    if pieces and not exists(path):
        return _sentencepiece(folder, {}, settings, raw_config, tensors)
    raw = read_json(path)
    model = raw.get("model")
    if pieces and isinstance(model, dict) and (model.get("byte_fallback") or model.get("type") == "Unigram"):
        return _sentencepiece(folder, raw, settings, raw_config, tensors)
    if not isinstance(model, dict):
        raise FormatError("has no model", code="huggingface.no-tokenizer-model", path=path)
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        more = f"; SentencePiece's scores are in {PIECES}, which is not here" if model.get("byte_fallback") else ""
        raise UnsupportedError(
            f"the tokenizer is not plain byte-level BPE{more}", code="tokenizer.unsupported-model", path=path
        )
    pre = _pre_tokenizer(raw, bool(model.get("ignore_merges")), path)
    added = _added(raw, path)
    by_id = _by_id(model.get("vocab"), added, path)
    rows = _rows(max(by_id), tensors, path)
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(rows)]
    token_types = [UNUSED if id not in by_id else added.get(by_id[id], (id, NORMAL))[1] for id in range(rows)]
    ids = {token: id for id, token in by_id.items()}
    special = {name: _special(name, settings, raw_config, ids, folder) for name in ("bos", "eos", "pad")}
    return TokenizerData(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_types=token_types,
        merges=_merges(model.get("merges"), path),
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
        add_bos=_add_bos(settings, folder),
        chat_template=_chat_template(folder, settings),
    )


def _rows(last: int, tensors: dict[str, Tensor], path: Path) -> int:
    """Rows of the embedding; the last token must have one."""
    if "token_embd.weight" not in tensors:
        raise FormatError("has no tensor 'model.embed_tokens.weight'", code="model.missing-tensor", path=path.parent)
    rows = tensors["token_embd.weight"].shape[0]
    if last >= rows:
        raise FormatError(f"token {last} has no row in an embedding of {rows}", code="huggingface.token-without-row", path=path)
    return rows


def _add_bos(settings: dict[str, Any], folder: Path) -> bool | None:
    add_bos = settings.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise FormatError(
            f"add_bos_token is {add_bos!r}, not true or false", code="huggingface.bad-value", path=folder / TOKENIZER_CONFIG
        )
    return add_bos


# ── SentencePiece ─────────────────────────────────────────────────────────────────────────────────────────────────

_ADDED, _PAD = -1000.0, -10000.0  # scores that llama.cpp's converter gives to added tokens and to padding


def _sentencepiece(
    folder: Path, raw: dict[str, Any], settings: dict[str, Any], raw_config: dict[str, Any], tensors: dict[str, Tensor]
) -> TokenizerData:
    """tokenizer.model, with the tokens that tokenizer.json or tokenizer_config.json add, as llama.cpp's converter has them."""
    path = folder / PIECES
    found = read_pieces(path)
    added = _decoder(settings, folder) or _added(raw, folder / TOKENIZER)
    last = max([len(found.texts) - 1, *(id for id, _ in added.values())])
    rows = _rows(last, tensors, path)
    more = rows - len(found.texts)
    tokens = found.texts + [f"[PAD{id}]" for id in range(len(found.texts), rows)]
    kinds, scores = found.types + [UNUSED] * more, found.scores + [_PAD] * more
    for token, (id, kind) in added.items():
        tokens[id] = token if kind == CONTROL else token.replace(SPACE, " ")
        kinds[id], scores[id] = kind, _ADDED
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        id, twice = next((id, token) for id, token in enumerate(tokens) if ids[token] != id)
        raise FormatError(f"token {twice!r:.60} is {id} and {ids[twice]}", code="huggingface.duplicate-id", path=path)
    special = {name: _special(name, settings, raw_config, ids, folder) for name in ("bos", "eos", "pad")}
    return TokenizerData(
        model="llama", pre="default", tokens=tokens, token_types=kinds, merges=[], scores=scores,
        **{f"{name}_token_id": found.special.get(name) if id is None else id for name, id in special.items()},
        add_bos=_add_bos(settings, folder), chat_template=_chat_template(folder, settings), add_space_prefix=found.prefix,
    )  # fmt: skip


def _decoder(settings: dict[str, Any], folder: Path) -> dict[str, tuple[int, int]]:
    """``added_tokens_decoder`` of tokenizer_config.json: token -> id and ggml's type."""
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict) or not all(id.isdecimal() and isinstance(item, dict) for id, item in listed.items()):
        raise FormatError(
            "added_tokens_decoder is not a map of ids", code="huggingface.bad-added-token", path=folder / TOKENIZER_CONFIG
        )
    items = [{**item, "id": int(id)} for id, item in listed.items() if len(id) < 10]
    plain = [{k: v for k, v in item.items() if k not in ("single_word", "lstrip", "rstrip")} for item in items]
    return _added({"added_tokens": plain}, folder / TOKENIZER_CONFIG)


# ── byte-level BPE ────────────────────────────────────────────────────────────────────────────────────────────────


def _pre_tokenizer(raw: dict[str, Any], whole_words: bool, path: Path) -> str:
    """The name ggml has for the way text is cut into words; the patterns must be known to the letter."""
    normalizer, cutter = raw.get("normalizer"), raw.get("pre_tokenizer")
    patterns = _patterns(cutter)
    known = [name for name, cut in PRE_TOKENIZERS.items() if patterns == cut.patterns and whole_words == cut.whole_words]
    if not known:
        raise UnsupportedError(
            f"the pre-tokenizer {short(cutter)} is not one that is known", code="tokenizer.unsupported-pre-tokenizer", path=path
        )
    kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    if kind != ("NFC" if PRE_TOKENIZERS[known[0]].nfc else None):
        expected = "NFC" if PRE_TOKENIZERS[known[0]].nfc else "none"
        raise UnsupportedError(
            f"the normalizer is {short(normalizer)}; {known[0]} has {expected}",
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
            raise FormatError(f"added_tokens holds {short(item)}", code="huggingface.bad-added-token", path=path)
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
            raise FormatError(f"merge {short(merge)} is not a pair", code="tokenizer.bad-merge", path=path)
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
    if exists(folder / TEMPLATE):
        return read_text(folder / TEMPLATE)
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), found)
    if found is not None and not isinstance(found, str):
        raise FormatError(
            "the chat template is not text, nor is there one called 'default'",
            code="huggingface.bad-value", path=folder / TOKENIZER_CONFIG,
        )  # fmt: skip
    return found


__all__ = ["tokenizer"]
