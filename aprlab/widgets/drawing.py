"""Figures as PNG bytes for an `Image` widget: drawn one at a time, without pyplot's global state."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aprlab.figures import style
from aprlab.figures.core import plain

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


def value_histogram(sides: dict[str, np.ndarray], ax: Any) -> Any:
    """Histograms of some values on common bins, a line per side; the outermost bins hold everything beyond."""
    with np.errstate(all="ignore"):
        finite = {label: x[np.isfinite(x)].astype(np.float64) for label, x in sides.items()}
    first = next(iter(finite.values()))
    centre, spread = float(first.mean()) if first.size else 0.0, (float(first.std()) if first.size else 0.0) or 1.0
    ends = (centre - 5 * spread, centre + 5 * spread)
    with style():
        for n, (label, x) in enumerate(finite.items()):
            counts, edges = np.histogram(np.clip(x, *ends), 60, ends)
            bad = sides[label].size - x.size
            text = plain(f"{label} ({bad} NaN or Inf)" if bad else label)
            ax.stairs(counts, edges, label=text, color=("#0072B2", "#D55E00")[n % 2], linewidth=(2.4, 1.3)[n % 2])
        ax.set_xlabel("value (the outermost bars hold everything beyond)")
        ax.set_ylabel("count")
        ax.legend()
    return ax


__all__ = ["png", "value_histogram"]
