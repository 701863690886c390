"""The trace explorer with another program on the other side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from variants import shallow

import aprlab
from aprlab import widgets
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import Contract
from aprlab.errors import UsageError
from aprlab.faults import session_with
from aprlab.inference.session import Session
from aprlab.widgets.models.traces import TraceExplorer


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(tiny, tmp_path_factory.mktemp("sources") / "two.gguf", 2)


def explored(path: Path, source: object) -> TraceExplorer:
    explorer = TraceExplorer(path, engine="reference", source=source)
    explorer.run()
    explorer.work.wait()
    assert explorer.ready and explorer.work.error == ""
    return explorer


def test_what_a_contract_costs_is_the_whole_error_and_none_is_introduced(two: Path) -> None:
    rounded = Session(ContractEngine(aprlab.open_model(two), Contract("q8", "f16")))
    explorer = explored(two, rounded)
    assert "all 33 operations are" in explorer.words and explorer.first() == ""
    steps, whole = explorer.map()
    explorer.set_mode("introduced")
    assert explorer.map()[0] == steps and whole.shape == (2, len(steps))
    assert whole.max() > 1e-3 and explorer.map()[1].max() < 1e-5


@pytest.mark.parametrize("recorded", [False, True])
def test_a_fault_of_another_program_stands_alone_on_its_own_input(two: Path, tmp_path: Path, recorded: bool) -> None:
    source: object = session_with(aprlab.open_model(two), ["rope-theta"], "reference")
    if recorded:
        with aprlab.source(source) as theirs:
            source = str(theirs.run([5, 9, 30, 77]).save(tmp_path / "t.npz"))
    explorer = explored(two, source)
    assert explorer.first() == "layers.0.q_rope" and "4 of 33 operations are not" in explorer.words
    explorer.set_mode("introduced")
    steps, errors = explorer.map()
    guilty = [step for step, column in zip(steps, errors.T, strict=True) if (column > 1e-5).any()]
    assert guilty == ["q_rope", "k_rope"]
    explorer.click("layers.1.k_rope")
    assert explorer.detail is not None and explorer.detail.by_position[0] == 0 < explorer.detail.by_position[1]
    explorer.choose(faults=["rope-norm"])  # a session of ours again
    assert explorer.source is None and not explorer.ready


def test_a_recording_that_says_too_little_is_refused(two: Path, tmp_path: Path) -> None:
    with aprlab.source("reference", two) as theirs:
        few = theirs.run([5, 9, 30], "logits").save(tmp_path / "few.npz")
    explorer = TraceExplorer(two, engine="reference", source=str(few))
    explorer.run()
    explorer.work.wait()
    assert not explorer.ready and "gives no step of every layer" in explorer.work.error


def test_the_view_takes_a_source(two: Path) -> None:
    view = widgets.trace_explorer(two, engine="reference", source="reference")
    view.explorer.run()
    view.explorer.work.wait()
    view.refresh()
    assert "all 33 operations are" in view.words.html and np.all(view.explorer.map()[1] == 0)
    with pytest.raises(UsageError):
        view.explorer.set_mode("neither")
