"""Attention weights are what softmax of q·k gives, whatever engine they are read off; loud channels are where they were put."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import CONFIG, random_model

from aprlab.errors import UsageError
from aprlab.faults import session_with
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.tracing.attention import attention_distance, attention_weights
from aprlab.tracing.channels import channel_peaks, loudest_channels
from aprlab.tracing.traces import Point, Trace, trace

MANY = [5, 200, 17, 3, 299] * 8  # more positions than a head has places, so that the engine is asked more than once


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="module")
def full(model: Model) -> Trace:
    assert len(MANY) > CONFIG.head_dim
    return trace(model, MANY)


def softmax_of(full: Trace, layer: int) -> np.ndarray:
    q, k = (full[f"layers.{layer}.{step}"].values.astype(np.float64) for step in ("q_rope", "k_rope"))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[2])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True)


@pytest.mark.parametrize("engine", ["reference", "jit"])
def test_weights_are_the_softmax_of_queries_and_keys(model: Model, full: Trace, engine: str) -> None:
    session = Session(model, engine=engine)
    for layer in range(CONFIG.block_count):
        weights = attention_weights(session, full, layer)
        assert weights.shape == (CONFIG.head_count, len(MANY), len(MANY))
        np.testing.assert_allclose(weights, softmax_of(full, layer), atol=2e-6)
        assert not np.triu(weights, 1).any()


def test_weights_sum_the_values_to_what_attention_returned(model: Model, full: Trace) -> None:
    weights = attention_weights(Session(model, engine="reference"), full, 0).astype(np.float64)
    v = np.repeat(full["layers.0.v"].values, CONFIG.head_count // CONFIG.head_count_kv, axis=1)
    found = np.einsum("hts,shd->thd", weights, v).reshape(len(MANY), -1)
    np.testing.assert_allclose(found, full["layers.0.attn"].values, atol=1e-5)


def test_a_faulty_engine_shows_its_own_weights(model: Model, full: Trace) -> None:
    healthy = attention_weights(Session(model, engine="reference"), full, 0)
    broken = attention_weights(session_with(model, ["gqa-modulo"], engine="reference"), full, 0)
    far = attention_distance(healthy, broken)
    group, kv = CONFIG.head_count // CONFIG.head_count_kv, CONFIG.head_count_kv
    assert [head for head in range(CONFIG.head_count) if far[head] == 0] == [
        head for head in range(CONFIG.head_count) if head // group == head % kv
    ]
    assert attention_distance(healthy, healthy).tolist() == [0] * CONFIG.head_count
    with pytest.raises(UsageError, match="cannot be compared"):
        attention_distance(healthy, healthy[:, :3, :3])


def test_layers_points_and_positions_that_are_not_there_are_refused(model: Model, full: Trace) -> None:
    session = Session(model, engine="reference")
    with pytest.raises(UsageError, match=r"no layer 9"):
        attention_weights(session, full, 9)
    with pytest.raises(UsageError, match="holds no point"):
        attention_weights(session, full.select("layers.*.out"), 0)
    last = trace(model, MANY, positions="last")
    with pytest.raises(UsageError, match=f"1 positions of {len(MANY)}"):
        attention_weights(session, last, 0)


def test_a_loud_channel_is_found_where_it_was_put(full: Trace) -> None:
    points = {name: full[name] for name in full if name.endswith(".out")}
    values = np.ones_like(full["layers.1.out"].values)
    values[3, 7] = -2000
    values[2, 4], values[1, 4] = 50, np.nan
    points["layers.1.out"] = Point("layers.1.out", values, full["layers.1.out"].positions, "reference", "f32")
    some = replace(full, points=points)
    first, second = loudest_channels(some, 2)
    assert (first.channel, first.layer, first.position, first.value, first.times, first.massive) == (7, 1, 3, -2000, 2000, (1,))
    assert (second.channel, second.times, second.massive) == (4, 50, ())
    assert channel_peaks(some).shape == (CONFIG.block_count, CONFIG.embedding_length)
    with pytest.raises(UsageError, match="holds no point"):
        channel_peaks(full.select("logits"))
