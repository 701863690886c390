"""File faults: what differs from the healthy file, and that nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from differences import box, by_gguf, differences
from faulty_files import BIASES, CODES, ELSEWHERE, EXPECTED, HEAD, NORM, E, Healthy, Source, contents

from aprlab import quants
from aprlab.errors import FormatError, UsageError
from aprlab.faults import FAULTS, OTHER_ARCHITECTURES, convert_with, file_faults, layout, naming
from aprlab.formats import open_model
from aprlab.model import names
from aprlab.model.model import Model

GIVEN = [id for id, fault in file_faults().items() if fault.given.get("quantize", "q5k") not in ("q5k", "q3k")]  # slow ones


@pytest.mark.parametrize("id", sorted(GIVEN))
@pytest.mark.filterwarnings("ignore:unknown dtype")
def test_with_what_is_given_a_fault_shows_on_any_model(id: str, model: Model, tmp_path: Path) -> None:
    """`convert --quantize …` as the catalogue says is enough; a fault that changes nothing would be refused."""
    with pytest.raises(UsageError, match="changes nothing here; it needs"):
        convert_with(model, tmp_path / "x.apr", [id])
    report = convert_with(model, tmp_path / "x.apr", [id], **FAULTS[id].given)
    assert report.notes[-1].startswith(f"fault {id}: ")


def test_every_file_fault_is_expected() -> None:
    assert set(EXPECTED) | ELSEWHERE == set(file_faults()) - OTHER_ARCHITECTURES


@pytest.mark.parametrize("id", sorted(EXPECTED))
def test_a_file_fault_changes_this_and_nothing_else(id: str, healthy: Healthy, broken: Callable[[str], Path]) -> None:
    assert differences(healthy(FAULTS[id]), box(broken(id))) == EXPECTED[id]


@pytest.mark.parametrize("id", sorted(CODES))
def test_dtype_bytes_are_those_of_the_record(id: str, healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = by_gguf(healthy(FAULTS[id])), by_gguf(box(broken(id)))
    assert {(right[n][0].code, wrong[n][0].code) for n in right} == set(CODES[id].items())


@pytest.mark.parametrize(
    ("id", "pairs"),
    [
        ("swapped-q-k", [("attn_q.weight", "attn_k.weight"), ("attn_q.bias", "attn_k.bias")]),
        ("swapped-k-v", [("attn_k.weight", "attn_v.weight"), ("attn_k.bias", "attn_v.bias")]),
        ("swapped-gate-up", [("ffn_gate.weight", "ffn_up.weight")]),
    ],
)
def test_swapped_names(id: str, pairs: list[tuple[str, str]], healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = healthy(FAULTS[id]), box(broken(id))
    for layer in (0, 3):
        for a, b in pairs:
            assert contents(right, f"blk.{layer}.{a}") == contents(wrong, f"blk.{layer}.{b}")
            assert contents(right, f"blk.{layer}.{b}") == contents(wrong, f"blk.{layer}.{a}")


def test_swapped_layers_are_one_and_two(healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = healthy(FAULTS["swapped-layers"]), box(broken("swapped-layers"))
    for name in by_gguf(right):
        other = name.replace("blk.1.", "blk.X.").replace("blk.2.", "blk.1.").replace("blk.X.", "blk.2.")
        assert contents(wrong, other) == contents(right, name)


@pytest.mark.parametrize(
    ("id", "zeros"),
    [("lost-qkv-biases", BIASES), ("zero-lm-head", {HEAD}), ("zeroed-norm", {NORM})],
)
def test_zeros_are_zeros(id: str, zeros: set[str], healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = healthy(FAULTS[id]), box(broken(id))
    changed = [n for n in by_gguf(right) if contents(right, n) != contents(wrong, n)]
    assert {names.template_of(n) for n in changed} == zeros
    assert not any(any(contents(wrong, n)) for n in changed)
    assert id != "zeroed-norm" or changed == ["blk.1.attn_norm.weight"]


def test_fused_biases_are_theirs_in_a_row(healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = healthy(FAULTS["fused-biases"]), box(broken("fused-biases"))
    three = b"".join(contents(right, f"blk.3.attn_{x}.bias") for x in "qkv")
    assert sorted_floats(contents(wrong, "model.layers.3.self_attn.qkv_proj.bias")) == sorted_floats(three)
    assert contents(right, "blk.3.attn_q.bias") in contents(wrong, "model.layers.3.self_attn.qkv_proj.bias")


def sorted_floats(raw: bytes) -> list[float]:
    return sorted(np.frombuffer(raw, "<f4").tolist())


def test_a_binary_search_misses_most_of_an_unsorted_index(healthy: Healthy, broken: Callable[[str], Path]) -> None:
    listed = [entry.name for entry in healthy(FAULTS["unsorted-index"]).entries]
    unsorted = [entry.name for entry in box(broken("unsorted-index")).entries]
    assert naming.found_by_binary_search(listed) == listed
    assert sorted(unsorted) == sorted(listed)
    assert len(naming.found_by_binary_search(unsorted)) < len(listed) // 2


def test_the_made_up_head_is_the_embedding(healthy: Healthy, broken: Callable[[str], Path]) -> None:
    assert contents(box(broken("tied-lm-head")), HEAD) == contents(healthy(FAULTS["tied-lm-head"]), E)


def test_wrong_norm_is_the_other_one(healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = healthy(FAULTS["wrong-norm"]), box(broken("wrong-norm"))
    assert contents(wrong, "blk.3.attn_norm.weight") == contents(right, "blk.3.ffn_norm.weight")


def test_a_cut_file_is_the_beginning_of_the_whole_one(healthy: Healthy, broken: Callable[[str], Path]) -> None:
    whole, cut = healthy(FAULTS["truncated"]).path.read_bytes(), broken("truncated").read_bytes()
    assert cut == whole[: len(whole) * 955 // 1000]
    with pytest.raises(FormatError, match="the data ends at"):
        open_model(broken("truncated"))


def test_default_dequantise_has_the_values_to_the_last_bit(model: Model, broken: Callable[[str], Path]) -> None:
    found = open_model(broken("default-dequantise"))
    assert set(found.by_type()) == {"F32"}
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.2.ffn_down.weight"):
        assert np.array_equal(found.tensors[name].dequantise(), model.tensors[name].dequantise())


def test_a_warning_is_all_the_warned_one_adds(source: Source, tmp_path: Path, broken: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="unknown dtype Q5_0, writing F32"):
        convert_with(source(FAULTS["unknown-to-f32-warned"]), tmp_path / "x.apr", ["unknown-to-f32-warned"])
    assert (tmp_path / "x.apr").read_bytes() == broken("unknown-to-f32").read_bytes()


def test_transposition_leaves_every_order_blind_statistic(model: Model, tmp_path: Path) -> None:
    convert_with(model, tmp_path / "right.apr", [], quantize="f32")
    convert_with(model, tmp_path / "wrong.apr", ["GH-202"], quantize="f32")
    right, wrong = open_model(tmp_path / "right.apr"), open_model(tmp_path / "wrong.apr")
    for name in ("blk.1.ffn_down.weight", "blk.1.attn_k.weight", "blk.1.attn_q.weight"):
        x, y = right.tensors[name].dequantise(), wrong.tensors[name].dequantise()
        assert np.array_equal(y.reshape(x.shape[::-1]), x.T)
        assert np.array_equal(np.sort(x, axis=None), np.sort(y, axis=None))
        assert abs(np.corrcoef(x.reshape(-1), y.reshape(-1))[0, 1]) < 0.1


def test_transposed_blocks_are_the_transposes_encoded_again(model: Model, broken: Callable[[str], Path]) -> None:
    found = open_model(broken("GH-202"))
    for name in ("blk.1.ffn_down.weight", "blk.1.attn_k.weight"):
        tensor = model.tensors[name]
        again = quants.quantise(layout.transposed(tensor.dequantise()), tensor.type)
        assert np.array_equal(found.tensors[name].raw, again.reshape(-1))


def test_double_reversal_is_the_transpose_consistently(model: Model, broken: Callable[[str], Path]) -> None:
    found = open_model(broken("double-reversal"))
    for name in ("blk.1.ffn_down.weight", "blk.1.attn_k.weight", "token_embd.weight"):
        x, y = model.tensors[name].dequantise(), found.tensors[name].dequantise()
        assert y.shape == x.shape[::-1]
        assert np.corrcoef(x.T.reshape(-1), y.reshape(-1))[0, 1] > 0.98


def test_permuted_rows_are_llamas(model: Model, broken: Callable[[str], Path]) -> None:
    found, config = open_model(broken("permuted-qk")), model.config
    for name, heads in (("attn_q", config.head_count), ("attn_k", config.head_count_kv)):
        for kind in ("weight", "bias"):
            x, y = (m.tensors[f"blk.1.{name}.{kind}"].dequantise() for m in (model, found))
            apart = x.reshape(heads, 2, config.head_dim // 2, -1)
            assert np.array_equal(y.reshape(heads, config.head_dim // 2, 2, -1), apart.swapaxes(1, 2))
