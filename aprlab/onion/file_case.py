"""The case that the layers work on: a file, its reference where there is one, and what has been found out so far.

It is filled from the cheap end; each field says who writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from aprlab.conversion.recode import re_encoded, recoded
from aprlab.formats.raw import Piece, Reference, Seen, of_config, of_tokenizer
from aprlab.model import names
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.looks import FLOATS, Looks
from aprlab.onion.row_errors import RowErrors
from aprlab.onion.verdict import LAYERS
from aprlab.onion.words import Mechanism
from aprlab.quants.types import TensorType


@dataclass(eq=False)
class TensorMatch:
    """A piece of the suspected file and the tensor that it is, or should be.

    Attributes:
        piece: as written.
        true: GGUF name by content, or by name where no content matches; None where it matches nothing.
        of: the reference's tensor, None without a reference or where `true` is None.
        by: how the two were brought together: ``content``, ``span`` (content, but not where the index points),
            ``values`` (decoded, correlated), ``rule``, ``shape``, ``name``, ``nothing``.
        kind: the type the bytes really have; None while that is open. Written by the dtype layer.
        open_kinds: the types that are left where nothing decides between them. Written by the dtype layer.
        equal: the raw bytes are the reference's.
        correlation: of decoded values with the reference's, where it was needed; None if it was not.
        place: where in the image the right bytes stand, if not where the index says.
        looks: type -> figures of the values under it, where they had a say. Written by the dtype layer.
        rows: all rows compared with the reference's, once that was needed; None before, or where they cannot be decoded.
        apart: made from the reference's source, not from the reference: what both types lose counts. Written by the dtype layer.
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
    looks: dict[str, Looks] = field(default_factory=dict)
    rows: RowErrors | None = None
    apart: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it should have."""
        return self.piece.shape if self.of is None else self.of.shape


@dataclass(eq=False)
class Deviation:
    """One decision of the writer that came out otherwise than it should have.

    Attributes:
        kind: what is concerned: ``name``, ``missing``, ``extra``, ``seal`` (the container as a whole), ``span``,
            ``type``, ``encoding``, ``dims``, ``bytes``, ``config``, ``tokenizer``. Each kind has one layer that explains and
            repairs it, see `aprlab.onion.layers.OWNERS`.
        tensor: GGUF name of the tensor concerned, or the field of config or tokenizer.
        found, expected: as it is, as it should be.
        cause: what was done, as a code with the parameters that tell causes apart.
        match: the piece concerned.
        evidence: figures.
        harmless: nothing that runs can notice.
    """

    kind: str
    tensor: str
    found: Any
    expected: Any
    cause: Mechanism
    match: TensorMatch | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    confidence: float = 1.0
    harmless: bool = False
    ambiguous: bool = False

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"unknown layer {self.layer!r}")

    @property
    def layer(self) -> str:
        """Where it belongs: the first half of the code."""
        return self.cause.code.partition(".")[0]

    @property
    def code(self) -> str:
        """Of the cause; stable."""
        return self.cause.code

    @property
    def mechanism(self) -> str:
        """The cause in words, for people."""
        return str(self.cause)

    @property
    def fixable(self) -> bool:
        """Whether it is known what should be there instead; seals and surplus tensors are simply dropped."""
        return self.expected is not None or self.kind in ("seal", "extra")

    def __repr__(self) -> str:
        return f"Deviation({self.kind} {self.tensor}: {self.cause.label})"


@dataclass(eq=False)
class Attempts:
    """Transforms that explained a tensor, or did not: what failed on several tensors is not tried on a hundred more.

    Attributes:
        worked: code of a transform -> tensors that it explained.
        failed: type -> tensors of which no transform of values gave the bytes.
        unexplained: type -> tensors that no transform at all explained.
    """

    worked: dict[str, int] = field(default_factory=dict)
    failed: dict[TensorType, int] = field(default_factory=dict)
    unexplained: dict[TensorType | None, int] = field(default_factory=dict)


@dataclass(eq=False)
class FileCase:
    """A file under suspicion.

    Attributes:
        file: as it is, nothing of it taken on trust. Written by who opens the case.
        ref: the reference, None where the file is judged alone. Written by who opens the case.
        matches: one for each row of the index. Written by the naming layer, completed by the dtype layer.
        deviations: written by who peels: each layer's, in turn.
        target: the type that every matrix was re-encoded to, where one was. Written by the dtype layer.
        attempts: written by the weights layer.
    """

    file: Seen
    ref: Reference | None
    matches: list[TensorMatch] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)
    target: TensorType | None = None
    attempts: Attempts = field(default_factory=Attempts)
    _healthy: dict[tuple[str, TensorType], Tensor] = field(default_factory=dict, repr=False)

    def healthy(self, tensor: Tensor, kind: TensorType) -> Tensor:
        """`healthy_tensor`, remembered."""
        if tensor.type is kind:
            return tensor
        if (tensor.name, kind) not in self._healthy:
            self._healthy[tensor.name, kind] = healthy_tensor(tensor, kind)
        return self._healthy[tensor.name, kind]

    def expected_name(self, gguf: str) -> str:
        """The name that a tensor must have in this file."""
        return gguf if self.file.unrun is not None else names.from_gguf(gguf, self.file.dialect.naming)

    @cached_property
    def expected_config(self) -> dict[str, Any]:
        """Config fields of the reference; {} without one."""
        return {} if self.ref is None or self.file.unrun is not None else of_config(self.ref.model.config)

    @cached_property
    def expected_tokenizer(self) -> dict[str, Any]:
        """Tokenizer fields of the reference; {} without one."""
        return {} if self.ref is None or self.file.unrun is not None else of_tokenizer(self.ref.model.tokenizer)


def tensors_of(deviations: Iterable[Deviation]) -> list[str]:
    """Names of the tensors concerned, each once."""
    return list(dict.fromkeys(d.tensor for d in deviations if d.tensor and d.kind not in ("config", "tokenizer")))


def by_cause(deviations: Iterable[Deviation]) -> list[list[Deviation]]:
    """Deviations of one cause put together, in the order of the first of each."""
    groups: dict[Any, list[Deviation]] = {}
    for deviation in deviations:
        groups.setdefault(deviation.cause.key, []).append(deviation)
    return list(groups.values())


def healthy_tensor(tensor: Tensor, kind: TensorType) -> Tensor:
    """The reference's tensor in the type that the file holds it in: itself, or re-encoded, with its bytes at hand.

    A vector is F32 wherever ggml reads it, and of 16 bits in many a SafeTensors file; it is never held in blocks.
    """
    if tensor.type is kind or (len(tensor.shape) < 2 and not {tensor.type, kind} <= set(FLOATS)):
        return tensor
    out = re_encoded(tensor, kind) if len(tensor.shape) > 1 else recoded(tensor, kind)
    if out.content.at_hand:
        return out
    return Tensor(tensor.name, out.type, tensor.shape, out.raw, Origin(tensor.origin.path, tensor.origin.name, -1))


__all__ = ["Attempts", "Deviation", "FileCase", "TensorMatch", "by_cause", "healthy_tensor", "tensors_of"]
