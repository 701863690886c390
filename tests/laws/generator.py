"""Files for the laws between the tools: healthy variants, and files with one thing wrong; types × keys × tokenizers × faults.

Every case is made by code from the embedded model. What is asked of a case is not a verdict by hand: the laws compare what
the tools say of it with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from variants import variant

from aprlab.conversion import convert
from aprlab.errors import AprlabError
from aprlab.faults import convert_with, file_faults
from aprlab.formats import gguf, open_model
from aprlab.model import Origin, Tensor
from aprlab.quants import dequantise, quantise, types
from aprlab.quants.types import TensorType

Make = Callable[[Path], Path | None]


@dataclass(frozen=True)
class FileCase:
    """A file that is made when it is needed.

    Attributes:
        name: what was done.
        make: writes it to the path that it gets, or somewhere beside, and returns where; None where it cannot be made.
        healthy: nothing that a run could notice was changed.
    """

    name: str
    make: Make
    healthy: bool = False


# Of the first two layers, so that a model of two layers will do.
MATRIX, NORM, BIAS = "blk.1.ffn_up.weight", "blk.1.attn_norm.weight", "blk.0.attn_k.bias"
KEYS = ("qwen2.block_count", "qwen2.context_length", "qwen2.embedding_length", "qwen2.feed_forward_length",
        "qwen2.attention.head_count", "qwen2.attention.head_count_kv", "qwen2.rope.freq_base",
        "qwen2.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.padding_token_id",
        "tokenizer.chat_template", "general.architecture", "general.name", "general.file_type")  # fmt: skip
VALUES: dict[str, Any] = {"zero": 0, "one": 1, "large": 2**31, "negative": -1.0, "text": "x", "list": ["x", "y"],
                          "numbers": [1, 2], "yes": True, "nan": float("nan"),
                          "tiny": 1e-30}  # fmt: skip


def healthy(source: Path) -> Iterator[FileCase]:
    """Files that answer as the source does, bit for bit or within what their types hold."""
    for alignment in (16, 64, 128):
        yield FileCase(f"alignment {alignment}", lambda out, a=alignment: variant(source, out, alignment=a), True)
    yield FileCase("everything in another order", lambda out: variant(source, out, reverse=True), True)
    for key, value in {"general.description": "x", "somebody.else": 1, "qwen2.attention.causal": True,
                       "qwen2.rope.dimension_count": 32, "general.quantized_by": "y", "tokenizer.ggml.add_space_prefix": False,
                       "qwen2.rope.scaling.type": "none"}.items():  # fmt: skip
        yield FileCase(f"harmless {key}", lambda out, k=key, v=value: variant(source, out, keys={k: v}), True)
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.padding_token_id", "general.name"):
        yield FileCase(f"without {key}", lambda out, k=key: variant(source, out, drop=(k,)), True)
    for kind in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_0", "q5_1", "q4_k", "q4_k_m", "q4_1"):
        yield FileCase(f"re-encoded {kind}", lambda out, k=kind: _converted(source, out, quantize=k), True)
    for dialect in ("aprender", "realizar"):
        for compress in (None, "lz4", "zstd"):
            apr = f"APR {dialect} {compress}"
            yield FileCase(apr, lambda out, d=dialect, c=compress: _apr(source, out, dialect=d, compress=c), True)
    for kind in (types.F16, types.BF16):
        for name in (NORM, "output_norm.weight"):
            exact = FileCase(f"{name} as {kind.name}", lambda out, k=kind, n=name: _retyped(source, out, n, k), True)
            yield exact


def changed_keys(source: Path) -> Iterator[FileCase]:
    for key in KEYS:
        yield FileCase(f"GGUF without {key}", lambda out, k=key: variant(source, out, drop=(k,)))
        for what, value in VALUES.items():
            yield FileCase(f"GGUF {key} = {what}", lambda out, k=key, v=value: variant(source, out, keys={k: v}))


APR_KEYS = ("architecture", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size", "intermediate_size",
            "max_position_embeddings", "rope_theta", "rope_type", "rms_norm_eps", "head_dim", "tokenizer.vocabulary",
            "tokenizer.merges", "tokenizer.token_type", "tokenizer.pre_type", "tokenizer.eos_token_id",
            "tokenizer.bos_token_id", "tokenizer.add_bos_token", "chat_template")  # fmt: skip
APR_VALUES: dict[str, Any] = {"nothing": None, "zero": 0, "one": 1, "huge": 10**400, "tiny": 1e-30, "text": "x", "list": [1],
                              "texts": ["a b"], "object": {"a": 1}, "yes": True, "negative": -3}  # fmt: skip


def changed_metadata(source: Path) -> Iterator[FileCase]:
    for key in APR_KEYS:
        for what, value in APR_VALUES.items():
            yield FileCase(f"APR {key} = {what}", lambda out, k=key, v=value: _with_metadata(source, out, k, v))
    scaled = {"type": "linear", "factor": 2.0}
    for key, value in {"rope_scaling": scaled, "hidden_act": "gelu", "use_sliding_window": True}.items():
        yield FileCase(f"APR {key}", lambda out, k=key, v=value: _with_metadata(source, out, k, v))


def changed_tensors(source: Path) -> Iterator[FileCase]:
    for name in (MATRIX, NORM, BIAS, "token_embd.weight", "output_norm.weight", "blk.1.attn_v.weight", "blk.0.attn_q.bias"):
        yield FileCase(f"without {name}", lambda out, n=name: variant(source, out, tensors={n: None}))
        for what, change in EDITS.items():
            yield FileCase(f"{name} {what}", lambda out, n=name, c=change: _edited(source, out, n, c))
    extra = {"blk.0.attn_q_norm.weight": (32,), "rope_freqs.weight": (16,), "output.bias": (840,), "nobody": (3,)}
    for name, shape in extra.items():
        yield FileCase(f"with {name}", lambda out, n=name, s=shape: variant(source, out, tensors={n: _made(n, s)}))
    for share in (0.1, 0.5, 0.9, 0.999):
        yield FileCase(f"cut at {share}", lambda out, s=share: _cut(source, out, s))


def faulty(source: Path) -> Iterator[FileCase]:
    for id in file_faults():
        yield FileCase(f"fault {id}", lambda out, i=id: _with_fault(source, out.with_suffix(".apr"), i))


def cases(source: Path) -> list[FileCase]:
    parts = (healthy, changed_keys, changed_metadata, changed_tensors, faulty)
    return [case for part in parts for case in part(source)]


# ── making them ───────────────────────────────────────────────────────────────────────────────────────────────────


def _scaled(x: np.ndarray) -> np.ndarray:
    return x * np.float32(1.02)


def _rows_zero(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.reshape(-1, x.shape[-1])[:30] = 0
    return x


def _infinite(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.reshape(-1)[x.size // 2] = np.inf
    return x


EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "× 1.02": _scaled, "rows lost": _rows_zero, "with Inf": _infinite, "zero": np.zeros_like,
    "reversed": lambda x: x[::-1].copy(),
    "+ 0.01": lambda x: x + np.float32(0.01), "negated": lambda x: -x,
}  # fmt: skip


def _edited(source: Path, out: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """One tensor with other values, in its own type where that can hold them, else as F32."""
    tensor = open_model(source).tensors[name]
    values = change(tensor.dequantise())
    kind = tensor.type if np.isfinite(values).all() else types.F32
    return variant(source, out, tensors={name: _with_values(tensor, values, kind)})


def _retyped(source: Path, out: Path, name: str, kind: TensorType) -> Path:
    """A tensor in another type, with values that the type holds exactly on both sides."""
    tensor = open_model(source).tensors[name]
    raw = quantise(tensor.dequantise().reshape(1, -1), kind).reshape(-1)
    exact = dequantise(raw, kind, tensor.shape)
    base = variant(source, out.with_name("rounded.gguf"), tensors={name: _with_values(tensor, exact, types.F32)})
    return variant(base, out, tensors={name: _with_values(tensor, exact, kind)})


def _with_values(tensor: Tensor, values: np.ndarray, kind: TensorType) -> Tensor:
    values = np.ascontiguousarray(values, np.float32).reshape(-1, tensor.shape[-1])
    raw = values.view(np.uint8) if kind is types.F32 else quantise(values, kind)  # an encoder refuses Inf
    return Tensor(tensor.name, kind, tensor.shape, raw.reshape(-1), tensor.origin)


def _made(name: str, shape: tuple[int, ...]) -> Tensor:
    values = np.linspace(0.5, 1.5, int(np.prod(shape)), dtype=np.float32)
    return Tensor(name, types.F32, shape, values.view(np.uint8), Origin(Path("made"), name, 0))


def _cut(source: Path, out: Path, share: float) -> Path:
    data = source.read_bytes()
    out.write_bytes(data[: int(len(data) * share)])
    return out


def _converted(source: Path, out: Path, **options: Any) -> Path:
    convert(source, out, force=True, **options)
    return out


def _apr(source: Path, out: Path, **options: Any) -> Path:
    return _converted(source, out.with_suffix(".apr"), **options)


def _with_metadata(source: Path, out: Path, key: str, value: Any) -> Path | None:
    from dataclasses import replace

    def changed(metadata: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in metadata.items() if k != "source_metadata"}, key: value}

    out = out.with_suffix(".apr")
    try:
        convert(source, out, force=True, seams=lambda s: replace(s, metadata=changed))
    except (AprlabError, ValueError):
        return None
    return out


def _with_fault(source: Path, out: Path, id: str) -> Path | None:
    try:
        convert_with(source, out, [id], force=True)
    except AprlabError:
        return None
    return out


__all__ = ["FileCase", "cases", "gguf", "healthy"]
