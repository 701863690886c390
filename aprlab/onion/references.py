"""Opened reference files with their hashes, remembered from one peel to the next."""

from __future__ import annotations

from pathlib import Path

from aprlab.formats import open_model
from aprlab.formats.raw import Reference
from aprlab.model.model import Model

_REFERENCES: dict[tuple[str, int, int], Reference] = {}


def reference_of(ref: str | Path | Model) -> Reference:
    """The reference, with hashes; the last few are remembered, files by path, time and size, opened models by themselves."""
    if isinstance(ref, Model):
        return _of_model(ref)
    path = Path(ref)
    try:
        state = path.stat()
        key = (str(path.resolve()), state.st_mtime_ns, state.st_size)
    except OSError:
        key = (str(path), 0, 0)
    if key not in _REFERENCES:
        if len(_REFERENCES) >= 4:
            _REFERENCES.pop(next(iter(_REFERENCES)))
        _REFERENCES[key] = Reference(open_model(path))
    return _REFERENCES[key]


_MODELS: list[Reference] = []


def _of_model(model: Model) -> Reference:
    """The reference of an opened model; what was changed in it since it was opened counts."""
    for found in _MODELS:
        if found.model is model and all(found.tensors.get(n) is t for n, t in model.tensors.items()):
            return found
    del _MODELS[:-1]
    _MODELS.append(Reference(model))
    return _MODELS[-1]
