"""Every fault is seen: what a file fault changes and that it changes nothing else, what a run fault does to the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from differences import box, by_gguf, differences
from hypothesis import given, settings
from hypothesis import strategies as st

from aprlab import quants
from aprlab.cli.app import run_cli
from aprlab.conversion.converter import convert
from aprlab.errors import FormatError, NumericError, UsageError
from aprlab.faults import (
    FAULTS,
    LAYERS,
    SECTIONS,
    Fault,
    by_id,
    convert_with,
    decode,
    file_faults,
    instrument_faults,
    instruments,
    layout,
    naming,
    run_faults,
    session_with,
)
from aprlab.faults.catalogue import markdown
from aprlab.faults.forward import KvStale, last_of_equals, q8_k
from aprlab.formats import open_model
from aprlab.formats.apr import Container
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model import names
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.tracing.traces import Trace, trace

ROOT = Path(__file__).parents[2]
QUESTION = "What is 2+2?"


# ── the catalogue itself ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_catalogue_is_whole() -> None:
    assert len(FAULTS) >= 45
    assert {fault.section for fault in FAULTS.values()} == set(SECTIONS)
    assert {fault.layer for fault in FAULTS.values()} == set(LAYERS)
    assert {"GH-186", "GH-190", "GH-191", "GH-202", "GH-370", "GH-438"} <= set(FAULTS)
    assert {*file_faults(), *run_faults(), *instrument_faults()} == set(FAULTS)
    assert not {*file_faults(), *run_faults()} & {*instrument_faults()}
    titles = [fault.title for fault in FAULTS.values()]
    assert len(set(titles)) == len(titles)


def test_docs_are_the_catalogue() -> None:
    found = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert found == markdown(), "run: python -m aprlab.faults.catalogue docs/faults.md"


@pytest.mark.parametrize(
    ("wrong", "near"), [("GH-19", "GH-191"), ("lost-bias", "lost-qkv-biases"), ("ropenorm", "rope-norm"), ("q4k", "q4k-min-lost")]
)
def test_an_unknown_id_is_refused_with_near_matches(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown fault '{wrong}'.*{near}"):
        by_id(wrong)


def test_ids_know_no_case_and_no_doubles(tiny: Path, tmp_path: Path) -> None:
    assert by_id("gh-191") is FAULTS["GH-191"]
    with pytest.raises(UsageError, match="named twice"):
        convert_with(tiny, tmp_path / "x.apr", ["GH-191", "gh-191"])
    assert not list(tmp_path.iterdir())


def test_a_fault_must_be_told_whole() -> None:
    good = FAULTS["GH-191"]
    for change in (
        {"story": "one line"}, {"mark": ""}, {"layer": "kernel"}, {"section": "H"}, {"seams": None},
        {"instrument": len, "ruler": "checksum"}, {"post": layout.truncate},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="fault GH-191"):
            replace(good, **change)


# ── file faults: what differs, and that nothing else does ─────────────────────────────────────────────────────────

E, HEAD, N = "token_embd.weight", "output.weight", "output_norm.weight"
Q, K, V, OUT = (f"blk.N.attn_{x}.weight" for x in ("q", "k", "v", "output"))
GATE, UP, DOWN = (f"blk.N.ffn_{x}.weight" for x in ("gate", "up", "down"))
QB, KB, VB = (f"blk.N.attn_{x}.bias" for x in "qkv")
NORM, FFN_NORM = "blk.N.attn_norm.weight", "blk.N.ffn_norm.weight"
ALL = {gguf for gguf, _ in names.PAIRS}
MATRICES = {E, HEAD, Q, K, V, OUT, GATE, UP, DOWN}
NOT_SQUARE = MATRICES - {Q, OUT}
BIASES = {QB, KB, VB}
Q4K = MATRICES - {HEAD}
Q6K = {V, DOWN, HEAD}

# id -> kind of difference -> templates of names or metadata keys; every kind that is not named must be absent.
EXPECTED: dict[str, dict[str, set[str]]] = {
    "GH-190": {"renamed": ALL - {HEAD}},
    "short-names": {"renamed": ALL - {HEAD}},
    "raw-names": {"renamed": ALL},
    "swapped-q-k": {"dims": {Q, K, QB, KB}, "size": {Q, K, QB, KB}},
    "swapped-k-v": {"code": {K, V}, "size": {K, V}, "bytes": {K, V, KB, VB}},
    "swapped-gate-up": {"bytes": {GATE, UP}},
    "swapped-layers": {"bytes": ALL - {E, HEAD, N}},
    "lost-qkv-biases": {"bytes": BIASES},
    "lost-q-biases": {"bytes": {QB}},
    "lost-k-biases": {"bytes": {KB}},
    "lost-v-biases": {"bytes": {VB}},
    "missing-biases": {"missing": BIASES},
    "bare-bias-names": {"renamed": BIASES},
    "fused-biases": {"missing": BIASES, "extra": {"model.layers.N.self_attn.qkv_proj.bias"}},
    "unsorted-index": {"order": {"index"}, "problems": {"not sorted"}},
    "duplicate-tensor": {"twice": {N}, "problems": {"stands there twice"}},
    "dropped-tensor": {"missing": {N}},
    "tied-lm-head": {"code": {HEAD}, "size": {HEAD}},
    "zero-lm-head": {"bytes": {HEAD}},
    "default-dequantise": {"code": MATRICES, "size": MATRICES, "metadata": {"quantization"}, "flags": {"quantized"}},
    "offset-shifted": {"offset": ALL, "bytes": ALL, "problems": {"ends at"}},
    "overlapping-tensors": {"offset": {GATE}, "bytes": {GATE}, "problems": {"overlap"}},
    "dims-swapped": {"dims": NOT_SQUARE},
    "double-reversal": {
        "dims": NOT_SQUARE, "code": {E, HEAD, K, V}, "size": {E, HEAD, K, V}, "bytes": {Q, OUT, GATE, UP, DOWN},
    },
    "GH-202": {"bytes": MATRICES},
    "transposed-embedding": {"bytes": {E}},
    "permuted-qk": {"bytes": {Q, K, QB, KB}},
    "scales-flushed": {"bytes": Q6K},
    "scales-floored": {"bytes": Q6K},
    "rope-norm": {"metadata": {"rope_type"}},
    "rope-theta": {"metadata": {"rope_theta"}},
    "mha-dims": {"metadata": {"num_kv_heads"}},
    "head-dim-guessed": {"metadata": {"head_dim", "num_heads", "num_kv_heads"}},
    "wrong-eps": {"metadata": {"rms_norm_eps"}},
    "zeroed-norm": {"bytes": {NORM}},
    "wrong-norm": {"bytes": {NORM}},
    "no-merges": {"metadata": {"tokenizer.merges"}},
    "specials-untyped": {"metadata": {"tokenizer.token_type"}},
    "wrong-pre-tokeniser": {"metadata": {"tokenizer.pre_type"}},
    "template-lost": {"metadata": {"chat_template"}},
    "template-skipped": {"metadata": {"chat_template"}},
    "template-doubled": {"metadata": {"chat_template"}},
    "template-hard-coded": {"metadata": {"chat_template"}},
    "eos-hard-coded": {"metadata": {"tokenizer.eos_token_id"}},
}  # fmt: skip
# Faults of the dtype byte: healthy byte -> written byte, for every byte there is; nothing but codes differs.
CODES = {
    "GH-186": {0: 0, 12: 0, 14: 0},
    "GH-191": {0: 0, 12: 8, 14: 9},
    "GH-191-code": {0: 0, 13: 12},
    "GH-191-reader": {0: 0, 8: 0},
    "GH-191-again": {0: 0, 8: 128},
    "GH-438": {0: 0, 30: 2},
    "GH-438-apr": {0: 0, 128: 8},
    "aprq4-relabelled": {0: 0, 128: 2},
    "unknown-to-f32": {0: 0, 6: 0},
    "unknown-to-f32-warned": {0: 0, 6: 0},
}
EXPECTED |= {id: {"code": MATRICES} for id in CODES}
# Decoder faults: blocks rewritten; checked against the faulty decoder below.
REWRITTEN = {id for id, fault in FAULTS.items() if fault.registry is not None and fault.seams is not None}
EXPECTED |= {id: {"bytes": Q4K if id.startswith("q4k") else MATRICES} for id in REWRITTEN - set(EXPECTED) - {"floor-blocks"}}
ELSEWHERE = {"truncated", "GH-370", "floor-blocks"}  # tests of their own below


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    with open_model(tiny) as opened:
        yield opened


Healthy = Callable[[Fault], Container]
Source = Callable[[Fault], Model]


@pytest.fixture(scope="module")
def source(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The embedded model in the types that a fault needs, encoded once each."""
    made: dict[str, Model] = {}

    def find(fault: Fault) -> Model:
        target = fault.given.get("quantize", "")
        if target not in made:
            path = tiny
            if target:
                path = tmp_path_factory.mktemp("source") / f"{target}.apr"
                convert(tiny, path, quantize=target)
            made[target] = open_model(path)
        return made[target]

    return find


@pytest.fixture(scope="module")
def healthy(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    """The healthy conversion of that."""
    made: dict[Path, Container] = {}

    def find(fault: Fault) -> Container:
        model = source(fault)
        if model.path not in made:
            path = tmp_path_factory.mktemp("healthy") / "healthy.apr"
            convert_with(model, path, [])
            made[model.path] = box(path)
        return made[model.path]

    return find


@pytest.fixture(scope="module")
def broken(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a fault, made once."""
    made: dict[str, Path] = {}

    def find(id: str) -> Path:
        if id not in made:
            path = tmp_path_factory.mktemp("broken") / "broken.apr"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                convert_with(source(FAULTS[id]), path, [id])
            made[id] = path
        return made[id]

    return find


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
    assert set(EXPECTED) | ELSEWHERE == set(file_faults())


@pytest.mark.parametrize("id", sorted(EXPECTED))
def test_a_file_fault_changes_this_and_nothing_else(id: str, healthy: Healthy, broken: Callable[[str], Path]) -> None:
    assert differences(healthy(FAULTS[id]), box(broken(id))) == EXPECTED[id]


@pytest.mark.parametrize("id", sorted(CODES))
def test_dtype_bytes_are_those_of_the_record(id: str, healthy: Healthy, broken: Callable[[str], Path]) -> None:
    right, wrong = by_gguf(healthy(FAULTS[id])), by_gguf(box(broken(id)))
    assert {(right[n][0].code, wrong[n][0].code) for n in right} == set(CODES[id].items())


def contents(found: Container, name: str) -> bytes:
    return found.bytes_of(by_gguf(found)[name][0]).tobytes()


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


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("id", sorted(REWRITTEN - {"floor-blocks"}))
def test_rewritten_blocks_decode_to_what_the_faulty_decoder_makes(
    id: str, healthy: Healthy, broken: Callable[[str], Path]
) -> None:
    """The two forms of a decoder fault are one: decode(rewritten) = faulty decode(healthy), bit for bit."""
    fault = FAULTS[id]
    assert fault.registry is not None
    registry = fault.registry(quants.REGISTRY)
    right, wrong = open_model(healthy(fault).path), open_model(broken(id))
    seen = 0
    for name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "blk.1.attn_k.weight"):
        x, y = right.tensors[name], wrong.tensors[name]
        faulty = quants.dequantise(x.raw, x.type, x.shape, registry=registry)
        assert np.array_equal(y.dequantise().view(np.uint32), faulty.view(np.uint32))
        seen += not np.array_equal(faulty, x.dequantise())
    assert seen > 0


def random_blocks(kind: types.TensorType, count: int, seed: int) -> np.ndarray:
    """Blocks of random values with random scales: (count, block bytes)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, kind.block_elements)) * rng.uniform(0.01, 3, size=(count, 1)) + rng.normal(size=(count, 1))
    return quants.encode(values.astype(np.float32), kind)


@pytest.mark.parametrize(
    ("id", "kind", "least", "most"),
    [("q5k-layout", types.Q5_K, 235, 256), ("q3k-layout", types.Q3_K, 185, 240), ("q2k-layout", types.Q2_K, 150, 215)],
)
def test_invented_layouts_get_most_values_wrong(id: str, kind: types.TensorType, least: int, most: int) -> None:
    blocks = random_blocks(kind, 64, 5)
    fault = FAULTS[id]
    assert fault.registry is not None
    wrong = quants.decode(blocks, kind, registry=fault.registry(quants.REGISTRY)) != quants.decode(blocks, kind)
    assert least <= wrong.sum(axis=1).mean() <= most


def decoded(id: str, kind: types.TensorType, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(healthy, faulty) values, (n, elements)."""
    registry = FAULTS[id].registry
    assert registry is not None
    return quants.decode(blocks, kind), quants.decode(blocks, kind, registry=registry(quants.REGISTRY))


def test_marks_within_a_q4k_block() -> None:
    blocks = random_blocks(types.Q4_K, 32, 1)
    fields = blocks.reshape(-1).view(quants.Q4_K.layout)
    groups = {id: [x.reshape(32, 8, 32) for x in decoded(id, types.Q4_K, blocks)] for id in FAULTS if id.startswith("q4k")}
    right, lost = groups["q4k-min-lost"]
    sc, m = quants.Q4_K().unpack_scales(fields["scales"])
    dmin = fields["dmin"].astype(np.float32)[:, None]
    assert np.allclose(lost - right, (dmin * m)[:, :, None], rtol=1e-6, atol=1e-6)
    for id in ("q4k-scale-bits", "q4k-scales-plain"):
        right, wrong = groups[id]
        assert np.array_equal(right[:, :4], wrong[:, :4])
        assert not np.array_equal(right[:, 4:], wrong[:, 4:])
    right, wrong = groups["q4k-one-scale"]
    assert np.array_equal(right[:, 0::2], wrong[:, 0::2])
    assert not np.array_equal(right[:, 1::2], wrong[:, 1::2])
    right, wrong = groups["q4k-d-dmin"]
    d = fields["d"].astype(np.float32)[:, None]
    q = (right + (dmin * m)[:, :, None]) / np.where(d * sc == 0, 1, d * sc)[:, :, None]
    assert np.allclose(wrong, (dmin * sc)[:, :, None] * q - (d * m)[:, :, None], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("id", ["q4k-nibble-pairs", "q4k-nibbles-exchanged", "q4k-16-bytes"])
def test_nibbles_are_only_moved_within_runs_of_64(id: str) -> None:
    blocks = random_blocks(types.Q4_K, 8, 2)
    fault = FAULTS[id]
    assert fault.registry is not None
    qs = blocks.reshape(-1).view(quants.Q4_K.layout)["qs"]
    faulty = fault.registry(quants.REGISTRY)[types.Q4_K]
    right, wrong = quants.Q4_K().unpack_nibbles(qs), faulty.unpack_nibbles(qs)  # type: ignore[attr-defined]
    assert not np.array_equal(right, wrong)
    assert np.array_equal(np.sort(right.reshape(8, 4, 64)), np.sort(wrong.reshape(8, 4, 64)))


def test_adjacent_pairs_keep_the_values_of_a_block_and_lose_their_order() -> None:
    right, wrong = decoded("nibble-pairs", types.Q4_0, random_blocks(types.Q4_0, 256, 3))
    assert np.array_equal(np.sort(right), np.sort(wrong))
    centred = [x - x.mean(axis=1, keepdims=True) for x in (right, wrong)]
    assert abs(np.corrcoef(centred[0].reshape(-1), centred[1].reshape(-1))[0, 1]) < 0.2


def test_high_bits_are_off_by_sixteen_steps() -> None:
    blocks = random_blocks(types.Q5_0, 64, 4)
    right, wrong = decoded("q5-high-bits", types.Q5_0, blocks)
    d = np.abs(blocks.reshape(-1).view(quants.Q5_0.layout)["d"].astype(np.float32))[:, None]
    steps = np.rint((wrong - right) / d)
    assert set(np.unique(steps)) == {-16, 0, 16}


def test_blocks_of_36_bytes_are_out_of_step_from_the_second_on() -> None:
    blocks = random_blocks(types.Q8_0, 64, 6)
    right, wrong = decoded("q80-36-bytes", types.Q8_0, blocks)
    assert np.array_equal(wrong[0, :30], right[0, 2:])  # two bytes late, under the right scale
    assert not np.isclose(wrong[1:20], right[1:20]).all(axis=1).any()
    assert not wrong[-1].any() or not np.isfinite(wrong).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_flushed_and_floored_scales_touch_subnormal_blocks_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(16, 32)) * 10.0 ** rng.uniform(-6, 0, size=(16, 1))
    blocks = quants.encode(values.astype(np.float32), types.Q8_0)
    d = np.abs(blocks.view(quants.Q8_0.layout)["d"].reshape(-1).astype(np.float32))
    small = (d > 0) & (d < 2.0**-14)
    for id, scale in (("scales-flushed", 0.0), ("scales-floored", 2.0**-14)):
        right, wrong = decoded(id, types.Q8_0, blocks)
        assert np.array_equal(right[~small], wrong[~small])
        q = blocks.view(quants.Q8_0.layout)["qs"].reshape(16, 32)
        assert np.array_equal(wrong[small], np.float32(scale) * q[small])


def test_the_default_kernel_hits_one_type_only(model: Model) -> None:
    registry = FAULTS["default-kernel"].registry
    assert registry is not None
    faulty = registry(quants.REGISTRY)
    assert [kind.name for kind in faulty if faulty[kind] is not quants.REGISTRY[kind]] == ["Q6_K"]
    tensor = model.tensors["blk.0.attn_v.weight"]
    wrong = quants.dequantise(tensor.raw, tensor.type, tensor.shape, registry=faulty)
    count = tensor.nbytes // 210
    expected = quants.decode(np.asarray(tensor.raw[: count * 144]).reshape(-1, 144), types.Q4_K)
    assert np.array_equal(wrong.reshape(expected.shape), expected, equal_nan=True)


# ── models whose rows are no multiple of 256 ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def narrow(tmp_path: Path) -> Model:
    """A random model with 192 columns in attn_output, as Q8_0."""
    from builders import random_model

    made = random_model(3, mix=(types.Q4_K, types.Q6_K))
    made.path, made.format = tmp_path / "random.apr", "apr"
    made.path.touch()
    return made


NARROW = "blk.1.attn_output.weight"


def test_flat_blocks_run_across_rows(narrow: Model, tmp_path: Path) -> None:
    convert_with(narrow, tmp_path / "right.apr", [])
    convert_with(narrow, tmp_path / "wrong.apr", ["GH-370"])
    right, wrong = box(tmp_path / "right.apr"), box(tmp_path / "wrong.apr")
    seen = differences(right, wrong)
    assert seen == {"code": {OUT}, "size": {OUT}}
    entry, tensor = by_gguf(wrong)[NARROW][0], narrow.tensors[NARROW]
    assert entry.code == types.Q4_K.code
    assert entry.dims == tensor.shape == (256, 192)
    assert entry.size == tensor.size // 256 * 144
    expected = quants.encode(tensor.dequantise().reshape(-1, 256), types.Q4_K)
    assert np.array_equal(wrong.bytes_of(entry), expected.reshape(-1))
    with pytest.raises(FormatError, match="size law"):
        open_model(tmp_path / "wrong.apr")


def test_lost_ends_of_rows(narrow: Model, tmp_path: Path) -> None:
    convert_with(narrow, tmp_path / "right.apr", [])
    convert_with(narrow, tmp_path / "wrong.apr", ["floor-blocks"])
    assert differences(box(tmp_path / "right.apr"), box(tmp_path / "wrong.apr")) == {"bytes": {OUT}}
    fault = FAULTS["floor-blocks"]
    assert fault.registry is not None
    tensor = narrow.tensors[NARROW]
    faulty = quants.dequantise(tensor.raw, tensor.type, tensor.shape, registry=fault.registry(quants.REGISTRY))
    assert not faulty.any()  # 192 columns are less than one super-block
    assert np.array_equal(open_model(tmp_path / "wrong.apr").tensors[NARROW].dequantise(), faulty)


@pytest.mark.parametrize("id", ["padded-activations", "floor-blocks"])
def test_narrow_rows_go_wrong_in_attn_output_and_not_before(id: str, narrow: Model) -> None:
    tokens = [5, 250, 17, 3, 99]
    right, wrong = trace(Session(narrow), tokens), trace(session_with(narrow, [id]), tokens)
    assert first_difference(right, wrong) == ("layers.0.attn_out", list(range(5)))
    if id == "padded-activations":
        x, y = (t.points["layers.0.attn_out"].values for t in (right, wrong))
        assert np.allclose(x[:, 0], y[:, 0], atol=1e-4)  # row 0 lies where it should
        assert not y[:, -(256 - 192) :].any()  # the last rows are read beyond the end


@pytest.mark.parametrize("id", ["GH-370", "floor-blocks", "padded-activations"])
def test_on_wide_rows_they_change_nothing_and_say_so(id: str, model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"'{id}' changes nothing here; it needs rows whose width is not a multiple of 256"):
        session_with(model, [id])
    if id in file_faults():
        with pytest.raises(UsageError, match="changes nothing here"):
            convert_with(model, tmp_path / "x.apr", [id])
        assert not list(tmp_path.iterdir())


# ── run faults: where the pass goes wrong first ───────────────────────────────────────────────────────────────────

EVERY, LATER = "every position", "every position but 0"
# id -> (first point that differs in one pass over the prompt, in passes of one token each, at which positions)
FIRST: dict[str, tuple[str | None, str | None, str]] = {
    "lost-qkv-biases": ("layers.0.q", "layers.0.q", EVERY),
    "lost-q-biases": ("layers.0.q", "layers.0.q", EVERY),
    "lost-k-biases": ("layers.0.k", "layers.0.k", EVERY),
    "lost-v-biases": ("layers.0.v", "layers.0.v", EVERY),
    "tied-lm-head": ("logits", "logits", EVERY),
    "cache-key-mismatch": (None, None, ""),
    **{id: ("embed", "embed", EVERY) for id in FAULTS if id.startswith("q4k")},
    **dict.fromkeys(("nibble-pairs", "q5-high-bits", "q5k-layout", "q3k-layout", "q2k-layout"), ("embed", "embed", EVERY)),
    "q80-36-bytes": ("embed", "embed", EVERY),
    "scales-flushed": ("layers.0.v", "layers.0.v", EVERY),
    "scales-floored": ("layers.0.v", "layers.0.v", EVERY),
    "default-kernel": ("layers.0.v", "layers.0.v", EVERY),
    "rope-norm": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "rope-theta": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "gqa-modulo": ("layers.0.attn", "layers.0.attn", EVERY),
    "head-dim-guessed": ("layers.0.q_rope", "layers.0.q_rope", LATER),
    "layer-norm": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "wrong-eps": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "unweighted-norm": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "zeroed-norm": ("layers.1.attn_norm", "layers.1.attn_norm", EVERY),
    "wrong-norm": ("layers.0.attn_norm", "layers.0.attn_norm", EVERY),
    "kv-twice": (None, "layers.0.q_rope", LATER),
    "kv-stale": ("layers.0.q_rope", "layers.0.q_rope", EVERY),
    "kv-empty": (None, "layers.0.attn", LATER),
    "kv-refed": (None, None, ""),
    "last-token-twice": (None, None, ""),
    "prefill-decode": (None, "layers.0.q", EVERY),
    "q8-activations": ("layers.0.q", "layers.0.q", EVERY),
    "massive-channel": ("layers.0.q", "layers.0.q", EVERY),
    "argmax-nan": ("norm", "norm", EVERY),
}
WORDS = {id for id, fault in run_faults().items() if fault.tokenizer is not None or fault.prompt is not None}


def first_difference(a: Trace, b: Trace) -> tuple[str, list[int]] | None:
    """The first point whose values are not equal bit for bit (whatever their shape), and at which rows."""
    for name, point in a.points.items():
        x, y = (values.reshape(len(values), -1) for values in (point.values, b.points[name].values))
        if not np.array_equal(x, y):
            return name, [row for row in range(len(x)) if not np.array_equal(x[row], y[row])]
    return None


class Base:
    """A healthy model as a fault needs it, and its traces."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.session = session_with(model, [])
        self.ids = self.session.prompt_tokens(QUESTION)[-6:]
        self.traces = {chunk: trace(self.session, self.ids, chunk=chunk) for chunk in (None, 1)}


@pytest.fixture(scope="module")
def base(source: Source) -> Callable[[str], Base]:
    made: dict[Path, Base] = {}

    def find(id: str) -> Base:
        model = source(FAULTS[id])
        if model.path not in made:
            made[model.path] = Base(model)
        return made[model.path]

    return find


def test_every_run_fault_is_expected() -> None:
    assert set(FIRST) | WORDS | {"mha-dims", "floor-blocks", "padded-activations"} == set(run_faults())


@pytest.mark.parametrize("id", sorted(FIRST))
def test_a_run_fault_goes_wrong_here_and_not_before(id: str, base: Callable[[str], Base]) -> None:
    found = base(id)
    session = session_with(found.model, [id])
    for chunk, expected in zip((None, 1), FIRST[id], strict=False):
        assert isinstance(expected, str | None)
        seen = first_difference(found.traces[chunk], trace(session, found.ids, chunk=chunk))
        if expected is None:
            assert seen is None
        else:
            count = len(found.ids)
            assert seen == (expected, list(range(count) if FIRST[id][2] == EVERY else range(1, count)))


def test_lost_biases_are_one_vector_at_every_position(base: Callable[[str], Base]) -> None:
    found = base("lost-qkv-biases")
    wrong = trace(session_with(found.model, ["lost-qkv-biases"]), found.ids, "layers.0.*")
    for point in "qkv":
        right = found.traces[None].points[f"layers.0.{point}"].values
        apart = (right - wrong.points[f"layers.0.{point}"].values).reshape(len(found.ids), -1)
        bias = found.model.tensors[f"blk.0.attn_{point}.bias"].dequantise()
        assert np.allclose(apart, bias, rtol=1e-4, atol=1e-4 * np.abs(right).max())


def test_the_rope_base_leaves_the_fastest_pair_alone(base: Callable[[str], Base]) -> None:
    found = base("rope-theta")
    half = found.model.config.head_dim // 2
    right = found.traces[None].points["layers.0.q_rope"].values
    wrong = trace(session_with(found.model, ["rope-theta"]), found.ids, "layers.0.q_rope").points["layers.0.q_rope"].values
    same = [np.array_equal(right[..., i], wrong[..., i]) and np.array_equal(right[..., i + half], wrong[..., i + half])
            for i in range(half)]  # fmt: skip
    assert same == [True] + [False] * (half - 1)


def test_dealt_heads_are_right_where_both_rules_agree(base: Callable[[str], Base]) -> None:
    found, point = base("gqa-modulo"), "layers.0.attn"
    config = found.model.config
    right = found.traces[None].points[point].values.reshape(len(found.ids), config.head_count, -1)
    wrong = trace(session_with(found.model, ["gqa-modulo"]), found.ids, point).points[point].values.reshape(right.shape)
    group, kv_heads = config.head_count // config.head_count_kv, config.head_count_kv
    for head in range(config.head_count):
        assert np.allclose(right[:, head], wrong[:, head], atol=1e-5) == (head // group == head % kv_heads)


def test_the_empty_cache_gives_a_token_its_own_value(base: Callable[[str], Base]) -> None:
    found = base("kv-empty")
    config = found.model.config
    seen = trace(session_with(found.model, ["kv-empty"]), found.ids, "layers.0.*", chunk=1).points
    own = np.repeat(seen["layers.0.v"].values, config.head_count // config.head_count_kv, axis=1)
    assert np.allclose(seen["layers.0.attn"].values, own.reshape(len(found.ids), -1), atol=1e-6)


def test_a_mismatched_key_is_never_a_hit(base: Callable[[str], Base]) -> None:
    found = base("cache-key-mismatch")
    session = session_with(found.model, ["cache-key-mismatch"])
    trace(session, found.ids, chunk=1)
    engine = session.engine
    assert isinstance(engine, naming.KeyMismatch)
    assert engine.hits == 0
    assert engine.misses == len(found.ids) * (7 * found.model.config.block_count + 1)


def test_mha_dims_contradict_the_shapes(model: Model, broken: Callable[[str], Path]) -> None:
    with pytest.raises(FormatError, match=r"attn_k.weight.*has shape \(64, 256\), the config demands \(256, 256\)"):
        session_with(model, ["mha-dims"])
    with pytest.raises(FormatError, match="the config demands"):
        Session(open_model(broken("mha-dims")))


def test_eight_bits_cost_per_cents_and_a_massive_channel_costs_the_rest() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 600)).astype(np.float32)
    x[1, :256] = 0
    rounded = q8_k(x)
    assert not rounded[1, :256].any()
    for start in (0, 256, 512):
        part, other = x[:, start : start + 256], rounded[:, start : start + 256]
        step = np.abs(part).max(axis=1, keepdims=True) / 127
        assert (np.abs(part - other) <= step * 0.5001).all()
    assert 0 < np.linalg.norm(x - rounded) / np.linalg.norm(x) < 0.02


def test_a_massive_channel_is_worse_in_the_last_layers_only(base: Callable[[str], Base]) -> None:
    found = base("massive-channel")
    last = found.model.config.block_count - 1
    assert last >= found.model.config.block_count * 7 // 8

    def error(id: str, layer: int) -> float:
        point = f"layers.{layer}.gate"
        right = found.traces[None].points[point].values
        wrong = trace(session_with(found.model, [id]), found.ids, point).points[point].values
        return float(np.linalg.norm(right - wrong) / np.linalg.norm(right))

    assert error("massive-channel", 1) == error("q8-activations", 1) < 0.1
    assert error("massive-channel", last) > 3 * error("q8-activations", last)


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [([1, 5, 2], 1), ([5, 1, 5], 2), ([np.nan] * 4, 3), ([9, np.nan, 1, 3, 2], 3), ([9, 1, np.nan], 2), ([np.inf, 1], 0)],
)
def test_the_maximum_for_which_nan_equals_everything(logits: list[float], chosen: int) -> None:
    current = 0  # Rust's max_by, word for word: the later of equals wins
    for i, x in enumerate(logits):
        if not x < logits[current]:
            current = i
    assert last_of_equals(np.array(logits, np.float32)) == current == chosen


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(session: Session, prompt: str = QUESTION, max_tokens: int = 12) -> str:
    return session.generate(prompt, max_tokens=max_tokens).text


def test_prompts_go_wrong_as_told(model: Model) -> None:
    session = session_with(model, [])
    right = session.prompt_tokens(QUESTION)
    control = {id for id, kind in enumerate(model.tokenizer.token_types) if kind == 3}

    def ids(fault: str) -> list[int]:
        return session_with(model, [fault]).prompt_tokens(QUESTION)

    text = session.tokenizer.decode(right)
    assert len(ids("no-merges")) == sum(
        1 if id in control else len(session.tokenizer.token_bytes(id)) for id in right
    )  # one id a byte, but for the specials
    for fault in ("split-specials", "specials-untyped"):
        assert not control & set(ids(fault))
        assert session.tokenizer.decode(ids(fault)) == text
    assert session.tokenizer.decode(ids("template-skipped")) == QUESTION
    doubled = session.tokenizer.decode(ids("template-doubled"))
    once = session.tokenizer.decode(right)
    assert once in doubled
    assert sum(id in control for id in ids("template-doubled")) > 1.5 * sum(id in control for id in right)
    plain = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert session.tokenizer.decode(ids("template-hard-coded")) == plain
    with pytest.raises(UsageError, match="no chat template"):
        ids("template-lost")


def test_gpt2_cuts_words_otherwise(model: Model) -> None:
    right, wrong = session_with(model, []).tokenizer, session_with(model, ["wrong-pre-tokeniser"]).tokenizer

    def words(tokenizer: Qwen2Tokenizer) -> list[str]:
        return [word for word, _ in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("is 12):\n")]

    assert words(right) == ["is", "Ġ", "1", "2", "):Ċ"]
    assert words(wrong) == ["is", "Ġ12", "):", "Ċ"]
    assert right.encode("hello world") == wrong.encode("hello world")
    assert right.decode(wrong.encode("is 12):\n")) == "is 12):\n"


def test_spelled_tokens_are_the_same_tokens(model: Model) -> None:
    right = session_with(model, []).generate(QUESTION, max_tokens=12)
    wrong = session_with(model, ["byte-level-text"]).generate(QUESTION, max_tokens=12)
    assert wrong.tokens == right.tokens
    assert wrong.text == "".join(model.tokenizer.tokens[id] for id in right.tokens) != right.text


def test_nobody_listens_for_the_end(model: Model) -> None:
    right = session_with(model, []).generate(QUESTION, max_tokens=24)
    wrong = session_with(model, ["eos-hard-coded"]).generate(QUESTION, max_tokens=24)
    assert right.stop == "eos"
    assert wrong.tokens[: len(right.tokens)] == right.tokens
    assert wrong.tokens[len(right.tokens)] == model.tokenizer.eos_token_id
    assert len(wrong.tokens) > len(right.tokens)


# Answers that no model, however small, keeps under these; and those that every engine within its contract keeps.
LOUD = (
    "lost-qkv-biases", "swapped-k-v", "tied-lm-head", "zero-lm-head", "GH-202", "transposed-embedding", "permuted-qk",
    "q4k-min-lost", "q4k-d-dmin", "q4k-scales-plain", "q4k-nibble-pairs", "q4k-nibbles-exchanged", "q4k-16-bytes",
    "scales-flushed", "rope-norm", "gqa-modulo", "head-dim-guessed", "kv-empty", "argmax-nan",
)  # fmt: skip
QUIET = ("cache-key-mismatch", "default-dequantise", "q8-activations", "prefill-decode", "wrong-eps")


@pytest.fixture(scope="module")
def right_tokens(model: Model) -> list[int]:
    return session_with(model, []).generate(QUESTION, max_tokens=8).tokens


def tokens_of(id: str, model: Model, broken: Callable[[str], Path]) -> list[int]:
    session = session_with(model, [id]) if FAULTS[id].run_seam is not None else Session(open_model(broken(id)))
    return session.generate(QUESTION, max_tokens=8).tokens


@pytest.mark.parametrize("id", sorted(LOUD))
def test_loud_faults_change_the_answer(
    id: str, model: Model, broken: Callable[[str], Path], right_tokens: list[int]
) -> None:
    assert not FAULTS[id].silent
    assert tokens_of(id, model, broken) != right_tokens


@pytest.mark.parametrize("id", sorted(QUIET))
def test_silent_faults_leave_the_answer(
    id: str, model: Model, broken: Callable[[str], Path], right_tokens: list[int]
) -> None:
    assert FAULTS[id].silent
    assert tokens_of(id, model, broken) == right_tokens


def test_a_type_read_by_the_wrong_kernel_ends_in_nan(model: Model) -> None:
    with pytest.raises(NumericError, match=r"step 0: .* NaN"):
        answer(session_with(model, ["default-kernel"]))


@pytest.mark.real
def test_silence_on_the_real_model(real_05b: Path) -> None:
    """`silent` is a claim about real models: held on the 0.5B for those that a small model does not settle."""
    pytest.importorskip("aprlab.engines.jit")
    chosen = ("rope-theta", "zeroed-norm", "template-doubled", "rope-norm", "kv-stale")
    with open_model(real_05b) as model:
        right = session_with(model, [], engine="jit").generate(QUESTION, max_tokens=9).text
        kept = {}
        for id in chosen:
            session = session_with(model, [id], engine="jit")
            kept[id] = session.generate(QUESTION, max_tokens=9).text == right
            session.engine.close()
    assert kept == {id: FAULTS[id].silent for id in chosen}
    assert sorted(kept.values()) == [False, False, True, True, True]


# ── pairs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_file_that_cannot_be_opened_is_refused_in_a_session(model: Model) -> None:
    with pytest.raises(FormatError, match="historic naming 'bare'"):
        session_with(model, ["GH-190"])


@pytest.mark.parametrize("id", sorted(set(FIRST) & set(file_faults()) - {"cache-key-mismatch"}))
def test_both_forms_of_a_fault_give_the_same_logits(
    id: str, base: Callable[[str], Base], broken: Callable[[str], Path]
) -> None:
    found = base(id)
    as_run = trace(session_with(found.model, [id]), found.ids, "logits").points["logits"].values
    as_file = trace(Session(open_model(broken(id))), found.ids, "logits").points["logits"].values
    assert np.array_equal(as_run, as_file)


@pytest.mark.parametrize("id", ["q4k-one-scale", "default-kernel", "lost-qkv-biases", "gqa-modulo", "kv-twice", "rope-norm"])
def test_faults_mean_the_same_on_another_engine(id: str, base: Callable[[str], Base]) -> None:
    pytest.importorskip("aprlab.engines.jit")
    found = base(id)
    points = ("layers.0.q", "layers.0.v", "layers.0.attn")
    here = trace(session_with(found.model, [id]), found.ids, points, chunk=1)
    there = trace(session_with(found.model, [id], engine="jit", threads=1), found.ids, points, chunk=1)
    for point in points:
        x, y = here.points[point].values, there.points[point].values
        finite = np.isfinite(x)
        assert np.allclose(x[finite], y[finite], atol=2e-4 * np.abs(x[finite]).max(initial=1))


def test_a_stale_cache_begins_after_an_older_prompt(model: Model) -> None:
    session = session_with(model, ["kv-stale"])
    assert isinstance(session.engine, KvStale)
    cache = session.engine.new_cache(model.config, 8)
    assert cache.positions(2).tolist() == [5, 6]


def test_a_sequence_fed_again_is_the_same_as_a_longer_prompt(model: Model) -> None:
    """Step by step: prompt, then prompt and prompt with one token more, and so on, one behind the other."""
    healthy, refed = session_with(model, []), session_with(model, ["kv-refed"])
    ids = healthy.prompt_tokens(QUESTION)
    said = refed.generate(ids, max_tokens=4, keep_logits=True)
    assert said.logits is not None
    seen: list[int] = []
    for step, logits in enumerate(said.logits):
        seen += [*ids, *said.tokens[:step]]
        alone = healthy.generate(seen, max_tokens=1, keep_logits=True).logits
        assert alone is not None
        assert np.allclose(logits, alone[0], atol=1e-4 * np.abs(alone).max())
    fresh = session_with(model, [])  # the other one has parts of the prompt in its cache, and so another last bit
    plain = fresh.generate(ids, max_tokens=4, keep_logits=True).logits
    assert plain is not None
    assert np.array_equal(said.logits[0], plain[0])
    assert not np.allclose(said.logits[1], plain[1], atol=1e-3)
    assert refed.generate(ids, max_tokens=4).tokens == said.tokens  # a second question finds no trace of the first
    assert len(refed.generate("What is 2+2?", max_tokens=60).tokens) <= 60  # the cache runs full and is emptied


def test_the_last_token_twice_is_a_longer_prompt(model: Model) -> None:
    healthy, broken = session_with(model, []), session_with(model, ["last-token-twice"])
    ids = healthy.prompt_tokens(QUESTION)
    for _ in range(2):  # the second time from the cache
        said = broken.generate(ids, max_tokens=3, keep_logits=True).logits
        meant = healthy.generate([*ids, ids[-1]], max_tokens=3, keep_logits=True).logits
        plain = healthy.generate(ids, max_tokens=3, keep_logits=True).logits
        assert said is not None
        assert meant is not None
        assert plain is not None
        assert np.allclose(said[0], meant[0], atol=1e-4 * np.abs(meant).max())
        assert not np.allclose(said[0], plain[0], atol=1e-3)


def test_a_lost_prompt_is_one_token_whatever_was_asked(model: Model) -> None:
    session = session_with(model, ["prompt-lost"])
    assert session.prompt_tokens(QUESTION) == session.prompt_tokens("Something else") == [1]
    assert session.tokenizer.decode(session_with(model, []).prompt_tokens("4", raw=True)) == "4"


# ── instruments ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_instruments_lie_as_told(tmp_path: Path, broken: Callable[[str], Path], healthy: Healthy) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 12)).astype(np.float32) * np.linspace(1, 9, 7, dtype=np.float32)[:, None]
    assert np.std(values) / np.std(values) == 1
    assert instruments.mixed_positions(values, values) > 1.5

    weights = rng.normal(size=(6, 10)).astype(np.float32)
    assert instruments.order_blind_checksum(weights) == instruments.order_blind_checksum(weights.T)
    assert weights.tobytes() != np.ascontiguousarray(weights.T).tobytes()
    assert instruments.order_blind_checksum(weights) != instruments.order_blind_checksum(weights * np.float32(1.001))

    a, b = {"x": weights, "y": weights}, {"x": weights}
    assert instruments.nothing_compared({"x": weights}, {"z": weights * 2})
    assert instruments.common_only(a, b)
    assert not instruments.common_only({"x": weights}, {"z": weights})
    assert not instruments.common_only(a, {"x": weights * 2})

    (tmp_path / "nonsense.apr").write_bytes(b"nonsense")
    assert instruments.always_succeeds(tmp_path / "nonsense.apr")
    assert not instruments.partly_valid(tmp_path / "nonsense.apr")
    assert instruments.partly_valid(broken("truncated"))
    with pytest.raises(FormatError):
        open_model(broken("truncated"))

    good = rng.normal(4.62, 0.5, size=896).astype(np.float32)  # as Qwen's output_norm
    assert not instruments.norm_near_one(good)
    assert instruments.norm_near_one(np.ones(8, np.float32))
    assert instruments.first_ten([True] * 10 + [False])
    assert not instruments.first_ten([False] + [True] * 10)
    assert not instruments.first_ten([])
    assert instruments.words_for_garbage("For more information ask again.")
    assert not instruments.words_for_garbage("türleminÐ¸ÑĩÐµÑģÑĤÐ²Ð¾ gabantha")
    assert instruments.exit_zero("VILLEVILLEVILLE") == 0
    fixture = instruments.square_zeros((4, 6))
    assert np.array_equal(fixture, fixture.T)
    assert not instruments.greedy_mending(1.0, 2.0)


def test_every_ruler_has_a_liar() -> None:
    assert {fault.ruler for fault in instrument_faults().values()} == set(instruments.RULERS)


@pytest.mark.parametrize("id", ["mixed-positions", "exit-zero"])
def test_instruments_are_no_models_faults(id: str, model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an instrument's"):
        session_with(model, [id])
    with pytest.raises(UsageError, match="is no file's"):
        convert_with(model, tmp_path / "x.apr", [id])


# ── files and the command line ────────────────────────────────────────────────────────────────────────────────────


def test_a_broken_file_stands_by_itself(model: Model, broken: Callable[[str], Path]) -> None:
    """No record of the source is left in it, and its footer is that of its writer: nothing but the fault is wrong."""
    assert "source_metadata" not in box(broken("GH-191")).metadata
    assert not box(broken("GH-191")).problems
    assert not [p for p in box(broken("overlapping-tensors")).problems if "CRC" in str(p)]


def test_nothing_is_left_and_nothing_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.apr"
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"x\.apr"):
        convert_with(tiny, out, ["GH-191"])
    with pytest.raises(UsageError, match="changes nothing here"):
        convert_with(tiny, out, ["GH-438"], force=True)
    assert out.read_bytes() == b"precious"
    report = convert_with(tiny, out, ["GH-191", "GH-190"], force=True)
    assert report.output == out
    assert report.bytes_out == out.stat().st_size
    assert [note.split(":")[0] for note in report.notes] == ["fault GH-191", "fault GH-190"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.apr"]
    with pytest.raises(UsageError, match="must not be compressed"):
        convert_with(tiny, tmp_path / "y.apr", ["truncated"], compress="lz4")


def test_dialect_realizar_can_be_broken_too(model: Model, tmp_path: Path) -> None:
    convert_with(model, tmp_path / "x.apr", ["GH-191", "rope-norm", "head-dim-guessed"], dialect="realizar")
    found = box(tmp_path / "x.apr")
    assert {entry.code for entry in found.entries} == {0, 8, 9}
    assert found.metadata["rope_type"] == 0
    assert found.metadata["num_attention_heads"] == model.config.head_count // 2
    with pytest.raises(UsageError, match="it needs the dialect aprender"):
        convert_with(model, tmp_path / "y.apr", ["raw-names"], dialect="realizar")


def test_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["faults"]) == 0
    assert f"{len(FAULTS)} faults" in capsys.readouterr().out
    assert run_cli(["faults", "--json"]) == 0
    assert [fault["id"] for fault in json.loads(capsys.readouterr().out)] == list(FAULTS)
    assert run_cli(["faults", "GH-370", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer"] == "layout"
    assert run_cli(["faults", "lost-v-biases"]) == 0
    assert "optional" in capsys.readouterr().out
    assert run_cli(["faults", "lost-bias"]) == 2
    assert "lost-qkv-biases" in capsys.readouterr().err

    out = str(tmp_path / "x.apr")
    assert run_cli(["convert", str(tiny), "-o", out, "--fault", "GH-191, GH-190", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reversible"] is False
    assert run_cli(["run", str(tiny), "-p", QUESTION, "-n", "6", "--fault", "byte-level-text,lost-qkv-biases", "--json"]) == 0
    wrong = json.loads(capsys.readouterr().out)
    assert wrong["text"] == answer(session_with(tiny, ["lost-qkv-biases", "byte-level-text"]), max_tokens=6)


def test_the_page_is_written_by_a_module(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "aprlab.faults.catalogue", str(tmp_path / "x.md")], check=True)
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == markdown()


def test_a_recoded_tensor_is_encoded_before_its_blocks_are_edited() -> None:
    """A fault on top of `--quantize` sees the blocks that would have been written."""
    from builders import tensor

    rng = np.random.default_rng(1)
    source = tensor("blk.0.attn_k.weight", rng.normal(size=(64, 256)).astype(np.float32), types.F32)
    from aprlab.conversion.recode import re_encoded
    from aprlab.faults.tensors import with_blocks

    edited: Tensor = with_blocks(re_encoded(source, types.Q4_K), decode.lose_min)
    expected = quants.quantise(source.dequantise(), types.Q4_K).reshape(-1).view(quants.Q4_K.layout)
    assert np.array_equal(edited.raw.view(quants.Q4_K.layout)["qs"], expected["qs"])
    assert not edited.raw.view(quants.Q4_K.layout)["dmin"].any()
