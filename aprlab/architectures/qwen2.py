"""Qwen2, once, from tokens to logits.

T positions go in together: the whole prompt at first, one token at a time afterwards, through the same lines. The
engine does the arithmetic, the config says how; neither knows the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from aprlab.engines.base import Array, Cache, Engine
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import output_weight, shapes
from aprlab.model.model import Model

# Sees the array at a named point and returns the one to go on with: the same to watch, another one to patch.
Tap = Callable[[str, Array], Array]


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
        config: what `points` below and `inventory.shapes` call H, Hkv, D, E, F, V.
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
    ids = _checked(tokens, config)
    positions = cache.positions(len(ids))  # (T,)
    see = tap if tap is not None else _pass_by
    heads, kv_heads = (-1, config.head_count, config.head_dim), (-1, config.head_count_kv, config.head_dim)
    eps, theta, style = config.rms_norm_eps, config.rope_theta, config.rope_type

    x = see("embed", engine.embed(ids, "token_embd.weight"))  # (T, E)
    for n in range(config.block_count):
        at, w = f"layers.{n}", f"blk.{n}"

        # attention: look back, from a normalised copy of the stream
        h = see(f"{at}.attn_norm", engine.norm(x, f"{w}.attn_norm.weight", eps))  # (T, E)
        q = see(f"{at}.q", engine.matmul(h, f"{w}.attn_q.weight", f"{w}.attn_q.bias").reshape(heads))  # (T, H, D)
        k = see(f"{at}.k", engine.matmul(h, f"{w}.attn_k.weight", f"{w}.attn_k.bias").reshape(kv_heads))  # (T, Hkv, D)
        v = see(f"{at}.v", engine.matmul(h, f"{w}.attn_v.weight", f"{w}.attn_v.bias").reshape(kv_heads))  # (T, Hkv, D)
        q = see(f"{at}.q_rope", engine.rope(q, positions, theta, style))
        k = see(f"{at}.k_rope", engine.rope(k, positions, theta, style))
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


def points(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trace point in the order of the pass, with the shape of one position's value."""
    e, f = config.embedding_length, config.feed_forward_length
    q, k = (config.head_count, config.head_dim), (config.head_count_kv, config.head_dim)
    layer = {
        "attn_norm": (e,), "q": q, "k": k, "v": k, "q_rope": q, "k_rope": k,
        "attn": (config.head_count * config.head_dim,), "attn_out": (e,), "ffn_inp": (e,),
        "ffn_norm": (e,), "gate": (f,), "up": (f,), "swiglu": (f,), "down": (e,), "out": (e,),
    }  # fmt: skip
    layers = {f"layers.{n}.{name}": shape for n in range(config.block_count) for name, shape in layer.items()}
    return {"embed": (e,), **layers, "norm": (e,), "logits": (config.vocab_size,)}


def check(model: Model, config: ModelConfig) -> None:
    """Check before the first pass that every tensor is there, in the shape that the config requires.

    Args:
        model: whose tensors are checked.
        config: the numbers to check them by; usually the model's own.

    Raises:
        FormatError: naming the first that is not; a missing Q/K/V bias is as bad as a missing weight.
        UnsupportedError: a tensor that this forward pass would leave out.
    """
    wanted = shapes(config)
    for name, shape in wanted.items():
        found = model.tensor(name).shape
        if found != shape:
            raise FormatError(
                f"has shape {found}, the config demands {shape}", code="model.tensor-shape", path=model.path, tensor=name
            )
    # Readers take a model that has an output.weight for untied; a config that says otherwise is a fault, put in on purpose.
    known = {*wanted, "output.weight"}
    for name, tensor in model.tensors.items():
        if name not in known:
            raise UnsupportedError(
                f"is {foreign_tensor(name, config)}; a Qwen2 forward pass does not use it, so the answer would not be "
                "this model's",
                code="qwen2.foreign-tensor", path=model.path, tensor=tensor.origin.name, offset=tensor.origin.place(),
            )  # fmt: skip


# What a tensor that Qwen2 does not have is for, by the end of its name.
_FOREIGN = {
    "attn_q_norm.weight": "the norm of each query head (Qwen3)",
    "attn_k_norm.weight": "the norm of each key head (Qwen3)",
    "rope_freqs.weight": "the factors of the rotary frequencies (Llama 3)",
    "rope_factors_long.weight": "the factors of the rotary frequencies at long contexts",
    "rope_factors_short.weight": "the factors of the rotary frequencies at short contexts",
    "output.bias": "a bias of the output head",
    "attn_output.bias": "a bias of the attention's output",
    "attn_qkv.weight": "the fused query, key and value weight",
    "ffn_gate_inp.weight": "the router of a mixture of experts",
    "lora_a": "half of a LoRA adapter",
    "lora_b": "half of a LoRA adapter",
}


def foreign_tensor(name: str, config: ModelConfig) -> str:
    """What a tensor is that a Qwen2 model of this config does not have, as far as its name says."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.block_count and name.replace(layer[0], "blk.0.", 1) in shapes(config):
        return f"of layer {layer[1]}, but block_count is {config.block_count}"
    return next((what for end, what in _FOREIGN.items() if name.endswith(end)), "no tensor of a Qwen2 model")


def _checked(tokens: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    ids = np.asarray(tokens)
    if ids.size == 0:
        raise UsageError("there are no tokens to run", code="forward.no-tokens")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"tokens are one row of integers, not {ids.dtype} of shape {ids.shape}", code="forward.bad-tokens")
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.size:
        raise UsageError(
            f"token {wrong[0]} is outside the vocabulary of {config.vocab_size}", code="tokenizer.token-out-of-range"
        )
    return ids.astype(np.int64)


def _pass_by(point: str, x: Array) -> Array:
    return x
