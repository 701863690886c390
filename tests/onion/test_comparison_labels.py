"""A lawful float label is never overruled by looks; looks decide only against a reading that no model can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, as_type, file_with

from aprlab import quants
from aprlab.conversion.converter import export
from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.gates.repairs import repair
from aprlab.onion.looks import by_looks, looks_of
from aprlab.onion.peeling import peel
from aprlab.quants import types
from aprlab.quants.types import TensorType

NORMS = ["output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"]
BIASES = ["blk.0.attn_q.bias", "blk.1.attn_k.bias", "blk.2.attn_v.bias"]


@pytest.mark.parametrize("kind", [types.F16, types.BF16], ids=str)
@pytest.mark.parametrize("names", [NORMS, BIASES], ids=["norms", "biases"])
def test_vectors_of_16_bits_are_healthy(kind: TensorType, names: list[str], tmp_path: Path) -> None:
    path = file_with(tmp_path / "vectors.gguf", {name: lambda t: as_type(t, kind) for name in names})
    alone = peel(None, path, fast=True)
    assert (alone.exit_code in (0, 4), alone.findings) == (True, []), str(alone)
    with pytest.raises(UsageError, match="nothing to repair"):
        repair(path, tmp_path / "repaired.apr")
    verdict = peel(REF, path)
    assert verdict.verdict == "equivalent", str(verdict)
    assert {f.code for f in verdict.findings} == {"dtype.file-rounded"}


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_own_exports_are_healthy(dtype: str, tmp_path: Path) -> None:
    export(REF, tmp_path / dtype, format="safetensors", dtype=dtype)
    verdict = peel(None, tmp_path / dtype)
    assert verdict.exit_code == 0, str(verdict)
    assert not verdict.findings


def blocks(kind: TensorType) -> tuple[np.ndarray, tuple[int, ...]]:
    with open_model(REF) as model:
        tensor = model.tensors["blk.0.ffn_down.weight"]
        return quants.quantise(tensor.dequantise(), kind).reshape(-1), tensor.shape


SAME_WIDTH = [types.Q4_K, types.Q4_0, types.APR_Q4]


def test_a_label_whose_reading_is_absurd_gives_way() -> None:
    raw, shape = blocks(types.Q4_K)
    for label in (types.Q4_0, types.APR_Q4):
        chosen, figures = by_looks(raw, shape, SAME_WIDTH, label)
        assert chosen is types.Q4_K
        assert figures[label.name].absurd and figures["Q4_K"].trained
    assert by_looks(raw, shape, SAME_WIDTH, types.Q4_K)[0] is None, "what is not absurd stands"


def test_looks_do_not_tell_two_trained_readings_apart() -> None:
    raw, shape = blocks(types.Q4_0)
    assert by_looks(raw, shape, SAME_WIDTH, types.Q4_K)[0] is None, "Q4_0 and AprQ4 both look trained"
    assert by_looks(raw, shape, [types.Q4_0, types.Q4_K], types.Q4_K)[0] is types.Q4_0


@pytest.mark.parametrize(("held", "label"), [(types.F16, types.BF16), (types.BF16, types.F16)], ids=str)
def test_a_float_label_stands_however_it_looks(held: TensorType, label: TensorType) -> None:
    raw, shape = blocks(held)
    assert by_looks(raw, shape, [types.F16, types.BF16], label) == (None, {})
    looks = looks_of(raw, shape, held)
    assert looks is not None and looks.trained
