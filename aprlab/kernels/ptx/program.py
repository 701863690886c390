"""An entry of a module, made ready to run: calls inlined, labels resolved, every instruction decoded once into a
closure.

A closure takes the machine's `State` and does its work on whatever lanes are active. Control flow closures return the
next pc instead, or -1 when the group of lanes ended, split or waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.kernels.ptx import floats, ops
from aprlab.kernels.ptx.floats import Value
from aprlab.kernels.ptx.memory import GENERIC
from aprlab.kernels.ptx.ops import DTYPES, Modifiers
from aprlab.kernels.ptx.parser import (
    TYPE_BYTES,
    Address,
    BranchTargets,
    Function,
    Group,
    Imm,
    Instruction,
    Label,
    Location,
    Module,
    Not,
    Operand,
    Reg,
    ValueAndPredicate,
    Variable,
    VectorOperand,
    constant_bytes,
)

if TYPE_CHECKING:
    from aprlab.kernels.ptx.machine import State

Run = Callable[["State"], None]
Control = Callable[["State", int], int]
Getter = Callable[["State"], Value]
Setter = Callable[["State", Value], None]

SPECIALS = {
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
} | {
    "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%clock", "%clock_hi", "%clock64",
    "%globaltimer", "%globaltimer_lo",
    "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size",
}  # fmt: skip


@dataclass
class Op:
    """One decoded instruction. `reads` and `writes` are register numbers; exactly one of `run` and `control` is set."""

    instruction: Instruction
    run: Run | None = None
    control: Control | None = None
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    approximate: bool = False


@dataclass
class Program:
    """A flat list of ops; registers by number; the layout of parameter, shared and local memory."""

    module: Module
    entry: Function
    ops: list[Op] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    params: dict[str, int] = field(default_factory=dict)
    param_bytes: int = 0
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (offset, bytes); dynamic shared has bytes −1
    shared_bytes: int = 0
    local: dict[str, tuple[int, int]] = field(default_factory=dict)
    local_bytes: int = 0

    @cached_property
    def listing(self) -> tuple[list[str], list[Location | None], list[int]]:
        """Text, source location and PTX line of every instruction."""
        items = [op.instruction for op in self.ops]
        return [str(item) for item in items], [item.loc for item in items], [item.line for item in items]


# ---- flattening ----------------------------------------


# Calls are copied in, so that a text of 30 functions that call each other twice would become 2^30 copies.
MOST_COPIED = 50_000  # instructions, labels, registers and variables that calls bring in, all together
MOST_DEPTH = 64  # calls inside each other
MOST_LOCAL = 512 << 10  # bytes of local memory of a thread, as CUDA allows
MOST_SHARED = 232448  # bytes of shared memory that a block can have on the largest GPUs

# What the decoding of an instruction with too few, too many or unlike operands runs into.
_MALFORMED = (IndexError, KeyError, ValueError, TypeError)


class _Flattener:
    """Copies the entry's body, with each call replaced by the callee's body under fresh names.

    Parameter variables of calls become pseudo registers, one for each (name, offset, width) that the code uses.
    """

    def __init__(self, module: Module, entry: Function) -> None:
        self.module = module
        self.registers: dict[str, str] = dict(entry.registers)
        self.variables: dict[str, Variable] = {n: v for n, v in entry.variables.items() if v.space != "param"}
        self.call_params = {n for n, v in entry.variables.items() if v.space == "param"}
        self.code: list[Instruction | Label] = []
        self.tables: dict[str, tuple[str, ...]] = {}
        self.copies = self.copied = 0
        self.slots: dict[tuple[str, int], tuple[int, int]] = {}  # byte of a call parameter → (start, width) of who uses it
        self.body(entry, {}, [], None)

    def body(self, function: Function, names: dict[str, str], stack: list[str], end: str | None) -> None:
        for item in function.body:
            if isinstance(item, Label):
                self.code.append(Label(names.get(item.name, item.name), item.line))
            elif isinstance(item, BranchTargets):
                self.tables[names.get(item.name, item.name)] = tuple(names.get(t, t) for t in item.targets)
            else:
                try:
                    self.instruction(item, names, [*stack, function.name], end)
                except _MALFORMED as error:
                    said = f"PTX line {item.line}: cannot decode {item} ({error})"
                    raise FormatError(said, code="ptx.operands") from error

    def instruction(self, item: Instruction, names: dict[str, str], stack: list[str], end: str | None) -> None:
        if item.parts[0] == "call":
            self.call(item, names, stack)
        elif end is not None and item.parts[0] == "ret":
            self.code.append(replace(self.renamed(item, names), opcode="bra", operands=(Reg(end),)))
        else:
            self.code.append(self.parameter_move(self.renamed(item, names)))

    def renamed(self, item: Instruction, names: dict[str, str]) -> Instruction:
        if not names:
            return item

        def operand(o: Operand) -> Operand:
            match o:
                case Reg(name):
                    return Reg(names.get(name, name))
                case Address(base, offset):
                    return Address(names.get(base, base) if base else None, offset)
                case VectorOperand(items):
                    return VectorOperand(tuple(map(operand, items)))
                case Group(items):
                    return Group(tuple(map(operand, items)))
                case ValueAndPredicate(first, second):
                    return ValueAndPredicate(operand(first), operand(second))
                case Not(inner):
                    return Not(operand(inner))
                case _:
                    return o

        guard = names.get(item.guard, item.guard) if item.guard else None
        return replace(item, operands=tuple(map(operand, item.operands)), guard=guard)

    def parameter_move(self, item: Instruction) -> Instruction:
        """`st.param [call parameter]` and `ld.param` of one, as a move to or from pseudo registers."""
        base = item.parts[0]
        if base not in ("ld", "st") or "param" not in (p.split("::")[0] for p in item.parts):
            return item
        address = item.operands[1 if base == "ld" else 0]
        if not isinstance(address, Address) or address.base not in self.call_params:
            return item
        kind = item.parts[-1]
        other = item.operands[0 if base == "ld" else 1]
        items = other.items if isinstance(other, VectorOperand) else (other,)
        slots = tuple(self.slot(address.base, address.offset + i * TYPE_BYTES[kind], kind) for i in range(len(items)))
        ends = (items, slots) if base == "ld" else (slots, items)
        # The machine's own opcode: several moves in one instruction.
        operands = (VectorOperand(tuple(ends[0])), VectorOperand(tuple(ends[1])))
        return replace(item, opcode=f"_moves.{kind}", operands=operands, shown=str(item))

    def slot(self, name: str, offset: int, kind: str) -> Reg:
        size = TYPE_BYTES[kind]
        register = f"{name}+{offset}:{size}"
        for byte in range(offset, offset + size):
            start, width = self.slots.setdefault((name, byte), (offset, size))
            if (start, width) != (offset, size):
                said = f"call parameter {name!r} is used in overlapping pieces of {width} and {size} bytes"
                raise UnsupportedError(said, code="ptx.call-parameter-overlap")
        self.registers.setdefault(register, f"b{8 * max(size, 2)}")
        return Reg(register)

    def call(self, item: Instruction, names: dict[str, str], stack: list[str]) -> None:
        item = self.renamed(item, names)
        if item.guard:
            raise UnsupportedError(f"PTX line {item.line}: a predicated call", code="ptx.predicated-call")
        operands = list(item.operands)
        first = operands[0]
        results = first.items if isinstance(first, Group) else ()
        if isinstance(first, Group):
            operands.pop(0)
        target, arguments = operands[0], operands[1].items if len(operands) > 1 and isinstance(operands[1], Group) else ()
        if not isinstance(target, Reg) or target.name not in self.module.functions:
            said = f"PTX line {item.line}: indirect call or unknown function {target}"
            raise UnsupportedError(said, code="ptx.indirect-call")
        function = self.module.functions[target.name]
        if not function.defined:
            said = f"PTX line {item.line}: call of {function.name!r}, which has no body here"
            raise UnsupportedError(said, code="ptx.function-undefined")
        if function.name in stack:
            said = f"PTX line {item.line}: recursive call of {function.name!r}"
            raise UnsupportedError(said, code="ptx.recursive-call")
        self.count(function, item, stack)
        self.copies += 1
        tag = f"#{self.copies}"
        inner = {name: name + tag for name in (*function.registers, *function.variables)}
        inner |= {i.name: i.name + tag for i in function.body if isinstance(i, Label | BranchTargets)}
        self.registers |= {inner[name]: kind for name, kind in function.registers.items()}
        for name, variable in function.variables.items():
            if variable.space == "param":
                self.call_params.add(inner[name])
            else:
                self.variables[inner[name]] = replace(variable, name=inner[name])
        formals = [*function.returns, *function.params]
        actuals = [*results, *arguments]
        if len(formals) != len(actuals):
            said = f"PTX line {item.line}: {function.name!r} takes {len(formals)} values, {len(actuals)} given"
            raise FormatError(said, code="ptx.call-arguments")
        after: list[Instruction] = []
        for number, (formal, actual) in enumerate(zip(formals, actuals, strict=True)):
            is_result = number < len(function.returns)
            if formal.space == "reg":
                move = (actual, Reg(inner[formal.name])) if is_result else (Reg(inner[formal.name]), actual)
                step = replace(item, opcode=f"mov.{formal.type}", operands=move)
                after.append(step) if is_result else self.code.append(step)
            elif isinstance(actual, Reg) and actual.name in self.call_params:
                inner[formal.name] = actual.name
            else:  # a register or constant handed to a .param formal
                inner[formal.name] = formal.name + tag
                self.call_params.add(inner[formal.name])
                slot = self.slot(inner[formal.name], 0, formal.type)
                step = replace(item, opcode=f"mov.{formal.type}", operands=(actual, slot) if is_result else (slot, actual))
                after.append(step) if is_result else self.code.append(step)
        end = f"end of {function.name}{tag}"
        self.body(function, inner, stack, end)
        self.code.append(Label(end, item.line))
        self.code += after

    def count(self, function: Function, item: Instruction, stack: list[str]) -> None:
        """What a call brings in is counted before it is copied."""
        self.copied += 1 + len(function.body) + len(function.registers) + len(function.variables)
        if self.copied > MOST_COPIED:
            said = f"calls bring in {self.copied} instructions and registers; at most {MOST_COPIED} are taken"
            raise UnsupportedError(f"PTX line {item.line}: {said}", code="ptx.inlining-limit")
        if len(stack) > MOST_DEPTH:
            said = f"PTX line {item.line}: more than {MOST_DEPTH} calls inside each other"
            raise UnsupportedError(said, code="ptx.call-depth")


def _layout(variables: list[Variable], gap: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Offsets by declaration order and alignment. There are `gap` bytes between neighbours, so that an overrun can be seen;
    a multiple of 128 keeps every variable in its banks.
    """
    out: dict[str, tuple[int, int]] = {}
    at = 0
    for variable in variables:
        at = -(-at // variable.align) * variable.align
        out[variable.name] = (at, variable.nbytes)
        at += variable.nbytes + gap
    return out, max(at - gap, 0) if variables else 0


# ---- building ----------------------------------------


def build(module: Module, entry: str, *, checks: bool = False, dynamic_shared: int = 0) -> Program:
    """Decode `entry`. Raises `UsageError` if there is none of that name, `UnsupportedError` with the PTX line for an
    unknown opcode or modifier. With `checks`, shared variables are laid out with gaps and register reads are
    watched.
    """
    function = module.functions.get(entry)
    if function is None or not function.entry or not function.defined:
        known = ", ".join(module.entries) or "none"
        raise UsageError(f"no entry {entry!r}; the module has {known}", code="ptx.entry-unknown")
    flat = _Flattener(module, function)
    program = Program(module, function)
    for name, kind in flat.registers.items():
        program.registers[name] = len(program.types)
        program.types.append(kind)
        program.widths.append(0 if kind == "pred" else max(TYPE_BYTES[kind], 2))
    program.registers["%cc"] = len(program.types)  # the condition code of add.cc and kin
    program.types.append("pred")
    program.widths.append(0)
    at = 0
    for param in function.params:
        at = -(-at // param.align) * param.align
        program.params[param.name] = at
        at += param.nbytes
    program.param_bytes = at
    used = {name for item in flat.code if isinstance(item, Instruction) for name in _symbols(item)}
    candidates = [*module.variables.values(), *flat.variables.values()]
    shared = [v for v in candidates if v.space == "shared" and v.name in used]
    static = [v for v in shared if v.count != 0]
    program.shared, size = _layout(static, 128 if checks else 0)
    dynamic = [v for v in shared if v.count == 0]
    if dynamic or dynamic_shared:
        align = max((v.align for v in dynamic), default=16)
        if checks and static:
            size += 128
        size = -(-size // align) * align
        for variable in dynamic:
            program.shared[variable.name] = (size, -1)
        size += dynamic_shared
    program.shared_bytes = size
    local = [v for v in candidates if v.space == "local"]
    program.local, program.local_bytes = _layout(local, 16 if checks else 0)
    for what, need, most in (
        ("static shared memory for a block", sum(v.nbytes for v in static), MOST_SHARED),
        ("local memory for a thread", sum(v.nbytes for v in local), MOST_LOCAL),
    ):
        if need > most:
            raise UnsupportedError(f"{entry!r} needs {need} bytes of {what}; CUDA allows {most}", code="ptx.memory-limit")
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for item in flat.code:
        if isinstance(item, Label):
            labels[item.name] = len(code)
        else:
            code.append(item)
    code.append(Instruction("ret", (), line=code[-1].line if code else function.line))
    builder = _Builder(program, labels, flat.tables, checks)
    program.ops = [builder.op(item, pc) for pc, item in enumerate(code)]
    return program


def _symbols(item: Instruction) -> list[str]:
    out: list[str] = []

    def walk(o: Operand) -> None:
        match o:
            case Reg(name) | Address(str(name), _):
                out.append(name)
            case VectorOperand(items) | Group(items):
                for inner in items:
                    walk(inner)
            case ValueAndPredicate(first, second):
                walk(first)
                walk(second)
            case Not(inner):
                walk(inner)
            case _:
                pass

    for operand in item.operands:
        walk(operand)
    return out


_SPACES = ("global", "shared", "local", "const", "param")
# Hints that do not change what a program computes.
_HINTS = (
    "ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "L1::evict_normal",
    "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::64B", "L2::128B", "L2::256B", "unified",
)  # fmt: skip
_STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
_SCOPES = ("cta", "cluster", "gpu", "sys")


@dataclass(frozen=True)
class Access:
    """What a memory instruction does, for the memory system and its watchers. `nbytes` is a lane's whole access."""

    pc: int
    space: str
    kind: str  # "load", "store" or "atomic"
    dtype: np.dtype[Any]
    lanes: int  # vector elements
    strong: bool = False

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.lanes


class _Builder:
    def __init__(self, program: Program, labels: dict[str, int], tables: dict[str, tuple[str, ...]], checks: bool) -> None:
        self.program, self.labels, self.tables, self.checks = program, labels, tables, checks
        self.names = list(program.registers)
        self.jumps: dict[str, list[int]] = {}
        self.reads: list[int] = []
        self.writes: list[int] = []
        self.item = Instruction("", ())
        self.pc = 0

    def fail(self, message: str, code: str = "ptx.operands") -> FormatError:
        return FormatError(f"PTX line {self.item.line}: {message}", code=code)

    def unsupported(self, message: str, code: str = "ptx.instruction-form") -> UnsupportedError:
        return UnsupportedError(f"PTX line {self.item.line}: {message}", code=code)

    # -- operands

    def register(self, operand: Operand | str) -> int:
        name = operand if isinstance(operand, str) else str(operand)
        number = self.program.registers.get(name)
        if number is None:
            raise self.fail(f"{name!r} is not a declared register", "ptx.register-unknown")
        return number

    def get(self, operand: Operand, kind: str) -> Getter:
        """A closure that reads `operand` as PTX type `kind` on the active lanes."""
        dtype = DTYPES[kind]
        match operand:
            case Imm():
                constant = self.constant(operand, kind)
                return lambda st: constant
            case Not(inner):
                if kind != "pred":
                    raise self.fail(f"{operand}: ! is for predicates, a .{kind} is expected", "ptx.operand-type")
                positive = self.get(inner, "pred")
                return lambda st: ~positive(st)
            case Reg(name) if name in self.program.registers:
                return self.get_register(self.register(operand), dtype)
            case Reg(name) if name in SPECIALS:
                if kind == "pred":
                    raise self.fail(f"{name} is not a predicate", "ptx.operand-type")
                return _get_special(name, dtype)
            case Reg(name) if name.startswith("%"):
                raise self.unsupported(
                    f"{name!r} is neither a declared register nor a special one that is known", "ptx.special-register-unknown"
                )
            case Reg(name):
                return self.get_symbol(name, 0, dtype)
            case Address(str(name), offset) if name in self.program.registers:  # `reg + 1`, as some write by hand
                base = self.get_register(self.register(name), dtype)
                step = dtype.type(offset & ((1 << 8 * dtype.itemsize) - 1))
                return lambda st: base(st) + step
            case Address(str(name), offset):
                return self.get_symbol(name, offset, dtype)
            case _:
                raise self.fail(f"{operand} is not a value")

    def constant(self, operand: Imm, kind: str) -> Value:
        if kind == "pred":
            return np.bool_(operand.value)
        return np.frombuffer(constant_bytes(operand, kind), DTYPES[kind])[0]

    def get_register(self, number: int, dtype: np.dtype[Any]) -> Getter:
        self.reads.append(number)
        width = self.program.widths[number]
        name = self.names[number] if self.checks else ""
        if (width == 0) != (dtype == np.bool_):
            raise self.fail(f"{self.names[number]} is .{self.program.types[number]}, used as {dtype}", "ptx.operand-type")
        if width and width < dtype.itemsize:
            raise self.fail(f"{self.names[number]} is .{self.program.types[number]}, too narrow for {dtype}", "ptx.operand-type")
        narrow = np.dtype(f"u{dtype.itemsize}") if width > dtype.itemsize else None
        stored = np.dtype(f"u{width}") if width else np.dtype(bool)
        pc = self.pc
        checks = self.checks

        def read(st: State) -> Value:
            value = st.regs[number]
            if value is None:
                value = stored.type(0)
                if checks:
                    st.unwritten(pc, number, name)
            elif checks:
                st.check_written(pc, number, name)
            if narrow is not None:
                value = (value if value.dtype.kind == "u" else floats.bits(value, stored)).astype(narrow)
            if value.dtype is not dtype:
                value = value.view(dtype) if value.ndim else np.asarray(value).view(dtype)[()]
            if st.sel is None:
                st.owned[number] = False  # a reader of the whole array may keep it
                return value
            return st.sel.pick(value)

        return read

    def get_symbol(self, name: str, offset: int, dtype: np.dtype[Any]) -> Getter:
        program = self.program
        for table in (program.shared, program.local):
            if name in table:
                constant = dtype.type(table[name][0] + offset)
                return lambda st: constant
        if name in program.params:
            constant = dtype.type(program.params[name] + offset)
            return lambda st: constant
        if name in program.module.variables:
            return lambda st: dtype.type(st.symbols[name] + offset)
        if name in program.module.functions:
            raise self.unsupported(f"the address of function {name!r}")
        raise self.fail(f"unknown name {name!r}", "ptx.name-unknown")

    def put(self, operand: Operand, kind: str) -> Setter:
        """A closure that writes a value of PTX type `kind` on the active lanes, widened if the register is wider."""
        if isinstance(operand, Reg) and operand.name == "_":
            return lambda st, value: None
        number = self.register(operand)
        self.writes.append(number)
        width, dtype = self.program.widths[number], DTYPES[kind]
        if (width == 0) != (dtype == np.bool_) or (width and width < dtype.itemsize):
            raise self.fail(f"{operand} is .{self.program.types[number]}, the result is .{kind}", "ptx.operand-type")
        size = width or 1
        # A wider register takes the bits, extended by the type's sign.
        narrow = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{dtype.itemsize}") if width > dtype.itemsize else None
        wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width}") if width else dtype
        line = self.item.line

        def write(st: State, value: Value) -> None:
            if narrow is not None:
                value = (value if value.dtype is narrow else floats.bits(value, narrow)).astype(wide)
            if value.dtype.itemsize != size:
                said = f"PTX line {line}: {operand}: a {value.dtype} for a register of {size} bytes"
                raise FormatError(said, code="ptx.operand-type")
            if st.sel is None:
                st.regs[number] = value
                st.owned[number] = False
                if st.valid is not None:
                    st.valid[number] = None
            else:
                st.scatter(number, value, size)

        return write

    def label(self, operand: Operand) -> int:
        target = self.labels.get(str(operand))
        if target is None:
            raise self.fail(f"no label {operand}", "ptx.label-unknown")
        return target

    # -- instructions

    def op(self, item: Instruction, pc: int) -> Op:
        self.item, self.pc, self.reads, self.writes = item, pc, [], []
        base = item.parts[0]
        op = Op(item)
        control = getattr(self, f"control_{base}", None)
        special = getattr(self, f"op_{base.lstrip('_')}", None)
        try:
            if control is not None:
                op.control = control(Modifiers(item))
            elif special is not None:
                op.run = special(Modifiers(item))
            else:
                alu = ops.decode(item)
                op.run, op.approximate = self.alu(alu), alu.approximate
        except _MALFORMED as error:
            raise self.fail(f"cannot decode {item} ({type(error).__name__}: {error})") from error
        if item.guard is not None and base not in ("bra", "ret", "exit"):
            guard = self.get(Reg(item.guard), "pred")
            negated = item.guard_negated
            if op.run is not None:
                op.run = _guarded(guard, negated, op.run)
            else:
                assert op.control is not None
                op.control = _guarded_control(guard, negated, op.control)
        op.reads, op.writes = tuple(self.reads), tuple(self.writes)
        return op

    def alu(self, alu: ops.Alu) -> Run:
        operands = list(self.item.operands)
        first = operands.pop(0)
        targets = [first.first, first.second] if isinstance(first, ValueAndPredicate) else [first]
        if len(targets) > len(alu.dst):
            raise self.fail(f"{self.item.opcode} has one result")
        kinds = alu.src
        if len(operands) != len(kinds):
            raise self.fail(f"{self.item.opcode} takes {len(kinds)} operands, {len(operands)} given")
        gets = [self.get(o, kind) for o, kind in zip(operands, kinds, strict=True)]
        if alu.carry_in:
            gets.append(self.get(Reg("%cc"), "pred"))
        puts = [self.put(t, kind) for t, kind in zip(targets, alu.dst, strict=False)]
        if alu.carry_out:
            puts.append(self.put(Reg("%cc"), "pred"))
        law = alu.law
        if len(alu.dst) + alu.carry_out > 1:

            def run_many(st: State) -> None:
                results = law(*[get(st) for get in gets])
                for put, value in zip(puts, results, strict=False):
                    put(st, value() if callable(value) else value)

            return run_many
        put = puts[0]
        if len(gets) == 1:
            (a,) = gets
            return lambda st: put(st, law(a(st)))
        if len(gets) == 2:
            a, b = gets
            return lambda st: put(st, law(a(st), b(st)))
        if len(gets) == 3:
            a, b, c = gets
            return lambda st: put(st, law(a(st), b(st), c(st)))
        return lambda st: put(st, law(*[get(st) for get in gets]))

    # -- moves

    def op_mov(self, m: Modifiers) -> Run:
        kind = m.kind(*TYPE_BYTES)
        m.done()
        target, source = self.item.operands
        if isinstance(source, VectorOperand):
            part = f"b{TYPE_BYTES[kind] * 8 // len(source.items)}"
            gets = [self.get(o, part) for o in source.items]
            put = self.put(target, kind)
            whole, step = DTYPES[f"b{TYPE_BYTES[kind] * 8}"], TYPE_BYTES[part] * 8

            def pack(st: State) -> None:
                out = gets[0](st).astype(whole)
                for i, get in enumerate(gets[1:], 1):
                    out = out | (get(st).astype(whole) << whole.type(i * step))
                put(st, out)

            return pack
        if isinstance(target, VectorOperand):
            part = f"b{TYPE_BYTES[kind] * 8 // len(target.items)}"
            get = self.get(source, f"b{TYPE_BYTES[kind] * 8}")
            puts = [self.put(o, part) for o in target.items]
            small, step = DTYPES[part], TYPE_BYTES[part] * 8

            def unpack(st: State) -> None:
                value = get(st)
                for i, put in enumerate(puts):
                    put(st, (value >> value.dtype.type(i * step)).astype(small))

            return unpack
        get, put = self.get(source, kind), self.put(target, kind)
        return lambda st: put(st, get(st))

    def op_moves(self, m: Modifiers) -> Run:
        """The call parameters' own: element by element from one vector of registers to another."""
        kind = m.kind(*TYPE_BYTES)
        targets, sources = self.item.operands
        assert isinstance(targets, VectorOperand)
        assert isinstance(sources, VectorOperand)
        pairs = [(self.put(t, kind), self.get(s, kind)) for t, s in zip(targets.items, sources.items, strict=True)]

        def run(st: State) -> None:
            for put, get in pairs:
                put(st, get(st))

        return run

    def op_cvta(self, m: Modifiers) -> Run:
        to, space, kind = m.flag("to"), m.choice(*_SPACES), m.kind("u32", "u64")
        m.done()
        window = np.uint64(GENERIC[space])
        get, put = self.get(self.item.operands[1], kind), self.put(self.item.operands[0], kind)
        if not window:
            return lambda st: put(st, get(st))
        return (lambda st: put(st, get(st) - window)) if to else (lambda st: put(st, get(st) + window))

    def op_isspacep(self, m: Modifiers) -> Run:
        space = m.choice(*_SPACES)
        m.done()
        window = np.uint64(GENERIC[space] >> 60)
        get, put = self.get(self.item.operands[1], "u64"), self.put(self.item.operands[0], "pred")
        return lambda st: put(st, get(st) >> np.uint64(60) == window)

    # -- memory

    def space(self, m: Modifiers) -> str:
        for name in list(m.left):
            if name.split("::")[0] in _SPACES:
                m.left.remove(name)
                return name.split("::")[0]
        return "generic"

    def access(self, m: Modifiers, kind: str) -> tuple[Access, str]:
        space = self.space(m)
        for hint in _HINTS:
            m.flag(hint)
        strong = sum(m.flag(name) for name in _STRONG) > 0  # every one is consumed
        m.flag("weak")
        for scope in _SCOPES:
            m.flag(scope)
        vector = int(m.choice("v2", "v4", "v8", default="v1")[1:])
        written = m.kind(*(t for t in TYPE_BYTES if t not in ("pred", "b128", "f16x2", "bf16x2")))
        m.done()
        if vector * TYPE_BYTES[written] > 16:
            raise self.unsupported(f"an access of {vector * TYPE_BYTES[written]} bytes a lane")
        return Access(self.pc, space, kind, DTYPES[written], vector, strong), written

    def placed(self, access: Access, operand: Operand) -> Access:
        """A generic access by a variable's name is one to that variable's space."""
        if access.space == "generic" and isinstance(operand, Address) and operand.base is not None:
            program = self.program
            tables: dict[str, Collection[str]] = {"shared": program.shared, "local": program.local, "param": program.params}
            for space, table in tables.items():
                if operand.base in table:
                    return replace(access, space=space)
        return access

    def address(self, operand: Operand) -> tuple[int | None, Getter, int]:
        """(register number or None, reader of the base, constant offset) of an address operand."""
        if not isinstance(operand, Address):
            raise self.fail(f"{operand} is not an address")
        if operand.base is None:
            return None, lambda st: np.uint64(0), operand.offset
        if operand.base in self.program.registers:
            number = self.register(operand.base)
            kind = f"u{8 * self.program.widths[number]}"
            if kind not in ("u32", "u64"):
                raise self.fail(f"{operand.base} cannot hold an address")
            return number, self.get(Reg(operand.base), kind), operand.offset
        return None, self.get_symbol(operand.base, 0, np.dtype(np.uint64)), operand.offset

    def op_ld(self, m: Modifiers) -> Run:
        target, source = self.item.operands
        access, kind = self.access(m, "load")
        access = self.placed(access, source)
        targets = target.items if isinstance(target, VectorOperand) else (target,)
        if len(targets) != access.lanes:
            raise self.fail(f"{self.item.opcode} with {len(targets)} destinations")
        number, base, offset = self.address(source)
        puts = [self.put(t, kind) for t in targets]
        if access.space == "param" and isinstance(source, Address) and source.base in self.program.params:
            start = self.program.params[str(source.base)] + offset
            if start + access.nbytes > self.program.param_bytes:
                raise self.fail(f"{source} reads beyond the parameters")
            size, dtype = access.dtype.itemsize, access.dtype

            def load_param(st: State) -> None:
                for i, put in enumerate(puts):
                    put(st, np.frombuffer(st.params, dtype, 1, start + i * size)[0])

            return load_param
        if len(puts) == 1:
            (put,) = puts
            return lambda st: put(st, st.load(access, number, base, offset)[0])

        def load(st: State) -> None:
            for put, value in zip(puts, st.load(access, number, base, offset), strict=True):
                put(st, value)

        return load

    op_ldu = op_ld

    def op_st(self, m: Modifiers) -> Run:
        target, source = self.item.operands
        access, kind = self.access(m, "store")
        access = self.placed(access, target)
        if access.space in ("param", "const"):
            raise self.unsupported(f"a store to .{access.space}")
        sources = source.items if isinstance(source, VectorOperand) else (source,)
        if len(sources) != access.lanes:
            raise self.fail(f"{self.item.opcode} with {len(sources)} sources")
        number, base, offset = self.address(target)
        gets = [self.get(s, kind) for s in sources]
        return lambda st: st.store(access, number, base, offset, [get(st) for get in gets])

    def atomic(self, m: Modifiers, returns: bool) -> Run:
        operation = m.choice("add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas")
        space = self.space(m)
        for name in (*_STRONG, *_SCOPES, "noftz"):
            m.flag(name)
        kind = m.kind("b16", "b32", "b64", "u32", "s32", "u64", "s64", "f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
        m.done()
        access = Access(self.pc, space, "atomic", DTYPES[kind], 1, True)
        operands = list(self.item.operands)
        put = self.put(operands.pop(0), kind) if returns else None
        access = self.placed(access, operands[0])
        number, base, offset = self.address(operands[0])
        gets = [self.get(o, kind) for o in operands[1:]]
        law = _atomic_law(operation, kind)

        def run(st: State) -> None:
            old = st.atomic(access, number, base, offset, [get(st) for get in gets], law, operation)
            if put is not None:
                put(st, old)

        return run

    def op_atom(self, m: Modifiers) -> Run:
        return self.atomic(m, True)

    def op_red(self, m: Modifiers) -> Run:
        return self.atomic(m, False)

    def op_cp(self, m: Modifiers) -> Run:
        """cp.async, done at once: a missing wait is the one mistake that stays invisible."""
        m.choice("async")
        if m.flag("commit_group") or m.flag("wait_group") or m.flag("wait_all"):
            m.done()
            return lambda st: None
        m.choice("ca", "cg")
        m.choice("shared", "shared::cta")
        m.choice("global")
        for hint in _HINTS:
            m.flag(hint)
        m.done()
        size = self.item.operands[2]
        if not isinstance(size, Imm) or size.value not in (4, 8, 16) or len(self.item.operands) > 3:
            raise self.unsupported("this form of cp.async")
        kind, lanes = {4: ("b32", 1), 8: ("b32", 2), 16: ("b32", 4)}[int(size.value)]
        source = Access(self.pc, "global", "load", DTYPES[kind], lanes)
        target = Access(self.pc, "shared", "store", DTYPES[kind], lanes)
        to, to_base, to_offset = self.address(self.item.operands[0])
        at, at_base, at_offset = self.address(self.item.operands[1])
        return lambda st: st.store(target, to, to_base, to_offset, st.load(source, at, at_base, at_offset))

    def nothing(self, m: Modifiers) -> Run:
        return lambda st: None

    op_prefetch = op_prefetchu = op_nanosleep = op_discard = nothing

    def op_membar(self, m: Modifiers) -> Run:
        m.choice("cta", "gl", "sys")
        m.done()
        return lambda st: None

    def op_fence(self, m: Modifiers) -> Run:
        m.choice("sc", "acq_rel", default="")
        m.choice(*_SCOPES)
        m.done()
        return lambda st: None

    # -- warp-wide

    def op_shfl(self, m: Modifiers) -> Run:
        if not m.flag("sync"):
            raise self.unsupported("shfl without .sync, which needs sm_6x or older")
        mode = m.choice("up", "down", "bfly", "idx")
        m.kind("b32")
        m.done()
        first, a, b, c, mask = self.item.operands
        target, flag = (first.first, first.second) if isinstance(first, ValueAndPredicate) else (first, None)
        put, put_flag = self.put(target, "b32"), self.put(flag, "pred") if flag is not None else None
        gets = [self.get(o, "b32") for o in (a, b, c, mask)]
        pc = self.pc

        def run(st: State) -> None:
            a, b, c, mask = (get(st) for get in gets)
            value, hit = st.shuffle(pc, mode, a, b, c, mask, put_flag is not None)
            put(st, value)
            if put_flag is not None:
                put_flag(st, hit)

        return run

    def op_vote(self, m: Modifiers) -> Run:
        if not m.flag("sync"):
            raise self.unsupported("vote without .sync, which needs sm_6x or older")
        mode = m.choice("all", "any", "uni", "ballot")
        kind = m.kind("b32") if mode == "ballot" else m.kind("pred")
        m.done()
        put = self.put(self.item.operands[0], kind)
        get, mask = self.get(self.item.operands[1], "pred"), self.get(self.item.operands[2], "b32")
        pc = self.pc
        return lambda st: put(st, st.vote(pc, mode, get(st), mask(st)))

    def op_activemask(self, m: Modifiers) -> Run:
        m.kind("b32")
        m.done()
        put, pc = self.put(self.item.operands[0], "b32"), self.pc
        return lambda st: put(st, st.vote(pc, "ballot", np.bool_(True), None))

    def op_match(self, m: Modifiers) -> Run:
        mode = m.choice("any", "all")
        m.choice("sync")
        kind = m.kind("b32", "b64")
        m.done()
        first = self.item.operands[0]
        target, flag = (first.first, first.second) if isinstance(first, ValueAndPredicate) else (first, None)
        put, put_flag = self.put(target, "b32"), self.put(flag, "pred") if flag is not None else None
        get, mask = self.get(self.item.operands[1], kind), self.get(self.item.operands[2], "b32")
        pc = self.pc

        def run(st: State) -> None:
            value, hit = st.match(pc, mode, get(st), mask(st))
            put(st, value)
            if put_flag is not None:
                put_flag(st, hit)

        return run

    def op_redux(self, m: Modifiers) -> Run:
        m.choice("sync")
        operation = m.choice("add", "min", "max", "and", "or", "xor")
        kind = m.kind("b32", "u32", "s32")
        m.done()
        put = self.put(self.item.operands[0], kind)
        get, mask = self.get(self.item.operands[1], kind), self.get(self.item.operands[2], "b32")
        pc = self.pc
        return lambda st: put(st, st.redux(pc, operation, get(st), mask(st)))

    # -- control flow

    def control_bra(self, m: Modifiers) -> Control:
        m.flag("uni")
        m.done()
        target = self.label(self.item.operands[0])
        if self.item.guard is None:
            return lambda st, pc: target
        guard, negated = self.get(Reg(self.item.guard), "pred"), self.item.guard_negated

        def branch(st: State, pc: int) -> int:
            taken = guard(st)
            return st.branch(~taken if negated else taken, target, pc + 1)

        return branch

    def control_brx(self, m: Modifiers) -> Control:
        m.choice("idx")
        m.flag("uni")
        m.done()
        name = str(self.item.operands[1])
        table = self.tables.get(name)
        if table is None:
            raise self.fail(f"no .branchtargets {self.item.operands[1]}", "ptx.label-unknown")
        if name not in self.jumps:
            self.jumps[name] = [self.label(Reg(target)) for target in table]
        targets = self.jumps[name]
        get = self.get(self.item.operands[0], "u32")
        return lambda st, pc: st.jump(get(st), targets, pc)

    def control_ret(self, m: Modifiers) -> Control:
        m.flag("uni")
        m.done()
        if self.item.guard is None:
            return lambda st, pc: st.exit()
        guard, negated = self.get(Reg(self.item.guard), "pred"), self.item.guard_negated

        def leave(st: State, pc: int) -> int:
            taken = guard(st)
            return st.branch(~taken if negated else taken, -1, pc + 1)

        return leave

    control_exit = control_ret

    def control_trap(self, m: Modifiers) -> Control:
        m.done()
        return lambda st, pc: st.trap(pc)

    def control_bar(self, m: Modifiers) -> Control:
        m.flag("cta")
        m.flag("aligned")
        if m.flag("warp"):
            m.choice("sync")
            m.done()
            mask = self.get(self.item.operands[0], "b32")

            def warp(st: State, pc: int) -> int:
                st.warp_sync(pc, mask(st))
                return pc + 1

            return warp
        what = m.choice("sync", "red", "arrive")
        if what == "arrive":
            raise self.unsupported("bar.arrive")
        operands = list(self.item.operands)
        reduction: tuple[str, Getter, Setter] | None = None
        if what == "red":
            operation = m.choice("popc", "and", "or")
            kind = m.kind("u32") if operation == "popc" else m.kind("pred")
            put = self.put(operands.pop(0), kind)
            reduction = (operation, self.get(operands.pop(), "pred"), put)
        m.done()
        number = self.get(operands[0], "u32") if operands else lambda st: np.uint32(0)
        count = self.get(operands[1], "u32") if len(operands) > 1 else None
        return lambda st, pc: st.barrier(pc, number(st), count(st) if count else None, reduction)

    control_barrier = control_bar


def _guarded(guard: Getter, negated: bool, run: Run) -> Run:
    """`@p`: run on the lanes where p holds."""

    def guarded(st: State) -> None:
        hit = guard(st)
        st.only(~hit if negated else hit, run)

    return guarded


def _guarded_control(guard: Getter, negated: bool, control: Control) -> Control:
    def guarded(st: State, pc: int) -> int:
        hit = guard(st)
        return control(st, pc) if st.part(~hit if negated else hit, pc + 1) else pc + 1

    return guarded


def _get_special(name: str, dtype: np.dtype[Any]) -> Getter:
    def read(st: State) -> Value:
        value = st.special(name)
        if value.dtype is not dtype:
            value = value.astype(dtype) if dtype.itemsize != value.dtype.itemsize else floats.bits(value, dtype)
        return value if st.sel is None else st.sel.pick(value)

    return read


def _atomic_law(operation: str, kind: str) -> Callable[..., Any]:
    """(old, operand…) → new, on NumPy scalars."""
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        if operation != "add":
            raise UnsupportedError(f"atom.{operation}.{kind}", code="ptx.instruction-form")
        return ops.decode(Instruction(f"add.rn.{kind}", ())).law
    if kind == "f32" and operation == "add":
        return floats.add32
    laws: dict[str, Callable[..., Any]] = {
        "add": lambda old, b: old + b,
        "min": lambda old, b: min(old, b),
        "max": lambda old, b: max(old, b),
        "inc": lambda old, b: old.dtype.type(0) if old >= b else old + old.dtype.type(1),
        "dec": lambda old, b: b if old == 0 or old > b else old - old.dtype.type(1),
        "and": lambda old, b: old & b,
        "or": lambda old, b: old | b,
        "xor": lambda old, b: old ^ b,
        "exch": lambda old, b: b,
        "cas": lambda old, b, c: c if old == b else old,
    }
    return laws[operation]
