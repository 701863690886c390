"""Kernel faults: each edit fits, changes the kernels it names and no others, and is wrong in the way its history tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG, random_model

from aprlab import engines, quants
from aprlab.architectures import forward
from aprlab.engines.ptx import PtxDevice
from aprlab.errors import AprlabError, UsageError
from aprlab.faults import FAULTS, session_with
from aprlab.formats import open_model
from aprlab.kernels.cuda import compile as nvrtc
from aprlab.kernels.cuda import launch as launches
from aprlab.kernels.cuda import mutations, verify
from aprlab.kernels.cuda.mutations import MUTATIONS, Edit
from aprlab.quants import types
from aprlab.quants.types import TensorType, by_name

ROWS, COLS = 5, 512


def decoded(name: str | None, kind: TensorType, raw: np.ndarray, values: int) -> np.ndarray:
    """What the (faulty) dequantise kernel makes of `raw`."""
    device = PtxDevice(**mutations.options(name)) if name else PtxDevice()
    bench = verify.Bench(device)
    at, room = bench.room(4 * values)
    bench.run(launches.dequantise(kind, bench.put(raw), at, values))
    return bench.get(room, (values,), np.float32)


def multiplied(name: str, kind: TensorType, contract: str, raw: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What the faulty mat-vec kernel makes of `raw` (ROWS, COLS) and x (1, COLS)."""
    bench = verify.Bench(PtxDevice(**mutations.options(name)))
    prepared, _ = bench.room(launches.prepared_bytes(contract, 1, COLS))
    at, room = bench.room(4 * ROWS)
    bench.run(launches.prepare(contract, bench.put(x), prepared, 1, COLS))
    bench.run(launches.matvec(kind, contract, bench.put(raw), prepared, launches.NULL, at, 1, ROWS, COLS))
    return bench.get(room, (ROWS,), np.float32)


def weights(kind: TensorType, name: str) -> np.ndarray:
    """Encoded (ROWS, COLS); for the flushed scales, rows small enough to have subnormal ones."""
    raw = verify.random_weights(kind, ROWS, COLS)
    if name != "scales-flushed":
        return raw
    power = -9 if kind is types.Q8_0 else -13  # of Q8_0's blocks some then have such a scale and some not
    small = quants.dequantise(raw, kind, (ROWS, COLS)) * np.float32(2.0**power)
    return quants.quantise(small, kind).reshape(-1)


# ---- edits and archive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_edit_matches_exactly_once(name: str) -> None:
    healthy, faulty = nvrtc.texts(), mutations.files(name)
    changed = {file for file in healthy if healthy[file] != faulty[file]}
    assert changed == {edit.file for edit in MUTATIONS[name].edits}
    assert set(mutations.sources(name)) == set(nvrtc.MODULES)


def test_an_edit_that_matches_not_at_all_or_twice_raises() -> None:
    edit = Edit("a.cu", "x = 1;", "x = 2;")
    assert edit.apply("int x = 1;") == "int x = 2;"
    with pytest.raises(AprlabError, match=r"'x = 1;' occurs 0 times in a\.cu"):
        edit.apply("int x = 3;")
    with pytest.raises(AprlabError, match=r"occurs 2 times in a\.cu"):
        edit.apply("x = 1; x = 1;")


def test_an_unknown_fault_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'q9'.*q4k-scale-unpack"):
        mutations.ptx("q9")


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_archive_changes_the_kernels_of_the_declared_types_and_no_others(name: str) -> None:
    changed = {entry for entries in mutations._archive()[name].values() for entry in entries}
    kinds = {kind.name for kind in launches.DEQUANTISED if f"dequantise_{kind.name.lower()}_f32" in changed}
    assert kinds == set(MUTATIONS[name].types)
    stems = [f"{what}_{kind.lower()}" for kind in kinds for what in ("dequantise", "embed", "matvec")]
    of_type = {stem + end for stem in stems for end in ("", "_f32", "_f16", "_q8")}
    assert changed <= of_type
    for kind in kinds & {k.name for k in launches.PACKED}:
        low = kind.lower()
        assert {f"matvec_{low}", f"matvec_{low}_q8", f"dequantise_{low}_f32", f"dequantise_{low}_f16"} <= changed


def test_the_archive_was_compiled_from_these_sources() -> None:
    """Stands in for compiling every fault anew; the next test does that for one of each kind of edit."""
    assert json.loads(mutations.RECORD.read_text(encoding="utf-8")) == {name: mutations.digest(name) for name in MUTATIONS}
    assert len({mutations.digest(name) for name in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC on this machine")
@pytest.mark.parametrize("name", ["q4k-scale-unpack", "q5-high-halves", "last-block-lost"])  # a helper, one type, all types
def test_the_archive_is_what_the_edited_source_compiles_to(name: str) -> None:
    if nvrtc.version() != (12, 9):
        pytest.skip("the archive was made by NVRTC 12.9")
    fresh = mutations.compiled(name, ("dequantise",))
    assert fresh["dequantise"] == mutations._archive()[name]["dequantise"]


# ---- what the faults do ----------------------------------------------------------------------------------------------


# Faults of many types have few code paths: scales read as a pair or one by one; rows staged or not, whole blocks or parts.
ALIKE = [(m.name, by_name(k)) for m in MUTATIONS.values() for k in m.types if len(m.types) <= 2]
ALIKE += [("scales-flushed", k) for k in (types.Q4_K, types.Q5_1, types.Q6_K)]
ALIKE += [("last-block-lost", k) for k in (types.Q4_K, types.Q5_0, types.Q6_K)]


@pytest.mark.parametrize(("name", "kind"), ALIKE, ids=str)
def test_faulty_matvec_and_faulty_dequantise_are_wrong_alike(name: str, kind: TensorType) -> None:
    """Both contracts multiply with exactly the wrong weights that the dequantise kernel shows."""
    raw, x = weights(kind, name), verify.random_activations(1, COLS)
    right = quants.dequantise(raw, kind, (ROWS, COLS)).astype(np.float64)
    wrong = decoded(name, kind, raw, ROWS * COLS).reshape(ROWS, COLS).astype(np.float64)
    assert not np.array_equal(wrong, right)
    finite = np.isfinite(wrong).all(-1)
    assert finite.all() or name == "q8-36-bytes"
    q, d = verify.round_to_q8(x)
    used = {"f32": x.astype(np.float64), "q8": q * np.repeat(d.astype(np.float64), 32, -1)}
    for contract in launches.CONTRACTS:
        y = multiplied(name, kind, contract, raw, x)
        with np.errstate(invalid="ignore", over="ignore"):
            truth, size = used[contract][0] @ wrong.T, np.abs(used[contract][0]) @ (np.abs(wrong) + 40 * np.abs(right).max()).T
        assert np.all(np.abs(y - truth)[finite] <= 64 * verify.UNIT * size[finite])
        if name != "last-block-lost":  # which spares all rows but the last
            lost = np.abs(used[contract] @ right.T - truth)[0][finite] > 64 * verify.UNIT * size[finite]
            assert lost.any() or not finite.any()


def blocks_of(name: str, kind: TensorType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(raw blocks, right values, wrong values), the last two by block."""
    raw = weights(kind, name)
    right = quants.dequantise(raw, kind, (ROWS * COLS,))
    wrong = decoded(name, kind, raw, ROWS * COLS)
    n = kind.block_elements
    return raw.reshape(-1, kind.block_bytes), right.reshape(-1, n), wrong.reshape(-1, n)


def steps(values: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.rint(values / d[:, None]).astype(int)


def test_nibble_pairs_are_the_right_values_in_wrong_places() -> None:
    _, right, wrong = blocks_of("q4-nibble-pairs", types.Q4_0)
    order = np.arange(32).reshape(2, 16).T.reshape(-1)  # 0, 16, 1, 17, …
    np.testing.assert_array_equal(wrong, right[:, order])


def test_min_lost_adds_the_min_back() -> None:
    raw, right, wrong = blocks_of("q4k-min-lost", types.Q4_K)
    lowest = raw.copy()
    lowest[:, 16:] = 0
    mins = quants.dequantise(lowest.reshape(-1), types.Q4_K, (right.size,)).reshape(right.shape)  # -dmin min
    np.testing.assert_allclose(wrong, right - mins, atol=4 * verify.UNIT * np.abs(right).max())
    assert (wrong >= 0).all()


def test_swapped_nibbles_exchange_the_quants_of_two_sub_blocks() -> None:
    raw, _, wrong = blocks_of("q4k-nibbles-exchanged", types.Q4_K)
    swapped = raw.copy()
    swapped[:, 16:] = raw[:, 16:] >> 4 | raw[:, 16:] << 4
    np.testing.assert_array_equal(wrong.reshape(-1), quants.dequantise(swapped.reshape(-1), types.Q4_K, (wrong.size,)))


def test_swapped_d_and_dmin() -> None:
    raw, _, wrong = blocks_of("q4k-d-dmin", types.Q4_K)
    swapped = raw.copy()
    swapped[:, [0, 1, 2, 3]] = raw[:, [2, 3, 0, 1]]
    np.testing.assert_array_equal(wrong.reshape(-1), quants.dequantise(swapped.reshape(-1), types.Q4_K, (wrong.size,)))


def test_lost_top_bits_touch_the_scales_of_the_upper_half_only() -> None:
    raw, right, wrong = blocks_of("q4k-scale-unpack", types.Q4_K)
    np.testing.assert_array_equal(wrong[:, :128], right[:, :128])
    low = raw.copy()
    low[:, 4:8] &= 0x3F  # the top two bits of scales 4..7 stand above scales 0..3
    lowered = quants.dequantise(low.reshape(-1), types.Q4_K, (right.size,)).reshape(right.shape)
    np.testing.assert_array_equal(wrong[:, 128:], lowered[:, 128:])
    assert (wrong[:, 128:] != right[:, 128:]).mean() > 0.5


def test_one_scale_leaves_the_low_nibbles_right() -> None:
    _, right, wrong = blocks_of("q4k-one-scale", types.Q4_K)
    r, w = right.reshape(-1, 4, 2, 32), wrong.reshape(-1, 4, 2, 32)
    np.testing.assert_array_equal(w[:, :, 0], r[:, :, 0])
    assert (w[:, :, 1] != r[:, :, 1]).mean() > 0.5


def test_sixteen_byte_groups_read_each_sub_block_from_bytes_of_its_own() -> None:
    raw, right, wrong = blocks_of("q4k-16-bytes", types.Q4_K)
    own = raw[:, 16:].reshape(-1, 8, 16)
    read = np.concatenate([own & 15, own >> 4], -1)  # (blocks, sub-block, value)
    repacked = raw.copy()
    repacked[:, 16:] = (read[:, 0::2] | read[:, 1::2] << 4).reshape(-1, 128)
    np.testing.assert_array_equal(wrong.reshape(-1), quants.dequantise(repacked.reshape(-1), types.Q4_K, (wrong.size,)))
    assert (wrong != right).mean() > 0.4


def test_neighbouring_nibbles_of_q4_k() -> None:
    raw, _, wrong = blocks_of("q4k-nibble-pairs", types.Q4_K)
    quants_of_chunk = np.stack([raw[:, 16:] & 15, raw[:, 16:] >> 4], -1).reshape(-1, 4, 64)  # neighbours of a byte
    repacked = raw.copy()
    repacked[:, 16:] = (quants_of_chunk[:, :, :32] | quants_of_chunk[:, :, 32:] << 4).reshape(-1, 128)
    np.testing.assert_array_equal(wrong.reshape(-1), quants.dequantise(repacked.reshape(-1), types.Q4_K, (wrong.size,)))


@pytest.mark.parametrize("kind", [types.Q5_0, types.Q5_1], ids=str)
def test_fifth_bits_of_the_other_half_are_off_by_sixteen_steps_or_right(kind: TensorType) -> None:
    raw, right, wrong = blocks_of("q5-high-halves", kind)
    d = raw[:, :2].copy().view(np.float16).astype(np.float32)[:, 0]
    assert set(np.unique(np.abs(steps(wrong - right, d)))) == {0, 16}
    assert 0.2 < (wrong != right).mean() < 0.8


def test_blocks_of_36_bytes_drift_from_the_second_on() -> None:
    _, right, wrong = blocks_of("q8-36-bytes", types.Q8_0)
    np.testing.assert_array_equal(wrong[0], right[0])
    assert (wrong[1:] != right[1:]).mean() > 0.9


def test_flushed_scales_zero_the_blocks_that_have_them() -> None:
    raw, right, wrong = blocks_of("scales-flushed", types.Q8_0)
    subnormal = (raw[:, 1] & 0x7C) == 0
    assert 0 < subnormal.sum() < len(raw)
    assert not wrong[subnormal].any()
    np.testing.assert_array_equal(wrong[~subnormal], right[~subnormal])


@pytest.mark.parametrize("kind", [types.Q4_K, types.Q6_K, types.Q5_0], ids=str)
def test_the_last_block_is_lost_and_nothing_else(kind: TensorType) -> None:
    _, right, wrong = blocks_of("last-block-lost", kind)
    assert right[-1].any()
    assert not wrong[-1].any()
    np.testing.assert_array_equal(wrong[:-1], right[:-1])


def test_a_fault_enters_an_engine_and_moves_its_logits() -> None:
    config = replace(CONFIG, block_count=1)
    model = random_model(config=config, mix=(types.Q4_K, types.Q6_K))
    token = np.array([5])

    def logits(engine: engines.Engine) -> np.ndarray:
        return engine.to_numpy(forward(engine, config, token, engine.new_cache(config, 1)))

    healthy = logits(engines.create("ptx", model))
    faulty = logits(engines.create("ptx", model, **mutations.options("q4k-min-lost")))
    spared = logits(engines.create("ptx", model, **mutations.options("q5-high-halves")))  # no tensor of that type
    assert np.abs(faulty - healthy).max() > 0.1 * np.abs(healthy).max()
    np.testing.assert_array_equal(spared, healthy)


def test_a_kernel_fault_is_a_fault_by_id_of_the_engines_that_run_kernels(tiny: Path) -> None:
    """Also those that the catalogue does not have; the session's own engine multiplies as the faulty kernel decodes."""
    name = "blk.0.attn_q.weight"
    with open_model(tiny) as model:
        session = session_with(model, ["q4k-scale-unpack"], engine="ptx")
        assert session.engine.name == "ptx"
        tensor = model.tensor(name)
        assert tensor.type is types.Q4_K
        x = verify.random_activations(1, tensor.cols)
        got = session.engine.to_numpy(session.engine.matmul(session.engine.from_numpy(x), name))[0]
        wrong = decoded("q4k-scale-unpack", tensor.type, tensor.raw, tensor.size).reshape(tensor.shape).astype(np.float64)
        right = tensor.dequantise().astype(np.float64)
    size = np.abs(x[0].astype(np.float64)) @ (np.abs(wrong) + np.abs(right).max()).T
    assert (np.abs(got - wrong @ x[0]) <= 64 * verify.UNIT * size).all()
    assert (np.abs(got - right @ x[0]) > 64 * verify.UNIT * size).any()


def test_kernel_faults_are_distinguished_from_others() -> None:
    only = sorted(set(MUTATIONS) - set(FAULTS))
    assert {"q4-nibble-pairs", "q5-high-halves", "last-block-lost"} <= set(only)
    shared = SHARED[0]
    for name in (*only, shared):
        others, options = mutations.select(["rope-norm", name], "ptx", FAULTS)
        assert others == ["rope-norm"]
        assert set(options) == {"kernels", "overrun"}
        assert options["kernels"] == mutations.ptx(name)
    _, options = mutations.select([only[0]], "cuda", FAULTS)
    assert options == {"kernels": mutations.sources(only[0])}
    assert mutations.select([shared, "rope-norm"], "jit", FAULTS) == ([shared, "rope-norm"], {})
    with pytest.raises(UsageError, match=rf"'{only[0]}' is one of the CUDA kernels, which engine 'jit' does not run"):
        mutations.select([only[0]], "jit", FAULTS)
    with pytest.raises(UsageError, match="one kernel fault at a time"):
        mutations.select(only[:2], "ptx", FAULTS)


SHARED = [name for name in MUTATIONS if name in FAULTS]


@pytest.mark.parametrize("name", SHARED)
def test_a_kernel_fault_and_the_catalogues_fault_of_the_same_name_decode_alike(name: str) -> None:
    """One name, one bug: in NumPy, where the catalogue puts it, and in the kernels."""
    kind = types.Q4_K
    raw = weights(kind, name)
    change = FAULTS[name].registry
    assert change is not None
    wrong = change(dict(quants.REGISTRY))[kind].decode(raw.reshape(-1, kind.block_bytes))
    got = decoded(name, kind, raw, ROWS * COLS).reshape(wrong.shape)
    np.testing.assert_allclose(got, wrong, rtol=0, atol=4 * verify.UNIT * np.abs(wrong).max())


def test_the_catalogue_has_most_of_the_kernel_faults() -> None:
    assert len(SHARED) >= 7
