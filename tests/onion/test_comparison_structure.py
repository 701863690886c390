"""Words of structure: circles of layers, shifts, copies, heads; keys that may be missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, file_with
from variants import variant

from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion.peeling import peel
from aprlab.onion.verdict import Finding


def moved(tmp_path: Path, part: str, sources: dict[int, int]) -> Finding:
    """The one finding where layers hold the part of other layers: layer -> whose it holds."""
    with open_model(REF) as model:
        found = {f"blk.{n}.{part}": model.tensors[f"blk.{m}.{part}"].replace(name=f"blk.{n}.{part}") for n, m in sources.items()}
        verdict = peel(REF, variant(REF, tmp_path / "moved.gguf", tensors=found), fast=True)
    (finding,) = [f for f in verdict.findings if not f.harmless]
    return finding


def test_three_layers_in_a_circle_are_one_circle(tmp_path: Path) -> None:
    finding = moved(tmp_path, "attn_q.weight", {2: 0, 3: 2, 0: 3})
    assert (finding.code, finding.parameters) == ("naming.layers-rotated", {"layers": [0, 2, 3]})


def test_two_layers_exchanged_stay_an_exchange(tmp_path: Path) -> None:
    assert moved(tmp_path, "attn_q.weight", {1: 2, 2: 1}).code == "naming.layers-exchanged"


def test_biases_shifted_by_a_layer_are_one_sentence(tmp_path: Path) -> None:
    finding = moved(tmp_path, "attn_v.bias", {1: 0, 2: 1, 3: 2, 4: 3})
    assert (finding.code, finding.parameters) == ("naming.layers-shifted", {"part": "attn_v.bias", "by": 1}), str(finding)


def test_a_copied_layer_names_both(tmp_path: Path) -> None:
    finding = moved(tmp_path, "ffn_up.weight", {3: 1})
    assert finding.code == "weights.bytes-of-another-layer"
    assert finding.parameters == {"part": "ffn_up.weight", "layer": 3, "other": 1}


@pytest.mark.parametrize("part", ["attn_q.weight", "attn_q.bias"])
def test_exchanged_heads_are_named(part: str, tmp_path: Path) -> None:
    with open_model(REF) as model:
        heads = model.config.head_count

    def exchanged(tensor: Tensor) -> Tensor:
        raw = np.array(tensor.raw).reshape(heads, -1)
        raw[[0, 1]] = raw[[1, 0]]
        return tensor.replace(raw=raw.reshape(-1))

    verdict = peel(REF, file_with(tmp_path / "heads.gguf", {f"blk.2.{part}": exchanged}), fast=True)
    (finding,) = verdict.findings
    assert (finding.layer, finding.code) == ("layout", "layout.heads-reordered"), str(finding)
    assert finding.parameters == {"heads": ["1 in place of 0", "0 in place of 1"], "of": heads}


@pytest.mark.parametrize("keys", [("tokenizer.ggml.bos_token_id",), ("tokenizer.ggml.add_bos_token",)])
def test_keys_about_a_start_that_nothing_uses_may_be_missing(keys: tuple[str, ...], tmp_path: Path) -> None:
    full = variant(REF, tmp_path / "full.gguf", keys={"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": False})
    verdict = peel(full, variant(full, tmp_path / "less.gguf", drop=keys), fast=True)
    assert verdict.exit_code == 0, str(verdict)
    true = variant(full, tmp_path / "true.gguf", keys={"tokenizer.ggml.add_bos_token": True})
    assert peel(full, true, fast=True).verdict == "broken", "a start that is put in front of texts is no small thing"
