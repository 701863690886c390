"""What a byte-level vocabulary is: its alphabet, ggml's token types, how text is cut, and what must hold of tokenizer data.

Data alone: `aprlab.inference.tokenizer` encodes and decodes with it.
"""

from __future__ import annotations

from aprlab.errors import FormatError, UnsupportedError
from aprlab.model.config import TokenizerData

# ggml's token types (`LLAMA_TOKEN_TYPE_*`)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# `tokenizer.ggml.pre` -> how text is cut into words before merging; the pattern is Qwen2's own (tokenizer.json)
PRE_TOKENIZERS: dict[str, str] = {
    "qwen2": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}
# Other names that ggml gives the same pattern (`LLAMA_VOCAB_PRE_TYPE_QWEN2` in llama-vocab.cpp).
PRE_TOKENIZERS |= dict.fromkeys(("deepseek-r1-qwen", "kormo"), PRE_TOKENIZERS["qwen2"])

# Control tokens that end a generation in addition to the file's own eos, as llama.cpp has it: end of a turn, of a text, and
# the file and repository marks of the fill-in-the-middle format.
END_OF_GENERATION = ("<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_ALPHABET: dict[str, int] = _byte_alphabet()


def check_tokenizer(data: TokenizerData) -> dict[str, int]:
    """Token -> id of sound tokenizer data.

    Raises:
        UnsupportedError: a model or pre-tokeniser other than Qwen2's, by name.
        FormatError: vocabulary and types have different lengths, a token is listed twice, a byte has no token, a special id
            is outside the vocabulary.
    """
    if data.model != "gpt2":
        raise UnsupportedError(
            f"tokenizer model {data.model!r}; only 'gpt2' (byte-level BPE) is handled", code="tokenizer.unsupported-model"
        )
    if data.pre not in PRE_TOKENIZERS:
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
    return _vocabulary(data.tokens)


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(id for id, token in enumerate(tokens) if ids[token] != id)
        raise FormatError(
            f"token {tokens[twice]!r} is listed twice in the vocabulary, as {twice} and {ids[tokens[twice]]}",
            code="tokenizer.duplicate-token",
        )  # fmt: skip
    missing = [byte for char, byte in BYTE_ALPHABET.items() if char not in ids]
    if missing:  # such a byte would vanish from every prompt without a word
        raise FormatError(
            f"the vocabulary has no token for byte 0x{missing[0]:02X} ({len(missing)} bytes in all)",
            code="tokenizer.missing-byte",
        )  # fmt: skip
    return ids


def merge_pairs(data: TokenizerData, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges as pairs; raises FormatError where one is no pair, or gives or takes a token that `ids` lacks."""
    merges: list[tuple[str, str]] = []
    for n, merge in enumerate(data.merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise FormatError(f"merge {n} {merge!r} is not two words with a space between them", code="tokenizer.bad-merge")
        merges.append((left, right))
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in ids:
                raise FormatError(
                    f"vocabulary and merges do not fit: Token `{token}` out of vocabulary", code="tokenizer.merges-do-not-fit"
                )
    return merges


def end_of_generation(data: TokenizerData, ids: dict[str, int]) -> frozenset[int]:
    """Ids that end a generation: the file's own eos, and the control tokens of `END_OF_GENERATION` that it has."""
    controls = (ids.get(name) for name in END_OF_GENERATION)
    ends = {id for id in controls if id is not None and data.token_types[id] == CONTROL}
    return frozenset(ends if data.eos_token_id is None else ends | {data.eos_token_id})
