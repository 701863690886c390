"""The right name: ids for GGUF files as for APR files, and only where they explain the bytes better than all others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from comparison_files import REF, file_with
from variants import variant

from aprlab import quants
from aprlab.conversion.converter import convert
from aprlab.faults import FAULTS, convert_with
from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion.layers._misreads import misreads
from aprlab.onion.peeling import peel
from aprlab.quants import types

TWINS = ["permuted-qk", "swapped-gate-up", "q4k-min-lost", "transposed-embedding", "zeroed-norm"]


@pytest.mark.parametrize("id", TWINS)
def test_a_gguf_twin_has_the_id_of_its_apr_case(id: str, tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "fault.apr", [id])
    with open_model(tmp_path / "fault.apr") as model:
        path = variant(REF, tmp_path / "twin.gguf", tensors=model.tensors)
    verdict = peel(REF, path, fast=True)
    assert (verdict.verdict, verdict.faults) == ("broken", [id]), str(verdict)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert found.evidence["reproduces_the_file"] is True


def test_one_tensor_scaled_among_decoded_ones(tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"

    def scaled(tensor: Tensor) -> Tensor:
        raw = (tensor.dequantise() * np.float32(1.02)).view(np.uint8).reshape(-1)
        return tensor.replace(raw=raw) if tensor.name == name else tensor

    convert_with(REF, tmp_path / "f32.apr", ["default-dequantise"])
    with open_model(tmp_path / "f32.apr") as model:
        changed = scaled(model.tensors[name])
        where = model.tensors[name].origin.offset
    data = bytearray((tmp_path / "f32.apr").read_bytes())
    data[where : where + changed.nbytes] = changed.raw.tobytes()
    (tmp_path / "scaled.apr").write_bytes(data)
    verdict = peel(REF, tmp_path / "scaled.apr")
    assert "default-dequantise" in verdict.faults
    assert "GH-186" not in verdict.faults
    weights = [f for f in verdict.findings if f.layer == "weights"]
    assert [(f.code, f.tensors, f.parameters["by"]) for f in weights] == [("weights.scaled", [name], 1.02)], str(verdict)


@pytest.mark.parametrize("how", ["nibbles and fifth bits in pairs", "nibbles in pairs, each with its own fifth bit"])
def test_q5_0_decoded_in_pairs_and_kept(how: str, tmp_path: Path) -> None:
    (misread,) = [m for m in misreads() if m.how == how and m.kind is types.Q5_0]

    def kept(tensor: Tensor) -> Tensor:
        raw = quants.quantise(tensor.dequantise(), types.Q5_0).reshape(-1)
        values = misread.decode(raw, tensor.shape)
        return Tensor(tensor.name, types.F32, tensor.shape, values.view(np.uint8).reshape(-1), tensor.origin)

    names = ["blk.0.ffn_up.weight", "blk.1.attn_k.weight", "blk.2.ffn_down.weight"]
    verdict = peel(REF, file_with(tmp_path / "misread.gguf", dict.fromkeys(names, kept)), fast=True)
    (found,) = [f for f in verdict.findings if not f.harmless]
    assert (found.layer, sorted(found.tensors)) == ("decode", sorted(names))
    assert found.parameters == {"type": "Q5_0", "how": how, "after": "F32"}


def test_healthy_twins_have_no_id(tmp_path: Path) -> None:
    convert(REF, tmp_path / "good.apr")
    with open_model(tmp_path / "good.apr") as model:
        path = variant(REF, tmp_path / "good.gguf", tensors=model.tensors, reverse=True)
    assert peel(REF, path, fast=True).faults == []
    assert "GH-186" in FAULTS
