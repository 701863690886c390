"""Tools the file faults share: tensors changed on their way into the file, and edits of a finished file."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from aprlab.conversion.recode import Recoded, at_hand
from aprlab.conversion.seams import Seams
from aprlab.errors import UsageError
from aprlab.formats import apr
from aprlab.formats.apr import Entry, Plan
from aprlab.model.content import Rows
from aprlab.model.tensor import Tensor
from aprlab.quants import REGISTRY
from aprlab.quants.types import TensorType


class Edited(Recoded):
    """Values that a fault has made of a tensor's: computed all at once on demand, and encoded again as `kind`.

    `compute` gets float32 as `exact_values` gives them and gives as many, which are taken in C order as `shape`.
    """

    __slots__ = ("_compute", "_kept")

    def __init__(
        self, tensor: Tensor, kind: TensorType, shape: tuple[int, ...], compute: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        before = tensor.content
        super().__init__(before.source if isinstance(before, Recoded) else tensor, kind, shape)
        self._compute = lambda: compute(exact_values(tensor))
        self._kept: np.ndarray | None = None

    def exact(self, rows: Rows | None = None) -> np.ndarray:
        if self._kept is None:
            self._kept = np.ascontiguousarray(self._compute(), np.float32).reshape(self.shape)
        return self._kept if rows is None else self._kept[rows]

    def forget(self, rows: slice) -> None:
        """Nothing: later rows are made of the same values."""


def exact_values(tensor: Tensor) -> np.ndarray:
    """float32 of a tensor that may be about to be encoded: its values before that."""
    return tensor.content.exact() if isinstance(tensor.content, Recoded) else tensor.dequantise()


def with_values(
    tensor: Tensor,
    compute: Callable[[np.ndarray], np.ndarray],
    *,
    shape: tuple[int, ...] | None = None,
    kind: TensorType | None = None,
) -> Tensor:
    """`tensor` with other values, encoded again (as `kind`, or as before) when the file is written.

    `compute` gets float32 of the tensor's shape and gives as many values, which are taken in C order as `shape`.
    """
    shape, kind = shape or tensor.shape, kind or tensor.type
    return tensor.replace(type=kind, shape=shape, content=Edited(tensor, kind, shape, compute))


def with_blocks(tensor: Tensor, edit: Callable[[np.ndarray], None]) -> Tensor:
    """A copy of `tensor` whose blocks, seen through their type's layout (structured, shape (n,)), `edit` has changed."""
    tensor = at_hand(tensor)
    raw = np.array(tensor.raw, np.uint8)
    edit(raw[tensor.type.tensor_bytes :].view(REGISTRY[tensor.type].layout))
    return tensor.replace(raw=raw)


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
