"""Marks of encoders: healthy files have them, whoever encoded; each dies on the fault it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprlab import paths
from aprlab.conversion.converter import convert
from aprlab.formats import open_model
from aprlab.model.tensor import Tensor
from aprlab.onion.block_marks import NULLS, marks_of, unlikely
from aprlab.quants import REGISTRY, types

REF = paths.embedded_model()


def test_every_mark_is_measured_and_healthy_in_the_embedded_model(tmp_path: Path) -> None:
    marks = marks_of(open_model(REF).tensors.values())
    for kind in ("q4_k", "q5_k", "q8_0"):  # this project's encoder
        convert(REF, tmp_path / f"{kind}.apr", quantize=kind)
        marks += marks_of(open_model(tmp_path / f"{kind}.apr").tensors.values())
    assert {mark.name for mark in marks} == set(NULLS)
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
        (_smaller, types.Q6_K, {"largest-scale-128"}),
    ],
)
def test_a_mark_dies_on_the_fault_it_is_for(edit: Any, kind: Any, dead: set[str]) -> None:
    found = unlikely(_edited(kind, edit))
    assert dead <= {mark.name for mark in found}
    assert {mark.type for mark in found} == {kind}


def test_numbers_that_do_not_use_their_range_are_unlikely(tmp_path: Path) -> None:
    convert(REF, tmp_path / "q.apr", quantize="q8_0")
    tensor = open_model(tmp_path / "q.apr").tensors["blk.0.ffn_up.weight"]
    raw = np.array(tensor.raw)
    raw.view(REGISTRY[types.Q8_0].layout)["qs"] //= 2
    assert [mark.name for mark in unlikely([tensor.replace(content=raw)])] == ["largest-number-127"]
    assert unlikely([tensor]) == []


def test_the_real_model_has_all_marks() -> None:
    path = paths.models_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if not path.is_file():
        pytest.skip("the real 0.5B is not here")
    assert unlikely(open_model(path).tensors.values()) == []
