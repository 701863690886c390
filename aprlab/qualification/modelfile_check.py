"""A Modelfile against the model it serves: the same prompts, the same ends, the same weights. "Fine here, garbage in Ollama"
is most often one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from aprlab.errors import AprlabError
from aprlab.formats.modelfile import Modelfile, read_modelfile
from aprlab.inference.ollama import ollama_prompt
from aprlab.inference.session import conversation_tokens, without_first
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model

AROUND = 24  # characters that are shown from the first difference on
Problem = dict[str, Any]
Turn = dict[str, str]


def modelfile_problems(
    source: Model, path: Path, model: Path, conversations: Mapping[str, Sequence[Turn]]
) -> tuple[list[Problem], bool]:
    """What is wrong with a Modelfile, and whether all of it could be looked at.

    Args:
        source: whose template and ends are right.
        path: the Modelfile.
        model: the file that it should serve.
        conversations: name -> messages.

    Returns:
        Problems, each with ``code`` and its parameters; False where the template is left to Ollama's guess.

    Raises:
        FormatError: it cannot be read, or its template is broken.
    """
    found, tokenizer = read_modelfile(path), Qwen2Tokenizer(source.tokenizer, source.path)
    problems = [*_weights(found, model), *_ends(found, tokenizer, source.tokenizer.tokens)]
    problems += [{"code": "modelfile.not-handled", "instruction": text} for text in found.other]
    if found.template is None:
        return problems, False
    for name, turns in conversations.items():
        if (problem := _prompt(found, source, tokenizer, name, turns)) is not None:
            problems.append(problem)
    return problems, True


def _weights(found: Modelfile, model: Path) -> list[Problem]:
    """FROM names a file, and it is another one."""
    named = PurePath(found.base)
    if named.suffix.lower() == ".gguf" and named.name != model.name:
        return [{"code": "modelfile.other-weights", "found": named.name, "expected": model.name}]
    return []


def _ends(found: Modelfile, tokenizer: Qwen2Tokenizer, tokens: Sequence[str]) -> list[Problem]:
    """A stop line that common text contains cuts answers short; one that is no token of this model never stops it."""
    known = set(tokens)
    problems: list[Problem] = []
    for stop in found.stops:
        if not stop.strip() or stop.isalnum():
            problems.append({"code": "modelfile.stop-cuts", "stop": stop})
        elif _mark(stop) and stop not in known:
            problems.append({"code": "modelfile.stop-of-another-model", "stop": stop})
    ends = sorted(tokens[n] for n in tokenizer.eog if n < len(tokens))
    marks = [stop for stop in found.stops if _mark(stop)]
    if marks and ends and not set(marks) & set(ends):
        problems.append({"code": "modelfile.no-end", "stops": marks, "ends": ends})
    return problems


def _mark(text: str) -> bool:
    """Whether it looks like a control token."""
    return (text[:1], text[-1:]) in (("<", ">"), ("[", "]"))


def _prompt(found: Modelfile, source: Model, tokenizer: Qwen2Tokenizer, name: str, turns: Sequence[Turn]) -> Problem | None:
    """How the prompt of one conversation differs; None where it does not, or the source's own template refuses it."""
    try:
        right = conversation_tokens(source, tokenizer, turns)
    except AprlabError:
        return None
    before = [{"role": role, "content": content} for role, content in found.messages]
    if found.system and not any(turn["role"] == "system" for turn in turns):
        before.insert(0, {"role": "system", "content": found.system})
    text = ollama_prompt(found.template or "", [*before, *turns])
    made = tokenizer.encode(without_first(text, source.tokenizer, tokenizer))
    if made == right:
        return None
    at = next((n for n, (x, y) in enumerate(zip(made, right, strict=False)) if x != y), min(len(made), len(right)))
    shown = [tokenizer.decode(ids[at:])[:AROUND] for ids in (made, right)]
    return {"code": "modelfile.prompt", "conversation": name, "position": at, "found": shown[0], "expected": shown[1]}


__all__ = ["modelfile_problems"]
