"""What is this file? Each thing that people give instead of a model is named in one line, and nothing is compared with it."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import unpadded, variant

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats import gguf, identify, open_model
from aprlab.formats.identity import FILE_ONLY, Identity
from aprlab.instruments import diff
from aprlab.model import Origin, Tensor
from aprlab.onion.peeling import peel
from aprlab.quants import types

Make = Callable[[Path, Path], Any]


def made(name: str, rows: int = 4) -> Tensor:
    values = np.linspace(0.5, 1.5, rows * 32, dtype=np.float32).reshape(rows, 32)
    return Tensor(name, types.F32, values.shape, values.reshape(-1).view(np.uint8), Origin(Path("made"), name, 0))


def of_type(said: str, *names: str, architecture: str = "qwen2") -> Make:
    """A GGUF file of this `general.type` with these tensors and no other."""

    def make(tiny: Path, out: Path) -> None:
        keys = {"general.type": said, "general.architecture": architecture}
        nothing = dict.fromkeys(open_model(tiny).tensors)
        variant(tiny, out, keys=keys, tensors={**nothing, **{name: made(name) for name in names}})

    return make


def with_keys(**keys: Any) -> Make:
    return lambda tiny, out: variant(tiny, out, keys={key.replace("__", "."): value for key, value in keys.items()})


def of_bytes(data: bytes) -> Make:
    return lambda tiny, out: out.write_bytes(data)


def with_version(version: bytes) -> Make:
    return lambda tiny, out: out.write_bytes(tiny.read_bytes()[:4] + version + tiny.read_bytes()[8:])


def with_codes(code: int) -> Make:
    """Every Q4_K label replaced; the bytes stay."""

    def make(tiny: Path, out: Path) -> None:
        header = gguf.read_header(tiny)
        infos = [replace(i, code=code) if i.code == types.Q4_K.code else i for i in header.infos]
        out.write_bytes(gguf.pack_header(list(header.fields.values()), infos) + header.file[header.data_offset :].tobytes())

    return make


def packed(kind: str) -> Make:
    def make(tiny: Path, out: Path) -> None:
        inside = tiny.read_bytes()[:9000]
        if kind == "gzip":
            out.write_bytes(gzip.compress(inside))
        elif kind == "tar":
            with tarfile.open(out, "w") as box:
                info = tarfile.TarInfo("model.gguf")
                info.size = len(inside)
                box.addfile(info, io.BytesIO(inside))
        else:
            with zipfile.ZipFile(out, "w") as zipped:
                zipped.writestr("archive/data.pkl" if kind == "torch" else "model.gguf", inside)

    return make


def numpy_array(tiny: Path, out: Path) -> None:
    with open(out, "wb") as file:
        np.save(file, np.arange(5))


def unpadded_and_cut(tiny: Path, out: Path) -> None:
    unpadded(tiny, out)
    out.write_bytes(out.read_bytes()[:-100])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 397808192\n"
ROWS: dict[str, tuple[Make, str, str]] = {  # what: how it is made, its code, what the line must say
    "lora": (of_type("adapter", "blk.0.attn_q.weight.lora_a"), "identity.lora-adapter", "LoRA adapter"),
    "lora by its tensors": (of_type("model", "x.lora_a", "x.lora_b"), "identity.lora-adapter", "LoRA"),
    "imatrix": (of_type("imatrix", "blk.0.attn_q.weight.in_sum2"), "identity.imatrix", "importance matrix"),
    "imatrix by its tensors": (of_type("model", "a.in_sum2", "a.counts"), "identity.imatrix", "llama-quantize"),
    "control vector": (of_type("model", "direction.1"), "identity.control-vector", "control vector"),
    "projector": (of_type("mmproj", "v.patch_embd.weight", architecture="clip"), "identity.projector", "projector"),
    "vocabulary": (of_type("model"), "identity.vocabulary-only", "vocabulary only"),
    "gemma": (with_keys(general__architecture="gemma"), "identity.other-architecture", "'gemma'.*only 'qwen2'.*inspect"),
    "Qwen2": (with_keys(general__architecture="Qwen2"), "identity.other-architecture", "'Qwen2'.*only 'qwen2'"),
    "moe": (with_keys(general__architecture="qwen2moe"), "identity.mixture-of-experts", "mixture of experts"),
    "experts": (with_keys(qwen2__expert_count=8), "identity.mixture-of-experts", "qwen2.expert_count"),
    "first part": (with_keys(split__count=5, split__no=0), "identity.part-of-several", "part 1 of 5 .*--merge"),
    "values per layer": (
        with_keys(qwen2__attention__head_count_kv=[2, 2, 2, 2, 2, 2, 2, 1]), "identity.values-per-layer", "head_count_kv"
    ),
    "big-endian": (with_version(b"\0\0\0\3"), "identity.big-endian", "big-endian"),
    "version 1": (with_version(b"\1\0\0\0"), "identity.gguf-version-1", "version 1"),
    "ggjt": (of_bytes(b"tjgg" + bytes(range(90))), "identity.older-ggml", "ggjt"),
    "ggml": (of_bytes(b"lmgg" + bytes(range(90))), "identity.older-ggml", "older format ggml"),
    "ggmf": (of_bytes(b"fmgg" + bytes(range(90))), "identity.older-ggml", "ggmf"),
    "pointer": (of_bytes(LFS), "identity.git-lfs-pointer", "397,808,192 bytes.*git lfs pull"),
    "page": (of_bytes(b"\n<!DOCTYPE html><title>Sign\nin</title>"), "identity.html-page", r"HTML page \('Sign in'\)"),
    "xml": (of_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "identity.html-page", "AccessDenied"),
    "json": (of_bytes(b'{"error": "Repository not found"}'), "identity.json", "Repository not found"),
    "index": (of_bytes(b'{"metadata": {}, "weight_map": {}}'), "identity.json", "index of a sharded model.*folder"),
    "text": (of_bytes(b"Entry not found"), "identity.text", "Entry not found"),
    "gzip": (packed("gzip"), "identity.packed", "gzip.*gunzip"),
    "zip": (packed("zip"), "identity.packed", "packed with zip"),
    "tar": (packed("tar"), "identity.packed", "tar -xf"),
    "zstd": (of_bytes(b"\x28\xb5\x2f\xfd" + bytes(50)), "identity.packed", "zstd -d"),
    "xz": (of_bytes(b"\xfd7zXZ\0" + bytes(50)), "identity.packed", "xz -d"),
    "torch zip": (packed("torch"), "identity.pytorch", "PyTorch.*save_pretrained"),
    "pickle": (of_bytes(pickle.dumps({"a": [1, 2]}, 4)), "identity.pytorch", "pickle"),
    "numpy": (numpy_array, "identity.other-format", "NumPy"),
    "onnx": (of_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(range(256))), "identity.other-format", "ONNX"),
    "old imatrix": (of_bytes(struct.pack("<ii", 3, 19) + b"blk.0.attn_q.weight" + bytes(64)), "identity.imatrix", "imatrix"),
    "empty": (of_bytes(b""), "identity.empty", "empty.*fetch it again"),
    "zeros": (of_bytes(bytes(10_000)), "identity.zeros", r"only zeros \(10,000 bytes\)"),
    "zeros first": (of_bytes(bytes(10_000) + b"x"), "identity.zeros", "starts with zeros"),
    "cut": (lambda tiny, out: out.write_bytes(tiny.read_bytes()[:-1000]), "identity.truncated", "1,000 of the file's .* missing"),
    "unpadded": (unpadded_and_cut, "identity.unpadded-and-cut", "offset .* expected .* llama.cpp refuses"),
    "removed type": (with_codes(31), "identity.removed-type", "Q4_0_4_4.*requantise from the source as Q4_0"),
    "removed IQ4": (with_codes(38), "identity.removed-type", "IQ4_NL_8_8"),
    "ik type": (with_codes(139), "identity.foreign-type", "IQ4_K.*ik_llama.cpp"),
    "ik type without a name": (with_codes(190), "identity.foreign-type", "190.*ik_llama.cpp"),
}  # fmt: skip
DAMAGED = ("cut", "unpadded")


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("what")
    found = {}
    for n, (what, (make, _, _)) in enumerate(ROWS.items()):
        found[what] = folder / f"{n}.gguf"
        make(tiny, found[what])
    return found


@pytest.mark.parametrize("what", ROWS)
def test_it_is_named_in_one_line(files: dict[str, Path], what: str) -> None:
    found = identify(files[what])
    line = str(found)
    assert found.code == ROWS[what][1] and "\n" not in line and len(line) < 300
    assert re.search(ROWS[what][2], line), line
    assert found.remedy and found.kind == ("damaged" if what in DAMAGED else found.kind) != "model"


@pytest.mark.parametrize("what", ROWS)
def test_it_cannot_be_run_and_the_error_is_that_line(files: dict[str, Path], what: str) -> None:
    with pytest.raises((UnsupportedError, FormatError)) as caught, open_model(files[what]) as model:
        assert str(identify(files[what])) in model.warnings
        model.config  # noqa: B018
    assert (caught.value.code, caught.value.path) == (ROWS[what][1], files[what])
    assert identify(files[what]).remedy in caught.value.message


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("what", ROWS)
def test_peel_says_that_and_nothing_else(tiny: Path, files: dict[str, Path], what: str, alone: bool) -> None:
    verdict = peel(None if alone else tiny, files[what])
    if alone and ROWS[what][1] in FILE_ONLY:  # a sound model: its file is looked at as far as that goes without a run
        assert (verdict.verdict, verdict.exit_code, verdict.findings) == ("unproved", 4, [])
        assert identify(files[what]).remedy in verdict.not_looked_at["forward"]
        return
    (finding,) = verdict.findings
    assert verdict.not_looked_at.keys() >= {"weights", "forward"}
    assert verdict.verdict == ("broken" if what in DAMAGED else "not-comparable")
    assert verdict.exit_code == (3 if what in DAMAGED else 4)
    assert finding.parameters["rule"] == ROWS[what][1] and identify(files[what]).remedy in finding.mechanism


@pytest.mark.parametrize("header_too", [True, False])
def test_data_without_padding_is_whole(tiny: Path, tmp_path: Path, header_too: bool) -> None:
    """Every tensor begins where the one before it ends: the bytes are known, and `repair` lays them out again."""
    unpadded(tiny, tmp_path / "m.gguf", header_too=header_too)
    found = identify(tmp_path / "m.gguf")
    assert (found.kind, found.code) == ("damaged", "identity.unpadded") and "aprlab repair" in found.remedy
    with pytest.raises(FormatError, match="without padding"):
        open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("by", [-16, 16])
def test_one_offset_that_is_wrong_is_no_layout_without_padding(tiny: Path, tmp_path: Path, by: int) -> None:
    header = gguf.read_header(tiny)
    infos = [replace(info, offset=info.offset + by * (n == 5)) for n, info in enumerate(header.infos)]
    data = header.file[header.data_offset :].tobytes()
    (tmp_path / "m.gguf").write_bytes(gguf.pack_header(list(header.fields.values()), infos) + data)
    assert not identify(tmp_path / "m.gguf").code.startswith("identity.unpadded")


def test_a_model_is_a_model(tiny: Path, tmp_path: Path) -> None:
    assert identify(tiny) == Identity("model", "identity.model", "is a GGUF model", "")
    assert identify(tmp_path).kind == "model"  # a folder: its reader says what is missing
    assert identify(tmp_path / "none").code == "identity.unreadable"


def test_diff_and_convert_say_it_too(tiny: Path, files: dict[str, Path], tmp_path: Path) -> None:
    from aprlab.conversion import convert

    for what, ask in [
        *((what, lambda f: diff(tiny, f)) for what in ("lora", "gemma", "page", "removed type")),
        *((what, lambda f: convert(f, tmp_path / "out.apr")) for what in ("lora", "page", "removed type")),
    ]:
        with pytest.raises(AprlabError) as caught:
            ask(files[what])
        assert caught.value.code == ROWS[what][1], what
    assert not (tmp_path / "out.apr").exists()


def test_the_other_parts_are_looked_for(tiny: Path, tmp_path: Path) -> None:
    for n in (1, 3):
        keys = {"split.count": 3, "split.no": n - 1}
        variant(tiny, tmp_path / f"m-{n:05d}-of-00003.gguf", keys=keys)
    assert "part 3 of a model" in identify(tmp_path / "m-00003-of-00003.gguf").says.replace("of 3 ", "")
    assert "(missing here: m-00002-of-00003.gguf)" in identify(tmp_path / "m-00003-of-00003.gguf").says
    variant(tiny, tmp_path / "m-00002-of-00003.gguf", keys={"split.count": 3, "split.no": 1})
    whole = identify(tmp_path / "m-00001-of-00003.gguf")  # all are here, and are read: each has the same tensors
    assert (whole.kind, whole.code) == ("damaged", "reading.duplicate-tensor") and "m-00001-of-00003.gguf" in whole.says


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    adapter, torch, files = (tmp_path / name for name in ("adapter", "torch", "files"))
    for folder, names in ((adapter, ["adapter_config.json", "adapter_model.safetensors"]), (files, ["a.gguf"]),
                          (torch, ["config.json", "pytorch_model.bin"])):  # fmt: skip
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    assert identify(adapter).code == "identity.lora-adapter"
    assert identify(torch).code == "identity.pytorch"
    assert identify(files).code == "identity.folder-of-files" and "a.gguf" in identify(files).says
    with pytest.raises(UnsupportedError, match="LoRA"):
        open_model(adapter)


def test_a_shard_and_an_adapter_as_safetensors(tmp_path: Path) -> None:
    def write(name: str, tensor: str) -> Path:
        head = json.dumps({tensor: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
        return tmp_path / name

    assert identify(write("model-00002-of-00003.safetensors", "a")).code == "identity.part-of-several"
    assert identify(write("adapter_model.safetensors", "base.q_proj.lora_A.weight")).code == "identity.lora-adapter"
    assert identify(write("model.safetensors", "model.norm.weight")).kind == "model"


def test_one_label_of_a_foreign_type_is_not_the_whole_file(tiny: Path, tmp_path: Path) -> None:
    """With a reference the bytes tell what they are; without one the label is named, and nobody guesses."""
    header = gguf.read_header(tiny)
    name = next(i.name for i in header.infos if i.code == types.Q4_K.code)
    infos = [replace(i, code=31) if i.name == name else i for i in header.infos]
    path = tmp_path / "label.gguf"
    path.write_bytes(gguf.pack_header(list(header.fields.values()), infos) + header.file[header.data_offset :].tobytes())
    assert identify(path).kind == "model"
    with pytest.raises(FormatError, match="Q4_0_4_4"):
        open_model(path)
    (finding,) = [f for f in peel(tiny, path).findings if name in f.tensors]
    assert finding.code == "dtype.code-of-another-type" and "Q4_0_4_4" in finding.mechanism
    (finding,) = [f for f in peel(None, path).findings if f.layer == "dtype" and name in f.tensors]
    assert finding.code == "dtype.foreign-code" and "Q4_K" not in finding.mechanism


def test_the_final_padding_may_lack_and_is_noted(tiny: Path, tmp_path: Path) -> None:
    odd = Tensor("output_norm.weight", types.F32, (3,), np.ones(3, np.float32).view(np.uint8), Origin(Path("made"), "odd", 0))
    tensors = {**dict.fromkeys(open_model(tiny).tensors), "output_norm.weight": odd}
    path = variant(tiny, tmp_path / "v.gguf", tensors=tensors)
    assert open_model(path).warnings == []
    path.write_bytes(path.read_bytes()[:-20])
    assert open_model(path).warnings == ["ends without the last 20 bytes of padding; llama.cpp loads such a file, too"]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    match rng.randrange(4):
        case 0:
            return rng.randbytes(rng.randrange(200))
        case 1:
            return bytes(data[: rng.randrange(len(data) + 1)])
        case 2:
            return rng.choice([s[:9] for s in seeds]) + rng.randbytes(rng.randrange(300))
    for _ in range(rng.randrange(1, 9)):
        if data:
            data[rng.randrange(min(len(data), 3000))] = rng.randrange(256)
    return bytes(data)


def test_no_bytes_make_it_raise(files: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(14)
    seeds = [path.read_bytes()[:60_000] for path in files.values()]
    path = tmp_path / "x.gguf"
    codes = set()
    for _ in range(2000):
        path.write_bytes(mutated(rng, seeds))
        found = identify(path)
        codes.add(found.code)
        assert "\n" not in str(found) and (found.error is None) == (found.kind == "model"), found
    assert len(codes) > 15, codes
