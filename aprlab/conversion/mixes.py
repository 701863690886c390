"""Mixes: which block type llama.cpp gives each tensor of a Qwen2 when a whole file is quantised, e.g. as Q4_K_M.

The rules are those of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`, the part that a dense Qwen2 reaches.
`tests/conversion/test_synthetic.py` holds them against the real 0.5B and 1.5B, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aprlab.errors import UnsupportedError, UsageError
from aprlab.model import names
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType

# Mix -> the type of most matrices. `M` gives half of the value and down projections more bits.
MIXES: dict[str, TensorType] = {
    "q4_k_s": types.Q4_K, "q4_k_m": types.Q4_K, "q5_k_s": types.Q5_K, "q5_k_m": types.Q5_K,
}  # fmt: skip

# The replacement where a row does not hold whole blocks of 256.
SUBSTITUTES = {
    types.Q2_K: types.Q4_0, types.Q3_K: types.Q4_0, types.Q4_K: types.Q5_0, types.Q5_K: types.Q5_1, types.Q6_K: types.Q8_0,
    types.by_name("IQ4_XS"): types.by_name("IQ4_NL"),
}  # fmt: skip


def use_more_bits(place: int, count: int) -> bool:
    """llama.cpp's choice of the half that matters: the first and last eighth, and every third between."""
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


def fitting(kind: TensorType, shape: tuple[int, ...], name: str) -> TensorType:
    """`kind`, or llama.cpp's substitute where its blocks do not fit into a row of `shape`."""
    if shape[-1] % kind.block_elements == 0:
        return kind
    substitute = SUBSTITUTES.get(kind, kind)
    if shape[-1] % substitute.block_elements:
        raise UnsupportedError(
            f"a row of {shape[-1]} values does not hold whole {substitute.name} blocks",
            code="quants.row-not-whole-blocks", tensor=name,
        )  # fmt: skip
    return substitute


def types_of(shapes: Mapping[str, tuple[int, ...]], mix: str) -> dict[str, TensorType]:
    """The type that `mix` gives every tensor of a model, by GGUF name, with these `shapes`.

    llama.cpp counts value and down projections as it meets them, and the count, not the layer, decides which get more
    bits. So the order of `shapes` matters: today it is by layer number; when the known models were published it was by
    name (0, 1, 10, 11 … 2, 20), which their files show.

    Raises:
        UsageError: an unknown mix.
        UnsupportedError: a row that neither the type nor its substitute can hold.
    """
    if mix not in MIXES:
        raise UsageError(f"unknown mix {mix!r}; known: {', '.join(MIXES)}", code="conversion.unknown-mix")
    tied = "output.weight" not in shapes
    met: dict[str, list[str]] = {"blk.N.attn_v.weight": [], "blk.N.ffn_down.weight": []}
    for name in shapes:
        met.get(names.template_of(name), []).append(name)
    place = {name: n for listed in met.values() for n, name in enumerate(listed)}
    found: dict[str, TensorType] = {}
    for name, shape in shapes.items():
        kind = MIXES[mix] if len(shape) > 1 else types.F32
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            kind = types.Q6_K if shape[-1] % kind.block_elements == 0 else types.Q8_0
        elif name in place:
            count = len(met[names.template_of(name)])
            if mix.endswith("_m") and use_more_bits(place[name], count):
                kind = types.Q6_K
            elif mix == "q4_k_s" and place[name] < (4 if "attn_v" in name else count // 8):
                kind = types.Q5_K
        found[name] = fitting(kind, shape, name)
    return found


# Matrices that llama.cpp leaves as they are whatever is asked for: routers, positions, convolutions, time mixing.
_LEFT = (
    "_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "pos_embd.weight", "token_types.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "time_mix_first.weight", "time_mix_w0.weight",
    "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
)  # fmt: skip


def kind_by_name(tensor: Tensor, target: TensorType) -> TensorType:
    """The type in which a tensor of any architecture is written where `target` is asked for.

    As llama.cpp has it: matrices called ``….weight``, but for those that it leaves alone; F16 where rows hold no whole blocks
    of `target` or its substitute. Whole numbers stay what they are.
    """
    matrix = len(tensor.shape) > 1 and tensor.name.endswith("weight") and tensor.type not in types.WHOLE_NUMBERS
    if not matrix or any(part in tensor.name for part in _LEFT):
        return tensor.type
    kind = target
    if tensor.cols % kind.block_elements:
        kind = SUBSTITUTES.get(kind, kind)
    return types.F16 if tensor.cols % kind.block_elements else kind


def by_layer(listed: Iterable[str]) -> list[str]:
    """GGUF names in the order in which llama.cpp quantises today: what has no layer first, then layer by layer."""

    def key(name: str) -> tuple[int, str]:
        number = name.split(".")[1] if name.startswith("blk.") else ""
        return (int(number) if number.isascii() and number.isdigit() and len(number) < 10 else -1, name)

    return sorted(listed, key=key)
