"""Figures of measurements: what is drawn is what was given, and what cannot be drawn is refused."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from aprlab.errors import UsageError
from aprlab.figures import measures


def test_ratio_plot_has_a_line_at_one_and_one_a_side() -> None:
    ax = measures.ratio_plot({"honest": [1, 1, 1], "mixed": [0.7, 0.9, 1.2]}, ylabel="ratio")
    base, honest, mixed = ax.get_lines()
    assert set(base.get_ydata()) == {1}
    assert (list(honest.get_ydata()), list(mixed.get_ydata())) == ([1, 1, 1], [0.7, 0.9, 1.2])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["honest", "mixed"]
    with pytest.raises(UsageError, match="unlike numbers of layers: a 1, b 2"):
        measures.ratio_plot({"a": [1], "b": [1, 2]}, ylabel="ratio")


def test_coverage_bars_are_drawn_end_to_end() -> None:
    ax = measures.coverage_bars({"first": {"equal": 3, "not looked at": 4}, "second": {"equal": 0, "differs": 2}})
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    starts = [[bar.get_x() for bar in bars] for bars in ax.containers]
    assert widths == [[3, 0], [4, 0], [0, 2]]
    assert starts == [[0, 0], [3, 0], [7, 0]]
    assert [text.get_text() for text in ax.texts] == ["3", "", "4", "", "", "2"]


def test_band_plot_names_what_the_rule_refuses() -> None:
    ax = measures.band_plot({"a": 0.9, "b": 1.1, "c": 4.62, "d": 0.1}, (0.5, 1.5), xlabel="mean")
    inside, outside = ax.collections[-2:]
    assert sorted(inside.get_offsets()[:, 0]) == [0.9, 1.1]
    assert sorted(outside.get_offsets()[:, 0]) == [0.1, 4.62]
    assert {text.get_text() for text in ax.texts} == {"c", "d"}
    with pytest.raises(UsageError, match="band ends before it begins"):
        measures.band_plot({"a": 1.0}, (2, 1), xlabel="mean")


def test_null_strip_marks_what_no_healthy_file_has() -> None:
    ax = measures.null_strip([0.2, 0.9, 1.0], (0.8, 1.25), (0.98, 1.03), xlabel="ratio")
    bar, inside, outside = ax.get_lines()
    assert list(bar.get_xdata()) == [0.98, 1.03]
    assert (list(inside.get_xdata()), list(outside.get_xdata())) == ([0.9, 1.0], [0.2])
    assert len(measures.null_strip([0.9], (0.8, float("inf")), None, xlabel="ratio").get_lines()) == 2


def test_check_strip_shows_every_check_and_the_cut() -> None:
    holds = [True] * 12 + [False, True]
    ax = measures.check_strip(holds, cut=10)
    np.testing.assert_array_equal(ax.images[0].get_array(), [holds])
    assert [text.get_text() for text in ax.texts] == ["cut after 10: the rest is not judged"]
    assert list(ax.get_lines()[0].get_xdata()) == [9.5, 9.5]
    assert not measures.check_strip(holds).texts
    for cut in (0, 15):
        with pytest.raises(UsageError, match=f"a cut after {cut} of 14"):
            measures.check_strip(holds, cut=cut)


def test_distance_bars_mark_what_is_further_than_the_first() -> None:
    ax = measures.distance_bars({"both faults": 0.5, "one repaired": 0.8, "both repaired": 0.0}, xlabel="distance")
    bars = ax.containers[0]
    assert [bar.get_width() for bar in bars] == [0.5, 0.8, 0.0]
    assert len({mpl.colors.to_hex(bar.get_facecolor()) for bar in bars}) == 3
    assert [text.get_text().strip() for text in ax.texts] == ["0.50", "0.80", "0.00"]
    with pytest.raises(UsageError, match="finite"):
        measures.distance_bars({"a": float("inf")}, xlabel="distance")


def test_tensor_map_puts_every_tensor_in_its_place() -> None:
    cells = {"token_embd.weight": "fine", "blk.0.attn_q.weight": "fine"}
    cells |= {"blk.1.attn_q.weight": "lost", "blk.1.attn_q.bias": "lost"}
    ax = measures.tensor_map(cells, ["fine", "lost"])
    seen = ax.images[0].get_array()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["token_embd.weight", "attn_q.weight", "attn_q.bias"]
    np.testing.assert_array_equal(seen.filled(9), [[0, 0], [0, 1], [9, 1]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["fine: 2", "lost: 2"]
    with pytest.raises(UsageError, match="unknown state 'lost'"):
        measures.tensor_map(cells, ["fine"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: measures.ratio_plot({}, ylabel=""),
        lambda: measures.coverage_bars({"a": {}}),
        lambda: measures.band_plot({}, (0, 1), xlabel=""),
        lambda: measures.null_strip([], (0, 1), None, xlabel=""),
        lambda: measures.check_strip([]),
        lambda: measures.distance_bars({}, xlabel=""),
        lambda: measures.tensor_map({}, ["fine"]),
    ],
    ids=["ratio", "coverage", "band", "null", "strip", "distance", "map"],
)
def test_nothing_to_draw_is_refused(draw) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        draw()


def test_a_group_of_bars_for_each_layer() -> None:
    ax = measures.layer_bars({"|Wx|": [3.0, 4.0], "|b|": [1.0, 2.0]}, ylabel="l2")
    assert [bar.get_height() for bar in ax.patches] == [3.0, 4.0, 1.0, 2.0]
    assert ax.patches[2].get_x() > ax.patches[0].get_x()
    assert ax.get_yscale() == "linear"
    with pytest.raises(UsageError, match="parts of 1, 2 layers"):
        measures.layer_bars({"a": [1.0], "b": [1.0, 2.0]}, ylabel="l2")


def test_what_is_outside_the_layers_is_one_cell() -> None:
    cells = {"token_embd.weight": "hit", "blk.0.attn_q.weight": "calm", "blk.1.attn_q.weight": "hit"}
    ax = measures.tensor_map(cells, ("calm", "hit"))
    (whole,) = ax.patches
    assert whole.get_width() > 1.9
    assert whole.get_zorder() > 2.5, "above the lines between columns"
