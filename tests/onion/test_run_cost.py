"""What types may cost is measured on the model itself; the verdict states KL and tokens, and is bound by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_files import REF, as_type, file_with
from variants import shallow

from aprlab.engines import create
from aprlab.formats import open_model
from aprlab.onion import run_cost
from aprlab.onion.peeling import peel
from aprlab.onion.row_errors import row_errors
from aprlab.onion.verdict import Verdict
from aprlab.quants import types
from aprlab.quants.types import TensorType

KINDS = (types.Q8_0, types.Q4_0, types.Q2_K)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(REF, tmp_path_factory.mktemp("cost") / "base.gguf")


@pytest.fixture(scope="module")
def verdicts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[TensorType, Verdict]:
    """The base next to itself, re-encoded in each type."""
    folder = tmp_path_factory.mktemp("types")
    with open_model(base) as model:
        names = [name for name, t in model.tensors.items() if len(t.shape) == 2]
    files = {
        kind: file_with(folder / f"{kind}.gguf", {n: lambda t, k=kind: as_type(t, k) for n in names}, base) for kind in KINDS
    }
    return {kind: peel(base, path, max_tokens=6, threads=1) for kind, path in files.items()}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_cost_is_what_random_errors_of_that_size_cost(kind: TensorType, verdicts: dict[TensorType, Verdict]) -> None:
    verdict = verdicts[kind]
    assert verdict.verdict == "equivalent", str(verdict)
    cost = verdict.cost
    assert 0 < cost["kl"] <= cost["kl_allowed"] < 100 * cost["kl"]
    assert 0 < cost["distance"] <= cost["distance_allowed"] < 10 * cost["distance"]
    assert f"KL {cost['kl']:.3g} nats" in str(verdict) and verdict.to_json()["cost"]["kl"] == cost["kl"]


def test_tokens_that_differ_are_said(verdicts: dict[TensorType, Verdict]) -> None:
    said = {kind: [f for f in v.findings if f.code == "forward.answer-differs"] for kind, v in verdicts.items()}
    assert {kind: v.cost["tokens"] for kind, v in verdicts.items()} == {kind: not found for kind, found in said.items()}
    found = [finding for some in said.values() for finding in some]
    assert found, "no type of this test changes a token"
    assert all(f.harmless and f.parameters["differ"] > 0 for f in found)


COST = {"bitwise": False, "tokens": True, "same_token": 5, "steps": 5, "distance": 0.1, "distance_allowed": 0.2, "kl": 0.01,
        "kl_allowed": 0.02}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "code"),
    [({}, None), ({"kl": 0.03}, "forward.costs-too-much"), ({"distance": 0.3}, "forward.costs-too-much"),
     ({"tokens": False, "same_token": 4}, "forward.answer-differs")],
)  # fmt: skip
def test_a_cost_is_bound_by_its_limits(changed: dict[str, Any], code: str | None) -> None:
    found = run_cost.cost_finding({**COST, **changed})
    assert (None if found is None else found.code) == code


def test_random_errors_have_the_size_of_what_was_lost(base: Path) -> None:
    name = "blk.0.ffn_up.weight"
    with open_model(base) as model:
        tensor = model.tensors[name]
        errors = row_errors(tensor, types.Q4_0, as_type(tensor, types.Q4_0).raw)
        assert errors is not None
        engine = create("reference", model)
        x = np.random.default_rng(1).standard_normal((64, tensor.cols)).astype(np.float32)
        noisy = run_cost.NoisyEngine(engine, {name: errors}, 0)
        exact, moved = engine.matmul(x, name), noisy.matmul(x, name)
        held = as_type(tensor, types.Q4_0).dequantise()
        lost = np.linalg.norm(x @ (held - tensor.dequantise()).T)
        assert np.linalg.norm(moved - exact) == pytest.approx(lost, rel=0.1)
        other = "blk.0.ffn_gate.weight"
        assert np.array_equal(noisy.matmul(x, other), engine.matmul(x, other))
