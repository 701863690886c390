"""A file that shrinks while it is mapped: one line with file and offset, no temporary file left, exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aprlab import guard
from aprlab.formats import common

SHRINK = """
import os, sys, threading
from pathlib import Path
from aprlab import guard
from aprlab.formats import common
path, how = Path(sys.argv[1]), sys.argv[2]
if how != "unguarded":
    assert guard.install() and guard.install()
def touch(raw):
    import xxhash
    xxhash.xxh3_64_digest(raw.data)  # without the interpreter's lock
raw = common.map_file(path)
with common.atomic(path.with_name("out")) as file:
    file.write(b"half")
    os.truncate(path, 4096)
    if how == "thread":
        thread = threading.Thread(target=touch, args=(raw,))
        thread.start()
        thread.join()
    elif how == "named":
        common.PARTS.add(str(path.with_name(".out.part")))
        path.with_name(".out.part").write_bytes(b"half")
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


def test_an_address_has_a_file_only_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(8192))
    raw = common.map_file(path)
    start = raw.ctypes.data
    assert f"{path}: at offset 5000: cut short" in guard.line(start + 5000)
    del raw
    assert str(path) not in guard.line(start + 5000) and "cannot be read" in guard.line(start + 5000)
