"""The one table of tensor types. Reader, writer, converter, tests and docs take codes and sizes from here.

ggml's rows come from the `gguf` package (`GGMLQuantizationType`, `GGML_QUANT_SIZES`); APR's two own types follow
them. There is no default row: an unknown code or name raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from aprlab.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class TensorType:
    """One block type.

    Attributes:
        code: ggml's type number (128 and 129 are APR's own).
        name: ggml's name, e.g. ``Q4_K``.
        block_elements: values in one block; a row (the last axis) holds whole blocks only.
        block_bytes: bytes of one block.
        tensor_bytes: bytes that stand once in front of the whole tensor (AprQ8's scale; else 0).
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
_BY_CODE = {t.code: t for t in TYPES}
_BY_NAME = {t.name.upper(): t for t in TYPES}
assert len(_BY_CODE) == len(_BY_NAME) == len(TYPES)


def by_code(code: int) -> TensorType:
    """The type of ggml (or APR) number `code`; raises `UnsupportedError` for an unassigned number."""
    try:
        return _BY_CODE[code]
    except KeyError:
        raise UnsupportedError(f"unknown tensor type code {code}", code="quants.unknown-type-code") from None


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
