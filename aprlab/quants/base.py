"""What every block type has in common: shape arithmetic, chunks, and the checks at the door.

A quant is a declared byte layout (a NumPy structured dtype with ggml's field names) plus a decode and, where one is
written, an encode. The small steps of a decode (`half`, `unpack_nibbles`, `unpack_scales` ...) are methods of their own,
so that a historic bug can be modelled by a subclass that replaces exactly one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from aprlab.errors import FormatError, NumericError, UnsupportedError, UsageError
from aprlab.quants.types import TensorType

if TYPE_CHECKING:
    from numpy.typing import NDArray

# NDArray[np.uint8] and so on, spelled out: importing `numpy.typing` takes a sixth of the time of NumPy itself
Bytes = np.ndarray[tuple[Any, ...], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[Any, ...], np.dtype[np.float32]]
Fields = np.ndarray[tuple[Any, ...], np.dtype[np.void]]

CHUNK = 1 << 18  # values worked on at a time: the temporaries of a chunk stay in a core's cache


class Quant:
    """One block type. Subclasses declare `type` and `layout` and write `decode_fields` (and `encode_fields`).

    Sizes below: n blocks, E = `type.block_elements` values and B = `type.block_bytes` bytes a block.
    """

    type: ClassVar[TensorType]
    layout: ClassVar[np.dtype[np.void]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "layout" in cls.__dict__ and cls.layout.itemsize != cls.type.block_bytes:
            raise TypeError(f"{cls.__name__}: layout has {cls.layout.itemsize} bytes, {cls.type} {cls.type.block_bytes}")

    # -- what a subclass writes

    def decode_fields(self, b: Fields, out: Floats) -> None:
        """Decode blocks viewed as `layout`, shape (n,), into `out`, float32 (n, E)."""
        raise UnsupportedError(f"no decoder for tensor type {self.type}", code="quants.no-decoder")

    def encode_fields(self, x: Floats, b: Fields) -> None:
        """Encode finite `x`, float32 (n, E), into the zeroed blocks `b`, viewed as `layout`, shape (n,)."""
        raise UnsupportedError(f"no encoder for tensor type {self.type}", code="quants.no-encoder")

    def half(self, field: NDArray[np.float16]) -> Floats:
        """Step: a float16 scale field of any shape as float32, subnormals and signed zeros kept."""
        return field.astype(np.float32)

    # -- what callers use

    @property
    def can_encode(self) -> bool:
        """Whether this type can be written."""
        kind = type(self)
        return kind.encode_fields is not Quant.encode_fields or kind.quantise is not Quant.quantise

    def decode(self, blocks: Bytes, out: Floats | None = None) -> Floats:
        """Decode `blocks`, uint8 (n, B), to float32 (n, E); into `out` where it is given.

        A scale that is not finite gives values that are not finite, as in ggml: looking at broken files is what
        this is for. Raises `UnsupportedError` for blocks of the wrong width.
        """
        b = self._fields(blocks)
        out = self._target(out, (len(b), self.type.block_elements))
        step = max(1, CHUNK // self.type.block_elements)
        with np.errstate(invalid="ignore", over="ignore"):
            for i in range(0, len(b), step):
                self.decode_fields(b[i : i + step], out[i : i + step])
        return out

    def encode(self, x: Floats) -> Bytes:
        """Encode `x`, finite floats (n, E), to uint8 (n, B).

        Raises `NumericError` for values that are not finite or need a scale that float16 cannot hold,
        `UnsupportedError` where the type has no encoder or the width is wrong.
        """
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self.type.block_elements:
            raise UnsupportedError(
                f"{self.type}: values of shape {x.shape}, not (n, {self.type.block_elements})", code="quants.bad-values-shape"
            )
        _demand_finite(x, self.type)
        blocks = np.zeros((len(x), self.type.block_bytes), np.uint8)
        b = self._fields(blocks)
        step = max(1, CHUNK // self.type.block_elements)
        # Division by a zero or subnormal scale is settled by the encoders themselves, after the fact.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            for i in range(0, len(b), step):
                self.encode_fields(x[i : i + step], b[i : i + step])
        return blocks

    def dequantise(self, raw: Bytes, shape: tuple[int, ...], out: Floats | None = None) -> Floats:
        """A whole tensor: `raw`, uint8 of `type.nbytes(shape)` bytes in any shape, to float32 of `shape` (NumPy order).

        Raises `FormatError` where the bytes break the size law.
        """
        flat = self._whole(raw, shape)
        out = self._target(out, shape)
        self.decode(flat.reshape(-1, self.type.block_bytes), out.reshape(-1, self.type.block_elements))
        return out

    def quantise(self, x: Floats) -> Bytes:
        """Rows of values, (..., columns), to uint8 (..., row bytes); blocks never cross a row."""
        x = np.asarray(x, np.float32)
        if x.ndim == 0:
            raise UnsupportedError(f"{self.type}: a single number has no row to quantise", code="quants.no-dimensions")
        width = self.type.row_bytes(x.shape[-1])
        return self.encode(x.reshape(-1, self.type.block_elements)).reshape(*x.shape[:-1], width)

    def _fields(self, blocks: Bytes) -> Fields:
        """The blocks, uint8 (n, B), seen through `layout`: a view wherever memory allows, shape (n,)."""
        if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != self.type.block_bytes:
            wanted = f"uint8 (n, {self.type.block_bytes})"
            raise UnsupportedError(
                f"{self.type}: blocks are {blocks.dtype} {blocks.shape}, not {wanted}", code="quants.bad-blocks"
            )
        return np.ascontiguousarray(blocks).reshape(-1).view(self.layout)

    def _target(self, out: Floats | None, shape: tuple[int, ...]) -> Floats:
        """`out` if it can be filled in place, or a new float32 array of `shape`."""
        if out is None:
            return np.empty(shape, np.float32)
        if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise UsageError(
                f"{self.type}: out is {out.dtype} {out.shape}, not contiguous float32 {shape}", code="quants.bad-out"
            )
        return out

    def _whole(self, raw: Bytes, shape: tuple[int, ...]) -> Bytes:
        """All bytes of a tensor as one axis, checked against the size law."""
        flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        if flat.size != (expected := self.type.nbytes(shape)):
            raise FormatError(f"{flat.size} bytes, but {self.type} of shape {shape} takes {expected}", code="quants.size-law")
        return flat


def _demand_finite(x: Floats, type_: TensorType) -> None:
    if not np.isfinite(x).all():
        where = np.unravel_index(int(np.argmin(np.isfinite(x))), x.shape)
        raise NumericError(f"cannot encode {x[where]} (block {where[0]}, value {where[-1]}) as {type_}", code="quants.not-finite")


def bits(x: Bytes, first: int, count: int) -> Bytes:
    """`count` bits of each byte, from bit `first` on, as a number."""
    moved: Bytes = np.right_shift(x, first) if first else x
    if first + count == 8:
        return moved
    kept: Bytes = np.bitwise_and(moved, (1 << count) - 1)
    return kept


def up(x: Bytes, count: int) -> Bytes:
    """Each byte moved up by `count` bits; what leaves the byte is lost."""
    moved: Bytes = np.multiply(x, 1 << count)  # eighteen times as fast as NumPy's left shift of bytes
    return moved


def to_half(value: Floats, type_: TensorType) -> NDArray[np.float16]:
    """float32 to float16, nearest even; raises `NumericError` where a finite number would turn into infinity."""
    half = value.astype(np.float16)
    if not np.isfinite(half).all():
        worst = float(np.abs(value).max())
        raise NumericError(f"{worst:g} does not fit into the float16 of {type_} (largest: 65504)", code="quants.out-of-range")
    return half


def inverse(d: Floats) -> Floats:
    """1/d, and 0 where d is 0 or so small that 1/d is not finite (its float16 is 0 in that case)."""
    with np.errstate(divide="ignore", over="ignore"):
        inv = np.float32(1) / d
    return np.where(np.isfinite(inv), inv, np.float32(0))


def round_away(x: Floats) -> Floats:
    """C's ``roundf``: to the nearest integer, halves away from zero. Exact, as ``x - trunc(x)`` is."""
    whole = np.trunc(x)
    return whole + np.trunc(2 * (x - whole))
