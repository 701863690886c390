"""Figures of files: bytes by type, what tables make of a type, how the values of a tensor are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inventory_bars(sides: Mapping[str, Mapping[str, int]], ax: Axes | None = None, *, unit: str = "MiB") -> Axes:
    """Bytes (or tensors) by type, a group of bars per type, a bar per side; the values are on the bars.

    Args:
        sides: label -> {type name: bytes or count}; a type that a side lacks is a bar of zero.
        unit: ``MiB`` divides by 2**20, ``tensors`` takes the values as they are.
    """
    if unit not in ("MiB", "tensors"):
        raise UsageError(f"unknown unit {unit!r}; known: MiB, tensors", code="figures.unknown-unit")
    ax = axes_or_new(ax)
    need_data(sides)
    kinds = list(dict.fromkeys(kind for side in sides.values() for kind in side))
    scale, width = (2**20 if unit == "MiB" else 1), 0.8 / len(sides)
    with style():
        for n, (label, side) in enumerate(sides.items()):
            values = [side.get(kind, 0) / scale for kind in kinds]
            places = np.arange(len(kinds)) + (n - (len(sides) - 1) / 2) * width
            bars = ax.bar(places, values, width, label=plain(label), color=nth_colour(n))
            ax.bar_label(bars, fmt="%.3g" if unit == "MiB" else "%d", fontsize=8)
        ax.set_xticks(range(len(kinds)), [plain(kind) for kind in kinds])
        ax.set_ylabel(unit)
        ax.grid(visible=False, axis="x")
        ax.legend()
    return ax


def dtype_flow(
    ways: Mapping[str, Sequence[str]], right: Mapping[str, bool], stages: Sequence[str], ax: Axes | None = None
) -> Axes:
    """What becomes of each type on its way through several tables: a column per table, a line per type.

    Args:
        ways: name of a type -> what it is called at each of `stages`; equal words in one column are one box.
        right: name of a type -> whether it arrives as itself; the others are drawn dashed in another colour.
        stages: headings of the columns.
    """
    need_data(ways)
    if ways.keys() != right.keys() or any(len(way) != len(stages) for way in ways.values()):
        raise UsageError(f"each type needs a verdict and {len(stages)} words", code="figures.wrong-words")
    ax = axes_or_new(ax, 9, 0.42 * len(ways) + 0.8)
    boxes = [list(dict.fromkeys(way[n] for way in ways.values())) for n in range(len(stages))]

    def height(column: int, word: str, name: str = "") -> float:
        """Boxes are spread over the column in order of arrival; lines through one box run side by side."""
        middle = (boxes[column].index(word) + 0.5) / len(boxes[column])
        through = [other for other, way in ways.items() if way[column] == word]
        return middle + (min(0.012, 0.07 / len(through)) * (through.index(name) - (len(through) - 1) / 2) if name else 0)

    with style():
        for name, way in ways.items():
            heights = [height(n, word, name) for n, word in enumerate(way)]
            colour, stroke = (nth_colour(0), "-") if right[name] else (nth_colour(1), "--")
            ax.plot(range(len(stages)), heights, label=plain(name), zorder=1, color=colour, linestyle=stroke)
        for n, words in enumerate(boxes):
            for word in words:  # a box as high as its bundle of lines
                through = [height(n, word, name) for name, way in ways.items() if way[n] == word]
                wide, high = (0.012 + 0.009 * len(word)) * len(stages), 0.034 + max(through) - min(through)
                corner = n - wide / 2, height(n, word) - high / 2
                frame = mpl.patches.Rectangle(corner, wide, high, facecolor="white", edgecolor="0.4", linewidth=0.8, zorder=2)
                ax.add_patch(frame)
                ax.text(n, height(n, word), plain(word), ha="center", va="center", fontsize=9)
        ax.set_xticks(range(len(stages)), [plain(stage) for stage in stages])
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set_yticks([])
        ax.set(xlim=(-0.35, len(stages) - 0.65), ylim=(1, 0))
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
    return ax


def magnitude_histogram(sides: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Share of a tensor's values by decimal order of magnitude, a line per side; zeros, NaN and Inf are in the legend.

    Args:
        sides: label -> values, any shape. The share is of all values, so a side with many zeros has a lower line.
    """
    ax = axes_or_new(ax)
    need_data(sides)
    with np.errstate(invalid="ignore"):  # bytes that are no floats may be signalling NaNs
        flat = {label: np.asarray(values, np.float64).ravel() for label, values in sides.items()}
    logs = {label: np.log10(np.abs(x[np.isfinite(x) & (x != 0)])) for label, x in flat.items()}
    if not any(x.size for x in logs.values()):
        raise UsageError("nothing to draw: no value is finite and not zero", code="figures.nothing-to-draw")
    low = np.floor(min(x.min() for x in logs.values() if x.size))
    high = np.ceil(max(x.max() for x in logs.values() if x.size)) + 1e-9
    bins = np.linspace(low, high, max(24, 2 * round(high - low)) + 1)
    with style():
        for n, (label, x) in enumerate(flat.items()):
            share = np.histogram(logs[label], bins)[0] / x.size
            zero, bad = float(np.mean(x == 0)), float(np.mean(~np.isfinite(x)))
            text = f"{label} ({zero:.1%} zero, {bad:.2%} NaN or Inf)"
            ax.stairs(share, bins, label=plain(text), color=nth_colour(n), linewidth=1.6, fill=False)
        ax.set_yscale("log")
        ax.set_ylim(top=10)  # room for the legend above the lines
        ax.set_xlabel("order of magnitude: log10 |value|")
        ax.set_ylabel("share of values")
        ax.legend(loc="upper left")
    return ax


def quantile_plot(a: np.ndarray, b: np.ndarray, labels: tuple[str, str], ax: Axes | None = None, *, points: int = 201) -> Axes:
    """Quantiles of the finite values of both sides against each other; on the diagonal both are spread alike.

    Both axes are linear near zero and logarithmic beyond the median magnitude of `a`.

    Args:
        a, b: values, in any shape.
        labels: of the two axes.
        points: number of quantiles.
    """
    x, y = (side[np.isfinite(side)].astype(np.float64) for side in (np.asarray(a), np.asarray(b)))
    if not x.size or not y.size:
        raise UsageError("nothing to draw: a side holds no finite value", code="figures.nothing-to-draw")
    ax = axes_or_new(ax, 4.5, 4.5)
    at = np.linspace(0, 1, points)
    p, q = np.quantile(x, at), np.quantile(y, at)
    with style():
        ax.plot(p, p, color=nth_colour(7), linewidth=0.8, zorder=1)
        ax.plot(p, q, color=nth_colour(1), marker="o", linewidth=0.8)
        near = float(np.median(np.abs(x))) or 1.0
        ax.set_xscale("symlog", linthresh=near)
        ax.set_yscale("symlog", linthresh=near)
        for axis, values in ((ax.xaxis, p), (ax.yaxis, q)):
            largest = float(np.abs(values).max()) or near
            ticks = 10.0 ** np.unique(np.linspace(np.ceil(np.log10(near)), np.floor(np.log10(largest)), 3).round()[1:])
            axis.set_ticks([*-ticks[::-1], 0, *ticks])
        ax.set_xlabel(f"quantiles, {whole(labels[0])}")
        ax.set_ylabel(f"quantiles, {whole(labels[1])}")
    return ax
