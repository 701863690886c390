"""The one table of tensor types. Reader, writer, converter, tests and docs take codes and sizes from here.

ggml's rows come from the `gguf` package (`GGMLQuantizationType`, `GGML_QUANT_SIZES`); APR's two own types are next to
them. Codes that ggml gave up, and those of ik_llama.cpp, are in `FOREIGN`, by name and with what to do. There is no
default row: an unknown code or name raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aprlab.errors import UnsupportedError
from aprlab.quants.ggml import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class TensorType:
    """One block type.

    Attributes:
        code: ggml's type number (128 and 129 are APR's own).
        name: ggml's name, e.g. ``Q4_K``.
        block_elements: values in one block; a row (the last axis) holds whole blocks only.
        block_bytes: bytes of one block.
        tensor_bytes: bytes once in front of the whole tensor (AprQ8's scale; else 0).
    """

    code: int
    name: str
    block_elements: int
    block_bytes: int
    tensor_bytes: int = 0

    @property
    def quantised(self) -> bool:
        """True where values share a scale, i.e. for everything but plain floats and integers."""
        return self.block_elements > 1 or self.tensor_bytes > 0

    @property
    def bits(self) -> float:
        """Bits a value, scales included."""
        return 8 * self.block_bytes / self.block_elements

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values; raises where the row does not hold whole blocks."""
        blocks, rest = divmod(columns, self.block_elements)
        if rest:
            raise UnsupportedError(
                f"a row of {columns} values does not hold whole {self.name} blocks of {self.block_elements}",
                code="quants.row-not-whole-blocks",
            )  # fmt: skip
        return blocks * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The size law: bytes of a tensor of `shape` (NumPy order, the last axis is a row)."""
        if not shape:
            raise UnsupportedError("a tensor without dimensions has no size", code="quants.no-dimensions")
        return self.tensor_bytes + math.prod(shape[:-1]) * self.row_bytes(shape[-1])

    def fits(self, shape: tuple[int, ...], nbytes: int) -> bool:
        """Whether `nbytes` is what the size law demands; False too where rows do not hold whole blocks."""
        return bool(shape) and shape[-1] % self.block_elements == 0 and self.nbytes(shape) == nbytes

    def __str__(self) -> str:
        return self.name


# Where the `gguf` package's sizes are not ggml's: Q8_1 keeps two halfs next to its 32 numbers, not two floats.
CORRECTED = {"Q8_1": (32, 36)}

TYPES: tuple[TensorType, ...] = (
    *(TensorType(int(t), t.name, *CORRECTED.get(t.name, GGML_QUANT_SIZES[t])) for t in GGMLQuantizationType),
    TensorType(128, "AprQ4", 32, 18),
    TensorType(129, "AprQ8", 1, 1, tensor_bytes=4),
)

@dataclass(frozen=True, slots=True)
class ForeignType:
    """A type code that files are met with and that no ggml of today reads.

    Attributes:
        name: the type's name where it lives or lived.
        home: who gave the code out, and what became of it.
        remedy: what the owner of such a file can do.
    """

    code: int
    name: str
    home: str
    remedy: str

    def __str__(self) -> str:
        return f"type code {self.code} is {self.name}, {self.home}; {self.remedy}"


def _foreign_types() -> dict[int, ForeignType]:
    removed = (
        ({4: "Q4_2", 5: "Q4_3"}, "removed from ggml in 2023", "requantise from the source"),
        ({31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}, "Q4_0 repacked for one processor, removed from ggml",
         "requantise from the source as Q4_0, which llama.cpp repacks while it loads"),
        ({36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}, "IQ4_NL repacked for one processor, removed from ggml",
         "requantise from the source as IQ4_NL, which llama.cpp repacks while it loads"),
    )  # fmt: skip
    found = {code: ForeignType(code, name, home, fix) for names, home, fix in removed for code, name in names.items()}
    fix = "requantise from the source with llama.cpp, or run the file with ik_llama.cpp"
    for code in IK_CODES:
        found[code] = ForeignType(code, IK_NAMES.get(code, "a type"), "of ik_llama.cpp alone", fix)
    return found


# ik_llama.cpp numbers its own types from 133 on, and the same repacked in rows from 200 on.
IK_NAMES = {
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64", 137: "IQ2_K",
    138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 147: "Q8_K16",
    148: "Q8_K32", 149: "Q8_KR8", 150: "Q8_K128", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT",
    155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8",
    210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4",
    217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4",
    223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4",
    338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip
IK_CODES = range(133, 400)
FOREIGN = _foreign_types()

_BY_CODE = {t.code: t for t in TYPES}
_BY_NAME = {t.name.upper(): t for t in TYPES}
assert len(_BY_CODE) == len(_BY_NAME) == len(TYPES)
assert not FOREIGN.keys() & _BY_CODE.keys()


def by_code(code: int) -> TensorType:
    """The type of ggml (or APR) number `code`; raises `UnsupportedError`, by name, for a removed, foreign or unassigned one."""
    if code in FOREIGN:
        raise UnsupportedError(f"tensor {FOREIGN[code]}", code="quants.foreign-type-code")
    try:
        return _BY_CODE[code]
    except KeyError:
        raise UnsupportedError(f"unknown tensor type code {code}", code="quants.unknown-type-code") from None


def lawful(code: int) -> TensorType | None:
    """The type of ggml's number `code`; None for APR's own, for those that ggml gave up, and for an unassigned number."""
    found = _BY_CODE.get(code)
    return None if found in (APR_Q4, APR_Q8) else found


def by_name(name: str) -> TensorType:
    """The type called `name` (case does not matter, ``q4k`` is ``Q4_K``); raises `UnsupportedError`."""
    key = name.upper()
    for candidate in (key, f"{key[:-1]}_K" if key.endswith("K") else key):
        if candidate in _BY_NAME:
            return _BY_NAME[candidate]
    raise UnsupportedError(f"unknown tensor type {name!r}; known: {', '.join(t.name for t in TYPES)}", code="quants.unknown-type")


F32, F16, BF16, F64 = (by_name(n) for n in ("F32", "F16", "BF16", "F64"))
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1 = (by_name(n) for n in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1"))
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K = (by_name(n) for n in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"))
IQ2_XXS, IQ2_XS = by_name("IQ2_XXS"), by_name("IQ2_XS")
APR_Q4, APR_Q8 = by_name("AprQ4"), by_name("AprQ8")
WHOLE_NUMBERS = tuple(by_name(n) for n in ("I8", "I16", "I32", "I64"))
