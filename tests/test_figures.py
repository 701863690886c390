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


def test_colours_are_the_styles_even_when_drawn_later() -> None:
    with figures.style():
        wanted = ["#" + plt.rcParams["axes.prop_cycle"].by_key()["color"][n].lstrip("#") for n in (0, 1)]
    assert [line.get_color().upper() for line in figures.norm_plot({"GGUF": A, "APR": B}).get_lines()] == wanted


def test_the_style_is_one_file_and_leaves_no_trace() -> None:
    before = plt.rcParams["axes.spines.top"]
    with figures.style():
        assert plt.rcParams["axes.spines.top"] is False
    assert plt.rcParams["axes.spines.top"] == before
    assert figures.STYLE.is_file()


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


def test_error_map_tells_equal_from_small_and_broken() -> None:
    values = np.array([[0.0, 1e-3, np.inf], [0.0, 10.0, 1e-12]])
    ax = figures.error_map(values, range(2), ["q", "k", "v"], xlabel="step", limits=(1e-6, 1.0))
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), [[True, False, True], [True, False, False]])
    assert drawn[0, 1] == 1e-3
    assert (drawn[1, 1], drawn[1, 2]) == (1.0, 1e-6)
    assert [patch.get_xy() for patch in ax.patches] == [(1.5, -0.5)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q", "k", "v"]
    for bad in (values[:1], -values):
        with pytest.raises(UsageError, match="2 rows and 3 columns"):
            figures.error_map(bad, range(2), ["q", "k", "v"], xlabel="step")


def test_state_map_writes_every_word_and_knows_its_states() -> None:
    cells = [["found", "lost"], ["lost", "lost"]]
    ax = figures.state_map(cells, ["q", "k"], ["bare", "short"], ["found", "lost"])
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0, 1], [1, 1]])
    assert [text.get_text() for text in ax.texts] == ["found", "lost", "lost", "lost"]
    with pytest.raises(UsageError, match="unknown state 'lost'"):
        figures.state_map(cells, ["q", "k"], ["bare", "short"], ["found"])
