"""Figures as PNG bytes for an `Image` widget: drawn one at a time, without pyplot's global state."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aprlab.figures import style

_ONE = threading.Lock()  # matplotlib's settings are global


def png(draw: Callable[[Any], object], size: tuple[float, float] = (8, 3.4), dpi: int = 110, *, columns: int = 1) -> bytes:
    """What `draw(ax)` draws on axes of this size in inches; with several `columns`, `draw(axes)` on as many side by side."""
    with _ONE, style():
        figure = Figure(figsize=size, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure.subplots(1, columns))
        out = io.BytesIO()
        canvas.print_figure(out, format="png", dpi=dpi, bbox_inches="tight")
    return out.getvalue()


__all__ = ["png"]
