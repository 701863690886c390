"""What all layers share: the case, its deviations, and the draft in which some of them are mended.

A layer suspects (finds deviations of one kind), explains (says what was done, in words and figures) and repairs (puts
one deviation right in a draft). The case holds what is known about both files and is filled from the cheap end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from aprlab.errors import AprlabError, FormatError
from aprlab.formats import apr
from aprlab.formats.raw import CONFIG_FIELDS, MISSING, NEEDED, TOKENIZER_FIELDS, Conflict, Piece, Reference, Seen, of_config
from aprlab.formats.raw import of_tokenizer as _of_tokenizer
from aprlab.model import names
from aprlab.model.config import ModelConfig, TokenizerData, check_config, require_qwen2
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.verdict import Finding, some
from aprlab.quants import dequantise
from aprlab.quants.types import TensorType


@dataclass(eq=False)
class Match:
    """A piece of the broken file and the tensor that it is, or should be.

    Attributes:
        piece: as it stands.
        true: GGUF name by content, or by name where no content matches; None where it is nobody's.
        of: the reference's tensor, None without a reference or where `true` is None.
        by: how the two were brought together: ``content``, ``span`` (content, beside where the index points),
            ``values`` (decoded, correlated), ``name``.
        place: where in the image the right bytes stand, if not where the index says.
        kind: the type the bytes really have; None while that is open.
        open_kinds: the types that are left where nothing decides between them.
        equal: the raw bytes are the reference's.
        correlation: of decoded values with the reference's, where it was needed; None if it was not.
    """

    piece: Piece
    true: str | None
    of: Tensor | None
    by: str
    kind: TensorType | None = None
    open_kinds: tuple[TensorType, ...] = ()
    equal: bool = False
    correlation: float | None = None
    place: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it should have."""
        return self.piece.shape if self.of is None else self.of.shape


@dataclass(eq=False)
class Deviation:
    """One decision of the writer that came out otherwise than it should have.

    Attributes:
        layer: where it was found.
        what: ``name``, ``type``, ``dims``, ``bytes``, ``encoding``, ``span``, ``missing``, ``extra``, ``config``,
            ``tokenizer``, ``seal`` (anything about the container that no tensor is concerned in).
        tensor: GGUF name of the tensor concerned, or the field of config or tokenizer.
        seen, due: as it is, as it should be.
        how: the mechanism, a short key by which deviations of one cause are put together.
        match: the piece concerned.
        evidence: figures.
        harmless: nothing that runs can notice.
    """

    layer: str
    what: str
    tensor: str
    seen: Any
    due: Any
    how: str
    match: Match | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    confidence: float = 1.0
    harmless: bool = False
    ambiguous: bool = False

    def __repr__(self) -> str:
        return f"Deviation({self.layer}/{self.what} {self.tensor}: {self.how})"


@dataclass(eq=False)
class Case:
    """Two files, or one, and what the layers have found out so far."""

    seen: Seen
    ref: Reference | None
    matches: list[Match] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)
    target: TensorType | None = None  # the type that every 2-D weight was re-encoded to, where one was
    notes: dict[str, Any] = field(default_factory=dict)
    _healthy: dict[tuple[str, TensorType], Tensor] = field(default_factory=dict, repr=False)

    def healthy(self, tensor: Tensor, kind: TensorType) -> Tensor:
        """`healthy_tensor`, remembered."""
        if tensor.type is kind:
            return tensor
        if (tensor.name, kind) not in self._healthy:
            self._healthy[tensor.name, kind] = healthy_tensor(tensor, kind)
        return self._healthy[tensor.name, kind]

    def of(self, layer: str) -> list[Deviation]:
        """Deviations found by one layer."""
        return [d for d in self.deviations if d.layer == layer]

    def due_name(self, gguf: str) -> str:
        """The name that a tensor must have in this file."""
        return names.from_gguf(gguf, self.seen.dialect.naming)

    @cached_property
    def due_config(self) -> dict[str, Any]:
        """Config fields of the reference; {} without one."""
        return {} if self.ref is None else of_config(self.ref.model.config)

    @cached_property
    def due_tokenizer(self) -> dict[str, Any]:
        """Tokenizer fields of the reference; {} without one."""
        return {} if self.ref is None else _of_tokenizer(self.ref.model.tokenizer)


class Layer(ABC):
    """One skin of the onion."""

    name: ClassVar[str]

    @abstractmethod
    def suspect(self, case: Case) -> list[Deviation]:
        """What is not as it should be."""

    def explain(self, case: Case, deviations: list[Deviation]) -> list[Finding]:
        """The deviations put together by cause, in words; the id of the catalogue is found elsewhere."""
        groups: dict[str, list[Deviation]] = {}
        for deviation in deviations:
            groups.setdefault(deviation.how, []).append(deviation)
        return [self.tell(case, how, group) for how, group in groups.items()]

    def tell(self, case: Case, how: str, group: list[Deviation]) -> Finding:
        """One finding for deviations of one cause."""
        evidence: dict[str, Any] = {}
        if len(group) > 1:
            evidence["count"] = len(group)
        evidence |= group[0].evidence
        evidence |= {"seen": _shown(group[0].seen), "due": _shown(group[0].due)} if _tellable(group[0]) else {}
        return Finding(
            group[0].layer, None, tensors_of(group), how, evidence, min(d.confidence for d in group),
            harmless=all(d.harmless for d in group), ambiguous=any(d.ambiguous for d in group),
        )  # fmt: skip

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        """Put one deviation right in a draft."""
        draft.mend(deviation)


def tensors_of(deviations: Iterable[Deviation]) -> list[str]:
    """Names of the tensors concerned, each once."""
    return list(dict.fromkeys(d.tensor for d in deviations if d.tensor and d.what not in ("config", "tokenizer")))


def _tellable(deviation: Deviation) -> bool:
    return deviation.what in ("name", "type", "dims", "config", "tokenizer", "span")


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return f"{len(value)} entries"
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int | float | str) and len(str(value)) < 80 else str(value)[:80]


# ── decoding for a look ───────────────────────────────────────────────────────────────────────────────────────────

SAMPLE_ROWS = 8


def sample_rows(rows: int) -> np.ndarray:
    """A few row numbers spread over a tensor, first and last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE_ROWS)).astype(np.int64))


def sample(raw: np.ndarray, kind: TensorType, shape: tuple[int, ...]) -> np.ndarray | None:
    """Decoded values of a few rows, float32 (rows, cols); None where the bytes are not there or nobody can decode."""
    if not kind.fits(shape, len(raw)):
        return None
    cols = shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64)) if len(shape) > 1 else 1
    blocks = raw[kind.tensor_bytes :].reshape(rows, kind.row_bytes(cols))[sample_rows(rows)]
    part = np.concatenate([raw[: kind.tensor_bytes], blocks.reshape(-1)])
    try:
        return dequantise(part, kind, (len(blocks), cols))
    except AprlabError:
        return None


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays of one shape, in float64; 0 where either is zero or not finite."""
    x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    with np.errstate(all="ignore"):
        found = float(x @ y) / float(np.linalg.norm(x) * np.linalg.norm(y) or np.nan)
    return found if np.isfinite(found) else 0.0


# ── the draft ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class _Slot:
    stated: str | None
    kind: TensorType | None
    shape: tuple[int, ...]
    raw: np.ndarray
    offset: int
    name: str


class Draft:
    """The broken file in memory, with some of its deviations put right: a model where it can be one.

    Whatever is not mended stays broken: a name of another naming is not found, a label that breaks the size law is
    refused, and so on, exactly as the strict reader would have it.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        naming = case.seen.dialect.naming
        self.slots: dict[int, _Slot] = {}
        for n, match in enumerate(case.matches):
            p = match.piece
            fitting = p.fitting()
            kind = fitting[0] if len(fitting) == 1 else None
            # Equal bytes are read from the reference's file: one copy in memory serves both sides.
            raw = match.of.raw if match.equal and match.of is not None else p.raw
            self.slots[n] = _Slot(names.to_gguf(p.name, naming), kind, p.shape, raw, p.offset, p.name)
        self.order = {id(match): n for n, match in enumerate(case.matches)}
        self.config = dict(case.seen.config)
        self.tokenizer = dict(case.seen.tokenizer)
        self.added: dict[str, Tensor] = {}
        self.broken = {id(d): d for d in case.deviations if d.what == "seal"}

    def mend(self, deviation: Deviation) -> None:
        """Put one deviation right."""
        d = deviation
        slot = self.slots.get(self.order[id(d.match)]) if d.match is not None else None
        if d.what == "seal":
            self.broken.pop(id(d))
        elif d.what == "config":
            self.config[d.tensor] = d.due
        elif d.what == "tokenizer":
            self.tokenizer[d.tensor] = d.due
        elif d.what == "missing":
            self.added[d.tensor] = d.due
        elif d.what == "extra":
            assert d.match is not None
            self.slots.pop(self.order[id(d.match)], None)
        elif slot is None:
            pass  # the tensor was taken out by another repair
        elif d.what == "name":
            slot.stated = d.tensor
        elif d.what == "type":
            slot.kind = d.due
        elif d.what == "dims":
            slot.shape = d.due
            assert d.match is not None
            fits = [t for t in apr.candidates(d.match.piece.code) if t.fits(d.due, len(slot.raw))]
            slot.kind = fits[0] if slot.kind is None and len(fits) == 1 else slot.kind
        elif d.what in ("bytes", "encoding", "span"):
            good: Tensor = d.due
            slot.raw, slot.offset = good.raw, good.origin.offset if good.origin.path == self.case.seen.path else -1
            if d.what == "encoding":
                slot.kind = good.type
            elif d.what == "bytes":
                slot.kind = good.type if slot.kind is None or not slot.kind.fits(slot.shape, len(good.raw)) else slot.kind
        else:
            raise ValueError(f"nobody knows how to mend {d.what!r}")

    def model(self) -> Model:
        """The draft as a model; raises FormatError for what a strict reader would refuse."""
        path = self.case.seen.path
        for deviation in self.broken.values():
            raise FormatError(deviation.how, path=path)
        tensors: dict[str, Tensor] = {}
        for slot in self.slots.values():
            if slot.stated is None:
                raise FormatError("unknown tensor name", path=path, tensor=slot.name)
            if slot.stated in tensors:
                raise FormatError("stands there twice", path=path, tensor=slot.name)
            if slot.kind is None or not slot.kind.fits(slot.shape, len(slot.raw)):
                raise FormatError("breaks the size law", path=path, tensor=slot.name)
            origin = Origin(path, slot.name, slot.offset)
            tensors[slot.stated] = Tensor(slot.stated, slot.kind, slot.shape, slot.raw, origin)
        for name, tensor in self.added.items():
            tensors[name] = tensor.replace(name=name)
        config, data = self.config, self.tokenizer
        return Model(
            path=path, format="apr" if self.case.seen.format == "apr" else "gguf", dialect=self.case.seen.dialect.name,
            tensors=tensors, metadata=self.case.seen.metadata,
            make_config=lambda: made_config(config, tensors, path), make_tokenizer=lambda: made_tokenizer(data, path),
        )  # fmt: skip


def made_config(found: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> ModelConfig:
    """A config from fields, checked as the readers check theirs."""
    for name in CONFIG_FIELDS:
        value = found.get(name, MISSING)
        if value == MISSING or isinstance(value, Conflict):
            raise FormatError(f"config field {name!r} is {value!r}", path=path)
        if name not in ("architecture", "rope_type") and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise FormatError(f"config field {name!r} is {value!r}, not a number", path=path)
    require_qwen2(str(found["architecture"]), path)
    if found["rope_type"] not in apr.ROPE_TYPES.values():
        raise FormatError(f"rope_type is {found['rope_type']!r}", path=path)
    config = ModelConfig(**{name: found[name] for name in CONFIG_FIELDS}, tied_embeddings="output.weight" not in tensors)
    return check_config(config, path)


def made_tokenizer(found: dict[str, Any], path: Any) -> TokenizerData:
    """Tokenizer data from fields; what is optional may be missing."""
    for name in NEEDED:
        if found.get(name, MISSING) == MISSING:
            raise FormatError(f"tokenizer has no {name!r}", path=path)
    values: dict[str, Any] = {name: None if (v := found.get(name, MISSING)) == MISSING else v for name in TOKENIZER_FIELDS}
    return TokenizerData(**values)


def healthy_tensor(tensor: Tensor, kind: TensorType) -> Tensor:
    """The reference's tensor in the type that the file holds it in: itself, or re-encoded, with its bytes at hand."""
    from aprlab.conversion.recode import re_encoded

    if tensor.type is kind or len(tensor.shape) < 2:
        return tensor
    out = re_encoded(tensor, kind)
    if out.content.at_hand:
        return out
    return Tensor(tensor.name, out.type, tensor.shape, out.raw, Origin(tensor.origin.path, tensor.origin.name, -1))


__all__ = [
    "Case", "Deviation", "Draft", "Layer", "Match", "correlation", "healthy_tensor", "made_config", "made_tokenizer",
    "replace", "sample", "some", "tensors_of",
]  # fmt: skip
