"""What a contract does to numbers: halves, bfloat16, and ggml's three 8-bit roundings, in plain NumPy.

Each takes float32 and gives the values that are left, as float32, of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aprlab.errors import UnsupportedError
from aprlab.quants.types import TensorType

Rounding = Callable[[np.ndarray], np.ndarray]


def f32(x: np.ndarray) -> np.ndarray:
    """As it is."""
    return x.astype(np.float32, copy=False)


def f16(x: np.ndarray) -> np.ndarray:
    """To half precision."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    """To bfloat16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32)).astype(np.float32)


def q8_0(x: np.ndarray) -> np.ndarray:
    """ggml's Q8_0 (and Q8_1): blocks of 32, the scale kept as a half."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(largest != 0, np.float32(127) / largest, np.float32(0)).astype(np.float32)
        whole = np.rint(blocks * factor)
    return (whole * f16(largest / np.float32(127))).astype(np.float32).reshape(x.shape)


def q8_k(x: np.ndarray) -> np.ndarray:
    """ggml's Q8_K: blocks of 256, the scale from the value of largest magnitude, its sign kept."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], -1, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = (np.float32(-127) / largest).astype(np.float32)
        whole = np.minimum(np.rint(blocks * factor), 127)
        values = np.where(largest != 0, whole * (np.float32(1) / factor), 0)
    return values.astype(np.float32).reshape(x.shape)


FLOATS: dict[str, Rounding] = {"f32": f32, "f16": f16, "bf16": bf16}
_BY_TYPE: dict[str, Rounding] = {"F32": f32, "F16": f16, "BF16": bf16}
_SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")


def for_weight(activations: str, kind: TensorType) -> Rounding:
    """What a product with a weight of this type does to its activations; raises UnsupportedError where ggml's is not known."""
    if activations != "q8":
        return FLOATS[activations]
    if kind.name in _BY_TYPE:
        return _BY_TYPE[kind.name]
    if kind.name in _SIMPLE:
        return q8_0
    if kind.block_elements == 256:
        return q8_k
    said = f"how ggml rounds activations for {kind.name} is not known here"
    raise UnsupportedError(said, code="engines.unknown-contract-of-type")
