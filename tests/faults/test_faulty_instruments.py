"""Faults of instruments: what is measured goes wrong, not what is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faulty_files import Healthy

from aprlab.errors import FormatError, UsageError
from aprlab.faults import convert_with, instrument_faults, instruments, session_with
from aprlab.formats import open_model
from aprlab.model.model import Model


def test_instruments_are_wrong_as_described(tmp_path: Path, broken: Callable[[str], Path], healthy: Healthy) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 12)).astype(np.float32) * np.linspace(1, 9, 7, dtype=np.float32)[:, None]
    assert np.std(values) / np.std(values) == 1
    assert instruments.mixed_positions(values, values) > 1.5

    weights = rng.normal(size=(6, 10)).astype(np.float32)
    assert instruments.order_blind_checksum(weights) == instruments.order_blind_checksum(weights.T)
    assert weights.tobytes() != np.ascontiguousarray(weights.T).tobytes()
    assert instruments.order_blind_checksum(weights) != instruments.order_blind_checksum(weights * np.float32(1.001))

    a, b = {"x": weights, "y": weights}, {"x": weights}
    assert instruments.nothing_compared({"x": weights}, {"z": weights * 2})
    assert instruments.common_only(a, b)
    assert not instruments.common_only({"x": weights}, {"z": weights})
    assert not instruments.common_only(a, {"x": weights * 2})

    (tmp_path / "nonsense.apr").write_bytes(b"nonsense")
    assert instruments.always_succeeds(tmp_path / "nonsense.apr")
    assert not instruments.partly_valid(tmp_path / "nonsense.apr")
    assert instruments.partly_valid(broken("truncated"))
    with pytest.raises(FormatError):
        open_model(broken("truncated"))

    good = rng.normal(4.62, 0.5, size=896).astype(np.float32)  # as Qwen's output_norm
    assert not instruments.norm_near_one(good)
    assert instruments.norm_near_one(np.ones(8, np.float32))
    assert instruments.first_ten([True] * 10 + [False])
    assert not instruments.first_ten([False] + [True] * 10)
    assert not instruments.first_ten([])
    assert instruments.words_for_garbage("For more information ask again.")
    assert not instruments.words_for_garbage("türleminÐ¸ÑĩÐµÑģÑĤÐ²Ð¾ gabantha")
    assert instruments.exit_zero("VILLEVILLEVILLE") == 0
    fixture = instruments.square_zeros((4, 6))
    assert np.array_equal(fixture, fixture.T)
    assert not instruments.greedy_mending(1.0, 2.0)


def test_every_ruler_has_a_liar() -> None:
    assert {fault.replaces for fault in instrument_faults().values()} == set(instruments.REPLACEABLE)


@pytest.mark.parametrize("id", ["mixed-positions", "exit-zero"])
def test_instruments_are_no_models_faults(id: str, model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a fault of an instrument"):
        session_with(model, [id])
    with pytest.raises(UsageError, match="has no file form"):
        convert_with(model, tmp_path / "x.apr", [id])
