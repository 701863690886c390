"""What every forward pass asks of its inputs: tokens that are in the vocabulary, tensors that are there and no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from aprlab.engines.base import Array
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.model.architecture import ARCHITECTURES, architecture_of
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import shapes
from aprlab.model.model import Model
from aprlab.model.rope import FACTORS

# Sees the array at a named point and returns the one to go on with: the same to watch, another one to patch.
Tap = Callable[[str, Array], Array]


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
    # Readers take a model that has an output.weight for untied, and one that has factors for scaled by them; a config that
    # says otherwise is a fault, put in on purpose.
    known = {*wanted, "output.weight", *([FACTORS] if ARCHITECTURES[config.architecture].rope_factors else [])}
    title = ARCHITECTURES[config.architecture].title
    for name, tensor in model.tensors.items():
        if name not in known:
            raise UnsupportedError(
                f"is {foreign_tensor(name, config)}; a {title} forward pass does not use it, so the answer would not be "
                "this model's",
                code="forward.foreign-tensor", path=model.path, tensor=tensor.origin.name, offset=tensor.origin.place(),
            )  # fmt: skip


# What a tensor that not every architecture has is for, by the end of its name.
_FOREIGN = {
    "attn_q_norm.weight": "the norm of each query head (Qwen3)",
    "attn_k_norm.weight": "the norm of each key head (Qwen3)",
    "rope_freqs.weight": "the factors of the rotary frequencies (Llama 3)",
    "rope_factors_long.weight": "the factors of the rotary frequencies at long contexts",
    "rope_factors_short.weight": "the factors of the rotary frequencies at short contexts",
    "output.bias": "a bias of the output head",
    "attn_q.bias": "a bias of the queries (Qwen2)",
    "attn_k.bias": "a bias of the keys (Qwen2)",
    "attn_v.bias": "a bias of the values (Qwen2)",
    "attn_output.bias": "a bias of the attention's output",
    "attn_qkv.weight": "the fused query, key and value weight",
    "ffn_gate_inp.weight": "the router of a mixture of experts",
    "lora_a": "half of a LoRA adapter",
    "lora_b": "half of a LoRA adapter",
}


def foreign_tensor(name: str, config: ModelConfig) -> str:
    """What a tensor is that a model of this config does not have, as far as its name says."""
    layer = re.match(r"blk\.([0-9]{1,9})\.", name)
    if layer and int(layer[1]) >= config.block_count and name.replace(layer[0], "blk.0.", 1) in shapes(config):
        return f"of layer {layer[1]}, but block_count is {config.block_count}"
    title = ARCHITECTURES[config.architecture].title
    return next((what for end, what in _FOREIGN.items() if name.endswith(end)), f"no tensor of a {title} model")


def checked(tokens: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    """`tokens` as int64 ``(T,)``; raises UsageError for none, for no integers, and for an id outside the vocabulary."""
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


def points(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trace point in the order of the pass, with the shape of one position's value.

    Raises:
        UnsupportedError: an architecture without a forward pass here.
    """
    e, f = config.embedding_length, config.feed_forward_length
    q, k = (config.head_count, config.head_dim), (config.head_count_kv, config.head_dim)
    normed = any(gguf == "blk.N.attn_q_norm.weight" for gguf, _, _ in architecture_of(config.architecture).layer)
    layer = {
        "attn_norm": (e,), "q": q, "k": k, "v": k, **({"q_norm": q, "k_norm": k} if normed else {}), "q_rope": q, "k_rope": k,
        "attn": (config.head_count * config.head_dim,), "attn_out": (e,), "ffn_inp": (e,),
        "ffn_norm": (e,), "gate": (f,), "up": (f,), "swiglu": (f,), "down": (e,), "out": (e,),
    }  # fmt: skip
    layers = {f"layers.{n}.{name}": shape for n in range(config.block_count) for name, shape in layer.items()}
    return {"embed": (e,), **layers, "norm": (e,), "logits": (config.vocab_size,)}


def pass_by(point: str, x: Array) -> Array:
    """A tap that only lets pass."""
    return x


__all__ = ["Tap", "check", "checked", "foreign_tensor", "pass_by", "points"]
