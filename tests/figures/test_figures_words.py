"""Words in figures: each cell says its token, and its colour how likely it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import aprlab
from aprlab import figures
from aprlab.errors import UsageError
from aprlab.faults import session_with
from aprlab.figures.words import spelled
from aprlab.inference import Session
from aprlab.tracing.words import answer_steps, logit_lens, position_kl


def test_a_token_is_spelled_so_that_it_is_seen() -> None:
    assert [spelled(token) for token in (" a", "\n", "$x$", "<|im_start|>", "\x1b[", "日")] == [
        "␣a", "⏎", "$x$", "<|im_sta…", "�[", "�",
    ]  # fmt: skip


def test_a_map_of_words_has_each_token_on_its_probability() -> None:
    ax = figures.word_map([["a", " b"], ["$c", "d"]], np.array([[0.1, 0.9], [np.nan, 0.5]]), [0, 1], ["x", "y"])
    assert [text.get_text() for text in ax.texts] == ["a", "␣b", "$c", "d"]
    assert [text.get_color() for text in ax.texts] == ["black", "white", "black", "black"]
    assert ax.images[0].get_array().mask.tolist() == [[False, False], [True, False]]
    for words, likely in (([["a"]], np.zeros((1, 2))), ([], np.zeros((0, 0))), ([["a", "b"], ["c"]], np.zeros((2, 2)))):
        with pytest.raises(UsageError, match="probabilities of shape"):
            figures.word_map(words, likely, range(len(words)), ["x", "y"][: likely.shape[1]])


def test_kl_has_the_tokens_on_its_axis_and_crosses_where_there_is_no_number() -> None:
    ax = figures.kl_plot({"a": np.array([0.0, 2.0, np.nan]), "b": np.zeros(3)}, ["<s>", "2", "\n"])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["<s>", "2", "⏎"]
    line, lost = ax.get_lines()[:2]
    assert line.get_ydata()[:2].tolist() == [0.0, 2.0]
    assert (lost.get_xdata().tolist(), lost.get_ydata().tolist()) == ([2], [ax.get_ylim()[1]])
    with pytest.raises(UsageError, match="b: 3 positions, 2 tokens"):
        figures.kl_plot({"b": np.zeros(3)}, ["x", "y"])


def test_answers_are_rows_of_tokens_with_their_probability() -> None:
    ax = figures.answer_strips({"healthy": [("2", 0.99), (" +", 0.5)], "silent": [], "broken": [("x", float("nan"))]})
    assert [text.get_text() for text in ax.texts] == ["2\n0.99", "␣+\n0.50", "x"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["healthy", "silent", "broken"]
    with pytest.raises(UsageError, match="no answer has a token"):
        figures.answer_strips({"silent": []})


def test_the_last_layer_of_the_lens_is_the_models_own_word_and_kl_tells_faults(tiny: Path) -> None:
    model = aprlab.open_model(tiny)
    session, broken = Session(model, engine="reference"), session_with(model, ["rope-norm"], engine="reference")
    healthy = aprlab.trace(session, "What is 2+2?")
    lens = logit_lens(session, healthy, last=3)
    assert lens.ids.shape == lens.probabilities.shape == (8, 3)
    assert lens.ids[-1].tolist() == healthy["logits"].values[-3:].argmax(axis=1).tolist()
    assert logit_lens(session, healthy).ids.shape == (8, len(healthy.tokens))
    assert position_kl(healthy, healthy).max() == 0
    kl = position_kl(healthy, aprlab.trace(broken, healthy.tokens))
    assert kl[0] == 0
    assert kl.max() > 1
    with pytest.raises(UsageError, match="the same tokens"):
        position_kl(healthy, aprlab.trace(session, "What is 3+4?"))
    steps = answer_steps(session, "What is 2+2?")
    assert "".join(token for token, _ in steps) == "2 + 2 equals 4."
    assert all(0.3 < p <= 1 for _, p in steps)
