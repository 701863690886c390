"""An explicit SIMD layer inside ``@njit``: LLVM vectors as numba types, and the few operations the kernels are made of.

A value of `Vector(kind, bits, lanes)` is one LLVM vector, e.g. ``f32x8`` or ``i8x32``; it lives in a register. Every
function below is an intrinsic that emits LLVM IR where it is called; none can be called from Python. Nearly all of it
is portable IR that LLVM turns into whatever the processor has. Only `dot4`, `dot4_scaled` and the `pairs_*` differ by
instruction set.

Names: `load_*` take a 1-D array and an element index and need no alignment. Bytes are ``i8``; whether they are signed
is up to the operation, as in LLVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel.models import OpaqueModel, PrimitiveModel
from numba.extending import NativeValue, intrinsic, register_model, typeof_impl, unbox

from aprlab.kernels.simd import isa as isas

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


# -- types --------------------------------------------------------------------------------------------------------------


class Vector(types.Type):
    """The numba type of a vector: `kind` is ``i`` or ``f``, `bits` of one lane, number of `lanes`."""

    def __init__(self, kind: str, bits: int, lanes: int) -> None:
        self.kind, self.bits, self.lanes = kind, bits, lanes
        super().__init__(name=f"{kind}{bits}x{lanes}")

    @property
    def lane(self) -> ir.Type:
        """LLVM's type of one lane."""
        return {32: F32, 64: F64}[self.bits] if self.kind == "f" else ir.IntType(self.bits)

    @property
    def llvm(self) -> ir.VectorType:
        """LLVM's type of the vector."""
        return ir.VectorType(self.lane, self.lanes)


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32x8, i32x8, i16x16 = Vector("f", 32, 8), Vector("i", 32, 8), Vector("i", 16, 16)
f32x16, i32x16 = Vector("f", 32, 16), Vector("i", 32, 16)
i8x16, i8x32, i8x64 = Vector("i", 8, 16), Vector("i", 8, 32), Vector("i", 8, 64)


class Marker(types.Opaque):
    """A value that is all type: which instruction set (`group` ``isa``) or which block type (``block``)."""

    def __init__(self, group: str, value: str) -> None:
        self.group, self.value = group, value
        super().__init__(name=f"{group}({value}, {isas.source_digest()})")


register_model(Marker)(OpaqueModel)
_ISA_MARKERS = {isa: Marker("isa", isa.name) for isa in isas.ALL}


@typeof_impl.register(isas.Isa)
def _typeof_isa(value: isas.Isa, context: Any) -> Marker:
    return _ISA_MARKERS[value]


@unbox(Marker)
def _unbox_marker(typ: Marker, obj: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


# -- helpers of the emitters --------------------------------------------------------------------------------------------


def _constant(vector: Vector, values: list[int]) -> ir.Constant:
    return ir.Constant(vector.llvm, [ir.Constant(vector.lane, v) for v in values])


def _repeat(vector: Vector, value: int) -> ir.Constant:
    return _constant(vector, [value] * vector.lanes)


def _mask(indices: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(indices)), [ir.Constant(I32, i) for i in indices])


def _shuffle(b: ir.IRBuilder, a: ir.Value, indices: list[int], other: ir.Value | None = None) -> ir.Value:
    return b.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if other is None else other, _mask(indices))


def _splat(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(value.type, lanes)
    single = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return _shuffle(b, single, [0] * lanes)


def _call(b: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, args)


def _pointer(context: Any, b: ir.IRBuilder, array_type: Any, array: Any, index: Any, kind: ir.Type) -> ir.Value:
    data = context.make_array(array_type)(context, b, array).data
    return b.bitcast(b.gep(data, [index]), kind.as_pointer())


def _load(b: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return b.load(pointer, align=1)


def _doubled(vector: Vector) -> Vector:
    return Vector(vector.kind, vector.bits, 2 * vector.lanes)


def _is_pair(array: Any) -> bool:
    """Whether loads are to take two places at a time: `array` is a tuple (array, how many elements lie between them)."""
    return isinstance(array, types.BaseTuple)


def _both(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """One vector after the other."""
    return _shuffle(b, low, list(range(2 * low.type.count)), high)


def _fitted(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """The vector, repeated where it has half the lanes."""
    return value if value.type.count == lanes else _both(b, value, value)


def _from_places(vector: Vector, array: Any, one: Callable[..., ir.Value]) -> Any:
    """What an intrinsic (array, index) -> vector returns: `one` loads from one place; of a pair of places both, side by side."""
    if not _is_pair(array):
        return vector(array, types.intp), lambda context, b, signature, args: one(context, b, array, args[0], args[1])

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        held, gap = (b.extract_value(args[0], i) for i in range(2))
        ends = (one(context, b, array[0], held, at) for at in (args[1], b.add(args[1], gap)))
        return _both(b, *ends)

    return _doubled(vector)(array, types.intp), emit


def _loader(vector: Vector, doc: str) -> Any:
    """An intrinsic (array, index) -> vector that loads as many bytes as the vector has."""

    def load(typingctx: Any, array: Any, index: Any) -> Any:
        def one(context: Any, b: ir.IRBuilder, kind: Any, held: Any, at: Any) -> ir.Value:
            return _load(b, _pointer(context, b, kind, held, at, vector.llvm))

        return _from_places(vector, array, one)

    load.__doc__ = doc
    return intrinsic(load)


def _binary(emit_one: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value], doc: str) -> Any:
    """An intrinsic (vector, vector of the same type, or half of it, which is repeated) -> vector."""

    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        if not isinstance(a, Vector) or not isinstance(b, Vector) or a not in (b, _doubled(b)):
            return None

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return emit_one(builder, args[0], _fitted(builder, args[1], a.lanes))

        return a(a, b), emit

    operation.__doc__ = doc
    return intrinsic(operation)


# -- loads, stores, splats ----------------------------------------------------------------------------------------------

load_f32x8 = _loader(f32x8, "Eight floats of a float32 array.")
load_f32x16 = _loader(f32x16, "Sixteen floats of a float32 array.")
load_i32x8 = _loader(i32x8, "32 bytes as eight 32-bit integers.")
load_i8x16 = _loader(i8x16, "16 bytes.")
load_i8x32 = _loader(i8x32, "32 bytes.")


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of element `index`, which will be read once; beyond the array's end nothing happens."""

    def ask(context: Any, b: ir.IRBuilder, kind: Any, held: Any, at: Any) -> None:
        pointer = _pointer(context, b, kind, held, at, I8)
        called = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, called, "llvm.prefetch.p0")
        b.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 3, 1))])  # to read, into all caches, data

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if _is_pair(array):
            held, gap = (b.extract_value(args[0], i) for i in range(2))
            for at in (args[1], b.add(args[1], gap)):
                ask(context, b, array[0], held, at)
        else:
            ask(context, b, array, args[0], args[1])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def store_f32x8(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Eight floats into a float32 array."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b.store(args[2], _pointer(context, b, array, args[0], args[1], f32x8.llvm), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x8), emit


@intrinsic
def store_i8x8(typingctx: Any, array: Any, index: Any, gap: Any, value: Any) -> Any:
    """Eight 32-bit integers, cut to their low bytes, into an int8 array: four at `index`, four `gap` behind it."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        small = b.trunc(args[3], ir.VectorType(I8, 8))
        for half, at in ((0, args[1]), (4, b.add(args[1], args[2]))):
            four = _shuffle(b, small, list(range(half, half + 4)))
            b.store(four, _pointer(context, b, array, args[0], at, four.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, i32x8), emit


@intrinsic
def load_half(typingctx: Any, array: Any, index: Any) -> Any:
    """The IEEE half at byte `index` of a uint8 array, as float32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.fpext(_load(b, _pointer(context, b, array, args[0], args[1], F16)), F32)

    return types.float32(array, types.intp), emit


@intrinsic
def load_f32(typingctx: Any, array: Any, index: Any) -> Any:
    """The float32 at byte `index` of a uint8 array."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _load(b, _pointer(context, b, array, args[0], args[1], F32))

    return types.float32(array, types.intp), emit


@intrinsic
def load_u32(typingctx: Any, array: Any, index: Any) -> Any:
    """The little-endian unsigned 32-bit integer at byte `index` of a uint8 array, as int64."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.zext(_load(b, _pointer(context, b, array, args[0], args[1], I32)), I64)

    return types.int64(array, types.intp), emit


@intrinsic
def load_f32x8_bytes(typingctx: Any, array: Any, index: Any) -> Any:
    """Eight float32 at byte `index` of a uint8 array."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _load(b, _pointer(context, b, array, args[0], args[1], f32x8.llvm))

    return f32x8(array, types.intp), emit


@intrinsic
def load_half8(typingctx: Any, array: Any, index: Any) -> Any:
    """Eight IEEE halves at byte `index` of a uint8 array, as float32."""

    def one(context: Any, b: ir.IRBuilder, kind: Any, held: Any, at: Any) -> ir.Value:
        return b.fpext(_load(b, _pointer(context, b, kind, held, at, ir.VectorType(F16, 8))), f32x8.llvm)

    return _from_places(f32x8, array, one)


@intrinsic
def load_bfloat8(typingctx: Any, array: Any, index: Any) -> Any:
    """Eight bfloat16 at byte `index` of a uint8 array, as float32: the upper halves of its bits."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        halves = _load(b, _pointer(context, b, array, args[0], args[1], ir.VectorType(I16, 8)))
        return b.bitcast(b.shl(b.zext(halves, i32x8.llvm), _repeat(i32x8, 16)), f32x8.llvm)

    return f32x8(array, types.intp), emit


@intrinsic
def load_bfloat(typingctx: Any, array: Any, index: Any) -> Any:
    """The bfloat16 at byte `index` of a uint8 array, as float32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        half = _load(b, _pointer(context, b, array, args[0], args[1], I16))
        return b.bitcast(b.shl(b.zext(half, I32), ir.Constant(I32, 16)), F32)

    return types.float32(array, types.intp), emit


@intrinsic
def load_u8_as_i32x8(typingctx: Any, array: Any, index: Any) -> Any:
    """Eight unsigned bytes at byte `index`, as 32-bit integers."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        small = _load(b, _pointer(context, b, array, args[0], args[1], ir.VectorType(I8, 8)))
        return b.zext(small, i32x8.llvm)

    return i32x8(array, types.intp), emit


def _splatter(vector: Vector, scalar: Any, doc: str) -> Any:
    def splat(typingctx: Any, value: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            value = args[0]
            if vector.kind == "i" and vector.bits < 64:
                value = b.trunc(value, vector.lane)
            return _splat(b, value, vector.lanes)

        return vector(scalar), emit

    splat.__doc__ = doc
    return intrinsic(splat)


splat_f32 = _splatter(f32x8, types.float32, "One float32 in all eight lanes.")
splat_f32x16 = _splatter(f32x16, types.float32, "One float32 in all sixteen lanes.")
splat_i32 = _splatter(i32x8, types.int64, "One integer, cut to 32 bits, in all eight lanes.")
splat_i8 = _splatter(i8x32, types.int64, "One integer, cut to 8 bits, in all 32 lanes.")
splat_i8x16 = _splatter(i8x16, types.int64, "One integer, cut to 8 bits, in all 16 lanes.")


# -- arithmetic ---------------------------------------------------------------------------------------------------------


def _is_float(value: ir.Value) -> bool:
    return isinstance(value.type.element, ir.FloatType | ir.DoubleType)


add = _binary(lambda b, x, y: b.fadd(x, y) if _is_float(x) else b.add(x, y), "Lane by lane x + y.")
sub = _binary(lambda b, x, y: b.fsub(x, y) if _is_float(x) else b.sub(x, y), "Lane by lane x - y.")
mul = _binary(lambda b, x, y: b.fmul(x, y) if _is_float(x) else b.mul(x, y), "Lane by lane x * y.")
div = _binary(lambda b, x, y: b.fdiv(x, y), "Lane by lane x / y of floats.")
band = _binary(lambda b, x, y: b.and_(x, y), "Bitwise and.")
bor = _binary(lambda b, x, y: b.or_(x, y), "Bitwise or.")
bxor = _binary(lambda b, x, y: b.xor(x, y), "Bitwise exclusive or.")
maximum = _binary(lambda b, x, y: _call(b, "llvm.maxnum.v8f32", x.type, [x, y]), "Lane by lane maximum of f32x8; NaN loses.")
minimum = _binary(lambda b, x, y: _call(b, "llvm.minnum.v8f32", x.type, [x, y]), "Lane by lane minimum of f32x8; NaN loses.")


def _shifter(method: str, doc: str) -> Any:
    def shift(typingctx: Any, value: Any, count: Any) -> Any:
        if not isinstance(value, Vector) or value.kind != "i":
            return None

        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            # no processor has byte shifts: take them by pairs, and let the caller mask what crosses over
            lanes = Vector("i", 16, value.lanes // 2) if value in (i8x32, i8x64) else value
            amount = _splat(b, b.trunc(args[1], lanes.lane), lanes.lanes)
            return b.bitcast(getattr(b, method)(b.bitcast(args[0], lanes.llvm), amount), value.llvm)

        return value(value, types.int64), emit

    shift.__doc__ = doc
    return intrinsic(shift)


shl = _shifter("shl", "Every lane shifted left by a scalar. Bytes move in pairs, and bits cross: mask afterwards.")
shr = _shifter("lshr", "Every lane shifted right by a scalar, zeros coming in. Bytes move in pairs: mask afterwards.")
sar = _shifter("ashr", "Every lane shifted right by a scalar, the sign coming in; not for bytes.")


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """Lane by lane x * y + z of floats, with one rounding where the processor can fuse and with two where it cannot."""
    if not isinstance(x, Vector) or x.kind != "f" or not x == y == z:
        return None

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _call(b, f"llvm.fmuladd.v{x.lanes}f{x.bits}", x.llvm, list(args))

    return x(x, x, x), emit


@intrinsic
def select_less(typingctx: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """Lane by lane: a where x < y, else b (so b where either is NaN); f32x8."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return f32x8(f32x8, f32x8, f32x8, f32x8), emit


@intrinsic
def lane_numbers(typingctx: Any) -> Any:
    """0, 1, … 7 as f32x8."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(f32x8.llvm, [ir.Constant(F32, float(i)) for i in range(8)])

    return f32x8(), emit


@intrinsic
def absolute(typingctx: Any, x: Any) -> Any:
    """|x| of f32x8."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _call(b, "llvm.fabs.v8f32", f32x8.llvm, [args[0]])

    return f32x8(f32x8), emit


@intrinsic
def hsum(typingctx: Any, x: Any) -> Any:
    """Sum of the lanes of f32x8, by halves: ((0+4)+(2+6)) + ((1+5)+(3+7)), on every machine."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        value = args[0]
        for width in (4, 2, 1):
            low, high = _shuffle(b, value, list(range(width))), _shuffle(b, value, list(range(width, 2 * width)))
            value = b.fadd(low, high)
        return b.extract_element(value, ir.Constant(I32, 0))

    return types.float32(f32x8), emit


@intrinsic
def hmax(typingctx: Any, x: Any) -> Any:
    """Largest lane of f32x8."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        value = args[0]
        for width in (4, 2, 1):
            low, high = _shuffle(b, value, list(range(width))), _shuffle(b, value, list(range(width, 2 * width)))
            value = _call(b, f"llvm.maxnum.v{width}f32", low.type, [low, high])
        return b.extract_element(value, ir.Constant(I32, 0))

    return types.float32(f32x8), emit


@intrinsic
def hsum_i32(typingctx: Any, x: Any) -> Any:
    """Sum of the lanes of i32x8, as int64 (the sum itself is of 32 bits)."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        value = args[0]
        for width in (4, 2, 1):
            low, high = _shuffle(b, value, list(range(width))), _shuffle(b, value, list(range(width, 2 * width)))
            value = b.add(low, high)
        return b.sext(b.extract_element(value, ir.Constant(I32, 0)), I64)

    return types.int64(i32x8), emit


# -- conversions --------------------------------------------------------------------------------------------------------


@intrinsic
def to_f32(typingctx: Any, x: Any) -> Any:
    """i32x8, signed, as f32x8; i32x16 as f32x16."""
    if not isinstance(x, Vector) or x.kind != "i" or x.bits != 32:
        return None
    floats = Vector("f", 32, x.lanes)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.sitofp(args[0], floats.llvm)

    return floats(x), emit


@intrinsic
def round_even(typingctx: Any, x: Any) -> Any:
    """f32x8 rounded to the nearest integer, ties to even, as i32x8."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        whole = _call(b, "llvm.nearbyint.v8f32", f32x8.llvm, [args[0]])
        return b.fptosi(whole, i32x8.llvm)

    return i32x8(f32x8), emit


@intrinsic
def as_f32(typingctx: Any, x: Any) -> Any:
    """The bits of i32x8 read as f32x8."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.bitcast(args[0], f32x8.llvm)

    return f32x8(i32x8), emit


@intrinsic
def half_round(typingctx: Any, x: Any) -> Any:
    """A float32 rounded to IEEE half and back."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.fpext(b.fptrunc(args[0], F16), F32)

    return types.float32(types.float32), emit


def _widener(target: Vector, part: int) -> Any:
    lanes, whole = target.lanes, Vector("i", 32, target.lanes)

    def widen(typingctx: Any, x: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            some = _shuffle(b, args[0], list(range(lanes * part, lanes * part + lanes)))
            return b.sitofp(b.sext(some, whole.llvm), target.llvm)

        return target(i8x32), emit

    widen.__doc__ = f"Signed bytes {lanes * part} to {lanes * part + lanes - 1} of i8x32 as {target.name}."
    return intrinsic(widen)


widen0, widen1, widen2, widen3 = (_widener(f32x8, part) for part in range(4))
widen_low, widen_high = (_widener(f32x16, part) for part in range(2))


@intrinsic
def fold(typingctx: Any, x: Any) -> Any:
    """f32x16 -> f32x8: lane i + lane i + 8."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.fadd(_shuffle(b, args[0], list(range(8))), _shuffle(b, args[0], list(range(8, 16))))

    return f32x8(f32x16), emit


# -- bytes --------------------------------------------------------------------------------------------------------------


@intrinsic
def join(typingctx: Any, low: Any, high: Any) -> Any:
    """Two i8x16 as one i8x32."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _shuffle(b, args[0], list(range(32)), args[1])

    return i8x32(i8x16, i8x16), emit


@intrinsic
def nibbles(typingctx: Any, x: Any) -> Any:
    """The low nibbles of i8x16, then the high ones: i8x32 of 0…15."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pairs = ir.VectorType(I16, 8)
        high = b.lshr(b.bitcast(args[0], pairs), ir.Constant(pairs, [ir.Constant(I16, 4)] * 8))
        both = _shuffle(b, args[0], list(range(32)), b.bitcast(high, i8x16.llvm))
        return b.and_(both, _repeat(i8x32, 15))

    return i8x32(i8x16), emit


@intrinsic
def bits_to_bytes(typingctx: Any, bits: Any) -> Any:
    """32 bits as i8x32: byte i is 255 where bit i (1 << i) is set, else 0."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        # byte i // 8 of the word into byte i, then its bit i % 8
        word = b.bitcast(_splat(b, b.trunc(args[0], I32), 8), i8x32.llvm)
        spread = _shuffle(b, word, [i // 8 + (16 if i >= 16 else 0) for i in range(32)])
        bit = _constant(i8x32, [1 << (i % 8) for i in range(32)])
        return b.sext(b.icmp_unsigned("==", b.and_(spread, bit), bit), i8x32.llvm)

    return i8x32(types.int64), emit


@intrinsic
def magnitude(typingctx: Any, x: Any) -> Any:
    """|x| of signed bytes i8x32, as unsigned bytes (-128 becomes 128)."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        zero = _repeat(i8x32, 0)
        return b.select(b.icmp_signed("<", args[0], zero), b.sub(zero, args[0]), args[0])

    return i8x32(i8x32), emit


@intrinsic
def with_sign(typingctx: Any, isa: Any, x: Any, sign: Any) -> Any:
    """x with the sign of `sign` multiplied in, bytes; 0 where `sign` is 0. x is never -128 (else -x would overflow)."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if isa.value == isas.AVX2.name:
            return _call(b, "llvm.x86.avx2.psign.b", i8x32.llvm, [args[1], args[2]])
        # the zero needs no care: it only ever meets magnitude(sign) == 0
        zero = _repeat(i8x32, 0)
        return b.select(b.icmp_signed("<", args[2], zero), b.sub(zero, args[1]), args[1])

    return i8x32(isa, i8x32, i8x32), emit


# -- the one operation that instruction sets disagree about -------------------------------------------------------------


def _pairs(b: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Products of even and of odd bytes, each exact in i16x16; no saturation is possible for single products."""
    u, s = b.bitcast(unsigned, i16x16.llvm), b.bitcast(signed, i16x16.llvm)
    eight = _repeat(i16x16, 8)
    even = b.mul(b.and_(u, _repeat(i16x16, 255)), b.ashr(b.shl(s, eight), eight))
    odd = b.mul(b.lshr(u, eight), b.ashr(s, eight))
    return even, odd


def _fold(b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """Sums of neighbouring signed 16-bit lanes: i16x16 -> i32x8."""
    wide, sixteen = b.bitcast(pairs, i32x8.llvm), _repeat(i32x8, 16)
    return b.add(b.ashr(b.shl(wide, sixteen), sixteen), b.ashr(wide, sixteen))


def _dot4_portable(b: ir.IRBuilder, acc: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    even, odd = _pairs(b, unsigned, signed)
    return b.add(acc, b.add(_fold(b, even), _fold(b, odd)))


def _dot4_avx2(b: ir.IRBuilder, acc: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [unsigned, signed])
    return b.add(acc, _call(b, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, _repeat(i16x16, 1)]))


def _dot4_avx512(b: ir.IRBuilder, acc: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    if not isas.supported(isas.AVX512):  # asked for by name on a lesser machine: the same sums, spelled out
        return _dot4_portable(b, acc, unsigned, signed)
    args = [acc, b.bitcast(unsigned, acc.type), b.bitcast(signed, acc.type)]
    return _call(b, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, args)


_DOT4 = {isas.AVX512.name: _dot4_avx512, isas.AVX2.name: _dot4_avx2, isas.PORTABLE.name: _dot4_portable}


@intrinsic
def dot4(typingctx: Any, isa: Any, acc: Any, unsigned: Any, signed: Any) -> Any:
    """acc i32x8 + the sums of four neighbouring products of unsigned and signed bytes.

    Lane i sums bytes 4i … 4i + 3, in every set. AVX2 adds two products in 16 bits with saturation: |a*b + c*d| must
    stay below 32768, which holds for unsigned bytes up to 128 against signed ones from -127 on.
    """

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _DOT4[isa.value](b, args[1], args[2], args[3])

    return i32x8(isa, i32x8, i8x32, i8x32), emit


@intrinsic
def dot4_scaled(typingctx: Any, isa: Any, acc: Any, unsigned: Any, signed: Any, scale: Any) -> Any:
    """acc + scale * (the sums of `dot4`): i32x8; `scale` as `scale_halves` made it for this set."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, acc, u, s, factor = args
        if isa.value == isas.AVX2.name:
            pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [u, s])
            factor = b.bitcast(factor, i16x16.llvm)
            return b.add(acc, _call(b, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [pairs, factor]))
        sums = _DOT4[isa.value](b, _repeat(i32x8, 0), u, s)
        return b.add(acc, b.mul(sums, factor))

    return i32x8(isa, i32x8, i8x32, i8x32, i32x8), emit


@intrinsic
def scale_halves(typingctx: Any, isa: Any, low: Any, high: Any) -> Any:
    """Scale `low` for products 0-15 of `dot4_scaled`, `high` for 16-31."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        lane = I16 if isa.value == isas.AVX2.name else I32
        two = ir.Constant(ir.VectorType(lane, 2), ir.Undefined)
        two = b.insert_element(two, b.trunc(args[1], lane), ir.Constant(I32, 0))
        two = b.insert_element(two, b.trunc(args[2], lane), ir.Constant(I32, 1))
        half = 8 if lane is I16 else 4
        return b.bitcast(_shuffle(b, two, [0] * half + [1] * half), i32x8.llvm)

    return i32x8(isa, types.int64, types.int64), emit


# -- sums over several vectors of bytes ---------------------------------------------------------------------------------
#
# Where a few `dot4` go to the same sum, AVX2 does better to add products of byte pairs in 16 bits and to widen once. The
# running sums are i16x16 there and in portable code, and i32x8 with VNNI, whose one instruction does it all.
#
# Activations come in tiles: a few tokens at once, of each the same number of digits. A tile is described by its type alone, a
# tuple (one item a token) of tuples (one item a digit); sums, totals and the like are tuples with a vector for each digit of
# each token, and arrays hold what belongs together side by side: the bytes of a step of four values as [token][digit][4].


def _per_digit(tile: Any) -> int:
    return int(tile.count * tile.dtype.count)


def _pair_vector(isa: Any) -> Vector:
    return i32x8 if isa.value == isas.AVX512.name else i16x16


def _pair_products(b: ir.IRBuilder, isa: str, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """Sums of two neighbouring products, i16x16; they must fit."""
    if isa == isas.AVX2.name:
        return _call(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16.llvm, [unsigned, signed])
    even, odd = _pairs(b, unsigned, signed)
    return b.add(even, odd)


def _in_order(b: ir.IRBuilder, isa: str, values: list[ir.Value]) -> list[ir.Value]:
    """The values as they are, all of them reached before any is used and before anything more is loaded.

    Without such stops LLVM turns long chains of additions into trees of many leaves, and spills most of them.
    """
    if isa == isas.PORTABLE.name or not isas.supported(isas.AVX2):  # the register classes below are of x86
        return values
    register = "v" if isa == isas.AVX512.name and isas.supported(isas.AVX512) else "x"  # all 32, or the first 16
    count, vector = len(values), values[0].type
    kind = ir.FunctionType(ir.LiteralStructType([vector] * count) if count > 1 else vector, [vector] * count)
    constraints = ",".join([*[f"={register}"] * count, *map(str, range(count)), "~{memory}"])
    got = b.call(ir.InlineAsm(kind, "", constraints, side_effect=True), values)
    return [b.extract_value(got, i) for i in range(count)] if count > 1 else [got]


@intrinsic
def totals_zero(typingctx: Any, tile: Any, array: Any) -> Any:
    """Zeros i32x8, one for each digit of each token; i32x16 for what is loaded from a pair of places of `array`."""
    kind = types.UniTuple(i32x16 if _is_pair(array) else i32x8, _per_digit(tile))

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(b, kind, [_repeat(kind.dtype, 0)] * kind.count)

    return kind(tile, array), emit


@intrinsic
def pairs_zero(typingctx: Any, isa: Any, tile: Any) -> Any:
    """Running sums of nothing, one for each digit of each token."""
    kind = types.UniTuple(_pair_vector(isa), _per_digit(tile))

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(b, kind, [_repeat(kind.dtype, 0)] * kind.count)

    return kind(isa, tile), emit


@intrinsic
def pairs_load(typingctx: Any, isa: Any, tile: Any, zeros: Any, unit: Any) -> Any:
    """Running sums that start at `pair_word`s of an int32 array, [unit][token][digit]."""
    kind = types.UniTuple(_pair_vector(isa), _per_digit(tile))

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        made = []
        start = b.mul(args[3], ir.Constant(I64, kind.count))
        for i in range(kind.count):
            word = _load(b, _pointer(context, b, zeros, args[2], b.add(start, ir.Constant(I64, i)), I32))
            made.append(b.bitcast(_splat(b, word, 8), kind.dtype.llvm))
        return context.make_tuple(b, kind, made)

    return kind(isa, tile, zeros, types.intp), emit


@intrinsic
def pair_word(typingctx: Any, isa: Any, first: Any, second: Any) -> Any:
    """Where the two sums of a lane's pair start, int32: both in 16 bits, or their sum where there are no pairs."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        first, second = b.trunc(args[1], I32), b.trunc(args[2], I32)
        if isa.value == isas.AVX512.name:
            return b.add(first, second)
        return b.or_(b.and_(first, ir.Constant(I32, 0xFFFF)), b.shl(second, ir.Constant(I32, 16)))

    return types.int32(isa, types.int64, types.int64), emit


@intrinsic
def pairs_add(typingctx: Any, isa: Any, sums: Any, unsigned: Any, digits: Any, index: Any) -> Any:
    """sums + the products of unsigned bytes i8x32 with four signed ones of each digit of each token, the same four in every lane;
    with VNNI of i8x64, too, whose sums are twice as wide.

    They are those of values `index` … `index` + 3, a multiple of four, in an int8 array [step][token][digit][4]. Two products
    together must fit 16 bits, and so must whatever a pair has added up to at `pairs_close`.
    """

    if unsigned not in (i8x32, i8x64):
        return None
    vnni, lanes = sums.dtype in (i32x8, i32x16), unsigned.lanes // 4
    kind = types.UniTuple(Vector("i", 32, lanes), sums.count) if vnni else sums

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        made = []
        first = b.mul(args[4], ir.Constant(I64, sums.count))
        for i in range(sums.count):
            start = b.extract_value(args[1], i)
            word = _load(b, _pointer(context, b, digits, args[3], b.add(first, ir.Constant(I64, 4 * i)), I32))
            signed = b.bitcast(_splat(b, word, lanes), unsigned.llvm)
            if vnni:
                made.append(_dot4_avx512(b, _fitted(b, start, lanes), args[2], signed))
            else:
                made.append(b.add(start, _pair_products(b, isa.value, args[2], signed)))
        return context.make_tuple(b, kind, _in_order(b, isa.value, made))

    return kind(isa, sums, unsigned, digits, types.intp), emit


@intrinsic
def pairs_close(typingctx: Any, isa: Any, totals: Any, sums: Any, factor: Any) -> Any:
    """totals + factor * sums, lane by lane; `factor` by `pairs_factor` or `pairs_one` for this set."""

    def close(b: ir.IRBuilder, total: ir.Value, added: ir.Value, factor: ir.Value) -> ir.Value:
        if sums.dtype in (i32x8, i32x16):
            return b.add(total, b.mul(added, _fitted(b, factor, total.type.count)))
        if isa.value == isas.AVX2.name:
            factor = b.bitcast(factor, i16x16.llvm)
            return b.add(total, _call(b, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [added, factor]))
        sixteen = _repeat(i32x8, 16)
        return b.add(total, b.mul(_fold(b, added), b.ashr(b.shl(factor, sixteen), sixteen)))

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        each = ((b.extract_value(args[1], i), b.extract_value(args[2], i)) for i in range(sums.count))
        return context.make_tuple(b, totals, [close(b, total, added, args[3]) for total, added in each])

    return totals(isa, totals, sums, factor), emit


def _fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, f"llvm.fmuladd.v{x.type.count}f32", x.type, [x, y, z])


@intrinsic
def totals_value(typingctx: Any, tile: Any, totals: Any) -> Any:
    """What totals of digits of base 256, lowest first, mean together: an f32x8 a token, put together from the lowest up."""
    lanes, each = totals.dtype.lanes, tile.dtype.count
    kind = types.UniTuple(Vector("f", 32, lanes), tile.count)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        values = []
        for n in range(kind.count):
            floats = [b.sitofp(b.extract_value(args[1], n * each + i), kind.dtype.llvm) for i in range(each)]
            value = floats[0]
            for i, high in enumerate(floats[1:], 1):
                base = ir.Constant(kind.dtype.llvm, [ir.Constant(F32, float(256**i))] * lanes)
                value = _fma(b, high, base, value)
            values.append(value)
        return context.make_tuple(b, kind, values)

    return kind(tile, totals), emit


# -- one vector a token -------------------------------------------------------------------------------------------------


@intrinsic
def each_zero(typingctx: Any, tile: Any, array: Any) -> Any:
    """Zeros f32x8, one a token; f32x16 for what is loaded from a pair of places of `array`."""
    kind = types.UniTuple(f32x16 if _is_pair(array) else f32x8, tile.count)

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(b, kind, [_splat(b, ir.Constant(F32, 0.0), kind.dtype.lanes)] * kind.count)

    return kind(tile, array), emit


def _each(make: Callable[..., ir.Value], doc: str, *, factors: bool) -> Any:
    """An intrinsic (sums a token, vector, array, index, [vectors a token]) with a number a token from array[index * tokens]."""

    def emitter(sums: Any, array: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            first, made = b.mul(args[3], ir.Constant(I64, sums.count)), []
            for n in range(sums.count):
                number = _load(b, _pointer(context, b, array, args[2], b.add(first, ir.Constant(I64, n)), F32))
                more = [b.extract_value(args[4], n)] if factors else []
                made.append(make(b, b.extract_value(args[0], n), args[1], _splat(b, number, sums.dtype.lanes), *more))
            return context.make_tuple(b, sums, made)

        return emit

    if factors:

        def with_factors(typingctx: Any, sums: Any, x: Any, array: Any, index: Any, values: Any) -> Any:
            return sums(sums, sums.dtype, array, types.intp, sums), emitter(sums, array)

        with_factors.__doc__ = doc
        return intrinsic(with_factors)

    def without(typingctx: Any, sums: Any, x: Any, array: Any, index: Any) -> Any:
        return sums(sums, sums.dtype, array, types.intp), emitter(sums, array)

    without.__doc__ = doc
    return intrinsic(without)


each_fma = _each(lambda b, total, x, number: _fma(b, x, number, total), "total + x * number, a token.", factors=False)
each_scaled = _each(
    lambda b, total, x, number, value: _fma(b, b.fmul(x, number), value, total),
    "total + (x * number) * value, a token.",
    factors=True,
)


@intrinsic
def each_sub(typingctx: Any, x: Any, y: Any) -> Any:
    """x - y, a token."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pairs = ((b.extract_value(args[0], n), b.extract_value(args[1], n)) for n in range(x.count))
        return context.make_tuple(b, x, [b.fsub(left, right) for left, right in pairs])

    return x(x, x), emit


@intrinsic
def each_store(typingctx: Any, array: Any, index: Any, step: Any, values: Any, count: Any) -> Any:
    """The first `count` vectors into a float32 array, from `index` on in steps of `step`."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        for n in range(values.count):
            at = b.add(args[1], b.mul(args[2], ir.Constant(I64, n)))
            with b.if_then(b.icmp_signed("<", ir.Constant(I64, n), args[4])):
                value = b.extract_value(args[3], n)
                b.store(value, _pointer(context, b, array, args[0], at, value.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, values, types.intp), emit


@intrinsic
def each_add(typingctx: Any, values: Any, x: Any) -> Any:
    """value + x, a token."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(b, values, [b.fadd(b.extract_value(args[0], n), args[1]) for n in range(values.count)])

    return values(values, values.dtype), emit


@intrinsic
def pairs_one(typingctx: Any, isa: Any) -> Any:
    """The factor 1 of `pairs_close`."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _repeat(i32x8, 1 if isa.value == isas.AVX512.name else 0x10001)

    return i32x8(isa), emit


def _factor(signed: bool) -> Any:
    def factor(typingctx: Any, isa: Any, words: Any, byte: Any) -> Any:
        wide = isa.value == isas.AVX512.name

        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            # the byte to the top of each 16 (or 32) bits, then down again, with its sign or without
            lanes = words if wide else i16x16
            shift = b.shl(b.trunc(args[2], I32), ir.Constant(I32, 3))
            word = b.and_(b.lshr(args[1], _splat(b, shift, words.lanes)), _repeat(words, 255))
            if not wide:
                word = b.or_(word, b.shl(word, _repeat(words, 16)))
            if not signed:
                return word
            eight = _repeat(lanes, 24 if wide else 8)
            return b.bitcast(b.ashr(b.shl(b.bitcast(word, lanes.llvm), eight), eight), words.llvm)

        return words(isa, words, types.int64), emit

    factor.__doc__ = f"Byte 0-3, {'signed' if signed else 'unsigned'}, of each 32-bit lane, as a factor of `pairs_close`."
    return intrinsic(factor)


pairs_factor, pairs_factor_signed = _factor(False), _factor(True)


def _storer(kind: ir.IntType, doc: str) -> Any:
    def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
        def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            b.store(b.trunc(args[2], kind), _pointer(context, b, array, args[0], args[1], kind), align=1)
            return context.get_dummy_value()

        return types.void(array, types.intp, types.int64), emit

    store.__doc__ = doc
    return intrinsic(store)


store_u16 = _storer(I16, "The low 16 bits of an int64, little-endian, at byte `index` of a uint8 array.")
store_u32 = _storer(I32, "The low 32 bits of an int64, little-endian, at byte `index` of a uint8 array.")


@intrinsic
def load_u16(typingctx: Any, array: Any, index: Any) -> Any:
    """The little-endian unsigned 16-bit integer at byte `index` of a uint8 array, as int64."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return b.zext(_load(b, _pointer(context, b, array, args[0], args[1], I16)), I64)

    return types.int64(array, types.intp), emit


# -- 16 bits ------------------------------------------------------------------------------------------------------------

load_i16x16 = _loader(i16x16, "Sixteen integers of an int16 array.")


@intrinsic
def load_i8_as_i16x16(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen signed bytes at byte `index`, as 16-bit integers."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        small = _load(b, _pointer(context, b, array, args[0], args[1], i8x16.llvm))
        return b.sext(small, i16x16.llvm)

    return i16x16(array, types.intp), emit


@intrinsic
def dot2(typingctx: Any, isa: Any, x: Any, y: Any) -> Any:
    """Sums of two neighbouring products of i16x16, as i32x8; exact unless all four are -32768."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if isa.value == isas.AVX2.name or (isa.value == isas.AVX512.name and isas.supported(isas.AVX2)):
            return _call(b, "llvm.x86.avx2.pmadd.wd", i32x8.llvm, [args[1], args[2]])
        wide = ir.VectorType(I32, 16)
        products = b.mul(b.sext(args[1], wide), b.sext(args[2], wide))
        even = _shuffle(b, products, list(range(0, 16, 2)))
        return b.add(even, _shuffle(b, products, list(range(1, 16, 2))))

    return i32x8(isa, i16x16, i16x16), emit


@intrinsic
def store_i16x8(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Eight 32-bit integers, cut to their low 16 bits, into an int16 array."""

    def emit(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        small = b.trunc(args[2], ir.VectorType(I16, 8))
        b.store(small, _pointer(context, b, array, args[0], args[1], small.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, i32x8), emit
