"""Qwen2's tokenizer, built from what the model file carries: byte-level BPE by Hugging Face's `tokenizers`.

Decoding is done on bytes here, not on text there: a character may be spread over several tokens, and a stream has to
give it out whole, once, and lose no byte.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.model.config import TokenizerData
from aprlab.model.keys import KNOWN_ENDS

# ggml's token types (`LLAMA_TOKEN_TYPE_*`)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# `tokenizer.ggml.pre` -> how text is cut into words before merging; the pattern is Qwen2's own (tokenizer.json)
PRE_TOKENIZERS: dict[str, str] = {
    "qwen2": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}
# Other names that ggml gives the same pattern (`LLAMA_VOCAB_PRE_TYPE_QWEN2` in llama-vocab.cpp).
PRE_TOKENIZERS |= dict.fromkeys(("deepseek-r1-qwen", "kormo"), PRE_TOKENIZERS["qwen2"])

# Control tokens that end a generation besides the file's own eos, as llama.cpp has it: end of a turn, of a text, and
# the file and repository marks of the fill-in-the-middle format.
END_OF_GENERATION = KNOWN_ENDS


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_ALPHABET: dict[str, int] = _byte_alphabet()


class Qwen2Tokenizer:
    """Text to ids and back.

    Attributes:
        data: what it was built from.
        vocab_size: number of ids.
        eog: ids that end a generation.

    Raises:
        UnsupportedError: a model or pre-tokeniser other than Qwen2's, by name.
        FormatError: vocabulary and merges contradict each other, a token stands twice, a byte has no token, a special id
            is outside the vocabulary.
    """

    def __init__(self, data: TokenizerData) -> None:
        if data.model != "gpt2":
            raise UnsupportedError(f"tokenizer model {data.model!r}; only 'gpt2' (byte-level BPE) is handled")
        if data.pre not in PRE_TOKENIZERS:
            raise UnsupportedError(f"pre-tokeniser {data.pre!r}; known: {', '.join(PRE_TOKENIZERS)}")
        if len(data.token_types) != len(data.tokens):
            raise FormatError(f"{len(data.tokens)} tokens, but {len(data.token_types)} token types")
        self.data = data
        self.vocab_size = len(data.tokens)
        for name, id in (("bos", data.bos_token_id), ("eos", data.eos_token_id), ("padding", data.pad_token_id)):
            if id is not None and not 0 <= id < self.vocab_size:
                raise FormatError(f"the {name} token {id} is outside the vocabulary of {self.vocab_size}")
        self._ids = _vocabulary(data.tokens)
        self._tokenizer = _build(data, self._ids)
        self.eog: frozenset[int] = frozenset(
            id for id in (data.eos_token_id, *(self._control(name) for name in END_OF_GENERATION)) if id is not None
        )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of `text` (NFC-normalised first, as Qwen2 does).

        Args:
            text: any string that UTF-8 can carry.
            parse_special: read control tokens such as ``<|im_start|>`` as themselves; False splits their spelling like
                any text. User-defined tokens (``<tool_call>``) are read as themselves either way, as in llama.cpp.

        Raises:
            UsageError: the text holds lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not Unicode: {error.reason} at character {error.start}") from None
        self._tokenizer.encode_special_tokens = not parse_special
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        first = [self.data.bos_token_id] if self.data.add_bos and self.data.bos_token_id is not None else []
        return first + ids

    def token(self, id: int) -> str:
        """The token as the file spells it (``Ġdef``); raises UsageError for an id outside the vocabulary."""
        if not 0 <= id < self.vocab_size:
            raise UsageError(f"token {id} is outside the vocabulary of {self.vocab_size}")
        return self.data.tokens[id]

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; special and unused tokens stand for their own spelling."""
        token = self.token(id)
        if self.data.token_types[id] != NORMAL:
            return token.encode()
        try:
            return bytes(BYTE_ALPHABET[c] for c in token)
        except KeyError as error:
            raise FormatError(f"token {id} {token!r} holds {error.args[0]!r}, no byte of a byte-level vocabulary") from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves control tokens out."""
        stream = self.stream(skip_special=skip_special)
        return "".join(stream.feed(id) for id in ids) + stream.end()

    def stream(self, *, skip_special: bool = False) -> Stream:
        """A decoder that takes ids one by one."""
        return Stream(self, skip_special)

    def is_special(self, id: int) -> bool:
        """Whether `id` is a control token."""
        return self.data.token_types[id] == CONTROL

    def _control(self, name: str) -> int | None:
        id = self._ids.get(name)
        return id if id is not None and self.is_special(id) else None


class Stream:
    """Text as it becomes certain: whole characters only, every byte once. `end` gives what is left over."""

    def __init__(self, tokenizer: Qwen2Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        """Text that token `id` completes; may be empty."""
        piece = self._tokenizer.token_bytes(id)
        return self._utf8.decode(b"" if self._skip_special and self._tokenizer.is_special(id) else piece)

    def end(self) -> str:
        """U+FFFD for each character that never became whole."""
        return self._utf8.decode(b"", final=True)


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(id for id, token in enumerate(tokens) if ids[token] != id)
        raise FormatError(f"token {tokens[twice]!r} stands twice in the vocabulary, as {twice} and {ids[tokens[twice]]}")
    missing = [byte for char, byte in BYTE_ALPHABET.items() if char not in ids]
    if missing:  # such a byte would vanish from every prompt without a word
        raise FormatError(f"the vocabulary has no token for byte 0x{missing[0]:02X} ({len(missing)} bytes in all)")
    return ids


def _build(data: TokenizerData, ids: dict[str, int]) -> Tokenizer:
    merges: list[tuple[str, str]] = []
    for n, merge in enumerate(data.merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise FormatError(f"merge {n} {merge!r} is not two words with a space between them")
        merges.append((left, right))
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    except Exception as error:  # the Rust side raises plain Exception, with the word that is out of place
        raise FormatError(f"vocabulary and merges do not fit: {error}") from None
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[data.pre]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=type_ == CONTROL, normalized=False)
        for token, type_ in zip(data.tokens, data.token_types, strict=True)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer
