"""A model file as written, taken apart and not yet trusted: what its index says, and the bytes it points to.

The strict readers refuse a broken file, rightly; here it is inspected anyway. Nothing is decoded; names and
types are kept as written, together with what they could mean.
"""

from __future__ import annotations

import bisect
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aprlab.errors import AprlabError, FormatError, UnsupportedError, UsageError
from aprlab.formats import apr, gguf, huggingface, open_model
from aprlab.formats.gguf_record import header_of, keeps_names, plain_value, recorded_header
from aprlab.formats.identity import file_only, of_keys, unpadded
from aprlab.formats.split import joined
from aprlab.model import names, rope, window
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.content import drop_pages, map_file
from aprlab.model.keys import one_number
from aprlab.model.model import Model
from aprlab.model.remote import url_of
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType


@dataclass(eq=False)
class Piece:
    """One row of a file's index with the bytes it points to.

    Attributes:
        name: as written.
        code: dtype byte (or ggml's type number) as written.
        shape: NumPy order, as the file's dialect means its dims.
        size: bytes as the index claims; `raw` is shorter where the file ends before them.
        offset: absolute offset of the data in the file, -1 in a compressed one.
        start: the same within the decompressed image.
        at: offset of the row itself.
        raw: ``uint8``, a view on the mapped file.
        stated: the GGUF name that `name` stands for, None where no naming knows it.
        naming: the naming that knows it.
        place: where in the image `raw` was taken from instead, once an offset proved wrong.
    """

    name: str
    code: int
    shape: tuple[int, ...]
    size: int
    offset: int
    start: int
    at: int
    raw: np.ndarray = field(repr=False)
    stated: str | None
    naming: str
    place: int | None = None

    @cached_property
    def hash(self) -> tuple[int, int]:
        """Length and XXH3-64 of the raw bytes: sensitive to their order."""
        return content_hash(self.raw)

    def fitting(self) -> list[TensorType]:
        """Types that the label has ever stood for and that obey the size law."""
        return [t for t in apr.candidates(self.code) if t.fits(self.shape, self.size)]


@dataclass(eq=False)
class Seen:
    """A file taken apart.

    Attributes:
        problems: what a strict reader would say, in file order.
        unrun: why a model cannot be run although its file may be sound (another architecture…): its names are what they
            are, and its keys are compared as keys. None for Qwen2.
    """

    path: Path
    format: str
    dialect: apr.Dialect
    pieces: list[Piece]
    metadata: Mapping[str, Any]
    problems: list[AprlabError]
    box: apr.Container | None = None
    header: gguf.Header | None = None
    unrun: AprlabError | None = None

    @property
    def naming(self) -> str:
        """The naming under which most names are known."""
        if self.format == "gguf" or self.unrun is not None:
            return "raw"
        if self.format == "model":
            return self.dialect.naming
        return "canonical" if self.box is None else apr.naming_of(self.box.entries)

    @cached_property
    def nbytes(self) -> int:
        """Size of the file; of the weights where it is a directory."""
        apart = self.format == "model" or self.path.is_dir()
        return sum(piece.size for piece in self.pieces) if apart else self.path.stat().st_size

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key with a plain value, of a model that cannot be run."""
        header = self.header or recorded_header(self.metadata, self.path)
        return {key: _plain_or_wrong(item.value) for key, item in header.fields.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every field of the config as this file has it; see `config_fields`."""
        return config_fields(self)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """Every field of the tokenizer as this file has it; see `tokenizer_fields`."""
        return tokenizer_fields(self.metadata) if self.format != "gguf" else _gguf_tokenizer(self)


def _plain_or_wrong(value: Any) -> Any:
    try:
        return plain_value(value)
    except FormatError as error:
        return Wrong(f"a list of {len(value)}: {error.message}")


class Missing:
    """A value that a file should have and has not."""

    def __repr__(self) -> str:
        return "missing"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Missing)

    def __hash__(self) -> int:
        return 0


MISSING = Missing()


@dataclass(frozen=True)
class Conflict:
    """A value that a file gives several times, differently."""

    values: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return " against ".join(f"{key} = {value!r}" for key, value in self.values)


@dataclass(frozen=True)
class Wrong:
    """A value of a kind that its field cannot have; `shown` is what the file says, cut if it is long."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


# ── the typed door: every value from a file comes in by one of these ──────────────────────────────────────────────


def wrong(value: Any) -> Wrong:
    """Any value as one of the wrong kind, in a few words; never fails."""
    if isinstance(value, Wrong):
        return value
    if isinstance(value, list | tuple | np.ndarray | gguf.Strings):
        return Wrong(f"a list of {len(value)}")
    try:
        shown = repr(value)
    except ValueError:  # a number of more digits than Python prints
        shown = "a number without end"
    return Wrong(shown if len(shown) <= 60 else f"{shown[:59]}…")


def whole(value: Any) -> Any:
    """An int within 64 bits as it is, anything else as `Wrong`; `MISSING` and conflicts pass."""
    if isinstance(value, Missing | Conflict):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64:
        return value
    return wrong(value)


def number(value: Any) -> Any:
    """A finite number rounded to float32, which is what every writer had, as float; anything else as `Wrong`."""
    if isinstance(value, Missing | Conflict):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            with np.errstate(over="ignore"):
                found = float(np.float32(value))
        except OverflowError:
            found = math.inf
        if math.isfinite(found):
            return found
    return wrong(value)


def text(value: Any) -> Any:
    """A string as it is, anything else as `Wrong`."""
    return value if isinstance(value, str | Missing | Conflict) else wrong(value)


def flag(value: Any) -> Any:
    """True or False as it is, anything else as `Wrong`: 0 and 1 are no flags."""
    return value if isinstance(value, bool | Missing | Conflict) else wrong(value)


def texts(value: Any) -> Any:
    """A list of strings as a list, anything else (strings that are no UTF-8, too) as `Wrong`."""
    if isinstance(value, gguf.Strings):
        try:
            return list(value)
        except FormatError as error:
            return Wrong(f"a list of {len(value)}: {error.message}")
    if isinstance(value, list) and set(map(type, value)) <= {str}:
        return value
    return value if isinstance(value, Missing) else wrong(value)


def wholes(value: Any) -> Any:
    """A list of ints as a list, anything else as `Wrong`."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value.tolist()
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return value
    return value if isinstance(value, Missing) else wrong(value)


def numbers(value: Any) -> Any:
    """A list of numbers as a list of floats, anything else as `Wrong`."""
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return [float(item) for item in value]
    kinds = isinstance(value, list) and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    if kinds and not any(abs(item) > sys.float_info.max for item in value):
        return [float(item) for item in value]
    return value if isinstance(value, Missing) else wrong(value)


def unusable(value: Any) -> bool:
    """Whether a field has no value that could be used: missing, contradictory, or of the wrong kind."""
    return isinstance(value, Missing | Conflict | Wrong)


def content_hash(raw: np.ndarray) -> tuple[int, int]:
    """Length and XXH3-64 of some bytes, ``uint8 (n,)``."""
    found = len(raw), xxhash.xxh3_64_intdigest(np.ascontiguousarray(raw).data)
    drop_pages(raw)
    return found


def look(path: str | Path) -> Seen:
    """Take a GGUF or APR file apart, or a SafeTensors model.

    Raises:
        UsageError: there is no such file.
        FormatError, UnsupportedError: nothing more can be read (no magic, index cut off, JSON broken, encrypted…).
    """
    path = Path(path)
    if url_of(path) is not None:
        raise UsageError("is a URL; download it to take it apart", code="remote.not-for-runs", path=path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _look_safetensors(path)
    file = map_file(path)
    if bytes(file[:4]) == b"GGUF":
        return _look_gguf(path)
    if bytes(file[:3]) == b"APR":
        return from_container(apr.scan(path))
    if bytes(file[8:9]) == b"{":
        return _look_safetensors(path)
    raise FormatError(
        f"neither GGUF nor APR: the file starts with {bytes(file[:4]).hex(' ') or 'nothing'}",
        code="formats.unknown-format", path=path, offset=0,
    )  # fmt: skip


def _look_safetensors(path: Path) -> Seen:
    """A SafeTensors model. Its container is taken at the strict reader's word; names and shapes are kept as written."""
    dialect = apr.DIALECTS["aprender"]  # the same names, and dims in the same order
    try:
        model = open_model(path)
        metadata = apr.metadata_of(model, list(model.tensors.values()), dialect)
    except FormatError as error:
        if error.code not in _MISNAMED:
            raise
        return _look_misnamed(path, dialect, error)
    pieces = [
        Piece(t.origin.name, t.type.code, t.shape, t.nbytes, t.origin.offset, t.origin.offset, 0, t.raw, name, "canonical")
        for name, t in model.tensors.items()
    ]
    return Seen(path, "safetensors", dialect, pieces, metadata, [])


_MISNAMED = ("names.unknown-tensor", "model.missing-tensor", "model.tensor-shape", "huggingface.untied-without-head")


def _look_misnamed(path: Path, dialect: apr.Dialect, error: FormatError) -> Seen:
    """A SafeTensors model with names or shapes that no reader takes; raises `error` where its architecture reorders rows."""
    found, model = huggingface.look(path, lambda name: meaning(name, "canonical")[0])
    if ARCHITECTURES[model.config.architecture].permuted:
        raise error  # which rows are to be reordered is told by the names
    pieces = [
        Piece(t.origin.name, t.type.code, t.shape, t.nbytes, t.origin.offset, t.origin.offset, 0, t.raw,
              name, meaning(t.origin.name, "canonical")[1])
        for t, name in found
    ]  # fmt: skip
    metadata = apr.metadata_of(model, list(model.tensors.values()), dialect)
    return Seen(path, "safetensors", dialect, pieces, metadata, [error])


def from_model(model: Model) -> Seen:
    """An opened model taken apart as if it were a file of its own, with whatever was changed in it since."""
    naming = "raw" if model.format == "gguf" or model.dialect.startswith("realizar") else "canonical"
    dialect = apr.DIALECTS["realizar" if naming == "raw" else "aprender"]
    pieces = []
    for name, t in model.tensors.items():
        at = t.origin.offset
        pieces.append(
            Piece(names.from_gguf(name, naming), t.type.code, t.shape, t.nbytes, at, at, 0, t.raw, name, naming)
        )
    if (unrun := file_only(model)) is not None:
        for piece in pieces:
            piece.name = piece.stated or piece.name
        return Seen(model.path, "model", dialect, pieces, model.metadata, [], header=header_of(model), unrun=unrun)
    metadata = apr.metadata_of(model, list(model.tensors.values()), dialect)
    return Seen(model.path, "model", dialect, pieces, metadata, [])


def from_container(box: apr.Container) -> Seen:
    """An APR file, from its scan. The dialect comes from the row-major flag first, from the names if it is not set."""
    kept = keeps_names(box.metadata)
    naming = "raw" if kept else apr.naming_of(box.entries)
    row_major = bool(box.flags & apr.FLAGS["row_major"])
    dialect = apr.DIALECTS["realizar" if naming == "raw" and not row_major else "aprender"]
    pieces = []
    for entry in box.entries:
        stated, known_as = (entry.name, "raw") if kept else meaning(entry.name, naming)
        shape = entry.dims if dialect.dims == "rows" else entry.dims[::-1]
        offset = box.data_offset + entry.offset if box.compression is None else -1
        pieces.append(
            Piece(
                entry.name,
                entry.code,
                shape,
                entry.size,
                offset,
                box.data_offset + entry.offset,
                entry.at,
                box.bytes_of(entry),
                stated,
                known_as,
            )
        )
    unrun = _unrun_by_record(box) if kept else None
    return Seen(box.path, "apr", dialect, pieces, box.metadata, list(box.problems), box=box, unrun=unrun)


def _unrun_by_record(box: apr.Container) -> AprlabError:
    """What the keys that a file keeps say of its model; raises FormatError where they are damaged: nothing else knows it."""
    found = of_keys(recorded_header(box.metadata, box.path))
    if found is not None and found.error is not None:
        return found.error
    problem = FormatError("keeps the names of a model that could be run", code="apr.kept-names", path=box.path)
    box.problems.append(problem)
    return problem


def meaning(name: str, likely: str) -> tuple[str | None, str]:
    """The GGUF name that `name` stands for and the naming that says so, asking the `likely` one first."""
    found = names.namings_of(name)
    if likely in found:
        return found[likely], likely
    for naming, gguf_name in found.items():
        return gguf_name, naming
    return None, ""


def _look_gguf(path: Path) -> Seen:
    header = joined(gguf.read_header(path))
    unrun = found.error if (found := of_keys(header)) is not None else None
    problems: list[AprlabError] = []
    try:
        gguf.model_of(header)
    except (FormatError, UnsupportedError) as error:
        found_unpadded = unpadded(header)
        problems.append(error if found_unpadded is None else found_unpadded[0])
        header = header if found_unpadded is None else found_unpadded[1]
    pieces = [piece for part in header.parts or (header,) for piece in _pieces(part, kept=unrun is not None)]
    metadata = gguf.FieldView(header)
    return Seen(path, "gguf", apr.DIALECTS["realizar"], pieces, metadata, problems, header=header, unrun=unrun)


def _pieces(header: gguf.Header, *, kept: bool) -> list[Piece]:
    """The tensors of one GGUF file; `kept`: names are what they are."""
    starts = sorted({info.offset for info in header.infos} | {header.file_size - header.data_offset})
    pieces = []
    for info in header.infos:
        shape = info.ne[::-1]
        after = bisect.bisect_right(starts, info.offset)
        end = starts[after] if after < len(starts) else info.offset
        room = end - info.offset
        kinds = [t for t in apr.candidates(info.code)[:1] if shape[-1] % t.block_elements == 0]
        size = room
        if kinds and room - header.alignment < (exact := kinds[0].nbytes(shape)) <= room:
            size = exact  # GGUF states no sizes: everything before the next tensor is the type's bytes and padding
        else:
            fits = [t for t in types.TYPES if t.fits(shape, room) or 0 <= room - _nbytes(t, shape) < header.alignment]
            left = kinds[0].nbytes(shape) if kinds and kinds[0].nbytes(shape) <= room else room  # a gap lies behind it
            size = _nbytes(fits[0], shape) if fits else left
        start = header.data_offset + info.offset
        raw = header.file[start : start + size]
        stated, naming = (info.name, "raw") if kept else meaning(info.name, "raw")
        pieces.append(Piece(info.name, info.code, shape, size, start, start, info.at, raw, stated, naming))
    return pieces


def _nbytes(kind: TensorType, shape: tuple[int, ...]) -> int:
    return kind.nbytes(shape) if shape[-1] % kind.block_elements == 0 else -1 << 40


# ── config and tokenizer, field by field ──────────────────────────────────────────────────────────────────────────

# What a run depends on. `context_length` bounds it, the rest changes numbers; what the tensors say is not listed.
CONFIG_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("tied_embeddings", "rope_factors"))
TOKENIZER_FIELDS = tuple(f.name for f in fields(TokenizerData))

# Config field -> key in a GGUF file, behind the architecture and a dot.
GGUF_CONFIG = {
    "block_count": "block_count", "embedding_length": "embedding_length", "feed_forward_length": "feed_forward_length",
    "context_length": "context_length", "head_count": "attention.head_count", "head_count_kv": "attention.head_count_kv",
    "rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
# tokenizer field -> (key in an APR file, key in a GGUF file)
TOKENIZER_KEYS: dict[str, tuple[tuple[str, ...], str]] = {
    "model": (("tokenizer.model", "tokenizer.model_type"), "tokenizer.ggml.model"),
    "pre": (("tokenizer.pre_type",), "tokenizer.ggml.pre"),
    "tokens": (("tokenizer.vocabulary",), "tokenizer.ggml.tokens"),
    "token_types": (("tokenizer.token_type",), "tokenizer.ggml.token_type"),
    "merges": (("tokenizer.merges",), "tokenizer.ggml.merges"),
    "bos_token_id": (("tokenizer.bos_token_id",), "tokenizer.ggml.bos_token_id"),
    "eos_token_id": (("tokenizer.eos_token_id",), "tokenizer.ggml.eos_token_id"),
    "pad_token_id": (("tokenizer.padding_token_id",), "tokenizer.ggml.padding_token_id"),
    "add_bos": (("tokenizer.add_bos_token",), "tokenizer.ggml.add_bos_token"),
    "scores": (("tokenizer.scores",), "tokenizer.ggml.scores"),
    "add_space_prefix": (("tokenizer.add_space_prefix",), "tokenizer.ggml.add_space_prefix"),
    "chat_template": (("chat_template", "tokenizer.chat_template"), "tokenizer.chat_template"),
}  # fmt: skip


def needed(model: Any) -> tuple[str, ...]:
    """The fields without which there is no tokenizer of this model: byte-level BPE, or SentencePiece (``llama``)."""
    return ("model", "tokens", "token_types", *(("scores",) if model == "llama" else ("pre", "merges")))


_DOORS: dict[str, Callable[[Any], Any]] = dict.fromkeys(CONFIG_FIELDS, whole) | {
    "architecture": text, "rope_type": text, "rope_theta": number, "rms_norm_eps": number, "rope_scaling": lambda found: found,
    "sliding_window": lambda found: found,
}  # fmt: skip
_TOKENIZER_DOORS: dict[str, Callable[[Any], Any]] = {
    "model": text, "pre": text, "tokens": texts, "token_types": wholes, "merges": texts, "bos_token_id": whole,
    "eos_token_id": whole, "pad_token_id": whole, "add_bos": flag, "chat_template": text, "scores": numbers,
    "add_space_prefix": flag,
}  # fmt: skip


def config_fields(seen: Seen) -> dict[str, Any]:
    """Config field -> value, `MISSING`, `Conflict` or `Wrong`; nothing is assumed and nothing refused.

    Floats are rounded to float32, which is what every writer had. A missing `head_dim` is what both formats define it
    to be, and a missing `vocab_size` in GGUF is the embedding's number of rows.
    """
    found: dict[str, Any] = {}
    if seen.format != "gguf":
        for name in apr.CONFIG_KEYS:
            found[name] = alias_value(seen.metadata, apr.CONFIG_KEYS[name][0])
        style = found["rope_type"]
        found["rope_type"] = apr.ROPE_TYPES.get(style, style) if type(style) is int else style
        found["rope_scaling"] = _scaling(
            lambda context: rope.from_huggingface(seen.metadata.get("rope_scaling"), context), found["context_length"]
        )
        found["sliding_window"] = _scaling(
            lambda context: window.from_huggingface(seen.metadata, context), found["context_length"]
        )
    else:
        found = {"architecture": seen.metadata.get("general.architecture", MISSING)}
        prefix = found["architecture"] if isinstance(found["architecture"], str) else ""
        kind = ARCHITECTURES.get(prefix)
        defaults = {} if kind is None else kind.defaults
        for name, key in GGUF_CONFIG.items():
            value = seen.metadata.get(f"{prefix}.{key}", defaults.get(key, MISSING))
            found[name] = one_number(f"{prefix}.{key}", value, seen.metadata.get(f"{prefix}.block_count"))
        embedding = next((p for p in seen.pieces if p.stated == "token_embd.weight"), None)
        found["vocab_size"] = MISSING if embedding is None or not embedding.shape else embedding.shape[0]
        found["rope_type"] = "neox" if kind is None else kind.rope_type
        found["head_dim"] = seen.metadata.get(f"{prefix}.attention.key_length", MISSING)
        found["rope_scaling"] = _scaling(
            lambda context: rope.from_gguf(lambda key: seen.metadata.get(f"{prefix}.{key}"), context), found["context_length"]
        )
        found["sliding_window"] = _scaling(
            lambda context: window.from_gguf(seen.metadata.get(f"{prefix}.{window.GGUF_KEY}"), context), found["context_length"]
        )
    found = {name: _DOORS[name](value) for name, value in found.items()}
    if found["head_dim"] == MISSING and isinstance(found["head_count"], int) and isinstance(found["embedding_length"], int):
        found["head_dim"] = found["embedding_length"] // max(found["head_count"], 1)
    return found


def _scaling(read: Callable[[int], Any], context_length: Any) -> Any:
    """Rotary scaling or a window as `read` finds it, None for none, `Wrong` for one that cannot be read."""
    try:
        return read(context_length if type(context_length) is int else 0)
    except AprlabError as error:
        return Wrong(error.message)


def alias_value(metadata: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value under any of `keys`, `MISSING`, or a `Conflict` of several."""
    found = {key: metadata[key] for key in keys if metadata.get(key) is not None}
    if not found:
        return MISSING
    if len({json.dumps(value, sort_keys=True) for value in found.values()}) > 1:
        return Conflict(tuple(found.items()))
    return next(iter(found.values()))


def tokenizer_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizer field -> value, `MISSING` or `Wrong`, from an APR file's metadata."""
    found = {}
    for name, (keys, _) in TOKENIZER_KEYS.items():
        present = [metadata[key] for key in keys if metadata.get(key) is not None]  # upstream writes the template twice
        found[name] = _TOKENIZER_DOORS[name](present[0] if present else MISSING)
    return _of_its_model(found)


def _gguf_tokenizer(seen: Seen) -> dict[str, Any]:
    found = {name: _TOKENIZER_DOORS[name](seen.metadata.get(key, MISSING)) for name, (_, key) in TOKENIZER_KEYS.items()}
    return _of_its_model(found)


def _of_its_model(found: dict[str, Any]) -> dict[str, Any]:
    """Without what the tokenizer's model does not use, as the strict readers have it."""
    if found["model"] == "llama":
        pre = found["pre"]
        return found | {"merges": [], "pre": "default" if pre == MISSING else pre}
    return found | {"scores": MISSING}


def of_config(config: ModelConfig) -> dict[str, Any]:
    """The same fields of a sound config."""
    return {name: getattr(config, name) for name in CONFIG_FIELDS}


def of_tokenizer(data: TokenizerData) -> dict[str, Any]:
    """The same fields of sound tokenizer data; None becomes `MISSING`."""
    return {name: MISSING if (value := getattr(data, name)) is None else value for name in TOKENIZER_FIELDS}


# ── the reference ──────────────────────────────────────────────────────────────────────────────────────────────────


class Reference:
    """A sound model, with the hashes of its tensors."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.path = model.path
        self.tensors: dict[str, Tensor] = model.tensors
        self._hashes: dict[str, tuple[int, int]] = {}

    def hash(self, name: str) -> tuple[int, int]:
        """Length and XXH3-64 of a tensor's raw bytes."""
        if name not in self._hashes:
            self._hashes[name] = content_hash(self.tensors[name].raw)
        return self._hashes[name]

    @cached_property
    def by_hash(self) -> dict[tuple[int, int], list[str]]:
        """Content -> the tensors that have it (norms of ones may share theirs)."""
        found: dict[tuple[int, int], list[str]] = {}
        for name in self.tensors:
            found.setdefault(self.hash(name), []).append(name)
        return found
