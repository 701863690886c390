"""The arithmetic opcodes: one row each, from the written modifiers to a pure function on arrays.

`decode(instruction)` returns an `Alu`: operand types and the function. The function sees one array (or NumPy scalar)
per source, already viewed as that type, and returns one per destination. Shapes broadcast. Every modifier must be
consumed: what is left over, or an opcode without a row, raises `UnsupportedError` with the PTX line. Memory, control
flow and warp-wide opcodes are in `program.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from aprlab.errors import UnsupportedError
from aprlab.kernels.ptx import floats
from aprlab.kernels.ptx.floats import Value
from aprlab.kernels.ptx.parser import Imm, Instruction

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "u2", "bf16": "u2",
        "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4",
        "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    }.items()
}  # fmt: skip
_INTS = ("u16", "s16", "u32", "s32", "u64", "s64")
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@dataclass(frozen=True)
class Alu:
    """One decoded arithmetic instruction: types of the destinations and sources, and the function between them.

    `approximate` marks the opcodes whose last bits the ISA leaves open; they are evaluated within their documented
    bound. `carry_in` and `carry_out` make the condition code an extra last source or destination.
    """

    dst: tuple[str, ...]
    src: tuple[str, ...]
    law: Callable[..., Any]
    approximate: bool = False
    carry_in: bool = False
    carry_out: bool = False


class Modifiers:
    """The dotted parts behind the opcode, consumed one by one."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.left = list(instruction.parts[1:])

    def unsupported(self, why: str, code: str = "ptx.instruction-form") -> UnsupportedError:
        return UnsupportedError(f"PTX line {self.instruction.line}: {why} in {self.instruction.opcode!r}", code=code)

    def flag(self, name: str) -> bool:
        if name in self.left:
            self.left.remove(name)
            return True
        return False

    def choice(self, *names: str, default: str | None = None) -> str:
        for name in self.left:
            if name in names:
                self.left.remove(name)
                return name
        if default is None:
            raise self.unsupported(f"none of .{', .'.join(names)}")
        return default

    def kind(self, *allowed: str) -> str:
        """The last type modifier."""
        if not self.left or self.left[-1] not in allowed:
            raise self.unsupported(f"type .{self.left[-1] if self.left else '(none)'}")
        return self.left.pop()

    def done(self) -> None:
        if self.left:
            raise self.unsupported(f"unknown modifier .{self.left[0]}", "ptx.modifier-unknown")


_TABLE: dict[str, Callable[[Modifiers], Alu]] = {}


def _op(*names: str) -> Callable[[Callable[[Modifiers], Alu]], Callable[[Modifiers], Alu]]:
    def register(row: Callable[[Modifiers], Alu]) -> Callable[[Modifiers], Alu]:
        for name in names:
            _TABLE[name] = row
        return row

    return register


def known(base: str) -> bool:
    return base in _TABLE


def opcodes() -> list[str]:
    """Every arithmetic opcode the machine knows."""
    return sorted(_TABLE)


def decode(instruction: Instruction) -> Alu:
    """The row of this instruction's opcode. Raises `UnsupportedError` with the PTX line for what has none."""
    row = _TABLE.get(instruction.parts[0])
    if row is None:
        raise UnsupportedError(
            f"PTX line {instruction.line}: unknown opcode {instruction.opcode!r}", code="ptx.opcode-unknown"
        )
    modifiers = Modifiers(instruction)
    alu = row(modifiers)
    modifiers.done()
    return alu


# ---- float plumbing ----------------------------------------


def _float_law(law: Callable[..., Value], ftz: bool, sat: bool) -> Callable[..., Value]:
    """`.ftz` flushes operands and result, `.sat` clamps."""
    if not ftz and not sat:
        return law

    def wrapped(*values: Value) -> Value:
        if ftz:
            values = tuple(floats.flush(v) for v in values)
        out = law(*values)
        if sat:
            out = floats.saturate(out)
        return floats.flush(out) if ftz else out

    return wrapped


def _half_law(
    kind: str, law: Callable[..., Value], mode: str = "rn", relu: bool = False, sat: bool = False
) -> Callable[..., Value]:
    """A law on float64 (returning exact or rounded-to-odd float64) as one on float16/bfloat16 bits, packed or not."""
    widen = floats.half_to_32 if kind.startswith("f16") else floats.bfloat_to_32
    narrow = floats.narrow_half if kind.startswith("f16") else floats.narrow_bfloat

    def one(*values: Value) -> Value:
        out = law(*(widen(v).astype(np.float64) for v in values))
        if relu:
            out = np.where(out > 0, out, np.where(np.isnan(out), out, 0.0))
        if sat:
            out = floats.saturate(np.asarray(out))
        return narrow(np.asarray(out)[()], mode)

    return _by_halves(one) if kind.endswith("x2") else one


def _by_halves(one: Callable[..., Value]) -> Callable[..., Value]:
    def both(*values: Value) -> Value:
        low = one(*(v.astype(np.uint16) for v in values)).astype(np.uint32)
        high = one(*((v >> np.uint32(16)).astype(np.uint16) for v in values)).astype(np.uint32)
        return low | (high << np.uint32(16))

    return both


def _odd_sum(a: Value, b: Value) -> Value:
    return floats.round_to_odd(*floats.two_sum(a, b))


# ---- add, sub, mul, mad, fma ----------------------------------------


@_op("add", "sub")
def _add(m: Modifiers) -> Alu:
    minus = m.instruction.parts[0] == "sub"
    kind = m.kind(*_INTS, "f32", "f64", *_HALVES, "u16x2", "s16x2")
    if kind in ("f32", "f64"):
        mode, ftz, sat = m.choice(*floats.MODES, default="rn"), m.flag("ftz"), m.flag("sat")
        add = floats.add32 if kind == "f32" else floats.add64
        law = (lambda a, b: add(a, -b, mode)) if minus else (lambda a, b: add(a, b, mode))
        if kind == "f64" and mode == "rn":
            law = np.subtract if minus else np.add
        if kind == "f32" and mode == "rn" and minus:
            law = lambda a, b: floats.canonical(a - b)  # noqa: E731
        return Alu((kind,), (kind, kind), _float_law(law, ftz, sat))
    if kind in _HALVES:
        mode, sat = m.choice("rn", default="rn"), m.flag("sat")
        m.flag("ftz")
        return Alu((kind,), (kind, kind), _half_law(kind, lambda a, b: _odd_sum(a, -b if minus else b), mode, sat=sat))
    if kind.endswith("16x2"):
        one = np.subtract if minus else np.add
        return Alu(("b32",), ("b32", "b32"), _by_halves(one))
    if m.flag("cc"):
        unsigned = "u" + kind[1:]
        if minus:
            return Alu((kind,), (unsigned, unsigned), lambda a, b: (a - b, a >= b), carry_out=True)
        return Alu((kind,), (unsigned, unsigned), lambda a, b: (a + b, a + b < a), carry_out=True)
    if m.flag("sat"):
        if kind != "s32":
            raise m.unsupported(f".sat with .{kind}")
        wide = np.subtract if minus else np.add
        return Alu(
            (kind,),
            (kind, kind),
            lambda a, b: np.clip(wide(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32),
        )
    # Two's complement does not care about the sign, and unsigned NumPy scalars wrap without a warning.
    unsigned = "u" + kind[1:]
    return Alu((unsigned,), (unsigned, unsigned), np.subtract if minus else np.add)


@_op("addc", "subc")
def _addc(m: Modifiers) -> Alu:
    minus, out = m.instruction.parts[0] == "subc", m.flag("cc")
    unsigned = "u" + m.kind("u32", "s32", "u64", "s64")[1:]

    def law(a: Value, b: Value, carry: Value) -> tuple[Value, Value] | Value:
        c = carry.astype(a.dtype)
        if minus:
            b = ~b  # the flag is the adder's carry, not a borrow: a - b is a + ~b + 1
        total = a + b
        result = total + c
        return (result, (total < a) | (result < total)) if out else result

    return Alu((unsigned,), (unsigned, unsigned), law, carry_in=True, carry_out=out)


def _high(a: Value, b: Value) -> Value:
    """Upper half of a product, any integer type."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)
    ua, ub = a.astype(np.uint64), b.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = ua & low, ua >> shift, ub & low, ub >> shift
    middle = ah * bl + ((al * bl) >> shift)
    cross = (middle & low) + al * bh
    out = ah * bh + (middle >> shift) + (cross >> shift)
    if a.dtype.kind == "i":
        out = out - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return out.astype(a.dtype)[()]


def _wide_product(kind: str) -> Callable[[Value, Value], Value]:
    wide = DTYPES[_WIDER[kind]]
    return lambda a, b: a.astype(wide) * b.astype(wide)


def _low(a: Value, b: Value) -> Value:
    return a * b


def _part24(m: Modifiers) -> tuple[str, Callable[[Value, Value], Value]]:
    part, kind = m.choice("hi", "lo"), m.kind("u32", "s32")
    wide = np.int64 if kind == "s32" else np.uint64

    def law(a: Value, b: Value) -> Value:
        eight = a.dtype.type(8)
        product = ((a << eight) >> eight).astype(wide) * ((b << eight) >> eight).astype(wide)
        return (product >> wide(16 if part == "hi" else 0)).astype(np.uint32)

    return kind, law


@_op("mul24", "mad24")
def _mul24(m: Modifiers) -> Alu:
    kind, law = _part24(m)
    if m.instruction.parts[0] == "mul24":
        return Alu(("u32",), (kind, kind), law)
    return Alu(("u32",), (kind, kind, "u32"), lambda a, b, c: law(a, b) + c)


@_op("mul")
def _mul(m: Modifiers) -> Alu:
    kind = m.kind(*_INTS, "f32", "f64", *_HALVES)
    if kind in ("f32", "f64"):
        mode, ftz, sat = m.choice(*floats.MODES, default="rn"), m.flag("ftz"), m.flag("sat")
        mul = floats.mul32 if kind == "f32" else floats.mul64
        return Alu((kind,), (kind, kind), _float_law(lambda a, b: mul(a, b, mode), ftz, sat))
    if kind in _HALVES:
        mode, sat = m.choice("rn", default="rn"), m.flag("sat")
        m.flag("ftz")
        return Alu((kind,), (kind, kind), _half_law(kind, np.multiply, mode, sat=sat))
    part = m.choice("lo", "hi", "wide")
    unsigned = "u" + kind[1:]
    if part == "lo":
        return Alu((unsigned,), (unsigned, unsigned), _low)
    if part == "hi":
        return Alu((kind,), (kind, kind), _high)
    if kind not in _WIDER:
        raise m.unsupported(f".wide with .{kind}")
    return Alu((_WIDER[kind],), (kind, kind), _wide_product(kind))


@_op("mad", "madc")
def _mad(m: Modifiers) -> Alu:
    kind = m.kind(*_INTS, "f32", "f64")
    if kind in ("f32", "f64"):
        return _fma_row(m, kind)
    part = m.choice("lo", "hi", "wide")
    sat, out, into = m.flag("sat"), m.flag("cc"), m.instruction.parts[0] == "madc"
    unsigned = "u" + kind[1:]
    if part == "wide":
        if kind not in _WIDER or out or into or sat:
            raise m.unsupported("mad.wide of this kind")
        wide, product = _WIDER[kind], _wide_product(kind)
        return Alu((wide,), (kind, kind, wide), lambda a, b, c: product(a, b) + c)
    term = _low if part == "lo" else _high
    if sat:
        if (kind, part) != ("s32", "hi"):
            raise m.unsupported(".sat outside mad.hi.s32")
        return Alu(
            (kind,), (kind,) * 3, lambda a, b, c: np.clip(_high(a, b).astype(np.int64) + c, -(2**31), 2**31 - 1).astype(np.int32)
        )
    unsigned_type = DTYPES[unsigned]
    sources = (unsigned, unsigned, unsigned) if part == "lo" else (kind, kind, unsigned)
    if not out and not into:
        return Alu((unsigned,), sources, lambda a, b, c: term(a, b).astype(unsigned_type, copy=False) + c)

    def carried(a: Value, b: Value, c: Value, carry: Value | None = None) -> tuple[Value, Value] | Value:
        product = term(a, b).astype(unsigned_type)
        total = product + c
        result = total if carry is None else total + carry.astype(unsigned_type)
        return (result, (total < c) | (result < total)) if out else result

    return Alu((unsigned,), sources, carried, carry_in=into, carry_out=out)


@_op("fma")
def _fma(m: Modifiers) -> Alu:
    kind = m.kind("f32", "f64", *_HALVES)
    if kind in _HALVES:
        mode, relu, sat = m.choice("rn"), m.flag("relu"), m.flag("sat")
        m.flag("ftz")
        return Alu((kind,), (kind,) * 3, _half_law(kind, lambda a, b, c: _odd_sum(a * b, c), mode, relu, sat))
    return _fma_row(m, kind)


def _fma_row(m: Modifiers, kind: str) -> Alu:
    mode, ftz, sat = m.choice(*floats.MODES), m.flag("ftz"), m.flag("sat")
    fma = floats.fma32 if kind == "f32" else floats.fma64
    return Alu((kind,), (kind,) * 3, _float_law(lambda a, b, c: fma(a, b, c, mode), ftz, sat))


# ---- division and transcendental ----------------------------------------


@_op("div")
def _div(m: Modifiers) -> Alu:
    kind = m.kind(*_INTS, "f32", "f64")
    if kind == "f32":
        how, ftz = m.choice("approx", "full", *floats.MODES), m.flag("ftz")
        if how == "approx":
            return Alu((kind,), (kind, kind), _float_law(_div_approx, ftz, False), approximate=True)
        mode = "rn" if how == "full" else how
        return Alu(
            (kind,), (kind, kind), _float_law(lambda a, b: floats.div32(a, b, mode), ftz, False), approximate=how == "full"
        )
    if kind == "f64":
        mode = m.choice(*floats.MODES)
        law = np.divide if mode == "rn" else _in_doubles(lambda a, b: a / b, np.divide, mode)
        return Alu((kind,), (kind, kind), law)
    return Alu((kind,), (kind, kind), _quotient)


def _div_approx(a: Value, b: Value) -> Value:
    out = floats.div32(a, b)
    huge = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(huge, np.where(np.isinf(a) | np.isnan(a), floats.NAN32, np.copysign(np.float32(0), out)), out)[()]


def _quotient(a: Value, b: Value) -> Value:
    """Truncating; the ISA leaves x / 0 open, here all ones, as GPUs give."""
    zero = a.dtype.type(0)
    if a.dtype.kind == "u":
        return np.where(b == zero, ~zero, a // np.where(b == zero, a.dtype.type(1), b))[()]
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    ua, ub = _magnitude(a, unsigned), _magnitude(b, unsigned)
    size = ua // np.where(ub == 0, unsigned.type(1), ub)
    signed = floats.bits(np.where((a < 0) != (b < 0), ~size + unsigned.type(1), size)[()], a.dtype)
    return np.where(b == zero, ~zero, signed)[()]


def _magnitude(a: Value, unsigned: np.dtype[Any]) -> Value:
    raw = floats.bits(a, unsigned)
    return np.where(a < 0, ~raw + unsigned.type(1), raw)[()]


@_op("rem")
def _rem(m: Modifiers) -> Alu:
    kind = m.kind(*_INTS)
    return Alu((kind,), (kind, kind), lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b)[()])


def _through_double(law: Callable[[Value], Value]) -> Callable[[Value], Value]:
    """Evaluate in float64 and round once: inside every documented `.approx` bound."""
    return lambda a: floats.canonical(law(a.astype(np.float64)).astype(np.float32))


def _in_doubles(law: Callable[..., Fraction], plain: Callable[..., Value], mode: str) -> Callable[..., Value]:
    """A float64 law in a directed rounding mode, by exact fractions."""
    return lambda *v: floats.by_fractions(law, mode, *v, nearest=plain(*v))


@_op("rcp", "sqrt", "rsqrt")
def _root(m: Modifiers) -> Alu:
    base, kind = m.instruction.parts[0], m.kind("f32", "f64")
    modes = () if base == "rsqrt" else floats.MODES
    how, ftz = m.choice("approx", *modes), m.flag("ftz")
    exact: dict[str, Callable[[Value], Value]] = {
        "rcp": lambda a: 1.0 / a,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: np.where(a == 0, np.copysign(np.inf, a), 1.0 / np.sqrt(a))[()],
    }
    if how == "approx":
        if kind == "f64":
            return Alu((kind,), (kind,), _upper_word(exact[base]) if ftz else exact[base], approximate=True)
        return Alu((kind,), (kind,), _float_law(_through_double(exact[base]), ftz, False), approximate=True)
    if kind == "f64":
        if how == "rn":
            return Alu((kind,), (kind,), exact[base])
        if base == "sqrt":
            raise m.unsupported("directed rounding")
        return Alu((kind,), (kind,), _in_doubles(lambda a: 1 / a, exact[base], how))
    if base == "rcp":
        return Alu((kind,), (kind,), _float_law(lambda a: floats.div32(np.float32(1), a, how), ftz, False))
    return Alu((kind,), (kind,), _float_law(lambda a: floats.sqrt32(a, how), ftz, False))


def _upper_word(law: Callable[[Value], Value]) -> Callable[[Value], Value]:
    """rcp.approx.ftz.f64 and kin: only the upper word of the operand is read and of the result given."""
    mask = np.uint64(0xFFFFFFFF00000000)
    return lambda a: floats.bits(
        floats.bits(law(floats.bits(floats.bits(a, np.uint64) & mask, np.float64)), np.uint64) & mask, np.float64
    )


@_op("ex2", "lg2", "sin", "cos", "tanh")
def _transcendental(m: Modifiers) -> Alu:
    base = m.instruction.parts[0]
    m.choice("approx")
    ftz = m.flag("ftz")
    laws: dict[str, Callable[[Value], Value]] = {"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh}
    kind = m.kind("f32", *(_HALVES if base in ("ex2", "tanh") else ()))
    if kind in _HALVES:
        return Alu((kind,), (kind,), _half_law(kind, laws[base]), approximate=True)
    return Alu((kind,), (kind,), _float_law(_through_double(laws[base]), ftz, False), approximate=True)


# ---- abs, neg, min, max ----------------------------------------


@_op("abs", "neg")
def _sign(m: Modifiers) -> Alu:
    base, kind = m.instruction.parts[0], m.kind(*_INTS, "f32", "f64", *_HALVES)
    ftz = m.flag("ftz")
    if kind in _HALVES:
        bit = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}[kind]
        one = DTYPES[kind].type(bit)
        return Alu((kind,), (kind,), (lambda a: a & ~one) if base == "abs" else (lambda a: a ^ one))
    if kind in ("f32", "f64"):
        return Alu((kind,), (kind,), _float_law(np.abs if base == "abs" else np.negative, ftz, False))
    unsigned = DTYPES["u" + kind[1:]]
    if base == "abs":
        return Alu((kind,), (kind,), lambda a: floats.bits(_magnitude(a, unsigned), a.dtype))
    return Alu(("u" + kind[1:],), ("u" + kind[1:],), lambda a: ~a + unsigned.type(1))


def _extreme(largest: bool, keep_nan: bool, xorsign: bool) -> Callable[..., Value]:
    def law(*values: Value) -> Value:
        out = values[0]
        for b in values[1:]:
            a = out
            if xorsign:
                flip = np.signbit(a) ^ np.signbit(b)
                a, b = np.abs(a), np.abs(b)
            ahead = (a > b) | ((a == b) & np.signbit(b)) if largest else (a < b) | ((a == b) & np.signbit(a))
            out = np.where(ahead, a, b)
            out = np.where(np.isnan(a), b, np.where(np.isnan(b), a, out))
            if keep_nan:
                out = np.where(np.isnan(a) | np.isnan(b), out.dtype.type(np.nan), out)
            if xorsign:
                out = np.where(flip, -np.abs(out), np.abs(out))
        return out[()]

    return law


@_op("min", "max")
def _minmax(m: Modifiers) -> Alu:
    largest, kind = m.instruction.parts[0] == "max", m.kind(*_INTS, "f32", "f64", *_HALVES)
    if kind in ("f32", "f64", *_HALVES):
        ftz, keep, xorsign = m.flag("ftz"), m.flag("NaN"), m.flag("xorsign")
        if xorsign and not m.flag("abs"):
            raise m.unsupported(".xorsign without .abs")
        law = _extreme(largest, keep, xorsign)
        count = len(m.instruction.operands) - 1
        if kind in _HALVES:
            return Alu((kind,), (kind,) * count, _half_law(kind, law))
        full = (lambda *v: floats.canonical(law(*v))) if kind == "f32" else law
        return Alu((kind,), (kind,) * count, _float_law(full, ftz, False))
    relu = m.flag("relu")
    pick = np.maximum if largest else np.minimum
    if relu:
        return Alu((kind,), (kind, kind), lambda a, b: np.maximum(pick(a, b), a.dtype.type(0)))
    return Alu((kind,), (kind, kind), pick)


# ---- bits ----------------------------------------


@_op("and", "or", "xor")
def _logic(m: Modifiers) -> Alu:
    kind = m.kind("pred", "b16", "b32", "b64")
    return Alu((kind,), (kind, kind), {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[m.instruction.parts[0]])


@_op("not")
def _not(m: Modifiers) -> Alu:
    kind = m.kind("pred", "b16", "b32", "b64")
    return Alu((kind,), (kind,), np.invert)


@_op("cnot")
def _cnot(m: Modifiers) -> Alu:
    kind = m.kind("b16", "b32", "b64")
    return Alu((kind,), (kind,), lambda a: (a == 0).astype(a.dtype))


@_op("shl", "shr")
def _shift(m: Modifiers) -> Alu:
    left = m.instruction.parts[0] == "shl"
    kind = m.kind("b16", "b32", "b64") if left else m.kind("b16", "b32", "b64", *_INTS)
    dtype = DTYPES[kind]
    shift = np.left_shift if left else np.right_shift
    amount = m.instruction.operands[2]
    if isinstance(amount, Imm):
        count = dtype.type(min(int(amount.value) & 0xFFFFFFFF, 127))  # NumPy, like PTX, shifts everything out at ≥ width
        return Alu((kind,), (kind, "u32"), lambda a, b: shift(a, count))
    # 127 is beyond every width and fits every type.
    return Alu((kind,), (kind, "u32"), lambda a, b: shift(a, np.minimum(b, np.uint32(127)).astype(dtype)))


@_op("shf")
def _funnel(m: Modifiers) -> Alu:
    side, mode = m.choice("l", "r"), m.choice("clamp", "wrap")
    m.kind("b32")

    def law(a: Value, b: Value, c: Value) -> Value:
        count = (np.minimum(c, np.uint32(32)) if mode == "clamp" else c & np.uint32(31)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        if side == "l":
            return ((both << count) >> np.uint64(32)).astype(np.uint32)
        return (both >> count).astype(np.uint32)

    return Alu(("b32",), ("b32", "b32", "u32"), law)


@_op("popc")
def _popc(m: Modifiers) -> Alu:
    kind = m.kind("b32", "b64")
    return Alu(("u32",), (kind,), lambda a: np.bitwise_count(a).astype(np.uint32))


def _smear(a: Value) -> Value:
    width, step = 8 * a.dtype.itemsize, 1
    while step < width:
        a = a | (a >> a.dtype.type(step))
        step *= 2
    return a


@_op("clz")
def _clz(m: Modifiers) -> Alu:
    kind = m.kind("b32", "b64")
    width = np.uint32(8 * DTYPES[kind].itemsize)
    return Alu(("u32",), (kind,), lambda a: width - np.bitwise_count(_smear(a)).astype(np.uint32))


@_op("bfind")
def _bfind(m: Modifiers) -> Alu:
    amount, kind = m.flag("shiftamt"), m.kind("u32", "s32", "u64", "s64")
    unsigned = DTYPES["u" + kind[1:]]
    width = np.uint32(8 * unsigned.itemsize)

    def law(a: Value) -> Value:
        raw = floats.bits(a, unsigned)
        raw = np.where(a < 0, ~raw, raw)[()] if kind[0] == "s" else raw
        place = np.bitwise_count(_smear(raw)).astype(np.uint32) - np.uint32(1)
        return np.where(raw == 0, np.uint32(0xFFFFFFFF), width - np.uint32(1) - place if amount else place)[()]

    return Alu(("u32",), (kind,), law)


@_op("brev")
def _brev(m: Modifiers) -> Alu:
    kind = m.kind("b32", "b64")
    width = 8 * DTYPES[kind].itemsize

    def law(a: Value) -> Value:
        step, word = width // 2, a.dtype.type
        mask = (1 << width) - 1
        while step:
            mask ^= (mask << step) & ((1 << width) - 1)
            a = ((a >> word(step)) & word(mask)) | ((a & word(mask)) << word(step))
            step //= 2
        return a

    return Alu((kind,), (kind,), law)


@_op("bfe")
def _bfe(m: Modifiers) -> Alu:
    kind = m.kind("u32", "s32", "u64", "s64")
    dtype = DTYPES[kind]
    unsigned, width = DTYPES["u" + kind[1:]], 8 * dtype.itemsize

    def law(a: Value, b: Value, c: Value) -> Value:
        position, length = b & np.uint32(255), c & np.uint32(255)
        raw = floats.bits(a, unsigned)
        word = unsigned.type
        mask = np.where(length >= width, ~word(0), (word(1) << np.minimum(length, np.uint32(127)).astype(unsigned)) - word(1))
        out = (raw >> np.minimum(position, np.uint32(127)).astype(unsigned)) & mask
        if kind[0] == "s":
            # The sign is the field's top bit, or the operand's when the field reaches beyond it.
            top = np.minimum(position + length - np.uint32(1), np.uint32(width - 1)).astype(unsigned)
            negative = ((raw >> top) & word(1) == 1) & (length != 0)
            inside = np.where(position >= width, word(0), out)
            have = np.where(position >= width, np.uint32(0), np.minimum(length, np.uint32(width) - position)).astype(unsigned)
            fill = np.where(have >= width, word(0), ~word(0) << have)
            out = np.where(negative, inside | fill, inside)
        return floats.bits(np.asarray(out).astype(unsigned)[()], dtype)

    return Alu((kind,), (kind, "u32", "u32"), law)


@_op("bfi")
def _bfi(m: Modifiers) -> Alu:
    kind = m.kind("b32", "b64")
    word, dtype, width = DTYPES[kind].type, DTYPES[kind], 8 * DTYPES[kind].itemsize

    def law(a: Value, b: Value, c: Value, d: Value) -> Value:
        position, length = np.minimum(c & np.uint32(255), np.uint32(127)), d & np.uint32(255)
        mask = np.where(length >= width, ~word(0), (word(1) << np.minimum(length, np.uint32(127)).astype(dtype)) - word(1))
        place = position.astype(dtype)
        return ((b & ~(mask << place)) | ((a & mask) << place)).astype(dtype)

    return Alu((kind,), (kind, kind, "u32", "u32"), law)


@_op("lop3")
def _lop3(m: Modifiers) -> Alu:
    m.kind("b32")
    table = m.instruction.operands[4]
    if not isinstance(table, Imm):
        raise m.unsupported("a lookup table that is not a constant")
    code = int(table.value)

    def pair(four: int, b: Value, c: Value) -> Value:
        terms = []
        if four & 1:
            terms.append(~b & ~c)
        if four & 2:
            terms.append(~b & c)
        if four & 4:
            terms.append(b & ~c)
        if four & 8:
            terms.append(b & c)
        out = b & np.uint32(0) if not terms else terms[0]
        for term in terms[1:]:
            out = out | term
        return out

    return Alu(
        ("b32",), ("b32", "b32", "b32", "u32"), lambda a, b, c, _: (~a & pair(code & 15, b, c)) | (a & pair(code >> 4, b, c))
    )


@_op("prmt")
def _prmt(m: Modifiers) -> Alu:
    mode = m.choice("f4e", "b4e", "rc8", "ecl", "ecr", "rc16", default="")
    m.kind("b32")
    selector = m.instruction.operands[3]

    def source(c: Value, i: int) -> Value:
        """Byte number and sign flag of result byte i."""
        two = c & np.uint32(3)
        steps = {
            "": (c >> np.uint32(4 * i)) & np.uint32(15),
            "f4e": two + np.uint32(i),
            "b4e": (two - np.uint32(i)) & np.uint32(7),
            "rc8": two,
            "ecl": np.maximum(two, np.uint32(i)),
            "ecr": np.minimum(two, np.uint32(i)),
            "rc16": (two & np.uint32(1)) * np.uint32(2) + np.uint32(i & 1),
        }
        return steps[mode]

    def constant(a: Value, b: Value, c: Value) -> Value:
        words, out = (a, b), None
        for i in range(4):
            number = int(source(np.uint32(code), i))
            word, shift = words[(number >> 2) & 1], 8 * (number & 3)
            if number & 8:
                byte = (floats.bits(word, np.int32) << np.int32(24 - shift)) >> np.int32(31)
                part = floats.bits(byte, np.uint32) & np.uint32(0xFF << (8 * i))
            elif shift >= 8 * i:
                part = (word >> np.uint32(shift - 8 * i)) & np.uint32(0xFF << (8 * i))
            else:
                part = (word << np.uint32(8 * i - shift)) & np.uint32(0xFF << (8 * i))
            out = part if out is None else out | part
        return out

    def general(a: Value, b: Value, c: Value) -> Value:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        out: Value = np.uint32(0)
        for i in range(4):
            number = source(c, i)
            byte = (both >> ((number & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            out = out | (np.where(number & np.uint32(8), sign, byte) << np.uint32(8 * i))
        return out

    if isinstance(selector, Imm):
        code = int(selector.value) & 0xFFFFFFFF
        return Alu(("b32",), ("b32", "b32", "b32"), constant)
    return Alu(("b32",), ("b32", "b32", "b32"), general)


@_op("sad")
def _sad(m: Modifiers) -> Alu:
    kind = m.kind(*_INTS)
    unsigned = "u" + kind[1:]
    dtype = DTYPES[unsigned]
    return Alu(
        (unsigned,),
        (kind, kind, unsigned),
        lambda a, b, c: (
            c + np.where(a < b, floats.bits(b, dtype) - floats.bits(a, dtype), floats.bits(a, dtype) - floats.bits(b, dtype))[()]
        ),
    )


def _byte_terms(a: Value, kind: str) -> list[Value]:
    """The four bytes of a word, low first, widened to 32 bits."""
    word = floats.bits(a, np.int32 if kind == "s32" else np.uint32)
    top = word.dtype.type(24)
    return [(word << word.dtype.type(24 - 8 * i)) >> top for i in range(3)] + [word >> top]


@_op("dp4a")
def _dp4a(m: Modifiers) -> Alu:
    second, first = m.kind("u32", "s32"), m.kind("u32", "s32")

    def law(a: Value, b: Value, c: Value) -> Value:
        out = c
        for x, y in zip(_byte_terms(a, first), _byte_terms(b, second), strict=True):
            out = out + floats.bits(x, np.uint32) * floats.bits(y, np.uint32)
        return out

    return Alu(("u32",), ("u32", "u32", "u32"), law)


@_op("dp2a")
def _dp2a(m: Modifiers) -> Alu:
    part = m.choice("lo", "hi")
    second, first = m.kind("u32", "s32"), m.kind("u32", "s32")

    def law(a: Value, b: Value, c: Value) -> Value:
        word = floats.bits(a, np.int32 if first == "s32" else np.uint32)
        half = word.dtype.type(16)
        x = [(word << half) >> half, word >> half]
        y = _byte_terms(b, second)[0 if part == "lo" else 2 :]
        for i in range(2):
            c = c + floats.bits(x[i], np.uint32) * floats.bits(y[i], np.uint32)
        return c

    return Alu(("u32",), ("u32", "u32", "u32"), law)


# ---- comparisons ----------------------------------------

_COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _unordered(a: Value, b: Value) -> Value:
    return np.isnan(a) | np.isnan(b)


def _comparison(m: Modifiers, kind: str) -> Callable[[Value, Value], Value]:
    name = m.choice(*_COMPARE, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    ftz = m.flag("ftz")
    law: Callable[[Value, Value], Value]
    if kind in ("f32", "f64", "f16", "bf16"):
        if name in ("lo", "ls", "hi", "hs"):
            raise m.unsupported(f".{name} on floats")
        if name == "num":
            law = lambda a, b: ~_unordered(a, b)  # noqa: E731
        elif name == "nan":
            law = _unordered
        elif name == "ne":  # ordered: false for NaN, unlike NumPy's
            law = lambda a, b: (a != b) & ~_unordered(a, b)  # noqa: E731
        elif name == "neu":
            law = np.not_equal
        elif name.endswith("u"):
            ordered = _COMPARE[name[:2]]
            law = lambda a, b: ordered(a, b) | _unordered(a, b)  # noqa: E731
        else:
            law = _COMPARE[name]
        if kind in ("f16", "bf16"):
            widen = floats.half_to_32 if kind == "f16" else floats.bfloat_to_32
            return lambda a, b: law(widen(a), widen(b))
        if ftz:
            return lambda a, b: law(floats.flush(a), floats.flush(b))
        return law
    if name not in _COMPARE:
        raise m.unsupported(f".{name} on integers")
    return _COMPARE[name]


_BOOL: dict[str, Callable[[Value, Value], Value]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@_op("setp")
def _setp(m: Modifiers) -> Alu:
    kind = m.kind("b16", "b32", "b64", *_INTS, "f32", "f64", "f16", "bf16")
    join = m.choice(*_BOOL, default="none")
    compare = _comparison(m, kind)
    if join == "none":
        return Alu(("pred", "pred"), (kind, kind), lambda a, b: _with_complement(compare(a, b)))
    law = _BOOL[join]

    def joined(a: Value, b: Value, c: Value) -> tuple[Value, Value]:
        hit = compare(a, b)
        return law(hit, c), law(~hit, c)

    return Alu(("pred", "pred"), (kind, kind, "pred"), joined)


def _with_complement(hit: Value) -> tuple[Value, Callable[[], Value]]:
    return hit, lambda: ~hit  # most programs never ask for the second result


@_op("set")
def _set(m: Modifiers) -> Alu:
    kind = m.kind("b16", "b32", "b64", *_INTS, "f32", "f64", "f16", "bf16")
    out = m.kind("u32", "s32", "f32")
    join = m.choice(*_BOOL, default="none")
    compare = _comparison(m, kind)

    def result(hit: Value) -> Value:
        return hit.astype(np.float32) if out == "f32" else np.where(hit, np.uint32(0xFFFFFFFF), np.uint32(0))[()]

    if join == "none":
        return Alu((out if out == "f32" else "u32",), (kind, kind), lambda a, b: result(compare(a, b)))
    return Alu((out if out == "f32" else "u32",), (kind, kind, "pred"), lambda a, b, c: result(_BOOL[join](compare(a, b), c)))


@_op("selp")
def _selp(m: Modifiers) -> Alu:
    kind = m.kind("b16", "b32", "b64", *_INTS, "f32", "f64")
    return Alu((kind,), (kind, kind, "pred"), _select)


def _select(a: Value, b: Value, p: Value) -> Value:
    if p.ndim == 0:
        return a if p else b
    return np.where(p, a, b)


def _choose(hit: Value, a: Value, b: Value) -> Value:
    out: Value = np.where(hit, a, b)
    return out[()]


@_op("slct")
def _slct(m: Modifiers) -> Alu:
    test, ftz = m.kind("s32", "f32"), m.flag("ftz")
    kind = m.kind("b16", "b32", "b64", *_INTS, "f32", "f64")
    return Alu((kind,), (kind, kind, test), lambda a, b, c: _choose((floats.flush(c) if ftz else c) >= 0, a, b))


@_op("testp")
def _testp(m: Modifiers) -> Alu:
    kind, name = m.kind("f32", "f64"), m.choice("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    tiny = np.finfo(DTYPES[kind]).tiny
    laws: dict[str, Callable[[Value], Value]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny), "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }  # fmt: skip
    return Alu(("pred",), (kind,), laws[name])


@_op("copysign")
def _copysign(m: Modifiers) -> Alu:
    kind = m.kind("f32", "f64")
    return Alu((kind,), (kind, kind), lambda a, b: np.copysign(b, a))


# ---- cvt ----------------------------------------

_ALL_INTS = ("u8", "s8", *_INTS)


@_op("cvt")
def _cvt(m: Modifiers) -> Alu:
    source = m.kind(*_ALL_INTS, "f16", "bf16", "f32", "f64")
    target = m.kind(*_ALL_INTS, "f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
    whole = m.choice("rni", "rzi", "rmi", "rpi", default="")
    mode = m.choice(*floats.MODES, default="")
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    if target.endswith("x2"):
        return _cvt_packed(m, target, source, mode, relu, sat)
    integers = (source in _ALL_INTS, target in _ALL_INTS)
    if integers == (True, True):
        return Alu((target,), (source,), _int_to_int(DTYPES[source], DTYPES[target], sat))
    if integers == (True, False):
        if not mode:
            raise m.unsupported("a conversion from integer to float without rounding mode")
        return Alu((target,), (source,), _int_to_float(target, mode, sat))
    widen = {"f16": floats.half_to_32, "bf16": floats.bfloat_to_32}.get(source, lambda a: a)
    if integers == (False, True):
        if not whole:
            raise m.unsupported("a conversion from float to integer without integer rounding")
        dtype = DTYPES[target]
        return Alu(
            (target,),
            (source,),
            lambda a: floats.float_to_int(floats.flush(widen(a)) if ftz and source == "f32" else widen(a), dtype, whole),
        )
    return Alu((target,), (source,), _float_to_float(m, source, target, whole, mode, ftz, sat, relu))


def _int_to_int(source: np.dtype[Any], target: np.dtype[Any], sat: bool) -> Callable[[Value], Value]:
    if not sat:
        return lambda a: a.astype(target)
    low, high = np.iinfo(target).min, np.iinfo(target).max
    bottom, top = max(low, np.iinfo(source).min), min(high, np.iinfo(source).max)
    return lambda a: np.clip(a, source.type(bottom), source.type(top)).astype(target)


def _int_to_float(target: str, mode: str, sat: bool) -> Callable[[Value], Value]:
    def law(a: Value) -> Value:
        if target == "f64":
            return floats.int_to_float64(a, mode)
        if target == "f32" and mode == "rn":
            return a.astype(np.float32)
        return _narrow(floats.int_to_64(a), target, mode)

    return (lambda a: floats.saturate(law(a))) if sat and target in ("f32", "f64") else law


def _narrow(value: Value, target: str, mode: str) -> Value:
    if target == "f32":
        return floats.narrow32(value, mode)
    return (floats.narrow_half if target == "f16" else floats.narrow_bfloat)(value, mode)


def _float_to_float(
    m: Modifiers, source: str, target: str, whole: str, mode: str, ftz: bool, sat: bool, relu: bool
) -> Callable[[Value], Value]:
    widen = {"f16": floats.half_to_32, "bf16": floats.bfloat_to_32}.get(source)
    order = {"f16": 0, "bf16": 0, "f32": 1, "f64": 2}
    if order[target] < order[source] and not mode:
        raise m.unsupported("a narrowing conversion without rounding mode")

    def law(a: Value) -> Value:
        if widen:
            a = widen(a)
        if ftz and a.dtype == np.float32:
            a = floats.flush(a)
        if whole:
            a = floats.to_integral(a, whole)
        if relu:
            a = np.where(a > 0, a, np.where(np.isnan(a), a, a.dtype.type(0)))[()]
        if sat:
            a = floats.saturate(a)
        if target == "f64":
            return a.astype(np.float64)
        if target == "f32":
            out = a if a.dtype == np.float32 else floats.narrow32(a, mode)
            out = floats.canonical(out)
            return floats.flush(out) if ftz else out
        return _narrow(a.astype(np.float64), target, mode or "rn")

    return law


def _cvt_packed(m: Modifiers, target: str, source: str, mode: str, relu: bool, sat: bool) -> Alu:
    if source != "f32" or mode not in ("rn", "rz"):
        raise m.unsupported("a packed conversion of this kind")
    one = target[:-2]

    def part(a: Value) -> Value:
        if relu:
            a = np.where(a > 0, a, np.where(np.isnan(a), a, np.float32(0)))[()]
        if sat:
            a = floats.saturate(a)
        return _narrow(a.astype(np.float64), one, mode).astype(np.uint32)

    return Alu((target,), ("f32", "f32"), lambda a, b: (part(a) << np.uint32(16)) | part(b))
