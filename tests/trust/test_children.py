"""A parent that is killed: what it has started ends too, and what it has left is removed by the next run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")

HELPER = """
import os, sys, time

def rest(*_):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    rest()
"""
JOBS = "import helper; from aprlab.workers import results; list(results(helper.rest, [1, 2], jobs=2))"
LAB = "import sys; from aprlab.lab import jupyter; jupyter._run(jupyter._tied([sys.executable, '-m', 'helper']))"


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def outlives(code: str, folder: Path, seconds: float) -> bool:
    """Whether a child of this program lives so long after the program was killed."""
    (folder / "helper.py").write_text(HELPER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    ends = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    if found := alive(pid):
        os.kill(pid, signal.SIGKILL)
    return found


@pytest.mark.parametrize("code", [JOBS, LAB], ids=["jobs", "lab"])
def test_children_of_jobs_and_lab_die_with_their_parents(code: str, tmp_path: Path) -> None:
    assert not outlives(code, tmp_path, 20)


def test_a_child_that_outlives_its_parent_is_seen(tmp_path: Path) -> None:
    """The mutant of the test above: JupyterLab's command as it is, tied to nothing."""
    assert outlives(LAB.replace("jupyter._tied", ""), tmp_path, 0.5)


def test_a_killed_sweeps_folder_goes_with_the_next_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aprlab.errors import FormatError
    from aprlab.formats.leftovers import claimed_folder, release_folder
    from aprlab.lab import sweeps

    code = "import os; from aprlab.lab.sweeps import TEMPORARY, temporary_folder\n"
    code += "with temporary_folder(TEMPORARY):\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(sweeps.TEMPORARY)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = claimed_folder(sweeps.TEMPORARY)
    assert len(list(tmp_path.iterdir())) == 2
    matrix = tmp_path / "m.yaml"
    matrix.write_text("notebooks: [00_golden_rule]\nmatrix: {engine: [no-such-engine]}\n")
    with pytest.raises(FormatError):
        sweeps.sweep(matrix, tmp_path / "out")
    assert living.is_dir()
    assert {path.name for path in tmp_path.iterdir()} <= {living.name, "m.yaml", "out"}
    release_folder(living)
