"""Figures of runs: the drawn data is the given data."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab import figures
from aprlab.errors import UsageError

A = [{"layer": n, "mean": 0.1 * n - 0.3, "std": 1.0 + n, "l2": 10.0**n} for n in range(4)]
B = [{**row, "mean": row["mean"] + 1, "l2": row["l2"] * 2} for row in A]


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


def test_error_map_tells_equal_from_small_and_broken() -> None:
    values = np.array([[0.0, 1e-3, np.inf], [0.0, 10.0, 1e-12]])
    ax = figures.error_map(values, range(2), ["q", "k", "v"], xlabel="step", limits=(1e-6, 1.0))
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), [[True, False, True], [True, False, False]])
    assert drawn[0, 1] == 1e-3
    image = ax.images[0]
    assert image.to_rgba([10.0, 1e-12]).tolist() == image.to_rgba([1.0, 1e-6]).tolist(), "beyond the limits: the ends' colours"
    broken, first = ax.patches
    assert (broken.get_xy(), first.get_xy()) == ((1.5, -0.5), (0.5, -0.5))
    assert broken.get_fill() and not first.get_fill()
    assert ax.images[0].colorbar.ax.get_ylabel().splitlines()[1:] == ["grey: equal", "orange: NaN or Inf"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q", "k", "v"]
    for bad in (values[:1], -values):
        with pytest.raises(UsageError, match="2 rows and 3 columns"):
            figures.error_map(bad, range(2), ["q", "k", "v"], xlabel="step")


def test_an_error_map_without_an_error_has_no_frame_and_its_scale_follows_the_errors() -> None:
    assert not figures.error_map(np.zeros((2, 2)), range(2), range(2), xlabel="step").patches
    assert figures.error_limits(np.zeros((2, 2))) == (1e-7, 1.0)
    assert figures.error_limits(np.array([0.5, 3.0]), np.array([np.inf, 0.0])) == (pytest.approx(0.1), 10.0)
    assert figures.error_limits(np.array([2e-7, 4e-7])) == (pytest.approx(1e-8), pytest.approx(1e-6))
