"""A server that speaks OpenAI's HTTP interface as a source: text, tokens and the likeliest of each step, nothing inside.

llama-server, vLLM, ollama and others answer ``/v1/completions`` and ``/v1/chat/completions``; `server_answers` reads that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aprlab.engines.contracts import Contract
from aprlab.errors import UnsupportedError
from aprlab.formats import open_model
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model
from aprlab.sources.base import Abilities, Source
from aprlab.sources.json_http import SCHEMES, SECONDS, JsonServer, ServerRefusal
from aprlab.sources.llama_cpp import activations_of
from aprlab.sources.server_answers import AnswerReader, ServerAnswer

TOPS = (20, 5, None)  # likeliest tokens to ask for, until the server takes one: OpenAI's limits, then none at all


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
        self._reader = AnswerReader(self.tokenizer, self.server.url)
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
            answer = self._reader.read(found, count)
            self._top[path] = top
            return answer
        raise AssertionError("one of the tries returns or raises")


def is_address(text: str) -> bool:
    """Whether a source's name is a server's address."""
    return text.partition("://")[0] in SCHEMES and "://" in text


__all__ = ["ServerSource", "is_address"]
