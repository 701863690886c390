"""Which instructions the kernels may use: three sets, chosen when the program runs.

`Isa` objects are handed to kernels as an argument. They carry no bits: each has a numba type of its own, so one kernel
source is compiled once per set, and the set is part of the signature under which numba caches the result on disk. A
digest of the kernels' sources is part of that type too, since numba looks only at the file of the outermost function
when it decides whether a cached kernel is stale.

This module does not need numba.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aprlab.errors import UsageError

ENVIRONMENT = "APRLAB_SIMD"


@dataclass(frozen=True, slots=True)
class Isa:
    """One instruction set: `name` for people, `features` as LLVM names what it needs of the processor."""

    name: str
    features: tuple[str, ...]


AVX512 = Isa("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))
AVX2 = Isa("avx2", ("avx2", "fma", "f16c"))
PORTABLE = Isa("portable", ())
ALL = (AVX512, AVX2, PORTABLE)  # best first
_KEEPERS = ("kernel_cache.py", "shipped.py", "emission.py", "plain.py")  # of this package, but not part of any kernel
NAMES = tuple(isa.name for isa in ALL)


@cache
def host_features() -> frozenset[str]:
    """Features of this processor that LLVM knows and the operating system has enabled."""
    from llvmlite import binding

    return frozenset(name for name, enabled in binding.get_host_cpu_features().items() if enabled)


def supported(isa: Isa) -> bool:
    """Whether this processor has every instruction of `isa`."""
    return host_features().issuperset(isa.features)


def choose(name: str | None = None) -> Isa:
    """The set called `name`; else the one that `APRLAB_SIMD` names; else the best one of this machine.

    A set that is asked for by name is given even where the processor lacks it, as long as it can be imitated there:
    ``avx512`` then runs with its one instruction of interest (vpdpbusd) spelled out, so that its kernels can be tested
    anywhere. ``avx2`` cannot be imitated and is refused.

    Raises:
        UsageError: no set has this name, or the processor cannot run it.
    """
    asked = name or os.environ.get(ENVIRONMENT) or None
    if asked is None:
        return next(isa for isa in ALL if supported(isa))
    for isa in ALL:
        if isa.name == asked.lower():
            if isa is AVX2 and not supported(isa):
                raise UsageError("this processor has no AVX2", code="simd.no-avx2")
            return isa
    raise UsageError(f"unknown instruction set {asked!r}; known: {', '.join(NAMES)}", code="simd.unknown-instruction-set")


@cache
def source_digest() -> str:
    """A short digest of the source files of this package that make kernels: changes when any kernel does."""
    digest = hashlib.sha256()
    for path in sorted(set(Path(__file__).parent.glob("*.py")) - {Path(__file__).with_name(name) for name in _KEEPERS}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
