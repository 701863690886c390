"""An APR file taken apart: whatever can be parsed, and a list of what is wrong with it."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats.apr.layout import (
    ALIGNMENT,
    DIMS_LIMIT,
    ENTRY_LEAST,
    EXPANSION,
    EXPANSION_FREE,
    FLAGS,
    HEADER,
    HEADER_SIZE,
    METADATA_LIMIT,
    NAME_LIMIT,
    Container,
    Entry,
    header_crc,
)
from aprlab.formats.reading import Cursor, Span, check_spans, json_object, padding
from aprlab.model.content import map_file
from aprlab.model.remote import RemoteFile, open_url, url_of

FIRST_READ, MOST_READ = 1 << 18, 1 << 28  # bytes of a remote file that are fetched for all in front of its data


def scan(path: str | Path, *, verify: bool = True) -> Container:
    """Take an APR file apart. Raises only where nothing more can be read; everything else goes into `problems`.

    Args:
        path: the file.
        verify: also compute the footer's CRC-32, which reads the whole file once; never of a file at a URL.
    """
    path = Path(path)
    remote = None if (url := url_of(path)) is None else open_url(url)
    file = map_file(path) if remote is None else remote.read(0, min(FIRST_READ, remote.size))
    _refuse_version_1(file, path)
    at = Cursor(file.data, path)
    head = bytes(at.data[at.need(HEADER_SIZE, "the header") : HEADER_SIZE])
    magic, major, minor, flags, count, metadata_offset, metadata_size, index_offset, data_offset, crc = HEADER.unpack(head)
    if magic not in (b"APR\0", b"APR2"):
        raise FormatError(
            f"is not APR: starts with {magic.hex(' ')}, expected '41 50 52 00'", code="apr.bad-magic", path=path, offset=0
        )
    if major != 2:
        raise UnsupportedError(
            f"is APR version {major}.{minor}; version 2 is handled", code="apr.unsupported-version", path=path, offset=4
        )
    _refuse_kinds(flags, path)

    problems: list[AprlabError] = []
    if crc != header_crc(head):
        problems.append(
            FormatError(
                f"header CRC is {crc:08x}, the header's bytes give {header_crc(head):08x}",
                code="apr.header-crc",
                path=path,
                offset=40,
            )
        )
    if unknown := flags & ~sum(FLAGS.values()):
        problems.append(FormatError(f"flags {unknown:#06x} are not known", code="apr.unknown-flags", path=path, offset=6))
    _check_parts(count, metadata_offset, metadata_size, index_offset, data_offset, path)
    compression = "lz4" if flags & FLAGS["lz4"] else "zstd" if flags & FLAGS["zstd"] else None
    if remote is not None:
        file = _rest_of_head(file, remote, data_offset, compression)
    image = file if compression is None else _decompress(path, file, compression, data_offset, count)

    at = Cursor(image.data, path)
    at.offset = metadata_offset
    metadata = _parse_metadata(at, metadata_size)
    at.offset = index_offset
    if index_offset < len(image) and image[index_offset] == ord("["):
        raise UnsupportedError(
            "keeps its weights as one JSON payload (realizar's own form)", code="apr.json-weights", path=path, offset=index_offset
        )
    entries = read_index(at, count, data_offset)
    box = Container(
        path, magic, (major, minor), flags, metadata_offset, metadata_size, index_offset, data_offset,
        metadata, entries, image, compression=compression, problems=problems, remote=remote,
    )  # fmt: skip
    _check_index(box)
    _check_end(box, verify=verify)
    return box


def _rest_of_head(file: np.ndarray, remote: RemoteFile, data_offset: int, compression: str | None) -> np.ndarray:
    """Everything in front of the data of a file at a URL, ``uint8``, given its first bytes."""
    if compression is not None:
        raise UnsupportedError(
            f"is compressed as a whole ({compression}): it cannot be read in ranges; download it", code="apr.compressed-by-url",
            path=remote.path, offset=6,
        )  # fmt: skip
    stop = min(data_offset, remote.size, MOST_READ)
    return file if stop <= len(file) else np.concatenate([file, remote.read(len(file), stop)])


def _refuse_version_1(file: np.ndarray, path: Path) -> None:
    if bytes(file[:4]) == b"APR1":
        raise UnsupportedError(
            "is APR version 1 ('APR1'), an older layout; convert it again from its source",
            code="apr.unsupported-version", path=path,
        )  # fmt: skip
    if bytes(file[:4]) == b"APRN":
        raise UnsupportedError(
            "is APR version 1 ('APRN', MessagePack metadata); convert it again from its source",
            code="apr.unsupported-version", path=path,
        )  # fmt: skip


def _check_parts(count: int, metadata_offset: int, metadata_size: int, index_offset: int, data_offset: int, path: Path) -> None:
    """What the header claims about sizes and order, before any of it is read."""
    if metadata_size > METADATA_LIMIT:
        raise FormatError(
            f"claims {metadata_size} bytes of metadata; at most {METADATA_LIMIT} are allowed",
            code="apr.metadata-too-large", path=path, offset=20,
        )  # fmt: skip
    if not HEADER_SIZE <= metadata_offset <= metadata_offset + metadata_size <= index_offset <= data_offset:
        raise FormatError(
            f"parts out of order: metadata {metadata_offset}+{metadata_size}, index {index_offset}, data {data_offset}",
            code="apr.parts-out-of-order", path=path, offset=12,
        )  # fmt: skip
    if data_offset - index_offset < count * ENTRY_LEAST:
        raise FormatError(
            f"claims {count} tensors, at least {count * ENTRY_LEAST} bytes of index; the index has {data_offset - index_offset}",
            code="apr.implausible-count", path=path, offset=8,
        )  # fmt: skip


def _refuse_kinds(flags: int, path: Path) -> None:
    for name in ("encrypted", "sharded", "column_major", "filterbank"):
        if flags & FLAGS[name]:
            kind = name.replace("_", "-")
            fix = "; convert it again from its source, as one plain file" if name in ("sharded", "column_major") else ""
            raise UnsupportedError(
                f"is {kind} (flag {FLAGS[name]:#06x}), which is not handled{fix}",
                code="apr.unsupported-flag", path=path, offset=6,
            )  # fmt: skip
    if flags & FLAGS["lz4"] and flags & FLAGS["zstd"]:
        raise FormatError("claims to be compressed by LZ4 and by zstd", code="apr.two-compressions", path=path, offset=6)


def _parse_metadata(at: Cursor, size: int) -> dict[str, Any]:
    text = at.text(size, "the metadata")
    return json_object(text, "metadata", at.path, at.offset - size) if size else {}


def read_index(at: Cursor, count: int, end: int) -> list[Entry]:
    if end > at.size:
        raise FormatError(
            f"ends inside the index: data would start at {end}, the file has {at.size}",
            code="reading.truncated", path=at.path, offset=32,
        )  # fmt: skip
    inside = Cursor(at.data[:end], at.path, at.offset)
    entries = []
    for n in range(count):
        start, what = inside.offset, f"index entry {n}"
        length = inside.unpack("H", what)
        if not 1 <= length <= NAME_LIMIT:
            raise FormatError(
                f"{what} has a name of {length} bytes; 1 to {NAME_LIMIT} are allowed",
                code="apr.name-length", path=at.path, offset=start,
            )  # fmt: skip
        name = inside.text(length, f"the name in {what}")
        code, dims = inside.unpack("B", what), inside.unpack("B", what)
        if not 1 <= dims <= DIMS_LIMIT:
            raise FormatError(
                f"has {dims} dimensions; 1 to {DIMS_LIMIT} are allowed",
                code="apr.dimension-count", path=at.path, tensor=name, offset=start,
            )  # fmt: skip
        shape = tuple(inside.unpack("Q", what) for _ in range(dims))
        entries.append(Entry(name, code, shape, inside.unpack("Q", what), inside.unpack("Q", what), start))
    return entries


def _check_index(box: Container) -> None:
    """Names once each; sorted where the dialect demands it; spans inside the file, aligned, not overlapping."""
    seen: set[str] = set()
    for entry in box.entries:
        if entry.name in seen:
            box.problems.append(
                FormatError(
                    "is listed twice", code="reading.duplicate-tensor", path=box.path, tensor=entry.name, offset=entry.at
                )
            )
        seen.add(entry.name)
        if entry.offset % ALIGNMENT:
            box.problems.append(
                FormatError(
                    f"data offset {entry.offset} is not a multiple of {ALIGNMENT}",
                    code="reading.unaligned-tensor", path=box.path, tensor=entry.name, offset=entry.at,
                )
            )  # fmt: skip
    listed = [entry.name for entry in box.entries]
    if box.flags & FLAGS["row_major"] and listed != sorted(listed):
        at = next(n for n in range(1, len(listed)) if listed[n] < listed[n - 1])
        box.problems.append(
            FormatError(
                f"comes after {listed[at - 1]!r}: the index is not sorted, and upstream's binary search misses tensors",
                code="apr.index-not-sorted", path=box.path, tensor=listed[at], offset=box.entries[at].at,
            )
        )  # fmt: skip
    spans = [Span(e.name, box.data_offset + e.offset, box.data_offset + e.offset + e.size) for e in box.entries]
    try:
        check_spans(spans, box.size, box.path)
    except FormatError as error:
        box.problems.append(error)


def _check_end(box: Container, *, verify: bool) -> None:
    """What follows the last tensor: nothing, padding, a CRC-32 of all before it, or padding and the CRC."""
    stop = max((box.data_offset + e.offset + e.size for e in box.entries), default=box.data_offset)
    pad, rest = padding(stop, ALIGNMENT), box.size - stop
    promised = box.metadata.get("source_metadata")
    promised = promised.get("body_bytes") if isinstance(promised, dict) else None
    body = box.size - box.data_offset
    if isinstance(promised, int) and promised != body:
        box.problems.append(
            FormatError(f"its writer wrote {promised} bytes of data, {body} are there", code="apr.body-length", path=box.path)
        )
    if rest < 0:
        return  # spans have said so already
    if rest not in (0, pad, 4, pad + 4):
        box.problems.append(
            FormatError(f"{rest} bytes follow the last tensor", code="reading.trailing-bytes", path=box.path, offset=stop)
        )
        return
    tail = box.from_(stop).tobytes()
    if rest in (0, pad) and not any(tail) and not (rest == 4 and box.flags & FLAGS["row_major"]):
        return
    stored = int.from_bytes(tail[-4:], "little")
    box.footer = stored
    if any(tail[:-4]):
        box.problems.append(
            FormatError("the padding after the last tensor is not zero", code="apr.padding-not-zero", path=box.path, offset=stop)
        )
    if verify and box.remote is None and stored != (found := _crc_of(box)):
        box.problems.append(
            FormatError(
                f"footer CRC is {stored:08x}, the file's bytes give {found:08x}: the file is damaged",
                code="apr.footer-crc", path=box.path, offset=len(box.image) - 4,
            )
        )  # fmt: skip


def _crc_of(box: Container, step: int = 1 << 22) -> int:
    """CRC-32 of all but the last four bytes. Read through a buffer, not the map: pages of a map count as memory."""
    crc, stop = 0, len(box.image) - 4
    if box.compression is not None:
        for start in range(0, stop, step):
            crc = zlib.crc32(box.image[start : min(start + step, stop)].data, crc)
        return crc
    buffer = memoryview(bytearray(step))
    with open(box.path, "rb", buffering=0) as file:
        while stop and (got := file.readinto(buffer[: min(step, stop)])):
            crc = zlib.crc32(buffer[:got], crc)
            stop -= got
    return crc


def _decompress(path: Path, file: np.ndarray, kind: str, data_offset: int, count: int) -> np.ndarray:
    """The image a compressed file stands for: raw header, then the decompressed body.

    Never trusts a claimed size: the body ends where header and index say it must, or the file is refused. Before a byte
    of the weights is unpacked, their claimed size is compared with what a body of this length can plausibly hold.
    """
    body = file[HEADER_SIZE:]
    most = EXPANSION_FREE + EXPANSION * len(body)

    def believable(nbytes: int, what: str, offset: int) -> None:
        if nbytes > most:
            said = f"{what} {nbytes} bytes; a {kind} body of {len(body)} bytes is unpacked to {most} bytes at most"
            raise FormatError(said, code="apr.expansion", path=path, offset=offset)

    if kind == "lz4":
        import lz4.block

        claimed = int.from_bytes(bytes(body[:4]), "little")
        if len(body) < 4 or claimed > 255 * len(body) + 64:
            said = f"LZ4 body of {len(body)} bytes claims {claimed}, more than LZ4 can pack"
            raise FormatError(said, code="apr.lz4-implausible-size", path=path, offset=64)
        believable(claimed, "LZ4 body claims", HEADER_SIZE)
        try:
            plain = lz4.block.decompress(body.data)
        except (lz4.block.LZ4BlockError, MemoryError, ValueError) as error:
            raise FormatError(f"LZ4 body is damaged: {error}", code="apr.lz4-damaged", path=path, offset=HEADER_SIZE) from None
        return np.concatenate([file[:HEADER_SIZE], np.frombuffer(plain, np.uint8)])
    import zstandard

    if data_offset > HEADER_SIZE + METADATA_LIMIT + (count + 1) * (ENTRY_LEAST + NAME_LIMIT + 8 * DIMS_LIMIT) + 2 * ALIGNMENT:
        said = f"data cannot start at {data_offset} with {count} tensors"
        raise FormatError(said, code="apr.implausible-data-offset", path=path, offset=32)
    believable(data_offset, "the data would start behind", 32)
    stream = zstandard.ZstdDecompressor().stream_reader(body.data)
    try:
        front = file[:HEADER_SIZE].tobytes() + stream.read(data_offset - HEADER_SIZE)
        index = int.from_bytes(front[24:32], "little")
        entries = read_index(Cursor(memoryview(front), path, index), count, data_offset)
        stop = max((data_offset + e.offset + e.size for e in entries), default=data_offset)
        believable(stop, "the index claims", index)
        limit = stop + ALIGNMENT + 4 - len(front)
        out = tempfile.TemporaryFile()  # noqa: SIM115  its map below keeps it alive
        out.write(front)
        while limit > 0 and (chunk := stream.read(min(limit, 1 << 22))):
            out.write(chunk)
            limit -= len(chunk)
        if stream.read(1):
            said = "zstd body goes on after the last tensor"
            raise FormatError(said, code="apr.zstd-goes-on", path=path, offset=HEADER_SIZE)
        out.flush()
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd body is damaged: {error}", code="apr.zstd-damaged", path=path, offset=HEADER_SIZE) from None
    except OSError as error:
        said = f"cannot be unpacked in {tempfile.gettempdir()} (TMPDIR): {error.strerror}"
        raise UsageError(said, code="apr.unpack-failed", path=path) from None
    return np.memmap(out, np.uint8, "r").view(np.ndarray)
