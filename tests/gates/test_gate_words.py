"""Every code of gates and stages has words, and every sentence gets the parameters that it names."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path

import pytest
from pages import page_script

from aprlab import gates
from aprlab.gates.words import TEMPLATES, words

ROOT = Path(gates.__file__).parent
DOCS = Path(__file__).resolve().parents[2] / "docs"
SAYS = {"holds", "fails", "_want", "_found", "StageFailure"}
CODE = re.compile(r"^(gate|stage)\.[a-z0-9.-]+$")


def used(source: str) -> list[tuple[str, set[str] | None]]:
    """Codes with the parameters given to them, None where those are not written out."""
    found: list[tuple[str, set[str] | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.match(node.value):
            found.append((node.value, None))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SAYS:
            codes = [a.value for a in node.args if isinstance(a, ast.Constant) and CODE.match(str(a.value))]
            given = {k.arg for k in node.keywords}
            found += [(code, None if None in given else {str(name) for name in given}) for code in codes]
    return found


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template.replace("[", "").replace("]", "")) if name}


def unfit(found: list[tuple[str, set[str] | None]]) -> list[str]:
    """Codes without words, and codes whose words ask for other parameters than they get."""
    return [c for c, given in found if c not in TEMPLATES or (given is not None and not fields(TEMPLATES[c]) <= given)]


def sources() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py") if path.name != "words.py"]


def test_every_code_has_words_and_gets_their_parameters() -> None:
    found = [pair for source in sources() for pair in used(source)]
    assert unfit(found) == []
    assert {code for code, _ in found} == TEMPLATES.keys(), "a sentence that nobody says"
    assert sum(given is not None for _, given in found) > 60


def test_a_code_without_words_or_without_its_parameters_would_be_noticed() -> None:
    assert unfit(used('holds("gate.unheard-of", x=1)')) == ["gate.unheard-of"] * 2
    assert unfit(used('_want(0, "stage.not-finite", where=1)')) == ["stage.not-finite"]


def test_words_are_filled_in_and_optional_parts_left_out() -> None:
    counted = {"names": 3, "unknown": 1, "missing": 0, "twice": 0}
    assert words("gate.names-differ", {**counted, "first": "x"}) == "3 names: 1 unknown, 0 missing, 0 twice, first x"
    assert words("gate.names-differ", {**counted, "first": None}) == "3 names: 1 unknown, 0 missing, 0 twice"
    law = {"tensor": "t", "byte": 12, "size": 7, "shape": (2, 3)}
    assert words("gate.size-law", {**law, "fit": ["F16", "BF16"]}).endswith("7 bytes as (2, 3): F16 or BF16 would fit")
    assert words("gate.size-law", {**law, "fit": []}).endswith("nothing would fit")
    assert words("gate.void", {"instruments": ["same", "verify"]}) == "void: same, verify failed"
    with pytest.raises(KeyError):
        words("gate.unheard-of", {})


def test_the_page_of_codes_is_what_the_code_says() -> None:
    module = page_script("gates_page")
    assert (DOCS / "gates.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make/gates_page.py"
