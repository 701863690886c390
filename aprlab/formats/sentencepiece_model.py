"""SentencePiece's `tokenizer.model`: pieces, scores and types, read from its protocol buffer.

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto: a ModelProto holds pieces (field 1:
text 1, score 2, type 3), a trainer's settings (field 2: model type 3, ids of the special pieces 40 to 43) and a normaliser's
(field 3: the space in front 3, spaces removed 4). Everything else is stepped over.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats.reading import read_bytes
from aprlab.model.vocabulary import BYTE, NORMAL

LIMIT = 64 << 20  # bytes; Llama 2's has half a million, Gemma's four
MOST = 1 << 20  # pieces
_BPE = 2  # of TrainerSpec.ModelType: 1 unigram, 2 BPE, 3 words, 4 characters
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


@dataclass
class Pieces:
    """What a tokenizer.model says.

    Attributes:
        texts: spaces are ``▁``.
        scores: one for each; those with the best are joined first.
        types: ggml's, which are SentencePiece's own numbers.
        special: name (``unk``, ``bos``, ``eos``, ``pad``) -> id, where there is one.
        prefix: whether a text begins with a space.
    """

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    prefix: bool = True


def read_pieces(path: Path) -> Pieces:
    """The file at `path`.

    Raises:
        FormatError: it is cut off, is no such file, or holds what none has; with the offset.
        UnsupportedError: it is no BPE.
    """
    raw = memoryview(read_bytes(path, LIMIT))
    found = Pieces()
    kind = 1  # what TrainerSpec says where it says nothing
    names = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    defaults = {"unk": 0, "bos": 1, "eos": 2}
    for number, wire, value, at in _fields(raw, 0, len(raw), path):
        if number == 1:
            _piece(found, raw, _span(wire, value, at, path), path)
        elif number == 2:
            for inner, _, said, _ in _fields(raw, *_span(wire, value, at, path), path):
                kind = _signed(said) if inner == 3 else kind
                if inner in names:
                    defaults[names[inner]] = _signed(said)
        elif number == 3:
            for inner, _, said, _ in _fields(raw, *_span(wire, value, at, path), path):
                found.prefix = bool(said) if inner == 3 else found.prefix
    if not found.texts:
        raise FormatError("holds no pieces; it is no tokenizer.model of SentencePiece", code="sentencepiece.no-pieces", path=path)
    if kind != _BPE:
        what = {1: "unigram", 3: "words", 4: "characters"}.get(kind, f"type {kind}")
        raise UnsupportedError(
            f"is a SentencePiece model of {what}; llama.cpp's tokenizer 'llama' is BPE", code="sentencepiece.not-bpe", path=path
        )
    found.special = {name: id for name, id in defaults.items() if 0 <= id < len(found.texts)}
    return found


def _piece(found: Pieces, raw: memoryview, span: tuple[int, int], path: Path) -> None:
    text, score, kind = "", 0.0, NORMAL
    for number, wire, value, at in _fields(raw, *span, path):
        if number == 1:
            start, stop = _span(wire, value, at, path)
            try:
                text = bytes(raw[start:stop]).decode()
            except UnicodeDecodeError:
                raise FormatError(
                    f"piece {len(found.texts)} is not UTF-8", code="sentencepiece.bad-piece", path=path, offset=start
                ) from None
        elif number == 2 and wire == _FOUR:
            score = struct.unpack("<f", struct.pack("<I", value))[0]
        elif number == 3 and wire == _VARINT:
            kind = value
    if not math.isfinite(score) or not NORMAL <= kind <= BYTE or not text:
        raise FormatError(
            f"piece {len(found.texts)} has text {text!r:.40}, score {score}, type {kind}; a text, a number and 1 to 6 are wanted",
            code="sentencepiece.bad-piece", path=path, offset=span[0],
        )  # fmt: skip
    if len(found.texts) == MOST:
        raise FormatError(f"holds more than {MOST} pieces", code="sentencepiece.too-many-pieces", path=path, offset=span[0])
    found.texts.append(text)
    found.scores.append(score)
    found.types.append(kind)


def _fields(raw: memoryview, at: int, stop: int, path: Path) -> Iterator[tuple[int, int, int, int]]:
    """(field, wire type, value, offset of the value); of bytes the value is how many."""
    while at < stop:
        tag, at = _varint(raw, at, stop, path)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            start = at
            value, at = _varint(raw, at, stop, path)
        elif wire == _BYTES:
            value, start = _varint(raw, at, stop, path)
            at = start + value
        elif wire in (_EIGHT, _FOUR):
            start, at = at, at + (8 if wire == _EIGHT else 4)
            value = int.from_bytes(raw[start:at], "little")
        else:
            raise FormatError(f"field {number} has wire type {wire}", code="sentencepiece.bad-field", path=path, offset=at)
        if at > stop or not number:
            raise FormatError(
                f"field {number} ends beyond what holds it; the file is cut off, or no tokenizer.model",
                code="sentencepiece.cut-off", path=path, offset=start,
            )  # fmt: skip
        yield number, wire, value, start


def _varint(raw: memoryview, at: int, stop: int, path: Path) -> tuple[int, int]:
    value = 0
    for n in range(10):
        if at + n >= stop:
            break
        byte = raw[at + n]
        value |= (byte & 127) << (7 * n)
        if byte < 128:
            return value, at + n + 1
    raise FormatError("a number does not end; the file is cut off", code="sentencepiece.cut-off", path=path, offset=at)


def _span(wire: int, value: int, at: int, path: Path) -> tuple[int, int]:
    if wire != _BYTES:
        raise FormatError(f"wire type {wire} where bytes are wanted", code="sentencepiece.bad-field", path=path, offset=at)
    return at, at + value


def _signed(value: int) -> int:
    """int32 of a varint."""
    return value - (1 << 64) if value >= 1 << 63 else value


__all__ = ["Pieces", "read_pieces"]
