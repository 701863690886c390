"""Statistics lead back to the decoder that made them, to the digits printed, and to nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprlab.cli.app import run_cli
from aprlab.errors import AprlabError, UsageError
from aprlab.faults import FAULTS
from aprlab.forensics.statistics import StatisticsForensics, explain_statistics, table_rows
from aprlab.formats import open_model
from aprlab.instruments.measured_figures import MeasuredFigures, agreement
from aprlab.instruments.statistics_tables import Figure, TableRow, read_statistics
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.paths import data_dir

DECODERS = ["q4k-nibble-pairs", "q6k-sequential"]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    """Two tensors of each type of the embedded model."""
    whole = open_model(tiny)
    few = [n for n in whole.tensors if n.startswith(("blk.0.", "blk.1."))]
    chosen: dict[str, Tensor] = {}
    for name in few:
        tensor = whole.tensors[name]
        if sum(t.type is tensor.type for t in chosen.values()) < 2 or "ffn_norm" in name or name == "blk.0.attn_q.weight":
            chosen[name] = tensor
    return whole.with_changes(tensors=chosen)


@pytest.fixture(scope="module")
def published(model: Model) -> list[dict[str, Any]]:
    """What upstream published, of the embedded model."""
    return table_rows(model, DECODERS)


def explained(model: Model, rows: list[dict[str, Any]], folder: Path, **options: Any) -> StatisticsForensics:
    path = folder / "table.json"
    path.write_text(json.dumps({"fingerprints": rows}))
    return explain_statistics(model, path, **options)


def test_a_faulty_decoder_is_convicted_by_its_figures(
    model: Model, published: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = explained(model, published, tmp_path)
    answers = {answer.type: answer for answer in found.types}
    assert answers["F32"].differ == 0
    q4k = [r for r in found.rows if r.type == "Q4_K"]
    assert {e.name for r in q4k for e in r.explained} == {"q4k-nibble-pairs", "q4k-16-bytes"}  # the same values in another order
    assert all(len(r.explained) == 2 and all(e.exact for e in r.explained) for r in q4k if r.differ)
    assert {e.name for r in found.rows if r.type == "Q6_K" for e in r.explained} == {"q6k-sequential"}
    assert {e.form for r in found.rows for e in r.explained} == {"decoder or file"}
    assert not any(answer.unexplained for answer in answers.values())
    assert "none left unexplained" in found.conclusion
    assert "cannot tell them apart" in answers["Q4_K"].words


def test_healthy_figures_are_called_healthy(model: Model, tmp_path: Path) -> None:
    found = explained(model, table_rows(model), tmp_path)
    assert not found.differing
    assert found.conclusion == f"all {len(model.tensors)} rows are the model's own"


def test_one_wrong_digit_is_not_explained(model: Model, published: list[dict[str, Any]], tmp_path: Path) -> None:
    """The last digit that was printed, of one figure of one row."""
    rows = [dict(row) for row in published]
    row = next(r for r in rows if r["dtype"] == "12")
    row["std"] = float(f"{row['std']:.6g}") * (1 + 4e-6)
    found = explained(model, rows, tmp_path)
    assert [r.name for r in found.rows if r.differ and not r.explained] == [row["name"]]


def test_without_checksums_the_other_figures_do(model: Model, published: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("name", "mean", "std", "min", "max")} for row in published]
    found = explained(model, rows, tmp_path)
    q6k = [r for r in found.rows if r.type == "Q6_K" and r.differ]
    assert q6k
    assert all([e.name for e in r.explained] == ["q6k-sequential"] and not r.explained[0].exact for r in q6k)


def test_two_faults_at_once_are_found(model: Model, tmp_path: Path) -> None:
    found = explained(model, table_rows(model, ["q4k-nibble-pairs", "q4k-min-lost"]), tmp_path)
    names = {e.name for r in found.rows for e in r.explained}
    assert "q4k-min-lost + q4k-nibble-pairs" in names
    assert all(" + " in name for name in names)
    alone = explained(model, table_rows(model, ["q4k-nibble-pairs", "q4k-min-lost"]), tmp_path, pairs=False)
    assert not any(r.explained for r in alone.rows)


def test_a_wrong_label_is_named(model: Model, tmp_path: Path) -> None:
    """Q4_K blocks read as floats: another number of values, most of them absurd."""
    rows = table_rows(model)
    for row in rows:
        tensor = model.tensors[row["name"]]
        if tensor.type.name == "Q4_K":
            floats = tensor.raw[: tensor.nbytes // 4 * 4].view(np.float32)
            measured = MeasuredFigures()
            measured.add(floats)
            row |= {"mean": measured.mean, "std": measured.std, "min": measured.min, "max": measured.max}
            row |= {"nan_count": measured.nan}
            row |= {"inf_count": measured.inf, "count": measured.count, "checksum": measured.checksum("bits-sum-32")}
            row |= {"zero_fraction": measured.zeros / measured.finite}
            for name in ("p5", "p25", "p50", "p75", "p95"):
                row.pop(name)
    found = explained(model, rows, tmp_path)
    q4k = [r for r in found.rows if r.type == "Q4_K"]
    assert {(e.name, e.form) for r in q4k for e in r.explained} == {("GH-186", "label")}


def test_figures_of_another_tensor_are_named(model: Model, tmp_path: Path) -> None:
    rows = table_rows(model)
    one, two = (next(r for r in rows if r["name"] == f"blk.{n}.ffn_norm.weight") for n in (0, 1))
    one["name"], two["name"] = two["name"], one["name"]
    found = {r.name: r for r in explained(model, rows, tmp_path).rows}
    assert found["blk.0.ffn_norm.weight"].other == "blk.1.ffn_norm.weight"
    assert found["blk.1.ffn_norm.weight"].other == "blk.0.ffn_norm.weight"


def test_every_decoder_fault_is_explained_by_its_own_figures(model: Model, tmp_path: Path) -> None:
    """A law over the catalogue: what a faulty decoder publishes leads back to it."""
    kinds = {tensor.type for tensor in model.tensors.values()}
    for fault in FAULTS.values():
        if fault.registry is None or fault.section != "D" or not fault.fits(model):
            continue
        rows = table_rows(model, [fault.id])
        if rows == table_rows(model):
            continue
        found = explained(model, rows, tmp_path, pairs=False)
        assert found.differing, fault.id
        assert all(fault.id in {e.name for e in r.explained} for r in found.differing), fault.id
    assert len(kinds) > 2


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_csv_and_our_own_fingerprints_are_read(
    model: Model, tiny: Path, published: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Tensor", "Min", "Max", "Avg", "StdDev", "Median", "colour"])
        for row in published:
            writer.writerow([row["name"], *(f"{row[key]:.6f}" for key in ("min", "max", "mean", "std", "p50")), "red"])
    table = read_statistics(path)
    assert table.left_out == ("colour",)
    assert set(table.rows["blk.0.attn_q.weight"].figures) == {"min", "max", "mean", "std", "p50"}
    assert table.rows["blk.0.attn_q.weight"].figures["mean"].half_unit == pytest.approx(0.5e-6)
    found = explain_statistics(model, table)
    assert {e.name for r in found.rows if r.type == "Q6_K" for e in r.explained} >= {"q6k-sequential"}

    assert run_cli(["fingerprint", str(tiny), "--json"]) == 0
    own = tmp_path / "own.json"
    own.write_text(capsys.readouterr().out)
    assert read_statistics(own).sampled
    assert not explain_statistics(open_model(tiny), own).differing


def test_names_of_hugging_face_are_understood(model: Model, published: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [dict(row) for row in published]
    rows[[r["name"] for r in rows].index("blk.0.attn_q.weight")]["name"] = "model.layers.0.self_attn.q_proj.weight"
    assert not [r for r in explained(model, rows, tmp_path).rows if r.differ and not r.explained]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "statistics.no-rows"),
        ("{", "statistics.not-json"),
        ("[]", "statistics.no-rows"),
        ('[{"mean": 1}]', "statistics.no-names"),
        ('[{"name": "x", "colour": 1}]', "statistics.no-figures"),
        ('[{"name": "x", "mean": "red"}]', "statistics.not-a-number"),
        ('[{"name": "x", "mean": 1}, {"name": "x", "mean": 1}]', "statistics.listed-twice"),
        ('[{"name": "x", "mean": 1}, {"mean": 1}]', "statistics.no-name"),
        ("\xff\xfe", "statistics.no-rows"),
    ],
)
def test_what_is_no_table_is_refused(text: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(AprlabError) as error:
        read_statistics(path)
    assert error.value.code == code
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AprlabError, match="not text"):
        read_statistics(path)
    with pytest.raises(UsageError):
        read_statistics(tmp_path / "none.json")
    path.write_text('[{"name": "other", "mean": 1}]')
    with pytest.raises(UsageError) as error:
        explain_statistics(model, path)
    assert error.value.code == "statistics.other-model"


def test_a_percentile_is_checked_under_any_definition() -> None:
    values = np.arange(1000, dtype=np.float32)
    for printed, good in ((49.0, True), (49.95, True), (50.0, True), (52.5, False), (46.0, False)):
        row = TableRow("x", "x", "", (), {"p5": Figure(printed, 1e-6)}, {})
        measured = MeasuredFigures(dict(row.figures))
        measured.add(values[:300])
        measured.add(values[300:])
        assert agreement(row, measured).whole == good, printed


def test_measured_figures_count_what_is_not_finite() -> None:
    measured = MeasuredFigures()
    measured.add(np.array([1, np.nan, np.inf, -np.inf, 0, 3], np.float32))
    assert (measured.count, measured.nan, measured.inf, measured.zeros, measured.min, measured.max) == (6, 1, 2, 1, 0, 3)
    assert measured.mean == pytest.approx(4 / 3)


# ── the verb ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_verb(tiny: Path, published: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(published))
    assert run_cli(["forensics", str(tiny), "--statistics", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {a["type"]: a["explanations"][0]["reading"] for a in data["types"] if a["differ"]} == {
        "Q4_K": "q4k-nibble-pairs", "Q6_K": "q6k-sequential",
    }  # fmt: skip
    assert run_cli(["forensics", str(tiny), "--statistics", str(path)]) == 0
    assert "q6k-sequential has all figures of" in capsys.readouterr().out
    assert run_cli(["forensics", str(tiny)]) == 2
    assert "--saw, --statistics and --case" in capsys.readouterr().err


@pytest.mark.real
def test_the_published_baseline_was_computed_by_two_faulty_decoders(real_15b: Path) -> None:
    """Twelve rows of upstream's reference of 2026-01-30, checksums included."""
    found = explain_statistics(real_15b, data_dir() / "published-statistics.json")
    answers = {answer.type: answer for answer in found.types}
    assert (answers["F32"].rows, answers["F32"].differ) == (4, 0)
    for kind, names in (("Q4_K", {"q4k-nibble-pairs", "q4k-16-bytes"}), ("Q6_K", {"q6k-sequential"})):
        assert answers[kind].agree == 0
        assert not answers[kind].unexplained
        assert {name for name, *_ in answers[kind].explanations} == names
        assert all(count == exact == answers[kind].rows for _, count, exact, _ in answers[kind].explanations)
