"""Block types: byte layout, decode and encode in readable NumPy, the truth that every engine is compared with.

>>> raw = quantise(x, types.Q4_K)                      # float32 (rows, columns) -> uint8 (rows, row bytes)
>>> y = dequantise(raw, types.Q4_K, x.shape)           # -> float32 (rows, columns)

Decoding is bit-equal to ggml's C for every type with a class here; encoding is ggml's reference quantisation, search
included. To model a bug, replace one step of one type and pass the changed registry along:

>>> class OneScale(Q4_K):
...     def unpack_scales(self, scales): ...
>>> broken = REGISTRY | {types.Q4_K: OneScale()}
>>> dequantise(raw, types.Q4_K, x.shape, registry=broken)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from aprlab.errors import UnsupportedError
from aprlab.quants.apr import AprQ4, AprQ8
from aprlab.quants.base import Bytes, Floats, Quant
from aprlab.quants.foreign import foreign
from aprlab.quants.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from aprlab.quants.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from aprlab.quants.nonlinear import IQ4_NL, IQ4_XS, Q1_0
from aprlab.quants.simple import BF16, F16, F32, F64, I8, I16, I32, I64
from aprlab.quants.types import TYPES, TensorType

OWN: tuple[Quant, ...] = tuple(
    kind() for kind in (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, AprQ4, AprQ8)
)
# Of files that llama.cpp runs, too; engines decode them by these classes, without kernels of their own.
OTHERS: tuple[Quant, ...] = tuple(kind() for kind in (F64, I8, I16, I32, I64, IQ4_NL, IQ4_XS, Q1_0))
REGISTRY: MappingProxyType[TensorType, Quant] = MappingProxyType(
    {t: foreign(t) for t in TYPES} | {q.type: q for q in (*OWN, *OTHERS)}
)


def quant(type_: TensorType, registry: Mapping[TensorType, Quant] = REGISTRY) -> Quant:
    """The quant of a type; raises `UnsupportedError` by name for a type that is not in the table."""
    try:
        return registry[type_]
    except KeyError:
        raise UnsupportedError(f"unknown tensor type {type_}", code="quants.unknown-type") from None


def decode(blocks: Bytes, type_: TensorType, *, registry: Mapping[TensorType, Quant] = REGISTRY) -> Floats:
    """Blocks, uint8 (n, block bytes), to float32 (n, block elements)."""
    return quant(type_, registry).decode(blocks)


def encode(x: Floats, type_: TensorType, *, registry: Mapping[TensorType, Quant] = REGISTRY) -> Bytes:
    """Finite values (n, block elements) to blocks, uint8 (n, block bytes)."""
    return quant(type_, registry).encode(x)


def dequantise(
    raw: Bytes,
    type_: TensorType,
    shape: tuple[int, ...],
    *,
    out: Floats | None = None,
    registry: Mapping[TensorType, Quant] = REGISTRY,
) -> Floats:
    """Decode a whole tensor.

    Args:
        raw: its bytes, uint8 in any shape.
        type_: its block type.
        shape: NumPy order; the last axis is a row.
        out: a contiguous float32 array of `shape`, to be filled instead of a new one.
        registry: the decoders by type.

    Returns:
        float32 of `shape`.

    Raises:
        FormatError: the number of bytes breaks the size law.
        UnsupportedError: the type cannot be decoded here.
    """
    return quant(type_, registry).dequantise(raw, shape, out)


def quantise(x: Floats, type_: TensorType, *, registry: Mapping[TensorType, Quant] = REGISTRY) -> Bytes:
    """Encode rows of values as blocks.

    Args:
        x: finite values, (..., columns); for AprQ8 a whole tensor.
        type_: the block type.
        registry: the encoders by type.

    Returns:
        uint8 (..., row bytes); for AprQ8 uint8 (bytes,).

    Raises:
        NumericError: values that are not finite or do not fit.
        UnsupportedError: the type cannot be written (`can_encode`), or a row does not hold whole blocks.
    """
    return quant(type_, registry).quantise(x)


def can_encode(type_: TensorType) -> bool:
    """Whether `quantise` can write this type."""
    return quant(type_).can_encode


def can_decode(type_: TensorType) -> bool:
    """Whether `dequantise` can read this type; asked of the decoder itself, with one block of zeros."""
    try:
        dequantise(np.zeros(type_.nbytes((type_.block_elements,)), np.uint8), type_, (type_.block_elements,))
    except UnsupportedError:
        return False
    return True


__all__ = [
    "BF16",
    "F16",
    "F32",
    "OWN",
    "Q2_K",
    "Q3_K",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "REGISTRY",
    "AprQ4",
    "AprQ8",
    "Bytes",
    "Floats",
    "Quant",
    "can_decode",
    "can_encode",
    "decode",
    "dequantise",
    "encode",
    "quant",
    "quantise",
]
