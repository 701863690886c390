"""Attention maps, loud channels, residuals: the drawn data is the given data."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab import figures
from aprlab.errors import UsageError
from aprlab.figures.live import places_of

WEIGHTS = np.tril(np.random.default_rng(2).random((6, 5, 5))) + 1e-2 * np.eye(5)
A = [{"layer": n, "mean": 0.1 * n - 0.3, "std": 1.0 + n, "l2": 10.0**n} for n in range(4)]
B = [{**row, "mean": row["mean"] + 1, "l2": row["l2"] * 2} for row in A]


def test_every_head_of_every_side_has_its_map() -> None:
    broken = WEIGHTS.copy()
    broken[1, 2, 0] = np.nan
    drawn = figures.attention_maps({"healthy": WEIGHTS, "broken": broken}, [0, 1, 5], tokens=list("abcde"), across=2)
    assert [ax.get_title("left") or ax.get_title() for ax in drawn] == [
        "head 0", "head 1", "head 0", "head 1", "head 5", "head 5"
    ]  # fmt: skip
    first = drawn[0].images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(first), np.triu(np.ones((5, 5), bool), 1))
    np.testing.assert_array_equal(first.filled(0), WEIGHTS[0])
    assert len(drawn[3].patches) == 1
    assert places_of(drawn[0]) == ["0 a", "1 b", "2 c", "3 d", "4 e"]
    assert drawn[0].get_ylabel() == "healthy"


@pytest.mark.parametrize(
    ("sides", "heads", "said"),
    [
        ({}, None, "nothing to draw"),
        ({"a": WEIGHTS, "b": WEIGHTS[:, :4, :4]}, None, "expected one"),
        ({"a": WEIGHTS[0]}, None, "expected one"),
        ({"a": WEIGHTS}, [6], "has 0 to 5"),
        ({"a": WEIGHTS}, [], "has 0 to 5"),
    ],
)
def test_maps_that_cannot_be_drawn_are_refused(sides: dict, heads: list | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        figures.attention_maps(sides, heads)


def test_loud_channels_have_a_line_each() -> None:
    peaks = np.arange(1.0, 13.0).reshape(3, 4)
    ax = figures.channel_plot(peaks, [3, 0], massive=1000)
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines[:2]], [peaks[:, 3], peaks[:, 0]])
    assert [text.get_text() for text in ax.get_legend().get_texts()][1:] == ["channel 3", "channel 0", "massive: 1000 medians"]
    for wrong in ([4], [-1]):
        with pytest.raises(UsageError, match="there are 4"):
            figures.channel_plot(peaks, wrong)
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.channel_plot(np.full((2, 2), np.nan), [0])


def test_residuals_are_what_an_overlay_hides() -> None:
    ax = figures.residual_plot({"GGUF": A, "APR": B})
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 1)
    ax = figures.residual_plot({"GGUF": A, "APR": B}, key="l2", scale="relative")
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 1)
    equal = figures.residual_plot({"GGUF": A, "APR": A})
    assert equal.get_ylim() == (-1, 1)
    with pytest.raises(UsageError, match="other layers"):
        figures.residual_plot({"GGUF": A, "APR": B[:2]})
    with pytest.raises(UsageError, match="scale"):
        figures.residual_plot({"GGUF": A}, scale="log")


def test_residuals_of_logits() -> None:
    a = np.array([1, 2, 3], np.float32)
    ax = figures.logit_residuals(a, a + np.float32(0.5), ("GGUF", "APR"))
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[1, 0.5], [2, 0.5], [3, 0.5]])
    assert figures.logit_residuals(a, a, ("GGUF", "APR")).get_ylim() == (-1, 1)
    with pytest.raises(UsageError, match="one length"):
        figures.logit_residuals(a, a[:2], ("GGUF", "APR"))
