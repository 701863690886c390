"""GGUF, APR and SafeTensors into each other. Blocks stay as they are unless somebody asks, by name, for another type.

Everything streams: memory does not grow with the file, and the output appears whole or not at all. SafeTensors has no
blocks, so that writing it decodes, and what that costs is measured on the way and stands in the report.
"""

from __future__ import annotations

import base64
import itertools
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from gguf.constants import LlamaFileType

from aprlab import __version__, mixes, names, types
from aprlab.errors import FormatError, NumericError, UnsupportedError, UsageError
from aprlab.formats import apr, gguf, huggingface, safetensors
from aprlab.formats.common import atomic, atomic_folder, check_output, drop_pages, padding, write_all
from aprlab.mixes import SUBSTITUTES
from aprlab.model import Model, ModelConfig, Tensor, TokenizerData
from aprlab.types import TensorType

CHUNK = 1 << 20
GAP_LIMIT = 1 << 16  # bytes of non-zero padding that a file may keep; more is not padding

FORMATS = ("gguf", "safetensors")  # what `export` writes

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class TensorLine:
    """What happened to one tensor."""

    name: str
    written_as: str
    shape: tuple[int, ...]
    type_in: str
    type_out: str
    nbytes: int


@dataclass(slots=True)
class Cost:
    """What a change of type did to values, over all tensors that went from one type to the other.

    Attributes:
        type_in, type_out: names of the types.
        tensors: how many.
        square: sum of the squared values before, float64.
        error: sum of the squared differences.
        worst: largest difference.
    """

    type_in: str
    type_out: str
    tensors: int = 0
    square: float = 0.0
    error: float = 0.0
    worst: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the differences in units of the values' own; 0 means that no value changed."""
        return float(np.sqrt(self.error / self.square)) if self.square else float(np.sqrt(self.error))

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Count in some values, float32, before and after."""
        apart = (after - before).reshape(-1).astype(np.float64)
        values = before.reshape(-1).astype(np.float64)
        self.square += float(values @ values)
        self.error += float(apart @ apart)
        self.worst = max(self.worst, float(np.abs(apart).max(initial=0.0)))

    def __str__(self) -> str:
        what = f"re-encoded {self.tensors} tensors from {self.type_in} to {self.type_out}"
        cost = f"relative error {self.relative:.2g}, largest {self.worst:.2g}" if self.error else "no value changed"
        return f"{what}: {cost}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"type_in": self.type_in, "type_out": self.type_out, "tensors": self.tensors,
                "relative": self.relative, "worst": self.worst}  # fmt: skip


@dataclass
class ConversionReport:
    """What a conversion did: bytes, types on both sides, seconds, one line per tensor.

    `reversible` says whether the output holds all that is needed to give the source back byte for byte; for an export it
    says whether that was done (None: the source is unknown). `costs` has what each change of type did to the values.
    """

    source: Path
    output: Path
    dialect: str
    bytes_in: int
    bytes_out: int
    types_in: dict[str, int]
    types_out: dict[str, int]
    lines: list[TensorLine]
    seconds: float
    reversible: bool | None = None
    notes: list[str] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    @property
    def tensors(self) -> int:
        """Number of tensors written."""
        return len(self.lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json` and reports."""
        return {
            "source": str(self.source), "output": str(self.output), "dialect": self.dialect,
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "tensors": self.tensors,
            "types_in": self.types_in, "types_out": self.types_out, "seconds": self.seconds,
            "reversible": self.reversible, "notes": self.notes, "costs": [cost.to_json() for cost in self.costs],
        }  # fmt: skip


@dataclass(frozen=True)
class Seams:
    """Where a conversion decides something. Each is a function, so that a historic bug can stand in for one of them.

    Attributes:
        name: GGUF name -> name in the file.
        code: type -> dtype byte.
        dims: shape (NumPy order) -> dims as written.
        tensor: the tensor to be written, e.g. re-encoded; gets and gives GGUF names and NumPy shapes.
        metadata: the finished metadata object.
        plans: the finished list of tensors, in file order.
    """

    name: Callable[[str], str]
    code: Callable[[TensorType], int]
    dims: Callable[[tuple[int, ...]], tuple[int, ...]]
    tensor: Callable[[Tensor], Tensor]
    metadata: Callable[[dict[str, Any]], dict[str, Any]] = lambda metadata: metadata
    plans: Callable[[list[apr.Plan]], list[apr.Plan]] = lambda plans: plans


def healthy_seams(
    dialect: apr.Dialect, target: TensorType | None = None, retype: Callable[[Tensor], Tensor] | None = None
) -> Seams:
    """The seams of a right conversion into `dialect`; `target` re-encodes every 2-D weight, `retype` each as it likes."""
    return Seams(
        name=lambda name: names.from_gguf(name, dialect.naming),
        code=lambda kind: kind.code,
        dims=lambda shape: shape if dialect.dims == "rows" else shape[::-1],
        tensor=retype or (lambda tensor: tensor if target is None else re_encoded(tensor, target)),
    )


def convert(
    source: str | Path | Model,
    output: str | Path,
    *,
    quantize: str | None = None,
    dialect: str = "aprender",
    compress: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    seams: Callable[[Seams], Seams] | None = None,
) -> ConversionReport:
    """Convert a model to APR, or to GGUF where the output is called so.

    Args:
        source: a GGUF file, an APR file, a SafeTensors file or Hugging Face directory, or an opened model.
        output: the file to write, GGUF if its name ends in ``.gguf``, else APR; it must not exist unless `force`.
        quantize: None keeps every block as it is; a type name (``q4_k``, ``q6k``, ``q8_0``, ``f16``, ``f32``…)
            re-encodes every 2-D weight, the name of a mix (``q4_k_m``…) each as llama.cpp would. Rows that a K type cannot
            hold get llama.cpp's substitute, and a note says so. Vectors of a SafeTensors model become F32, as everywhere.
        dialect: ``aprender`` or ``realizar``; APR only.
        compress: None, ``lz4`` or ``zstd``; APR only.
        force: replace an existing output.
        progress: called with bytes written since the last call.
        seams: turns the healthy seams into faulty ones (see `aprlab.onion`); APR only.

    Raises:
        UsageError, FormatError, UnsupportedError; no file is left behind.
    """
    started = time.perf_counter()
    if dialect not in apr.DIALECTS:
        raise UsageError(f"unknown dialect {dialect!r}; known: {', '.join(apr.DIALECTS)}")
    if compress not in (None, "lz4", "zstd"):
        raise UsageError(f"unknown compression {compress!r}; known: lz4, zstd")
    _known_target(quantize)
    output = Path(output)
    model = source if isinstance(source, Model) else Model.open(source)
    check_output(output, _inputs(model), force=force)
    if output.suffix == ".safetensors":
        raise UsageError("is a SafeTensors file; `export --format safetensors` writes a folder of them", path=output)
    _only_qwen2(model)
    into = apr.DIALECTS[dialect]
    retype = _retyping(model, quantize)
    if output.suffix == ".gguf":
        if dialect != "aprender" or compress is not None or seams is not None:
            raise UsageError("dialect, compression and faults are for APR; the output is called .gguf", path=output)
        return _to_gguf(model, output, [retype(t) for t in model.tensors.values()], quantize, force, progress, started)
    healthy = healthy_seams(into, retype=retype)
    used = healthy if seams is None else seams(healthy)

    plans, lines, written = [], [], []
    for tensor in model.tensors.values():
        out = used.tensor(tensor)
        written.append(out)
        name = used.name(out.name)
        plans.append(apr.Plan(name, used.code(out.type), used.dims(out.shape), out.nbytes, chunks_of(out)))
        lines.append(TensorLine(tensor.name, name, out.shape, tensor.type.name, out.type.name, out.nbytes))
    metadata = used.metadata(describe(model, written, into))
    flags = into.flags
    flags |= apr.FLAGS["quantized"] * any(t.type.quantised for t in written)
    flags |= apr.FLAGS["has_vocabulary"] * ("tokenizer.vocabulary" in metadata and into.naming == "canonical")
    size = apr.write(
        output, metadata, used.plans(plans), replace(into, flags=flags), compress=compress, force=force, progress=progress
    )
    reversible = seams is None and _promised(metadata, written)
    return _report(model, output, dialect, size, lines, written, started, quantize, reversible)


def _report(
    model: Model, output: Path, dialect: str, size: int, lines: list[TensorLine], written: list[Tensor], started: float,
    quantize: str | None = None, reversible: bool | None = None, notes: Iterable[str] = (),
) -> ConversionReport:  # fmt: skip
    """The report of what was just written; `notes` stand behind those about types."""
    costs = _costs(written)
    return ConversionReport(
        source=model.path,
        output=output,
        dialect=dialect,
        bytes_in=_bytes_of(model),
        bytes_out=size,
        types_in=model.by_type(),
        types_out=_count(t.type.name for t in written),
        lines=lines,
        seconds=time.perf_counter() - started,
        reversible=reversible,
        notes=[*_notes(lines, quantize, costs), *notes],
        costs=costs,
    )


def _inputs(model: Model) -> list[Path]:
    """Every file that `model` is read from; none of them may be written to."""
    found = {model.path, *(t.origin.path for t in model.tensors.values())}
    if model.format == "safetensors":
        folder = model.path if model.path.is_dir() else model.path.parent
        found.update(folder / name for name in huggingface.READ)
    return sorted(found)


def _bytes_of(model: Model) -> int:
    """Bytes of the model's file; of its weight files where it is a directory."""
    if not model.path.is_dir():
        return model.path.stat().st_size
    return sum(path.stat().st_size for path in {t.origin.path for t in model.tensors.values()})


def _only_qwen2(model: Model) -> None:
    known = set(names.VARIANTS["raw"])
    for name in model.tensors:
        if names.template_of(name) not in known or "N" in name.split("."):
            raise UnsupportedError("is no tensor of a Qwen2 model", path=model.path, tensor=name)


def _known_target(quantize: str | None) -> None:
    if quantize is not None and quantize.lower() not in mixes.MIXES:
        encodable(quantize)


def _retyping(model: Model, quantize: str | None) -> Callable[[Tensor], Tensor]:
    """What a right conversion does to each tensor: nothing, unless a type was asked for or SafeTensors has a half vector."""
    mix: dict[str, TensorType] = {}
    target: TensorType | None = None
    if quantize is not None and quantize.lower() in mixes.MIXES:
        mix = mixes.types_of({name: model.tensors[name].shape for name in mixes.by_layer(model.tensors)}, quantize.lower())
    elif quantize is not None:
        target = encodable(quantize)

    def retype(tensor: Tensor) -> Tensor:
        if len(tensor.shape) < 2:  # norms and biases are F32 wherever ggml reads them
            halves = model.format == "safetensors" and tensor.type is not types.F32
            return Recoded(tensor, types.F32) if halves else tensor
        wanted = mix.get(tensor.name, target)
        return tensor if wanted is None else re_encoded(tensor, wanted)

    return retype


def _count(items: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _notes(lines: list[TensorLine], quantize: str | None, costs: list[Cost]) -> list[str]:
    notes = [str(cost) for cost in costs]
    if quantize is None or quantize.lower() in mixes.MIXES:
        return notes
    target = encodable(quantize)
    other = SUBSTITUTES.get(target)
    if other is not None and any(line.type_in != line.type_out == other.name for line in lines if len(line.shape) > 1):
        notes.append(f"rows that are no multiple of {target.block_elements} were written as {other.name}, as llama.cpp does")
    if not notes and all(line.type_in == line.type_out for line in lines):
        notes.append(f"every 2-D weight was {target.name} already")
    return notes


def _costs(written: list[Tensor]) -> list[Cost]:
    """What re-encoding cost, one line for each pair of types, most tensors first; asked once everything is written."""
    found: dict[tuple[str, str], Cost] = {}
    for tensor in written:
        if isinstance(tensor, Recoded):
            one: Cost = tensor.cost  # type: ignore[attr-defined]
            total = found.setdefault((one.type_in, one.type_out), Cost(one.type_in, one.type_out))
            total.tensors += 1
            total.square += one.square
            total.error += one.error
            total.worst = max(total.worst, one.worst)
    return sorted(found.values(), key=lambda cost: (-cost.tensors, cost.type_in, cost.type_out))


# ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def encodable(name: str) -> TensorType:
    """The type called `name`, if there is an encoder for it."""
    from aprlab import quants

    kind = types.by_name(name)
    if not quants.can_encode(kind):
        able = ", ".join(t.name for t in types.TYPES if quants.can_encode(t))
        raise UsageError(f"cannot encode {kind.name}; can: {able}")
    return kind


class Recoded(Tensor):
    """A tensor whose bytes are made, row block by row block, only when they are written."""

    __slots__ = ("cost", "source")

    def __init__(self, source: Tensor, kind: TensorType) -> None:
        super().__init__(source.name, kind, source.shape, np.zeros(0, np.uint8), source.origin)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "cost", Cost(source.type.name, kind.name, 1))

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.shape)


def re_encoded(tensor: Tensor, target: TensorType) -> Tensor:
    """`tensor` in another type: 2-D weights only; the same object where nothing is to be done."""
    if len(tensor.shape) < 2 or tensor.type is target:
        return tensor
    target = mixes.fitting(target, tensor.shape, tensor.name)
    return tensor if tensor.type is target else Recoded(tensor, target)


def chunks_of(tensor: Tensor) -> Callable[[], Iterator[Any]]:
    """The bytes of a tensor in chunks.

    Bytes that stand in a file are read through a few small buffers (not through the map, whose pages would count as
    memory); a chunk is overwritten once seven more have been taken.
    """
    if isinstance(tensor, Recoded):
        return lambda: _encode_rows(tensor)
    if not _stands_in_file(tensor):
        raw = np.ascontiguousarray(tensor.raw)
        return lambda: (raw[start : start + CHUNK].data for start in range(0, len(raw), CHUNK))
    return lambda: _checked(tensor)


def _checked(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor as they stand in the file, in chunks of whole blocks, every scale looked at on the way."""
    head, step = tensor.type.tensor_bytes, CHUNK // tensor.type.block_bytes * tensor.type.block_bytes
    yield from read_chunks(tensor.origin.path, tensor.origin.offset, head)
    at = 0
    for chunk in read_chunks(tensor.origin.path, tensor.origin.offset + head, tensor.nbytes - head, step):
        tensor.check_values(np.frombuffer(chunk, np.uint8), at)
        yield chunk
        at += len(chunk)


def _stands_in_file(tensor: Tensor) -> bool:
    """Whether the bytes are those of the file at the tensor's origin, and not changed, decompressed or made in memory."""
    root: Any = tensor.raw
    while isinstance(root.base, np.ndarray):
        root = root.base
    return tensor.origin.offset >= 0 and tensor.raw.base is not None and isinstance(root, np.memmap)


class _Ring(threading.local):
    """Eight buffers a thread, taken in turn: enough for what `apr.write` keeps in flight."""

    def __init__(self) -> None:
        self.next = itertools.cycle([memoryview(bytearray(CHUNK)) for _ in range(8)]).__next__


_RING = _Ring()


def read_chunks(path: Path, offset: int, nbytes: int, step: int = CHUNK) -> Iterator[memoryview]:
    """`nbytes` of a file from `offset` on, in chunks of `step` (at most `CHUNK`)."""
    with open(path, "rb", buffering=0) as file:
        for start in range(offset, offset + nbytes, step):
            view = _RING.next()[: min(step, offset + nbytes - start)]
            if os.preadv(file.fileno(), [view], start) != len(view):
                raise FormatError("the file became shorter while it was read", path=path, offset=start)
            yield view


def _encode_rows(tensor: Recoded) -> Iterator[Any]:
    from aprlab import quants

    source: Tensor = tensor.source  # type: ignore[attr-defined]
    cost: Cost = tensor.cost  # type: ignore[attr-defined]
    # AprQ8 has one scale for all values and needs all of them at once.
    step = source.rows if tensor.type.tensor_bytes else max(1, (1 << 20) // source.cols)
    for start in range(0, source.rows, step):
        rows = slice(start, min(start + step, source.rows))
        values = source.dequantise(rows)
        if not np.isfinite(values).all():
            raise FormatError(f"rows {start}..{start + len(values)} hold values that are not finite",
                              path=source.origin.path, tensor=source.name, offset=source.origin.place())  # fmt: skip
        try:
            raw = quants.quantise(values, tensor.type).reshape(-1)
        except NumericError as error:
            raise NumericError(error.message, path=source.origin.path, tensor=source.name) from None
        cost.add(values, values if tensor.type is types.F32 else quants.dequantise(raw, tensor.type, values.shape))
        yield np.ascontiguousarray(raw).data
        if type(source) is Tensor:  # one whose values are computed has no bytes of its own
            drop_pages(source.blocks()[rows])


# ── metadata ──────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(model: Model, tensors: list[Tensor], dialect: apr.Dialect) -> dict[str, Any]:
    """The APR metadata of `model` with `tensors` as they will be written."""
    config, tok = model.config, model.tokenizer
    metadata: dict[str, Any] = {
        "model_type": config.architecture,
        "name": _text(model, "general.name", "name"),
        "license": _text(model, "general.license", "license"),
        "original_format": model.format,
        "param_count": sum(t.size for t in tensors),
        "quantization": _quantization(tensors),
    }
    rope_types = {name: number for number, name in apr.ROPE_TYPES.items()}
    for field_name, key in dialect.keys.items():
        value = getattr(config, field_name)
        metadata[key] = rope_types[value] if field_name == "rope_type" else value
    metadata["tied_embeddings"] = config.tied_embeddings
    metadata["chat_template"] = tok.chat_template
    metadata |= {
        "tokenizer.model": tok.model,
        "tokenizer.pre_type": tok.pre,
        "tokenizer.vocab_size": len(tok.tokens),
        "tokenizer.bos_token_id": tok.bos_token_id,
        "tokenizer.eos_token_id": tok.eos_token_id,
        "tokenizer.padding_token_id": tok.pad_token_id,
        "tokenizer.add_bos_token": tok.add_bos,
        "tokenizer.token_type": tok.token_types,
        "tokenizer.vocabulary": tok.tokens,
        "tokenizer.merges": tok.merges,
    }
    metadata = {key: value for key, value in metadata.items() if value is not None}
    metadata["source_metadata"] = {"writer": f"aprlab {__version__}", **_origin_record(model)}
    return metadata


def _text(model: Model, *keys: str) -> str | None:
    for key in keys:
        if isinstance(value := model.metadata.get(key), str):
            return value
    return None


def _quantization(tensors: list[Tensor]) -> dict[str, Any] | None:
    """The type that holds most bytes, as upstream's typed key wants it."""
    sizes: dict[TensorType, int] = {}
    for tensor in tensors:
        if tensor.type.quantised:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    if not sizes:
        return None
    most = max(sizes, key=lambda kind: sizes[kind])
    symmetric = most.name in ("Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q3_K", "AprQ4", "AprQ8")
    return {"quant_type": most.name, "bits": int(most.bits), "block_size": most.block_elements, "symmetric": symmetric}


# Arrays that stand in the metadata anyway are not written twice.
_SHARED = {
    "tokenizer.ggml.tokens": "tokenizer.vocabulary",
    "tokenizer.ggml.merges": "tokenizer.merges",
    "tokenizer.ggml.token_type": "tokenizer.token_type",
}


def _origin_record(model: Model) -> dict[str, Any]:
    """What an export needs to give the GGUF back byte for byte: keys, types, order, alignment, tensor order, gaps."""
    if model.format == "safetensors":
        return {}
    if model.format == "apr":
        source = model.metadata.get("source_metadata")
        return {"gguf": source["gguf"]} if isinstance(source, dict) and "gguf" in source else {}
    header = model.metadata.header if isinstance(model.metadata, gguf.FieldView) else gguf.read_header(model.path)
    if header.alignment > GAP_LIMIT or not gguf.gives_back(header):
        return {}
    kv = [[f.key, f.type_name, _plain(f)] for f in header.fields.values()]
    record: dict[str, Any] = {
        "version": header.version,
        "alignment": header.alignment,
        "kv": kv,
        "tensors": [[i.name, list(i.ne), i.code] for i in header.infos],
    }
    natural = gguf.layout([(t.name, t.type, t.shape) for t in model.tensors.values()], header.alignment)
    offsets = [info.offset for info in header.infos]
    if offsets != [info.offset for info in natural]:
        record["offsets"] = offsets
    gaps = _gaps(header, model)
    if gaps is None:
        return {}  # more than padding stands between the tensors: such a file cannot be given back
    if gaps:
        record["gaps"] = gaps
    record["xxh3_128"] = gguf_hash(header.file[: header.data_offset].tobytes(), model.tensors.values())
    return {"gguf": record}


def _plain(item: gguf.Field) -> Any:
    """A GGUF value as JSON that loses nothing: a float that JSON cannot say becomes its bits."""
    if item.key in _SHARED:
        return {"same_as": _SHARED[item.key]}
    value = item.value
    if isinstance(value, np.ndarray):
        bad = value.dtype.kind == "f" and not np.isfinite(value).all()
        return {"base64": base64.b64encode(value.tobytes()).decode()} if bad else value.tolist()
    if isinstance(value, float) and not np.isfinite(value):
        return {"base64": base64.b64encode(np.array(value, "<f4" if item.type_name == "float32" else "<f8").tobytes()).decode()}
    return list(value) if isinstance(value, gguf.Strings) else value


def _gaps(header: gguf.Header, model: Model) -> list[list[Any]] | None:
    """Bytes that belong to no tensor and are not zero, or do not follow ggml's layout: [offset, base64]; None where too many."""
    ends = sorted((t.origin.offset, t.origin.offset + t.nbytes) for t in model.tensors.values())
    gaps, at, total = [], header.data_offset, 0
    for start, stop in [*ends, (header.file_size, header.file_size)]:
        if start > at:
            between = header.file[at:start]
            if len(between) > GAP_LIMIT:
                return None
            last = stop == start == header.file_size
            if between.any() or (last and len(between) != padding(at, header.alignment)):
                total += len(between)
                if total > GAP_LIMIT:
                    return None
                gaps.append([at, base64.b64encode(between.tobytes()).decode()])
        elif start == header.file_size == at and padding(at, header.alignment):
            gaps.append([at, ""])  # the last tensor is not padded
        at = max(at, stop)
    return gaps


def gguf_hash(header: bytes, tensors: Iterable[Tensor]) -> str:
    """One XXH3-128 over the header and each tensor's XXH3-64 in file order: the identity of a GGUF file's content."""
    total = xxhash.xxh3_128(header)
    for tensor in tensors:
        part = xxhash.xxh3_64()
        # Scales are looked at when the bytes are written; here they would be a second time.
        plain = _stands_in_file(tensor)
        for chunk in read_chunks(tensor.origin.path, tensor.origin.offset, tensor.nbytes) if plain else chunks_of(tensor)():
            part.update(chunk)
        total.update(part.digest())
    return total.hexdigest()


# ── back ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def export(
    source: str | Path | Model,
    output: str | Path,
    *,
    format: str = "gguf",
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write a model as GGUF, or as a Hugging Face directory with SafeTensors.

    To GGUF: where the APR file was converted from a GGUF file by this project and its tensors were not changed, the result
    is that GGUF file, byte for byte (`reversible` is then True, proved by its hash). Others get a header made from their
    config. To SafeTensors: every tensor is decoded to `dtype`, names are Hugging Face's, and config, tokenizer and
    generation settings stand beside it, so that transformers loads the directory.

    Args:
        source: an APR file or a SafeTensors model; for SafeTensors also a GGUF file; or an opened model.
        output: the GGUF file, or the directory.
        format: ``gguf`` or ``safetensors``.
        dtype: ``f32`` (every value exactly; the default), ``f16`` or ``bf16``; SafeTensors only.
        force: replace an existing output; a directory only if it holds nothing but what an export writes.
        progress: called with bytes written since the last call.

    Raises:
        UsageError, FormatError, UnsupportedError: no file is left behind.
        NumericError: a value that F16 cannot hold.
    """
    started = time.perf_counter()
    output = Path(output)
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if dtype is not None and format != "safetensors":
        raise UsageError("dtype is for SafeTensors; `convert --quantize` re-encodes a GGUF or APR")
    model = source if isinstance(source, Model) else Model.open(source)
    if format == "safetensors":
        return _to_safetensors(model, output, dtype or "f32", force, progress, started)
    if model.format == "gguf":
        raise UsageError("is a GGUF file; export takes APR", path=model.path)
    check_output(output, _inputs(model), force=force)
    retype = _retyping(model, None)
    return _to_gguf(model, output, [retype(t) for t in model.tensors.values()], None, force, progress, started)


def _to_safetensors(
    model: Model, output: Path, dtype: str, force: bool, progress: Progress | None, started: float
) -> ConversionReport:
    from aprlab.qwen2.tokenizer import Qwen2Tokenizer

    kind = safetensors.DTYPES.get(dtype.upper())
    if kind is None:
        raise UsageError(f"unknown dtype {dtype!r}; known: {', '.join(name.lower() for name in safetensors.DTYPES)}")
    _only_qwen2(model)
    for path in _inputs(model):
        if output.exists() and output.resolve() in (path.resolve(), path.resolve().parent, path.parent.resolve()):
            raise UsageError("holds the input", path=output)
    tok = model.tokenizer
    eog = Qwen2Tokenizer(tok).eog
    ends = sorted(eog, key=lambda id: (id != tok.eos_token_id, id))
    torch = {types.F32: "float32", types.F16: "float16", types.BF16: "bfloat16"}[kind]
    files = huggingface.companions(model.config, tok, torch, ends)
    written = [t if t.type is kind else Recoded(t, kind) for t in model.tensors.values()]
    plans = [safetensors.Plan(names.from_gguf(t.name), t.type, t.shape, chunks_of(t)) for t in written]
    about = {"format": "pt", "name": _text(model, "general.name", "name"), "license": _text(model, "general.license", "license")}
    about["writer"] = f"aprlab {__version__}"
    with atomic_folder(output, force=force, ours=huggingface.WRITTEN.__contains__) as folder:
        huggingface.write_companions(folder, files)
        known = {key: text for key, text in about.items() if text is not None}
        size = safetensors.write(folder / huggingface.SINGLE, plans, known, progress)
    notes = []
    if foreign := huggingface.foreign_tokens(tok):
        notes.append(f"{len(foreign)} tokens, first {foreign[0]}, are of types that tokenizer.json has not; they became ordinary")
    lines = [
        TensorLine(a.name, names.from_gguf(a.name), a.shape, a.type.name, b.type.name, b.nbytes)
        for a, b in zip(model.tensors.values(), written, strict=True)
    ]
    return _report(model, output, f"hugging face, {kind.name}", size, lines, written, started, notes=notes)


def _to_gguf(
    model: Model, output: Path, written: list[Tensor], quantize: str | None, force: bool, progress: Progress | None,
    started: float,
) -> ConversionReport:  # fmt: skip
    """Write `written`, the tensors of `model` as they shall be, with the header that the model came with or one made for it."""
    altered = replace(model, tensors={t.name: t for t in written})
    recorded = model.metadata.get("source_metadata") if model.format == "apr" else None
    record = recorded.get("gguf") if isinstance(recorded, dict) else None
    what = "the metadata" if record is None else "source_metadata.gguf"
    try:
        header, ordered, record = _header_for(altered, record, quantize)
        infos, alignment = header.infos, header.alignment
        gaps = {at: base64.b64decode(text) for at, text in (record or {}).get("gaps", [])}
        front = gguf.pack_header(list(header.fields.values()), infos, version=header.version, alignment=alignment)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise FormatError(f"{what} is damaged: {type(error).__name__}: {error}", path=model.path) from None
    parts: dict[str, bytes] = {}  # hash of each tensor; written by offset, proved in the order of the table
    with atomic(output, force=force) as file:
        file.write(front)
        position = len(front)
        for info, tensor in sorted(zip(infos, ordered, strict=True), key=lambda pair: pair[0].offset):
            position = _fill(file, position, len(front) + info.offset, gaps)
            part = xxhash.xxh3_64()
            for chunk in chunks_of(tensor)():
                part.update(chunk)
                size = write_all(file, chunk)
                if progress is not None:
                    progress(size)
            parts[tensor.name] = part.digest()
            position += tensor.nbytes
        end = position + (len(gaps[position]) if position in gaps else padding(position, alignment))
        _fill(file, position, end, gaps)
    proof = xxhash.xxh3_128(front)
    for tensor in ordered:
        proof.update(parts[tensor.name])
    expected = (record or {}).get("xxh3_128")
    reversible = None if expected is None else proof.hexdigest() == expected
    notes = ["this is not the original GGUF file: its hash differs"] if reversible is False else []
    lines = [
        TensorLine(t.name, t.name, t.shape, model.tensors[t.name].type.name, t.type.name, t.nbytes) for t in ordered
    ]
    size = output.stat().st_size
    return _report(model, output, f"gguf v{header.version}", size, lines, ordered, started, quantize, reversible, notes)


def _fill(file: Any, position: int, start: int, gaps: dict[int, bytes]) -> int:
    """Write what stands between two tensors: the recorded bytes, else zeros."""
    if start < position:
        raise FormatError(f"recorded offsets overlap: {start} after {position}")
    if start - position > GAP_LIMIT:
        raise FormatError(f"recorded offsets leave {start - position} bytes open; at most {GAP_LIMIT} are written")
    between = gaps.get(position, bytes(start - position))
    if len(between) != start - position:
        raise FormatError(f"recorded gap of {len(between)} bytes at {position}, {start - position} are open")
    file.write(between)
    return start


def _promised(metadata: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether these metadata hold the record of a GGUF file of just these tensors."""
    try:
        return _holds(metadata["source_metadata"]["gguf"], tensors)
    except (LookupError, TypeError, ValueError):
        return False


def _holds(record: dict[str, Any], tensors: Iterable[Tensor]) -> bool:
    """Whether the recorded table is that of these tensors, in whatever order."""
    return {(n, tuple(ne), code) for n, ne, code in record["tensors"]} == {(t.name, t.ne, t.type.code) for t in tensors}


def _header_for(
    model: Model, record: dict[str, Any] | None, quantize: str | None
) -> tuple[gguf.Header, list[Tensor], dict[str, Any] | None]:
    """Header and tensors in file order: the recorded ones where they still hold, else made from config and tokenizer."""
    unchanged = record is not None and _holds(record, model.tensors.values())
    order = [row[0] for row in record["tensors"]] if record is not None else natural_order(model.tensors)
    ordered = [model.tensors[name] for name in dict.fromkeys([*order, *model.tensors]) if name in model.tensors]
    for tensor in ordered:
        if tensor.type in (types.APR_Q4, types.APR_Q8):
            raise UnsupportedError(f"is {tensor.type.name}, which GGUF does not have; convert with --quantize first",
                                   path=model.path, tensor=tensor.name)  # fmt: skip
    version, alignment = (record["version"], record["alignment"]) if record else (3, gguf.DEFAULT_ALIGNMENT)
    own = model.metadata.header if isinstance(model.metadata, gguf.FieldView) else None
    if own is not None:  # GGUF to GGUF: everything but the types stays
        version, alignment, ordered = own.version, own.alignment, [model.tensors[info.name] for info in own.infos]
        same = [t.type.code for t in ordered] == [info.code for info in own.infos]
        unchanged = same and (quantize or "").lower() not in mixes.MIXES
    if isinstance(alignment, int) and alignment > GAP_LIMIT:
        raise FormatError(f"the alignment is {alignment}; at most {GAP_LIMIT} is written", path=model.path)
    if version not in (2, 3) or not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"version {version!r}, alignment {alignment!r}")
    if own is not None:
        fields = list(own.fields.values())
    else:
        fields = _recorded_fields(model, record) if record else made_fields(model.config, model.tokenizer, model.metadata)
    if not unchanged:
        fields = with_file_type(fields, (t.type.name for t in ordered if len(t.shape) > 1), quantize)
    infos = gguf.layout([(t.name, t.type, t.shape) for t in ordered], alignment)
    if unchanged and record is not None and "offsets" in record:
        infos = [replace(info, offset=offset) for info, offset in zip(infos, record["offsets"], strict=True)]
    header = gguf.Header(model.path, version, {f.key: f for f in fields}, infos, alignment, 0, 0, np.zeros(0, np.uint8))
    return header, ordered, record if unchanged else None


def _recorded_fields(model: Model, record: dict[str, Any]) -> list[gguf.Field]:
    fields = []
    for key, type_name, value in record["kv"]:
        if isinstance(value, dict) and "same_as" in value:
            value = model.metadata[value["same_as"]]
        elif isinstance(value, dict):
            bits = np.frombuffer(base64.b64decode(value["base64"]), "<f4" if "float32" in type_name else "<f8")
            value = bits if type_name.startswith("array[") else float(bits[0])
        fields.append(gguf.field_of(key, type_name, value))
    return fields


def natural_order(tensors: Iterable[str]) -> list[str]:
    """The order of llama.cpp's converter, which follows the Hugging Face names: lm_head, model.embed_tokens, …, model.norm."""
    return sorted(tensors, key=names.from_gguf)


def made_fields(config: ModelConfig, tok: TokenizerData, metadata: Any) -> list[gguf.Field]:
    """The key-value section of a GGUF file for a model that does not come from one. Same keys as llama.cpp's converter."""
    if config.rope_type != "neox":
        raise UnsupportedError(f"rope_type is {config.rope_type!r}; GGUF has no key for it, a Qwen2 file is always NEOX")
    text = {key: value for key in ("name", "license") if isinstance(value := metadata.get(key), str)}
    values: list[tuple[str, str, Any]] = [
        ("general.architecture", "string", config.architecture),
        ("general.name", "string", text.get("name")),
        ("general.license", "string", text.get("license")),
        ("qwen2.block_count", "uint32", config.block_count),
        ("qwen2.context_length", "uint32", config.context_length),
        ("qwen2.embedding_length", "uint32", config.embedding_length),
        ("qwen2.feed_forward_length", "uint32", config.feed_forward_length),
        ("qwen2.attention.head_count", "uint32", config.head_count),
        ("qwen2.attention.head_count_kv", "uint32", config.head_count_kv),
        ("qwen2.rope.freq_base", "float32", config.rope_theta),
        ("qwen2.attention.layer_norm_rms_epsilon", "float32", config.rms_norm_eps),
        ("general.file_type", "uint32", 0),
        ("tokenizer.ggml.model", "string", tok.model),
        ("tokenizer.ggml.pre", "string", tok.pre),
        ("tokenizer.ggml.tokens", "array[string]", tok.tokens),
        ("tokenizer.ggml.token_type", "array[int32]", tok.token_types),
        ("tokenizer.ggml.merges", "array[string]", tok.merges),
        ("tokenizer.ggml.eos_token_id", "uint32", tok.eos_token_id),
        ("tokenizer.ggml.padding_token_id", "uint32", tok.pad_token_id),
        ("tokenizer.ggml.bos_token_id", "uint32", tok.bos_token_id),
        ("tokenizer.ggml.add_bos_token", "bool", tok.add_bos),
        ("tokenizer.chat_template", "string", tok.chat_template),
        ("general.quantization_version", "uint32", 2),
    ]
    if config.head_dim * config.head_count != config.embedding_length:
        values.insert(9, ("qwen2.attention.key_length", "uint32", config.head_dim))
        values.insert(10, ("qwen2.attention.value_length", "uint32", config.head_dim))
    return [gguf.field_of(key, type_name, value) for key, type_name, value in values if value is not None]


def with_file_type(fields: list[gguf.Field], matrices: Iterable[str], quantize: str | None) -> list[gguf.Field]:
    """The fields with a true `general.file_type`: the mix asked for, else the type of most 2-D weights, as llama.cpp counts."""
    most = next(iter(_count(matrices)), "F32")
    known = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M", "Q3_K": "MOSTLY_Q3_K_M"}
    mix = quantize is not None and quantize.lower() in mixes.MIXES
    label = f"MOSTLY_{quantize}".upper() if mix else known.get(most, f"MOSTLY_{most}")
    number = int(LlamaFileType.__members__.get(label, LlamaFileType.GUESSED))
    return [replace(f, value=number) if f.key == "general.file_type" and type(f.value) is int else f for f in fields]


__all__ = ["ConversionReport", "Seams", "TensorLine", "convert", "export", "healthy_seams"]
