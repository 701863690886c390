"""What a verb imports before it works: nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SLOW = (
    "gguf", "yaml", "numpy.typing", "ssl", "http.client", "urllib.request", "numba", "jinja2", "tokenizers", "matplotlib",
    "psutil", "papermill", "pydantic", "aprlab.engines", "aprlab.faults", "aprlab.onion",
)  # fmt: skip
_SHOW = """
import sys
from aprlab.cli.app import run_cli
status = run_cli(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
sys.exit(status)
"""


def imported(*args: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", _SHOW, *args], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_a_look_at_a_file_imports_neither_engines_nor_the_libraries_of_others(tiny: Path) -> None:
    found = imported("inspect", str(tiny))
    assert {"numpy", "aprlab.formats.gguf"} <= found, "the list says what was imported"
    assert not found & set(SLOW)


def test_the_version_imports_no_numpy() -> None:
    assert not imported("--version") & {"numpy", *SLOW}


def test_words_paths_and_defaults_are_converted_without_pydantic(tiny: Path, tmp_path: Path) -> None:
    found = imported("--debug", "convert", str(tiny), "-o", str(tmp_path / "out.apr"), "--dialect", "realizar")
    assert "aprlab.conversion.converter" in found
    assert "pydantic" not in found


def test_what_runs_notebooks_draws_nothing_itself() -> None:
    code = "import sys; from aprlab.lab import notebooks; notebooks.check_parameters('00_golden_rule', {}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "papermill" in done.stdout.split()
    assert not set(done.stdout.split()) & {"matplotlib", "aprlab.figures", "aprlab.faults"}
