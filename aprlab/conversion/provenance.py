"""What an APR file records of the GGUF that it came from, and the GGUF header made from that record."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash

from aprlab.conversion import mixes
from aprlab.conversion.report import count_of
from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats import apr, gguf
from aprlab.formats.gguf_record import header_of, recorded_fields
from aprlab.formats.identity import file_only
from aprlab.formats.reading import padding
from aprlab.model import names, rope, window
from aprlab.model.architecture import architecture_of
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.ggml import LlamaFileType
from aprlab.version import __version__

GAP_LIMIT = 1 << 16  # bytes of non-zero padding that a file may keep; more is not padding


# ── metadata ──────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(model: Model, tensors: list[Tensor], dialect: apr.Dialect, identity: GgufIdentity) -> dict[str, Any]:
    """The APR metadata of `model` with `tensors` as they will be written, and what an export back needs.

    The placeholder of `identity` stands for the hash of a GGUF file, which is not known yet.
    """
    source = {"writer": f"aprlab {__version__}", **_origin_record(model, identity)}
    split = isinstance(model.metadata, gguf.FieldView) and model.metadata.header.parts
    if "gguf" not in source and (split or file_only(model) is not None):
        source["gguf"] = _keys_record(model)
    if file_only(model) is not None:
        return apr.file_only_metadata(model, tensors, source["gguf"]) | {"source_metadata": source}
    return apr.metadata_of(model, tensors, dialect) | {"source_metadata": source}


def _origin_record(model: Model, identity: GgufIdentity) -> dict[str, Any]:
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
        return {}  # there is more than padding between the tensors: such a file cannot be reproduced
    if gaps:
        record["gaps"] = gaps
    identity.front, record["xxh3_128"] = header.bytes_of(0, header.data_offset).tobytes(), identity.placeholder
    return {"gguf": record}


def _keys_record(model: Model) -> dict[str, Any]:
    """Keys and tensor table alone, where the file cannot be given back byte for byte."""
    header = header_of(model)
    return {
        "version": header.version, "alignment": min(header.alignment, GAP_LIMIT),
        "kv": [[f.key, f.type_name, _plain(f)] for f in header.fields.values()],
        "tensors": [[i.name, list(i.ne), i.code] for i in header.infos],
    }  # fmt: skip


def _plain(item: gguf.Field) -> Any:
    """A GGUF value as JSON that loses nothing: a float that JSON cannot say becomes its bits."""
    if item.key in apr.SHARED_LISTS:  # in the metadata anyway, and not written twice
        return {"same_as": apr.SHARED_LISTS[item.key]}
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
            if start - at > GAP_LIMIT:
                return None
            between = header.bytes_of(at, start)
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


class GgufIdentity:
    """One XXH3-128 over a GGUF file's header and each tensor's XXH3-64 in the order of its table: the identity of its content.

    Tensors whose bytes pass through `watched` are not read again for it. `front` is the header, as bytes.
    """

    def __init__(self, tensors: Iterable[Tensor], front: bytes = b"") -> None:
        self.tensors, self.front = list(tensors), front
        self.placeholder = secrets.token_hex(16)  # as long as the hash, and in no file
        self._parts: dict[str, bytes] = {}

    def watched(self, tensor: Tensor, chunks: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
        """The same chunks, which are all bytes of `tensor` in order; they are hashed on the way."""

        def passed() -> Iterator[Any]:
            part = xxhash.xxh3_64()
            for chunk in chunks():
                part.update(chunk)
                yield chunk
            self._parts[tensor.name] = part.digest()

        return passed

    def text(self) -> str:
        """The identity, hexadecimal; what did not pass is read now."""
        total = xxhash.xxh3_128(self.front)
        for tensor in self.tensors:
            if tensor.name not in self._parts:
                for _ in self.watched(tensor, tensor.content.chunks)():  # scales are looked at when the bytes are written
                    pass
            total.update(self._parts[tensor.name])
        return total.hexdigest()


def promised(metadata: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether these metadata hold the record of a GGUF file of just these tensors."""
    try:
        record = metadata["source_metadata"]["gguf"]
        return "xxh3_128" in record and _holds(record, tensors)
    except (LookupError, TypeError, ValueError):
        return False


def _holds(record: dict[str, Any], tensors: Iterable[Tensor]) -> bool:
    """Whether the recorded table is that of these tensors, in whatever order."""
    return {(n, tuple(ne), code) for n, ne, code in record["tensors"]} == {(t.name, t.ne, t.type.code) for t in tensors}


def header_for(
    model: Model, record: dict[str, Any] | None, quantize: str | None
) -> tuple[gguf.Header, list[Tensor], dict[str, Any] | None]:
    """Header and tensors in file order: the recorded ones where they still hold, else made from config and tokenizer."""
    unchanged = record is not None and _holds(record, model.tensors.values())
    order = [row[0] for row in record["tensors"]] if record is not None else natural_order(model.tensors)
    ordered = [model.tensors[name] for name in dict.fromkeys([*order, *model.tensors]) if name in model.tensors]
    for tensor in ordered:
        if tensor.type in (types.APR_Q4, types.APR_Q8):
            raise UnsupportedError(f"is {tensor.type.name}, which GGUF does not have; convert with --quantize first",
                                   code="conversion.type-not-in-format", path=model.path, tensor=tensor.name)  # fmt: skip
    version, alignment = (record["version"], record["alignment"]) if record else (3, gguf.DEFAULT_ALIGNMENT)
    own = model.metadata.header if isinstance(model.metadata, gguf.FieldView) else None
    if own is not None:  # GGUF to GGUF: everything but the types stays
        version, alignment, ordered = own.version, own.alignment, [model.tensors[info.name] for info in own.infos]
        same = [t.type.code for t in ordered] == [info.code for info in own.infos]
        unchanged = same and (quantize or "").lower() not in mixes.MIXES
    if isinstance(alignment, int) and alignment > GAP_LIMIT:
        raise FormatError(
            f"the alignment is {alignment}; at most {GAP_LIMIT} is written",
            code="conversion.alignment-too-large", path=model.path,
        )  # fmt: skip
    if version not in (2, 3) or not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"version {version!r}, alignment {alignment!r}")
    if own is not None:
        fields = list(own.fields.values())
    else:
        fields = recorded_fields(model.metadata, record) if record else made_fields(model.config, model.tokenizer, model.metadata)
    if not unchanged:
        fields = with_file_type(fields, (t.type.name for t in ordered if len(t.shape) > 1), quantize)
    infos = gguf.layout([(t.name, t.type, t.shape) for t in ordered], alignment)
    if unchanged and record is not None and "offsets" in record:
        infos = [replace(info, offset=offset) for info, offset in zip(infos, record["offsets"], strict=True)]
    header = gguf.Header(model.path, version, {f.key: f for f in fields}, infos, alignment, 0, 0, np.zeros(0, np.uint8))
    return header, ordered, record if unchanged else None


def natural_order(tensors: Iterable[str]) -> list[str]:
    """The order of llama.cpp's converter, which follows the Hugging Face names: lm_head, model.embed_tokens, …, model.norm."""
    return sorted(tensors, key=names.from_gguf)


def made_fields(config: ModelConfig, tok: TokenizerData, metadata: Any) -> list[gguf.Field]:
    """The key-value section of a GGUF file for a model that does not come from one. Same keys as llama.cpp's converter."""
    kind = architecture_of(config.architecture)
    if config.rope_type != kind.rope_type:
        raise UnsupportedError(
            f"rope_type is {config.rope_type!r}; GGUF has no key for it, a {kind.title} file always has {kind.rope_type!r}",
            code="conversion.rope-type",
        )  # fmt: skip
    name = kind.name
    text = {key: value for key in ("name", "license") if isinstance(value := metadata.get(key), str)}
    values: list[tuple[str, str, Any]] = [
        ("general.architecture", "string", config.architecture),
        ("general.name", "string", text.get("name")),
        ("general.license", "string", text.get("license")),
        (f"{name}.block_count", "uint32", config.block_count),
        (f"{name}.context_length", "uint32", config.context_length),
        (f"{name}.embedding_length", "uint32", config.embedding_length),
        (f"{name}.feed_forward_length", "uint32", config.feed_forward_length),
        (f"{name}.attention.head_count", "uint32", config.head_count),
        (f"{name}.attention.head_count_kv", "uint32", config.head_count_kv),
        (f"{name}.rope.freq_base", "float32", config.rope_theta),
        (f"{name}.attention.layer_norm_rms_epsilon", "float32", config.rms_norm_eps),
        ("general.file_type", "uint32", 0),
        ("tokenizer.ggml.model", "string", tok.model),
        ("tokenizer.ggml.pre", "string", tok.pre),
        ("tokenizer.ggml.tokens", "array[string]", tok.tokens),
        ("tokenizer.ggml.token_type", "array[int32]", tok.token_types),
        ("tokenizer.ggml.scores", "array[float32]", tok.scores),
        ("tokenizer.ggml.merges", "array[string]", None if tok.model == "llama" else tok.merges),
        ("tokenizer.ggml.eos_token_id", "uint32", tok.eos_token_id),
        ("tokenizer.ggml.padding_token_id", "uint32", tok.pad_token_id),
        ("tokenizer.ggml.bos_token_id", "uint32", tok.bos_token_id),
        ("tokenizer.ggml.add_bos_token", "bool", tok.add_bos),
        ("tokenizer.ggml.add_space_prefix", "bool", tok.add_space_prefix),
        ("tokenizer.chat_template", "string", tok.chat_template),
        ("general.quantization_version", "uint32", 2),
    ]
    at = next(n for n, row in enumerate(values) if row[0] == "general.file_type")
    if config.sliding_window is not None:
        values.insert(at, (f"{name}.{window.GGUF_KEY}", "uint32", config.sliding_window))
    values[at:at] = [(f"{name}.{key}", type_name, value) for key, type_name, value in rope.to_gguf(config.rope_scaling)]
    if config.head_dim * config.head_count != config.embedding_length:
        values.insert(9, (f"{name}.attention.key_length", "uint32", config.head_dim))
        values.insert(10, (f"{name}.attention.value_length", "uint32", config.head_dim))
    return [gguf.field_of(key, type_name, value) for key, type_name, value in values if value is not None]


def with_file_type(fields: list[gguf.Field], matrices: Iterable[str], quantize: str | None) -> list[gguf.Field]:
    """The fields with a true `general.file_type`: the mix asked for, else the type of most 2-D weights, as llama.cpp counts."""
    most = next(iter(count_of(matrices)), "F32")
    known = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M", "Q3_K": "MOSTLY_Q3_K_M"}
    mix = quantize is not None and quantize.lower() in mixes.MIXES
    label = f"MOSTLY_{quantize}".upper() if mix else known.get(most, f"MOSTLY_{most}")
    number = int(LlamaFileType.__members__.get(label, LlamaFileType.GUESSED))
    return [replace(f, value=number) if f.key == "general.file_type" and type(f.value) is int else f for f in fields]
