"""The prompt that Ollama makes of messages with a Modelfile's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aprlab.inference.go_template import Node, execute, fields_of, parse

Turn = Mapping[str, str]


def ollama_prompt(template: str, messages: Sequence[Turn]) -> str:
    """The text that goes to the tokenizer.

    A template that asks for ``.Messages`` gets all of them at once; an older one is run for each question and answer, and the
    last time only up to ``.Response``. Neighbours of one role are joined by an empty line.

    Args:
        template: Go's `text/template`.
        messages: with ``role`` and ``content``.

    Raises:
        FormatError: the template is broken, or does what is not handled.
    """
    nodes = parse(template)
    asked = {name.lower() for name in fields_of(nodes)}
    system, turns = _collated(messages)
    if "messages" in asked:
        unused: dict[str, Any] = {"Tools": [], "Response": "", "Think": False, "IsThinkSet": False}
        return execute(nodes, {"Messages": turns, "System": system, **unused})
    if "response" not in asked:
        nodes = [*nodes, _response()]
    return _one_by_one(nodes, turns)


def _response() -> Node:
    return Node("action", pipeline=[[("fields", ".Response")]])


def _collated(messages: Sequence[Turn]) -> tuple[str, list[dict[str, Any]]]:
    """All system messages in one text, and the messages with neighbours of one role joined."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if turns and turns[-1]["Role"] == role and role != "tool":
            turns[-1]["Content"] += "\n\n" + content
        else:
            turns.append({"Role": role, "Content": content})
    return "\n\n".join(m["content"] for m in messages if m["role"] == "system"), turns


def _one_by_one(nodes: list[Node], turns: Sequence[Mapping[str, Any]]) -> str:
    """Question and answer in turn; the last stops where the answer would stand."""
    out: list[str] = []
    fresh = {"System": "", "Prompt": "", "Response": ""}
    now = dict(fresh)
    for turn in turns:
        role, content = turn["Role"], turn["Content"]
        full = now["Response"] or (role == "system" and now["Prompt"])
        if role in ("system", "user") and full:
            out.append(execute(nodes, now))
            now = dict(fresh)
        if role in ("system", "user", "assistant"):
            now[{"system": "System", "user": "Prompt", "assistant": "Response"}[role]] = content
    return "".join(out) + execute(_cut(nodes)[0], now)


def _cut(nodes: Sequence[Node]) -> tuple[list[Node], bool]:
    """The nodes without ``.Response`` and what follows it, and whether it was there."""
    kept: list[Node] = []
    for node in nodes:
        if node.kind == "action" and "Response" in fields_of([node]):
            return kept, True
        if node.body or node.other:
            body, found = _cut(node.body)
            other, also = _cut(node.other) if not found else ([], False)
            kept.append(Node(node.kind, node.text, node.names, node.fresh, node.pipeline, body, other))
            if found or also:
                return kept, True
        else:
            kept.append(node)
    return kept, False


__all__ = ["ollama_prompt"]
