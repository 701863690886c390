"""Figures of a qualification: what each area contributes, and how much a number of scenarios can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def area_bars(sides: Mapping[str, Mapping[str, float | None]], ax: Axes | None = None) -> Axes:
    """Share of what an area can give, a group of bars per area, a bar per side; an area without rows says so.

    Args:
        sides: label -> area -> share in 0..1, or None where nothing was run.
    """
    ax = axes_or_new(ax)
    need_data(sides)
    areas = list(dict.fromkeys(area for side in sides.values() for area in side))
    width = 0.8 / len(sides)
    with style():
        for n, (label, side) in enumerate(sides.items()):
            shares = [side.get(area) for area in areas]
            if any(share is not None and not 0 <= share <= 1 for share in shares):
                raise UsageError(f"shares lie in 0..1, {label} has {shares}", code="figures.share-out-of-range")
            places = np.arange(len(areas)) + (n - (len(sides) - 1) / 2) * width
            bars = ax.bar(places, [100 * (share or 0) for share in shares], width, label=plain(label), color=nth_colour(n))
            for bar, share in zip(bars, shares, strict=True):
                words = "no rows" if share is None else f"{100 * share:.0f}"
                ax.annotate(
                    words, (bar.get_x() + width / 2, bar.get_height()), textcoords="offset points", xytext=(0, 2), ha="center",
                    va="bottom", fontsize=8, rotation=90 if share is None else 0,
                )  # fmt: skip
        ax.set_xticks(range(len(areas)), [plain(area) for area in areas])
        ax.set_ylim(0, 112)
        ax.set_ylabel("% of the area's maximum")
        ax.grid(visible=False, axis="x")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(sides), frameon=False)
    return ax


def interval_plot(
    rows: Mapping[int, tuple[float, float, float]], ax: Axes | None = None, *, floor: float | None = None, label: str = "score"
) -> Axes:
    """A score with its interval against the number of scenarios behind it.

    Args:
        rows: number -> (score, low, high) in percent.
        floor: what the lower end has to reach.
    """
    ax = axes_or_new(ax, height=3.4)
    need_data({label: rows})
    counts = sorted(rows)
    score, low, high = (np.array([rows[n][k] for n in counts]) for k in range(3))
    with style():
        ax.errorbar(counts, score, yerr=[score - low, high - score], fmt="o", capsize=4, color=nth_colour(0), label=plain(label))
        if floor is not None:
            ax.axhline(floor, color=nth_colour(1), linestyle="--", linewidth=1, label="lower end required for release")
        ax.set_xlabel("scenarios run")
        ax.set_ylabel("%, with 95 % interval")
        ax.set_ylim(min(0.0, float(low.min())), 105)
        ax.legend(loc="lower right")
    return ax
