"""The protocol of sources: our own engines as sources, contracts, injection, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import aprlab
from aprlab.engines.contracts import Contract
from aprlab.errors import UsageError
from aprlab.sources import Source, source
from aprlab.tracing.comparisons import compare_traces
from aprlab.tracing.traces import Point, Trace

TOKENS = [5, 9, 30, 77, 41, 8, 200]


@pytest.fixture(scope="module")
def ours(tiny: Path) -> Iterator[Source]:
    with source("reference", tiny) as found:
        yield found


@pytest.mark.parametrize("text", ["f32", "q8", "q8, cache f16, flash", "bf16, cache bf16, values bf16", "f32, flash"])
def test_a_contract_is_its_line(text: str) -> None:
    assert str(Contract.parse(text)) == text


@pytest.mark.parametrize("text", ["", "f8", "q8, cache", "q8, cache q8", "q8, flash on", "f32, a 3", "f32, cache f16, cache f32"])
def test_an_unknown_contract_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Contract.parse(text)
    assert caught.value.code == "engines.unknown-contract"


def test_our_engine_as_a_source_traces_as_it_does_alone(ours: Source, tiny: Path) -> None:
    alone = aprlab.trace(aprlab.open_model(tiny), TOKENS)
    found = ours.run(TOKENS)
    assert compare_traces(alone, found).equal
    assert found.prompt == len(TOKENS)


def test_prompt_and_decode_are_the_passes_that_were_asked_for(ours: Source, tmp_path: Path) -> None:
    found = ours.run(TOKENS, "layers.*.out,logits", prompt=3)
    assert found.prompt == 3
    assert found["logits"].positions.tolist() == list(range(len(TOKENS)))
    kept = Trace.load(found.save(tmp_path / "t.npz"))
    assert kept.prompt == 3
    assert compare_traces(found, kept).equal


@pytest.mark.parametrize("prompt", [None, 4])
def test_what_is_injected_goes_on(ours: Source, prompt: int | None) -> None:
    healthy = ours.run(TOKENS, prompt=prompt)
    at = np.array([2, 5])
    zero = Point("layers.0.down", np.zeros_like(healthy["layers.0.down"].values[at]), at, "x", "f32")
    found = ours.run(TOKENS, prompt=prompt, inject={"layers.0.down": zero})
    assert not found["layers.0.down"].values[at].any()
    assert np.array_equal(found["layers.0.out"].values[at], found["layers.0.ffn_inp"].values[at])
    assert np.array_equal(found["layers.0.out"].values[[0, 1, 3]], healthy["layers.0.out"].values[[0, 1, 3]])
    assert not np.array_equal(found["logits"].values[6], healthy["logits"].values[6])  # through attention


def test_an_answer_is_the_greedy_one(ours: Source, tiny: Path) -> None:
    expected = aprlab.generate(aprlab.open_model(tiny), TOKENS, max_tokens=3).tokens
    assert ours.answer(TOKENS, len(expected)) == expected


def test_points_under_unlike_contracts_are_not_compared(ours: Source) -> None:
    found = ours.run(TOKENS)
    points = {name: Point(name, p.values, p.positions, "other", "q8, cache f16") for name, p in found.points.items()}
    other = Trace(points, TOKENS, "other", "q8, cache f16", found.config, found.source)
    with pytest.raises(UsageError) as caught:
        compare_traces(found, other)
    assert caught.value.code == "trace.points-unlike"


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"tokens": []}, "forward.no-tokens"), ({"tokens": [10**6]}, "tokenizer.token-out-of-range"),
        ({"points": "layers.9.nothing"}, "trace.pattern-unmatched"), ({"prompt": 0}, "source.prompt-length"),
        ({"prompt": 8}, "source.prompt-length"),
        ({"inject": {"embed": Point("embed", np.zeros((1, 3), np.float32), np.array([0]), "", "")}}, "source.injection-shape"),
        ({"inject": {"nothing": Point("nothing", np.zeros((1, 3), np.float32), np.array([0]), "", "")}}, "trace.point-missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(ours: Source, asked: dict[str, object], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        ours.run(**{"tokens": TOKENS, **asked})  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("what", "code"),
    [("oven", "source.unknown"), ("reference,contract", "source.bad-option"), ("reference,heat=3", "source.unknown-option")],
)
def test_an_unknown_source_is_refused(tiny: Path, what: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        source(what, tiny)
    assert caught.value.code == code
    with pytest.raises(UsageError) as caught:
        source("reference")
    assert caught.value.code == "source.no-model"
