"""Hooks that are called at each decoding of a tensor, from when they are added until they are removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

DecodeHook = Callable[[str], None]  # gets the GGUF name of the tensor that is about to be decoded

_hooks: list[DecodeHook] = []


@contextmanager
def decode_hook(hook: DecodeHook) -> Iterator[None]:
    """Inside the block `hook` is called before each decoding, by any decoder and on any thread."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def notify(name: str) -> None:
    """A tensor is about to be decoded: every way to do so calls this once."""
    for hook in tuple(_hooks):
        hook(name)
