"""A figure in words: what its axes say and the range of what they draw.

nbval compares text, not pictures, and a screen reader reads text. So a figure that is shown in a notebook carries the
numbers behind it: one line for its axes, one for each kind of artist. Three digits are enough to see that a figure
shows other data, and few enough to be the same on every processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import Collection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIGITS = 3


def described(figure: Figure) -> str:
    """A figure as lines of text: size, then each axes with its title, labels and the data of its artists."""
    width, height = figure.get_size_inches() * 100
    lines = [f"figure, {width:.0f} by {height:.0f}, {len(figure.axes)} axes"]
    for number, ax in enumerate(figure.axes, 1):
        lines += [f"  {number}. {_heading(ax)}", *(f"     {line}" for line in _artists(ax))]
    for legend in figure.legends:
        lines.append("  legend: " + " | ".join(text.get_text() for text in legend.get_texts()))
    return "\n".join(lines)


def _heading(ax: Axes) -> str:
    labels = [f"{axis} {label!r}" for axis, label in (("x", ax.get_xlabel()), ("y", ax.get_ylabel())) if label]
    scales = [f"{axis} {scale}" for axis, scale in (("x", ax.get_xscale()), ("y", ax.get_yscale())) if scale != "linear"]
    return ", ".join([repr(ax.get_title() or ax.get_title("left")), *labels, *scales])


def _artists(ax: Axes) -> Iterator[str]:
    for line in ax.lines:
        x, y = np.asarray(line.get_xdata(orig=False)), np.asarray(line.get_ydata(orig=False))
        if len(x):
            yield f"line {_colour(line.get_color())}: x {measured(x)}; y {measured(y)}"
    for collection in ax.collections:
        yield from _collection(collection)
    for image in ax.images:
        array: np.ndarray = np.ma.asarray(image.get_array())
        yield f"image {' × '.join(map(str, array.shape))}: {measured(array)}"
    for colour, boxes in _by_colour(ax).items():
        yield f"{len(boxes)} patches {colour}: {measured(np.concatenate([box.ravel() for box in boxes]))}"
    texts = [text.get_text() for text in ax.texts if text.get_text()]
    legend = ax.get_legend()
    if legend is not None:
        yield "legend: " + " | ".join(text.get_text() for text in legend.get_texts())
    if texts:
        yield "text: " + " | ".join(texts)


def _collection(collection: Collection) -> Iterator[str]:
    name = type(collection).__name__
    colours = np.asarray(collection.get_facecolor())
    colour = _colour(colours[0]) if len(colours) else "none"
    if isinstance(collection, PathCollection):
        points = np.asarray(collection.get_offsets())
        yield f"{len(points)} points {colour}: x {measured(points[:, 0])}; y {measured(points[:, 1])}"
        return
    values = collection.get_array()
    if values is not None:
        yield f"{name}: {measured(values)}"
        return
    corners = [np.asarray(path.vertices) for path in collection.get_paths()]
    corners = [points for points in corners if points.size]
    if corners:
        yield f"{name} {colour}: {measured(np.concatenate(corners).ravel())}"


def _by_colour(ax: Axes) -> dict[str, list[np.ndarray]]:
    """Corners of bars, wedges and other patches, in data units, by their colour."""
    groups: dict[str, list[np.ndarray]] = {}
    for patch in ax.patches:
        corners = patch.get_patch_transform().transform(patch.get_path().vertices)
        groups.setdefault(_colour(patch.get_facecolor()), []).append(corners)
    return groups


def _colour(colour: Any) -> str:
    return "none" if isinstance(colour, str) and colour == "none" else to_hex(colour)


def measured(values: Any) -> str:
    """Number, range and mean of some values, and how many are not finite: `9 from 0 to 8, mean 4`."""
    flat = np.ma.filled(np.ma.asarray(values, dtype=np.float64), np.nan).ravel()
    finite = flat[np.isfinite(flat)]
    if not finite.size:
        return f"{flat.size}, none finite"
    lost = f", {flat.size - finite.size} not finite" if finite.size < flat.size else ""
    low, high, mean = (_digits(x) for x in (finite.min(), finite.max(), finite.mean()))
    return f"{flat.size} from {low} to {high}, mean {mean}{lost}"


def _digits(value: float) -> str:
    """Three digits; a mean that only rounding keeps from zero is zero."""
    return "0" if abs(value) < 1e-12 else f"{value:.{DIGITS}g}"


__all__ = ["described", "measured"]
