"""The machine that runs the kernels, as an engine sees it: memory and launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from aprlab.errors import UnsupportedError, UsageError
from aprlab.kernels.cuda.compile import MODULES
from aprlab.kernels.cuda.launch import Launch


class Device(Protocol):
    """Memory and launches of one machine. Buffers are opaque, at least 16-aligned, and freed with their last reference."""

    def upload(self, data: np.ndarray, nbytes: int) -> Any:
        """A buffer of `nbytes` bytes that begins with `data` (uint8, 1-D, not longer)."""

    def empty(self, nbytes: int) -> Any:
        """A buffer of `nbytes` bytes of any content."""

    def download(self, buffer: Any, offset: int, nbytes: int) -> np.ndarray:
        """uint8 copy of bytes ``offset … offset + nbytes``; waits for all launches before it."""

    def pointer(self, buffer: Any, offset: int) -> Any:
        """The argument that points `offset` bytes into `buffer`."""

    def run(self, launch: Launch) -> None:
        """Run it after all launches before it; may return before it is done."""

    def free_bytes(self) -> int | None:
        """Memory that buffers may still take; None where the machine's own memory is meant."""

    def close(self) -> None:
        """Give back everything."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """4-byte elements in C order, a part of a device's buffer: `shape`, beginning `offset` bytes behind its start."""

    buffer: Any
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def reshape(self, *shape: int | tuple[int, ...]) -> DeviceArray:
        """A view in another shape; one extent may be -1."""
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        return DeviceArray(self.buffer, _resolve(self.size, wanted), self.offset)  # type: ignore[arg-type]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """A view of rows of the first axis, in steps of one."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise UnsupportedError(f"slices of device arrays take steps of 1, not {step}", code="cuda.slice-step")
        count = max(0, stop - start)
        return DeviceArray(self.buffer, (count, *self.shape[1:]), self.offset + 4 * start * prod(self.shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]


def _resolve(size: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    known = prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or (-1 in shape and (known == 0 or size % known)) or (-1 not in shape and known != size):
        raise ValueError(f"cannot make {shape} of {size} elements")
    return tuple(size // known if n == -1 else n for n in shape)


def module_texts(kernels: Mapping[str, str] | None) -> dict[str, str]:
    """A device's option `kernels`: text by module, in place of the package's own. Raises UsageError for an unknown module."""
    unknown = set(kernels or ()) - set(MODULES)
    if unknown:
        raise UsageError(
            f"unknown kernel module {min(unknown)!r}; known: {', '.join(MODULES)}", code="engines.unknown-kernels-module"
        )
    return dict(kernels or {})
