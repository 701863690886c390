"""What a server answers, read: OpenAI's interface has two shapes of log-probabilities, and llama-server a mixture.

A token is believed by its id where the answer has one, else by its bytes, else by its spelling, where that is one token's alone.
Nothing else that a server says is believed without a check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aprlab.errors import FormatError, UnsupportedError
from aprlab.inference.tokenizer import Qwen2Tokenizer

_MOST_BYTES = 1024  # of one token
_NEVER = -9999.0  # what OpenAI's interface says of a token that is too unlikely for a number


@dataclass(frozen=True)
class AnswerStep:
    """One token of an answer.

    Attributes:
        token: its id; None where what the server calls it is no token's name, or several tokens'.
        text: as the server spells it.
        top: natural log-probabilities by id, of the likeliest tokens whose id is known; empty where the server gives none.
    """

    token: int | None
    text: str
    top: dict[int, float]


@dataclass(frozen=True)
class ServerAnswer:
    """What a server answered.

    Attributes:
        text: all of it.
        steps: token by token; empty where it gives no log-probabilities.
        prompt_count: tokens of the prompt as the server counts them, or None.
        other_ids: ids under which the server has other bytes than this model: id -> (the server's, this model's).
    """

    text: str
    steps: list[AnswerStep]
    prompt_count: int | None
    other_ids: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)


class AnswerReader:
    """Reads answers about one vocabulary.

    Args:
        tokenizer: of the model that the server is believed to run.
        where: what an answer came from, for errors.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer, where: str) -> None:
        self.where = where
        self._bytes = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self._ids: dict[bytes, int | None] = {}
        for id, piece in enumerate(self._bytes):
            self._ids[piece] = None if piece in self._ids else id  # two tokens of the same bytes: neither is known by them

    def read(self, found: Any, count: int | None = None) -> ServerAnswer:
        """An answer to a completion or a chat, at most `count` tokens; also one of llama-server's own ``/completion``.

        Raises:
            UnsupportedError: it is no such answer, or longer.
            FormatError: it has ids that this vocabulary has not.
        """
        try:
            others: dict[int, tuple[bytes, bytes]] = {}
            if "completion_probabilities" in found:
                text, counted = found.get("content"), found.get("tokens_evaluated")
                steps = self._steps({"content": found["completion_probabilities"]}, others)
            else:
                choice = found["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                counted = (found.get("usage") or {}).get("prompt_tokens")
                steps = self._steps(choice.get("logprobs"), others)
            if not isinstance(text, str | None):
                raise TypeError
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            said = "this is no answer of OpenAI's interface: its choices, text or log-probabilities are malformed"
            raise UnsupportedError(said, code="server.shape", path=self.where) from None
        if count is not None and len(steps) > count:
            said = f"{len(steps)} tokens came, {count} were asked for"
            raise UnsupportedError(said, code="server.shape", path=self.where)
        known = type(counted) is int and counted > 0
        return ServerAnswer(text or "", steps, counted if known else None, others)

    def _steps(self, given: Any, others: dict[int, tuple[bytes, bytes]]) -> list[AnswerStep]:
        if given is None:
            return []
        if given.get("content") is not None:  # of a chat, and of llama-server's completions
            return [self._new_step(entry, others) for entry in given["content"]]
        tokens, tops = given.get("tokens") or [], given.get("top_logprobs") or []
        return [
            AnswerStep(self._id({"token": token}, others), str(token), self._top_of(top, others))
            for token, top in zip(tokens, [*tops, *[None] * (len(tokens) - len(tops))], strict=True)
        ]

    def _new_step(self, entry: Mapping[str, Any], others: dict[int, tuple[bytes, bytes]]) -> AnswerStep:
        top: dict[int, float] = {}
        for one in (entry, *(entry.get("top_logprobs") or ())):
            id = self._id(one, others)
            if id is not None:
                top[id] = _logprob(one["logprob"])
        return AnswerStep(self._id(entry, others), str(entry.get("token")), top if entry.get("top_logprobs") else {})

    def _top_of(self, top: Mapping[str, Any] | None, others: dict[int, tuple[bytes, bytes]]) -> dict[int, float]:
        found = {self._id({"token": token}, others): _logprob(value) for token, value in (top or {}).items()}
        return {id: value for id, value in found.items() if id is not None}

    def _id(self, entry: Mapping[str, Any], others: dict[int, tuple[bytes, bytes]]) -> int | None:
        """The id of a token in this model's vocabulary."""
        token, id, spelt = entry["token"], entry.get("id"), entry.get("bytes")
        piece = bytes(spelt) if isinstance(spelt, list) and 0 < len(spelt) <= _MOST_BYTES else None
        if isinstance(token, str) and token.startswith("token_id:"):  # vLLM, if it is asked for ids
            id = int(token.removeprefix("token_id:"))
        if type(id) is int:
            if not 0 <= id < len(self._bytes):
                said = f"token {id} of an answer is outside the vocabulary of {len(self._bytes)}: it runs another model"
                raise FormatError(said, code="server.other-vocabulary", path=self.where)
            if piece is not None and piece != self._bytes[id]:
                others[id] = piece, self._bytes[id]
            return id
        if piece is not None:
            return self._ids.get(piece)
        return None if "\ufffd" in token else self._ids.get(token.encode())


def _logprob(value: Any) -> float:
    """A log-probability; -inf where the server has none, or one below what a float holds."""
    if value is None:
        return -math.inf
    number = float(value)
    if math.isnan(number) or number > 1e-3:
        raise ValueError("no log-probability")
    return number if number > _NEVER else -math.inf


__all__ = ["AnswerReader", "AnswerStep", "ServerAnswer"]
