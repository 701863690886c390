"""A model's tensors in shares, for workers that each open the file themselves and read their part of it alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from aprlab.formats import open_model
from aprlab.model.model import Model
from aprlab.model.remote import url_of
from aprlab.model.tensor import Tensor

PER_WORKER = 8  # shares for each worker: few enough to cost nothing, enough that none waits long for the last


@dataclass(frozen=True, slots=True)
class Share:
    """Some tensors of one file, or of two that are compared.

    Attributes:
        paths: of the files, as the workers see them.
        names: of the tensors.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]

    def models(self) -> list[Model]:
        """The files, opened where this is called; the last few stay open."""
        return [_opened(path, version) for path, version in zip(self.paths, self.versions(), strict=True)]

    def versions(self) -> tuple[tuple[int, int], ...]:
        """What tells each file from one that was under its path before."""
        return tuple(map(_version, self.paths))


def shares(paths: Iterable[str], tensors: Iterable[Tensor], workers: int) -> list[Share]:
    """Shares of about the same number of bytes, the largest first: a large tensor is alone, small neighbours are together."""
    tensors = list(tensors)
    most = sum(tensor.nbytes for tensor in tensors) / (workers * PER_WORKER)
    groups: list[tuple[int, list[str]]] = []
    for tensor in tensors:
        if groups and groups[-1][0] + tensor.nbytes <= most:
            groups[-1] = groups[-1][0] + tensor.nbytes, [*groups[-1][1], tensor.name]
        else:
            groups.append((tensor.nbytes, [tensor.name]))
    groups.sort(key=lambda group: -group[0])
    return [Share(tuple(paths), tuple(names)) for _, names in groups]


def _version(path: str) -> tuple[int, int]:
    """What tells a file from the one that was under this path before; nothing for a URL, whose reader looks itself."""
    if url_of(path) is not None:
        return 0, 0
    said = os.stat(path)
    return said.st_mtime_ns, said.st_size


@lru_cache(maxsize=4)
def _opened(path: str, version: tuple[int, int]) -> Model:
    return open_model(path)


__all__ = ["Share", "shares"]
