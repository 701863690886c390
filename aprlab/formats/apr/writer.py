"""Writing APR files, streamed, whole or not at all."""

from __future__ import annotations

import itertools
import json
import queue
import tempfile
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats.apr.layout import (
    ALIGNMENT,
    EXPANSION,
    EXPANSION_FREE,
    FLAGS,
    HEADER,
    HEADER_SIZE,
    LZ4_LIMIT,
    METADATA_LIMIT,
    Dialect,
    Entry,
    header_crc,
)
from aprlab.formats.reading import padding
from aprlab.formats.writing import atomic, write_all
from aprlab.model.content import drop_pages


@dataclass(frozen=True, slots=True)
class Plan:
    """One tensor to be written: its index entry (offset still open) and where its bytes come from, in chunks."""

    name: str
    code: int
    dims: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Late:
    """A string of the metadata that is known only when all tensors were read: `placeholder` stands for it until then.

    `text()` is asked once, after the last tensor, and must be as long as the placeholder in UTF-8.
    """

    placeholder: str
    text: Callable[[], str]


def crc32_of_both(first: int, second: int, length: int) -> int:
    """CRC-32 of two runs of bytes from the CRC-32 of each and the `length` of the second, as zlib's ``crc32_combine``."""

    def times(a: int, b: int) -> int:  # polynomials over GF(2) modulo the CRC's, bits reflected: x^0 is the highest bit
        product = 0
        for bit in range(31, -1, -1):
            product ^= b if a >> bit & 1 else 0
            b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
        return product

    shift, power = 1 << 31, 1 << 23  # x^0; x^8, squared again and again
    while length:
        if length & 1:
            shift = times(power, shift)
        power, length = times(power, power), length >> 1
    return times(shift, first) ^ second


class _Crc:
    """Writes to a file and computes the CRC-32 of what was written in a second thread.

    A buffer must stay untouched until the CRC has read it: `write` waits before it would queue more than `depth`. With one
    that the CRC reads, one that is written, two that wait to be and one that is filled (`_ahead`) these are seven of the eight
    that `Content.chunks` promises.
    """

    depth = 2

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc, self.size = file, 0, 0
        self._queue: queue.Queue[Any] = queue.Queue(self.depth)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self.crc = zlib.crc32(data, self.crc)
            self._queue.task_done()

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.size += len(view)
        self._queue.put(view)
        write_all(self.file, view)

    def settle(self) -> int:
        """Wait for the second thread and end it; the CRC-32 of everything written."""
        self._queue.put(None)
        self._thread.join()
        return self.crc


def write(
    output: str | Path,
    metadata: dict[str, Any],
    plans: Iterable[Plan],
    dialect: Dialect,
    *,
    compress: str | None = None,
    force: bool = True,
    progress: Callable[[int], None] | None = None,
    late: Late | None = None,
) -> int:
    """Write an APR file under a temporary name and rename it when it is whole.

    Args:
        output: the file to make.
        metadata: the JSON object; `source_metadata.body_bytes` is filled in so that a cut-off file is noticed.
        plans: the tensors, names and dims as they will be in the file.
        dialect: flags, order of the index and footer come from it.
        compress: None, ``lz4`` or ``zstd`` for everything after the header.
        force: replace a file of that name.
        progress: called with the number of data bytes written since the last call.
        late: a string of the metadata that is put in at the end; nothing happens where its placeholder is not in them.

    Returns:
        The size of the file in bytes.
    """
    plans = sorted(plans, key=lambda p: p.name) if dialect.sorted_index else list(plans)
    header, front = _front(metadata, plans, dialect, compress, output)
    with atomic(Path(output), force=force) as file:
        if compress is None:
            return _write_body(file, header, front, plans, dialect, progress, late)
        with tempfile.TemporaryFile(dir=Path(output).resolve().parent) as plain:
            size = _write_body(plain, header, front, plans, dialect, progress, late)
            image = np.memmap(plain, np.uint8, "r", shape=(size,))
            file.write(header)
            compress_body(image[HEADER_SIZE:], compress, file)
            packed = file.tell() - HEADER_SIZE
            if size > EXPANSION_FREE + EXPANSION * packed:  # no reader of ours would take it
                said = f"packs {size} bytes into {packed}, more than {EXPANSION} times: write it without compression"
                raise UnsupportedError(said, code="apr.packs-too-well", path=output)
        return file.tell()


def _front(
    metadata: dict[str, Any], plans: list[Plan], dialect: Dialect, compress: str | None, output: str | Path
) -> tuple[bytearray, list[bytes]]:
    """The header, and what is between it and the data: metadata, index, padding."""
    entries, offset = [], 0
    for plan in plans:
        entries.append(Entry(plan.name, plan.code, plan.dims, offset, plan.nbytes))
        offset += plan.nbytes + padding(offset + plan.nbytes, ALIGNMENT)
    body = offset + (4 if dialect.footer else 0)
    if isinstance(metadata.get("source_metadata"), dict):
        metadata = {**metadata, "source_metadata": {**metadata["source_metadata"], "body_bytes": body}}
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > METADATA_LIMIT:
        raise UnsupportedError(f"metadata would be {len(text)} bytes; APR allows {METADATA_LIMIT}",
                               code="apr.metadata-does-not-fit", path=output)  # fmt: skip
    index = b"".join(entry.pack() for entry in entries)
    flags = dialect.flags | (FLAGS[compress] if compress else 0)
    header = bytearray(
        HEADER.pack(
            b"APR\0", 2, 0, flags, len(entries), HEADER_SIZE, len(text),
            index_at := HEADER_SIZE + len(text) + padding(len(text), ALIGNMENT),
            index_at + len(index) + padding(index_at + len(index), ALIGNMENT), 0,
        )
    )  # fmt: skip
    header[40:44] = header_crc(bytes(header)).to_bytes(4, "little")
    front = [text, bytes(padding(len(text), ALIGNMENT)), index, bytes(padding(index_at + len(index), ALIGNMENT))]
    if compress == "lz4" and (size := sum(map(len, front)) + body) > LZ4_LIMIT:
        raise UnsupportedError(f"an LZ4 block holds {LZ4_LIMIT} bytes at most, and {size} are to be packed; use zstd",
                               code="apr.lz4-limit", path=output)  # fmt: skip
    return header, front


def _write_body(
    file: IO[bytes],
    header: bytes | bytearray,
    front: list[bytes],
    plans: list[Plan],
    dialect: Dialect,
    progress: Callable[[int], None] | None,
    late: Late | None,
) -> int:
    write_all(file, memoryview(head := b"".join([header, *front])))
    out = _Crc(file)
    try:
        with closing(_ahead(plans)) as parts:
            _write_parts(out, parts, progress)
    finally:
        crc = out.settle()
    if late is not None and (stands := late.placeholder.encode()) in head:
        at, text = head.index(stands), late.text().encode()
        assert len(text) == len(stands), "the text is not as long as its placeholder"
        head = head.replace(stands, text)
        file.seek(at)
        write_all(file, memoryview(text))
        file.seek(0, 2)
    if dialect.footer:
        file.write(crc32_of_both(zlib.crc32(head), crc, out.size).to_bytes(4, "little"))
    return len(head) + out.size + (4 if dialect.footer else 0)


def _write_parts(out: _Crc, parts: Iterable[tuple[Plan, Any]], progress: Callable[[int], None] | None) -> None:
    """The chunks of all plans, padding behind each; raises FormatError where they are not as long as planned."""
    before = 0
    for plan, chunk in parts:
        if chunk is not None:
            out.write(chunk)
            if progress is not None:
                progress(memoryview(chunk).nbytes)
            continue
        if out.size - before != plan.nbytes:
            raise FormatError(
                f"gave {out.size - before} bytes, {plan.nbytes} were planned", code="writing.length-differs", tensor=plan.name
            )
        out.write(bytes(padding(plan.nbytes, ALIGNMENT)))
        before = out.size


def _ahead(plans: Iterable[Plan]) -> Generator[tuple[Plan, Any], None, None]:
    """Each plan with each of its chunks, then with None; chunks are read, checked and made in a thread, up to two ahead."""
    ready: queue.Queue[tuple[Plan, Any] | BaseException | None] = queue.Queue(2)
    ended = threading.Event()

    def read() -> None:
        try:
            for found in ((plan, chunk) for plan in plans for chunk in itertools.chain(plan.chunks(), [None])):
                ready.put(found)
                if ended.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # raised where it would have been without a thread
            ready.put(error)

    threading.Thread(target=read, name="aprlab-read", daemon=True).start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        ended.set()
        with suppress(queue.Empty):
            while True:
                ready.get_nowait()  # so that a thread that waits goes on, and ends


def compress_body(body: np.ndarray, kind: str, file: IO[bytes], step: int = 1 << 22) -> None:
    """Write `body`, a view on a mapped file, as one LZ4 block or as a stream of zstd, whose memory does not grow with it."""
    if kind == "lz4":
        import lz4.block

        write_all(file, lz4.block.compress(body.data, store_size=True))
        return
    import zstandard

    whole: Any = _Whole(file)
    with zstandard.ZstdCompressor(level=3).stream_writer(whole, size=len(body), closefd=False) as out:
        for start in range(0, len(body), step):
            out.write(body[start : start + step].data)
            drop_pages(body[start : start + step])


class _Whole:
    """A file each of whose writes takes everything."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        return write_all(self._file, data)
