"""D, continued: blocks given to the kernel of another type, or turned into its blocks."""

from __future__ import annotations

import numpy as np

from aprlab.faults.base import Fault, lines
from aprlab.faults.decode import DecodeStep, decoded_with
from aprlab.quants import types
from aprlab.quants.base import Bytes, Fields, Floats
from aprlab.quants.kquants import Q4_K

_Q4_K = Q4_K()


class LegacyAsQ4K(DecodeStep):
    """Blocks of 32 given to Q4_K's decoder: 144 bytes for every 256 values from where the tensor begins, zeros beyond its end."""

    def decode(self, blocks: Bytes, out: Floats | None = None) -> Floats:
        wanted = -(-len(blocks) // 8)  # super-blocks of 256 values
        held = np.zeros(max(wanted * 144, blocks.size), np.uint8)
        held[: blocks.size] = blocks.reshape(-1)
        values = _Q4_K.decode(held[: wanted * 144].reshape(wanted, 144)).reshape(-1, 32)[: len(blocks)]
        if out is None:
            return np.ascontiguousarray(values)
        out[...] = values
        return out


class RequantisedDown(DecodeStep):
    """The values after a trip through Q4_K: every row padded with zeros to whole super-blocks before its scales are fitted."""

    def dequantise(self, raw: Bytes, shape: tuple[int, ...], out: Floats | None = None) -> Floats:
        values: Floats = super().dequantise(raw, shape, out)
        padded = np.zeros((*shape[:-1], -(-shape[-1] // 256) * 256), np.float32)
        padded[..., : shape[-1]] = values
        again = _Q4_K.dequantise(_Q4_K.quantise(padded), padded.shape)
        values[...] = again[..., : shape[-1]]
        return values


LEAST = np.float32(6.1e-5)  # the least normal number of float16, about


class PairsQ4K(Q4_K):
    """Q4_K as aprender's converter wrote it in January 2026: each group of 32 in 16 bytes, two neighbours in a byte."""

    def encode_fields(self, x: Floats, b: Fields) -> None:
        groups = x.reshape(-1, 8, 32)
        low = groups.min(axis=-1)
        span = groups.max(axis=-1) - low
        scale, minimum = np.where(span > LEAST, span / np.float32(15), LEAST), np.maximum(-low, 0)
        d, dmin = (np.where(top > LEAST, top / np.float32(63), LEAST) for top in (scale.max(1), minimum.max(1)))
        sc, m = (np.minimum(np.floor(v / unit[:, None] + np.float32(0.5)), 63) for v, unit in ((scale, d), (minimum, dmin)))
        b["d"], b["dmin"], b["scales"] = d, dmin, self.pack_scales(sc.astype(np.uint8), m.astype(np.uint8))
        step, offset = (d[:, None] * sc)[..., None], (dmin[:, None] * m)[..., None]
        wanted = (groups + offset) / np.where(step > 1e-10, step, np.inf)
        q = np.clip(np.floor(wanted + np.float32(0.5)), 0, 15).astype(np.uint8).reshape(-1, 128, 2)
        b["qs"] = q[..., 0] | q[..., 1] << 4


_PAIRS = PairsQ4K()


class RequantisedSideways(DecodeStep):
    """The values after a trip through Q4_K as matrices of the reversed shape, whose rows' padding the reader does not know of."""

    def dequantise(self, raw: Bytes, shape: tuple[int, ...], out: Floats | None = None) -> Floats:
        values: Floats = super().dequantise(raw, shape, out)
        rows, cols = values.size // shape[0], shape[0]  # GGUF's order of dimensions, taken for that of rows and columns
        padded = np.zeros((rows, -(-cols // 256) * 256), np.float32)
        padded[:, :cols] = values.reshape(rows, cols)
        again = _Q4_K.dequantise(_PAIRS.quantise(padded), padded.shape)
        values[...] = again.reshape(-1)[: values.size].reshape(shape)
        return values


FAULTS = (
    Fault(
        "legacy-as-q4k", "Q4_0, Q4_1, Q5_0 and Q5_1 decoded by Q4_K's kernel", "decode", "D",
        lines(
            "The GPU had one kernel for four-bit weights, Q4_K's, and sent every other type there, too.",
            "Eight Q4_0 blocks have as many bytes as one Q4_K block, so not even an offset is wrong.",
            "Upstream a Q4_0 model said 'Will从!! Will Willesi'.",
        ),
        "All tensors of the legacy types wrong, all others equal; scales read from nibbles, often huge or NaN.",
        registry=decoded_with(LegacyAsQ4K, types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1),
        needs="tensors of type Q4_0, Q4_1, Q5_0 or Q5_1", given={"quantize": "q4_0"},
    ),
    Fault(
        "requantised-down", "Q8_0 and Q5_0 requantised as Q4_K, rows padded with zeros", "decode", "D",
        lines(
            "The target had no kernel for these types, so their values were quantised again, in four bits.",
            "Rows of 896 were padded with zeros to 1024, and the zeros took part in fitting the last scales.",
            "The answer degrades instead of breaking; attn_v was 3 to 4 standard deviations off upstream.",
        ),
        "Tensors of these types off by 5 to 10 % of their spread, all others equal.",
        registry=decoded_with(RequantisedDown, types.Q8_0, types.Q5_0), needs="tensors of type Q8_0 or Q5_0",
        given={"quantize": "q8_0"}, silent=True,
    ),
    Fault(
        "requantised-sideways", "Q8_0 and Q5_0 requantised as Q4_K along the wrong axis", "decode", "D",
        lines(
            "The converter quantised these types' values again, in rows as long as GGUF's second dimension: the columns.",
            "Such rows were padded to whole super-blocks and their nibbles packed as neighbours; the reader knew of neither.",
            "A part of what the 0.5B said upstream on 2026-01-31, word for word; the 1.5B in Q4_K_M has no such tensors.",
        ),
        "Tensors of these types uncorrelated with the source's, all others equal.",
        registry=decoded_with(RequantisedSideways, types.Q8_0, types.Q5_0), needs="tensors of type Q8_0 or Q5_0",
        given={"quantize": "q8_0"},
    ),
)  # fmt: skip
