"""What a vocabulary is: its alphabet, ggml's token types, how text is cut, and what must hold of tokenizer data.

Data alone: `aprlab.inference.tokenizer` encodes and decodes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aprlab.errors import FormatError, UnsupportedError
from aprlab.model.config import TokenizerData

# ggml's token types (`LLAMA_TOKEN_TYPE_*`)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # how SentencePiece writes a space


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words before merging.

    Attributes:
        patterns: each cuts what the one before has left whole into its matches and what is between them.
        nfc: text is composed (Unicode NFC) first. The models' authors do so; llama.cpp does not.
        whole_words: a word that is a token is that token, whatever merges would make of it.
        adds_bos: a first token is put in front where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = PreTokenizer(
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    nfc=True,
)
_LLAMA3 = PreTokenizer(
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    whole_words=True, adds_bos=True,
)  # fmt: skip
# As Mistral's tokenizer.json has it; llama.cpp's takes every letter beyond ASCII for both upper and lower case.
_TEKKEN = PreTokenizer(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    whole_words=True, adds_bos=True,
)  # fmt: skip

# `tokenizer.ggml.pre` -> what it stands for; where the model has a tokenizer.json, the patterns are the ones in it.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "smollm": PreTokenizer((r"\p{N}", GPT2_WORDS)),
    "tekken": _TEKKEN,
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    # Other names that ggml gives the same patterns (llama-vocab.cpp).
    **dict.fromkeys(("deepseek-r1-qwen", "kormo"), _QWEN2),
    **dict.fromkeys(("llama3", "llama-v3"), _LLAMA3),
}

# Control tokens that end a generation in addition to the file's own eos, as llama.cpp has it: end of a turn, of a message, of a
# text, and the file and repository marks of the fill-in-the-middle format.
END_OF_GENERATION = (
    "<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
    "</s>",
)  # fmt: skip


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_ALPHABET: dict[str, int] = _byte_alphabet()


def check_tokenizer(data: TokenizerData) -> dict[str, int]:
    """Token -> id of sound tokenizer data.

    Raises:
        UnsupportedError: a model or pre-tokeniser that is not handled, by name.
        FormatError: vocabulary and types (or scores) have different lengths, a token is listed twice, a byte has no token, a
            special id is outside the vocabulary.
    """
    if data.model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"tokenizer model {data.model!r}; handled: 'gpt2' (byte-level BPE), 'llama' (SentencePiece)",
            code="tokenizer.unsupported-model",
        )  # fmt: skip
    if data.model == "gpt2" and data.pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"pre-tokeniser {data.pre!r}; known: {', '.join(PRE_TOKENIZERS)}", code="tokenizer.unsupported-pre-tokenizer"
        )
    if len(data.token_types) != len(data.tokens):
        raise FormatError(
            f"{len(data.tokens)} tokens, but {len(data.token_types)} token types", code="tokenizer.token-types-count"
        )
    size = len(data.tokens)
    for name, id in (("bos", data.bos_token_id), ("eos", data.eos_token_id), ("padding", data.pad_token_id)):
        if id is not None and not 0 <= id < size:
            raise FormatError(
                f"the {name} token {id} is outside the vocabulary of {size}",
                code="tokenizer.special-token-out-of-range",
            )  # fmt: skip
    if data.model == "llama" and (data.scores is None or len(data.scores) != size):
        raise FormatError(f"{size} tokens, but {len(data.scores or [])} scores", code="tokenizer.scores-count")
    if data.scores is not None and not all(map(math.isfinite, data.scores)):
        raise FormatError("a score is not a finite number", code="tokenizer.score-not-finite")
    return _vocabulary(data)


def _vocabulary(data: TokenizerData) -> dict[str, int]:
    tokens = data.tokens
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(id for id, token in enumerate(tokens) if ids[token] != id)
        raise FormatError(
            f"token {tokens[twice]!r} is listed twice in the vocabulary, as {twice} and {ids[tokens[twice]]}",
            code="tokenizer.duplicate-token",
        )  # fmt: skip
    if data.model == "llama":
        missing = [byte for byte in range(256) if byte_token(byte) not in ids and chr(byte) not in ids]
    else:
        missing = [byte for char, byte in BYTE_ALPHABET.items() if char not in ids]
    if missing:  # such a byte would vanish from every prompt without a word
        raise FormatError(
            f"the vocabulary has no token for byte 0x{missing[0]:02X} ({len(missing)} bytes in all)",
            code="tokenizer.missing-byte",
        )  # fmt: skip
    return ids


def byte_token(byte: int) -> str:
    """How SentencePiece spells a byte that is part of no other token: ``<0x0A>``."""
    return f"<0x{byte:02X}>"


def first_token(data: TokenizerData) -> int | None:
    """The id put in front of every prompt, as llama.cpp does where a file says nothing; None for none."""
    pieces = data.model == "llama"
    adds = data.add_bos
    if adds is None:
        adds = pieces or PRE_TOKENIZERS[data.pre].adds_bos
    return (1 if data.bos_token_id is None and pieces else data.bos_token_id) if adds else None


def merge_pairs(data: TokenizerData, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges as pairs; raises FormatError where one is no pair, or gives or takes a token that `ids` lacks."""
    parts = [merge.partition(" ") for merge in data.merges]
    for n, part in enumerate(parts):
        if "" in part:
            raise FormatError(
                f"merge {n} {data.merges[n]!r} is not two words with a space between them", code="tokenizer.bad-merge"
            )
    merges = [(left, right) for left, _, right in parts]
    if all(left in ids and right in ids and left + right in ids for left, right in merges):  # a vocabulary has 150,000
        return merges
    stranger = next(token for left, right in merges for token in (left, right, left + right) if token not in ids)
    raise FormatError(
        f"vocabulary and merges do not fit: Token `{stranger}` out of vocabulary", code="tokenizer.merges-do-not-fit"
    )


def end_of_generation(data: TokenizerData, ids: dict[str, int]) -> frozenset[int]:
    """Ids that end a generation: the file's own eos, and the control tokens of `END_OF_GENERATION` that it has."""
    controls = (ids.get(name) for name in END_OF_GENERATION)
    ends = {id for id in controls if id is not None and data.token_types[id] == CONTROL}
    last = 2 if data.eos_token_id is None and data.model == "llama" else data.eos_token_id  # llama.cpp's default
    return frozenset(ends if last is None else ends | {last})
