"""SafeTensors: the container alone. An own header reader and a streaming writer.

The `safetensors` package copies every tensor it reads and has no bfloat16 in NumPy; here tensors are views on the mapped
file, and the writer never holds more than a chunk. The package is the oracle in the tests. Layout: u64 length of the
header, a JSON object (padded with spaces), data without holes.

What a folder of the Hugging Face hub adds to it (config, tokenizer, shards) is in `aprlab.formats.huggingface`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats.reading import Cursor, json_object, padding
from aprlab.formats.writing import atomic, write_all
from aprlab.model.content import Content, map_file
from aprlab.model.remote import RemoteFile, content_at, open_url, url_of
from aprlab.quants import types
from aprlab.quants.types import TensorType

HEADER_LIMIT = 16 * 2**20  # the package allows 100 MB; a Qwen2's has 50 kB, and Python needs ten times a header to parse it
FIRST_READ = 1 << 16  # bytes of a remote file that are fetched for its header; the rest of it is fetched next
ALIGNMENT = 8  # of the data, by padding the header

# Name in the header -> type. The others are known by name and refused: no Qwen2 weight is a whole number or a quarter byte.
DTYPES: dict[str, TensorType] = {"F32": types.F32, "F16": types.F16, "BF16": types.BF16}
FOREIGN = (
    "BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F64", "C64", "F4", "F6_E2M3", "F6_E3M2",
    "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
)  # fmt: skip
_NAMES = {kind: name for name, kind in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """One tensor of the header: `start` and `stop` are absolute offsets in the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass
class SafetensorsHeader:
    """Everything in front of the data, in the order of the data."""

    path: Path
    entries: list[SafetensorsEntry]
    metadata: dict[str, str]
    data_offset: int
    file: np.ndarray = field(repr=False)
    remote: RemoteFile | None = None  # where the file is at a URL: `file` then holds its beginning alone

    def content(self, entry: SafetensorsEntry) -> Content | np.ndarray:
        """What a tensor is made of: a view on the file, or ranges of the remote one."""
        return content_at(self.file, self.remote, entry.start, entry.stop)


def read_header(path: str | Path) -> SafetensorsHeader:
    """Read and check the header: length, JSON, dtypes, the size law, and that the data is covered without hole or overlap.

    Raises:
        FormatError: with offset and tensor, where a rule is broken.
        UnsupportedError: a dtype that is known by name and that no weight of a Qwen2 has.
    """
    path = Path(path)
    remote = None if (url := url_of(path)) is None else open_url(url)
    file = map_file(path) if remote is None else remote.read(0, min(FIRST_READ, remote.size))
    at = Cursor(file.data, path)
    size = at.unpack("Q", "the length of the header")
    if size > HEADER_LIMIT:
        raise FormatError(
            f"claims a header of {size} bytes; at most {HEADER_LIMIT} are allowed",
            code="safetensors.header-too-large", path=path, offset=0,
        )  # fmt: skip
    if remote is not None and 8 + size > len(file):
        file = np.concatenate([file, remote.read(len(file), min(8 + size, remote.size))])
        at = Cursor(file.data, path, at.offset)
    file_size = len(file) if remote is None else remote.size
    text = at.text(size, "the header")
    if not text.startswith("{"):
        raise FormatError(
            f"the header starts with {text[:1]!r}, not with '{{'", code="safetensors.bad-header-start", path=path, offset=8
        )
    listed = json_object(text, "the header", path, 8)
    metadata = listed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ is not a map of texts", code="safetensors.bad-metadata", path=path, offset=8)
    entries = sorted((_entry(name, item, at) for name, item in listed.items()), key=lambda e: (e.start, e.stop))
    end = at.offset
    for entry in entries:
        if entry.start != end:
            what = "overlaps what lies before it" if entry.start < end else f"leaves {entry.start - end} bytes to nobody"
            raise FormatError(
                f"begins at {entry.start}, {what}",
                code="safetensors.not-contiguous", path=path, tensor=entry.name, offset=entry.start,
            )  # fmt: skip
        end = entry.stop
    if end > file_size:
        last = next(e for e in entries if e.stop > file_size)
        raise FormatError(f"needs bytes {last.start}..{last.stop}, the file ends at {file_size}",
                          code="reading.tensor-beyond-end", path=path, tensor=last.name, offset=last.start)  # fmt: skip
    if end < file_size:
        raise FormatError(f"{file_size - end} bytes follow the last tensor", code="reading.trailing-bytes", path=path, offset=end)
    return SafetensorsHeader(path, entries, metadata, at.offset, file, remote)


def _entry(name: str, item: Any, at: Cursor) -> SafetensorsEntry:
    where: dict[str, Any] = {"path": at.path, "tensor": name, "offset": 8}
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            "its header entry does not consist of dtype, shape and data_offsets", code="safetensors.bad-entry", **where
        )
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        if dtype in FOREIGN:
            raise UnsupportedError(
                f"is {dtype}; weights are handled as {', '.join(DTYPES)}", code="safetensors.unsupported-dtype", **where
            )
        raise FormatError(f"unknown dtype {dtype!r}", code="safetensors.unknown-dtype", **where)
    if not _wholes(shape) or not shape or 0 in shape or len(shape) > 4:
        raise FormatError(f"has the impossible shape {shape!r}", code="reading.impossible-dimensions", **where)
    if not _wholes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"has the impossible data_offsets {offsets!r}", code="safetensors.bad-offsets", **where)
    start, stop = (at.offset + n for n in offsets)
    if not kind.fits(tuple(shape), stop - start):
        law = f"{kind.name} of shape {shape} takes {kind.nbytes(tuple(shape))}"
        raise FormatError(f"{stop - start} bytes break the size law: {law}", code="safetensors.size-law", **where)
    return SafetensorsEntry(name, kind, tuple(shape), start, stop)


def _wholes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**62 for n in values)


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SafetensorsPlan:
    """One tensor to be written, and where its bytes come from, in chunks."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Any]]


def pack_header(plans: Iterable[SafetensorsPlan], metadata: dict[str, str]) -> bytes:
    """The bytes in front of the data of `plans`, in that order, as the `safetensors` package would write them."""
    listed: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for plan in plans:
        if plan.type not in _NAMES:
            raise UnsupportedError(
                f"is {plan.type.name}, which SafeTensors does not have", code="conversion.type-not-in-format", tensor=plan.name
            )
        stop = offset + plan.type.nbytes(plan.shape)
        listed[plan.name] = {"dtype": _NAMES[plan.type], "shape": list(plan.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * padding(len(text), ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write(
    output: str | Path,
    plans: Iterable[SafetensorsPlan],
    metadata: dict[str, str],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a SafeTensors file under a temporary name and rename it when it is whole; its size in bytes.

    Tensors are laid out by name, as the `safetensors` package does for one dtype; `progress` gets bytes written.
    """
    plans = sorted(plans, key=lambda p: p.name)
    front = pack_header(plans, metadata)
    with atomic(Path(output)) as file:
        size = write_all(file, front)
        for plan in plans:
            before = size
            for chunk in plan.chunks():
                size += (written := write_all(file, chunk))
                if progress is not None:
                    progress(written)
            if size - before != plan.type.nbytes(plan.shape):
                raise FormatError(
                    f"gave {size - before} bytes, {plan.type.nbytes(plan.shape)} were planned",
                    code="writing.length-differs", tensor=plan.name,
                )  # fmt: skip
    return size
