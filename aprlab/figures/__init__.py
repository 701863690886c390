"""Figures: data in, axes out. Nothing here opens a file, runs a model or decides what is right.

Each function takes an `ax` to draw on (its own figure without one) and returns it, so that tests look at the artists.
`style()` is the one look of all of them.
"""

from aprlab.figures.core import STYLE, style
from aprlab.figures.files import dtype_flow, inventory_bars, magnitude_histogram, quantile_plot
from aprlab.figures.matrices import kill_plot, state_map
from aprlab.figures.traces import error_map, logits_plot, norm_plot, trace_plot

__all__ = [
    "STYLE",
    "dtype_flow",
    "error_map",
    "inventory_bars",
    "kill_plot",
    "logits_plot",
    "magnitude_histogram",
    "norm_plot",
    "quantile_plot",
    "state_map",
    "style",
    "trace_plot",
]
