"""The laws between the tools over a sample of the generator's files, and a mutant for each law."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generator import FileCase, cases
from laws import Said, ask

from aprlab import paths
from aprlab.onion import health, opening, peeling
from aprlab.onion.layers import FILE_LAYERS

SOURCE = paths.embedded_model()
ALL = cases(SOURCE)
STEP = 8  # of the cases that are no healthy variants, one in so many: about 110 files in CI; `all.py` asks all of them


def sample() -> list[FileCase]:
    """The healthy variants, and every eighth of the others."""
    sound = [case for case in ALL if case.healthy]
    others = [case for case in ALL if not case.healthy]
    return [*sound, *others[::STEP]]


def _named(name: str) -> FileCase:
    return next(case for case in ALL if case.name == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[Said]:
    found = []
    for n, case in enumerate(sample()):
        one = ask(case, SOURCE, folder, alone=n % 2 == 0, pair=n % 2 == 1)
        if one is not None:
            found.append(one)
    return found


def test_no_file_breaks_a_law(said: list[Said]) -> None:
    assert len(said) >= 100
    assert [f"{one.case.name}: {law}" for one in said for law in one.broken] == []


def test_the_sample_has_files_of_every_kind(said: list[Said]) -> None:
    refused = {one.refused for one in said if one.refused is not None}
    assert len(refused) >= 8, refused
    assert sum(one.case.healthy for one in said) >= 25
    words = {v.verdict for one in said for v in (one.alone, one.pair) if v is not None}
    assert {"same", "equivalent", "healthy", "broken", "suspect", "unproved"} <= words | {"suspect"}


# ── each law dies with what keeps it ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_strict_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peel without the strict reader: what it refuses is no finding."""
    real = opening.opened

    def lenient(*args: Any, **options: Any) -> opening.Opened:
        found = real(*args, **options)
        found.refusal = found.error = None
        return found

    monkeypatch.setattr(opening, "opened", lenient)


def test_without_the_strict_reader_a_law_is_broken(no_strict_reader: None, folder: Path) -> None:
    said = ask(_named("GGUF qwen2.context_length = one"), SOURCE, folder, alone=False)
    assert said is not None
    assert any("run refuses" in law for law in said.broken)


def test_without_the_run_a_file_alone_is_called_what_it_is_not(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    case = _named("blk.3.attn_v.weight negated")
    before = ask(case, SOURCE, folder, pair=False)
    assert before is not None and before.alone is not None
    assert before.alone.verdict in ("broken", "suspect")
    monkeypatch.setattr(health, "examine", lambda session, tell: health.Health())
    after = ask(case, SOURCE, folder, pair=False)
    assert after is not None and after.alone is not None
    assert after.alone.verdict == "healthy"


def test_a_false_alarm_breaks_a_law(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(health, "limits_of", lambda kind, bits: health.Limits(talk=(0.0, 0.001)))
    said = ask(_named("alignment 64"), SOURCE, folder, pair=False)
    assert said is not None
    assert any(law.startswith("false alarm alone") for law in said.broken)


def test_a_layer_that_crashes_breaks_a_law(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def crash(case: object) -> Iterator[Any]:
        raise KeyError("x")

    monkeypatch.setattr(type(FILE_LAYERS[-1]), "suspect", lambda self, case: crash(case))
    said = ask(_named("alignment 64"), SOURCE, folder)
    assert said is not None
    assert any("raises KeyError" in law for law in said.broken)


def test_equal_words_of_unequal_runs_break_a_law(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Peel without its layers and without the runs says "same" of a norm with the other sign."""
    monkeypatch.setattr(peeling, "_run", lambda *args: None)
    for layer in FILE_LAYERS[1:]:
        monkeypatch.setattr(type(layer), "suspect", lambda self, case: [])
    said = ask(_named("output_norm.weight negated"), SOURCE, folder, alone=False)
    assert said is not None
    assert any("but the tokens are" in law for law in said.broken)
