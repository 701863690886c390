"""The containers: each module reads and writes one, and refuses what breaks its rules, with offset and name."""

from __future__ import annotations

from pathlib import Path

from aprlab.errors import FormatError, UsageError
from aprlab.formats import apr, gguf, huggingface
from aprlab.model import Model


def open_model(path: str | Path) -> Model:
    """Open a GGUF, APR or SafeTensors file, recognised by magic, or a Hugging Face directory with SafeTensors.

    Raises:
        UsageError: there is no such file, it cannot be read, or it is a directory without a model.
        FormatError: the file breaks a rule of its format (counts, spans, alignment, overlap, size law).
        UnsupportedError: a kind of file that is known by name and not handled (APR1, APRN, split, encrypted…).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(9)
    except IsADirectoryError:
        return huggingface.open_model(path)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="reading.unreadable", path=path) from None
    if magic[:4] == b"GGUF":
        return gguf.open_model(path)
    if magic[:3] == b"APR":
        return apr.open_model(path)
    if magic[8:] == b"{" or path.suffix == ".safetensors":  # no magic: a length of eight bytes, then JSON
        return huggingface.open_model(path)
    found = magic[:4].hex(" ") or "nothing"
    raise FormatError(
        f"neither GGUF nor APR nor SafeTensors: the file starts with {found}, expected '47 47 55 46' or '41 50 52 00'",
        code="formats.unknown-format", path=path, offset=0,
    )  # fmt: skip


__all__ = ["open_model"]
