"""Qwen2, once, from tokens to logits.

T positions go in together: the whole prompt at first, one token at a time afterwards, through the same lines. The
engine does the arithmetic, the config says how; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aprlab.architectures.inputs import Tap, checked, pass_by
from aprlab.engines.base import Array, Cache, Engine
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import output_weight


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # broken weights are run on purpose; NaN is found later
def forward(
    engine: Engine,
    config: ModelConfig,
    tokens: Sequence[int] | np.ndarray,
    cache: Cache,
    tap: Tap | None = None,
    *,
    last_only: bool = False,
) -> Array:
    """Logits of `tokens`, which follow the positions already in `cache`; the cache grows by them.

    Args:
        engine: does the arithmetic.
        config: what `points` and `inventory.shapes` call H, Hkv, D, E, F, V.
        tokens: ids ``(T,)``.
        cache: from `engine.new_cache(config, capacity)`.
        tap: called at every point of `points(config)`, in order.
        last_only: take only the last position through the output head (`norm` and `logits` then have one row).

    Returns:
        The engine's array ``(T, V)``, or ``(1, V)``.

    Raises:
        UsageError: no tokens, an id outside the vocabulary, no room in the cache.
        FormatError: a weight or bias is missing or has another shape than its neighbours.
    """
    ids = checked(tokens, config)
    positions = cache.positions(len(ids))  # (T,)
    see = tap if tap is not None else pass_by
    heads, kv_heads = (-1, config.head_count, config.head_dim), (-1, config.head_count_kv, config.head_dim)
    eps, turn = config.rms_norm_eps, (config.rope_theta, config.rope_type, config.rope_scaling)

    x = see("embed", engine.embed(ids, "token_embd.weight"))  # (T, E)
    for n in range(config.block_count):
        at, w = f"layers.{n}", f"blk.{n}"

        # attention: look back, from a normalised copy of the stream
        h = see(f"{at}.attn_norm", engine.norm(x, f"{w}.attn_norm.weight", eps))  # (T, E)
        q = see(f"{at}.q", engine.matmul(h, f"{w}.attn_q.weight", f"{w}.attn_q.bias").reshape(heads))  # (T, H, D)
        k = see(f"{at}.k", engine.matmul(h, f"{w}.attn_k.weight", f"{w}.attn_k.bias").reshape(kv_heads))  # (T, Hkv, D)
        v = see(f"{at}.v", engine.matmul(h, f"{w}.attn_v.weight", f"{w}.attn_v.bias").reshape(kv_heads))  # (T, Hkv, D)
        q = see(f"{at}.q_rope", engine.rope(q, positions, *turn))
        k = see(f"{at}.k_rope", engine.rope(k, positions, *turn))
        a = see(f"{at}.attn", engine.attend(q, k, v, cache, n, positions))  # (T, H * D)
        a = see(f"{at}.attn_out", engine.matmul(a, f"{w}.attn_output.weight"))  # (T, E)
        x = see(f"{at}.ffn_inp", engine.add(x, a))  # (T, E), the stream after attention

        # feed forward: think, position by position
        h = see(f"{at}.ffn_norm", engine.norm(x, f"{w}.ffn_norm.weight", eps))  # (T, E)
        gate = see(f"{at}.gate", engine.matmul(h, f"{w}.ffn_gate.weight"))  # (T, F)
        up = see(f"{at}.up", engine.matmul(h, f"{w}.ffn_up.weight"))  # (T, F)
        h = see(f"{at}.swiglu", engine.swiglu(gate, up))  # (T, F)
        h = see(f"{at}.down", engine.matmul(h, f"{w}.ffn_down.weight"))  # (T, E)
        x = see(f"{at}.out", engine.add(x, h))  # (T, E), the stream after the layer
    cache.advance(len(ids))
    if last_only:
        x = x[-1:]
    x = see("norm", engine.norm(x, "output_norm.weight", eps))  # (T, E)
    return see("logits", engine.matmul(x, output_weight(config)))  # (T, V)
