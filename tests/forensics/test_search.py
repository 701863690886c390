"""A search outlives its end: what was judged is in a journal, true of one model, its cases and the faults as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aprlab.cli.app import run_cli
from aprlab.errors import AprlabError, UsageError
from aprlab.faults import session_with
from aprlab.forensics import bench as benches
from aprlab.forensics.bench import FaultBench, Question
from aprlab.forensics.outcome import Forensics
from aprlab.forensics.search import _Part, best_of, judge_part, search
from aprlab.formats import open_model
from aprlab.model.model import Model

FEW = ["q4k-nibble-pairs", "rope-norm", "template-lost", "nan-sampled"]
ASKED = Question("x", "What is 2+2?", " July July", "file", None, 8)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return open_model(tiny)


def run(model: Model, journal: Path | None, faults: list[str] = FEW, **options: object) -> tuple[Forensics, list[str]]:
    """The ranking, and the sets that had to be judged."""
    judged: list[str] = []

    class Counting(FaultBench):
        def judge(self, faults: tuple[str, ...], ids: object = None) -> dict:
            judged.append("+".join(faults))
            return super().judge(faults, ids)  # type: ignore[arg-type]

    question = options.pop("question", ASKED)
    assert isinstance(question, Question)
    return search(Counting(model, [question], "reference"), faults, journal=journal, **options)["x"], judged  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Forensics]:
    path = tmp_path_factory.mktemp("journal") / "whole.jsonl"
    found, judged = run(model, path)
    assert judged == FEW
    return path, found


def test_a_search_that_was_cut_goes_on_where_it_stopped(model: Model, whole: tuple[Path, Forensics], tmp_path: Path) -> None:
    lines = whole[0].read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 + len(FEW)  # what it is about, the question, and a line for each set
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:40])  # killed within its third line
    found, judged = run(model, cut)
    assert judged == FEW[2:]
    assert [(s.faults, s.match and s.match.score, s.error) for s in found.suspects] == [
        (s.faults, s.match and s.match.score, s.error) for s in whole[1].suspects
    ]
    assert cut.read_bytes().count(b"\n") == len(lines)
    again, judged = run(model, cut)
    assert judged == []
    assert again.posterior is not None
    assert whole[1].posterior is not None
    assert again.posterior.none == pytest.approx(whole[1].posterior.none, abs=1e-3)
    rows, _ = run(model, cut, ["rope-norm"])  # what the journal has is ranked, whatever is asked this time
    assert len(rows.suspects) == len(FEW)


@pytest.mark.parametrize(
    ("line", "change", "code"),
    [
        (0, {"model": {"name": "other.gguf", "is": "3 bytes"}}, "journal.other-model"),
        (0, {"engine": "jit"}, "journal.other-engine"),
        (0, {"journal": "a diary"}, "journal.not-one"),
        (0, {"version": 9}, "journal.not-one"),
        (1, {"digest": "0"}, "journal.other-case"),
        (2, {"faults": ["no-such"]}, "journal.other-faults"),
        (2, {"costs": 3}, "journal.line"),
    ],
)
def test_a_journal_of_something_else_is_refused_by_name(
    line: int, change: dict, code: str, model: Model, whole: tuple[Path, Forensics], tmp_path: Path
) -> None:
    rows = [json.loads(text) for text in whole[0].read_text(encoding="utf-8").splitlines()]
    rows[line] |= change
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(AprlabError) as error:
        run(model, path)
    assert error.value.code == code
    assert error.value.path == path
    assert path.read_bytes() == before


def test_a_fault_that_has_changed_since_is_refused(model: Model, whole: tuple[Path, Forensics], tmp_path: Path) -> None:
    rows = [json.loads(text) for text in whole[0].read_text(encoding="utf-8").splitlines()]
    rows[0]["faults"]["rope-norm"] = "of yesterday"
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UsageError, match="'rope-norm' has changed since"):
        run(model, path)


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", '{"journal": 3}\n', "cut before its end"])
def test_what_is_no_journal_is_left_alone(text: str, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(AprlabError):
        run(model, path)
    assert path.read_text() == text


def test_pairs_grow_from_what_makes_the_text_likely(model: Model, whole: tuple[Path, Forensics]) -> None:
    ran = {s.faults: s for s in whole[1].suspects if s.match is not None and s.bits is not None}
    assert best_of(whole[1].suspects, 1) == [min(ran, key=lambda faults: ran[faults].bits or 0)]
    found, judged = run(model, None, ["q4k-nibble-pairs", "rope-norm"], depth=2, width=1)
    assert judged == ["q4k-nibble-pairs", "rope-norm", "q4k-nibble-pairs+rope-norm"]
    assert len(found.suspects) == 3


def test_a_first_token_out_of_reach_ends_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The healthy model would never begin with it: the set is left after the prompt's own pass, and says so."""
    monkeypatch.setattr(benches, "FAR", (1000, 1))
    text = session_with(model, ["rope-norm"]).generate("What is 2+2?", max_tokens=6).text
    bench = FaultBench(model, [Question("x", "What is 2+2?", text, "file", None, 8)], "reference")
    kept, left = (bench.judge((id,))["x"] for id in ("rope-norm", "lost-k-biases"))
    assert (kept.first_rank, kept.cut) == (0, "")
    assert left.first_rank is not None
    assert left.first_rank > 1
    assert f"rank {left.first_rank}" in left.cut
    assert len(left.tokens) == 1
    assert kept.bits is not None
    assert left.bits is not None
    assert kept.bits < left.bits


def test_another_process_judges_alike(tiny: Path, model: Model, whole: tuple[Path, Forensics]) -> None:
    part = _Part(str(tiny), (ASKED,), "reference", 1, ("rope-norm",), ("x",))
    faults, found = judge_part(part)
    here = next(s for s in whole[1].suspects if s.faults == faults)
    assert (found["x"].tokens, found["x"].costs) == (here.tokens, here.costs)
    with pytest.raises(UsageError, match="jobs 0"):
        run(model, None, jobs=0)


def test_two_processes_and_the_verb(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "text.jsonl"
    args = ["forensics", str(tiny), "--saw", " July July", "--only", "rope-norm,q4k-nibble-pairs", "-e", "reference"]
    assert run_cli([*args, "--resume", str(journal), "--jobs", "2", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert {tuple(s["faults"]) for s in first["suspects"]} == {("rope-norm",), ("q4k-nibble-pairs",)}
    assert sum(first["posterior"][name] for name in ("healthy", "fault", "compound", "none")) == pytest.approx(1, abs=1e-3)
    assert run_cli([*args, "--resume", str(journal)]) == 0
    assert "none of these" in capsys.readouterr().out
    assert journal.read_text(encoding="utf-8").count('"for"') == 2
    assert run_cli([*args[:-1], "jit", "--resume", str(journal)]) == 2
    assert "journal of another engine" in capsys.readouterr().err


