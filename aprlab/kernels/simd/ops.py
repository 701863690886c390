"""What a forward pass needs apart from matrices: norm, rotation, SwiGLU, attention over a KV cache, and an exponential.

All arrays are float32, C order. Each result depends on its own row or (query, head) alone and is summed in an order
that neither the number of threads nor the number of queries in a call can change.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import float32, prange

from aprlab.kernels.simd.decode import FLAT, OPTIONS, decode_span
from aprlab.kernels.simd.kernel_cache import njit
from aprlab.kernels.simd.vectors import (
    add,
    as_f32,
    div,
    fma,
    hmax,
    hsum,
    lane_numbers,
    load_f32x8,
    maximum,
    mul,
    round_even,
    select_less,
    shl,
    splat_f32,
    splat_i32,
    store_f32x8,
    sub,
    to_f32,
)

CHUNK = 64  # positions whose keys and values are worked on together: both fit a first-level cache at D = 64


@njit(**FLAT)
def exp8(x):
    """exp of f32x8 within 2 ulp; 0 below -87.3, inf above 88.7, NaN stays. For kernels."""
    low = select_less(x, splat_f32(-87.33), splat_f32(-87.33), x)
    safe = select_less(splat_f32(88.37), low, splat_f32(88.37), low)
    n = round_even(mul(safe, splat_f32(1.4426950408889634)))
    whole = to_f32(n)
    r = fma(whole, splat_f32(-0.693359375), safe)  # ln 2 in two parts, the first one exact in few bits
    r = fma(whole, splat_f32(2.12194440e-4), r)
    # exp(r) on |r| <= ln(2)/2, minimax polynomial of the Cephes library
    p = fma(splat_f32(1.9875691500e-4), r, splat_f32(1.3981999507e-3))
    p = fma(p, r, splat_f32(8.3334519073e-3))
    p = fma(p, r, splat_f32(4.1665795894e-2))
    p = fma(p, r, splat_f32(1.6666665459e-1))
    p = fma(p, r, splat_f32(5.0000001201e-1))
    p = add(fma(mul(r, r), p, r), splat_f32(1.0))
    y = mul(p, as_f32(shl(add(n, splat_i32(127)), 23)))
    y = select_less(x, splat_f32(-87.33), splat_f32(0.0), y)
    return select_less(splat_f32(88.7), x, splat_f32(np.inf), y)


@njit(**OPTIONS)
def embed_rows(kind, w, row_bytes, tokens, out):
    """Rows `tokens` int64 (T,) of `w` (uint8, 1-D) into `out` (T, cols)."""
    flat = out.reshape(-1)
    for t in range(tokens.size):
        decode_span(kind, w, tokens[t] * row_bytes, out.shape[1], flat, t * out.shape[1])


@njit(**OPTIONS)
def rms_norm(x, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) * weight by row, (T, n); squares are summed in double, as ggml does."""
    n = x.shape[1]
    for t in range(x.shape[0]):
        a = b = c = d = 0.0
        for i in range(0, n // 4 * 4, 4):
            a += np.float64(x[t, i]) * np.float64(x[t, i])
            b += np.float64(x[t, i + 1]) * np.float64(x[t, i + 1])
            c += np.float64(x[t, i + 2]) * np.float64(x[t, i + 2])
            d += np.float64(x[t, i + 3]) * np.float64(x[t, i + 3])
        for i in range(n // 4 * 4, n):
            a += np.float64(x[t, i]) * np.float64(x[t, i])
        scale = np.float32(1.0 / np.sqrt(((a + b) + (c + d)) / n + eps))
        for i in range(n):
            out[t, i] = x[t, i] * scale * weight[i]


@njit(**OPTIONS)
def rotate(x, cos, sin, start, neox, out):
    """Turn x (T, heads, D) at positions start…; cos and sin (positions, D/2); pairs are halves (neox) or neighbours."""
    half = x.shape[2] // 2
    for t in range(x.shape[0]):
        c, s = cos[start + t], sin[start + t]
        for h in range(x.shape[1]):
            source, target = x[t, h], out[t, h]
            if neox:
                for i in range(half):
                    a, b = source[i], source[half + i]
                    target[i] = a * c[i] - b * s[i]
                    target[half + i] = a * s[i] + b * c[i]
            else:
                for i in range(half):
                    a, b = source[2 * i], source[2 * i + 1]
                    target[2 * i] = a * c[i] - b * s[i]
                    target[2 * i + 1] = a * s[i] + b * c[i]


@njit(**FLAT)
def _swiglu_span(gate, up, out, first, last):
    whole = first + (last - first) // 8 * 8
    for i in range(first, whole, 8):
        g = load_f32x8(gate, i)
        bottom = add(splat_f32(1.0), exp8(sub(splat_f32(0.0), g)))
        store_f32x8(out, i, mul(div(g, bottom), load_f32x8(up, i)))
    for i in range(whole, last):
        out[i] = gate[i] / (float32(1) + np.exp(-gate[i])) * up[i]


@njit(**OPTIONS)
def swiglu_serial(gate, up, out):
    """out = gate / (1 + exp(-gate)) * up, 1-D."""
    _swiglu_span(gate, up, out, 0, out.size)


@njit(parallel=True, **OPTIONS)
def swiglu_parallel(gate, up, out, tasks):
    """`swiglu_serial` in `tasks` parts, each a multiple of eight but the last."""
    eights = (out.size + 7) // 8
    for task in prange(tasks):
        _swiglu_span(gate, up, out, 8 * (task * eights // tasks), min(out.size, 8 * ((task + 1) * eights // tasks)))


# -- attention ----------------------------------------------------------------------------------------------------------
#
# Keys lie in the cache with eight positions interleaved, (Hkv, capacity / 8, D, 8): one vector holds one coordinate of
# eight neighbours, so scores need no sums across lanes. Values lie (Hkv, capacity, D). Work goes by chunks of CHUNK
# positions; each gives its own maximum, sum and weighted values, and chunks are merged in order.


@njit(**OPTIONS)
def store_keys_values(k, v, keys, values, start):
    """k and v (T, Hkv, D) into one layer's cache at positions start…"""
    for t in range(k.shape[0]):
        position = start + t
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                keys[h, position // 8, d, position % 8] = k[t, h, d]
                values[h, position, d] = v[t, h, d]


@njit(**FLAT)
def _scores(q, qo, keys, ko, size, first, last, scale, p, po):
    """p[po:] = scaled scores of query q[qo:] at positions first…last-1 (rounded up to eight); returns the maximum."""
    highest = splat_f32(-np.inf)
    step = size * 8
    blocks = (last - first + 7) // 8
    base = ko + first // 8 * step
    block = 0
    while block < blocks:
        if block + 4 <= blocks:
            a = b = c = d = splat_f32(0)
            at = base + block * step
            for i in range(size):
                x = splat_f32(q[qo + i])
                a = fma(x, load_f32x8(keys, at + 8 * i), a)
                b = fma(x, load_f32x8(keys, at + step + 8 * i), b)
                c = fma(x, load_f32x8(keys, at + 2 * step + 8 * i), c)
                d = fma(x, load_f32x8(keys, at + 3 * step + 8 * i), d)
            store_f32x8(p, po + 8 * block, mul(a, splat_f32(scale)))
            store_f32x8(p, po + 8 * block + 8, mul(b, splat_f32(scale)))
            store_f32x8(p, po + 8 * block + 16, mul(c, splat_f32(scale)))
            store_f32x8(p, po + 8 * block + 24, mul(d, splat_f32(scale)))
            block += 4
        else:
            a = splat_f32(0)
            at = base + block * step
            for i in range(size):
                a = fma(splat_f32(q[qo + i]), load_f32x8(keys, at + 8 * i), a)
            store_f32x8(p, po + 8 * block, mul(a, splat_f32(scale)))
            block += 1
    for block in range(blocks):  # lanes past the end never win and never weigh
        index = add(lane_numbers(), splat_f32(float32(8 * block)))
        s = select_less(index, splat_f32(float32(last - first)), load_f32x8(p, po + 8 * block), splat_f32(-np.inf))
        store_f32x8(p, po + 8 * block, s)
        highest = maximum(highest, s)
    return hmax(highest)


@njit(**FLAT)
def _attend_chunk(q, qo, keys, ko, values, vo, size, first, last, scale, p, part, o):
    """One chunk of one query head: part[o] = maximum, part[o + 1] = sum, part[o + 2 : o + 2 + D] = weighted values."""
    highest = _scores(q, qo, keys, ko, size, first, last, scale, p, 0)
    total = splat_f32(0)
    for block in range((last - first + 7) // 8):
        e = exp8(sub(load_f32x8(p, 8 * block), splat_f32(highest)))
        store_f32x8(p, 8 * block, e)
        total = add(total, e)
    part[o] = highest
    part[o + 1] = hsum(total)
    at = vo + first * size
    count = last - first
    piece = 0
    while piece < size:
        if piece + 64 <= size:
            a = b = c = d = e = f = g = h = splat_f32(0)
            for i in range(count):
                x = splat_f32(p[i])
                row = at + i * size + piece
                a = fma(x, load_f32x8(values, row), a)
                b = fma(x, load_f32x8(values, row + 8), b)
                c = fma(x, load_f32x8(values, row + 16), c)
                d = fma(x, load_f32x8(values, row + 24), d)
                e = fma(x, load_f32x8(values, row + 32), e)
                f = fma(x, load_f32x8(values, row + 40), f)
                g = fma(x, load_f32x8(values, row + 48), g)
                h = fma(x, load_f32x8(values, row + 56), h)
            store_f32x8(part, o + 2 + piece, a)
            store_f32x8(part, o + 10 + piece, b)
            store_f32x8(part, o + 18 + piece, c)
            store_f32x8(part, o + 26 + piece, d)
            store_f32x8(part, o + 34 + piece, e)
            store_f32x8(part, o + 42 + piece, f)
            store_f32x8(part, o + 50 + piece, g)
            store_f32x8(part, o + 58 + piece, h)
            piece += 64
        else:
            a = splat_f32(0)
            for i in range(count):
                a = fma(splat_f32(p[i]), load_f32x8(values, at + i * size + piece), a)
            store_f32x8(part, o + 2 + piece, a)
            piece += 8


@njit(**FLAT)
def _merge(part, o, size, into, io, first):
    """Chunk part[o:] onto the running into[io:] (same layout); the first one starts it."""
    if first:
        for i in range(size + 2):
            into[io + i] = part[o + i]
        return
    highest = max(into[io], part[o])
    old, new = np.exp(into[io] - highest), np.exp(part[o] - highest)
    into[io] = highest
    into[io + 1] = into[io + 1] * old + part[o + 1] * new
    for i in range(0, size, 8):
        scaled = mul(load_f32x8(part, o + 2 + i), splat_f32(new))
        store_f32x8(into, io + 2 + i, fma(load_f32x8(into, io + 2 + i), splat_f32(old), scaled))


@njit(**FLAT)
def _finish(into, io, size, out, oo):
    factor = float32(1) / into[io + 1]
    for i in range(0, size, 8):
        store_f32x8(out, oo + i, mul(load_f32x8(into, io + 2 + i), splat_f32(factor)))


@njit(**FLAT)
def _attend_queries(q, keys, values, heads, kv_heads, size, capacity, start, first, last, out):
    """Work items first…last-1 of (T x H) whole query heads, one after the other, item = t * H + h."""
    group = heads // kv_heads
    scale = float32(1.0 / np.sqrt(size))
    p = np.empty(CHUNK, np.float32)
    part = np.empty(size + 2, np.float32)
    running = np.empty(size + 2, np.float32)
    for item in range(first, last):
        t, h = item // heads, item % heads
        offset = (h // group) * capacity * size
        seen = start + t + 1
        for at in range(0, seen, CHUNK):
            end = min(at + CHUNK, seen)
            _attend_chunk(q, item * size, keys, offset, values, offset, size, at, end, scale, p, part, 0)
            _merge(part, 0, size, running, 0, at == 0)
        _finish(running, 0, size, out, item * size)


@njit(**OPTIONS)
def attend_serial(q, keys, values, heads, kv_heads, size, capacity, start, out):
    """Causal grouped attention of q (T x H x D, flat) over one layer's cache (flat), into out (T x H x D, flat)."""
    _attend_queries(q, keys, values, heads, kv_heads, size, capacity, start, 0, q.size // size, out)


@njit(parallel=True, **OPTIONS)
def attend_parallel(q, keys, values, heads, kv_heads, size, capacity, start, out, tasks):
    """`attend_serial`, many queries: items dealt out so that early (short) and late (long) queries mix."""
    items = q.size // size
    parts = 8 * tasks  # later queries see more: small parts keep the threads evenly busy
    for task in prange(tasks):
        for step in range(8):
            part = step * tasks + (task if step % 2 == 0 else tasks - 1 - task)
            _attend_queries(
                q, keys, values, heads, kv_heads, size, capacity, start,
                part * items // parts, (part + 1) * items // parts, out,
            )  # fmt: skip


@njit(parallel=True, **OPTIONS)
def attend_one_parallel(q, keys, values, heads, kv_heads, size, capacity, start, out, tasks):
    """`attend_serial` for one query over a long cache: chunks of positions are shared out, then merged in order."""
    group = heads // kv_heads
    scale = float32(1.0 / np.sqrt(size))
    seen = start + 1
    chunks = (seen + CHUNK - 1) // CHUNK
    width = size + 2
    parts = np.empty(heads * chunks * width, np.float32)
    for task in prange(tasks):
        p = np.empty(CHUNK, np.float32)
        items = kv_heads * chunks
        for item in range(task * items // tasks, (task + 1) * items // tasks):
            kv, chunk = item // chunks, item % chunks
            offset = kv * capacity * size
            first, last = chunk * CHUNK, min(chunk * CHUNK + CHUNK, seen)
            for h in range(kv * group, kv * group + group):  # heads that share these keys, while they are in cache
                at = (h * chunks + chunk) * width
                _attend_chunk(
                    q, h * size, keys, offset, values, offset, size, first, last, scale, p, parts, at
                )  # fmt: skip
    running = np.empty(width, np.float32)
    for h in range(heads):
        for chunk in range(chunks):
            _merge(parts, (h * chunks + chunk) * width, size, running, 0, chunk == 0)
        _finish(running, 0, size, out, h * size)
