"""Chat templates: programs that come with a model file, so they are not trusted.

jinja2's immutable sandbox keeps a template away from Python's attributes, but not from `{% for %}` a thousand deep,
``'a' * 10**10`` or a filter that pads to a gigabyte, and there are too many such doors to watch each. Every template
is therefore rendered in a child process, inside the sandbox, under limits of the kernel's: CPU time, memory, output.
The child starts without site, environment or network use and takes about a tenth of a second; what it answered is
remembered, a refusal too, and not that it was stopped: a second try may have more room.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from aprlab.errors import FormatError, UsageError

Message = Mapping[str, Any]

SECONDS = 2  # CPU time; a real template needs a thousandth of it
WAIT = 30  # times as long by the clock, since a busy machine takes its time to give them
MEMORY = 512 << 20  # address space in bytes; interpreter and jinja2 take a tenth of it
CHARACTERS = 1 << 20  # of output, far beyond every context length
_CHILD = Path(__file__).with_name("_render.py")


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
    """The prompt text that `template` makes of `messages`.

    Args:
        template: jinja2, as models carry it under ``tokenizer.chat_template``.
        messages: each with ``role`` and ``content``.
        add_generation_prompt: end with the opening of the assistant's turn.
        variables: what else the template may ask for (``tools``, ``bos_token``…); JSON values only.

    Raises:
        FormatError: the template is broken, does what it must not, or does not come to an end.
        UsageError: the template itself refuses these messages (`raise_exception`), or they are not JSON.
    """
    try:
        asked = json.dumps(
            {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables}, ensure_ascii=True
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"chat messages must be plain JSON values: {error}", code="template.messages-not-json") from None
    match _answer(template, asked):
        case {"text": str(text)}:
            return text
        case {"error": "refusal", "message": str(message)}:
            raise UsageError(f"the chat template refuses these messages: {message}", code="template.refuses")
        case {"error": str(), "message": str(message)}:
            raise FormatError(f"the chat template fails: {message}", code="template.fails")
        case _:
            raise FormatError("the chat template breaks its renderer", code="template.renderer-broke")


@lru_cache(maxsize=64)
def _answer(template: str, variables: str) -> Any:
    """What the child makes of a template; to be read only."""
    request = {
        "path": sys.path, "template": template, "variables": json.loads(variables),
        "seconds": SECONDS, "memory": MEMORY, "characters": CHARACTERS,
    }  # fmt: skip
    return _ask(json.dumps(request | {"parent": os.getpid()}).encode())


def _ask(request: bytes) -> Any:
    """Runs the child; its answer goes through a file, whose size the kernel limits too."""
    with tempfile.TemporaryFile() as output:
        try:
            # -I -S: no environment, no site, no current folder; the request brings the module path along
            child = subprocess.run(
                [sys.executable, "-I", "-S", str(_CHILD)],
                input=request,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=WAIT * SECONDS,
                env={},
                cwd="/",
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FormatError(
                f"the chat template does not come to an end in {WAIT * SECONDS:g} s", code="template.limits"
            ) from None
        if child.returncode != 0:
            raise FormatError(
                f"the chat template was stopped: more than {SECONDS} s, {MEMORY >> 20} MiB or {CHARACTERS} characters "
                f"(exit status {child.returncode})",
                code="template.limits",
            )
        output.seek(0)
        try:
            return json.loads(output.read())
        except ValueError:
            raise FormatError("the chat template breaks its renderer", code="template.renderer-broke") from None
