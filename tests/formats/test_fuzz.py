"""Mutated files: every outcome is a model or one clear AprlabError, never another exception, never much memory."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aprlab.conversion.converter import convert
from aprlab.errors import AprlabError
from aprlab.formats import apr, gguf, open_model

EXAMPLES = int(os.environ.get("APRLAB_FUZZ", "1100"))  # two formats: more than 2,000 files a run
LOOSE = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

INTERESTING = st.sampled_from([0, 1, 2, 3, 0x7F, 0x80, 0xFF, 2**15, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])
EDIT = st.one_of(
    st.tuples(st.just("bit"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("u32"), st.floats(0, 1), INTERESTING),
    st.tuples(st.just("u64"), st.floats(0, 1), INTERESTING),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.integers(1, 70)),
    st.tuples(st.just("remove"), st.floats(0, 1), st.integers(1, 70)),
)


def small(tiny: Path, out: Path) -> Path:
    """A small whole model: the embedded one with its first layer only, its vocabulary cut to what the tensors need."""
    header = gguf.read_header(tiny)
    keep = [i for i in header.infos if not i.name.startswith("blk.") or i.name.startswith("blk.0.")]
    keep = [i for i in keep if i.name not in ("token_embd.weight", "output.weight")]
    source = open_model(tiny).tensors
    few = 7
    tensors = [("token_embd.weight", source["token_embd.weight"].type, (few, source["token_embd.weight"].cols))]
    tensors += [(i.name, source[i.name].type, source[i.name].shape) for i in keep]
    infos = gguf.layout(tensors)
    fields = dict(header.fields)
    fields["qwen2.block_count"] = gguf.Field("qwen2.block_count", 4, 1)
    for key in ("tokens", "token_type"):
        field = fields[f"tokenizer.ggml.{key}"]
        fields[field.key] = gguf.Field(field.key, field.type, list(field.value)[:few], field.element)
    merges = fields["tokenizer.ggml.merges"]
    fields[merges.key] = gguf.Field(merges.key, merges.type, list(merges.value)[:5], merges.element)
    data = bytearray()
    for info, (name, kind, shape) in zip(infos, tensors, strict=True):
        data += bytes(info.offset - len(data)) + source[name].raw[: kind.nbytes(shape)].tobytes()
    out.write_bytes(gguf.pack_header(list(fields.values()), infos) + data + bytes(-len(data) % 32))
    return out


@pytest.fixture(scope="module")
def seeds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    source = small(tiny, folder / "s.gguf")
    convert(source, folder / "s.apr")
    convert(source, folder / "z.apr", compress="zstd")
    convert(source, folder / "r.apr", dialect="realizar")
    files = {name: (folder / name).read_bytes() for name in ("s.gguf", "s.apr", "z.apr", "r.apr")}
    for name in files:
        assert open_model(folder / name).config.block_count == 1
    return files


def head_size(raw: bytes) -> int:
    """Most edits go where structure is: the part before the tensor data."""
    return struct.unpack_from("<Q", raw, 32)[0] if raw[:3] == b"APR" else 40_000


def mutate(raw: bytes, edits: list, reseal: bool) -> bytes:
    data = bytearray(raw)
    for what, place, value in edits:
        span = min(len(data), head_size(raw)) if place < 0.8 else len(data)
        at = min(int(place / 0.8 * span) if place < 0.8 else int(place * span), max(len(data) - 1, 0))
        if what == "bit" and data:
            data[at] ^= 1 << value
        elif what == "byte" and data:
            data[at] = value
        elif what in ("u32", "u64"):
            size = 4 if what == "u32" else 8
            data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = bytes(range(value))
        elif what == "remove":
            del data[at : at + value]
    if reseal and data[:3] == b"APR" and len(data) > 68:  # past the CRCs, to what they protect
        data[40:44] = struct.pack("<I", zlib.crc32(data[:40] + data[44:64]))
        data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
    return bytes(data)


def look_at_everything(path: Path) -> None:
    """What a user would do with a file: open, read config and tokenizer, check and decode every tensor."""
    model = open_model(path)
    for part in ("config", "tokenizer"):
        try:
            getattr(model, part)
        except AprlabError as error:
            assert "\n" not in str(error)
    for tensor in model.tensors.values():
        tensor.check_values()
        if tensor.type.name in ("F32", "Q4_K", "Q6_K"):
            values = tensor.dequantise(slice(0, 2))
            assert values.shape[-1] == tensor.cols


@pytest.mark.parametrize("names", [["s.gguf"], ["s.apr", "z.apr", "r.apr"]], ids=["gguf", "apr"])
def test_mutated_files(names: list[str], seeds: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "m"
    outcomes: dict[str, int] = {}

    @LOOSE
    @given(st.sampled_from(names), st.lists(EDIT, min_size=1, max_size=4), st.booleans())
    def run(name: str, edits: list, reseal: bool) -> None:
        path.write_bytes(mutate(seeds[name], edits, reseal))
        try:
            look_at_everything(path)
            outcomes["opened"] = outcomes.get("opened", 0) + 1
        except AprlabError as error:
            assert str(error) and "\n" not in str(error) and str(path) in str(error)
            outcomes[type(error).__name__] = outcomes.get(type(error).__name__, 0) + 1

    run()
    assert outcomes.get("FormatError", 0) > EXAMPLES // 10, outcomes  # the edits do break files
    assert sum(outcomes.values()) >= EXAMPLES * 0.9


def test_a_footer_sees_every_flipped_bit(seeds: dict[str, bytes], tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    raw = seeds["s.apr"]
    for at in rng.integers(0, len(raw), 60):
        data = bytearray(raw)
        data[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "f.apr").write_bytes(data)
        with pytest.raises(AprlabError):
            apr.open_model(tmp_path / "f.apr")
