"""What dtype bytes and names in an APR file mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats.apr.layout import AMBIGUOUS, APRENDER_U8, Container, Entry
from aprlab.model import names
from aprlab.quants import types
from aprlab.quants.types import TensorType


def candidates(code: int) -> tuple[TensorType, ...]:
    """Every type an APR dtype byte has stood for; empty for an unassigned byte."""
    if code in AMBIGUOUS:
        return AMBIGUOUS[code]
    try:
        return (types.by_code(code),)
    except UnsupportedError:
        return ()


def type_of(box: Container, entry: Entry, shape: tuple[int, ...]) -> TensorType:
    """The type of an entry: the one candidate of its dtype byte that obeys the size law.

    Raises:
        UnsupportedError: aprender's U8.
        FormatError: unknown byte, no candidate fits (the label is wrong), or more than one does (ambiguous).
    """
    where: dict[str, Any] = {"path": box.path, "tensor": entry.name, "offset": entry.at}
    known = candidates(entry.code)
    if not known:
        raise FormatError(f"unknown dtype byte {entry.code}", code="apr.unknown-dtype", **where)
    fitting = [t for t in known if t.fits(shape, entry.size)]
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        raise FormatError(
            f"dtype byte {entry.code} is ambiguous: {entry.size} bytes fit {' and '.join(t.name for t in fitting)}",
            code="apr.ambiguous-dtype", **where,
        )  # fmt: skip
    size = int(np.prod(shape, dtype=object))
    if entry.code == APRENDER_U8 and entry.size == size:
        raise UnsupportedError("is U8 (dtype byte 7 of aprender), which is not handled", code="apr.unsupported-dtype", **where)
    wanted = " or ".join(f"{t.nbytes(shape) if shape[-1] % t.block_elements == 0 else 'none'} as {t.name}" for t in known)
    others = [t.name for t in types.TYPES if t.fits(shape, entry.size)]
    hint = f"; the size fits {', '.join(others)}" if others else ""
    raise FormatError(
        f"dtype byte {entry.code} with {entry.size} bytes breaks the size law: expected {wanted}{hint}",
        code="apr.size-law", **where,
    )  # fmt: skip


def naming_of(entries: Iterable[Entry]) -> str:
    """The naming (a key of `names.VARIANTS`) under which most names are known; '' where none knows any."""
    listed = [entry.name for entry in entries]
    known = {naming: sum(names.to_gguf(name, naming) is not None for name in listed) for naming in names.VARIANTS}
    best = max(known, key=lambda naming: known[naming])
    return best if known[best] else ""
