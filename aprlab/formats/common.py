"""What both containers need: a bounds-checked cursor, span checks, mapping a file, writing one atomically."""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from aprlab.errors import FormatError, UsageError


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
                f"ends inside {what}: {nbytes} bytes needed, {self.size - start} left", path=self.path, offset=start
            )
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
            raise FormatError(f"{what} is not UTF-8 ({error.reason})", path=self.path, offset=start + error.start) from None


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's bytes in the file: `[start, stop)`, absolute."""

    name: str
    start: int
    stop: int


def check_spans(spans: list[Span], end: int, path: Path) -> None:
    """Every span lies before `end` and no two overlap; raises FormatError for the first that does not."""
    for span in spans:
        if span.stop > end:
            raise FormatError(
                f"needs bytes {span.start}..{span.stop}, the data ends at {end}", path=path, tensor=span.name, offset=span.start
            )
    ordered = sorted((s for s in spans if s.stop > s.start), key=lambda s: s.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.stop:
            raise FormatError(
                f"overlaps tensor {before.name!r}, whose bytes end at {before.stop}",
                path=path, tensor=after.name, offset=after.start,
            )  # fmt: skip


def map_file(path: Path) -> np.ndarray:
    """The file as a read-only ``uint8 (size,)`` view on a memory map; an empty file gives an empty array."""
    try:
        if os.path.getsize(path) == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=path) from None


def padding(offset: int, alignment: int) -> int:
    """Bytes from `offset` to the next multiple of `alignment`."""
    return -offset % alignment


def check_output(output: Path, sources: list[Path], *, force: bool) -> None:
    """Refuse an output that is an input, a folder, or exists already (unless `force`)."""
    for source in sources:
        if output.exists() and source.exists() and output.samefile(source):
            raise UsageError("output and input are the same file", path=output)
    if output.is_dir():
        raise UsageError("is a directory; name a file to write", path=output)
    if output.exists() and not force:
        raise UsageError("exists already; use --force to replace it", path=output)
    if not output.parent.is_dir():
        raise UsageError(f"the folder {str(output.parent)!r} does not exist", path=output)


@contextmanager
def atomic(output: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `output` only when the block ends well: temporary name, flush to disk, rename.

    A symbolic link is written through, not replaced. Whatever ends the block otherwise removes the temporary file.
    """
    target = output.resolve()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", path=output) from None
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mode = target.stat().st_mode if target.exists() else 0o666 & ~_umask()
        os.chmod(name, mode & 0o7777)
        os.replace(name, target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"cannot be written: {error.strerror or error}", path=output) from None
        raise
    _sync_folder(target.parent)


def write_all(file: IO[bytes], data: Any) -> int:
    """Write a buffer to an unbuffered file, which may take it in parts; the number of bytes."""
    view = memoryview(data).cast("B")
    size = len(view)
    while view:
        view = view[file.write(view) :]
    return size


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, and then it does not matter."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
