"""How a figure is shown in a notebook: a picture for every screen, words for nbval and readers, data for the mouse.

IPython asks its formatters for every kind that a front end may show. Three are set here, for all figures:

* ``image/png``: twice as many pixels as the figure has on the screen, so that it is sharp; at most 128 colours, so that
  a notebook stays small;
* ``text/plain``: what is drawn, in words (`described`), which is what nbval compares;
* `FIGURE_DATA`: the data, which aprlab's extension of JupyterLab and the pages of `aprlab investigate` make live.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from aprlab.display.figure_data import FIGURE_DATA
from aprlab.figures.described import described

SHARP = 2  # pixels of the picture for one of the screen
_COLOURS = 128


def picture(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """The figure as PNG, and the width and height in which it is shown."""
    return _picture_and_cut(figure)[:2]


def _picture_and_cut(figure: Figure) -> tuple[bytes, dict[str, int], Bbox]:
    """`picture`, and what part of the figure it shows, in inches. The figure stays laid out as it was drawn."""
    from PIL import Image

    from aprlab.figures.live import cut

    with _laid_out_once(figure, SHARP * figure.dpi):
        box = cut(figure)
        once = {"compress_level": 0}  # it is read again in the next line
        figure.set_layout_engine(None)
        figure.savefig(drawn := io.BytesIO(), format="png", dpi=figure.dpi, bbox_inches=box, pad_inches=0, pil_kwargs=once)
    image = Image.open(drawn).convert("RGB")
    few = image.quantize(_COLOURS, dither=Image.Dither.NONE)
    few.save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue(), {"width": image.width // SHARP, "height": image.height // SHARP}, box


@contextmanager
def _laid_out_once(figure: Figure, dpi: float) -> Iterator[None]:
    """The figure at another resolution, where its layout may be taken off: `savefig` would do it again, a fourth of a picture."""
    was, layout = figure.dpi, figure.get_layout_engine()
    figure.dpi = dpi
    try:
        with mpl.rc_context({"figure.constrained_layout.use": False, "figure.autolayout": False}):  # what None means
            yield
    finally:
        figure.dpi = was
        figure.set_layout_engine(layout if layout is not None else "none")


def show_in_cells() -> None:
    """Set the three formatters; does nothing outside IPython. Called by `style`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    formatters["text/plain"].for_type(Figure, lambda figure, printer, cycle: printer.text(described(figure)))
    formatters["image/png"].for_type(Figure, _picture_first)
    if FIGURE_DATA not in formatters:
        formatters[FIGURE_DATA] = _formatter(FIGURE_DATA)
    formatters[FIGURE_DATA].for_type(Figure, _data_then)


_SHOWN: WeakKeyDictionary[Figure, Bbox] = WeakKeyDictionary()


def _picture_first(figure: Figure) -> tuple[bytes, dict[str, int]]:
    png, size, _SHOWN[figure] = _picture_and_cut(figure)
    return png, size


def _data_then(figure: Figure) -> dict[str, Any]:
    """The data of a figure as its picture, made just before, has laid it out: to the pixel, and without a layout of their own.

    A layout depends on the resolution, and costs as much as the drawing.
    """
    from aprlab.figures.live import live_data

    return live_data(figure, _SHOWN.pop(figure, None))  # None: of a front end that wants no picture


def _formatter(mime: str) -> Any:
    from IPython.core.formatters import JSONFormatter
    from traitlets import ObjectName, Unicode

    class LiveFormatter(JSONFormatter):
        format_type = Unicode(mime)
        print_method = ObjectName("_repr_aprlab_figure_")

    return LiveFormatter()


__all__ = ["SHARP", "picture", "show_in_cells"]
