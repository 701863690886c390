"""Suspects ranked: how well each explains the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.patches import Patch

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ranking_bars(
    scores: Mapping[str, float],
    groups: Mapping[str, str],
    ax: Axes | None = None,
    *,
    enough: float | None = None,
    known: Sequence[str] = (),
) -> Axes:
    """A bar a suspect, the best on top, coloured by the group it belongs to.

    Args:
        scores: suspect -> score, 0 to 1, in the order in which they are drawn.
        groups: suspect -> group; the legend names them in order of appearance, those of `known` first.
        enough: a line at the score from which on something is explained.
        known: groups that have a colour even if they are empty, so that two figures agree.

    Raises:
        UsageError: nothing to draw, a suspect without a group, or more groups than colours.
    """
    need_data({"suspects": list(scores)})
    if missing := [name for name in scores if name not in groups]:
        raise UsageError(f"{missing[0]!r} belongs to no group", code="figures.no-group")
    order = list(dict.fromkeys([*known, *(groups[name] for name in scores)]))
    if len(order) > 8:
        raise UsageError(f"{len(order)} groups, but only 8 colours can be distinguished", code="figures.too-many-groups")
    ax = axes_or_new(ax, 9, 0.2 * len(scores) + 0.9)
    with style():
        colours = {group: nth_colour(n) for n, group in enumerate(order)}
        bars = ax.barh(range(len(scores)), list(scores.values()), color=[colours[groups[name]] for name in scores], height=0.75)
        ax.bar_label(bars, [f"{score:.2f}" for score in scores.values()], padding=3, fontsize=7)
        if enough is not None:
            ax.axvline(enough, color="0.3", linewidth=1, linestyle="--", zorder=0)
            ax.annotate(
                "explains", (enough, len(scores) - 0.5), xytext=(4, 3), textcoords="offset points", fontsize=8, color="0.3"
            )
        ax.set_yticks(range(len(scores)), [plain(name) for name in scores], fontsize=8)
        ax.set(xlim=(0, 1.06), ylim=(len(scores) - 0.4, -0.6))
        ax.set_xlabel("how well the fault explains the text (1: the same words in the same order)")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        present = [group for group in order if group in {groups[name] for name in scores}]
        covered = max(list(scores.values())[-1 - len(present) :])  # by a legend in the lower right corner
        where = {"loc": "lower right"} if covered < 0.7 else {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
        ax.legend(handles=[Patch(color=colours[group], label=group) for group in present], fontsize=8, **where)
    return ax
