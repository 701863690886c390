"""Types whose four bits choose from a table of values that are not evenly spaced: IQ4_NL and IQ4_XS; and Q1_0, a sign a value.

Layouts, arithmetic and search as in ggml's ``ggml-quants.c``: `dequantize_row_iq4_nl`, `dequantize_row_iq4_xs`, and
`quantize_row_iq4_nl_impl` as llama-quantize calls it without an importance matrix, byte for byte.
"""

from __future__ import annotations

import numpy as np

from aprlab.quants import types
from aprlab.quants.base import Bytes, Fields, Floats, Quant, bits, inverse, to_half
from aprlab.quants.legacy import halves, pack_halves
from aprlab.quants.search import GROUP_MAX_EPS, ordered_sum

KVALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
TRIES = 7  # roundings that are tried on either side of the largest value's

# Index of the nearest value, by twice a number, rounded down: midpoints are multiples of a half, so this is exact. A number
# in the middle goes up, as in ggml's `best_index_int8`.
_KVALUE_BYTES = KVALUES.astype(np.int8).view(np.uint8)
_TWICE = np.arange(2 * int(KVALUES[0]), 2 * int(KVALUES[-1]) + 1)
_NEAREST = np.searchsorted(KVALUES[1:] + KVALUES[:-1], _TWICE, side="right").astype(np.uint8)
_NEAREST_VALUE = KVALUES[_NEAREST]


def _at(x: Floats) -> np.ndarray:
    """Place of each number of any shape in the tables of the nearest."""
    twice = np.floor(x + x)
    return (np.clip(twice, _TWICE[0], _TWICE[-1]) - _TWICE[0]).astype(np.intp)


def nearest(x: Floats) -> Bytes:
    """Index of the table's value nearest to each number: float32 to uint8, of one shape."""
    found: Bytes = _NEAREST[_at(x)]
    return found


def scale_of(x: Floats) -> Floats:
    """The scale of each group that loses least, weighted by the squares of the values: (32, groups) to (groups,)."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    zero = np.abs(largest) < GROUP_MAX_EPS
    top = np.where(zero, np.float32(1), largest)
    weight = x * x

    def sums(factor: Floats) -> tuple[Floats, Floats]:
        q = _NEAREST_VALUE[_at(factor * x)]
        wq = weight * q
        return ordered_sum(wq * x), ordered_sum(wq * q)

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        qx, q2 = sums(np.float32(1) / (-top / KVALUES[0]))
        scale = qx / q2
        best = scale * qx
        for step in range(-TRIES, TRIES + 1):
            qx, q2 = sums((np.float32(step) + KVALUES[0]) / top)
            better = (q2 > 0) & (qx * qx > best * q2)
            scale = np.where(better, qx / q2, scale)
            best = np.where(better, scale * qx, best)
    return np.where(zero, np.float32(0), scale).astype(np.float32)


def _columns(x: Floats) -> tuple[Floats, int]:
    """Groups of 32, (n, 32), as columns (32, n or more): at least two, so that sums run in one order; and n."""
    if len(x) == 1:
        x = np.repeat(x, 2, axis=0)
        return np.ascontiguousarray(x.T), 1
    return np.ascontiguousarray(x.T), len(x)


class IQ4_NL(Quant):
    """32 values of 4 bits, which choose from `KVALUES`, and a scale."""

    type = types.by_name("IQ4_NL")
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.multiply(self.half(b["d"])[:, None], KVALUES[halves(b["qs"])], out=out)

    def encode_fields(self, x: Floats, b: Fields) -> None:
        columns, n = _columns(x)
        scale = scale_of(columns)[:n]
        b["d"] = to_half(scale, self.type)
        b["qs"] = pack_halves(nearest(inverse(scale)[:, None] * x))


def iq4_nl_as_q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of IQ4_NL as blocks of Q8_0 with the same values to the bit: both are a half times a signed byte.

    Args:
        raw: ``uint8 (n * 18,)``.

    Returns:
        ``uint8 (n * 34,)``.
    """
    b = raw.reshape(-1, 18)
    out = np.empty((len(b), 34), np.uint8)
    out[:, :2] = b[:, :2]
    out[:, 2:] = _KVALUE_BYTES[halves(b[:, 2:])]
    return out.reshape(-1)


class IQ4_XS(Quant):
    """256 values in groups of 32 as IQ4_NL's, each group with a scale of 6 bits of its own."""

    type = types.by_name("IQ4_XS")
    layout = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])

    def unpack_scales(self, b: Fields) -> np.ndarray:
        """Step: the 8 scales of each block, -32..31, float32 (n, 8)."""
        low = np.stack([bits(b["scales_l"], 0, 4), bits(b["scales_l"], 4, 4)], axis=-1).reshape(-1, 8)
        high = (b["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)
        return (low | (high.astype(np.uint8) << np.uint8(4))).astype(np.float32) - np.float32(32)

    def decode_fields(self, b: Fields, out: Floats) -> None:
        scale = self.half(b["d"])[:, None] * self.unpack_scales(b)
        values = KVALUES[halves(b["qs"].reshape(-1, 16))].reshape(-1, 8, 32)
        np.multiply(scale[:, :, None], values, out=out.reshape(-1, 8, 32))

    def encode_fields(self, x: Floats, b: Fields) -> None:
        groups = x.reshape(-1, 32)
        scales = scale_of(np.ascontiguousarray(groups.T)).reshape(-1, 8)
        d = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1) / np.float32(-32)
        b["d"] = to_half(d[:, 0], self.type)
        steps = np.clip(np.rint(inverse(d) * scales), -32, 31).astype(np.float32)
        b["qs"] = pack_halves(nearest(inverse((d * steps).reshape(-1, 1)) * groups)).reshape(-1, 128)
        numbers = (steps + np.float32(32)).astype(np.uint8)
        b["scales_l"] = bits(numbers[:, 0::2], 0, 4) | (bits(numbers[:, 1::2], 0, 4) << np.uint8(4))
        high = bits(numbers, 4, 2).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
        b["scales_h"] = np.bitwise_or.reduce(high, axis=1)


class Q1_0(Quant):
    """128 values of one bit, a sign, and a scale."""

    type = types.by_name("Q1_0")
    layout = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        d = self.half(b["d"])[:, None]
        np.copyto(out, np.where(np.unpackbits(b["qs"], axis=-1, bitorder="little") > 0, d, -d))
