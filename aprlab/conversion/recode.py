"""Re-encoding tensors on their way into a file, streamed."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.conversion import mixes
from aprlab.conversion.cost import Cost
from aprlab.errors import FormatError, NumericError, UsageError
from aprlab.model.content import drop_pages
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType

CHUNK = 1 << 20


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def encodable(name: str) -> TensorType:
    """The type called `name`, if there is an encoder for it."""
    from aprlab import quants

    kind = types.by_name(name)
    if not quants.can_encode(kind):
        able = ", ".join(t.name for t in types.TYPES if quants.can_encode(t))
        raise UsageError(f"cannot encode {kind.name}; can: {able}", code="conversion.cannot-encode")
    return kind


class Recoded(Tensor):
    """A tensor whose bytes are made, row block by row block, only when they are written."""

    __slots__ = ("cost", "source")

    def __init__(self, source: Tensor, kind: TensorType) -> None:
        super().__init__(source.name, kind, source.shape, np.zeros(0, np.uint8), source.origin)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "cost", Cost(source.type.name, kind.name, 1))

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.shape)


def re_encoded(tensor: Tensor, target: TensorType) -> Tensor:
    """`tensor` in another type: 2-D weights only; the same object where nothing is to be done."""
    if len(tensor.shape) < 2 or tensor.type is target:
        return tensor
    target = mixes.fitting(target, tensor.shape, tensor.name)
    return tensor if tensor.type is target else Recoded(tensor, target)


def chunks_of(tensor: Tensor) -> Callable[[], Iterator[Any]]:
    """The bytes of a tensor in chunks.

    Bytes that stand in a file are read through a few small buffers (not through the map, whose pages would count as
    memory); a chunk is overwritten once seven more have been taken.
    """
    if isinstance(tensor, Recoded):
        return lambda: _encode_rows(tensor)
    if not stands_in_file(tensor):
        raw = np.ascontiguousarray(tensor.raw)
        return lambda: (raw[start : start + CHUNK].data for start in range(0, len(raw), CHUNK))
    return lambda: _checked(tensor)


def _checked(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor as they stand in the file, in chunks of whole blocks, every scale looked at on the way."""
    head, step = tensor.type.tensor_bytes, CHUNK // tensor.type.block_bytes * tensor.type.block_bytes
    yield from read_chunks(tensor.origin.path, tensor.origin.offset, head)
    at = 0
    for chunk in read_chunks(tensor.origin.path, tensor.origin.offset + head, tensor.nbytes - head, step):
        tensor.check_values(np.frombuffer(chunk, np.uint8), at)
        yield chunk
        at += len(chunk)


def stands_in_file(tensor: Tensor) -> bool:
    """Whether the bytes are those of the file at the tensor's origin, and not changed, decompressed or made in memory."""
    root: Any = tensor.raw
    while isinstance(root.base, np.ndarray):
        root = root.base
    return tensor.origin.offset >= 0 and tensor.raw.base is not None and isinstance(root, np.memmap)


class _Ring(threading.local):
    """Eight buffers a thread, taken in turn: enough for what `apr.write` keeps in flight."""

    def __init__(self) -> None:
        self.next = itertools.cycle([memoryview(bytearray(CHUNK)) for _ in range(8)]).__next__


_RING = _Ring()


def read_chunks(path: Path, offset: int, nbytes: int, step: int = CHUNK) -> Iterator[memoryview]:
    """`nbytes` of a file from `offset` on, in chunks of `step` (at most `CHUNK`)."""
    with open(path, "rb", buffering=0) as file:
        for start in range(offset, offset + nbytes, step):
            view = _RING.next()[: min(step, offset + nbytes - start)]
            if os.preadv(file.fileno(), [view], start) != len(view):
                raise FormatError(
                    "the file became shorter while it was read", code="reading.file-shrank", path=path, offset=start
                )
            yield view


def _encode_rows(tensor: Recoded) -> Iterator[Any]:
    from aprlab import quants

    source: Tensor = tensor.source  # type: ignore[attr-defined]
    cost: Cost = tensor.cost  # type: ignore[attr-defined]
    # AprQ8 has one scale for all values and needs all of them at once.
    step = source.rows if tensor.type.tensor_bytes else max(1, (1 << 20) // source.cols)
    for start in range(0, source.rows, step):
        rows = slice(start, min(start + step, source.rows))
        values = source.dequantise(rows)
        if not np.isfinite(values).all():
            raise FormatError(f"rows {start}..{start + len(values)} hold values that are not finite",
                              code="conversion.not-finite", path=source.origin.path, tensor=source.name,
                              offset=source.origin.place())  # fmt: skip
        try:
            raw = quants.quantise(values, tensor.type).reshape(-1)
        except NumericError as error:
            raise NumericError(error.message, code=error.code, path=source.origin.path, tensor=source.name) from None
        cost.add(values, values if tensor.type is types.F32 else quants.dequantise(raw, tensor.type, values.shape))
        yield np.ascontiguousarray(raw).data
        if type(source) is Tensor:  # one whose values are computed has no bytes of its own
            drop_pages(source.blocks()[rows])
