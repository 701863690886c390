"""Figures: data in, axes out. Nothing here opens a file, runs a model or decides what is right.

Each function takes an `ax` to draw on (its own figure without one) and returns it, so that tests look at the artists.
`style()` is the one look of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from aprlab.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = Path(__file__).with_name("aprlab.mplstyle")


@contextmanager
def style() -> Iterator[None]:
    """The house style, for a `with` block."""
    with mpl.style.context(STYLE):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # switched on by a backend at its first figure; undone, all later figures would stay unseen


def _axes(ax: Axes | None, width: float = 9, height: float = 4) -> Axes:
    if ax is not None:
        return ax
    with style():
        return plt.subplots(figsize=(width, height))[1]


def trace_plot(sides: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes | None = None, *, spread: bool = True) -> Axes:
    """Mean ± standard deviation of one trace point per layer, a line per side.

    Args:
        sides: label -> rows in layer order, each with ``layer`` (int), ``mean`` and ``std``. Equal sides lie on top of
            each other, so every next one is drawn thinner and dashed: both stay visible.
        spread: shade ± one standard deviation.
    """
    ax = _axes(ax)
    _some(sides)
    with style():
        for n, (label, rows) in enumerate(sides.items()):
            layers = [row["layer"] for row in rows]
            mean, std = (np.array([row[key] for row in rows], dtype=float) for key in ("mean", "std"))
            (line,) = ax.plot(layers, mean, label=label, color=_colour(n), **_stroke(n))
            if spread:
                ax.fill_between(layers, mean - std, mean + std, color=line.get_color(), alpha=0.15, linewidth=0)
        _layer_axis(ax)
        ax.set_ylabel("activation: mean ± std")
        ax.legend()
    return ax


def norm_plot(sides: Mapping[str, Sequence[Mapping[str, Any]]], ax: Axes | None = None, *, diverged: int | None = None) -> Axes:
    """l2 norm of one trace point per layer (log scale), a line per side; `diverged` marks a layer."""
    ax = _axes(ax)
    _some(sides)
    with style():
        for n, (label, rows) in enumerate(sides.items()):
            ax.plot([row["layer"] for row in rows], [row["l2"] for row in rows], label=label, color=_colour(n), **_stroke(n))
        if diverged is not None:
            ax.axvline(diverged, color=_colour(7), linewidth=1, linestyle=":", label=f"first difference: layer {diverged}")
        ax.set_yscale("log")
        _layer_axis(ax)
        ax.set_ylabel("activation: l2 norm")
        ax.legend()
    return ax


def inventory_bars(sides: Mapping[str, Mapping[str, int]], ax: Axes | None = None, *, unit: str = "MiB") -> Axes:
    """Bytes (or tensors) by type, a group of bars per type, a bar per side; the values stand on the bars.

    Args:
        sides: label -> {type name: bytes or count}; a type that a side lacks is a bar of zero.
        unit: ``MiB`` divides by 2**20, ``tensors`` takes the values as they are.
    """
    if unit not in ("MiB", "tensors"):
        raise UsageError(f"unknown unit {unit!r}; known: MiB, tensors")
    ax = _axes(ax)
    _some(sides)
    kinds = list(dict.fromkeys(kind for side in sides.values() for kind in side))
    scale, width = (2**20 if unit == "MiB" else 1), 0.8 / len(sides)
    with style():
        for n, (label, side) in enumerate(sides.items()):
            values = [side.get(kind, 0) / scale for kind in kinds]
            places = np.arange(len(kinds)) + (n - (len(sides) - 1) / 2) * width
            bars = ax.bar(places, values, width, label=label, color=_colour(n))
            ax.bar_label(bars, fmt="%.3g" if unit == "MiB" else "%d", fontsize=8)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_ylabel(unit)
        ax.grid(visible=False, axis="x")
        ax.legend()
    return ax


def logits_plot(
    a: np.ndarray, b: np.ndarray, labels: tuple[str, str], ax: Axes | None = None, *, top: Mapping[int, str] | None = None
) -> Axes:
    """Scatter of two logit vectors (vocab,), the diagonal behind; `top` names some tokens: id -> text."""
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise UsageError(f"two logit vectors of one length are wanted, got {a.shape} and {b.shape}")
    ax = _axes(ax, 4.5, 4.5)
    with style():
        ends = [min(a.min(), b.min()), max(a.max(), b.max())]
        ax.plot(ends, ends, color=_colour(7), linewidth=0.8, zorder=1)
        ax.scatter(a, b, s=10, color=_colour(0), alpha=0.6, linewidths=0, rasterized=True)
        for token, text in (top or {}).items():
            ax.annotate(
                repr(text), (float(a[token]), float(b[token])), textcoords="offset points", xytext=(-4, 4), ha="right", fontsize=8
            )
        ax.set_xlabel(f"logit, {labels[0]}")
        ax.set_ylabel(f"logit, {labels[1]}")
        ax.set_aspect("equal")
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
    _some(ways)
    if ways.keys() != right.keys() or any(len(way) != len(stages) for way in ways.values()):
        raise UsageError(f"a verdict and {len(stages)} words are wanted for each type")
    ax = _axes(ax, 9, 0.42 * len(ways) + 0.8)
    boxes = [list(dict.fromkeys(way[n] for way in ways.values())) for n in range(len(stages))]

    def height(column: int, word: str, name: str = "") -> float:
        """Boxes are spread over the column in order of arrival; lines through one box run side by side."""
        middle = (boxes[column].index(word) + 0.5) / len(boxes[column])
        through = [other for other, way in ways.items() if way[column] == word]
        return middle + (min(0.012, 0.07 / len(through)) * (through.index(name) - (len(through) - 1) / 2) if name else 0)

    with style():
        for name, way in ways.items():
            heights = [height(n, word, name) for n, word in enumerate(way)]
            colour, stroke = (_colour(0), "-") if right[name] else (_colour(1), "--")
            ax.plot(range(len(stages)), heights, label=name, zorder=1, color=colour, linestyle=stroke)
        for n, words in enumerate(boxes):
            for word in words:
                frame = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "0.4", "linewidth": 0.8}
                ax.text(n, height(n, word), word, ha="center", va="center", fontsize=9, bbox=frame)
        ax.set_xticks(range(len(stages)), stages)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set_yticks([])
        ax.set(xlim=(-0.35, len(stages) - 0.65), ylim=(1, 0))
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
    return ax


def magnitude_histogram(sides: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Share of a tensor's values by decimal order of magnitude, a line per side; zeros, NaN and Inf stand in the legend.

    Args:
        sides: label -> values, any shape. The share is of all values, so a side with many zeros has a lower line.
    """
    ax = _axes(ax)
    _some(sides)
    with np.errstate(invalid="ignore"):  # bytes that are no floats may be signalling NaNs
        flat = {label: np.asarray(values, np.float64).ravel() for label, values in sides.items()}
    logs = {label: np.log10(np.abs(x[np.isfinite(x) & (x != 0)])) for label, x in flat.items()}
    if not any(x.size for x in logs.values()):
        raise UsageError("nothing to draw: no value is finite and not zero")
    low = np.floor(min(x.min() for x in logs.values() if x.size))
    high = np.ceil(max(x.max() for x in logs.values() if x.size)) + 1e-9
    bins = np.linspace(low, high, max(24, 2 * round(high - low)) + 1)
    with style():
        for n, (label, x) in enumerate(flat.items()):
            share = np.histogram(logs[label], bins)[0] / x.size
            zero, bad = float(np.mean(x == 0)), float(np.mean(~np.isfinite(x)))
            text = f"{label} ({zero:.1%} zero, {bad:.2%} NaN or Inf)"
            ax.stairs(share, bins, label=text, color=_colour(n), linewidth=1.6, fill=False)
        ax.set_yscale("log")
        ax.set_ylim(top=10)  # room for the legend above the lines
        ax.set_xlabel("order of magnitude: log10 |value|")
        ax.set_ylabel("share of the values")
        ax.legend(loc="upper left")
    return ax


def quantile_plot(a: np.ndarray, b: np.ndarray, labels: tuple[str, str], ax: Axes | None = None, *, points: int = 201) -> Axes:
    """Quantiles of the finite values of both sides against each other; on the diagonal both are spread alike.

    Both axes are linear near zero and logarithmic beyond the median magnitude of `a`.
    """
    x, y = (side[np.isfinite(side)].astype(np.float64) for side in (np.asarray(a), np.asarray(b)))
    if not x.size or not y.size:
        raise UsageError("nothing to draw: a side holds no finite value")
    ax = _axes(ax, 4.5, 4.5)
    at = np.linspace(0, 1, points)
    p, q = np.quantile(x, at), np.quantile(y, at)
    with style():
        ax.plot(p, p, color=_colour(7), linewidth=0.8, zorder=1)
        ax.plot(p, q, color=_colour(1), marker="o", linewidth=0.8)
        near = float(np.median(np.abs(x))) or 1.0
        ax.set_xscale("symlog", linthresh=near)
        ax.set_yscale("symlog", linthresh=near)
        for axis, values in ((ax.xaxis, p), (ax.yaxis, q)):
            largest = float(np.abs(values).max()) or near
            ticks = 10.0 ** np.unique(np.linspace(np.ceil(np.log10(near)), np.floor(np.log10(largest)), 3).round()[1:])
            axis.set_ticks([*-ticks[::-1], 0, *ticks])
        ax.set_xlabel(f"quantiles, {labels[0]}")
        ax.set_ylabel(f"quantiles, {labels[1]}")
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
    limits: tuple[float, float] = (1e-7, 1.0),
) -> Axes:
    """Errors as a heat map with a logarithmic scale: layer × step of the layer, layer × position.

    Args:
        values: ``(rows, columns)``, not negative. 0 (equal bit for bit) is drawn grey, NaN and Inf orange.
        rows, columns: what stands on the axes; numbers are thinned out, words are all written.
        limits: ends of the colour scale, so that two maps can share one; what lies beyond takes the end's colour.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(rows), len(columns)) or not values.size or (values < 0).any():
        raise UsageError(f"errors of shape {values.shape} for {len(rows)} rows and {len(columns)} columns; none may be negative")
    ax = _axes(ax)
    colours = mpl.colormaps["cividis"].copy()
    with style():
        finite = np.isfinite(values)
        inside = np.ma.masked_array(np.clip(values, *limits), mask=(values == 0) | ~finite)
        ax.set_facecolor(EQUAL)
        image = ax.imshow(inside, cmap=colours, norm=mpl.colors.LogNorm(*limits), aspect="auto", interpolation="nearest")
        for row, column in zip(*np.nonzero(~finite), strict=True):
            ax.add_patch(mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=BROKEN, linewidth=0))
        for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
            if all(isinstance(name, str) for name in names):
                axis.set_ticks(range(len(names)), names)
            else:
                step = -(-len(names) // 16)
                axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
        if any(isinstance(name, str) for name in columns):
            ax.tick_params(axis="x", rotation=60)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.grid(visible=False)
        ax.figure.colorbar(image, ax=ax, label=label)
    return ax


_STATES = (0, 5, 1, 2, 3, 4, 6, 7)  # colours of states: two that are calm, one that is not, others


def state_map(
    cells: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str], states: Sequence[str], ax: Axes | None = None
) -> Axes:
    """A table of few states in colours: which of `states` holds for each row and column; the word stands in the cell.

    Raises:
        UsageError: nothing to draw, a row of another length, or a cell that is none of `states`.
    """
    if not cells or len(cells) != len(rows) or any(len(line) != len(columns) for line in cells):
        raise UsageError(f"nothing to draw: {len(rows)} rows of {len(columns)} cells are wanted")
    unknown = {cell for line in cells for cell in line} - set(states)
    if unknown:
        raise UsageError(f"unknown state {sorted(unknown)[0]!r}; known: {', '.join(states)}")
    ax = _axes(ax, 9, 0.32 * len(rows) + 1)
    with style():
        palette = mpl.colors.ListedColormap([_colour(n) for n in _STATES[: len(states)]])
        index = np.array([[states.index(cell) for cell in line] for line in cells])
        ax.imshow(index, cmap=palette, vmin=-0.5, vmax=len(states) - 0.5, aspect="auto", alpha=0.35, interpolation="nearest")
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                ax.text(column, row, cell, ha="center", va="center", fontsize=8)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.tick_params(length=0)
        ax.grid(visible=False)
    return ax


def kill_plot(cells: Mapping[str, Sequence[str]], gates: Sequence[str], ax: Axes | None = None) -> Axes:
    """Which gate kills which fault: a row per fault, a column per gate.

    Args:
        cells: fault -> one word a gate: ``kill`` (filled), ``refused`` (half-tone: could not look), ``void``
            (half-tone), ``pass`` (empty). Anything else raises UsageError.
        gates: names of the columns.
    """
    shades = {"pass": 0.0, "void": 0.25, "refused": 0.25, "kill": 1.0}
    _some({"faults": list(cells)})
    for fault, words in cells.items():
        if len(words) != len(gates) or not set(words) <= shades.keys():
            raise UsageError(f"{fault}: {len(words)} words for {len(gates)} gates, known are {', '.join(shades)}")
    ax = _axes(ax, 0.35 * len(gates) + 3, 0.16 * len(cells) + 1.5)
    values = np.array([[shades[word] for word in words] for words in cells.values()])
    with style():
        ax.imshow(values, cmap="Reds", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
        heads = [f"{gate} ({int((column == 1).sum())})" for gate, column in zip(gates, values.T, strict=True)]
        ax.set_xticks(range(len(gates)), heads)
        ax.tick_params(axis="x", rotation=90, labeltop=True, labelbottom=False, length=0)
        ax.set_yticks(range(len(cells)), list(cells), fontsize=6)
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False)
        for at in np.arange(0.5, len(gates) - 1):
            ax.axvline(at, color="white", linewidth=1)
    return ax


def _colour(n: int) -> str:
    """The nth colour of the style now: a figure drawn later, outside `style()`, would resolve ``Cn`` by another one."""
    return mpl.colors.to_hex(f"C{n}")


def _stroke(n: int) -> dict[str, Any]:
    """The nth line over the same points: thinner than the last, and dashed."""
    return {"linewidth": max(4.0 - 2.2 * n, 1.0), "linestyle": "-" if n == 0 else "--", "marker": "" if n == 0 else "o"}


def _layer_axis(ax: Axes) -> None:
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _some(sides: Mapping[str, Any]) -> None:
    if not sides or not all(len(side) for side in sides.values()):
        raise UsageError("nothing to draw: a figure needs at least one side, and each side some data")
