"""Figures of quantised blocks: their bits, the values made of them, wrong values against right ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator

from aprlab.errors import UsageError
from aprlab.figures.core import axes_or_new, need_data, nth_colour, plain, style, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIELDS = (1, 4, 2, 0, 3, 5)  # colours of fields, in their order: small ones in those that stand out
_PALE = 0.80  # how far towards white a bit that is 0 goes
_ROOM = 0.75  # of a row of bits, for what is below it


def block_microscope(
    block: np.ndarray,
    layout: np.dtype[np.void],
    ax: Axes | None = None,
    *,
    width: int = 16,
    marks: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> Axes:
    """The bytes of one block as bits, coloured by field; each byte's hexadecimal number is below it.

    Args:
        block: uint8 ``(bytes,)``. The bits of a byte are drawn as they are written, highest first; 1 is dark, 0 pale.
        layout: the block as a structured dtype: field names, offsets and sizes.
        width: bytes a row.
        marks: label -> (byte, bit) pairs to be framed, bit 0 the lowest: the bits that make one number.

    Raises:
        UsageError: a block of another size than its layout, or a mark outside of it.
    """
    if block.dtype != np.uint8 or block.shape != (layout.itemsize,) or layout.fields is None:
        raise UsageError(
            f"expected a block of {layout.itemsize} bytes with named fields, got {block.dtype} {block.shape}",
            code="figures.not-a-block",
        )  # fmt: skip
    for label, places in (marks or {}).items():
        if not all(0 <= byte < len(block) and 0 <= bit < 8 for byte, bit in places):
            raise UsageError(f"{label}: a marked bit lies outside of the block", code="figures.mark-outside")
    rows = -(-len(block) // width)
    ax = axes_or_new(ax, 9, 0.3 * rows + 1)
    with style():
        colours = [nth_colour(_FIELDS[n % len(_FIELDS)]) for n in range(len(layout.fields))]
        names = sorted(layout.fields, key=lambda name: layout.fields[name][1])  # type: ignore[index]
        spans = [(layout.fields[name][1], layout.fields[name][0].itemsize) for name in names]
        painted = _painted(block, spans, colours, rows * width)
        for row, line in enumerate(painted.reshape(rows, width * 8, 3)):
            top = row * (1 + _ROOM)
            ax.imshow(line[None], extent=(0, width * 8, top + 1, top), aspect="auto", interpolation="nearest")
        for byte, value in enumerate(block):
            at = (byte % width * 8, byte // width * (1 + _ROOM))
            ax.text(at[0] + 4, at[1] + 1.06, f"{value:02x}", ha="center", va="top", fontsize=7, family="monospace", color="0.35")
        for edge in range(1, width * 8):
            ax.axvline(edge, color="white", linewidth=2.4 if edge % 8 == 0 else 1.0 if edge % 8 == 4 else 0.4)
        handles = [
            Patch(color=colour, label=f"{name} ({_bytes(layout.fields[name][0].itemsize)})")
            for name, colour in zip(names, colours, strict=True)
        ]
        handles += _framed(ax, marks or {}, width)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.01), "ncols": len(handles)}
        ax.legend(handles=handles, fontsize=8, handlelength=1.4, columnspacing=1.4, **below)
        ax.set_yticks([row * (1 + _ROOM) + 0.5 for row in range(rows)], [f"{row * width}" for row in range(rows)])
        ax.set_ylabel("byte")
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.set(xlim=(-0.5, width * 8 + 0.5), ylim=(rows * (1 + _ROOM), -0.2))
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
    return ax


def _painted(block: np.ndarray, spans: Sequence[tuple[int, int]], colours: Sequence[str], size: int) -> np.ndarray:
    """Colours of `size` bytes' bits, ``(size, 8, 3)``: those of each span (start, bytes) in its colour, dark where 1."""
    painted = np.ones((size, 8, 3))
    for (start, nbytes), colour in zip(spans, colours, strict=True):
        bits = np.unpackbits(block[start : start + nbytes]).reshape(-1, 8, 1)
        dark = np.array(mpl.colors.to_rgb(colour))
        painted[start : start + nbytes] = np.where(bits == 1, dark, 1 - (1 - dark) * (1 - _PALE))
    return painted


def _framed(ax: Axes, marks: Mapping[str, Sequence[tuple[int, int]]], width: int) -> list[Patch]:
    """Frames round the marked bits; neighbours in a byte share one. Returns what the legend shows."""
    shown: list[Patch] = []
    for n, (label, places) in enumerate(marks.items()):
        frame: dict[str, Any] = {
            "fill": False,
            "edgecolor": "black",
            "linewidth": 1.6,
            "linestyle": ("-", "--", ":", "-.")[n % 4],
        }
        runs: list[list[int]] = []  # byte, highest bit, lowest bit
        for byte, bit in sorted(places, key=lambda place: (place[0], -place[1])):
            if runs and runs[-1][0] == byte and runs[-1][2] == bit + 1:
                runs[-1][2] = bit
            else:
                runs.append([byte, bit, bit])
        for byte, high, low in runs:
            corner = (byte % width * 8 + 7 - high, byte // width * (1 + _ROOM) - 0.08)
            ax.add_patch(Rectangle(corner, high - low + 1, 1.16, zorder=3, **frame))
        shown.append(Patch(label=plain(label), **frame))
    return shown


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


def block_values(sides: Mapping[str, np.ndarray], ax: Axes | None = None, *, group: int = 32) -> Axes:
    """The values of one block by their place in it, a line per side, with a thin line where a group of `group` begins.

    Args:
        sides: label -> values, ``(n,)``, all of one length; what is not finite leaves a gap.
    """
    need_data(sides)
    if len({values.shape for values in sides.values()}) != 1 or next(iter(sides.values())).ndim != 1:
        raise UsageError(
            f"expected values of the same length, got {', '.join(str(v.shape) for v in sides.values())}",
            code="figures.unlike-shapes",
        )  # fmt: skip
    ax = axes_or_new(ax, 9, 3)
    count = len(next(iter(sides.values())))
    with style():
        for n, (label, values) in enumerate(sides.items()):
            drawn = np.where(np.isfinite(values), values, np.nan)
            ax.plot(range(count), drawn, label=plain(label), color=nth_colour(n), linewidth=2.2 - 0.9 * min(n, 1), alpha=0.9)
        for edge in range(group, count, group):
            ax.axvline(edge - 0.5, color="0.6", linewidth=0.7, zorder=0)
        ax.set_xticks(range(0, count + 1, group))
        ax.set_xlim(-1, count)
        ax.grid(visible=False, axis="x")
        ax.set_xlabel(f"position in the block (a group has {group} values)")
        ax.set_ylabel("value")
        ax.legend(loc="upper right", ncols=len(sides), bbox_to_anchor=(1, 1.13))
    return ax


def _reach(values: np.ndarray) -> float:
    """Half the width of an axis: the largest magnitude and some room, or, where few lie far out, that of all others."""
    size = np.abs(values)
    most = float(np.quantile(size, 0.995))
    return 1.1 * (float(size.max()) if size.max() <= 4 * most else 1.5 * most) or 1.0


def value_scatter(
    truth: np.ndarray,
    seen: np.ndarray,
    labels: tuple[str, str],
    ax: Axes | None = None,
    *,
    note: str = "",
    points: int = 3000,
) -> Axes:
    """Decoded values against the right ones: on the diagonal they are equal. What is not finite is left out.

    Both axes have the same limits, but where `seen` is more than twenty times as large.
    Few far outliers, as real weights have them, stay outside of the axes, which say how many; else all would be one dot.

    Args:
        truth, seen: values of one shape, at equal places.
        labels: of the axes, for `truth` and `seen`.
        note: small words above the axes.
        points: about so many are drawn, evenly spread over the places.
    """
    if truth.shape != seen.shape or not truth.size:
        raise UsageError(f"expected two arrays of one shape, got {truth.shape} and {seen.shape}", code="figures.unlike-shapes")
    ax = axes_or_new(ax, 3.4, 3.6)
    with np.errstate(invalid="ignore"):  # wrongly decoded values may be signalling NaNs
        x, y = (np.asarray(side, np.float64).reshape(-1) for side in (truth, seen))
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    # an odd step shares no factor with the powers of two of which rows and blocks are made
    chosen = finite[:: -(-finite.size // points) | 1] if finite.size > points else finite
    with style():
        ends = [float(x[finite].min()), float(x[finite].max())] if finite.size else [0.0, 0.0]
        ax.plot(ends, ends, color=nth_colour(7), linewidth=0.8, zorder=3)
        colour = nth_colour(0 if np.array_equal(x, y, equal_nan=True) else 1)
        ax.scatter(x[chosen], y[chosen], s=4, color=colour, alpha=0.35, linewidths=0, rasterized=True)
        if chosen.size:
            span, reach = (_reach(side[chosen]) for side in (x, y))
            if reach <= 20 * span:  # one scale for both, so that the diagonal is one; beyond that all would lie on a line
                span = reach = max(span, reach)
            outside = (np.abs(x[chosen]) > span) | (np.abs(y[chosen]) > reach)
            ax.set(xlim=(-span, span), ylim=(-reach, reach))
            if reach > 20 * span:
                ax.set_yscale("symlog", linthresh=span)
                ax.yaxis.set_minor_locator(NullLocator())
            if outside.any():
                corner: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "0.3"}
                ax.text(0.99, 0.01, f"{outside.sum()} points beyond", transform=ax.transAxes, **corner)
        above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": "0.3"}
        ax.annotate(plain(note), (0.5, 1), xycoords="axes fraction", **above)
        ax.set_xlabel(whole(labels[0]))
        ax.set_ylabel(whole(labels[1]))
        if ax.get_xscale() == "linear":
            ax.locator_params(axis="x", nbins=4)
        ax.set_box_aspect(1)
    return ax
