"""Scales that are not numbers: looked for in the bytes, without decoding a block."""

from __future__ import annotations

import numpy as np

from aprlab.quants import types
from aprlab.quants.base import Bytes, Quant
from aprlab.quants.types import TensorType

# Exponent bits by width of a float field: all set means NaN or infinity.
_EXPONENT: dict[int, np.unsignedinteger] = {2: np.uint16(0x7C00), 4: np.uint32(0x7F800000), 8: np.uint64(0x7FF0000000000000)}
_BF16 = np.uint16(0x7F80)


def first_bad_block(blocks: Bytes, quant: Quant) -> int | None:
    """Number of the first block with a NaN or infinite scale (or value, for plain floats), or None.

    `blocks` is ``uint8 (n * block bytes,)``, of the type of `quant`. A type whose layout declares no float field has
    nothing to check here.
    """
    fields = blocks.view(quant.layout)
    worst: int | None = None
    for name in quant.layout.names or ():
        dtype = quant.layout[name]
        if quant.type is types.BF16:
            exponent: np.unsignedinteger = _BF16
        elif dtype.kind == "f" and dtype.shape == ():
            exponent = _EXPONENT[dtype.itemsize]
        else:
            continue
        bits = fields[name].view(exponent.dtype)
        bad = (bits & exponent) == exponent
        if bad.any():
            found = int(np.argmax(bad))
            worst = found if worst is None else min(worst, found)
    return worst


def scale_is_finite(raw: Bytes, type_: TensorType) -> bool:
    """Whether the scale in front of a tensor (AprQ8's) is a number; True for types without one."""
    return not type_.tensor_bytes or bool(np.isfinite(raw[: type_.tensor_bytes].view("<f4")).all())
