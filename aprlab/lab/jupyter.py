"""JupyterLab over the project's notebooks: in the checkout itself, or over copies that belong to the user."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aprlab import paths
from aprlab.display.plain_text import json_text
from aprlab.errors import FormatError, UsageError
from aprlab.formats.writing import atomic, write_all, write_text

FOLDER = "aprlab-notebooks"
FIRST = "index.ipynb"
_RECORD = ".aprlab-notebooks.json"  # what was copied, so that a later version can tell its own copies from changed ones


@dataclass
class Copied:
    """What became of each notebook, by its path in the folder."""

    new: list[str] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def copy_notebooks(folder: str | Path) -> Copied:
    """Copy all notebooks into `folder`. A copy that was changed, and a file that was never ours, stays as it is.

    Raises:
        UsageError: `folder` is a file or cannot be written.
        FormatError: the record of what was copied before is damaged.
    """
    folder, source = Path(folder), paths.notebooks_dir()
    record = folder / _RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = record.read_text(encoding="utf-8") if record.is_file() else ""
        known = json.loads(before) if record.is_file() else {}
        if not isinstance(known, dict):
            raise ValueError("not an object")
        done = Copied()
        for notebook in sorted(source.rglob("*.ipynb")):
            if ".ipynb_checkpoints" in notebook.parts:
                continue
            name = notebook.relative_to(source).as_posix()
            target, due = folder / name, _hash(notebook)
            found = _hash(target) if target.exists() else None
            if found not in (None, due, known.get(name)):
                done.kept.append(name)
                continue
            known[name] = due
            if found == due:
                continue
            (done.new if found is None else done.renewed).append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic(target) as file:
                write_all(file, notebook.read_bytes())
        text = json_text(known, indent=1) + "\n"
        if text != before:
            write_text(record, text)
    except OSError as error:
        raise UsageError(f"cannot be used: {error.strerror or error}", code="jupyter.cannot-use", path=folder) from None
    except ValueError as error:
        raise FormatError(
            f"is damaged: {error}; delete it, and every notebook that differs is kept", code="jupyter.damaged", path=record
        ) from None
    return done


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkout() -> Path | None:
    """The project's folder where this is a checkout, None where it is an installed wheel."""
    notebooks = paths.notebooks_dir()
    return notebooks.parent if notebooks.name == "notebooks" else None


def command(root: Path, notebook: str, port: int | None = None, *, browser: bool = True, more: Sequence[str] = ()) -> list[str]:
    """The command line that opens JupyterLab over `root` with one notebook in front."""
    options = [f"--ServerApp.root_dir={root.resolve()}", f"--LabApp.default_url=/lab/tree/{notebook}"]
    options += [] if port is None else [f"--port={port}"]
    options += [] if browser else ["--no-browser"]
    return [sys.executable, "-m", "jupyterlab", *options, *more]


def environment() -> dict[str, str]:
    """With the tab for model files, also where aprlab runs from a checkout and nothing was installed beside JupyterLab."""
    own = str(Path(__file__).resolve().parents[1] / "widgets" / "jupyter")
    return os.environ | {
        name: os.pathsep.join([own, *filter(None, [os.environ.get(name)])]) for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH")
    }


# Run instead of `-m MODULE`: the same, in a process that gets SIGTERM when its parent is gone and then ends its kernels.
_TIED = (
    "import runpy, signal, sys; from aprlab.paths import leave_with_parent; "
    "leave_with_parent(int(sys.argv[1]), signal.SIGTERM); "
    "del sys.argv[:2]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def _tied(line: list[str]) -> list[str]:
    """`line`, which runs a module of Python, as a process that ends with this one."""
    assert line[:2] == [sys.executable, "-m"], line
    return [sys.executable, "-c", _TIED, str(os.getpid()), *line[2:]]


def _run(line: list[str]) -> int:
    """Run JupyterLab. Ctrl-C is JupyterLab's to answer (it asks first): `subprocess.call` would kill it soon after."""
    if threading.current_thread() is not threading.main_thread():
        return subprocess.call(line, env=environment())
    before = signal.signal(signal.SIGINT, lambda number, frame: None)  # not SIG_IGN, which a child inherits
    try:
        return subprocess.call(line, env=environment())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def open_lab(
    folder: Path | None = None, port: int | None = None, *, browser: bool = True, more: Sequence[str] = ()
) -> tuple[int, Copied]:
    """Open JupyterLab in the checkout, or over copies in `folder` (``./aprlab-notebooks`` without one); its exit status.

    Raises:
        UsageError, FormatError: as `copy_notebooks`.
    """
    project = checkout()
    if folder is None and project is not None:
        return _run(_tied(command(project, f"notebooks/{FIRST}", port, browser=browser, more=more))), Copied()
    place = folder if folder is not None else Path(FOLDER)
    copied = copy_notebooks(place)
    for name in copied.kept:
        print(f"{place / name}: changed by you, kept as it is", file=sys.stderr)
    return _run(_tied(command(place, FIRST, port, browser=browser, more=more))), copied


__all__ = ["FIRST", "FOLDER", "Copied", "checkout", "command", "copy_notebooks", "environment", "open_lab"]
