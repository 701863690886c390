"""Opened reference files with their hashes, remembered from one peel to the next."""

from __future__ import annotations

from pathlib import Path

from aprlab.formats import open_model
from aprlab.formats.raw import Reference
from aprlab.model.model import Model

_REFERENCES: dict[tuple[str, int, int], Reference] = {}


def reference_of(ref: str | Path | Model) -> Reference:
    """The reference, with hashes; the last few are remembered by path, time and size."""
    path = Path(ref.path if isinstance(ref, Model) else ref)
    try:
        state = path.stat()
        key = (str(path.resolve()), state.st_mtime_ns, state.st_size)
    except OSError:
        key = ("", 0, 0)
    if key not in _REFERENCES:
        if len(_REFERENCES) >= 4:
            _REFERENCES.pop(next(iter(_REFERENCES)))
        _REFERENCES[key] = Reference(open_model(path))
    return _REFERENCES[key]
