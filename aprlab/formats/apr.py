"""APR v2, in the dialects found in the wild: a strict reader, a scan for broken files, and a writer.

Layout: 64-byte header, JSON metadata, tensor index, data, each part on a multiple of 64; `docs/formats.md` has the
tables. `scan` reads whatever can be parsed and lists what is wrong; `open_model` raises the first thing that is wrong.
"""

from __future__ import annotations

import json
import queue
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats.gguf import check_config
from aprlab.formats.reading import Cursor, Span, check_spans, json_object, padding
from aprlab.formats.writing import atomic, write_all
from aprlab.model import keys, names
from aprlab.model.config import ModelConfig, TokenizerData, require_qwen2
from aprlab.model.content import drop_pages, map_file
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType

HEADER = struct.Struct("<4sBBHIQIQQI20x")
HEADER_SIZE = HEADER.size
assert HEADER_SIZE == 64
ALIGNMENT = 64
METADATA_LIMIT = 16 * 2**20
NAME_LIMIT, DIMS_LIMIT = 256, 8
_ENTRY_LEAST = 2 + 1 + 1 + 1 + 8 + 8 + 8  # the shortest index entry: a name of one byte, one dimension
LZ4_LIMIT = 0x7E000000  # bytes of an LZ4 block before it is packed

FLAGS = {
    "lz4": 0x0001, "zstd": 0x0002, "encrypted": 0x0004, "signed": 0x0008, "sharded": 0x0010, "quantized": 0x0020,
    "filterbank": 0x0040, "model_card": 0x0080, "streaming": 0x0100, "has_vocabulary": 0x0200,
    "row_major": 0x0400, "column_major": 0x0800,
}  # fmt: skip

# Bytes that mean two things: ggml's type, and what aprender gave the number to. The size law decides.
AMBIGUOUS: dict[int, tuple[TensorType, ...]] = {
    3: (types.Q4_1, types.F64),
    5: (types.by_name("I64"),),
    6: (types.Q5_0, types.by_name("I8")),
    8: (types.Q8_0, types.APR_Q4),
    9: (types.Q8_1, types.APR_Q8),
}
# aprender's U8 has no ggml type; its number is Q5_1's.
APRENDER_U8 = 7


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the tensor index, exactly as written. `offset` is relative to the data, `at` is where the row stands."""

    name: str
    code: int
    dims: tuple[int, ...]
    offset: int
    size: int
    at: int = 0

    def pack(self) -> bytes:
        """The row's bytes."""
        name = self.name.encode()
        head = struct.pack("<H", len(name)) + name + struct.pack("<BB", self.code, len(self.dims))
        return head + struct.pack(f"<{len(self.dims)}QQQ", *self.dims, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one writer writes.

    `naming` is a key of `names.VARIANTS`; `dims` is ``rows`` (NumPy order) or ``ne`` (ggml order).
    """

    name: str
    naming: str
    dims: str
    flags: int
    sorted_index: bool
    footer: bool
    keys: dict[str, str]  # config field -> metadata key


_COMMON = {
    "architecture": "architecture",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rope_type": "rope_type",
    "rms_norm_eps": "rms_norm_eps",
    "head_dim": "head_dim",
}
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "aprender", "canonical", "rows", FLAGS["row_major"], True, True,
            {**_COMMON, "block_count": "num_layers", "head_count": "num_heads", "head_count_kv": "num_kv_heads"},
        ),
        Dialect(
            "realizar", "raw", "ne", 0, False, False,
            {**_COMMON, "block_count": "num_hidden_layers", "head_count": "num_attention_heads",
             "head_count_kv": "num_key_value_heads"},
        ),
    )
}  # fmt: skip

# Every key a config value was ever written under, and the value upstream's reader assumes where none is there.
CONFIG_KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "architecture": (("architecture",), "unknown"),
    "block_count": (("num_layers", "n_layers", "num_hidden_layers", "n_layer"), "0"),
    "embedding_length": (("hidden_size", "hidden_dim", "d_model", "n_embd"), "0"),
    "feed_forward_length": (("intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"), "4 × hidden_size"),
    "head_count": (("num_heads", "n_heads", "num_attention_heads", "n_head"), "0"),
    "head_count_kv": (("num_kv_heads", "n_kv_heads", "num_key_value_heads"), "num_heads"),
    "vocab_size": (("vocab_size", "n_vocab"), "0"),
    "context_length": (("max_position_embeddings", "max_seq_len", "context_length", "n_ctx"), "2048"),
    "rope_theta": (("rope_theta",), "10000.0"),
    "rope_type": (("rope_type",), "0 (NORM)"),
    "rms_norm_eps": (("rms_norm_eps", "layer_norm_eps", "norm_eps"), "1e-06"),
    "head_dim": (("head_dim",), "hidden_size / num_heads"),
}
WHOLE = (
    "block_count", "embedding_length", "feed_forward_length", "head_count", "head_count_kv", "vocab_size", "context_length",
)  # fmt: skip
ROPE_TYPES = {0: "norm", 2: "neox"}


@dataclass
class Container:
    """An APR file taken apart, nothing interpreted yet.

    `image` is the whole file as ``uint8``, decompressed where it was compressed. `problems` holds what a strict reader
    refuses but a scan can look past, in file order.
    """

    path: Path
    magic: bytes
    version: tuple[int, int]
    flags: int
    metadata_offset: int
    metadata_size: int
    index_offset: int
    data_offset: int
    metadata: dict[str, Any]
    entries: list[Entry]
    image: np.ndarray = field(repr=False)
    footer: int | None = None
    compression: str | None = None
    problems: list[AprlabError] = field(default_factory=list)

    @property
    def flag_names(self) -> list[str]:
        """The names of the flags that are set."""
        return [name for name, bit in FLAGS.items() if self.flags & bit]

    def bytes_of(self, entry: Entry) -> np.ndarray:
        """The bytes the index gives to `entry`: a ``uint8`` view, shorter where the file ends before them."""
        start = self.data_offset + entry.offset
        return self.image[start : start + entry.size]


def header_crc(header: bytes) -> int:
    """CRC-32 over the header without its own field: bytes 0..39, then 44..63."""
    return zlib.crc32(header[44:64], zlib.crc32(header[:40]))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def scan(path: str | Path, *, verify: bool = True) -> Container:
    """Take an APR file apart. Raises only where nothing more can be read; everything else goes into `problems`.

    Args:
        path: the file.
        verify: also compute the footer's CRC-32, which reads the whole file once.
    """
    path = Path(path)
    file = map_file(path)
    if bytes(file[:4]) == b"APR1":
        raise UnsupportedError("is APR version 1 ('APR1'), an older layout; convert it again from its source", path=path)
    if bytes(file[:4]) == b"APRN":
        raise UnsupportedError("is APR version 1 ('APRN', MessagePack metadata); convert it again from its source", path=path)
    at = Cursor(file.data, path)
    head = bytes(at.data[at.need(HEADER_SIZE, "the header") : HEADER_SIZE])
    magic, major, minor, flags, count, metadata_offset, metadata_size, index_offset, data_offset, crc = HEADER.unpack(head)
    if magic not in (b"APR\0", b"APR2"):
        raise FormatError(f"is not APR: starts with {magic.hex(' ')}, expected '41 50 52 00'", path=path, offset=0)
    if major != 2:
        raise UnsupportedError(f"is APR version {major}.{minor}; version 2 is handled", path=path, offset=4)
    _refuse_kinds(flags, path)

    problems: list[AprlabError] = []
    if crc != header_crc(head):
        problems.append(
            FormatError(f"header CRC is {crc:08x}, the header's bytes give {header_crc(head):08x}", path=path, offset=40)
        )
    if unknown := flags & ~sum(FLAGS.values()):
        problems.append(FormatError(f"flags {unknown:#06x} are not known", path=path, offset=6))
    if metadata_size > METADATA_LIMIT:
        raise FormatError(f"claims {metadata_size} bytes of metadata; at most {METADATA_LIMIT} are allowed", path=path, offset=20)
    if not HEADER_SIZE <= metadata_offset <= metadata_offset + metadata_size <= index_offset <= data_offset:
        raise FormatError(
            f"parts out of order: metadata {metadata_offset}+{metadata_size}, index {index_offset}, data {data_offset}",
            path=path, offset=12,
        )  # fmt: skip
    if data_offset - index_offset < count * _ENTRY_LEAST:
        raise FormatError(
            f"claims {count} tensors, at least {count * _ENTRY_LEAST} bytes of index; the index has {data_offset - index_offset}",
            path=path, offset=8,
        )  # fmt: skip
    compression = "lz4" if flags & FLAGS["lz4"] else "zstd" if flags & FLAGS["zstd"] else None
    image = file if compression is None else _decompress(path, file, compression, data_offset, count)

    at = Cursor(image.data, path)
    at.offset = metadata_offset
    metadata = _parse_metadata(at, metadata_size)
    at.offset = index_offset
    if index_offset < len(image) and image[index_offset] == ord("["):
        raise UnsupportedError("keeps its weights as one JSON payload (realizar's own form)", path=path, offset=index_offset)
    entries = _read_index(at, count, data_offset)
    box = Container(
        path, magic, (major, minor), flags, metadata_offset, metadata_size, index_offset, data_offset,
        metadata, entries, image, compression=compression, problems=problems,
    )  # fmt: skip
    _check_index(box)
    _check_end(box, verify=verify)
    return box


def _refuse_kinds(flags: int, path: Path) -> None:
    for name in ("encrypted", "sharded", "column_major", "filterbank"):
        if flags & FLAGS[name]:
            kind = name.replace("_", "-")
            raise UnsupportedError(f"is {kind} (flag {FLAGS[name]:#06x}), which is not handled", path=path, offset=6)
    if flags & FLAGS["lz4"] and flags & FLAGS["zstd"]:
        raise FormatError("claims to be compressed by LZ4 and by zstd", path=path, offset=6)


def _parse_metadata(at: Cursor, size: int) -> dict[str, Any]:
    text = at.text(size, "the metadata")
    return json_object(text, "metadata", at.path, at.offset - size) if size else {}


def _read_index(at: Cursor, count: int, end: int) -> list[Entry]:
    if end > at.size:
        raise FormatError(f"ends inside the index: data would start at {end}, the file has {at.size}", path=at.path, offset=32)
    inside = Cursor(at.data[:end], at.path, at.offset)
    entries = []
    for n in range(count):
        start, what = inside.offset, f"index entry {n}"
        length = inside.unpack("H", what)
        if not 1 <= length <= NAME_LIMIT:
            raise FormatError(f"{what} has a name of {length} bytes; 1 to {NAME_LIMIT} are allowed", path=at.path, offset=start)
        name = inside.text(length, f"the name in {what}")
        code, dims = inside.unpack("B", what), inside.unpack("B", what)
        if not 1 <= dims <= DIMS_LIMIT:
            raise FormatError(f"has {dims} dimensions; 1 to {DIMS_LIMIT} are allowed", path=at.path, tensor=name, offset=start)
        shape = tuple(inside.unpack("Q", what) for _ in range(dims))
        entries.append(Entry(name, code, shape, inside.unpack("Q", what), inside.unpack("Q", what), start))
    return entries


def _check_index(box: Container) -> None:
    """Names once each; sorted where the dialect demands it; spans inside the file, aligned, not overlapping."""
    seen: set[str] = set()
    for entry in box.entries:
        if entry.name in seen:
            box.problems.append(FormatError("stands there twice", path=box.path, tensor=entry.name, offset=entry.at))
        seen.add(entry.name)
        if entry.offset % ALIGNMENT:
            box.problems.append(
                FormatError(
                    f"data offset {entry.offset} is not a multiple of {ALIGNMENT}",
                    path=box.path, tensor=entry.name, offset=entry.at,
                )
            )  # fmt: skip
    listed = [entry.name for entry in box.entries]
    if box.flags & FLAGS["row_major"] and listed != sorted(listed):
        at = next(n for n in range(1, len(listed)) if listed[n] < listed[n - 1])
        box.problems.append(
            FormatError(
                f"stands after {listed[at - 1]!r}: the index is not sorted, and upstream's binary search misses tensors",
                path=box.path, tensor=listed[at], offset=box.entries[at].at,
            )
        )  # fmt: skip
    spans = [Span(e.name, box.data_offset + e.offset, box.data_offset + e.offset + e.size) for e in box.entries]
    try:
        check_spans(spans, len(box.image), box.path)
    except FormatError as error:
        box.problems.append(error)


def _check_end(box: Container, *, verify: bool) -> None:
    """What follows the last tensor: nothing, padding, a CRC-32 of all before it, or padding and the CRC."""
    stop = max((box.data_offset + e.offset + e.size for e in box.entries), default=box.data_offset)
    pad, rest = padding(stop, ALIGNMENT), len(box.image) - stop
    promised = box.metadata.get("source_metadata")
    promised = promised.get("body_bytes") if isinstance(promised, dict) else None
    body = len(box.image) - box.data_offset
    if isinstance(promised, int) and promised != body:
        box.problems.append(FormatError(f"its writer wrote {promised} bytes of data, {body} are there", path=box.path))
    if rest < 0:
        return  # spans have said so already
    if rest not in (0, pad, 4, pad + 4):
        box.problems.append(FormatError(f"{rest} bytes follow the last tensor", path=box.path, offset=stop))
        return
    tail = box.image[stop:].tobytes()
    if rest in (0, pad) and not any(tail) and not (rest == 4 and box.flags & FLAGS["row_major"]):
        return
    stored = int.from_bytes(tail[-4:], "little")
    box.footer = stored
    if any(tail[:-4]):
        box.problems.append(FormatError("the padding after the last tensor is not zero", path=box.path, offset=stop))
    if verify and stored != (found := _crc_of(box)):
        box.problems.append(
            FormatError(
                f"footer CRC is {stored:08x}, the file's bytes give {found:08x}: the file is damaged",
                path=box.path, offset=len(box.image) - 4,
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

    Never trusts a claimed size: the body ends where header and index say it must, or the file is refused.
    """
    body = file[HEADER_SIZE:]
    if kind == "lz4":
        import lz4.block

        claimed = int.from_bytes(bytes(body[:4]), "little")
        if len(body) < 4 or claimed > 255 * len(body) + 64:
            raise FormatError(f"LZ4 body of {len(body)} bytes claims {claimed}, more than LZ4 can pack", path=path, offset=64)
        try:
            plain = lz4.block.decompress(body.data)
        except (lz4.block.LZ4BlockError, MemoryError, ValueError) as error:
            raise FormatError(f"LZ4 body is damaged: {error}", path=path, offset=HEADER_SIZE) from None
        return np.concatenate([file[:HEADER_SIZE], np.frombuffer(plain, np.uint8)])
    import zstandard

    if data_offset > HEADER_SIZE + METADATA_LIMIT + (count + 1) * (_ENTRY_LEAST + NAME_LIMIT + 8 * DIMS_LIMIT) + 2 * ALIGNMENT:
        raise FormatError(f"data cannot start at {data_offset} with {count} tensors", path=path, offset=32)
    stream = zstandard.ZstdDecompressor().stream_reader(body.data)
    try:
        front = file[:HEADER_SIZE].tobytes() + stream.read(data_offset - HEADER_SIZE)
        index = int.from_bytes(front[24:32], "little")
        entries = _read_index(Cursor(memoryview(front), path, index), count, data_offset)
        stop = max((data_offset + e.offset + e.size for e in entries), default=data_offset)
        limit = stop + ALIGNMENT + 4 - len(front)
        out = tempfile.TemporaryFile()  # noqa: SIM115  its map below keeps it alive
        out.write(front)
        while limit > 0 and (chunk := stream.read(min(limit, 1 << 22))):
            out.write(chunk)
            limit -= len(chunk)
        if stream.read(1):
            raise FormatError("zstd body goes on after the last tensor", path=path, offset=HEADER_SIZE)
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd body is damaged: {error}", path=path, offset=HEADER_SIZE) from None
    out.flush()
    return np.memmap(out, np.uint8, "r").view(np.ndarray)


# ── meaning ───────────────────────────────────────────────────────────────────────────────────────────────────────


def candidates(code: int) -> tuple[TensorType, ...]:
    """Every type an APR dtype byte has stood for; empty for a byte nobody gave out."""
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
        FormatError: unknown byte, no candidate fits (the label lies), or more than one does (ambiguous).
    """
    where: dict[str, Any] = {"path": box.path, "tensor": entry.name, "offset": entry.at}
    known = candidates(entry.code)
    if not known:
        raise FormatError(f"unknown dtype byte {entry.code}", **where)
    fitting = [t for t in known if t.fits(shape, entry.size)]
    if len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        raise FormatError(
            f"dtype byte {entry.code} is ambiguous: {entry.size} bytes fit {' and '.join(t.name for t in fitting)}", **where
        )
    size = int(np.prod(shape, dtype=object))
    if entry.code == APRENDER_U8 and entry.size == size:
        raise UnsupportedError("is U8 (dtype byte 7 of aprender), which is not handled", **where)
    wanted = " or ".join(f"{t.nbytes(shape) if shape[-1] % t.block_elements == 0 else 'none'} as {t.name}" for t in known)
    others = [t.name for t in types.TYPES if t.fits(shape, entry.size)]
    hint = f"; the size fits {', '.join(others)}" if others else ""
    raise FormatError(f"dtype byte {entry.code} with {entry.size} bytes breaks the size law: {wanted} wanted{hint}", **where)


def naming_of(entries: Iterable[Entry]) -> str:
    """The naming (a key of `names.VARIANTS`) under which most names are known; '' where none knows any."""
    listed = [entry.name for entry in entries]
    known = {naming: sum(names.to_gguf(name, naming) is not None for name in listed) for naming in names.VARIANTS}
    best = max(known, key=lambda naming: known[naming])
    return best if known[best] else ""


def open_model(path: str | Path, *, verify: bool = True) -> Model:
    """Open an APR file of a known dialect, strictly: the first thing that is wrong is raised.

    Args:
        path: the file.
        verify: check the footer's CRC-32 (reads the whole file once).
    """
    box = scan(path, verify=verify)
    if box.problems:
        raise box.problems[0]
    naming = naming_of(box.entries)
    if naming not in ("canonical", "raw"):
        example = box.entries[0].name if box.entries else "none"
        found = f"the historic naming {naming!r}" if naming else "no known naming"
        raise FormatError(
            f"tensor names follow {found} (first: {example!r}); expected 'model.layers.N…' or 'blk.N…'. "
            "`aprlab peel` tells more, `aprlab repair` can rename",
            path=box.path,
        )
    dialect = next(d for d in DIALECTS.values() if d.naming == naming)
    tensors: dict[str, Tensor] = {}
    for entry in box.entries:
        gguf = names.to_gguf(entry.name, naming)
        if gguf is None:
            raise FormatError(
                f"unknown tensor name; {naming} names look like {names.from_gguf('blk.0.attn_q.weight', naming)!r}",
                path=box.path, tensor=entry.name, offset=entry.at,
            )  # fmt: skip
        shape = entry.dims if dialect.dims == "rows" else entry.dims[::-1]
        if 0 in shape or np.prod([float(n) for n in shape]) > 2**62:
            raise FormatError(f"has the impossible dimensions {list(shape)}", path=path, tensor=entry.name, offset=entry.at)
        kind = type_of(box, entry, shape)
        start = box.data_offset + entry.offset
        origin = Origin(box.path, entry.name, start if box.compression is None else -1)
        tensors[gguf] = Tensor(gguf, kind, shape, box.bytes_of(entry), origin)
    footer = "" if box.footer is not None or not dialect.footer else " without footer"
    warnings = _false_flags(box, tensors)
    model = Model(
        path=box.path,
        format="apr",
        dialect=dialect.name + footer,
        tensors=tensors,
        metadata=box.metadata,
        make_config=lambda: config(box.metadata, tensors, box.path),
        make_tokenizer=lambda: tokenizer(box.metadata, box.path),
        warnings=warnings,
        header={
            "version": ".".join(map(str, box.version)), "flags": box.flag_names, "compression": box.compression,
            "data_offset": box.data_offset, "footer_crc": box.footer,
        },
    )  # fmt: skip
    return model


def _false_flags(box: Container, tensors: dict[str, Tensor]) -> list[str]:
    """Flags that do not tell the truth; upstream leaves some clear, so it is a warning. realizar knows only one flag."""
    truth = {"quantized": any(t.type.quantised for t in tensors.values())}
    if box.flags & FLAGS["row_major"]:
        truth["has_vocabulary"] = "tokenizer.vocabulary" in box.metadata
    return [
        f"flag {name!r} is {'clear, but the file has' if true else 'set, but the file has no'} such content"
        for name, true in truth.items()
        if bool(box.flags & FLAGS[name]) != true
    ]


def _config_value(metadata: dict[str, Any], name: str, path: Path) -> tuple[str, Any]:
    """Key and value of a config field under any of its keys; two keys that disagree, or none, are an error."""
    keys, default = CONFIG_KEYS[name]
    found = {key: metadata[key] for key in keys if metadata.get(key) is not None}
    if not found:
        raise FormatError(f"metadata has no {keys[0]!r}; upstream would assume {default}, which is refused here", path=path)
    if len({json.dumps(v) for v in found.values()}) > 1:
        raise FormatError(f"metadata keys disagree: {found}", path=path)
    return next(iter(found.items()))


def _whole(metadata: dict[str, Any], name: str, path: Path) -> int:
    key, value = _config_value(metadata, name, path)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise FormatError(f"metadata key {key!r} is {value!r:.60}, not a whole number in range", path=path)
    return value


def _float32(metadata: dict[str, Any], name: str, path: Path) -> float:
    key, value = _config_value(metadata, name, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 3.4e38:
        raise FormatError(f"metadata key {key!r} is {value!r:.60}, not a number that a float32 can hold", path=path)
    return float(np.float32(value))  # every writer has an f32 there; 1e-6 and its f32 neighbour are the same value


def config(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> ModelConfig:
    """The Qwen2 config of an APR file; a missing key raises and names the default that upstream would assume."""
    _, architecture = _config_value(metadata, "architecture", path)
    require_qwen2(str(architecture), path)
    number = {name: _whole(metadata, name, path) for name in WHOLE}
    _, rope = _config_value(metadata, "rope_type", path)
    if not isinstance(rope, int) or rope not in ROPE_TYPES:
        raise FormatError(f"metadata key 'rope_type' is {rope!r}; 0 (NORM) and 2 (NEOX) are known", path=path)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError("has no tensor 'token_embd.weight'", path=path)
    if embedding.shape != (number["vocab_size"], number["embedding_length"]):
        raise FormatError(
            f"has shape {embedding.shape}, but vocab_size is {number['vocab_size']} and hidden_size {number['embedding_length']}",
            path=path, tensor=embedding.origin.name,
        )  # fmt: skip
    # Neither writer always has it, and both define it so; a wrong one shows in the shapes of Q and K.
    head_dim = number["embedding_length"] // max(number["head_count"], 1)
    if metadata.get("head_dim") is not None:
        head_dim = _whole(metadata, "head_dim", path)
    found = ModelConfig(
        architecture=str(architecture),
        **number,
        head_dim=head_dim,
        rope_theta=_float32(metadata, "rope_theta", path),
        rope_type=ROPE_TYPES[rope],
        rms_norm_eps=_float32(metadata, "rms_norm_eps", path),
        tied_embeddings="output.weight" not in tensors,
    )
    for problem in keys.huggingface_problems(metadata, found):
        raise UnsupportedError(f"metadata {problem}", code="keys.not-handled", path=path)
    return check_config(found, path)


def tokenizer(metadata: dict[str, Any], path: Path) -> TokenizerData:
    """The tokenizer data of an APR file; a missing key raises and names it."""

    def need(key: str, kind: type, default: str) -> Any:
        value = metadata.get(key)
        if value is None:
            raise FormatError(f"metadata has no {key!r}; {default}, which is refused here", path=path)
        if not isinstance(value, kind):
            raise FormatError(f"metadata key {key!r} is a {type(value).__name__}, not a {kind.__name__}", path=path)
        return value

    def strings(key: str, default: str) -> list[str]:
        value = need(key, list, default)
        if not all(isinstance(item, str) for item in value):
            raise FormatError(f"metadata key {key!r} holds something that is not text", path=path)
        return value

    def identity(key: str) -> int | None:
        value = metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise FormatError(f"metadata key {key!r} is {value!r}, not a token id", path=path)
        return value

    tokens = strings("tokenizer.vocabulary", "upstream would print token numbers")
    token_types = need("tokenizer.token_type", list, "upstream would take every token for ordinary text")
    if len(token_types) != len(tokens):
        raise FormatError(f"{len(tokens)} tokens, but {len(token_types)} token types", path=path)
    if not all(isinstance(t, int) and not isinstance(t, bool) for t in token_types):
        raise FormatError("metadata key 'tokenizer.token_type' holds something that is not a number", path=path)
    model_key = "tokenizer.model" if "tokenizer.model" in metadata else "tokenizer.model_type"
    add_bos = metadata.get("tokenizer.add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise FormatError(f"metadata key 'tokenizer.add_bos_token' is {add_bos!r:.60}, not true or false", path=path)
    template = metadata.get("chat_template", metadata.get("tokenizer.chat_template"))
    if template is not None and not isinstance(template, str):
        raise FormatError("the chat template is not text", path=path)
    return TokenizerData(
        model=need(model_key, str, "upstream would guess it from the vocabulary"),
        pre=need("tokenizer.pre_type", str, "upstream would split text as GPT-2 does"),
        tokens=tokens,
        token_types=token_types,
        merges=strings("tokenizer.merges", "upstream would cut text into single bytes"),
        bos_token_id=identity("tokenizer.bos_token_id"),
        eos_token_id=identity("tokenizer.eos_token_id"),
        pad_token_id=identity("tokenizer.padding_token_id"),
        add_bos=add_bos,
        chat_template=template,
    )


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Plan:
    """One tensor to be written: its index entry (offset still open) and where its bytes come from, in chunks."""

    name: str
    code: int
    dims: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[Any]]


class _Crc:
    """Writes to a file and computes the CRC-32 of what was written in a second thread.

    A buffer must stay untouched until the CRC has read it: `write` waits before it would queue more than `depth`.
    """

    depth = 4

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
) -> int:
    """Write an APR file under a temporary name and rename it when it is whole.

    Args:
        output: the file to make.
        metadata: the JSON object; `source_metadata.body_bytes` is filled in so that a cut-off file is noticed.
        plans: the tensors, names and dims as they shall stand in the file.
        dialect: flags, order of the index and footer come from it.
        compress: None, ``lz4`` or ``zstd`` for everything after the header.
        force: replace a file of that name.
        progress: called with the number of data bytes written since the last call.

    Returns:
        The size of the file in bytes.
    """
    plans = sorted(plans, key=lambda p: p.name) if dialect.sorted_index else list(plans)
    entries, offset = [], 0
    for plan in plans:
        entries.append(Entry(plan.name, plan.code, plan.dims, offset, plan.nbytes))
        offset += plan.nbytes + padding(offset + plan.nbytes, ALIGNMENT)
    body = offset + (4 if dialect.footer else 0)
    if isinstance(metadata.get("source_metadata"), dict):
        metadata = {**metadata, "source_metadata": {**metadata["source_metadata"], "body_bytes": body}}
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > METADATA_LIMIT:
        raise UnsupportedError(f"metadata would be {len(text)} bytes; APR allows {METADATA_LIMIT}", path=output)
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
    if compress == "lz4" and (due := sum(map(len, front)) + body) > LZ4_LIMIT:
        raise UnsupportedError(f"an LZ4 block holds {LZ4_LIMIT} bytes, and {due} are to be packed; zstd can", path=output)
    with atomic(Path(output), force=force) as file:
        if compress is None:
            return _write_body(_Crc(file), header, front, plans, dialect, progress)
        with tempfile.TemporaryFile(dir=Path(output).resolve().parent) as plain:
            size = _write_body(_Crc(plain), header, front, plans, dialect, progress)
            image = np.memmap(plain, np.uint8, "r", shape=(size,))
            file.write(header)
            _compress(image[HEADER_SIZE:], compress, file)
        return file.tell()


def _write_body(
    out: _Crc,
    header: bytes | bytearray,
    front: list[bytes],
    plans: list[Plan],
    dialect: Dialect,
    progress: Callable[[int], None] | None,
) -> int:
    try:
        for part in (header, *front):
            out.write(part)
        for plan in plans:
            before = out.size
            for chunk in plan.chunks():
                out.write(chunk)
                if progress is not None:
                    progress(memoryview(chunk).nbytes)
            if out.size - before != plan.nbytes:
                raise FormatError(f"gave {out.size - before} bytes, {plan.nbytes} were planned", tensor=plan.name)
            out.write(bytes(padding(plan.nbytes, ALIGNMENT)))
    finally:
        crc = out.settle()
    if dialect.footer:
        out.file.write(crc.to_bytes(4, "little"))
    return out.size + (4 if dialect.footer else 0)


def _compress(body: np.ndarray, kind: str, file: IO[bytes], step: int = 1 << 22) -> None:
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
