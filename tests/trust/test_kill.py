"""SIGKILL at a few moments of the verbs that write files; `kill.py --moments 50` for all of them, at many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_at_any_moment_an_output_is_absent_or_whole() -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), "--moments", "4", "--json"]
    only = "convert,compress,export,safetensors,fetch,replace"
    done = subprocess.run([*command, "--only", only], capture_output=True, text=True)
    rows = json.loads(done.stdout)
    assert done.returncode == 0, rows
    assert len(rows) == 6 and all(row["holds"] and row["rerun"] == 4 for row in rows)
    assert sum(row["absent"] for row in rows) > 4  # they were killed, not late
    if sys.platform == "linux":  # files have no name before they are whole
        assert all(row["litter"] == 0 for row in rows if row["verb"] in ("convert", "compress", "export"))


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_writer_that_is_not_whole_or_leaves_things_is_seen(tmp_path: Path) -> None:
    """Mutants: one writes its output piece by piece, one leaves a folder in TMPDIR that nobody removes."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import kill, json, random, tempfile, time; from dataclasses import asdict; from pathlib import Path\n"
        "def pieces(folder):\n"
        "    with open(folder / 'o', 'w') as file:\n"
        "        for _ in range(40): file.write('x'); file.flush(); time.sleep(0.01)\n"
        "def litters(folder):\n    tempfile.mkdtemp(); (folder / 'o').write_text('x')\n"
        f"place, rng = Path({str(tmp_path)!r}), random.Random(1)\n"
        "rows = [kill.tally(kill.Job(run.__name__, run, 'o'), 3, rng, place) for run in (pieces, litters)]\n"
        "print(json.dumps([asdict(row) | {'holds': row.holds} for row in rows]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    pieces, litters = json.loads(done.stdout)
    assert pieces["broken"] and not pieces["holds"]
    assert litters["left"] and not litters["holds"]
