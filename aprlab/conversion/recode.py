"""Re-encoding tensors on their way into a file, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aprlab import quants
from aprlab.conversion import mixes
from aprlab.conversion.cost import Cost
from aprlab.errors import FormatError, NumericError, UsageError
from aprlab.model.content import CHUNK, Content, Mapped, Rows, read_chunks
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType


def encodable(name: str) -> TensorType:
    """The type called `name`, if there is an encoder for it."""
    kind = types.by_name(name)
    if not quants.can_encode(kind):
        able = ", ".join(t.name for t in types.TYPES if quants.can_encode(t))
        raise UsageError(f"cannot encode {kind.name}; can: {able}", code="conversion.cannot-encode")
    return kind


class Recoded(Content):
    """The values of `source` in another type: encoded row block by row block, each time they are written.

    Attributes:
        source: the tensor as it was.
        kind: the type that the bytes are of.
        shape: of the values that are encoded; its last axis is a row of blocks.
        cost: what the change of type did to the values, once they were encoded.
    """

    __slots__ = ("cost", "kind", "shape", "source")

    def __init__(self, source: Tensor, kind: TensorType, shape: tuple[int, ...] | None = None) -> None:
        self.source, self.kind, self.shape = source, kind, shape or source.shape
        self.cost = Cost(source.type.name, kind.name, 1)

    @property
    def nbytes(self) -> int:
        return self.kind.nbytes(self.shape)

    def exact(self, rows: Rows | None = None) -> np.ndarray:
        """The values before they are encoded: float32 of `shape`, or ``(len(rows), cols)``."""
        return self.source.dequantise(rows)

    def few(self, rows: np.ndarray) -> np.ndarray:
        """`exact` of a few rows by number, int64: float32 ``(len(rows), cols)``; other rows are not made where that can be."""
        return self.exact(rows)

    def some(self, rows: np.ndarray, size: int) -> np.ndarray:
        return quants.quantise(np.ascontiguousarray(self.few(rows)), self.kind).reshape(len(rows), -1)

    def forget(self, rows: slice) -> None:
        """What `exact` gave of these rows was encoded."""
        self.source.release(rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.whole()[start:stop]

    def whole(self) -> np.ndarray:
        return np.concatenate([np.frombuffer(bytes(chunk), np.uint8) for chunk in self.chunks()])

    def chunks(self, step: int = CHUNK) -> Iterator[Any]:
        source, cols = self.source, self.shape[-1]
        count = int(np.prod(self.shape, dtype=np.int64)) // cols
        # AprQ8 has one scale for all values and needs all of them at once.
        step = count if self.kind.tensor_bytes else max(1, (1 << 20) // cols)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            values = self.exact(rows)
            if not np.isfinite(values).all():
                raise FormatError(f"rows {start}..{start + len(values)} hold values that are not finite",
                                  code="conversion.not-finite", path=source.origin.path, tensor=source.name,
                                  offset=source.origin.place())  # fmt: skip
            try:
                raw = quants.quantise(values, self.kind).reshape(-1)
            except NumericError as error:
                raise NumericError(error.message, code=error.code, path=source.origin.path, tensor=source.name) from None
            self.cost.add(values, values if self.kind is types.F32 else quants.dequantise(raw, self.kind, values.shape))
            yield np.ascontiguousarray(raw).data
            self.forget(rows)


def recoded(tensor: Tensor, kind: TensorType) -> Tensor:
    """`tensor` in another type, whose bytes are made only when they are written."""
    return Tensor(tensor.name, kind, tensor.shape, Recoded(tensor, kind), tensor.origin)


def re_encoded(tensor: Tensor, target: TensorType) -> Tensor:
    """`tensor` in another type: 2-D weights only; the same object where nothing is to be done."""
    if len(tensor.shape) < 2 or tensor.type is target:
        return tensor
    target = mixes.fitting(target, tensor.shape, tensor.name)
    return tensor if tensor.type is target else recoded(tensor, target)


def at_hand(tensor: Tensor) -> Tensor:
    """The tensor with its bytes in memory: one that is yet to be encoded is encoded now, others are the same object."""
    return tensor if tensor.content.at_hand else tensor.replace(content=tensor.raw)


def chunks_of(tensor: Tensor) -> Callable[[], Iterator[Any]]:
    """The bytes of a tensor in chunks; see `Content.chunks`. Those of a file are checked on the way."""
    return (lambda: _checked(tensor)) if tensor.in_file else tensor.content.chunks


def _checked(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor as they are in the file, in chunks of whole blocks, every scale checked on the way."""
    content = tensor.content
    assert isinstance(content, Mapped)  # `in_file` says so
    head, step = tensor.type.tensor_bytes, CHUNK // tensor.type.block_bytes * tensor.type.block_bytes
    yield from read_chunks(content.path, content.offset, head)
    at = 0
    for chunk in read_chunks(content.path, content.offset + head, content.nbytes - head, step):
        tensor.check_values(np.frombuffer(chunk, np.uint8), at)
        yield chunk
        at += len(chunk)
