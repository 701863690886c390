"""What `engines.base` promises, compared with float64 formulas, for every engine that this machine can make."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import CONFIG, random_model, tensor

from aprlab import engines
from aprlab.architectures import forward
from aprlab.engines.base import Cache, Engine
from aprlab.engines.blas import blas_threads
from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.model.model import Model
from aprlab.quants import types

UNIT = 2.0**-24
T = 7


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module", params=engines.NAMES)
def engine(request: pytest.FixtureRequest, model: Model) -> Iterator[Engine]:
    try:
        made = engines.create(request.param, model)
    except (UsageError, UnsupportedError) as reason:  # no library; no driver
        pytest.skip(str(reason))
    yield made
    made.close()


def rows(engine: Engine, shape: tuple[int, ...], seed: int = 3) -> tuple[np.ndarray, Any]:
    """Random float32 of `shape`, and the same as the engine's own array."""
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x, engine.from_numpy(x.copy())


def product_tolerance(engine: Engine, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(T, rows): float32's worst case for each dot product; for `q8`, half a step of 127 per block of 256 in addition."""
    size = np.abs(x.astype(np.float64)) @ np.abs(w.T)
    bound = (w.shape[1] + 2) * UNIT * size
    if engine.contract == "q8":
        bound += np.abs(x).max() / 127 * np.abs(w).sum(-1)
    return bound + UNIT * size


def test_arrays_go_in_and_out_unchanged(engine: Engine) -> None:
    x, mine = rows(engine, (T, 3, 5))
    back = engine.to_numpy(mine)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(engine.to_numpy(mine[-1:]), x[-1:])
    np.testing.assert_array_equal(engine.to_numpy(mine.reshape((T, 15))), x.reshape(T, 15))


def test_embed_decodes_exactly_the_rows_asked_for(engine: Engine, model: Model) -> None:
    tokens = np.array([5, 299, 0, 5], np.int64)
    table = model.tensors["token_embd.weight"].dequantise()
    np.testing.assert_array_equal(engine.to_numpy(engine.embed(tokens, "token_embd.weight")), table[tokens])


@pytest.mark.parametrize("name", [n for n, t in random_model().tensors.items() if len(t.shape) == 2])
def test_matmul_of_every_type(engine: Engine, model: Model, name: str) -> None:
    weight = model.tensors[name]
    for count in (1, T):
        x, mine = rows(engine, (count, weight.cols))
        w = weight.dequantise().astype(np.float64)
        y = engine.to_numpy(engine.matmul(mine, name))
        assert y.shape == (count, weight.rows)
        assert y.dtype == np.float32
        assert np.all(np.abs(y - x.astype(np.float64) @ w.T) <= product_tolerance(engine, x, w))


def test_matmul_adds_the_bias_that_is_named(engine: Engine, model: Model) -> None:
    _, mine = rows(engine, (T, CONFIG.embedding_length))
    plain = engine.to_numpy(engine.matmul(mine, "blk.0.attn_k.weight"))
    both = engine.to_numpy(engine.matmul(mine, "blk.0.attn_k.weight", "blk.0.attn_k.bias"))
    bias = model.tensors["blk.0.attn_k.bias"].dequantise()
    assert np.abs(bias).max() > 0.5
    np.testing.assert_allclose(both, plain + bias, atol=8 * UNIT * np.abs(plain).max(), rtol=0)


def test_norm(engine: Engine, model: Model) -> None:
    x, mine = rows(engine, (T, CONFIG.embedding_length))
    w = model.tensors["blk.0.attn_norm.weight"].dequantise().astype(np.float64)
    for eps in (1e-6, 0.5):
        truth = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * w
        y = engine.to_numpy(engine.norm(mine, "blk.0.attn_norm.weight", eps))
        np.testing.assert_allclose(y, truth, atol=32 * UNIT * np.abs(truth).max(), rtol=0)


@pytest.mark.parametrize("style", ["neox", "norm"])
def test_rope_is_a_complex_turn_of_the_right_pairs(engine: Engine, style: str) -> None:
    size, theta = CONFIG.head_dim, 10_000.0
    x, mine = rows(engine, (T, 3, size))
    positions = np.arange(20, 20 + T, dtype=np.int64)
    turn = np.exp(1j * np.outer(positions, theta ** (-2.0 * np.arange(size // 2) / size)))[:, None, :]
    pairs = [(i, i + size // 2) if style == "neox" else (2 * i, 2 * i + 1) for i in range(size // 2)]
    first, second = (np.array(index) for index in zip(*pairs, strict=True))
    z = (x[..., first] + 1j * x[..., second]) * turn
    truth = np.empty(x.shape)
    truth[..., first], truth[..., second] = z.real, z.imag
    y = engine.to_numpy(engine.rope(mine, positions, theta, style))
    # the angle itself may be float32: position 26 is then off by 26 units
    np.testing.assert_allclose(y, truth, atol=64 * UNIT * np.abs(x).max(), rtol=0)


def test_rope_refuses_an_unknown_style(engine: Engine) -> None:
    _, mine = rows(engine, (T, 3, CONFIG.head_dim))
    with pytest.raises(UnsupportedError, match=r"'yarn'.*neox.*norm"):
        engine.rope(mine, np.arange(T), 1e4, "yarn")


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """float64, all T queries over the T keys, one head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            score = k[: t + 1, head // group].astype(np.float64) @ q[t, head] / np.sqrt(q.shape[2])
            p = np.exp(score - score.max())
            out[t, head] = p @ v[: t + 1, head // group] / p.sum()
    return out.reshape(len(q), -1)


@pytest.mark.parametrize("chunks", [(T,), (1,) * T, (4, 3)])
def test_attend_in_one_pass_and_in_many(engine: Engine, chunks: tuple[int, ...]) -> None:
    heads, kv, size = CONFIG.head_count, CONFIG.head_count_kv, CONFIG.head_dim
    (q, mine_q), (k, mine_k), (v, mine_v) = (rows(engine, (T, n, size), seed=n + i) for i, n in enumerate((heads, kv, kv)))
    cache = engine.new_cache(CONFIG, T)
    layer = CONFIG.block_count - 1
    pieces, start = [], 0
    for count in chunks:
        part = slice(start, start + count)
        positions = cache.positions(count)
        pieces.append(engine.to_numpy(engine.attend(mine_q[part], mine_k[part], mine_v[part], cache, layer, positions)).copy())
        assert cache.length == start  # moving it is the forward pass's business
        cache.advance(count)
        start += count
    y = np.concatenate(pieces)
    assert y.shape == (T, heads * size)
    np.testing.assert_allclose(y, attention(q, k, v), atol=(size + T + 16) * UNIT * np.abs(v).max() * 4, rtol=0)


def test_attend_keeps_layers_apart(engine: Engine) -> None:
    size = CONFIG.head_dim
    (_, q), (k, mine_k), (_, mine_v) = (rows(engine, (1, n, size), seed=n) for n in (6, 2, 2))
    cache = engine.new_cache(CONFIG, 2)
    first = engine.to_numpy(engine.attend(q, mine_k, mine_v, cache, 0, cache.positions(1))).copy()
    engine.attend(q, mine_k, engine.from_numpy(k * 9), cache, 1, cache.positions(1))
    again = engine.to_numpy(engine.attend(q, mine_k, mine_v, cache, 0, cache.positions(1)))
    np.testing.assert_array_equal(first, again)


def test_swiglu_and_add(engine: Engine) -> None:
    (gate, mine_gate), (up, mine_up) = (rows(engine, (T, 512), seed=s) for s in (4, 5))
    truth = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    got = engine.to_numpy(engine.swiglu(mine_gate, mine_up))
    np.testing.assert_allclose(got, truth, atol=16 * UNIT * np.abs(truth).max(), rtol=0)
    np.testing.assert_array_equal(engine.to_numpy(engine.add(mine_gate, mine_up)), gate + up)


def test_swiglu_far_out_is_zero_or_the_gate(engine: Engine) -> None:
    gate = np.array([[-1000.0, -100.0, 100.0, 1000.0]], np.float32)
    got = engine.to_numpy(engine.swiglu(engine.from_numpy(gate), engine.from_numpy(np.ones_like(gate))))
    np.testing.assert_allclose(got, [[0.0, 0.0, 100.0, 1000.0]], atol=1e-30)


def test_results_are_new_and_inputs_stay(engine: Engine) -> None:
    """Two calls give two arrays, and neither touches its input."""
    width, ffn = CONFIG.embedding_length, CONFIG.feed_forward_length
    x, mine = rows(engine, (T, width))
    g, wide = rows(engine, (T, ffn))
    h, heads = rows(engine, (T, CONFIG.head_count, CONFIG.head_dim))
    calls = {
        "norm": lambda: engine.norm(mine, "output_norm.weight", 1e-6),
        "matmul": lambda: engine.matmul(mine, "blk.1.ffn_up.weight"),
        "rope": lambda: engine.rope(heads, np.arange(T), 1e4, "neox"),
        "swiglu": lambda: engine.swiglu(wide, wide),
        "add": lambda: engine.add(mine, mine),
        "embed": lambda: engine.embed(np.arange(T), "token_embd.weight"),
    }
    for name, call in calls.items():
        first = call()
        kept = engine.to_numpy(first).copy()
        second = call()
        assert first is not second, name
        np.testing.assert_array_equal(engine.to_numpy(first), kept, err_msg=name)
        assert not np.shares_memory(engine.to_numpy(first), engine.to_numpy(second)), name
    for before, after in ((x, mine), (g, wide), (h, heads)):
        np.testing.assert_array_equal(engine.to_numpy(after), before)


def test_missing_and_misshapen_tensors_are_named(engine: Engine, model: Model) -> None:
    _, mine = rows(engine, (T, CONFIG.embedding_length))
    with pytest.raises(FormatError, match=r"blk\.9\.attn_q\.weight"):
        engine.matmul(mine, "blk.9.attn_q.weight")
    with pytest.raises(FormatError, match=r"blk\.0\.attn_o\.bias"):
        engine.matmul(mine, "blk.0.attn_q.weight", "blk.0.attn_o.bias")
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_down\.weight.*\(256, 512\).*256"):
        engine.matmul(mine, "blk.0.ffn_down.weight")
    with pytest.raises(FormatError, match=r"blk\.0\.attn_k\.bias.*\(64,\).*\(192,\)"):
        engine.matmul(mine, "blk.0.attn_q.weight", "blk.0.attn_k.bias")
    with pytest.raises(FormatError, match=r"blk\.0\.attn_k\.bias"):
        engine.norm(mine, "blk.0.attn_k.bias", 1e-6)


# -- the reference engine's own promises -------------------------------------------------------------------------------


def test_streamed_weights_agree_with_kept_ones(model: Model) -> None:
    kept, streamed = (ReferenceEngine(model, cache_weights=keep) for keep in (True, False))
    kept.warm()
    streamed.warm()
    assert kept.memory()["weights"] == 4 * sum(
        t.size for n, t in model.tensors.items() if len(t.shape) == 2 and n != "token_embd.weight"
    )
    x = np.random.default_rng(0).normal(size=(T, 256)).astype(np.float32)
    for name in ("blk.0.ffn_up.weight", "output.weight"):
        w = model.tensors[name].dequantise().astype(np.float64)
        difference = np.abs(kept.matmul(x, name).astype(np.float64) - streamed.matmul(x, name))
        assert np.all(difference <= 2 * product_tolerance(kept, x, w))
    assert streamed.memory()["weights"] == 0
    kept.close()
    assert kept.memory()["weights"] == 0


def test_row_blocks_cover_a_tall_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows that do not divide the rows evenly: every row comes out once, in its place."""
    model = random_model()
    monkeypatch.setattr("aprlab.engines.reference._BLOCK_BYTES", 4 * 256 * 37)
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    w = model.tensors["output.weight"].dequantise()
    for keep in (True, False):
        y = ReferenceEngine(model, cache_weights=keep).matmul(x, "output.weight")
        np.testing.assert_allclose(y, x @ w.T, atol=1e-4)


def test_memory_decides_whether_weights_are_kept(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    import psutil

    for available, keep in ((1 << 40, True), (1 << 10, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: type("Memory", (), {"available": available}))
        assert ReferenceEngine(model).cache_weights is keep


def test_tied_embedding_is_kept_where_it_is_the_output() -> None:
    model = random_model(config=replace(CONFIG, tied_embeddings=True))
    engine = ReferenceEngine(model, cache_weights=True)
    engine.warm()
    assert engine.memory()["weights"] == 4 * sum(t.size for t in model.tensors.values() if len(t.shape) == 2)


def test_attention_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    q, k, v = (np.random.default_rng(n).normal(size=(T, n, 32)).astype(np.float32) for n in (6, 2, 2))
    engine = ReferenceEngine(model)
    for block in (1, 3, 100):
        monkeypatch.setattr("aprlab.engines.reference._QUERY_BLOCK", block)
        cache = engine.new_cache(CONFIG, T)
        np.testing.assert_allclose(engine.attend(q, k, v, cache, 0, cache.positions(T)), attention(q, k, v), atol=1e-5)


def test_attention_refuses_heads_that_do_not_divide(model: Model) -> None:
    engine = ReferenceEngine(model)
    q, k = np.ones((1, 5, 32), np.float32), np.ones((1, 2, 32), np.float32)
    with pytest.raises(FormatError, match="5 query heads"):
        engine.attend(q, k, k, engine.new_cache(CONFIG, 1), 0, np.arange(1))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_hold_for_the_matmul_only(model: Model, threads: int) -> None:
    from threadpoolctl import threadpool_info

    before = threadpool_info()
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    engine = ReferenceEngine(model, threads=threads)
    with blas_threads(threads):
        assert all(pool["num_threads"] <= threads for pool in threadpool_info() if pool["user_api"] == "blas")
    np.testing.assert_allclose(engine.matmul(x, "output.weight"), ReferenceEngine(model).matmul(x, "output.weight"), atol=1e-4)
    assert threadpool_info() == before


# -- the table of engines ----------------------------------------------------------------------------------------------


def test_unknown_engine_and_senseless_threads(model: Model) -> None:
    with pytest.raises(UsageError, match=r"'turbo'.*reference.*jit"):
        engines.create("turbo", model)
    with pytest.raises(UsageError, match="0 threads"):
        engines.create("reference", model, threads=0)


def test_engine_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setitem(engines._ENGINES, "cuda", ("aprlab.engines.of_tomorrow", "Engine"))
    with pytest.raises(UsageError, match=r"'cuda' is not available here.*of_tomorrow"):
        engines.create("cuda", model)


def test_cache_counts_positions() -> None:
    cache = Cache(None, None, capacity=5)
    assert cache.positions(3).tolist() == [0, 1, 2]
    cache.advance(3)
    assert cache.positions(2).tolist() == [3, 4]
    with pytest.raises(UsageError, match=r"3 \+ 3 positions.*5"):
        cache.positions(3)
    cache.truncate(1)
    assert cache.positions(1).tolist() == [1]
    for wrong in (-1, 2):
        with pytest.raises(UsageError, match="cannot cut"):
            cache.truncate(wrong)


def test_a_weight_of_one_dimension_is_no_matrix(model: Model) -> None:
    values = np.ones(256, np.float32)
    broken = random_model()
    broken.tensors["output.weight"] = tensor("output.weight", values, types.F32)
    with pytest.raises(FormatError, match=r"output\.weight.*\(256,\)"):
        ReferenceEngine(broken).matmul(np.ones((1, 256), np.float32), "output.weight")


def test_hooks_come_and_go(engine: Engine) -> None:
    seen: list[tuple[str, Any]] = []

    def first(y: Any, x: Any, weight: str, bias: str | None = None) -> None:
        seen.append((weight, y))

    def second(y: Any, *args: Any, **named: Any) -> None:
        seen.append(("second", y))

    name = "blk.0.ffn_up.weight"
    x = rows(engine, (2, engine.model.tensor(name).cols))[1]
    plain = engine.to_numpy(engine.matmul(x, name)).copy()
    with engine.hooked("matmul", first), engine.hooked("matmul", second):
        y = engine.matmul(x, name)
        assert seen == [(name, y), ("second", y)]
        engine.remove_hook("matmul", first)
        engine.matmul(x, weight=name)
        assert [who for who, _ in seen] == [name, "second", "second"]
        engine.add_hook("matmul", first)
    np.testing.assert_array_equal(engine.to_numpy(y), plain)
    engine.matmul(x, name)
    assert len(seen) == 3 and "matmul" not in vars(engine)  # without hooks the class's own method, and nothing between
    with pytest.raises(UsageError, match="no primitive 'jump'"):
        engine.add_hook("jump", first)
    with pytest.raises(ValueError, match="no such hook"):
        engine.remove_hook("matmul", first)


@pytest.mark.parametrize("name", ["reference", "jit"])
def test_infinite_weights_run_without_a_warning_on_any_thread(model: Model, name: str) -> None:
    broken = model.tensors["blk.0.attn_output.weight"]
    values = broken.dequantise().copy()
    values[1, 2:4] = np.inf, -np.inf  # which cancel where two activations have one sign
    tensors = {**model.tensors, broken.name: broken.replace(type=types.F32, raw=values.view(np.uint8).reshape(-1))}
    one = engines.create(name, model.with_changes(tensors=tensors), threads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = one.to_numpy(forward(one, model.config, range(12), one.new_cache(model.config, 12)))
    one.close()
    assert np.isnan(out).any(), "the infinity came through"
