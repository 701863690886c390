"""Each of the ten stages passes a healthy file and notices what it is there for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from aprlab import engines
from aprlab.cli.app import run_cli
from aprlab.engines import create
from aprlab.engines.delegating import DelegatingEngine
from aprlab.errors import UsageError
from aprlab.faults import convert_with, session_with, upstream
from aprlab.formats import open_model
from aprlab.gates import ten_stages as module
from aprlab.gates.ten_stages import STAGES, check
from aprlab.inference.session import Session
from aprlab.model.model import Model


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    return open_model(tiny)


def failed(results) -> list[str]:
    return [r.name for r in results if not r.ok]


def test_a_healthy_file_passes_ten_stages_which_are_upstreams_by_name(model) -> None:
    results = check(model)
    assert failed(results) == [] and module.passed(results) == (10, 10)
    assert [r.name for r in results] == list(upstream.ten_checks([], [1], np.zeros(3, np.float32)))


class NextRow(DelegatingEngine):
    def embed(self, tokens: np.ndarray, weight: str) -> Any:
        return self.inner.embed(tokens + 1, weight)


class GateForUp(DelegatingEngine):
    def swiglu(self, gate: Any, up: Any) -> Any:
        return self.inner.swiglu(up, gate)


class Cut(DelegatingEngine):
    """The output head's last products are left out."""

    def matmul(self, x: Any, weight: str, bias: str | None = None) -> Any:
        y = self.inner.matmul(x, weight, bias)
        if weight == "output.weight":
            y = y.copy()
            y[:, len(y[0]) // 2 :] = 0
        return y


@pytest.mark.parametrize(
    ("stage", "mutant"),
    [
        ("tokenizer", "no-merges"), ("tokenizer", "template-doubled"), ("tokenizer", "split-specials"), ("embedding", NextRow),
        ("positions", "rope-norm"), ("q, k, v", "lost-k-biases"), ("attention", "gqa-modulo"), ("attention", "kv-empty"),
        ("feed forward", GateForUp), ("norms", "layer-norm"), ("norms", "unweighted-norm"), ("output head", Cut),
        ("probabilities", "rope-norm"), ("sampler", "eos-hard-coded"),
    ],
)  # fmt: skip
def test_each_stage_notices_its_mutant(model, stage, mutant, monkeypatch) -> None:
    if isinstance(mutant, str):
        session = session_with(model, [mutant])
    else:
        session = Session(mutant(create("reference", model)))
    others = {name: look for name, look in STAGES.items() if name == stage}
    monkeypatch.setattr(module, "STAGES", others)  # one stage is enough, and quick
    assert failed(check(model, session)) == [stage]


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("lost-qkv-biases", "q, k, v"), ("zeroed-norm", "norms"), ("zero-lm-head", "output head"),
        ("q4k-min-lost", "probabilities"),
    ],
)  # fmt: skip
def test_files_that_upstreams_check_passes_are_noticed(model, tmp_path, fault, stage) -> None:
    path = tmp_path / "broken.apr"
    convert_with(model, path, [fault])
    assert stage in failed(check(path))
    session = upstream.session(path)
    ones = np.ones((1, session.config.embedding_length), np.float32)
    logits = session.engine.to_numpy(session.engine.matmul(ones, "output.weight"))
    written = [t.origin.name for t in session.model.tensors.values()]
    assert all(upstream.ten_checks(written, session.tokenizer.encode("Hello"), logits[0]).values()), "10/10 upstream"


def test_a_file_that_the_strict_reader_refuses_fails_every_stage_and_says_why(model, tmp_path) -> None:
    path = tmp_path / "broken.apr"
    convert_with(model, path, ["GH-191"])
    results = check(path)
    assert failed(results) == list(STAGES)
    assert all("dtype byte" in r.detail for r in results)


def test_an_engine_that_is_not_to_be_had_is_no_fault_of_the_files(model, monkeypatch, capfd) -> None:
    assert run_cli(["check", str(model.path), "--engine", "abacus"]) == 2
    assert capfd.readouterr().err.startswith("aprlab: unknown engine 'abacus'")
    monkeypatch.setitem(engines._ENGINES, "abacus", ("aprlab.engines.abacus", "Abacus"))
    with pytest.raises(UsageError, match="engine 'abacus' is not available here"):
        check(model, engine="abacus")


def read_stages(capfd) -> list[dict[str, Any]]:
    said = json.loads(capfd.readouterr().out)
    assert said["schema"] == 2
    return said["stages"]


def test_the_verb(tiny, tmp_path, capfd) -> None:
    assert run_cli(["check", str(tiny), "--json"]) == 0
    assert [row["ok"] for row in read_stages(capfd)] == [True] * 10
    convert_with(tiny, tmp_path / "broken.apr", ["rope-norm"])
    assert run_cli(["check", str(tmp_path / "broken.apr")]) == 3
    assert "positions" in capfd.readouterr().out
    assert run_cli(["check", str(tmp_path / "broken.apr"), "--json"]) == 3
    codes = {row["stage"]: row["code"] for row in read_stages(capfd)}
    assert codes["positions"] == "stage.positions.rope-type" and codes["embedding"] == "stage.embedding"
    with pytest.raises(UsageError):
        check(tmp_path / "none.apr")
