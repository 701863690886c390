"""SECURITY.md: every claim names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\[`(test_\w+)`\]\(([\w./]+)\)")


def claims(text: str) -> list[list[str]]:
    """The rows of the first table, cell by cell."""
    rows = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows[1:]


def missing(text: str) -> list[str]:
    """What is wrong: claims without a test, tests that do not exist."""
    found = []
    for what, *_, held in claims(text):
        links = _LINK.findall(held)
        if not links:
            found.append(f"{what}: no test")
        for name, place in links:
            path = ROOT / place
            tree = ast.parse(path.read_text()) if path.is_file() else ast.parse("")
            if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
                found.append(f"{what}: {place} has no {name}")
    return found


def test_every_claim_has_its_tests() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert len(claims(text)) > 10
    assert missing(text) == []


@pytest.mark.parametrize(
    "held", ["nothing", "[`test_no_such_thing`](tests/trust/test_kill.py)", "[`test_it_costs_little`](tests/trust/gone.py)"]
)
def test_a_claim_without_a_test_is_seen(held: str) -> None:
    assert len(missing(f"| what | how | held by |\n|---|---|---|\n| files | well | {held} |\n")) == 1
