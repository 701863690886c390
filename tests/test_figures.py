"""Figures are tested on their artists: the drawn data is the given data."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest

from aprlab import figures
from aprlab.errors import UsageError

A = [{"layer": n, "mean": 0.1 * n - 0.3, "std": 1.0 + n, "l2": 10.0**n} for n in range(4)]
B = [{**row, "mean": row["mean"] + 1, "l2": row["l2"] * 2} for row in A]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_trace_plot_draws_every_side_with_its_spread() -> None:
    ax = figures.trace_plot({"GGUF": A, "APR": B})
    assert [line.get_label() for line in ax.get_lines()] == ["GGUF", "APR"]
    for line, rows in zip(ax.get_lines(), (A, B), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), [row["mean"] for row in rows])
    assert len(ax.collections) == 2
    low, high = ax.collections[0].get_paths()[0].vertices[:, 1].min(), ax.collections[0].get_paths()[0].vertices[:, 1].max()
    assert low == pytest.approx(min(row["mean"] - row["std"] for row in A))
    assert high == pytest.approx(max(row["mean"] + row["std"] for row in A))


def test_lines_on_top_of_each_other_stay_visible() -> None:
    first, second = figures.trace_plot({"GGUF": A, "APR": A}).get_lines()
    assert first.get_linewidth() > second.get_linewidth()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_color() != second.get_color()


def test_norm_plot_is_logarithmic_and_marks_the_divergence() -> None:
    ax = figures.norm_plot({"GGUF": A, "APR": B}, diverged=2)
    assert ax.get_yscale() == "log"
    assert list(ax.get_lines()[2].get_xdata()) == [2, 2]
    assert "layer 2" in ax.get_legend().get_texts()[2].get_text()


def test_inventory_bars_have_a_bar_for_what_a_side_lacks() -> None:
    ax = figures.inventory_bars({"GGUF": {"Q4_K": 3 << 20, "F32": 1 << 20}, "APR": {"F32": 5 << 20}})
    heights = [[bar.get_height() for bar in group] for group in ax.containers]
    assert heights == [[3.0, 1.0], [0.0, 5.0]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["Q4_K", "F32"]
    assert ax.get_ylabel() == "MiB"


def test_logits_plot_has_every_point_and_names_the_top() -> None:
    x = np.random.default_rng(3).normal(size=50).astype(np.float32)
    ax = figures.logits_plot(x, x + 1, ("GGUF", "APR"), top={int(x.argmax()): " four"})
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([x, x + 1], axis=1), rtol=1e-6)
    assert [text.get_text() for text in ax.texts] == ["' four'"]


@pytest.mark.parametrize("draw", [figures.trace_plot, figures.norm_plot, figures.inventory_bars])
@pytest.mark.parametrize("sides", [{}, {"GGUF": []}, {"GGUF": A, "APR": []}], ids=["no side", "no data", "one empty"])
def test_nothing_to_draw_is_refused(draw, sides) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        draw(sides)


def test_the_style_is_one_file_and_leaves_no_trace() -> None:
    before = plt.rcParams["axes.spines.top"]
    with figures.style():
        assert plt.rcParams["axes.spines.top"] is False
    assert plt.rcParams["axes.spines.top"] == before
    assert figures.STYLE.is_file()
