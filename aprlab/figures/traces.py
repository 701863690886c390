"""Figures of runs: activations per layer, logits, errors by layer, step and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, layer_axis, need_data, nth_colour, nth_stroke, plain, style, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def trace_plot(sides: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes | None = None, *, spread: bool = True) -> Axes:
    """Mean ± standard deviation of one trace point per layer, a line per side.

    Args:
        sides: label -> rows in layer order, each with ``layer`` (int), ``mean`` and ``std``. Equal sides lie on top of
            each other, so every next one is drawn thinner and dashed: both stay visible.
        spread: shade ± one standard deviation.
    """
    ax = axes_or_new(ax)
    need_data(sides)
    with style():
        for n, (label, rows) in enumerate(sides.items()):
            layers = [row["layer"] for row in rows]
            mean, std = (np.array([row[key] for row in rows], dtype=float) for key in ("mean", "std"))
            (line,) = ax.plot(layers, mean, label=plain(label), color=nth_colour(n), **nth_stroke(n))
            if spread:
                ax.fill_between(layers, mean - std, mean + std, color=line.get_color(), alpha=0.15, linewidth=0)
        layer_axis(ax)
        ax.set_ylabel("activation: mean ± std")
        ax.legend()
    return ax


def norm_plot(sides: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes | None = None, *, diverged: int | None = None) -> Axes:
    """l2 norm of one trace point per layer (log scale), a line per side.

    Args:
        sides: label -> one row per layer, with `layer` and `l2`.
        diverged: the layer to be marked.
    """
    ax = axes_or_new(ax)
    need_data(sides)
    with style():
        for n, (label, rows) in enumerate(sides.items()):
            ax.plot(
                [row["layer"] for row in rows], [row["l2"] for row in rows],
                label=plain(label), color=nth_colour(n), **nth_stroke(n),
            )  # fmt: skip
        if diverged is not None:
            ax.axvline(diverged, color=nth_colour(7), linewidth=1, linestyle=":", label=f"first difference: layer {diverged}")
        ax.set_yscale("log")
        layer_axis(ax)
        ax.set_ylabel("activation: l2 norm")
        ax.legend()
    return ax


def residual_plot(
    sides: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes | None = None, *, key: str = "mean", scale: str = "linear"
) -> Axes:
    """What an overlay hides: each side less the first one, by layer. Equal sides lie on the zero line, in the first colour's.

    Args:
        sides: label -> rows in layer order, each with `layer` and `key`; the first is the one that others are compared with.
        key: which figure of the rows: ``mean``, ``std``, ``l2``.
        scale: ``linear``, or ``relative`` to the first side's figure.

    Raises:
        UsageError: nothing to draw, sides of other layers, another scale.
    """
    if scale not in ("linear", "relative"):
        raise UsageError(f"scale {scale!r}; expected 'linear' or 'relative'", code="figures.unknown-scale")
    ax = axes_or_new(ax, 9, 1.4)
    need_data(sides)
    (_, first), *others = sides.items()
    layers, base = [row["layer"] for row in first], np.array([row[key] for row in first], dtype=float)
    with style():
        ax.axhline(0, color=nth_colour(0), linewidth=1)
        equal = True
        for n, (label, rows) in enumerate(others, 1):
            if [row["layer"] for row in rows] != layers:
                raise UsageError(f"{label}: other layers than the first side", code="figures.unlike-shapes")
            apart = np.array([row[key] for row in rows], dtype=float) - base
            equal &= not apart.any()
            values = apart / np.where(base == 0, 1, np.abs(base)) if scale == "relative" else apart
            ax.plot(layers, values, label=plain(label), color=nth_colour(n), marker="o", markersize=3)
        if equal:
            ax.set_ylim(-1, 1)
            ax.set_yticks([0])
        layer_axis(ax)
        ax.set_ylabel("difference" if scale == "linear" else "relative")
    return ax


SNR_RANGE = (-20.0, 160.0)  # dB; below float32's noise (some 150 dB) comes only equality, at the top edge
COSINE_RANGE = (-0.5, 1.0)


def agreement_plot(sides: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes | None = None, *, measure: str = "snr") -> Axes:
    """Agreement with a reference after each layer, a line per side, on a linear axis.

    Args:
        sides: label -> rows in layer order with ``layer``, ``snr`` (dB) and ``cosine``. Equal sides (snr inf) lie at the top
            edge; NaN and values below the axis are crosses at its lower edge.
        measure: ``snr`` or ``cosine``.
    """
    if measure not in ("snr", "cosine"):
        raise UsageError(f"measure {measure!r}; expected 'snr' or 'cosine'", code="figures.unknown-measure")
    ax = axes_or_new(ax)
    need_data(sides)
    low, high = SNR_RANGE if measure == "snr" else COSINE_RANGE
    with style():
        for n, (label, rows) in enumerate(sides.items()):
            layers = np.array([row["layer"] for row in rows])
            values = np.array([row[measure] for row in rows], dtype=float)
            seen = np.clip(values, low, high)
            lost = ~np.isfinite(values) & ~np.isposinf(values) | (values < low)
            ax.plot(layers, np.where(lost, np.nan, seen), label=plain(label), color=nth_colour(n), marker="o", markersize=4)
            if lost.any():
                ax.plot(layers[lost], np.full(lost.sum(), low), color=nth_colour(n), linestyle="", marker="X", markersize=7)
        ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        if measure == "snr":
            ax.set_yticks([-20, 0, 40, 80, 120, 160], ["NaN, or\nno signal", "0", "40", "80", "120", "equal"])
            ax.axhline(0, color=nth_colour(7), linewidth=0.8, linestyle=":")
            ax.set_ylabel("signal to noise, dB")
        else:
            ax.set_yticks([-0.5, 0, 0.5, 1], ["NaN, or\nopposite", "0", "0.5", "1"])
            ax.set_ylabel("cosine with the reference")
        layer_axis(ax)
        ax.legend()
    return ax


def logits_plot(
    a: np.ndarray, b: np.ndarray, labels: tuple[str, str], ax: Axes | None = None, *, top: Mapping[int, str] | None = None
) -> Axes:
    """Scatter of two logit vectors, with the diagonal.

    Args:
        a, b: logits, (vocab,).
        labels: of the two axes.
        top: token id -> text, for the tokens to be named.
    """
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise UsageError(f"expected two logit vectors of one length, got {a.shape} and {b.shape}", code="figures.unlike-shapes")
    ax = axes_or_new(ax, 4.5, 4.5)
    with style():
        ends = [min(a.min(), b.min()), max(a.max(), b.max())]
        ax.plot(ends, ends, color=nth_colour(7), linewidth=0.8, zorder=1)
        ax.scatter(a, b, s=10, color=nth_colour(0), alpha=0.6, linewidths=0, rasterized=True)
        for n, (token, text) in enumerate((top or {}).items()):  # above and below the diagonal in turn: neighbours do not collide
            side, align = ((-16, 8), "right") if n % 2 == 0 else ((16, -8), "left")
            place = float(a[token]), float(b[token])
            line = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
            ax.annotate(
                plain(repr(text)), place, textcoords="offset points", xytext=side, ha=align, va="center", fontsize=8,
                arrowprops=line,
            )  # fmt: skip
        ax.set_xlabel(f"logit, {whole(labels[0])}")
        ax.set_ylabel(f"logit, {whole(labels[1])}")
        ax.set_aspect("equal")
    return ax


def logit_residuals(a: np.ndarray, b: np.ndarray, labels: tuple[str, str], ax: Axes | None = None) -> Axes:
    """Under a scatter of logits: b less a, at a's logit. Equal logits lie on the zero line.

    Args:
        a, b: logits, (vocab,).
        labels: of both sides.
    """
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise UsageError(f"expected two logit vectors of one length, got {a.shape} and {b.shape}", code="figures.unlike-shapes")
    ax = axes_or_new(ax, 4.5, 1.6)
    with style():
        ax.axhline(0, color=nth_colour(7), linewidth=0.8, zorder=1)
        ax.scatter(a, b.astype(np.float64) - a, s=8, color=nth_colour(1), alpha=0.6, linewidths=0, rasterized=True)
        if np.array_equal(a, b):
            ax.set_ylim(-1, 1)
            ax.set_yticks([0])
        ax.set_xlabel(f"logit, {whole(labels[0])}")
        ax.set_ylabel(f"{whole(labels[1])} - {whole(labels[0])}")
    return ax


EQUAL, BROKEN = "0.93", "#D55E00"  # a heat map's cells without any error, and those with NaN or Inf


def error_map(
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str = "layer",
    label: str = "relative error (l2)",
    limits: tuple[float, float] | None = None,
    bar: bool | Sequence[Axes] = True,
) -> Axes:
    """Errors as a heat map with a logarithmic scale: layer × step of the layer, layer × position.

    The first cell that differs, in the order of the pass (row by row), has a frame.

    Args:
        values: ``(rows, columns)``, not negative. 0 (equal bit for bit) is drawn grey, NaN and Inf orange.
        rows, columns: labels of the axes; numbers are thinned out, words are all written.
        limits: ends of the colour scale, so that two maps can share one; `error_limits` of the values without. Values beyond
            take the end's colour.
        bar: whether there is a colour bar; axes that share their limits can share one, beside all of them.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(rows), len(columns)) or not values.size or (values < 0).any():
        raise UsageError(
            f"errors of shape {values.shape} for {len(rows)} rows and {len(columns)} columns; none may be negative",
            code="figures.bad-errors",
        )  # fmt: skip
    ax = axes_or_new(ax)
    limits = error_limits(values) if limits is None else limits
    colours = mpl.colormaps["viridis"].copy()  # its middle is no grey, which is for equal
    with style():
        finite = np.isfinite(values)
        inside = np.ma.masked_array(values, mask=(values == 0) | ~finite)
        ax.set_facecolor(EQUAL)
        image = ax.imshow(inside, cmap=colours, norm=mpl.colors.LogNorm(*limits), aspect="auto", interpolation="nearest")
        for row, column in zip(*np.nonzero(~finite), strict=True):
            ax.add_patch(mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=BROKEN, linewidth=0))
        for row, column in list(zip(*np.nonzero(values), strict=True))[:1]:
            frame = mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=BROKEN, linewidth=2, zorder=3)
            frame.set_clip_on(False)
            ax.add_patch(frame)
        for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
            if all(isinstance(name, str) for name in names):
                axis.set_ticks(range(len(names)), [plain(name) for name in names])
            else:
                step = -(-len(names) // 16)
                axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
        if any(isinstance(name, str) for name in columns):
            ax.tick_params(axis="x", rotation=60)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.grid(visible=False)
        if bar is not False:
            signs = [("grey: equal", (values == 0).any()), ("orange: NaN or Inf", not finite.all())]
            words = "\n".join([plain(label), *(sign for sign, seen in signs if seen)])
            ax.figure.colorbar(image, ax=ax if bar is True else list(bar), label=words)
    return ax


def error_limits(*maps: np.ndarray) -> tuple[float, float]:
    """Ends of a colour scale on which the errors of all maps can be told apart: whole decades, at least two.

    Errors of a broken run lie around 1, those of rounding around 1e-7: one fixed scale would make either all one colour.
    """
    errors = np.concatenate([np.asarray(values, np.float64).ravel() for values in maps])
    errors = errors[np.isfinite(errors) & (errors > 0)]
    if not errors.size:
        return 1e-7, 1.0
    low, high = np.floor(np.log10(errors.min())), np.ceil(np.log10(errors.max()))
    return 10.0 ** min(low, high - 2), 10.0**high
