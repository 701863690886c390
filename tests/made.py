"""Whole model files made for tests: any architecture, random weights, a tokenizer of any kind, as GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from builders import BYTE_ALPHABET, CONFIG, TEMPLATE, random_model

from aprlab.conversion.provenance import made_fields
from aprlab.formats import gguf, safetensors
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.model import Model
from aprlab.model.vocabulary import byte_token
from aprlab.quants import types

F32 = (types.F32,)
# Words from which merges are made: letters of several scripts, digits, marks, code.
WORDS = (  # noqa: SIM905 - a list of fifty strings is not easier to read
    "hello world the quick brown fox don't I'LL naïve Ünïcode Straße école ÉCOLE 日本語 你好 世界 한국어 العربية हिन्दी Ελληνικά "
    "Привет def return self print range import class __init__ 2024 1234567 3.14 != == -> => :: // /* */ <<< >>> "
    "MixedCase camelCase HTTPServer snake_case x = y + 1"
).split()
MARKS = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool_call>": 4}


def bpe_data(pre: str, extra: int = 0, **changes: Any) -> TokenizerData:
    """Byte-level BPE with merges that spell `WORDS`, with and without a space in front."""
    tokens, merges = list(BYTE_ALPHABET), []
    back = {byte: char for char, byte in BYTE_ALPHABET.items()}
    for text in [each for word in WORDS for each in (word, f" {word}")] + ["    ", "\n\n", " \n"]:
        parts = [back[byte] for byte in text.encode()]
        while len(parts) > 1:
            joined = parts[0] + parts[1]
            if joined not in tokens:
                merges.append(f"{parts[0]} {parts[1]}")
                tokens.append(joined)
            parts = [joined, *parts[2:]]
    kinds = [1] * len(tokens) + list(MARKS.values()) + [5] * extra
    tokens += [*MARKS, *(f"[PAD{n}]" for n in range(extra))]
    data = TokenizerData(
        "gpt2", pre, tokens, kinds, merges, tokens.index("<|endoftext|>"), tokens.index("<|im_end|>"), None, None, TEMPLATE
    )
    return replace(data, **changes)


def pieces_data(**changes: Any) -> TokenizerData:
    """SentencePiece's BPE: three special tokens, 256 bytes, then pieces whose scores fall with their number."""
    tokens, kinds = ["<unk>", "<s>", "</s>"], [2, 3, 3]
    tokens += [byte_token(byte) for byte in range(256)]
    kinds += [6] * 256
    pieces: list[str] = []
    for word in WORDS:
        text = f"▁{word}"
        pieces += [text[:n] for n in range(2, len(text) + 1)] + [word[n : n + 2] for n in range(len(word) - 1)]
        pieces += [word[:3], word[-3:]]
    letters = [*sorted({letter for word in WORDS for letter in word}), "▁", "\n"]
    known = [piece for piece in dict.fromkeys(pieces) if len(piece) > 1] + letters
    tokens += [*known, "<|im_start|>", "<|im_end|>", "<tool_call>"]
    kinds += [1] * len(known) + [3, 3, 4]
    scores = [0.0] * 259 + [-float(n) for n in range(len(known))] + [0.0] * 3
    data = TokenizerData("llama", "default", tokens, kinds, [], 1, 2, None, None, TEMPLATE, scores, None)
    return replace(data, **changes)


def made_model(config: ModelConfig = CONFIG, data: TokenizerData | None = None, seed: int = 3, mix: Any = F32) -> Model:
    """A random model of `config`'s architecture with this tokenizer, in memory."""
    data = bpe_data("qwen2") if data is None else data
    model = random_model(seed, replace(config, vocab_size=len(data.tokens)), mix)
    return replace(model, make_tokenizer=lambda: data)


def write_gguf(model: Model, path: Path, drop: tuple[str, ...] = (), **keys: Any) -> Path:
    """`model` as a GGUF file, with keys dropped, or set: ``llama__rope__freq_base=5e5``."""
    fields = {f.key: f for f in made_fields(model.config, model.tokenizer, model.metadata) if f.key not in drop}
    for key, value in keys.items():
        name = key.replace("__", ".")
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        fields[name] = gguf.field_of(name, kind, value)
    infos = gguf.layout([(name, t.type, t.shape) for name, t in model.tensors.items()])
    with open(path, "wb") as file:
        file.write(gguf.pack_header(list(fields.values()), infos))
        for tensor in model.tensors.values():
            raw = np.ascontiguousarray(tensor.raw)
            file.write(raw.tobytes() + bytes(-len(raw) % gguf.DEFAULT_ALIGNMENT))
    return path


def shard(folder: Path, parts: int = 3) -> None:
    """Spread model.safetensors over shards with an index, as transformers does above a size."""
    header = safetensors.read_header(folder / "model.safetensors")
    weight_map = {}
    for n in range(parts):
        file = f"model-{n + 1:05}-of-{parts:05}.safetensors"
        mine = header.entries[n::parts]
        plans = [
            safetensors.SafetensorsPlan(e.name, e.type, e.shape, lambda e=e: iter([header.file[e.start : e.stop].tobytes()]))  # type: ignore[misc]
            for e in mine
        ]
        safetensors.write(folder / file, plans, {"format": "pt"})
        weight_map |= {e.name: file for e in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
