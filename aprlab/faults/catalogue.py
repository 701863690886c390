"""Where a fault enters, in words."""

from __future__ import annotations

from aprlab.faults.base import Fault

_FORM = {
    "seams": "file", "post": "file", "registry": "decoder", "engine": "engine", "config": "config", "tokenizer": "tokenizer",
    "prompt": "tokenizer", "session": "loop",
}  # fmt: skip


def forms(fault: Fault) -> str:
    """Where a fault enters, in one or two words: ``file, engine``."""
    if fault.replaces:
        return f"instrument: {fault.replaces}"
    return ", ".join(_FORM[seam] for seam in (fault.file_seam, fault.run_seam) if seam is not None)
