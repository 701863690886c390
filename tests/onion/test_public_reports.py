"""Inputs of public bug reports, restated on one layer of the embedded model: what each is called, and that `run` agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_files import REF, as_type, file_with
from variants import shallow, variant

from aprlab.conversion import export
from aprlab.errors import AprlabError
from aprlab.formats import gguf, open_model
from aprlab.gates.repairs import repair
from aprlab.inference.session import Session
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.peeling import peel
from aprlab.quants import dequantise, types
from aprlab.quants.types import TensorType


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(REF, tmp_path_factory.mktemp("reports") / "base.gguf")


def matrices(base: Path) -> list[str]:
    return [name for name, t in open_model(base).tensors.items() if len(t.shape) == 2]


def with_keys(**keys: Any) -> Callable[[Path, Path], Path]:
    """A base with keys set; two underscores stand for a dot."""
    return lambda base, out: variant(base, out, keys={key.replace("__", "."): value for key, value in keys.items()})


def as_f16(base: Path, out: Path, change: Callable[[np.ndarray], np.ndarray] | None = None) -> Path:
    def held(name: str, tensor: Tensor) -> Tensor:
        return as_type(tensor, types.F16, change if name == "token_embd.weight" else None)

    return file_with(out, {n: lambda t, n=n: held(n, t) for n in matrices(base)}, base)


def rows_lost(x: np.ndarray) -> np.ndarray:
    x[300:330] = 0
    return x


def one_infinite(base: Path, out: Path) -> Path:
    name = "blk.0.ffn_down.weight"
    raw = np.array(open_model(as_f16(base, out)).tensors[name].raw)
    raw.view(np.uint16)[1000] = 0x7C00
    return file_with(out.with_name("inf.gguf"), {name: lambda t: t.replace(raw=raw)}, out)


def norms_as(kind: TensorType) -> Callable[[Path, Path], Path]:
    def make(base: Path, out: Path) -> Path:
        names = [name for name, t in open_model(base).tensors.items() if len(t.shape) == 1]
        return file_with(out, {n: lambda t: as_type(t, kind).replace(shape=t.shape) for n in names}, base)

    return make


def with_tensor(name: str, count: int) -> Callable[[Path, Path], Path]:
    ones = np.ones(count, np.float32).view(np.uint8)
    return lambda base, out: variant(
        base, out, tensors={name: Tensor(name, types.F32, (count,), ones, Origin(Path("made"), name, 0))}
    )


def tokens_twice(base: Path, out: Path) -> Path:
    tokens = open_model(base).tokenizer.tokens
    return variant(base, out, keys={"tokenizer.ggml.tokens": [*tokens[:-1], tokens[-2]]})


def more_tokens(base: Path, out: Path) -> Path:
    data = open_model(base).tokenizer
    kinds = gguf.field_of("tokenizer.ggml.token_type", "array[int32]", [*data.token_types, *[1] * 20])
    extra = [f"[NEW{n}]" for n in range(20)]
    return variant(base, out, keys={"tokenizer.ggml.tokens": [*data.tokens, *extra], "tokenizer.ggml.token_type": kinds})


THETA = gguf.field_of("qwen2.rope.freq_base", "uint32", 1_000_000)
# name -> how it is made, what peel says of it next to the base, the code of a finding, whether run refuses it
REPORTS: dict[str, tuple[Callable[[Path, Path], Path], str, str | None, bool]] = {
    "norms in F16": (norms_as(types.F16), "equivalent", "dtype.file-rounded", False),
    "norms in BF16": (norms_as(types.BF16), "equivalent", "dtype.file-rounded", False),
    "one Inf among F16 weights": (one_infinite, "broken", "weights.not-finite", True),
    "embedding rows lost": (lambda b, o: as_f16(b, o, rows_lost), "broken", "weights.rows-zero", False),
    "YaRN": (with_keys(qwen2__rope__scaling__type="yarn", qwen2__rope__scaling__factor=4.0,
                       qwen2__rope__scaling__original_context_length=128), "broken", None, False),
    "linear scaling": (with_keys(qwen2__rope__scaling__type="linear", qwen2__rope__scaling__factor=2.0), "broken", None, False),
    "the old key of it": (with_keys(qwen2__rope__scale_linear=2.0), "broken", None, False),
    "not causal": (with_keys(qwen2__attention__causal=False), "not-comparable", None, True),
    "a part of each head rotated": (with_keys(qwen2__rope__dimension_count=16), "not-comparable", None, True),
    "rope base as uint32": (with_keys(qwen2__rope__freq_base=THETA), "broken", None, True),
    "a token listed twice": (tokens_twice, "broken", "tokenizer.entries-differ", True),
    "a broken template": (with_keys(tokenizer__chat_template="{% for x in y %}"), "broken", "tokenizer.field-differs", True),
    "norms of query heads": (with_tensor("blk.0.attn_q_norm.weight", 32), "not-comparable", "naming.unknown-tensor", True),
    "factors of frequencies": (with_tensor("rope_freqs.weight", 16), "not-comparable", "naming.unknown-tensor", True),
    "an alias of the cut": (with_keys(tokenizer__ggml__pre="deepseek-r1-qwen"), "equivalent", "tokenizer.value-differs", False),
    "tokens beyond the rows": (more_tokens, "broken", "tokenizer.count-differs", True),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_reported_file_is_called_what_it_is(name: str, base: Path, tmp_path: Path) -> None:
    make, word, code, refused = REPORTS[name]
    path = make(base, tmp_path / "reported.gguf")
    verdict = peel(base, path, max_tokens=2)
    assert verdict.verdict == word, str(verdict)
    assert code is None or code in {f.code for f in verdict.findings}, str(verdict)
    alone = peel(None, path, fast=True)
    try:
        session = Session(open_model(path))
        session.generate("What is 2+2?", max_tokens=2, raw=session.wants_raw)
    except AprlabError:
        assert refused
        assert any(not f.harmless for f in alone.findings) and alone.exit_code != 0
    else:
        assert not refused
        assert all(f.harmless for f in alone.findings) or word == "broken", str(alone)


def test_a_tensor_that_nobody_understands_is_not_deleted(base: Path, tmp_path: Path) -> None:
    path = with_tensor("blk.0.attn_q_norm.weight", 32)(base, tmp_path / "v.gguf")
    with pytest.raises(AprlabError):
        repair(path, tmp_path / "out.gguf", base)
    assert not (tmp_path / "out.gguf").exists()


def test_a_bf16_checkpoint_is_no_broken_one(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "hf", format="safetensors", dtype="bf16")
    verdict = peel(base, tmp_path / "hf", max_tokens=2)
    assert verdict.verdict == "equivalent", str(verdict)
    assert all(f.harmless for f in peel(None, tmp_path / "hf", fast=True).findings)


# ── IQ4_NL, which is read here and not written: the nearest of its values, by hand ────────────────────────────────

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def as_iq4_nl(tensor: Tensor) -> Tensor:
    x = tensor.dequantise().reshape(-1, 32)
    at = np.abs(x).argmax(axis=1)
    d = (x[np.arange(len(x)), at] / VALUES[0]).astype(np.float16)
    scaled = np.divide(x, d.astype(np.float32)[:, None], out=np.zeros_like(x), where=d[:, None] != 0)
    codes = np.abs(scaled[:, :, None] - VALUES).argmin(axis=2).astype(np.uint8)
    raw = np.concatenate([d.view(np.uint8).reshape(-1, 2), codes[:, :16] | codes[:, 16:] << 4], axis=1).reshape(-1)
    kind = types.by_name("IQ4_NL")
    assert np.corrcoef(dequantise(raw, kind, tensor.shape).reshape(-1), x.reshape(-1))[0, 1] > 0.99
    return Tensor(tensor.name, kind, tensor.shape, raw, Origin(tensor.origin.path, tensor.name, -1))


def test_a_type_that_is_only_read_is_equivalent_with_its_bound(base: Path, tmp_path: Path) -> None:
    path = file_with(tmp_path / "iq4.gguf", dict.fromkeys(matrices(base), as_iq4_nl), base)
    verdict = peel(base, path, max_tokens=6)
    assert verdict.verdict == "equivalent", str(verdict)
    assert 0 < verdict.cost["kl"] <= verdict.cost["kl_allowed"]
    assert verdict.cost["tokens"] != any(f.code == "forward.answer-differs" for f in verdict.findings)
