"""The runner: crashes, hangs and shortage of memory are results; finished rows are not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import children
import numpy as np
import pytest

from aprlab.cli.prove import report_name
from aprlab.errors import FormatError, NumericError, UsageError
from aprlab.qualification import playbook, runner, scoring
from aprlab.qualification.runner import Broken, Child, Qualification, qualify
from aprlab.qualification.scoring import CRASH, ERROR, FAIL, MEMORY, PASS, SKIP, TIMEOUT

SENTENCES = {
    "segfault": (CRASH, "SIGSEGV; about to fall"), "exit": (CRASH, "exit status 3"), "killed": (MEMORY, "SIGKILL"),
    "hang": (TIMEOUT, "no answer within 1 s"), "eat": (MEMORY, "out of memory"), "nan": (ERROR, "5 NaN among 9 logits"),
    "bug": (ERROR, "ZeroDivisionError"),
}  # fmt: skip


def book(folder: Path, scenarios: list[dict[str, object]], formats: tuple[str, ...] = ("gguf",)) -> playbook.Playbook:
    data = {"name": "test", "title": "t", "formats": list(formats), "scenarios": scenarios}
    path = folder / "test.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return playbook.load(path)


def ask(id: str, prompt: str, **more: object) -> dict[str, object]:
    return {"id": id, "area": "QUAL", "ask": prompt, "expect": [{"exact": f"the answer to {prompt}"}], **more}


def test_whatever_breaks_is_a_result_and_the_next_scenario_runs(tiny: Path, tmp_path: Path) -> None:
    bad = [ask(f"{name}-it", name, timeout=1 if name == "hang" else 60) for name in SENTENCES]
    good = [ask(f"after-{name}", "hello") for name in SENTENCES]
    scenarios = [scenario for pair in zip(bad, good, strict=True) for scenario in pair]
    seen: list[str] = []
    found = qualify(
        tiny, book(tmp_path, scenarios), serve=children.stub, memory=1 << 34, on_row=lambda row: seen.append(row.scenario)
    )
    assert seen == [s["id"] for s in scenarios]
    for n, (outcome, note) in enumerate(SENTENCES.values()):
        broken, after = found.rows[2 * n : 2 * n + 2]
        assert (broken.outcome, after.outcome) == (outcome, PASS), broken.note
        assert note in broken.note
    assert found.upstream.closed == ("G3 no crash",)
    assert found.own.verdict == scoring.UNFIT
    assert found.own.blockers[0].endswith("error")
    assert Qualification.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()


def test_a_child_that_cannot_start_is_tried_once(tiny: Path, tmp_path: Path) -> None:
    found = qualify(tiny, book(tmp_path, [ask("a", "x"), ask("b", "y")]), serve=children.stub, engine="ptx")
    assert [(row.outcome, row.note) for row in found.rows] == [(CRASH, "the process ended: exit status 7")] * 2


def test_repeat_and_restart_see_an_answer_that_drifts(tiny: Path, tmp_path: Path) -> None:
    twice = {"area": "STAB", "repeat": 3}
    scenarios = [
        {"id": "same", "ask": "x", **twice}, {"id": "other", "ask": "drift", **twice},
        {"id": "again", "area": "STAB", "ask": "x", "restart": True},
        {"id": "counted", "area": "STAB", "ask": "drift", "restart": True},
    ]  # fmt: skip
    found = qualify(tiny, book(tmp_path, scenarios), serve=children.stub)
    assert [row.outcome for row in found.rows] == [PASS, FAIL, PASS, FAIL]
    assert found.rows[1].words[0]["said"] == "0 of 2 times the same tokens"
    assert [row.words[0]["oracle"] for row in found.rows] == ["repeat", "repeat", "restart", "restart"]


def test_a_run_goes_on_where_it_stopped(tiny: Path, tmp_path: Path) -> None:
    conversion = {"id": "c", "area": "COMP", "do": "convert", "from": "gguf", "to": "apr"}
    plan = book(tmp_path, [ask("a", "x"), ask("b", "y"), conversion])
    journal = tmp_path / "j.jsonl"
    done: list[str] = []
    stop_at = 2

    def stop(row: scoring.ScenarioRow) -> None:
        done.append(row.scenario)
        if len(done) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qualify(tiny, plan, serve=children.stub, journal=journal, on_row=stop)
    whole = journal.read_text()
    assert done == ["c", "a"]
    assert len(whole.splitlines()) == 2, "what was not run is not kept"
    journal.write_text(whole + '{"key": "b@gguf", "row": {"scen')  # torn by a power cut
    second = qualify(tiny, plan, serve=children.stub, journal=journal)
    assert (second.resumed, [row.outcome for row in second.rows]) == (1, [SKIP, PASS, PASS])
    third = qualify(tiny, plan, serve=children.stub, journal=journal)
    assert third.resumed == 2, "what was not run is tried again"
    assert [row.to_json() for row in third.rows] == [row.to_json() for row in second.rows]
    other = qualify(tiny, book(tmp_path, [ask("a", "z"), ask("b", "y")]), serve=children.stub, journal=journal)
    assert other.resumed == 0, "rows of another playbook"
    assert not list(tmp_path.glob("*.part"))
    late = qualify(tiny, book(tmp_path, [ask("a", "z"), ask("n", "new")]), serve=children.stub, minutes=0)
    assert [(row.outcome, row.note) for row in late.rows] == [(SKIP, "the time was up")] * 2


def test_a_journal_is_read_again_whatever_the_answers_hold(tmp_path: Path) -> None:
    path, header = tmp_path / "j.jsonl", {"model": "x"}
    texts = [f"a{end}b" for end in "\x85\u2028\u2029\x0b日"]
    rows = {f"{n}@gguf": scoring.ScenarioRow(str(n), "QUAL", "ask", "gguf", PASS, text=text) for n, text in enumerate(texts)}
    first = runner._Journal(path, header)
    for key, row in rows.items():
        first.add(key, row)
    whole = path.read_bytes()
    path.write_bytes(whole + '{"key": "日'.encode()[:-1])  # torn in the middle of a character
    assert runner._Journal(path, header).rows == rows
    assert path.read_bytes() == whole
    for line in (b"3\n", b'{"key": "a"}\n', b'{"key": "a", "row": {"odd": 1}}\n', b"\xff\n"):
        path.write_bytes(whole + line)
        with pytest.raises(FormatError, match="not a journal: line 7 holds no row; --fresh starts again"):
            runner._Journal(path, header)
    assert runner._Journal(path, {"model": "y"}).rows == {}, "another model's may be as it will"


def test_folders_are_distinguished_by_their_names_and_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "qwen2.5-0.5b", tmp_path / "qwen2.5-1.5b"]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(folders[0])
    assert [report_name(path) for path in (*folders, Path(), Path("m.v1.gguf"))] == [
        "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-0.5b", "m.v1",
    ]  # fmt: skip
    plan = book(tmp_path, [ask("a", "x")])

    def header(path: Path) -> dict[str, object]:
        run = runner._Run(path, "safetensors", plan, ("safetensors",), "reference", None, None, children.stub)
        run.close()
        return run.header

    weights = folders[0] / "model.safetensors"
    before, stat = header(folders[0]), weights.stat()
    assert before["bytes"] == 7
    assert header(weights) == before | {"model": weights.name, "modified": stat.st_mtime_ns}
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert header(folders[0]) != before


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_logits_that_are_no_numbers_are_an_error_in_words(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    seen = {"logits": SimpleNamespace(values=np.full((2, 3), value, np.float32))}
    monkeypatch.setattr(sys.modules["aprlab.tracing.traces"], "trace", lambda *args, **options: seen)
    bench = runner.worker.ChildOperations()
    bench.session = SimpleNamespace(chat_tokens=lambda text: [1, 2])
    with pytest.raises(NumericError, match="not numbers, or all zero"):
        bench.do_serial()


def test_a_pair_of_silent_models_is_still_plain_json(tiny: Path, tmp_path: Path) -> None:
    from aprlab.faults import convert_with

    convert_with(tiny, tmp_path / "silent.apr", ["zero-lm-head"])
    path = str(tmp_path / "silent.apr")
    pair = runner.worker.ChildOperations().do_pair(path, path, "reference", 1, ["Hi"], 1)
    assert json.loads(json.dumps(pair, allow_nan=False))["pair"]["answers"][0]["relative_l2"] == 0


def test_children_and_their_files_are_gone_afterwards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    child = Child(children.stub, None)
    pid = child.ask({"op": "ask", "kind": "ask", "prompt": "x"}, 60)["pid"]
    assert pid != os.getpid()
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    qualify(tiny, book(tmp_path, [ask("a", "segfault")]), serve=children.stub)
    assert not list((tmp_path / "t").iterdir())


def test_files_that_cannot_be_made_say_so_in_each_row(tiny: Path, tmp_path: Path) -> None:
    plan = book(tmp_path, [ask("a", "x")], ("gguf", "apr"))

    def no_disk(self: object, *args: object, **kw: object) -> Path:
        raise Broken(ERROR, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Run, "_made", no_disk)
        found = qualify(tiny, plan, serve=children.stub)
    assert [(row.format, row.outcome) for row in found.rows] == [("gguf", PASS), ("apr", ERROR)]
    assert found.rows[1].note == "no apr file: No space left on device"


def test_bad_input_is_refused_before_a_child_starts(tiny: Path, tmp_path: Path) -> None:
    plan = book(tmp_path, [ask("a", "x")])
    with pytest.raises(UsageError, match="unknown format 'onnx'"):
        qualify(tiny, plan, formats=["onnx"], serve=children.stub)
    (tmp_path / "bad.gguf").write_bytes(b"no")
    with pytest.raises(FormatError):
        qualify(tmp_path / "bad.gguf", plan, serve=children.stub)
    (tmp_path / "bad.json").write_text('{"rows": 5}')
    with pytest.raises(FormatError, match="not a qualification"):
        runner.read(tmp_path / "bad.json")


_DECODE = "decode_tokens_per_second"


# -- with a real child -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Qualification:
    """The embedded model in two formats, through one scenario of each kind."""
    scenarios: list[dict[str, object]] = [
        {"id": "load", "area": "STAB", "do": "load"},
        {"id": "add", "area": "QUAL", "ask": "What is 2+2?", "expect": [{"exact": "2 + 2 equals 4."}, {"stop": "eos"}]},
        {"id": "empty", "area": "EDGE", "ask": "", "expect": [{"refused": "the prompt is empty"}]},
        {"id": "not-refused", "area": "EDGE", "ask": "What is 2+2?", "max_tokens": 2, "expect": [{"refused": "empty"}]},
        {"id": "serial", "area": "REGR", "do": "serial", "expect": [{"figure": {"of": "relative_l2", "at_most": 1e-3}}]},
        {"id": "speed", "area": "PERF", "do": "speed", "expect": [{"figure": {"of": _DECODE, "at_least": 1e9}}]},
        {"id": "memory", "area": "PERF", "do": "memory", "expect": [{"figure": {"of": "beyond_file_mib", "at_most": 900}}]},
        {"id": "there", "area": "COMP", "do": "convert", "from": "gguf", "to": "apr", "max_tokens": 8},
        {"id": "back", "area": "COMP", "do": "convert", "from": "apr", "to": "gguf", "max_tokens": 8},
        {"id": "st", "area": "COMP", "do": "convert", "from": "gguf", "to": "safetensors"},
        {"id": "fp", "area": "REGR", "do": "gate", "gate": "F-ROSETTA-FP-001"},
        {"id": "count", "area": "REGR", "do": "gate", "gate": "F-GOLDEN-RULE-002"},
    ]
    plan = book(tmp_path_factory.mktemp("small"), scenarios, ("gguf", "apr"))
    return qualify(tiny, plan, engine="reference", threads=1)


def test_a_real_model_through_one_scenario_of_each_kind(small: Qualification) -> None:
    told = {(row.scenario, row.format): row for row in small.rows}
    for format in ("gguf", "apr"):
        assert told["add", format].text == "2 + 2 equals 4."
        assert {s: told[s, format].outcome for s in ("load", "add", "empty", "not-refused", "serial", "speed", "memory")} == {
            "load": PASS, "add": PASS, "empty": PASS, "not-refused": FAIL, "serial": PASS, "speed": FAIL, "memory": PASS,
        }  # fmt: skip
        assert told["load", format].figures["tensors"] == 99
        assert 0 < told["serial", format].figures["relative_l2"] < 1e-4
        assert told["speed", format].figures["prompt_tokens_per_second"] > 0
        assert told["memory", format].figures["peak_mib"] > 20
    for name, format in (("there", "gguf→apr"), ("back", "apr→gguf")):
        row = told[name, format]
        assert row.outcome == PASS, row.note
        assert row.details["same"] == 99
        assert all(a["bitwise"] and a["tokens"] for a in row.details["answers"])
    assert told["st", "gguf→safetensors"].outcome == SKIP
    assert [told[g, "gguf→apr"].outcome for g in ("fp", "count")] == [PASS, PASS]
    assert "99 tensors: 0 other" in told["fp", "gguf→apr"].words[0]["said"]


def test_a_faulty_conversion_is_reported_by_pair_and_gate(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair and gates of a file with a fault: what a child would say is asked in this process."""
    from aprlab.faults import convert_with
    from aprlab.qualification.worker import ChildOperations

    convert_with(tiny, tmp_path / "bad.apr", ["q4k-min-lost"])
    bench = ChildOperations()
    how = {"engine": "reference", "prompts": ["What is 2+2?"], "max_tokens": 6}
    pair = bench.do_pair(source=str(tiny), output=str(tmp_path / "bad.apr"), threads=1, **how)["pair"]
    assert not pair["answers"][0]["golden"]
    assert pair["answers"][0]["relative_l2"] > 0.01
    assert 0 < pair["other"] < 99
    assert pair["first"]
    gate = bench.do_gates(ref=str(tiny), cand=str(tmp_path / "bad.apr"), ids=["F-ROSETTA-FP-001"], **how)["gates"]
    assert [g["passed"] for g in gate] == [False]


def test_safetensors_and_back_keep_every_value_and_token(tiny: Path, tmp_path: Path) -> None:
    from aprlab.qualification.worker import ChildOperations, make

    make(tiny, tmp_path / "st", "safetensors")
    make(tmp_path / "st", tmp_path / "back.gguf", "gguf")
    how = {"engine": "reference", "prompts": ["What is 2+2?"], "max_tokens": 12, "threads": 1}
    for a, b in ((tiny, tmp_path / "st"), (tmp_path / "st", tmp_path / "back.gguf")):
        pair = ChildOperations().do_pair(source=str(a), output=str(b), **how)["pair"]
        assert (pair["same"], pair["other"], pair["answers"][0]["golden"]) == (99, 0, True)
        assert set(pair["types"][1]) == {"F32"}


@pytest.mark.peer
def test_the_peer_agrees_with_a_healthy_answer_and_with_no_other(tiny: Path) -> None:
    pytest.importorskip("xllamacpp")
    from aprlab.formats import open_model
    from aprlab.inference.session import Session
    from aprlab.qualification import oracles

    mine = Session(open_model(tiny), threads=1).generate("What is 2+2?", max_tokens=12)
    child = Child(runner.worker.serve, None)
    peer = child.ask({"op": "peer", "path": str(tiny), "prompt": mine.prompt_tokens, "max_tokens": 12}, 120)
    child.close()
    ends = [open_model(tiny).tokenizer.eos_token_id or 0]
    answer = oracles.Answer(mine.text, mine.tokens, mine.stop, mine.prompt_tokens, ends, peer=peer)
    word = oracles.judge("agreement", answer, {"tokens": 12}, "What is 2+2?")
    assert word.passed, word.said
    answer.tokens = [answer.tokens[0], answer.tokens[0] + 1, *answer.tokens[2:]]
    word = oracles.judge("agreement", answer, {"tokens": 12}, "What is 2+2?")
    assert word.passed is False
    assert "1 tokens the same" in word.said
    answer.tokens = mine.tokens[:4]  # ended by itself too early
    assert oracles.judge("agreement", answer, {"tokens": 12}, "").passed is False


def test_an_orphan_ends_itself_in_the_middle_of_a_hang(tmp_path: Path) -> None:
    code = (
        "import children, os, threading, time\nfrom aprlab.qualification.runner import Child\n"
        "if __name__ == '__main__':\n"
        " child = Child(children.stub, None)\n"
        " print(child.ask({'op': 'ask', 'kind': 'ask', 'prompt': 'x'}, 60)['pid'], flush=True)\n"
        " threading.Timer(0.5, os._exit, [0]).start()\n child.ask({'op': 'ask', 'kind': 'ask', 'prompt': 'hang'}, 60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=True)
    pid = int(done.stdout)
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":  # ended, and nobody has fetched it
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} still hangs")


def test_an_answer_that_exhausts_an_oracle_does_not_pass_and_ends_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle runs in a child with limits: the run goes on, and a second run finds the row in the journal."""
    monkeypatch.setattr(runner, "JUDGE_SECONDS", 0.001)
    scenarios = [ask("first", "x"), ask("second", "y")]
    book_ = book(tmp_path, scenarios)
    found = qualify(tiny, book_, serve=children.stub, journal=tmp_path / "journal")
    assert [row.outcome for row in found.rows] == [FAIL, FAIL]
    assert all("cannot be judged: timeout" in row.words[0]["said"] for row in found.rows)
    again = qualify(tiny, book_, serve=children.stub, journal=tmp_path / "journal")
    assert again.resumed == 2


def test_numbers_that_json_has_no_word_for_reach_no_journal() -> None:
    given = {"a": [float("nan"), 1.5], "b": {"c": float("-inf")}, "d": (1, "x")}
    assert json.dumps(runner.finite(given), allow_nan=False) == '{"a": [null, 1.5], "b": {"c": null}, "d": [1, "x"]}'
