"""The style, and colours that outlast it."""

from __future__ import annotations

import matplotlib.pyplot as plt

from aprlab import figures


def test_colours_are_the_styles_even_when_drawn_later() -> None:
    sides = {"GGUF": [{"layer": 0, "l2": 1.0}], "APR": [{"layer": 0, "l2": 2.0}]}
    with figures.style():
        wanted = ["#" + plt.rcParams["axes.prop_cycle"].by_key()["color"][n].lstrip("#") for n in (0, 1)]
    assert [line.get_color().upper() for line in figures.norm_plot(sides).get_lines()] == wanted


def test_the_style_is_one_file_and_leaves_no_trace() -> None:
    before = plt.rcParams["axes.spines.top"]
    with figures.style():
        assert plt.rcParams["axes.spines.top"] is False
    assert plt.rcParams["axes.spines.top"] == before
    assert figures.STYLE.is_file()
