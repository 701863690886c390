"""llama.cpp on the same files: prompt ids and greedy tokens of tiny random models of each architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG
from made import bpe_data, made_model, pieces_data, write_gguf
from peer import llama_says

from aprlab.faults import session_with
from aprlab.formats import open_model
from aprlab.inference import Session
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.rope import RopeScaling
from aprlab.sources.llama_cpp import LlamaSource
from aprlab.tracing import trace

pytestmark = pytest.mark.peer
pytest.importorskip("xllamacpp")

TEXT = "hello world, don't print 1234 × naïve 日本語!\n\n  return x"
SMALL = replace(CONFIG, block_count=2)
LLAMA = replace(SMALL, architecture="llama", rope_type="norm", rope_theta=500_000.0)
QWEN2 = replace(SMALL, head_count=8)  # llama.cpp wants as many query values as the embedding has
YARN, LINEAR = RopeScaling("yarn", 4.0, original_context=16), RopeScaling("linear", 4.0)
MODELS: dict[str, tuple[ModelConfig, TokenizerData]] = {
    "qwen3": (replace(SMALL, architecture="qwen3"), bpe_data("qwen2")),
    "llama 3": (replace(LLAMA, rope_factors=True, tied_embeddings=True), bpe_data("llama-bpe")),
    "llama 2": (replace(LLAMA, rope_theta=10_000.0), pieces_data()),
    "mistral": (replace(LLAMA, head_dim=64, head_count=2, head_count_kv=1), bpe_data("tekken")),
    "smollm": (LLAMA, bpe_data("smollm")),
    "qwen2, yarn": (replace(QWEN2, rope_scaling=YARN), bpe_data("qwen2")),
    "qwen2, yarn, betas": (replace(QWEN2, rope_scaling=replace(YARN, attention_factor=1.5, beta_fast=4.0)), bpe_data("qwen2")),
    "qwen2, linear": (replace(QWEN2, rope_scaling=RopeScaling("linear", 3.0)), bpe_data("deepseek-r1-qwen")),
    "qwen3, yarn": (replace(SMALL, architecture="qwen3", rope_scaling=YARN), bpe_data("qwen2")),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_ids_and_tokens_are_llama_cpps(tmp_path: Path, what: str) -> None:
    config, data = MODELS[what]
    path = write_gguf(made_model(config, data), tmp_path / "m.gguf")
    said = llama_says(path, TEXT)
    assert "refused" not in said, said
    session = Session(open_model(path))
    ids = session.raw_tokens(TEXT)
    assert ids == said["ids"]
    assert session.generate(ids, max_tokens=len(said["answer"])).tokens == said["answer"]


def test_llama_cpp_ignores_the_window_of_a_mistral(tmp_path: Path) -> None:
    """The catalogue's `sliding-window-ignored`, as a real program has it: its tokens are those of attention without a window."""
    path = write_gguf(made_model(replace(LLAMA, sliding_window=4), bpe_data("llama-bpe")), tmp_path / "m.gguf")
    said = llama_says(path, TEXT)
    assert "refused" not in said, said
    session = Session(open_model(path))
    of_window = session.generate(said["ids"], max_tokens=len(said["answer"])).tokens
    unbounded = session_with(open_model(path), ["sliding-window-ignored"])
    assert unbounded.generate(said["ids"], max_tokens=len(said["answer"])).tokens == said["answer"] != of_window


@pytest.mark.parametrize(
    ("scaling", "positions"), [(YARN, 2_000), (LINEAR, 2_000), (YARN, 12_000)], ids=["yarn", "linear", "yarn, 12,000"]
)
def test_tokens_at_long_positions_are_llama_cpps(tmp_path: Path, scaling: RopeScaling, positions: int) -> None:
    """Where the model was trained on a few positions: an ignored scaling gives other tokens."""
    config = replace(QWEN2, block_count=1, context_length=2 * positions, rope_scaling=scaling)
    path = write_gguf(made_model(config), tmp_path / "m.gguf")
    text = "hello world return self print 2024 " * (positions // 15 + 2)
    said = llama_says(path, text)
    assert "refused" not in said, said
    session = Session(open_model(path), engine="jit")
    assert session.raw_tokens(text) == said["ids"]
    assert positions < len(said["ids"]) < positions + 100
    assert session.generate(said["ids"], max_tokens=len(said["answer"])).tokens == said["answer"]
    if positions > 2_000:
        return
    plain = Session(session.engine, config=replace(session.config, rope_scaling=None))
    assert plain.generate(said["ids"], max_tokens=len(said["answer"])).tokens != said["answer"]


@pytest.mark.parametrize("what", ["qwen3", "llama 3", "llama 2", "qwen2, yarn"])
def test_every_trace_point_is_llama_cpps(tmp_path: Path, what: str) -> None:
    """In float32 throughout, so that one wrong operation shows at its own point."""
    path = write_gguf(made_model(*MODELS[what]), tmp_path / "m.gguf")
    session = Session(open_model(path))
    ids = session.raw_tokens(TEXT)
    ours = trace(session, ids)
    with LlamaSource(path, cache="f32") as source:
        theirs = source.run(ids)
    assert list(theirs) == list(ours)
    for name in ours:
        far = np.linalg.norm(ours[name].values - theirs[name].values) / np.linalg.norm(ours[name].values)
        assert far < 1e-5, name
