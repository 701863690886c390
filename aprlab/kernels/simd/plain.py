"""What the kernels compute, as plain loops: the executable specification that tests hold them to. Needs no numba.

Decoding has its specification in `aprlab.quants`. Everything here is meant to be read, not to be fast.
"""

from __future__ import annotations

import math

import numpy as np


def dot4(acc: np.ndarray, unsigned: np.ndarray, signed: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """acc int32 (8,) plus four neighbouring products a lane, uint8 (32,) by int8 (32,), each lane times its `scale`."""
    out = acc.astype(np.int64)
    for lane in range(8):
        total = sum(int(unsigned[i]) * int(signed[i]) for i in range(4 * lane, 4 * lane + 4))
        out[lane] += total * (1 if scale is None else int(scale[lane]))
    return out.astype(np.int32)


def round_32(x: np.ndarray, halves: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ggml's Q8_0 (Q8_1 with `halves`) of x float32 (n,) -> q int8 (n,), d and s float32 (n / 32,), as on x86.

    The reference C code of ggml divides and rounds a little differently (halves away from zero); its x86 code, which
    is what runs, multiplies by ``127 / max`` and rounds halves to even.
    """
    q, d, s = np.empty(x.size, np.int8), np.empty(x.size // 32, np.float32), np.empty(x.size // 32, np.float32)
    for block in range(x.size // 32):
        values = x[32 * block : 32 * block + 32]
        largest = np.float32(max(abs(v) for v in values))
        factor = np.float32(127) / largest if largest else np.float32(0)
        integers = [round(float(np.float32(v * factor))) for v in values]  # Python rounds halves to even
        step = largest / np.float32(127)
        q[32 * block : 32 * block + 32] = integers
        d[block] = np.float16(step)
        s[block] = np.float16(step * np.float32(sum(integers))) if halves else d[block] * np.float32(sum(integers))
    return q, d, s


def round_256(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ggml's Q8_K of x float32 (n,) -> q int8 (n,), d float32 (n / 256,), sums of 16 float32 (n / 16,)."""
    q, d, s = np.empty(x.size, np.int8), np.empty(x.size // 256, np.float32), np.empty(x.size // 16, np.float32)
    for block in range(x.size // 256):
        values = x[256 * block : 256 * block + 256]
        extreme = np.float32(0)  # the value of largest magnitude, with its sign; the first of equals
        for v in values:
            if abs(v) > abs(extreme):
                extreme = v
        if not extreme:
            q[256 * block : 256 * block + 256], d[block], s[16 * block : 16 * block + 16] = 0, 0, 0
            continue
        factor = np.float32(-127) / extreme
        integers = [min(127, round(float(np.float32(factor * v)))) for v in values]
        q[256 * block : 256 * block + 256] = integers
        d[block] = np.float32(1) / factor
        s[16 * block : 16 * block + 16] = [sum(integers[i : i + 16]) for i in range(0, 256, 16)]
    return q, d, s


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int) -> np.ndarray:
    """Causal grouped attention in double: q (T, H, D) at positions start…, k and v (positions, Hkv, D) -> (T, H * D)."""
    count, heads, size = q.shape
    group = heads // k.shape[1]
    out = np.empty((count, heads, size))
    for t in range(count):
        seen = start + t + 1
        for h in range(heads):
            keys, values = k[:seen, h // group].astype(np.float64), v[:seen, h // group].astype(np.float64)
            scores = [float(keys[i] @ q[t, h]) / math.sqrt(size) for i in range(seen)]
            highest = max(scores)
            weights = [math.exp(score - highest) for score in scores]
            out[t, h] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return out.reshape(count, heads * size)
