"""Text from files on its way to a terminal, and data on its way to JSON: the two doors that everything printed goes through.

A tensor name, a metadata value, an answer or a path may hold anything. `printable` shows what a terminal would obey (ESC,
the other control characters, marks that turn the direction of writing) as visible escapes; `json_text` writes JSON that
every parser reads: NaN and Infinity, which JSON has no numbers for, become the strings ``"nan"``, ``"inf"``, ``"-inf"``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

# C0 but for the line feed and the tab, DEL, C1; marks of direction and separators of lines; halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with every character that a terminal obeys as a visible escape: ``\\x1b``, ``\\u202e``, ``\\udc80``.

    Args:
        lines: let line feeds and tabs through; without it they are escaped, too, so that the result is one line.
    """
    text = _UNSAFE.sub(_escaped, text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code == 0x0D:
        return "\\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def plain_data(value: Any) -> Any:
    """`value` as what JSON knows: tuples and sets as lists, NumPy's scalars and arrays as Python's, paths as text, bytes as
    hexadecimal digits, numbers that are not finite as ``"nan"``, ``"inf"`` and ``"-inf"``, keys as text.

    Raises:
        TypeError: a type that has no plain form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain_data(key)): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_data(item) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if hasattr(value, "tolist"):  # NumPy's
        return plain_data(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as JSON. Control characters, marks of direction and lone surrogates are escaped, so that it can be printed.

    Args:
        indent: as `json.dumps` has it.
        ascii_only: escape everything beyond ASCII, for a stream that cannot carry it.
    """
    text = json.dumps(plain_data(value), ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    return _UNSAFE.sub(lambda found: found.group() if found.group() in "\n\t" else f"\\u{ord(found.group()):04x}", text)


__all__ = ["json_text", "plain_data", "printable"]
