"""Cases that are handed over: what is in them, what is not, and what a hostile one can do (nothing)."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import socket
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest

from aprlab.cli.app import run_cli
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.faults import convert_with
from aprlab.forensics.ranking import forensics
from aprlab.lab import case_figures, case_reading
from aprlab.lab.case_folders import NAMES, MadeCase, fingerprint, make_case, subject
from aprlab.lab.case_notebooks import KINDS, case_notebook, concluded
from aprlab.lab.case_reading import files_at_hand, read_case
from aprlab.lab.private_words import PrivateWords

SECRET = "alice-o-hara"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path must not be told."""
    folder = tmp_path_factory.mktemp("home") / SECRET / "secret project"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def made(private: Path, tiny: Path) -> MadeCase:
    """One case, of two files, made as such a user would."""
    shutil.copy(tiny, private / "model.gguf")
    convert_with(tiny, private / "broken.apr", ["lost-v-biases"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USER", "LOGNAME"):
            patch.setenv(name, SECRET)
        return make_case(subject([private / "model.gguf", private / "broken.apr"]), private / "case-17")


def outside_of_pictures(data: bytes) -> str:
    """The text of a part, without what is written in base64."""
    return re.sub(r"[A-Za-z0-9+/=\n]{200,}", "", data.decode("utf-8", "replace"))


def test_a_case_has_everything_and_is_small_enough_for_an_issue(made: MadeCase) -> None:
    assert sorted(path.name for path in made.folder.iterdir()) == sorted(NAMES)
    assert made.archive.stat().st_size < 400_000
    facts = json.loads((made.folder / "case.json").read_text())
    assert facts == made.facts
    assert (facts["schema"], facts["kind"], facts["conclusion"]) == (1, "two", "broken: lost-v-biases")
    assert facts["findings"]["verdict"] == "broken"
    assert facts["findings"]["answers"]["repaired"] == facts["findings"]["answers"]["reference"]
    assert facts["commands"] == [
        "aprlab case new model.gguf broken.apr", "aprlab peel model.gguf broken.apr",
        "aprlab repair broken.apr -o fixed.apr --reference model.gguf",
    ]  # fmt: skip
    assert {"aprlab", "python", "numpy"} <= facts["versions"].keys()
    assert {"system", "machine", "cores", "gpu"} <= facts["environment"].keys()
    sides = {row["role"]: row["sha256"] for row in facts["files"]}
    assert sides == {
        "reference": hashlib.sha256((made.folder.parent / "model.gguf").read_bytes()).hexdigest(),
        "candidate": hashlib.sha256((made.folder.parent / "broken.apr").read_bytes()).hexdigest(),
    }


def test_the_notebook_is_executed_and_the_telling_figure_comes_first(made: MadeCase) -> None:
    notebook = nbformat.read(made.folder / "case.ipynb", 4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# model.gguf against broken.apr\n\n**broken: lost-v-biases**")
    drawn, card = [cell for cell in notebook.cells if cell.get("outputs")][:2]
    assert "image/png" in {kind for output in drawn.outputs for kind in output.get("data", {})}
    assert "lost-v-biases" in card.outputs[0].data["text/html"]
    page = (made.folder / "case.html").read_text()
    assert page.index("<img") < page.index("SHA-256") < page.index("The notebook")
    for fetched in ("<script", "<link", "@import", 'src="http'):
        assert fetched not in page


def test_nothing_private_is_in_any_part(made: MadeCase) -> None:
    names = [entry.filename for entry in zipfile.ZipFile(made.archive).infolist()]
    assert names == [f"case-17/{name}" for name in NAMES]
    for name in NAMES:
        data = (made.folder / name).read_bytes()
        assert SECRET.encode() not in data
        assert b"secret project" not in data
        text = outside_of_pictures(data)
        assert not re.search(r"(?<![\w.:/<])/(home|root|tmp|usr|work|Users|var|opt)/", text), name
        host = socket.gethostname()
        assert len(host) < 4 or host == "localhost" or not re.search(rf"\b{re.escape(host)}\b", text)


def test_words_that_tell_of_a_machine_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"USER": "mallory", "HOSTNAME": "hal9000", "LOGNAME": "root"}.items():
        monkeypatch.setenv(name, value)
    words = PrivateWords([tmp_path / "models"], ["http://bench.example.org:8080/v1", "llama.cpp"])
    for text, told in {
        "http://gpu-box:8080/v1 and https://ci@build.corp.lan/x": "http://HOST/v1 and https://HOST/x",
        "bench.example.org said no; benches": "HOST said no; benches",
        "mallory@hal9000:~/m.gguf, hal9000, by mallory; the root": "USER@HOST:~/m.gguf, HOST, by USER; the root",
        r"\\server\share\m.gguf": "m.gguf",
        "VILLE@VILLE: a@b and 'https://huggingface.co/Qwen'": "VILLE@VILLE: a@b and 'https://huggingface.co/Qwen'",
        f"{tmp_path}/models/a.gguf: bad": "a.gguf: bad",
        "'/home/bob/x/m.gguf'": "'m.gguf'",
        "File /Users/bob/git/aprlab/run.py, line 3": "File run.py, line 3",
        r"C:\Users\bob\m.gguf and D:\\x\\y.apr": "m.gguf and y.apr",
        "http://127.0.0.1:8080/v1 and https://bob@localhost/x": "http://HOST/v1 and https://HOST/x",
        "https://example.org/data/x": "https://example.org/data/x",
        "<var>a</var> 3/opt/2 blk.0/tmp": "<var>a</var> 3/opt/2 blk.0/tmp",
    }.items():
        assert words.without(text) == told
    outputs = [
        {"text": f"{Path.home()}/a"}, {"traceback": [f"{Path.cwd()}/b"]},
        {"data": {"text/plain": "/tmp/x/c", "image/png": "iVB/tmp/x"}},
    ]  # fmt: skip
    words.of_outputs(outputs)
    assert outputs == [{"text": "a"}, {"traceback": ["b"]}, {"data": {"text/plain": "c", "image/png": "iVB/tmp/x"}}]
    assert words.within({"/tmp/k": ["/tmp/x/v", 3, None]}) == {"k": ["v", 3, None]}


def test_a_case_is_opened_and_the_files_at_hand_are_compared(
    made: MadeCase, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "from-somebody.zip"
    shutil.copy(made.archive, moved)
    assert [each.state for each in files_at_hand(read_case(moved))] == ["not here", "not here"]
    assert run_cli(["case", "open", str(moved), str(private / "model.gguf")]) == 0
    printed = capsys.readouterr().out
    assert "broken: lost-v-biases" in printed
    assert re.search(r"reference +model.gguf +the same file\n", printed)
    assert re.search(r"candidate +broken.apr +not here\n", printed)
    shutil.copy(private / "model.gguf", tmp_path / "broken.apr")
    assert run_cli(["case", "open", str(moved), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["state"] for each in found["at_hand"]] == ["not here", "other"]
    renamed = [tmp_path / "a.bin", tmp_path / "b.bin"]  # as many as the case has: in its order
    for name, path in zip(("model.gguf", "broken.apr"), renamed, strict=True):
        shutil.copy(private / name, path)
    assert [each.state for each in files_at_hand(read_case(made.folder), renamed)] == ["same", "same"]
    for given, code in (([tmp_path / "no"], "cli.no-such-file"), (renamed[:1], "case.other-name")):
        with pytest.raises(UsageError) as caught:
            files_at_hand(read_case(moved), given)
        assert caught.value.code == code


def test_a_part_that_was_changed_is_noticed(made: MadeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "case"
    shutil.copytree(made.folder, folder)
    assert read_case(folder).whole
    (folder / "case.html").write_text("<h1>all is well</h1>")
    (folder / "figure.png").unlink()
    assert read_case(folder).parts == {"case.ipynb": "same", "case.html": "other", "figure.png": "not here"}
    assert run_cli(["case", "open", str(folder)]) == 1
    assert "case.html: changed since the case was made" in capsys.readouterr().err


def test_a_case_is_not_replaced_without_force(made: MadeCase, private: Path) -> None:
    about = subject([private / "model.gguf"])
    with pytest.raises(UsageError, match="exists already"):
        make_case(about, private / "case-17")
    (private / "papers").mkdir()
    (private / "papers" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        make_case(about, private / "papers", force=True)
    assert not list(private.glob(".*part"))


def test_two_files_of_one_name_and_split_models_lie_next_to_the_notebook(tmp_path: Path) -> None:
    from aprlab.lab.case_folders import _laid_out

    for folder in ("a", "b", "work", "work2"):
        (tmp_path / folder).mkdir()
    for place in ("a/m.gguf", "b/m.gguf", "a/big-00001-of-00002.gguf", "a/big-00002-of-00002.gguf", "a/big-00001-of-00003.gguf"):
        (tmp_path / place).write_text(place)
    names = _laid_out(subject([tmp_path / "a/m.gguf", tmp_path / "b/m.gguf"]), tmp_path / "work")
    assert names == {"reference": "m.gguf", "candidate": "candidate/m.gguf"}
    assert (tmp_path / "work/candidate/m.gguf").read_text() == "b/m.gguf"
    _laid_out(subject([tmp_path / "a/big-00001-of-00002.gguf"]), tmp_path / "work2")
    assert sorted(p.name for p in (tmp_path / "work2").iterdir()) == ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    size, digest = fingerprint(tmp_path / "a/big-00001-of-00002.gguf")
    assert size == 2 * len("a/big-00001-of-00002.gguf")
    (tmp_path / "a/big-00002-of-00002.gguf").write_text("x" * 25)
    assert fingerprint(tmp_path / "a/big-00001-of-00002.gguf")[1] != digest


@pytest.mark.parametrize(
    ("files", "options", "code"),
    [
        ([], {}, "case.files"),
        (["a", "a", "a"], {}, "case.files"),
        (["a", "a"], {"saw": "x"}, "case.files"),
        (["a"], {"saw": "x", "sources": ["jit"]}, "case.sentence-and-programs"),
        (["none"], {}, "cli.no-such-file"),
        (["a"], {"sources": ["none.yaml"]}, "cli.no-such-file"),
    ],
)
def test_what_makes_no_case(files: list[str], options: dict[str, Any], code: str, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UsageError) as caught:
        subject([tmp_path / name for name in files], **options)
    assert caught.value.code == code


def test_a_heading_shows_names_and_findings_as_they_are() -> None:
    with pytest.raises(UsageError, match="two, one, source, garbage"):
        case_notebook("three", {})
    notebook = case_notebook("one", {"candidate": 'we"ird\n`x`.apr', "prompt": "[a](b)"})
    for cell in notebook.cells[1:]:
        compile(cell.source, "cell", "exec")
    concluded(notebook, "<img src=x> *a*", "[b](javascript:1) `c`", ["we`ird`` x.apr"], "aprlab case new x")
    text = notebook.cells[0].source
    assert r"\<img src=x\> \*a\*" in text
    assert r"\[b\]\(javascript:1\) \`c\`" in text
    assert "``` we`ird`` x.apr ```" in text
    assert KINDS.keys() == {"two", "one", "source", "garbage"}


def test_the_telling_figures_of_sentences_and_programs(tiny: Path) -> None:
    ax = case_figures.of_ranking(forensics(tiny, "4", faults=["rope-norm"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rope-norm"]
    ax = case_figures.of_sources(tiny, ["reference+rope-norm"], "2+2")
    assert max(ax.get_lines()[0].get_ydata()) < 40
    plt.close("all")


# -- hostile cases ------------------------------------------------------------------------------------------------------


def packed(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return file.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


def changed(facts: dict[str, Any], **keys: Any) -> bytes:
    return json.dumps({**facts, **keys}).encode()


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "no zip": (lambda facts: b"PK\x03\x04 not really", "case.bad-zip"),
    "empty": (lambda facts: b"", "case.bad-zip"),
    "nothing in it": (lambda facts: packed(), "case.no-json"),
    "out of the folder": (lambda facts: packed(("../../case.json", b"{}")), "case.bad-entry"),
    "absolute": (lambda facts: packed(("/etc/case.json", b"{}")), "case.bad-entry"),
    "backslash": (lambda facts: packed(("..\\case.json", b"{}")), "case.bad-entry"),
    "deep": (lambda facts: packed(("a/b/case.json", b"{}")), "case.bad-entry"),
    "a link": (lambda facts: packed((link("case.json"), b"/etc/passwd")), "case.bad-entry"),
    "twice": (lambda facts: packed(("a/case.json", b"{}"), ("b/case.json", b"{}")), "case.part-twice"),
    "many entries": (lambda facts: packed(*((f"a/{n}", b"") for n in range(65))), "case.too-many-entries"),
    "a bomb": (lambda facts: packed(("case.json", bytes(2_000_000))), "case.too-large"),
    "another bomb": (lambda facts: packed(("case.json", changed(facts)), ("case.html", bytes(2_000_000))), "case.too-large"),
    "no JSON": (lambda facts: packed(("case.json", b"{")), "reading.bad-json"),
    "no UTF-8": (lambda facts: packed(("case.json", b"\xff\xfe")), "case.not-utf8"),
    "a list": (lambda facts: packed(("case.json", b"[]")), "reading.json-not-an-object"),
    "nested": (lambda facts: packed(("case.json", b'{"a":' + b"[" * 100_000)), "reading.bad-json"),
    "no keys": (lambda facts: packed(("case.json", b'{"schema": 1}')), "case.bad-key"),
    "a later schema": (lambda facts: packed(("case.json", b'{"schema": 2}')), "case.schema"),
    "a schema that is none": (lambda facts: packed(("case.json", b'{"schema": true}')), "case.bad-key"),
    "files of another form": (lambda facts: packed(("case.json", changed(facts, files=[{"name": 3}]))), "case.bad-row"),
    "rows that are none": (lambda facts: packed(("case.json", changed(facts, contents=["x"]))), "case.bad-row"),
    "commands that are none": (lambda facts: packed(("case.json", changed(facts, commands=[3]))), "case.bad-key"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_case_is_one_line(
    name: str, made: MadeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(case_reading, "MOST", 1_000_000)
    build, code = HOSTILE[name]
    path = tmp_path / "case.zip"
    path.write_bytes(build(made.facts))
    with pytest.raises(FormatError) as caught:
        read_case(path)
    assert caught.value.code == code
    assert run_cli(["case", "open", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["case.zip"]


def test_a_damaged_zip_is_one_line_wherever_it_is_damaged(made: MadeCase, tmp_path: Path) -> None:
    data = made.archive.read_bytes()
    path = tmp_path / "case.zip"
    for cut in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:cut])
        with pytest.raises(AprlabError):
            read_case(path)
        path.write_bytes(data[:cut] + bytes([data[cut] ^ 0x5A]) + data[cut + 1 :])
        with suppress(AprlabError):  # damage in a member that is not read is not seen
            assert read_case(path).facts == made.facts


def test_a_case_says_nothing_to_a_terminal(made: MadeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31m\x07\u202e../../etc/passwd"
    files = [{"role": evil, "name": evil, "bytes": 1, "sha256": evil}]
    found = {"findings": [{"layer": evil}, 3]}
    facts = changed(made.facts, title=evil, files=files, commands=[evil], findings=found, contents=[])
    (tmp_path / "case.zip").write_bytes(packed(("case.json", facts)))
    run_cli(["case", "open", str(tmp_path / "case.zip")])
    printed = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & set(printed.out + printed.err)
