"""Figures of few states: tables in colours, which gate kills which fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_ALARM = 1
_STATES = (0, 5, _ALARM, 2, 3, 4, 6, 7)  # colours of states: two that are calm, one that is not, others


def state_map(
    cells: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    states: Sequence[str],
    ax: Axes | None = None,
    *,
    alarm: str | None = None,
) -> Axes:
    """A table of few states in colours: which of `states` holds for each row and column; the word is in the cell.

    `alarm` is the state that takes the colour of alarm; without it the third one does.

    Raises:
        UsageError: nothing to draw, a row of another length, or a cell that is none of `states`.
    """
    if not cells or len(cells) != len(rows) or any(len(line) != len(columns) for line in cells):
        raise UsageError(f"nothing to draw: {len(rows)} rows of {len(columns)} cells are needed", code="figures.nothing-to-draw")
    unknown = ({cell for line in cells for cell in line} | {alarm or states[0]}) - set(states)
    if unknown:
        raise UsageError(f"unknown state {sorted(unknown)[0]!r}; known: {', '.join(states)}", code="figures.unknown-state")
    ax = axes_or_new(ax, 9, 0.32 * len(rows) + 1)
    with style():
        calm = iter(n for n in _STATES if alarm is None or n != _ALARM)
        colours = [nth_colour(_ALARM if state == alarm else next(calm)) for state in states]
        palette = mpl.colors.ListedColormap(colours)
        index = np.array([[states.index(cell) for cell in line] for line in cells])
        ax.imshow(index, cmap=palette, vmin=-0.5, vmax=len(states) - 0.5, aspect="auto", alpha=0.35, interpolation="nearest")
        for row, line in enumerate(cells):
            for column, cell in enumerate(line):
                ax.text(column, row, plain(cell), ha="center", va="center", fontsize=8)
        ax.set_xticks(range(len(columns)), [plain(column) for column in columns])
        ax.set_yticks(range(len(rows)), [plain(row) for row in rows])
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
    need_data({"faults": list(cells)})
    for fault, words in cells.items():
        if len(words) != len(gates) or not set(words) <= shades.keys():
            raise UsageError(
                f"{fault}: {len(words)} words for {len(gates)} gates, known are {', '.join(shades)}", code="figures.wrong-words"
            )
    ax = axes_or_new(ax, 0.35 * len(gates) + 3, 0.16 * len(cells) + 1.5)
    values = np.array([[shades[word] for word in words] for words in cells.values()])
    with style():
        ax.imshow(values, cmap="Reds", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
        heads = [f"{gate} ({int((column == 1).sum())})" for gate, column in zip(gates, values.T, strict=True)]
        ax.set_xticks(range(len(gates)), [plain(head) for head in heads])
        ax.tick_params(axis="x", rotation=90, labeltop=True, labelbottom=False, length=0)
        ax.set_yticks(range(len(cells)), [plain(cell) for cell in cells], fontsize=6)
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False)
        for at in np.arange(0.5, len(gates) - 1):
            ax.axvline(at, color="white", linewidth=1)
    return ax
