"""Which gate kills which fault, as a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, plain, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
