"""Faults of block decoders: which values go wrong, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from differences import box, by_gguf, differences
from faulty_files import OUT, REWRITTEN, Healthy
from faulty_runs import first_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from aprlab import quants
from aprlab.errors import FormatError, UsageError
from aprlab.faults import FAULTS, convert_with, decode, file_faults, session_with
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.tracing.traces import trace


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


def test_pairs_of_q5_move_the_nibbles_and_leave_the_fifth_bits() -> None:
    blocks = random_blocks(types.Q5_0, 64, 5)
    d = blocks.reshape(-1).view(quants.Q5_0.layout)["d"].astype(np.float32)[:, None]
    right, wrong = (np.rint(x / d).astype(int) + 16 for x in decoded("q5-nibble-pairs", types.Q5_0, blocks))
    assert np.array_equal(right >> 4, wrong >> 4)
    assert not np.array_equal(right, wrong)
    assert np.array_equal(np.sort(right & 15), np.sort(wrong & 15))
    assert np.array_equal(wrong[:, 1] & 15, right[:, 16] & 15)  # byte 0: values 0 and 1, not 0 and 16


def test_values_requantised_sideways_are_rows_of_the_wrong_axis_and_their_padding() -> None:
    shape = (24, 320)
    x = np.random.default_rng(6).normal(size=shape).astype(np.float32)
    raw, fault = quants.quantise(x, types.Q8_0), FAULTS["requantised-sideways"]
    assert fault.registry is not None
    right = quants.dequantise(raw, types.Q8_0, shape)
    wrong = quants.dequantise(raw, types.Q8_0, shape, registry=fault.registry(quants.REGISTRY)).reshape(-1, 256)
    rows = right.reshape(320, 24)[: len(wrong)]  # the first 30 of the padded rows fill the tensor
    step = (rows.max(1) - np.minimum(rows.min(1), 0)) / 15
    assert np.all(np.abs(wrong[:, :12] - rows[:, ::2]) <= 0.6 * step[:, None])  # low nibbles: every other value
    assert np.all(np.abs(wrong[:, 64:]) <= 0.6 * step[:, None])  # padding


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
