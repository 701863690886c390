"""Compiled kernels on disk, kept so that they can only save time: damaged, full, unwritable, the cache is done without.

numba's own cache trusts its folder: a torn index ends the program, a flipped bit in machine code is run, two processes that
start at once take each other's file for theirs, a place that cannot be written forbids caching functions at all. Here each
compiled kernel is a file of its own, named after all that it depends on and beginning with its SHA-256; there is no index.

A kernel that is not on disk is generated from the module that ships with the package (`aprlab.kernels.simd.shipped`), and
compiled from its source where that does not fit. APRLAB_KERNEL_CACHE=off does without either: everything is compiled.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import CPUDispatcher
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from aprlab.kernels.simd import shipped
from aprlab.kernels.simd.isa import source_digest

SWITCH = "APRLAB_KERNEL_CACHE"
_SIZE = hashlib.sha256().digest_size


class KernelCache(_Cache):
    """The compiled code of one function, by signature; no failure of its files is a failure of the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._place: Path | None = None  # all files of this function are called that, and more
        self._stamp = source_digest()
        with suppress(RuntimeError, OSError):  # there is no folder that could be written
            numbas = CompileResultCacheImpl(function)
            self._place = Path(numbas.locator.get_cache_path()) / numbas.filename_base
            self._stamp = _digest(self._stamp, numbas.locator.get_source_stamp(), numba.__version__)

    @property
    def cache_path(self) -> str | None:
        """The folder; None where none can be written."""
        return None if self._place is None else str(self._place.parent)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for a signature, from disk or from its shipped module; None where it has to be compiled."""
        rtsys.initialize(target_context)  # all of numba that machine code needs; whoever compiles loads the rest, in half a second
        try:
            path = self._path(sig, target_context.codegen())
            if (stored := _read(path)) is not None:
                return CompileResult._rebuild(target_context, *stored)
            if (made := shipped.generate(self._function, sig, target_context.codegen())) is not None:
                self._write(path, made)
                return CompileResult._rebuild(target_context, *made)
        except Exception:  # whatever unpickling raises, and rebuilding: it is compiled
            pass
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a function that was compiled."""
        if not data.library.has_dynamic_globals:
            with suppress(Exception):
                self._write(self._path(sig, data.codegen), data._reduce())

    def _path(self, sig: Any, codegen: Any) -> Path | None:
        if self._place is None:
            return None
        code = self._function.__code__.co_code, sys.version, codegen.magic_tuple()  # the last: the processor, as LLVM sees it
        return self._place.with_name(f"{self._place.name}.{self._stamp}.{_digest(str(sig), *code)}.nbc")

    def _write(self, path: Path | None, payload: Any) -> None:
        """Whole or not at all; what an older source left goes. A full disk, a folder that cannot be written: nothing happens."""
        if path is None:
            return
        content = dumps(payload)
        with suppress(OSError):
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(content).digest() + content)
                os.replace(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
            assert self._place is not None
            for other in path.parent.glob(f"{self._place.name}.*.nbc"):
                if not other.name.startswith(f"{self._place.name}.{self._stamp}."):
                    other.unlink(missing_ok=True)

    def enable(self) -> None:
        """numba's interface; the cache is always on."""

    def disable(self) -> None:
        """As `enable`."""

    def flush(self) -> None:
        """Forget everything about this function."""
        if self._place is not None:
            for path in self._place.parent.glob(f"{self._place.name}.*.nbc"):
                path.unlink(missing_ok=True)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(path: Path | None) -> Any:
    """What `KernelCache._write` wrote; None where nothing is there, or not all of it."""
    try:
        stored = b"" if path is None else path.read_bytes()
    except OSError:
        return None
    if not stored or hashlib.sha256(stored[_SIZE:]).digest() != stored[:_SIZE]:
        return None
    return pickle.loads(stored[_SIZE:])


class KernelDispatcher(CPUDispatcher):
    """numba's dispatcher of a compiled function, over a `KernelCache`."""

    def enable_caching(self) -> None:
        if os.environ.get(SWITCH) != "off":
            self._cache = KernelCache(self.py_func)

    def _compilation_chain_init_hook(self) -> None:
        """numba looks through all installed packages for its extensions here; it does again before it really compiles."""


def njit(*functions: Callable[..., Any], cache: bool = False, **options: Any) -> Any:
    """`numba.njit`, whose ``cache=True`` never fails."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = KernelDispatcher(function, targetoptions={"nopython": True, "boundscheck": None, **options})
        if cache:
            dispatcher.enable_caching()
        return dispatcher

    return compiled(functions[0]) if functions else compiled


__all__ = ["KernelCache", "njit"]
