"""Traces of a pass by named points, and comparisons: two arrays, traces, models or answers next to each other."""

from aprlab.tracing.comparisons import Comparison, compare
from aprlab.tracing.traces import Trace, trace

__all__ = ["Comparison", "Trace", "compare", "trace"]
