"""What a conversion did: bytes, types, seconds, costs, a line for each tensor."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aprlab.conversion import mixes
from aprlab.conversion.cost import Cost
from aprlab.conversion.mixes import SUBSTITUTES
from aprlab.conversion.recode import Recoded, encodable
from aprlab.model.model import Model
from aprlab.model.remote import url_of
from aprlab.model.tensor import Tensor


@dataclass(frozen=True, slots=True)
class TensorLine:
    """What happened to one tensor."""

    name: str
    written_as: str
    shape: tuple[int, ...]
    type_in: str
    type_out: str
    nbytes: int


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


def report_of(
    model: Model, output: Path, dialect: str, size: int, lines: list[TensorLine], written: list[Tensor], started: float,
    quantize: str | None = None, reversible: bool | None = None, notes: Iterable[str] = (),
) -> ConversionReport:  # fmt: skip
    """The report of what was just written; `notes` follow those about types."""
    costs = _costs(written)
    return ConversionReport(
        source=model.path,
        output=output,
        dialect=dialect,
        bytes_in=_bytes_of(model),
        bytes_out=size,
        types_in=model.by_type(),
        types_out=count_of(t.type.name for t in written),
        lines=lines,
        seconds=time.perf_counter() - started,
        reversible=reversible,
        notes=[*_notes(lines, quantize, costs), *notes],
        costs=costs,
    )


def _bytes_of(model: Model) -> int:
    """Bytes of the model's file; of all its weight files where there are several; of its tensors where it is at a URL."""
    if url_of(model.path) is not None:
        return model.nbytes
    files = {t.origin.path for t in model.tensors.values()}
    if not model.path.is_dir() and len(files) < 2:
        return model.path.stat().st_size
    return sum(path.stat().st_size for path in files)


def count_of(items: Iterable[str]) -> dict[str, int]:
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
        if isinstance(tensor.content, Recoded):
            one = tensor.content.cost
            total = found.setdefault((one.type_in, one.type_out), Cost(one.type_in, one.type_out))
            total.tensors += 1
            total.square += one.square
            total.error += one.error
            total.worst = max(total.worst, one.worst)
    return sorted(found.values(), key=lambda cost: (-cost.tensors, cost.type_in, cost.type_out))
