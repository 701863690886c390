"""Every row is compared: within the bound of its type a file is equivalent, beyond it the rows are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, as_type, file_with

from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion import row_errors
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import Finding
from aprlab.quants import REGISTRY, types
from aprlab.quants.types import TensorType

NAME = "blk.1.ffn_up.weight"
Change = Callable[[np.ndarray], np.ndarray]


def one(path: Path) -> Finding:
    """The one finding that is not harmless."""
    verdict = peel(REF, path, fast=True)
    assert verdict.verdict == "broken", str(verdict)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert (found.layer, found.fault, found.tensors) == ("weights", None, [NAME]), str(found)
    return found


def changed(tmp_path: Path, kind: TensorType, change: Change) -> Finding:
    return one(file_with(tmp_path / "changed.gguf", {NAME: lambda t: as_type(t, kind, change)}))


def rows_set(rows: slice | list[int], value: float) -> Change:
    def change(x: np.ndarray) -> np.ndarray:
        x[rows] *= np.float32(value)
        return x

    return change


FLOATS = [types.F32, types.F16, types.BF16]
CHANGES: dict[str, tuple[Change, str, dict]] = {
    "scaled": (lambda x: x * 1.02, "weights.scaled", {"by": 1.02}),
    "negated": (lambda x: -x, "weights.negated", {}),
    "offset": (lambda x: x + 0.01, "weights.offset", {"offset": 0.01}),
    "rows of zeros": (rows_set(slice(30), 0), "weights.rows-zero", {"rows": "0–29"}),
    "two rows of zeros": (rows_set([3, 77], 0), "weights.rows-zero", {"rows": "3, 77"}),
    "one row scaled": (rows_set([5], 1.05), "weights.scaled-in-rows", {"rows": "5", "by": 1.05}),
    "rows negated": (rows_set(slice(8, 10), -1), "weights.negated-in-rows", {"rows": "8–9"}),
    "columns": (lambda x: x[:, np.r_[1, 0, 2 : x.shape[1]]], "weights.columns-permuted", {"moved": 2, "of": 256}),
}


@pytest.mark.parametrize("kind", FLOATS, ids=str)
@pytest.mark.parametrize("what", CHANGES)
def test_changed_floats_are_told_in_figures(what: str, kind: TensorType, tmp_path: Path) -> None:
    change, code, parameters = CHANGES[what]
    found = changed(tmp_path, kind, change)
    assert found.code == code, str(found)
    for name, value in parameters.items():
        assert found.parameters[name] == (pytest.approx(value, rel=5e-3) if isinstance(value, float) else value)
    assert {"scale", "offset", "correlation", "rel_l2", "rows_changed"} <= found.evidence.keys()


@pytest.mark.parametrize("kind", [types.F16, types.BF16, types.F32], ids=str)
def test_one_value_that_is_not_finite(kind: TensorType, tmp_path: Path) -> None:
    def inf(tensor: Tensor) -> Tensor:
        tensor = as_type(tensor, kind)
        raw = np.array(tensor.raw)
        pattern = {2: np.uint16(0x7C00 if kind is types.F16 else 0x7F80), 4: np.uint32(0x7F800000)}[kind.block_bytes]
        raw.view(pattern.dtype)[256 * 9 + 17] = pattern
        return tensor.replace(raw=raw)

    found = one(file_with(tmp_path / "inf.gguf", {NAME: inf}))
    assert (found.code, found.parameters) == ("weights.not-finite", {"rows": "9"})


@pytest.mark.parametrize("kind", [types.Q8_0, types.Q6_K, types.Q5_0], ids=str)
def test_a_lost_row_of_a_re_encoded_tensor_is_named(kind: TensorType, tmp_path: Path) -> None:
    assert changed(tmp_path, kind, rows_set([101], 0)).parameters["rows"] == "101"


def test_a_lost_row_hides_from_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: only a few rows are compared, as they once were."""
    path = file_with(tmp_path / "lost.gguf", {NAME: lambda t: as_type(t, types.F16, rows_set([101], 0))})
    assert peel(REF, path, fast=True).verdict == "broken"
    every = row_errors.beyond
    monkeypatch.setattr("aprlab.onion.layers.dtype.beyond", lambda e, *kinds: every(e.of_rows(np.arange(0, e.rows, 64)), *kinds))
    assert peel(REF, path, fast=True).verdict == "equivalent"


@pytest.mark.parametrize("kind", [types.Q4_K, types.Q6_K], ids=str)
def test_a_scale_of_every_block_halved(kind: TensorType, tmp_path: Path) -> None:
    def halved(tensor: Tensor) -> Tensor:
        raw = np.array(tensor.raw)
        raw.view(REGISTRY[tensor.type].layout)["d"] *= np.float16(0.5)
        return tensor.replace(raw=raw)

    with open_model(REF) as model:
        name = next(n for n, t in model.tensors.items() if t.type is kind)
    path = file_with(tmp_path / "halved.gguf", {name: halved})
    (found,) = peel(REF, path, fast=True).findings
    assert (found.layer, found.code, found.tensors) == ("weights", "weights.field-scaled", [name])
    assert found.parameters == {"fields": ["d"], "by": 0.5}


def matrices() -> list[str]:
    with open_model(REF) as model:
        return [name for name, t in model.tensors.items() if len(t.shape) == 2]


@pytest.mark.parametrize("kind", [types.F16, types.BF16, types.Q8_0, types.Q5_K, types.Q4_1, types.Q3_K], ids=str)
def test_re_encoded_within_the_bound_is_equivalent(kind: TensorType, tmp_path: Path) -> None:
    path = file_with(tmp_path / "other.gguf", {name: lambda t: as_type(t, kind) for name in matrices()})
    verdict = peel(REF, path, fast=True)
    assert verdict.verdict == "equivalent", str(verdict)
    assert {f.layer for f in verdict.findings} == {"dtype"}


def test_bf16_and_f16_of_the_same_weights_are_equivalent(tmp_path: Path) -> None:
    """Neither is the other one rounded: both were rounded from one source."""

    def noisy(x: np.ndarray) -> np.ndarray:
        return x * np.float32(1 + 1 / 3000) + np.float32(1e-5)

    names = matrices()
    for kind in (types.BF16, types.F16):
        file_with(tmp_path / f"{kind}.gguf", {name: lambda t, k=kind: as_type(t, k, noisy) for name in names})
    verdict = peel(tmp_path / "BF16.gguf", tmp_path / "F16.gguf", fast=True)
    assert verdict.verdict == "equivalent", str(verdict)


def test_encoded_once_more_in_the_same_type_is_equivalent(tmp_path: Path) -> None:
    path = file_with(tmp_path / "again.gguf", {name: lambda t: as_type(t, t.type) for name in matrices()})
    verdict = peel(REF, path, fast=True)
    assert verdict.verdict == "equivalent", str(verdict)
    assert {f.code for f in verdict.findings} == {"dtype.re-encoded"}
