"""This machine: where the project's own files are (in the checkout, or inside the installed package), and its processors."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from aprlab.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    for candidate in (_PACKAGE.parent / name, _PACKAGE / f"_{name}"):
        if candidate.is_dir() and (candidate.parent == _PACKAGE or (candidate.parent / "pyproject.toml").is_file()):
            return candidate
    raise UsageError(
        f"the project's folder {name!r} is neither next to the package nor inside it; is the installation whole?",
        code="paths.no-project-folder",
    )  # fmt: skip


def data_dir() -> Path:
    """`data/` of the checkout, or its copy in the wheel."""
    return _folder("data")


def notebooks_dir() -> Path:
    """`notebooks/` of the checkout, or its copy in the wheel."""
    return _folder("notebooks")


def embedded_model() -> Path:
    """The tiny trained Qwen2 GGUF that every example and test can use without a download."""
    return data_dir() / "aprlab-tiny-q4_k_m.gguf"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Ask the system to end this process with its parent (Linux; elsewhere nothing happens).

    parent: its process id, where the caller knows it: a parent that is gone already ends this process here.
    number: the signal; SIGTERM for a process that has children of its own to end.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def models_dir() -> Path:
    """Where real models are kept: $APRLAB_MODELS, or `~/.cache/aprlab/models`."""
    return Path(os.environ.get("APRLAB_MODELS") or Path.home() / ".cache/aprlab/models")
