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

from matplotlib.figure import Figure

from aprlab.figures.described import described

SHARP = 2  # pixels of the picture for one of the screen
_COLOURS = 128


def picture(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """The figure as PNG, and the width and height in which it is shown."""
    from PIL import Image

    from aprlab.figures.live import cut

    figure.savefig(drawn := io.BytesIO(), format="png", dpi=SHARP * figure.dpi, bbox_inches=cut(figure), pad_inches=0)
    image = Image.open(drawn).convert("RGB")
    few = image.quantize(_COLOURS, dither=Image.Dither.NONE)
    few.save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue(), {"width": image.width // SHARP, "height": image.height // SHARP}


def show_in_cells() -> None:
    """Set the three formatters; does nothing outside IPython. Called by `style`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    from aprlab.figures.live import MIME, live_data

    formatters = shell.display_formatter.formatters
    formatters["text/plain"].for_type(Figure, lambda figure, printer, cycle: printer.text(described(figure)))
    formatters["image/png"].for_type(Figure, picture)
    if MIME not in formatters:
        formatters[MIME] = _formatter(MIME)
    formatters[MIME].for_type(Figure, live_data)


def _formatter(mime: str) -> Any:
    from IPython.core.formatters import JSONFormatter
    from traitlets import ObjectName, Unicode

    class LiveFormatter(JSONFormatter):
        format_type = Unicode(mime)
        print_method = ObjectName("_repr_aprlab_figure_")

    return LiveFormatter()


__all__ = ["SHARP", "picture", "show_in_cells"]
