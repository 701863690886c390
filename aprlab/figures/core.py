"""What all figures share: the style, the axes to draw on, colours that last, strokes that do not hide each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from aprlab.errors import UsageError
from aprlab.figures.in_cells import show_in_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = Path(__file__).with_name("aprlab.mplstyle")


@contextmanager
def style() -> Iterator[None]:
    """The house style, for a `with` block; in a notebook, figures are also put into words and data (`in_cells`)."""
    with mpl.style.context(STYLE):
        yield
        interactive = mpl.is_interactive()
    show_in_cells()  # now, because a backend that is loaded at its first figure sets formatters of its own
    mpl.interactive(interactive)  # switched on by a backend at its first figure; undone, all later figures would stay unseen


def axes_or_new(ax: Axes | None, width: float = 9, height: float = 4) -> Axes:
    """The axes to draw on. Their title and labels are words, never formulas: names from a file may hold ``$``."""
    if ax is None:
        with style():
            ax = plt.subplots(figsize=(width, height))[1]
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_parse_math(False)
    return ax


def plain(text: object) -> str:
    """Words that may come from a file, for a legend, a tick or a note: ``$`` begins no formula.

    Ticks and legends are made again at every drawing, so that the text itself has to say so; matplotlib drops the backslash.
    """
    return whole(text).replace("$", r"\$")


def whole(text: object) -> str:
    """Text without half characters (from a file name that is no UTF-8), which no font can draw."""
    return str(text).encode("utf-8", "replace").decode()


def nth_colour(n: int) -> str:
    """The nth colour of the style now: a figure drawn later, outside `style()`, would resolve ``Cn`` by another one."""
    return mpl.colors.to_hex(f"C{n}")


def nth_stroke(n: int) -> dict[str, Any]:
    """The nth line over the same points: thinner than the last, and dashed."""
    return {"linewidth": max(4.0 - 2.2 * n, 1.0), "linestyle": "-" if n == 0 else "--", "marker": "" if n == 0 else "o"}


def layer_axis(ax: Axes) -> None:
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def need_data(sides: Mapping[str, Any]) -> None:
    if not sides or not all(len(side) for side in sides.values()):
        raise UsageError(
            "nothing to draw: a figure needs at least one side, and each side some data", code="figures.nothing-to-draw"
        )
