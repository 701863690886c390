"""No gate and no stage hangs on wording: every sentence is replaced by noise. The whole kill matrix: see test_gates.py."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from noise import noise

from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.gates import MatrixRow, check, kill_matrix, matrix
from aprlab.model.model import Model

UNFIT = "floor-blocks"  # needs rows that are no multiple of 256, which the embedded model has not


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    return open_model(tiny)


def cells(rows: Iterable[MatrixRow]) -> list[dict[str, str]]:
    return [row.cells for row in rows]


def test_the_ten_stages_are_the_same_under_noise(model) -> None:
    with noise():
        noisy = check(model)
        sentences = [r.detail for r in noisy]
    plain = check(model)
    assert [(r.name, r.ok, r.code) for r in noisy] == [(r.name, r.ok, r.code) for r in plain]
    assert not set(sentences) & {r.detail for r in plain}, "every sentence was noise"


def test_noise_shows_a_decision_by_wording(model, monkeypatch) -> None:
    """Mutant: a fault that changes nothing is known by the words of its refusal, as it once was."""
    plain = kill_matrix(model, [UNFIT])
    assert len(plain.control) == 2, "tried on the sibling"

    def by_words(self, fault, form, folder):
        try:
            case = self._case(fault, form, folder)
        except UsageError as error:
            if "changes nothing here" in str(error):
                raise matrix.UnfitModel(fault.id) from None
            raise
        return self._judge(fault.id, form, fault.layer, case)

    monkeypatch.setattr(matrix.MatrixBench, "row", by_words)
    assert cells(kill_matrix(model, [UNFIT]).rows) == cells(plain.rows)
    with noise(), pytest.raises(UsageError):
        kill_matrix(model, [UNFIT])
