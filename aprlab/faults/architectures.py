"""What other architectures than Qwen2 bring: norms of heads, scaled rotation, rows in another order. Sections C and E."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from aprlab.conversion.recode import at_hand
from aprlab.conversion.seams import Seams
from aprlab.engines.base import Array
from aprlab.engines.delegating import DelegatingEngine
from aprlab.faults.base import Fault, lines
from aprlab.faults.tensors import change_metadata, change_plans, change_tensors, config_of, is_
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import FACTORS
from aprlab.model.row_order import as_halves
from aprlab.model.tensor import Tensor

_HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")


class HeadsAsTheyAre(DelegatingEngine):
    """Query and key heads go on without their norms."""

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return x if weight.endswith(_HEAD_NORMS) else self.inner.norm(x, weight, eps)


def has_head_norms(model: Model) -> bool:
    return any(name.endswith(_HEAD_NORMS) for name in model.tensors)


def unscaled(config: ModelConfig) -> ModelConfig:
    return replace(config, rope_scaling=None)


def write_unscaled(s: Seams) -> Seams:
    """The same in a file."""

    return change_metadata(s, rope_scaling=None)


def without_factors(config: ModelConfig) -> ModelConfig:
    return replace(config, rope_factors=False)


def write_without_factors(s: Seams) -> Seams:
    """The same in a file."""
    return change_plans(s, lambda plans: [plan for plan in plans if plan.name != FACTORS])


def unbounded(config: ModelConfig) -> ModelConfig:
    return replace(config, sliding_window=None)


def write_unbounded(s: Seams) -> Seams:
    """The same in a file."""
    return change_metadata(s, sliding_window=None)


def in_halves(s: Seams) -> Seams:
    """Rows of Q and K in the order that rotation of halves needs, in a model whose rotation is of adjacent pairs."""

    def change(tensor: Tensor) -> Tensor:
        if not is_(tensor.name, "attn_q.weight", "attn_k.weight"):
            return tensor
        config = config_of(tensor)
        if config.rope_type != "norm":
            return tensor
        tensor, size = at_hand(tensor), config.head_dim
        raw = tensor.raw.reshape(tensor.rows, -1)[as_halves(tensor.rows // size, size)]
        return tensor.replace(raw=np.ascontiguousarray(raw).reshape(-1))

    return change_tensors(s, change)


def is_scaled(model: Model) -> bool:
    return model.config.rope_scaling is not None


FAULTS = (
    Fault(
        "lost-head-norms", "Norms of query and key heads skipped", "forward", "E",
        lines(
            "A loader written for Qwen2 read a Qwen3: every tensor it knows is there.",
            "The norms of each query and key head, which Qwen2 has not, were left out.",
            "No tensor is missing and every shape is right; attention looks at the wrong places.",
        ),
        "Norms of the heads of q and k are not 1 before rotation; everything before q_rope is correct.",
        engine=HeadsAsTheyAre, needs="norms of query and key heads (Qwen3)", fits=has_head_norms,
    ),
    Fault(
        "rope-scaling-ignored", "Rotary scaling of the config ignored", "config", "E",
        lines(
            "The converter copied the base of the rotary frequencies and not rope_scaling.",
            "A model whose context was extended by YaRN or linear scaling turns too fast.",
            "Short answers stay readable; long contexts fall apart (llama.cpp #13322).",
        ),
        "rope_scaling is missing; queries and keys are right before rotation, wrong after it from position 1 on.",
        seams=write_unscaled, config=unscaled, needs="scaled rotation (YaRN or linear)", fits=is_scaled,
    ),
    Fault(
        "rope-factors-lost", "rope_freqs.weight lost: Llama 3's factors of the rotary frequencies", "naming", "E",
        lines(
            "The tensor rope_freqs.weight has no name in Hugging Face's world, so the converter dropped it.",
            "Slow pairs of a Llama 3.1 or later then turn up to 32 times too fast.",
            "All weights are right, and within the first 8,192 positions answers look well.",
        ),
        "rope_freqs.weight is missing; queries and keys are right before rotation, wrong after it.",
        seams=write_without_factors, config=without_factors, needs="the tensor rope_freqs.weight (Llama 3.1 and later)",
        fits=lambda model: model.config.rope_factors,
    ),
    Fault(
        "sliding-window-ignored", "Sliding window of attention ignored", "config", "E",
        lines(
            "The converter had no key for the window, or the runtime of this architecture does not read it.",
            "A Mistral 7B 0.1 or a Qwen2 with use_sliding_window was trained to see its last positions alone.",
            "All is right up to the length of the window; beyond it every layer mixes in what it never saw.",
        ),
        "sliding_window is missing; attention differs first at the position of the window's length.",
        seams=write_unbounded, config=unbounded, needs="a sliding window (Mistral 7B 0.1)",
        fits=lambda model: model.config.sliding_window is not None,
    ),
    Fault(
        "unpermuted-qk", "Q and K rows left in Hugging Face's order under NORM rotation", "layout", "C",
        lines(
            "A Llama was converted without moving the rows of Q and K, as is right for Qwen2.",
            "ggml rotates adjacent pairs of a Llama's heads; in this order they are no pairs.",
            "Shapes, statistics and any checksum that ignores order are those of the right file.",
        ),
        "Rows of Q and K are reordered within each head; the norm of each head is unchanged.",
        seams=in_halves, needs="rotation of adjacent pairs (Llama)",
    ),
)  # fmt: skip
