"""How things look in a notebook: every fact is there, everything is escaped, errors are one line."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from aprlab.display import html as richview
from aprlab.display.html import Cell
from aprlab.errors import FormatError
from aprlab.formats import open_model
from aprlab.gates import GateResult, GateResults
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.verdict import EXIT, MEANING, Finding, Repair, Verdict
from aprlab.onion.words import Mechanism
from aprlab.quants import types
from aprlab.tracing import comparisons


def parsed(page: str) -> ET.Element:
    """The page, which must be well-formed: what is open gets closed, `<` and `&` are escaped."""
    return ET.fromstring(f"<body>{page}</body>")


def words(page: str) -> str:
    return " ".join("".join(parsed(page).itertext()).split())


def test_a_table_escapes_marks_and_aligns() -> None:
    page = richview.table(("a", "b"), [["<i>&", 3], [Cell("no", "bad"), "x"]], caption="1 < 2", strong=[False, True])
    root = parsed(page)
    assert words(page) == "1 < 2ab<i>&3✗ nox"
    assert [td.get("style") for td in root.iter("td")] == [f"text-align:{side}" for side in ("left", "right", "left", "left")]
    assert [tr.get("style") for tr in root.iter("tr")] == [None, None, "font-weight:bold"]
    assert "max-height:9em" in richview.table(("a",), [], height="9em")


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 bytes"), (2048, "2.00 KiB"), (3 << 20, "3.00 MiB"), (5 << 30, "5.00 GiB")])
def test_sizes(nbytes: int, text: str) -> None:
    assert richview.size(nbytes) == text


def test_a_model_shows_its_inventory_and_what_is_missing(tiny: Path) -> None:
    with open_model(tiny) as model:
        page = words(model._repr_html_())
        assert "Q4_K49" in page
        assert "8 (2 for keys and values)" in page
        assert all(name in page for name in model.tensors)
        assert "missing" not in page
        del model.tensors["blk.3.attn_q.bias"]
        assert "✗ missing: blk.3.attn_q.bias" in words(model._repr_html_())


def test_a_tensor_shows_statistics_of_what_was_looked_at(tiny: Path) -> None:
    with open_model(tiny) as model:
        tensor = model.tensor("blk.0.ffn_gate.weight")
        page = words(tensor._repr_html_())
        values = tensor.dequantise(slice(0, 256))
        assert "the first 256 of 512 rows" in page
        assert f"std {values.astype(np.float64).std():.4g}" in page
        assert "all values" in words(model.tensor("blk.0.attn_q.bias")._repr_html_())


def test_a_tensor_of_broken_numbers_says_so() -> None:
    def vector(*values: float) -> str:
        raw = np.array(values, np.float32).view(np.uint8)
        return words(Tensor("x", types.F32, (len(values),), raw, Origin(Path("f"), "x", 0))._repr_html_())

    assert "✗ all values: none is finite" in vector(np.nan, np.inf)
    assert "NaN or Inf ✗ 1" in vector(1, 2, np.nan)
    assert "std 0" in vector(7, 7)


def test_a_histogram_counts_all_values() -> None:
    page = richview.histogram(np.array([0.0] * 10 + [1.0] * 5 + [100.0]), bins=8)
    heights = [float(bar.get("height") or 0) for bar in parsed(page).iter("rect")]
    assert heights[0] == 44
    assert len(heights) == 2  # zeros and ones lie in one bar, the stray in the last
    assert heights[1] == pytest.approx(44 / 15, abs=0.06)


def test_a_comparison_marks_what_differs() -> None:
    page = comparisons.compare_tokens([1, 2], [1, 3])._repr_html_()
    assert words(page).startswith("✗ tokens, a against b: 2 tokens compared, 1 equal bit for bit, first difference at 1")
    assert page.count("font-weight:bold") == 1
    assert page.count("✗ no") == 1
    assert words(comparisons.compare_tokens([1], [1])._repr_html_()).startswith("✓")


def test_a_verdict_shows_findings_and_repair() -> None:
    verdict = Verdict(
        "broken", [Finding("naming", "GH-190", ["a<b"], Mechanism("naming.unknown-name"), {"count": 3})], {"point": "embed"},
        Repair(["naming/GH-190"], True, {"sets_run": 2}), title="x & y",
    )  # fmt: skip
    page = words(verdict._repr_html_())
    assert page.startswith("✗ x & y: broken")
    for part in ("✗ GH-190", "a<b", "count3", "first divergencepointembed", "smallest repair naming/GH-190", "sets_run2"):
        assert part in page
    assert words(Verdict("same", [])._repr_html_()).startswith("✓ sameNothing differs")
    assert words(Verdict("not-comparable", [])._repr_html_()).startswith("? not-comparableNo statement")


def test_a_verdict_ends_with_the_command_that_goes_on() -> None:
    def verdict(word: str, repair: Repair | None = None, **compared: str | None) -> str:
        return Verdict(word, [], repair=repair, compared=compared).next_step  # type: ignore[arg-type]

    fix, odd = Repair(["dtype/GH-191"], True, {}), "it's <b>.apr"
    assert verdict("broken", fix, reference="a.gguf", candidate="b.apr") == "aprlab repair b.apr -o fixed.apr --reference a.gguf"
    assert shlex.split(verdict("broken", fix, reference=None, candidate=odd)) == ["aprlab", "repair", odd, "-o", "fixed.apr"]
    assert verdict("suspect", reference=None, candidate="b.gguf") == "aprlab peel REFERENCE b.gguf"
    assert verdict("same", fix, reference="a.gguf", candidate="b.apr") == ""
    assert verdict("broken", fix, reference="jit", candidate="cuda") == ""
    page = Verdict("broken", [], repair=fix, compared={"reference": None, "candidate": odd})._repr_html_()
    assert "<b>.apr" not in page
    assert set(MEANING) == set(EXIT)


def test_gates_are_a_list_and_a_table() -> None:
    gates = GateResults(
        [
            GateResult("A", True, "gate.no-steps", "holds"),
            GateResult("B", False, "gate.no-steps", "h", refused=True),
            GateResult("C", None, "gate.void", "h", {"instruments": ["a<b"]}),
        ]
    )
    assert [gate.id for gate in gates] == ["A", "B", "C"]
    page = words(gates._repr_html_())
    assert page.startswith("✗ 1 of 3 gates passed")
    for part in ("A✓ passed", "B✗ refused", "C? void"):
        assert part in page


def test_an_error_is_one_line_in_a_cell(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    source = f"import aprlab\nmodel = aprlab.open_model({str(tiny)!r})\nmodel.tensor('nobody')\n"
    monkeypatch.delenv("APRLAB_DEBUG", raising=False)
    assert isinstance(shell.run_cell(source).error_in_exec, FormatError)
    said = capsys.readouterr().out
    assert re.search(r"^FormatError: \S+: has no tensor 'nobody'$", said, re.MULTILINE)
    assert "at line 3 of the cell: model.tensor('nobody')" in said
    assert len(said.strip().splitlines()) == 2
    monkeypatch.setenv("APRLAB_DEBUG", "1")
    shell.run_cell(source)
    assert "model.py" in capsys.readouterr().out
