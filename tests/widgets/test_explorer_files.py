"""Explorers and files: what is picked, what is saved, what is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import aprlab
from aprlab import paths
from aprlab.errors import AprlabError, UsageError
from aprlab.formats import open_model
from aprlab.quants import types
from aprlab.widgets import pages
from aprlab.widgets.models.blocks import BlockMicroscope
from aprlab.widgets.models.files import Side, nearby, shown
from aprlab.widgets.models.onion import OnionExplorer
from aprlab.widgets.models.tensors import TensorBrowser
from aprlab.widgets.models.traces import TraceExplorer


def test_the_repaired_file_is_saved_and_is_healthy(mislabelled: Path, tiny: Path, tmp_path: Path) -> None:
    onion = OnionExplorer()
    onion.choose(faults=[], candidate=str(mislabelled))
    onion.run()
    onion.work.wait()
    assert not onion.can_save
    for label in onion.repairs:
        onion.repair(label)
        onion.work.wait()
    for taken in (mislabelled, tiny):
        with pytest.raises(UsageError, match="the same file"):
            onion.save(taken, force=True)
    (tmp_path / "there.apr").touch()
    with pytest.raises(UsageError, match="exists already"):
        onion.save(tmp_path / "there.apr")
    onion.save(tmp_path / "fixed.apr")
    onion.work.wait()
    assert onion.work.error == ""
    assert onion.saved.endswith("it says what the reference says")
    assert aprlab.compare(open_model(tiny), open_model(tmp_path / "fixed.apr")).equal


def test_pickers_offer_what_is_near(tmp_path: Path, mislabelled: Path, one_scale: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.gguf", "a/c.apr", "a/notes.txt", ".hidden.gguf"):
        (tmp_path / name).touch()
    assert nearby(tmp_path) == [str(tmp_path / "b.gguf"), str(tmp_path / "a/c.apr")]
    assert nearby(tmp_path, 1) == [str(tmp_path / "b.gguf")]
    assert (shown(paths.embedded_model()), shown(mislabelled)) == ("embedded (tiny)", str(mislabelled))
    assert shown(Path.cwd() / "a" / "b.apr") == "a/b.apr"
    assert [side.path for side in Side.open_all(["embedded (tiny)"])] == [paths.embedded_model()]
    browser = TensorBrowser(Side.open(one_scale))
    browser.open(str(one_scale), f" {mislabelled} ")
    browser.work.wait()
    assert [side.path for side in browser.sides] == [one_scale, mislabelled]
    assert {row.status for row in browser.all} != {""}
    scope = BlockMicroscope(Side.open(one_scale))
    scope.choose(row=1)
    for refused in ("nothing.apr", str(tmp_path / "a/notes.txt")):
        for explorer in (browser, scope):
            with pytest.raises(AprlabError):
                explorer.open(refused)
    assert scope.row == 1
    scope.open(str(mislabelled))
    assert (list(scope.sides), scope.row) == ([mislabelled.name], 0)


def test_the_trace_explorer_runs_other_files(tiny: Path, one_scale: Path) -> None:
    explorer = TraceExplorer(tiny)
    for refused in ("nothing.apr", ""):
        with pytest.raises(AprlabError):
            explorer.open(refused, str(one_scale))
    assert (explorer.model, explorer.other) == (tiny, None)
    explorer.open("embedded (tiny)", f" {one_scale} ")
    assert (explorer.model, explorer.other) == (paths.embedded_model(), one_scale)
    explorer.run()
    explorer.work.wait()
    assert explorer.first() == "embed", "its embedding is of the broken type, too"
    explorer.open(str(tiny))
    assert (explorer.other, explorer.ready) == (None, False)


def test_the_scales_of_a_block_are_decoded(tiny: Path) -> None:
    scope = BlockMicroscope(Side.open(tiny), name="blk.0.ffn_gate.weight")
    block = scope.first
    assert len(block.groups) == 8
    values, numbers = block.decode(), block.quant.unpack(block.raw.view(block.quant.layout))[0]
    for n, group in enumerate(block.groups):
        assert 0 <= group.scale < 64
        assert 0 <= group.minimum < 64
        some = slice(32 * n, 32 * n + 32)
        assert np.allclose(values[some], group.step * numbers[some] - group.offset, rtol=1e-6, atol=1e-9)
    assert "<td>224 to 255</td>" in pages.block_fields(block).replace(' style="text-align:left"', "")
    scope.choose(name="blk.0.ffn_down.weight")
    assert scope.first.kind is types.Q6_K
    assert scope.first.groups == []
