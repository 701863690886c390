"""numba's cache of compiled kernels on disk, made so that it can only save time: damaged, full, unwritable, it is done without.

numba trusts the folder: a torn index ends the program, a flipped bit in machine code is run, a place that cannot be written
forbids caching functions at all. Here each kernel's file begins with its SHA-256, and whatever fails is compiled again.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import CPUDispatcher

_SIZE = hashlib.sha256().digest_size


class _CheckedFiles(IndexDataCacheFile):
    """The index and data files of one kernel; the data behind its hash. An OSError means to numba: not there."""

    def _load_index(self) -> dict[Any, str]:
        try:
            found: dict[Any, str] = super()._load_index()
        except Exception:  # whatever unpickling a torn file raises
            return {}
        return found

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            stored = file.read()
        if hashlib.sha256(stored[_SIZE:]).digest() != stored[:_SIZE]:
            raise OSError(f"{name} is damaged")
        return pickle.loads(stored[_SIZE:])

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)


class KernelCache(FunctionCache):
    """The cache of one kernel; no failure of its files is a failure of the kernel."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _CheckedFiles(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # a full disk, a folder that cannot be written
            self.disable()


class KernelDispatcher(CPUDispatcher):
    """numba's dispatcher of a compiled function, over a `KernelCache`."""

    def enable_caching(self) -> None:
        with suppress(RuntimeError, OSError):  # there is no folder that could be written
            self._cache = KernelCache(self.py_func)


def njit(*functions: Callable[..., Any], cache: bool = False, **options: Any) -> Any:
    """`numba.njit`, whose ``cache=True`` never fails."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = KernelDispatcher(function, targetoptions={"nopython": True, "boundscheck": None, **options})
        if cache:
            dispatcher.enable_caching()
        return dispatcher

    return compiled(functions[0]) if functions else compiled


__all__ = ["KernelCache", "njit"]
