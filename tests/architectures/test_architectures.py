"""Qwen3, Llama and scaled rotation against the independent float64 pass; what each layer needs is needed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import CONFIG, random_model
from oracle import Oracle, logits_and_tolerance

import aprlab
from aprlab import engines
from aprlab.architectures import PASSES, check, forward, points
from aprlab.engines.reference import ReferenceEngine
from aprlab.errors import FormatError, UnsupportedError
from aprlab.model import names
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import shapes
from aprlab.model.model import Model
from aprlab.model.rope import FACTORS, RopeScaling
from aprlab.model.tensor import Tensor

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, CONFIG.vocab_size, 13)]
SMALL = replace(CONFIG, block_count=2)
YARN, LINEAR = RopeScaling("yarn", 4.0, original_context=16), RopeScaling("linear", 3.0)
CONFIGS: dict[str, ModelConfig] = {
    "qwen3": replace(SMALL, architecture="qwen3"),
    "llama": replace(SMALL, architecture="llama", rope_type="norm"),
    "llama 3": replace(SMALL, architecture="llama", rope_type="norm", rope_factors=True, tied_embeddings=True),
    "qwen2, yarn": replace(SMALL, rope_scaling=YARN),
    "qwen2, linear": replace(SMALL, rope_scaling=LINEAR),
    "qwen3, yarn": replace(SMALL, architecture="qwen3", rope_scaling=replace(YARN, attention_factor=1.25, beta_fast=8.0)),
    "mistral": replace(SMALL, architecture="llama", rope_type="norm", sliding_window=5),
    "qwen2, window": replace(SMALL, sliding_window=9),
    "llama, linear": replace(SMALL, architecture="llama", rope_type="norm", rope_scaling=LINEAR),
}  # fmt: skip


def run(engine: engines.Engine, config: ModelConfig, chunks: tuple[int, ...] = (13,), **kw: Any) -> np.ndarray:
    cache, start, out = engine.new_cache(config, len(TOKENS)), 0, []
    for count in chunks:
        out.append(engine.to_numpy(forward(engine, config, TOKENS[start : start + count], cache, **kw)))
        start += count
    return np.concatenate(out)


@pytest.mark.parametrize("what", CONFIGS)
def test_logits_are_those_of_float64(what: str) -> None:
    config = CONFIGS[what]
    model = random_model(3, config)
    check(model, config)
    logits, tolerance = logits_and_tolerance(model, config, TOKENS)
    assert tolerance < 1e-3 * np.abs(logits).max()  # or it would forgive anything
    for name in ("reference", "jit"):
        engine = engines.create(name, model)
        assert np.abs(run(engine, config) - logits).max() <= tolerance, name
        assert np.abs(run(engine, config, (5, 1, 7)) - logits).max() <= tolerance, name


def test_the_kernels_of_the_gpu_do_it_too() -> None:
    """On the PTX machine, one layer of each architecture; the table of angles carries every scaling."""
    for what in ("qwen3, yarn", "llama 3", "mistral"):
        config = replace(CONFIGS[what], block_count=1)
        if config.sliding_window is not None:
            config = replace(config, sliding_window=2)
        model = random_model(3, config)
        logits, tolerance = logits_and_tolerance(model, config, TOKENS[:3])
        engine = engines.create("ptx", model)
        found = engine.to_numpy(forward(engine, config, TOKENS[:3], engine.new_cache(config, 8)))
        assert np.abs(found - logits).max() <= 2 * tolerance, what


LOST: dict[str, tuple[str, dict[str, Any]]] = {
    "scaling ignored": ("qwen2, yarn", {"rope_scaling": None}),
    "scaling by the other rule": ("qwen2, linear", {"rope_scaling": replace(YARN, factor=3.0)}),
    "original context ignored": ("qwen2, yarn", {"rope_scaling": replace(YARN, original_context=128)}),
    "factors lost": ("llama 3", {"rope_factors": False}),
    "window ignored": ("mistral", {"sliding_window": None}),
    "window of another length": ("mistral", {"sliding_window": 4}),
    "halves rotated": ("llama", {"rope_type": "neox"}),
}


@pytest.mark.parametrize("what", LOST)
def test_what_is_lost_is_far_outside_the_tolerance(what: str) -> None:
    """And equals the truth of the config without it, so the config is obeyed and not only noticed."""
    of, change = LOST[what]
    config = CONFIGS[of]
    model = random_model(3, config)
    logits, tolerance = logits_and_tolerance(model, config, TOKENS)
    wrong = replace(config, **change)
    found = run(ReferenceEngine(model), wrong)
    assert np.abs(found - logits).max() > 100 * tolerance
    assert np.abs(found - Oracle(model, wrong).logits(TOKENS)).max() <= 2 * tolerance


class HeadsAsTheyAre(ReferenceEngine):
    """Queries and keys are not normalised."""

    def norm(self, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        return x if weight.endswith(("q_norm.weight", "k_norm.weight")) else super().norm(x, weight, eps)


def test_lost_head_norms_are_far_outside_the_tolerance() -> None:
    config = CONFIGS["qwen3"]
    model = random_model(3, config)
    logits, tolerance = logits_and_tolerance(model, config, TOKENS)
    assert np.abs(run(HeadsAsTheyAre(model), config) - logits).max() > 100 * tolerance


@pytest.mark.parametrize("what", ["qwen3", "llama 3"])
def test_every_point_fires_once_in_order_with_its_shape(what: str) -> None:
    config, seen = CONFIGS[what], []

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        seen.append((name, x.shape))
        return x

    run(ReferenceEngine(random_model(3, config)), config, tap=tap)
    assert seen == [(name, (len(TOKENS), *shape)) for name, shape in points(config).items()]


# ── as data ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_architecture_has_a_pass_and_each_pass_an_architecture() -> None:
    assert PASSES.keys() == ARCHITECTURES.keys()
    with pytest.raises(UnsupportedError, match="'gemma'; handled: 'qwen2', 'qwen3', 'llama'"):
        points(replace(CONFIG, architecture="gemma"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_a_bijection_both_ways(architecture: str) -> None:
    kind = ARCHITECTURES[architecture]
    config = replace(SMALL, architecture=architecture, rope_factors=kind.rope_factors)
    inventory = set(shapes(config))
    assert inventory - {FACTORS} == set(names.inventory(2, architecture=architecture))
    for naming in names.VARIANTS:
        written = {names.from_gguf(name, naming): name for name in inventory}
        assert len(written) == len(inventory)
        assert all(names.to_gguf(there, naming) == name for there, name in written.items())


class Asking(ReferenceEngine):
    """Notes every weight that it is asked for."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.asked: set[str] = set()

    def matrix(self, name: str, cols: int | None = None) -> Tensor:
        self.asked.add(name)
        return super().matrix(name, cols)

    def vector(self, name: str, length: int) -> Tensor:
        self.asked.add(name)
        return super().vector(name, length)


def test_a_pass_asks_for_its_inventory_and_nothing_else() -> None:
    for what, config in CONFIGS.items():
        engine = Asking(random_model(3, config))
        run(engine, config)
        assert engine.asked == set(shapes(config)), what


@pytest.mark.parametrize(
    ("what", "name", "message"),
    [("qwen3", "blk.1.attn_k_norm.weight", "has no tensor"), ("llama 3", FACTORS, "has no tensor"),
     ("llama", "blk.0.attn_v.weight", "has no tensor")],
)  # fmt: skip
def test_a_lost_tensor_is_named(what: str, name: str, message: str) -> None:
    model = random_model(3, CONFIGS[what])
    del model.tensors[name]
    with pytest.raises(FormatError, match=f"{message} '{name}'"):
        check(model, CONFIGS[what])


@pytest.mark.parametrize(("what", "other"), [("llama", "qwen2"), ("qwen2, yarn", "qwen3"), ("qwen3", "llama")])
def test_a_tensor_of_another_architecture_is_refused_by_name(what: str, other: str) -> None:
    """Under the name of an architecture that lacks some of its tensors, a model is not run without them."""
    config = replace(CONFIGS[what], architecture=other)
    with pytest.raises((FormatError, UnsupportedError), match=r"attn_(q|k)(_norm)?\.(weight|bias)"):
        check(random_model(3, CONFIGS[what]), config)


def test_nobody_takes_one_architectures_pass_for_all() -> None:
    """Whoever runs a model asks `aprlab.architectures`, which looks at the config."""
    package = Path(aprlab.__file__).parent
    one = "|".join(ARCHITECTURES)
    named = re.compile(rf"aprlab\.architectures\.({one}) import|aprlab\.architectures import ({one})")
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if named.search(path.read_text())}
    assert found == {"architectures/__init__.py"}
