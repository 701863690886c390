"""Two faults at once: they compose, and some mask each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from differences import box, differences
from faulty_files import EXPECTED, Healthy, contents
from faulty_runs import QUESTION, answer

from aprlab import quants
from aprlab.faults import FAULTS, convert_with, session_with
from aprlab.model.model import Model
from aprlab.tracing.traces import trace


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("GH-190", "GH-191"), ("GH-191", "lost-qkv-biases"), ("raw-names", "dims-swapped"), ("swapped-gate-up", "GH-190"),
        ("rope-theta", "no-merges"), ("truncated", "GH-186"), ("wrong-norm", "zeroed-norm"),
        ("offset-shifted", "swapped-layers"),
    ],
)  # fmt: skip
def test_file_faults_compose(first: str, second: str, healthy: Healthy, model: Model, tmp_path: Path) -> None:
    """A pair differs where either alone does: kinds of both, names of both."""
    convert_with(model, tmp_path / "pair.apr", [first, second])
    seen = differences(healthy(FAULTS[first]), box(tmp_path / "pair.apr"))
    for id in (first, second):
        expected = EXPECTED.get(id, {"problems": {"ends at"}})
        for kind, found in expected.items():
            assert found <= seen.get(kind, set()), (id, kind)


def test_exchanges_follow_the_names_whatever_their_generation(healthy: Healthy, model: Model, tmp_path: Path) -> None:
    for order in (["GH-190", "swapped-gate-up"], ["swapped-gate-up", "GH-190"]):
        convert_with(model, tmp_path / "x.apr", order, force=True)
        found = {entry.name: entry for entry in box(tmp_path / "x.apr").entries}
        right = healthy(FAULTS["GH-190"])
        gate = box(tmp_path / "x.apr").bytes_of(found["layers.2.mlp.gate_proj.weight"]).tobytes()
        assert gate == contents(right, "blk.2.ffn_up.weight")


def test_two_bugs_that_mask_each_other(model: Model) -> None:
    """Rows permuted as for Llama, and NORM rotation: each alone is garbage, together they are right."""
    session = session_with(model, [])
    ids = session.prompt_tokens(QUESTION)[-8:]
    right = trace(session, ids, "logits").points["logits"].values
    both = trace(session_with(model, ["permuted-qk", "rope-norm"]), ids, "logits").points["logits"].values
    assert np.allclose(right, both, atol=1e-3 * np.abs(right).max())
    for alone in ("permuted-qk", "rope-norm"):
        wrong = trace(session_with(model, [alone]), ids, "logits").points["logits"].values
        assert np.linalg.norm(wrong - right) > 0.1 * np.linalg.norm(right)


def test_run_faults_compose(model: Model) -> None:
    session = session_with(model, ["lost-q-biases", "lost-k-biases", "lost-v-biases"])
    assert answer(session) == answer(session_with(model, ["lost-qkv-biases"]))
    both = session_with(model, ["byte-level-text", "eos-hard-coded", "wrong-pre-tokeniser"])
    assert "<|im_end|>" in answer(both)
    assert "Ġ" in answer(both)


def test_decoder_faults_compose_on_one_type(model: Model) -> None:
    """Both steps are replaced: the pair is neither of the two."""
    tensor = model.tensors["blk.0.attn_k.weight"]

    def values(*ids: str) -> np.ndarray:
        registry = quants.REGISTRY
        for id in ids:
            change = FAULTS[id].registry
            assert change is not None
            registry = change(registry)  # type: ignore[assignment]
        return quants.dequantise(tensor.raw, tensor.type, tensor.shape, registry=registry)

    pair = values("q4k-min-lost", "q4k-nibble-pairs")
    assert np.array_equal(pair, values("q4k-nibble-pairs", "q4k-min-lost"))
    assert (pair >= 0).all()
    assert not np.array_equal(pair, values("q4k-min-lost"))
