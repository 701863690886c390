"""Figures of kernels: bars are the counts, points lie on the roof."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab import figures
from aprlab.errors import UsageError
from aprlab.kernels.ptx.counters import LineProfile

LINES = [
    LineProfile("dir/a.cu", 1, 10, 320, requests=4, sectors=16),
    LineProfile("dir/a.cu", 2, 20, 600),
    LineProfile("b.cuh", 7, 2, 64, requests=2, wavefronts=8),
    LineProfile("", 0, 1, 16),
]
SOURCE = {"a.cu": "x = w[i];  // comes from memory\n" + "y = " + "a * " * 40 + "b;\n"}


def test_profile_has_a_bar_a_line_in_the_order_of_the_source() -> None:
    ax = figures.ptx_profile(LINES, SOURCE)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([1.6, 6.4, 32.0, 60.0])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "(no line)"
    assert names[1] == "b.cuh:7"
    assert names[2] == "x = w[i];  a.cu:1"
    assert names[3].endswith("…  a.cu:2")
    assert len(names[3]) <= 72
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["2 requests × 4 wavefronts", "4 requests × 4 sectors"]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 3


def test_cheap_lines_share_a_bar_and_costs_can_be_a_weight() -> None:
    ax = figures.ptx_profile(LINES, per=1000, most=2)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.32, 0.6, 0.08])
    assert ax.get_yticklabels()[2].get_text() == "the other 2 lines"
    assert ax.patches[2].get_hatch()
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.ptx_profile([])


def test_points_lie_on_the_roof() -> None:
    kernels = {"lean": 2.0, "fat": 50.0}
    machines = {"M": (100.0, 1000.0), "N": (10.0, 1000.0)}
    ax = figures.roofline(kernels, machines, measured={("M", "fat"): 700.0})
    m, n, measured = (np.asarray(points.get_offsets()) for points in ax.collections)
    np.testing.assert_array_equal(m, [[2, 200], [50, 1000]])
    np.testing.assert_array_equal(n, [[2, 20], [50, 500]])
    np.testing.assert_array_equal(measured, [[50, 700]])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in ax.texts] == ["lean", "fat"]
    assert ["corner at 10.0" in text.get_text() for text in ax.get_legend().get_texts()] == [True, False]
    with pytest.raises(UsageError, match="'fat' on 'X' was measured"):
        figures.roofline(kernels, machines, measured={("X", "fat"): 1.0})
