"""ggml's K quants: a super-block of 256 values, cut into groups of 16 or 32 whose scales are themselves quantised.

Layouts, arithmetic and search as in ggml's ``ggml-quants.c`` (``dequantize_row_*_K``, ``quantize_row_*_K_ref``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aprlab.quants import search, types
from aprlab.quants.base import Bytes, Fields, Floats, Quant, bits, to_half, up

Ints = np.ndarray[tuple[Any, ...], np.dtype[np.int8]]


def columns(x: Floats, size: int) -> Floats:
    """Values (n, 256) as groups of `size` in columns: (size, n * 256 / size), as `search` needs them."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def rows(q: Floats) -> Floats:
    """Inverse of `columns`: (size, groups) to (n, 256)."""
    return np.ascontiguousarray(q.T).reshape(-1, 256)


def unpack_runs(packed: Bytes, width: int, size: int) -> Bytes:
    """K quants' order of packed numbers: (n, bytes) to (n, numbers).

    Runs of `width` bytes: the lowest `size` bits of a run's bytes are its first `width` numbers, the next bits the
    next `width` numbers, and so on.
    """
    runs = packed.reshape(len(packed), -1, width)
    q = np.empty((len(packed), runs.shape[1], 8 // size, width), np.uint8)
    for i in range(8 // size):
        q[:, :, i] = bits(runs, size * i, size)
    return q.reshape(len(packed), -1)


def pack_runs(q: Bytes, width: int, size: int) -> Bytes:
    """Inverse of `unpack_runs`; bits of `q` above the lowest `size` are dropped."""
    runs = bits(q, 0, size).reshape(len(q), -1, 8 // size, width)
    packed = runs[:, :, 0].copy()
    for i in range(1, 8 // size):
        packed |= up(runs[:, :, i], size * i)
    return packed.reshape(len(q), -1)


def scale_groups(out: Floats, scale: Floats, minimum: Floats | None = None) -> None:
    """In place: values (n, 256) times their group's scale (n, groups), less their group's minimum."""
    groups = out.reshape(*scale.shape, -1)
    groups *= scale[:, :, None]
    if minimum is not None:
        groups -= minimum[:, :, None]


def _quantise_groups(x: Floats, q: Floats, scale: Floats, minimum: Floats | None, low: int, high: int) -> Floats:
    """The final numbers, (n, 256): `(x + minimum) / scale` to the nearest, within low..high, against the stored scales.

    A group whose stored scale is 0 keeps the numbers `q` of the search, as in ggml; they decode to the same value.
    Beyond 2^22 ggml's ``nearest_int`` wraps around; here such a number is cut off at low or high like any other.
    """
    d = scale[:, :, None]
    values = x.reshape(*scale.shape, -1)
    steps = (values if minimum is None else values + minimum[:, :, None]) / d
    return np.where(d == 0, q.reshape(steps.shape), np.clip(np.rint(steps), low, high)).reshape(x.shape)


def _round_unsigned(x: Floats, top: int) -> Bytes:
    """Nearest integer, 0..top."""
    return np.clip(np.nan_to_num(np.rint(x)), 0, top).astype(np.uint8)


class _Super(Quant):
    """Steps that every K quant has."""

    def super_scale(self, b: Fields) -> Floats:
        """Step: the scale of the scales, (n, 1)."""
        return self.half(b["d"])[:, None]


class _WithMinimum(_Super):
    """Q2_K, Q4_K, Q5_K: value = d * sc * q - dmin * m, with sc and m one number a group."""

    groups: int

    def super_minimum(self, b: Fields) -> Floats:
        """Step: the scale of the minima, (n, 1)."""
        return self.half(b["dmin"])[:, None]

    def unpack_scales(self, scales: Bytes) -> tuple[Bytes, Bytes]:
        """Step: the packed scales to (sc, m), each (n, groups)."""
        raise NotImplementedError

    def unpack(self, b: Fields) -> Bytes:
        """The numbers of the values, (n, 256)."""
        raise NotImplementedError

    def group_scales(self, b: Fields) -> tuple[Floats, Floats]:
        """Step: d * sc and dmin * m, each (n, groups)."""
        sc, m = self.unpack_scales(b["scales"])
        return self.super_scale(b) * sc, self.super_minimum(b) * m

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack(b))
        scale_groups(out, *self.group_scales(b))

    def _store_supers(self, b: Fields, scale: Floats, minimum: Floats, top: int) -> tuple[Bytes, Bytes]:
        """Write d and dmin for group scales and minima (n, groups); return them in units of d and dmin, 0..top."""
        units = []
        for name, value in (("d", scale), ("dmin", minimum)):
            largest = np.maximum(value.max(axis=1, keepdims=True), np.float32(0))
            b[name] = to_half(largest / np.float32(top), self.type)[:, 0]
            inverse = np.where(largest > 0, np.float32(top) / largest, np.float32(0))
            units.append(_round_unsigned(inverse * value, top))
        return units[0], units[1]


class Q2_K(_WithMinimum):
    """16 groups of 16; sc and m are the low and high nibble of one byte; q has 2 bits."""

    type = types.Q2_K
    layout = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])

    def unpack_scales(self, scales: Bytes) -> tuple[Bytes, Bytes]:
        return bits(scales, 0, 4), bits(scales, 4, 4)

    def unpack_quants(self, qs: Bytes) -> Bytes:
        """Step: (n, 64) bytes to (n, 256) numbers of 0..3."""
        return unpack_runs(qs, 32, 2)

    def unpack(self, b: Fields) -> Bytes:
        return self.unpack_quants(b["qs"])

    def encode_fields(self, x: Floats, b: Fields) -> None:
        groups = columns(x, 16)
        scale, minimum, q = search.make_qkx2_quants(groups, np.abs(groups), 3, -0.5, 0.1, 15, absolute=True)
        sc, m = self._store_supers(b, scale.reshape(-1, 16), minimum.reshape(-1, 16), 15)
        b["scales"] = sc | up(m, 4)
        q = _quantise_groups(x, rows(q), *Q2_K.group_scales(self, b), 0, 3)
        b["qs"] = pack_runs(q.astype(np.uint8), 32, 2)


class _SixBitScales(_WithMinimum):
    """Q4_K and Q5_K: 8 groups of 32; sc and m have six bits each, packed into 12 bytes."""

    def unpack_scales(self, scales: Bytes) -> tuple[Bytes, Bytes]:
        """Step: (n, 12) bytes to sc and m, each (n, 8) of 0..63.

        Groups 0..3: the low six bits of bytes 0..3 (sc) and 4..7 (m). Groups 4..7: low (sc) and high (m) nibbles of
        bytes 8..11, with the top two bits of bytes 0..3 (sc) and 4..7 (m) above them.
        """
        first, second, third = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
        sc = np.concatenate([bits(first, 0, 6), bits(third, 0, 4) | up(bits(first, 6, 2), 4)], axis=1)
        m = np.concatenate([bits(second, 0, 6), bits(third, 4, 4) | up(bits(second, 6, 2), 4)], axis=1)
        return sc, m

    def pack_scales(self, sc: Bytes, m: Bytes) -> Bytes:
        """Inverse of `unpack_scales`."""
        first = sc[:, :4] | up(bits(sc[:, 4:], 4, 2), 6)
        second = m[:, :4] | up(bits(m[:, 4:], 4, 2), 6)
        third = bits(sc[:, 4:], 0, 4) | up(m[:, 4:], 4)
        return np.concatenate([first, second, third], axis=1)

    def unpack_nibbles(self, qs: Bytes) -> Bytes:
        """Step: (n, 128) bytes to (n, 256) numbers of 0..15: four runs of 32 bytes, low nibbles before high ones."""
        return unpack_runs(qs, 32, 4)

    def _search(self, x: Floats, b: Fields, nmax: int, rmin: float, nstep: int) -> Bytes:
        """Write d, dmin and scales; return the numbers (n, 256)."""
        groups = columns(x, 32)
        mean = np.sqrt(search.ordered_sum(groups * groups) / np.float32(32))
        scale, minimum, q = search.make_qkx2_quants(groups, mean + np.abs(groups), nmax, rmin, 0.1, nstep, absolute=False)
        b["scales"] = self.pack_scales(*self._store_supers(b, scale.reshape(-1, 8), minimum.reshape(-1, 8), 63))
        return _quantise_groups(x, rows(q), *self.group_scales(b), 0, nmax).astype(np.uint8)


class Q4_K(_SixBitScales):
    """q has 4 bits."""

    type = types.Q4_K
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])

    def unpack(self, b: Fields) -> Bytes:
        return self.unpack_nibbles(b["qs"])

    def encode_fields(self, x: Floats, b: Fields) -> None:
        b["qs"] = pack_runs(self._search(x, b, 15, -1.0, 20), 32, 4)


class Q5_K(_SixBitScales):
    """q has 5 bits, the fifth in qh."""

    type = types.Q5_K
    layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        """Step: (n, 32) bytes to (n, 256) bits; bit g of byte j belongs to value j of group g."""
        return unpack_runs(qh, 32, 1)

    def unpack(self, b: Fields) -> Bytes:
        return up(self.unpack_high_bits(b["qh"]), 4) | self.unpack_nibbles(b["qs"])

    def encode_fields(self, x: Floats, b: Fields) -> None:
        q = self._search(x, b, 31, -0.5, 15)
        b["qs"] = pack_runs(q, 32, 4)
        b["qh"] = pack_runs(bits(q, 4, 1), 32, 1)


class Q3_K(_Super):
    """value = d * (sc - 32) * (q - 4): 16 groups of 16, six-bit sc, q with two bits in qs and the third in hmask."""

    type = types.Q3_K
    layout = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])

    def unpack_scales(self, scales: Bytes) -> Ints:
        """Step: (n, 12) bytes to (n, 16) signed scales, -32..31.

        The low four bits of groups 0..7 and 8..15 are the low and high nibbles of bytes 0..7; the top two bits of
        group j are bits 2 (j // 4) and up of byte 8 + j % 4.
        """
        low = np.concatenate([bits(scales[:, :8], 0, 4), bits(scales[:, :8], 4, 4)], axis=1)
        high = unpack_runs(scales[:, 8:], 4, 2)
        return (low | up(high, 4)).astype(np.int8) - np.int8(32)

    def pack_scales(self, sc: Ints) -> Bytes:
        """Inverse of `unpack_scales`."""
        u = (sc + np.int8(32)).astype(np.uint8)
        low = bits(u[:, :8], 0, 4) | up(u[:, 8:], 4)
        return np.concatenate([low, pack_runs(bits(u, 4, 2), 4, 2)], axis=1)

    def unpack_quants(self, qs: Bytes) -> Bytes:
        """Step: (n, 64) bytes to (n, 256) numbers of 0..3."""
        return unpack_runs(qs, 32, 2)

    def unpack_high_bits(self, hmask: Bytes) -> Bytes:
        """Step: (n, 32) bytes to (n, 256) bits; bit k of byte j belongs to value 32 k + j."""
        return unpack_runs(hmask, 32, 1)

    def unpack(self, b: Fields) -> Bytes:
        """(n, 256) numbers of 0..7, before 4 is taken off."""
        return up(self.unpack_high_bits(b["hmask"]), 2) | self.unpack_quants(b["qs"])

    def group_scales(self, b: Fields) -> Floats:
        """Step: d * sc, (n, 16)."""
        return self.super_scale(b) * self.unpack_scales(b["scales"])

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack(b))
        out -= 4
        scale_groups(out, self.group_scales(b))

    def encode_fields(self, x: Floats, b: Fields) -> None:
        scale, q = search.make_q3_quants(columns(x, 16), 4)
        scale = scale.reshape(-1, 16)
        largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
        inv = np.float32(-32) / largest
        b["d"] = to_half(np.where(largest != 0, np.float32(1) / inv, np.float32(0)), self.type)[:, 0]
        units = np.clip(np.nan_to_num(np.rint(inv * scale)), -32, 31).astype(np.int8)
        b["scales"] = np.where(largest != 0, self.pack_scales(units), np.uint8(0))  # ggml: twelve zero bytes for zeros
        u = (_quantise_groups(x, rows(q), self.group_scales(b), None, -4, 3) + 4).astype(np.uint8)
        b["qs"], b["hmask"] = pack_runs(u, 32, 2), pack_runs(bits(u, 2, 1), 32, 1)


class Q6_K(_Super):
    """value = d * sc * (q - 32): 16 groups of 16, signed 8-bit sc, q with four bits in ql and two in qh."""

    type = types.Q6_K
    layout = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])

    def unpack_nibbles(self, ql: Bytes) -> Bytes:
        """Step: (n, 128) bytes to (n, 256) numbers of 0..15: two runs of 64 bytes, low nibbles before high ones."""
        return unpack_runs(ql, 64, 4)

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        """Step: (n, 64) bytes to (n, 256) numbers of 0..3: two runs of 32 bytes, lowest bits first."""
        return unpack_runs(qh, 32, 2)

    def unpack(self, b: Fields) -> Bytes:
        """(n, 256) numbers of 0..63, before 32 is taken off."""
        return up(self.unpack_high_bits(b["qh"]), 4) | self.unpack_nibbles(b["ql"])

    def group_scales(self, b: Fields) -> Floats:
        """Step: d * sc, (n, 16)."""
        return self.super_scale(b) * b["scales"]

    def decode_fields(self, b: Fields, out: Floats) -> None:
        np.copyto(out, self.unpack(b))
        out -= 32
        scale_groups(out, self.group_scales(b))

    def encode_fields(self, x: Floats, b: Fields) -> None:
        scale, q = search.make_qx_quants(columns(x, 16), 32)
        scale = scale.reshape(-1, 16)
        largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
        zero = np.abs(largest) < search.GROUP_MAX_EPS
        inv = np.where(zero, np.float32(0), np.float32(-128) / largest)
        b["d"] = to_half(np.where(zero, np.float32(0), np.float32(1) / inv), self.type)[:, 0]
        b["scales"] = np.clip(np.rint(inv * scale), -128, 127).astype(np.int8)
        u = (_quantise_groups(x, rows(q), self.group_scales(b), None, -32, 31) + 32).astype(np.uint8)
        u = np.where(zero, np.uint8(0), u)  # ggml: a block of zeros is all zero bytes
        b["ql"], b["qh"] = pack_runs(u, 64, 4), pack_runs(bits(u, 4, 2), 32, 2)
