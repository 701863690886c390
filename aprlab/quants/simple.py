"""Types without blocks, one value each: F32, F16, BF16; F64 and whole numbers, which are read and never written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aprlab.errors import NumericError
from aprlab.quants import types
from aprlab.quants.base import Fields, Floats, Quant, to_half

if TYPE_CHECKING:
    from numpy.typing import NDArray


class F32(Quant):
    """IEEE single precision, little-endian: the bytes are the values."""

    type = types.F32
    layout = np.dtype([("x", "<f4")])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        out[:, 0] = b["x"]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        b["x"] = x[:, 0]


class F16(Quant):
    """IEEE half precision."""

    type = types.F16
    layout = np.dtype([("x", "<f2")])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        out[:, 0] = self.half(b["x"])

    def encode_fields(self, x: Floats, b: Fields) -> None:
        b["x"] = to_half(x[:, 0], self.type)


class BF16(Quant):
    """bfloat16: the upper half of a float32."""

    type = types.BF16
    layout = np.dtype([("x", "<u2")])

    def widen(self, x: NDArray[np.uint16]) -> Floats:
        """Step: the 16 bits as the upper half of a float32."""
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def decode_fields(self, b: Fields, out: Floats) -> None:
        out[:, 0] = self.widen(b["x"])

    def encode_fields(self, x: Floats, b: Fields) -> None:
        bits = x[:, 0].view(np.uint32)
        # Nearest even: half a unit less one, plus the last bit that stays.
        high = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        if ((high & 0x7F80) == 0x7F80).any():
            raise NumericError(f"{float(np.abs(x).max()):g} does not fit into {self.type}", code="quants.out-of-range")
        b["x"] = high


class _Widest(Quant):
    """Values that float32 holds only rounded, to the nearest: what is decoded is for looking at."""

    def decode_fields(self, b: Fields, out: Floats) -> None:
        out[:, 0] = b["x"]


class F64(_Widest):
    """IEEE double precision."""

    type = types.F64
    layout = np.dtype([("x", "<f8")])


class I8(_Widest):
    """Signed whole numbers of one byte."""

    type = types.by_name("I8")
    layout = np.dtype([("x", "i1")])


class I16(_Widest):
    """Signed whole numbers of two bytes."""

    type = types.by_name("I16")
    layout = np.dtype([("x", "<i2")])


class I32(_Widest):
    """Signed whole numbers of four bytes."""

    type = types.by_name("I32")
    layout = np.dtype([("x", "<i4")])


class I64(_Widest):
    """Signed whole numbers of eight bytes."""

    type = types.by_name("I64")
    layout = np.dtype([("x", "<i8")])
