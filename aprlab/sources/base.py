"""What a source is: a program under test that runs tokens and gives a trace, and says beforehand what it can.

Our own engines are sources like llama.cpp, transformers or a dump on disk. Whoever judges a source asks for nothing but this
protocol, so a new program needs one subclass. A value is a point of `architectures.points` or it is not in the
trace: keys before rotation are ``k`` and those after it ``k_rope``, the output of an MLP is ``down``, the stream after
it ``out``. So neither the residual convention nor the place of the rotation is left to guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from aprlab.architectures import points as all_points
from aprlab.engines.contracts import Contract
from aprlab.errors import UsageError
from aprlab.model.config import ModelConfig
from aprlab.tracing.traces import Point, Trace, matching


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a source can give.

    Attributes:
        points: names of the trace points that it has, in the order of the pass; empty where it gives no values inside.
        positions: ``all``; ``last`` (of the prompt alone); ``given``: those that a recording happens to hold.
        injection: values can be written at any point, and the pass goes on from them.
        logits: of which positions.
        reruns: runs tokens that it was not asked before; a recording does not.
        text: answers a text with a text.
        logprobs: gives log-probabilities of the likeliest tokens.
    """

    points: tuple[str, ...]
    positions: Literal["all", "last", "given"] = "all"
    injection: bool = False
    logits: Literal["all", "last", "none"] = "all"
    reruns: bool = True
    text: bool = False
    logprobs: bool = False


class Source:
    """A program under test.

    Attributes:
        name: of the program, e.g. ``llama.cpp``.
        version: as the program states it; empty where it does not.
        file: the model (or the recording) that it runs.
        config: numbers of the model's forward pass.
        contract: what it is allowed to round.
        can: what it gives.
        recorded: of a recording, the tokens that it has run, and how many of them went in at once (None: not known).
    """

    recorded: tuple[list[int], int | None] | None = None
    name: str
    version: str
    file: Path
    config: ModelConfig
    contract: Contract
    can: Abilities

    def run(
        self,
        tokens: Sequence[int],
        points: str | Iterable[str] = "*",
        *,
        prompt: int | None = None,
        inject: Mapping[str, Point] | None = None,
    ) -> Trace:
        """Run tokens from position 0 on and keep named points.

        Args:
            tokens: at least one id.
            points: globs as for `aprlab.trace`.
            prompt: so many tokens go in at once, the others one by one; None: all at once.
            inject: by point, values that take the place of the computed ones at their positions.

        Raises:
            UsageError: no tokens, a point it does not have, tokens that a recording does not hold, injection where it cannot,
                a source without values inside.
        """
        if not self.can.points:
            said = f"{self.name} gives no whole values of the pass, so there is no trace; `aprlab peel MODEL --source` judges it"
            raise UsageError(said, code="source.no-values")
        ids, wanted, first = self._checked(tokens, points, prompt, inject)
        return self._run(ids, wanted, first, inject or {})

    def _run(self, ids: list[int], wanted: list[str], first: int, inject: Mapping[str, Point]) -> Trace:
        """What `run` gives, once tokens, names of points, length of the prompt and injection are what it may be asked."""
        raise NotImplementedError(f"{type(self).__name__} has points and does not say how it runs")

    def answer(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `tokens`, one after another (greedy; ends of an answer do not end it)."""
        if not self.can.reruns or self.can.logits == "none":
            raise UsageError(f"{self.name} cannot go on from a prompt", code="source.no-answer")
        ids = [int(token) for token in tokens]
        for _ in range(count):
            logits = self.run(ids, "logits", prompt=len(tokens))["logits"].values[-1]
            ids.append(int(np.argmax(logits)))
        return ids[len(tokens) :]

    def close(self) -> None:
        """Give back memory and processes."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{type(self).__name__}({self.name}{version}, {self.contract}, {str(self.file)!r})"

    # -- shared checks ---------------------------------------------------------------------------------------------

    def _checked(
        self, tokens: Sequence[int], points: str | Iterable[str], prompt: int | None, inject: Mapping[str, Point] | None
    ) -> tuple[list[int], list[str], int]:
        """Tokens, names of points and length of the prompt, once they are what `run` may be asked."""
        ids = [int(token) for token in tokens]
        if not ids:
            raise UsageError("there are no tokens to run", code="forward.no-tokens")
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                said = f"token {token} is outside the vocabulary of {self.config.vocab_size}"
                raise UsageError(said, code="tokenizer.token-out-of-range")
        if len(ids) > self.config.context_length:
            said = f"{len(ids)} tokens exceed the context of {self.config.context_length}"
            raise UsageError(said, code="trace.context")
        first = len(ids) if prompt is None else prompt
        if not 1 <= first <= len(ids):
            raise UsageError(f"a prompt of {first} of {len(ids)} tokens", code="source.prompt-length")
        wanted = matching(points, list(self.can.points))
        if inject:
            self._check_injection(inject, len(ids))
        return ids, wanted, first

    def _check_injection(self, inject: Mapping[str, Point], count: int) -> None:
        if not self.can.injection:
            raise UsageError(f"{self.name} takes no values from outside", code="source.no-injection")
        shapes = all_points(self.config)
        for name, point in inject.items():
            if name not in self.can.points:
                raise UsageError(f"{self.name} has no point {name!r} to write at", code="trace.point-missing")
            expected = (len(point.positions), *shapes[name])
            if point.values.shape != expected or not np.all((point.positions >= 0) & (point.positions < count)):
                said = f"{name}: values {point.values.shape} for {len(point.positions)} positions of {count}; expected {expected}"
                raise UsageError(said, code="source.injection-shape")
