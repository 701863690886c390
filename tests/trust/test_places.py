"""Places where nothing can be written, and two that write to one: one line each, nothing half-written, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aprlab.conversion.converter import convert
from aprlab.faults import convert_with

APRLAB = [sys.executable, "-m", "aprlab"]


@pytest.fixture
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with the options of the parameter; only root can make one."""
    place = tmp_path / "place"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def refused(*words: object, cwd: Path) -> str:
    done = subprocess.run([*APRLAB, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 2, (words, done)
    return done.stderr.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a tmpfs")
@pytest.mark.parametrize(("mounted", "why"), [("size=100k", "No space left on device"), ("ro", "Read-only file system")],
                         indirect=["mounted"])  # fmt: skip
def test_where_nothing_can_be_written(mounted: Path, why: str, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "m.apr")
    convert_with(tiny, tmp_path / "broken.apr", ["GH-190"])
    (tmp_path / "m.yaml").write_text("notebooks: [07_peel]\nmatrix: {fault: [GH-191]}\n")
    runs = {
        "a.apr": ("convert", tiny, "-o"), "z.apr": ("convert", tiny, "--compress", "zstd", "-o"),
        "q.gguf": ("convert", tiny, "--quantize", "q8_0", "-o"), "f.apr": ("convert", tiny, "--fault", "GH-190", "-o"),
        "b.gguf": ("export", "m.apr", "-o"), "hf": ("export", "m.apr", "--format", "safetensors", "-o"),
        "r.apr": ("repair", "broken.apr", "--reference", tiny, "-o"), "walk": ("investigate", "--out"),
        "sweep": ("sweep", "m.yaml", "--out"),
    }  # fmt: skip
    for name, words in runs.items():
        said = refused(*words, mounted / name, cwd=tmp_path)
        assert said.startswith(f"aprlab: {mounted / name}") and said.endswith(why) and ".part" not in said, said
        assert [path for path in mounted.rglob("*") if path.is_file()] == []


def test_two_processes_on_one_output(tiny: Path, tmp_path: Path) -> None:
    """Without --force exactly one of them has written it, with --force both have; it is whole either way."""
    convert(tiny, tmp_path / "due.apr")
    for force in ([], ["--force"]):
        command = [*APRLAB, "convert", str(tiny), "-o", str(tmp_path / "o.apr"), *force]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
        said = [process.communicate(timeout=120)[1] for process in both]
        assert sorted(process.returncode for process in both) == ([0, 0] if force else [0, 2]), said
        assert force or any("exists already" in text for text in said)
        assert (tmp_path / "o.apr").read_bytes() == (tmp_path / "due.apr").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["due.apr", "o.apr"]
