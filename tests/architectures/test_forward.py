"""The forward pass against an independent float64 one; what a fault would do to it is part of each test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import CONFIG, random_model, tensor
from oracle import Oracle, logits_and_tolerance

from aprlab.architectures import check, forward, points
from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import FormatError, UsageError
from aprlab.model import names
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import shapes
from aprlab.model.model import Model
from aprlab.quants import types

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, CONFIG.vocab_size, 13)]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module")
def engine(model: Model) -> ReferenceEngine:
    return ReferenceEngine(model)


@pytest.fixture(scope="module")
def truth(model: Model) -> tuple[np.ndarray, float]:
    return logits_and_tolerance(model, CONFIG, TOKENS)


def run(engine: ReferenceEngine, chunks: tuple[int, ...] = (len(TOKENS),), config: ModelConfig = CONFIG, **kw: Any) -> np.ndarray:
    """Logits (T, V) of TOKENS, passed in as many pieces as `chunks` says."""
    assert sum(chunks) == len(TOKENS)
    cache, start, out = engine.new_cache(config, len(TOKENS)), 0, []
    for count in chunks:
        out.append(forward(engine, config, TOKENS[start : start + count], cache, **kw))
        start += count
    return np.concatenate(out)


def test_logits_are_those_of_float64(engine: ReferenceEngine, truth: tuple[np.ndarray, float]) -> None:
    logits, tolerance = truth
    assert tolerance < 1e-3 * np.abs(logits).max()  # or it would forgive anything
    assert np.abs(run(engine) - logits).max() <= tolerance


CHUNKS = [(1,) * 13, (5, 1, 7), (12, 1)]


@pytest.mark.parametrize("chunks", CHUNKS)
def test_serial_equals_batched(engine: ReferenceEngine, truth: tuple[np.ndarray, float], chunks: tuple[int, ...]) -> None:
    """Each is within the tolerance of the truth, so both are within twice that of each other."""
    assert np.abs(run(engine, chunks) - run(engine)).max() <= 2 * truth[1]
    assert np.abs(run(engine, chunks) - truth[0]).max() <= truth[1]


class NoBias(ReferenceEngine):
    """Q, K and V biases skipped in silence."""

    def matmul(self, x: np.ndarray, weight: str, bias: str | None = None) -> np.ndarray:
        return super().matmul(x, weight)


class Modulo(ReferenceEngine):
    """Query head h looks at key/value head ``h % Hkv``."""

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Any, layer: int, positions: np.ndarray) -> np.ndarray:
        group = q.shape[1] // k.shape[1]
        order = np.arange(q.shape[1]).reshape(group, -1).T.reshape(-1)
        y = super().attend(q[:, order], k, v, cache, layer, positions).reshape(q.shape)
        return y[:, np.argsort(order)].reshape(len(q), -1)


class Seer(ReferenceEngine):
    """Within a pass every position sees all the others: the causal mask is lost."""

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Any, layer: int, positions: np.ndarray) -> np.ndarray:
        y = np.empty((len(q), q.shape[1] * q.shape[2]), np.float32)
        for t in range(len(q)):
            turned = np.roll(np.arange(len(q)), -t - 1)  # query t goes last, and so looks at all
            y[t] = super().attend(q[turned], k[turned], v[turned], cache, layer, positions)[-1]
        return y


class LayerNorm(ReferenceEngine):
    """The mean is taken off first."""

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        return super().norm(x - x.mean(-1, keepdims=True), weight, eps)


class SwappedGate(ReferenceEngine):
    """gate and up take each other's place."""

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return super().swiglu(up, gate)


@pytest.mark.parametrize("kind", [NoBias, Modulo, Seer, LayerNorm, SwappedGate])
def test_a_wrong_primitive_is_far_outside_the_tolerance(
    model: Model, truth: tuple[np.ndarray, float], kind: type[ReferenceEngine]
) -> None:
    assert np.abs(run(kind(model)) - truth[0]).max() > 100 * truth[1]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": "norm"},
        {"rope_theta": 20_000.0},
        {"rms_norm_eps": 1e-3},
        {"tied_embeddings": True},
        {"head_count": 3, "head_dim": 64, "head_count_kv": 1},
    ],
    ids=str,
)
def test_a_wrong_config_is_far_outside_the_tolerance(
    engine: ReferenceEngine, model: Model, truth: tuple[np.ndarray, float], change: dict[str, Any]
) -> None:
    """And equals the truth of that wrong config, so the config is obeyed and not only noticed."""
    wrong = replace(CONFIG, **change)
    logits = run(engine, config=wrong)
    assert np.abs(logits - truth[0]).max() > 100 * truth[1]
    assert np.abs(logits - Oracle(model, wrong).logits(TOKENS)).max() <= truth[1] * 2


def test_tied_embeddings_and_norm_style_of_a_whole_model() -> None:
    config = replace(CONFIG, tied_embeddings=True, rope_type="norm", head_count=8, head_count_kv=1, head_dim=24, block_count=2)
    model = random_model(5, config)
    assert "output.weight" not in model.tensors
    logits, tolerance = logits_and_tolerance(model, config, TOKENS)
    for chunks in ((13,), (6, 7)):
        assert np.abs(run(ReferenceEngine(model), chunks, config) - logits).max() <= tolerance


def test_last_only_is_the_last_row(engine: ReferenceEngine, truth: tuple[np.ndarray, float]) -> None:
    last = run(engine, last_only=True)
    assert last.shape == (1, CONFIG.vocab_size)
    assert np.abs(last[0] - truth[0][-1]).max() <= truth[1]


def test_a_truncated_cache_is_as_good_as_a_fresh_one(engine: ReferenceEngine, truth: tuple[np.ndarray, float]) -> None:
    cache = engine.new_cache(CONFIG, 30)
    forward(engine, CONFIG, [*TOKENS[:5], 1, 2, 3, 4], cache)
    cache.truncate(5)
    again = forward(engine, CONFIG, TOKENS[5:], cache)
    assert cache.length == len(TOKENS)
    assert np.abs(again - truth[0][5:]).max() <= truth[1]


# -- points ------------------------------------------------------------------------------------------------------------


def test_every_point_fires_once_in_order_with_its_shape(engine: ReferenceEngine) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        seen.append((name, x.shape))
        return x

    run(engine, tap=tap)
    assert seen == [(name, (len(TOKENS), *shape)) for name, shape in points(CONFIG).items()]
    assert len(seen) == 3 + 15 * CONFIG.block_count


def test_watching_changes_nothing(engine: ReferenceEngine) -> None:
    np.testing.assert_array_equal(run(engine, tap=lambda name, x: x), run(engine))


def test_what_a_tap_returns_goes_on(engine: ReferenceEngine) -> None:
    """Patching any point moves the logits; patching in what was there does not."""
    kept: dict[str, np.ndarray] = {}

    def keep(name: str, x: np.ndarray) -> np.ndarray:
        kept[name] = x.copy()
        return x

    clean = run(engine, tap=keep)

    def patch(point: str, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return run(engine, tap=lambda name, x: change(kept[name]) if name == point else x)

    for point in points(CONFIG):
        np.testing.assert_array_equal(patch(point, lambda x: x), clean, err_msg=point)
        assert np.abs(patch(point, lambda x: np.roll(x, 1, -1)) - clean).max() > 1e-3, point


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_shapes_are_the_inventory(model: Model) -> None:
    for tied in (False, True):
        config = replace(CONFIG, tied_embeddings=tied, block_count=5)
        assert set(shapes(config)) == set(names.inventory(5, separate_output=not tied))
    check(model, CONFIG)


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "blk.2.attn_k.bias", "blk.0.attn_v.bias", "output.weight"])
def test_a_missing_tensor_is_named_before_and_during_a_pass(name: str) -> None:
    model = random_model()
    del model.tensors[name]
    with pytest.raises(FormatError, match=rf"has no tensor '{name}'"):
        check(model, CONFIG)
    with pytest.raises(FormatError, match=rf"has no tensor '{name}'"):
        run(ReferenceEngine(model))


def test_a_misshapen_tensor_is_named() -> None:
    model = random_model()
    k = model.tensors["blk.1.attn_k.weight"]
    model.tensors[k.name] = tensor(k.name, k.dequantise().T, types.F32)
    with pytest.raises(FormatError, match=r"blk\.1\.attn_k\.weight.*\(256, 64\).*\(64, 256\)"):
        check(model, CONFIG)
    with pytest.raises(FormatError, match=r"blk\.1\.attn_k\.weight"):
        run(ReferenceEngine(model))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([3, 300], "token 300 is outside the vocabulary of 300"),
        ([-1], "token -1"),
        ([1.5], "integers"),
        ([[1, 2]], "one row"),
        (list(range(20)), "do not fit"),
    ],
)
def test_senseless_tokens(engine: ReferenceEngine, tokens: list[Any], message: str) -> None:
    cache = engine.new_cache(CONFIG, 19)
    with pytest.raises(UsageError, match=message):
        forward(engine, CONFIG, tokens, cache)
    assert cache.length == 0


def test_broken_weights_run_without_a_word_to_stderr(recwarn: pytest.WarningsRecorder) -> None:
    model = random_model()
    up = model.tensors["blk.0.ffn_up.weight"]
    model.tensors[up.name] = tensor(up.name, np.full(up.shape, 3e38, np.float32), types.F32)
    assert not np.isfinite(run(ReferenceEngine(model))).any()
    assert not recwarn.list
