"""What every reader needs: a bounds-checked cursor, span checks, strict JSON."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aprlab.errors import FormatError, UsageError
from aprlab.model.remote import is_there, open_url, url_of


class Cursor:
    """Reads little-endian values from `data` and never past its end.

    `data` is a buffer, `path` is for messages only. `FormatError` carries the offset of what was being read.
    """

    def __init__(self, data: memoryview | bytes, path: Path, offset: int = 0) -> None:
        self.data, self.path, self.offset, self.size = data, path, offset, len(data)

    def need(self, nbytes: int, what: str) -> int:
        """Check that `nbytes` more are there, step over them and return where they start."""
        start = self.offset
        if nbytes > self.size - start:
            raise FormatError(
                f"ends inside {what}: {nbytes} bytes needed, {self.size - start} left",
                code="reading.truncated", path=self.path, offset=start,
            )  # fmt: skip
        self.offset = start + nbytes
        return start

    def unpack(self, code: str, what: str) -> Any:
        """One little-endian value of `struct` code `code`."""
        start = self.need(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def text(self, nbytes: int, what: str) -> str:
        """UTF-8 text of `nbytes`."""
        start = self.need(nbytes, what)
        try:
            return bytes(self.data[start : start + nbytes]).decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{what} is not UTF-8 ({error.reason})", code="reading.not-utf8", path=self.path, offset=start + error.start
            ) from None


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's bytes in the file: `[start, stop)`, absolute."""

    name: str
    start: int
    stop: int


def check_spans(spans: list[Span], end: int, path: Path) -> None:
    """Every span ends before `end` and no two overlap; raises FormatError for the first that does not."""
    for span in spans:
        if span.stop > end:
            raise FormatError(
                f"needs bytes {span.start}..{span.stop}, the data ends at {end}",
                code="reading.tensor-beyond-end", path=path, tensor=span.name, offset=span.start,
            )  # fmt: skip
    ordered = sorted((s for s in spans if s.stop > s.start), key=lambda s: s.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.stop:
            raise FormatError(
                f"overlaps tensor {before.name!r}, whose bytes end at {before.stop}",
                code="reading.tensors-overlap", path=path, tensor=after.name, offset=after.start,
            )  # fmt: skip


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading. A pipe would wait for a writer and a device has no end: neither is opened.

    Raises:
        OSError: as the system says it.
        UsageError: it is not a regular file, or its name cannot be a file's.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError:  # a NUL in the name
        raise UsageError("is not a valid file name", code="reading.file-name", path=repr(str(path))) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError("is not a regular file (a folder, a pipe or a device)", code="reading.file-kind", path=path)
    return open(handle, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a regular file, or one at a URL, that has at most `limit`.

    Raises:
        OSError, UsageError: as `open_regular`; FileNotFoundError, too, where there is nothing at the URL.
        FormatError: it has more bytes.
    """
    if (url := url_of(path)) is not None:
        if not is_there(url):
            raise FileNotFoundError(2, "No such file", url)
        remote = open_url(url)
        if remote.size > limit:
            raise FormatError(f"has too many bytes; at most {limit} are read", code="reading.file-limit", path=path)
        return remote.read(0, remote.size).tobytes()
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"has too many bytes; at most {limit} are read", code="reading.file-limit", path=path)
    return data


def beginning(path: Path, nbytes: int) -> bytes:
    """The first bytes of a regular file, or of one at a URL; fewer where it is shorter."""
    if (url := url_of(path)) is not None:
        remote = open_url(url)
        return remote.read(0, min(nbytes, remote.size)).tobytes()
    with open_regular(path) as file:
        return file.read(nbytes)


def exists(path: Path) -> bool:
    """Whether there is such a file, here or at a URL; UsageError where a server does not tell."""
    url = url_of(path)
    return path.is_file() if url is None else is_there(url)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_object(text: str, what: str, path: Path, offset: int | None = None) -> dict[str, Any]:
    """A strict JSON object: no duplicate key, no NaN, no endless nesting, nothing that cannot be written again."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key!r} is listed twice")
            found[key] = value
        return found

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    def finite(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"{digits[:40]} is beyond any float")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
        if _SURROGATE.search(text):  # half a character parses, and then cannot be written or printed
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON: {error}", code="reading.bad-json", path=path, offset=offset) from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{what} is a JSON {type(value).__name__}, not an object", code="reading.json-not-an-object", path=path, offset=offset
        )
    return value


def padding(offset: int, alignment: int) -> int:
    """Bytes from `offset` to the next multiple of `alignment`."""
    return -offset % alignment
