"""Figures of files: the drawn data is the given data."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab import figures
from aprlab.errors import UsageError


def test_inventory_bars_have_a_bar_for_what_a_side_lacks() -> None:
    ax = figures.inventory_bars({"GGUF": {"Q4_K": 3 << 20, "F32": 1 << 20}, "APR": {"F32": 5 << 20}})
    heights = [[bar.get_height() for bar in group] for group in ax.containers]
    assert heights == [[3.0, 1.0], [0.0, 5.0]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["Q4_K", "F32"]
    assert ax.get_ylabel() == "MiB"


def test_dtype_flow_has_a_line_a_type_and_a_box_a_word() -> None:
    ways = {"Q4_K": ("8", "Q4", "F32"), "Q5_K": ("8", "Q4", "F32"), "F16": ("1", "F16", "F16")}
    right = {"Q4_K": False, "Q5_K": False, "F16": True}
    ax = figures.dtype_flow(ways, right, ("byte", "label", "read as"))
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == list(ways)
    assert sorted(text.get_text() for text in ax.texts) == sorted(["8", "1", "Q4", "F16", "F32", "F16"])
    np.testing.assert_allclose(lines["Q4_K"].get_ydata()[1:], lines["Q5_K"].get_ydata()[1:], atol=0.15)
    assert not np.allclose(lines["Q4_K"].get_ydata()[1:], lines["F16"].get_ydata()[1:], atol=0.15)
    assert not np.array_equal(lines["Q4_K"].get_ydata(), lines["Q5_K"].get_ydata()), "one would hide the other"
    assert (lines["F16"].get_linestyle(), lines["Q4_K"].get_linestyle()) == ("-", "--")
    assert len(ax.patches) == len(ax.texts)
    for text, box in zip(ax.texts, ax.patches, strict=True):
        column = round(text.get_position()[0])
        through = [lines[name].get_ydata()[column] for name, way in ways.items() if way[column] == text.get_text()]
        assert box.get_y() < min(through) <= max(through) < box.get_y() + box.get_height()
    with pytest.raises(UsageError, match="3 words"):
        figures.dtype_flow(ways | {"F32": ("0",)}, right | {"F32": True}, ("byte", "label", "read as"))


def test_magnitude_histogram_counts_what_has_no_magnitude() -> None:
    tame = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
    wild = np.array([np.nan, np.inf, 1e30, 1e-30], np.float32)
    ax = figures.magnitude_histogram({"blocks": tame, "as F32": wild})
    shares = [patch.get_data().values.sum() for patch in ax.patches]
    assert shares == pytest.approx([0.75, 0.5])
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["blocks (25.0% zero, 0.00% NaN or Inf)", "as F32 (0.0% zero, 50.00% NaN or Inf)"]
    with pytest.raises(UsageError, match="no value is finite"):
        figures.magnitude_histogram({"zeros": np.zeros(3)})


def test_quantile_plot_puts_equal_spreads_on_the_diagonal() -> None:
    x = np.random.default_rng(5).normal(size=(7, 11)).astype(np.float32)
    same, other = (figures.quantile_plot(x, y, ("GGUF", "APR"), points=21).get_lines()[1] for y in (x.T, 1e6 * x))
    np.testing.assert_array_equal(same.get_xdata(), same.get_ydata())
    np.testing.assert_allclose(other.get_ydata(), 1e6 * np.asarray(other.get_xdata()), rtol=1e-6)
