"""The cache of compiled kernels only saves time: damaged it is made anew, and where it cannot be it is done without."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

KERNEL = """
import sys
from aprlab.kernels.simd.kernel_cache import njit
@njit(cache=True)
def add(a, b):
    return a + b
assert add(2, 3) == 5
print(sum(add.stats.cache_hits.values()))
"""


def run(folder: Path, cache: Path, **more: str) -> str:
    """``1`` where the kernel came from the cache, ``0`` where it was compiled."""
    (folder / "k.py").write_text(KERNEL)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **more}
    done = subprocess.run([sys.executable, folder / "k.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program and the cache that it has filled, and found; whoever damages it sees it made again."""
    folder = tmp_path_factory.mktemp("filled")
    assert [run(folder, folder / "cache"), run(folder, folder / "cache")] == ["0", "1"]
    return folder


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped"])
def test_damaged_files_are_made_again(damage: str, filled: Path) -> None:
    cache = filled / "cache"
    (file,) = cache.rglob("*.nbc")
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes({"torn": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    assert [run(filled, cache), run(filled, cache)] == ["0", "1"]


def refused(folder: Path, write: str, cache: Path) -> str:
    """As `run`, with `write` done first: something that makes writing fail."""
    (folder / "k.py").write_text(f"import os, tempfile\n{write}\n{KERNEL}")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, folder / "k.py"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_no_folder_can_be_written(tmp_path: Path) -> None:
    """Neither the one that is asked for, nor the package's, nor one in the home folder, as in a container that is read-only."""
    read_only = "def no(*_, **__): raise OSError(30, 'Read-only file system')\n"
    read_only += "os.makedirs = tempfile.TemporaryFile = tempfile.mkstemp = no"
    assert refused(tmp_path, read_only, tmp_path / "cache") == "0"
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    """Every write of the cache fails as on a full disk; the kernel runs all the same."""
    full = "def full(*_, **__): return os.open('/dev/full', os.O_WRONLY), '/nowhere'\ntempfile.mkstemp = full"
    assert refused(tmp_path, full, tmp_path / "cache") == "0"
    assert not list((tmp_path / "cache").rglob("*.nbc"))


def test_files_of_an_older_source_go(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run(tmp_path, cache)
    (old,) = cache.rglob("*.nbc")
    kept = old.with_name("other" + old.name)
    kept.write_bytes(old.read_bytes())
    old.rename(old.with_name(old.name.replace(old.name.split(".")[3], "0" * 16)))
    run(tmp_path, cache)
    assert sorted(path.name for path in cache.rglob("*.nbc")) == sorted([old.name, kept.name])


TOGETHER = """
import sys, time
from aprlab.kernels.simd.kernel_cache import njit
@njit(cache=True)
def twice(a):
    return a + a
values = [3, 3.5, 3j, True]
while time.time() < float(sys.argv[1]):
    pass
print([twice(v) for v in values[int(sys.argv[2]):] + values[: int(sys.argv[2])]], sum(twice.stats.cache_hits.values()))
"""


def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """Each compiles the same four versions of a function, in its own order; none ever takes another's for its own."""
    (tmp_path / "k.py").write_text(TOGETHER)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def start(at: float, first: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "k.py"), str(at), str(first)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    values = [6, 7.0, 6j, 2]
    children = [start(time.time() + 1.5, first) for first in range(3)]
    for first, child in enumerate(children):
        said, failed = child.communicate()
        assert said.startswith(str(values[first:] + values[:first])), failed
    assert start(0, 0).communicate()[0] == f"{values} 4\n"
    assert len(list((tmp_path / "cache").rglob("*"))) == 1 + 4, "temporary files were left"
