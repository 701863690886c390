"""From a prompt to an answer: template, tokens, prefill, one token after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aprlab import engines
from aprlab.architectures import check, forward
from aprlab.engines.base import Cache, Engine
from aprlab.engines.delegating import SharingEngine
from aprlab.errors import NumericError, UsageError
from aprlab.inference.generation import AnswerText, Generation, load_report
from aprlab.inference.sampling import Sampling
from aprlab.inference.template import Message, render
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.model import Model
from aprlab.model.remote import refuse_remote

OnToken = Callable[[int, str], None]  # token id, and the text that it made certain (may be empty)


def conversation_tokens(model: Model, tokenizer: Qwen2Tokenizer, turns: Sequence[Message]) -> list[int]:
    """Prompt ids of a conversation through the file's own chat template; no engine is needed.

    Raises:
        UsageError: no template in the file, or the template refuses the messages.
        FormatError: the template is broken or hostile.
    """
    return tokenizer.encode(without_first(conversation_text(model, turns), model.tokenizer, tokenizer))


def conversation_text(model: Model, turns: Sequence[Message]) -> str:
    """What the file's own chat template makes of a conversation; remembered, so that it can be asked for ahead.

    Raises:
        UsageError, FormatError: as `conversation_tokens`.
    """
    data = model.tokenizer
    if data.chat_template is None:
        raise UsageError("the model has no chat template; give the prompt raw", code="session.no-template", path=model.path)
    special: dict[str, Any] = {
        name: data.tokens[id]
        for name, id in (("bos_token", data.bos_token_id), ("eos_token", data.eos_token_id))
        if id is not None
    }
    return render(data.chat_template, turns, **special)


def without_first(text: str, data: TokenizerData, tokenizer: Qwen2Tokenizer) -> str:
    """`text` without the token that `encode` puts in front anyway, as llama.cpp drops one of the two."""
    return text if tokenizer.first is None else text.removeprefix(data.tokens[tokenizer.first])


def session_beside(session: Session, model: Model, *, engine: str, threads: int | None = None) -> Session:
    """A session over a model that borrows from another session what the two have in common: tokenizer, weights laid out.

    Args:
        session: over a plain engine, as `engine` and `threads` make it.
        model: in view; its own engine is made only for weights that are not in common.
        engine, threads: see `aprlab.engines.create`.

    Returns:
        One that answers as ``Session(model, engine=engine, threads=threads)``, to the last bit. The two must not run at once.
    """
    refuse_remote((tensor.content for tensor in model.tensors.values()), model.path)
    lender = session.model
    tokenizer = session.tokenizer if model.tokenizer == lender.tokenizer else None
    common = lender.in_common(model)
    if not common:
        return Session(model, engine=engine, threads=threads, tokenizer=tokenizer)
    shared = SharingEngine(session.engine, model, common, lambda: engines.create(engine, model, threads))
    return Session(shared, tokenizer=tokenizer)


class Session:
    """A model ready to answer: engine, config, tokenizer and a cache that remembers the common beginning of prompts.

    Args:
        model: an opened model, or an engine over one.
        engine: which engine to make, where a model is given: see `aprlab.engines.create`.
        threads: for that engine.
        config: instead of the model's own.
        tokenizer: instead of the model's own.
        cache_of: a session over the same engine and weights: what it has run already need not run again, so the two must not
            run at the same time.
        options: of the engine, where a model is given.
    """

    def __init__(
        self,
        model: Model | Engine,
        *,
        engine: str | engines.Choice | None = "auto",
        threads: int | None = None,
        config: ModelConfig | None = None,
        tokenizer: Qwen2Tokenizer | None = None,
        cache_of: Session | None = None,
        **options: Any,
    ) -> None:
        started = time.perf_counter()
        if isinstance(model, Model):
            refuse_remote((tensor.content for tensor in model.tensors.values()), model.path)
        self.engine = model if isinstance(model, Engine) else engines.create(engine, model, threads, **options)
        self.model = self.engine.model
        self.config = config if config is not None else self.model.config
        check(self.model, self.config)
        if tokenizer is not None:
            self.tokenizer = tokenizer
            self.engine.warm()
        else:  # both take half a second for a real model, and the engine needs Python little meanwhile
            with ThreadPoolExecutor(1, "aprlab-tokenizer") as pool:
                built = pool.submit(Qwen2Tokenizer, self.model.tokenizer, self.model.path)
                self.engine.warm()
                self.tokenizer = built.result()
        self.load_seconds = time.perf_counter() - started
        self._cache: Cache | None = None
        self._cached: list[int] = []  # the tokens whose positions the cache holds
        if cache_of is not None:
            self._cache, self._cached = cache_of._cache, cache_of._cached

    def forget(self) -> None:
        """The next prompt runs from its first token on, whatever ran before."""
        self._cache, self._cached = None, []

    # -- prompts -------------------------------------------------------------------------------------------------

    def chat_tokens(self, messages: str | Sequence[Message], *, system: str | None = None) -> list[int]:
        """Prompt ids of a conversation, or of one user's message, through the file's own chat template.

        Raises:
            UsageError: an empty message, no template in the file, or the template refuses the messages.
            FormatError: the template is broken or hostile.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if not turns or not all(str(turn.get("content", "")) for turn in turns):
            raise UsageError("the prompt is empty", code="session.empty-prompt")
        if system is not None:
            turns = [{"role": "system", "content": system}, *turns]
        return conversation_tokens(self.model, self.tokenizer, turns)

    @property
    def wants_raw(self) -> bool:
        """Whether a text can only go in as it is, since the file has no chat template: a fit `raw` for any model."""
        return self.model.tokenizer.chat_template is None

    def raw_tokens(self, prompt: str) -> list[int]:
        """Prompt ids of a text as it is; control tokens spelled out in it count as themselves."""
        ids = self.tokenizer.encode(prompt)
        if not prompt or not ids:
            raise UsageError("the prompt is empty", code="session.empty-prompt")
        return ids

    def prompt_tokens(
        self, prompt: str | Sequence[Message] | Sequence[int], *, raw: bool = False, system: str | None = None
    ) -> list[int]:
        """Ids of whatever the caller calls a prompt: a text (chat, or `raw`), a conversation, or ids already."""
        if isinstance(prompt, str):
            if raw and system is not None:
                raise UsageError("a raw prompt takes no system message", code="session.system-with-raw")
            return self.raw_tokens(prompt) if raw else self.chat_tokens(prompt, system=system)
        if len(prompt) == 0:
            raise UsageError("the prompt is empty", code="session.empty-prompt")
        if all(isinstance(part, int | np.integer) for part in prompt):
            if system is not None:
                raise UsageError("a prompt of token ids takes no system message", code="session.system-with-raw")
            return [int(part) for part in prompt]  # type: ignore[arg-type]
        return self.chat_tokens(prompt, system=system)  # type: ignore[arg-type]

    # -- answers -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        max_tokens: int = 128,
        raw: bool = False,
        system: str | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_token: OnToken | None = None,
        keep_logits: bool = False,
    ) -> Generation:
        """See `generate` below."""
        ids = self.prompt_tokens(prompt, raw=raw, system=system)
        if max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens}: at least 1 is needed", code="session.max-tokens")
        room = self.config.context_length - len(ids)
        if room < 1:
            raise UsageError(
                f"{len(ids)} prompt tokens leave no room in a context of {self.config.context_length}",
                code="session.context-full",
            )
        max_tokens = min(max_tokens, room)
        text = AnswerText(self.tokenizer, stop)
        started = time.perf_counter()
        fresh = self._resume(ids, len(ids) + max_tokens)
        logits = self._step(ids[-fresh:], step=0)
        prefilled = time.perf_counter()
        kept: list[np.ndarray] | None = [] if keep_logits else None
        tokens, ended = self._answer(logits, max_tokens, sampling or Sampling(), text, on_token, kept)
        finished = time.perf_counter()
        rest = text.end()
        if rest and on_token is not None:
            on_token(tokens[-1], rest)

        steps = len(tokens) - (ended != "eos")  # passes after the prompt's
        return Generation(
            prompt_tokens=ids,
            tokens=tokens,
            text=text.text,
            stop=ended,
            load=load_report(self.model),
            timing={
                "load_seconds": self.load_seconds,
                "prompt_tokens_per_second": fresh / (prefilled - started),
                "decode_tokens_per_second": steps / (finished - prefilled) if steps > 0 else None,
            },
            engine=self.engine.name,
            contract=self.engine.contract,
            engine_asked=self.engine.asked or self.engine.spec,
            logits=np.stack(kept) if kept is not None else None,
        )

    def _answer(
        self,
        logits: np.ndarray,
        max_tokens: int,
        sampling: Sampling,
        text: AnswerText,
        on_token: OnToken | None,
        kept: list[np.ndarray] | None,
    ) -> tuple[list[int], str]:
        """One token after another, from the prompt's `logits` on: the tokens, and why they end.

        `text` and `kept` (the logits that tokens were chosen from) are filled on the way.
        """
        rng = np.random.default_rng(sampling.seed)
        tokens: list[int] = []
        while True:
            if kept is not None:
                kept.append(logits.copy())
            token = sampling.choose(logits, rng)
            if token in self.tokenizer.eog:
                return tokens, "eos"
            tokens.append(token)
            piece = text.feed(token)
            if on_token is not None:
                on_token(token, piece)
            if text.stopped:
                return tokens, "stop"
            if len(tokens) == max_tokens:
                return tokens, "length"
            logits = self._step([token], step=len(tokens))

    def follow(self, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Logits of an answer that is given: row t is what the model says after `prompt` and ``tokens[:t]``.

        Args:
            prompt: at least one id.
            tokens: at least one id.

        Returns:
            float32 ``(len(tokens), V)``; not finite where the model is broken so badly.
        """
        ids = [*prompt, *tokens[:-1]]
        if not len(prompt) or not len(tokens):
            raise UsageError("a prompt and an answer are needed", code="session.answer-needed")
        self._resume(list(prompt), len(ids))
        assert self._cache is not None
        rest = ids[len(self._cached) :]
        out = forward(self.engine, self.config, rest, self._cache)
        self._cached += rest
        return self.engine.to_numpy(out)[-len(tokens) :]

    def _resume(self, ids: list[int], needed: int) -> int:
        """Makes the cache hold a beginning of `ids`, as long as it can; returns how many are left to run (≥ 1)."""
        if self._cache is None or self._cache.capacity < needed:
            capacity = min(self.config.context_length, max(256, 1 << (needed - 1).bit_length()))
            self._cache, self._cached = self.engine.new_cache(self.config, capacity), []
        common = 0
        for old, new in zip(self._cached, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        self._cache.truncate(common)
        del self._cached[common:]
        return len(ids) - common

    def _step(self, ids: list[int], step: int) -> np.ndarray:
        """Runs `ids` after what is cached; float32 logits ``(V,)`` of the last."""
        assert self._cache is not None
        out = forward(self.engine, self.config, ids, self._cache, last_only=True)
        self._cached += ids
        logits = self.engine.to_numpy(out)[-1]
        if not np.isfinite(logits).all():
            nan, inf = int(np.isnan(logits).sum()), int(np.isinf(logits).sum())
            raise NumericError(
                f"step {step}: {nan} NaN and {inf} Inf among {logits.size} logits",
                code="session.logits-not-finite", path=self.model.path,
            )  # fmt: skip
        return logits


def generate(
    model: Model | Engine | Session,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    max_tokens: int = 128,
    raw: bool = False,
    system: str | None = None,
    seed: int | None = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    on_token: OnToken | None = None,
    keep_logits: bool = False,
    engine: str | None = "auto",
    threads: int | None = None,
) -> Generation:
    """Answer `prompt`.

    Args:
        model: an opened model, an engine over one, or a `Session` (which also remembers earlier prompts).
        prompt: a user's message (through the chat template), a conversation as role/content messages, or token ids.
        max_tokens: at most so many new tokens, and no more than the context has room for.
        raw: take the text as it is, without the template.
        system: a system message to put in front; None leaves it to the template.
        seed, temperature, top_p: see `Sampling`; temperature 0 is greedy.
        stop: end as soon as one of these strings comes up, and cut the text before it.
        on_token: called with each new id and the text it made certain, in order.
        keep_logits: keep the logits each token was chosen from.
        engine, threads: which engine to make, where a model is given.

    Raises:
        UsageError: empty prompt, id outside the vocabulary, prompt as long as the context, no template, senseless numbers.
        FormatError: tensors missing or misshapen, vocabulary or template broken.
        NumericError: logits that are NaN or Inf, naming the step (0 is the prompt).
    """
    session = model if isinstance(model, Session) else Session(model, engine=engine, threads=threads)
    return session.generate(
        prompt,
        max_tokens=max_tokens,
        raw=raw,
        system=system,
        sampling=Sampling(temperature, top_p, seed),
        stop=stop,
        on_token=on_token,
        keep_logits=keep_logits,
    )
