"""Fewer or more rows of vocabulary than the reference has, and files of which only a part is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from variants import variant

from aprlab.conversion import convert
from aprlab.formats import gguf, open_model
from aprlab.model import Tensor
from aprlab.onion.peeling import peel
from aprlab.quants import quantise

ROWS = ("token_embd.weight", "output.weight")


def with_rows(source: Path, out: Path, rows: int, *, kind: int = 5, scale: float = 1.0) -> Path:
    """`source` with as many rows of vocabulary, and as many tokens; new rows are copies of the first, scaled."""
    header, model = gguf.read_header(source), open_model(source)
    tokens, kinds = list(header.value("tokenizer.ggml.tokens")), header.value("tokenizer.ggml.token_type").tolist()
    more = max(rows - len(tokens), 0)
    tokens = (tokens + [f"[NEW{n}]" for n in range(more)])[:rows]
    kinds = (kinds + [kind] * more)[:rows]
    tensors: dict[str, Tensor | None] = {}
    for name in ROWS:
        if name in model.tensors:
            old = model.tensors[name]
            values = np.concatenate([old.dequantise(), old.dequantise(slice(0, 1)).repeat(more, axis=0) * np.float32(scale)])
            extra = quantise(np.ascontiguousarray(values[old.shape[0] :]), old.type).reshape(-1) if more else old.raw[:0]
            step = old.type.row_bytes(old.cols)
            raw = np.concatenate([old.raw, extra])[: rows * step]
            tensors[name] = Tensor(name, old.type, (rows, old.cols), raw, old.origin)
    keys = {
        "tokenizer.ggml.tokens": gguf.field_of("tokenizer.ggml.tokens", "array[string]", tokens),
        "tokenizer.ggml.token_type": gguf.field_of("tokenizer.ggml.token_type", "array[int32]", kinds),
    }
    return variant(source, out, keys=keys, tensors=tensors)


def test_padding_rows_fewer_are_the_same_model(tiny: Path, tmp_path: Path) -> None:
    verdict = peel(tiny, with_rows(tiny, tmp_path / "v.gguf", 835))
    (finding,) = verdict.findings
    assert (verdict.verdict, verdict.exit_code, finding.code) == ("equivalent", 0, "tokenizer.rows-fewer")
    assert finding.parameters == {"count": 5, "first": 835, "last": 839, "tokens": [f"[PAD{n}]" for n in range(835, 840)]}
    assert "835 to 839 ([PAD835], " in finding.mechanism


@pytest.mark.parametrize("kind", [None, "q8_0"])
def test_padding_rows_more_are_the_same_model(tiny: Path, tmp_path: Path, kind: str | None) -> None:
    cand = with_rows(tiny, tmp_path / "v.gguf", 847)
    if kind is not None:
        cand = tmp_path / "v.apr"
        convert(tmp_path / "v.gguf", cand, quantize=kind)
    verdict = peel(tiny, cand)
    assert verdict.exit_code == 0, verdict
    (finding,) = [f for f in verdict.findings if f.code == "tokenizer.rows-more"]
    assert finding.parameters["first"] == 840 and finding.parameters["tokens"][0] == "[NEW0]"


def test_rows_of_tokens_with_a_meaning_are_not_padding(tiny: Path, tmp_path: Path) -> None:
    for n, (rows, kind, scale) in enumerate(((847, 3, 1.0), (847, 5, 50.0))):  # control tokens; rows that win everywhere
        verdict = peel(tiny, with_rows(tiny, tmp_path / f"{n}.gguf", rows, kind=kind, scale=scale))
        assert verdict.exit_code == 3, verdict
        assert "tokenizer.rows-more" in [f.code for f in verdict.findings]
    verdict = peel(tiny, with_rows(tiny, tmp_path / "words.gguf", 820))  # 820 to 834 are words and the ends of answers
    assert verdict.exit_code != 0 and "tokenizer.rows-fewer" not in [f.code for f in verdict.findings]


def test_a_third_of_a_model_is_missing_tensors_and_no_other_model(tiny: Path, tmp_path: Path) -> None:
    names = list(open_model(tiny).tensors)
    kept = [n for n in names if not n.startswith("blk.") or n.startswith("blk.0.")]
    assert 3 * len(kept) < 2 * len(names)
    verdict = peel(tiny, variant(tiny, tmp_path / "v.gguf", tensors=dict.fromkeys(n for n in names if n not in kept)))
    codes = {f.code: f for f in verdict.findings}
    assert verdict.verdict == "broken" and "naming.other-model" not in codes
    missing = {t for f in verdict.findings if f.code in ("naming.tensors-missing", "naming.biases-missing") for t in f.tensors}
    assert missing == set(names) - set(kept)


def test_tensors_of_other_shapes_beside_equal_ones_are_the_same_model(tiny: Path, tmp_path: Path) -> None:
    """Only what differs in every matrix is another model."""
    model = open_model(tiny)

    def halved(t: Tensor) -> Tensor:
        return Tensor(t.name, t.type, (t.rows // 2, t.cols), t.raw[: t.nbytes // 2], t.origin)

    matrices = [n for n, t in model.tensors.items() if len(t.shape) == 2 and n.startswith("blk.")]
    vectors = {n: Tensor(n, t.type, (t.size // 2,), t.raw[: t.nbytes // 2], t.origin)
               for n, t in model.tensors.items() if len(t.shape) == 1}  # fmt: skip
    some = {n: halved(model.tensors[n]) for n in matrices[: len(matrices) * 3 // 4]}
    verdict = peel(tiny, variant(tiny, tmp_path / "v.gguf", tensors={**vectors, **some}))
    assert "naming.other-model" not in [f.code for f in verdict.findings]
    every = {n: halved(t) for n, t in model.tensors.items() if len(t.shape) == 2}
    verdict = peel(tiny, variant(tiny, tmp_path / "w.gguf", tensors={**vectors, **every}))
    assert verdict.findings[0].code == "naming.other-model" and verdict.verdict == "not-comparable"
