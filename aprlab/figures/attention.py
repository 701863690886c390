"""Where the heads look, and which channels of the stream are loud: small multiples and lines by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, layer_axis, need_data, nth_colour, plain, style
from aprlab.figures.live import name_places
from aprlab.figures.words import spelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FAINT = 1e-3  # weights below are drawn as this: the colours are logarithmic
_BROKEN, _AHEAD = "#d55e00", "0.93"
_ACROSS = 700  # pixels in which the maps are to be readable


def attention_maps(
    sides: Mapping[str, np.ndarray], heads: Sequence[int] | None = None, *, tokens: Sequence[str] = (), across: int = 4,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> list[Axes]:  # fmt: skip
    """Attention of each head, side below side: a row of a map is a query, a column is what it looks at.

    Args:
        sides: label -> weights ``(heads, T, T)``, the same shape each. What is ahead of a query is grey where it is 0; weights
            are on a logarithmic scale from 0.001 to 1, NaN and Inf are orange.
        heads: which are drawn; all of them without.
        tokens: text of the positions, for the read-out of a map; numbers without.
        across: maps in a row of the figure.
        notes: label -> a word for each of the heads drawn, above its map.

    Returns:
        The axes, side by side of the same head in one column.

    Raises:
        UsageError: nothing to draw, weights of unlike shapes, a head that there is not.
    """
    need_data(sides)
    shapes = {np.shape(weights) for weights in sides.values()}
    (first, *others) = shapes
    if others or len(first) != 3 or first[1] != first[2]:
        raise UsageError(f"attention of shapes {sorted(shapes)}; expected one (heads, T, T)", code="figures.unlike-shapes")
    chosen = list(range(first[0])) if heads is None else list(heads)
    if not chosen or any(not 0 <= head < first[0] for head in chosen):
        raise UsageError(f"heads {chosen}: the model has 0 to {first[0] - 1}", code="figures.no-such-head")
    bands = -(-len(chosen) // across)
    with style():
        figure, grid = plt.subplots(
            bands * len(sides), across, figsize=(_ACROSS / 100 + 0.6, (6.4 / across + 0.28) * bands * len(sides) + 0.3),
            squeeze=False, sharex=True, sharey=True,
        )  # fmt: skip
        drawn, image = [], None
        for band in range(bands):
            for row, (label, weights) in enumerate(sides.items()):
                for column in range(across):
                    ax, place = grid[band * len(sides) + row, column], band * across + column
                    if place >= len(chosen):
                        ax.set_axis_off()
                        continue
                    image = _map(np.asarray(weights, np.float64)[chosen[place]], tokens, ax)
                    word = (notes or {}).get(label, [""] * len(chosen))[place]
                    ax.set_title(plain(f"head {chosen[place]}{f': {word}' if word else ''}"), fontsize=8)
                    if column == 0:
                        ax.set_ylabel(plain(label), fontsize=9)
                    drawn.append(ax)
        assert image is not None
        bar = figure.colorbar(image, ax=list(grid.ravel()), label="weight of attention", shrink=0.5, aspect=30)
        bar.ax.tick_params(labelsize=8)
    return drawn


def _map(weights: np.ndarray, tokens: Sequence[str], ax: Axes) -> Any:
    """One head."""
    bad = ~np.isfinite(weights)
    ahead = (np.arange(len(weights))[None, :] > np.arange(len(weights))[:, None]) & (weights == 0)
    ax.set_facecolor(_AHEAD)
    shown = np.ma.masked_array(weights, mask=ahead | bad)
    norm = mpl.colors.LogNorm(_FAINT, 1, clip=True)
    image = ax.imshow(shown, cmap="viridis", norm=norm, interpolation="nearest", aspect="equal")
    for row, column in zip(*np.nonzero(bad), strict=True):
        ax.add_patch(mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_BROKEN, linewidth=0))
    if tokens:
        name_places(ax, [f"{n} {spelled(token)}" for n, token in enumerate(tokens)])
    step = 10 if len(weights) > 12 else 4
    ticks = list(range(0, len(weights), step))
    ax.set_xticks(ticks, [str(n) for n in ticks], fontsize=7)
    ax.set_yticks(ticks, [str(n) for n in ticks], fontsize=7)
    ax.grid(visible=False)
    return image


def channel_plot(
    peaks: np.ndarray, named: Sequence[int], ax: Axes | None = None, *, massive: float | None = None, layers: Sequence[int] = ()
) -> Axes:
    """How far the loudest channels stand out of the residual stream, by layer: a line each, the others as a band.

    Args:
        peaks: largest magnitude of each channel in each layer, in medians of the layer: ``(layers, channels)``.
        named: the channels that get a line and their number at its end.
        ax: to draw on; a new figure without.
        massive: a dotted line at so many medians.
        layers: their numbers; from 0 on without.

    Raises:
        UsageError: nothing to draw, or a channel that there is not.
    """
    peaks = np.asarray(peaks, np.float64)
    if peaks.ndim != 2 or not peaks.size or not np.isfinite(peaks).any():
        raise UsageError(f"nothing to draw: peaks of shape {peaks.shape}", code="figures.nothing-to-draw")
    if any(not 0 <= channel < peaks.shape[1] for channel in named):
        raise UsageError(f"channels {list(named)}: there are {peaks.shape[1]}", code="figures.no-such-channel")
    ax = axes_or_new(ax, 7, 3.6)
    numbers = list(layers) or list(range(len(peaks)))
    rest = np.delete(peaks, list(named), axis=1)
    with style():
        if rest.shape[1]:
            low, high = (np.nanquantile(rest, q, axis=1) for q in (0.5, 1.0))
            ax.fill_between(numbers, low, high, color="0.85", linewidth=0, label="the louder half of all others")
        for n, channel in enumerate(named):
            ax.plot(numbers, peaks[:, channel], label=f"channel {channel}", color=nth_colour(n), marker="o", markersize=3)
        if massive is not None:
            ax.axhline(massive, color=nth_colour(7), linewidth=0.8, linestyle=":", label=f"massive: {massive:g} medians")
        ax.set_yscale("log")
        layer_axis(ax)
        ax.set_ylabel("largest |value|, in medians of the layer")
        ax.legend(ncols=2, fontsize=8)
    return ax


__all__ = ["attention_maps", "channel_plot"]
