"""The command line: answers, exit statuses, one-line errors, and what happens when somebody pulls the plug."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from aprlab import __version__
from aprlab.cli.app import run_cli
from aprlab.cli.find import peel
from aprlab.cli.look import ask
from aprlab.cli.verbs import VERBS
from aprlab.errors import UsageError


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]):
    """Run a command line in this process: (status, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run_cli([str(arg) for arg in args])
        return (status, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def tiny_apr(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.apr"
    assert run_cli(["convert", str(tiny), "-o", str(path)]) == 0
    return path


def command(*args: object, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-m", "aprlab", *map(str, args)], **pipes)


# -- the frame -------------------------------------------------------------------------------------------------------


def test_version(cli) -> None:
    assert cli("--version") == (0, f"aprlab {__version__}\n", "")


def test_start_up_loads_nothing_heavy() -> None:
    code = "import sys, aprlab.cli as c; s = c.run_cli(['--version']); print(s, sorted(set(sys.modules) & set(sys.argv[1:])))"
    heavy = ["numpy", "gguf", "numba", "matplotlib", "rich", "jupyter_client", "papermill", "tokenizers", "tqdm"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("verb", sorted(verb.path for verb in VERBS))
def test_every_verb_has_help_with_an_example_of_itself(cli, verb: str) -> None:
    status, out, _ = cli(*verb.split(), "--help")
    assert status == 0
    assert f"Example: aprlab {verb}" in " ".join(out.split())


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["run", "x.gguf"],
        ["inspect", "--frob"],
        ["run", "x.gguf", "-p", "hi", "-n", "0"],
        ["run", "x.gguf", "-p", "hi", "-n", "many"],
        ["run", "x.gguf", "-p", "hi", "--top-p", "1.5"],
    ],
)
def test_usage_errors_exit_2_with_at_most_one_line(cli, args: list[str]) -> None:
    status, _, err = cli(*args)
    assert status == 2
    assert len(err.splitlines()) == (1 if args else 0)
    assert err.startswith("aprlab: ") or not args


def test_errors_are_one_line_without_debug_and_a_stack_with_it(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nothing of the kind")
    process = command("inspect", bad)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"aprlab: {bad}")
    assert "neither GGUF nor APR" in err
    assert len(err.splitlines()) == 1
    for args in (["--debug", "inspect", bad], ["inspect", bad, "--debug"]):
        process = command(*args)
        assert "Traceback" in process.communicate()[1]
        assert process.returncode != 0


@pytest.mark.parametrize("what", ["missing", "folder"])
@pytest.mark.parametrize("verb", ["inspect", "convert", "export", "run", "chat", "investigate"])
def test_files_that_are_none(cli, tmp_path: Path, verb: str, what: str) -> None:
    path = tmp_path / "x.gguf"
    if what == "folder":
        path.mkdir()
    out = tmp_path / "out"
    options = {"convert": ["-o", out], "export": ["-o", out], "run": ["-p", "hi"]}
    args = ["--model", path, "--out", out] if verb == "investigate" else [path, *options.get(verb, [])]
    status, _, err = cli(verb, *args)
    assert status == 2
    assert err.startswith(f"aprlab: {path}: ")
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_colours_on_a_terminal_only(tiny: Path) -> None:
    def on_a_terminal(**settings: str) -> str:
        ours, theirs = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS")}
        environment |= {"TERM": "xterm-256color", "COLUMNS": "120", **settings}
        process = command("doctor", "--help", stdout=theirs, stderr=theirs, text=False, env=environment)
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += (part := os.read(ours, 65536))
            except OSError:  # Linux says EIO at the end of a terminal
                break
            if not part:
                break
        assert process.wait() == 0
        os.close(ours)
        return seen.decode()

    def coloured(text: str) -> bool:
        return any(f"\x1b[{code}" in text for code in ("1;3", "3", "38;"))

    assert coloured(on_a_terminal())
    assert not coloured(on_a_terminal(NO_COLOR="1"))
    process = command("doctor", "--help")
    assert "\x1b" not in process.communicate()[0]


def test_a_closed_pipe_is_quiet(tiny: Path) -> None:
    process = command("inspect", tiny, "--json", bufsize=0)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_nothing(tiny: Path, tmp_path: Path, number: int, status: int) -> None:
    # A pause in the progress bar holds the conversion in the middle of its work, when the temporary file is there.
    code = (
        "import sys, time, aprlab.cli as c, aprlab.cli.output as o\n"
        "def pause(self, n): print('writing', flush=True); time.sleep(60)\n"
        "o._NoBar.update = pause\n"
        "sys.exit(c.run_cli(sys.argv[1:]))"
    )
    out = tmp_path / "out.apr"
    args = [sys.executable, "-c", code, "convert", str(tiny), "-o", str(out)]
    # A shell starts background jobs with SIGINT ignored, and children inherit that: CI may run like this.
    heed = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout.readline() == "writing\n"
    if sys.platform == "linux":  # where it has no name yet
        held = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert any(link.startswith(str(tmp_path)) for link in held), "the output should be open by now"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "aprlab: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_the_shell_completes_verbs() -> None:
    environment = {**os.environ, "_APRLAB_COMPLETE": "complete_bash", "COMP_WORDS": "aprlab in", "COMP_CWORD": "1"}
    script = "import sys; sys.argv = ['aprlab']; from aprlab.cli.app import app_of; app_of()(prog_name='aprlab')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["inspect", "investigate"]


# -- files -----------------------------------------------------------------------------------------------------------


def test_inspect_as_json_tells_all(cli, tiny: Path) -> None:
    status, out, err = cli("inspect", tiny, "--json")
    seen = json.loads(out)
    assert (status, err) == (0, "")
    assert seen["format"] == "gguf"
    assert sum(row["tensors"] for row in seen["by_type"].values()) == len(seen["tensors"])
    assert sum(row["bytes"] for row in seen["by_type"].values()) == seen["bytes"] == sum(t["bytes"] for t in seen["tensors"])
    assert seen["missing"] == seen["unexpected"] == []
    assert seen["config"]["block_count"] * 12 + 3 == len(seen["tensors"])


def test_inspect_for_people_shows_every_tensor(cli, tiny_apr: Path) -> None:
    status, out, _ = cli("inspect", tiny_apr)
    assert status == 0
    assert "apr (aprender)" in out
    assert out.count("attn_q.bias") == 8


def test_convert_and_export_come_back_to_the_same_bytes(cli, tiny: Path, tiny_apr: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.gguf"
    status, out, _ = cli("export", tiny_apr, "-o", back, "--json")
    assert status == 0
    assert back.read_bytes() == tiny.read_bytes()
    assert json.loads(out)["types_in"] == json.loads(out)["types_out"]


def test_convert_verbose_has_a_line_per_tensor_and_quantize_says_so(cli, tiny: Path, tmp_path: Path) -> None:
    status, out, _ = cli("convert", tiny, "-o", tmp_path / "q.apr", "--quantize", "q8_0", "--verbose")
    assert status == 0
    assert out.count("model.layers.7.") == 12
    assert "note: re-encoded" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "SAME"], "same"),
        (["-o", "OLD"], "--force"),
        (["-o", "NEW", "--quantize", "q9"], "q9"),
        (["-o", "NEW", "--dialect", "x"], "'x'"),
    ],
)
def test_convert_refuses(cli, tiny: Path, tmp_path: Path, args: list[str], message: str) -> None:
    source, old, new = tmp_path / "in.gguf", tmp_path / "old.apr", tmp_path / "new.apr"
    source.write_bytes(tiny.read_bytes())
    old.write_bytes(b"precious")
    places = {"SAME": source, "OLD": old, "NEW": new}
    status, _, err = cli("convert", source, *(places.get(arg, arg) for arg in args))
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert old.read_bytes() == b"precious"
    assert source.read_bytes() == tiny.read_bytes()
    assert not new.exists()


# -- answers ---------------------------------------------------------------------------------------------------------


def test_run_streams_the_answer_to_stdout_and_the_rest_to_stderr(cli, tiny: Path) -> None:
    status, out, err = cli("run", tiny, "-p", "What is 2+2?")
    assert (status, out) == (0, "2 + 2 equals 4.\n")
    assert err.splitlines()[0] == "8 layers, 58 quantised, 41 F32 tensors, 3 MB; engine reference (auto)"


def test_run_as_json_is_the_same_answer_from_the_other_file(cli, tiny: Path, tiny_apr: Path) -> None:
    answers = []
    for path in (tiny, tiny_apr):
        status, out, err = cli("run", path, "-p", "What is 2+2?", "--json")
        assert (status, err) == (0, "")
        answers.append(json.loads(out))
    for answer in answers:
        assert answer.pop("timing").keys() == {"load_seconds", "prompt_tokens_per_second", "decode_tokens_per_second"}
    assert answers[0] == answers[1]
    assert answers[0]["text"] == "2 + 2 equals 4."
    assert answers[0]["stop"] == "eos"
    assert answers[0]["load"].keys() == {"layers", "quantised", "float", "bytes", "by_type"}


def test_run_stops_at_max_tokens_and_samples_by_seed(cli, tiny: Path) -> None:
    def tokens(*options: object) -> list[int]:
        status, out, _ = cli("run", tiny, "-p", "What is 2+2?", "--json", *options)
        assert status == 0
        return json.loads(out)["tokens"]

    greedy = tokens()
    assert tokens("-n", 3) == greedy[:3]
    hot = ["--temperature", 5, "-n", 8]
    assert tokens(*hot, "--seed", 1) == tokens(*hot, "--seed", 1)
    assert tokens(*hot, "--seed", 1) != tokens(*hot, "--seed", 2)
    assert tokens(*hot, "--top-p", 0.0001) == greedy


def test_run_traces_the_prompt(cli, tiny: Path, tmp_path: Path) -> None:
    from aprlab.tracing.traces import Trace

    kept = tmp_path / "t.npz"
    args = ["run", tiny, "-p", "What is 2+2?", "-n", 1, "--trace", "layers.*.out", "--trace-out", kept]
    status, out, err = cli(*args)
    assert (status, out) == (0, "2\n")
    assert [line.split()[0] for line in err.splitlines() if "std" in line] == [f"layers.{n}.out" for n in range(8)]
    assert list(Trace.load(kept)) == [f"layers.{n}.out" for n in range(8)]
    status, out, err = cli(*args)
    assert (status, out) == (2, ""), "an existing trace is refused before the answer"
    assert "exists" in err


@pytest.mark.parametrize(
    "args",
    [
        ["-p", ""],
        ["-p", "hi", "--trace", "no.such.point"],
        ["-p", "hi", "--trace-out", "x.npz"],
        ["-p", "hi", "--engine", "abacus"],
        ["-p", "hi", "--raw", "--system", "be brief"],
    ],
)
def test_run_refuses(cli, tiny: Path, args: list[str]) -> None:
    status, _, err = cli("run", tiny, *args)
    assert status == 2
    assert err.splitlines()[-1].startswith("aprlab: ")


def test_chat_remembers_and_survives_a_refusal(tiny: Path) -> None:
    lines = "What is 2+2?\n\n" + "too long " * 600 + "\nWhat is 2+2?\n/quit\nnever\n"
    process = command("chat", tiny, "-n", 32, stdin=subprocess.PIPE)
    out, err = process.communicate(lines)
    assert process.returncode == 0
    answers = out.splitlines()
    assert len(answers) == 3
    assert answers[0] == "2 + 2 equals 4."
    assert answers[1] == ""
    assert "no room in a context" in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_piped_into_chat_is_utf8(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    def piped(line: bytes) -> str | None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line), "utf-8", errors))
        return ask()

    assert piped("größer\n".encode()) == "größer"
    with pytest.raises(UsageError, match="not UTF-8"):
        piped(b"gr\xf6\xdfer\n")


# -- the onion -------------------------------------------------------------------------------------------------------


def test_peel_refuses_its_output_before_the_work(cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peel(*args: object, **options: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(import_module("aprlab.onion.peeling"), "peel", peel)
    (tmp_path / "file").touch()
    refusal = f"aprlab: {tmp_path / 'file'}: cannot be a folder for reports: File exists\n"
    assert cli("peel", tiny, "--out", tmp_path / "file")[::2] == (2, refusal)
    (tmp_path / f"{tiny.stem}.html").mkdir()
    status, _, err = cli("peel", tiny, "--out", tmp_path)
    assert status == 2
    assert "is a directory" in err


def test_the_title_of_a_verdict_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Verdict:
        exit_code = 0

        def to_json(self) -> dict[str, str]:
            return {}

        def _repr_html_(self) -> str:
            return "<p>"

    monkeypatch.setattr(sys.modules["aprlab.onion.peeling"], "peel", lambda *args, **options: Verdict())
    assert peel([Path("<b>&.gguf")], [], reports=tmp_path, prompt="", as_json=True) == 0
    assert "<title>&lt;b&gt;&amp;</title>" in (tmp_path / "<b>&.html").read_text()


# -- the lab ---------------------------------------------------------------------------------------------------------


def test_doctor_finds_this_installation_sound(cli) -> None:
    status, out, _ = cli("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert status == 0, [check for check in checks.values() if check["status"] == "fail"]
    assert "2 + 2 equals 4." in checks["embedded model"]["detail"]
    assert checks["numpy"]["status"] == "ok"


def test_investigate_prints_its_checks_and_leaves_three_files(cli, tmp_path: Path) -> None:
    out_folder = tmp_path / "reports"
    status, out, err = cli("investigate", "--out", out_folder)
    assert status == 0, err
    lines = out.splitlines()
    left = [*(f"00_golden_rule.{kind}" for kind in ("ipynb", "html", "json")), "index.html"]
    assert lines[-4:] == [str(out_folder / file) for file in left]
    assert all((out_folder / file).is_file() for file in left)
    assert all(line.startswith("yes ") for line in lines[:-4])
    findings = json.loads((out_folder / "00_golden_rule.json").read_text())
    assert len(findings["checks"]) == len(lines) - 4 >= 7
    assert findings["answers"]["apr"]["text"] == "2 + 2 equals 4."


def test_investigate_fails_where_the_rule_does(cli, tmp_path: Path) -> None:
    status, _, err = cli("investigate", "--out", tmp_path, "--expected", "5")
    assert status == 1
    assert err.count("\n") == 1
    assert "the answer is '5'" in err
    assert json.loads((tmp_path / "00_golden_rule.json").read_text())["checks"]["the answer is '5'"] is False


def test_investigate_refuses_an_unknown_engine_before_it_starts(cli, tmp_path: Path) -> None:
    status, _, err = cli("investigate", "--out", tmp_path / "out", "--engine", "abacus")
    assert status == 2
    assert "unknown engine 'abacus'; known: reference" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_the_golden_rule_on_the_real_model(cli, real_05b: Path, tmp_path: Path) -> None:
    status, out, err = cli(
        "investigate", "--model", real_05b, "--expected", "2 + 2 equals 4.", "--engine", "jit", "--out", tmp_path
    )
    assert status == 0, err
    assert "NO" not in out
    findings = json.loads((tmp_path / "00_golden_rule.json").read_text())
    assert findings["model"]["gguf"] == findings["model"]["apr"] == "24 layers, 170 quantised, 121 F32 tensors, 463 MB"


def test_typer_classes_are_where_they_are_expected() -> None:
    frame = sys.modules["aprlab.cli.app"]
    assert frame._ClickUsageError.__name__ == "UsageError"
    assert frame._ClickException.__name__ == "ClickException"
    assert issubclass(typer.BadParameter, frame._ClickUsageError)


# -- any program -------------------------------------------------------------------------------------------------------


def test_traces_of_programs_are_kept_compared_and_refused_where_unlike(cli, tiny: Path, tmp_path: Path) -> None:
    ours, same, other = (tmp_path / f"{name}.npz" for name in ("ours", "same", "other"))
    for path, ids in ((ours, "5,9,30"), (same, "5,9,30"), (other, "5,9,31")):
        status, out, _ = cli("trace", tiny, "--source", "reference", "--tokens", ids, "--points", "*.out,logits", "-o", path)
        assert (status, "contract f32" in out) == (0, True)
    assert cli("compare", ours, same)[0] == 0
    status, _, err = cli("compare", ours, other)
    assert (status, err.count("\n")) == (2, 1)
    assert cli("trace", tiny, "--tokens", "5,x", "-o", tmp_path / "x.npz")[0] == 2
    assert not (tmp_path / "x.npz").exists()


def test_peel_judges_sources_on_one_model(cli, tiny: Path, tmp_path: Path) -> None:
    status, out, _ = cli("peel", tiny, "--source", "reference+rope-theta", "-p", "Hi", "--json")
    found = json.loads(out)
    assert (status, [f["fault"] for f in found["findings"]]) == (3, ["rope-theta"])
    assert cli("peel", tiny, tiny, "--source", "reference")[0] == 2
    assert cli("peel", tiny, "--source", "oven")[0] == 2
