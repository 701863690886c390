"""Marks of encoders: healthy files have them, whoever encoded; each dies on the fault it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.conversion.recode import re_encoded
from aprlab.faults import convert_with
from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion.block_marks import marks_of, nulls, unlikely
from aprlab.onion.order_marks import order_marks
from aprlab.quants import REGISTRY, types

REF = paths.embedded_model()


def encoded(kind: Any, *names: str) -> list[Tensor]:
    """Matrices of the embedded model, encoded anew by this project."""
    tensors = open_model(REF).tensors
    made = [re_encoded(tensors[name], kind) for name in names]
    return [tensor.replace(content=np.asarray(tensor.raw)) for tensor in made]


def test_every_mark_is_measured_and_healthy_in_the_embedded_model() -> None:
    marks = marks_of(open_model(REF).tensors.values())
    for kind in (types.Q4_K, types.Q5_K, types.Q8_0, types.Q4_0, types.Q5_0, types.Q4_1):  # this project's encoder
        marks += marks_of(encoded(kind, "blk.0.ffn_up.weight", "blk.3.ffn_down.weight", "blk.5.attn_output.weight"))
    assert {mark.name for mark in marks} == set(nulls())
    assert [str(mark) for mark in marks if not mark.likely] == []


def _edited(kind: Any, edit: Any) -> list[Tensor]:
    tensors = []
    for tensor in open_model(REF).tensors.values():
        if tensor.type is kind and len(tensor.shape) == 2:
            raw = np.array(tensor.raw)
            edit(raw.view(REGISTRY[kind].layout))
            tensor = tensor.replace(content=raw)
        tensors.append(tensor)
    return tensors


def _exchange(b: np.ndarray) -> None:
    b["d"], b["dmin"] = b["dmin"].copy(), b["d"].copy()


def _top_bits(b: np.ndarray) -> None:
    b["scales"][:, :8] &= 63


def _zero_minimum(b: np.ndarray) -> None:
    b["dmin"] = 0


def _plain(b: np.ndarray) -> None:
    b["scales"] = np.roll(b["scales"], 4, axis=1)


def _one_scale(b: np.ndarray) -> None:
    b["scales"][:, 1] = b["scales"][:, 0]
    b["scales"][:, 3] = b["scales"][:, 2]
    b["scales"][:, 9] = b["scales"][:, 8]
    b["scales"][:, 11] = b["scales"][:, 10]


def _low_only(b: np.ndarray) -> None:
    b["qs"] &= 15


def _minima_as_scales(b: np.ndarray) -> None:
    quant = REGISTRY[types.Q4_K]
    scales, minima = quant.unpack_scales(b["scales"])
    b["scales"] = quant.pack_scales(np.hstack([scales[:, :4], minima[:, :4]]), minima)


def _flushed(b: np.ndarray) -> None:
    b["d"][::2] = 0


def _raised(b: np.ndarray) -> None:
    b["d"][::2] = 2.0**-14


def _smaller(b: np.ndarray) -> None:
    b["scales"] //= 2


@pytest.mark.parametrize(
    ("edit", "kind", "dead"),
    [
        (_exchange, types.Q4_K, {"dmin-over-d"}),
        (_top_bits, types.Q4_K, {"late-over-early-scales", "late-over-early-minima"}),
        (_zero_minimum, types.Q4_K, {"dmin-not-zero"}),
        (_plain, types.Q4_K, {"largest-scale-63", "largest-minimum-63"}),
        (_one_scale, types.Q4_K, {"paired-scales-equal"}),
        (_low_only, types.Q4_K, {"nibbles-alike"}),
        (_minima_as_scales, types.Q4_K, {"late-scales-are-early-minima"}),
        (_flushed, types.Q4_K, {"zero-scale-with-numbers"}),
        (_raised, types.Q6_K, {"scale-at-smallest-normal"}),
        (_smaller, types.Q6_K, {"largest-scale-128"}),
    ],
)
def test_a_mark_dies_on_the_fault_it_is_for(edit: Any, kind: Any, dead: set[str]) -> None:
    found = unlikely(_edited(kind, edit))
    assert dead <= {mark.name for mark in found}
    assert {mark.type for mark in found} == {kind}


def test_numbers_that_do_not_use_their_range_are_unlikely() -> None:
    (tensor,) = encoded(types.Q8_0, "blk.0.ffn_up.weight")
    raw = np.array(tensor.raw)
    raw.view(REGISTRY[types.Q8_0].layout)["qs"] //= 2
    assert [mark.name for mark in unlikely([tensor.replace(content=raw)])] == ["largest-number-127"]
    assert unlikely([tensor]) == []


@pytest.mark.parametrize(("kind", "name"), [(types.Q4_0, "lowest-number-present"), (types.Q4_1, "both-ends-present")])
def test_numbers_that_never_reach_an_end_are_unlikely(kind: Any, name: str) -> None:
    (tensor,) = encoded(kind, "blk.0.ffn_up.weight")
    raw = np.array(tensor.raw)
    raw.view(REGISTRY[tensor.type].layout)["qs"] |= 0x11
    assert [mark.name for mark in unlikely([tensor.replace(content=raw)])] == [name]
    assert unlikely([tensor]) == []


# ── marks of order ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("id", "dead"),
    [
        ("swapped-k-v", "keys-over-values"), ("swapped-gate-up", "up-follows-down"), ("GH-202", "channels-agree"),
        ("transposed-embedding", "embedding-has-channels"), ("lm-head-transposed", "head-has-channels"),
    ],
)  # fmt: skip
def test_a_mark_of_order_dies_on_the_fault_that_it_suggests(id: str, dead: str, tmp_path: Path) -> None:
    convert_with(REF, tmp_path / "b.apr", [id])
    odd = {mark.name: mark for mark in order_marks(open_model(tmp_path / "b.apr").tensors) if not mark.likely}
    assert dead in odd and id in odd[dead].suggests


@pytest.mark.parametrize("kind", ["q2_k", "q4_0"])
def test_marks_of_order_outlive_every_encoding(kind: str, tmp_path: Path) -> None:
    marks = order_marks(open_model(REF).tensors)
    assert {mark.name for mark in marks} == {
        "channels-agree", "up-follows-down", "keys-over-values", "embedding-has-channels", "head-has-channels"
    }  # fmt: skip
    convert(REF, tmp_path / "q.apr", quantize=kind)
    assert [str(m) for m in [*marks, *order_marks(open_model(tmp_path / "q.apr").tensors)] if not m.likely] == []


def test_the_real_model_has_all_marks() -> None:
    path = paths.models_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if not path.is_file():
        pytest.skip("the real 0.5B is not here")
    tensors = open_model(path).tensors
    assert unlikely(tensors.values()) == []
    assert [str(mark) for mark in order_marks(tensors) if not mark.likely] == []
