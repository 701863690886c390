"""Channels of the residual stream that stand out: a few of them are a thousand times larger than all others.

Large language models have *massive activations*: in a handful of channels, at the first token or at separators, one value
is orders of magnitude above the median (Sun et al. 2024, "Massive Activations in Large Language Models"). They are no
fault. They decide every mean, norm and "largest value" of a trace, so whoever compares such figures has to know them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aprlab.tracing.comparisons import layer_steps
from aprlab.tracing.traces import Trace

MASSIVE = 1000.0  # times the median of the layer, as in the paper


@dataclass(frozen=True)
class ChannelPeak:
    """The largest value of a channel over all layers.

    Attributes:
        channel: its number.
        layer, position: where it is largest.
        value: there.
        times: its magnitude, in medians of the layer's magnitudes.
        massive: layers in which it is above `MASSIVE` medians.
    """

    channel: int
    layer: int
    position: int
    value: float
    times: float
    massive: tuple[int, ...]


def channel_peaks(trace: Trace, step: str = "out") -> np.ndarray:
    """Largest magnitude of each channel in each layer, in medians of that layer: float64 ``(layers, channels)``.

    NaN and Inf are left out; a layer without any value but zero is all nan.

    Raises:
        UsageError: the trace has this step of no layer.
    """
    rows = []
    for _, name in layer_steps(trace, step):
        x = np.abs(trace[name].values.reshape(len(trace[name].values), -1).astype(np.float64))
        x[~np.isfinite(x)] = np.nan
        some = x[np.isfinite(x) & (x > 0)]
        middle = float(np.median(some)) if some.size else np.nan
        rows.append(np.fmax.reduce(x, axis=0) / middle)
    return np.array(rows)


def loudest_channels(trace: Trace, count: int = 5, step: str = "out") -> list[ChannelPeak]:
    """The channels that stand out most, largest first.

    Raises:
        UsageError: the trace has this step of no layer.
    """
    peaks = np.nan_to_num(channel_peaks(trace, step), nan=0.0)
    layers = [n for n, _ in layer_steps(trace, step)]
    found = []
    for channel in (int(c) for c in np.argsort(-peaks.max(axis=0), kind="stable")[:count]):
        row = int(peaks[:, channel].argmax())
        x = trace[f"layers.{layers[row]}.{step}"].values
        x = x.reshape(len(x), -1)[:, channel]
        place = int(np.nanargmax(np.where(np.isfinite(x), np.abs(x), np.nan))) if np.isfinite(x).any() else 0
        massive = tuple(layers[n] for n in np.flatnonzero(peaks[:, channel] >= MASSIVE))
        found.append(ChannelPeak(channel, layers[row], place, float(x[place]), float(peaks[row, channel]), massive))
    return found


__all__ = ["MASSIVE", "ChannelPeak", "channel_peaks", "loudest_channels"]
