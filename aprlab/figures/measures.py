"""Figures about measurements and findings: ratios, coverage, bands, checks in a row, distances, a map of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, layer_axis, need_data, nth_colour, nth_stroke, plain, style
from aprlab.figures.live import name_states

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ratio_plot(sides: Mapping[str, Sequence[float]], ax: Axes | None = None, *, ylabel: str) -> Axes:
    """A ratio per layer, a line per side, and where it should lie: at 1.

    Args:
        sides: label -> one positive ratio a layer, the same number each.
    """
    need_data(sides)
    if len({len(values) for values in sides.values()}) != 1:
        raise UsageError(
            f"unlike numbers of layers: {', '.join(f'{k} {len(v)}' for k, v in sides.items())}", code="figures.unlike-shapes"
        )
    ax = axes_or_new(ax)
    with style():
        ax.axhline(1, color=nth_colour(7), linewidth=0.8, zorder=1)
        for n, (label, values) in enumerate(sides.items()):
            ax.plot(range(len(values)), values, label=plain(label), color=nth_colour(n), **{**nth_stroke(n), "linewidth": 1.6})
        layer_axis(ax)
        ax.set_ylabel(ylabel)
        ax.legend()
    return ax


def coverage_bars(sides: Mapping[str, Mapping[str, int]], ax: Axes | None = None, *, xlabel: str = "tensors") -> Axes:
    """How much of each side was looked at: one bar a side, its parts end to end, each with its number.

    Args:
        sides: label -> {part: count}, the parts of all sides in one order; a part of 0 is not drawn.
    """
    need_data(sides)
    parts = list(dict.fromkeys(part for side in sides.values() for part in side))
    ax = axes_or_new(ax, 9, 0.5 * len(sides) + 1.2)
    with style():
        places, start = np.arange(len(sides)), np.zeros(len(sides))
        for n, part in enumerate(parts):
            counts = np.array([side.get(part, 0) for side in sides.values()], float)
            bars = ax.barh(places, counts, 0.6, left=start, label=plain(part), color=nth_colour((2, 1, 5, 3)[n % 4]), alpha=0.75)
            ax.bar_label(bars, [f"{int(count)}" if count else "" for count in counts], label_type="center", fontsize=9)
            start += counts
        ax.set_yticks(places, [plain(side) for side in sides])
        ax.invert_yaxis()
        ax.set_xlabel(xlabel)
        ax.grid(visible=False, axis="y")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts))
    return ax


def band_plot(values: Mapping[str, float], band: tuple[float, float], ax: Axes | None = None, *, xlabel: str) -> Axes:
    """Named values as dots, and the band that a rule allows; those outside are marked and named.

    Args:
        values: name -> value.
        band: lowest and highest value that the rule takes.
    """
    need_data({"values": list(values)})
    low, high = band
    if not low < high:
        raise UsageError(f"the band ends before it begins: {low} to {high}", code="figures.band-reversed")
    ax = axes_or_new(ax, 9, 2.2)
    with style():
        ax.axvspan(low, high, color=nth_colour(2), alpha=0.15, linewidth=0, label="accepted by the rule")
        inside = [x for x in values.values() if low <= x <= high]
        outside = {name: x for name, x in values.items() if not low <= x <= high}
        ax.scatter(inside, np.zeros(len(inside)), color=nth_colour(0), marker="|", s=160, label=f"accepted: {len(inside)}")
        ax.scatter(
            list(outside.values()),
            np.zeros(len(outside)),
            color=nth_colour(1),
            marker="D",
            s=36,
            label=f"rejected: {len(outside)}",
        )
        for n, (name, x) in enumerate(sorted(outside.items(), key=lambda item: item[1])):
            up = 9 if n % 2 == 0 else -16
            ax.annotate(plain(name), (x, 0), textcoords="offset points", xytext=(0, up), ha="center", fontsize=8)
        ax.margins(x=0.08)
        ax.set_ylim(-1, 1)
        ax.set_yticks([])
        ax.set_xlabel(xlabel)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=3)
    return ax


def null_strip(
    values: Sequence[float], healthy: tuple[float, float], measured: tuple[float, float] | None, ax: Axes | None = None, *,
    xlabel: str,
) -> Axes:  # fmt: skip
    """What healthy files have of a figure, and what this one has: one dot for each of its tensors.

    Args:
        values: of this file, finite; those outside `healthy` are marked.
        healthy: lowest and highest value that a healthy file may have: the light band.
        measured: lowest and highest of the healthy files that were measured: the dark bar below; None where there were none.
        xlabel: label of the axis.
    """
    need_data({"this file": values})
    ax = axes_or_new(ax, 4.5, 1.4)
    each = np.asarray(values, float)
    low, high = healthy
    spread = np.linspace(-0.2, 0.4, len(each)) if len(each) > 1 else np.zeros(1)
    with style():
        ends = [*each, *(measured or ())]
        far = [end for end in healthy if np.isfinite(end)]
        width = max(max([*ends, *far]) - min([*ends, *far]), 1e-3)
        left = min([*ends, *far]) - 0.06 * width
        right = max([*ends, *far]) + 0.06 * width
        ax.axvspan(max(low, left), min(high, right), color=nth_colour(2), alpha=0.15, linewidth=0)
        if measured is not None:
            ax.plot(measured, (-0.4, -0.4), "o-", color=nth_colour(2), linewidth=7, markersize=7, alpha=0.6)
        inside = (each >= low) & (each <= high)
        for chosen, colour in ((inside, nth_colour(0)), (~inside, nth_colour(3))):
            ax.plot(each[chosen], spread[chosen], "o", color=colour, markersize=4, alpha=0.7)
        ax.set_xlim(left, right)
        ax.set_ylim(-0.5, 0.5)
        ax.set_yticks([])
        ax.grid(visible=False, axis="y")
        ax.set_xlabel(xlabel)
    return ax


def check_strip(holds: Sequence[bool], ax: Axes | None = None, *, cut: int | None = None, xlabel: str = "check") -> Axes:
    """Checks in a row, one cell each.

    Args:
        holds: whether each check holds.
        cut: mark how many of them were looked at.
        xlabel: label of the axis.
    """
    need_data({"checks": holds})
    if cut is not None and not 0 < cut <= len(holds):
        raise UsageError(f"a cut after {cut} of {len(holds)} checks", code="figures.cut-outside")
    ax = axes_or_new(ax, 9, 1.4)
    with style():
        colours = mpl.colors.ListedColormap([nth_colour(1), nth_colour(0)])
        ax.imshow(np.array([holds], int), cmap=colours, vmin=0, vmax=1, aspect="auto", alpha=0.7, interpolation="nearest")
        if cut is not None:
            ax.axvspan(cut - 0.5, len(holds) - 0.5, facecolor="white", alpha=0.55, linewidth=0)
            ax.axvline(cut - 0.5, color=nth_colour(7), linewidth=2)
            ax.annotate(
                f"cut after {cut}: the rest is not judged",
                (cut - 0.5, -0.5),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=9,
            )
        patches = [mpl.patches.Patch(color=nth_colour(n), alpha=0.7, label=word) for n, word in ((0, "holds"), (1, "fails"))]
        ax.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        ax.set_yticks([])
        ax.set_xlabel(xlabel)
        ax.grid(visible=False)
    return ax


def distance_bars(distances: Mapping[str, float], ax: Axes | None = None, *, xlabel: str) -> Axes:
    """One bar for each state, with its value; those larger than the first are marked.

    Args:
        distances: state -> distance; the first is the one that the others are compared with.
        xlabel: label of the axis.
    """
    need_data({"states": list(distances)})
    values = np.array(list(distances.values()), float)
    if not np.isfinite(values).all():
        raise UsageError(f"distances must be finite, got {distances}", code="figures.not-finite")
    ax = axes_or_new(ax, 9, 0.45 * len(values) + 0.9)
    with style():
        worse = values > values[0]
        colours = [nth_colour(7) if n == 0 else nth_colour(1) if bad else nth_colour(0) for n, bad in enumerate(worse)]
        bars = ax.barh(range(len(values)), values, 0.6, color=colours, alpha=0.75)
        ax.bar_label(bars, [f" {value:.2f}" for value in values], fontsize=9)
        ax.axvline(values[0], color=nth_colour(7), linewidth=0.8, linestyle=":")
        ax.set_yticks(range(len(values)), [plain(name) for name in distances])
        ax.invert_yaxis()
        ax.set_xlabel(xlabel)
        ax.set_xlim(right=1.1 * (float(values.max()) or 1.0))
        ax.grid(visible=False, axis="y")
    return ax


def layer_bars(parts: Mapping[str, Sequence[float]], ax: Axes | None = None, *, ylabel: str) -> Axes:
    """A group of bars for each layer, one for each part of a sum, on a linear axis.

    Args:
        parts: label -> a value for each layer.
        ylabel: label of the axis.

    Raises:
        UsageError: nothing to draw, or parts of unlike length.
    """
    need_data(parts)
    lengths = {len(values) for values in parts.values()}
    if len(lengths) > 1:
        raise UsageError(f"parts of {', '.join(map(str, sorted(lengths)))} layers", code="figures.unlike-layers")
    ax = axes_or_new(ax)
    width = 0.8 / len(parts)
    with style():
        for n, (label, values) in enumerate(parts.items()):
            places = np.arange(len(values)) - 0.4 + (n + 0.5) * width
            ax.bar(places, np.asarray(values, float), width, label=plain(label), color=nth_colour(n))
        layer_axis(ax)
        ax.set_ylabel(ylabel)
        ax.grid(visible=False, axis="x")
        ax.set_ylim(top=1.15 * max(float(np.max(values)) for values in parts.values()) or 1.0)  # room for the legend
        ax.legend(loc="upper left", ncols=len(parts), fontsize=8, columnspacing=1)
    return ax


def tensor_map(cells: Mapping[str, str], states: Sequence[str], ax: Axes | None = None) -> Axes:
    """All tensors of a model at one glance: a row per kind, a column per layer, the colour is the state.

    Args:
        cells: GGUF name -> one of `states`. Tensors outside the layers take the whole of a row; a kind that a layer
            lacks stays white.
        states: known states; the first is the calm one and drawn grey.
    """
    need_data({"cells": list(cells)})
    unknown = set(cells.values()) - set(states)
    if unknown:
        raise UsageError(f"unknown state {sorted(unknown)[0]!r}; known: {', '.join(states)}", code="figures.unknown-state")
    inside = {name: name.split(".", 2) for name in cells if name.startswith("blk.")}
    rows = [name for name in cells if name not in inside] + list(dict.fromkeys(kind for _, _, kind in inside.values()))
    layers = 1 + max((int(layer) for _, layer, _ in inside.values()), default=0)
    index = np.full((len(rows), layers), np.nan)
    for name, state in cells.items():
        if name in inside:
            index[rows.index(inside[name][2]), int(inside[name][1])] = states.index(state)
        else:
            index[rows.index(name), :] = states.index(state)
    ax = axes_or_new(ax, 9, 0.26 * len(rows) + 1)
    with style():
        colours = ["0.90", *(nth_colour(n) for n in (1, 0, 2, 3, 4, 5, 6)[: len(states) - 1])]
        palette = mpl.colors.ListedColormap(colours[: len(states)])
        image = np.ma.masked_invalid(index)
        ax.imshow(image, cmap=palette, vmin=-0.5, vmax=len(states) - 0.5, aspect="auto", interpolation="nearest")
        ax.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        ax.grid(visible=False)
        ax.grid(visible=True, which="minor", color="white", linewidth=1, alpha=1)
        ax.set_axisbelow(False)
        for row, name in enumerate(rows):
            if name in cells:  # outside the layers: one cell, not one for each column
                colour = colours[states.index(cells[name])]
                ax.add_patch(mpl.patches.Rectangle((-0.48, row - 0.44), layers - 0.04, 0.88, color=colour, lw=0, zorder=3))
        ax.tick_params(which="both", length=0)
        ax.set_yticks(range(len(rows)), [plain(row) for row in rows], fontsize=8)
        layer_axis(ax)
        name_states(ax, states, [row for row, name in enumerate(rows) if name in cells])
        used = [(state, colour) for state, colour in zip(states, colours, strict=False) if state in cells.values()]
        patches = [mpl.patches.Patch(color=colour, label=f"{state}: {_count(cells, state)}") for state, colour in used]
        ax.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=max(len(patches), 1), fontsize=8)
    return ax


def _count(cells: Mapping[str, str], state: str) -> int:
    return sum(word == state for word in cells.values())
