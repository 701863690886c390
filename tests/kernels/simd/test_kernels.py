"""Kernels of the jit engine against their specifications: bitwise for decoding and rounding, derived bounds for sums."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np
import pytest

from aprlab import quants
from aprlab.kernels.simd import isa as isas
from aprlab.kernels.simd import kernels, plain
from aprlab.quants import types
from aprlab.quants.types import TensorType

UNIT = 2.0**-24
KINDS = list(kernels.KINDS)
QUANTISED = [t for t in KINDS if t.quantised]
NONE = np.empty(0, np.float32)
BEST = isas.choose()
OTHERS = [isa for isa in isas.ALL if isa is not BEST and (isa is not isas.AVX2 or isas.supported(isa))]


def named(value: Any) -> str:
    return str(getattr(value, "name", value))


def weights(type_: TensorType, rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Encoded random rows of unlike size: (raw uint8 1-D, their values float32 (rows, cols))."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, cols)) * rng.uniform(0.1, 3, (rows, 1)) + rng.normal(size=(rows, 1)) * 0.1
    raw = quants.quantise(x.astype(np.float32), type_).reshape(-1)
    return kernels.frozen(raw), quants.dequantise(raw, type_, (rows, cols))


def activations(count: int, cols: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, cols)) * rng.uniform(0.1, 4, cols)).astype(np.float32)


# -- decode -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", KINDS, ids=named)
def test_decode_is_bit_equal_to_the_package(type_: TensorType) -> None:
    """Random bytes: scales of every kind, subnormal, infinite and NaN among them."""
    rng = np.random.default_rng(2)
    n = 300 * max(1, type_.block_elements)
    raw = rng.integers(0, 256, type_.row_bytes(n), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_.code)).reshape(-1)
        own = quants.dequantise(raw, type_, (n,))
    out = np.full(n + 8, 7, np.float32)
    kernels.decode(kernels.KINDS[type_], kernels.frozen(raw), n, out)
    assert (out[n:] == 7).all(), "wrote past the end"
    for oracle in (want, own):
        bad = (out[:n].view(np.uint32) != oracle.view(np.uint32)) & ~(np.isnan(out[:n]) & np.isnan(oracle))
        assert not bad.any(), f"{bad.sum()} of {n} differ, first at {np.flatnonzero(bad)[0]}"


# -- contract f32 -------------------------------------------------------------------------------------------------------


def packed(type_: TensorType, raw: np.ndarray, cols: int) -> np.ndarray:
    """The matrix with eight rows side by side, zeros filling up the last eight."""
    step = kernels.ROWS * type_.row_bytes(cols)
    whole = np.zeros(-(-raw.size // step) * step, np.uint8)
    whole[: raw.size] = raw
    out = np.empty_like(whole)
    kernels.pack(kernels.fields(type_), type_.block_bytes, kernels.frozen(whole), type_.row_bytes(cols), out)
    return kernels.frozen(out)


def product(
    contract: str, isa: isas.Isa, type_: TensorType, raw: np.ndarray, x: np.ndarray, rows: int, bias: np.ndarray = NONE,
    tasks: int | None = None, refused: tuple[int, ...] = (), tiles: bool = False,
) -> np.ndarray:  # fmt: skip
    """What the engine's fused kernels make of it; `tasks` runs them in parallel, `tiles` takes those for prompts."""
    kind, row_bytes = kernels.KINDS[type_], type_.row_bytes(x.shape[1])
    name = "matmul_" + contract
    if kernels.packable(kind):
        name, raw = f"packed_{contract}{'_tiles' * tiles}", packed(type_, raw, x.shape[1])
    elif type_ is types.Q8_0 and contract == "f32":
        name = "q8_0_f32"
    out, odd = np.full((len(x), rows), np.nan, np.float32), np.zeros(len(x), np.uint8)
    kernel = getattr(kernels, name)
    args = isa, kind, raw, row_bytes, x, bias, out, odd, 0
    if tasks is None:
        said = kernel(*args, rows)
    else:
        kernel(*args, 0)
        said = kernels.product_parallel(kernels.address(kernel, *args, 0), *args[2:-1], tasks)
    assert tuple(np.flatnonzero(odd)) == refused
    assert (said > 0) == bool(refused)
    return out


def product_f32(
    isa: isas.Isa, type_: TensorType, raw: np.ndarray, x: np.ndarray, rows: int, bias: np.ndarray = NONE
) -> np.ndarray:
    return product("f32", isa, type_, raw, x, rows, bias)


def bound_f32(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Any order of summation, with or without fusing: (n + 4) roundings of the sum of magnitudes."""
    return (w.shape[1] + 4) * UNIT * (np.abs(x.astype(np.float64)) @ np.abs(w.T.astype(np.float64)))


@pytest.mark.parametrize(
    ("isa", "type_"),
    [(BEST, t) for t in KINDS] + [(isa, t) for isa in OTHERS for t in (types.Q5_0, types.Q6_K, types.Q8_0)],
    ids=named,
)
def test_products_of_contract_f32(isa: isas.Isa, type_: TensorType) -> None:
    rows, cols = 9, 512 if type_.quantised else 77  # plain floats need no whole blocks
    raw, w = weights(type_, rows, cols)
    x, bias = activations(3, cols), activations(1, rows, 5)[0]
    got = product_f32(isa, type_, raw, x, rows, bias)
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + bias
    bound = bound_f32(x, w) + UNIT * np.abs(exact)
    assert (np.abs(got - exact) <= bound).all()
    # the bound is tight enough to notice one weight that is off by one step, or two activations in each other's place
    swapped = x.copy()
    swapped[:, [3, 20]] = swapped[:, [20, 3]]
    assert (np.abs(product_f32(isa, type_, raw, swapped, rows, bias) - exact) > bound).any()
    bad = raw.copy()
    bad[bad.size // 2 :] ^= 1
    assert (np.abs(product_f32(isa, type_, kernels.frozen(bad), x, rows, bias) - exact) > bound).any()


def magnitudes(type_: TensorType, raw: np.ndarray, w: np.ndarray) -> np.ndarray:
    """|scale * integer| + |minimum| of every weight (rows, cols), in double: what the kernels' sums are made of."""
    size = np.abs(w.astype(np.float64))
    if type_.name in ("Q4_K", "Q4_1"):  # weight = a - m with a >= 0, and m is what an integer of 0 decodes to
        zero = raw.reshape(-1, type_.block_bytes).copy()
        zero[:, 16 if type_ is types.Q4_K else 4 :] = 0
        m = np.abs(quants.dequantise(zero.reshape(-1), type_, w.shape).astype(np.float64))
        return size + 2 * m
    return size


@pytest.mark.parametrize("type_", [types.Q5_0, types.Q4_1, types.Q4_K, types.Q6_K, types.Q8_0], ids=named)
def test_products_of_contract_f32_with_one_huge_activation_a_block(type_: TensorType) -> None:
    """The bound of docs/kernels.md, where it matters: 1000 times the others, and weights of all sizes opposite to it."""
    rows, cols = 8, 1024
    raw, w = weights(type_, rows, cols, 3)
    rng = np.random.default_rng(4)
    block = type_.block_elements
    x = activations(2, cols, 6)
    spots = np.arange(0, cols, block) + rng.integers(0, block, cols // block)
    x[:, spots] = 1000 * np.sign(x[:, spots])
    got = product_f32(BEST, type_, raw, x, rows)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    size = magnitudes(type_, raw, w)
    largest = np.abs(x).reshape(len(x), -1, block).max(-1)
    moved = largest.astype(np.float64) @ np.abs(w.astype(np.float64)).reshape(rows, -1, block).sum(-1).T * 2.02 * UNIT
    bound = moved + (cols // block + 12) * UNIT * (np.abs(x.astype(np.float64)) @ size.T)
    assert (np.abs(got - exact) <= bound).all()
    assert (bound <= 64 * bound_f32(x, w)).all()
    # a kernel that lost the last digit would be far outside
    step = np.repeat(2.0 ** (np.ceil(np.log2(largest)) - 15), block, axis=1)
    cut = (np.round(x / step) * step).astype(np.float32)
    assert (np.abs(product_f32(BEST, type_, raw, cut, rows) - exact) > bound).any()


@pytest.mark.parametrize("type_", [types.Q4_K, types.Q8_0], ids=named)
def test_activations_that_integers_do_not_suit_are_refused(type_: TensorType) -> None:
    raw, _ = weights(type_, 8, 512)
    healthy = activations(1, 512)[0]
    for value in (np.nan, np.inf, -np.inf, 1e35, 2.0**23):
        odd = healthy.copy()
        odd[300] = value
        product("f32", BEST, type_, raw, np.stack([healthy, odd, healthy, odd]), 8, refused=(1, 3))
    product("f32", BEST, type_, raw, np.stack([healthy * np.float32(1e-30), healthy]), 8, refused=(0,))
    assert not product("f32", BEST, type_, raw, np.zeros((1, 512), np.float32), 8).any()


def test_plain_float_products() -> None:
    """What is left for refused rows, on the bytes of the file."""
    for type_ in (types.Q5_0, types.Q4_K):
        raw, w = weights(type_, 9, 512)
        x, out = activations(3, 512), np.empty((3, 9), np.float32)
        kernels.matmul_f32(BEST, kernels.KINDS[type_], raw, type_.row_bytes(512), x, NONE, out, np.zeros(3, np.uint8), 0, 9)
        assert (np.abs(out - x.astype(np.float64) @ w.T.astype(np.float64)) <= bound_f32(x, w)).all()


# -- contract q8 --------------------------------------------------------------------------------------------------------


def product_q8(
    isa: isas.Isa, type_: TensorType, raw: np.ndarray, x: np.ndarray, rows: int, bias: np.ndarray = NONE
) -> np.ndarray:
    return product("q8", isa, type_, raw, x, rows, bias)


@pytest.mark.parametrize(
    ("isa", "type_"),
    [(BEST, t) for t in QUANTISED] + [(isa, t) for isa in OTHERS for t in (types.Q8_0, types.Q4_K)],
    ids=named,
)
def test_products_of_contract_q8(isa: isas.Isa, type_: TensorType) -> None:
    """Decoded weights times what the rounded activations stand for, in double; integers inside leave no room for order."""
    rows, cols = 7, 768
    raw, w = weights(type_, rows, cols)
    x, bias = activations(2, cols), activations(1, rows, 5)[0]
    rounded = np.empty_like(x)
    kernels.rounded(kernels.KINDS[type_], x, rounded)
    exact = rounded.astype(np.float64) @ w.T.astype(np.float64) + bias
    if type_ in (types.Q4_1, types.Q5_1):  # the minimum m meets s, which is d * sum(q) rounded to a half
        m = raw.reshape(rows, -1, type_.block_bytes)[:, :, 2:4].copy().view(np.float16)[:, :, 0].astype(np.float64)
        s = np.stack([plain.round_32(row, True)[2] for row in x]).astype(np.float64)
        exact += s @ m.T - rounded.reshape(len(x), -1, 32).sum(-1, dtype=np.float64) @ m.T
    size = np.abs(rounded).astype(np.float64) @ np.abs(w.T)
    # one float a block is added; minima and zero points are sums of their own, a few times as large
    bound = (cols // 32 + 8) * 4 * UNIT * size + UNIT * np.abs(exact)
    got = product_q8(isa, type_, raw, x, rows, bias)
    assert (np.abs(got - exact) <= bound).all()
    unrounded = x.astype(np.float64) @ w.T.astype(np.float64) + bias
    assert (np.abs(got - unrounded) > bound).any(), "the bound would not notice that activations were not rounded"


@pytest.mark.parametrize("type_", [types.Q5_0, types.Q4_1, types.Q6_K, types.Q4_K], ids=named)
def test_activations_are_rounded_as_the_loops_say(type_: TensorType) -> None:
    x = activations(2, 512)
    x[0, :32] = 0  # a block of nothing
    x[0, 32:64] = np.arange(-16, 16) * 0.5  # ties
    x[1, 256:] = 0
    q, d, s = (
        np.empty((2, 512), np.int8),
        np.empty((2, 512 // min(256, type_.block_elements)), np.float32),
        np.empty((2, 512 // (16 if type_.block_elements == 256 else 32)), np.float32),
    )
    kernels.quantise_rows(kernels.KINDS[type_], x, q, d, s)
    for t in range(2):
        if type_.block_elements == 32:
            want = plain.round_32(x[t], type_ is types.Q4_1)
        else:
            want = plain.round_256(x[t])
            if type_ is types.Q4_K:  # its minima take sums of 32
                s[t, 16:], sums = 0, want[2].reshape(-1, 2).sum(1)
                want = want[0], want[1], np.concatenate([sums, np.zeros(16, np.float32)])
        for got, wanted in zip((q[t], d[t], s[t]), want, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("type_", "format_", "size"), [(types.Q5_0, "q8_0", 34), (types.Q4_1, "q8_1", 36), (types.Q6_K, "q8_K", 292)], ids=named
)
def test_activations_are_rounded_as_ggml_does(type_: TensorType, format_: str, size: int) -> None:
    x = activations(1, 2048)
    q, d = np.empty((1, 2048), np.int8), np.empty((1, 2048 // min(256, type_.block_elements)), np.float32)
    s = np.empty((1, 2048 // (16 if format_ == "q8_K" else 32)), np.float32)
    kernels.quantise_rows(kernels.KINDS[type_], x, q, d, s)
    ggml = _ggml()
    step = 256 if format_ == "q8_K" else 32
    blocks = np.zeros((2048 // step, size), np.uint8)
    quantise = getattr(ggml, f"quantize_row_{format_}")
    quantise(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(blocks.ctypes.data), ctypes.c_int64(2048))
    if format_ == "q8_K":
        np.testing.assert_array_equal(blocks[:, :4].copy().view(np.float32).reshape(-1), d[0])
        np.testing.assert_array_equal(blocks[:, 4:260].copy().view(np.int8).reshape(-1), q[0])
        np.testing.assert_array_equal(blocks[:, 260:].copy().view(np.int16).reshape(-1), s[0])
        return
    np.testing.assert_array_equal(blocks[:, :2].copy().view(np.float16).reshape(-1), d[0])
    np.testing.assert_array_equal(blocks[:, size - 32 :].copy().view(np.int8).reshape(-1), q[0])
    if format_ == "q8_1":
        np.testing.assert_array_equal(blocks[:, 2:4].copy().view(np.float16).reshape(-1), s[0])


@pytest.mark.peer
@pytest.mark.parametrize("type_", QUANTISED, ids=named)
def test_products_of_contract_q8_against_ggml(type_: TensorType) -> None:
    """Same integers, same scales: what is left is the order in which a few floats are added."""
    ggml, cols = _ggml(), 1024
    raw, w = weights(type_, 5, cols)
    x = activations(1, cols)
    got = product_q8(BEST, type_, raw, x, 5)[0]
    name = type_.name.lower().replace("_k", "_K")
    format_ = "q8_K" if name.endswith("K") else "q8_1" if name.endswith("_1") else "q8_0"
    rounded, want = np.zeros(2048, np.uint8), np.zeros(5, np.float32)
    pointer, none = ctypes.c_void_p, ctypes.c_size_t(0)
    getattr(ggml, f"quantize_row_{format_}")(pointer(x.ctypes.data), pointer(rounded.ctypes.data), ctypes.c_int64(cols))
    for r in range(5):
        getattr(ggml, f"ggml_vec_dot_{name}_{format_}")(
            ctypes.c_int(cols), pointer(want.ctypes.data + 4 * r), none,
            pointer(raw.ctypes.data + r * type_.row_bytes(cols)), none,
            pointer(rounded.ctypes.data), none, ctypes.c_int(1),
        )  # fmt: skip
    size = np.abs(x[0].astype(np.float64)) @ np.abs(w.T)
    assert (np.abs(got - want) <= (cols // 32 + 8) * 4 * UNIT * size).all()
    assert (np.abs(product_f32(BEST, type_, raw, x, 5)[0] - want) > (cols // 32 + 8) * 4 * UNIT * size).any()


def _ggml() -> ctypes.CDLL:
    """ggml's C functions, from llama.cpp's Python package."""
    package = pytest.importorskip("xllamacpp")
    from pathlib import Path

    library = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_cpu_init()
    return library


# -- threads and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", ["f32", "q8"])
def test_neither_threads_nor_batches_change_a_bit(contract: str) -> None:
    type_, rows, cols = types.Q4_K, 37, 256
    raw, _ = weights(type_, rows, cols)
    x, bias = activations(3, cols), activations(1, rows, 5)[0]
    want = product(contract, BEST, type_, raw, x, rows, bias)
    for tasks in (1, 2, 3, 64):
        np.testing.assert_array_equal(product(contract, BEST, type_, raw, x, rows, bias, tasks), want)
    for t in range(3):
        np.testing.assert_array_equal(product(contract, BEST, type_, raw, x[t : t + 1], rows, bias)[0], want[t])


@pytest.mark.parametrize("contract", ["f32", "q8"])
@pytest.mark.parametrize("type_", [types.Q4_K, types.Q6_K, types.Q5_0, types.Q4_1], ids=named)
def test_tiles_of_tokens_give_what_each_token_gives(type_: TensorType, contract: str) -> None:
    """To the bit; with an unfinished tile, an unfinished eight of rows, and a token that integers do not suit."""
    rows, cols = 8 * 40 + 3, 768  # more rows than one visit to the tokens takes
    raw, _ = weights(type_, rows, cols)
    assert raw.size > 1 << 17
    x, bias = activations(7, cols), activations(1, rows, 5)[0]
    want = np.concatenate([product(contract, BEST, type_, raw, x[t : t + 1], rows, bias) for t in range(7)])
    np.testing.assert_array_equal(product(contract, BEST, type_, raw, x, rows, bias, tiles=True), want)
    np.testing.assert_array_equal(product(contract, BEST, type_, raw, x, rows, bias, tasks=3, tiles=True), want)
    if contract == "f32":
        x[[2, 6], 30] = 1e9
        got = product(contract, BEST, type_, raw, x, rows, bias, refused=(2, 6), tiles=True)
        np.testing.assert_array_equal(np.delete(got, [2, 6], 0), np.delete(want, [2, 6], 0))


# -- attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 24, 128])
def test_attention(size: int) -> None:
    heads, kv_heads, before, count = 6, 2, 131, 5
    total, room = before + count, 144
    rng = np.random.default_rng(size)
    q, k, v = (rng.normal(size=shape).astype(np.float32) * 1.5 for shape in
               ((count, heads, size), (total, kv_heads, size), (total, kv_heads, size)))  # fmt: skip
    keys = np.full((kv_heads, room // 8, size, 8), np.nan, np.float32)
    keys[:, total // 8 :] = 1e3  # positions that nobody filled: no NaN, but they must not weigh
    values = np.full((kv_heads, room, size), np.nan, np.float32)
    kernels.store_keys_values(k[:before], v[:before], keys, values, 0)
    kernels.store_keys_values(k[before:], v[before:], keys, values, before)
    flat = keys.reshape(-1), values.reshape(-1), heads, kv_heads, size, room

    out = np.empty(q.size, np.float32)
    kernels.attend_serial(q.reshape(-1), *flat, before, out)
    want = plain.attend(q, k, v, before)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=40 * UNIT * np.abs(v).max(), rtol=0)
    assert np.abs(plain.attend(q, k, v, before - 1) - want).max() > 1e-2, "a look one position too short would show"

    for tasks in (1, 2, 3):
        again = np.empty_like(out)
        kernels.attend_parallel(q.reshape(-1), *flat, before, again, tasks)
        np.testing.assert_array_equal(again, out)
        for t in range(count):
            one = np.empty(heads * size, np.float32)
            kernels.attend_one_parallel(q[t].reshape(-1), *flat, before + t, one, tasks)
            np.testing.assert_array_equal(one, out.reshape(count, -1)[t])


def test_attention_passes_nan_on() -> None:
    q = np.ones(32, np.float32)
    keys, values = np.zeros((1, 1, 32, 8), np.float32), np.ones((1, 8, 32), np.float32)
    keys[0, 0, 5, 2] = np.nan
    out = np.zeros(32, np.float32)
    kernels.attend_serial(q, keys.reshape(-1), values.reshape(-1), 1, 1, 32, 8, 3, out)
    assert np.isnan(out).all()
    kernels.attend_serial(q, keys.reshape(-1), values.reshape(-1), 1, 1, 32, 8, 1, out)  # does not see position 2
    np.testing.assert_array_equal(out, 1)
