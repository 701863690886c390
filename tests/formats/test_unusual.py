"""What `inspect` points out: each thing once where it is, and nothing where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import KINDS, write
from variants import variant

from aprlab.conversion import convert
from aprlab.formats import gguf, open_model
from aprlab.formats.unusual import unusual
from aprlab.model.vocabulary import UNUSED


def codes(path: Path) -> set[str]:
    return {one.code for one in unusual(open_model(path))}


CHANGES: dict[str, dict[str, Any]] = {
    "unusual.empty-array": {"general.tags": ("array[string]", [])},
    "unusual.rope-scaling": {"qwen2.rope.scaling.type": "yarn"},
    "unusual.sliding-window": {"qwen2.attention.sliding_window": ("uint32", 64)},
    "unusual.key-type": {"qwen2.block_count": ("uint64", 4)},
    "unusual.special-out-of-range": {"tokenizer.ggml.eos_token_id": 99_999},
    "unusual.no-pre": {"tokenizer.ggml.pre": None}, "unusual.no-merges": {"tokenizer.ggml.merges": None},
    "unusual.no-template": {"tokenizer.chat_template": None}, "unusual.no-architecture": {"general.architecture": None},
}  # fmt: skip


def changed(path: Path, out: Path, keys: dict[str, Any], alignment: int = 32) -> Path:
    """The file with these keys, each a value of its old type, (type, value), or None to take it out."""
    header = gguf.read_header(path)
    model = gguf.model_of(header)
    fields = dict(header.fields)
    for key, value in keys.items():
        kind, plain = value if isinstance(value, tuple) else (None, value)
        if plain is None:
            fields.pop(key)
        else:
            old = fields.get(key)
            fields[key] = gguf.field_of(key, kind or (old.type_name if old else "string"), plain)
    infos = gguf.layout([(t.name, t.type, t.shape) for t in model.tensors.values()], alignment)
    body = b"".join(t.raw.tobytes() + bytes(-t.nbytes % alignment) for t in model.tensors.values())
    out.write_bytes(gguf.pack_header(list(fields.values()), infos, alignment=alignment) + body)
    return out


@pytest.mark.parametrize("code", CHANGES)
def test_each_is_pointed_out_where_it_is(tiny: Path, tmp_path: Path, code: str) -> None:
    usual = codes(tiny)
    assert codes(changed(tiny, tmp_path / "x.gguf", CHANGES[code])) == usual | {code} and code not in usual


def test_alignment_padding_and_version(tiny: Path, tmp_path: Path) -> None:
    wide = changed(tiny, tmp_path / "a.gguf", {"general.alignment": ("uint32", 64)}, alignment=64)
    assert codes(wide) == codes(tiny) | {"unusual.alignment"}
    kinds = np.array(open_model(tiny).tokenizer.token_types, np.int32)
    kinds[-6:] = UNUSED  # five are so in the embedded model
    padded = changed(tiny, tmp_path / "p.gguf", {"tokenizer.ggml.token_type": ("array[int32]", kinds)})
    (found,) = [one for one in unusual(open_model(padded)) if one.code == "unusual.padded"]
    assert "the last 6 of 840 tokens" in found.says
    assert "unusual.tied" in codes(write(tmp_path / "g.gguf", "gemma2"))


def test_other_architectures_and_apr(tmp_path: Path) -> None:
    for kind in KINDS:
        path = write(tmp_path / f"{kind}.gguf", kind)
        convert(path, tmp_path / f"{kind}.apr")
        assert codes(path) == codes(tmp_path / f"{kind}.apr"), kind


def test_a_variant_with_a_key_that_describes_is_usual(tiny: Path, tmp_path: Path) -> None:
    assert codes(variant(tiny, tmp_path / "v.gguf", keys={"general.description": "healthy"})) == codes(tiny)
