"""Playbooks: those of the project are sound, and whatever is wrong is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprlab.errors import FormatError, UsageError
from aprlab.gates import GATES
from aprlab.qualification import oracles, playbook

TICKET_GATES = {
    "F-GOLDEN-RULE-001", "F-GOLDEN-RULE-002", "F-GOLDEN-RULE-003", "F-ROSETTA-FP-001", "F-ROSETTA-STATS-001", "F-APR-FORMAT-001",
}  # fmt: skip
HEAD = "name: t\ntitle: T\nformats: [gguf]\nscenarios:\n"


def load(folder: Path, text: str) -> playbook.Playbook:
    path = folder / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return playbook.load(path)


def test_the_projects_playbooks() -> None:
    books = {name: playbook.load(name) for name in playbook.names()}
    assert {"quick", "full", "embedded"} <= books.keys()
    assert len(books["quick"].scenarios) == 10
    assert {s.area for s in books["quick"].scenarios} == {"QUAL"}
    assert {s.max_tokens for s in books["quick"].scenarios} == {32, 1}
    for name in ("full", "embedded"):
        assert {s.area for s in books[name].scenarios} == set(playbook.AREAS)
        assert {s.gate for s in books[name].scenarios if s.kind == "gate"} == TICKET_GATES <= GATES.keys()
        assert {"load", "serial", "speed", "memory", "convert"} <= {s.kind for s in books[name].scenarios}
        assert any(s.restart for s in books[name].scenarios)
        assert any(s.repeat > 1 for s in books[name].scenarios)
    full = books["full"]
    assert 45 <= len(full.scenarios) <= 60
    pairs = {(s.source, s.target) for s in full.scenarios if s.kind == "convert"}
    assert pairs == {(a, b) for a in playbook.FORMATS for b in playbook.FORMATS if a != b}
    used = {oracle for s in full.scenarios for oracle, _ in s.expect} | {"exact"}
    assert used == oracles.ORACLES.keys()
    assert full.digest != books["embedded"].digest


def test_what_a_scenario_says_of_itself(tmp_path: Path) -> None:
    text = HEAD + (
        "  - {id: a, area: QUAL, ask: 'Q?', fill: {text: 'x ', times: 3}, stop: ['.'], expect: [{garbage: false}]}\n"
        "  - id: b\n    area: STAB\n    talk: [{role: user, content: hi}, {role: assistant, content: ho}]\n    repeat: 2\n"
        "  - {id: c, area: COMP, do: convert, from: gguf, to: apr, timeout: 9}\n"
    )
    first, second, third = load(tmp_path, text).scenarios
    assert (first.question, first.words, first.stop, first.line) == ("x x x Q?", "[3 × 'x '] Q?", (".",), 5)
    assert (second.words, second.repeat, second.asks, second.once) == ("user: hi\nassistant: ho", 2, True, False)
    assert (third.words, third.timeout, third.asks, third.once, third.line) == ("gguf → apr", 9, False, True, 10)


def test_the_digest_changes_with_what_counts_only(tmp_path: Path) -> None:
    one = "  - {id: a, area: QUAL, ask: 'Q?', expect: [{exact: A}]}\n"
    digest = load(tmp_path, HEAD + one).digest
    assert load(tmp_path, HEAD.replace("title: T", "title: U") + "\n" + one.replace("ask", "why: w, ask")).digest == digest
    for other in (one.replace("Q?", "R?"), one.replace("exact: A", "exact: B"), one.replace("ask", "seed: 2, ask")):
        assert load(tmp_path, HEAD + other).digest != digest


GOOD = "  - {id: a, area: QUAL, ask: Q, expect: [{exact: A}]}\n"
BAD = {
    "line 1: title is missing": "name: t\nformats: [gguf]\nscenarios:\n" + GOOD,
    "line 4: unknown key 'colour'": "name: t\ntitle: T\nformats: [gguf]\ncolour: red\nscenarios:\n" + GOOD,
    "line 3: formats: unknown 'onnx'; known: gguf, apr, safetensors": HEAD.replace("[gguf]", "[onnx]") + GOOD,
    "line 3: formats: must be a list": HEAD.replace("[gguf]", "[gguf, gguf]") + GOOD,
    "line 4: scenarios: must be a list": HEAD,
    "line 5: must be keys with values, got 'x'": HEAD + "  - x\n",
    "line 5: area is missing": HEAD + "  - {id: a, ask: Q, expect: [{exact: A}]}\n",
    "line 5: area: unknown 'GOOD'; known: QUAL": HEAD + GOOD.replace("QUAL", "GOOD"),
    "line 6: id 'a' again": HEAD + GOOD + GOOD,
    "line 5: id: must be letters": HEAD + GOOD.replace("id: a", "id: 'a b'"),
    "line 5: expected exactly one of ask, complete, talk, do, got ask, do": HEAD + GOOD.replace("ask: Q", "ask: Q, do: load"),
    "line 5: expected exactly one of ask, complete, talk, do, got none": HEAD + "  - {id: a, area: QUAL}\n",
    "line 5: expect is missing": HEAD + "  - {id: a, area: QUAL, ask: Q}\n",
    "line 6: expect: must be a list of oracles": HEAD + "  - {id: a, area: QUAL, ask: Q,\n     expect: []}\n",
    "line 7: unknown oracle 'sure'": HEAD + "  - {id: a, area: QUAL, ask: Q, expect: [\n    {exact: A},\n    {sure: 1}]}\n",
    "line 5: must be one oracle and its argument": HEAD + GOOD.replace("{exact: A}", "{exact: A, stop: eos}"),
    "line 5: max_tokens: must be a whole number from 1 to 4096, got 0": HEAD + GOOD.replace("ask", "max_tokens: 0, ask"),
    "line 5: max_tokens: must be a whole number from 1 to 4096, got True": HEAD + GOOD.replace("ask", "max_tokens: true, ask"),
    "line 4: unknown key 'ask'": "name: t\ntitle: T\nformats: [gguf]\ndefaults: {ask: x}\nscenarios:\n" + GOOD,
    "line 5: stop: must be a list of texts": HEAD + GOOD.replace("ask", "stop: [], ask"),
    "line 5: temperature: must be a number from 0 to 10": HEAD + GOOD.replace("ask", "temperature: -1, ask"),
    "line 5: fill: must have text and times": HEAD + GOOD.replace("ask", "fill: {text: x}, ask"),
    "line 5: from is needed for do: convert, and allowed only there": HEAD + GOOD.replace("ask", "from: gguf, ask"),
    "line 5: from and to are the same": HEAD + "  - {id: a, area: COMP, do: convert, from: apr, to: apr}\n",
    "line 5: unknown gate 'F-X'; known: F-GOLDEN-RULE-001": HEAD + "  - {id: a, area: REGR, do: gate, gate: F-X}\n",
    "line 5: repeat has no use in do: load": HEAD + "  - {id: a, area: STAB, do: load, repeat: 2}\n",
    "line 5: arithmetic has no use in load": HEAD + "  - {id: a, area: STAB, do: load, expect: [{arithmetic: 4}]}\n",
    "arithmetic: 4 is in the question": HEAD + "  - {id: a, area: QUAL, ask: 'Is 2+2 = 4?', expect: [{arithmetic: 4}]}\n",
    "contains: 'Q' is in the question": HEAD + GOOD.replace("exact: A", "contains: Q"),
    "garbage: must be false, got True": HEAD + GOOD.replace("exact: A", "garbage: true"),
    "code: unknown language 'cobol'": HEAD + GOOD.replace("exact: A", "code: {language: cobol}"),
    "stop: must be one or some of eos, length, stop": HEAD + GOOD.replace("exact: A", "stop: [end]"),
    "script: unknown 'klingon'": HEAD + GOOD.replace("exact: A", "script: klingon"),
    "figure has no use in ask": HEAD + GOOD.replace("exact: A", "figure: {of: x, at_least: 1}"),
    "agreement: must have tokens: how many": HEAD + GOOD.replace("exact: A", "agreement: {tokens: 0}"),
    "contains: must be text or a list of texts": HEAD + GOOD.replace("exact: A", "contains: [' ']"),
    "line 5, column ": HEAD + "  - {id: a, area: [QUAL}\n",
    "line 5: key 'id' again": HEAD + GOOD.replace("id: a", "id: a, id: b"),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_whatever_is_wrong_is_reported_with_its_line(tmp_path: Path, said: str) -> None:
    with pytest.raises(FormatError) as error:
        load(tmp_path, BAD[said])
    assert said in error.value.message
    assert error.value.message.startswith("line ")
    assert "\n" not in error.value.message


def test_unknown_playbooks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no playbook 'slow'; known: embedded, full, quick"):
        playbook.load("slow")
    with pytest.raises(UsageError, match="cannot be read"):
        playbook.load(tmp_path / "none.yaml")
