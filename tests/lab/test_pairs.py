"""Pairs of sides and the pictures of what is found between them, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from aprlab.errors import UsageError
from aprlab.faults import convert_with
from aprlab.formats import open_model
from aprlab.lab import finding_figures as pictures
from aprlab.lab import pairs as suspects
from aprlab.onion.verdict import LAYERS, Finding


@pytest.fixture(autouse=True)
def _close_figures() -> object:
    yield
    plt.close("all")


def legend(ax: plt.Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_fault_in_a_file(tmp_path: Path) -> None:
    pair = suspects.pair(fault="lost-v-biases", folder=tmp_path)
    verdict = pair.peel()
    assert isinstance(pair, suspects.Files)
    assert pair.named(verdict) == {"lost-v-biases"}
    (finding,) = verdict.findings
    left, right = pair.picture(finding)
    assert legend(left) == ["as it should be: 91", "this finding: 8"]
    assert right.get_title(loc="left") == "blk.0.attn_v.bias"
    assert set(right.collections[0].get_offsets()[:, 1]) == {0.0}
    maps = pair.error_maps(verdict)
    assert maps is not None
    assert maps.guilty == ["v"]
    assert (maps.total > 0).sum() > (maps.alone > 0).sum()
    drawn = pictures.inherited_and_introduced(maps.steps, maps.total, maps.alone)
    assert [ax.get_title(loc="left") for ax in drawn] == ["inherited and introduced", "introduced by each step"]
    answers = pair.answers(verdict)
    assert answers["repaired"] == answers["reference"] == "2 + 2 equals 4."
    assert answers["candidate"] != answers["reference"]


def test_a_fault_in_an_engine() -> None:
    pair = suspects.pair(fault="gqa-modulo", folder="")
    verdict = pair.peel()
    assert isinstance(pair, suspects.Engines)
    assert pair.named(verdict) == {"gqa-modulo"}
    maps = pair.error_maps(verdict)
    assert maps is not None
    assert maps.guilty == ["attn"]
    left, _ = pair.picture(verdict.findings[0])
    assert left.get_title(loc="left") == "introduced by each step"
    assert pair.answers(verdict)["repaired"] == "2 + 2 equals 4."


def test_two_findings_have_two_colours_and_labels_are_explained(tmp_path: Path) -> None:
    pair = suspects.pair(fault="GH-191,swapped-gate-up", folder=tmp_path)
    verdict = pair.peel()
    by_layer = {finding.layer: finding for finding in verdict.findings}
    assert set(by_layer) == {"naming", "dtype"}
    left, right = pair.picture(by_layer["naming"], others=verdict.findings)
    assert "another finding" in legend(left)[2]
    assert [[bar.get_width() for bar in bars] for bars in right.containers] == [[83, 99], [16, 0], [0, 0]]
    _, right = pair.picture(by_layer["dtype"], others=verdict.findings)
    assert "8 = Q8_0/AprQ4" in right.get_title(loc="left")
    assert "reference" in pair.sessions(verdict)
    assert pair.answers(verdict)["candidate"].startswith("<")


def test_a_file_alone_and_a_healthy_one(tmp_path: Path, tiny: Path) -> None:
    convert_with(tiny, tmp_path / "c.apr", ["GH-190"])
    alone = suspects.pair(candidate=tmp_path / "c.apr", folder=tmp_path)
    verdict = alone.peel()
    assert verdict.verdict == "broken"
    assert "reference" not in alone.answers(verdict)
    assert alone.error_maps(verdict) is None
    left, right = alone.picture(verdict.findings[0])
    assert any(text.startswith("this finding: ") for text in legend(left))
    assert right.texts[0].get_text()
    convert_with(tiny, tmp_path / "h.apr", [])
    healthy = suspects.pair(tiny, candidate=tmp_path / "h.apr", folder=tmp_path)
    verdict = healthy.peel()
    assert verdict.verdict == "same"
    assert healthy.faults == ()
    maps = healthy.error_maps(verdict)
    assert maps is not None
    assert maps.guilty == []
    first = healthy.telling(verdict)
    assert legend(first) == ["candidate"]
    assert set(first.get_lines()[0].get_ydata()) == {160.0}  # equal in every layer


def test_a_file_alone_shows_the_mark_that_no_healthy_file_has(tmp_path: Path, tiny: Path) -> None:
    convert_with(tiny, tmp_path / "c.apr", ["q4k-min-lost"])
    with open_model(tmp_path / "c.apr") as model:
        tensors = list(model.tensors.values())
        left, right = pictures.of_marks(tensors)
    assert "Q4_K: dmin-not-zero" in (left.get_xlabel(), right.get_xlabel())
    with pytest.raises(UsageError, match="no tensor of this file has blocks with marks"):
        pictures.of_marks([])


def test_what_a_fault_needs_is_given_to_both_sides(tmp_path: Path) -> None:
    pair = suspects.pair(fault="unknown-to-f32", folder=tmp_path)
    assert (pair.reference_name, pair.candidate_name) == ("reference.apr", "candidate.apr")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either a candidate or a fault is needed"),
        ({"candidate": "c", "fault": "GH-190"}, "which of them"),
        ({"fault": "GH-19O"}, "unknown fault 'GH-19O'; near: .*GH-190"),
        ({"fault": "first-ten"}, "a fault of a measurement: see notebook 05_instruments"),
        ({"fault": "GH-190,gqa-modulo"}, "GH-190 can be in a file only, gqa-modulo in an engine only"),
        ({"fault": "GH-190", "reference": "r"}, "the model is the reference"),
        ({"fault": "unknown-to-f32,q5k-layout"}, "need different types: quantize q5_0 and q5k"),
    ],
)
def test_what_makes_no_pair(given: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        suspects.pair(**given, folder=tmp_path)


def test_every_layer_has_a_caption() -> None:
    said = {layer: pictures.caption(Finding(layer, None, [], "x")) for layer in LAYERS}
    assert all(said.values())
    assert len(set(said.values())) >= 6
