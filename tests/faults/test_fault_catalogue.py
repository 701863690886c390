"""The catalogue of faults: whole, documented, found by id."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pages import page_script

from aprlab.errors import UsageError
from aprlab.faults import FAULTS, LAYERS, SECTIONS, by_id, convert_with, file_faults, instrument_faults, layout, run_faults

ROOT = Path(__file__).parents[2]


def test_the_catalogue_is_whole() -> None:
    assert len(FAULTS) >= 45
    assert {fault.section for fault in FAULTS.values()} == set(SECTIONS)
    assert {fault.layer for fault in FAULTS.values()} == set(LAYERS)
    assert {"GH-186", "GH-190", "GH-191", "GH-202", "GH-370", "GH-438"} <= set(FAULTS)
    assert {*file_faults(), *run_faults(), *instrument_faults()} == set(FAULTS)
    assert not {*file_faults(), *run_faults()} & {*instrument_faults()}
    titles = [fault.title for fault in FAULTS.values()]
    assert len(set(titles)) == len(titles)


def test_docs_are_the_catalogue() -> None:
    found = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert found == page_script("faults_page").markdown(), "run: python docs/make/faults_page.py docs/faults.md"


@pytest.mark.parametrize(
    ("wrong", "near"), [("GH-19", "GH-191"), ("lost-bias", "lost-qkv-biases"), ("ropenorm", "rope-norm"), ("q4k", "q4k-min-lost")]
)
def test_an_unknown_id_is_refused_with_near_matches(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown fault '{wrong}'.*{near}"):
        by_id(wrong)


def test_ids_know_no_case_and_no_doubles(tiny: Path, tmp_path: Path) -> None:
    assert by_id("gh-191") is FAULTS["GH-191"]
    with pytest.raises(UsageError, match="named twice"):
        convert_with(tiny, tmp_path / "x.apr", ["GH-191", "gh-191"])
    assert not list(tmp_path.iterdir())


def test_a_fault_must_be_described_completely() -> None:
    good = FAULTS["GH-191"]
    for change in (
        {"story": "one line"}, {"mark": ""}, {"layer": "kernel"}, {"section": "H"}, {"seams": None},
        {"instrument": len, "replaces": "checksum"}, {"post": layout.truncate},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="fault GH-191"):
            replace(good, **change)


def test_the_page_is_written_by_a_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs/make/faults_page.py", str(tmp_path / "x.md")], check=True)
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
