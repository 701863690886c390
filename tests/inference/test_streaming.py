"""Files larger than memory: what is read in parts gives the same, and pages go back when they have been used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG

from aprlab import instruments
from aprlab.conversion import synthetic as synth
from aprlab.engines import create
from aprlab.errors import FormatError, UsageError
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.content import drop_pages
from aprlab.published import ANSWER, QUESTION


@pytest.mark.parametrize("engine", ["reference", "jit"])
def test_a_streaming_engine_gives_the_same_logits(engine: str, tiny: Path) -> None:
    if engine == "jit":
        pytest.importorskip("numba")
    kept, streamed = (Session(open_model(tiny), engine=engine, stream=stream) for stream in (False, True))
    a, b = (s.generate(QUESTION, max_tokens=4, keep_logits=True) for s in (kept, streamed))
    assert a.logits is not None and b.logits is not None
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)
    assert ANSWER.startswith(b.text)
    assert streamed.engine.memory()["weights"] < 100_000  # vectors alone: nothing decoded is kept


def test_other_engines_cannot_stream(tiny: Path) -> None:
    with pytest.raises(UsageError, match="'ptx' cannot stream"):
        create("ptx", open_model(tiny), stream=True)


def test_dropped_pages_are_read_again(tiny: Path) -> None:
    tensor = open_model(tiny).tensor("blk.0.ffn_down.weight")
    before = tensor.raw.copy()
    drop_pages(tensor.raw)
    drop_pages(tensor.raw[77:99])
    drop_pages(before)  # no map: nothing happens
    drop_pages(before[:0])
    assert np.array_equal(tensor.raw, before)


def test_a_bad_scale_is_found_in_any_part(tiny: Path) -> None:
    tensor = open_model(tiny).tensor("token_embd.weight")
    raw = np.tile(tensor.raw, 400)  # 48 MB: three parts
    big = tensor.replace(raw=raw, shape=(tensor.rows * 400, tensor.cols))
    big.check_values()
    block = raw.nbytes // tensor.type.block_bytes - 2
    raw[block * tensor.type.block_bytes :][:2] = (0xFF, 0x7F)
    with pytest.raises(FormatError, match=f"block {block} has a scale") as caught:
        big.check_values()
    assert caught.value.offset == tensor.origin.offset + block * tensor.type.block_bytes


def test_a_fingerprint_in_parts_is_the_fingerprint(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny)
    names = ["token_embd.weight", "blk.0.ffn_down.weight", "blk.7.attn_v.weight"]
    whole = [instruments.fingerprint(model.tensor(n))[0] for n in names]
    monkeypatch.setattr(instruments, "LARGE", 1000)
    monkeypatch.setattr(instruments, "PART", 4096)
    for name, due in zip(names, whole, strict=True):
        got = instruments.fingerprint(model.tensor(name))[0]
        assert (got.raw, got.values, got.seen.zeros, got.seen.min, got.seen.max, got.seen.percentiles) == (
            due.raw, due.values, due.seen.zeros, due.seen.min, due.seen.max, due.seen.percentiles,
        )  # fmt: skip
        assert due.seen.std is not None and due.seen.mean is not None
        np.testing.assert_allclose([got.seen.mean, got.seen.std], [due.seen.mean, due.seen.std], rtol=1e-7, atol=1e-12)
    broken = model.tensor(names[0])
    values = broken.dequantise()[:200].copy()
    values[3, 5], values[190, 7] = np.nan, np.inf
    bad = broken.replace(type=model.tensor("output_norm.weight").type, shape=values.shape, raw=values.view(np.uint8).reshape(-1))
    seen = instruments.fingerprint(bad)[0].seen
    assert (seen.nan, seen.inf, seen.count) == (1, 1, values.size)


def test_memory_of_file_work_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file of 70 MB and one of 8: the peaks of conversion, strict reading and fingerprint differ by a few chunks."""
    from dataclasses import replace

    code = (
        "import re, sys; from aprlab.conversion import convert, export; from aprlab.formats import open_model\n"
        "from aprlab.instruments import fingerprint\n"
        "a = sys.argv[1]; convert(a, a + '.apr'); export(a + '.apr', a + '.gguf'); open_model(a + '.apr').check_values()\n"
        "fingerprint(open_model(a).tensor('blk.0.ffn_down.weight'))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    peaks = []
    for layers, wide in ((1, 2048), (2, 20480)):
        path = tmp_path / f"{layers}.gguf"
        synth.write(replace(CONFIG, block_count=layers, embedding_length=1024, feed_forward_length=wide), path)
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code, path], text=True)) / 1024)
    sizes = [(tmp_path / f"{n}.gguf").stat().st_size / 2**20 for n in (1, 2)]
    assert sizes[1] > sizes[0] + 50
    assert peaks[1] < 300 and peaks[1] - peaks[0] < 30
