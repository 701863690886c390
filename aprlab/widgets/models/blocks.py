"""Block microscope: one block of a tensor, its bytes, fields and values, on two sides and under any decoding fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from aprlab.errors import UsageError
from aprlab.faults import FAULTS
from aprlab.model.tensor import Tensor
from aprlab.quants import Q4_K, Q5_K, REGISTRY
from aprlab.quants.base import Quant
from aprlab.quants.types import TensorType
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.files import Side

WINDOW = 32  # values that are shown of a type whose blocks are single values
_CHUNK = 1 << 20  # values decoded at a time while looking for the worst block


@dataclass(frozen=True)
class BlockField:
    """A named run of bytes of a block, ``start`` to ``stop``, and what its numbers are as they stand."""

    name: str
    start: int
    stop: int
    shown: str


@dataclass(frozen=True)
class ScaleGroup:
    """Thirty-two values of a Q4_K or Q5_K block: ``scale`` and ``minimum`` of six bits, and times ``d`` and ``dmin``."""

    scale: int
    minimum: int
    step: float
    offset: float


@dataclass(frozen=True, eq=False)
class Block:
    """Some bytes of a tensor that encode some of its values.

    Attributes:
        kind: type of the tensor.
        raw: uint8 ``(bytes,)``: one block, or `WINDOW` of them for types of single values.
        head: bytes once before all blocks of the tensor (AprQ8's scale).
        quant: the healthy decoder.
    """

    kind: TensorType
    raw: np.ndarray
    head: np.ndarray
    quant: Quant

    @property
    def size(self) -> int:
        """Values."""
        return len(self.raw) // self.kind.block_bytes * self.kind.block_elements

    def decode(self, raw: np.ndarray | None = None, quant: Quant | None = None) -> np.ndarray:
        """Values, float32 ``(size,)``, of these bytes or of others, by this decoder or by another."""
        whole = np.concatenate([self.head, self.raw if raw is None else raw])
        with np.errstate(all="ignore"):
            return (quant or self.quant).dequantise(whole, (1, self.size))[0]

    @cached_property
    def fields(self) -> list[BlockField]:
        """In the order of the bytes."""
        layout, count = self.quant.layout, len(self.raw) // self.kind.block_bytes
        places: Mapping[str, Any] = layout.fields or {}
        found = []
        for name in sorted(places, key=lambda name: places[name][1]):
            kind, start = places[name][:2]
            numbers = self.raw.view(layout)[name].reshape(-1)
            text = ", ".join(f"{x:.6g}" if numbers.dtype.kind == "f" else str(x) for x in numbers[:WINDOW].tolist())
            stop = start + kind.itemsize if count == 1 else len(self.raw)
            found.append(BlockField(name, start, stop, text + (" …" if len(numbers) > WINDOW else "")))
        return found

    @cached_property
    def groups(self) -> list[ScaleGroup]:
        """The eight scales and minima of a block whose fields pack them into twelve bytes; none of other types."""
        quant = self.quant
        if not isinstance(quant, Q4_K | Q5_K):
            return []
        fields = self.raw.view(quant.layout)
        sc, m = quant.unpack_scales(fields["scales"])
        with np.errstate(all="ignore"):
            steps, offsets = quant.group_scales(fields)
        return [
            ScaleGroup(*row) for row in zip(sc[0].tolist(), m[0].tolist(), steps[0].tolist(), offsets[0].tolist(), strict=True)
        ]

    def field_of(self, byte: int) -> BlockField:
        """The field that a byte belongs to."""
        return next(field for field in self.fields if field.start <= byte < field.stop)

    @cached_property
    def reach(self) -> np.ndarray:
        """Which bit makes which value: bool ``(bytes, 8, size)``, bit 0 the lowest; found by turning each bit over."""
        healthy = self.decode().view(np.uint32)
        found = np.zeros((len(self.raw), 8, self.size), bool)
        for byte in range(len(self.raw)):
            for bit in range(8):
                other = self.raw.copy()
                other[byte] ^= 1 << bit
                found[byte, bit] = self.decode(other).view(np.uint32) != healthy
        return found

    def values_of(self, byte: int) -> np.ndarray:
        """Indices of the values that depend on a byte."""
        return np.flatnonzero(self.reach[byte].any(axis=0))

    def bits_of(self, value: int) -> dict[str, list[tuple[int, int]]]:
        """Field -> (byte, bit) pairs that a value depends on."""
        found: dict[str, list[tuple[int, int]]] = {}
        for byte, bit in np.argwhere(self.reach[:, :, value]).tolist():
            found.setdefault(self.field_of(byte).name, []).append((byte, bit))
        return found


def _width(kind: TensorType) -> int:
    """Values that are shown as one block."""
    return kind.block_elements if kind.block_elements > 1 else WINDOW


def faults_of(kind: TensorType) -> dict[str, Quant]:
    """Id -> decoder of each fault of the catalogue that decodes this type otherwise."""
    found = {}
    for fault in FAULTS.values():
        if fault.registry is not None and kind in REGISTRY:
            decoder = fault.registry(REGISTRY).get(kind)
            if decoder is not None and decoder is not REGISTRY[kind]:
                found[fault.id] = decoder
    return found


class BlockMicroscope(Observable):
    """One block at a time.

    Attributes:
        sides: by label, the first is the reference.
        name, row, block: which block of which tensor; a row of a type of single values has blocks of `WINDOW` values.
        fault: id of a decoding fault to compare with the truth, or ''.
        byte, value: what was clicked, or -1.
    """

    def __init__(self, *sides: Side, name: str = "") -> None:
        super().__init__()
        self._show(sides, name)

    def open(self, reference: str, suspect: str = "") -> None:
        """Look at other files; what is not a file or cannot be read is refused, and the files stay as they were.

        Raises:
            UsageError, FormatError, UnsupportedError: as `Side.open`.
        """
        self.work.free()
        self._show(Side.open_all([reference, *([suspect] if suspect.strip() else [])]), "")

    def _show(self, sides: Sequence[Side], name: str) -> None:
        if not sides:
            raise UsageError("a file is needed", code="widgets.file-needed")
        by_label = {side.label: side for side in sides}
        if len(by_label) != len(sides):
            raise UsageError("two files under one label", code="widgets.duplicate-label")
        if not name and not sides[0].tensors:
            raise UsageError(f"{sides[0].label} has no tensor that can be decoded", code="widgets.no-decodable-tensor")
        self.sides = by_label
        self._decoded: dict[str, Block] = {}
        self.name, self.row, self.block, self.fault, self.byte, self.value = "", 0, 0, "", -1, -1
        self.worst_words = ""
        self.choose(name or next((n for n in self.names if self.tensor(n).type.quantised), self.names[0]))

    @property
    def names(self) -> list[str]:
        """Tensors of the first side."""
        return list(next(iter(self.sides.values())).tensors)

    def tensor(self, name: str = "", label: str = "") -> Tensor:
        """The tensor looked at, of the first side or of the one called `label`."""
        side = self.sides[label] if label else next(iter(self.sides.values()))
        try:
            return side.tensors[name or self.name]
        except KeyError:
            raise UsageError(
                f"{side.label} has no tensor {name or self.name!r} that can be decoded", code="widgets.no-decodable-tensor"
            ) from None

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        tensor = self.tensor()
        return -(-tensor.cols // _width(tensor.type))

    @property
    def faults(self) -> list[str]:
        """Ids that can be toggled for this tensor's type."""
        return list(faults_of(self.tensor().type))

    def choose(self, name: str | None = None, row: int | None = None, block: int | None = None) -> None:
        """Go elsewhere; a row or block beyond the end becomes the last one, and a fault of other types is switched off."""
        self.work.free()
        if name is not None and name != self.name:
            self.tensor(name)
            self.name, self.row, self.block, self.worst_words = name, 0, 0, ""
        tensor = self.tensor()
        self.row = min(max(self.row if row is None else row, 0), tensor.rows - 1)
        self.block = min(max(self.block if block is None else block, 0), self.blocks - 1)
        if self.fault not in self.faults:
            self.fault = ""
        self._decoded, self.byte, self.value = {}, -1, -1
        self.changed()

    def toggle(self, fault: str) -> None:
        """Hold a decoding fault against the truth ('' none)."""
        self.work.free()
        if fault and fault not in self.faults:
            raise UsageError(
                f"{fault!r} does not decode {self.tensor().type.name}; there are: {', '.join(self.faults) or 'none'}",
                code="widgets.fault-does-not-decode",
            )  # fmt: skip
        self.fault, self.worst_words = fault, ""
        self.changed()

    def click(self, *, byte: int = -1, value: int = -1) -> None:
        """Mark a byte and the values it makes, or a value and the bits it is made of; the same again unmarks it."""
        same = (byte, value) == (self.byte, self.value)
        self.byte, self.value = (-1, -1) if same else (byte, value)
        self.changed()

    # -- what is shown

    def block_on(self, label: str) -> Block | None:
        """The block on one side; None where that side has no such tensor, or one of another shape."""
        if label not in self._decoded:
            found = self._cut(label)
            if found is None:
                return None
            self._decoded[label] = found
        return self._decoded[label]

    def _cut(self, label: str) -> Block | None:
        tensor = self.sides[label].tensors.get(self.name)
        if tensor is None or self.row >= tensor.rows:
            return None
        kind = tensor.type
        step = kind.block_bytes * (_width(kind) // kind.block_elements)
        raw = tensor.blocks()[self.row, self.block * step : (self.block + 1) * step]
        if not raw.size:
            return None
        return Block(kind, np.array(raw), np.array(tensor.raw[: kind.tensor_bytes]), REGISTRY[kind])

    @property
    def first(self) -> Block:
        """The block of the reference."""
        found = self.block_on(next(iter(self.sides)))
        assert found is not None
        return found

    def values(self) -> dict[str, np.ndarray]:
        """Label -> values of this block: each side's, and what the fault makes of the first side's bytes."""
        found = {}
        for label in self.sides:
            block = self.block_on(label)
            if block is not None:
                found[label] = block.decode()
        if self.fault:
            found[self.fault] = self.first.decode(quant=faults_of(self.first.kind)[self.fault])
        return found

    def marked(self) -> tuple[set[int], set[int]]:
        """(bytes, values) to be marked."""
        if self.byte >= 0:
            return {self.byte}, set(self.first.values_of(self.byte).tolist())
        if self.value >= 0:
            return {byte for places in self.first.bits_of(self.value).values() for byte, _ in places}, {self.value}
        return set(), set()

    def find_worst(self) -> None:
        """Go to the block in which the two sides, or fault and truth, are furthest apart: the largest |difference|."""
        labels = list(self.sides)
        if not self.fault and len(labels) < 2:
            raise UsageError(
                "nothing to compare this side with: choose a fault, or open two files", code="widgets.nothing-to-compare"
            )
        a = self.tensor()
        b = a if self.fault else self.tensor(label=labels[1])
        if b.shape != a.shape:
            raise UsageError(f"unlike shapes: {a.shape} and {b.shape}", code="widgets.unlike-shapes")
        self.work.start("looking for the worst block", lambda: self._search(a, b))

    def _search(self, a: Tensor, b: Tensor) -> None:
        faulty = faults_of(a.type).get(self.fault)
        step, best, where = max(1, _CHUNK // a.cols), 0.0, (self.row, self.block)
        for start in range(0, a.rows, step):
            self.work.tell(f"looking for the worst block: row {start} of {a.rows}", start / a.rows)
            rows = slice(start, min(start + step, a.rows))
            x = a.dequantise(rows)
            if faulty is None:
                y = b.dequantise(rows)
            else:
                whole = np.concatenate([a.raw[: a.type.tensor_bytes], a.blocks()[rows].reshape(-1)])
                with np.errstate(all="ignore"):
                    y = faulty.dequantise(whole, x.shape)
            with np.errstate(all="ignore"):
                apart = np.abs(x.astype(np.float64) - y)
            apart[np.isnan(apart)] = np.inf
            at = np.unravel_index(int(np.argmax(apart)), apart.shape)
            if apart[at] > best:
                best = float(apart[at])
                where = start + int(at[0]), int(at[1]) // _width(a.type)
        self.row, self.block = where
        self._decoded, self.byte, self.value = {}, -1, -1
        against = self.fault or list(self.sides)[1]
        self.worst_words = f"furthest from {against}: {best:.4g} in row {where[0]}, block {where[1]}"
        if best == 0:
            self.worst_words = f"{self.name}: no value differs from {against}"

    def rows(self) -> list[Mapping[str, object]]:
        """A table of the values: index, each side's, largest differences first where there are any."""
        values = self.values()
        labels = list(values)
        count = min(len(v) for v in values.values())
        apart = np.zeros(count)
        if len(labels) > 1:
            with np.errstate(all="ignore"):
                apart = np.abs(values[labels[0]][:count].astype(np.float64) - values[labels[-1]][:count])
            apart[np.isnan(apart)] = np.inf
        order = np.argsort(-apart, kind="stable")
        return [
            {"value": int(n), **{label: float(values[label][n]) for label in labels}, "apart": float(apart[n])} for n in order
        ]


__all__ = ["WINDOW", "Block", "BlockField", "BlockMicroscope", "ScaleGroup", "faults_of"]
