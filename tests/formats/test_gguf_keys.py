"""Keys of a GGUF file in other widths, empty, absent: opened where llama.cpp opens it, refused in one line where it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import variant

from aprlab.errors import AprlabError, FormatError, UnsupportedError
from aprlab.formats import gguf, open_model
from aprlab.formats.identity import identify
from aprlab.inference import Session
from aprlab.model import keys

REFUSED: dict[str, tuple[str, str, Any]] = {
    f"{key} as {kind}": (key, kind, value)
    for key, value, kinds in (
        ("qwen2.block_count", 4, ("int32", "uint64", "int64", "uint16")),
        ("qwen2.context_length", 512, ("int32", "uint64")),
        ("qwen2.attention.head_count", 8, ("int32", "uint64")),
        ("qwen2.attention.key_length", 32, ("int32",)),
        ("qwen2.rope.freq_base", 1e6, ("float64",)),
        ("qwen2.rope.freq_base", 1_000_000, ("uint32",)),
        ("qwen2.attention.layer_norm_rms_epsilon", 1e-6, ("float64",)),
        ("general.file_type", 15, ("int32", "uint64")),
        ("tokenizer.ggml.eos_token_id", 834, ("int32", "uint64")),
        ("tokenizer.ggml.bos_token_id", 832, ("int32",)),
        ("tokenizer.ggml.add_bos_token", 0, ("uint8",)),
        ("tokenizer.ggml.token_type", [1] * 840, ("array[uint32]", "array[int8]")),
        ("tokenizer.ggml.token_type", [], ("array[int32]",)),
        ("tokenizer.ggml.tokens", [], ("array[string]",)),
        ("general.alignment", 32, ("uint64",)),
    )
    for kind in kinds
}
OPENED: dict[str, tuple[str, str, Any]] = {
    "general.quantization_version as int64": ("general.quantization_version", "int64", 2),
    "general.tags empty": ("general.tags", "array[string]", []),
    "somebody's float64": ("somebody.number", "float64", 0.1),
    "qwen2.vocab_size as uint64": ("qwen2.vocab_size", "uint64", 840),
    "qwen2.attention.sliding_window as uint64": ("qwen2.attention.sliding_window", "uint64", 0),
}


def made(tiny: Path, out: Path, row: tuple[str, str, Any]) -> Path:
    key, kind, value = row
    return variant(tiny, out, keys={key: gguf.field_of(key, kind, value)})


@pytest.mark.parametrize("what", REFUSED)
def test_a_key_of_another_type_is_refused_in_one_line(tiny: Path, tmp_path: Path, what: str) -> None:
    path = made(tiny, tmp_path / "v.gguf", REFUSED[what])
    with pytest.raises(AprlabError) as caught:
        Session(open_model(path))
    assert caught.value.path == path and "\n" not in str(caught.value)
    if REFUSED[what][2] != []:
        assert REFUSED[what][0] in caught.value.message and caught.value.offset is not None


@pytest.mark.parametrize("what", OPENED)
def test_a_key_that_nothing_depends_on_may_have_any_type(tiny: Path, tmp_path: Path, what: str) -> None:
    model = open_model(made(tiny, tmp_path / "v.gguf", OPENED[what]))
    assert model.config == open_model(tiny).config and model.tokenizer == open_model(tiny).tokenizer


@pytest.mark.peer
def test_llama_cpp_opens_and_refuses_the_same(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from peer import llama_says

    for what, row in (REFUSED | OPENED).items():
        assert ("refused" in llama_says(made(tiny, tmp_path / "v.gguf", row))) == (what in REFUSED), what


def test_every_type_in_the_table_is_one_of_gguf() -> None:
    for key, kind in keys._TYPES.items():
        assert gguf.field_of(key, kind, [] if kind.startswith("array") else 0).type_name == kind
    assert keys.gguf_type("general.description") is None


def test_the_table_decides(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: without its row, an int32 passes for a uint32."""
    path = made(tiny, tmp_path / "v.gguf", ("qwen2.block_count", "int32", 4))
    monkeypatch.delitem(keys._TYPES, "*.block_count")
    assert open_model(path).config.block_count == 4


def test_a_missing_cut_is_refused_with_what_to_do(tiny: Path, tmp_path: Path) -> None:
    path = variant(tiny, tmp_path / "v.gguf", drop=("tokenizer.ggml.pre",))
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.pre.*'default'.*--pre-tokenizer qwen2"):
        open_model(path).tokenizer  # noqa: B018


def test_errors_of_tokenizer_data_name_the_file(tiny: Path, tmp_path: Path) -> None:
    tokens = open_model(tiny).tokenizer.tokens
    for n, changes in enumerate(({"tokenizer.ggml.pre": "nobody"}, {"tokenizer.ggml.model": "llama"},
                                 {"tokenizer.ggml.tokens": [*tokens[:-1], tokens[0]]},
                                 {"tokenizer.ggml.merges": ["oneword"]})):  # fmt: skip
        path = variant(tiny, tmp_path / f"{n}.gguf", keys=changes)
        with pytest.raises((FormatError, UnsupportedError)) as caught:
            Session(open_model(path))
        assert caught.value.path == path and str(caught.value).startswith(str(path)), changes


def test_a_key_twice_and_a_gap_are_refused(tiny: Path, tmp_path: Path) -> None:
    header, whole = gguf.read_header(tiny), tiny.read_bytes()
    fields, data = list(header.fields.values()), whole[header.data_offset :]
    path = tmp_path / "v.gguf"
    path.write_bytes(gguf.pack_header([*fields, fields[2]], header.infos) + data)
    with pytest.raises(FormatError, match="twice") as caught:
        open_model(path)
    assert caught.value.code == "gguf.duplicate-key"
    at = header.infos[3].offset
    infos = [replace(i, offset=i.offset + 32 * (i.offset >= at)) for i in header.infos]
    path.write_bytes(gguf.pack_header(fields, infos) + data[:at] + bytes(32) + data[at:])
    with pytest.raises(FormatError, match=f"offset {at + 32}, expected {at}.*llama.cpp refuses") as caught:
        open_model(path)
    assert (caught.value.code, caught.value.tensor) == ("gguf.gap", header.infos[3].name)


def test_what_follows_the_last_tensor_is_nobodys(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(tiny.read_bytes() + bytes(64))
    name = "output_norm.weight"
    assert np.array_equal(open_model(path).tensors[name].raw, open_model(tiny).tensors[name].raw)


PER_LAYER = ("qwen2.attention.head_count", "qwen2.attention.head_count_kv", "qwen2.feed_forward_length")


@pytest.mark.parametrize("key", PER_LAYER)
@pytest.mark.parametrize("kind", ["array[int32]", "array[uint32]"])
def test_one_number_for_each_layer_is_one_number(key: str, kind: str, tiny: Path, tmp_path: Path) -> None:
    header = gguf.read_header(tiny)
    number, layers = header.value(key), header.value("qwen2.block_count")

    def with_values(values: list[int], kind: str = kind) -> Path:
        return variant(tiny, tmp_path / "v.gguf", keys={key: gguf.field_of(key, kind, values)})

    assert open_model(with_values([number] * layers)).config == open_model(tiny).config
    for values in ([number] * (layers - 1), [number] * (layers - 1) + [2 * number]):
        path = with_values(values)
        assert identify(path).kind == "layers" and "is an array" in str(identify(path))
        with pytest.raises(UnsupportedError, match=f"'{key}' is an array"):
            open_model(path).config  # noqa: B018
    with pytest.raises(UnsupportedError, match=f"'{key}' is an array"):
        open_model(with_values([number] * layers, "array[uint64]")).config  # noqa: B018


def test_a_missing_rope_base_is_taken_as_llama_cpp_takes_it(tiny: Path, tmp_path: Path) -> None:
    model = open_model(variant(tiny, tmp_path / "v.gguf", drop=("qwen2.rope.freq_base",)))
    assert model.config.rope_theta == 10_000 and "rope.freq_base" in model.warnings[0]


def test_missing_token_types_are_taken_as_llama_cpp_takes_them(tiny: Path, tmp_path: Path) -> None:
    """All normal, but those that end an answer."""
    model = open_model(variant(tiny, tmp_path / "v.gguf", drop=("tokenizer.ggml.token_type",)))
    data = model.tokenizer
    marked = {data.tokens[n] for n, kind in enumerate(data.token_types) if kind != 1}
    assert marked == {"<|im_end|>", "<|endoftext|>"} and "token_type" in model.warnings[0]


@pytest.mark.peer
def test_llama_cpp_takes_these_files_the_same_way(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from peer import llama_says

    header, text = gguf.read_header(tiny), "<|im_start|>user\nhi<|im_end|>\n"
    layers = header.value("qwen2.block_count")
    arrays = {key: gguf.field_of(key, "array[int32]", [header.value(key)] * layers) for key in PER_LAYER}
    for changes in ({"keys": arrays}, {"drop": ("tokenizer.ggml.token_type",)}, {"drop": ("qwen2.rope.freq_base",)}):
        path = variant(tiny, tmp_path / "v.gguf", **changes)
        said = llama_says(path, text)
        own = Session(open_model(path))
        assert own.tokenizer.encode(text) == said["ids"], changes
        assert int(np.argmax(own.follow(said["ids"], [0])[0])) == said["answer"][0], changes
    at = header.infos[3].offset
    infos = [replace(i, offset=i.offset + 32 * (i.offset >= at)) for i in header.infos]
    data = tiny.read_bytes()[header.data_offset :]
    path.write_bytes(gguf.pack_header(list(header.fields.values()), infos) + data[:at] + bytes(32) + data[at:])
    assert "refused" in llama_says(path, text)
