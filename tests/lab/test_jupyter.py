"""`aprlab lab`: copies that never overwrite what somebody changed, and the command line that it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aprlab import paths
from aprlab.cli.app import run_cli
from aprlab.errors import FormatError, UsageError
from aprlab.lab import jupyter as workplace

NAMES = {path.relative_to(paths.notebooks_dir()).as_posix() for path in paths.notebooks_dir().rglob("*.ipynb")}


def test_changed_copies_are_kept_and_old_ones_renewed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    first = workplace.copy_notebooks(folder)
    assert set(first.new) == {name for name in NAMES if ".ipynb_checkpoints" not in name}
    assert "interactive/onion_explorer.ipynb" in first.new
    again = workplace.copy_notebooks(folder)
    assert (again.new, again.renewed, again.kept) == ([], [], [])
    mine, gone, old = folder / "00_golden_rule.ipynb", folder / "01_naming.ipynb", folder / "02_dtype.ipynb"
    mine.write_text("mine")
    gone.unlink()
    old.write_text("of an older version")
    record = folder / ".aprlab-notebooks.json"
    known = json.loads(record.read_text())
    known["02_dtype.ipynb"] = workplace._hash(old)
    record.write_text(json.dumps(known))
    third = workplace.copy_notebooks(folder)
    assert (third.new, third.renewed, third.kept) == (["01_naming.ipynb"], ["02_dtype.ipynb"], ["00_golden_rule.ipynb"])
    assert mine.read_text() == "mine"
    assert old.read_bytes() == (paths.notebooks_dir() / "02_dtype.ipynb").read_bytes()


def test_a_copy_is_whole_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.copy_notebooks(tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    workplace.copy_notebooks(tmp_path)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "01_naming.ipynb").unlink()

    def fail(file: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workplace, "write_all", fail)
    with pytest.raises(UsageError, match="No space left"):
        workplace.copy_notebooks(tmp_path)
    assert not (tmp_path / "01_naming.ipynb").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_is_jupyterlabs_to_answer() -> None:
    """It goes to both; the child, which asks first, is neither killed nor left behind, and says how it ended."""
    before = signal.getsignal(signal.SIGINT)
    assert workplace._run(["sh", "-c", "trap '' INT; kill -INT $PPID; sleep 0.5; exit 7"]) == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_what_cannot_be_written_or_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        workplace.copy_notebooks(tmp_path / "file")
    (tmp_path / ".aprlab-notebooks.json").write_text("[")
    with pytest.raises(FormatError, match="is damaged"):
        workplace.copy_notebooks(tmp_path)


def test_the_command_that_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: ran.append(command) or 7)
    assert run_cli(["lab", "--no-browser", "--port", "9999", "--", "--allow-root"]) == 7
    root = paths.notebooks_dir().parent
    head = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    assert ran == [
        workplace._tied(
            [*head, "--LabApp.default_url=/lab/tree/notebooks/index.ipynb", "--port=9999", "--no-browser", "--allow-root"]
        )
    ]
    assert ran[0][3:5] == [str(os.getpid()), "jupyterlab"]
    assert run_cli(["lab", "--dir", str(tmp_path)]) == 7
    assert ran[1][5:] == [f"--ServerApp.root_dir={tmp_path}", "--LabApp.default_url=/lab/tree/index.ipynb"]
    (tmp_path / "01_naming.ipynb").write_text("mine")
    run_cli(["lab", "--dir", str(tmp_path)])
    assert "01_naming.ipynb: changed by you, kept as it is" in capsys.readouterr().err


def test_from_a_wheel_the_notebooks_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "site" / "aprlab" / "_notebooks"
    packaged.mkdir(parents=True)
    (packaged / "00_golden_rule.ipynb").write_text("{}")
    monkeypatch.setattr(paths, "notebooks_dir", lambda: packaged)
    monkeypatch.setattr(subprocess, "call", lambda command, env: 0)
    monkeypatch.chdir(tmp_path)
    status, copied = workplace.open_lab()
    assert (status, copied.new) == (0, ["00_golden_rule.ipynb"])
    assert (tmp_path / "aprlab-notebooks" / "00_golden_rule.ipynb").is_file()
