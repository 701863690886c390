"""Nothing in the package decides by the wording of a message: no comparison, search or look-up reads one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "aprlab"
WORDS = {"message", "mechanism", "title"}  # attributes that hold sentences
_SEARCHES = {"startswith", "endswith", "find", "partition", "removeprefix"}
_PATTERNS = {"match", "search", "fullmatch", "findall"}


def decisions_by_wording(source: str) -> list[str]:
    """Places where a sentence is compared, searched or used as a key, as ``line: expression``."""
    tree = ast.parse(source)
    errors = {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}

    def sentence(node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr in WORDS and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("str", "repr", "reason"):
            return any(isinstance(a, ast.Name) and a.id in errors for a in node.args) or any(map(sentence, node.args))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("lower", "strip"):
            return sentence(node.func.value)
        return False

    found = []
    for node in ast.walk(tree):
        guilty = False
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
            guilty = not none and any(map(sentence, sides))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            guilty = node.func.attr in _SEARCHES and sentence(node.func.value)
            guilty |= node.func.attr in _PATTERNS | {"get", "setdefault"} and any(map(sentence, node.args))
        elif isinstance(node, ast.Subscript):
            guilty = sentence(node.slice)
        if guilty:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_decides_by_wording() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{place}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for place in decisions_by_wording(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'x = "changes nothing here" in str(error)',
        'x = error.message == "gone"',
        'x = finding.mechanism.startswith("the file")',
        'x = KNOWN[problem.message]',
        'x = KNOWN.get(finding.mechanism)',
        're.search("cut off", str(error))',
        'x = any(words in problem.message for words in KNOWN)',
        'x = "space" in str(error).lower()',
    ],
)
def test_a_decision_by_wording_is_seen(line: str) -> None:
    source = f"try:\n    f()\nexcept ValueError as error:\n    {line}\n"
    assert len(decisions_by_wording(source)) == 1
    assert decisions_by_wording(source.replace("str(error)", "error.code").replace("message", "code").replace(
        "mechanism", "code")) == []  # fmt: skip
