"""Blocks to float32, bit for bit as ggml decodes them.

Every product of a scale and an integer is exact but for at most one rounding, which is why a fused multiply-add gives
the same bits as two operations.
"""

# mypy: ignore-errors

from __future__ import annotations

from numba.extending import overload

from aprlab.kernels.simd.blocks import FLOATS, INLINE, elements, factors, has_plus, integers, size
from aprlab.kernels.simd.kernel_cache import njit
from aprlab.kernels.simd.vectors import (
    fma,
    load_bfloat,
    load_bfloat8,
    load_f32,
    load_f32x8_bytes,
    load_half,
    load_half8,
    mul,
    splat_f32,
    store_f32x8,
    widen0,
    widen1,
    widen2,
    widen3,
)

OPTIONS = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
FLAT = {**INLINE, "nogil": True}  # a helper that is compiled into its callers


def decode_span(kind, w, at, count, out, o):
    """`count` values (whole blocks) from byte `at` of `w` into `out[o:]`. Only for kernels."""
    raise NotImplementedError


LOADERS = {
    "F32": (load_f32x8_bytes, load_f32),
    "F16": (load_half8, load_half),
    "BF16": (load_bfloat8, load_bfloat),
}  # eight values, one value


@overload(decode_span, jit_options=INLINE, strict=False)
def _decode_span(kind, w, at, count, out, o):
    if kind.value in FLOATS:
        load, load_one = LOADERS[kind.value]

        def floats(kind, w, at, count, out, o):
            step = size(kind)
            whole = count // 8 * 8
            for i in range(0, whole, 8):
                store_f32x8(out, o + i, load(w, at + i * step))
            for i in range(whole, count):
                out[o + i] = load_one(w, at + i * step)

        return floats

    def blocks(kind, w, at, count, out, o):
        for block in range(count // elements(kind)):
            start = at + block * size(kind)
            for j in range(elements(kind) // 32):
                q = integers(kind, w, start, j)
                low, high, plus_low, plus_high = factors(kind, w, start, j)
                i = o + block * elements(kind) + 32 * j
                if has_plus(kind):
                    store_f32x8(out, i, fma(splat_f32(low), widen0(q), splat_f32(plus_low)))
                    store_f32x8(out, i + 8, fma(splat_f32(low), widen1(q), splat_f32(plus_low)))
                    store_f32x8(out, i + 16, fma(splat_f32(high), widen2(q), splat_f32(plus_high)))
                    store_f32x8(out, i + 24, fma(splat_f32(high), widen3(q), splat_f32(plus_high)))
                else:
                    store_f32x8(out, i, mul(splat_f32(low), widen0(q)))
                    store_f32x8(out, i + 8, mul(splat_f32(low), widen1(q)))
                    store_f32x8(out, i + 16, mul(splat_f32(high), widen2(q)))
                    store_f32x8(out, i + 24, mul(splat_f32(high), widen3(q)))

    return blocks


@njit(**OPTIONS)
def decode(kind, w, count, out):
    """Decode `count` values, whole blocks, from `w` uint8 into `out` float32, both 1-D."""
    decode_span(kind, w, 0, count, out, 0)
