"""Contents: where a tensor's bytes come from, kept or made on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import random_model

from aprlab import in_use, quants
from aprlab.conversion.recode import Recoded, at_hand, chunks_of, recoded
from aprlab.conversion.seams import Seams
from aprlab.conversion.synthetic import RandomBlocks
from aprlab.errors import FormatError
from aprlab.faults import layout
from aprlab.faults.apply import Misread
from aprlab.faults.tensors import Edited, EditedBlocks, with_values
from aprlab.model import decode_hooks
from aprlab.model.content import Content, Held, Mapped, content_of, map_file
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants import REGISTRY, types
from aprlab.quants.types import TensorType

SHAPE = (6, 512)
KINDS = (types.Q4_K, types.Q8_0, types.F32, types.BF16, types.APR_Q8)


class Ranges(Content):
    """Bytes that are fetched, as from a remote file: every range asked for is noted."""

    def __init__(self, raw: np.ndarray) -> None:
        self.raw, self.asked = raw, []  # type: list[tuple[int, int]]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        self.asked.append((start, stop))
        return self.raw[start:stop].copy()


def blocks(kind: TensorType, seed: int = 1) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    return np.ascontiguousarray(quants.quantise(values, kind)).reshape(-1).view(np.uint8)


def tensor(content: Content | np.ndarray, kind: TensorType = types.Q4_K, offset: int = 0) -> Tensor:
    return Tensor("blk.0.ffn_up.weight", kind, SHAPE, content, Origin(Path("f.gguf"), "up", offset))


@pytest.fixture
def mapped(tmp_path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Puts bytes into a file behind 100 others; the view on them."""

    def view(raw: np.ndarray) -> np.ndarray:
        (tmp_path / "file").write_bytes(bytes(100) + raw.tobytes() + b"rest")
        return map_file(tmp_path / "file")[100 : 100 + raw.nbytes]

    return view


def flipped(b: np.ndarray) -> None:
    """An edit of blocks: the last byte of each."""
    b.view(np.uint8).reshape(len(b), -1)[:, -1] ^= 1


def made(how: str, kind: TensorType, mapped: Callable[[np.ndarray], np.ndarray]) -> Content:
    """A content of `kind` by each of the ways that there are."""
    raw = blocks(kind)
    plain = tensor(raw, kind)
    by_name: dict[str, Callable[[], Content]] = {
        "held": lambda: Held(raw),
        "mapped": lambda: content_of(mapped(raw)),
        "ranges": lambda: Ranges(raw),
        "recoded": lambda: Recoded(plain, kind),
        "edited": lambda: Edited(plain, kind, SHAPE, lambda values: values * 2),
        "blocks": lambda: EditedBlocks(plain, flipped),
        "misread": lambda: Misread(raw, REGISTRY),
        "random": lambda: RandomBlocks("x", kind, SHAPE, 3),
    }
    return by_name[how]()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("how", ["held", "mapped", "ranges", "recoded", "edited", "blocks", "misread", "random"])
def test_every_content_gives_one_answer(how: str, kind: TensorType, mapped: Callable[[np.ndarray], np.ndarray]) -> None:
    if how == "random" and kind is types.APR_Q8:
        pytest.skip("random AprQ8 is refused")
    content = made(how, kind, mapped)
    whole = content.whole()
    assert whole.dtype == np.uint8 and whole.shape == (content.nbytes,) == (kind.nbytes(SHAPE),)
    assert b"".join(bytes(chunk) for chunk in content.chunks()) == whole.tobytes()
    assert content.read(7, 90).tobytes() == whole[7:90].tobytes()
    values = content.values(kind, SHAPE)
    np.testing.assert_array_equal(values, quants.dequantise(whole, kind, SHAPE))
    for rows in (slice(1, 4), slice(4, 4), slice(None, None, 2), slice(-2, None), np.array([5, 0, 5])):
        np.testing.assert_array_equal(content.values(kind, SHAPE, rows), values[rows])


def test_a_view_on_a_mapped_file_knows_its_place_and_copies_nothing(mapped: Callable[[np.ndarray], np.ndarray]) -> None:
    view = mapped(blocks(types.Q4_K))
    one = tensor(view, offset=100)
    assert isinstance(one.content, Mapped) and one.content.offset == 100 and one.content.path.name == "file"
    assert one.raw is view and np.shares_memory(one.blocks(), view) and one.in_file
    assert np.shares_memory(one.content.read(10, 20), view) and not one.raw.flags.writeable
    assert not tensor(view, offset=-1).in_file  # in a compressed body
    assert not tensor(view.copy()).in_file and isinstance(tensor(view.copy()).content, Held)
    one.release()
    one.release(slice(1, 3))  # reading it again is allowed
    np.testing.assert_array_equal(one.raw, blocks(types.Q4_K))


def test_a_file_that_is_not_mapped_any_more_gives_no_place(mapped: Callable[[np.ndarray], np.ndarray]) -> None:
    before = set(in_use.MAPPED)
    view = mapped(blocks(types.F32))
    assert len(set(in_use.MAPPED) - before) == 1
    del view
    assert set(in_use.MAPPED) == before


def test_some_rows_are_read_without_the_others() -> None:
    content = Ranges(blocks(types.Q8_0))
    row = types.Q8_0.row_bytes(SHAPE[1])
    tensor(content, types.Q8_0).dequantise(slice(2, 4))
    assert content.asked == [(2 * row, 4 * row)]


def test_a_tensor_is_frozen_and_replaced() -> None:
    one = tensor(blocks(types.Q4_K))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "other"  # type: ignore[misc]
    other = one.replace(name="other", raw=blocks(types.Q4_K, 2))
    assert other.name == "other" and not np.array_equal(other.raw, one.raw) and other.shape == one.shape
    assert dataclasses.replace(one, name="x").content is one.content


def test_who_decodes_blocks_himself_asks_whether_he_may() -> None:
    raw = blocks(types.Q4_K)
    assert tensor(raw).content.as_stored and recoded(tensor(raw), types.Q8_0).content.as_stored
    assert not tensor(Misread(raw, REGISTRY)).content.as_stored


def test_what_is_to_be_encoded_is_encoded_of_the_exact_values() -> None:
    one = tensor(blocks(types.F32), types.F32)
    coarse = recoded(one, types.Q4_0)
    doubled = with_values(coarse, lambda values: values * 2)  # of the values before Q4_0 rounded them
    expected = quants.quantise(one.dequantise() * 2, types.Q4_0).reshape(-1)
    np.testing.assert_array_equal(doubled.raw, expected)
    twice = with_values(doubled, lambda values: values[::-1], kind=types.F32)
    np.testing.assert_array_equal(twice.dequantise(), one.dequantise()[::-1] * 2)
    assert not coarse.content.at_hand and at_hand(coarse).content.at_hand and at_hand(one) is one
    assert b"".join(map(bytes, chunks_of(coarse)())) == coarse.raw.tobytes() == at_hand(coarse).raw.tobytes()


@pytest.mark.parametrize("kind", [types.F32, types.Q8_0], ids=str)
def test_a_few_rows_are_made_without_the_others(kind: TensorType) -> None:
    one = tensor(blocks(types.F32), types.F32)
    healthy = Seams(str, lambda type_: type_.code, tuple, lambda tensor: recoded(tensor, kind))
    turned, twice = layout.transpose_data()(healthy), layout.transpose_data()(layout.transpose_data()(healthy))
    changed = [seams.tensor(one) for seams in (healthy, turned, twice, layout.reverse_both(healthy))]
    flips = EditedBlocks(healthy.tensor(one), flipped)
    np.testing.assert_array_equal(flips.some(np.array([1, 4]), kind.row_bytes(SHAPE[1])), flips.whole().reshape(6, -1)[[1, 4]])
    for made in (*changed, layout.flat_tensor(one), layout.flat_tensor(turned.tensor(one))):
        assert isinstance(made.content, Recoded)
        content, cols = made.content, made.content.shape[-1]
        count = made.nbytes // made.type.row_bytes(cols)
        rows = np.array(sorted({0, count // 2, count - 1}))
        few, encoded = content.few(rows), content.some(rows, made.nbytes // count)
        whole = content.exact()
        np.testing.assert_array_equal(few, whole.reshape(-1, cols)[rows])
        np.testing.assert_array_equal(encoded, content.whole().reshape(count, -1)[rows])


def test_bad_scales_are_found_in_a_file_and_its_bytes_are_streamed(mapped: Callable[[np.ndarray], np.ndarray]) -> None:
    raw = blocks(types.F16)
    raw[1000:1002] = 0xFF  # a NaN
    one = tensor(mapped(raw), types.F16, offset=100)
    with pytest.raises(FormatError, match="not a finite number") as error:
        list(chunks_of(one)())
    assert error.value.offset == 1100
    with pytest.raises(FormatError, match="not a finite number"):
        one.check_values()
    assert b"".join(map(bytes, one.content.chunks())) == raw.tobytes()


def test_each_decoding_is_noticed_once() -> None:
    seen: list[str] = []
    with decode_hooks.decode_hook(seen.append):
        tensor(Misread(blocks(types.Q4_K), REGISTRY)).dequantise()
        tensor(blocks(types.Q4_K)).dequantise(slice(0, 1))
    assert seen == ["blk.0.ffn_up.weight"] * 2


def test_a_model_with_changes_leaves_the_other_alone() -> None:
    model = random_model()
    assert isinstance(model, Model)
    theta, tokens = model.config.rope_theta, model.tokenizer.tokens
    one = model.with_changes(config=dataclasses.replace(model.config, rope_theta=7.0))
    assert one.config.rope_theta == 7.0 and model.config.rope_theta == theta
    assert one.tokenizer is model.tokenizer and one.tensors is model.tensors
    two = model.with_changes(tokenizer=dataclasses.replace(model.tokenizer, tokens=["a"]), tensors={})
    assert two.tokenizer.tokens == ["a"] and two.tensors == {} and two.config is model.config
    assert model.tokenizer.tokens is tokens and model.tensors
