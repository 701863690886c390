"""GGUF, APR and SafeTensors into each other."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aprlab.conversion import mixes
from aprlab.conversion.provenance import GAP_LIMIT, GgufIdentity, describe, header_for, promised
from aprlab.conversion.recode import chunks_of, encodable, re_encoded, recoded
from aprlab.conversion.report import ConversionReport, TensorLine, report_of
from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats import apr, gguf, huggingface, huggingface_files, open_model, safetensors
from aprlab.formats.identity import file_only, no_model, something_else
from aprlab.formats.reading import padding
from aprlab.formats.writing import atomic, atomic_folder, check_output, write_all
from aprlab.model import names, rope
from aprlab.model.architecture import architecture_of
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.model.vocabulary import check_tokenizer, end_of_generation, merge_pairs
from aprlab.quants import types
from aprlab.quants.types import TensorType
from aprlab.version import __version__

FORMATS = ("gguf", "safetensors")  # what `export` writes

Progress = Callable[[int], None]


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
    output = Path(output)
    _check_options(quantize, dialect, compress)
    model = source if isinstance(source, Model) else open_model(source)
    if (error := no_model(model)) is not None:
        raise error
    check_output(output, _inputs(model), force=force)
    if output.suffix == ".safetensors":
        raise UsageError(
            "is a SafeTensors file; `export --format safetensors` writes a folder of them",
            code="conversion.output-is-safetensors", path=output,
        )  # fmt: skip
    kept = file_only(model) is not None
    if not kept:
        _only_known(model)
    retype = _retyping(model, quantize)
    if output.suffix != ".gguf":
        healthy = healthy_seams(apr.DIALECTS[dialect], retype=retype)
        if kept:  # no other naming knows these names
            healthy = replace(healthy, name=str)
        used = healthy if seams is None else seams(healthy)
        report = _to_apr(model, output, used, quantize, dialect, compress, force, progress, started)
        report.reversible = seams is None and report.reversible
        return report
    if dialect != "aprender" or compress is not None or seams is not None:
        raise UsageError(
            "dialect, compression and faults are for APR; the output is called .gguf",
            code="conversion.options-not-for-gguf", path=output,
        )  # fmt: skip
    return _to_gguf(model, output, [retype(t) for t in model.tensors.values()], quantize, force, progress, started)


def _check_options(quantize: str | None, dialect: str, compress: str | None) -> None:
    if dialect not in apr.DIALECTS:
        raise UsageError(f"unknown dialect {dialect!r}; known: {', '.join(apr.DIALECTS)}", code="conversion.unknown-dialect")
    if compress not in (None, "lz4", "zstd"):
        raise UsageError(f"unknown compression {compress!r}; known: lz4, zstd", code="conversion.unknown-compression")
    _known_target(quantize)


def _to_apr(
    model: Model, output: Path, used: Seams, quantize: str | None, dialect: str, compress: str | None, force: bool,
    progress: Progress | None, started: float,
) -> ConversionReport:  # fmt: skip
    """Write what the seams make of `model`; `reversible` is said of them as if they were healthy."""
    into = apr.DIALECTS[dialect]
    plans, lines, written = [], [], []
    identity = GgufIdentity(model.tensors.values())
    for tensor in model.tensors.values():
        out = used.tensor(tensor)
        written.append(out)
        name = used.name(out.name)
        chunks = chunks_of(out) if out.content is not tensor.content else identity.watched(tensor, chunks_of(out))
        plans.append(apr.Plan(name, used.code(out.type), used.dims(out.shape), out.nbytes, chunks))
        lines.append(TensorLine(tensor.name, name, out.shape, tensor.type.name, out.type.name, out.nbytes))
    metadata = used.metadata(describe(model, written, into, identity))
    flags = into.flags
    flags |= apr.FLAGS["quantized"] * any(t.type.quantised for t in written)
    flags |= apr.FLAGS["has_vocabulary"] * ("tokenizer.vocabulary" in metadata and into.naming == "canonical")
    size = apr.write(
        output, metadata, used.plans(plans), replace(into, flags=flags), compress=compress, force=force, progress=progress,
        late=apr.Late(identity.placeholder, identity.text),
    )  # fmt: skip
    return report_of(model, output, dialect, size, lines, written, started, quantize, promised(metadata, written))


def _inputs(model: Model) -> list[Path]:
    """Every file that `model` is read from; none of them may be written to."""
    found = {model.path, *(t.origin.path for t in model.tensors.values())}
    if model.format == "safetensors":
        folder = model.path if model.path.is_dir() else model.path.parent
        found.update(folder / name for name in huggingface_files.READ)
    return sorted(found)


def _only_known(model: Model) -> None:
    """Raise UnsupportedError for a tensor that the model's architecture does not have."""
    kind = architecture_of(model.config.architecture, model.path)
    known = {row[0] for row in kind.rows} | ({rope.FACTORS} if kind.rope_factors else set())
    for name in model.tensors:
        if names.template_of(name) not in known or "N" in name.split("."):
            raise UnsupportedError(
                f"is not a tensor of a {kind.title} model", code="conversion.unknown-tensor", path=model.path, tensor=name
            )


def _known_target(quantize: str | None) -> None:
    if quantize is not None and quantize.lower() not in mixes.MIXES:
        encodable(quantize)


def _retyping(model: Model, quantize: str | None) -> Callable[[Tensor], Tensor]:
    """What a right conversion does to each tensor: nothing, unless a type was asked for or SafeTensors has a half vector."""
    if quantize is not None and (error := file_only(model)) is not None:
        return _retyping_by_name(quantize, error)
    mix: dict[str, TensorType] = {}
    target: TensorType | None = None
    if quantize is not None and quantize.lower() in mixes.MIXES:
        mix = mixes.types_of({name: model.tensors[name].shape for name in mixes.by_layer(model.tensors)}, quantize.lower())
    elif quantize is not None:
        target = encodable(quantize)

    def retype(tensor: Tensor) -> Tensor:
        if len(tensor.shape) < 2:  # norms and biases are F32 wherever ggml reads them
            halves = model.format == "safetensors" and tensor.type is not types.F32
            return recoded(tensor, types.F32) if halves else tensor
        wanted = mix.get(tensor.name, target)
        return tensor if wanted is None else re_encoded(tensor, wanted)

    return retype


def _retyping_by_name(quantize: str, error: AprlabError) -> Callable[[Tensor], Tensor]:
    """The same for a model of which only the file is understood: matrices by their names, as llama.cpp chooses them."""
    if quantize.lower() in mixes.MIXES:
        raise UsageError(
            f"which type {quantize} gives each tensor is known for Qwen2 alone; give one type, e.g. q8_0 ({error.message})",
            code="conversion.mix-of-another-architecture", path=error.path,
        )  # fmt: skip
    target = encodable(quantize)
    return lambda tensor: re_encoded(tensor, kind) if (kind := mixes.kind_by_name(tensor, target)) is not tensor.type else tensor


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
    generation settings are written next to it, so that transformers loads the directory.

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
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}", code="conversion.unknown-format")
    if dtype is not None and format != "safetensors":
        raise UsageError(
            "dtype is for SafeTensors; `convert --quantize` re-encodes a GGUF or APR", code="conversion.dtype-not-for-format"
        )
    model = source if isinstance(source, Model) else open_model(source)
    if (error := something_else(model) if format == "safetensors" else no_model(model)) is not None:
        raise error
    if format == "safetensors":
        return _to_safetensors(model, output, dtype or "f32", force, progress, started)
    if model.format == "gguf":
        raise UsageError("is a GGUF file; export takes APR", code="conversion.export-takes-apr", path=model.path)
    check_output(output, _inputs(model), force=force)
    retype = _retyping(model, None)
    return _to_gguf(model, output, [retype(t) for t in model.tensors.values()], None, force, progress, started)


def _to_safetensors(
    model: Model, output: Path, dtype: str, force: bool, progress: Progress | None, started: float
) -> ConversionReport:
    kind = safetensors.DTYPES.get(dtype.upper())
    if kind is None:
        raise UsageError(
            f"unknown dtype {dtype!r}; known: {', '.join(name.lower() for name in safetensors.DTYPES)}",
            code="conversion.unknown-dtype",
        )  # fmt: skip
    _only_known(model)
    for path in _inputs(model):
        if output.exists() and output.resolve() in (path.resolve(), path.resolve().parent, path.parent.resolve()):
            raise UsageError("holds the input", code="conversion.output-holds-input", path=output)
    tok = model.tokenizer
    ids = check_tokenizer(tok)
    merge_pairs(tok, ids)
    ends = sorted(end_of_generation(tok, ids), key=lambda id: (id != tok.eos_token_id, id))
    torch = {types.F32: "float32", types.F16: "float16", types.BF16: "bfloat16"}[kind]
    factors = model.tensors[rope.FACTORS].dequantise() if rope.FACTORS in model.tensors else None
    files = huggingface.companions(model.config, tok, torch, ends, factors)
    tensors = [huggingface.as_hugging_face_has_it(t, model.config) for t in model.tensors.values() if t.name != rope.FACTORS]
    written = [t if t.type is kind else recoded(t, kind) for t in tensors]
    plans = [safetensors.SafetensorsPlan(names.from_gguf(t.name), t.type, t.shape, chunks_of(t)) for t in written]
    named = {key: apr.text_of(model, f"general.{key}", key) for key in ("name", "license")}
    about = {"format": "pt", **named, "writer": f"aprlab {__version__}"}
    with atomic_folder(output, force=force, ours=huggingface_files.WRITTEN.__contains__) as folder:
        huggingface.write_companions(folder, files)
        known = {key: text for key, text in about.items() if text is not None}
        size = safetensors.write(folder / huggingface.SINGLE, plans, known, progress)
    notes = []
    if foreign := huggingface.foreign_tokens(tok):
        notes.append(f"{len(foreign)} tokens, first {foreign[0]}, are of types that tokenizer.json has not; they became ordinary")
    lines = [
        TensorLine(a.name, names.from_gguf(a.name), a.shape, a.type.name, b.type.name, b.nbytes)
        for a, b in zip(tensors, written, strict=True)
    ]
    return report_of(model, output, f"hugging face, {kind.name}", size, lines, written, started, notes=notes)


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
        header, ordered, record = header_for(altered, record, quantize)
        infos, alignment = header.infos, header.alignment
        gaps = {at: base64.b64decode(text) for at, text in (record or {}).get("gaps", [])}
        front = gguf.pack_header(list(header.fields.values()), infos, version=header.version, alignment=alignment)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise FormatError(
            f"{what} is damaged: {type(error).__name__}: {error}", code="conversion.record-damaged", path=model.path
        ) from None
    identity = GgufIdentity(ordered, front)  # tensors are written by offset, and hashed in the order of the table
    with atomic(output, force=force) as file:
        file.write(front)
        position = len(front)
        for info, tensor in sorted(zip(infos, ordered, strict=True), key=lambda pair: pair[0].offset):
            position = _fill(file, position, len(front) + info.offset, gaps)
            for chunk in identity.watched(tensor, chunks_of(tensor))():
                size = write_all(file, chunk)
                if progress is not None:
                    progress(size)
            position += tensor.nbytes
        end = position + (len(gaps[position]) if position in gaps else padding(position, alignment))
        _fill(file, position, end, gaps)
    expected = (record or {}).get("xxh3_128")
    reversible = None if expected is None else identity.text() == expected
    notes = ["this is not the original GGUF file: its hash differs"] if reversible is False else []
    lines = [
        TensorLine(t.name, t.name, t.shape, model.tensors[t.name].type.name, t.type.name, t.nbytes) for t in ordered
    ]
    size = output.stat().st_size
    return report_of(model, output, f"gguf v{header.version}", size, lines, ordered, started, quantize, reversible, notes)


def _fill(file: Any, position: int, start: int, gaps: dict[int, bytes]) -> int:
    """Write what is between two tensors: the recorded bytes, else zeros."""
    if start < position:
        raise FormatError(f"recorded offsets overlap: {start} after {position}", code="conversion.recorded-overlap")
    if start - position > GAP_LIMIT:
        raise FormatError(
            f"recorded offsets leave {start - position} bytes open; at most {GAP_LIMIT} are written",
            code="conversion.recorded-gap-too-large",
        )  # fmt: skip
    between = gaps.get(position, bytes(start - position))
    if len(between) != start - position:
        raise FormatError(
            f"recorded gap of {len(between)} bytes at {position}, {start - position} are open",
            code="conversion.recorded-gap-length",
        )  # fmt: skip
    file.write(between)
    return start
