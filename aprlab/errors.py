"""The errors that aprlab raises on purpose. Each is one line for the user and an exit status for the shell."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any


class AprlabError(Exception):
    """Base of every error the library raises on purpose.

    The message is one line for people; where a file, a tensor or a byte offset is known it is put in front of it. Programs
    look at `code`, which is stable (``room.rule``, listed in docs/errors.md): no decision may depend on the wording.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, code: str, path: str | PathLike[str] | None = None, tensor: str | None = None,
        offset: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.code, self.path, self.tensor, self.offset = message, code, path, tensor, offset

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.code, self.path, self.tensor, self.offset))

    def to_json(self) -> dict[str, Any]:
        """The error for programs: `code`, `message`, `path`, `tensor`, `offset`; None for what is not known."""
        path = None if self.path is None else os.fspath(self.path)
        return {
            "code": self.code, "message": self.message, "path": path, "tensor": self.tensor, "offset": self.offset,
        }  # fmt: skip

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a cell: the line, and where in the cell it happened; the stack with APRLAB_DEBUG=1."""
        import traceback

        if os.environ.get("APRLAB_DEBUG"):
            return traceback.format_exception(self)
        lines = [f"{type(self).__name__}: {self}"]
        frames = traceback.extract_tb(self.__traceback__)
        cells = [frame for frame in frames if "ipykernel_" in frame.filename or "ipython-input-" in frame.filename]
        if cells and cells[0].line:
            lines.append(f"  at line {cells[0].lineno} of the cell: {cells[0].line}")
        return lines

    def __str__(self) -> str:
        where = [str(self.path)] if self.path is not None else []
        if self.tensor is not None:
            where.append(f"tensor {self.tensor!r}")
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        return f"{', '.join(where)}: {self.message}" if where else self.message


def _rebuild(kind: type[AprlabError], message: str, code: str, path: Any, tensor: str | None, offset: int | None) -> AprlabError:
    return kind(message, code=code, path=path, tensor=tensor, offset=offset)


# What a broken model may raise on its way through tokenizer and layers: words where it is refused, NumPy's where it is not.
BROKEN = (AprlabError, ValueError, IndexError, TypeError)


def reason(error: BaseException) -> str:
    """Why something stopped, without the file's name in front."""
    return str(getattr(error, "message", error))


class FormatError(AprlabError):
    """A file breaks the rules of its own format."""

    exit_code = 2


class UnsupportedError(AprlabError):
    """The input is sound, but of a kind aprlab does not handle; the message names the kind."""

    exit_code = 2


class UsageError(AprlabError):
    """The request itself cannot be met: a missing file, output = input, an unknown name."""

    exit_code = 2


class NumericError(AprlabError):
    """A computation left the numbers: NaN or Inf logits, a scale that is not finite."""

    exit_code = 1
