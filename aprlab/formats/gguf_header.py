"""What the header of a GGUF file is: keys with their types, the tensor table, string arrays that stay in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError
from aprlab.model.remote import RemoteFile

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Value types of the key-value section by number: name and struct code.
SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
VALUE_TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64", "float64",
)  # fmt: skip
STRING, ARRAY = VALUE_TYPES.index("string"), VALUE_TYPES.index("array")
DTYPES = {n: np.dtype("<" + code if code != "?" else "u1") for n, code in enumerate(SCALARS) if code}

TOGETHER = 1 << 16  # strings that are decoded at once


class Strings(Sequence[str]):
    """A string array still in the file: offsets now, text when asked."""

    def __init__(self, data: memoryview, starts: np.ndarray, stops: np.ndarray, path: Path) -> None:
        self._data, self._starts, self._stops, self._path = data, starts, stops, path

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, stop = int(self._starts[index]), int(self._stops[index])
        try:
            return bytes(self._data[start:stop]).decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"string is not UTF-8 ({error.reason})", code="reading.not-utf8", path=self._path, offset=start + error.start
            ) from None

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), TOGETHER):
            stop = min(start + TOGETHER, len(self))
            found = self._together(start, stop)
            yield from found if found is not None else (self[i] for i in range(start, stop))  # finds the offset and raises

    def _together(self, start: int, stop: int) -> list[str] | None:
        """Strings of a range, in two thirds of the time that one after another takes; None where one holds a NUL or is not UTF-8.

        The eight bytes of length between two strings become one NUL, which no character of UTF-8 goes across.
        """
        base = int(self._starts[start])
        gaps = self._stops[start : stop - 1] - base
        block = np.frombuffer(self._data, np.uint8)[base : int(self._stops[stop - 1])].copy()
        block[gaps] = 0
        keep = np.ones(len(block), bool)
        for byte in range(1, 8):
            keep[gaps + byte] = False
        try:
            found = block[keep].tobytes().decode().split("\0")
        except UnicodeDecodeError:
            return None
        return found if len(found) == stop - start else None

    def checked(self) -> Strings:
        """The same strings, all of them UTF-8; raises FormatError for the first that is not.

        Nothing is cut apart for it: a length between two strings is eight ASCII characters, or is made so.
        """
        text = np.frombuffer(self._data, np.uint8)
        for start in range(0, len(self), TOGETHER):
            stop = min(start + TOGETHER, len(self))
            base = int(self._starts[start])
            block = text[base : int(self._stops[stop - 1])].copy()
            gaps, sizes = self._stops[start : stop - 1] - base, self._stops[start + 1 : stop] - self._starts[start + 1 : stop]
            for gap in gaps[sizes > 127]:
                block[gap : gap + 8] = 0
            try:
                block.tobytes().decode()
            except UnicodeDecodeError:
                for index in range(start, stop):
                    self[index]  # finds the offset and raises
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"


@dataclass(frozen=True, slots=True)
class Field:
    """One key-value pair, with its type: `type` is a number of `VALUE_TYPES`, `element` the one inside an array."""

    key: str
    type: int
    value: Any
    element: int | None = None
    offset: int = 0

    @property
    def type_name(self) -> str:
        """`uint32`, or `array[string]`."""
        return VALUE_TYPES[self.type] if self.element is None else f"array[{VALUE_TYPES[self.element]}]"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table, as written: `ne` in ggml order, `code` unchecked, `offset` relative to the data."""

    name: str
    ne: tuple[int, ...]
    code: int
    offset: int
    at: int  # where the row is in the file


@dataclass
class Header:
    """Everything in front of the tensor data."""

    path: Path
    version: int
    fields: dict[str, Field]
    infos: list[TensorInfo]
    alignment: int
    data_offset: int
    file_size: int
    file: np.ndarray = field(repr=False)
    parts: tuple[Header, ...] = ()  # of a model that is split into several files: theirs, in order
    remote: RemoteFile | None = None  # where the file is at a URL: `file` then holds its beginning alone

    def bytes_of(self, start: int, stop: int) -> np.ndarray:
        """Bytes of the file: ``uint8``, fetched where it is remote."""
        return self.file[start:stop] if self.remote is None else self.remote.read(start, min(stop, self.file_size))

    def value(self, key: str) -> Any:
        """The value of `key`, or None."""
        found = self.fields.get(key)
        return None if found is None else found.value


class FieldView(Mapping[str, Any]):
    """The key-value section as a plain mapping key -> value; `header` keeps the types."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def __getitem__(self, key: str) -> Any:
        return self.header.fields[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.fields)

    def __len__(self) -> int:
        return len(self.header.fields)
