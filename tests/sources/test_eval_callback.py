"""The text of llama-eval-callback: read in every layout, compared with our own run, the first tensor that is another named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from eval_printer import printed
from variants import first_layers, variant

import aprlab
from aprlab.cli.app import run_cli
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import Contract
from aprlab.errors import AprlabError
from aprlab.faults import session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.source_peeling import peel_sources
from aprlab.sources import source
from aprlab.sources.engines import EngineSource
from aprlab.sources.eval_callback import PrintoutSource

IDS = [5, 9, 30, 77, 41, 8, 200, 31]
NODES = {
    "embed": ("embd", "GET_ROWS"), "attn_norm": ("attn_norm", "MUL"), "q": ("Qcur", "ADD"), "k": ("Kcur", "ADD"),
    "v": ("Vcur", "ADD"), "q_rope": ("Qcur", "ROPE"), "k_rope": ("Kcur", "ROPE"), "attn": ("kqv_out", "CONT"),
    "attn_out": ("node_9", "MUL_MAT"),
    "ffn_inp": ("ffn_inp", "ADD"), "ffn_norm": ("ffn_norm", "MUL"), "gate": ("ffn_gate", "MUL_MAT"), "up": ("ffn_up", "MUL_MAT"),
    "swiglu": ("ffn_swiglu", "SWIGLU"), "down": ("ffn_out", "MUL_MAT"), "out": ("l_out", "ADD"),
    "norm": ("result_norm", "MUL"), "logits": ("result_output", "MUL_MAT"),
}  # fmt: skip
LAST = ("ffn_inp", "ffn_norm", "gate", "up", "swiglu", "down", "out")
# As PR 6576 of llama.cpp shows it (2024): three values of a row, no sum; and 2025's six, with one.
OLD = """llama_new_context_with_model: graph nodes  = 1225
ggml_debug:              inp_embd = (f32)   GET_ROWS(token_embd.weight{256, 840, 1, 1}, inp_tokens{1, 1, 1, 1}}) = {256, 1, 1, 1}
                                     [
                                      [
                                       [ -0.0181,   0.0272,   0.0272, ...],
                                      ],
                                     ]
ggml_debug:                   norm-0 = (f32)   RMS_NORM(CUDA0#inp_embd#0{256, 1, 1, 1}, }) = {256, 1, 1, 1}
                                     [
                                      [
                                       [ -0.6989,   1.0636,   1.0636, ...],
                                      ],
                                     ]
ggml_debug:                Kcur-0 = (f32)       ROPE(Kcur-0 (reshaped){32, 2, 1, 1}, inp_pos{1, 1, 1, 1}}) = {32, 2, 1, 1}
                                     [
                                      [
                                       [      0.0260,       0.0299,       0.0009, ...,       0.0173,       0.0058,      -0.0157],
                                       [      0.0602,       0.0272,      -0.0239, ...,       0.0578,       0.0108,      -0.0360],
                                      ],
                                     ]
                                     sum = -4.452065
"""


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return first_layers(open_model(tiny), 2)


def text_of(session: Session, ids: list[int] = IDS, *, list_ids: bool = True, without: str = "") -> str:
    """What the example would print of an engine of ours; the MLP of the last layer has the last position alone."""
    trace = EngineSource(session).run(ids)
    lines = [f"number of input tokens = {len(ids)}", *(f"  {id}" for id in ids)] if list_ids else ["main: build = 1"]
    for name, point in trace.points.items():
        step, layer = name.split(".")[-1], name.split(".")[1] if "." in name else ""
        node, operation = NODES[step]
        last = step in ("norm", "logits") or (layer == "1" and step in LAST)
        values = point.values[-1:] if last else point.values
        if step in ("q", "k", "v"):
            values = values.reshape(len(values), -1)
        name = f"{node}-{layer}" if layer and node != "node_9" else node
        if step != without:
            shaped = values.reshape(*(1,) * (4 - values.ndim), *values.shape)
            lines.append(printed(name, "f32", operation, ["a{1, 1, 1, 1}"], shaped, "common_debug_cb_eval"))
    return "\n".join(lines)


def judged(model: Model, folder: Path, text: str, options: str = ",activations=f32,cache=f32") -> aprlab.onion.verdict.Verdict:
    path = folder / "eval.txt"
    path.write_text(text)
    return peel_sources(model, [f"{path}{options}"], prompt=IDS)


def test_what_the_example_printed_in_2024_is_read(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "old.log"
    path.write_text(OLD)
    embed, k = PrintoutSource(path, model).tensors
    assert (embed.point, embed.at.tolist(), embed.sum) == ("embed", [0, 1, 2], None)
    assert embed.values.tolist() == [-0.0181, 0.0272, 0.0272]
    assert (k.point, k.shape, k.sum, k.half) == ("layers.0.k_rope", (1, 2, 32), -4.452065, 0.5e-4)
    assert k.at.tolist() == [0, 1, 2, 29, 30, 31, 32, 33, 34, 61, 62, 63] and k.values[-1] == -0.036


@pytest.mark.parametrize("contract", ["f32", "q8, cache f16", "q8, cache f16, flash"])
def test_a_healthy_printout_agrees_and_says_what_was_looked_at(model: Model, tmp_path: Path, contract: str) -> None:
    rules = Contract.parse(contract)
    options = f",activations={rules.activations},cache={rules.cache},flash={'on' if rules.flash else 'off'}"
    verdict = judged(model, tmp_path, text_of(Session(ContractEngine(model, rules))), options)
    (found,) = verdict.findings
    assert (verdict.verdict, found.code, found.harmless) == ("equivalent", "forward.printout-agrees", True)
    assert (found.parameters["tensors"], found.parameters["sums"]) == (33, 33) and 900 < found.parameters["values"] < 3000


@pytest.mark.parametrize(
    ("fault", "step", "name"),
    [("rope-theta", "q_rope", ""), ("lost-k-biases", "k", ""), ("lost-qkv-biases", "q", ""), ("wrong-eps", "attn_norm", ""),
     ("q4k-min-lost", "embed", ""), ("q4k-nibble-pairs", "embed", ""), ("gqa-modulo", "attn", ""),
     ("wrong-norm", "attn_norm", ""), ("zeroed-norm", "attn_norm", "layers.1")],
)  # fmt: skip
def test_a_fault_is_named_where_it_first_shows(model: Model, tmp_path: Path, fault: str, step: str, name: str) -> None:
    verdict = judged(model, tmp_path, text_of(session_with(model, [fault], "reference")))
    assert verdict.first_divergence is not None and verdict.first_divergence["point"].split(".")[-1] == step, verdict
    (found,) = verdict.findings
    assert (verdict.verdict, found.fault or found.parameters["form"]) == ("broken", fault if not name else found.fault)
    assert found.evidence["not_judged"].startswith("the values that were not printed")


def test_what_no_form_gives_is_the_first_tensor_that_is_another(model: Model, tmp_path: Path) -> None:
    text = text_of(Session(model, engine="reference"))
    at = text.index("ffn_out-0 =")
    broken = text[:at] + re.sub("sum = -?", "sum = 9", text[at:], count=1)
    verdict = judged(model, tmp_path, broken)
    (found,) = verdict.findings
    assert (found.code, found.parameters["point"]) == ("forward.printout-differs", "layers.0.down")
    assert found.parameters["before"] == 14
    lines = broken.splitlines()
    assert "ffn_out-0 =" in lines[found.parameters["line"] - 1]


def test_the_prompt_is_found_by_its_ids_its_length_and_its_rows(model: Model, tmp_path: Path) -> None:
    session = Session(model, engine="reference")
    path = tmp_path / "e.txt"
    path.write_text(text_of(session, session.raw_tokens("What is 2+2?"), list_ids=False))
    options = f"{path},activations=f32,cache=f32"
    assert peel_sources(model, [options], prompt="What is 2+2?").verdict == "equivalent"  # as it is, not by the template
    with pytest.raises(AprlabError) as caught:
        peel_sources(model, [options], prompt="What is 2+2+2?")
    assert caught.value.code == "printout.other-prompt" and "--prompt" in str(caught.value)
    path.write_text(text_of(session, session.chat_tokens("Hi"), list_ids=False))
    assert peel_sources(model, [options], prompt="Hi").verdict == "equivalent"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda text: "nothing of the kind", "printout.none"),
        (lambda text: text.replace("{256, 8, 1, 1}", "{255, 8, 1, 1}"), "printout.other-model"),
        (lambda text: text.replace("        ],\n", "", 1), "printout.values"),
        (lambda text: text.replace("            ..., \n", ""), "printout.values"),
        (lambda text: text.replace(".", ",", 40), "printout.values"),
    ],
)  # fmt: skip
def test_a_text_that_is_none_is_one_line(model: Model, tmp_path: Path, change: object, code: str) -> None:
    text = change(text_of(Session(model, engine="reference")))  # type: ignore[operator]
    with pytest.raises(AprlabError) as caught:
        judged(model, tmp_path, text)
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_it_is_no_trace_and_needs_a_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.txt"
    path.write_text(OLD)
    assert run_cli(["trace", str(tiny), "--source", str(path), "-o", str(tmp_path / "t.npz")]) == 2
    assert "peel MODEL --source" in capsys.readouterr().err and not (tmp_path / "t.npz").exists()
    for what, code in ((str(tmp_path / "none.txt"), "printout.unreadable"), (f"{path},heat=1", "source.unknown-option")):
        with pytest.raises(AprlabError) as caught:
            source(what, tiny)
        assert caught.value.code == code
    with pytest.raises(AprlabError) as caught:
        source(str(path))
    assert caught.value.code == "source.no-model"


@pytest.mark.peer
def test_what_llama_cpp_itself_prints(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    edited = variant(tiny, tmp_path / "e.gguf", keys={"qwen2.rope.freq_base": 500_000.0})
    script = Path(__file__).with_name("eval_printer.py")
    for path, flash, expected in ((tiny, "1", []), (edited, "0", ["forward.printout-as-form"])):
        command = [sys.executable, script, path, "What is 2+2?", "ggml_debug", flash]
        said = subprocess.run(command, capture_output=True, text=True)
        (tmp_path / "e.txt").write_text(said.stdout)
        verdict = peel_sources(tiny, [str(tmp_path / "e.txt")], prompt="whatever")  # the text lists its ids
        assert [f.code for f in verdict.findings if not f.harmless] == expected, said.stderr
        assert ("flash" in verdict.findings[0].evidence["contract"]) == (flash == "1")
    assert verdict.findings[0].parameters["details"] == ", theta 500000.0"
    assert np.isfinite(verdict.findings[0].evidence["introduced_at"]["off"])
