"""SentencePiece's tokenizer.model: written here field by field as its .proto says, read back, and broken in every way."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG
from made import made_model, pieces_data

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats import huggingface_tokenizer
from aprlab.formats.sentencepiece_model import read_pieces
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import TokenizerData


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def inside(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def piece(text: str, score: float, kind: int) -> bytes:
    return inside(1, inside(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))


def written(data: TokenizerData, kind: int = 2, prefix: bool = True) -> bytes:
    assert data.scores is not None
    pieces = [piece(*row) for row in zip(data.tokens, data.scores, data.token_types, strict=True)]
    trainer = inside(2, inside(1, b"corpus.txt") + number(3, kind) + number(43, -1) + varint(10 << 3 | 1) + bytes(8))
    return b"".join(pieces) + trainer + inside(3, inside(1, b"identity") + number(3, prefix))


@pytest.fixture(scope="module")
def data() -> TokenizerData:
    """Without added tokens: those are not in tokenizer.model."""
    whole = pieces_data()
    assert whole.scores is not None
    return replace(whole, tokens=whole.tokens[:-3], token_types=whole.token_types[:-3], scores=whole.scores[:-3])


def test_pieces_scores_types_and_the_special_ids_are_read(data: TokenizerData, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(written(data, prefix=False))
    found = read_pieces(tmp_path / "t")
    assert (found.texts, found.scores, found.types) == (data.tokens, data.scores, data.token_types)
    assert found.special == {"unk": 0, "bos": 1, "eos": 2} and not found.prefix


def test_a_folder_with_tokenizer_model_alone_gives_the_ids_of_the_gguf(data: TokenizerData, tmp_path: Path) -> None:
    added = {"content": "<|im_end|>", "special": True}, {"content": "<tool▁call>", "special": False}
    first = len(data.tokens)
    (tmp_path / "tokenizer.model").write_bytes(written(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True, "lstrip": False}}
        | {str(first + n): item for n, item in enumerate(added)},
        "eos_token": "<|im_end|>", "add_bos_token": True,
    }))  # fmt: skip
    config = replace(CONFIG, architecture="llama", rope_type="norm", vocab_size=first + 4)
    model = made_model(config, replace(pieces_data(), tokens=[f"{n}" for n in range(first + 4)], token_types=[1] * (first + 4),
                                       scores=[0.0] * (first + 4)))  # fmt: skip
    found = huggingface_tokenizer.tokenizer(tmp_path, {}, model.tensors)
    assert found.tokens[first:] == ["<|im_end|>", "<tool call>", f"[PAD{first + 2}]", f"[PAD{first + 3}]"]
    assert found.token_types[first:] == [3, 4, 5, 5] and (found.bos_token_id, found.eos_token_id) == (1, first)
    assert (found.model, found.add_bos, found.add_space_prefix, found.merges) == ("llama", True, True, [])
    text = "hello world, Größe 日本 🙂"
    assert Qwen2Tokenizer(found).encode(text) == Qwen2Tokenizer(replace(data, eos_token_id=None, add_bos=True)).encode(text)


def test_a_tokenizer_json_without_scores_asks_for_tokenizer_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "byte_fallback": True}}))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.model, which is not here"):
        huggingface_tokenizer.tokenizer(tmp_path, {}, {})


@pytest.mark.parametrize(("name", "raw", "code"), [
    ("empty", b"", "sentencepiece.no-pieces"), ("text", b"hello", "sentencepiece."),
    ("gguf", b"GGUF\x03\0\0\0", "sentencepiece."),
    ("no text", piece("", 0, 1), "sentencepiece.bad-piece"), ("nan", piece("a", float("nan"), 1), "sentencepiece.bad-piece"),
    ("type", piece("a", 0, 9), "sentencepiece.bad-piece"), ("utf-8", inside(1, inside(1, b"\xff")), "sentencepiece.bad-piece"),
    ("longer than the file", varint(1 << 3 | 2) + varint(1 << 60), "sentencepiece.cut-off"),
    ("endless number", b"\xff" * 40, "sentencepiece.cut-off"), ("groups", b"\x0b\x0c", "sentencepiece.bad-field"),
    ("a number for a piece", number(1, 5), "sentencepiece.bad-field"),
    ("unigram", piece("a", 0, 1) + inside(2, number(3, 1)), "sentencepiece.not-bpe"),
    ("field 0", b"\x00\x00", "sentencepiece.cut-off"),
])  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str, raw: bytes, code: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises((FormatError, UnsupportedError)) as found:
        read_pieces(tmp_path / "tokenizer.model")
    assert found.value.code is not None and found.value.code.startswith(code) and "\n" not in found.value.message


def test_any_bytes_are_read_or_refused(data: TokenizerData, tmp_path: Path) -> None:
    raw, rng = np.frombuffer(written(data), np.uint8), np.random.default_rng(18)
    for n in range(200):
        broken = raw[: rng.integers(1, len(raw))].copy() if n % 4 == 0 else raw.copy()
        broken[rng.integers(0, len(broken), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "t").write_bytes(broken.tobytes())
        try:
            read_pieces(tmp_path / "t")
        except AprlabError as error:
            assert error.path is not None
