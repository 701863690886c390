"""GGUF, versions 2 and 3: a header reader of our own and a writer that reproduces every byte.

The `gguf` package needs seconds and half a gigabyte for a vocabulary of 150,000 tokens because it makes an array of
every string; here string arrays stay offsets into the file until they are needed. Layout: ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats.gguf_header import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    DTYPES,
    MAGIC,
    SCALARS,
    STRING,
    VALUE_TYPES,
    Field,
    FieldView,
    Header,
    Strings,
    TensorInfo,
)
from aprlab.formats.gguf_meaning import config, optional, tokenizer
from aprlab.formats.reading import Cursor, Span, check_spans, padding
from aprlab.model import keys
from aprlab.model.content import map_file
from aprlab.model.model import Model
from aprlab.model.remote import RemoteFile, content_at, open_url, url_of
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType

FIRST_READ, MOST_READ = 1 << 20, 1 << 28  # bytes of a remote file that are fetched for its header


def read_header(path: str | Path) -> Header:
    """Read and check the header: counts, lengths, duplicates. Nothing is allocated by a number from the file.

    Raises:
        FormatError: with the offset, where a rule is broken or the file ends too early.
        UnsupportedError: version 1, big-endian files, nested arrays.
    """
    path = Path(path)
    if (url := url_of(path)) is not None:
        return _read_remote(open_url(url))
    file = map_file(path)
    return _parse_header(path, file, len(file))


def _read_remote(remote: RemoteFile) -> Header:
    """The header of a file at a URL: its beginning is fetched, twice as much each time, until the header is whole."""
    have = min(FIRST_READ, remote.size)
    file = remote.read(0, have)
    while True:
        try:
            header = _parse_header(remote.path, file, remote.size)
        except FormatError as error:
            if error.code not in ("reading.truncated", "gguf.implausible-count") or have >= min(remote.size, MOST_READ):
                raise
        else:
            header.remote = remote
            return header
        more = min(2 * have, remote.size, MOST_READ)
        file, have = np.concatenate([file, remote.read(have, more)]), more


def _parse_header(path: Path, file: np.ndarray, file_size: int) -> Header:
    """The header at the beginning of `file`, ``uint8``, of which the whole has `file_size` bytes."""
    at = Cursor(file.data, path)
    magic = bytes(at.data[: at.need(4, "the magic") + 4])
    if magic != MAGIC:
        raise FormatError(f"is not GGUF: starts with {magic.hex(' ')}", code="gguf.bad-magic", path=path, offset=0)
    version = at.unpack("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = "a big-endian GGUF file" if swapped in (1, 2, 3) else f"GGUF version {version}"
        raise UnsupportedError(
            f"{kind} is not handled (versions 2 and 3 are)", code="gguf.unsupported-version", path=path, offset=4
        )
    tensor_count, field_count = at.unpack("Q", "the tensor count"), at.unpack("Q", "the key-value count")
    _plausible(at, tensor_count, 8 + 4 + 8 + 4 + 8, "tensors", 8)  # an empty name, one dimension
    _plausible(at, field_count, 8 + 4 + 1, "key-value pairs", 16)

    fields: dict[str, Field] = {}
    for _ in range(field_count):
        item = _read_field(at)
        if item.key in fields:
            raise FormatError(f"key {item.key!r} is listed twice", code="gguf.duplicate-key", path=path, offset=item.offset)
        fields[item.key] = item
    infos: list[TensorInfo] = []
    seen: set[str] = set()
    for _ in range(tensor_count):
        info = _read_info(at)
        if info.name in seen:
            raise FormatError("is listed twice", code="reading.duplicate-tensor", path=path, tensor=info.name, offset=info.at)
        seen.add(info.name)
        infos.append(info)

    alignment = DEFAULT_ALIGNMENT
    if (found := fields.get("general.alignment")) is not None:
        if found.type != VALUE_TYPES.index("uint32") or found.value < 8 or found.value & (found.value - 1):
            raise FormatError(
                f"general.alignment is {found.value!r} ({found.type_name}); it must be a uint32, a power of two, at least 8",
                code="gguf.bad-alignment", path=path, offset=found.offset,
            )  # fmt: skip
        alignment = found.value
    data_offset = at.offset + padding(at.offset, alignment)
    return Header(path, version, fields, infos, alignment, data_offset, file_size, file)


def _plausible(at: Cursor, count: int, least: int, what: str, offset: int) -> None:
    left = at.size - at.offset
    if count * least > left:
        raise FormatError(
            f"claims {count} {what}, at least {count * least} bytes, but only {left} are left",
            code="gguf.implausible-count", path=at.path, offset=offset,
        )  # fmt: skip


def _read_string(at: Cursor, what: str) -> str:
    return at.text(at.unpack("Q", f"the length of {what}"), what)


def _read_field(at: Cursor) -> Field:
    start = at.offset
    key = _read_string(at, "a key")
    number = at.unpack("I", f"the type of {key!r}")
    if number == ARRAY:
        element = at.unpack("I", f"the element type of {key!r}")
        count = at.unpack("Q", f"the length of {key!r}")
        return Field(key, number, _read_array(at, key, element, count), element, start)
    return Field(key, number, _read_value(at, key, number), None, start)


def _read_value(at: Cursor, key: str, number: int) -> Any:
    if number == STRING:
        return _read_string(at, f"the value of {key!r}")
    code = _scalar_code(at, key, number)
    value = at.unpack("B" if code == "?" else code, f"the value of {key!r}")
    if code != "?":
        return value
    if value > 1:
        raise FormatError(f"{key!r} is a bool of value {value}", code="gguf.bad-bool", path=at.path, offset=at.offset - 1)
    return bool(value)


def _scalar_code(at: Cursor, key: str, number: int) -> str:
    code = SCALARS[number] if number < len(SCALARS) else None
    if code is None:
        raise FormatError(
            f"{key!r} has the unknown value type {number}", code="gguf.unknown-value-type", path=at.path, offset=at.offset - 4
        )
    return code


def _read_array(at: Cursor, key: str, element: int, count: int) -> Any:
    if element == ARRAY:
        raise UnsupportedError(f"{key!r} is an array of arrays", code="gguf.nested-array", path=at.path, offset=at.offset)
    if element == STRING:
        _plausible(at, count, 8, f"strings in {key!r}", at.offset - 8)
        starts, stops = _string_spans(at, key, count)
        return Strings(memoryview(at.data), starts, stops, at.path)
    dtype = DTYPES[element] if _scalar_code(at, key, element) else None
    assert dtype is not None
    _plausible(at, count, dtype.itemsize, f"values in {key!r}", at.offset - 8)
    start = at.need(count * dtype.itemsize, f"the values of {key!r}")
    values = np.frombuffer(at.data, dtype, count, start)
    if VALUE_TYPES[element] == "bool" and (values > 1).any():
        raise FormatError(f"{key!r} holds a bool above 1", code="gguf.bad-bool", path=at.path, offset=start)
    return values


def _string_spans(at: Cursor, key: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `count` strings starts and stops, int64 ``(count,)``; a real vocabulary has 300,000 of them."""
    first, found, single = at.offset, array("q"), FEW  # eight bytes a string, where a list of Python's numbers takes forty
    while len(found) < count:
        some = _short_strings(at, count - len(found))
        found.frombytes(some.tobytes())
        at.offset = found[-1] if found else first
        if len(some) >= MANY:
            single = FEW
            continue
        # an empty string, one of 256 bytes or more, a NUL: text does not look so, this file does
        wanted = min(len(found) + single, count)
        _strings_one_by_one(at, found, wanted)
        single = min(2 * single, 1 << 16)
        if len(found) < wanted:
            said = f"ends inside string {len(found)} of {key!r}"
            raise FormatError(said, code="reading.truncated", path=at.path, offset=at.offset)
    stops = np.frombuffer(found, np.int64) if found else np.empty(0, np.int64)
    starts = np.empty_like(stops)  # each behind its length, and that behind the last one
    starts[:1], starts[1:] = first, stops[:-1]
    starts += 8
    return starts, stops


FEW, MANY = 16, 2000  # strings that are read one by one where it must be; as many as repay a look at all bytes of a window
_WINDOW = 1 << 17  # bytes: fits a core's cache


def _short_strings(at: Cursor, most: int) -> np.ndarray:
    """Where strings stop that follow each other from here on, int64: those that one look at the next bytes finds, maybe none.

    A length below 256 is a byte with seven zeros behind it. Each string must begin where the one before it stops, so that
    nothing in a text is taken for a length.
    """
    window = np.frombuffer(at.data, np.uint8)[at.offset : at.offset + _WINDOW]
    there = np.flatnonzero(window)
    lengths = there[:-1][np.diff(there) == 8]
    if not len(lengths) or lengths[0]:
        return np.empty(0, np.int64)
    stops = lengths + 8 + window[lengths]
    broken = np.flatnonzero(stops[:-1] != lengths[1:])
    stops = stops[: min(most, int(broken[0]) + 1 if len(broken) else len(stops))] + at.offset
    return stops[: np.searchsorted(stops, at.size, "right")]


def _strings_one_by_one(at: Cursor, found: array[int], wanted: int) -> None:
    """Add to `found` where strings of any length stop, until there are `wanted`, or the file ends."""
    position, length = at.offset, struct.Struct("<Q").unpack_from
    with suppress(struct.error):  # not even a length is left
        while len(found) < wanted:
            position += 8 + length(at.data, position)[0]
            if position > at.size:
                break
            found.append(position)
            at.offset = position


def _read_info(at: Cursor) -> TensorInfo:
    start = at.offset
    name = _read_string(at, "a tensor name")
    dims = at.unpack("I", f"the number of dimensions of {name!r}")
    if not 1 <= dims <= 4:
        raise FormatError(
            f"has {dims} dimensions; GGUF allows 1 to 4",
            code="gguf.dimension-count", path=at.path, tensor=name, offset=at.offset - 4,
        )  # fmt: skip
    ne = tuple(at.unpack("Q", f"a dimension of {name!r}") for _ in range(dims))
    code, offset = at.unpack("I", f"the type of {name!r}"), at.unpack("Q", f"the offset of {name!r}")
    return TensorInfo(name, ne, code, offset, start)


def tensor_type(header: Header, info: TensorInfo) -> TensorType:
    """The type of a tensor, checked: known code, GGUF's own (not APR's), rows of whole blocks."""
    try:
        kind = types.by_code(info.code)
    except UnsupportedError as error:
        raise FormatError(error.message, code="gguf.unknown-type", path=header.path, tensor=info.name, offset=info.at) from None
    if kind in (types.APR_Q4, types.APR_Q8):
        raise FormatError(
            f"unknown tensor type code {info.code}",
            code="gguf.unknown-type", path=header.path, tensor=info.name, offset=info.at,
        )  # fmt: skip
    try:
        kind.row_bytes(info.ne[0])
    except UnsupportedError as error:
        raise FormatError(
            error.message, code="gguf.row-not-whole-blocks", path=header.path, tensor=info.name, offset=info.at
        ) from None
    return kind


def open_model(path: str | Path) -> Model:
    """Open a GGUF file: header, config, tokenizer data, tensors as views. Checks every span before anything is decoded."""
    return model_of(read_header(path))


def model_of(header: Header) -> Model:
    """The file whose header this is, as a model; raises for the first rule that its tensors break."""
    split = optional(header, "split.count", int)
    if split is not None and split > 1:
        raise UnsupportedError(
            f"is one part of a model split into {split} files; join them first (llama-gguf-split --merge)",
            code="gguf.split-file", path=header.path,
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    warnings: list[str] = []
    for part in header.parts or (header,):
        spans = _add_tensors(part, tensors)
        warnings += _notes(part, spans)
    split_in = f", {len(header.parts)} files" if header.parts else ""
    return Model(
        path=header.path,
        format="gguf",
        dialect=f"gguf v{header.version}{split_in}",
        tensors=tensors,
        metadata=FieldView(header),
        make_config=lambda: config(header),
        make_tokenizer=tokenizer(header),
        warnings=warnings,
        header={"version": header.version, "alignment": header.alignment, "data_offset": header.data_offset},
    )


def _add_tensors(header: Header, tensors: dict[str, Tensor]) -> list[Span]:
    """The tensors of one file, put into `tensors`; their spans."""
    spans: list[Span] = []
    for info in header.infos:
        if 0 in info.ne or np.prod([float(n) for n in info.ne]) > 2**62:
            raise FormatError(
                f"has the impossible dimensions {list(info.ne)}",
                code="reading.impossible-dimensions", path=header.path, tensor=info.name, offset=info.at,
            )  # fmt: skip
        kind = tensor_type(header, info)
        if info.offset % header.alignment:
            raise FormatError(
                f"data offset {info.offset} is not a multiple of the alignment {header.alignment}",
                code="reading.unaligned-tensor", path=header.path, tensor=info.name, offset=info.at,
            )  # fmt: skip
        shape = info.ne[::-1]
        start = header.data_offset + info.offset
        spans.append(Span(info.name, start, start + kind.nbytes(shape)))
        raw = content_at(header.file, header.remote, start, spans[-1].stop)
        tensors[info.name] = Tensor(info.name, kind, shape, raw, Origin(header.path, info.name, start))
    check_spans(spans, header.file_size, header.path)
    _check_layout(header, spans)
    return spans


def _check_layout(header: Header, spans: Sequence[Span]) -> None:
    """The tensors one after the other in the order of the table, with padding and nothing else between; so llama.cpp has it."""
    end = header.data_offset
    for span, info in zip(spans, header.infos, strict=True):
        expected = end + padding(end - header.data_offset, header.alignment)
        if span.start != expected:
            raise FormatError(
                f"has offset {info.offset}, expected {expected - header.data_offset}: tensors are in another order or have gaps "
                "between them, and llama.cpp refuses such a file. Try: aprlab repair FILE -o FIXED.gguf",
                code="gguf.gap", path=header.path, tensor=info.name, offset=info.at,
            )  # fmt: skip
        end = span.stop


def _notes(header: Header, spans: Sequence[Span]) -> list[str]:
    """What is unusual, and does no harm here."""
    found = []
    name = header.value("general.architecture")
    defaults = {f"{name}.{key}": f"{value:g}" for key, value in keys.DEFAULTS.items()}
    defaults["tokenizer.ggml.token_type"] = "all tokens are normal, but those that end an answer"
    for key, default in defaults.items():
        if key not in header.fields and name is not None:  # a later part of several has no keys
            found.append(f"has no key {key!r}; taken as llama.cpp takes it: {default}")
    last = max((span.stop for span in spans), default=header.file_size)
    lacks = last + padding(last - header.data_offset, header.alignment) - header.file_size
    if lacks > 0:
        found.append(f"ends without the last {lacks} bytes of padding; llama.cpp loads such a file, too")
    return found


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pack_field(item: Field) -> bytes:
    """The bytes of a key-value pair; raises ValueError or struct.error for a value that its type cannot hold."""
    head = _pack_string(item.key) + struct.pack("<I", item.type)
    if item.element is None:
        return head + (_pack_string(item.value) if item.type == STRING else struct.pack(f"<{SCALARS[item.type]}", item.value))
    head += struct.pack("<IQ", item.element, len(item.value))
    if item.element == STRING:
        return head + b"".join(map(_pack_string, item.value))
    values = np.asarray(item.value)
    made = values.astype(DTYPES[item.element])
    if values.shape != (len(item.value),) or (made.dtype.kind != "f" and not np.array_equal(made, values)):
        raise ValueError(f"key {item.key!r} holds something that is no {VALUE_TYPES[item.element]}")
    return head + made.tobytes()


def _pack_info(info: TensorInfo) -> bytes:
    return _pack_string(info.name) + struct.pack(f"<I{len(info.ne)}QIQ", len(info.ne), *info.ne, info.code, info.offset)


def gives_back(header: Header) -> bool:
    """Whether `pack_header` makes the same bytes that `header` was read from.

    It does not where the padding in front of the data is not zero, nor for a NaN whose bits Python changes. Strings and
    table rows have only one spelling, so that the long arrays need not be looked at.
    """
    last = header.infos[-1]
    if header.bytes_of(last.at + len(_pack_info(last)), header.data_offset).any():
        return False
    packed = ((item.offset, pack_field(item)) for item in header.fields.values() if not isinstance(item.value, Strings))
    return all(header.file[at : at + len(raw)].tobytes() == raw for at, raw in packed)


def field_of(key: str, type_name: str, value: Any) -> Field:
    """A key-value pair whose type is given by name, as `Field.type_name` has it."""
    inner = type_name.removeprefix("array[").removesuffix("]")
    number = VALUE_TYPES.index(inner)
    return Field(key, number, value) if inner == type_name else Field(key, ARRAY, value, number)


def pack_header(
    fields: Sequence[Field], infos: Sequence[TensorInfo], *, version: int = 3, alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """The bytes in front of the data, padded to `alignment`. `TensorInfo.offset` is written unchanged."""
    parts = [MAGIC, struct.pack("<IQQ", version, len(infos), len(fields))]
    parts += map(pack_field, fields)
    parts += map(_pack_info, infos)
    head = b"".join(parts)
    return head + bytes(padding(len(head), alignment))


def layout(tensors: Sequence[tuple[str, TensorType, tuple[int, ...]]], alignment: int = DEFAULT_ALIGNMENT) -> list[TensorInfo]:
    """Offsets as ggml lays tensors out: in order, each on a multiple of `alignment`. Shapes are NumPy's."""
    infos, offset = [], 0
    for name, kind, shape in tensors:
        infos.append(TensorInfo(name, tuple(shape[::-1]), kind.code, offset, 0))
        offset += kind.nbytes(tuple(shape))
        offset += padding(offset, alignment)
    return infos
