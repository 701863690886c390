"""APR's own two types, as aprender writes them.

Both quantise the tensor as one flat run of values. aprlab asks whole blocks of every row, as it does of ggml's types:
the type table's size law refuses an AprQ4 tensor whose rows are not multiples of 32.
"""

from __future__ import annotations

import numpy as np

from aprlab.errors import NumericError, UnsupportedError
from aprlab.quants import types
from aprlab.quants.base import Bytes, Fields, Floats, Quant, bits, round_away, to_half, up


def pairs(qs: Bytes) -> Bytes:
    """APR's nibble order: (n, 16) bytes to (n, 32); byte i holds value 2i (low nibble) and 2i+1 (high nibble)."""
    return np.stack([bits(qs, 0, 4), bits(qs, 4, 4)], axis=-1).reshape(len(qs), -1)


def pack_pairs(q: Bytes) -> Bytes:
    """Inverse of `pairs`: (n, 32) numbers of 0..15 to (n, 16) bytes."""
    return q[:, 0::2] | up(q[:, 1::2], 4)


class AprQ4(Quant):
    """value = d * (q - 8): the fields of Q4_0, the nibbles in adjacent pairs, and a scale of max|x| / 7."""

    type = types.APR_Q4
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def unpack_nibbles(self, qs: Bytes) -> Bytes:
        """Step: (n, 16) bytes to (n, 32) numbers of 0..15 in the order of the values."""
        return pairs(qs)

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack_nibbles(b["qs"]))
        out -= 8
        out *= self.half(b["d"])[:, None]

    def encode_fields(self, x: Floats, b: Fields) -> None:
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(7)
        d[d == 0] = 1  # a block of zeros carries scale 1 in aprender's files
        b["d"] = to_half(d[:, 0], self.type)
        b["qs"] = pack_pairs((np.clip(round_away(x / d), -8, 7) + 8).astype(np.uint8))


class AprQ8(Quant):
    """value = scale * q: one float32 scale in front of the whole tensor, then a signed byte a value.

    A block alone means nothing without that scale, so `decode` and `encode` refuse; `dequantise` and `quantise`
    take and give the whole tensor, scale first.
    """

    type = types.APR_Q8
    layout = np.dtype([("qs", "i1")])

    def decode(self, blocks: Bytes, out: Floats | None = None) -> Floats:
        raise UnsupportedError(
            f"{self.type} has one scale for a whole tensor: its blocks cannot be decoded alone", code="quants.scale-per-tensor"
        )

    def encode(self, x: Floats) -> Bytes:
        raise UnsupportedError(
            f"{self.type} has one scale for a whole tensor: its blocks cannot be encoded alone", code="quants.scale-per-tensor"
        )

    def scale(self, head: Bytes) -> np.float32:
        """Step: the four bytes in front of the tensor as its float32 scale."""
        return np.float32(head.view("<f4")[0])

    def dequantise(self, raw: Bytes, shape: tuple[int, ...], out: Floats | None = None) -> Floats:
        flat = self._whole(raw, shape)
        out = self._target(out, shape)
        with np.errstate(invalid="ignore", over="ignore"):
            np.multiply(flat[4:].view(np.int8), self.scale(flat[:4]), out=out.reshape(-1), dtype=np.float32)
        return out

    def quantise(self, x: Floats) -> Bytes:
        """All values of a tensor, any shape, to uint8 (4 + x.size,): the scale, then the signed bytes."""
        x = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(x).all():
            raise NumericError(f"cannot encode values that are not finite as {self.type}", code="quants.not-finite")
        scale = np.float32(np.abs(x).max(initial=0)) / np.float32(127)
        if scale == 0:
            scale = np.float32(1)  # as aprender does for a tensor of zeros
        q = np.clip(round_away(x.reshape(-1) / scale), -127, 127).astype(np.int8)
        return np.concatenate([np.array([scale], "<f4").view(np.uint8), q.view(np.uint8)])
