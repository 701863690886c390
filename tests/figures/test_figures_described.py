"""A figure in words changes when its data, its colours or its labels do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from aprlab import figures
from aprlab.errors import UsageError
from aprlab.figures.described import described, measured

DRAWINGS: dict[str, Callable[[Axes, float], object]] = {
    "line": lambda ax, x: ax.plot([0, 1, 2], [0, x, 1]),
    "scatter": lambda ax, x: ax.scatter([0, 1], [x, 2]),
    "image": lambda ax, x: ax.imshow([[0, 1], [x, 2]]),
    "mesh": lambda ax, x: ax.pcolormesh(np.array([[0, 1], [x, 2]])),
    "bars": lambda ax, x: ax.bar([0, 1], [3, x]),
    "histogram": lambda ax, x: ax.hist([0, 1, x, x + 1]),
    "band": lambda ax, x: ax.fill_between([0, 1], [0, x], [1, 7]),
    "text": lambda ax, x: ax.text(0, 0, f"{x} tokens"),
    "title": lambda ax, x: ax.set_title(f"{x}"),
    "legend": lambda ax, x: ax.legend(ax.plot([1]), [f"{x}"]),
    "figure legend": lambda ax, x: ax.figure.legend(ax.plot([1]), [f"{x}"]),
}


def words(draw: Callable[[Axes, float], object], value: float) -> str:
    fig, ax = plt.subplots()
    draw(ax, value)
    try:
        return described(fig)
    finally:
        plt.close(fig)


@pytest.mark.parametrize("kind", DRAWINGS)
def test_other_data_are_other_words_and_noise_is_not(kind: str) -> None:
    draw = DRAWINGS[kind]
    assert words(draw, 5.0) != words(draw, 6.0)
    if kind not in ("text", "title", "legend", "figure legend"):
        assert words(draw, 5.0) == words(draw, 5.0 + 1e-9)


def test_swapped_colours_are_other_words() -> None:
    def draw(ax: Axes, swap: float) -> None:
        for values, colour in zip(([1, 2], [3, 4]), ("C0", "C1") if swap else ("C1", "C0"), strict=True):
            ax.plot(values, color=colour)

    assert words(draw, 0) != words(draw, 1)


def test_values_in_words() -> None:
    assert measured([1, 2, np.nan, 4]) == "4 from 1 to 4, mean 2.33, 1 not finite"
    assert measured([np.inf]) == "1, none finite"
    assert measured([1e-17, -1e-17]) == "2 from 0 to 0, mean 0"


def test_a_healthy_side_lies_at_the_top_and_one_of_nan_at_the_bottom() -> None:
    rows = {
        "equal": [{"layer": n, "snr": np.inf, "cosine": 1.0} for n in range(3)],
        "close": [{"layer": n, "snr": 40.0, "cosine": 0.9999} for n in range(3)],
        "lost": [{"layer": n, "snr": np.nan, "cosine": np.nan} for n in range(3)],
    }
    for measure, middle in (("snr", 40.0), ("cosine", 0.9999)):
        ax = figures.agreement_plot(rows, measure=measure)
        top, close, nothing, crosses = ax.lines[:4]
        low, high = ax.get_ylim()
        assert set(close.get_ydata()) == {middle}
        assert all(high - 0.1 * (high - low) < y <= high for y in top.get_ydata())
        assert np.isnan(nothing.get_ydata()).all()
        assert len(crosses.get_ydata()) == 3 and crosses.get_ydata().max() < low + 0.1 * (high - low)
        plt.close(ax.figure)
    with pytest.raises(UsageError, match="expected 'snr' or 'cosine'"):
        figures.agreement_plot(rows, measure="db")
