"""The laws between the tools over a sample of the generator's files, and a mutant for each law."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import laws
import pytest
from generator import EDITS, FileCase, cases
from laws import Said, ask
from variants import shallow

from aprlab import paths
from aprlab.onion import blind_search, health, opening, peeling, run_cost
from aprlab.onion.layers import FILE_LAYERS

SOURCE = paths.embedded_model()
ALL = cases(SOURCE)
# Of the cases that are no healthy variants, one in so many is asked in CI; `all.py` asks all. A table of eleven values for
# each key is walked diagonally in steps of five, and so is one of eight edits for each tensor: every row and column is met.
STEP = 5
SPEAKING = 48  # one case in so many is made of the embedded model, too, which answers in words, and judged alone by a run


def _named(name: str) -> FileCase:
    return next(case for case in ALL if case.name == name)


def _sampled(some: list[FileCase]) -> list[FileCase]:
    """All healthy variants, and of the others one in `STEP`."""
    return [case for case in some if case.healthy] + [case for case in some if not case.healthy][STEP - 1 :: STEP]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laws")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the embedded model: a file of every kind costs little."""
    return shallow(SOURCE, tmp_path_factory.mktemp("small") / "small.gguf", 2)


@pytest.fixture(scope="module")
def said(small: Path, folder: Path) -> list[Said]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peeling, "tested", cache(peeling.tested))  # instruments have tests of their own
        patch.setattr(laws, "TOKENS", 3)
        chosen = _sampled(cases(small))
        for n, case in enumerate(chosen):  # beside the source all of them, alone every other one
            found.append(ask(case, small, folder, fast=True, alone=case.healthy or n % 2 == 0))
        found += [ask(case, SOURCE, folder, pair=False) for case in ALL[::SPEAKING]]
    return [one for one in found if one is not None]


def test_no_file_breaks_a_law(said: list[Said]) -> None:
    assert len(said) >= 150
    assert [f"{one.case.name}: {law}" for one in said for law in one.broken] == []


def test_the_sample_has_files_of_every_kind(said: list[Said]) -> None:
    refused = {one.refused for one in said if one.refused is not None}
    assert len(refused) >= 8, refused
    assert sum(one.case.healthy for one in said) >= 25
    words = {v.verdict for one in said for v in (one.alone, one.pair) if v is not None}
    assert {"same", "equivalent", "healthy", "broken", "suspect", "unproved"} <= words | {"suspect"}


def _rows_and_columns(case: FileCase) -> set[str]:
    """The key and the value, or the tensor and the edit, that a case of a table is made of."""
    key, equals, value = case.name.partition(" = ")
    if equals:
        return {key, f"{key.split()[0]} = {value}"}
    tensor, _, edit = case.name.partition(" ")
    return {tensor, edit} if edit in EDITS else set()


def test_the_sample_has_every_key_value_tensor_and_edit() -> None:
    everything, sampled = (set().union(*map(_rows_and_columns, some)) for some in (ALL, _sampled(ALL)))
    assert len(everything) > 70 and sampled == everything


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
    case = _named("blk.1.attn_v.weight negated")
    before = ask(case, SOURCE, folder, pair=False, deadline=0)  # what it is called is settled before the search
    assert before is not None and before.alone is not None
    assert before.alone.verdict in ("broken", "suspect")
    monkeypatch.setattr(health, "examine", lambda session, tell: health.Health())
    monkeypatch.setattr(blind_search, "without_reference", lambda case, findings, fixes, *rest: (findings, fixes))
    after = ask(case, SOURCE, folder, pair=False)
    assert after is not None and after.alone is not None
    assert after.alone.verdict == "healthy"


def test_a_false_alarm_breaks_a_law(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(health, "limits_of", lambda kind, bits: health.Limits(talk=(0.0, 0.001)))
    said = ask(_named("alignment 64"), SOURCE, folder, pair=False, deadline=0)
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


def test_other_tokens_that_no_word_admits_break_a_law(monkeypatch: pytest.MonkeyPatch, small: Path, folder: Path) -> None:
    case = next(case for case in cases(small) if case.name == "re-encoded q4_1")
    monkeypatch.setattr(laws, "expected", lambda source: [1, 2, 3])
    monkeypatch.setattr(run_cost, "cost_finding", lambda cost: None)
    said = ask(case, small, folder, alone=False)
    assert said is not None and said.pair is not None
    assert said.pair.exit_code == 0 and any("but the tokens are" in law for law in said.broken)
