"""A source that runs another model than the one it is judged on: said at once, and never taken for a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from variants import first_layers

from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import AprlabError
from aprlab.faults import session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.source_peeling import peel_sources
from aprlab.quants.types import F32
from aprlab.sources.engines import EngineSource

IDS = [5, 9, 30, 77, 41]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return first_layers(open_model(tiny), 3)


def changed(model: Model, change: Callable[[str, np.ndarray], np.ndarray]) -> Model:
    """The model with other values in its matrices and norms, as F32."""
    tensors = {name: in_floats(t, change(name, t.dequantise())) for name, t in model.tensors.items()}
    return replace(model.with_changes(tensors=tensors), path=Path("/another/file.gguf"))


def in_floats(tensor: Tensor, values: np.ndarray) -> Tensor:
    raw = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    return Tensor(tensor.name, F32, values.shape, raw, tensor.origin)


def of(model: Model) -> EngineSource:
    return EngineSource(Session(ReferenceEngine(model)))


def noise(by: float) -> Callable[[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(1)
    return lambda name, x: x + by * x.std() * rng.standard_normal(x.shape).astype(np.float32) if x.ndim == 2 else x


def test_other_values_are_no_fault_and_are_said_in_one_line(model: Model) -> None:
    for other, what in (
        (changed(model, noise(0.03)), "the same rows in another encoding"),
        (changed(model, noise(3)), "the rows of another table"),
        (changed(model, lambda _, x: x.astype(np.float16)), "the same rows rounded to F16"),
    ):
        verdict = peel_sources(model, [of(other)], prompt=IDS)
        (found,) = verdict.findings
        assert (verdict.verdict, found.code) == ("not-comparable", "instrument.other-weights")
        assert found.cause.parameters["what"] == what
        assert verdict.repair is None and found.evidence["products_off"] == "22 of 22"


def test_other_products_under_the_same_embedding_are_said_to_be_either(model: Model) -> None:
    other = changed(model, lambda name, x: noise(0.1)(name, x) if name.startswith("blk") else x)
    verdict = peel_sources(model, [of(other)], prompt=IDS)
    assert (verdict.verdict, [f.code for f in verdict.findings]) == ("broken", ["forward.products-differ"])


def test_the_models_own_file_read_wrongly_is_broken(model: Model) -> None:
    other = replace(changed(model, noise(0.03)), path=model.path)
    verdict = peel_sources(model, [of(other)], prompt=IDS)
    assert (verdict.verdict, [f.code for f in verdict.findings]) == ("broken", ["forward.weights-differ"])


def test_a_known_decoder_is_still_named_though_most_products_are_wrong(model: Model) -> None:
    verdict = peel_sources(model, [EngineSource(session_with(model, ["q4k-min-lost"], "reference"))], prompt=IDS)
    assert (verdict.verdict, verdict.faults) == ("broken", ["q4k-min-lost"])


def test_other_dimensions_are_refused_naming_each(model: Model) -> None:
    for config, said in (
        (replace(model.config, block_count=2), "block_count 2, not 3"),
        (replace(model.config, vocab_size=848, head_count=2), "head_count 2, not 8; vocab_size 848, not 840"),
        (replace(model.config, architecture="llama"), "architecture llama, not qwen2"),
    ):
        theirs = of(model)
        theirs.config = config
        with pytest.raises(AprlabError) as caught:
            peel_sources(model, [theirs], prompt=IDS)
        assert caught.value.code == "source.other-model" and said in str(caught.value)
