"""Names, tokens and labels that come from a file are words in every figure: a ``$`` in them begins no formula."""

from __future__ import annotations

import io

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

import matplotlib.pyplot as plt  # noqa: E402

from aprlab import figures  # noqa: E402
from aprlab.figures.core import plain, whole  # noqa: E402

BAD = "$\\frac{$"  # no formula that matplotlib can set
WORDS = (BAD, "$x^2$", "a \\$ b", "half \ud800")


def draw(ax: plt.Axes) -> None:
    ax.set_title(BAD)
    ax.figure.savefig(io.BytesIO(), format="png", dpi=40)
    plt.close(ax.figure)


def test_the_text_would_break_a_figure() -> None:
    """Without our functions it does: else the tests below could not fail."""
    ax = plt.subplots()[1]
    with pytest.raises(ValueError, match="Expected"):
        draw(ax)


@pytest.mark.parametrize("word", WORDS)
def test_it_is_shown_as_it_is(word: str) -> None:
    ax = plt.subplots()[1]
    text = ax.text(0, 0, plain(word))
    shown, formula = text._preprocess_math(text.get_text())
    assert not formula and shown == word.replace("\ud800", "?")
    plt.close(ax.figure)


@pytest.mark.parametrize("word", WORDS)
def test_figures_with_foreign_names(word: str) -> None:
    ones = np.linspace(1, 2, 300)
    draw(figures.inventory_bars({word: {word: 1, "Q4_K": 2}}))
    draw(figures.logits_plot(ones, ones + 1, (word, "b"), top={3: word, 4: word}))
    draw(figures.error_map(np.ones((2, 2)), [word, "b"], [word, "c"], xlabel=whole(word)))
    draw(figures.magnitude_histogram({word: ones, "b": ones}))
    draw(figures.distance_bars({word: 0.5, "b": 0.1}, xlabel=whole(word)))
    draw(figures.coverage_bars({word: {word: 2, "b": 1}}, xlabel=whole(word)))
