"""ggml's three searches for the scale (and minimum) of a group of weights, over many groups at once.

Named as in ggml's ``ggml-quants.c``. Groups lie in columns: x is (values of a group, groups), so that each sum runs down
axis 0, in float32 and in C's order, while NumPy works along the groups. That order is what makes the bytes equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aprlab.quants.base import Floats

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP_MAX_EPS = np.float32(1e-15)  # ggml: a group of smaller magnitudes counts as zeros


def ordered_sum(a: Floats) -> Floats:
    """Sum over axis 0 in float32, one row after the other.

    NumPy sums pairwise along the axis that is contiguous in memory and in plain order along any other; with one
    column the two could not be distinguished, and a K quant never has fewer than eight.
    """
    assert a.flags.c_contiguous
    assert a.shape[1] > 1
    total: Floats = np.add.reduce(a, axis=0)
    return total


def _levels(x: Floats, inv: Floats, base: Floats, nmax: int) -> Floats:
    """``(x - base) * inv``, rounded and kept within 0..nmax."""
    q = x - base
    q *= inv
    np.rint(q, out=q)
    return np.clip(q, np.float32(0), np.float32(nmax), out=q)


def make_qkx2_quants(
    x: Floats, weights: Floats, nmax: int, rmin: float, rdelta: float, nstep: int, *, absolute: bool
) -> tuple[Floats, Floats, Floats]:
    """Scale and minimum of ``x ≈ scale * q - minimum``, q in 0..nmax, minimum >= 0 (Q2_K, Q4_K, Q5_K).

    Tries nstep + 1 roundings, solves weighted least squares for each and keeps the best by weighted square (or
    `absolute`) error. As in ggml, an accepted minimum is the base of the tries after it.

    Args: x, weights float32 (values, groups). Returns: scale (groups,), minimum (groups,), q as float32 (values, groups).
    """
    sum_w, sum_x = ordered_sum(weights), ordered_sum(weights * x)
    top = x.max(axis=0)
    low = np.minimum(x.min(axis=0), np.float32(0))
    flat = top == low  # all values equal and not positive: scale 0, the minimum says it all

    def error(q: Floats, scale: Floats, low: Floats) -> Floats:
        diff = q * scale
        diff += low
        diff -= x
        if absolute:
            np.abs(diff, out=diff)
        else:
            diff *= diff
        diff *= weights
        return ordered_sum(diff)

    inv: Floats = np.float32(nmax) / (top - low)
    best_scale: Floats = np.float32(1) / inv
    best_error = error(_levels(x, inv, low, nmax), best_scale, low)
    best_inv, best_base = inv, low
    for step in range(nstep + 1):
        inv = (np.float32(rmin) + np.float32(rdelta) * np.float32(step) + np.float32(nmax)) / (top - low)
        q = _levels(x, inv, low, nmax)
        wq = weights * q
        sum_l = ordered_sum(wq)
        sum_l2 = ordered_sum(wq * q)
        wq *= x
        sum_xl = ordered_sum(wq)
        det = sum_w * sum_l2 - sum_l * sum_l
        scale: Floats = np.divide(sum_w * sum_xl - sum_x * sum_l, det)
        new_low: Floats = np.divide(sum_l2 * sum_x - sum_l * sum_xl, det)
        above = new_low > 0  # the format has no positive minimum
        np.copyto(scale, sum_xl / sum_l2, where=above)
        new_low[above] = 0
        err = error(q, scale, new_low)
        better = (det > 0) & (err < best_error)
        best_error = np.where(better, err, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_inv, best_base = np.where(better, inv, best_inv), np.where(better, low, best_base)
        low = np.where(better, new_low, low)
    best_q = _levels(x, best_inv, best_base, nmax)
    best_scale[flat] = 0
    best_q[:, flat] = 0
    return best_scale, -low, best_q


def _signed_start(x: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """The value of largest magnitude of each group, sign kept, and which groups count as zeros."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    return largest, np.abs(largest) < GROUP_MAX_EPS


def _nearest(x: Floats, inv: Floats, nmax: int) -> Floats:
    q = x * inv
    np.rint(q, out=q)
    return np.clip(q, np.float32(-nmax), np.float32(nmax - 1), out=q)


def make_qx_quants(x: Floats, nmax: int) -> tuple[Floats, Floats]:
    """Scale of ``x ≈ scale * q``, q in -nmax..nmax-1, weighted by x² (Q6_K): 19 roundings, the best by explained square.

    Args: x float32 (values, groups). Returns: scale (groups,), q as float32 (values, groups).
    """
    largest, zero = _signed_start(x)
    weighted = x * x  # C writes w*x*l and w*l*l with w = x*x
    moment = weighted * x

    def sums(q: Floats) -> tuple[Floats, Floats]:
        wq = weighted * q
        wq *= q
        return ordered_sum(moment * q), ordered_sum(wq)

    best_inv: Floats = np.float32(-nmax) / largest
    sumlx, suml2 = sums(_nearest(x, best_inv, nmax))
    best_scale = np.where(suml2 != 0, sumlx / suml2, np.float32(0))
    best = best_scale * sumlx
    for step in range(-9, 10):
        if step == 0:
            continue
        inv = -(np.float32(nmax) + np.float32(0.1) * np.float32(step)) / largest
        sumlx, suml2 = sums(_nearest(x, inv, nmax))
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        scale = sumlx / suml2
        best_inv = np.where(better, inv, best_inv)
        best_scale = np.where(better, scale, best_scale)
        best = np.where(better, scale * sumlx, best)
    best_q = _nearest(x, best_inv, nmax)
    best_scale[zero] = 0
    best_q[:, zero] = -nmax  # ggml leaves the stored number 0 there, which is -nmax
    return best_scale, best_q


def make_q3_quants(x: Floats, nmax: int) -> tuple[Floats, Floats]:
    """Scale of ``x ≈ scale * q``, q in -nmax..nmax-1, weighted by x² (Q3_K): up to five rounds of changing one q at a time.

    Args: x float32 (values, groups). Returns: scale (groups,), q as float32 (values, groups).
    """
    largest, zero = _signed_start(x)
    weighted = x * x
    moment = weighted * x
    q = _nearest(x, np.float32(-nmax) / largest, nmax)
    sumlx, suml2 = ordered_sum(moment * q), ordered_sum(weighted * q * q)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            slx = sumlx - moment[i] * q[i]
            sl2 = suml2 - weighted[i] * q[i] * q[i]
            new = np.clip(np.rint(x[i] * sl2 / slx), -nmax, nmax - 1)
            change = (slx > 0) & (new != q[i])
            slx += moment[i] * new
            sl2 += weighted[i] * new * new
            change &= (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            if change.any():
                changed = True
                np.copyto(q[i], new, where=change)
                np.copyto(sumlx, slx, where=change)
                np.copyto(suml2, sl2, where=change)
        if not changed:
            break
    scale = np.where(suml2 > 0, sumlx / suml2, np.float32(0))
    scale[zero] = 0
    q[:, zero] = -nmax
    return scale, q
