"""Whether bytes are the same: a checksum, a comparison over the union of names, the strict reader's word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from aprlab.errors import AprlabError
from aprlab.formats import open_model
from aprlab.tracing.comparisons import difference

Arrays = Mapping[str, np.ndarray]


def checksum(values: np.ndarray) -> int:
    """XXH3-64 of dtype, shape and bytes: changes with any value and with their order."""
    values = np.ascontiguousarray(values)
    state = xxhash.xxh3_64(f"{values.dtype.str}{values.shape}".encode())
    state.update(values.reshape(-1).view(np.uint8).data)
    return state.intdigest()


def same(a: Arrays, b: Arrays) -> bool:
    """Whether both sides have the same names, at least one, and equal values under each, bit for bit.

    Args:
        a, b: name -> array.
    """
    if not a or a.keys() != b.keys():
        return False
    return all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and difference(a[n], b[n]).equal for n in a)


def verify(path: Path) -> bool:
    """Whether the strict reader takes the file, footer CRC and scales included."""
    try:
        with open_model(path) as model:
            model.check_values()
    except AprlabError:
        return False
    return True
