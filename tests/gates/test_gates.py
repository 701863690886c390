"""The gates and their kill matrix: every fault dies, every gate kills, a healthy conversion passes everywhere."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from noise import noise

from aprlab import engines, figures, gates
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, OTHER_ARCHITECTURES, by_id, convert_with, session_with
from aprlab.formats import open_model
from aprlab.gates import GATES, KILL, KillMatrix, figure_cells, kill_matrix, markdown, short
from aprlab.model.model import Model

DOCS = Path(__file__).resolve().parents[2] / "docs"
TICKET = {
    "F-GOLDEN-RULE-001": "convert(gguf) → inference == gguf inference",
    "F-GOLDEN-RULE-002": "converted tensor count matches the source's",
    "F-GOLDEN-RULE-003": "no garbage in the converted model's output",
    "F-ROSETTA-FP-001": "tensor checksums match, over the union of both sides",
    "F-ROSETTA-STATS-001": "mean, std, min and max within the type's tolerance",
    "F-APR-FORMAT-001": "dtype metadata matches the actual tensor data layout",
}


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    return open_model(tiny)


@pytest.fixture(scope="module")
def healthy(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gates") / "healthy.apr"
    convert(model, path)
    return path


@pytest.fixture(scope="module")
def matrix(model) -> KillMatrix:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unknown dtype")  # one of the faults warns, as upstream did
        return kill_matrix(model)


# -- the matrix ------------------------------------------------------------------------------------------------------


def test_the_gates_are_the_tickets_and_the_invariants_and_four_more() -> None:
    assert {id: GATES[id].assertion for id in TICKET} == TICKET
    assert list(GATES)[6:] == ["I-1", "I-2", "I-3", "I-4", "I-5", "A-LOGITS", "A-SERIAL", "A-WORK", "A-SELFTEST"]


def test_every_fault_of_the_catalogue_is_tried_in_each_form_and_dies(matrix) -> None:
    # What other architectures bring dies in tests/faults/test_architecture_faults.py.
    here = [f for f in FAULTS.values() if f.id not in OTHER_ARCHITECTURES]
    due = {(f.id, form) for f in here for form, seam in (("file", f.file_seam), ("run", f.run_seam)) if seam}
    due |= {(f.id, "instrument") for f in here if f.instrument}
    assert {(row.fault, row.form) for row in matrix.rows} == due
    assert [f"{row.fault} ({row.form})" for row in matrix.survivors()] == []


def test_every_gate_kills_something(matrix) -> None:
    assert matrix.idle() == []


def test_a_gate_that_kills_nothing_would_be_noticed(matrix) -> None:
    cells = [r.cells | {"A-WORK": gates.PASS} for r in matrix.rows]
    rows = [replace(r, cells=c) for r, c in zip(matrix.rows, cells, strict=True)]
    assert KillMatrix(rows, matrix.control).idle() == ["A-WORK"]
    assert [r.fault for r in KillMatrix(rows, matrix.control).survivors()] == ["cache-key-mismatch"]


def test_the_healthy_conversion_passes_every_gate_whatever_its_types(matrix) -> None:
    assert len(matrix.control) == 2, "the embedded model, and its sibling with all types"
    for row in matrix.control:
        assert set(row.cells.values()) == {gates.PASS}, {g: row.figures[g] for g, c in row.cells.items() if c != gates.PASS}
        assert all(row.upstream.values())


def test_the_matrix_is_the_same_with_every_sentence_replaced_by_noise(model, matrix) -> None:
    """Every eighth fault: each gate speaks in every row, and its words are the same ones."""
    chosen = [id for id in FAULTS if id not in OTHER_ARCHITECTURES][::8]
    with noise(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unknown dtype")
        noisy = kill_matrix(model, chosen)
    before = [*matrix.control, *(row for row in matrix.rows if row.fault in chosen)]
    for a, b in zip(before, [*noisy.control, *noisy.rows], strict=True):
        assert replace(a, figures={}) == replace(b, figures={})
        assert all(a.figures[id] != b.figures[id] for id in GATES), "every figure was noise"


def test_upstreams_ten_checks_kill_next_to_nothing(matrix) -> None:
    loaded = [row for row in matrix.rows if row.upstream]
    assert len(loaded) > 0.8 * len(matrix.rows)
    assert all(len(row.upstream) == 10 for row in loaded)
    nan = {"q80-36-bytes", "default-kernel", "legacy-as-q4k", "argmax-nan"}
    assert {row.fault for row in matrix.upstream_kills()} <= nan, "NaN, nothing else"


def test_silent_faults_pass_the_text_gates_and_die_elsewhere(matrix) -> None:
    silent = {"cache-key-mismatch", "prefill-decode", "q8-activations", "default-dequantise", "GH-438-apr"}
    for row in matrix.rows:
        if row.fault in silent:
            assert row.cells["F-GOLDEN-RULE-001"] == row.cells["F-GOLDEN-RULE-003"] == gates.PASS, row.fault
            assert row.killers


@pytest.mark.parametrize(
    ("fault", "form", "gate", "says"),
    [
        ("GH-190", "file", "I-2", gates.KILL),
        ("GH-191", "file", "F-APR-FORMAT-001", gates.KILL),
        ("GH-191", "file", "F-ROSETTA-FP-001", gates.PASS),  # the bytes are right, the label is not
        ("GH-202", "file", "F-ROSETTA-STATS-001", gates.PASS),  # transposed: statistics cannot see it
        ("GH-202", "file", "F-ROSETTA-FP-001", gates.KILL),
        ("default-dequantise", "file", "F-ROSETTA-STATS-001", gates.PASS),
        ("lost-qkv-biases", "run", "I-4", gates.PASS),  # the file is whole, the reader is not
        ("lost-qkv-biases", "run", "A-LOGITS", gates.KILL),
        ("missing-biases", "file", "F-GOLDEN-RULE-002", gates.KILL),
        ("kv-twice", "run", "A-SERIAL", gates.KILL),
        ("order-blind-checksum", "instrument", "F-ROSETTA-FP-001", gates.VOID),
        ("words-for-garbage", "instrument", "F-GOLDEN-RULE-003", gates.VOID),
    ],
)
def test_gates_see_what_they_are_there_for_and_no_more(matrix, fault, form, gate, says) -> None:
    (row,) = [r for r in matrix.rows if (r.fault, r.form) == (fault, form)]
    assert row.cells[gate] == says, row.figures[gate]


def test_the_page_is_what_the_code_says(matrix) -> None:
    """Word for word, but for text of wrong weights, where a rounding of another machine may choose another token."""
    kept, made = ((DOCS / "kill-matrix.md").read_text(encoding="utf-8"), markdown(matrix))
    rows = [[line.split(" | ") for line in page.splitlines() if line.startswith("| ")] for page in (kept, made)]
    assert len(rows[0]) == len(rows[1]), "run: python docs/make/kill_matrix.py"
    heads = next(row for row in rows[1] if row[0] == "| fault")
    loose = {heads.index(head) for head in ("GR-1", "GR-3")} | {len(heads) - 1}
    other = 0
    for a, b in zip(*rows, strict=True):
        if len(a) != len(heads):
            assert a[:2] == b[:2]  # the gates; their counts follow from the table
            continue
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            assert n in loose or x == y, f"{a[0]}, {heads[n]}: {x!r} in the page, {y!r} now"
            other += x != y
    assert other <= 0.02 * len(heads) * len(rows[0])


def test_the_figure_has_a_row_per_fault_and_fills_what_is_killed(matrix) -> None:
    cells = figure_cells(matrix)
    ax = figures.kill_plot(cells, [short(id) for id in GATES])
    drawn = ax.images[0].get_array()
    assert drawn.shape == (len(matrix.rows), len(GATES))
    assert int((drawn == 1).sum()) == sum(len(row.killers) for row in matrix.rows)
    assert ax.get_xticklabels()[0].get_text() == f"GR-1 ({len(matrix.kills('F-GOLDEN-RULE-001'))})"
    plt.close("all")
    with pytest.raises(UsageError, match="2 words for 1 gates"):
        figures.kill_plot({"x": ["kill", "pass"]}, ["GR-1"])
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.kill_plot({}, ["GR-1"])


def test_names_of_columns_are_short_and_each_its_own() -> None:
    assert len({short(id) for id in GATES}) == len(GATES)
    assert [short(id) for id in GATES][:6] == ["GR-1", "GR-2", "GR-3", "FP", "STATS", "FORMAT"]


# -- one pair --------------------------------------------------------------------------------------------------------


def test_run_answers_for_one_pair(model, healthy, tmp_path) -> None:
    assert all(r.passed for r in gates.run(model, healthy, max_tokens=4))
    convert_with(model, tmp_path / "broken.apr", ["lost-k-biases"])
    said = {r.id: r for r in gates.run(model, tmp_path / "broken.apr", max_tokens=4)}
    assert said["F-ROSETTA-FP-001"].passed is False and "attn_k.bias" in said["F-ROSETTA-FP-001"].figure
    assert said["F-GOLDEN-RULE-002"].passed is True


def test_a_re_encoding_that_was_meant_passes_and_another_does_not(model, tmp_path) -> None:
    convert(model, tmp_path / "q8.apr", quantize="q8_0")
    meant = gates.run(model, tmp_path / "q8.apr", max_tokens=2, requantised="q8_0")
    assert [r.id for r in meant if r.passed is not True] == []
    other = {r.id for r in gates.run(model, tmp_path / "q8.apr", max_tokens=2, requantised="q4_0") if r.passed is False}
    unsaid = {r.id for r in gates.run(model, tmp_path / "q8.apr", max_tokens=2) if r.passed is False}
    assert {"F-ROSETTA-FP-001", "I-1", "A-LOGITS"} <= other & unsaid


def test_a_faulty_reader_of_a_healthy_file_is_given_as_a_session(model, healthy) -> None:
    said = {r.id: r for r in gates.run(model, healthy, None, session_with(model, ["gqa-modulo"]), max_tokens=4)}
    assert said["A-LOGITS"].passed is False and said["I-1"].passed is True


def test_a_gate_on_a_faulty_instrument_is_void(model, healthy) -> None:
    lie = by_id("order-blind-checksum")
    said = {r.id: r for r in gates.run(model, healthy, max_tokens=2, replaced={lie.replaces: lie.instrument})}
    assert said["F-ROSETTA-FP-001"].passed is None and "void: checksum" in said["F-ROSETTA-FP-001"].figure
    assert said["A-SELFTEST"].passed is False
    assert said["F-GOLDEN-RULE-001"].passed is True, "what does not rest on it still counts"


def test_every_gate_rests_on_instruments_that_exist() -> None:
    from aprlab.instruments.self_test import INSTRUMENTS

    for gate in GATES.values():
        assert set(gate.rests_on) <= INSTRUMENTS.keys() and (gate.rests_on or gate.id == "A-SELFTEST")


def test_an_engine_that_is_not_to_be_had_is_no_fault_of_the_candidates(model, healthy, monkeypatch) -> None:
    with pytest.raises(UsageError, match="unknown engine 'abacus'"):
        gates.run(model, healthy, engine="abacus")
    monkeypatch.setitem(engines._ENGINES, "abacus", ("aprlab.engines.abacus", "Abacus"))
    with pytest.raises(UsageError, match="engine 'abacus' is not available here"):
        gates.run(model, healthy, engine="abacus")
    assert engines.known("abacus") == "abacus"


def test_a_model_without_a_chat_template_is_asked_all_the_same(model, healthy, tmp_path) -> None:
    tokenizer = replace(model.tokenizer, chat_template=None)
    draft = Model(
        path=model.path, format="apr", dialect="aprender", tensors=model.tensors, metadata={},
        make_config=lambda: model.config, make_tokenizer=lambda: tokenizer,
    )  # fmt: skip
    convert(draft, tmp_path / "bare.apr")
    convert(tmp_path / "bare.apr", tmp_path / "again.apr")
    asked = ["F-GOLDEN-RULE-001", "I-5", "A-LOGITS", "A-SERIAL", "A-WORK"]

    def said(cand: Path, *ids: str) -> dict[str, bool | None]:
        return {r.id: r.passed for r in gates.run(tmp_path / "bare.apr", cand, max_tokens=1, prompts=["Hi"], ids=ids)}

    assert said(tmp_path / "again.apr", *asked) == dict.fromkeys(asked, True)
    assert said(healthy, "I-5") == {"I-5": False}, "it has a template that the source has not"


def read_gates(capfd) -> list[dict[str, object]]:
    said = json.loads(capfd.readouterr().out)
    assert said["schema"] == 2
    return said["gates"]


def test_the_verb_prints_and_tells_by_its_status(tiny, healthy, tmp_path, capfd) -> None:
    assert run_cli(["gates", str(tiny), str(healthy), "-n", "2", "--json"]) == 0
    assert [r["id"] for r in read_gates(capfd)] == list(GATES)
    convert_with(tiny, tmp_path / "broken.apr", ["GH-191"])
    assert run_cli(["gates", str(tiny), str(tmp_path / "broken.apr"), "-n", "2"]) == 3
    assert "FAIL" in capfd.readouterr().out
    assert run_cli(["gates", str(tiny), str(tmp_path / "broken.apr"), "-n", "2", "--json"]) == 3
    rows = {str(row["id"]): row for row in read_gates(capfd)}
    keys = {"id", "passed", "code", "parameters", "figure", "assertion", "refused"}
    assert all(row.keys() == keys for row in rows.values())
    assert rows["F-APR-FORMAT-001"]["code"] == "gate.size-law" and rows["I-2"]["code"] == "gate.names-lead-back"
    assert run_cli(["gates", str(tiny), str(healthy), "-n", "2", "--fault", "GH-191"]) == 2
    assert "not a fault of an instrument" in capfd.readouterr().err
    assert run_cli(["gates", str(tiny), str(tmp_path / "none.apr")]) == 2


def test_the_other_verbs(tiny, healthy, tmp_path, capfd) -> None:
    assert run_cli(["selftest"]) == 0
    assert run_cli(["selftest", "--fault", "exit-zero,first-ten", "--json"]) == 1
    said = capfd.readouterr().out
    assert said.count('"ok": false') == 2
    assert run_cli(["fingerprint", str(tiny), str(healthy), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["equal"] is True and said["schema"] == 2 and {row["code"] for row in said["rows"]} == {"fingerprint.same"}
    assert run_cli(["fingerprint", str(tiny)]) == 0
    assert "transposed: sum blind, statistics blind, hash sees it" in capfd.readouterr().out
    convert_with(tiny, tmp_path / "other.apr", ["wrong-eps"])
    assert run_cli(["diff", str(tiny), str(healthy)]) == 0
    assert run_cli(["diff", str(tiny), str(tmp_path / "other.apr")]) == 1
    assert "config.rms_norm_eps" in capfd.readouterr().out
    assert run_cli(["diff", str(tiny), str(tmp_path / "other.apr"), "--json"]) == 1
    said = json.loads(capfd.readouterr().out)
    found = {row["what"]: row["code"] for row in said["rows"] if not row["equal"]}
    assert said["schema"] == 2 and found == {"config.rms_norm_eps": "diff.value"}


def test_kill_is_a_word_of_the_figure() -> None:
    assert figures.kill_plot({"x": [KILL]}, ["GR-1"]).images[0].get_array()[0, 0] == 1
    plt.close("all")
