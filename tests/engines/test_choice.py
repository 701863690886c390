"""Which engine is taken: the one rule behind `auto`, and contracts by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import aprlab
from aprlab import engines, gates, sources
from aprlab.cli.app import run_cli
from aprlab.engines import base, choice, choose
from aprlab.errors import FormatError, UsageError
from aprlab.faults import session_with
from aprlab.forensics import ranking
from aprlab.formats import open_model
from aprlab.inference import Session
from aprlab.lab import sweep_matrix as sweeps
from aprlab.lab.notebooks import check_parameters
from aprlab.model.model import Model
from aprlab.onion import peel
from aprlab.qualification import playbook, runner
from aprlab.tracing.golden_rule import Golden


@pytest.fixture
def model(tiny: Path) -> Model:
    return open_model(tiny)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a real one, on a machine without a GPU that has engine jit."""
    monkeypatch.setattr(base, "SMALL", 1)
    monkeypatch.setattr(choice, "cuda_refusal", lambda model, contract: "no GPU")
    monkeypatch.setattr(choice, "jit_refusal", lambda model, contract, threads: None)


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "", None])
def test_a_tiny_model_takes_reference_even_where_there_is_a_gpu(asked, model: Model, monkeypatch) -> None:
    monkeypatch.setattr(choice, "cuda_refusal", lambda model, contract: None)
    found = choose(asked, model)
    assert (found.spec, found.asked, found.second, str(found)) == ("reference", "auto", False, "reference (auto)")


@pytest.mark.parametrize(
    ("refused", "taken"),
    [(set(), "cuda"), ({"cuda"}, "jit"), ({"jit"}, "cuda"), ({"cuda", "jit"}, "reference")],
)
def test_a_real_model_takes_a_gpu_then_jit_then_reference(refused, taken, model: Model, real, monkeypatch) -> None:
    for name in ("cuda", "jit"):
        monkeypatch.setattr(choice, f"{name}_refusal", lambda *given, n=name: f"{n} is away" if n in refused else None)
    found = choose("auto", model)
    assert (found.spec, found.second) == (taken, taken == "reference")
    if taken == "reference":
        assert str(found).startswith("reference (auto: ") and "not cuda: cuda is away; not jit: jit is away" in str(found)


def test_streaming_and_contracts_leave_engines_out(model: Model, real, monkeypatch) -> None:
    monkeypatch.setattr(choice, "cuda_refusal", lambda model, contract: None)
    assert choose("auto", model, stream=True).name == "jit"
    monkeypatch.setattr(base, "SMALL", 1 << 60)
    assert choose("auto:q8", model).spec == "cuda:q8", "NumPy has no such contract, however small the model"
    for name in ("cuda", "jit"):
        monkeypatch.setattr(choice, f"{name}_refusal", lambda *given: "away")
    with pytest.raises(UsageError, match="no engine here has contract q8: not reference: it has no contract q8; not cuda: away"):
        choose("auto:q8", model)


def test_what_jit_and_cuda_need(model: Model, monkeypatch) -> None:
    odd = replace(model, make_config=lambda: replace(model.config, head_dim=12))
    assert choice.jit_refusal(odd) == "heads of 12 values"
    assert "threads" in str(choice.jit_refusal(model, threads=4096))
    monkeypatch.setattr(choice, "gpus", lambda: 0)
    assert choice.cuda_refusal(model) == "no GPU"
    monkeypatch.setattr(choice, "gpus", lambda: 1)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert choice.cuda_refusal(model) == "cupy is not installed"


@pytest.mark.parametrize(("free", "fits"), [(1 << 40, True), (1 << 20, False)])
def test_a_model_that_does_not_fit_on_the_gpu_goes_elsewhere(free, fits, model: Model, monkeypatch) -> None:
    from aprlab.engines import cuda

    class Device:
        def __init__(self, kernels, device) -> None:
            pass

        def free_bytes(self) -> int:
            return free

    monkeypatch.setattr(cuda, "CudaDevice", Device)
    monkeypatch.setattr(choice, "gpus", lambda: 1)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(base, "SMALL", 1)
    monkeypatch.setattr(choice, "_head_dim", lambda model: 64)
    monkeypatch.setattr(choice, "jit_refusal", lambda model, contract, threads: None)
    found = choose("auto", model)
    assert found.name == ("cuda" if fits else "jit")
    assert fits or "are free" in found.reason
    monkeypatch.setattr(choice, "_head_dim", lambda model: 60)
    assert choice.cuda_refusal(model) == "heads of 60 values"


# -- contracts by name -------------------------------------------------------------------------------------------------


def test_a_contract_is_part_of_the_name(model: Model) -> None:
    x = np.random.default_rng(0).normal(size=(1, 256)).astype(np.float32)
    by_name, by_option = engines.create("jit:q8", model), engines.create("jit", model, contract="q8")
    assert (by_name.contract, by_name.spec, by_name.asked) == ("q8", "jit:q8", "jit:q8")
    assert by_option.spec == "jit:q8"
    np.testing.assert_array_equal(by_name.matmul(x, "output.weight"), by_option.matmul(x, "output.weight"))
    plain = engines.create("jit", model)
    assert plain.spec == engines.create("jit:f32", model).spec == "jit"
    assert not np.array_equal(by_name.matmul(x, "output.weight"), plain.matmul(x, "output.weight"))


@pytest.mark.parametrize(
    ("spec", "code", "said"),
    [
        ("warp", "engines.unknown", "unknown engine 'warp'; known: reference, jit, cuda, ptx, auto"),
        ("warp:q8", "engines.unknown", "unknown engine 'warp'"),
        ("jit:q4", "engines.unknown-contract", "engine 'jit:q4': unknown activation contract 'q4'; known: f32, q8"),
        ("jit:", "engines.unknown-contract", "unknown activation contract ''"),
        ("auto:x", "engines.unknown-contract", "unknown activation contract 'x'"),
        ("reference:q8", "engines.contract-not-of-engine", "'reference' has contract f32 only; engines with q8: jit, cuda, ptx"),
    ],
)
def test_a_wrong_engine_is_one_clear_line(spec, code, said, model: Model, tiny: Path, capsys) -> None:
    for refuse in (engines.known, lambda spec: choose(spec, model), lambda spec: Session(model, engine=spec)):
        with pytest.raises(UsageError) as error:
            refuse(spec)
        assert error.value.code == code
        assert said in error.value.message
    assert run_cli(["run", str(tiny), "-p", "hi", "-e", spec]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_two_contracts_are_one_too_many(model: Model) -> None:
    with pytest.raises(UsageError, match="which of them"):
        engines.create("jit:q8", model, contract="f32")


# -- everywhere --------------------------------------------------------------------------------------------------------


def test_run_says_which_engine_it_took_and_what_was_asked_for(tiny: Path, capsys) -> None:
    assert run_cli(["run", str(tiny), "-p", "hi", "-n", "1"]) == 0
    assert "41 F32 tensors, 3 MB; engine reference (auto)\n" in capsys.readouterr().err
    said = {}
    for asked in ("auto", "jit", "jit:q8"):
        assert run_cli(["run", str(tiny), "-p", "hi", "-n", "1", "--json", "-e", asked]) == 0
        said[asked] = json.loads(capsys.readouterr().out)
    taken = {asked: (j["engine"], j["contract"], j["engine_asked"]) for asked, j in said.items()}
    assert taken == {
        "auto": ("reference", "f32", "auto"), "jit": ("jit", "f32", "jit"), "jit:q8": ("jit", "q8", "jit:q8"),
    }  # fmt: skip


def test_the_same_tokens_whichever_engine_it_is(model: Model) -> None:
    answers = [aprlab.generate(model, [1, 2, 3], max_tokens=8, engine=engine).tokens for engine in ("auto", "jit", "reference")]
    assert answers[0] == answers[1] == answers[2]


def test_verbose_says_why_once_and_only_where_asked_for(tiny: Path, capsys) -> None:
    assert run_cli(["check", str(tiny), "--verbose"]) in (0, 3)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine ")]
    assert len(told) == 1
    assert told[0].startswith("engine reference, contract f32, taken by auto: ") and told[0].endswith(" weights")
    assert run_cli(["check", str(tiny)]) in (0, 3)
    assert "engine " not in capsys.readouterr().err
    assert not logging.getLogger("aprlab.engines").handlers


@pytest.mark.parametrize("verb", [["gates", "X", "X", "-n", "1"], ["check", "X"], ["peel", "X", "X"]])
def test_the_json_of_a_verb_names_the_engine(verb: list[str], tiny: Path, capsys) -> None:
    run_cli([str(tiny) if word == "X" else word for word in verb] + ["--json"])
    made = json.loads(capsys.readouterr().out)
    assert (made["engine"], made["engine_asked"]) == ("reference", "auto")


def test_both_sides_run_on_the_engine_of_the_reference(model: Model, real, monkeypatch) -> None:
    """Chosen twice, a candidate with fewer weights could get another one, whose bits differ."""
    monkeypatch.setattr(base, "SMALL", choice.weights(model))
    fewer = model.with_changes(tensors={n: t for n, t in model.tensors.items() if n != "blk.0.attn_q.bias"})
    assert (choose(None, model).name, choose(None, fewer).name) == ("jit", "reference")
    golden = Golden(model, prompt="hi", max_tokens=1)
    assert golden.session.engine.spec == golden.session_of(model).engine.spec == golden.engine == "jit"
    side = gates.evidence.ReferenceSide(model, None, "auto", ["hi"], 1)
    assert side.engine.spec == "jit"
    given = gates.evidence.ReferenceSide(model, Session(model, engine="jit:q8"), "auto", ["hi"], 1)
    assert given.engine.spec == "jit:q8", "a session that is given decides"


def test_the_contract_goes_along(model: Model) -> None:
    """To sessions with faults, to the ranking of faults, to a second engine of `peel`."""
    assert session_with(model, ["rope-norm"], "jit:q8").engine.contract == "q8"
    session = Session(model, engine="jit:q8")
    assert session_with(session, ["rope-norm"]).engine.contract == "q8"
    found = ranking.forensics(session, [5], prompt="hi", raw=True, faults=["rope-norm"])
    assert (found.engine, found.to_json()["engine_asked"]) == ("jit:q8", "jit:q8")
    assert aprlab.trace(session, [1, 2], "norm").contract == "q8"
    assert peel(model, engines=("jit:q8", "jit:q8"), fast=True).verdict == "same"
    assert peel(model, engines=("jit", "jit:q8"), fast=True).verdict == "not-comparable"


def test_a_source_is_an_engine_by_any_of_its_names(model: Model, tiny: Path, tmp_path: Path, capsys) -> None:
    assert str(sources.source("jit:q8", model).contract) == str(sources.source("jit,contract=q8", model).contract) == "q8"
    with pytest.raises(UsageError, match="unknown activation contract 'q5'"):
        sources.source("jit:q5", model)
    assert run_cli(["trace", str(tiny), "-o", str(tmp_path / "t.npz"), "-p", "hi", "--points", "norm"]) == 0
    said = capsys.readouterr()
    assert "reference" in said.out + said.err, "auto, for a tiny model"


def test_kernel_faults_are_for_engines_asked_for_by_name(model: Model, real, monkeypatch) -> None:
    """On a machine with a GPU `auto` may take cuda; a fault of the catalogue is the same fault all the same."""
    monkeypatch.setitem(choice.ENGINES, "cuda", choice.ENGINES["ptx"])  # a GPU, as far as it goes
    monkeypatch.setattr(choice, "cuda_refusal", lambda model, contract: None)
    taken, named = session_with(model, ["q4k-min-lost"]), session_with(model, ["q4k-min-lost"], "cuda")
    assert (taken.engine.asked, named.engine.asked) == ("auto", "cuda")
    assert not taken.engine.device._texts, "the blocks are rewritten, the kernels are the package's own"
    assert named.engine.device._texts


def test_sweeps_and_notebooks_know_engines(tmp_path: Path) -> None:
    assert check_parameters("00_golden_rule", {"engine": "jit:q8"}) == {"engine": "jit:q8"}
    with pytest.raises(UsageError, match="unknown activation contract 'q5'"):
        check_parameters("00_golden_rule", {"engine": "jit:q5"})
    (tmp_path / "m.yaml").write_text("notebooks: [00_golden_rule]\nmatrix:\n  engine: [auto, jit:q8]\n")
    assert [cell.parameters["engine"] for cell in sweeps.read_matrix(tmp_path / "m.yaml")] == ["auto", "jit:q8"]
    (tmp_path / "m.yaml").write_text("notebooks: [00_golden_rule]\nmatrix:\n  engine: [auto, warp]\n")
    with pytest.raises(FormatError, match="line 3: unknown engine 'warp'"):
        sweeps.read_matrix(tmp_path / "m.yaml")


_BOOK = """name: one
title: one
formats: [gguf]
engine: {engine}
scenarios:
  - {{id: add, area: QUAL, ask: "2", max_tokens: 1, expect: [{{garbage: false}}]}}
"""


def test_a_playbook_may_name_its_engine(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(_BOOK.format(engine="jit:q8"))
    book = playbook.load(tmp_path / "one.yaml")
    assert runner._facts(tiny, book.engine, None)[1].spec == "jit:q8"
    assert playbook.load("quick").engine == "auto"
    (tmp_path / "one.yaml").write_text(_BOOK.format(engine="reference:q8"))
    with pytest.raises(FormatError, match="line 4: engine: engine 'reference:q8': 'reference' has contract f32 only"):
        playbook.load(tmp_path / "one.yaml")
