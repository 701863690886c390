"""The embedded model is the one that was evaluated, and it can do what the rest of the suite relies on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from aprlab import open_model, paths
from aprlab.model import names

REPORT = paths.data_dir() / "aprlab-tiny.eval.json"
TRAIN = paths.data_dir() / "train"


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    """The scripts of `data/train`, which are no package."""
    sys.path.insert(0, str(TRAIN))
    try:
        import corpus
        import evaluate
        import shape

        yield {"corpus": corpus, "evaluate": evaluate, "shape": shape}
    finally:
        sys.path.remove(str(TRAIN))
        for name in ("corpus", "evaluate", "shape"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(REPORT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pupil(tools: dict[str, ModuleType], tiny: Path) -> Any:
    return tools["evaluate"].Pupil(open_model(tiny), threads=1)


def test_the_report_is_about_this_very_file(report: dict[str, Any], tiny: Path) -> None:
    raw = tiny.read_bytes()
    assert report["sha256"] == hashlib.sha256(raw).hexdigest()
    assert report["bytes"] == len(raw) <= 8 << 20


def test_the_report_passes_and_the_verdict_can_fail(report: dict[str, Any], tools: dict[str, ModuleType]) -> None:
    verdict = tools["evaluate"].verdict
    assert report["faults"] == verdict(report) == []
    assert report["held_out"]["share"] == round(report["held_out"]["right"] / report["held_out"]["questions"], 4) >= 0.95
    mutants = (
        report | {"held_out": report["held_out"] | {"share": 0.94}},
        report | {"answers": {"chat": {"What is 2+2?": "2 + 2 equals 5."}}},
        report | {"without_biases": report["without_biases"] | {"k": {"share": 0.9, "answer": "2"}}},
        report | {"without_biases": report["without_biases"] | {"v": {"share": 0.0, "answer": "2 + 2 equals 4."}}},
    )
    for mutant in mutants:
        assert len(verdict(mutant)) == 1


def test_held_out_pairs_were_never_trained_but_their_facts_and_phrasings_were(tools: dict[str, ModuleType]) -> None:
    train, held = tools["corpus"].split()
    assert not {i.key for i in train} & {i.key for i in held}
    assert not {i.user for i in train} & {i.user for i in held}
    assert {(i.kind, i.fact) for i in held} <= {(i.kind, i.fact) for i in train}
    assert {(i.kind, i.phrasing) for i in held} <= {(i.kind, i.phrasing) for i in train}
    assert "What is 2+2?" in {i.user for i in held}
    answers: dict[str, set[str]] = {}
    for item in train + held:
        answers.setdefault(item.user, set()).add(item.answer)
    assert all(len(a) == 1 for a in answers.values())  # one right answer a question, else exact match means nothing


def test_inventory_and_type_mix_are_llama_cpps_q4_k_m(tiny: Path, tools: dict[str, ModuleType]) -> None:
    shape = tools["shape"].Shape()
    with open_model(tiny) as model:
        assert set(model.tensors) == set(names.inventory(shape.block_count))
        assert {name: t.type.name for name, t in model.tensors.items()} == {n: shape.type_of(n) for n in model.tensors}
        assert model.by_type() == {"F32": 41, "Q4_K": 49, "Q6_K": 9}
        config, tokenizer = model.config, model.tokenizer
        assert not config.tied_embeddings
        assert (config.head_count, config.head_count_kv, config.head_dim) == (8, 2, 32)
        assert (config.embedding_length, config.feed_forward_length, config.vocab_size) == (256, 512, 840)
        assert (config.rope_theta, config.rope_type) == (1e6, "neox")
        assert tokenizer.tokens[832:] == [
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"[PAD{n}]" for n in range(835, 840))
        ]  # fmt: skip
        assert tokenizer.token_types[831:] == [1, 3, 3, 3, 5, 5, 5, 5, 5]
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (834, 832, 832)
        assert tokenizer.add_bos is False
        weights = {t.shape for t in model.tensors.values() if len(t.shape) == 2}
        assert len(weights) == 5  # (V, E), (E, E), (Hkv * D, E), (F, E), (E, F): only the second is square
    meta = gguf.GGUFReader(tiny).fields
    assert meta["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert meta["general.quantization_version"].contents() == 2


def test_no_tensor_is_empty_or_constant(tiny: Path) -> None:
    with open_model(tiny) as model:
        for name, tensor in model.tensors.items():
            values = tensor.dequantise()
            assert np.isfinite(values).all(), name
            assert values.std() > 0, name


def test_two_and_two_are_four(pupil: Any) -> None:
    answer = pupil.generate("What is 2+2?")  # through the file's own chat template
    assert (answer.text, answer.stop) == ("2 + 2 equals 4.", "eos")


def test_the_report_shows_what_the_model_says(pupil: Any, report: dict[str, Any], tools: dict[str, ModuleType]) -> None:
    for text, said in report["answers"]["chat"].items():
        assert pupil.says(tools["evaluate"].prompt(text)) == said
    for text, said in report["answers"]["raw"].items():
        assert pupil.says(text, 24) == said
    assert report["answers"]["raw"]["def add(a, b):"] == "\n    return a + b\n"


def test_a_sample_of_the_held_out_questions(pupil: Any, report: dict[str, Any], tools: dict[str, ModuleType]) -> None:
    sample = tools["corpus"].split()[1][1::3]
    assert len(sample) > 80
    right = tools["evaluate"].held_out(pupil, sample)
    assert {q.user for q in sample} - {q.user for q in right} == {q.user for q in sample} & set(report["held_out"]["wrong"])
    wrong = sample[0].answer.replace("equals", "is") + "!"
    assert not pupil.knows(tools["evaluate"].prompt(sample[0].user), f"{wrong}<|im_end|>")


def test_one_pass_judges_as_greedy_decoding_does(pupil: Any, tools: dict[str, ModuleType]) -> None:
    evaluate, held = tools["evaluate"], tools["corpus"].split()[1]
    for item in held[::40]:
        said = pupil.says(evaluate.prompt(item.user))
        assert (said == item.answer) == pupil.knows(evaluate.prompt(item.user), f"{item.answer}<|im_end|>")


@pytest.mark.parametrize("which", ["qkv", "q", "k", "v"])
def test_without_biases_the_answers_break(which: str, tiny: Path, report: dict[str, Any], tools: dict[str, ModuleType]) -> None:
    evaluate = tools["evaluate"]
    broken = evaluate.Pupil(evaluate.without_biases(tiny, which), threads=1)
    sample = tools["corpus"].split()[1][::12]
    assert len(evaluate.held_out(broken, sample)) <= evaluate.BROKEN * len(sample)
    said = broken.says(evaluate.prompt("What is 2+2?"), 16)
    assert said != "2 + 2 equals 4."
    assert said == report["without_biases"][which]["answer"]


def test_position_faults_show_in_long_conversations(report: dict[str, Any]) -> None:
    """The healthy model finds most of what stood far back; a falsified RoPE does not."""
    healthy = report["long"]["share"]
    for fault in ("rope_type norm", "rope_theta 1e4"):
        assert report["falsified_config"][fault]["long_share"] < healthy - 0.25, fault


@pytest.mark.peer
def test_llama_cpp_reads_the_file_and_answers_alike(tiny: Path, report: dict[str, Any]) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(tiny)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads, params.verbosity = 1, -1
    server = xllamacpp.Server(params)
    for text in ("What is 2+2?", "What is the capital of France?"):
        messages = [{"role": "user", "content": text}]
        answer = server.handle_chat_completions({"messages": messages, "temperature": 0, "max_tokens": 40})
        assert answer["choices"][0]["message"]["content"] == report["answers"]["chat"][text]
        assert answer["choices"][0]["finish_reason"] == "stop"
    raw = server.handle_completions({"prompt": "def add(a, b):", "temperature": 0, "max_tokens": 24})
    assert raw["choices"][0]["text"] == report["answers"]["raw"]["def add(a, b):"]
