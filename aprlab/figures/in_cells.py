"""How a figure is shown in a notebook: a picture for every screen, words for nbval and readers, data for the mouse.

IPython asks its formatters for every kind that a front end may show. Three are set here, for all figures:

* ``image/png``: twice as many pixels as the figure has on the screen, so that it is sharp; at most 128 colours, so that
  a notebook stays small;
* ``text/plain``: what is drawn, in words (`described`), which is what nbval compares;
* `live.MIME`: the data, which aprlab's extension of JupyterLab and the pages of `aprlab investigate` make live.
"""

from __future__ import annotations

import io
import sys
from typing import Any
from weakref import WeakKeyDictionary

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from aprlab.figures.described import described

SHARP = 2  # pixels of the picture for one of the screen
_COLOURS = 128


def picture(figure: Figure, box: Bbox | None = None) -> tuple[bytes, dict[str, int]]:
    """The figure as PNG, and the width and height in which it is shown; `box` is its `cut`, where that is known."""
    from PIL import Image

    from aprlab.figures.live import cut

    box = cut(figure) if box is None else box
    once = {"compress_level": 0}  # read again in the next line
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=SHARP * figure.dpi, bbox_inches=box, pad_inches=0, pil_kwargs=once)
    image = Image.open(drawn).convert("RGB")
    few = image.quantize(_COLOURS, dither=Image.Dither.NONE)
    few.save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue(), {"width": image.width // SHARP, "height": image.height // SHARP}


def show_in_cells() -> None:
    """Set the three formatters; does nothing outside IPython. Called by `style`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    from aprlab.figures.live import MIME

    formatters = shell.display_formatter.formatters
    formatters["text/plain"].for_type(Figure, lambda figure, printer, cycle: printer.text(described(figure)))
    formatters["image/png"].for_type(Figure, _picture_first)
    if MIME not in formatters:
        formatters[MIME] = _formatter(MIME)
    formatters[MIME].for_type(Figure, _data_then)


_SHOWN: WeakKeyDictionary[Figure, Bbox] = WeakKeyDictionary()


def _picture_first(figure: Figure) -> tuple[bytes, dict[str, int]]:
    from aprlab.figures.live import cut

    box = cut(figure)
    drawn = picture(figure, box)
    _SHOWN[figure] = box
    return drawn


def _data_then(figure: Figure) -> dict[str, Any]:
    """The data of a figure as its picture, made just before, has laid it out: to the pixel, and without a layout of their own.

    A layout depends on the resolution, and is a third of the work of both.
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
