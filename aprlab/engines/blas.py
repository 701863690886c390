"""Threads of the BLAS libraries in this process, set for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


@cache
def _libraries() -> list[Any]:
    """NumPy's own, which is loaded by now."""
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


@contextmanager
def blas_threads(threads: int | None) -> Iterator[None]:
    """BLAS uses so many threads inside; None leaves it alone.

    As ``ThreadpoolController.limit``, which takes 80 µs each time; a small product takes less.
    """
    before = [] if threads is None else [(library, library.get_num_threads()) for library in _libraries()]
    changed = [(library, count) for library, count in before if count != threads]
    for library, _ in changed:
        library.set_num_threads(threads)
    try:
        yield
    finally:
        for library, count in changed:
            library.set_num_threads(count)


__all__ = ["blas_threads"]
