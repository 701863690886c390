"""The cache of compiled kernels only saves time: damaged it is made anew, and where it cannot be it is done without."""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.parametrize(("suffix", "damage"), [(".nbi", "torn"), (".nbc", "empty"), (".nbc", "flipped")])
def test_damaged_files_are_made_again(suffix: str, damage: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert [run(tmp_path, cache), run(tmp_path, cache)] == ["0", "1"]
    (file,) = cache.rglob(f"*{suffix}")
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes({"torn": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    assert [run(tmp_path, cache), run(tmp_path, cache)] == ["0", "1"]


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path, tmp_path / "file" / "cache") == "0"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    """Every write of the cache fails as on a full disk; the kernel runs all the same."""
    full = "import numba.core.caching as c, contextlib\n"
    full += "c.IndexDataCacheFile._open_for_write = lambda self, path: contextlib.closing(open('/dev/full', 'wb', buffering=0))\n"
    (tmp_path / "k.py").write_text(full + KERNEL)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, tmp_path / "k.py"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
