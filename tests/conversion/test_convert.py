"""Conversion laws: there and back byte for byte, blocks untouched, output whole or absent."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import LlamaFileType

from aprlab import quants
from aprlab.conversion import provenance, recode, report, seams
from aprlab.conversion.converter import convert, export
from aprlab.conversion.mixes import SUBSTITUTES
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.formats import apr, gguf, open_model
from aprlab.model.model import Model
from aprlab.quants import types


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dialect", apr.DIALECTS)
@pytest.mark.parametrize("compress", [None, "zstd"])
def test_there_and_back_is_the_same_file(tiny: Path, tmp_path: Path, dialect: str, compress: str | None) -> None:
    report = convert(tiny, tmp_path / "a.apr", dialect=dialect, compress=compress)
    assert report.reversible and report.tensors == 99 and report.types_in == report.types_out and not report.notes
    back = export(tmp_path / "a.apr", tmp_path / "b.gguf")
    assert back.reversible and sha256(tmp_path / "b.gguf") == sha256(tiny)
    assert back.bytes_out == tiny.stat().st_size


def test_converting_twice_is_converting_once(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "a.apr")
    convert(tiny, tmp_path / "b.apr")
    assert sha256(tmp_path / "a.apr") == sha256(tmp_path / "b.apr")
    convert(tmp_path / "a.apr", tmp_path / "c.apr", dialect="realizar")
    convert(tmp_path / "c.apr", tmp_path / "d.apr", dialect="aprender")
    export(tmp_path / "d.apr", tmp_path / "d.gguf")
    assert sha256(tmp_path / "d.gguf") == sha256(tiny)


def odd_gguf(tiny: Path, out: Path, *, gap: bytes = b"", tail: bytes = b"", version: int = 3, alignment: int = 32) -> Path:
    """The embedded model laid out unlike ggml would: reversed tensors, gaps, strange keys, other alignment."""
    header = gguf.read_header(tiny)
    extra = [
        gguf.Field("odd.nan", gguf.VALUE_TYPES.index("float32"), float("nan")),
        gguf.Field("odd.inf64", gguf.VALUE_TYPES.index("float64"), float("-inf")),
        gguf.Field("odd.floats", gguf.ARRAY, np.array([1, np.nan, 0.1], "<f4"), gguf.VALUE_TYPES.index("float32")),
        gguf.Field("odd.bools", gguf.ARRAY, np.array([1, 0], "u1"), gguf.VALUE_TYPES.index("bool")),
        gguf.Field("odd.u64", gguf.VALUE_TYPES.index("uint64"), 2**64 - 1),
        gguf.Field("odd.empty", gguf.ARRAY, [], gguf.STRING),
        gguf.Field("general.alignment", gguf.VALUE_TYPES.index("uint32"), alignment),
    ]
    data, infos = bytearray(), []
    for info in reversed(header.infos):
        start = header.data_offset + info.offset
        size = gguf.tensor_type(header, info).nbytes(info.ne[::-1])
        data += gap + bytes(-(len(data) + len(gap)) % alignment)
        infos.append(replace(info, offset=len(data)))
        data += header.file[start : start + size].tobytes()
    front = gguf.pack_header([*header.fields.values(), *extra], infos, version=version, alignment=alignment)
    out.write_bytes(front + data + tail)
    return out


@pytest.mark.parametrize(
    "odd",
    [{}, {"tail": b"trailing"}, {"version": 2}, {"alignment": 256}],
    ids=str,
)
def test_odd_files_come_back_too(tiny: Path, tmp_path: Path, odd: dict) -> None:
    source = odd_gguf(tiny, tmp_path / "odd.gguf", **odd)
    report = convert(source, tmp_path / "a.apr")
    assert report.reversible
    assert export(tmp_path / "a.apr", tmp_path / "b.gguf").reversible
    assert (tmp_path / "b.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("gap", [b"left over", bytes(96)])
def test_gaps_between_tensors_are_refused_as_llama_cpp_does(tiny: Path, tmp_path: Path, gap: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        convert(odd_gguf(tiny, tmp_path / "odd.gguf", gap=gap), tmp_path / "a.apr")
    assert caught.value.code == "gguf.gap" and not (tmp_path / "a.apr").exists()


def test_more_than_padding_between_tensors_is_not_promised_back(tiny: Path, tmp_path: Path) -> None:
    source = odd_gguf(tiny, tmp_path / "odd.gguf", tail=os.urandom(provenance.GAP_LIMIT + 1))
    assert convert(source, tmp_path / "a.apr").reversible is False
    assert export(tmp_path / "a.apr", tmp_path / "b.gguf").reversible is None


@pytest.mark.parametrize("odd", [{"alignment": 2 * provenance.GAP_LIMIT}, {}])
def test_what_export_would_refuse_is_not_promised(odd: dict, tiny: Path, tmp_path: Path) -> None:
    """Alignments beyond the limit, and a header that packing does not give back: the padding is not zero."""
    model = open_model(tiny)
    few = [t for n, t in model.tensors.items() if not n.startswith("blk.") or n.startswith("blk.0.")]
    fields = {**model.metadata.header.fields, "qwen2.block_count": gguf.field_of("qwen2.block_count", "uint32", 1)}
    fields["general.alignment"] = gguf.field_of("general.alignment", "uint32", odd.get("alignment", 32))
    data, infos, step = b"", [], odd.get("alignment", 32)
    for tensor in few:
        data += bytes(-len(data) % step)
        infos.append(gguf.TensorInfo(tensor.name, tensor.ne, tensor.type.code, len(data), 0))
        data += tensor.raw.tobytes()
    front = bytearray(gguf.pack_header(list(fields.values()), infos, alignment=step))
    if not odd:
        last = tensor.name.encode() + struct.pack("<IQQI", 2, *tensor.ne, tensor.type.code)
        end = front.index(last) + len(last) + 8
        assert len(front) > end, "a header that needs no padding shows nothing"
        front[end] = 7
    (tmp_path / "odd.gguf").write_bytes(bytes(front) + data)
    report = convert(tmp_path / "odd.gguf", tmp_path / "a.apr")
    assert report.reversible is False
    assert export(tmp_path / "a.apr", tmp_path / "b.gguf").reversible is None


def test_a_table_in_another_order_than_the_data_is_refused(tiny: Path, tmp_path: Path) -> None:
    header = gguf.read_header(tiny)
    infos = [*header.infos[1::2], *header.infos[::2]]
    front = gguf.pack_header(list(header.fields.values()), infos)
    (tmp_path / "odd.gguf").write_bytes(front + header.file[header.data_offset :].tobytes())
    with pytest.raises(FormatError) as caught:
        convert(tmp_path / "odd.gguf", tmp_path / "a.apr")
    assert caught.value.code == "gguf.gap"


def test_a_changed_tensor_is_not_called_the_original(tiny: Path, tmp_path: Path) -> None:
    """The hash has to see one flipped bit of one block, though names, types and shapes still agree."""
    convert(tiny, tmp_path / "a.apr")
    model = open_model(tmp_path / "a.apr")
    tensor = model.tensors["blk.0.attn_q.weight"]
    raw = tensor.raw.copy()
    raw[77] ^= 1
    model.tensors[tensor.name] = tensor.replace(raw=raw)
    report = export(model, tmp_path / "b.gguf")
    assert report.reversible is False and "not the original" in report.notes[-1]
    assert export(open_model(tmp_path / "a.apr"), tmp_path / "c.gguf").reversible is True


def test_a_foreign_apr_becomes_a_gguf_with_the_same_model(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "a.apr", seams=lambda s: replace(s, metadata=lambda m: m | {"source_metadata": {}}))
    report = export(tmp_path / "a.apr", tmp_path / "b.gguf")
    assert report.reversible is None
    a, b = open_model(tiny), open_model(tmp_path / "b.gguf")
    assert (a.config, a.tokenizer) == (b.config, b.tokenizer)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(np.array_equal(t.raw, b.tensors[n].raw) for n, t in a.tensors.items())


def test_a_damaged_record_is_an_error(tiny: Path, tmp_path: Path) -> None:
    def damage(metadata: dict) -> dict:
        metadata["source_metadata"]["gguf"]["kv"][3] = ["general.x", "uint33", 1]
        return metadata

    convert(tiny, tmp_path / "a.apr", seams=lambda s: replace(s, metadata=damage))
    with pytest.raises(FormatError, match=r"source_metadata\.gguf is damaged"):
        export(tmp_path / "a.apr", tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


@pytest.fixture(scope="module")
def back(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The embedded model as APR, with the record of the GGUF that it was."""
    path = tmp_path_factory.mktemp("back") / "a.apr"
    convert(tiny, path)
    return open_model(path)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text for a number": lambda r: r["kv"].append(["x", "uint32", "abc"]),
    "a table for a row": lambda r: r["kv"].append(["x", "array[uint8]", [[1, 2], [3, 4]]]),
    "a number too large": lambda r: r["kv"].append(["x", "array[uint8]", [1, 256]]),
    "gaps of no pairs": lambda r: r.update(gaps=[5]),
    "gaps of no base64": lambda r: r.update(gaps=[[1, "x"]]),
    "offsets of floats": lambda r: r.update(offsets=[32.0 * n for n in range(len(r["tensors"]))]),
    "alignment without end": lambda r: r.update(alignment=2**33),
    "a file of 16 GB": lambda r: r.update(offsets=[0, *(2**34 * n for n in range(1, len(r["tensors"])))]),
    "no table": lambda r: r.pop("tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_hostile_record_is_one_line_and_no_file(damage: str, back: Model, tmp_path: Path) -> None:
    metadata = {**back.metadata, "source_metadata": copy.deepcopy(back.metadata["source_metadata"])}
    DAMAGES[damage](metadata["source_metadata"]["gguf"])
    with pytest.raises(FormatError) as caught:
        export(replace(back, metadata=metadata), tmp_path / "b.gguf")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_tensor_listed_twice_is_written_once(back: Model, tiny: Path, tmp_path: Path) -> None:
    metadata = {**back.metadata, "source_metadata": copy.deepcopy(back.metadata["source_metadata"])}
    listed = metadata["source_metadata"]["gguf"]["tensors"]
    listed.append(listed[0])
    assert export(replace(back, metadata=metadata), tmp_path / "b.gguf").tensors == len(back.tensors)
    assert (tmp_path / "b.gguf").read_bytes() == tiny.read_bytes()


def test_a_copy_promises_only_what_its_source_held(back: Model) -> None:
    """APR to APR hands the record on; it is a promise only for the very tensors that it lists."""
    tensors = list(back.tensors.values())
    assert provenance.promised(back.metadata, tensors)
    assert not provenance.promised(back.metadata, [tensors[0].replace(type=types.F16), *tensors[1:]])
    assert not provenance.promised({"source_metadata": {"gguf": ["x"]}}, tensors)


def test_without_a_record_it_is_the_metadata_that_are_damaged(back: Model, tmp_path: Path) -> None:
    plain = {**back.metadata, "source_metadata": {}, "name": 7, "license": ["MIT"]}
    types_ = [10**30, *back.tokenizer.token_types[1:]]
    model = replace(back, metadata=plain, make_tokenizer=lambda: replace(back.tokenizer, token_types=types_))
    with pytest.raises(FormatError, match=r"a\.apr: the metadata is damaged"):
        export(model, tmp_path / "b.gguf")
    export(replace(back, metadata=plain), tmp_path / "b.gguf")
    assert not {"general.name", "general.license"} & open_model(tmp_path / "b.gguf").metadata.keys()


# ── re-encoding, on purpose ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["q4k", "q6_k", "Q8_0", "q5_0", "f16", "bf16", "f32", "aprq4", "aprq8"])
def test_quantize_changes_2d_weights_only_and_says_so(name: str, tiny: Path, tmp_path: Path) -> None:
    target = types.by_name(name)
    report = convert(tiny, tmp_path / "a.apr", quantize=name)
    assert not report.reversible and report.notes
    before, after = open_model(tiny), open_model(tmp_path / "a.apr")
    for tensor in before.tensors.values():
        found = after.tensors[tensor.name]
        if len(tensor.shape) == 1 or tensor.type is target:
            assert found.type is tensor.type and np.array_equal(found.raw, tensor.raw)
        else:
            assert found.type is target
            expected = quants.quantise(tensor.dequantise(), target)
            assert np.array_equal(found.raw, expected.reshape(-1))
    assert after.config == before.config


def test_rows_that_do_not_fit_get_llama_cpps_substitute(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    tensor = model.tensors["blk.0.ffn_gate.weight"]
    narrow = np.linspace(-1, 1, 6 * 96, dtype=np.float32).reshape(6, 96)
    for target, substitute in SUBSTITUTES.items():
        thin = tensor.replace(type=types.F32, shape=(6, 96), raw=narrow.reshape(-1).view(np.uint8))
        assert recode.re_encoded(thin, target).type is substitute
    with pytest.raises(UnsupportedError, match=r"row of 33 values.*Q5_0"):
        odd = tensor.replace(type=types.F32, shape=(6, 33), raw=np.zeros(6 * 33 * 4, np.uint8))
        recode.re_encoded(odd, types.Q4_K)


def test_the_file_type_is_that_of_the_mix_or_of_most_matrices(tiny: Path, tmp_path: Path) -> None:
    header = gguf.read_header(tiny)
    fields = {**header.fields, "general.file_type": gguf.field_of("general.file_type", "uint32", 99)}
    front = gguf.pack_header(list(fields.values()), header.infos)
    (tmp_path / "own.gguf").write_bytes(front + header.file[header.data_offset :].tobytes())
    own = open_model(tmp_path / "own.gguf")
    half = {n: t.replace(type=types.Q8_1) if len(t.shape) > 1 else t for n, t in own.tensors.items()}

    def label(tensors: dict[str, Any], quantize: str | None) -> int:
        made, _, _ = provenance.header_for(replace(own, tensors=tensors), None, quantize)
        return int(made.value("general.file_type"))

    assert label(own.tensors, None) == label(own.tensors, "q4_k") == 99  # nothing was changed, so nothing is known better
    assert label(own.tensors, "q4_k_s") == LlamaFileType.MOSTLY_Q4_K_S
    assert label(own.tensors, "Q5_K_M") == LlamaFileType.MOSTLY_Q5_K_M
    assert label(half, "q8_1") == LlamaFileType.GUESSED  # llama.cpp has no word for it


def test_a_fault_over_re_encoding(tiny: Path) -> None:
    from aprlab.faults.dtypes import dequantise_all

    faulty = dequantise_all(seams.healthy_seams(apr.DIALECTS["aprender"], types.Q8_0))
    tensor = open_model(tiny).tensors["blk.0.attn_k.weight"]
    out = faulty.tensor(tensor)
    once = quants.dequantise(quants.quantise(tensor.dequantise(), types.Q8_0).reshape(-1), types.Q8_0, tensor.shape)
    assert b"".join(map(bytes, recode.chunks_of(out)())) == once.tobytes()
    line = report.TensorLine(tensor.name, tensor.name, tensor.shape, tensor.type.name, out.type.name, out.nbytes)
    assert report._notes([line], "q8_0", []) == [] == report._notes([line], "q4_k", [])


def test_a_place_in_a_packed_file_is_no_offset(tiny: Path, tmp_path: Path) -> None:
    tensor = open_model(tiny).tensors["blk.0.attn_k.weight"]
    raw = np.full(tensor.size, np.nan, "<f4").view(np.uint8)
    lost = tensor.replace(type=types.F32, raw=raw, origin=replace(tensor.origin, offset=-1))
    with pytest.raises(FormatError, match="not finite") as caught:
        list(recode.chunks_of(recode.recoded(lost, types.F16))())
    assert caught.value.offset is None


def test_default_keeps_every_block(tiny: Path, tmp_path: Path) -> None:
    """Upstream's default dequantised; a converter that does is 6.4 times as large and has no quantised tensor."""
    report = convert(tiny, tmp_path / "a.apr")
    before, after = open_model(tiny), open_model(tmp_path / "a.apr")
    assert after.quantised == before.quantised > 0
    assert all(np.array_equal(t.raw, after.tensors[n].raw) for n, t in before.tensors.items())
    assert abs(report.bytes_out - report.bytes_in) < 100_000


# ── bad requests, and what is left behind ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", [convert, export])
def test_bad_outputs(action, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "in.apr")
    source = tiny if action is convert else tmp_path / "in.apr"
    (tmp_path / "there").write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists already"):
        action(source, tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"precious"
    with pytest.raises(UsageError, match="same file"):
        action(source, source, force=True)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="same file"):
        action(source, tmp_path / "link", force=True)
    with pytest.raises(UsageError, match="directory"):
        action(source, tmp_path, force=True)
    with pytest.raises(UsageError, match="does not exist"):
        action(source, tmp_path / "no" / "out")
    with pytest.raises(UsageError, match="No such file"):
        action(tmp_path / "missing", tmp_path / "out")
    action(source, tmp_path / "there", force=True)
    assert (tmp_path / "there").stat().st_size > 1_000_000


def test_bad_words(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown dialect 'klingon'; known: aprender, realizar"):
        convert(tiny, tmp_path / "a.apr", dialect="klingon")
    with pytest.raises(UnsupportedError, match="unknown tensor type 'q9'"):
        convert(tiny, tmp_path / "a.apr", quantize="q9")
    with pytest.raises(UsageError, match="cannot encode IQ2_XXS; can: "):
        convert(tiny, tmp_path / "a.apr", quantize="iq2_xxs")
    with pytest.raises(UsageError, match="is a GGUF file; export takes APR"):
        export(tiny, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_no_qwen2s_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    model.tensors["blk.0.attn_sinks.weight"] = model.tensors["blk.0.attn_norm.weight"].replace(name="blk.0.attn_sinks.weight")
    with pytest.raises(UnsupportedError, match="is not a tensor of a Qwen2 model") as caught:
        convert(model, tmp_path / "a.apr")
    assert caught.value.tensor == "blk.0.attn_sinks.weight"
    model = open_model(tiny)
    model.tensors["blk.N.attn_norm.weight"] = model.tensors["blk.0.attn_norm.weight"].replace(name="blk.N.attn_norm.weight")
    with pytest.raises(UnsupportedError, match=r"blk\.N\..*not a tensor of a Qwen2 model"):
        convert(model, tmp_path / "a.apr")


def test_a_scale_that_is_no_number_stops_the_conversion(tiny: Path, tmp_path: Path) -> None:
    tensor = open_model(tiny).tensors["blk.1.attn_k.weight"]
    raw = bytearray(tiny.read_bytes())
    at = tensor.origin.offset + 3 * tensor.type.block_bytes
    raw[at : at + 2] = b"\xff\x7f"
    (tmp_path / "nan.gguf").write_bytes(raw)
    with pytest.raises(FormatError, match="block 3 has a scale") as caught:
        convert(tmp_path / "nan.gguf", tmp_path / "a.apr")
    assert (caught.value.tensor, caught.value.offset) == (tensor.name, at)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.gguf"]


def test_an_error_half_way_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    def fail(nbytes: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(nbytes)
        if len(seen) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "a.apr", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: both end in an OSError of `write`."""
    code = (
        "import resource, signal, sys\n"
        "from aprlab.conversion import convert\nfrom aprlab.errors import UsageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: convert(sys.argv[1], sys.argv[2])\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny, tmp_path / "a.apr"], capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in done.stdout and list(tmp_path.iterdir()) == []


def test_killed_half_way_leaves_no_output(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL cannot be answered: what may stay is a hidden temporary file, never the name asked for."""
    code = (
        "import sys, time\nfrom aprlab.conversion import convert\n"
        "convert(sys.argv[1], sys.argv[2], progress=lambda n: (print('.', flush=True), time.sleep(0.05)))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tiny, tmp_path / "a.apr"], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.read(4)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "a.apr").exists()
    for _ in range(50):
        if all(p.name.startswith(".a.apr.") for p in tmp_path.iterdir()):
            break
        time.sleep(0.1)
    assert convert(tiny, tmp_path / "a.apr").reversible


def test_the_report_is_plain_data(tiny: Path, tmp_path: Path) -> None:
    import json

    report = convert(tiny, tmp_path / "a.apr")
    data = json.loads(json.dumps(report.to_json()))
    assert data["bytes_out"] == (tmp_path / "a.apr").stat().st_size and data["seconds"] > 0
    assert sum(data["types_out"].values()) == data["tensors"] == len(report.lines)
    line = next(x for x in report.lines if x.name == "blk.0.attn_q.weight")
    assert line.written_as == "model.layers.0.self_attn.q_proj.weight" and line.shape == (256, 256)


def test_a_symbolic_link_is_written_through(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real.apr").write_bytes(b"old")
    (tmp_path / "link.apr").symlink_to(tmp_path / "real.apr")
    convert(tiny, tmp_path / "link.apr", force=True)
    assert (tmp_path / "link.apr").is_symlink() and (tmp_path / "real.apr").stat().st_size > 1_000_000


@pytest.mark.real
def test_the_natural_order_is_llama_cpps(real_05b: Path) -> None:
    written = list(open_model(real_05b).tensors)
    assert provenance.natural_order(reversed(written)) == written


@pytest.mark.real
def test_the_real_model_there_and_back(real_05b: Path, tmp_path: Path) -> None:
    assert convert(real_05b, tmp_path / "a.apr").reversible
    assert export(tmp_path / "a.apr", tmp_path / "b.gguf").reversible
    with open(real_05b, "rb") as a, open(tmp_path / "b.gguf", "rb") as b:
        while chunk := a.read(1 << 22):
            assert chunk == b.read(1 << 22)
        assert not b.read(1)


def test_a_conversion_reads_its_source_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    preadv = os.preadv

    def counted(handle: int, views: list[memoryview], offset: int) -> int:
        read.extend(range(offset, offset + len(views[0])))
        return preadv(handle, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    convert(tiny, tmp_path / "m.apr")
    assert len(read) == len(set(read)) == sum(t.nbytes for t in open_model(tiny).tensors.values())
