"""How the modules of `aprlab.kernels.simd.shipped` are made: every kernel for every signature the engine calls it with.

`docs/make/kernel_modules.py` runs this, a process for each instruction set, with `environment`: what a module looks like depends
on the processor that LLVM optimises for and, by the numbers in numba's names, on what was compiled before it. No kernel is
run, so one machine can make the modules for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numba
from numba import types
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from aprlab.errors import UsageError
from aprlab.kernels.simd import isa as isas
from aprlab.kernels.simd import kernels, packed, shipped
from aprlab.kernels.simd.kernel_cache import SWITCH
from aprlab.quants.types import Q4_K, Q8_0, by_name

PROCESSORS = {isas.AVX512.name: ("x86-64-v4", "+avx512vnni"), isas.AVX2.name: ("x86-64-v3", "")}

BOOL, I64, F64 = types.boolean, types.int64, types.float64
BYTES, RAW = types.Array(types.uint8, 1, "C"), types.Array(types.uint8, 1, "C", readonly=True)
TOKENS, FIELDS = types.Array(types.int64, 1, "C"), types.Array(types.int64, 2, "C")
F1, F2, F3, F4 = (types.Array(types.float32, n, "C") for n in (1, 2, 3, 4))


def environment(isa: isas.Isa) -> dict[str, str]:
    """Variables of a process that calls `emit`: numba reads them when it starts."""
    processor, features = PROCESSORS[isa.name]
    return {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "PYTHONHASHSEED": "0", SWITCH: "off"}


def wanted(isa: isas.Isa) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, signature) in the order in which they are compiled; cheap ones first, which the tests make again."""
    yield kernels.rms_norm, (F2, F1, F64, F2)
    yield kernels.swiglu_serial, (F1, F1, F1)
    yield kernels.decode, (numba.typeof(kernels.KINDS[Q4_K]), RAW, I64, F1)
    yield kernels.pack, (FIELDS, I64, RAW, I64, BYTES)
    heads = F1, F1, F1, I64, I64, I64, I64, I64, F1
    yield kernels.attend_serial, heads
    yield kernels.attend_parallel, (*heads, I64)
    yield kernels.attend_one_parallel, (*heads, I64)
    yield kernels.swiglu_parallel, (F1, F1, F1, I64)
    yield kernels.rotate, (F3, F2, F2, I64, BOOL, F3)
    yield kernels.store_keys_values, (F3, F3, F4, F3, I64)
    yield kernels.product_parallel, (I64, RAW, I64, F2, F1, F2, BYTES, I64)
    markers = {kind.type.name: numba.typeof(kind) for kind in kernels.KINDS.values()}
    for name, marker in markers.items():
        yield kernels.decode, (marker, RAW, I64, F1)
        yield kernels.embed_rows, (marker, RAW, I64, TOKENS, F2)
        if by_name(name).quantised:
            yield kernels.rounded, (marker, F2, F2)
    for name, marker in markers.items():
        for product in products(isa, name):
            yield product, (numba.typeof(isa), marker, RAW, I64, F2, F1, F2, BYTES, I64, I64)


def products(isa: isas.Isa, name: str) -> list[Any]:
    """The products that the engine uses with matrices of a block type, whatever the contract."""
    if name in packed.FIELDS:
        tiles = [kernels.packed_f32_tiles] if isa is isas.AVX512 else []  # the others have too few registers: BLAS does it
        return [kernels.matmul_f32, kernels.packed_f32, *tiles, kernels.packed_q8, kernels.packed_q8_tiles]
    if by_name(name) is Q8_0:
        return [kernels.matmul_f32, kernels.q8_0_f32, kernels.matmul_q8]
    return [kernels.matmul_f32, kernels.matmul_q8] if by_name(name).quantised else [kernels.matmul_f32]


def emit(isa: isas.Isa, count: int | None = None) -> shipped.KernelArchive:
    """The archive of an instruction set, or its first `count` modules; in a process that began with `environment`.

    Raises:
        UsageError: this process is another one, and would make something else.
    """
    if PROCESSORS[isa.name] != (numba.config.CPU_NAME, numba.config.CPU_FEATURES):  # type: ignore[attr-defined]
        raise UsageError("modules are made in a process of their own", code="simd.emission-environment")
    isas.host_features = lambda: frozenset((*isas.AVX2.features, *isa.features))  # type: ignore[assignment]
    modules = {}
    for kernel, sig in islice(wanted(isa), count):
        kernel.compile(sig)
        made = kernel.overloads[sig]
        made.fndesc.typemap = made.fndesc.calltypes = None  # numba's cache keeps neither
        rest = (
            made.fndesc, made.environment, made.signature, made.objectmode, made.lifted, "", made.reload_init,
            tuple(made._find_referenced_environments()),
        )  # fmt: skip
        modules[shipped.key(kernel.py_func, sig)] = shipped.KernelModule(made.library.name, made.library.get_llvm_str(), dumps(rest))
    return shipped.KernelArchive(shipped.made_with(cpu_target.target_context.codegen()), modules)
