"""What is printed: tables that never break an id, text from files that no terminal obeys, JSON that every parser reads."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aprlab.cli import output
from aprlab.cli.app import main, run_cli
from aprlab.display.plain_text import json_text, plain_data, printable
from aprlab.errors import FormatError
from aprlab.faults import FAULTS, convert_with
from aprlab.formats import open_model

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLOUR = re.compile("\x1b\\[[0-9;]*m")
WIDTHS = (20, 60, 80)


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_a_terminal(monkeypatch: pytest.MonkeyPatch):
    """What a verb writes to a terminal of this width, without its colours: (status, lines)."""

    def run(columns: int, *args: object) -> tuple[int, list[str]]:
        screen = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm-256color")
            status = run_cli([str(arg) for arg in args])
        return status, COLOUR.sub("", screen.getvalue()).splitlines()

    return run


@pytest.fixture
def piped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What a verb writes into a pipe: (status, lines)."""

    def run(columns: int, *args: object) -> tuple[int, list[str]]:
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        status = run_cli([str(arg) for arg in args])
        return status, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with another epsilon."""
    path = tmp_path_factory.mktemp("output") / "other.apr"
    convert_with(tiny, path, ["wrong-eps"])
    return path


# -- tables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", WIDTHS)
def test_grep_finds_a_fault_at_any_width(columns: int) -> None:
    """The real command, at a real terminal and in a real pipe."""
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, "-m", "aprlab", "faults"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "cache-key-mismatch" in line]
    assert FAULTS["cache-key-mismatch"].title in line, "one line is the whole row"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdout=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += (part := os.read(ours, 65536))
        except OSError:  # Linux says EIO at the end of a terminal
            break
        if not part:
            break
    os.close(ours)
    assert process.wait() == 0
    assert "cache-key-mismatch" in COLOUR.sub("", seen.decode())


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_table_breaks_an_id(columns: int, at_a_terminal, piped, tiny: Path, other: Path) -> None:
    with open_model(tiny) as model:
        tensors = list(model.tensors)
    ids = {
        ("faults",): list(FAULTS),
        ("inspect", tiny): [*tensors, "embedding_length", "512 × 256"],
        ("fingerprint", tiny): tensors,
        ("diff", tiny, other): ["config.rms_norm_eps"],
        ("selftest",): ["statistics", "checksum"],
        ("gpu", "faults"): ["q4k-min-lost"],
        ("check", tiny): ["probabilities"],
    }
    for run in (at_a_terminal, piped):
        for args, expected in ids.items():
            status, lines = run(columns, *args)
            assert status in (0, 1)
            for id in expected:
                assert any(re.search(rf"(?<![\w.-]){re.escape(id)}(?![\w.-])", line) for line in lines), (args, id, columns)


def test_a_pipe_has_one_line_a_row_and_no_boxes(piped, tiny: Path) -> None:
    for columns in WIDTHS:
        _, lines = piped(columns, "faults")
        assert len(lines) == len(FAULTS) + 2
        assert not any(0x2500 <= ord(character) < 0x2600 for line in lines for character in line)
        assert lines == piped(1000, "faults")[1]
    _, lines = piped(20, "gpu", "faults")
    assert all(not line.endswith(" ") for line in lines)


def test_prose_is_folded_at_a_terminal_and_ids_are_not(at_a_terminal) -> None:
    _, wide = at_a_terminal(400, "faults")
    _, narrow = at_a_terminal(100, "faults")
    assert len(narrow) > len(wide)
    longest = max(len(id) for id in FAULTS)
    assert all(len(line) <= max(100, longest + 100) for line in narrow)


def test_columns_are_aligned_by_what_a_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    output.say_table("t", ("name", "n"), [("größer", 1), ("名前", 22), ("x", 333)], right=("n",))
    assert capsys.readouterr().out.splitlines() == ["t", "name      n", "größer    1", "名前     22", "x       333"]


def test_a_table_that_folds_its_ids_is_seen(at_a_terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the tests above: every column is prose."""
    say = output.say_table
    monkeypatch.setattr(output, "_PROSE", 4)
    monkeypatch.setattr(output, "say_table", lambda title, columns, rows, **_: say(title, columns, rows, prose=columns))
    _, lines = at_a_terminal(20, "faults")
    assert sum(any(id in line for line in lines) for id in FAULTS) < len(FAULTS)


# -- text from files ----------------------------------------------------------------------------------------------------


def test_nothing_that_a_terminal_obeys_gets_through() -> None:
    everything = "".join(map(chr, [*range(0x100), 0x200E, 0x2028, 0x202E, 0x2066, 0xDC80, 0xD83D]))
    assert not OBEYED.search(printable(everything))
    assert "\n" not in printable(everything)
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("\x1b[31m\r\x9b\u202e\udcff\n\t") == "\\x1b[31m\\r\\x9b\\u202e\\udcff\\n\\t"
    for harmless in ("größer", "日本語", "\U0001f600", "[bold]x[/]", "a\\x1b"):
        assert printable(harmless) == harmless


@pytest.fixture(scope="module")
def hostile(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tensor names and metadata want to be a terminal's commands and rich's markup."""
    path = tmp_path_factory.mktemp("[bold]") / "[red]x.gguf"
    data = tiny.read_bytes()
    for old, new in (
        (b"blk.7.ffn_up.weight", b"\x1b]0;OWNED\x07\x1b[2J\xc2\x9b\xe2\x80\xae"),
        (b"blk.6.ffn_up.weight", b"[/][bold red]blink!"),
    ):
        assert len(old) == len(new)
        assert data.count(old) == 1
        data = data.replace(old, new)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "X"], ["inspect", "X", "--json"], ["fingerprint", "X"], ["fingerprint", "X", "TINY"],
        ["diff", "TINY", "X"], ["diff", "TINY", "X", "--json"], ["peel", "X", "--fast"], ["peel", "TINY", "X", "--fast"],
        ["peel", "TINY", "X", "--fast", "--json"], ["gates", "TINY", "X", "-n", "1"], ["check", "X"],
        ["convert", "X", "-o", "OUT", "--verbose"], ["run", "X", "-p", "\x1b[31m"], ["inspect", "X\x1b[31m\udcff"],
        ["run", "X", "-p", "hi", "--system", "[/]"], ["faults", "\x1b[2J"], ["\x1b[2J"], ["inspect", "--\x1b[2J"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["terminal", "pipe"])
def test_hostile_text_is_shown_and_not_obeyed(
    args: list[str], place: str, hostile: Path, tiny: Path, tmp_path: Path, at_a_terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"X": str(hostile), "TINY": str(tiny), "OUT": str(tmp_path / "[i]\x1b.apr")}
    words = [names.get(arg, arg.replace("X", str(hostile), 1) if arg.startswith("X") else arg) for arg in args]
    if place == "terminal":
        _, lines = at_a_terminal(80, *words)
        text = "\n".join(lines)
    else:
        run_cli(words)
        text = ""
    shown, complaints = capsys.readouterr()
    for part in (text, shown, complaints):
        assert not OBEYED.search(part.replace("\n", "")), part[:500]
    assert text or shown or complaints
    assert "Traceback" not in complaints


def test_markup_is_text(hostile: Path, capsys: pytest.CaptureFixture[str], at_a_terminal) -> None:
    assert run_cli(["inspect", str(hostile)]) == 0
    for lines in (capsys.readouterr().out.splitlines(), at_a_terminal(60, "inspect", hostile)[1]):
        assert str(hostile) in lines, "the path, in one piece"
        assert any("[/][bold red]blink!" in line for line in lines)


def test_a_door_that_lets_everything_through_is_seen(hostile: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The mutant of the tests above."""
    monkeypatch.setattr(output, "printable", lambda text, lines=False: text)
    assert run_cli(["inspect", str(hostile)]) == 0
    assert OBEYED.search(capsys.readouterr().out.replace("\n", ""))


def test_the_stack_of_an_error_is_text_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(file: object, as_json: bool = False) -> None:
        raise error

    error: Exception = FormatError("\x1b[2J", code="test.hostile")
    monkeypatch.setattr("aprlab.formats.open_model", fail)
    assert run_cli(["inspect", "x", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "\\x1b[2J" in shown
    assert not OBEYED.search(shown.replace("\n", ""))
    error = ZeroDivisionError("\x1b[2J")  # a bug
    with pytest.raises(SystemExit) as end:
        main(["inspect", "x"])
    assert end.value.code == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: \\x1b[2J" in shown


# -- JSON ---------------------------------------------------------------------------------------------------------------


def test_json_has_no_bare_nan_and_takes_what_the_library_gives() -> None:
    value = {
        "nan": math.nan, "list": (math.inf, -math.inf, 1.5), "path": Path("a"), 1: np.float32("nan"), "array": np.arange(3),
        "bytes": b"\x01\xff", "none": None, "flag": np.bool_(True), "int": np.int64(5), "text": "\x9b\u202e\udc80\x1b\né",
    }  # fmt: skip
    text = json_text(value)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(text, parse_constant=refuse)
    assert found == {
        "nan": "nan", "list": ["inf", "-inf", 1.5], "path": "a", "1": "nan", "array": [0, 1, 2], "bytes": "01ff",
        "none": None, "flag": True, "int": 5, "text": "\x9b\u202e\udc80\x1b\né",
    }  # fmt: skip
    assert not OBEYED.search(text)
    assert json.loads(json_text(value, ascii_only=True)) == found
    assert json_text(value, ascii_only=True).isascii()
    with pytest.raises(TypeError, match="object has no form"):
        plain_data(object())


def test_every_json_goes_through_that_door(monkeypatch, capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    monkeypatch.setattr("aprlab.model.description.describe", lambda model, keys=None: {"x": math.nan, "y": [np.float32("inf")]})
    assert run_cli(["inspect", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: 1 / 0)
    assert found.pop("identity")["kind"] == "model"
    assert [row["code"] for row in found.pop("unusual")] == ["unusual.padded"]
    assert found == {"x": "nan", "y": ["inf"]}


def test_json_is_json_on_an_ascii_stream(tiny: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "aprlab", "faults", "--json"], env=environment, capture_output=True, check=True
    )
    assert [fault["id"] for fault in json.loads(done.stdout.decode("ascii"))] == list(FAULTS)


# -- errors for programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (["inspect", "gone.gguf", "--json"], 2, "reading.unreadable"),
        (["--debug", "inspect", "gone.gguf", "--json"], 2, "reading.unreadable"),
        (["run", "cut.gguf", "-p", "Hi", "--json"], 2, "gguf.implausible-count"),
        (["faults", "no-such", "--json"], 2, "faults.unknown"),
        (["run", "X", "-p", "Hi", "-n", "many", "--json"], 2, "cli.usage"),
        (["inspect", "X", "--no-such", "--json"], 2, "cli.usage"),
        (["convert", "X", "-o", "no/such/folder/x.apr", "--json"], 2, "writing.no-such-folder"),
    ],
)
def test_an_error_is_json_where_json_was_asked_for(
    args: list[str], status: int, code: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:5000])
    words = [str(tiny) if word == "X" else word for word in args]
    assert run_cli(words) == status
    told, complained = capsys.readouterr()
    found = json.loads(told)
    assert list(found) == ["code", "message", "path", "tensor", "offset"] and found["message"]
    assert found["code"] == code
    assert complained.startswith("Traceback" if "--debug" in args else "aprlab: ")
    assert run_cli([word for word in words if word != "--json"]) == status
    assert capsys.readouterr().out == "", "nothing where it was not asked for, and the last command line is forgotten"
    with monkeypatch.context() as patch:
        patch.setattr(output, "say_json", lambda value: None)
        assert run_cli(words) == status
        assert capsys.readouterr().out == "", "it is printed there and nowhere else"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (MemoryError(), 1, "cli.out-of-memory"),
        (OSError(28, "No space left on device", "o.apr"), 1, "cli.system"),
        (KeyboardInterrupt(), 130, "cli.interrupted"),
    ],
)
def test_other_ends_are_json_too(
    error: BaseException, status: int, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("aprlab.formats.identity.identify", fail)
    monkeypatch.setattr("aprlab.formats.open_model", fail)
    assert run_cli(["inspect", "x.gguf", "--json"]) == status
    told, complained = capsys.readouterr()
    assert json.loads(told)["code"] == code
    assert len(complained.splitlines()) == 1
