"""What else a server may have made of a prompt: forms of templates, special tokens and ends, to be tried on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from aprlab.errors import BROKEN
from aprlab.faults import FAULTS, session_with
from aprlab.inference.session import Session

# the two that Qwen's own templates add where a conversation has none
_SYSTEM = ("You are a helpful assistant.", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_MOST = 32


def prompt_forms(session: Session, prompt: str | None, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Other prompts with a name each, none twice, none that is `ids`.

    Args:
        session: over the model; nothing is run.
        prompt: the user's text, if there is one; else only what can happen to ids.
        ids: what the prompt should be.
    """
    seen, found = {tuple(ids)}, []
    for name, make in islice(_all(session, prompt, ids), _MOST):
        try:
            other = make()
        except BROKEN:
            continue
        if other and tuple(other) not in seen and len(other) < session.config.context_length:
            seen.add(tuple(other))
            found.append((name, other))
    return found


def _all(session: Session, prompt: str | None, ids: list[int]) -> Iterator[tuple[str, Callable[[], list[int]]]]:
    tokenizer, data = session.tokenizer, session.model.tokenizer
    text = tokenizer.decode(ids if tokenizer.first is None else ids[1:])
    yield "control tokens spelt as text", lambda: tokenizer.encode(text, parse_special=False)
    for id, name in ((data.bos_token_id, "bos_token"), (data.eos_token_id, "eos_token")):
        if id is not None:
            yield f"{name} put in front", lambda id=id: [id, *ids]  # type: ignore[misc]
            yield f"{name} put at the end", lambda id=id: [*ids, id]  # type: ignore[misc]
    if tokenizer.first is not None:
        yield "without the token that begins a text", lambda: ids[1:]
    yield "without its last newline", lambda: tokenizer.encode(text.rstrip("\n"))
    yield "without its first token", lambda: ids[1:]
    yield "without its last token", lambda: ids[:-1]
    yield "its last token alone", lambda: ids[-1:]
    if prompt is None:
        return
    yield "no template", lambda: session.raw_tokens(prompt)
    yield "no system message", lambda: tokenizer.encode(_CHATML.format(prompt))
    for system in _SYSTEM:
        yield f"system message {system!r}", lambda system=system: session.chat_tokens(prompt, system=system)  # type: ignore[misc]
    yield "the template twice", lambda: session.chat_tokens(text)
    yield "without the opening of the answer", lambda: tokenizer.encode(_before_the_answer(text))
    for fault in FAULTS.values():
        if fault.prompt is not None:
            yield fault.title, lambda fault=fault: session_with(session, [fault]).prompt_tokens(prompt)  # type: ignore[misc]


def _before_the_answer(text: str) -> str:
    """A prompt in ChatML without its last turn's opening."""
    head, mark, _ = text.rpartition("<|im_start|>")
    return head if mark else text


__all__ = ["prompt_forms"]
