"""Tools the file faults share: tensors changed on their way into the file, and edits of a finished file."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.conversion.recode import Recoded
from aprlab.conversion.seams import Seams
from aprlab.errors import UsageError
from aprlab.formats import apr, open_model
from aprlab.formats.apr import Entry, Plan
from aprlab.model.config import ModelConfig
from aprlab.model.content import CHUNK, Content, Held, Rows
from aprlab.model.tensor import Tensor
from aprlab.quants import REGISTRY
from aprlab.quants.types import TensorType

Moved = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # places in the result, shape before -> places before


class Edited(Recoded):
    """Values that a fault has made of a tensor's: computed all at once on demand, and encoded again as `kind`.

    `compute` gets float32 as `exact_values` gives them and gives as many, which are taken in C order as `shape`.

    `origin`, where values are only moved: for places in the result (int64, C order) the places that their values come from in a
    tensor of a shape; places beyond its end are zeros.
    """

    __slots__ = ("_compute", "_kept", "_origin", "_tensor")

    def __init__(
        self, tensor: Tensor, kind: TensorType, shape: tuple[int, ...], compute: Callable[[np.ndarray], np.ndarray],
        origin: Moved | None = None,
    ) -> None:  # fmt: skip
        before = tensor.content
        super().__init__(before.source if isinstance(before, Recoded) else tensor, kind, shape)
        self._tensor, self._compute, self._origin = tensor, compute, origin
        self._kept: np.ndarray | None = None

    def exact(self, rows: Rows | None = None) -> np.ndarray:
        if self._kept is None:
            self._kept = np.ascontiguousarray(self._compute(exact_values(self._tensor)), np.float32).reshape(self.shape)
        return self._kept if rows is None else self._kept.reshape(-1, self.shape[-1])[rows]

    def few(self, rows: np.ndarray) -> np.ndarray:
        if self._kept is not None or self._origin is None:
            return self.exact(rows)
        before = self._tensor.content.shape if isinstance(self._tensor.content, Recoded) else self._tensor.shape
        cols = before[-1]
        places = self._origin(rows[:, None] * self.shape[-1] + np.arange(self.shape[-1]), before)
        there = places < math.prod(before)
        needed, at = np.unique(places[there] // cols, return_inverse=True)
        out = np.zeros(places.shape, np.float32)
        out[there] = exact_values(self._tensor, needed)[at, places[there] % cols]
        return out

    def forget(self, rows: slice) -> None:
        """Nothing: later rows are made of the same values."""


def exact_values(tensor: Tensor, few: np.ndarray | None = None) -> np.ndarray:
    """float32 of a tensor that may be about to be encoded, all or of a few rows by number: its values before that."""
    if not isinstance(tensor.content, Recoded):
        return tensor.dequantise(few)
    return tensor.content.exact() if few is None else tensor.content.few(few)


def with_values(
    tensor: Tensor,
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    shape: tuple[int, ...] | None = None,
    kind: TensorType | None = None,
    origin: Moved | None = None,
) -> Tensor:
    """`tensor` with other values, encoded again (as `kind`, or as before) when the file is written.

    `compute` gets float32 of the tensor's shape and gives as many values, which are taken in C order as `shape`; `origin` says
    where each comes from, if they are only moved: see `Edited`.
    """
    shape, kind = shape or tensor.shape, kind or tensor.type
    return tensor.replace(type=kind, shape=shape, content=Edited(tensor, kind, shape, compute, origin))


class EditedBlocks(Content):
    """The blocks of a tensor, each changed by itself; made each time they are asked for.

    `edit` gets blocks through their type's layout (structured, shape (n,)), any of them in any order, and changes them in place.
    """

    __slots__ = ("_edit", "_tensor")

    def __init__(self, tensor: Tensor, edit: Callable[[np.ndarray], None]) -> None:
        self._tensor, self._edit = tensor, edit

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        head, size = self._tensor.type.tensor_bytes, self._tensor.type.block_bytes
        if start < head or stop <= start:
            return self.whole()[start:stop] if start < stop else np.empty(0, np.uint8)
        first, last = (start - head) // size, -(-(min(stop, self.nbytes) - head) // size)
        raw = np.array(self._tensor.content.read(head + first * size, head + last * size), np.uint8)
        self._edit(raw.view(self._layout))
        return raw[start - head - first * size : stop - head - first * size]

    def whole(self) -> np.ndarray:
        raw = np.array(self._tensor.raw, np.uint8)
        self._edit(raw[self._tensor.type.tensor_bytes :].view(self._layout))
        return raw

    def some(self, rows: np.ndarray, size: int) -> np.ndarray:
        raw = np.array(self._tensor.content.some(rows, size), np.uint8).reshape(-1)
        self._edit(raw.view(self._layout))
        return raw.reshape(len(rows), size)

    def chunks(self, step: int = CHUNK) -> Iterator[Any]:
        return Held(self.whole()).chunks(step)

    @property
    def _layout(self) -> np.dtype[Any]:
        return REGISTRY[self._tensor.type].layout


def with_blocks(tensor: Tensor, edit: Callable[[np.ndarray], None]) -> Tensor:
    """`tensor` with its blocks changed when they are asked for: see `EditedBlocks`."""
    return tensor.replace(content=EditedBlocks(tensor, edit))


def change_tensors(s: Seams, change: Callable[[Tensor], Tensor]) -> Seams:
    """`change` gets every tensor that will be written and gives another, or the same object where it has no business."""
    return replace(s, tensor=lambda tensor: change(s.tensor(tensor)))


def change_metadata(s: Seams, **changes: object) -> Seams:
    """Metadata keys set to other values; None drops the key, a key that is not there is left alone."""

    def changed(metadata: dict) -> dict:
        before = s.metadata(metadata)
        after = {key: changes.get(key, value) for key, value in before.items()}
        return {key: value for key, value in after.items() if key not in changes or value is not None}

    return replace(s, metadata=changed)


def change_plans(s: Seams, change: Callable[[list[Plan]], list[Plan]]) -> Seams:
    """`change` gets the finished list of tensors and gives another; it does not alter the one it got."""
    return replace(s, plans=lambda plans: change(s.plans(plans)))


def config_of(tensor: Tensor) -> ModelConfig:
    """The config of the file that a tensor comes from: a seam sees one tensor at a time, so its file is asked, once."""
    path = tensor.origin.path
    state = path.stat() if path.exists() else None
    return _config(path, None if state is None else (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=4)
def _config(path: Path, state: tuple[int, int] | None) -> ModelConfig:
    with open_model(path) as model:
        return model.config


def is_(name: str, *templates: str) -> bool:
    """Whether a GGUF name is one of `templates`, in any layer: ``is_("blk.3.attn_q.bias", "attn_q.bias")``."""
    return re.sub(r"^blk\.\d+\.", "", name) in templates


# ── finished files ────────────────────────────────────────────────────────────────────────────────────────────────


def edit_index(path: Path, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Rewrite the tensor index of an APR file in place, header and footer kept true: the writer of the day meant it so."""
    box = apr.scan(path, verify=False)
    if box.compression is not None:
        raise UsageError(
            "this fault edits the finished file, which must not be compressed", code="faults.needs-uncompressed", path=path
        )
    old = b"".join(entry.pack() for entry in box.entries)
    new = b"".join(entry.pack() for entry in change(list(box.entries)))
    if len(new) != len(old):
        raise UsageError(f"the index would have {len(new)} bytes instead of {len(old)}", code="faults.index-length", path=path)
    with open(path, "r+b") as file:
        file.seek(box.index_offset)
        file.write(new)
    renew_footer(path, has_footer=box.footer is not None)


def renew_footer(path: Path, *, has_footer: bool) -> None:
    """Make the CRC-32 at the end of the file right again, where it has one."""
    if not has_footer:
        return
    with open(path, "r+b") as file:
        left, crc = path.stat().st_size - 4, 0
        while left and (part := file.read(min(left, 1 << 22))):
            crc = zlib.crc32(part, crc)
            left -= len(part)
        file.seek(-4, 2)
        file.write(crc.to_bytes(4, "little"))
