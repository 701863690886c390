"""One loop over threads for every product of a matrix.

numba compiles a parallel function much longer than a plain one, and would do so for each block type, instruction set and
contract. Instead all fused kernels have one signature, are compiled as plain functions, and this loop calls the compiled code
by its address.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from aprlab.kernels.simd.decode import OPTIONS
from aprlab.kernels.simd.kernel_cache import njit
from aprlab.kernels.simd.packed import ROWS


def address(kernel: Any, *args: Any) -> int:
    """Where the code of `kernel` for arguments of these types begins; it has been called with such before.

    The code follows numba's C convention: arguments by value, as in compiled code.
    """
    compiled = kernel.overloads[tuple(numba.typeof(a) for a in args)]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)


@intrinsic
def _call(
    typingctx: Any, address: Any, w: Any, row_bytes: Any, x: Any, bias: Any, out: Any, refused: Any, first: Any, last: Any
) -> Any:
    """The kernel at `address`, called with two markers (which carry no bits) and the other arguments."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        marker = context.get_dummy_value()
        given = [marker, marker, *args[1:]]
        kind = ir.FunctionType(context.get_value_type(types.int64), [value.type for value in given])
        return b.call(b.inttoptr(args[0], kind.as_pointer()), given)

    return types.int64(types.int64, w, types.int64, x, bias, out, refused, types.int64, types.int64), emit


@njit(parallel=True, **OPTIONS)
def product_parallel(address, w, row_bytes, x, bias, out, refused, tasks):
    """The product at `address` (see `address`) with the rows of the matrix in `tasks` parts; returns what each of them returns.

    Rows are dealt out in eights, which is how packed matrices hold them. Each part prepares the activations for itself, while it
    would else wait for one that prepares them for all.
    """
    eights, odd = (out.shape[1] + ROWS - 1) // ROWS, 0
    for task in prange(tasks):
        first, last = ROWS * (task * eights // tasks), min(ROWS * ((task + 1) * eights // tasks), out.shape[1])
        odd = max(odd, _call(address, w, row_bytes, x, bias, out, refused, first, last))
    return odd
