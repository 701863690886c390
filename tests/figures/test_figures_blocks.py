"""Figures of blocks: every bit is there, in the colour of its field; values lie where they should."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from aprlab import figures, quants
from aprlab.errors import UsageError
from aprlab.quants import types

LAYOUT = quants.REGISTRY[types.Q4_K].layout
BLOCK = np.random.default_rng(11).integers(0, 256, LAYOUT.itemsize, dtype=np.uint8)


def test_the_microscope_shows_every_bit_in_the_colour_of_its_field() -> None:
    ax = figures.block_microscope(BLOCK, LAYOUT)
    painted = np.concatenate([np.asarray(image.get_array()).reshape(16, 8, 3) for image in ax.images])
    legend = {
        text.get_text(): patch for text, patch in zip(ax.get_legend().get_texts(), ax.get_legend().get_patches(), strict=True)
    }
    assert list(legend) == ["d (2 bytes)", "dmin (2 bytes)", "scales (12 bytes)", "qs (128 bytes)"]
    bits = np.unpackbits(BLOCK).reshape(-1, 8)
    for patch, (start, stop) in zip(legend.values(), ((0, 2), (2, 4), (4, 16), (16, 144)), strict=True):
        dark = np.array(mpl.colors.to_rgb(patch.get_facecolor()[:3]))
        ones = bits[start:stop] == 1
        np.testing.assert_allclose(painted[start:stop][ones], np.broadcast_to(dark, (int(ones.sum()), 3)))
        assert (painted[start:stop][~ones] > dark - 1e-9).all()
        assert np.ptp(painted[start:stop][~ones], axis=0).max() < 1e-9, "one shade for all zeros of a field"
    assert [text.get_text() for text in ax.texts] == [f"{value:02x}" for value in BLOCK]


def test_marked_bits_are_framed_where_they_stand() -> None:
    marks = {"scale of group 5": [(13, 0), (13, 1), (13, 2), (13, 3), (5, 6), (5, 7)], "sign": [(20, 7)]}
    ax = figures.block_microscope(BLOCK, LAYOUT, marks=marks)
    frames = [(patch.get_x(), patch.get_width(), patch.get_linestyle()) for patch in ax.patches]
    # byte 5, bits 7 and 6: the first two of eight; byte 13, bits 3 to 0: the last four; byte 20 is the fifth of its row
    assert frames == [(40.0, 2, "-"), (108.0, 4, "-"), (32.0, 1, "--")]
    assert [text.get_text() for text in ax.get_legend().get_texts()][-2:] == list(marks)
    with pytest.raises(UsageError, match="sign: a marked bit lies outside"):
        figures.block_microscope(BLOCK, LAYOUT, marks={"sign": [(144, 0)]})


@pytest.mark.parametrize("block", [BLOCK[:-1], BLOCK.astype(np.int16)], ids=["too short", "no bytes"])
def test_the_microscope_refuses_what_is_no_such_block(block: np.ndarray) -> None:
    with pytest.raises(UsageError, match="a block of 144 bytes"):
        figures.block_microscope(block, LAYOUT)


def test_values_of_a_block_by_place_with_gaps_for_what_is_no_number() -> None:
    right = np.linspace(-1, 1, 96, dtype=np.float32)
    wrong = np.where(np.arange(96) == 40, np.inf, right[::-1])
    ax = figures.block_values({"right": right, "wrong": wrong})
    one, other = ax.get_lines()[:2]
    np.testing.assert_array_equal(one.get_ydata(), right)
    np.testing.assert_array_equal(np.isnan(other.get_ydata()), np.arange(96) == 40)
    assert [line.get_xdata()[0] for line in ax.get_lines()[2:]] == [31.5, 63.5]
    with pytest.raises(UsageError, match="the same length"):
        figures.block_values({"right": right, "wrong": wrong[:-1]})


def test_scatter_draws_pairs_and_leaves_out_what_is_no_number() -> None:
    truth = np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)
    seen = truth.copy()
    seen[3, 5] = np.nan
    ax = figures.value_scatter(truth, seen, ("right", "decoded"), note="one is lost")
    drawn = np.asarray(ax.collections[0].get_offsets())
    kept = np.arange(128) != 3 * 16 + 5
    np.testing.assert_array_equal(drawn, np.stack([truth.reshape(-1)[kept]] * 2, axis=1))
    assert [text.get_text() for text in ax.texts] == ["one is lost"]
    equal = figures.value_scatter(truth, truth, ("right", "decoded"))
    assert not np.array_equal(equal.collections[0].get_facecolor(), ax.collections[0].get_facecolor())


def test_scatter_thins_out_but_sees_every_place_of_a_block() -> None:
    truth = np.arange(100 * 256, dtype=np.float32).reshape(100, 256)
    drawn = np.asarray(figures.value_scatter(truth, truth, ("a", "b"), points=3000).collections[0].get_offsets())[:, 0]
    assert 2000 < len(drawn) <= 3000
    assert len(np.unique(drawn % 256)) == 256


def test_scatter_of_wild_values_is_logarithmic_beyond_the_truth() -> None:
    truth = np.linspace(-0.1, 0.1, 50)
    assert figures.value_scatter(truth, truth * 3, ("a", "b")).get_yscale() == "linear"
    assert figures.value_scatter(truth, truth * 1e9, ("a", "b")).get_yscale() == "symlog"
    with pytest.raises(UsageError, match="one shape"):
        figures.value_scatter(truth, truth[1:], ("a", "b"))


def test_outliers_do_not_make_one_dot_of_all_others() -> None:
    truth = np.random.default_rng(4).normal(size=1000)
    assert not figures.value_scatter(truth, truth, ("a", "b")).texts[0].get_text().endswith("beyond")
    seen = truth.copy()
    truth[7], seen[11] = 900.0, -800.0
    ax = figures.value_scatter(truth, seen, ("a", "b"))
    assert max(*ax.get_xlim(), *ax.get_ylim()) < 10
    assert ax.texts[0].get_text() == "2 points beyond"
