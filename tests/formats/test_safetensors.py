"""SafeTensors: the container against its own package, hostile headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats import open_model, safetensors
from aprlab.quants import types

DTYPES = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16}


def test_the_same_bytes_as_the_package_writes(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(1)
    shapes = {"b": (3, 5), "a": (7,), "ü.c": (2, 1, 4)}
    arrays = {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    package.save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    plans = [
        safetensors.SafetensorsPlan(name, types.F16, x.shape, lambda x=x: iter([x.tobytes()[:3], x.tobytes()[3:]]))  # type: ignore[misc]
        for name, x in arrays.items()
    ]
    size = safetensors.write(tmp_path / "ours.safetensors", plans, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert size == (tmp_path / "ours.safetensors").stat().st_size
    read = safetensors.read_header(tmp_path / "theirs.safetensors")
    assert read.metadata == {"format": "pt"} and {e.name: e.shape for e in read.entries} == shapes
    for entry in read.entries:
        assert np.array_equal(read.file[entry.start : entry.stop].view("<f2").reshape(entry.shape), arrays[entry.name])


def test_the_package_reads_what_is_exported(tiny: Path, folders: dict[str, Path]) -> None:
    package = pytest.importorskip("safetensors")
    model = open_model(tiny)
    with package.safe_open(folders["f32"] / "model.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.keys()) == len(model.tensors)
        got = file.get_tensor("model.layers.3.self_attn.k_proj.weight")
    np.testing.assert_array_equal(got, model.tensor("blk.3.attn_k.weight").dequantise())


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12], **changes}}


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (b"", FormatError, "ends inside the length"),
        (b"\x05\0\0", FormatError, "ends inside the length"),
        (struct.pack("<Q", 2**63) + b"{", FormatError, "claims a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 9_000_000) + b"{}", FormatError, "ends inside the header"),
        (pack(b"[1]"), FormatError, "starts with '\\['"),
        (pack(b"{}x"), FormatError, "not valid JSON"),
        (pack(b'{"x":1,"x":2}'), FormatError, "'x' is listed twice"),
        (pack(b'{"a":' * 50_000), FormatError, "not valid JSON"),
        (pack(b'{"x":\xff}'), FormatError, "not UTF-8"),
        (pack({"x": 1}), FormatError, "does not consist of"),
        (pack({"x": {"dtype": "F16", "shape": [1]}}), FormatError, "does not consist of"),
        (pack(entry(dtype="F17"), bytes(12)), FormatError, "unknown dtype 'F17'"),
        (pack(entry(dtype=["F16"]), bytes(12)), FormatError, "unknown dtype"),
        (pack(entry(dtype="F8_E4M3"), bytes(12)), UnsupportedError, "is F8_E4M3"),
        (pack(entry(shape=[2, -3]), bytes(12)), FormatError, "impossible shape"),
        (pack(entry(shape=[2, 3.0]), bytes(12)), FormatError, "impossible shape"),
        (pack(entry(shape=[True, 6]), bytes(12)), FormatError, "impossible shape"),
        (pack(entry(shape=[])), FormatError, "impossible shape"),
        (pack(entry(shape=[2**40, 2**40]), bytes(12)), FormatError, "size law"),
        (pack(entry(data_offsets=[12, 0]), bytes(12)), FormatError, "impossible data_offsets"),
        (pack(entry(data_offsets=[0, 11]), bytes(12)), FormatError, "12$"),
        (pack(entry(), bytes(11)), FormatError, r"needs bytes \d+..\d+, the file ends at"),
        (pack(entry(), bytes(13)), FormatError, "1 bytes follow"),
        (pack(entry(data_offsets=[1, 13]), bytes(13)), FormatError, "leaves 1 bytes to nobody"),
        (pack({**entry(), "y": entry()["x"]}, bytes(12)), FormatError, "overlaps"),
        (pack({"__metadata__": {"a": 1}}), FormatError, "map of texts"),
    ],
)  # fmt: skip
def test_hostile_headers(raw: bytes, kind: type[AprlabError], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(kind, match=message) as caught:
        safetensors.read_header(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(AprlabError):
        open_model(path)


def test_every_cut_and_every_flipped_header_byte_is_noticed(tmp_path: Path) -> None:
    """Whatever a header says, reading it either gives the tensors that stand there or raises one of our errors."""
    path = tmp_path / "small.safetensors"
    plans = [
        safetensors.SafetensorsPlan(f"layer.{n}", kind, (n + 2, 3), lambda n=n, kind=kind: iter([bytes(kind.nbytes((n + 2, 3)))]))  # type: ignore[misc]
        for n, kind in enumerate(DTYPES.values())
    ]
    safetensors.write(path, plans, {"format": "pt"})
    whole = path.read_bytes()
    sound = {e.name: (e.type, e.shape, e.start) for e in safetensors.read_header(path).entries}
    front = 8 + int.from_bytes(whole[:8], "little")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(AprlabError):
            safetensors.read_header(path)
    refused = 0
    for at in range(front):
        for flip in (1, 4, 32, 128):
            raw = bytearray(whole)
            raw[at] ^= flip
            path.write_bytes(raw)
            try:
                got = {e.name: (e.type, e.shape, e.start) for e in safetensors.read_header(path).entries}
            except AprlabError:
                refused += 1
            else:  # a letter of a name or of the metadata; two kinds of one width; 3 × 2 for 2 × 3
                assert sorted(start for *_, start in got.values()) == sorted(start for *_, start in sound.values())
    assert refused > 2.5 * front
