"""The order of Q's and K's rows: a head's rotary pairs as two halves, as Hugging Face has them, or next to each other.

ggml rotates adjacent pairs for Llama (NORM), transformers rotates halves. llama.cpp's converter therefore moves rows, and
here they are moved where a Hugging Face folder is read or written: inside, tensors are GGUF's. The rotation of a file and
the order of its rows belong together; either without the other is garbage.
"""

from __future__ import annotations

import numpy as np

from aprlab.model.content import Content
from aprlab.model.tensor import Tensor


def as_pairs(heads: int, head_dim: int) -> np.ndarray:
    """int64 ``(heads * D,)``: row r of adjacent pairs is row ``as_pairs(…)[r]`` of halves."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def as_halves(heads: int, head_dim: int) -> np.ndarray:
    """The way back: row r of halves is row ``as_halves(…)[r]`` of adjacent pairs."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


class Reordered(Content):
    """The rows of another content in another order; each has its blocks to itself, so none is decoded."""

    __slots__ = ("order", "row_bytes", "source")

    def __init__(self, source: Content, row_bytes: int, order: np.ndarray) -> None:
        self.source, self.row_bytes, self.order = source, row_bytes, order

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self.row_bytes
        first, last = start // size, -(-stop // size)
        wanted = self.order[first:last]
        if not self.source.at_hand and len(wanted) > 1:  # one request for all: rows move within a head alone
            low, high = int(wanted.min()), int(wanted.max()) + 1
            rows = list(self.source.read(low * size, high * size).reshape(-1, size)[wanted - low])
        else:
            rows = [self.source.read(row * size, (row + 1) * size) for row in wanted.tolist()]
        together = np.concatenate(rows) if rows else np.zeros(0, np.uint8)
        return together[start - first * size : stop - first * size]

    def release(self, start: int = 0, stop: int | None = None) -> None:
        self.source.release()  # rows of anywhere


def reordered(tensor: Tensor, order: np.ndarray) -> Tensor:
    """`tensor` with row ``order[r]`` as its row r; of a type that keeps nothing in front of its rows."""
    assert tensor.type.tensor_bytes == 0
    assert len(order) == tensor.rows
    return tensor.replace(content=Reordered(tensor.content, tensor.type.row_bytes(tensor.cols), order))


__all__ = ["Reordered", "as_halves", "as_pairs", "reordered"]
