"""Ways in which a tensor's bytes can be read, or have been written, wrongly: each a source of values in chunks.

They come from the catalogue: the decoders of section D alone and in pairs, the wrong labels of section B, and what the faults
of sections C to E make of a tensor on its way into a file.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aprlab.conversion.recode import Recoded
from aprlab.conversion.seams import Seams
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, Fault
from aprlab.faults.base import Registry
from aprlab.model.tensor import Tensor
from aprlab.quants import REGISTRY, can_decode, types
from aprlab.quants.base import Quant
from aprlab.quants.types import TensorType

CHUNK = 1 << 16  # values at a time: with their float64 copy they stay in a core's cache
SAMPLES = (128, 2048)  # blocks that are looked at before all are
RECODED_LIMIT = 1 << 20  # values of a tensor that is encoded again to find out; that takes a second or so
SECTIONS = ("B", "C", "D", "E")
AS_IS = Seams(name=lambda name: name, code=lambda kind: kind.code, dims=lambda shape: shape, tensor=lambda tensor: tensor)


@dataclass(frozen=True)
class TensorReading:
    """One way to get values from a tensor.

    Attributes:
        faults: ids of the catalogue; none where no fault leads there.
        form: ``decoder``, ``label`` or ``file``.
        how: the same in words.
        values: a tensor -> float32 chunks, in row order.
        sample: a tensor and a number -> float32 ``(blocks, values)`` of so many blocks, chosen by chance but always the same;
            None where blocks do not stand alone.
    """

    faults: tuple[str, ...]
    form: str
    how: str
    values: Callable[[Tensor], Iterator[np.ndarray]]
    sample: Callable[[Tensor, int], np.ndarray] | None = None

    @property
    def name(self) -> str:
        """The faults, or what it does where the catalogue has no name for it."""
        return " + ".join(self.faults) or self.how


# ── how values come ───────────────────────────────────────────────────────────────────────────────────────────────


def blocks_of(tensor: Tensor, kind: TensorType) -> np.ndarray:
    """All bytes of a tensor as blocks of `kind`, whole ones only: uint8 ``(n, bytes)``."""
    raw = tensor.raw[kind.tensor_bytes :]
    count = len(raw) // kind.block_bytes
    return raw[: count * kind.block_bytes].reshape(count, kind.block_bytes)


def decoded(decoder: Quant, tensor: Tensor) -> Iterator[np.ndarray]:
    """Values by a decoder whose blocks stand alone."""
    blocks, step = blocks_of(tensor, decoder.type), max(1, CHUNK // decoder.type.block_elements)
    for start in range(0, len(blocks), step):
        yield decoder.decode(blocks[start : start + step])


def sampled(decoder: Quant, tensor: Tensor, count: int) -> np.ndarray:
    """Values of `count` blocks, of more where blocks are small: float32 ``(n, values)``. Evenly spaced ones would all be of the
    same few columns, where the number of blocks in a row divides the distance."""
    blocks = blocks_of(tensor, decoder.type)
    count = min(len(blocks), count * max(1, 32 // decoder.type.block_elements))
    chosen = np.random.default_rng(0).choice(len(blocks), count, replace=False, shuffle=False)
    values = decoder.decode(blocks[np.sort(chosen)])
    return values if values.shape[1] > 1 else values.reshape(-1, 32) if values.size % 32 == 0 else values


def stored(tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor's own values."""
    rows = max(1, CHUNK // tensor.cols)
    if tensor.rows <= rows or tensor.type.tensor_bytes:
        yield np.ascontiguousarray(tensor.dequantise())
        return
    for start in range(0, tensor.rows, rows):
        yield np.ascontiguousarray(tensor.dequantise(slice(start, min(start + rows, tensor.rows))))


def _alone(decoder: Quant) -> bool:
    """Whether a decoder looks at one block at a time: it has no way of its own to walk through a tensor."""
    kind = type(decoder)
    return kind.decode is Quant.decode and kind.dequantise is Quant.dequantise


def by_decoder(faults: tuple[str, ...], form: str, how: str, decoder: Quant) -> TensorReading:
    """The reading of a decoder."""
    if _alone(decoder):
        return TensorReading(faults, form, how, lambda t: decoded(decoder, t), lambda t, n: sampled(decoder, t, n))
    return TensorReading(faults, form, how, lambda t: iter([decoder.dequantise(t.raw, t.shape)]))


# ── where they come from ──────────────────────────────────────────────────────────────────────────────────────────


def decoders(kind: TensorType) -> list[TensorReading]:
    """Faulty decoders of one type."""
    found = []
    for fault, registry in _registries(kind, REGISTRY):
        found.append(by_decoder((fault.id,), "decoder", fault.title, registry[kind]))
    return found


def decoder_pairs(kind: TensorType, without: frozenset[str] = frozenset()) -> list[TensorReading]:
    """Two faulty decoders of one type at once, the second on top of the first; none that has a fault of `without`."""
    found = []
    single = [(f, r) for f, r in _registries(kind, REGISTRY) if f.id not in without]
    for (first, registry), (second, _) in itertools.permutations(single, 2):
        assert second.registry is not None
        both = second.registry(registry)[kind]
        swapped = single_order(first, second)
        if not swapped and _same_either_way(both, kind, first, second):
            continue
        found.append(by_decoder((first.id, second.id), "decoder", f"{first.title}; {second.title}", both))
    return found


def single_order(first: Fault, second: Fault) -> bool:
    """Whether two faults are in the catalogue's order."""
    order = list(FAULTS)
    return order.index(first.id) < order.index(second.id)


def _same_either_way(both: Quant, kind: TensorType, first: Fault, second: Fault) -> bool:
    """Whether two steps replace different methods, so that their order does not matter."""
    assert first.registry is not None
    assert second.registry is not None
    steps = [set(vars(type(dict(change(REGISTRY))[kind]).__mro__[1])) - _PLAIN for change in (first.registry, second.registry)]
    return not steps[0] & steps[1]


_PLAIN = {"__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__"}


def _registries(kind: TensorType, base: Registry) -> Iterator[tuple[Fault, Registry]]:
    for fault in FAULTS.values():
        if fault.registry is not None and fault.section in SECTIONS:
            try:
                registry = fault.registry(base)
            except KeyError:  # of a type that this registry does not have
                continue
            if registry.get(kind) is not base.get(kind):
                yield fault, registry


def labels(kind: TensorType) -> list[TensorReading]:
    """The blocks of one type taken for those of every other; named by the faults that label them so."""
    named: dict[TensorType, list[str]] = {}
    for fault in FAULTS.values():
        if fault.section != "B" or fault.seams is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of these faults warns, as its program did
            code = fault.seams(AS_IS).code(kind)
        if code != kind.code:
            try:
                named.setdefault(types.by_code(code), []).append(fault.id)
            except AprlabError:
                continue
    found = []
    for other in (t for t in REGISTRY if t is not kind and not t.tensor_bytes and can_decode(t)):
        ids = named.get(other, [])
        found.append(by_decoder(tuple(ids[:1]), "label", f"{kind.name} blocks read as {other.name}", REGISTRY[other]))
    return found


def files(tensor: Tensor) -> list[TensorReading]:
    """What the file faults make of this tensor where they change it: its values after that."""
    found = []
    for fault in FAULTS.values():
        if fault.section not in SECTIONS or fault.seams is None or fault.registry is not None:
            continue
        try:
            changed = fault.seams(AS_IS).tensor(tensor)
        except AprlabError:
            continue
        if changed is tensor or (isinstance(changed.content, Recoded) and tensor.size > RECODED_LIMIT):
            continue
        found.append(TensorReading((fault.id,), "file", fault.title, _values_of(changed)))
    return found


def _values_of(changed: Tensor) -> Callable[[Tensor], Iterator[np.ndarray]]:
    return lambda tensor: stored(changed)


def in_file(tensor: Tensor, faults: tuple[str, ...]) -> Tensor | None:
    """The tensor as a file with these faults has it; None where one has no file form or changes nothing."""
    for id in faults:
        seams = FAULTS[id].seams
        if seams is None:
            return None
        changed = seams(AS_IS).tensor(tensor)
        if changed is tensor:
            return None
        tensor = changed
    return tensor
