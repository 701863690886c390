"""Where the bytes of a tensor come from.

A tensor has a type, a shape and a content. The content gives ranges of bytes, and values. This module has the two kinds that
hold their bytes: a view on a mapped file and an array in memory. Contents that make their bytes on demand are defined
where they are made: re-encoded (`aprlab.conversion.recode`), random (`aprlab.conversion.synthetic`), edited and misread
(`aprlab.faults`).
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from aprlab import quants
from aprlab.errors import FormatError, UsageError
from aprlab.in_use import MAPPED
from aprlab.quants.types import TensorType

CHUNK = 1 << 20  # most bytes of one chunk
Rows = slice | np.ndarray


class Content(ABC):
    """The bytes of one tensor.

    Attributes:
        at_hand: `read` and `whole` give views and cost nothing; else the bytes are made each time.
        as_stored: the values are what a healthy decoder makes of the bytes. Who decodes blocks by other means than `values`
            may do so only then.
    """

    __slots__ = ()
    at_hand: ClassVar[bool] = False
    as_stored: ClassVar[bool] = True

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Number of bytes."""

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes ``start … stop``: ``uint8 (stop - start,)``."""

    def whole(self) -> np.ndarray:
        """All bytes: ``uint8 (nbytes,)``."""
        return self.read(0, self.nbytes)

    def some(self, rows: np.ndarray, size: int) -> np.ndarray:
        """The bytes of a few rows by number, of a type that has none for the tensor as a whole: ``uint8 (len(rows), size)``.

        `size` are the bytes of a row. Contents that make their bytes make no other row where that can be.
        """
        return self.whole().reshape(-1, size)[rows]

    def chunks(self, step: int = CHUNK) -> Iterator[Any]:
        """All bytes in order, as buffers of at most `step` bytes (contents that make their bytes choose their own step).

        A buffer may be overwritten once seven more have been taken.
        """
        for start in range(0, self.nbytes, step):
            yield self.read(start, min(start + step, self.nbytes)).data

    def values(self, kind: TensorType, shape: tuple[int, ...], rows: Rows | None = None) -> np.ndarray:
        """float32 of `shape`, or ``(len(rows), cols)`` for a slice or an index array of rows, decoded as `kind`."""
        if rows is None:
            return quants.dequantise(self.whole(), kind, shape)
        head, size = kind.tensor_bytes, kind.row_bytes(shape[-1])
        count = (self.nbytes - head) // size
        if isinstance(rows, slice) and (span := range(*rows.indices(count))).step == 1:
            part = self.read(head + span.start * size, head + max(span.start, span.stop) * size).reshape(-1, size)
        else:
            part = self.read(head, self.nbytes).reshape(count, size)[rows]
        raw = np.concatenate([self.read(0, head), part.reshape(-1)]) if head else part.reshape(-1)
        return quants.dequantise(raw, kind, (part.shape[0], shape[-1]))

    def release(self, start: int = 0, stop: int | None = None) -> None:  # noqa: B027 - nothing is held by default
        """These bytes are not needed for now; reading them again is allowed."""


class Held(Content):
    """An array in memory, ``uint8 (nbytes,)``."""

    __slots__ = ("array",)
    at_hand = True

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def whole(self) -> np.ndarray:
        return self.array  # the same object each time

    def chunks(self, step: int = CHUNK) -> Iterator[Any]:
        raw = np.ascontiguousarray(self.array)
        return (raw[start : start + step].data for start in range(0, len(raw), step))

    def release(self, start: int = 0, stop: int | None = None) -> None:
        drop_pages(self.array[start:stop])


class Mapped(Held):
    """A view on a mapped file: bytes from `offset` of `path` on."""

    __slots__ = ("offset", "path")

    def __init__(self, array: np.ndarray, path: Path, offset: int) -> None:
        super().__init__(array)
        self.path, self.offset = path, offset

    def chunks(self, step: int = CHUNK) -> Iterator[Any]:
        """Read through a few small buffers, not through the map, whose pages would count as memory."""
        return read_chunks(self.path, self.offset, self.nbytes, step)


def content_of(source: Content | np.ndarray) -> Content:
    """`source` as a content: an array is `Mapped` where it is a view on a file from `map_file`, else `Held`."""
    if isinstance(source, Content):
        return source
    start = _address(_root(source))
    known = MAPPED.get(start) if source.nbytes else None
    return Held(source) if known is None else Mapped(source, Path(known[1]), _address(source) - start)


# ── mapped files ──────────────────────────────────────────────────────────────────────────────────────────────────


def map_file(path: Path) -> np.ndarray:
    """The file as a read-only ``uint8 (size,)`` view on a memory map; an empty file gives an empty array."""
    try:
        if os.path.getsize(path) == 0:
            return np.zeros(0, np.uint8)
        file = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", code="reading.unreadable", path=path) from None
    start = file.ctypes.data
    MAPPED[start] = (file.nbytes, Path(path))
    weakref.finalize(file, MAPPED.pop, start, None)
    return file.view(np.ndarray)


def drop_pages(raw: np.ndarray) -> None:
    """Tell the kernel that the pages of this view on a mapped file are not needed now; reading them again is allowed.

    Pages of a map count as this process's memory until then. Arrays that are no such view are left alone.
    """
    root = _root(raw)
    pages: Any = root.base
    if not (isinstance(root, np.memmap) and isinstance(pages, mmap.mmap) and raw.nbytes):
        return
    start = _address(raw) - _address(root)
    first = start - start % mmap.PAGESIZE  # NumPy maps a file from an offset of 0, so that pages begin here
    pages.madvise(mmap.MADV_DONTNEED, first, start + raw.nbytes - first)


def _root(array: np.ndarray) -> Any:
    """The array that owns the memory that `array` is a view on."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return root


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class _Ring(threading.local):
    """Eight buffers a thread, taken in turn: enough for what `apr.write` keeps in flight."""

    def __init__(self) -> None:
        self.next = itertools.cycle([memoryview(bytearray(CHUNK)) for _ in range(8)]).__next__


@cache
def _ring() -> _Ring:
    """Made when the first file is read this way: 8 MiB of zeros are 10 ms of every start."""
    return _Ring()


def read_chunks(path: Path, offset: int, nbytes: int, step: int = CHUNK) -> Iterator[memoryview]:
    """`nbytes` of a file from `offset` on, in chunks of `step` (at most `CHUNK`)."""
    ring = _ring()
    with open(path, "rb", buffering=0) as file:
        for start in range(offset, offset + nbytes, step):
            view = ring.next()[: min(step, offset + nbytes - start)]
            if os.preadv(file.fileno(), [view], start) != len(view):
                raise FormatError(
                    "the file became shorter while it was read", code="reading.file-shrank", path=path, offset=start
                )
            yield view
