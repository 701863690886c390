"""Places where nothing can be written, and two that write to one: one line each, nothing half-written, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from aprlab.cli.app import run_cli
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


PARAMETERS = 'model: str = ""  # file\nout: str = ""  # folder'


def talkative(path: Path) -> None:
    """The smallest notebook whose report does not fit on a full disk."""
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[tagged, new_code_cell("print('x' * 200_000)")], metadata={"kernelspec": kernel}), path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a tmpfs")
@pytest.mark.parametrize(("mounted", "why"), [("size=100k", "No space left on device"), ("ro", "Read-only file system")],
                         indirect=["mounted"])  # fmt: skip
def test_where_nothing_can_be_written(
    mounted: Path, why: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    convert(tiny, tmp_path / "m.apr")
    convert_with(tiny, tmp_path / "broken.apr", ["GH-190"])
    talkative(tmp_path / "m.ipynb")
    (tmp_path / "m.yaml").write_text("notebooks: [m.ipynb]\n")
    monkeypatch.chdir(tmp_path)
    runs = {
        "a.apr": ("convert", tiny, "-o"), "z.apr": ("convert", tiny, "--compress", "zstd", "-o"),
        "q.gguf": ("convert", tiny, "--quantize", "q8_0", "-o"), "f.apr": ("convert", tiny, "--fault", "GH-190", "-o"),
        "b.gguf": ("export", "m.apr", "-o"), "hf": ("export", "m.apr", "--format", "safetensors", "-o"),
        "r.apr": ("repair", "broken.apr", "--reference", tiny, "-o"), "walk": ("investigate", "--only", "m.ipynb", "--out"),
        "sweep": ("sweep", "m.yaml", "--out"),
    }  # fmt: skip
    for name, words in runs.items():
        capfd.readouterr()
        assert run_cli([str(word) for word in (*words, mounted / name)]) == 2
        (*_, said) = capfd.readouterr().err.splitlines()
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
