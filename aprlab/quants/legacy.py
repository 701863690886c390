"""ggml's first generation: 32 values share a float16 scale (Q4_0, Q5_0, Q8_0), or a scale and a minimum (Q4_1, Q5_1).

Layouts and arithmetic as in ggml's ``ggml-quants.c`` (``dequantize_row_*``, ``quantize_row_*_ref``), bit for bit.
"""

from __future__ import annotations

import numpy as np

from aprlab.quants import types
from aprlab.quants.base import Bytes, Fields, Floats, Quant, bits, inverse, round_away, to_half, up


def halves(qs: Bytes) -> Bytes:
    """ggml's nibble order: (n, 16) bytes to (n, 32); low nibbles are the first half, high nibbles the second."""
    return np.concatenate([bits(qs, 0, 4), bits(qs, 4, 4)], axis=-1)


def pack_halves(q: Bytes) -> Bytes:
    """Inverse of `halves`: (n, 32) numbers, of which the low four bits count, to (n, 16) bytes."""
    return bits(q[:, :16], 0, 4) | up(q[:, 16:], 4)


class _Nibbles(Quant):
    """The step that Q4_0, Q4_1, Q5_0 and Q5_1 share."""

    def unpack_nibbles(self, qs: Bytes) -> Bytes:
        """Step: (n, 16) bytes to (n, 32) numbers of 0..15 in the order of the values."""
        return halves(qs)


class _HighBits(_Nibbles):
    """Q5_0 and Q5_1 keep the fifth bits of the 32 values in four bytes of their own."""

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        """Step: (n, 4) bytes to (n, 32) bits; value i's is bit i of the little-endian 32-bit word."""
        return np.unpackbits(qh, axis=-1, bitorder="little")

    def unpack(self, b: Fields) -> Bytes:
        """(n, 32) numbers of 0..31."""
        return up(self.unpack_high_bits(b["qh"]), 4) | self.unpack_nibbles(b["qs"])

    def pack(self, q: Bytes, b: Fields) -> None:
        """Inverse of `unpack`."""
        b["qh"] = np.packbits(bits(q, 4, 1), axis=-1, bitorder="little")
        b["qs"] = pack_halves(q)


def _largest(x: Floats) -> Floats:
    """The value of largest magnitude of each row, sign kept, the first of equals; (n, E) to (n, 1)."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)


def _to_steps(x: Floats, d: Floats, offset: float, top: int) -> Bytes:
    """Numbers 0..top: `x / d` plus `offset`, cut off as C's cast does."""
    steps = np.trunc(x * inverse(d) + np.float32(offset))
    return np.clip(steps, 0, top).astype(np.uint8)


class Q4_0(_Nibbles):
    """value = d * (q - 8)"""

    type = types.Q4_0
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack_nibbles(b["qs"]))
        out -= 8
        out *= self.half(b["d"])[:, None]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        d = _largest(x) / np.float32(-8)
        b["d"] = to_half(d[:, 0], self.type)
        b["qs"] = pack_halves(_to_steps(x, d, 8.5, 15))


class Q4_1(_Nibbles):
    """value = d * q + m"""

    type = types.Q4_1
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack_nibbles(b["qs"]))
        out *= self.half(b["d"])[:, None]
        out += self.half(b["m"])[:, None]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        low = x.min(axis=1, keepdims=True)
        d = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
        b["d"], b["m"] = to_half(d[:, 0], self.type), to_half(low[:, 0], self.type)
        b["qs"] = pack_halves(_to_steps(x - low, d, 0.5, 15))


class Q5_0(_HighBits):
    """value = d * (q - 16), the fifth bits in qh"""

    type = types.Q5_0
    layout = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack(b))
        out -= 16
        out *= self.half(b["d"])[:, None]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        d = _largest(x) / np.float32(-16)
        b["d"] = to_half(d[:, 0], self.type)
        self.pack(_to_steps(x, d, 16.5, 31), b)


class Q5_1(_HighBits):
    """value = d * q + m, the fifth bits in qh"""

    type = types.Q5_1
    layout = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack(b))
        out *= self.half(b["d"])[:, None]
        out += self.half(b["m"])[:, None]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        low = x.min(axis=1, keepdims=True)
        d = (x.max(axis=1, keepdims=True) - low) / np.float32(31)
        b["d"], b["m"] = to_half(d[:, 0], self.type), to_half(low[:, 0], self.type)
        self.pack(_to_steps(x - low, d, 0.5, 31), b)


class Q8_0(Quant):
    """value = d * q, q signed"""

    type = types.Q8_0
    layout = np.dtype([("d", "<f2"), ("qs", "i1", 32)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, b["qs"])
        out *= self.half(b["d"])[:, None]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        b["d"] = to_half(d[:, 0], self.type)
        b["qs"] = round_away(x * inverse(d)).astype(np.int8)
