"""A file that shrinks while it is mapped: one line with file and offset, no temporary file left, exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aprlab import in_use
from aprlab.cli import sigbus as guard
from aprlab.errors import UsageError
from aprlab.formats import writing
from aprlab.model import content

SHRINK = """
import os, sys, threading
from pathlib import Path
from aprlab import in_use
from aprlab.cli import sigbus as guard
from aprlab.formats import writing
from aprlab.model import content
path, how = Path(sys.argv[1]), sys.argv[2]
if how != "unguarded":
    assert guard.install() and guard.install()
def touch(raw):
    import xxhash
    xxhash.xxh3_64_digest(raw.data)  # without the interpreter's lock
raw = content.map_file(path)
with writing.atomic(path.with_name("out")) as file:
    file.write(b"half")
    os.truncate(path, 4096)
    if how == "thread":
        thread = threading.Thread(target=touch, args=(raw,))
        thread.start()
        thread.join()
    elif how == "named":
        in_use.PARTS.add(str(path.with_name(".out.part")))
        path.with_name(".out.part").write_bytes(b"half")
        in_use.PARTS.add(str(path.with_name(".gone.part")))
        folder = writing.atomic_folder(path.with_name("folder"))
        (folder.__enter__() / "half").write_bytes(b"half")
    print(raw.sum())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guard knows Linux's signals only")
@pytest.mark.parametrize("how", ["main", "thread", "named", "unguarded"])
def test_a_file_that_shrinks(how: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(range(256)) * 4096)
    done = subprocess.run([sys.executable, "-c", SHRINK, path, how], capture_output=True, text=True, timeout=120)
    if how == "unguarded":  # what it would be without: the test can fail
        assert done.returncode == -7 and done.stderr == ""
        return
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"aprlab: {path}: at offset 4096: cut short while it was read (4096 bytes now, 1048576 at open)\n"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_an_interrupt_between_two_steps_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def interrupted(*args: Any, **options: Any) -> None:
        link(*args, **options)
        assert any(str(tmp_path) in part for part in in_use.PARTS)  # the guard would find it
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupted)
    try:
        with writing.atomic(tmp_path / "out") as file:
            file.write(b"whole")
    except KeyboardInterrupt:
        assert list(tmp_path.iterdir()) == []
    assert not any(str(tmp_path) in part for part in in_use.PARTS)


@pytest.mark.parametrize("system", ["files without a name", "two names", "one name"])
def test_a_file_that_appears_meanwhile_is_not_replaced(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # as FAT says

    if system != "files without a name":
        monkeypatch.setattr(writing, "_nameless", lambda folder: None)
    if system == "one name":
        monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="out: exists already"), writing.atomic(out, force=False) as file:
        file.write(b"ours")
        out.write_bytes(b"precious")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out", b"precious")]
    with pytest.raises(UsageError, match="out: exists already"), writing.drafted(out, force=False) as draft:
        draft.write_bytes(b"ours")
    with writing.atomic(out) as file:
        file.write(b"ours")
    with writing.atomic(tmp_path / "new", force=False) as file:
        file.write(b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"out": b"ours", "new": b"new"}
    assert not any(str(tmp_path) in part for part in in_use.PARTS)


def test_a_name_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"), writing.atomic(tmp_path / ("a" * 250)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_in_a_folder_meanwhile_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "ours").touch()
    with pytest.raises(UsageError, match="holds 'thesis'"), writing.atomic_folder(out, force=True, ours="ours".__eq__) as made:
        assert str(made) in in_use.PARTS
        (made / "ours").write_text("new")
        (out / "thesis").write_text("precious")
    assert (out / "thesis").read_text() == "precious" and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not any(str(tmp_path) in part for part in in_use.PARTS)


def test_an_address_has_a_file_only_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(8192))
    raw = content.map_file(path)
    start = raw.ctypes.data
    assert f"{path}: at offset 5000: cut short" in guard.line(start + 5000)
    del raw
    assert str(path) not in guard.line(start + 5000) and "cannot be read" in guard.line(start + 5000)
