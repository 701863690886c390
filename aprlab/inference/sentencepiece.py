"""SentencePiece's BPE, as llama.cpp reads it from a GGUF file (`llm_tokenizer_spm`): pairs with the best score are joined first.

There are no merges: any two neighbours may be joined whose text is a token, and that token's score says how soon. What no
token covers is spelt in bytes. Spaces are written as ``▁``, and a text begins with one.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator

from aprlab.model.config import TokenizerData
from aprlab.model.vocabulary import CONTROL, SPACE, UNKNOWN, USER_DEFINED, byte_token


class SentencePieces:
    """Text to ids by scores.

    Args:
        data: checked tokenizer data with scores.
        ids: token -> id.
    """

    def __init__(self, data: TokenizerData, ids: dict[str, int]) -> None:
        assert data.scores is not None
        self._ids, self._scores = ids, data.scores
        self._prefix = data.add_space_prefix is not False  # llama.cpp's default
        kinds = list(zip(data.tokens, data.token_types, strict=True))
        self._always = _any_of(token for token, kind in kinds if kind == USER_DEFINED)
        self._special = _any_of(token for token, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN))

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of `text`; user-defined tokens are read as themselves always, control tokens where asked for."""
        found: list[int] = []
        marks = self._special if parse_special else self._always
        after_special, at = True, 0
        for start, stop in [*_spans(marks, text), (len(text), len(text))]:
            if start > at:
                found += self._words(text[at:start], after_special and self._prefix)
                after_special = False
            if stop > start:
                found.append(self._ids[text[start:stop]])
                after_special = True
            at = stop
        return found

    def _words(self, text: str, prefix: bool) -> list[int]:
        """Ids of text without special tokens."""
        parts: list[str | None] = list((" " * prefix + text).replace(" ", SPACE))
        after = [*range(1, len(parts)), -1]
        before = [*range(-1, len(parts) - 1)]
        pairs: list[tuple[float, int, int, str]] = []  # score, worst first; place; place of the right part; the joined text

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            joined = f"{parts[left]}{parts[right]}"
            if joined in self._ids:
                heapq.heappush(pairs, (-self._scores[self._ids[joined]], left, right, joined))

        for place in range(len(parts) - 1):
            consider(place, place + 1)
        while pairs:
            _, left, right, joined = heapq.heappop(pairs)
            if parts[left] is None or parts[right] is None or f"{parts[left]}{parts[right]}" != joined or after[left] != right:
                continue  # one of them was joined to another meanwhile
            parts[left], parts[right] = joined, None
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [id for part in parts if part is not None for id in self._of_part(part)]

    def _of_part(self, part: str) -> list[int]:
        """A token's id, or those of its bytes."""
        if part in self._ids:
            return [self._ids[part]]
        return [self._ids.get(byte_token(byte), self._ids.get(chr(byte), 0)) for byte in part.encode()]


def _any_of(tokens: Iterator[str]) -> re.Pattern[str] | None:
    """A pattern for any of `tokens`, the longest first."""
    known = sorted(filter(None, tokens), key=lambda token: -len(token.encode()))
    return re.compile("|".join(map(re.escape, known))) if known else None


def _spans(pattern: re.Pattern[str] | None, text: str) -> list[tuple[int, int]]:
    return [] if pattern is None else [found.span() for found in pattern.finditer(text)]


__all__ = ["SentencePieces"]
