"""Block types against ggml's own C, called through the shared library that `xllamacpp` ships."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest
from test_quants import BLOCKED, bad_blocks, ids, random_blocks, samples

from aprlab import quants
from aprlab.formats import open_model
from aprlab.quants import search, types
from aprlab.quants.types import TensorType

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.peer

# gcc keeps the order of float sums and, without -mfma, each rounding: there our bytes must be C's. Where the compiler
# may fuse multiply and add (arm64), the search can end elsewhere, and only the law on the error is left.
BYTE_EQUAL = platform.machine() in ("x86_64", "AMD64")
FOREIGN = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"]
FOREIGN += ["NVFP4", "Q1_0"]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    return ctypes.CDLL(str(library))


def c_name(type_: TensorType) -> str:
    name = type_.name.lower()
    return name.removesuffix("_k") + "_K" if name.endswith("_k") else name


def call(function: ctypes._CFuncPtr, source: np.ndarray, target: np.ndarray, count: int) -> np.ndarray:
    function(ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(target.ctypes.data), ctypes.c_int64(count))
    return target


def c_decode(ggml: ctypes.CDLL, blocks: np.ndarray, type_: TensorType) -> np.ndarray:
    out = np.empty((len(blocks), type_.block_elements), np.float32)
    return call(ggml[f"dequantize_row_{c_name(type_)}"], blocks, out, out.size)


def c_encode(ggml: ctypes.CDLL, x: np.ndarray, type_: TensorType) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros((len(x), type_.block_bytes), np.uint8)
    return call(ggml[f"quantize_row_{c_name(type_)}_ref"], x, out, x.size)


def rmse(q: quants.Quant, blocks: np.ndarray, x: np.ndarray) -> float:
    return float(np.sqrt(np.mean((q.decode(blocks).astype(np.float64) - x) ** 2)))


def hold_against_c(ggml: ctypes.CDLL, q: quants.Quant, x: np.ndarray, name: str) -> None:
    """The law of an encoder: no larger an error than ggml's (1e-3 of it for fused arithmetic); on x86-64 the same bytes."""
    ours, theirs = q.encode(x), c_encode(ggml, x, q.type)
    assert rmse(q, ours, x) <= rmse(q, theirs, x) * (1 + 1e-3), f"{q.type}, {name}"
    if BYTE_EQUAL:
        wrong = (ours != theirs).any(axis=1)
        assert not wrong.any(), f"{q.type}, {name}: {wrong.sum()} of {len(x)} blocks differ"


@pytest.mark.parametrize("q", BLOCKED, ids=ids(BLOCKED))
def test_decode_is_bit_equal_to_c(ggml: ctypes.CDLL, q: quants.Quant) -> None:
    blocks = random_blocks(q, 2003, seed=1)
    assert bad_blocks(q.decode(blocks), c_decode(ggml, blocks, q.type)) == 0


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_decode_is_bit_equal_to_c(ggml: ctypes.CDLL, name: str) -> None:
    type_ = types.by_name(name)
    blocks = np.random.default_rng(2).integers(0, 120, (300, type_.block_bytes), dtype=np.uint8)
    assert bad_blocks(quants.decode(blocks, type_), c_decode(ggml, blocks, type_)) == 0


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_values_from_a_table_encode_as_llama_quantize_does(ggml: ctypes.CDLL, name: str) -> None:
    """`quantize_iq4_*` without an importance matrix, which tries fifteen roundings of a group's scale."""
    q = quants.REGISTRY[types.by_name(name)]
    function = ggml[f"quantize_{name.lower()}"]
    function.restype = ctypes.c_size_t
    for what, x in samples(q.type.block_elements):
        x = np.ascontiguousarray(x, np.float32)
        theirs = np.zeros((len(x), q.type.block_bytes), np.uint8)
        function(
            ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(theirs.ctypes.data), ctypes.c_int64(len(x)),
            ctypes.c_int64(x.shape[1]), None,
        )  # fmt: skip
        ours = q.encode(x)
        assert rmse(q, ours, x) <= rmse(q, theirs, x) * (1 + 1e-3), what
        if BYTE_EQUAL:
            np.testing.assert_array_equal(ours, theirs, err_msg=what)


def test_half_precision_encodes_as_c(ggml: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(100_000) * 10.0 ** rng.integers(-9, 4, 100_000)).astype(np.float32)
    ties = (np.arange(2**16, dtype=np.uint32) << 13 | np.uint32(0x1000)) + np.uint32(0x38000000)  # halfway between two float16
    x = np.concatenate([x, ties[ties < 0x477FF000].view(np.float32)])
    wanted = call(ggml.ggml_fp32_to_fp16_row, x, np.empty(x.size, np.uint16), x.size)
    np.testing.assert_array_equal(quants.encode(x[:, None], types.F16).view(np.uint16)[:, 0], wanted)
    x = np.concatenate([x, (np.arange(2**15, dtype=np.uint32) << 16 | np.uint32(0x8000)).view(np.float32)])
    x = x[np.abs(x) < 3.38e38]
    wanted = call(ggml.ggml_fp32_to_bf16_row_ref, x, np.empty(x.size, np.uint16), x.size)
    np.testing.assert_array_equal(quants.encode(x[:, None], types.BF16).view(np.uint16)[:, 0], wanted)


@pytest.mark.parametrize("q", BLOCKED, ids=ids(BLOCKED))
def test_encode_as_c(ggml: ctypes.CDLL, q: quants.Quant) -> None:
    for name, x in samples(q.type.block_elements, n=150):
        hold_against_c(ggml, q, x, name)


@pytest.mark.real
@pytest.mark.parametrize("q", BLOCKED, ids=ids(BLOCKED))
def test_encode_real_rows_as_c(ggml: ctypes.CDLL, real_05b: Path, q: quants.Quant) -> None:
    with open_model(real_05b) as model:
        for name in ("blk.0.ffn_down.weight", "blk.23.ffn_down.weight", "blk.11.ffn_down.weight"):
            x = model.tensors[name].dequantise(slice(100, 116))  # rows of 4864 = 19 x 256
            hold_against_c(ggml, q, x.reshape(-1, q.type.block_elements), name)


@pytest.mark.real
def test_decode_real_tensors_as_c(ggml: ctypes.CDLL, real_05b: Path) -> None:
    with open_model(real_05b) as model:
        seen = {}
        for tensor in model.tensors.values():
            if tensor.type.quantised and tensor.type not in seen:
                blocks = np.ascontiguousarray(tensor.blocks()[:64]).reshape(-1, tensor.type.block_bytes)
                seen[tensor.type] = bad_blocks(quants.decode(blocks, tensor.type), c_decode(ggml, blocks, tensor.type))
    assert {t.name for t in seen} == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert not any(seen.values()), seen


@pytest.mark.skipif(not BYTE_EQUAL, reason="bytes are held against C on x86-64 only")
def test_byte_equality_kills_mutants_of_the_search(ggml: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(5).standard_normal((300, 256)).astype(np.float32)
    healthy = search.make_qkx2_quants, search.make_qx_quants, search.make_q3_quants, search.ordered_sum

    def survives(q: quants.Quant) -> bool:
        return bool((q.encode(x) == c_encode(ggml, x, q.type)).all())

    def pairwise(a: np.ndarray) -> np.ndarray:
        return np.add.reduce(np.ascontiguousarray(a.T), axis=1)

    def one_step_less(x, w, nmax, rmin, rdelta, nstep, *, absolute):
        return healthy[0](x, w, nmax, rmin, rdelta, nstep - 1, absolute=absolute)

    def other_norm(x, w, nmax, rmin, rdelta, nstep, *, absolute):
        return healthy[0](x, w, nmax, rmin, rdelta, nstep, absolute=not absolute)

    def unweighted(x, w, nmax, rmin, rdelta, nstep, *, absolute):
        return healthy[0](x, np.ones_like(w), nmax, rmin, rdelta, nstep, absolute=absolute)

    minimum = [quants.Q2_K(), quants.Q4_K(), quants.Q5_K()]
    mutants = [("make_qkx2_quants", m, q) for m in (one_step_less, other_norm, unweighted) for q in minimum]
    mutants += [("ordered_sum", pairwise, quants.Q4_K())]  # elsewhere the last bit of a sum decides too seldom
    mutants += [("make_qx_quants", healthy[2], quants.Q6_K()), ("make_q3_quants", healthy[1], quants.Q3_K())]
    for name, mutant, q in mutants:
        assert survives(q)
        with monkeypatch.context() as patch:
            patch.setattr(search, name, mutant)
            assert not survives(q), f"{mutant.__name__} survives on {q.type}"
