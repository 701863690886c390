"""What the prompt of a chat template shows of the template, without a reference: control tokens, and how they nest."""

from __future__ import annotations

import re
from typing import Any

from aprlab.errors import BROKEN
from aprlab.formats.raw import MISSING
from aprlab.inference.template import render
from aprlab.inference.tokenizer import CONTROL
from aprlab.onion.file_case import Deviation
from aprlab.onion.words import Mechanism
from aprlab.published import QUESTION

BEGIN, END = "<|im_start|>", "<|im_end|>"


def template_deviations(found: dict[str, Any]) -> list[Deviation]:
    """What is odd about the prompt that a file's own template makes of a question.

    Args:
        found: tokenizer fields of the file, see `aprlab.formats.raw`.
    """
    template, tokens, kinds = found["chat_template"], found["tokens"], found["token_types"]
    if template == MISSING or not isinstance(template, str) or not isinstance(tokens, list) or BEGIN not in tokens:
        return []
    try:
        shown = render(template, [{"role": "user", "content": QUESTION}], **_special(found))
    except BROKEN:
        return []  # the strict reader says so
    marks = {t for t, kind in zip(tokens, kinds, strict=False) if kind == CONTROL} if isinstance(kinds, list) else set()

    def odd(code: str) -> list[Deviation]:
        return [Deviation("tokenizer", "chat_template", template, None, Mechanism(code), confidence=0.8)]

    if not any(mark in shown for mark in {*marks, BEGIN}):
        return odd("tokenizer.template-without-marks")
    inside = False
    for mark in re.findall(f"{re.escape(BEGIN)}|{re.escape(END)}", shown):
        if inside and mark == BEGIN:
            return odd("tokenizer.template-nests")
        inside = mark == BEGIN
    return []


def _special(found: dict[str, Any]) -> dict[str, Any]:
    """The tokens by which a session fills a template's variables."""
    tokens = found["tokens"]
    out: dict[str, Any] = {}
    for name in ("bos_token", "eos_token"):
        id_ = found[f"{name}_id"]
        if isinstance(id_, int) and not isinstance(id_, bool) and 0 <= id_ < len(tokens):
            out[name] = tokens[id_]
    return out


__all__ = ["template_deviations"]
