"""The wheel is whole: installed elsewhere it finds its own model and notebooks, and investigates with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=TREE, capture_output=True, check=True)
    (built,) = folder.glob("aprlab-*.whl")
    return built


def test_the_wheel_holds_what_it_needs(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    assert "aprlab/_data/aprlab-tiny-q4_k_m.gguf" in held
    assert {f"aprlab/_notebooks/{path.name}" for path in (TREE / "notebooks").glob("*.ipynb")} <= held


def test_the_wheel_investigates_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """One notebook of the walk, by the command line, from a place that knows nothing of the checkout."""
    site, out = tmp_path / "site", tmp_path / "work" / "reports"
    out.parent.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}
    script = "import aprlab, aprlab.paths as p; print(aprlab.__file__); print(p.notebooks_dir()); print(p.embedded_model())"
    seen = subprocess.run(
        [sys.executable, "-c", script], cwd=out.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert all(line.startswith(str(site)) for line in seen.stdout.splitlines()), seen.stdout
    command = [sys.executable, "-m", "aprlab", "investigate", "--fault", "lost-v-biases", "--out", "reports"]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((out / "07_peel.json").read_text())
    assert findings["headline"] == "broken: lost-v-biases"
    assert all(findings["checks"].values())
    assert "<h1>the embedded model</h1>" in (out / "index.html").read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["reports"]
