"""The candidate as `run` would open it: container, config, tokenizer, chat template, architecture, room in the context.

The layers look at a file leniently; whatever they say, a file that the strict reader refuses cannot be called sound. What
refuses it becomes a finding under the error's own code, unless the layers have found that cause already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aprlab.architectures import check
from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats import apr, gguf, open_model
from aprlab.formats.raw import Seen, meaning
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model
from aprlab.onion.file_case import FileCase
from aprlab.onion.fixes import Fix, drafted
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism, refused

# What a reader may raise on bytes that were not foreseen; its own words are AprlabErrors.
_UNFORESEEN = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)

# Code of an error, or its room -> the layer that it belongs to; what is not here has the layer of its step.
_BY_CODE = {
    "apr.ambiguous-dtype": "dtype", "apr.foreign-naming": "naming", "apr.size-law": "dtype", "apr.unknown-dtype": "dtype",
    "apr.unsupported-dtype": "dtype", "gguf.tokens-and-rows": "tokenizer", "gguf.unknown-type": "dtype",
    "model.missing-tensor": "naming", "model.tensor-shape": "layout", "forward.foreign-tensor": "naming",
    "session.context-full": "config", "session.logits-not-finite": "forward", "session.no-template": "tokenizer",
    "tokenizer.token-out-of-range": "tokenizer",
}  # fmt: skip
_BY_ROOM = {
    "config": "config", "forward": "forward", "keys": "config", "names": "naming", "quants": "dtype", "template": "tokenizer",
    "tokenizer": "tokenizer",
}  # fmt: skip
# The field whose own finding says what these refuse.
_FIELDS = {
    "config.unsupported-architecture": "architecture", "tokenizer.unsupported-model": "model",
    "tokenizer.unsupported-pre-tokenizer": "pre",
}  # fmt: skip


@dataclass
class Opened:
    """How far a strict reader comes.

    Attributes:
        model: the file, opened; None where it is refused before.
        tokenizer: built from its data.
        ids: of the prompt, through the file's own template.
        refusal: why it cannot answer, None where it can.
        layer: where the refusal belongs.
    """

    model: Model | None = None
    tokenizer: Qwen2Tokenizer | None = None
    ids: Sequence[int] = ()
    refusal: Mechanism | None = None
    layer: str = "container"
    error: AprlabError | None = None


class _Reader(Session):
    """As much of a session as makes prompts: no engine, no weights."""

    def __init__(self, model: Model, tokenizer: Qwen2Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer


def opened(
    file: Seen, *, prompt: str, max_tokens: int, model: Model | None = None, known: Qwen2Tokenizer | None = None
) -> Opened:
    """Open a file as `run` would, up to the first token.

    Args:
        file: the candidate, taken apart.
        prompt, max_tokens: what it will be asked, and how long an answer there must be room for.
        model: the candidate where it came as an opened model.
        known: a tokenizer to use for the candidate where their data are equal.
    """
    found = Opened()

    def read() -> None:
        found.model = model if model is not None else strictly(file)

    def tokens() -> None:
        data = of().tokenizer
        found.tokenizer = known if known is not None and known.data == data else Qwen2Tokenizer(data)

    def ids() -> None:
        assert found.tokenizer is not None
        reader = _Reader(of(), found.tokenizer)
        found.ids = reader.prompt_tokens(prompt, raw=reader.wants_raw)

    def of() -> Model:
        assert found.model is not None
        return found.model

    steps: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("container", read), ("config", lambda: of().config), ("layout", lambda: check(of(), of().config)),
        ("tokenizer", tokens), ("tokenizer", ids),
    )  # fmt: skip
    for layer, step in steps:
        try:
            step()
        except AprlabError as error:
            return _refused(found, error, layer)
        except _UNFORESEEN as error:
            what = f"cannot be read: {type(error).__name__}: {error}"
            return _refused(found, FormatError(what, code="onion.does-not-open", path=file.path), layer)
    room = of().config.context_length
    if len(found.ids) + max_tokens > room:
        figures = {"context_length": room, "prompt": len(found.ids), "answer": max_tokens}
        found.refusal, found.layer = Mechanism("config.context-too-short", figures), "config"
        found.error = UsageError(str(found.refusal), code="session.context-full", path=file.path)
    return found


def strictly(file: Seen) -> Model:
    """The file as its strict reader has it, from the scan that there is."""
    if file.box is not None:
        return apr.model_of(file.box)
    return gguf.model_of(file.header) if file.header is not None else open_model(file.path)


def _refused(found: Opened, error: AprlabError, step: str) -> Opened:
    found.layer = layer_of(error, step)
    found.refusal, found.error = refused(error, f"{found.layer}.refused"), error
    return found


def layer_of(error: AprlabError, step: str) -> str:
    """The layer that an error belongs to: by its code, its room, or the step that raised it."""
    return _BY_CODE.get(error.code) or _BY_ROOM.get(error.code.partition(".")[0]) or step


def finding(opened: Opened) -> Finding:
    """What refuses the file, as a finding."""
    assert opened.refusal is not None
    tensor = None if opened.error is None else opened.error.tensor
    evidence = {} if opened.error is None else {"offset": opened.error.offset}
    tensors = [tensor] if tensor is not None else []
    return Finding(opened.layer, None, tensors, opened.refusal, {k: v for k, v in evidence.items() if v is not None})


def explained(opened: Opened, case: FileCase, findings: Sequence[Finding], fixes: Sequence[Fix]) -> bool:
    """Whether the layers have found the cause of a refusal already.

    They have where a finding is about the tensor or the field that was refused, where one is in the same layer, or where
    the file opens once everything that was found is fixed. An unknown tensor or key is no fault of the
    file's; only its own finding says so.
    """
    error = opened.error
    bad = [f for f in findings if not f.harmless]
    if error is None or not bad or error.code == "forward.foreign-tensor":
        return False
    if error.code in _FIELDS:
        return any(_concerns(f, _FIELDS[error.code]) for f in bad)
    tensor = None if error.tensor is None else meaning(error.tensor, case.file.naming)[0] or error.tensor
    if any(tensor in f.tensors for f in bad):
        return True
    if isinstance(error, UnsupportedError):
        return False
    if any(f.layer == opened.layer for f in bad):
        return True
    possible = [fix for fix in fixes if fix.possible]
    return not _runs(drafted(case, [])) and _runs(drafted(case, possible))


def _runs(draft: Model | AprlabError) -> bool:
    """Whether a draft is a model whose tensors have the shapes that its config asks for."""
    if isinstance(draft, AprlabError):
        return False
    try:
        check(draft, draft.config)
    except AprlabError:
        return False
    return True


def _concerns(finding: Finding, field: str) -> bool:
    """Whether a finding is about a field of config or tokenizer, itself or by one of the causes it is made of."""
    causes = [finding.cause, *finding.evidence.get("mechanisms", ())]
    return any(cause.parameters.get("field") == field for cause in causes)


__all__ = ["Opened", "explained", "finding", "opened", "strictly"]
