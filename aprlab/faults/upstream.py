"""The software of the ticket, as it was on 2026-01-30: its tables, its reader, its loader's arithmetic, its checks.

Modelled from the record, to be watched, not used: every step here takes a wrong turn in silence. Beside it, what the
ticket itself got wrong, each as a function whose figures can be checked without the machine that produced them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import engines
from aprlab.errors import FormatError, UsageError
from aprlab.faults.dtypes import WRITER_CODE, WRITER_TABLE
from aprlab.faults.forward import LastOfEquals
from aprlab.faults.naming import QKV_BIASES, gguf_name
from aprlab.faults.tensors import is_
from aprlab.formats import apr, open_model, raw
from aprlab.inference.session import Session
from aprlab.model import names
from aprlab.model.config import LAYERS_LIMIT, ModelConfig
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.published import known_model
from aprlab.quants import types
from aprlab.quants.types import TensorType

READER = "upstream-2026-01-30"
READERS = (READER,)

# ── the four steps ────────────────────────────────────────────────────────────────────────────────────────────────

# Step 2. `TensorEntry::from_binary`: dtype byte -> text. 8 and 9 as the ticket's table has them, the rest of the
# record; a byte that is not here becomes "F32".
BYTE_TO_TEXT: dict[int, str] = {
    0: "F32", 1: "F16", 2: "BF16", 3: "F64", 4: "I32", 5: "I64", 6: "I8", 7: "U8", 8: "Q4", 9: "Q8_0", 12: "Q4_K", 14: "Q6_K",
}  # fmt: skip
# Step 3. `dtype_to_ggml_qtype`: text -> quantised type; anything else gives None, and None is read as floats.
TEXT_TO_TYPE: dict[str, TensorType] = {"Q4_K": types.Q4_K, "Q5_K": types.Q5_K, "Q6_K": types.Q6_K}
# Step 4. What None meant: these are read as what they are, all others as F32.
FLOATS: dict[str, TensorType] = {"F32": types.F32, "F16": types.F16}


@dataclass(frozen=True, slots=True)
class Chain:
    """What became of one dtype byte.

    Attributes:
        byte: in the index.
        text: what `from_binary` called it.
        known: whether the table had the byte at all.
        matched: the quantised type that the text matched, or None.
        loaded: the type the blocks were read as.
    """

    byte: int
    text: str
    known: bool
    matched: TensorType | None
    loaded: TensorType

    def __str__(self) -> str:
        text = f'"{self.text}"' if self.known else f'unknown, so "{self.text}"'
        match = f"matches {self.matched}" if self.matched else "no match"
        return f"byte {self.byte} → {text} → {match} → read as {self.loaded}"


def chain(byte: int) -> Chain:
    """The reader's way from a dtype byte to the type it reads the blocks as; never an error."""
    text = BYTE_TO_TEXT.get(byte, "F32")
    matched = TEXT_TO_TYPE.get(text)
    return Chain(byte, text, byte in BYTE_TO_TEXT, matched, matched or FLOATS.get(text, types.F32))


def mismatch_table(writer: Mapping[TensorType, int] = WRITER_TABLE) -> list[dict[str, Any]]:
    """The ticket's 'Complete DType Mapping Table': one row a type, written, read, matched, right."""
    rows = []
    for kind, byte in writer.items():
        way = chain(byte)
        right = way.loaded is kind
        rows.append({"type": kind.name, "writes": byte, "reads": way.text if way.known else f"unknown → {way.text}",
                     "matches": None if way.matched is None else way.matched.name, "right": right})  # fmt: skip
    return rows


# ── the reader ────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: str | Path) -> Model:
    """Open an APR file as the ticket's reader did: whatever it does not know becomes something else, in silence.

    Types go the way of `chain`. A tensor that is read as F32 without being it has too few bytes: the first values are
    its packed blocks taken for floats, the rest are zeros. Weights and norms are looked up under every form of name,
    Q/K/V biases only as ``model.layers.N…``; those not found are zeros. Missing config keys take upstream's defaults.
    `warnings` of the model say what it did.

    Raises:
        FormatError: what not even that reader survived: no parsable header, metadata or index, no tokenizer.
    """
    box = apr.scan(path, verify=False)
    notes: list[str] = []
    tensors: dict[str, Tensor] = {}
    ways: Counter[Chain] = Counter()
    naming = apr.naming_of(box.entries)
    for entry in box.entries:
        gguf = gguf_name(entry.name)
        if is_(gguf, *QKV_BIASES) and names.to_gguf(entry.name, "canonical") is None:
            continue  # biases were asked for under one name only
        way = chain(entry.code)
        ways[way] += 1
        shape = entry.dims[::-1] if naming == "raw" else entry.dims
        held = _read_as(way.loaded, shape, box.bytes_of(entry))
        tensors[gguf] = Tensor(gguf, way.loaded, shape, held, Origin(box.path, entry.name, -1))
    notes += [f"{way} ({count} tensors)" for way, count in sorted(ways.items(), key=lambda item: item[0].byte)]
    config = _config(box.metadata, tensors, notes, box.path)
    lost = 0
    for layer in range(config.block_count):
        for bias, heads in zip(QKV_BIASES, (config.head_count, config.head_count_kv, config.head_count_kv), strict=True):
            name, rows = f"blk.{layer}.{bias}", heads * config.head_dim
            if name not in tensors:
                if rows > ROWS_LIMIT:
                    raise FormatError(f"{heads} heads of {config.head_dim} values", code="apr.bad-value", path=box.path)
                lost += 1
                tensors[name] = Tensor(name, types.F32, (rows,), np.zeros(rows * 4, np.uint8), Origin(box.path, "", -1))
    if lost:
        notes.append(f"{lost} Q/K/V biases not found under model.layers.N…: left out")
    return Model(
        path=box.path, format="apr", dialect=READER, tensors=tensors, metadata=box.metadata,
        make_config=lambda: config, make_tokenizer=lambda: apr.tokenizer(box.metadata, box.path), warnings=notes,
    )  # fmt: skip


def _read_as(kind: TensorType, shape: tuple[int, ...], raw: np.ndarray) -> np.ndarray:
    """The bytes as `kind` of `shape`: cut or filled up with zeros to what that takes."""
    whole = shape[-1] % kind.block_elements == 0
    wanted = kind.nbytes(shape) if whole else len(raw)
    if len(raw) == wanted:
        return raw
    held = np.zeros(wanted, np.uint8)
    held[: len(raw)] = raw[:wanted]
    return held


SIZE_LIMIT, ROWS_LIMIT = 1 << 31, 1 << 24  # numbers of a config: what upstream's u32 and a tensor can hold


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str], path: Path) -> ModelConfig:
    """The config under any known key, upstream's default where there is none; each default is noted."""

    def value(name: str, default: Any) -> Any:
        keys = apr.CONFIG_KEYS[name][0]
        found = next((metadata[key] for key in keys if metadata.get(key) is not None), None)
        if found is None:
            notes.append(f"{keys[0]} missing: {default} assumed")
        return default if found is None else found

    def whole(name: str, default: int) -> int:
        found = raw.whole(value(name, default))
        if isinstance(found, raw.Wrong) or not 0 <= found < SIZE_LIMIT:
            raise FormatError(f"{name} is {found!r}, no size that a tensor can have", code="apr.bad-value", path=path)
        return int(found)

    def real(name: str, default: float) -> float:
        given = value(name, default)
        found = raw.number(given)
        if isinstance(found, raw.Wrong):
            raise FormatError(f"{name} is {found!r}, not a number", code="apr.bad-value", path=path)
        return float(given)  # as upstream's JSON reader has it, not rounded to float32

    width, heads = whole("embedding_length", 0), whole("head_count", 0)
    layers, rope = whole("block_count", 0), raw.whole(value("rope_type", 0))
    if layers > LAYERS_LIMIT:
        raise FormatError(f"block_count is {layers}", code="config.too-many-layers", path=path)
    return ModelConfig(
        architecture=str(value("architecture", "unknown")),
        block_count=layers,
        embedding_length=width,
        feed_forward_length=whole("feed_forward_length", 4 * width),
        head_count=heads,
        head_count_kv=whole("head_count_kv", heads),
        head_dim=width // max(heads, 1),
        vocab_size=whole("vocab_size", 0),
        context_length=whole("context_length", 2048),
        rope_theta=real("rope_theta", 10_000.0),
        rope_type=apr.ROPE_TYPES.get(rope, "norm"),
        rms_norm_eps=real("rms_norm_eps", 1e-6),
        tied_embeddings="output.weight" not in tensors,
    )


def session(path: str | Path, *, engine: str | engines.Choice = "auto", threads: int | None = None) -> Session:
    """A session as upstream ran it: `read`, and a maximum over the logits for which NaN equals everything."""
    return Session(LastOfEquals(engines.create(engine, read(path), threads)))


# ── the loader's line ─────────────────────────────────────────────────────────────────────────────────────────────

_PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_AGAIN = ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LoadLine:
    """What the loader printed. `nbytes` is None where the record does not say what was counted."""

    layers: int
    quantised: int
    floats: int
    nbytes: int | None = field(default=None)

    @property
    def megabytes(self) -> int | None:
        """Whole MiB, cut off as Rust's integer division does it."""
        return None if self.nbytes is None else self.nbytes // 2**20

    def __str__(self) -> str:
        size = "" if self.megabytes is None else f"{self.megabytes} MB of weights on GPU "
        return (
            f"[AprV2ModelCuda] Pre-cached {size}({self.layers} layers, {self.quantised} quantized, {self.floats} F32 tensors)"
        )


def numbers_of(model: str | Model | ModelConfig | Numbers) -> Numbers:
    """block_count, embedding_length… of a known model's name, an opened model, a config, or such a mapping."""
    if isinstance(model, str):
        return known_model(model).config
    if isinstance(model, Model):
        model = model.config
    if isinstance(model, ModelConfig):
        return {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    return model


def _sizes(n: Numbers) -> dict[str, int]:
    """Values of one layer's matrices, by stem."""
    e, f = n["embedding_length"], n["feed_forward_length"]
    head_dim = n.get("head_dim") or e // n["head_count"]
    q, kv = n["head_count"] * head_dim, n["head_count_kv"] * head_dim
    return {
        "attn_q": q * e, "attn_k": kv * e, "attn_v": kv * e, "attn_output": e * q,
        "ffn_gate": f * e, "ffn_up": f * e, "ffn_down": e * f,
    }  # fmt: skip


def load_line(model: str | Model | ModelConfig | Numbers, *, quantised: bool) -> LoadLine:
    """What that loader says about a model whose matrices it takes for floats (or, rightly, for quantised).

    It uploads the seven projections of every layer, then attn_output, gate, up and down a second time; the output head
    and the norms count in bytes, the output head as a tensor only where it is quantised, the duplicates always as F32.
    """
    n = numbers_of(model)
    layers, sizes = n["block_count"], _sizes(n)
    if quantised:
        return LoadLine(layers, len(_PROJECTIONS) * layers + 1, len(_AGAIN) * layers)
    projections = layers * (sum(sizes[s] for s in _PROJECTIONS) + sum(sizes[s] for s in _AGAIN))
    head, norms = n["vocab_size"] * n["embedding_length"], (2 * layers + 1) * n["embedding_length"]
    return LoadLine(layers, 0, (len(_PROJECTIONS) + len(_AGAIN)) * layers, 4 * (projections + head + norms))


# ── corrections ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Correction:
    """One thing the ticket says, what is true instead, and the figures that show it."""

    number: int
    claim: str
    truth: str
    figures: dict[str, Any]


MODEL = "qwen2.5-coder-1.5b"


def double_upload(model: str = MODEL) -> Correction:
    """1. 10550 MB and 308 F32 tensors count uploads, not tensors of the file."""
    floats, right = load_line(model, quantised=False), load_line(model, quantised=True)
    inventory = known_model(model).tensors
    return Correction(
        1,
        "10550 MB and 308 F32 tensors show the lost dtype; about 200 quantised and 108 F32 would be correct",
        "the loader uploads 11 matrices per layer, four of them twice; by that count a correct file gives 197 and 112",
        {
            "floats": floats.floats, "megabytes": floats.megabytes, "right_quantised": right.quantised,
            "right_floats": right.floats, "true_quantised": inventory.get("quantised"), "true_floats": inventory["float"],
        },
    )  # fmt: skip


def parameters(model: str | Model | ModelConfig | Numbers = MODEL, *, separate_output: bool = True) -> int:
    """Values of a whole Qwen2: embedding (twice where the output is separate), layers, last norm."""
    n = numbers_of(model)
    e = n["embedding_length"]
    head_dim = n.get("head_dim") or e // n["head_count"]
    biases = (n["head_count"] + 2 * n["head_count_kv"]) * head_dim
    layer = sum(_sizes(n).values()) + biases + 2 * e
    return n["vocab_size"] * e * (1 + separate_output) + n["block_count"] * layer + e


def full_dequantisation(model: str = MODEL) -> Correction:
    """2. 6.62 GiB is every value as a float, not a mislabelled file (whose size would not change at all)."""
    count = parameters(model)
    return Correction(
        2,
        "the APR file has 6.62 GiB because of the dtype byte table",
        "it is the whole model in F32, as the end of the ticket itself says; a wrong byte does not change any size",
        {"parameters": count, "bytes": 4 * count, "gib": round(4 * count / 2**30, 2)},
    )


def blocks_as_floats(raw: np.ndarray) -> dict[str, float]:
    """What Q4_K blocks look like when they are taken for F32.

    Args:
        raw: uint8, whole blocks of 144 bytes.

    Returns:
        ``filled``: share of the tensor's elements that get any bytes; ``not_finite``: share of NaN and Inf among those;
        ``largest``: largest finite magnitude.
    """
    if raw.size == 0 or raw.size % types.Q4_K.block_bytes:
        raise FormatError(f"{raw.size} bytes are not whole Q4_K blocks", code="faults.not-whole-blocks")
    seen = np.ascontiguousarray(raw).reshape(-1).view("<f4")
    finite = np.isfinite(seen)
    elements = raw.size // types.Q4_K.block_bytes * types.Q4_K.block_elements
    return {
        "filled": seen.size / elements,
        "not_finite": 1 - float(finite.mean()),
        "largest": float(np.abs(seen[finite]).max()),
    }


def not_plausible(model: Model | None = None) -> Correction:
    """3. Q4_K bytes read as F32 are anything but 'numerically plausible'; on the embedded model, or on `model`."""
    if model is None:
        from aprlab import paths

        model = open_model(paths.embedded_model())
    raw = [t.raw for t in model.tensors.values() if t.type is types.Q4_K]
    if not raw:
        raise UsageError("has no Q4_K tensors", code="faults.no-q4k-tensors", path=model.path)
    return Correction(
        3,
        "activations look reasonable, so weights are F32 reinterpretations of Q4_K bytes",
        "such weights have NaN, Inf and values up to 3e38, in one element of seven: nothing reasonable survives a layer",
        blocks_as_floats(np.concatenate(raw)),
    )


def found_biases(written: Sequence[str]) -> int:
    """Q/K/V biases that a look-up under ``model.layers.N…`` finds among these names."""
    return sum(
        is_(gguf, *QKV_BIASES) for name in written if (gguf := names.to_gguf(name, "canonical")) is not None
    )  # fmt: skip


def third_layer(model: str = MODEL) -> Correction:
    """4. The third layer is no kernel: under bare names every bias is lost, every other tensor is found."""
    n = numbers_of(model)
    inventory = list(names.inventory(n["block_count"]))
    return Correction(
        4,
        "a third layer: Q4_K dequantisation or shapes, unknown",
        "the naming fix lost the Q/K/V biases; the Q4_K kernel was correct",
        {
            "biases": 3 * n["block_count"],
            "found_canonical": found_biases([names.from_gguf(name, "canonical") for name in inventory]),
            "found_bare": found_biases([names.from_gguf(name, "bare") for name in inventory]),
        },
    )


def category_points(passed: int, rows: int, maximum: int) -> int:
    """Points of one category of the score."""
    return round(passed / rows * maximum)


def score(points: float) -> float:
    """Points of 1000 on the logarithmic scale of 100."""
    return 100 * math.log10(1 + 9 * points / 1000)


CATEGORIES = {"QUAL": 200, "PERF": 150, "STAB": 200, "COMP": 150, "EDGE": 150, "REGR": 150}


def same_stdout(first: str, second: str) -> bool:
    """How two runs were compared: everything that was printed, the line with the seconds too."""
    return first == second


def bookkeeping() -> Correction:
    """5. 83/200 and 24.2 are what the harness gives to ten passes of the only category that had rows."""
    quality = category_points(10, 24, CATEGORIES["QUAL"])
    answer = "2 + 2 equals 4."
    runs = [f"{answer}\nCompleted in {seconds:.2f}s (cached)" for seconds in (1.84, 1.79)]
    return Correction(
        5,
        "83/200 and 24.2/100 measure quality; 0 of 12 conversions pass; 85 and more once GH-190 and GH-191 are fixed",
        "24 rows, all in one category: a perfect run scores 44.7; no conversion could pass, because timings were compared too",
        {
            "quality": quality, "score": round(score(quality), 3), "best_possible": round(score(CATEGORIES["QUAL"]), 1),
            "same_answer_passes": same_stdout(*runs),
        },
    )  # fmt: skip


# The ten stages of upstream's check: what each looks at, which is a part of a name or that a number is a number.
_NAMED: dict[str, tuple[str, ...]] = {
    "embedding": ("emb", "wte", "token_embd"),
    "positions": (),
    "q, k, v": ("q_proj", "attn_q", "k_proj", "attn_k", "v_proj", "attn_v"),
    "attention": ("o_proj", "attn_output"),
    "feed forward": ("gate_proj", "ffn_gate", "up_proj", "ffn_up"),
    "norms": ("norm",),
    "output head": ("lm_head", "output", "emb"),
}


def ten_checks(written: Sequence[str], tokens: Sequence[int], logits: np.ndarray) -> dict[str, bool]:
    """Upstream's `check`, modelled: names by parts, some tokens, no NaN, a softmax that sums to 1.

    Args:
        written: tensor names as in the file.
        tokens: what the tokenizer made of some text.
        logits: one row, (V,).
    """
    named = {stage: not parts or any(part in name for part in parts for name in written) for stage, parts in _NAMED.items()}
    shifted = np.exp(logits.astype(np.float64) - np.max(logits))
    total = float((shifted / shifted.sum()).sum())
    return {
        "tokenizer": len(tokens) > 0,
        **named,
        "probabilities": not bool(np.isnan(logits).any()) and abs(total - 1) < 1e-3,
        "sampler": 0 <= int(np.argmax(logits)) < len(logits),
    }


def blind_checks(layers: int = 28, vocabulary: int = 151_936) -> Correction:
    """6. All ten checks pass on random numbers under right names."""
    rng = np.random.default_rng(0)
    written = [names.from_gguf(name) for name in names.inventory(layers)]
    passed = ten_checks(written, [1], rng.normal(size=vocabulary).astype(np.float32))
    return Correction(
        6,
        "`check` reports 10/10, so the damage is silent",
        "no check looks at values, types or sizes: only at substrings of names, NaN, and a softmax that sums to 1",
        {"passed": sum(passed.values()), "of": len(passed)},
    )


CORRECTIONS: tuple[Callable[[], Correction], ...] = (
    double_upload, full_dequantisation, not_plausible, third_layer, bookkeeping, blind_checks,
)  # fmt: skip

__all__ = [
    "BYTE_TO_TEXT", "CORRECTIONS", "READER", "READERS", "TEXT_TO_TYPE", "WRITER_CODE", "WRITER_TABLE", "Chain", "Correction",
    "LoadLine", "blind_checks", "blocks_as_floats", "bookkeeping", "category_points", "chain", "double_upload",
    "found_biases", "full_dequantisation", "load_line", "mismatch_table", "not_plausible", "parameters", "read", "score",
    "session", "ten_checks", "third_layer",
]  # fmt: skip
