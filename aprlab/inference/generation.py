"""What an answer is: tokens, text, why it ended, what it took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        prompt_tokens: ids that went in, template and all.
        tokens: ids that came out, without the one that ended it.
        text: what they say.
        stop: ``eos`` (the model ended), ``length`` (`max_tokens`, or the context is full), ``stop`` (a stop string).
        load: layers, quantised, float (tensors of each kind), bytes, by_type.
        timing: load_seconds, prompt_tokens_per_second, decode_tokens_per_second (None where nothing was timed).
        engine, contract: name and activation contract of the engine.
        engine_asked: what was asked for: ``auto``, or an engine by name.
        logits: float32 ``(steps, V)``, one row for each choice made, or None where they were not kept.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    stop: str
    load: dict[str, Any]
    timing: dict[str, float | None]
    engine: str
    contract: str = "f32"
    engine_asked: str = ""
    logits: np.ndarray | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the logits, as plain JSON values."""
        names = ("prompt_tokens", "tokens", "text", "stop", "load", "timing", "engine", "contract", "engine_asked")
        return {name: getattr(self, name) for name in names}


def load_report(model: Model) -> dict[str, Any]:
    """What was loaded, by counting the file's tensors: layers, quantised, float, bytes, by_type."""
    return {
        "layers": model.config.block_count,
        "quantised": model.quantised,
        "float": len(model.tensors) - model.quantised,
        "bytes": model.nbytes,
        "by_type": model.by_type(),
    }


class AnswerText:
    """Decoded text that holds back what may yet turn out to be the beginning of a stop string."""

    def __init__(self, tokenizer: Qwen2Tokenizer, stop: Iterable[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop = [s for s in stop if s]
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Text that is now certain to belong to the answer."""
        self._held += self._stream.feed(token)
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
            cut = len(self._held) - keep
            certain, self._held = self._held[:cut], self._held[cut:]
        self.text += certain
        return certain

    def end(self) -> str:
        """What was held back, and what never became a whole character."""
        rest = "" if self.stopped else self._held + self._stream.end()
        self.text += rest
        return rest
