"""One tensor, still in the bytes of its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab.errors import FormatError
from aprlab.model import decode_hooks
from aprlab.model.content import drop_pages
from aprlab.quants.types import TensorType

if TYPE_CHECKING:
    pass



@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor stood: the file, its name there, the absolute byte offset of its data (-1 in a compressed body)."""

    path: Path
    name: str
    offset: int

    def place(self, at: int = 0) -> int | None:
        """Absolute offset of byte `at` of its data; None in a compressed body, where there is none."""
        return self.offset + at if self.offset >= 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor, still in the bytes of its file.

    Attributes:
        name: GGUF name, e.g. ``blk.0.attn_q.weight``.
        type: its row of the type table.
        shape: NumPy order, rows first: a weight is ``(outputs, inputs)``.
        raw: ``uint8``, 1-D, exactly ``type.nbytes(shape)`` bytes; read-only view on the mapped file.
        origin: where it came from.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: np.ndarray
    origin: Origin

    @property
    def ne(self) -> tuple[int, ...]:
        """ggml's dimension order, fastest axis first: the reverse of `shape`."""
        return self.shape[::-1]

    @property
    def cols(self) -> int:
        """Length of a row (ggml's ``ne[0]``)."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows; 1 for a vector."""
        return self.size // self.cols

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the raw blocks."""
        return int(self.raw.nbytes)

    def blocks(self) -> np.ndarray:
        """Raw bytes by row: ``uint8 (rows, row_bytes)``, a view. AprQ8's leading scale is not part of a row."""
        return self.raw[self.type.tensor_bytes :].reshape(self.rows, self.type.row_bytes(self.cols))

    def dequantise(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """Values as ``float32``: of `shape`, or ``(len(rows), cols)`` for a slice or an index array of rows."""
        from aprlab import quants  # the decoders stand above the model, and only this method needs them

        decode_hooks.notify(self.name)
        if rows is None:
            return quants.dequantise(self.raw, self.type, self.shape)
        part = self.blocks()[rows]
        raw = np.concatenate([self.raw[: self.type.tensor_bytes], part.reshape(-1)]) if self.type.tensor_bytes else part
        return quants.dequantise(raw.reshape(-1), self.type, (part.shape[0], self.cols))

    def check_values(self, part: np.ndarray | None = None, start: int = 0) -> None:
        """Raise FormatError, with the byte offset of the block, where a scale (or a plain float) is NaN or infinite.

        `part` checks only these bytes, whole blocks that begin `start` bytes into the blocks; without it, all.
        """
        from aprlab.quants import quant
        from aprlab.quants.check import first_bad_block, scale_is_finite

        if part is None:
            step = (1 << 24) // self.type.block_bytes * self.type.block_bytes
            blocks = self.raw[self.type.tensor_bytes :]
            for at in range(0, max(len(blocks), 1), step):
                self.check_values(blocks[at : at + step], at)
                drop_pages(blocks[at : at + step])
            return
        blocks = part
        bad = first_bad_block(blocks, quant(self.type)) if scale_is_finite(self.raw, self.type) else 0
        if bad is not None:
            at = start + bad * self.type.block_bytes
            raise FormatError(
                f"{self.type.name} block {at // self.type.block_bytes} has a scale that is not a finite number",
                code="model.scale-not-finite",
                path=self.origin.path, tensor=self.name, offset=self.origin.place(self.type.tensor_bytes + at),
            )  # fmt: skip

    def replace(self, **changes: Any) -> Tensor:
        """A copy with some attributes changed."""
        fields = {"name": self.name, "type": self.type, "shape": self.shape, "raw": self.raw, "origin": self.origin}
        return Tensor(**{**fields, **changes})

    def _repr_html_(self) -> str:
        from aprlab.display.html import tensor_page  # only a notebook asks

        return tensor_page(self)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type.name}, shape={self.shape}, {self.nbytes} bytes)"
