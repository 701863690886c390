"""Where a kernel's bytes live: buffers in a flat 64-bit address space, and the set of lanes an instruction runs on.

Addresses are made so that every mistake can be located: each buffer has a window of 64 GiB to itself, so an access
before or behind it still names the buffer it meant. Shared, local and parameter memory are offsets from 0, with a
window each for generic pointers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprlab.errors import UsageError

WINDOW_BITS = 36
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 2 << 60, 3 << 60
GENERIC = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0}


@dataclass
class Pointer:
    """A kernel argument that points into `array`, `offset` bytes behind its start; `initialised=False` marks an
    output whose present contents mean nothing, so that reading them before writing is reported.
    """

    array: np.ndarray[Any, Any]
    offset: int = 0
    name: str = ""
    initialised: bool = True


@dataclass
class Buffer:
    """One allocation: `bytes` is a flat uint8 view of the caller's array (or an aligned copy, written back after the
    launch).

    Shared and local memory are buffers too: all blocks' (threads') copies one behind the other, `stride` apart, each
    with `limit` valid bytes. `written` marks the bytes that hold a defined value; None means all of them.
    """

    name: str
    bytes: np.ndarray[Any, Any]
    base: int
    limit: int
    writeable: bool = True
    written: np.ndarray[Any, Any] | None = None
    origin: np.ndarray[Any, Any] | None = None
    views: dict[np.dtype[Any], np.ndarray[Any, Any]] = field(default_factory=dict)

    def view(self, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """The whole elements of the buffer as `dtype`."""
        found = self.views.get(dtype)
        if found is None:
            found = self.bytes[: len(self.bytes) // dtype.itemsize * dtype.itemsize].view(dtype)
            self.views[dtype] = found
        return found


class AddressSpace:
    """The buffers of one launch. Window 0 stays empty: that is where null pointers point."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._by_array: dict[int, Buffer] = {}

    def add(self, array: np.ndarray[Any, Any], name: str, initialised: bool = True) -> Buffer:
        """Map an array; the same array object twice is the same buffer. Raises `UsageError` if it is not
        C-contiguous.
        """
        known = self._by_array.get(id(array))
        if known is not None and known.origin is array:
            return known
        if not array.flags.c_contiguous:
            raise UsageError(f"argument {name!r}: a kernel buffer must be C-contiguous", code="ptx.argument-layout")
        flat = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        if flat.ctypes.data % 16:  # NumPy views need the alignment that a GPU allocation would have
            copy = np.zeros(flat.nbytes + 16, np.uint8)
            start = -copy.ctypes.data % 16
            copy = copy[start : start + flat.nbytes]
            copy[:] = flat
            flat = copy
        written = None if initialised else np.zeros(flat.nbytes, bool)
        buffer = Buffer(name, flat, (len(self.buffers) + 1) << WINDOW_BITS, flat.nbytes, array.flags.writeable, written, array)
        self.buffers.append(buffer)
        self._by_array[id(array)] = buffer
        return buffer

    def write_back(self) -> None:
        """Give the caller's arrays what was written into aligned copies."""
        for buffer in self.buffers:
            array = buffer.origin
            if array is not None and buffer.writeable and array.size and not np.shares_memory(array, buffer.bytes):
                array.reshape(-1).view(np.uint8)[:] = buffer.bytes

    def at(self, address: int) -> Buffer | None:
        number = (address >> WINDOW_BITS) - 1
        return self.buffers[number] if 0 <= number < len(self.buffers) else None

    def describe(self, address: int) -> tuple[str, int]:
        """(buffer name, byte offset) of any address, also before and behind a buffer; the nearest window wins."""
        half = 1 << (WINDOW_BITS - 1)
        buffer = self.at(address + half if address & ((1 << WINDOW_BITS) - 1) >= half else address)
        return (buffer.name, address - buffer.base) if buffer is not None else ("(no buffer)", address)


class Lanes:
    """A set of active threads of a chunk of B blocks × T threads, as ascending flat indices (block-major).

    Registers are scalars, (1, T), (B, 1) or (B, T): `pick` takes this set's values out of any of them as a 1-D array.
    """

    __slots__ = ("_blocks", "_threads", "_warps", "count", "index", "key", "shape")

    def __init__(self, index: np.ndarray[Any, Any], shape: tuple[int, int]) -> None:
        self.index, self.shape, self.count = index, shape, len(index)
        first, last = int(index[0]), int(index[-1])
        # A contiguous run indexes by slice: views instead of gathers.
        self.key: Any = slice(first, last + 1) if last - first + 1 == self.count else index
        self._blocks: np.ndarray[Any, Any] | None = None
        self._threads: np.ndarray[Any, Any] | None = None
        self._warps = -1

    @property
    def blocks(self) -> np.ndarray[Any, Any]:
        if self._blocks is None:
            self._blocks = self.index // self.shape[1]
        return self._blocks

    @property
    def threads(self) -> np.ndarray[Any, Any]:
        if self._threads is None:
            self._threads = self.index % self.shape[1]
        return self._threads

    @property
    def warp_keys(self) -> np.ndarray[Any, Any]:
        """A number for each lane's warp, ascending."""
        return self.blocks * ((self.shape[1] + 31) // 32) + self.threads // 32

    @property
    def warps(self) -> int:
        """How many warps have a lane here."""
        if self._warps < 0:
            self._warps = int(np.count_nonzero(np.diff(self.warp_keys))) + 1
        return self._warps

    def pick(self, value: Any) -> Any:
        if value.ndim == 0:
            return value
        if value.size == 1:
            return value.reshape(())[()]
        if value.shape == self.shape:
            return value.reshape(-1)[self.key]
        return value[0][self.threads] if value.shape[0] == 1 else value[:, 0][self.blocks]

    def flat(self, value: Any) -> Any:
        """`pick`, with scalars spread to one value a lane."""
        picked = self.pick(value)
        return np.full(self.count, picked) if picked.ndim == 0 else picked


def merge(parts: Iterable[Lanes], shape: tuple[int, int]) -> Lanes:
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    return Lanes(np.sort(np.concatenate([part.index for part in parts])), shape)
