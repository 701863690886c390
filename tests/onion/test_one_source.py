"""Two quantisations of one source are equivalent within what both types lose; a row that is not is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, as_type, file_with
from variants import shallow

from aprlab.formats import open_model
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import Verdict
from aprlab.quants import bounds, types
from aprlab.quants.types import TensorType

KINDS = [types.F16, types.Q8_0, types.Q6_K, types.Q4_K, types.Q4_0, types.Q2_K]
FINER = [*itertools.combinations(KINDS[1:], 2), (types.F16, types.Q4_K)]  # the first loses less than the second
NAME = "blk.0.ffn_up.weight"
Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[TensorType, Path]:
    """One source, whose values are on no type's grid, in each type."""
    folder = tmp_path_factory.mktemp("one-source")
    base = shallow(REF, folder / "base.gguf")
    rng = np.random.default_rng(0)

    def off_grid(x: np.ndarray) -> np.ndarray:
        size = np.sqrt((x**2).mean(axis=1, keepdims=True))
        return x + (0.05 * size * rng.standard_normal(x.shape)).astype(np.float32)

    with open_model(base) as model:
        names = [name for name, t in model.tensors.items() if len(t.shape) == 2]
    source = file_with(folder / "F32.gguf", {n: lambda t: as_type(t, types.F32, off_grid) for n in names}, base)
    found = {types.F32: source}
    for kind in KINDS:
        found[kind] = file_with(folder / f"{kind}.gguf", {n: lambda t, k=kind: as_type(t, k) for n in names}, source)
    return found


def damaged(files: dict[TensorType, Path], ref: TensorType, kind: TensorType, change: Change, out: Path) -> Verdict:
    """The file in `kind` with one tensor's source changed before it was encoded, next to the one in `ref`."""
    with open_model(files[types.F32]) as source:
        tensor = as_type(source.tensors[NAME], kind, change)
    return peel(files[ref], file_with(out / "damaged.gguf", {NAME: lambda t: tensor}, files[kind]), fast=True)


@pytest.mark.parametrize(("ref", "kind"), [*((b, a) for a, b in FINER), (types.Q8_0, types.Q4_0)], ids=str)
def test_two_types_of_one_source_are_equivalent(ref: TensorType, kind: TensorType, files: dict[TensorType, Path]) -> None:
    verdict = peel(files[ref], files[kind], fast=True)
    assert verdict.verdict == "equivalent", str(verdict)
    assert {f.code for f in verdict.findings} <= {"dtype.one-source", "dtype.re-encoded"}
    if bounds.LOST.get(ref.name, 0) > bounds.LOST.get(kind.name, 0):  # the file has lost less than the reference
        assert "dtype.one-source" in {f.code for f in verdict.findings}


def rows_scaled(by: float) -> Change:
    def change(x: np.ndarray) -> np.ndarray:
        x[[7, 200]] *= np.float32(by)
        return x

    return change


def lost(x: np.ndarray) -> np.ndarray:
    x[9] = 0
    return x


def exchanged(x: np.ndarray) -> np.ndarray:
    x[[3, 50]] = x[[50, 3]]
    return x


def one_value(x: np.ndarray) -> np.ndarray:
    x[33, 5] = -2 * np.abs(x[33]).max()
    return x


DAMAGE: dict[str, tuple[Change, str]] = {
    "two rows × 1.1": (rows_scaled(1.1), "7, 200"), "two rows × 0.9": (rows_scaled(0.9), "7, 200"), "a lost row": (lost, "9"),
    "two rows exchanged": (exchanged, "3, 50"), "one value": (one_value, "33"),
}  # fmt: skip
PAIRS = [(types.Q4_K, types.Q8_0), (types.Q4_0, types.Q6_K)]


@pytest.mark.parametrize(("ref", "kind"), PAIRS, ids=str)
@pytest.mark.parametrize("what", DAMAGE)
def test_rows_that_both_types_do_not_explain_are_named(
    what: str, ref: TensorType, kind: TensorType, files: dict[TensorType, Path], tmp_path: Path
) -> None:  # fmt: skip
    change, rows = DAMAGE[what]
    verdict = damaged(files, ref, kind, change, tmp_path)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert (verdict.verdict, found.tensors) == ("broken", [NAME]), str(verdict)
    assert found.parameters["rows"] == rows, str(found)


@pytest.mark.parametrize(("ref", "kind"), PAIRS, ids=str)
@pytest.mark.parametrize("by", [1.04, 0.96])
def test_a_scale_throughout_is_seen(
    ref: TensorType, kind: TensorType, by: float, files: dict[TensorType, Path], tmp_path: Path
) -> None:  # fmt: skip
    verdict = damaged(files, ref, kind, lambda x: x * np.float32(by), tmp_path)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert found.code == "weights.scaled" and found.parameters["by"] == pytest.approx(by, abs=0.02), str(verdict)


@pytest.mark.parametrize(("ref", "kind"), PAIRS[:2], ids=str)
def test_columns_in_another_order_are_seen(
    ref: TensorType, kind: TensorType, files: dict[TensorType, Path], tmp_path: Path
) -> None:  # fmt: skip
    order = np.r_[1, 0, 2:256]
    assert damaged(files, ref, kind, lambda x: x[:, order], tmp_path).verdict == "broken"


def test_a_scaled_row_hides_within_the_bound(
    files: dict[TensorType, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Mutant: only the size of a row's error is compared, not the line through it."""
    monkeypatch.setattr("aprlab.onion.layers.dtype.tilted", lambda errors: np.zeros(0, np.int64))
    assert damaged(files, *PAIRS[0], rows_scaled(1.06), tmp_path).verdict == "equivalent"


def test_a_wrong_value_hides_within_the_bound_of_its_row(
    files: dict[TensorType, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Mutant: a block's own bound does not count."""

    def half_turned(x: np.ndarray) -> np.ndarray:
        at = np.abs(x[33]).argmax()
        x[33, at] *= np.float32(0.4)
        return x

    assert damaged(files, types.Q6_K, types.Q4_0, half_turned, tmp_path).verdict == "broken"
    monkeypatch.setattr(bounds, "value_limit", lambda kind: np.inf)
    assert damaged(files, types.Q6_K, types.Q4_0, half_turned, tmp_path).verdict == "equivalent"


def test_another_model_of_this_shape_is_not_of_this_source(files: dict[TensorType, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    verdict = damaged(files, types.Q4_K, types.Q8_0, lambda x: rng.permutation(x.reshape(-1)).reshape(x.shape), tmp_path)
    assert verdict.verdict == "broken"
