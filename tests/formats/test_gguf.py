"""The GGUF reader against the `gguf` package's, and the writer against the reader."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.formats import gguf, open_model
from aprlab.formats.reading import Cursor


def assert_same_as_the_package(path: Path) -> None:
    """Every field with its types and value, every tensor with its shape, type, offset and bytes."""
    ours, theirs = gguf.read_header(path), GGUFReader(path)
    listed = [f for f in theirs.fields.values() if not f.name.startswith("GGUF.")]
    assert [f.name for f in listed] == list(ours.fields)
    for field in listed:
        found = ours.fields[field.name]
        assert [int(t) for t in field.types[:2]] == [found.type, *([] if found.element is None else [found.element])]
        some = slice(None, None, 1 if len(field.data) < 10_000 else 101)  # the package takes its time
        value, contents = found.value, field.contents(some) if found.element is not None else field.contents()
        if isinstance(value, np.ndarray):
            value = value[some].tolist()
        elif isinstance(value, gguf.Strings):
            assert len(value) == len(field.data)
            value = list(value)[some]
        assert value == contents, field.name
    model = open_model(path)
    assert [t.name for t in theirs.tensors] == list(model.tensors)
    for tensor, found in zip(theirs.tensors, model.tensors.values(), strict=True):
        assert (tuple(tensor.shape.tolist()), int(tensor.tensor_type)) == (found.ne, found.type.code)
        assert int(tensor.data_offset) == found.origin.offset
        assert np.array_equal(np.asarray(tensor.data).reshape(-1).view(np.uint8), found.raw)


def test_embedded_model_against_the_package(tiny: Path) -> None:
    assert_same_as_the_package(tiny)


@pytest.mark.real
def test_real_model_against_the_package(real_05b: Path) -> None:
    assert_same_as_the_package(real_05b)


SCALARS: list[tuple[str, Any, GGUFValueType]] = [
    ("u8", 255, GGUFValueType.UINT8), ("i8", -128, GGUFValueType.INT8), ("u16", 65535, GGUFValueType.UINT16),
    ("i16", -32768, GGUFValueType.INT16), ("u32", 2**32 - 1, GGUFValueType.UINT32), ("i32", -(2**31), GGUFValueType.INT32),
    ("f32", 0.1, GGUFValueType.FLOAT32), ("bool", True, GGUFValueType.BOOL), ("string", "grüße 你好", GGUFValueType.STRING),
    ("u64", 2**64 - 1, GGUFValueType.UINT64), ("i64", -(2**63), GGUFValueType.INT64), ("f64", 0.1, GGUFValueType.FLOAT64),
]  # fmt: skip


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """A file with every value type, arrays of each, and tensors of odd sizes."""
    path = tmp_path / "varied.gguf"
    writer = GGUFWriter(path, "qwen2")
    for name, value, kind in SCALARS:
        writer.add_key_value(f"scalar.{name}", value, kind)
        writer.add_key_value(f"array.{name}", [value, value], GGUFValueType.ARRAY, sub_type=kind)
    rng = np.random.default_rng(7)
    writer.add_tensor("vector", rng.standard_normal(5).astype(np.float32))
    writer.add_tensor("matrix", rng.standard_normal((3, 7)).astype(np.float16))
    writer.add_tensor("cube", rng.standard_normal((2, 3, 5)).astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def test_every_value_type(varied: Path) -> None:
    assert_same_as_the_package(varied)
    header = gguf.read_header(varied)
    assert header.value("scalar.u64") == 2**64 - 1
    assert header.value("scalar.f32") == pytest.approx(0.1, rel=1e-7)
    assert header.fields["array.string"].type_name == "array[string]"
    assert header.value("array.bool").tolist() == [1, 1]


@pytest.mark.parametrize("which", ["tiny", "varied"])
def test_the_writer_gives_the_header_back(which: str, request: pytest.FixtureRequest) -> None:
    header = gguf.read_header(request.getfixturevalue(which))
    front = gguf.pack_header(list(header.fields.values()), header.infos, version=header.version, alignment=header.alignment)
    assert front == header.file[: header.data_offset].tobytes()
    tensors = [(i.name, gguf.tensor_type(header, i), i.ne[::-1]) for i in header.infos]
    assert [i.offset for i in gguf.layout(tensors, header.alignment)] == [i.offset for i in header.infos]


def test_strings_are_a_sequence(tiny: Path) -> None:
    tokens = gguf.read_header(tiny).value("tokenizer.ggml.tokens")
    assert tokens[-1] == list(tokens)[-1] and tokens[2:5] == list(tokens)[2:5]
    assert tokens == list(tokens) and tokens != list(tokens)[1:]
    assert len(tokens) == len(list(tokens)) > 100


def patched(path: Path, offset: int, data: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    out = path.with_name("patched.gguf")
    out.write_bytes(raw)
    return out


def test_a_split_file_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    header = gguf.read_header(tiny)
    fields = [*header.fields.values(), gguf.Field("split.count", 2, 3), gguf.Field("split.no", 2, 1)]
    path = tmp_path / "part.gguf"
    path.write_bytes(gguf.pack_header(fields, header.infos) + header.file[header.data_offset :].tobytes())
    with pytest.raises(UnsupportedError, match="part 2 of 3 of a model split into 3 files"):
        open_model(path)


def test_keys_of_another_type_are_one_line(tiny: Path, tmp_path: Path) -> None:
    header = gguf.read_header(tiny)
    count = len(header.value("tokenizer.ggml.tokens"))
    path = tmp_path / "odd.gguf"
    for field in (
        gguf.field_of("split.count", "string", "two"),
        gguf.field_of("split.count", "array[uint8]", [1, 2]),
        gguf.field_of("tokenizer.ggml.token_type", "array[float32]", np.ones(count)),
        gguf.field_of("qwen2.block_count", "uint32", 2**32 - 1),
    ):
        fields = {**header.fields, field.key: field}
        path.write_bytes(gguf.pack_header(list(fields.values()), header.infos) + header.file[header.data_offset :].tobytes())
        with pytest.raises(FormatError, match=field.key.rpartition(".")[2]):
            model = open_model(path)
            assert model.config and model.tokenizer


def test_a_field_is_made_by_the_name_of_its_type(varied: Path) -> None:
    for field in gguf.read_header(varied).fields.values():
        made = gguf.field_of(field.key, field.type_name, field.value)
        assert (made.type, made.element, made.type_name) == (field.type, field.element, field.type_name)
    with pytest.raises(ValueError, match="holds something that is no uint8"):
        gguf.pack_header([gguf.field_of("x", "array[uint8]", [1, -1])], [])


def test_a_count_that_the_table_cannot_hold(tmp_path: Path) -> None:
    """A row has at least an empty name and one dimension: 32 bytes."""
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 10, 0) + bytes(319))
    with pytest.raises(FormatError, match="claims 10 tensors, at least 320 bytes"):
        gguf.read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("offset", "data", "kind", "message"),
    [
        (0, b"GGML", FormatError, "neither GGUF nor APR"),
        (4, struct.pack("<I", 1), UnsupportedError, "version 1"),
        (4, struct.pack(">I", 3), UnsupportedError, "big-endian"),
        (8, struct.pack("<Q", 2**60), FormatError, "claims 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 2**63), FormatError, "key-value pairs"),
        (24, struct.pack("<Q", 2**64 - 1), FormatError, "ends inside a key"),
        (32, b"\xff\xfe", FormatError, "not UTF-8"),
    ],
)
def test_a_bad_header_is_one_clear_line(
    varied: Path, offset: int, data: bytes, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_model(patched(varied, offset, data))
    assert "\n" not in str(caught.value) and "patched.gguf" in str(caught.value)


def rewritten(varied: Path, **changes: Any) -> Path:
    """The varied file with one tensor's row changed."""
    header = gguf.read_header(varied)
    infos = [replace(i, **changes) if i.name == "matrix" else i for i in header.infos]
    out = varied.with_name("rewritten.gguf")
    out.write_bytes(gguf.pack_header(list(header.fields.values()), infos) + header.file[header.data_offset :].tobytes())
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": 130}, "unknown tensor type code 130"),
        ({"code": 4}, "type code 4 is Q4_2"),
        ({"code": 33}, "type code 33 is Q4_0_8_8"),
        ({"code": 128}, "unknown tensor type code 128"),
        ({"code": 12}, "does not hold whole Q4_K blocks"),
        ({"ne": (0, 3)}, "impossible dimensions"),
        ({"ne": (2**32, 2**32)}, "impossible dimensions"),
        ({"ne": (2**20, 2**20)}, "the data ends at"),
        ({"ne": (1,) * 5}, "5 dimensions"),
        ({"offset": 33}, "multiple of the alignment"),
        ({"offset": 0}, "overlaps tensor"),
        ({"offset": 2**40}, "the data ends at"),
        ({"name": "vector"}, "twice"),
    ],
)
def test_a_bad_tensor_is_named(varied: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        open_model(rewritten(varied, **changes))
    assert caught.value.tensor == changes.get("name", "matrix") or "cube" in str(caught.value) or "vector" in str(caught.value)


def test_truncated_anywhere(varied: Path, tmp_path: Path) -> None:
    whole = varied.read_bytes()
    last = max(t.origin.offset + t.nbytes for t in open_model(varied).tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in range(last):
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_model(cut)


def test_missing_keys_are_named(varied: Path) -> None:
    model = open_model(varied)
    with pytest.raises(FormatError, match=r"qwen2\.block_count"):
        model.config  # noqa: B018
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.tokens"):
        model.tokenizer  # noqa: B018


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        open_model(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        open_model(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="starts with nothing"):
        open_model(tmp_path / "empty.gguf")


def test_nothing_is_dequantised_until_asked(tiny: Path) -> None:
    model = open_model(tiny)
    tensor = model.tensors["blk.0.ffn_down.weight"]
    assert tensor.raw.base is not None and not tensor.raw.flags.writeable
    assert tensor.shape == tensor.ne[::-1] and tensor.rows * tensor.cols == tensor.size
    assert tensor.blocks().shape == (tensor.rows, tensor.type.row_bytes(tensor.cols))
    some = tensor.dequantise(slice(3, 9))
    assert np.array_equal(some, tensor.dequantise()[3:9])


def test_a_scale_that_is_no_number_is_found(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    tensor = model.tensors["blk.3.ffn_gate.weight"]
    block = 5
    at = tensor.origin.offset + block * tensor.type.block_bytes
    out = tmp_path / "nan.gguf"
    raw = bytearray(tiny.read_bytes())
    raw[at + 2 : at + 4] = struct.pack("<H", 0x7E00)  # Q4_K: d, then dmin
    out.write_bytes(raw)
    model.check_values()
    with pytest.raises(FormatError, match=r"block 5 has a scale that is not a finite number") as caught:
        open_model(out).check_values()
    assert (caught.value.tensor, caught.value.offset) == (tensor.name, at)


@pytest.mark.parametrize(
    "strings",
    [[], ["one"], ["", "", ""], ["a", "", "Ġnaïve 中文 🙂", "b" * 70_000], ["a\0b", "c"], ["\0", ""], ["x" * 128, "y" * 255],
     [("é" * (n % 300))[: n % 97 or 300] for n in range(4000)], ["word"] * 20_000, ["", "a\0b"] * 1500 + ["end"] * 700],
)
def test_strings_at_once_are_the_strings_one_by_one(strings: list[str], tmp_path: Path) -> None:
    item = gguf.Field("k", gguf.ARRAY, strings, gguf.STRING)
    data = gguf.pack_field(item)
    read = gguf._read_field(Cursor(memoryview(data), tmp_path / "x.gguf")).value
    assert list(read) == [read[i] for i in range(len(read))] == strings
    assert read.checked() is read


def test_a_character_cut_between_two_strings_is_not_utf8(tmp_path: Path) -> None:
    """Both halves would be one sound character if the strings were decoded together."""
    data = gguf.pack_field(gguf.Field("k", gguf.ARRAY, ["ab", "cd", "e"], gguf.STRING))
    head = data.index(b"ab")
    data = data[: head + 1] + b"\xc3" + data[head + 2 : head + 10] + b"\xa4" + data[head + 11 :]
    read = gguf._read_field(Cursor(memoryview(data), tmp_path / "x.gguf")).value
    with pytest.raises(FormatError, match="string is not UTF-8"):
        list(read)
    with pytest.raises(FormatError, match="string is not UTF-8"):
        read.checked()


@pytest.mark.parametrize("length", [2, 0xA4, 0x1A4])
def test_a_length_does_not_go_on_with_a_character(length: int, tmp_path: Path) -> None:
    """The first string ends in half a character, and the length behind it has, or had, the byte of its other half."""
    data = gguf.pack_field(gguf.Field("k", gguf.ARRAY, ["ab", "c" * length], gguf.STRING))
    data = data.replace(b"ab", b"a\xc3")
    read = gguf._read_field(Cursor(memoryview(data), tmp_path / "x.gguf")).value
    with pytest.raises(FormatError, match="string is not UTF-8") as error:
        read.checked()
    assert error.value.offset == data.index(b"\xc3")


def test_a_vocabulary_of_which_only_the_sizes_are_asked_is_checked_as_the_whole(tiny: Path, tmp_path: Path) -> None:
    glance, whole = open_model(tiny).tokenizer_glance(), open_model(tiny).tokenizer
    assert isinstance(glance.tokens, gguf.Strings) and isinstance(glance.merges, gguf.Strings)
    assert (list(glance.tokens), list(glance.merges)) == (whole.tokens, whole.merges)
    assert replace(glance, tokens=whole.tokens, merges=whole.merges) == whole
    raw = tiny.read_bytes()
    for text in (whole.tokens[-1], whole.merges[-1]):
        packed = struct.pack("<Q", len(text.encode())) + text.encode()
        (tmp_path / "bad.gguf").write_bytes(raw.replace(packed, packed[:-1] + b"\xff"))
        said = []
        for ask in (lambda model: model.tokenizer_glance(), lambda model: model.tokenizer):
            with pytest.raises(FormatError, match="not UTF-8") as error:
                ask(open_model(tmp_path / "bad.gguf"))
            said.append(str(error.value))
        assert said[0] == said[1]


@pytest.mark.parametrize("left", [0, 3, 8, 9, 10, 17, 18, 19])
def test_a_list_of_strings_that_ends_too_early_says_which(left: int, tmp_path: Path) -> None:
    """The offset is that of the string's length: the second string starts 10 bytes behind the first."""
    data = gguf.pack_field(gguf.Field("k", gguf.ARRAY, ["ab", "cd"], gguf.STRING))
    first = data.index(b"ab") - 8
    at = Cursor(memoryview(data[: first + left]), tmp_path / "x.gguf", first)
    with pytest.raises(FormatError) as error:
        gguf._string_spans(at, "k", 2)
    assert error.value.code == "reading.truncated"
    assert error.value.offset == first + (10 if left >= 10 else 0)
    assert f"ends inside string {int(left >= 10)} of 'k'" in error.value.message
