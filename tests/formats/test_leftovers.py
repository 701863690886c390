"""After death: what a killed writer leaves is swept by the next one, what lives is left alone, and a folder is never gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aprlab.errors import UsageError
from aprlab.formats import leftovers, writing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and signals of Unix")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ours(name: str) -> bool:
    return name == "a.txt"


def write_folder(target: Path, text: str) -> None:
    with writing.atomic_folder(target, force=True, ours=ours) as made:
        (made / "a.txt").write_text(text)


def test_leftovers_go_and_the_living_stay(tmp_path: Path) -> None:
    (tmp_path / ".o.apr.abcdefgh.part").write_bytes(b"half")
    (tmp_path / ".o.apr.0123456789ab.part").write_bytes(b"a download of the hub, which goes on from there")
    (tmp_path / ".other.apr.abcdefgh.part").write_bytes(b"another output's")
    living = tmp_path / ".o.apr.alive_12.part"
    with open(living, "wb") as file:
        leftovers.claim(file.fileno())
        writing.write_text(tmp_path / "o.apr", "whole")
        assert names(tmp_path) == [".o.apr.0123456789ab.part", ".o.apr.alive_12.part", ".other.apr.abcdefgh.part", "o.apr"]
    writing.write_text(tmp_path / "o.apr", "whole")
    assert not living.exists()


def test_a_link_is_never_followed_when_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear/letter").write_text("keep me")
    (tmp_path / ".o.abcdefgh.part").symlink_to(tmp_path / "dear")
    writing.write_text(tmp_path / "o", "whole")
    assert (tmp_path / "dear/letter").read_text() == "keep me"


def test_a_killed_writers_files_go_with_the_next_run(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from aprlab.formats import writing\n"
        "writing._nameless = lambda folder: None\n"
        "with writing.atomic(Path(sys.argv[1])) as file:\n    file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "o"], check=False)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].endswith(".part")
    writing.write_text(tmp_path / "o", "whole")
    assert names(tmp_path) == ["o"]


def test_folders_are_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a folder is replaced again and again, a reader always finds it whole."""
    target = tmp_path / "o"
    write_folder(target, "0" * 9)
    if not leftovers.exchange(target, target.with_name("o")) and sys.platform != "linux":
        pytest.skip("names cannot be exchanged here")
    code = (
        "import sys; from pathlib import Path; path = Path(sys.argv[1]); seen = 0; print('go', flush=True)\n"
        "while not (path.parent / 'stop').exists():\n"
        "    text = (path / 'a.txt').read_text(); seen += 1; assert len(text) == 9, text\n"
        "print(seen)"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "go\n"
    for n in range(60):
        write_folder(target, str(n % 10) * 9)
    (tmp_path / "stop").touch()
    said, complaints = reader.communicate(timeout=60)
    assert reader.returncode == 0, complaints
    assert int(said) > 100 and names(tmp_path) == ["o", "stop"]


def test_without_an_exchange_the_next_run_puts_the_folder_back(tmp_path: Path) -> None:
    """Killed in the one instant without the folder: it is there again before the next run has begun."""
    target = tmp_path / "o"
    write_folder(target, "old")
    code = (
        "import os, sys; from pathlib import Path; from aprlab.formats import writing\n"
        "writing.exchange = lambda a, b: False\n"
        "real = os.rename\n"
        "def rename(a, b):\n    real(a, b)\n    if str(b).endswith('.old'): os.kill(os.getpid(), 9)\n"
        "os.rename = rename\n"
        "with writing.atomic_folder(Path(sys.argv[1]), force=True, ours=lambda name: True) as made:\n"
        "    (made / 'a.txt').write_text('new')\n"
    )
    subprocess.run([sys.executable, "-c", code, target], check=False)
    assert not target.exists() and any(name.endswith(".old") for name in names(tmp_path))
    with pytest.raises(RuntimeError), writing.atomic_folder(target, force=True, ours=ours):
        raise RuntimeError("the next run fails; the old folder is there all the same")
    assert (target / "a.txt").read_text() == "old" and names(tmp_path) == ["o"]


def test_two_steps_leave_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "exchange", lambda a, b: False)
    write_folder(tmp_path / "o", "old")
    write_folder(tmp_path / "o", "new")
    assert (tmp_path / "o/a.txt").read_text() == "new" and names(tmp_path) == ["o"]


def test_temporary_folders_of_the_dead_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = (
        "import os; from aprlab.formats import leftovers\n"
        "folder = leftovers.claimed_folder('aprlab-qualify-'); (folder / 'm.apr').write_bytes(bytes(9))\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    alive = leftovers.claimed_folder("aprlab-qualify-")
    assert len(names(tmp_path)) == 2
    leftovers.sweep_temporary("aprlab-qualify-")
    assert names(tmp_path) == [alive.name]
    leftovers.release_folder(alive)
    assert names(tmp_path) == []


def test_a_circle_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (lambda: writing.write_text(tmp_path / "a", ""), lambda: write_folder(tmp_path / "a", "")):
        with pytest.raises(UsageError) as caught:
            write()
        assert caught.value.code == "writing.output-name" and "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_children_die_with_their_parents() -> None:
    """A template that never ends, a parent that is killed: its renderer ends too, and at once."""
    code = (
        "import threading, time, os; from aprlab.inference import template\n"
        "loop = '{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}'\n"
        "template.SECONDS = 60\n"
        "threading.Thread(target=template.render, args=(loop, [])).start()\n"
        "time.sleep(1.5); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    children = Path(f"/proc/{pid}/task")
    found = [int(child) for task in children.iterdir() for child in (task / "children").read_text().split()]
    assert len(found) == 1
    os.kill(pid, signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        state = Path(f"/proc/{found[0]}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(found[0], signal.SIGKILL)
    raise AssertionError("the renderer outlived its parent")
