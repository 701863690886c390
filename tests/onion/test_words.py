"""The table of codes: every code of the onion is in it, every code in it is used, and the page lists it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pages import page_script

from aprlab.errors import FormatError
from aprlab.onion.file_case import Deviation, by_cause
from aprlab.onion.layers import FILE_LAYERS, OWNERS
from aprlab.onion.verdict import LAYERS, Finding, plain
from aprlab.onion.words import TEMPLATES, Mechanism, parameters_of, refused, words

ROOT = Path(__file__).parents[2]


def literals(source: str) -> Iterator[str]:
    """Patterns of all strings of a module; what an f-string fills in may be any part of a code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(re.escape(v.value) if isinstance(v, ast.Constant) else "[a-z-]+" for v in node.values)  # type: ignore[arg-type]


def given(source: str) -> Iterator[tuple[str, set[str]]]:
    """Codes and names of parameters, where both are written out at the call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Mechanism":
            code, *rest = node.args
            if isinstance(code, ast.Constant) and all(isinstance(part, ast.Dict) for part in rest):
                names = {k.value for part in rest for k in part.keys if isinstance(k, ast.Constant)}  # type: ignore[attr-defined]
                yield str(code.value), names


def sources() -> list[str]:
    folder = ROOT / "aprlab" / "onion"
    return [path.read_text(encoding="utf-8") for path in folder.rglob("*.py") if path.name != "words.py"]


def made_from(texts: list[str]) -> set[str]:
    patterns = {p for text in texts for p in literals(text) if "." in p or "-" in p}
    return {code for code in TEMPLATES if any(re.fullmatch(p, code) for p in patterns)}


def test_every_code_in_the_table_is_used() -> None:
    built = {f"tokenizer.{part}" for part in ("rotated", "reordered", "lost", "missing", "unexpected")}  # one word alone
    assert set(TEMPLATES) - made_from(sources()) - built == set()
    assert "container.truncated" not in made_from(["x = 'container.overlap'"])


def test_every_code_that_is_written_has_the_parameters_of_its_sentence() -> None:
    found = [pair for text in sources() for pair in given(text)]
    assert len(found) > 30
    for code, names in found:
        assert set(parameters_of(code)) <= names, code
    (mutant,) = given('Mechanism("weights.all-zeros", {"tensor": 1})')
    assert not set(parameters_of(mutant[0])) <= mutant[1]


def test_codes_are_layer_and_mechanism() -> None:
    for code in TEMPLATES:
        assert re.fullmatch(r"[a-z]+\.[a-z0-9-]+", code)
        assert code.partition(".")[0] in (*LAYERS, "catalogue")


def test_unknown_codes_and_missing_parameters_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown code"):
        Mechanism("weights.unheard-of")
    with pytest.raises(KeyError):
        words("weights.all-zeros", {})
    with pytest.raises(ValueError, match="unknown layer"):
        Finding("wights", None, [], Mechanism("weights.all-zeros", {"part": "x"}))
    with pytest.raises(ValueError, match="unknown layer"):
        Deviation("bytes", "x", None, None, Mechanism("catalogue.fault", {"fault": "GH-190"}))


def test_lists_and_plurals() -> None:
    assert words("dtype.several-types-fit", {"label": 8, "types": ["Q4_0", "AprQ4"]}).endswith("between Q4_0 and AprQ4")
    one, two = ({"fields": fields} for fields in (["d"], ["d", "qs"]))
    assert words("decode.fields-changed-in-most-blocks", one) == "field 'd' changed in most blocks"
    assert words("decode.fields-changed-in-most-blocks", two) == "fields 'd', 'qs' changed in most blocks"
    assert words("forward.operations-differ", {"operations": ["rope"]}) == "rope differs on the same input"
    assert words("forward.operations-differ", {"operations": ["add", "rope"]}) == "add, rope differ on the same input"


def test_causes_differ_by_parameters_and_never_by_a_quoted_message() -> None:
    errors = [FormatError("one", code="apr.unknown-flags"), FormatError("two", code="apr.unknown-flags"),
              FormatError("one", code="apr.padding-not-zero")]  # fmt: skip
    causes = [refused(error, "container.refused") for error in errors]
    deviations = [Deviation("seal", "", None, None, cause) for cause in causes]
    assert by_cause(deviations) == [deviations[:2], deviations[2:]]
    assert causes[0].label == causes[1].label == "container.refused(rule=apr.unknown-flags)"
    assert str(causes[1]) == "two"
    assert plain(causes[0]) == {
        "code": "container.refused", "parameters": {"rule": "apr.unknown-flags", "message": "one"}, "words": "one",
    }  # fmt: skip


def test_every_kind_of_deviation_has_one_layer() -> None:
    kinds = [kind for layer in FILE_LAYERS for kind in layer.kinds]
    assert len(kinds) == len(set(kinds)) == len(OWNERS)
    with pytest.raises(KeyError):
        OWNERS["unheard-of"]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The program that makes the table of the page."""
    return page_script("peel_codes")


def test_the_page_lists_all_codes(made: ModuleType) -> None:
    text = made.PAGE.read_text(encoding="utf-8")
    assert made.page(text) == text, "run: python docs/make/peel_codes.py"
    older = text.replace("| `weights.all-zeros` |", "| `weights.zeros` |")
    assert older != text and made.page(older) != older
    with pytest.raises(ValueError, match="marks"):
        made.page(text.replace("<!-- end of codes -->", ""))
