"""The real Qwen2.5-Coder-0.5B: the same prompt ids and the same greedy text as llama.cpp in F32, token for token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peer import f32_copy, log_softmax, logprobs, serve

from aprlab.architectures import forward, points
from aprlab.conversion.converter import convert
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.tracing.traces import trace

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "golden-0.5b.json").read_text())
RUNS: list[dict[str, Any]] = GOLDEN["runs"]


def names(run: dict[str, Any]) -> str:
    return f"{run['mode']}: {run['prompt']}"


@pytest.fixture(scope="module")
def session(real_05b: Path) -> Iterator[Session]:
    made = Session(open_model(real_05b), threads=2)
    yield made
    made.engine.close()


@pytest.mark.real
@pytest.mark.parametrize("run", RUNS, ids=names)
def test_prompt_ids(session: Session, run: dict[str, Any]) -> None:
    ids = session.prompt_tokens(run["prompt"], raw=run["mode"] == "raw")
    assert ids == run["prompt_ids"]
    assert session.tokenizer.decode(ids) == run["prompt_text"]


@pytest.mark.real
@pytest.mark.parametrize("run", RUNS, ids=names)
def test_greedy_output_token_for_token(session: Session, run: dict[str, Any]) -> None:
    most = 20  # tokens: two of the answers end before that, and the third costs a second a token
    answer = session.generate(run["prompt"], raw=run["mode"] == "raw", max_tokens=most, keep_logits=True)
    assert answer.tokens == run["output_ids"][:most]
    assert run["output_text"].startswith(answer.text) and answer.text.strip()
    ended = len(run["output_ids"]) < most
    assert answer.stop == (run["stop"] if ended else "length")
    assert answer.text == run["output_text"] or not ended
    assert answer.logits is not None
    top = np.sort(answer.logits, axis=-1)[:, -2:]
    np.testing.assert_allclose(top[:, 1] - top[:, 0], run["margin"][: len(top)], atol=1e-3)  # the lead, step by step


@pytest.mark.real
def test_gguf_and_apr_give_the_same_logits_bit_for_bit(session: Session, real_05b: Path, tmp_path: Path) -> None:
    convert(real_05b, tmp_path / "model.apr")
    prompt = RUNS[0]["prompt_ids"]
    with open_model(tmp_path / "model.apr") as model:
        assert model.config == session.config
        other = Session(model, threads=2)
        assert other.chat_tokens(RUNS[0]["prompt"]) == prompt
        mine, theirs = (
            s.engine.to_numpy(forward(s.engine, s.config, prompt[:5], s.engine.new_cache(s.config, 5))) for s in (session, other)
        )
        other.engine.close()
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.real
def test_every_point_of_the_real_model(session: Session) -> None:
    kept = trace(session, RUNS[0]["prompt_ids"], positions="last")
    assert {name: kept[name].values.shape[1:] for name in kept} == points(session.config)
    assert all(line.nan == line.inf == 0 for line in kept.summary())
    assert int(kept["logits"].values[0].argmax()) == RUNS[0]["output_ids"][0]


@pytest.mark.peer
def test_logits_are_llama_cpps_in_f32(tiny: Path, tmp_path: Path) -> None:
    """On the embedded model; `benchmarks/logits_against_llama.py` does the same for real ones."""
    pytest.importorskip("xllamacpp")
    session = Session(open_model(tiny))
    server = serve(f32_copy(tiny, tmp_path))
    answer = session.generate("What is 2+2?", max_tokens=4, keep_logits=True)
    assert answer.logits is not None
    for step, logits in enumerate(answer.logits):
        theirs = logprobs(server, [*answer.prompt_tokens, *answer.tokens[:step]], session.config.vocab_size)
        assert np.abs(log_softmax(logits) - theirs).max() < 1e-4
        if step:  # what another position's logits would look like
            assert np.abs(log_softmax(answer.logits[step - 1]) - theirs).max() > 1
