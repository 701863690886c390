"""A model's tokenizer, built from what its file carries: byte-level BPE by Hugging Face's `tokenizers`, or SentencePiece.

Decoding is done on bytes here, not on text there: a character may be spread over several tokens, and a stream has to
give it out whole, once, and lose no byte.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.inference.sentencepiece import SentencePieces
from aprlab.model.config import TokenizerData
from aprlab.model.vocabulary import (
    BYTE,
    BYTE_ALPHABET,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    USER_DEFINED,
    check_tokenizer,
    end_of_generation,
    first_token,
    merge_pairs,
)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Qwen2Tokenizer:
    """Text to ids and back.

    Attributes:
        data: what it was built from.
        vocab_size: number of ids.
        eog: ids that end a generation.
        first: the id put in front of every text; None for none.

    Raises:
        UnsupportedError: a model or pre-tokeniser that is not handled, by name.
        FormatError: vocabulary and merges contradict each other, a token is listed twice, a byte has no token, a special id
            is outside the vocabulary.
    """

    def __init__(self, data: TokenizerData, path: Path | None = None) -> None:
        """Build it; errors of the data name the file at `path`."""
        self.data = data
        self.vocab_size = len(data.tokens)
        try:
            self._ids = check_tokenizer(data)
            pieces = data.model == "llama"
            self._tokenizer = SentencePieces(data, self._ids) if pieces else _build(data, self._ids)
        except AprlabError as error:
            error.path = path if error.path is None else error.path
            raise
        self.eog = end_of_generation(data, self._ids)
        self.first = first_token(data)

    def working_as(
        self, kind: type[Qwen2Tokenizer], *, eog: frozenset[int] | None = None, words: str | None = None
    ) -> Qwen2Tokenizer:
        """This tokenizer, but a `kind`: of the same parts, none of them built again.

        Args:
            kind: the class; a subclass that works in another way.
            eog: other ids that end a generation.
            words: another pattern by which text is cut into words.
        """
        other = kind.__new__(kind)
        other.data, other.vocab_size, other._ids = self.data, self.vocab_size, self._ids
        other.eog, other.first = self.eog if eog is None else eog, self.first
        other._tokenizer = self._tokenizer
        if words is not None:
            if isinstance(self._tokenizer, SentencePieces):
                raise UnsupportedError("SentencePiece does not cut text into words", code="tokenizer.no-words")
            other._tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
            other._tokenizer.pre_tokenizer = _cutter((words,))
        return other

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of `text` (NFC-normalised first where the model's authors do so).

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
            raise UsageError(
                f"the text is not Unicode: {error.reason} at character {error.start}", code="tokenizer.text-not-unicode"
            ) from None
        if isinstance(self._tokenizer, SentencePieces):
            ids = self._tokenizer.encode(text, parse_special)
        else:
            self._tokenizer.encode_special_tokens = not parse_special
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.first is None else [self.first, *ids]

    def token(self, id: int) -> str:
        """The token as the file spells it (``Ġdef``); raises UsageError for an id outside the vocabulary."""
        if not 0 <= id < self.vocab_size:
            raise UsageError(f"token {id} is outside the vocabulary of {self.vocab_size}", code="tokenizer.token-out-of-range")
        return self.data.tokens[id]

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; special and unused tokens stand for their own spelling."""
        token, kind = self.token(id), self.data.token_types[id]
        if self.data.model == "llama":
            if kind == BYTE:
                return bytes([int(token[3:5], 16)]) if _BYTE_TOKEN.fullmatch(token) else token.encode()
            return (token.replace(SPACE, " ") if kind == NORMAL else token).encode()
        if kind != NORMAL:
            return token.encode()
        try:
            return bytes(BYTE_ALPHABET[c] for c in token)
        except KeyError as error:
            raise FormatError(
                f"token {id} {token!r} holds {error.args[0]!r}, which is not a byte of a byte-level vocabulary",
                code="tokenizer.token-not-bytes",
            ) from None  # fmt: skip

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


def _build(data: TokenizerData, ids: dict[str, int]) -> Tokenizer:
    merges = merge_pairs(data, ids)  # checked here: the Rust side panics where a merge gives no token
    cut = PRE_TOKENIZERS[data.pre]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=cut.whole_words))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _cutter(cut.patterns)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=type_ == CONTROL, normalized=False)
        for token, type_ in zip(data.tokens, data.token_types, strict=True)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _cutter(patterns: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """Cuts text into words, by one pattern after the other, and words into bytes."""
    words = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
