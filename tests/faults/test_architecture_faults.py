"""What other architectures than Qwen2 bring, on tiny random models of theirs: what changes, which gates see it, and peel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from builders import CONFIG
from faulty_runs import first_difference
from made import bpe_data, made_model, write_gguf

from aprlab.errors import UsageError
from aprlab.faults import FAULTS, OTHER_ARCHITECTURES, convert_with, session_with
from aprlab.formats import open_model
from aprlab.gates.matrix import KILL, PASS, MatrixBench
from aprlab.inference import Session
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling
from aprlab.onion import peel
from aprlab.onion.run_peeling import peel_sessions
from aprlab.tracing.traces import trace

SMALL = replace(CONFIG, block_count=2)
LLAMA = replace(SMALL, architecture="llama", rope_type="norm")
MODELS = {
    "qwen3": (replace(SMALL, architecture="qwen3"), "qwen2"),
    "yarn": (replace(SMALL, rope_scaling=RopeScaling("yarn", 4.0, original_context=16)), "qwen2"),
    "llama": (replace(LLAMA, rope_factors=True), "llama-bpe"),
    "mistral": (replace(LLAMA, sliding_window=6), "llama-bpe"),
}
# fault -> model that it needs, where its run differs first, what peel calls the file's finding
EXPECTED = {
    "lost-head-norms": ("qwen3", "layers.0.q_norm"),
    "rope-scaling-ignored": ("yarn", "layers.0.q_rope"),
    "rope-factors-lost": ("llama", "layers.0.q_rope"),
    "unpermuted-qk": ("llama", "layers.0.q"),
    "sliding-window-ignored": ("mistral", "layers.0.attn"),
}
FORMS = [(id, form) for id in EXPECTED for form in ("file", "run") if getattr(FAULTS[id], f"{form}_seam")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: open_model(write_gguf(made_model(config, bpe_data(pre)), folder / f"{name}.gguf"))
        for name, (config, pre) in MODELS.items()
    }


@pytest.fixture(scope="module")
def benches(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, MatrixBench]:
    folder = tmp_path_factory.mktemp("benches")
    return {
        name: MatrixBench(model, folder / f"{name}.apr", "reference", ("What is 2+2?",), 4) for name, model in models.items()
    }


def test_every_one_is_expected_and_refused_where_it_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    assert set(EXPECTED) == OTHER_ARCHITECTURES
    for id in EXPECTED:
        with pytest.raises(UsageError, match=f"'{id}' changes nothing here; it needs"):
            session_with(tiny, [id])


@pytest.mark.parametrize("id", EXPECTED)
def test_a_run_differs_first_where_it_must(id: str, models: dict[str, Model]) -> None:
    of, point = EXPECTED[id]
    healthy = Session(models[of])
    ids = healthy.raw_tokens("hello world, return 1234 hello world")
    found = first_difference(trace(healthy, ids), trace(session_with(models[of], [id]), ids))
    assert found is not None
    assert found[0] == point


@pytest.mark.parametrize("id", [id for id, form in FORMS if form == "run" and FAULTS[id].seams])
def test_file_form_and_run_form_mean_the_same(id: str, models: dict[str, Model], tmp_path: Path) -> None:
    model = models[EXPECTED[id][0]]
    convert_with(model, tmp_path / "broken.apr", [id])
    ids = Session(model).raw_tokens("hello world, return 1234")
    a, b = Session(open_model(tmp_path / "broken.apr")), session_with(model, [id])
    assert first_difference(trace(a, ids), trace(b, ids)) is None


@pytest.mark.parametrize(("id", "form"), FORMS)
def test_a_gate_that_the_healthy_conversion_passes_kills_it(
    id: str, form: str, benches: dict[str, MatrixBench], tmp_path: Path
) -> None:
    """A random model babbles, so the gate on garbage kills it healthy, too; that one does not count."""
    bench = benches[EXPECTED[id][0]]
    row = bench.row(FAULTS[id], form, tmp_path)
    assert [gate for gate in row.killers if bench.control.cells[gate] == PASS]
    assert [gate for gate, cell in bench.control.cells.items() if cell == KILL] in ([], ["F-GOLDEN-RULE-003"])


@pytest.mark.parametrize("id", [id for id, form in FORMS if form == "file"])
def test_peel_names_it_in_a_file(id: str, models: dict[str, Model], tmp_path: Path) -> None:
    model = models[EXPECTED[id][0]]
    convert_with(model, tmp_path / "broken.apr", [id])
    verdict = peel(model.path, tmp_path / "broken.apr", max_tokens=2)
    assert verdict.verdict == "broken"
    assert [f.fault for f in verdict.findings if not f.harmless] == [id]
    assert verdict.repair is not None


@pytest.mark.parametrize("id", [id for id, form in FORMS if form == "run"])
def test_peel_names_it_in_a_run(id: str, models: dict[str, Model]) -> None:
    model = models[EXPECTED[id][0]]
    verdict = peel_sessions(Session(model), session_with(model, [id]), prompt="What is 2+2?", max_tokens=2)
    assert [f.fault for f in verdict.findings if not f.harmless] == [id]
