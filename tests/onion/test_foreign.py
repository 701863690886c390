"""A foreign trace: healthy ones are within their contract, a fault is found where it enters and called by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from variants import first_layers

from aprlab.engines import roundings
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import Contract
from aprlab.engines.reference import ReferenceEngine
from aprlab.faults import session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.foreign_naming import fitting_contract, marks, names
from aprlab.onion.foreign_shadow import Judges, Operation, shadow_of, wrong
from aprlab.onion.peeling import peel
from aprlab.sources.engines import EngineSource
from aprlab.tracing.traces import Point, Trace

TOKENS = [5, 9, 30, 77, 41, 8, 200, 31, 12]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    """The first three layers of the embedded model: enough for every operation, and quick."""
    return first_layers(open_model(tiny), 3)


@pytest.fixture(scope="module")
def healthy(model: Model) -> Trace:
    return EngineSource(Session(ReferenceEngine(model))).run(TOKENS, prompt=7)


def judged(model: Model, given: Trace, contract: str | None = None) -> tuple[list[Operation], Judges]:
    judges = Judges(model, Contract.parse(given.contract if contract is None else contract))
    return shadow_of(given, judges, model.config), judges


def altered(given: Trace, point: str, values: np.ndarray) -> Trace:
    old = given[point]
    return replace(given, points={**given.points, point: Point(point, values.astype(np.float32), old.positions, "x", "f32")})


@pytest.mark.parametrize("contract", ["q8", "q8, cache f16, flash", "bf16, cache bf16, values bf16"])
def test_a_healthy_trace_is_within_its_contract(model: Model, contract: str) -> None:
    engine = ContractEngine(model, Contract.parse(contract))
    given = EngineSource(Session(engine)).run(TOKENS, prompt=7)
    operations, _ = judged(model, given)
    assert len(operations) == len(given)
    assert [o.point for o in operations if not o.fits] == []


def test_float32_is_within_float32(model: Model, healthy: Trace) -> None:
    assert all(o.fits for o in judged(model, healthy)[0])


@pytest.mark.parametrize(
    ("made", "declared"),
    [("q8", "f32"), ("f32", "q8"), ("q8", "q8, cache f16"), ("bf16, values bf16", "f32")],
)
def test_another_contract_than_declared_is_recognised(model: Model, made: str, declared: str) -> None:
    given = EngineSource(Session(ContractEngine(model, Contract.parse(made)))).run(TOKENS)
    operations, judges = judged(model, given, declared)
    bad = [o for o in operations if not o.fits]
    assert bad
    found = fitting_contract(bad, judges)
    assert found is not None
    assert str(found[0]) == made
    assert len(found[1]) == len(bad)


@pytest.mark.parametrize(
    ("fault", "step"),
    [("rope-theta", "q_rope"), ("gqa-modulo", "attn"), ("lost-k-biases", "k"), ("wrong-eps", "attn_norm"),
     ("layer-norm", "attn_norm"), ("kv-empty", "attn")],
)  # fmt: skip
def test_a_fault_is_found_where_it_enters_and_named(model: Model, fault: str, step: str) -> None:
    given = EngineSource(session_with(model, [fault], "reference")).run(TOKENS, prompt=7)
    operations, judges = judged(model, given)
    bad = [o for o in operations if not o.fits]
    assert bad[0].step == step
    found = names(operations, judges, model.config)
    assert [one.form.fault for one in found if one.form is not None] == [fault]
    if fault == "kv-empty":
        assert bad[0].rows[bad[0].wrong].tolist() == [7, 8]  # while decoding
    if fault == "rope-theta":
        assert not any(o.wrong[0] for o in bad)  # position 0 is not rotated


def test_a_fault_of_one_layer_does_not_accuse_the_next(model: Model, healthy: Trace) -> None:
    """Whoever gets wrong inputs and computes rightly is not wrong."""
    shape = healthy["layers.1.down"].values
    zero = Point("layers.1.down", np.zeros_like(shape), np.arange(len(TOKENS)), "x", "f32")
    given = EngineSource(Session(ReferenceEngine(model))).run(TOKENS, inject={"layers.1.down": zero})
    assert [o.point for o in judged(model, given)[0] if not o.fits] == ["layers.1.down"]


def test_without_the_points_between_the_layer_is_found(model: Model, healthy: Trace) -> None:
    whole = EngineSource(session_with(model, ["zeroed-norm"], "reference")).run(TOKENS)
    operations, judges = judged(model, whole.select("layers.*.out"))
    assert [o.point for o in operations] == [f"layers.{n}.out" for n in range(3)]
    assert [o.point for o in operations if not o.fits] == ["layers.1.out"]
    assert names(operations, judges, model.config) == []  # several operations in one: none is named
    assert all(o.fits for o in judged(model, healthy.select("layers.*.out,logits"))[0])


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        (lambda x: x * 0.5, {"scaled_by": 0.5}), (lambda x: x + np.linspace(1, 2, x.shape[-1]), {"constant_added": True}),
        (lambda x: x[..., ::-1], {"permuted": True}), (lambda x: np.where(np.arange(x.shape[-1]) == 7, 9, x), {"channels": [7]}),
        (lambda x: np.where(np.arange(len(x))[:, None] >= 4, -x, x), {"positions": "4…8"}),
        (lambda x: np.where(np.arange(x.shape[-1]) == 3, np.nan, x), {"not_finite": 9}),
    ],
)  # fmt: skip
def test_what_no_form_gives_is_described(model: Model, healthy: Trace, change: object, mark: dict[str, object]) -> None:
    point = "layers.2.up"
    given = altered(healthy, point, change(healthy[point].values))  # type: ignore[operator]
    (bad,) = [o for o in judged(model, given)[0] if o.point == point]
    assert marks(bad).items() >= mark.items()


@pytest.mark.parametrize(
    ("off", "rounding", "expected"),
    [([1, 1, 1, 1], [0, 0, 0, 0], []), ([1, 1, 9, 1], [0, 0, 0, 0], [2]), ([1, 1, 9, 1], [10, 10, 10, 10], []),
     ([9, 9, 9, 1], [10, 10, 10, 10], [0, 1, 2])],
)  # fmt: skip
def test_rounding_excuses_some_positions_and_never_most(
    off: Sequence[float], rounding: Sequence[float], expected: list[int]
) -> None:
    found = wrong(np.array(off, float), np.full(4, 2.0), np.array(rounding, float))
    assert np.flatnonzero(found).tolist() == expected


@pytest.mark.parametrize("rounding", [roundings.q8_0, roundings.q8_k, roundings.f16, roundings.bf16])
def test_a_rounding_done_twice_is_done_once(rounding: roundings.Rounding) -> None:
    x = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    once = rounding(x)
    assert not np.array_equal(once, x)
    assert np.allclose(rounding(once), once, rtol=1e-3, atol=1e-3 * np.abs(x).max() / 127)
    assert not rounding(np.zeros((2, 256), np.float32)).any()


def test_peel_judges_each_source_and_proves_the_name(model: Model) -> None:
    found = peel(model, sources=["reference", "reference+gqa-modulo"], prompt="Hi")
    assert (found.verdict, found.faults) == ("broken", ["gqa-modulo"])
    assert {f.evidence["source"] for f in found.findings} == {"reference+gqa-modulo"}
    assert found.first_divergence is not None and found.first_divergence["point"] == "layers.0.attn"
    assert found.repair is not None
    for proof in ("with the right values injected", "with the fault in our engine"):
        equal, of = found.repair.proof[proof]["likeliest token equal"].split(" of ")
        assert equal == of
    before, of = found.repair.proof["before"]["likeliest token equal"].split(" of ")
    assert before != of
