"""Bars of suspects: lengths are scores, colours are groups."""

from __future__ import annotations

import pytest

from aprlab import figures
from aprlab.errors import UsageError

SCORES = {"lost-qkv-biases": 0.9, "q4k-min-lost": 0.2, "rope-norm": 0.0, "q4k-d-dmin": 0.0}
GROUPS = {"lost-qkv-biases": "naming", "q4k-min-lost": "decode", "rope-norm": "config", "q4k-d-dmin": "decode"}


def test_bars_are_the_scores_from_the_top_down() -> None:
    ax = figures.ranking_bars(SCORES, GROUPS, enough=0.35)
    assert [bar.get_width() for bar in ax.patches] == list(SCORES.values())
    assert [label.get_text() for label in ax.get_yticklabels()] == list(SCORES)
    bottom, top = ax.get_ylim()
    assert top < 0 < 3 < bottom, "the first stands on top"
    assert list(ax.get_lines()[0].get_xdata()) == [0.35, 0.35]
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert colours[1] == colours[3]
    assert len(set(colours)) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["naming", "decode", "config"]


def test_two_figures_agree_on_the_colours_of_known_groups() -> None:
    known = ("config", "decode", "naming")
    one = figures.ranking_bars(SCORES, GROUPS, known=known).patches[0].get_facecolor()
    other = figures.ranking_bars({"lost-qkv-biases": 1.0}, GROUPS, known=known)
    assert other.patches[0].get_facecolor() == one
    assert [text.get_text() for text in other.get_legend().get_texts()] == ["naming"]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.ranking_bars({}, {})
    with pytest.raises(UsageError, match="'rope-norm' belongs to no group"):
        figures.ranking_bars(SCORES, {k: v for k, v in GROUPS.items() if k != "rope-norm"})
    with pytest.raises(UsageError, match="9 groups"):
        figures.ranking_bars({str(n): 0.0 for n in range(9)}, {str(n): str(n) for n in range(9)})
