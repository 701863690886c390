"""Comparisons: they see one flipped bit, drop nothing, and refuse to compare nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aprlab import paths
from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.tracing import comparisons
from aprlab.tracing.traces import trace

RNG = np.random.default_rng(7)


def test_equal_means_every_bit() -> None:
    a = RNG.normal(size=(3, 5)).astype(np.float32)
    assert comparisons.difference(a, a.copy()).equal
    b = a.copy()
    b.view(np.uint32)[2, 1] ^= 1
    seen = comparisons.difference(a, b)
    assert not seen.equal
    assert seen.worst == (2, 1)
    assert seen.max_abs == abs(float(a[2, 1]) - float(b[2, 1])) > 0


def test_zero_signs_and_nan_are_distinguished_by_their_bits() -> None:
    a, nan = np.array([0.0, 1.0], np.float32), np.array([np.nan, 1.0], np.float32)
    assert not comparisons.difference(a, np.array([-0.0, 1.0], np.float32)).equal
    assert comparisons.difference(nan, nan.copy()).equal
    one_sided = comparisons.difference(a, nan)
    assert not one_sided.equal
    assert one_sided.worst == (0,)
    assert np.isnan(one_sided.max_abs)


def test_figures_against_plain_arithmetic() -> None:
    a, b = np.array([3.0, 4.0], np.float32), np.array([4.0, -3.0], np.float32)
    seen = comparisons.difference(a, b)
    assert seen.max_abs == 7.0
    assert seen.rel_l2 == pytest.approx(50**0.5 / 5)
    assert seen.cosine == pytest.approx(0.0)
    assert comparisons.difference(np.zeros(2, np.float32), b).rel_l2 == float("inf")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)),
        (np.zeros(3, np.float32), np.zeros(3, np.float64)),
        (np.zeros(0, np.float32), np.zeros(0, np.float32)),
    ],
    ids=["shape", "dtype", "empty"],
)
def test_unlike_or_empty_arrays_are_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(UsageError):
        comparisons.difference(a, b)


def test_the_longer_answer_is_not_cut() -> None:
    seen = comparisons.compare_tokens([5, 6], [5, 6, 7], text=lambda token: f"<{token}>")
    assert not seen.equal
    assert seen.first == 2
    assert seen.rows[2]["a"] is None
    assert seen.rows[2]["b text"] == "'<7>'"
    assert seen.summary == "3 tokens compared, 2 equal bit for bit, first difference at 2"


def test_two_empty_answers_prove_nothing() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        comparisons.compare_tokens([], [])


def test_logits_kl_and_top() -> None:
    a = RNG.normal(size=(2, 11)).astype(np.float32) * 3
    b = a.copy()
    b[1, 4] = a[1].max() + 5
    seen = comparisons.compare_logits(a, b)
    assert [row["equal"] for row in seen.rows] == [True, False]
    assert seen.rows[0]["kl"] == 0
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (a[1], b[1]))
    assert seen.rows[1]["kl"] == pytest.approx(float(np.sum(p * np.log(p / q))))
    assert seen.rows[1]["b top"] == 4 != seen.rows[1]["a top"]


def test_a_table_shows_every_row_in_text_and_html() -> None:
    seen = comparisons.compare_tokens([1, 2], [1, 3], text=lambda token: "<b>" if token == 3 else "x")
    assert len(seen.table().splitlines()) == 3
    assert seen.table(seen.differing()).count("\n") == 1
    page = seen._repr_html_()
    assert page.count("<tr") == 3
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_unlike_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot compare list with ndarray"):
        comparisons.compare([1], np.zeros(1))


def test_agreement_by_layer_is_inf_for_equal_values_nan_for_lost_ones_and_decibels_between() -> None:
    healthy = trace(Session(open_model(paths.embedded_model()), engine="reference"), [1, 2, 3])
    assert {row["snr"] for row in comparisons.agreement_rows(healthy, healthy)} == {math.inf}

    def with_layer_2(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        points = dict(healthy.points)
        points["layers.2.out"] = replace(points["layers.2.out"], values=change(points["layers.2.out"].values))
        other = replace(healthy, points=points)
        rows = comparisons.agreement_rows(healthy, other)
        assert [row["layer"] for row in rows if not row["equal"]] == [2]
        return rows[2]

    assert with_layer_2(lambda x: (x * np.float32(1.01)))["snr"] == pytest.approx(40, abs=0.01)
    assert with_layer_2(lambda x: x * np.float32(2))["snr"] == pytest.approx(0, abs=1e-6)
    assert with_layer_2(lambda x: -x)["cosine"] == pytest.approx(-1)
    assert math.isnan(with_layer_2(lambda x: np.where(x > 0, np.float32("nan"), x))["snr"])
