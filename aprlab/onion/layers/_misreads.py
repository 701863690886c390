"""Blocks that were decoded wrongly and kept as plain floats: the values that each wrong decoder would have left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from aprlab.errors import AprlabError
from aprlab.faults import FAULTS
from aprlab.onion.file_case import FileCase, TensorMatch
from aprlab.onion.looks import FLOATS
from aprlab.onion.words import Mechanism
from aprlab.quants import REGISTRY, can_encode, dequantise, quantise, types
from aprlab.quants.apr import pairs
from aprlab.quants.base import Bytes, Quant
from aprlab.quants.types import TensorType

Decoder = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # bytes and shape -> float32 of that shape
_ROWS = 1 << 18  # values of a part


@dataclass(frozen=True, eq=False)
class WrongDecoder:
    """A wrong decoder of one type; `how` says what it does, in words."""

    kind: TensorType
    how: str
    decode: Decoder


class _InPairs(Quant):
    """Mixed into Q5_0 and Q5_1: byte i holds values 2i and 2i+1, whose fifth bits are bits 2i and 2i+1."""

    def unpack_nibbles(self, qs: Bytes) -> Bytes:
        return pairs(qs)


def _in_pairs(kind: TensorType) -> Decoder:
    return type("InPairs", (_InPairs, type(REGISTRY[kind])), {})().dequantise


def _halves_in_pairs(kind: TensorType) -> Decoder:
    """The value that belongs at i or i + 16, fifth bit and all, comes out at 2i or 2i + 1."""

    def decode(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        blocks = dequantise(raw, kind, shape).reshape(-1, 2, 16)
        return np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(shape)

    return decode


@cache
def misreads() -> tuple[WrongDecoder, ...]:
    """What is tried: the project's own list, then every decoder of the catalogue."""
    found = []
    for kind in (types.Q5_0, types.Q5_1):
        found.append(WrongDecoder(kind, "nibbles and fifth bits in pairs", _in_pairs(kind)))
        found.append(WrongDecoder(kind, "nibbles in pairs, each with its own fifth bit", _halves_in_pairs(kind)))
    for fault in FAULTS.values():
        if fault.registry is None:
            continue
        changed = fault.registry(REGISTRY)
        for kind, quant in changed.items():
            if quant is not REGISTRY[kind] and can_encode(kind):
                found.append(WrongDecoder(kind, f"the fault {fault.id}", quant.dequantise))
    return tuple(found)


def explained_by_misreading(case: FileCase, match: TensorMatch) -> Mechanism | None:
    """The wrong decoder that gives all values of a tensor that is held in plain floats; None where none does.

    The blocks that were decoded are the reference's, or, where the wrong decoder is another type's, the reference's values
    in that type.
    """
    of, kind = match.of, match.kind
    if of is None or kind not in FLOATS or len(of.shape) != 2 or not kind.fits(of.shape, len(match.piece.raw)):
        return None
    known = case.attempts.worked
    for misread in sorted(misreads(), key=lambda m: (m.kind is not of.type, -known.get(_key(m), 0))):
        if of.cols % misread.kind.block_elements or not all(_agrees(match, misread)):
            continue
        known[_key(misread)] = known.get(_key(misread), 0) + 1
        return Mechanism("decode.misread", {"type": misread.kind.name, "how": misread.how, "after": kind.name})
    return None


def _key(misread: WrongDecoder) -> str:
    return f"{misread.kind}: {misread.how}"


def _agrees(match: TensorMatch, misread: WrongDecoder) -> Iterator[bool]:
    """Whether a wrong decoder gives the bytes, two rows first, then part by part; the first no ends the search."""
    of, kind = match.of, match.kind
    assert of is not None
    assert kind is not None
    size, step = kind.row_bytes(of.cols), max(1, _ROWS // of.cols)
    for start, stop in [(0, min(2, of.rows)), *((n, min(n + step, of.rows)) for n in range(0, of.rows, step))]:
        try:
            if misread.kind is of.type:
                blocks = of.blocks()[start:stop].reshape(-1)
            else:
                blocks = quantise(of.dequantise(slice(start, stop)), misread.kind).reshape(-1)
            values = misread.decode(blocks, (stop - start, of.cols))
            yield np.array_equal(quantise(values, kind).reshape(-1), match.piece.raw[start * size : stop * size])
        except (AprlabError, ValueError):
            yield False


__all__ = ["explained_by_misreading", "misreads"]
