"""The containers: each module reads and writes one, and refuses what breaks its rules, with offset and name."""

from __future__ import annotations

from pathlib import Path

from aprlab.errors import UsageError
from aprlab.formats import apr, gguf, huggingface_files
from aprlab.formats.identity import Identity, identify, refusing
from aprlab.formats.reading import beginning
from aprlab.model import Model
from aprlab.model.remote import url_of


def open_model(path: str | Path, found: Identity | None = None) -> Model:
    """Open a GGUF, APR or SafeTensors file, recognised by magic, or a Hugging Face directory with SafeTensors.

    A GGUF file that is sound and cannot be run (another architecture, an adapter, a vocabulary…) opens for a look at its
    tensors and keys; its config and tokenizer raise the line that says what it is.

    Args:
        path: a file, or a directory.
        found: what `identify` says of it, where it was asked already.

    Raises:
        UsageError: there is no such file, it cannot be read, or it is a directory without a model.
        FormatError: the file breaks a rule of its format (counts, spans, alignment, overlap, size law).
        UnsupportedError: a kind of file that is known by name and not handled (APR1, APRN, split, a pointer, a page…).
    """
    path = Path(path)
    try:
        if url_of(path) is None and not path.is_dir():
            open(path, "rb").close()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="reading.unreadable", path=path) from None
    found = identify(path) if found is None else found
    if found.header is not None and found.kind in ("model", "layers"):
        return _named(gguf.model_of(found.header), found)
    if found.error is not None:
        raise found.error
    if _is_apr(path):
        return apr.open_model(path)
    from aprlab.formats import huggingface

    return huggingface.open_model(path)


def _is_apr(path: Path) -> bool:
    folder = huggingface_files.folder_of(path) == path
    return not folder and beginning(path, 3) == b"APR"


def _named(model: Model, found: Identity) -> Model:
    """A model with what it really is, where it cannot be run."""
    if found.error is not None:
        refusing(model, found.error)
        model.warnings.append(str(found))
    return model


__all__ = ["Identity", "identify", "open_model"]
