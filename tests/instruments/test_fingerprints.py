"""A tensor in parts, by the compiled kernels or by NumPy: one fingerprint."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from aprlab.conversion import convert
from aprlab.formats import open_model
from aprlab.instruments import fingerprints
from aprlab.instruments.summary_statistics import PERCENTILES, RunningFigures, percentiles, statistics
from aprlab.kernels.simd import kernels


@pytest.fixture(params=["as published", "q6_k", "q4_1", "bf16"])
def model(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path):
    if request.param == "as published":
        return open_model(tiny)
    convert(tiny, tmp_path / "m.apr", quantize=request.param)
    return open_model(tmp_path / "m.apr")


def test_parts_and_kernels_change_nothing(model, monkeypatch):
    whole = fingerprints.fingerprint(model)
    for name, value in (("PART", 1 << 10), ("LARGE", 1 << 11)):
        monkeypatch.setattr(fingerprints, name, value)
    in_parts = fingerprints.fingerprint(model)
    monkeypatch.setattr(fingerprints, "MANY", 0)
    by_kernels = fingerprints.fingerprint(model)
    for a, b, c in zip(whole, in_parts, by_kernels, strict=True):
        assert a.raw == b.raw == c.raw and a.values == b.values == c.values, a.name
        for x, y, z in zip(astuple(a.seen), astuple(b.seen), astuple(c.seen), strict=True):
            np.testing.assert_allclose([y, z], [x, x], rtol=1e-12, atol=1e-12 * (a.seen.std or 0))


def test_a_decoder_that_differs_is_not_used(tiny, monkeypatch):
    right = [p.values for p in fingerprints.fingerprint(tiny)]
    for name, value in (("PART", 1 << 10), ("LARGE", 1 << 11), ("MANY", 0)):
        monkeypatch.setattr(fingerprints, name, value)
    asked = []

    def wrong(kind, raw, count, out):
        asked.append(kind)
        out[:] = 1

    monkeypatch.setattr(kernels, "decode", wrong)
    assert [p.values for p in fingerprints.fingerprint(tiny)] == right and asked


@pytest.mark.parametrize("with_kernels", [False, True])
def test_values_that_are_not_finite_are_counted_and_left_out(with_kernels):
    values = np.random.default_rng(5).normal(3, 0.01, 1000).astype(np.float32)
    values[[3, 500]], values[[7, 8, 9]], values[[11, 999]] = np.nan, np.inf, [0.0, -0.0]
    figures = RunningFigures(values.size, kernels if with_kernels else None)
    for part in (values[:0], values[:2], values[2:700], values[700:]):
        figures.add(np.ascontiguousarray(part))
    one, other = statistics(values), figures.statistics()
    assert (one.count, one.nan, one.inf, one.zeros) == (other.count, other.nan, other.inf, other.zeros) == (1000, 2, 3, 2)
    np.testing.assert_allclose(other.percentiles, one.percentiles)
    np.testing.assert_allclose([other.mean, other.std, other.min, other.max], [one.mean, one.std, one.min, one.max], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 99, 4096])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    np.testing.assert_allclose(percentiles(np.sort(values)), np.percentile(values.astype(np.float64), PERCENTILES), rtol=1e-14)
