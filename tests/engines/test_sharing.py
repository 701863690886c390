"""A session that borrows what two models have in common: the same bits as with an engine of its own, and nothing done twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import random_model

from aprlab import engines
from aprlab.architectures import forward
from aprlab.engines.base import Engine
from aprlab.engines.delegating import SharingEngine
from aprlab.faults.tensors import with_values
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.run_cost import measured
from aprlab.tracing import golden_rule
from aprlab.tracing.golden_rule import Golden

CHANGED = ("blk.0.attn_q.bias", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def other(tensor: Tensor) -> Tensor:
    """The tensor with half its values, its bytes in memory."""
    return tensor.replace(raw=with_values(tensor, lambda values: values / 2).raw)


def with_other(model: Model, *names: str) -> Model:
    return model.with_changes(tensors=model.tensors | {name: other(model.tensors[name]) for name in names})


def copied(model: Model) -> Model:
    """The same bytes at another place in memory."""
    return model.with_changes(tensors={name: t.replace(raw=t.raw.copy()) for name, t in model.tensors.items()})


def test_what_is_in_common_is_told_by_bytes() -> None:
    model = random_model()
    assert model.in_common(model) == model.in_common(copied(model)) == model.tensors.keys()
    assert model.in_common(with_other(model, *CHANGED)) == model.tensors.keys() - set(CHANGED)
    first = next(iter(model.tensors))
    fewer = model.with_changes(tensors={name: t for name, t in model.tensors.items() if name != first})
    assert model.in_common(fewer) == fewer.in_common(model) == fewer.tensors.keys()
    norm = model.tensors["blk.0.ffn_norm.weight"]
    for one in (norm.replace(shape=(1, norm.size)), with_values(norm, lambda values: values)):  # another shape; made on demand
        assert norm.name not in model.in_common(model.with_changes(tensors=model.tensors | {norm.name: one}))


@pytest.mark.parametrize("name", ["reference", "jit", "jit:q8"])
def test_borrowed_weights_give_the_bits_of_an_engine_of_its_own(name: str) -> None:
    model = random_model()
    changed = with_other(copied(model), *CHANGED)
    lender, alone = engines.create(name, model), engines.create(name, changed)
    sharing = SharingEngine(lender, changed, model.in_common(changed), lambda: engines.create(name, changed))
    for passes in ([IDS], [IDS[:5], IDS[5:6], IDS[6:7]]):
        caches = [engine.new_cache(model.config, len(IDS)) for engine in (alone, sharing, lender)]
        for ids in passes:
            a, b, before = (
                np.array(engine.to_numpy(forward(engine, model.config, ids, cache)))
                for engine, cache in zip((alone, sharing, lender), caches, strict=True)
            )
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
            assert not np.array_equal(a, before), "the changed weights had no part in it"
    assert not sharing.whole
    held = {"weights": 0, **sharing.memory()}
    assert held.get("packed", 0) < alone.memory().get("packed", 1)
    for engine in (sharing, alone, lender):
        engine.close()


@pytest.mark.parametrize("length", [12, 1])
def test_a_model_that_is_the_reference_in_all_is_run_once(length: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(tiny) as model, open_model(tiny) as again:
        golden = Golden(model, prompt="What is 2+2?", max_tokens=length)
        assert (golden.stop == "eos") is (length == 12)
        apart = Golden(Session(model), prompt="What is 2+2?", max_tokens=length).measure(again)  # lends nothing: two runs
        runs: list[Engine] = []
        real = golden_rule.forward
        monkeypatch.setattr(golden_rule, "forward", lambda engine, *args: runs.append(engine) or real(engine, *args))
        for _ in range(2):
            same = golden.measure(again)
            assert same.to_json() == apart.to_json() and same.chosen == apart.chosen and same.bitwise and same.says_the_same
            assert runs == [golden.session.engine] * (length == 1), "the step after the answer, where nothing ended it"
        assert measured(same, golden) == measured(apart, golden) and golden.steps == len(golden.chosen)
        runs.clear()
        wrong = golden.measure(with_other(again, "output_norm.weight"))
        assert len(runs) == 1 and not wrong.bitwise
        assert not golden.measure(again.with_changes(config=replace(again.config, rope_theta=10.0))).bitwise
        assert len(runs) == 2, "another config is another run"
        deaf = again.with_changes(tokenizer=replace(again.tokenizer, merges=again.tokenizer.merges[1:], eos_token_id=0))
        found = golden.measure(deaf)
        assert len(runs) == 2 and not found.says_the_same and not found.tokens, "other words are other words, whatever the pass"
