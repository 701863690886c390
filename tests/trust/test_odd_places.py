"""Names that are no UTF-8, a C locale, streams that are closed: the right answer or one line, and the right exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names are bytes on Linux")
APRLAB = [sys.executable, "-m", "aprlab"]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("locale", [{}, C_LOCALE], ids=["utf-8", "C"])
def test_names_that_are_no_utf8(locale: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    source, made, pages = (os.fsencode(tmp_path) + b"/" + name for name in (b"a\xff.gguf", b"o\xfe.apr", b"p\xfd"))
    os.symlink(tiny, source)
    environment = {**os.environ, **locale}
    for words in (["inspect", source], ["convert", source, "-o", made], ["peel", source, made, "--out", pages]):
        done = subprocess.run([*APRLAB, *words], capture_output=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-600:]
    assert any(name.endswith(b".html") for name in os.listdir(pages))
    again = subprocess.run([*APRLAB, "convert", source, "-o", made], capture_output=True, env=environment, timeout=300)
    assert again.returncode == 2 and again.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams(closed: tuple[int, ...], tiny: Path, tmp_path: Path) -> None:
    """What is printed goes nowhere, and above all not into the file that is written."""
    due = tmp_path / "due.apr"
    subprocess.run([*APRLAB, "convert", tiny, "-o", due], check=True, capture_output=True)
    made = tmp_path / "o.apr"
    closing = " ".join(f"{n}>&-" for n in closed)
    line = f'"$0" -m aprlab convert "$1" -o "$2" {closing}'
    done = subprocess.run(["sh", "-c", line, sys.executable, tiny, made], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-600:]
    assert made.read_bytes() == due.read_bytes()
