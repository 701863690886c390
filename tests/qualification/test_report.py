"""Page, JSON, figures and the verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import page_script

from aprlab import figures
from aprlab.cli.app import run_cli
from aprlab.errors import UsageError
from aprlab.qualification import report, runner
from aprlab.qualification.runner import Qualification
from aprlab.qualification.scoring import FAIL, PASS, SKIP, ScenarioRow

MODEL = {"file": "m.gguf", "format": "gguf", "bytes": 5, "by_type": {"Q4_K": 2}, "parameters": 7}


def made(rows: list[ScenarioRow]) -> Qualification:
    return Qualification(MODEL, {"name": "p", "title": "T", "digest": "d"}, "reference", 1, ("gguf", "apr"), rows)


def rows() -> list[ScenarioRow]:
    word = {"oracle": "exact", "passed": False, "said": "'<b>5'"}
    return [
        ScenarioRow("ask", "QUAL", "ask", "gguf", FAIL, prompt="2+2\x07?", text="<b>5", stop="eos", tokens=[1], words=[word]),
        ScenarioRow("ask", "QUAL", "ask", "apr", FAIL, prompt="2+2\x07?", text="<b>5", stop="eos", tokens=[1], words=[word]),
        ScenarioRow("other", "EDGE", "ask", "gguf", PASS, prompt="hi", text="hello", tokens=[1]),
        ScenarioRow("F-X", "REGR", "gate", "gguf→apr", PASS, prompt="F-X", words=[{**word, "passed": True, "said": "9 tensors"}]),
        ScenarioRow("there", "COMP", "convert", "gguf→apr", SKIP, prompt="gguf → apr", note="apr is not asked for"),
        ScenarioRow("fast", "PERF", "speed", "gguf", PASS, figures={"decode_tokens_per_second": 12.5}),
    ]


def test_the_page_has_everything_and_fetches_nothing(tmp_path: Path) -> None:
    found = made(rows())
    page, data = report.write(found, tmp_path / "q")
    text = page.read_text()
    parts = ["not enough evidence", "2+2\\x07?", "&lt;b&gt;5", "9 tensors", "apr is not asked for", "12.5", "hello"]
    for part in [*parts, "of 1000 points"]:
        assert part in text, part
    assert "<b>5" not in text
    assert text.count("&lt;b&gt;5</pre>") == 1, "the same answer in two formats stands there once"
    assert "gguf, apr: fail; exact" in text
    assert "src=" not in text
    assert "http" not in text
    again = runner.read(data)
    assert [r.to_json() for r in again.rows] == [r.to_json() for r in found.rows]
    assert json.loads(data.read_text())["own"]["sentence"] == found.own.sentence
    assert not list(tmp_path.glob("*.part"))


def test_the_columns_of_the_tickets_table() -> None:
    cells = report.cells(made(rows()))
    assert (cells["rows"], cells["answers"], cells["conversions"]) == ("3/5", "0/1", "not run")
    assert cells["own"] == "75.0 %"
    assert report.area_rows(made(rows()))[0] == ("QUAL quality of answers", "0", "1", "0", "0/200")


def test_docs_page_has_the_tickets_rows_next_to_the_measured_ones() -> None:
    text = page_script("qualification_page").markdown([made(rows())])
    assert "| Qwen2.5-Coder 0.5B Instruct | 24.2 (F) | 10/22 | 10/10 | 0/12 |" in text
    assert text.count("| 24.2 (F) |") == 5
    assert "m.gguf" in text


def test_area_bars_draw_shares_and_say_where_there_are_no_rows() -> None:
    ax = figures.area_bars({"a": {"QUAL": 0.5, "PERF": None}, "b": {"QUAL": 1.0, "PERF": 0.0}})
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert heights == [[50, 0], [100, 0]]
    assert [text.get_text() for text in ax.texts] == ["50", "no rows", "100", "0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["QUAL", "PERF"]
    with pytest.raises(UsageError, match="shares lie in"):
        figures.area_bars({"a": {"QUAL": 50.0}})
    with pytest.raises(UsageError):
        figures.area_bars({})


def test_interval_plot_draws_both_ends() -> None:
    ax = figures.interval_plot({10: (100.0, 72.0, 100.0), 20: (90.0, 70.0, 97.0)}, floor=80)
    (bars,) = ax.containers
    assert bars.lines[0].get_xydata().tolist() == [[10, 100], [20, 90]]
    segments = [segment.tolist() for segment in bars.lines[2][0].get_segments()]
    assert segments == [[[10, 72], [10, 100]], [[20, 70], [20, 97]]]
    assert any(list(line.get_ydata()) == [80, 80] for line in ax.lines)


def test_the_verb_runs_resumes_and_leaves_page_and_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "two.yaml"
    plan.write_text(
        "name: two\ntitle: T\nformats: [gguf]\nscenarios:\n"
        "  - {id: a, area: QUAL, ask: 'What is 2+2?', expect: [{arithmetic: 4}]}\n"
        "  - {id: b, area: QUAL, ask: 'What is 2+2?', max_tokens: 2, expect: [{stop: eos}]}\n"
    )
    out = tmp_path / "reports"
    args = ["qualify", str(tiny), "--playbook", str(plan), "--engine", "reference", "--out", str(out)]
    assert run_cli(args) == 4
    told = capsys.readouterr()
    assert "not enough evidence: 1 of 2 scenarios pass" in told.out
    assert "upstream's score: 27.9 (F), at most 44.7" in told.out
    assert str(out / f"qualify-{tiny.stem}-two.html") in told.out
    assert run_cli([*args, "--json"]) == 4
    told = capsys.readouterr()
    data = json.loads(told.out)
    assert [row["outcome"] for row in data["rows"]] == [PASS, FAIL]
    assert "2 of 2 rows are an earlier run's" in told.err
    assert run_cli([*args[:-4], "--engine", "warp", "--out", str(out)]) == 2
    assert "unknown engine 'warp'" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace("arithmetic: 4", "arithmetik: 4"))
    assert run_cli(args) == 2
    assert "line 5: unknown oracle 'arithmetik'" in capsys.readouterr().err
