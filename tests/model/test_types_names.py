"""The type table and the name bijection: every member, both ways."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aprlab.errors import UnsupportedError
from aprlab.formats import apr
from aprlab.formats.apr import scanner
from aprlab.formats.reading import Cursor
from aprlab.model import names
from aprlab.quants import types


def test_the_table_is_the_packages_plus_two() -> None:
    assert {t.code for t in types.TYPES} - {128, 129} == {int(t) for t in GGMLQuantizationType}
    differing = set()
    for member in GGMLQuantizationType:
        row = types.by_code(int(member))
        assert row.name == member.name
        if (row.block_elements, row.block_bytes) != GGML_QUANT_SIZES[member]:
            differing.add(row.name)
    assert differing <= types.CORRECTED.keys()


@pytest.mark.peer
def test_sizes_are_those_of_ggmls_c() -> None:
    package = pytest.importorskip("xllamacpp")
    (library,) = Path(package.__file__).parent.glob("*.so")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_type_size.restype, ggml.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    for row in types.TYPES:
        if row not in (types.APR_Q4, types.APR_Q8):
            assert (ggml.ggml_blck_size(row.code), ggml.ggml_type_size(row.code)) == (row.block_elements, row.block_bytes), row


@pytest.mark.parametrize("kind", types.TYPES, ids=lambda t: t.name)
def test_every_type_comes_back_from_its_dtype_byte(kind: types.TensorType) -> None:
    """The ticket's invariant I-3 over every member: type -> byte -> index entry -> type."""
    shape = (3, kind.block_elements * 64)  # large enough that AprQ8 and Q8_1 cannot be confused
    entry = apr.Entry("model.norm.weight", kind.code, shape, 0, kind.nbytes(shape))
    image = np.zeros(64 + entry.size, np.uint8)
    box = apr.Container(Path("x"), b"APR\0", (2, 0), 0, 64, 0, 64, 64, {}, [entry], image)
    packed = entry.pack()
    at = Cursor(memoryview(packed), Path("x"))
    (read,) = scanner.read_index(at, 1, len(packed))
    assert read == entry
    assert apr.type_of(box, read, shape) is kind


@pytest.mark.parametrize("code", [4, 36, 37, 38, 99, 127, 130, 255])
def test_unknown_codes_raise(code: int) -> None:
    assert code not in {t.code for t in types.TYPES}
    with pytest.raises(UnsupportedError, match=str(code)):
        types.by_code(code)
    assert apr.candidates(code) == ()


def test_names_are_read_generously_and_refused_clearly() -> None:
    assert types.by_name("q4_k") is types.by_name("q4k") is types.Q4_K
    assert types.by_name("aprq8") is types.APR_Q8
    with pytest.raises(UnsupportedError, match="q9_z"):
        types.by_name("q9_z")


def test_the_size_law() -> None:
    assert types.Q4_K.nbytes((1536, 8960)) == 1536 * 8960 // 256 * 144
    assert types.Q6_K.nbytes((7, 256)) == 7 * 210
    assert types.APR_Q8.nbytes((5, 7)) == 4 + 35
    assert not types.Q4_K.fits((4, 896), 4 * 896 * 144 // 256)  # rows of 896 hold no whole blocks
    with pytest.raises(UnsupportedError, match=r"896.*Q4_K"):
        types.Q4_K.nbytes((4, 896))


@pytest.mark.parametrize("layers", [24, 28, 36, 48])
@pytest.mark.parametrize("naming", names.VARIANTS)
def test_names_are_a_bijection(layers: int, naming: str) -> None:
    inventory = list(names.inventory(layers))
    assert len(inventory) == len(set(inventory)) == 12 * layers + 3
    written = [names.from_gguf(name, naming) for name in inventory]
    assert len(set(written)) == len(inventory)
    assert [names.to_gguf(name, naming) for name in written] == inventory


def test_names_by_example() -> None:
    name = "blk.27.attn_q.bias"
    assert {naming: names.from_gguf(name, naming) for naming in names.VARIANTS} == {
        "canonical": "model.layers.27.self_attn.q_proj.bias",
        "bare": "layers.27.self_attn.q_proj.bias",
        "short": "27.q_proj.bias",
        "raw": "blk.27.attn_q.bias",
    }
    assert names.to_gguf("model.layers.27.self_attn.r_proj.bias") is None
    assert names.to_gguf("model.layers.027.self_attn.q_proj.bias") is None  # a number has one spelling
    for layer in ("N", "1" * 5000, "٣"):
        assert names.to_gguf(f"model.layers.{layer}.self_attn.q_proj.bias") is None
        assert names.from_gguf(f"blk.{layer}.attn_q.bias") == f"blk.{layer}.attn_q.bias"
    assert set(names.namings_of("lm_head.weight")) == {"canonical", "bare", "short"}


def test_a_tied_model_has_two_global_tensors() -> None:
    assert "output.weight" not in set(names.inventory(36, separate_output=False))
