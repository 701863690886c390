"""The certificate: a right conversion has it, each class of wrong ones does not, and each check is shown one that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from foreign_files import write as write_foreign

from aprlab import quants
from aprlab.cli.app import run_cli
from aprlab.conversion import convert
from aprlab.errors import UsageError
from aprlab.faults import convert_with, session_with
from aprlab.formats import open_model
from aprlab.inference import Session
from aprlab.onion.row_errors import row_errors
from aprlab.onion.verdict import Verdict
from aprlab.qualification import certificate, certificate_page
from aprlab.qualification.certificate import Certificate, CertificateCheck, verify
from aprlab.qualification.certificate_words import PROBLEMS, TEMPLATES, TITLES, words
from aprlab.qualification.text_reading import affordable, interval, long_window, read, windows
from aprlab.quants import types

TOKENS = 64


@pytest.fixture(scope="module")
def sound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    out = tmp_path_factory.mktemp("sound") / "m.apr"
    convert(tiny, out)
    return verify(tiny, out, tokens=TOKENS)


def by_id(found: Certificate) -> dict[str, CertificateCheck]:
    return {check.id: check for check in found.checks}


def test_a_lossless_conversion_is_certified(sound: Certificate) -> None:
    assert (sound.verdict, sound.exit_code) == ("certified", 0)
    assert list(by_id(sound)) == [id for id in TITLES if id != "modelfile"]
    assert by_id(sound)["text"].code == by_id(sound)["long context"].code == "verify.text-same"
    assert by_id(sound)["text"].parameters["kl"] == 0 and by_id(sound)["text"].parameters["same"] == 1
    assert sum(row["equal"] for row in sound.tensors) == by_id(sound)["tensors"].parameters["tensors"]
    assert by_id(sound)["prompts"].parameters["prompts"] == 5
    assert str(sound).endswith(sound.sentence) and str(sound).count("pass") == len(TITLES) - 1
    assert sound._repr_html_().count("<tr") >= len(TITLES) - 1 and "certified" in sound._repr_html_()


def test_a_conversion_that_loses_what_its_type_loses_is_certified_with_figures(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "q.gguf", quantize="q8_0")
    found = verify(tiny, tmp_path / "q.gguf", tokens=TOKENS)
    assert found.verdict == "certified"
    assert "harmless: re-encoded from" in by_id(found)["layers"].figure
    text = by_id(found)["text"].parameters
    assert 0 < text["kl"] < text["allowed"] and not text["exact"]
    assert text["kl_interval"][0] <= text["kl"] <= text["kl_interval"][1]
    assert {row["after"] for row in found.tensors} >= {"Q8_0", "F32"} and found.by_layer["blk.0"] > 0
    assert all(row["worst_row"] <= row["bound"] for row in found.tensors if row["bound"] is not None)


# One of each section and layer of the catalogue that a file can have; all of them: docs/certificate.md.
KILLED = (
    "unsorted-index", "GH-190", "lost-qkv-biases", "GH-191", "dims-swapped", "q4k-min-lost", "rope-theta", "no-merges",
)  # fmt: skip


@pytest.mark.parametrize("fault", KILLED)
def test_a_wrong_conversion_is_not_certified(tiny: Path, tmp_path: Path, fault: str) -> None:
    convert_with(tiny, tmp_path / "bad.apr", [fault])
    found = verify(tiny, tmp_path / "bad.apr", tokens=TOKENS)
    assert (found.verdict, found.exit_code) == ("not certified", 3)
    assert found.sentence.startswith("Do not release it")


def test_the_text_alone_refuses_a_model_that_computes_otherwise(tiny: Path) -> None:
    """Same files, same prompts; one side rotates wrongly."""
    with open_model(tiny) as model:
        a, b = Session(model), session_with(model, ["rope-norm"])
        lossy = model.tensor("blk.0.attn_q.weight")
        raw = quants.quantise(lossy.dequantise(), types.Q4_0).reshape(-1)
        errors = {lossy.name: row_errors(lossy, types.Q4_0, raw)}
        checks = certificate._of_text(a, b, TOKENS, errors)  # one matrix has lost what four bits lose
        assert [check.passed for check in checks] == [False, False] and checks[0].code == "verify.text-off"
        exact = certificate._of_text(a, a, TOKENS, None)
        assert [check.code for check in exact] == ["verify.text-same"] * 2
        near = read(a, b, windows(a, TOKENS))
        assert near.kl.shape == near.same.shape and (near.kl > 0).any() and not near.same.all()


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_what_a_type_costs_is_foretold_by_the_source_alone(tiny: Path, tmp_path: Path, kind: str) -> None:
    convert(tiny, tmp_path / "q.gguf", quantize=kind)
    found = by_id(verify(tiny, tmp_path / "q.gguf", tokens=384))
    for id in ("text", "long context"):
        figures = found[id].parameters
        assert found[id].passed and figures["kl"] > (figures["allowed"] - 1e-5) / 9  # three times what is right


def test_long_windows_and_short_ones(tiny: Path) -> None:
    with open_model(tiny) as model:
        session = Session(model)
        near, long = affordable(session, 96)
        assert (near, long) == (64, 32) and len(long_window(session, long)) == 32
        assert [len(ids) for ids in windows(session, near)] == [64]
        assert affordable(session, None) == (8192, 2048)
        all_of_it = windows(session, 8192)
        assert len({tuple(ids) for ids in all_of_it}) == len(all_of_it) > 10
        assert windows(session, 1100)[-1] != windows(session, 512)[0]  # from all over the text


def test_other_prompts_are_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(tiny) as model:
        a = Session(model)
        data = replace(model.tokenizer, chat_template=(model.tokenizer.chat_template or "").replace("system", "sistem"))
        b = Session(model.with_changes(tokenizer=data))
        check = certificate._of_prompts(a, b)
        assert check.passed is False and "a system message" in check.parameters["first"]
        assert certificate._of_prompts(a, a).passed


def test_what_cannot_be_run_is_never_certified_and_what_is_wrong_with_it_is_found(tmp_path: Path) -> None:
    source, other = write_foreign(tmp_path / "a.gguf", "falcon"), write_foreign(tmp_path / "b.gguf", "falcon", seed=1)
    convert(source, tmp_path / "a.apr")
    found = verify(source, tmp_path / "a.apr")
    assert (found.verdict, found.exit_code) == ("not enough evidence", 4)
    assert [c.id for c in found.checks if c.passed is None] == ["prompts", "text", "long context"]
    assert all(c.passed for c in found.checks if c.passed is not None)
    assert verify(source, other).verdict == "not certified"


def test_a_broken_file_is_a_verdict_and_a_broken_source_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-5000])
    found = verify(tiny, tmp_path / "cut.gguf")
    assert found.verdict == "not certified" and by_id(found)["file"].passed is False
    assert by_id(found)["tensors"].passed is None
    with pytest.raises(UsageError):
        verify(tmp_path / "none.gguf", tiny)


def test_intervals_hold_what_they_say() -> None:
    rng = np.random.default_rng(3)
    hit = 0
    for _ in range(200):
        drawn = np.repeat(rng.normal(size=(4, 8)), 32, axis=1)  # neighbours alike: a block is one draw
        _, low, high = interval(drawn)
        hit += low <= 0 <= high
    assert 170 <= hit <= 199
    assert interval(np.ones((3, 64))) == (1.0, 1.0, 1.0)
    assert interval(np.ones((1, 16)))[2] == float("inf")  # one draw says nothing of the spread


def test_every_code_has_words(sound: Certificate) -> None:
    assert {check.code for check in sound.checks} <= set(TEMPLATES)
    with pytest.raises(KeyError):
        words("verify.nothing", {})


def hostile(sound: Certificate) -> Certificate:
    bad = CertificateCheck("prompts", False, "verify.run-refused", {"message": "<script>|\x00`x` [a](b)\nnext"})
    open_ = CertificateCheck("text", None, "verify.needs-a-run", {"message": "é"})
    return replace(sound, checks=[*sound.checks[:3], bad, open_], model="a|<b>.gguf")


@pytest.mark.parametrize("change", [lambda found: found, hostile])
def test_what_is_written_can_be_read(sound: Certificate, tmp_path: Path, change: Callable[[Certificate], Certificate]) -> None:
    found = change(sound)
    paths = {path.name: path.read_text(encoding="utf-8") for path in certificate_page.write(found, tmp_path)}
    assert tuple(paths) == certificate_page.NAMES
    data = json.loads(paths["certificate.json"])
    assert (data["schema"], data["verdict"]) == (1, found.verdict)
    assert [c["id"] for c in data["checks"]] == [c.id for c in found.checks]
    suite = ElementTree.fromstring(paths["junit.xml"])
    counted = [sum(c.passed is value for c in found.checks) for value in (False, None)]
    assert [len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "skipped")] == counted
    assert [int(suite.attrib[name]) for name in ("tests", "failures", "skipped")] == [len(found.checks), *counted]
    assert "<script>" not in paths["report.html"] and "<script>" not in paths["summary.md"]
    rows = [line for line in paths["summary.md"].splitlines() if line.startswith("| ") and " | pass | " in line]
    assert len(rows) == sum(c.passed is True for c in found.checks)
    assert found.verdict in paths["report.html"] and found.verdict in paths["summary.md"]


def test_the_command_line(
    sound: Certificate, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def known(source: Path, model: Path, **options: Any) -> Certificate:
        asked.update(options)
        return sound

    monkeypatch.setattr(certificate, "verify", known)
    assert run_cli(["verify", str(tiny), str(tiny), "--tokens", "99", "--out", str(tmp_path / "r")]) == 0
    assert asked["tokens"] == 99 and sorted(p.name for p in (tmp_path / "r").iterdir()) == sorted(certificate_page.NAMES)
    assert "certified: It is what a right conversion makes of its source" in capfd.readouterr().out
    assert run_cli(["verify", str(tiny), str(tmp_path / "none.gguf")]) == 2
    sound.checks.append(CertificateCheck("text", False, "verify.run-refused", {"message": "x"}))
    try:
        assert run_cli(["verify", str(tiny), str(tiny), "--json"]) == 3
    finally:
        sound.checks.pop()
    assert json.loads(capfd.readouterr().out)["verdict"] == "not certified"
    assert isinstance(sound.peeled, Verdict)


PLAIN = """TEMPLATE \"\"\"{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
<|im_start|>assistant
{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>
{{ end }}{{ end }}\"\"\"
"""
SYSTEM = "SYSTEM You are aprlab-tiny, a small test model.\n"
MODELFILES: dict[str, tuple[str, bool | None, list[str]]] = {
    "right": (f"FROM ./m.gguf\n{PLAIN}{SYSTEM}PARAMETER stop <|im_end|>\n", True, []),
    "no system message": (f"FROM x\n{PLAIN}", False, ["modelfile.prompt"] * 2),
    "another family's marks": (
        f"FROM x\n{PLAIN}{SYSTEM}".replace("<|im_end|>", "<|eot_id|>"), False, ["modelfile.prompt"] * 3
    ),
    "another family's stop": (
        f"FROM x\n{PLAIN}{SYSTEM}PARAMETER stop <|eot_id|>\n", False, ["modelfile.stop-of-another-model", "modelfile.no-end"]
    ),
    "a stop that cuts": (f"FROM x\n{PLAIN}{SYSTEM}PARAMETER stop user\n", False, ["modelfile.stop-cuts"]),
    "other weights": (f"FROM other.gguf\n{PLAIN}{SYSTEM}", False, ["modelfile.other-weights"]),
    "an adapter": (f"FROM x\n{PLAIN}{SYSTEM}ADAPTER a.gguf\n", False, ["modelfile.not-handled"]),
    "no template": ("FROM x\n", None, []),
    "broken": ("FROM x\nTEMPLATE {{ if }}\n", False, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELFILES)
def test_a_modelfile_makes_the_sources_prompts_or_is_named(tiny: Path, tmp_path: Path, name: str) -> None:
    text, passed, codes = MODELFILES[name]
    (tmp_path / "Modelfile").write_text(text)
    check = certificate._of_modelfile(tiny, tmp_path / "m.gguf", tmp_path / "Modelfile")
    assert check.passed is passed and check.figure
    assert [problem["code"] for problem in check.parameters.get("problems", ())] == codes


def test_the_modelfile_is_part_of_the_verdict(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(MODELFILES["no system message"][0])
    found = verify(tiny, tiny, tokens=TOKENS, modelfile=tmp_path / "Modelfile")
    assert found.verdict == "not certified" and "system" in by_id(found)["modelfile"].figure
    assert set(PROBLEMS) >= {p["code"] for p in by_id(found)["modelfile"].parameters["problems"]}
