"""The data of a figure, for a reader with a mouse: what is under the pointer, and one axes enlarged.

`live_data` gives what a few hundred lines of JavaScript (`static/live.js` of the JupyterLab extension) need to draw the
axes again on a canvas: lines, points, bars, bands, maps, words, in data units. It is data alone, no script: a notebook
that nobody has marked as trusted shows it, and who cannot show it (GitHub, print) shows the picture beside it.

Numbers are float32 in base64, rounded to four digits, so that a committed figure stays small and a line in a diff.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.collections import Collection, LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle, StepPatch
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Affine2D, Bbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERSION = 1
MARGIN = 0.1  # inches around what is drawn, as `savefig.bbox: tight` has it
MOST = 1500  # points of one scatter or line that go along; more are thinned out
CELLS = 200_000  # of a map; a larger one is a picture only


_PLACES: WeakKeyDictionary[Axes, list[str]] = WeakKeyDictionary()
_STATES: WeakKeyDictionary[Axes, tuple[list[str], list[int]]] = WeakKeyDictionary()


def name_places(ax: Axes, names: Sequence[str]) -> None:
    """What the places 0, 1, … of a map's rows and columns are called where it is read at a point: tokens, say."""
    _PLACES[ax] = [str(name) for name in names]


def places_of(ax: Axes) -> list[str]:
    """As `name_places` was told; empty where it was not."""
    return _PLACES.get(ax, [])


def name_states(ax: Axes, states: Sequence[str], whole: Sequence[int] = ()) -> None:
    """What the values 0, 1, … of a map mean, and which of its rows are one cell, read without a column."""
    _STATES[ax] = [str(state) for state in states], list(whole)


def cut(figure: Figure) -> Bbox:
    """The part of a figure that is drawn on, in inches: what its picture shows. The figure is laid out for it."""
    layout = figure.get_layout_engine()
    if layout is not None and figure.axes:
        layout.execute(figure)
    box = figure.get_tightbbox()
    return Bbox.unit() if box is None else box.padded(MARGIN)


def live_data(figure: Figure, box: Bbox | None = None) -> dict[str, Any]:
    """The figure as plain data, fit for JSON; axes that hold nothing to read (colour bars) are left out.

    `box` is the `cut` of a picture of it that was drawn just now, whose layout then holds; without one it is laid out anew.
    """
    box = cut(figure) if box is None else box
    axes = [_axes(ax, box, figure.dpi) for ax in figure.axes if ax.get_label() != "<colorbar>" and ax.axison]
    plain: dict[str, Any] = _whole({"version": VERSION, "axes": [each for each in axes if any(each[kind] for kind in _KINDS)]})
    return plain


def _whole(value: Any) -> Any:
    """The same with 1 for 1.0: a front end that saves the notebook writes no other way, and an opened one stays as it is."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


_KINDS = ("lines", "points", "bars", "bands", "maps")


def _axes(ax: Axes, box: Bbox, dpi: float) -> dict[str, Any]:
    place = ax.get_window_extent().transformed(_inches(dpi))
    corners = [
        (place.x0 - box.x0) / box.width, 1 - (place.y1 - box.y0) / box.height,
        (place.x1 - box.x0) / box.width, 1 - (place.y0 - box.y0) / box.height,
    ]  # fmt: skip
    found: dict[str, Any] = {
        "box": [round(corner, 4) for corner in corners],
        "title": words(ax.get_title() or ax.get_title("left")),
        "x": _axis(ax, "x"),
        "y": _axis(ax, "y"),
        "places": places_of(ax), "square": ax.get_aspect() in ("equal", 1) or ax.get_box_aspect() == 1,
        "lines": [_line(ax, line) for line in ax.lines if len(np.asarray(line.get_xdata(orig=False)))],
        "points": [], "bands": [], "bars": [], "maps": [],
        "words": list(_words(ax)),
    }  # fmt: skip
    for collection in ax.collections:
        _collection(ax, collection, found)
    named = {patch: bars.get_label() for bars in ax.containers for patch in bars if isinstance(patch, Patch)}
    for patch in ax.patches:
        _patch(ax, patch, str(named.get(patch, patch.get_label())), found)
    if ax in _STATES:
        found["states"], found["whole"] = _STATES[ax]
    for image in ax.images:
        if isinstance(image, AxesImage):
            found["maps"] += list(_map(image, ax))
    return found


def _inches(dpi: float) -> Affine2D:
    return Affine2D().scale(1 / dpi)


def _axis(ax: Axes, which: str) -> dict[str, Any]:
    axis = getattr(ax, f"{which}axis")
    low, high = (float(end) for end in getattr(ax, f"get_{which}lim")())
    scale = str(axis.get_scale())
    said: dict[str, Any] = {"label": words(axis.get_label().get_text()), "scale": scale, "ends": [low, high]}
    if scale == "symlog":
        said["linear"] = float(axis.get_transform().linthresh)
    if isinstance(axis.get_major_locator(), FixedLocator):
        places = [float(at) for at in axis.get_majorticklocs()]
        labels = axis.get_major_formatter().format_ticks(places)
        said["ticks"] = [[at, words(label)] for at, label in zip(places, labels, strict=True)]
    return said


def words(text: str) -> str:
    """Text as it is read: the backslash that keeps a ``$`` from beginning a formula is none of it."""
    return text.replace(r"\$", "$")


def _label(text: object) -> str:
    """A label of the legend; matplotlib's own, which begin with a line, are none."""
    return "" if str(text).startswith("_") else words(str(text))


def packed(values: Any) -> str:
    """Numbers as float32 in base64, rounded to four digits."""
    flat = np.ma.filled(np.ma.asarray(values, dtype=np.float64), np.nan).ravel()
    some = np.isfinite(flat) & (flat != 0)
    with np.errstate(over="ignore"):
        size = 10.0 ** (np.floor(np.log10(np.abs(flat[some]))) - 3)
        flat[some] = np.round(flat[some] / size) * size
        return base64.b64encode(flat.astype("<f4").tobytes()).decode()


def _thin(count: int) -> slice:
    return slice(None, None, max(1, -(-count // MOST)))


def _in_data(ax: Axes, transform: Any, points: np.ndarray) -> np.ndarray:
    """Points ``(n, 2)`` in data units, whatever an artist gives them in (a horizontal line has x in parts of the axes)."""
    points = np.asarray(np.ma.filled(np.ma.asarray(points, dtype=np.float64), np.nan))
    if transform == ax.transData:
        return points
    moved: np.ndarray = ax.transData.inverted().transform(transform.transform(points))
    return moved


def _line(ax: Axes, line: Any) -> dict[str, Any]:
    points = _in_data(ax, line.get_transform(), np.column_stack([line.get_xdata(orig=False), line.get_ydata(orig=False)]))
    points = points[_thin(len(points))]
    bare = line.get_linestyle() in ("None", "", " ")
    return {
        "x": packed(points[:, 0]), "y": packed(points[:, 1]), "colour": _colour(line.get_color()),
        "width": 0 if bare else float(line.get_linewidth()), "dashed": line.get_linestyle() in ("--", ":", "-."),
        "dots": line.get_marker() not in ("", "None", None, " "), "label": _label(line.get_label()),
    }  # fmt: skip


def _collection(ax: Axes, collection: Collection, found: dict[str, Any]) -> None:
    faces = np.asarray(collection.get_facecolor())
    colour = _colour(faces[0]) if len(faces) else "none"
    label = _label(collection.get_label())
    if isinstance(collection, PathCollection):
        points = _in_data(ax, collection.get_offset_transform(), np.asarray(collection.get_offsets()))
        some, sizes = points[_thin(len(points))], np.asarray(collection.get_sizes())
        radius = float(np.sqrt(sizes[0]) / 2) if len(sizes) else 2.0
        found["points"].append({
            "x": packed(some[:, 0]), "y": packed(some[:, 1]), "colour": colour, "radius": max(radius, 1.0),
            "of": len(points), "label": label,
        })  # fmt: skip
    elif isinstance(collection, LineCollection):
        edges = np.asarray(collection.get_edgecolor())
        for n, segment in enumerate(collection.get_segments()[:MOST]):
            points = _in_data(ax, collection.get_transform(), np.asarray(segment))
            edge = _colour(edges[n % len(edges)]) if len(edges) else "#000000"
            found["lines"].append({
                "x": packed(points[:, 0]), "y": packed(points[:, 1]), "colour": edge, "width": 1.0, "dashed": False,
                "dots": False, "label": "",
            })  # fmt: skip
    elif isinstance(collection, PolyCollection):
        for path in collection.get_paths():
            points = _in_data(ax, collection.get_transform(), np.asarray(path.vertices))
            faint = float(faces[0][3]) if len(faces) else 1.0
            found["bands"].append({
                "x": packed(points[:, 0]), "y": packed(points[:, 1]), "colour": colour, "alpha": round(faint, 2), "label": label,
            })  # fmt: skip


def _patch(ax: Axes, patch: Patch, label: str, found: dict[str, Any]) -> None:
    if isinstance(patch, StepPatch):
        points = _in_data(ax, ax.transData, np.asarray(patch.get_path().vertices))
        points = points[np.isfinite(points).all(axis=1)]
        found["lines"].append({
            "x": packed(points[:, 0]), "y": packed(points[:, 1]), "colour": _colour(patch.get_edgecolor()), "width": 1.6,
            "dashed": False, "dots": False, "label": _label(label),
        })  # fmt: skip
    elif isinstance(patch, Rectangle):
        corners = _corners(ax, patch)
        alpha = float(to_rgba(patch.get_facecolor())[3])
        filled = patch.get_fill() and alpha > 0
        if np.isfinite(corners).all():
            found["bars"].append({
                "corners": packed(corners), "filled": bool(filled), "label": _label(label),
                "colour": _colour(patch.get_facecolor() if filled else patch.get_edgecolor()),
                "alpha": round(alpha, 2) if filled else 1.0,
            })  # fmt: skip


def _corners(ax: Axes, patch: Rectangle) -> tuple[float, float, float, float]:
    """Two opposite corners, in data units."""
    ends = patch.get_path().transformed(patch.get_transform()).vertices
    (x0, y0), (x1, y1) = ax.transData.inverted().transform([np.min(ends, axis=0), np.max(ends, axis=0)])
    return float(x0), float(y0), float(x1), float(y1)


def _map(image: AxesImage, ax: Axes) -> Iterator[dict[str, Any]]:
    """An image of numbers; one of colours is part of the picture alone."""
    array: np.ma.MaskedArray = np.ma.asarray(image.get_array())
    if array.ndim != 2 or not 0 < array.size <= CELLS:
        return
    table = [to_hex(colour) for colour in image.cmap(np.linspace(0, 1, 64))]
    scaled = np.ma.filled(np.ma.asarray(image.norm(array), dtype=np.float64), np.nan)
    place = np.where(np.isfinite(scaled), np.clip(scaled, 0, 1) * 63, 255).round().astype(np.uint8)  # 255: no number
    yield {
        "rows": array.shape[0], "columns": array.shape[1], "extent": [float(end) for end in image.get_extent()],
        "values": packed(np.ma.getdata(array)), "places": base64.b64encode(place.tobytes()).decode(), "table": table,
        "alpha": float(image.get_alpha() or 1), "nothing": _colour(ax.get_facecolor()), **_scale(image, ax),
    }  # fmt: skip


def _scale(image: AxesImage, ax: Axes) -> dict[str, Any]:
    """Label and marks of a map's colour bar, its own or one that it shares: a mark is a part of the scale and a value."""
    others = [each for other in ax.figure.axes for each in other.images if isinstance(each, AxesImage)]
    norm = cast("Any", image.norm)
    low, high = float(norm.vmin), float(norm.vmax)  # set, as the figure was drawn
    for each in (image, *others):
        bar = each.colorbar
        if bar is None or (each.norm.vmin, each.norm.vmax) != (low, high) or each.cmap != image.cmap:
            continue
        ticks = [float(value) for value in bar.get_ticks()]
        ticks = [value for value in ticks if low <= value <= high or np.isclose(value, (low, high), atol=0).any()]
        label = words(bar.ax.get_ylabel() or bar.ax.get_xlabel())
        return {"bar": {"label": label, "marks": [[round(float(norm(value)), 4), value] for value in ticks]}}
    return {}


def _words(ax: Axes) -> Iterator[list[Any]]:
    for text in ax.texts:
        if text.get_text() and text.get_transform() == ax.transData:
            x, y = text.get_position()
            if np.isfinite([x, y]).all():
                yield [float(x), float(y), words(text.get_text()), _colour(text.get_color())]


def _colour(colour: Any) -> str:
    return "none" if isinstance(colour, str) and colour == "none" else to_hex(colour)


__all__ = ["VERSION", "cut", "live_data", "name_places", "name_states", "packed", "places_of"]
