"""Instruments distinguish known pairs, and every faulty one of the catalogue is caught."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab import instruments
from aprlab.errors import FormatError, UsageError
from aprlab.faults import instrument_faults
from aprlab.faults.instruments import REPLACEABLE, order_blind_checksum
from aprlab.formats import open_model
from aprlab.instruments.fingerprints import compare_fingerprints, fingerprint, transposed_unseen
from aprlab.instruments.hashes import checksum
from aprlab.instruments.self_test import INSTRUMENTS, selftest, show, void
from aprlab.instruments.summary_statistics import statistics
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.tracing.comparisons import compare_models


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    return open_model(tiny)


def test_every_honest_instrument_passes_and_says_what_was_shown() -> None:
    results = selftest()
    assert [r.name for r in results] == list(INSTRUMENTS)
    assert all(r.ok and len(r.detail) > 10 for r in results), [r for r in results if not r.ok]
    assert void(results) == frozenset()


def test_the_catalogues_rulers_are_instruments_here() -> None:
    assert REPLACEABLE.keys() <= INSTRUMENTS.keys()
    assert {f.replaces for f in instrument_faults().values()} == REPLACEABLE.keys()


@pytest.mark.parametrize("fault", instrument_faults().values(), ids=lambda f: f.id)
def test_a_faulty_instrument_fails_alone_and_its_findings_are_void(fault) -> None:
    result = show(INSTRUMENTS[fault.replaces], fault.instrument)
    assert not result.ok and result.detail and void([result]) == {fault.replaces}


def test_an_instrument_that_breaks_has_failed_and_the_others_go_on() -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody expected this")

    results = selftest({"norm": broken})
    assert void(results) == {"norm"} and len(results) == len(INSTRUMENTS)
    assert "nobody expected this" in next(r.detail for r in results if r.name == "norm")


@pytest.mark.parametrize("name", list(INSTRUMENTS))
@pytest.mark.parametrize("constant", [True, False, 0.0, 1.0], ids=str)
def test_no_instrument_passes_that_always_says_the_same(name, constant) -> None:
    assert not show(INSTRUMENTS[name], lambda *_: constant).ok


def test_an_unknown_instrument_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown instrument 'scale'"):
        selftest({"scale": len})


def test_statistics_agree_with_float64_and_count_what_is_not_finite() -> None:
    x = np.random.default_rng(5).normal(3, 2, (31, 47)).astype(np.float32)
    seen = statistics(x)
    wide = x.astype(np.float64)
    assert seen.mean == pytest.approx(wide.mean(), rel=1e-12) and seen.std == pytest.approx(wide.std(), rel=1e-6)
    assert seen.percentiles == pytest.approx(np.percentile(wide, instruments.PERCENTILES), rel=1e-6)
    assert seen.total == pytest.approx(wide.sum(), rel=1e-9)
    assert statistics(np.full(3, np.nan, np.float32)).mean is None
    with pytest.raises(UsageError, match="statistics of nothing"):
        statistics(np.zeros((0, 4), np.float32))


def test_the_sum_does_not_see_a_transposed_tensor_and_the_hash_does(model) -> None:
    tensor = model.tensors["blk.0.attn_q.weight"]
    assert transposed_unseen(tensor) == {"sum": False, "statistics": False, "hash": True}
    values = tensor.dequantise()
    turned = np.ascontiguousarray(values.T)
    assert order_blind_checksum(values) == order_blind_checksum(turned) and checksum(values) != checksum(turned)
    with pytest.raises(UsageError, match="only a matrix"):
        transposed_unseen(model.tensors["output_norm.weight"])


def test_fingerprints_name_every_tensor_and_compare_over_the_union(model) -> None:
    prints = fingerprint(model)
    assert [p.name for p in prints] == list(model.tensors)
    assert len({p.raw for p in prints}) > len(prints) * 0.8  # norms may share theirs
    told: list[int] = []
    assert fingerprint(model, told.append) == [fingerprint(tensor)[0] for tensor in model.tensors.values()] == prints
    assert told == [tensor.raw.nbytes for tensor in model.tensors.values()]
    assert compare_fingerprints(prints, prints).equal
    found = compare_fingerprints(prints[:-1], prints[1:])
    ends = {row["name"]: row["finding"] for row in found.rows}
    assert ends[prints[0].name] == "only in a" and ends[prints[-1].name] == "only in b"
    assert len(found.rows) == len(prints) and not found.equal


def test_a_fingerprint_sees_what_upstreams_sum_does_not(model) -> None:
    tensor = model.tensors["blk.1.ffn_norm.weight"]
    other = Tensor(tensor.name, tensor.type, tensor.shape, tensor.raw.reshape(-1, 4)[::-1].reshape(-1).copy(), tensor.origin)
    (row,) = compare_fingerprints(fingerprint(tensor), fingerprint(other)).rows
    assert row["sum"] and row["statistics"] and not row["raw"] and not row["values"] and not row["equal"]


def test_diff_is_the_one_comparison_of_files(model, tiny) -> None:
    assert instruments.diff(tiny, model).rows == compare_models(model, open_model(tiny)).rows


def test_an_empty_file_has_no_fingerprint(model) -> None:
    empty = Model(model.path, "gguf", "", {}, {}, lambda: model.config, lambda: model.tokenizer)
    with pytest.raises(FormatError, match="holds no tensors"):
        fingerprint(empty)
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_fingerprints([], [])
