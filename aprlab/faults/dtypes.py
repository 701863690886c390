"""B. Dtype: the byte in the index says one type, the blocks have another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

from aprlab.conversion.recode import at_hand, re_encoded
from aprlab.conversion.seams import Seams
from aprlab.faults.base import Fault, lines
from aprlab.faults.tensors import change_tensors
from aprlab.quants import types
from aprlab.quants.types import TensorType

# The ticket's table of what the writer wrote before GH-191, and the same function as the ticket's diff shows it.
# They disagree about Q5_K; Q4_1, Q5_0 and Q5_1 are in neither and fell through to F32.
WRITER_TABLE: dict[TensorType, int] = {
    types.Q4_K: 8, types.Q5_K: 8, types.Q6_K: 9, types.Q8_0: 10, types.F32: 0, types.F16: 1,
}  # fmt: skip
WRITER_CODE: dict[TensorType, int] = WRITER_TABLE | {
    types.Q5_K: 12, types.Q4_0: 11, types.Q3_K: 13, types.Q2_K: 14, types.BF16: 2,
}  # fmt: skip
FELL_THROUGH = (types.Q4_1, types.Q5_0, types.Q5_1)

_K_TYPES = (types.Q2_K, types.Q3_K, types.Q4_K, types.Q5_K, types.Q6_K)


def coded(table: Mapping[TensorType, int]) -> Callable[[Seams], Seams]:
    """A converter whose table of dtype bytes differs in these types."""
    return lambda s: replace(s, code=lambda kind: table[kind] if kind in table else s.code(kind))


def fall_through_warned(s: Seams) -> Seams:
    """An unknown type becomes F32, and a line on standard error says so."""

    def code(kind: TensorType) -> int:
        if kind in FELL_THROUGH:
            warnings.warn(f"unknown dtype {kind.name}, writing F32", stacklevel=2)
            return types.F32.code
        return s.code(kind)

    return replace(s, code=code)


def dequantise_all(s: Seams) -> Seams:
    """Every matrix is decoded and written as F32."""
    return change_tensors(s, lambda t: t if t.type is types.F32 else re_encoded(at_hand(t), types.F32))


_SIZE_LAW = "The size law: the byte count in the index does not fit the labelled type, and fits the true type exactly."

FAULTS = (
    Fault(
        "GH-186", "K types labelled F32 (byte 0)", "dtype", "B",
        lines(
            "Files had ggml's number 12 for Q4_K; the reader of that time did not know it and fell back to F32.",
            "Packed 4-bit blocks were read as floats: they fill 14 % of the elements, 0.7 % NaN or Inf, values up to 3e38.",
            "A default arm, `_ => F32`, with no warning.",
        ),
        _SIZE_LAW + " Byte 0 with 144 bytes per 256 values.",
        seams=coded(dict.fromkeys(_K_TYPES, types.F32.code)), needs="tensors of a K type",
    ),
    Fault(
        "GH-191", "The writer's invented dtype bytes (Q4_K = 8, Q5_K = 8, Q6_K = 9, Q8_0 = 10)", "dtype", "B",
        lines(
            "The writer made up its own numbers, 8, 9, 10…, instead of using ggml's.",
            "The reader in the same crate read 8 as 'Q4', which matched no type, and fell back to F32.",
            "The data bytes are intact, so checksums over the data agree.",
        ),
        _SIZE_LAW + " Byte 8 with 144 bytes per 256 values, byte 9 with 210.",
        seams=coded(WRITER_TABLE), needs="tensors of type Q4_K, Q5_K, Q6_K or Q8_0",
    ),
    Fault(
        "GH-191-code", "The same writer, from the ticket's diff (Q5_K = 12, Q4_0 = 11, Q3_K = 13, Q2_K = 14, BF16 = 2)",
        "dtype", "B",
        lines(
            "The ticket's table and its diff disagree: Q5_K is 8 in one, 12 in the other.",
            "With 12, a Q5_K tensor is labelled Q4_K, a valid type that every reader knows.",
            "Only the size (176 bytes per 256 values, not 144) gives it away.",
        ),
        _SIZE_LAW + " Q5_K under Q4_K's byte, Q3_K and Q2_K under Q5_K's and Q6_K's.",
        seams=coded(WRITER_CODE), needs="tensors of a quantised type of the table", given={"quantize": "q5k"},
    ),
    Fault(
        "GH-191-reader", "Correct bytes, as the reader of that time understood them (8 = 'Q4' = F32, 9 = Q8_0)", "dtype", "B",
        lines(
            "The reader's own table mapped 8 to AprQ4 and 9 to Q8_0; in ggml both numbers mean other types.",
            "Q8_0 (8) in a correct file became 'Q4', matched nothing and fell back to F32.",
            "Written back to disk, the file says F32 for what are Q8_0 blocks.",
        ),
        _SIZE_LAW + " Byte 0 with 34 bytes per 32 values.",
        seams=coded({types.Q8_0: types.F32.code, types.Q8_1: types.Q8_0.code}), needs="tensors of type Q8_0",
        given={"quantize": "q8_0"},
    ),
    Fault(
        "GH-191-again", "Q8_0 labelled AprQ4: the same bug once more", "dtype", "B",
        lines(
            "A later reader maps 8 to the legacy AprQ4, while its own writer emits 8 for Q8_0.",
            "Two tables, one number, no shared enum: GH-191 again, for one more type.",
            "Both have 32 values per block, but 34 bytes versus 18.",
        ),
        _SIZE_LAW + " AprQ4's byte with 34 bytes per 32 values.",
        seams=coded({types.Q8_0: types.APR_Q4.code}), needs="tensors of type Q8_0", given={"quantize": "q8_0"},
    ),
    Fault(
        "GH-438", "BF16 written as 2, the number of Q4_0", "dtype", "B",
        lines(
            "aprender's own enum has BF16 = 2; in ggml 2 is Q4_0.",
            "After the move to ggml's numbers, old BF16 files were read as Q4_0.",
            "The decoded values are small and well-behaved: no NaN gives it away.",
        ),
        _SIZE_LAW + " Byte 2 with 2 bytes a value.",
        seams=coded({types.BF16: types.Q4_0.code}), needs="tensors of type BF16", given={"quantize": "bf16"},
    ),
    Fault(
        "GH-438-apr", "AprQ4 and AprQ8 written as 8 and 9, the numbers of Q8_0 and Q8_1", "dtype", "B",
        lines(
            "APR's two own types were 8 and 9 before they moved to 128 and 129.",
            "A reader with ggml's table reads them as Q8_0 and Q8_1.",
            "Here the size law settles it, so the file is read correctly; a table alone could not.",
        ),
        "Byte 8 with 18 bytes per 32 values: possible for AprQ4 only.",
        silent=True, seams=coded({types.APR_Q4: types.Q8_0.code, types.APR_Q8: types.Q8_1.code}),
        needs="tensors of type AprQ4 or AprQ8", given={"quantize": "aprq4"},
    ),
    Fault(
        "bf16-as-f16", "BF16 labelled F16", "dtype", "B",
        lines(
            "Two 16-bit floats, one branch: the bytes of BF16 were read as IEEE halves (aprender #1601).",
            "Eight bits of exponent become five, so 7.5625 becomes 7.0625 and most weights shrink towards 1.",
            "Sizes agree, so the size law cannot detect it, and no value need be NaN.",
        ),
        "Byte 1 with the bytes of BF16: values of weights near ±1.5 instead of ±0.02.",
        seams=coded({types.BF16: types.F16.code}), needs="tensors of type BF16", given={"quantize": "bf16"},
    ),
    Fault(
        "bf16-as-f32", "BF16 labelled F32", "dtype", "B",
        lines(
            "Every float was taken for four bytes.",
            "Two neighbouring values become one: the second gives sign, exponent and top bits, the first the rest.",
            "The numbers look like weights, as every second one of them is the upper half.",
        ),
        _SIZE_LAW + " Byte 0 with 2 bytes a value.",
        seams=coded({types.BF16: types.F32.code}), needs="tensors of type BF16", given={"quantize": "bf16"},
    ),
    Fault(
        "apr-q8-as-q8_0", "AprQ8 labelled Q8_0", "dtype", "B",
        lines(
            "Both are called Q8; the writer's own has one float32 scale for a whole tensor and a byte a value.",
            "ggml's has a float16 scale for every 32 values.",
            "Read as Q8_0, two weights of every block become its scale.",
        ),
        _SIZE_LAW + " Byte 8 with 4 bytes and one for each value.",
        seams=coded({types.APR_Q8: types.Q8_0.code}), needs="tensors of type AprQ8", given={"quantize": "aprq8"},
    ),
    Fault(
        "apr-q4-as-q4k", "AprQ4 labelled Q4_K", "dtype", "B",
        lines(
            "Eight blocks of AprQ4 are 144 bytes for 256 values, exactly one block of Q4_K.",
            "Scale and nibbles of the first blocks are read as d, dmin and scales.",
            "The size law cannot detect it.",
        ),
        "Byte 12 with the bytes of AprQ4: sizes agree, values absurd.",
        seams=coded({types.APR_Q4: types.Q4_K.code}), needs="tensors of type AprQ4", given={"quantize": "aprq4"},
    ),
    Fault(
        "unknown-to-f32", "Q4_1, Q5_0 and Q5_1 silently become F32", "dtype", "B",
        lines(
            "Types missing from the writer's table get byte 0.",
            "The last arm of the match: `_ => 0`.",
            "The 0.5B is full of Q5_0, because its rows do not hold whole K blocks: 133 of 291 tensors.",
        ),
        _SIZE_LAW + " Byte 0 with 20, 22 or 24 bytes per 32 values.",
        seams=coded(dict.fromkeys(FELL_THROUGH, types.F32.code)), needs="tensors of type Q4_1, Q5_0 or Q5_1",
        given={"quantize": "q5_0"},
    ),
    Fault(
        "unknown-to-f32-warned", "The same, with a warning on standard error", "dtype", "B",
        lines(
            "The fix of GH-191 added an eprintln to two of the three fallback arms.",
            "The file is just as broken, and the exit status is 0.",
            "Nobody reads one warning among a thousand lines of progress.",
        ),
        "As for unknown-to-f32, plus a warning during conversion.",
        seams=fall_through_warned, needs="tensors of type Q4_1, Q5_0 or Q5_1", given={"quantize": "q5_0"},
    ),
    Fault(
        "default-dequantise", "Every block decoded to F32 by default", "dtype", "B",
        lines(
            "`convert` without --quantize decoded everything: 1.1 GB became 6.62 GiB.",
            "The values are correct, and byte 0 = F32 is the one number that all tables agree on, so the answer is correct.",
            "It was mistaken for the dtype bug and masked it: 'quantisation lost'.",
        ),
        "All types F32, values bitwise equal to the decoded blocks, 6.4 times the size; same answer.",
        silent=True, seams=dequantise_all, needs="quantised tensors",
    ),
)  # fmt: skip
