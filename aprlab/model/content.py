"""Where the bytes of a tensor come from: views on mapped files."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import UsageError

MAPPED: dict[int, tuple[int, Path]] = {}  # address → size and path of each file that is mapped now, for `aprlab.cli.sigbus`


def map_file(path: Path) -> np.ndarray:
    """The file as a read-only ``uint8 (size,)`` view on a memory map; an empty file gives an empty array."""
    try:
        if os.path.getsize(path) == 0:
            return np.zeros(0, np.uint8)
        file = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=path) from None
    start = file.ctypes.data
    MAPPED[start] = (file.nbytes, Path(path))
    weakref.finalize(file, MAPPED.pop, start, None)
    return file.view(np.ndarray)


def drop_pages(raw: np.ndarray) -> None:
    """Tell the kernel that the pages of this view on a mapped file are not needed now; reading them again is allowed.

    Pages of a map count as this process's memory until then. Arrays that are no such view are left alone.
    """
    root: Any = raw
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not (isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap) and raw.nbytes):
        return
    start = raw.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    first = start - start % mmap.PAGESIZE  # NumPy maps a file from an offset of 0, so that pages begin here
    root.base.madvise(mmap.MADV_DONTNEED, first, start + raw.nbytes - first)
