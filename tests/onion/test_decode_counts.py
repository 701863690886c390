"""Counting decodings: hooks are added and removed, and see every decoder."""

from __future__ import annotations

import pytest

from aprlab import paths
from aprlab.faults import session_with
from aprlab.faults.tensors import with_values
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model import decode_hooks
from aprlab.onion.decode_counts import decodings

PRODUCT = "blk.0.attn_q.weight"


def test_an_engine_that_keeps_its_weights_decodes_none_of_its_products_again() -> None:
    session = Session(open_model(paths.embedded_model()))
    assert decodings(session.engine, session.config, 5) == {"token_embd.weight": 1}


def test_an_engine_that_keeps_nothing_decodes_each_product_again() -> None:
    session = Session(open_model(paths.embedded_model()), cache_weights=False)
    assert decodings(session.engine, session.config, 5)[PRODUCT] == 1


def test_a_cache_that_never_hits_shows() -> None:
    session = session_with(paths.embedded_model(), ["cache-key-mismatch"])
    assert decodings(session.engine, session.config, 5)[PRODUCT] == 1


def test_a_faulty_decoder_is_counted_too() -> None:
    session = session_with(paths.embedded_model(), ["q4k-one-scale"], cache_weights=False)
    kinds = {name: tensor.type.name for name, tensor in session.model.tensors.items()}
    counts = decodings(session.engine, session.config, 5)
    assert any(kinds[name] == "Q4_K" and count >= 1 for name, count in counts.items())


def test_hooks_are_removed_even_after_an_error() -> None:
    tensor = open_model(paths.embedded_model()).tensor(PRODUCT)
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="on purpose"), decode_hooks.decode_hook(seen.append):
        tensor.dequantise()
        raise RuntimeError("on purpose")
    tensor.dequantise()
    assert seen == [PRODUCT]


def test_each_decoding_of_an_edited_tensor_is_noted() -> None:
    tensor = open_model(paths.embedded_model()).tensor(PRODUCT)
    seen: list[str] = []
    edited = with_values(tensor, lambda values: values)
    with decode_hooks.decode_hook(seen.append):
        edited.dequantise()
        first = len(seen)
        edited.dequantise()
    assert set(seen) == {PRODUCT}
    assert len(seen) > first >= 1
