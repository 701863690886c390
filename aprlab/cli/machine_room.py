"""Panel "machine room": this installation. The command groups `ptx` and `gpu` have modules of their own."""

from __future__ import annotations

from aprlab.cli import output as out


def doctor(as_json: bool = False) -> int:
    """Check Python, packages, threads, GPU, memory and the embedded model."""
    from dataclasses import asdict

    from aprlab.lab.doctor import checks

    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            out.say_state(check.status, f"{check.name}: {check.detail}")
    if as_json:
        out.say_json([asdict(check) for check in found])
    return int(any(check.status == "fail" for check in found))
