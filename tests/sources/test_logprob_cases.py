"""A server's log-probabilities, kept as JSON, are a case: the figures name the fault where the text alone need not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import Manners, serving

from aprlab.cli.app import run_cli
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import Contract
from aprlab.errors import AprlabError
from aprlab.faults import session_with
from aprlab.forensics.cases import Case, rank_cases, read_cases
from aprlab.forensics.logprob_evidence import Figures
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.sources.json_http import JsonServer

FEW = ["rope-theta", "rope-norm", "gqa-modulo", "lost-k-biases", "wrong-eps", "q4k-min-lost", "rope-norm+lost-k-biases"]
PROMPT = "What is 2+2?"


@pytest.fixture(scope="module")
def healthy(tiny: Path) -> Session:
    return Session(open_model(tiny), engine="reference")


def answered(session: Session, shape: str = "new", steps: int = 3) -> Any:
    """What a server says, as JSON that was on a disk."""
    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": steps, "logprobs": True, "top_logprobs": 20}
    with serving(session, Manners(shape=shape)) as server:
        return json.loads(json.dumps(JsonServer(server.url).ask("/v1/chat/completions", asked)))


@pytest.mark.parametrize("shape", ["new", "bytes", "legacy"])
def test_the_fault_behind_the_figures_comes_first(healthy: Session, shape: str) -> None:
    for fault in ("lost-k-biases", "rope-norm+lost-k-biases") if shape == "new" else ("rope-theta",):
        case = Case("x", PROMPT, response=answered(session_with(healthy, fault.split("+")), shape))
        found = rank_cases(healthy, [case], faults=FEW)["x"]
        first, second = found.suspects[:2]
        assert "+".join(first.faults) == fault and first.match is not None and second.match is not None
        assert first.match.score > 0.99 and second.match.score < 0.9
        assert found.best is first and found.to_json()["suspects"][0]["why"].startswith("log-probabilities 0.0")


def test_healthy_figures_are_healthy_under_the_contract_of_another_program(healthy: Session) -> None:
    rounded = Session(ContractEngine(healthy.model, Contract("q8", "f16")))
    found = rank_cases(healthy, [Case("x", PROMPT, response=answered(rounded))], faults=FEW)["x"]
    assert found.conclusion == "that is what the healthy model says" and found.best is None


def test_vllm_and_llama_servers_own_completion_are_read(healthy: Session) -> None:
    tokens = healthy.generate(PROMPT, max_tokens=2).tokens
    name = healthy.tokenizer.decode([tokens[0]])
    old = {"tokens": [f"token_id:{tokens[0]}"], "token_logprobs": [-0.25], "top_logprobs": [{f"token_id:{tokens[0]}": -0.25}]}
    vllm = {"choices": [{"text": name, "logprobs": old}], "prompt_logprobs": None}
    entry = {"id": tokens[0], "token": name, "bytes": list(name.encode()), "logprob": -0.25, "top_logprobs": []}
    entry["top_logprobs"] = [dict(entry)]
    own = {"content": name, "completion_probabilities": [entry], "tokens_evaluated": 7}
    for response in (vllm, own):
        figures = Figures.of_json(response, healthy, 24)
        assert figures.tokens == (tokens[0],) and dict(figures.tops[0]) == {tokens[0]: -0.25}
    row = np.full((1, 840), -50.0)
    row[0, tokens[0]], row[0, tokens[0] - 1] = np.log(np.exp(-0.25)), np.log(1 - np.exp(-0.25))
    assert figures.misfit(row) < 1e-6  # the rest is one chance, whoever has it
    assert figures.misfit(row[:, ::-1]) > 10


def test_a_file_with_a_response_goes_through_the_command_line(
    healthy: Session, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "case.json"
    response = answered(session_with(healthy, ["gqa-modulo"]), steps=1)
    path.write_text(json.dumps({"id": "seen", "prompt": PROMPT, "response": response, "cause": ["gqa-modulo"]}))
    assert run_cli(["forensics", str(tiny), "--case", str(path), "--only", "rope-theta,gqa-modulo"]) == 0
    assert "gqa-modulo comes 1." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ([], "cases.entry"), ({}, "server.shape"), ({"choices": []}, "server.shape"),
        ({"choices": [{"text": "x"}]}, "cases.no-logprobs"),
        ({"choices": [{"text": "x", "logprobs": {"content": [{"token": "x", "id": 99999, "logprob": -1, "top_logprobs": []}]}}]},
         "server.other-vocabulary"),
    ],
)  # fmt: skip
def test_what_is_no_such_answer_is_refused(healthy: Session, tmp_path: Path, response: Any, code: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"prompt": "Hi", "text": "x", "response": response}))
    with pytest.raises(AprlabError) as caught:
        rank_cases(healthy, read_cases(path), faults=FEW)
    assert caught.value.code == code
