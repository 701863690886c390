"""D. Block decoding: the blocks are correct, the decoder is not.

Each fault replaces one step of a decoder. The file form writes blocks of which a healthy decoder makes the same values,
to the last bit: scales, minima and nibbles moved to where the faulty one looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from aprlab.conversion.recode import at_hand
from aprlab.conversion.seams import Seams
from aprlab.faults.base import Fault, Registry, lines
from aprlab.faults.tensors import change_tensors, with_blocks
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import OWN, REGISTRY, types
from aprlab.quants.apr import pairs
from aprlab.quants.base import Bytes, Fields, Floats, Quant, bits, up
from aprlab.quants.kquants import Q4_K, pack_runs, unpack_runs
from aprlab.quants.legacy import pack_halves
from aprlab.quants.types import TensorType

if TYPE_CHECKING:
    from numpy.typing import NDArray


class DecodeStep(Quant):
    """A step of a decoder, mixed into whatever decoder is there already; `super()` is that one's."""


def decoded_with(step: type[Quant], *kinds: TensorType) -> Callable[[Registry], Registry]:
    """A registry in which the decoders of `kinds` have this step instead of theirs."""

    def change(registry: Registry) -> Registry:
        changed = {kind: type(step.__name__, (step, type(registry[kind])), {})() for kind in kinds}
        return {**registry, **changed}

    return change


def blocks_edited(edit: Callable[[Fields], None], kinds: Iterable[TensorType]) -> Callable[[Seams], Seams]:
    """A converter that writes the blocks of tensors of `kinds` (two-dimensional) changed by `edit`."""
    wanted = tuple(kinds)

    def change(tensor: Tensor) -> Tensor:
        return with_blocks(tensor, edit) if tensor.type in wanted and len(tensor.shape) == 2 else tensor

    return lambda s: change_tensors(s, change)


# ── Q4_K ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_Q4_K = Q4_K()


class MinLost(Q4_K):
    """value = d * sc * q: the minimum is not subtracted."""

    def super_minimum(self, b: Fields) -> Floats:
        return np.zeros((len(b), 1), np.float32)


def lose_min(b: Fields) -> None:
    b["dmin"] = 0


class Exchanged(Q4_K):
    """d where dmin should be, and the reverse."""

    def super_scale(self, b: Fields) -> Floats:
        return self.half(b["dmin"])[:, None]

    def super_minimum(self, b: Fields) -> Floats:
        return self.half(b["d"])[:, None]


def exchange_d_dmin(b: Fields) -> None:
    b["d"], b["dmin"] = b["dmin"].copy(), b["d"].copy()


def _repacked(change: Callable[[Bytes, Bytes, Bytes], tuple[Bytes, Bytes]]) -> tuple[type[Quant], Callable[[Fields], None]]:
    """From `change(sc, m, packed)` the decoder's step and the edit of the blocks."""

    class Scales(Q4_K):
        def unpack_scales(self, scales: Bytes) -> tuple[Bytes, Bytes]:
            return change(*super().unpack_scales(scales), scales)

    def edit(b: Fields) -> None:
        sc, m = change(*_Q4_K.unpack_scales(b["scales"]), b["scales"])
        b["scales"] = _Q4_K.pack_scales(sc, m)

    return Scales, edit


def _one_for_two(sc: Bytes, m: Bytes, packed: Bytes) -> tuple[Bytes, Bytes]:
    """The high nibbles' group takes the scale and minimum of the low nibbles'."""
    return np.repeat(sc[:, 0::2], 2, axis=1), np.repeat(m[:, 0::2], 2, axis=1)


def _no_top_bits(sc: Bytes, m: Bytes, packed: Bytes) -> tuple[Bytes, Bytes]:
    """Groups 4..7 keep only the four bits of their nibble."""
    return np.hstack([sc[:, :4], bits(sc[:, 4:], 0, 4)]), np.hstack([m[:, :4], bits(m[:, 4:], 0, 4)])


def _plain_bytes(sc: Bytes, m: Bytes, packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales are taken for the low six bits of bytes 0..7, minima for those of bytes 4..11."""
    return bits(packed[:, 0:8], 0, 6), bits(packed[:, 4:12], 0, 6)


ONE_SCALE, NO_TOP_BITS, PLAIN_BYTES = _repacked(_one_for_two), _repacked(_no_top_bits), _repacked(_plain_bytes)


def _reordered(change: Callable[[Bytes], Bytes]) -> tuple[type[Quant], Callable[[Fields], None]]:
    """From `change`, (n, 128) bytes to (n, 256) numbers, the decoder's step and the edit of the blocks."""

    class Nibbles(Q4_K):
        def unpack_nibbles(self, qs: Bytes) -> Bytes:
            return change(qs)

    def edit(b: Fields) -> None:
        b["qs"] = pack_runs(change(b["qs"]), 32, 4)

    return Nibbles, edit


NIBBLE_PAIRS = _reordered(pairs)
NIBBLES_EXCHANGED = _reordered(lambda qs: unpack_runs(bits(qs, 4, 4) | up(qs, 4), 32, 4))
SIXTEEN_BYTES = _reordered(lambda qs: unpack_runs(qs, 16, 4))

# ── other types ───────────────────────────────────────────────────────────────────────────────────────────────────


class AdjacentPairs(DecodeStep):
    """Q4_0 to Q5_1: byte i holds values 2i and 2i+1, as in AprQ4, instead of i and i+16."""

    def unpack_nibbles(self, qs: Bytes) -> Bytes:
        return pairs(qs)


def to_adjacent_pairs(b: Fields) -> None:
    b["qs"] = pack_halves(pairs(b["qs"]))


class HighBitsReversed(DecodeStep):
    """Q5_0, Q5_1: the fifth bits of each byte from the top down."""

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        return np.unpackbits(qh, axis=-1, bitorder="big")


def reverse_high_bits(b: Fields) -> None:
    b["qh"] = np.packbits(np.unpackbits(b["qh"], axis=-1, bitorder="big"), axis=-1, bitorder="little")


def flat(packed: Bytes, size: int) -> Bytes:
    """Numbers of `size` bits one after another, lowest bits first: (n, bytes) to (n, numbers). ggml packs in runs."""
    return np.stack([bits(packed, size * i, size) for i in range(8 // size)], axis=-1).reshape(len(packed), -1)


class InventedQ5K(DecodeStep):
    """Q5_K as one would guess it: nibbles in pairs, high bits in a row."""

    def unpack_nibbles(self, qs: Bytes) -> Bytes:
        return flat(qs, 4)

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        return flat(qh, 1)


def invent_q5k(b: Fields) -> None:
    b["qs"], b["qh"] = pack_runs(flat(b["qs"], 4), 32, 4), pack_runs(flat(b["qh"], 1), 32, 1)


class SequentialQ6K(DecodeStep):
    """Q6_K as one would guess it: nibbles in pairs, two high bits of each value in a row."""

    def unpack_nibbles(self, ql: Bytes) -> Bytes:
        return flat(ql, 4)

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        return flat(qh, 2)


def sequential_q6k(b: Fields) -> None:
    b["ql"], b["qh"] = pack_runs(flat(b["ql"], 4), 64, 4), pack_runs(flat(b["qh"], 2), 32, 2)


class SequentialHighBits(DecodeStep):
    """Q5_K with the fifth bits in a row: bit i of the 256 belongs to value i."""

    def unpack_high_bits(self, qh: Bytes) -> Bytes:
        return flat(qh, 1)


def sequential_high_bits(b: Fields) -> None:
    b["qh"] = pack_runs(flat(b["qh"], 1), 32, 1)


class InventedQ3K(DecodeStep):
    """Q3_K as one would guess it: two-bit numbers in a row, high bits in a row."""

    def unpack_quants(self, qs: Bytes) -> Bytes:
        return flat(qs, 2)

    def unpack_high_bits(self, hmask: Bytes) -> Bytes:
        return flat(hmask, 1)


def invent_q3k(b: Fields) -> None:
    b["qs"], b["hmask"] = pack_runs(flat(b["qs"], 2), 32, 2), pack_runs(flat(b["hmask"], 1), 32, 1)


class InventedQ2K(DecodeStep):
    """Q2_K as one would guess it: two-bit numbers in a row."""

    def unpack_quants(self, qs: Bytes) -> Bytes:
        return flat(qs, 2)


def invent_q2k(b: Fields) -> None:
    b["qs"] = pack_runs(flat(b["qs"], 2), 32, 2)


class Stride36(DecodeStep):
    """Q8_0 in blocks of 36 bytes, scale, sum and 32 numbers, which is Q8_1's: from the second block on out of step."""

    def decode(self, blocks: Bytes, out: Floats | None = None) -> Floats:
        held = np.zeros(len(blocks) * 36, np.uint8)  # the last blocks end beyond the tensor, in zeros
        held[: blocks.size] = blocks.reshape(-1)
        layout = np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)])
        b = held.view(layout)
        out = np.empty((len(blocks), 32), np.float32) if out is None else out
        with np.errstate(invalid="ignore", over="ignore"):
            np.multiply(b["qs"], b["d"].astype(np.float32)[:, None], out=out)
        return out


SMALLEST_NORMAL = np.float16(2.0**-14)
_SCALED = tuple(quant.type for quant in OWN if quant.type.quantised and quant.type is not types.APR_Q8)


def _subnormal(field: NDArray[np.float16]) -> NDArray[np.bool_]:
    return (field != 0) & (np.abs(field) < SMALLEST_NORMAL)


class Flushed(DecodeStep):
    """Scales below 2**-14, float16's smallest normal number, become 0."""

    def half(self, field: NDArray[np.float16]) -> Floats:
        return np.where(_subnormal(field), np.float32(0), super().half(field))


class Floored(DecodeStep):
    """Scales below 2**-14 are raised to it, their sign kept."""

    def half(self, field: NDArray[np.float16]) -> Floats:
        raised = np.copysign(np.float32(SMALLEST_NORMAL), field.astype(np.float32))
        return np.where(_subnormal(field), raised, super().half(field))


def _each_half(change: Callable[[NDArray[np.float16]], NDArray[np.float16]]) -> Callable[[Fields], None]:
    def edit(b: Fields) -> None:
        for name in b.dtype.names or ():
            if b.dtype[name] == np.float16:
                b[name] = np.where(_subnormal(b[name]), change(b[name]), b[name])

    return edit


def has_subnormal_scales(model: Model) -> bool:
    """Whether any float16 scale of a quantised tensor is subnormal."""
    for tensor in model.tensors.values():
        if tensor.type in _SCALED:
            b = tensor.raw.view(REGISTRY[tensor.type].layout)
            if any(_subnormal(b[name]).any() for name in b.dtype.names or () if b.dtype[name] == np.float16):
                return True
    return False


class DefaultKernel(DecodeStep):
    """Q6_K blocks given to Q4_K's decoder, which takes 144 bytes a block from where the tensor begins."""

    def decode(self, blocks: Bytes, out: Floats | None = None) -> Floats:
        return _Q4_K.decode(blocks.reshape(-1)[: len(blocks) * 144].reshape(-1, 144), out)


class FlooredBlocks(DecodeStep):
    """The bytes of a row counted in whole super-blocks of 256: what is left over is lost."""

    def dequantise(self, raw: Bytes, shape: tuple[int, ...], out: Floats | None = None) -> Floats:
        values: Floats = super().dequantise(raw, shape, out)
        values[..., shape[-1] // 256 * 256 :] = 0
        return values


_OF_32 = (types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0)


def _broken_rows(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.type in _OF_32 and tensor.cols % 256 != 0


def floor_blocks(s: Seams) -> Seams:
    """The same in a file: zero blocks at the end of such rows."""

    def change(tensor: Tensor) -> Tensor:
        if not _broken_rows(tensor):
            return tensor
        tensor = at_hand(tensor)
        raw = np.array(tensor.raw).reshape(tensor.rows, -1)
        raw[:, tensor.cols // 256 * 256 // tensor.type.block_elements * tensor.type.block_bytes :] = 0
        return tensor.replace(raw=raw.reshape(-1))

    return change_tensors(s, change)


def relabel_aprq4(s: Seams) -> Seams:
    """AprQ4 blocks under Q4_0's byte."""
    return replace(s, code=lambda kind: types.Q4_0.code if kind is types.APR_Q4 else s.code(kind))


Pair = tuple[type[Quant], Callable[[Fields], None]]  # one mistake in both forms: of a decoder, and of blocks in a file


def _block_fault(
    id: str, title: str, story: str, mark: str, pair: Pair, *kinds: TensorType, quantize: str | None = None
) -> Fault:  # fmt: skip
    """The fault of a decoder of these types; `quantize` makes a model that has them."""
    step, edit = pair
    return Fault(
        id, title, "decode", "D", story, mark, seams=blocks_edited(edit, kinds), registry=decoded_with(step, *kinds),
        needs=f"tensors of type {' or '.join(map(str, kinds))}", given={} if quantize is None else {"quantize": quantize},
    )  # fmt: skip


FAULTS = (
    _block_fault(
        "q4k-min-lost", "Q4_K: the minimum is not subtracted",
        lines(
            "The kernel computes d·sc·q and forgets − dmin·m.",
            "Every value is too large by its group's minimum, so all weights become positive.",
            "No NaN, no zeros, correct shapes; the same token forever, whatever the prompt.",
        ),
        "Means of Q4_K tensors move from about 0 to far above it; file form: dmin = 0 in every block.",
        (MinLost, lose_min), types.Q4_K,
    ),
    _block_fault(
        "q4k-d-dmin", "Q4_K: d and dmin swapped",
        lines(
            "The two float16 numbers at the start of a block are read in the wrong order.",
            "Both are small positive numbers, so nothing looks odd.",
            "The same token forever, as with a lost minimum.",
        ),
        "Values are dmin·sc·q − d·m; file form: the first two fields swapped in every block.",
        (Exchanged, exchange_d_dmin), types.Q4_K,
    ),
    _block_fault(
        "q4k-one-scale", "Q4_K: one scale for both nibbles of a byte",
        lines(
            "Low nibbles use scale 2c, high nibbles 2c+1; the kernel used 2c for both.",
            "Half of the groups get their neighbour's scale and minimum.",
            "Neighbouring scales are similar, so statistics hardly change.",
        ),
        "Groups 1, 3, 5, 7 of every super-block wrong; 0, 2, 4, 6 correct.",
        ONE_SCALE, types.Q4_K,
    ),
    _block_fault(
        "q4k-scale-bits", "Q4_K: scales of groups 4..7 without their top two bits",
        lines(
            "The six-bit numbers of groups 4..7 are stored in two places: a nibble, and the top bits of other bytes.",
            "The kernel read only the nibble.",
            "The first half of every super-block is correct.",
        ),
        "Groups 4..7 wrong wherever a scale or minimum is 16 or more; groups 0..3 correct.",
        NO_TOP_BITS, types.Q4_K,
    ),
    _block_fault(
        "q4k-scales-plain", "Q4_K: scales read as plain bytes",
        lines(
            "Twelve bytes hold eight scales and eight minima; the kernel read byte g for scale g, byte g+4 for minimum g.",
            "Groups 0..3 come out correct; groups 4..7 use minima as scales.",
            "A quick test on the first 128 values passes.",
        ),
        "Groups 4..7 wrong, groups 0..3 correct.",
        PLAIN_BYTES, types.Q4_K,
    ),
    _block_fault(
        "q4k-nibble-pairs", "Q4_K: nibbles in adjacent pairs",
        lines(
            "Byte j was read as values 2j and 2j+1, as in many other formats.",
            "In Q4_K the low nibbles of 32 bytes are one group, the high nibbles the next.",
            "The multiset of quants in a block does not change, so histograms do not show it.",
        ),
        "Quants permuted within runs of 64 and multiplied by the wrong scales; correlation near 0.",
        NIBBLE_PAIRS, types.Q4_K,
    ),
    _block_fault(
        "q4k-nibbles-exchanged", "Q4_K: low and high nibble swapped",
        lines(
            "The high nibble was used for the first group, the low nibble for the second.",
            "Each group has its neighbour's quants with its own scale.",
            "Multilingual word salad; statistics nearly unchanged.",
        ),
        "Groups swapped in pairs, scales not.",
        NIBBLES_EXCHANGED, types.Q4_K,
    ),
    _block_fault(
        "q4k-16-bytes", "Q4_K: 16 bytes for a group of 32",
        lines(
            "The kernel read both nibbles of 16 bytes per group; a group is one nibble of 32 bytes.",
            "It reads every byte exactly once, so it ends in the right place.",
            "Half of the values in every group belong to another group.",
        ),
        "Quants permuted within runs of 64, in quarters of 16.",
        SIXTEEN_BYTES, types.Q4_K,
    ),
    _block_fault(
        "nibble-pairs", "Q4_0, Q4_1: nibbles in adjacent pairs",
        lines(
            "ggml stores value i in the low and i+16 in the high nibble of byte i; the kernel used 2i and 2i+1.",
            "AprQ4 stores them that way, and its code was reused.",
            "Upstream, correlation with the correct values was −0.18, and 0.999999 after the fix.",
        ),
        "The multiset of values in each block is unchanged, the order is not.",
        (AdjacentPairs, to_adjacent_pairs), types.Q4_0, types.Q4_1, quantize="q4_0",
    ),
    Fault(
        "aprq4-relabelled", "AprQ4 blocks labelled Q4_0", "dtype", "D",
        lines(
            "Both have a float16 scale and 16 bytes for 32 values: 18 bytes, value = d·(q − 8).",
            "Only the nibble order differs: adjacent pairs in AprQ4, halves in Q4_0.",
            "The size law cannot detect it, and every block has the correct multiset of values.",
        ),
        "Byte 2 instead of 128 (or 8); sizes agree; values permuted within blocks of 32.",
        seams=relabel_aprq4, needs="tensors of type AprQ4", given={"quantize": "aprq4"},
    ),
    _block_fault(
        "q5-nibble-pairs", "Q5_0, Q5_1: nibbles in adjacent pairs",
        lines(
            "Byte i was read as values 2i and 2i+1; ggml has i in its low and i+16 in its high nibble (aprender, January 2026).",
            "The fifth bit of value v was still bit v of the word, so values get other values' fifth bits.",
            "The 1.5B in Q4_K_M has no such tensors; the 0.5B, whose rows of 896 no K-quant fits, has them nearly everywhere.",
        ),
        "Q5_0 and Q5_1 only: nibbles permuted within blocks of 32, the fifth bits in place.",
        (AdjacentPairs, to_adjacent_pairs), types.Q5_0, types.Q5_1, quantize="q5_0",
    ),
    _block_fault(
        "q5-high-bits", "Q5_0, Q5_1: the fifth bits in the wrong order",
        lines(
            "Bit i of a little-endian 32-bit word belongs to value i; the kernel read each byte from the top bit down.",
            "Half of the quants are 16 too large or too small.",
            "Scales and nibbles are correct, so the blocks look similar.",
        ),
        "Values off by 0 or ±16 d; value i has the bit of value 7 − i of its eight.",
        (HighBitsReversed, reverse_high_bits), types.Q5_0, types.Q5_1, quantize="q5_0",
    ),
    _block_fault(
        "q5k-layout", "Q5_K: an invented layout",
        lines(
            "Written without looking at ggml: nibbles in pairs, high bits packed in sequence.",
            "ggml uses runs of 32 bytes for both.",
            "Encoder and decoder were only tested against each other, and they agreed.",
        ),
        "About 248 of 256 values of a block wrong.",
        (InventedQ5K, invent_q5k), types.Q5_K, quantize="q5k",
    ),
    _block_fault(
        "q6k-sequential", "Q6_K: nibbles and high bits read in sequence",
        lines(
            "Value v was read from nibble v of ql and from bits 2(v mod 4) of byte v/4 of qh; its scale from group v/16.",
            "ggml splits a block into two halves: the low nibbles of 64 bytes before the high ones, bits 32 values apart.",
            "Upstream's published statistics of 2026-01-30, the baseline of two gates, were computed this way.",
        ),
        "About 250 of 256 values of a block wrong; means and extremes hardly change, the spread grows by half.",
        (SequentialQ6K, sequential_q6k), types.Q6_K,
    ),
    _block_fault(
        "q5k-qh-sequential", "Q5_K: the fifth bits read in sequence",
        lines(
            "The nibbles were read correctly; the fifth bit of value v was taken from bit v mod 8 of byte v/8.",
            "In ggml bit g of byte j belongs to value j of group g.",
            "Only half of the values change, each by 16 steps of its group.",
        ),
        "Values off by 0 or ±16 d·sc; scales, minima and low nibbles correct.",
        (SequentialHighBits, sequential_high_bits), types.Q5_K, quantize="q5k",
    ),
    _block_fault(
        "q3k-layout", "Q3_K: an invented layout",
        lines(
            "Two-bit quants packed in sequence, high bits packed in sequence.",
            "ggml uses runs of 32 bytes for both, with four and eight bit planes.",
            "Encoder and decoder were only tested against each other, and they agreed.",
        ),
        "About 224 of 256 values of a block wrong.",
        (InventedQ3K, invent_q3k), types.Q3_K, quantize="q3k",
    ),
    _block_fault(
        "q2k-layout", "Q2_K: an invented layout",
        lines(
            "Two-bit quants packed in sequence.",
            "ggml uses runs of 32 bytes with four quants per byte, 32 values apart.",
            "Encoder and decoder were only tested against each other, and they agreed.",
        ),
        "About 192 of 256 values of a block wrong.",
        (InventedQ2K, invent_q2k), types.Q2_K, quantize="q2k",
    ),
    Fault(
        "q80-36-bytes", "Q8_0: blocks of 36 bytes instead of 34", "decode", "D",
        lines(
            "Q8_1 has a sum next to its scale, 36 bytes; its block size was used for Q8_0.",
            "The first block is nearly correct; from the second on, quants are read as scales.",
            "Values drift, some scales are NaN, and the argmax over NaN floods the answer with PAD.",
        ),
        "Block 0 shifted by two values, every later block by two more bytes; NaN and Inf; the tail is zero.",
        registry=decoded_with(Stride36, types.Q8_0), needs="tensors of type Q8_0", given={"quantize": "q8_0"},
    ),
    Fault(
        "scales-flushed", "Subnormal float16 scales flushed to 0", "decode", "D",
        lines(
            "A hand-written float16 conversion did not handle subnormal numbers.",
            "K types have scales of scales, and in every real model some are small enough to be subnormal.",
            "The weights of such blocks become zero; a tensor may lose 99 % of its values.",
        ),
        "Whole blocks are zero where |d| < 2⁻¹⁴; all others are bitwise equal.",
        seams=blocks_edited(_each_half(np.zeros_like), _SCALED), registry=decoded_with(Flushed, *_SCALED),
        needs="subnormal scales", fits=has_subnormal_scales,
    ),
    Fault(
        "scales-floored", "Subnormal float16 scales raised to the smallest normal number", "decode", "D",
        lines(
            "To avoid a division by zero, scales below 2⁻¹⁴ were raised to it.",
            "The quants of the block were computed for the smaller scale.",
            "Values in such blocks become too large, and so does the minimum that is subtracted.",
        ),
        "Blocks with |d| < 2⁻¹⁴ are too large; all others are bitwise equal.",
        seams=blocks_edited(_each_half(lambda half: np.copysign(SMALLEST_NORMAL, half)), _SCALED),
        registry=decoded_with(Floored, *_SCALED), needs="subnormal scales", fits=has_subnormal_scales,
    ),
    Fault(
        "floor-blocks", "Row size rounded down to whole super-blocks", "decode", "D",
        lines(
            "The bytes per row were computed as columns // 256 × block bytes: floor instead of ceil.",
            "With 896 columns, half a super-block per row is never read.",
            "If all widths are multiples of 256 nothing happens: the larger models pass.",
        ),
        "In every row the columns after the last multiple of 256 are zero.",
        seams=floor_blocks, registry=decoded_with(FlooredBlocks, *_OF_32),
        needs="rows whose width is not a multiple of 256 (the 0.5B)",
        fits=lambda model: any(_broken_rows(tensor) for tensor in model.tensors.values()),
    ),
    Fault(
        "default-kernel", "Q6_K decoded by Q4_K's kernel", "decode", "D",
        lines(
            "The kernel was chosen by a match with a default arm: `_ => Q4_K`.",
            "Q6_K has 210 bytes per block; the wrong kernel reads 144 of them as scales and nibbles.",
            "In a Q4_K_M file only the output and every other ffn_down and attn_v are affected.",
        ),
        "All tensors of one type wrong, all others equal; garbage scales, often NaN.",
        registry=decoded_with(DefaultKernel, types.Q6_K), needs="tensors of type Q6_K",
    ),
)  # fmt: skip
