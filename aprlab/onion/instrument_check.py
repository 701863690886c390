"""Before anything is measured: are the instruments sound?"""

from __future__ import annotations

from typing import Any

from aprlab import instruments
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism


def tested() -> tuple[dict[str, Any], list[Finding]]:
    """Each instrument shown a known-equal and a known-different pair; what fails is a finding of its own."""
    results = {r.name: True if r.ok else f"failed: {r.detail}" for r in instruments.selftest()}
    broken = [
        Finding("instrument", None, [], Mechanism("instrument.failed", {"instrument": name}), {"detail": state})
        for name, state in results.items()
        if state is not True
    ]
    return results, broken
