"""A sibling of a model with everything that the embedded model lacks: the kill matrix needs it for some faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from aprlab.conversion.converter import convert
from aprlab.formats import open_model
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import quantise, types
from aprlab.quants.types import TensorType

# tensor of the last layers but one -> type: one of each kind that a fault may need
_KINDS: dict[str, TensorType] = {
    "blk.{a}.attn_q.weight": types.Q8_0, "blk.{a}.attn_k.weight": types.Q4_0, "blk.{a}.attn_v.weight": types.Q5_K,
    "blk.{a}.attn_output.weight": types.Q5_1, "blk.{a}.ffn_gate.weight": types.BF16, "blk.{a}.ffn_up.weight": types.APR_Q8,
    "blk.{b}.attn_k.weight": types.Q3_K, "blk.{b}.attn_v.weight": types.Q2_K, "blk.{b}.attn_q.weight": types.Q4_1,
    "blk.{b}.attn_output.weight": types.APR_Q4, "blk.{b}.ffn_gate.weight": types.F16,
}  # fmt: skip


def sibling(model: Model, folder: Path) -> Model:
    """A model much like this one, with a tensor of every type and a feed-forward width that no 256-block divides.

    The 32 weakest neurons of every layer's feed-forward part are taken out, so that rows of ffn_down end in the middle
    of a 256-block; those become Q5_0, as in llama.cpp. Written to `folder` as APR, since two types are APR's own.

    Args:
        model: the model to start from.
        folder: where the file is written.

    Returns:
        The new model, opened.
    """
    config = model.config
    width = config.feed_forward_length - 32
    tensors: dict[str, Tensor] = {}
    middle = config.block_count // 2
    kinds = {name.format(a=middle, b=middle - 1): kind for name, kind in _KINDS.items()}
    for n in range(config.block_count):
        up, down = (model.tensor(f"blk.{n}.ffn_{part}.weight").dequantise() for part in ("up", "down"))
        strength = np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)
        kept = np.sort(np.argsort(strength)[32:])
        for part in ("gate", "up"):
            tensor = model.tensor(f"blk.{n}.ffn_{part}.weight")
            tensors[tensor.name] = _made(tensor, np.ascontiguousarray(tensor.blocks()[kept]), (width, tensor.cols), tensor.type)
        name = f"blk.{n}.ffn_down.weight"
        tensors[name] = _encoded(model.tensor(name), np.ascontiguousarray(down[:, kept]), types.Q5_0)
    changed = {name: tensors.get(name, tensor) for name, tensor in model.tensors.items()}
    for name, kind in kinds.items():
        changed[name] = _encoded(changed[name], changed[name].dequantise(), kind)
    smaller = replace(config, feed_forward_length=width)
    draft = Model(
        path=model.path, format="apr", dialect="aprender", tensors=changed, metadata={},
        make_config=lambda: smaller, make_tokenizer=lambda: model.tokenizer,
    )  # fmt: skip
    convert(draft, folder / "sibling.apr")
    return open_model(folder / "sibling.apr")


def _made(tensor: Tensor, raw: np.ndarray, shape: tuple[int, ...], kind: TensorType) -> Tensor:
    return Tensor(tensor.name, kind, shape, raw.reshape(-1).view(np.uint8), replace(tensor.origin, offset=-1))


def _encoded(tensor: Tensor, values: np.ndarray, kind: TensorType) -> Tensor:
    return _made(tensor, np.ascontiguousarray(quantise(values, kind)), values.shape, kind)
