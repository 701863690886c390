"""Where each head looks: the weights of attention, read off the engine itself.

A trace holds queries, keys and the sum that attention returns, not the weights in between. They are asked for by the
engine's own primitive: attention is a weighted sum of values, so on values that are a one in one position and zero in all
others it returns the weight of that position. What comes out is what *this* engine does with these queries and keys, a
faulty one included; nothing is computed a second way.
"""

from __future__ import annotations

import numpy as np

from aprlab.errors import UsageError
from aprlab.inference.session import Session
from aprlab.tracing.traces import Trace


def attention_weights(session: Session, trace: Trace, layer: int) -> np.ndarray:
    """Weights of attention of one layer: float32 ``(heads, T, T)``; row t of a head is what query t looks at.

    Args:
        session: whose engine attends.
        trace: of `session`, or of another run whose queries and keys it is to attend with: holds ``q_rope`` and ``k_rope`` of
            the layer, at all positions.
        layer: number of the layer.

    Returns:
        In a healthy engine each row sums to 1 and is 0 beyond its own position.

    Raises:
        UsageError: no such layer, a point that the trace lacks, or one that does not hold all positions.
    """
    config = session.config
    if not 0 <= layer < config.block_count:
        raise UsageError(f"no layer {layer}; the model has 0 to {config.block_count - 1}", code="trace.no-such-layer")
    names = [f"layers.{layer}.{step}" for step in ("q_rope", "k_rope")]
    count = len(trace.tokens)
    for name in names:
        if len(trace[name].positions) != count:
            said = f"{name} of the trace holds {len(trace[name].positions)} positions of {count}"
            raise UsageError(said, code="trace.positions-missing")
    engine, (q, k) = session.engine, (trace[name].values for name in names)
    heads, (_, kv_heads, size), positions = q.shape[1], k.shape, np.arange(count, dtype=np.int64)
    weights = np.empty((heads, count, count), np.float32)
    for start in range(0, count, size):  # a value has `size` places: so many positions are asked at once
        some = min(size, count - start)
        ones = np.zeros((count, kv_heads, size), np.float32)
        ones[np.arange(start, start + some), :, np.arange(some)] = 1
        cache = engine.new_cache(config, count)
        queries, keys, values = (engine.from_numpy(np.ascontiguousarray(x)) for x in (q, k, ones))
        seen = engine.to_numpy(engine.attend(queries, keys, values, cache, layer, positions)).reshape(count, heads, size)
        weights[:, :, start : start + some] = seen[:, :, :some].transpose(1, 0, 2)
    return weights


def attention_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How differently the heads of two runs look: mean over queries of half the l1 distance, float64 ``(heads,)``.

    0: equal; 1: no query looks at anything that it looked at before. nan where b holds NaN or Inf.

    Args:
        a, b: weights ``(heads, T, T)``.
    """
    if a.shape != b.shape:
        raise UsageError(f"attention of shapes {a.shape} and {b.shape} cannot be compared", code="trace.attention-unlike")
    apart: np.ndarray = np.abs(a.astype(np.float64) - b).sum(axis=2).mean(axis=1) / 2
    return apart


__all__ = ["attention_distance", "attention_weights"]
