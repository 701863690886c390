"""Mixes: which block type llama.cpp gives each tensor of a Qwen2 when a whole file is quantised, e.g. as Q4_K_M.

The rules are those of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`, the part that a dense Qwen2 reaches.
`tests/test_synth.py` holds them against the real 0.5B and 1.5B, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

from aprlab import names, types
from aprlab.errors import UnsupportedError, UsageError
from aprlab.types import TensorType

# Mix -> the type of most matrices. `M` gives half of the value and down projections more bits.
MIXES: dict[str, TensorType] = {
    "q4_k_s": types.Q4_K, "q4_k_m": types.Q4_K, "q5_k_s": types.Q5_K, "q5_k_m": types.Q5_K,
}  # fmt: skip

# What stands in where a row does not hold whole blocks of 256.
SUBSTITUTES = {
    types.Q2_K: types.Q4_0, types.Q3_K: types.Q4_0, types.Q4_K: types.Q5_0, types.Q5_K: types.Q5_1, types.Q6_K: types.Q8_0,
}  # fmt: skip


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of the half that matters: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(name: str, shape: tuple[int, ...], mix: str, layers: int, *, tied: bool) -> TensorType:
    """The type that `mix` gives the tensor of this GGUF name and shape in a model of so many layers.

    Raises:
        UsageError: an unknown mix.
        UnsupportedError: a row that neither the type nor its substitute can hold.
    """
    if mix not in MIXES:
        raise UsageError(f"unknown mix {mix!r}; known: {', '.join(MIXES)}")
    if len(shape) < 2:
        return types.F32
    kind = MIXES[mix]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = types.Q6_K if shape[-1] % kind.block_elements == 0 else types.Q8_0
    elif names.template_of(name) in ("blk.N.attn_v.weight", "blk.N.ffn_down.weight"):
        layer = int(name.split(".")[1])
        if mix.endswith("_m") and use_more_bits(layer, layers):
            kind = types.Q6_K
        elif mix == "q4_k_s" and layer < (4 if "attn_v" in name else layers // 8):
            kind = types.Q5_K
    return fitting(kind, shape, name)


def fitting(kind: TensorType, shape: tuple[int, ...], name: str) -> TensorType:
    """`kind`, or llama.cpp's substitute where its blocks do not fit into a row of `shape`."""
    if shape[-1] % kind.block_elements == 0:
        return kind
    substitute = SUBSTITUTES.get(kind, kind)
    if shape[-1] % substitute.block_elements:
        raise UnsupportedError(f"a row of {shape[-1]} values does not hold whole {substitute.name} blocks", tensor=name)
    return substitute


def types_of(shapes: Mapping[str, tuple[int, ...]], mix: str, layers: int) -> dict[str, TensorType]:
    """The type of every tensor, by GGUF name, of a model with tensors of these `shapes`."""
    tied = "output.weight" not in shapes
    return {name: type_of(name, shape, mix, layers, tied=tied) for name, shape in shapes.items()}
