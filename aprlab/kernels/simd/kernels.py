"""The kernels, in one place, for callers outside this package. Importing this module needs numba; nothing else does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# libgomp's waiting threads spin for milliseconds by default and starve whatever runs in between; it reads this when
# numba first loads it, which is later than this line
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba
import numpy as np

from aprlab.errors import UsageError
from aprlab.kernels.simd.blocks import KINDS, Kind
from aprlab.kernels.simd.decode import decode
from aprlab.kernels.simd.figures import summed
from aprlab.kernels.simd.matmul_f32 import matmul_f32
from aprlab.kernels.simd.ops import (
    attend_one_parallel,
    attend_parallel,
    attend_serial,
    embed_rows,
    rms_norm,
    rotate,
    store_keys_values,
    swiglu_parallel,
    swiglu_serial,
)
from aprlab.kernels.simd.packed import (
    FIELDS,
    ROWS,
    fields,
    pack,
    packed_f32,
    packed_f32_tiles,
    packed_q8,
    packed_q8_tiles,
    q8_0_f32,
)
from aprlab.kernels.simd.parallel_product import address, product_parallel
from aprlab.kernels.simd.q8 import matmul_q8, quantise_rows, rounded
from aprlab.paths import cores

__all__ = [
    "KINDS",
    "ROWS",
    "Kind",
    "address",
    "attend_one_parallel",
    "attend_parallel",
    "attend_serial",
    "check_threads",
    "decode",
    "embed_rows",
    "entry",
    "fields",
    "frozen",
    "matmul_f32",
    "matmul_q8",
    "pack",
    "packable",
    "packed_f32",
    "packed_f32_tiles",
    "packed_q8",
    "packed_q8_tiles",
    "product_parallel",
    "q8_0_f32",
    "quantise_rows",
    "rms_norm",
    "rotate",
    "rounded",
    "store_keys_values",
    "summed",
    "swiglu_parallel",
    "swiglu_serial",
]


def check_threads(threads: int | None) -> int:
    """Threads to use: `threads`, or None for every core of this process; raises UsageError beyond numba's own limit."""
    limit: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if threads is None:
        return min(limit, cores())
    if threads > limit:
        raise UsageError(
            f"{threads} threads: numba was started with {limit} (environment NUMBA_NUM_THREADS)", code="simd.too-many-threads"
        )
    return threads


def entry(kernel: Any, *args: Any) -> Callable[..., Any]:
    """The compiled code of `kernel` for arguments of these types, with which it has been called before.

    Calling that skips numba's look at the types of the arguments, 10 µs a call on a slow machine; it checks none of
    them, so they must be of the same types: dtype, dimensions, contiguity and all.
    """
    found: Callable[..., Any] = kernel.overloads[tuple(numba.typeof(a) for a in args)].entry_point
    return found


def packable(kind: Kind) -> bool:
    """Whether fused kernels need matrices of this block type packed (`pack`)."""
    return kind.type.name in FIELDS


def frozen(raw: np.ndarray) -> np.ndarray:
    """A read-only, 1-D view of bytes: weights always reach the kernels as one numba type."""
    view = raw.reshape(-1).view(np.uint8)
    view.flags.writeable = False
    return view
