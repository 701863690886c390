"""A server that speaks OpenAI's HTTP interface as a source: text, tokens and the likeliest of each step, nothing inside.

llama-server, vLLM, ollama and others answer ``/v1/completions`` and ``/v1/chat/completions`` in two shapes of log-probabilities;
both are read here. A token is believed by its id where the server gives one, else by its bytes, else by its spelling, where
that is one token's alone. Nothing else that a server says is believed without a check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aprlab.engines.contracts import Contract
from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats import open_model
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model
from aprlab.sources.base import Abilities, Source
from aprlab.sources.json_http import SCHEMES, SECONDS, JsonServer, ServerRefusal
from aprlab.sources.llama_cpp import activations_of

TOPS = (20, 5, None)  # likeliest tokens to ask for, until the server takes one: OpenAI's limits, then none at all
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


class ServerSource(Source):
    """A model behind an HTTP server.

    Args:
        url: base address, without ``/v1``.
        model: what the server is believed to run.
        name: the server's name for it; None takes the first that ``/v1/models`` lists.
        contract: what the server may round. None: as llama-server does, activations by the types of the file and a
            cache in half precision.
        seconds: for each answer.

    Raises:
        UsageError: no such address.
        ServerError, ServerRefusal: it cannot be reached.
    """

    def __init__(
        self, url: str, model: str | Path | Model, *, name: str | None = None, contract: Contract | None = None,
        seconds: float = SECONDS,
    ) -> None:  # fmt: skip
        opened = model if isinstance(model, Model) else open_model(model)
        base = url.rstrip("/").removesuffix("/v1")
        self.server = JsonServer(base, seconds)
        self.name, self.file, self.config, self.version = self.server.url, Path(opened.path), opened.config, ""
        self.contract = contract if contract is not None else Contract(activations_of(opened), "f16")
        self.can = Abilities((), positions="last", logits="none", text=True, logprobs=True)
        self.tokenizer = Qwen2Tokenizer(opened.tokenizer, opened.path)
        self._bytes = [self.tokenizer.token_bytes(id) for id in range(self.tokenizer.vocab_size)]
        self._ids: dict[bytes, int | None] = {}
        for id, piece in enumerate(self._bytes):
            self._ids[piece] = None if piece in self._ids else id  # two tokens of the same bytes: neither is known by them
        self._top: dict[str, int | None] = {}  # by path, what the server has taken
        self.model_name = name if name is not None else self._first_model()

    def _first_model(self) -> str:
        try:
            found = self.server.ask("/v1/models")
        except ServerRefusal:
            return "default"
        listed = found.get("data") if isinstance(found, dict) else None
        first = listed[0].get("id") if isinstance(listed, list) and listed and isinstance(listed[0], dict) else None
        return first if isinstance(first, str) else "default"

    def answer(self, tokens: Sequence[int], count: int) -> list[int]:
        ids = [step.token for step in self.complete(tokens, count).steps]
        if not ids or None in ids:
            raise UnsupportedError(f"{self.name} does not say which tokens it gives", code="server.no-logprobs")
        return [id for id in ids if id is not None]

    def complete(self, prompt: str | Sequence[int], count: int) -> ServerAnswer:
        """The greedy answer of at most `count` tokens to ids, or to a text as it is.

        Raises:
            ServerError, ServerRefusal: it cannot be reached, or refuses.
            UnsupportedError: its answer is none, or longer than was asked for.
        """
        given: Any = prompt if isinstance(prompt, str) else [int(id) for id in prompt]
        return self._asked("/v1/completions", {"prompt": given}, count, lambda top: {"logprobs": top})

    def chat(self, messages: Sequence[Mapping[str, Any]], count: int) -> ServerAnswer:
        """The greedy answer to a conversation, through the server's own template; see `complete`."""
        body = {"messages": [dict(message) for message in messages]}
        return self._asked("/v1/chat/completions", body, count, lambda top: {"logprobs": True, "top_logprobs": top})

    def _asked(self, path: str, what: Mapping[str, Any], count: int, top_of: Any) -> ServerAnswer:
        body = {"model": self.model_name, **what, "max_tokens": count, "temperature": 0, "stream": False}
        tries = [self._top[path]] if path in self._top else list(TOPS)
        for top in tries:
            try:
                found = self.server.ask(path, body if top is None else {**body, **top_of(top)})
            except ServerRefusal as refusal:
                if refusal.status not in (400, 422) or top is tries[-1]:
                    raise
                continue
            answer = self._read(path, found, count)
            self._top[path] = top
            return answer
        raise AssertionError("one of the tries returns or raises")

    # -- what comes back ------------------------------------------------------------------------------------------

    def _read(self, path: str, found: Any, count: int) -> ServerAnswer:
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            usage = found.get("usage") or {}
            counted = usage.get("prompt_tokens")
            others: dict[int, tuple[bytes, bytes]] = {}
            steps = self._steps(choice.get("logprobs"), others)
            if not isinstance(text, str | None):
                raise TypeError
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            said = f"{path}: this is no answer of OpenAI's interface: its choices, text or log-probabilities are malformed"
            raise UnsupportedError(said, code="server.shape", path=self.server.url) from None
        if len(steps) > count:
            said = f"{path}: {len(steps)} tokens came, {count} were asked for"
            raise UnsupportedError(said, code="server.shape", path=self.server.url)
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
                raise FormatError(said, code="server.other-vocabulary", path=self.server.url)
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


def is_address(text: str) -> bool:
    """Whether a source's name is a server's address."""
    return text.partition("://")[0] in SCHEMES and "://" in text


__all__ = ["AnswerStep", "ServerAnswer", "ServerSource", "is_address"]
