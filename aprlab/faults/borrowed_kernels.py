"""D, continued: blocks given to the kernel of another type, or turned into its blocks."""

from __future__ import annotations

import numpy as np

from aprlab.faults.base import Fault, lines
from aprlab.faults.decode import DecodeStep, decoded_with
from aprlab.quants import types
from aprlab.quants.base import Bytes, Floats
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
)  # fmt: skip
