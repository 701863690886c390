"""Figures: data in, axes out. Nothing here opens a file, runs a model or decides what is right.

Each function takes an `ax` to draw on (its own figure without one) and returns it, so that tests look at the artists.
`style()` is the one look of all of them.
"""

from aprlab.figures.attention import attention_maps, channel_plot
from aprlab.figures.blocks import block_microscope, block_values, value_scatter
from aprlab.figures.core import STYLE, style
from aprlab.figures.described import described
from aprlab.figures.files import dtype_flow, inventory_bars, magnitude_histogram, quantile_plot
from aprlab.figures.kernels import ptx_profile, roofline
from aprlab.figures.matrices import kill_plot
from aprlab.figures.measures import (
    band_plot,
    check_strip,
    coverage_bars,
    distance_bars,
    layer_bars,
    null_strip,
    ratio_plot,
    tensor_map,
)
from aprlab.figures.ranking import ranking_bars
from aprlab.figures.scores import area_bars, interval_plot
from aprlab.figures.traces import (
    agreement_plot,
    error_limits,
    error_map,
    logit_residuals,
    logits_plot,
    norm_plot,
    residual_plot,
    trace_plot,
)
from aprlab.figures.words import answer_strips, kl_plot, word_map

__all__ = [
    "STYLE",
    "agreement_plot",
    "answer_strips",
    "area_bars",
    "attention_maps",
    "band_plot",
    "block_microscope",
    "block_values",
    "channel_plot",
    "check_strip",
    "coverage_bars",
    "described",
    "distance_bars",
    "dtype_flow",
    "error_limits",
    "error_map",
    "interval_plot",
    "inventory_bars",
    "kill_plot",
    "kl_plot",
    "layer_bars",
    "logit_residuals",
    "logits_plot",
    "magnitude_histogram",
    "norm_plot",
    "null_strip",
    "ptx_profile",
    "quantile_plot",
    "ranking_bars",
    "ratio_plot",
    "residual_plot",
    "roofline",
    "style",
    "tensor_map",
    "trace_plot",
    "value_scatter",
    "word_map",
]
