"""One tensor: its type, its shape, and where its bytes come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from aprlab.errors import FormatError
from aprlab.model import decode_hooks
from aprlab.model.content import Content, Mapped, Rows, content_of
from aprlab.quants import quant
from aprlab.quants.check import first_bad_block, scale_is_finite
from aprlab.quants.types import TensorType


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor was: the file, its name there, the absolute byte offset of its data (-1 in a compressed body)."""

    path: Path
    name: str
    offset: int

    def place(self, at: int = 0) -> int | None:
        """Absolute offset of byte `at` of its data; None in a compressed body, where there is none."""
        return self.offset + at if self.offset >= 0 else None


@final
@dataclass(frozen=True, slots=True, eq=False, init=False)
class Tensor:
    """One tensor, still in its blocks. What is particular about it is said by its content, never by a subclass.

    Attributes:
        name: GGUF name, e.g. ``blk.0.attn_q.weight``.
        type: its row of the type table.
        shape: NumPy order, rows first: a weight is ``(outputs, inputs)``.
        content: gives the bytes, ``type.nbytes(shape)`` of them, and the values.
        origin: where it came from.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    content: Content
    origin: Origin

    def __init__(
        self, name: str, type: TensorType, shape: tuple[int, ...], content: Content | np.ndarray, origin: Origin
    ) -> None:
        """`content` may also be the bytes themselves, ``uint8``, 1-D: a view on a mapped file or an array in memory."""
        fields = {"name": name, "type": type, "shape": shape, "content": content_of(content), "origin": origin}
        for field, value in fields.items():
            object.__setattr__(self, field, value)

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
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the raw blocks."""
        return self.content.nbytes

    @property
    def raw(self) -> np.ndarray:
        """All bytes, ``uint8``, 1-D: the mapped file's or memory's own, read-only; made each time if not in memory."""
        return self.content.whole()

    @property
    def in_file(self) -> bool:
        """Whether the bytes are those of a file at the tensor's origin, and not changed, decompressed or made in memory."""
        return isinstance(self.content, Mapped) and self.origin.offset >= 0

    @property
    def at_hand(self) -> bool:
        """Whether bytes cost nothing to look at: in memory, or in a mapped file."""
        return self.content.at_hand

    def blocks(self) -> np.ndarray:
        """Raw bytes by row: ``uint8 (rows, row_bytes)``, a view. AprQ8's leading scale is not part of a row."""
        return self.raw[self.type.tensor_bytes :].reshape(self.rows, self.type.row_bytes(self.cols))

    def dequantise(self, rows: Rows | None = None) -> np.ndarray:
        """Values as ``float32``: of `shape`, or ``(len(rows), cols)`` for a slice or an index array of rows."""
        decode_hooks.notify(self.name)
        return self.content.values(self.type, self.shape, rows)

    def release(self, rows: slice | None = None) -> None:
        """The bytes, or those of `rows` (a slice with both ends, in steps of one), are not needed for now."""
        if rows is None:
            self.content.release()
        else:
            head, size = self.type.tensor_bytes, self.type.row_bytes(self.cols)
            self.content.release(head + rows.start * size, head + rows.stop * size)

    def same_memory(self, other: Tensor) -> bool:
        """Whether both are views on the same bytes, in memory or in one mapped file; nothing is read."""
        if not (self.at_hand and other.at_hand):
            return False
        a, b = self.raw.__array_interface__, other.raw.__array_interface__
        return all(a[key] == b[key] for key in ("data", "shape", "strides"))

    def same_bytes(self, other: Tensor, step: int = 1 << 24) -> bool:
        """Whether both hold the same bytes, read in parts of `step` bytes; their types are not looked at."""
        if self.nbytes != other.nbytes:
            return False
        for start in range(0, self.nbytes, step):
            stop = min(start + step, self.nbytes)
            same = np.array_equal(self.content.read(start, stop), other.content.read(start, stop))
            for content in (self.content, other.content):
                content.release(start, stop)
            if not same:
                return False
        return True

    def check_values(self, part: np.ndarray | None = None, start: int = 0) -> None:
        """Raise FormatError, with the byte offset of the block, where a scale (or a plain float) is NaN or infinite.

        `part` checks only these bytes, whole blocks that begin `start` bytes into the blocks; without it, all.
        """
        head = self.type.tensor_bytes
        if part is None:
            step = (1 << 24) // self.type.block_bytes * self.type.block_bytes
            for at in range(0, max(self.nbytes - head, 1), step):
                stop = min(at + step, self.nbytes - head)
                self.check_values(self.content.read(head + at, head + stop), at)
                self.content.release(head + at, head + stop)
            return
        bad = first_bad_block(part, quant(self.type)) if scale_is_finite(self.content.read(0, head), self.type) else 0
        if bad is not None:
            at = start + bad * self.type.block_bytes
            raise FormatError(
                f"{self.type.name} block {at // self.type.block_bytes} has a scale that is not a finite number",
                code="model.scale-not-finite",
                path=self.origin.path, tensor=self.name, offset=self.origin.place(head + at),
            )  # fmt: skip

    def replace(self, **changes: Any) -> Tensor:
        """A copy with some attributes changed; ``raw`` gives it other bytes."""
        if "raw" in changes:
            changes["content"] = changes.pop("raw")
        fields = {"name": self.name, "type": self.type, "shape": self.shape, "content": self.content, "origin": self.origin}
        return Tensor(**{**fields, **changes})

    def _repr_html_(self) -> str:
        from aprlab.display.html import tensor_page  # only a notebook asks

        return tensor_page(self)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type.name}, shape={self.shape}, {self.nbytes} bytes)"
