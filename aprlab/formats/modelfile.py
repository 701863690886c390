"""Ollama's Modelfile: which weights, which template, which system message, and where an answer stops.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md; a file of lines ``INSTRUCTION value``, values bare, in
quotes or in three of them over several lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from aprlab.errors import FormatError

MOST = 1 << 20  # bytes
KNOWN = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES", "RENDERER", "PARSER")


@dataclass
class Modelfile:
    """What a Modelfile says.

    Attributes:
        base: the weights, a path or the name of a model.
        template: Go's `text/template`; None where Ollama looks for one itself.
        system: message that opens every conversation; empty where there is none.
        stops: strings that end an answer.
        parameters: name -> values as written, ``stop`` left out.
        messages: (role, content) that stand before every conversation.
        other: instructions that have a meaning beyond text: ``ADAPTER``, ``RENDERER``, ``PARSER``.
    """

    base: str
    template: str | None = None
    system: str = ""
    stops: list[str] = field(default_factory=list)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def read_modelfile(path: str | Path) -> Modelfile:
    """The Modelfile at `path`; raises FormatError with the line that is wrong."""
    path = Path(path)
    try:
        if not path.is_file():
            raise FormatError("is no file", code="modelfile.unreadable", path=path)
        if path.stat().st_size > MOST:
            raise FormatError(f"has more than {MOST} bytes; a Modelfile has a few hundred", code="modelfile.too-large", path=path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot be read: {error}", code="modelfile.unreadable", path=path) from None
    found: Modelfile | None = None
    pending: list[tuple[str, str]] = []
    for line, word, value in _instructions(text.replace("\r\n", "\n"), path):
        if word not in KNOWN:
            raise FormatError(
                f"line {line}: {word:.40} is no instruction; known: {', '.join(KNOWN)}", code="modelfile.instruction", path=path
            )
        if word == "FROM":
            found = Modelfile(value) if found is None else found
        else:
            pending.append((word, value))
    if found is None:
        raise FormatError("has no FROM: it does not say which weights", code="modelfile.no-from", path=path)
    for word, value in pending:
        _apply(found, word, value, path)
    return found


def _apply(found: Modelfile, word: str, value: str, path: Path) -> None:
    if word == "TEMPLATE":
        found.template = value
    elif word == "SYSTEM":
        found.system = value
    elif word in ("PARAMETER", "MESSAGE"):
        name, _, rest = value.partition(" ")
        if not rest.strip():
            raise FormatError(f"{word} {value:.40}: a name and a value are wanted", code="modelfile.value", path=path)
        rest = _bare(rest)
        if word == "MESSAGE":
            found.messages.append((name, rest))
        elif name == "stop":
            found.stops.append(rest)
        else:
            found.parameters.setdefault(name, []).append(rest)
    elif word != "LICENSE":
        found.other.append(f"{word} {value}")


def _bare(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _instructions(text: str, path: Path) -> list[tuple[int, str, str]]:
    """(line, instruction in capitals, value without its quotes)."""
    found, at = [], 0
    start = re.compile(r"[ \t\n]*(?:#[^\n]*(?:\n|$)|(?P<word>\S+)[ \t]*)")
    while at < len(text) and (match := start.match(text, at)) is not None:
        at = match.end()
        if match["word"] is None:
            continue
        line = text.count("\n", 0, match.start("word")) + 1
        word = match["word"].upper()
        rest = text[at:]
        lead = re.match(r'(?:\S+[ \t]+)?"""', rest) if word in ("PARAMETER", "MESSAGE") else re.match('"""', rest)
        if lead is not None:
            end = rest.find('"""', lead.end())
            if end < 0:
                raise FormatError(f'line {line}: """ is never closed', code="modelfile.open-quote", path=path)
            found.append((line, word, f"{rest[: lead.end() - 3].strip()} {rest[lead.end() : end]}".removeprefix(" ")))
            at += end + 3
            continue
        if rest.startswith('"'):
            end = rest.find('"', 1)
            if end < 0:
                raise FormatError(f'line {line}: " is never closed', code="modelfile.open-quote", path=path)
            found.append((line, word, rest[1:end]))
            at += end + 1
            continue
        value = rest.partition("\n")[0]
        found.append((line, word, value.strip()))
        at += len(value)
    return found


__all__ = ["Modelfile", "read_modelfile"]
