"""APR files: dialects, the round trip, the size law, and every way a file can be wrong."""

from __future__ import annotations

import io
import json
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from aprlab.conversion.converter import convert, export
from aprlab.errors import AprlabError, FormatError, NumericError, UnsupportedError
from aprlab.formats import apr, open_model
from aprlab.formats.apr import writer
from aprlab.formats.reading import json_object
from aprlab.model import names
from aprlab.model.model import Model
from aprlab.quants import types


@pytest.fixture(scope="module")
def aprender(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apr") / "tiny.apr"
    convert(tiny, path)
    return path


@pytest.fixture(scope="module")
def realizar(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apr") / "tiny-realizar.apr"
    convert(tiny, path, dialect="realizar")
    return path


def assert_same_model(a: Model, b: Model) -> None:
    assert a.config == b.config and a.tokenizer == b.tokenizer
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert (tensor.type, tensor.shape) == (other.type, other.shape) and np.array_equal(tensor.raw, other.raw), name


# ── the container, byte by byte ───────────────────────────────────────────────────────────────────────────────────


def test_the_header_by_hand(aprender: Path) -> None:
    """Read with `struct` alone, as the format's tables have it."""
    raw = aprender.read_bytes()
    assert raw[:8] == b"APR\0\x02\x00" + struct.pack("<H", 0x0400 | 0x0200 | 0x0020)
    count, metadata_at, metadata_size, index_at, data_at = struct.unpack_from("<IQIQQ", raw, 8)
    assert metadata_at == 64 and index_at == -(-(64 + metadata_size) // 64) * 64 and data_at % 64 == 0
    assert struct.unpack_from("<I", raw, 40)[0] == zlib.crc32(raw[:40] + raw[44:64]) and not any(raw[44:64])
    assert not any(raw[64 + metadata_size : index_at])
    assert struct.unpack("<I", raw[-4:])[0] == zlib.crc32(raw[:-4])
    position, listed = index_at, []
    for _ in range(count):
        (length,) = struct.unpack_from("<H", raw, position)
        name = raw[position + 2 : position + 2 + length].decode()
        position += 2 + length
        code, dims = raw[position], raw[position + 1]
        values = struct.unpack_from(f"<{dims + 2}Q", raw, position + 2)
        position += 2 + 8 * (dims + 2)
        listed.append(name)
        assert values[-2] % 64 == 0
        assert values[-1] == types.by_code(code).nbytes(values[:-2])
    assert listed == sorted(listed) and len(listed) == count == 99
    assert not any(raw[position:data_at]) and data_at - position < 64
    metadata = json.loads(raw[64 : 64 + metadata_size])
    assert metadata["rope_type"] == 2 and metadata["num_layers"] == 8 and metadata["tokenizer.pre_type"] == "qwen2"


def test_dialects_differ_as_their_writers_do(aprender: Path, realizar: Path) -> None:
    a, b = apr.scan(aprender), apr.scan(realizar)
    assert (a.flag_names, b.flag_names) == (["quantized", "has_vocabulary", "row_major"], ["quantized"])
    assert a.footer is not None and b.footer is None
    assert {"num_layers", "num_heads"} <= a.metadata.keys() and {"num_hidden_layers", "num_attention_heads"} <= b.metadata.keys()
    assert "num_layers" not in b.metadata
    by_name = {e.name: e for e in b.entries}
    for entry in a.entries:
        gguf = names.to_gguf(entry.name)
        assert gguf is not None and by_name[gguf].dims == entry.dims[::-1]
    assert [e.name for e in b.entries] != sorted(e.name for e in b.entries)
    assert not a.problems and not b.problems


@pytest.mark.parametrize("which", ["aprender", "realizar"])
def test_the_same_model_comes_back(which: str, tiny: Path, request: pytest.FixtureRequest) -> None:
    model = open_model(request.getfixturevalue(which))
    assert model.dialect == which and not model.warnings
    assert_same_model(open_model(tiny), model)


def test_without_footer(aprender: Path, tiny: Path, tmp_path: Path) -> None:
    """What other writers leave away is not demanded; but a file that promised a footer must have it."""
    dialect = replace(apr.DIALECTS["aprender"], footer=False)
    path = rebuilt(aprender, tmp_path, dialect=dialect)
    model = open_model(path)
    assert model.dialect == "aprender without footer"
    assert_same_model(open_model(tiny), model)
    cut = tmp_path / "cut.apr"
    cut.write_bytes(aprender.read_bytes()[:-4])
    with pytest.raises(FormatError, match="its writer wrote"):
        open_model(cut)


@pytest.mark.parametrize("kind", ["lz4", "zstd"])
def test_compressed_bodies(kind: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.apr"
    report = convert(tiny, path, compress=kind)
    assert report.bytes_out == path.stat().st_size
    model = open_model(path)
    assert model.header["compression"] == kind
    assert_same_model(open_model(tiny), model)
    export(path, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == tiny.read_bytes()


def test_more_than_one_lz4_block_holds_is_refused_before_a_byte(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LZ4_LIMIT", 1_000_000)
    with pytest.raises(UnsupportedError, match="use zstd"):
        convert(tiny, tmp_path / "a.apr", compress="lz4", progress=lambda n: pytest.fail("written already"))
    assert list(tmp_path.iterdir()) == []


def test_zstd_is_a_stream_both_ways(tmp_path: Path) -> None:
    """Neither side holds the body, and a file that takes writes in parts gets all of it."""
    body = np.random.default_rng(1).integers(0, 256, 24 << 20, np.uint8)
    plan = apr.Plan("x", 0, (len(body) // 4,), len(body), lambda: iter([body.data]))
    tracemalloc.start()
    try:
        apr.write(tmp_path / "a.apr", {}, [plan], apr.DIALECTS["realizar"], compress="zstd")
        box = apr.scan(tmp_path / "a.apr")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(box.bytes_of(box.entries[0]), body) and peak < 20 << 20, peak

    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:5000])

    slow = Slow()
    writer.compress_body(body[:100_000], "zstd", slow)
    assert zstandard.ZstdDecompressor().decompress(slow.getvalue()) == body[:100_000].tobytes()


def test_a_count_that_the_index_cannot_hold(tmp_path: Path) -> None:
    """An entry has at least a name of one byte and one dimension: 29 bytes."""
    index = 28 * 64
    head = bytearray(apr.HEADER.pack(b"APR\0", 2, 0, 0, 64, 64, 0, 64, 64 + index, 0))
    head[40:44] = struct.pack("<I", apr.header_crc(bytes(head)))
    (tmp_path / "m.apr").write_bytes(bytes(head) + bytes(index))
    with pytest.raises(FormatError, match="claims 64 tensors, at least 1856 bytes"):
        apr.scan(tmp_path / "m.apr")


# ── dtype bytes ───────────────────────────────────────────────────────────────────────────────────────────────────


def container(code: int, shape: tuple[int, ...], size: int) -> tuple[apr.Container, apr.Entry]:
    entry = apr.Entry("t", code, shape, 0, size)
    return apr.Container(Path("x"), b"APR\0", (2, 0), 0, 64, 0, 64, 64, {}, [entry], np.zeros(64 + size, np.uint8)), entry


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (8, types.Q8_0), (8, types.APR_Q4), (9, types.Q8_1), (9, types.APR_Q8), (3, types.Q4_1), (3, types.F64),
        (6, types.Q5_0), (6, types.by_name("I8")), (128, types.APR_Q4), (129, types.APR_Q8), (12, types.Q4_K),
    ],
)  # fmt: skip
def test_the_size_law_decides(code: int, kind: types.TensorType) -> None:
    box, entry = container(code, (6, 512), kind.nbytes((6, 512)))
    assert apr.type_of(box, entry, (6, 512)) is kind


def test_where_two_types_fit_the_file_is_refused() -> None:
    box, entry = container(9, (1, 32), 36)  # one Q8_1 block, or AprQ8's scale and 32 values
    with pytest.raises(FormatError, match="ambiguous: 36 bytes fit Q8_1 and AprQ8"):
        apr.type_of(box, entry, (1, 32))


def test_historic_labels_break_the_size_law() -> None:
    """GH-191's writer wrote 8 for Q4_K and 9 for Q6_K: no candidate of 8 or 9 has such a size."""
    for code, kind in ((8, types.Q4_K), (9, types.Q6_K), (10, types.Q8_0), (11, types.Q4_0), (0, types.Q4_K)):
        box, entry = container(code, (3, 512), kind.nbytes((3, 512)))
        if (code, kind) == (8, types.Q4_K):  # 4.5 bits both: AprQ4 and Q4_K cannot be told apart by size
            assert apr.type_of(box, entry, (3, 512)) is types.APR_Q4
            continue
        with pytest.raises(FormatError, match=rf"breaks the size law.*{kind.name}"):
            apr.type_of(box, entry, (3, 512))


def test_u8_is_refused_by_name() -> None:
    box, entry = container(7, (3, 64), 192)
    with pytest.raises(UnsupportedError, match="U8"):
        apr.type_of(box, entry, (3, 64))


# ── files that are wrong ──────────────────────────────────────────────────────────────────────────────────────────


def rebuilt(
    source: Path,
    folder: Path,
    *,
    dialect: apr.Dialect | None = None,
    metadata: Callable[[dict[str, Any]], Any] = lambda m: m,
    entry: Callable[[apr.Plan], apr.Plan] = lambda p: p,
    plans: Callable[[list[apr.Plan]], list[apr.Plan]] = lambda p: p,
) -> Path:
    """Write the file again through the writer, with something changed."""
    box = apr.scan(source)

    def chunks(data: np.ndarray) -> Callable[[], Iterator[Any]]:
        return lambda: iter([np.ascontiguousarray(data).data] if len(data) else [])

    made = [apr.Plan(e.name, e.code, e.dims, e.size, chunks(box.bytes_of(e))) for e in box.entries]
    info = {k: v for k, v in box.metadata.items() if k != "source_metadata"}
    out = folder / "rebuilt.apr"
    apr.write(out, metadata(info), plans([entry(p) for p in made]), dialect or replace(apr.DIALECTS["aprender"], flags=box.flags))
    return out


def sealed(raw: bytearray) -> bytes:
    """Both CRCs made right again, so that only the change itself can be noticed."""
    raw[40:44] = struct.pack("<I", zlib.crc32(raw[:40] + raw[44:64]))
    raw[-4:] = struct.pack("<I", zlib.crc32(raw[:-4]))
    return bytes(raw)


@pytest.mark.parametrize(
    ("offset", "data", "kind", "message"),
    [
        (0, b"APR1", UnsupportedError, "APR1"),
        (0, b"APRN", UnsupportedError, "APRN"),
        (0, b"APRX", FormatError, "41 50 52 58"),
        (4, b"\x03", UnsupportedError, "version 3.0"),
        (6, struct.pack("<H", 0x0404), UnsupportedError, "encrypted"),
        (6, struct.pack("<H", 0x0410), UnsupportedError, "sharded"),
        (6, struct.pack("<H", 0x0800), UnsupportedError, "column-major"),
        (6, struct.pack("<H", 0x8400), FormatError, "flags 0x8000"),
        (8, struct.pack("<I", 2**32 - 1), FormatError, "claims 4294967295 tensors"),
        (12, struct.pack("<Q", 2**63), FormatError, "out of order"),
        (20, struct.pack("<I", 2**31), FormatError, "at most 16777216"),
        (24, struct.pack("<Q", 2**50), FormatError, "out of order"),
        (32, struct.pack("<Q", 2**50), FormatError, "ends inside the index"),
    ],
)
def test_a_bad_header_is_one_clear_line(
    aprender: Path, tmp_path: Path, offset: int, data: bytes, kind: type[AprlabError], message: str
) -> None:
    raw = bytearray(aprender.read_bytes())
    raw[offset : offset + len(data)] = data
    path = tmp_path / "bad.apr"
    path.write_bytes(sealed(raw))
    with pytest.raises(kind, match=message) as caught:
        open_model(path)
    assert "\n" not in str(caught.value) and "bad.apr" in str(caught.value)


def test_crcs_are_checked(aprender: Path, tmp_path: Path) -> None:
    raw = bytearray(aprender.read_bytes())
    raw[50] ^= 1  # reserved byte of the header
    (tmp_path / "h.apr").write_bytes(raw)
    with pytest.raises(FormatError, match="header CRC"):
        open_model(tmp_path / "h.apr")
    raw[50] ^= 1
    raw[len(raw) // 2] ^= 16  # somewhere in the weights
    (tmp_path / "d.apr").write_bytes(raw)
    with pytest.raises(FormatError, match="damaged"):
        open_model(tmp_path / "d.apr")
    assert apr.scan(tmp_path / "d.apr", verify=False).problems == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, code=77), "unknown dtype byte 77"),
        (lambda p: replace(p, code=0), "breaks the size law"),
        (lambda p: replace(p, dims=(*p.dims[:-1], p.dims[-1] + 256)), "breaks the size law|expected|has shape"),
        (lambda p: replace(p, dims=(0, 4)), "impossible dimensions"),
        (lambda p: replace(p, dims=(2**40, 2**40)), "impossible dimensions"),
        (lambda p: replace(p, name="model.layers.0.mlp.extra.weight"), "unknown tensor name"),
        (lambda p: replace(p, name="model.layers.0.self_attn.q_proj.weight"), "twice"),
    ],
)
def test_a_bad_entry_is_named(aprender: Path, tmp_path: Path, change: Callable[[apr.Plan], apr.Plan], message: str) -> None:
    chosen = "model.layers.3.mlp.down_proj.weight"
    path = rebuilt(aprender, tmp_path, entry=lambda p: change(p) if p.name == chosen else p)
    with pytest.raises(FormatError, match=message) as caught:
        open_model(path)
    assert caught.value.tensor is not None and caught.value.offset is not None


@pytest.mark.parametrize("naming", ["bare", "short"])
def test_historic_names_are_refused_by_name(naming: str, aprender: Path, tmp_path: Path) -> None:
    def rename(plan: apr.Plan) -> apr.Plan:
        gguf = names.to_gguf(plan.name)
        assert gguf is not None
        return replace(plan, name=names.from_gguf(gguf, naming))

    with pytest.raises(FormatError, match=f"historic naming '{naming}'"):
        open_model(rebuilt(aprender, tmp_path, entry=rename))


def test_an_unsorted_index_is_refused(aprender: Path, tmp_path: Path) -> None:
    dialect = replace(apr.DIALECTS["aprender"], sorted_index=False)
    path = rebuilt(aprender, tmp_path, dialect=dialect, plans=lambda plans: plans[::-1])
    with pytest.raises(FormatError, match="not sorted"):
        open_model(path)


def moved(source: Path, out: Path, name: str, **changes: int) -> Path:
    """Change offset or size of one entry in place."""
    box = apr.scan(source)
    raw = bytearray(source.read_bytes())
    entry = next(e for e in box.entries if e.name == name)
    raw[entry.at : entry.at + len(entry.pack())] = replace(entry, **changes).pack()
    out.write_bytes(sealed(raw))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"offset": 64}, "overlaps"), ({"offset": 96}, "multiple of 64"), ({"offset": 2**40}, "the data ends at"),
     ({"size": 2**62}, "the data ends at"), ({"size": 64}, "breaks the size law|follow the last")],
)  # fmt: skip
def test_bad_spans(aprender: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_model(moved(aprender, tmp_path / "moved.apr", "model.layers.5.mlp.up_proj.weight", **changes))


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda m: {k: v for k, v in m.items() if k != key}


@pytest.mark.parametrize(
    ("key", "assumed"),
    [("rope_theta", "10000.0"), ("rope_type", r"0 \(NORM\)"), ("rms_norm_eps", "1e-06"), ("num_kv_heads", "num_heads"),
     ("intermediate_size", "4 × hidden_size"), ("num_layers", "0"), ("max_position_embeddings", "2048")],
)  # fmt: skip
def test_no_config_value_is_assumed(aprender: Path, tmp_path: Path, key: str, assumed: str) -> None:
    model = open_model(rebuilt(aprender, tmp_path, metadata=without(key)))
    with pytest.raises(FormatError, match=f"{key}.*would assume {assumed}, which is refused"):
        model.config  # noqa: B018


@pytest.mark.parametrize("key", ["tokenizer.vocabulary", "tokenizer.merges", "tokenizer.token_type", "tokenizer.pre_type"])
def test_no_tokenizer_value_is_assumed(aprender: Path, tmp_path: Path, key: str) -> None:
    model = open_model(rebuilt(aprender, tmp_path, metadata=without(key)))
    assert model.config.block_count == 8
    with pytest.raises(FormatError, match=f"{key!r}.*refused"):
        model.tokenizer  # noqa: B018


def test_a_switch_is_true_or_false(aprender: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'tokenizer\.add_bos_token' is 'no', not true or false"):
        assert open_model(rebuilt(aprender, tmp_path, metadata=lambda m: {**m, "tokenizer.add_bos_token": "no"})).tokenizer


@pytest.mark.parametrize("alias", ["n_layers", "num_hidden_layers", "n_layer"])
def test_aliases_are_read_and_must_agree(aprender: Path, tmp_path: Path, alias: str) -> None:
    model = open_model(rebuilt(aprender, tmp_path, metadata=lambda m: {**without("num_layers")(m), alias: 8}))
    assert model.config.block_count == 8
    model = open_model(rebuilt(aprender, tmp_path, metadata=lambda m: {**m, alias: 9}))
    with pytest.raises(FormatError, match="disagree"):
        model.config  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_layers": "8"}, "not a whole number"), ({"num_layers": 8.0}, "not a whole number"), ({"num_heads": 2**40}, "in range"),
     ({"rope_type": 1}, "rope_type"), ({"rope_theta": "big"}, "not a number"), ({"rope_theta": 1e400}, "JSON|range"),
     ({"num_kv_heads": 3}, "cannot share"), ({"architecture": "gemma"}, "'gemma'; handled: 'qwen2'"),
     ({"vocab_size": 5}, "has shape"),
     ({"rms_norm_eps": -1.0}, "out of range"), ({"num_heads": 0}, "at least 1"), ({"rope_theta": 10**400}, "float32 can hold"),
     ({"num_heads": None, "n_head": "6"}, "'n_head' is '6'"), ({"rms_norm_eps": None, "norm_eps": "x"}, "'norm_eps' is 'x'")],
)  # fmt: skip
def test_senseless_config_values(aprender: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    if change.get("rope_theta") == 1e400:
        with pytest.raises(ValueError, match=message):  # the writer itself refuses what JSON cannot say
            rebuilt(aprender, tmp_path, metadata=lambda m: {**m, **change})
        return
    with pytest.raises(AprlabError, match=message):
        open_model(rebuilt(aprender, tmp_path, metadata=lambda m: {**m, **change})).config  # noqa: B018


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{}x", "not valid JSON"), (b"[1]", "list, not an object"), (b'{"a":1,"a":2}', "twice"), (b'{"a":NaN}', "not JSON"),
     (b"\xff{}", "not UTF-8"), (b"[" * 100_000, "not valid JSON"), (rb'{"a":["\ud800"]}', "surrogates"),
     (b'{"a":-1e999}', "beyond any float")],
)  # fmt: skip
def test_bad_metadata(aprender: Path, tmp_path: Path, text: bytes, message: str) -> None:
    size = -(-len(text) // 64) * 64
    head = bytearray(apr.HEADER.pack(b"APR\0", 2, 0, 0x400, 0, 64, len(text), 64 + size, 64 + size, 0))
    head[40:44] = struct.pack("<I", apr.header_crc(bytes(head)))
    (tmp_path / "m.apr").write_bytes(bytes(head) + text.ljust(size, b"\0"))
    with pytest.raises(FormatError, match=message):
        apr.scan(tmp_path / "m.apr")


def test_a_character_in_two_escapes_is_one() -> None:
    assert json_object(r'{"a": "\ud83d\ude00", "b": 1e300}', "it", Path("x")) == {"a": "\U0001f600", "b": 1e300}


def test_realizars_json_payload_is_refused_by_name(tmp_path: Path) -> None:
    index = b'[{"name":"weights","dtype":"json"}]'.ljust(64)
    head = bytearray(apr.HEADER.pack(b"APR\0", 2, 0, 0, 1, 64, 2, 128, 192, 0))
    head[40:44] = struct.pack("<I", apr.header_crc(bytes(head)))
    (tmp_path / "j.apr").write_bytes(bytes(head) + b"{}".ljust(64, b"\0") + index + b"{}")
    with pytest.raises(UnsupportedError, match="JSON payload"):
        open_model(tmp_path / "j.apr")


def test_truncated_anywhere(aprender: Path, tmp_path: Path) -> None:
    whole = aprender.read_bytes()
    data_at = apr.scan(aprender).data_offset
    cut = tmp_path / "cut.apr"
    rng = np.random.default_rng(3)
    for size in [*range(0, 130), data_at - 1, data_at, *rng.integers(130, len(whole), 120).tolist(), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            open_model(cut)


@pytest.mark.parametrize("kind", ["lz4", "zstd"])
def test_bombs_are_refused(kind: str, tmp_path: Path) -> None:
    import lz4.block
    import zstandard

    body = bytes(200 << 20)
    packed = lz4.block.compress(body) if kind == "lz4" else zstandard.ZstdCompressor().compress(body)
    head = bytearray(apr.HEADER.pack(b"APR\0", 2, 0, apr.FLAGS[kind], 0, 64, 0, 64, 64, 0))
    head[40:44] = struct.pack("<I", apr.header_crc(bytes(head)))
    path = tmp_path / "bomb.apr"
    path.write_bytes(bytes(head) + packed)
    with pytest.raises(AprlabError):
        open_model(path)
    path.write_bytes(bytes(head) + struct.pack("<I", 2**32 - 1) + packed[4:200])
    with pytest.raises(FormatError, match=r"LZ4 can pack|damaged|ends inside"):
        open_model(path)


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 5), (3, 1 << 16), (70000, 70001)])
def test_the_checksum_of_two_runs_is_that_of_both_together(sizes) -> None:
    draw = np.random.default_rng(3)
    first, second = (draw.bytes(size) for size in sizes)
    assert apr.crc32_of_both(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


# -- chunks are made in a thread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 5])
def test_an_error_of_a_chunk_is_the_errors_own_and_leaves_no_file_and_no_thread(where: int, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        for n in range(6):
            if n == where:
                raise NumericError("this one", code="test.chunk")
            yield bytes(4)

    plan = apr.Plan("x", 0, (6,), 24, chunks)
    with pytest.raises(NumericError, match="this one"):
        apr.write(tmp_path / "a.apr", {}, [plan], apr.DIALECTS["aprender"])
    assert not list(tmp_path.iterdir())
    assert all_end("aprlab-read")


def test_a_writer_that_stops_ends_the_thread_that_reads_for_it(tmp_path: Path) -> None:
    taken: list[int] = []

    def chunks() -> Iterator[bytes]:
        for n in range(1000):
            taken.append(n)
            yield bytes(4)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    plan = apr.Plan("x", 0, (1000,), 4000, chunks)
    with pytest.raises(KeyboardInterrupt):
        apr.write(tmp_path / "a.apr", {}, [plan], apr.DIALECTS["aprender"], progress=stop)
    assert all_end("aprlab-read")
    assert len(taken) < 10, "a chunk is made at most a few ahead, which is what the ring of buffers allows"
    assert not list(tmp_path.iterdir())


def all_end(name: str) -> bool:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(5)
    return all(thread.name != name for thread in threading.enumerate())
