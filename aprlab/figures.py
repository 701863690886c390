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
            (line,) = ax.plot(layers, mean, label=label, color=f"C{n}", **_stroke(n))
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
            ax.plot([row["layer"] for row in rows], [row["l2"] for row in rows], label=label, color=f"C{n}", **_stroke(n))
        if diverged is not None:
            ax.axvline(diverged, color="C7", linewidth=1, linestyle=":", label=f"first difference: layer {diverged}")
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
            bars = ax.bar(places, values, width, label=label, color=f"C{n}")
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
        ax.plot(ends, ends, color="C7", linewidth=0.8, zorder=1)
        ax.scatter(a, b, s=10, color="C0", alpha=0.6, linewidths=0, rasterized=True)
        for token, text in (top or {}).items():
            ax.annotate(
                repr(text), (float(a[token]), float(b[token])), textcoords="offset points", xytext=(-4, 4), ha="right", fontsize=8
            )
        ax.set_xlabel(f"logit, {labels[0]}")
        ax.set_ylabel(f"logit, {labels[1]}")
        ax.set_aspect("equal")
    return ax


def _stroke(n: int) -> dict[str, Any]:
    """The nth line over the same points: thinner than the last, and dashed."""
    return {"linewidth": max(4.0 - 2.2 * n, 1.0), "linestyle": "-" if n == 0 else "--", "marker": "" if n == 0 else "o"}


def _layer_axis(ax: Axes) -> None:
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _some(sides: Mapping[str, Any]) -> None:
    if not sides or not all(len(side) for side in sides.values()):
        raise UsageError("nothing to draw: a figure needs at least one side, and each side some data")
