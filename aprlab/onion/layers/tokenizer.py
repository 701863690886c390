"""Tokenizer: vocabulary, merges, kinds of tokens, ids that end an answer, the chat template."""

from __future__ import annotations

from typing import Any, ClassVar

from aprlab.formats.raw import MISSING, NEEDED, TOKENIZER_FIELDS
from aprlab.inference.tokenizer import CONTROL, PRE_TOKENIZERS
from aprlab.onion.layers.base import Case, Deviation, Layer


class TokenizerLayer(Layer):
    """Against the reference's tokenizer data, or against what every Qwen2 tokenizer has."""

    name: ClassVar[str] = "tokenizer"

    def suspect(self, case: Case) -> list[Deviation]:
        if case.ref is None:
            return _alone(case.seen.tokenizer)
        found = []
        for name in TOKENIZER_FIELDS:
            value, due = case.seen.tokenizer[name], case.due_tokenizer[name]
            if value != due:
                how, evidence = told(name, value, due)
                found.append(Deviation("tokenizer", "tokenizer", name, value, due, how, evidence=evidence))
        return found


def told(name: str, value: Any, due: Any) -> tuple[str, dict[str, Any]]:
    """What was done to a field, in words and figures."""
    if value == MISSING:
        return f"{name} is missing", {}
    if due == MISSING:
        return f"{name} is there, and the reference has none", {}
    if isinstance(value, list) and isinstance(due, list):
        evidence: dict[str, Any] = {"entries": len(value), "due_entries": len(due)}
        if len(value) == len(due):
            differ = [n for n, (a, b) in enumerate(zip(value, due, strict=True)) if a != b]
            evidence |= {"differing": len(differ), "first": differ[0]}
            if (shift := rotation(value, due)) is not None:
                return f"{name} are rotated by {shift}", evidence
            if sorted(map(str, value)) == sorted(map(str, due)):
                return f"{name} are in another order", evidence
            return f"{len(differ)} of {len(due)} {name} differ", evidence
        if not value:
            return f"{name} are all lost", evidence
        if value == due[: len(value)]:
            return f"{name} are cut off", evidence
        return f"{name} differ in number", evidence
    if isinstance(value, str) and isinstance(due, str) and len(due) > 40:
        return f"{name} differs", {"characters": len(value), "due_characters": len(due)}
    return f"{name} is {value!r}, not {due!r}", {}


def rotation(value: list[Any], due: list[Any]) -> int | None:
    """By how many places `due` was moved round to give `value`; None where it was not."""
    if not value or len(value) != len(due):
        return None
    for shift, item in enumerate(value):
        if item == due[0] and shift and value[shift:] == due[: len(due) - shift] and value[:shift] == due[len(due) - shift :]:
            return shift
    return None


def _alone(found: dict[str, Any]) -> list[Deviation]:
    out = []
    for name in NEEDED:
        if found[name] == MISSING or found[name] == []:
            out.append(Deviation("tokenizer", "tokenizer", name, found[name], MISSING, f"{name} is missing or empty"))
    if found["chat_template"] == MISSING:
        out.append(Deviation("tokenizer", "tokenizer", "chat_template", MISSING, MISSING, "chat_template is missing"))
    if found["pre"] != MISSING and found["pre"] not in PRE_TOKENIZERS:
        how = f"pre-tokeniser {found['pre']!r} is not Qwen2's"
        out.append(Deviation("tokenizer", "tokenizer", "pre", found["pre"], next(iter(PRE_TOKENIZERS)), how))
    tokens, kinds = found["tokens"], found["token_types"]
    if isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds):
        marks = [n for n, t in enumerate(tokens) if t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
        plain_ = [tokens[n] for n in marks if kinds[n] != CONTROL]
        if plain_:
            due = [CONTROL if n in marks else kind for n, kind in enumerate(kinds)]
            how = f"{', '.join(plain_)} are marked as ordinary text"
            out.append(Deviation("tokenizer", "tokenizer", "token_types", kinds, due, how))
        eos, due_eos = found["eos_token_id"], [n for n, t in enumerate(tokens) if t in ("<|im_end|>", "<|endoftext|>")]
        if eos != MISSING and due_eos and eos not in due_eos:
            known = isinstance(eos, int) and 0 <= eos < len(tokens)
            how = f"eos_token_id {eos} is {tokens[eos]!r}" if known else f"eos_token_id is {eos!r}"
            out.append(Deviation("tokenizer", "tokenizer", "eos_token_id", eos, due_eos[-1], how, confidence=0.9))
    return out
