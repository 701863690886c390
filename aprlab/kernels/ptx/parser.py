"""PTX text → `Module`: a plain tree of variables, functions and instructions, each with its line.

The grammar is that of the PTX ISA 8.x as far as compilers and people write it for compute kernels. Nothing is
interpreted here: an instruction keeps its opcode as written, and `program.py` asks whether it is known. What does not
parse raises `FormatError` with the line.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aprlab.errors import FormatError, UnsupportedError

# ---- limits: what no kernel needs, and what a few bytes of text could ask for ----------------------------------------

MOST_REGISTERS = 200_000  # declared in one file
MOST_DATA = 64 << 20  # bytes of all variables of one file
MOST_DIGITS = 64  # of one number
MOST_BITS = 128  # of a constant expression's value
MOST_ALIGN = 1 << 16

# ---- operands ----------------------------------------


@dataclass(frozen=True)
class Reg:
    """A register, special register (`%tid.x`), variable, label or function name: the program builder distinguishes
    them.
    """

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Imm:
    """A constant. `bits` is the float width (32 or 64) when it was written as a float, 0 for an integer; `pattern`
    the float's bits, because a NaN's payload does not survive Python's float.
    """

    value: int | float
    bits: int = 0
    pattern: int = 0

    def __str__(self) -> str:
        if self.bits:
            return f"0f{self.pattern:08X}" if self.bits == 32 else f"0d{self.pattern:016X}"
        return str(self.value)


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; base None is an absolute address."""

    base: str | None
    offset: int

    def __str__(self) -> str:
        return f"[{self.base}{self.offset:+d}]" if self.base and self.offset else f"[{self.base or self.offset}]"


@dataclass(frozen=True)
class VectorOperand:
    """`{a, b, …}`."""

    items: tuple[Operand, ...]

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.items)) + "}"


@dataclass(frozen=True)
class ValueAndPredicate:
    """`d|p`: a value and a predicate result."""

    first: Operand
    second: Operand

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


@dataclass(frozen=True)
class Not:
    """`!p`."""

    item: Operand

    def __str__(self) -> str:
        return f"!{self.item}"


@dataclass(frozen=True)
class Group:
    """`(a, b)`: the argument lists of a call."""

    items: tuple[Operand, ...]

    def __str__(self) -> str:
        return "(" + ", ".join(map(str, self.items)) + ")"


Operand = Reg | Imm | Address | VectorOperand | ValueAndPredicate | Not | Group

# ---- statements ----------------------------------------


@dataclass(frozen=True)
class Location:
    """A source line as `.loc` gives it; `inlined_at` is the call site when the compiler inlined a function here."""

    file: str
    line: int
    column: int = 0
    inlined_at: Location | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Instruction:
    """One instruction as written: `opcode` with all its modifiers, the guard predicate, the operands, the PTX line.

    `shown` is how it reads where the program builder has put something else in its place.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    guard_negated: bool = False
    line: int = 0
    loc: Location | None = None
    shown: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        if self.shown:
            return self.shown
        guard = f"@{'!' if self.guard_negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(map(str, self.operands))}".rstrip()


@dataclass(frozen=True)
class Label:
    name: str
    line: int = 0


@dataclass(frozen=True)
class BranchTargets:
    """`name: .branchtargets a, b, …;` – the table of a `brx.idx`."""

    name: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Variable:
    """A declared variable of one state space.

    `data` holds the initial bytes (None: not initialised), `pointers` the places in it where another variable's
    address belongs: byte offset → (name, addend).
    """

    space: str
    name: str
    type: str
    align: int
    nbytes: int
    data: bytes | None = None
    pointers: dict[int, tuple[str, int]] = field(default_factory=dict)
    extern: bool = False
    count: int | None = None  # elements of an array, None for a scalar, 0 for `[]`
    line: int = 0


@dataclass
class Function:
    """An `.entry` or `.func`: its parameters in order, its registers (name → type), variables, and body."""

    name: str
    entry: bool
    params: list[Variable]
    returns: list[Variable] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | Label | BranchTargets] = field(default_factory=list)
    defined: bool = False
    line: int = 0


@dataclass
class Module:
    """One PTX file."""

    version: str = ""
    target: str = ""
    address_size: int = 64
    files: dict[int, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    text: str = ""

    @property
    def entries(self) -> dict[str, Function]:
        """The kernels, by name, in the order of the file."""
        return {name: function for name, function in self.functions.items() if function.entry and function.defined}

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


# ---- types ----------------------------------------

TYPE_BYTES = {
    "pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16,
}  # fmt: skip
_SPACES = ("reg", "sreg", "const", "global", "local", "param", "shared", "tex")
_LINKAGE = (".visible", ".extern", ".weak", ".common", ".hidden")

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\f\v]+|//[^\n]*|/\*.*?\*/)
      |(?P<open>/\*)
      |(?P<newline>\n)
      |(?P<string>"[^"\n]*")
      |(?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
      |(?P<int>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)
      |(?P<name>\.\w+(?:::\w+)?|[%A-Za-z_$](?:[\w$.%]|::)*)
      |(?P<punct>[-+*/<>=!@|,;:()\[\]{}~&^?])""",
    re.VERBOSE | re.DOTALL,
)
_ENDS = (",", ";", "]", "}", ")")
_FILE = re.compile(r'^[ \t]*\.file[ \t]+(\d{1,9})[ \t]+"([^"\n]*)"', re.MULTILINE)  # [ \t]: \s would try every blank line again


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def _tokens(text: str) -> list[_Token]:
    out, position, line = [], 0, 1
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup, match.group()
        if match.start() != position:
            break
        if kind == "open":  # found once, or every later "/*" would look for its end again
            raise FormatError(f"PTX line {line}: a comment is never closed", code="ptx.comment-open")
        position = match.end()
        if kind == "newline":
            line += 1
        elif kind == "skip":
            if word[0] == "/":
                line += word.count("\n")
        else:
            out.append(_Token(str(kind), word, line))
    if position < len(text):
        raise FormatError(f"PTX line {line}: cannot read {text[position : position + 20]!r}", code="ptx.token")
    out.append(_Token("end", "", line))
    return out


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.at = 0
        self.module = Module(text=text)
        for match in _FILE.finditer(text):  # compilers write the .file table behind its first use
            self.module.files[int(match[1])] = match[2]
        self.loc: Location | None = None
        self.scopes: list[dict[str, str]] = []
        self.renames = self.declared = self.data_bytes = 0

    # -- token level

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def fail(self, message: str, code: str = "ptx.syntax") -> FormatError:
        return FormatError(f"PTX line {self.token.line}: {message}", code=code)

    def unsupported(self, message: str, code: str, line: int = 0) -> UnsupportedError:
        return UnsupportedError(f"PTX line {line or self.token.line}: {message}", code=code)

    def next(self) -> _Token:
        token = self.token
        if token.kind == "end":
            raise self.fail("the text ends too early", "ptx.truncated")
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        token = self.tokens[self.at]
        if token.text == text and token.kind != "string":
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.fail(f"expected {text!r}, found {self.token.text!r}")

    def name(self) -> str:
        if self.token.kind != "name":
            raise self.fail(f"expected a name, found {self.token.text!r}")
        return self.next().text

    def integer(self) -> int:
        value = self.expression()
        if not isinstance(value.value, int):
            raise self.fail("expected an integer")
        return value.value

    # -- constants: unary and binary + - * over integers and floats, which is all that is met in the wild

    def expression(self) -> Imm:
        token = self.tokens[self.at]
        if token.kind == "int" and self.tokens[self.at + 1].text in _ENDS:  # nearly always
            self.at += 1
            return Imm(_integer(token.text))
        left = self.term()
        while self.token.text in ("+", "-"):
            sign = self.next().text
            right = self.term()
            left = _constant(left.value + right.value if sign == "+" else left.value - right.value)
        return left

    def term(self) -> Imm:
        left = self.factor()
        while self.accept("*"):
            right = self.factor()
            left = _constant(left.value * right.value)
        return left

    def factor(self) -> Imm:
        token = self.next()
        if token.text == "-":
            inner = self.factor()
            return Imm(-inner.value, inner.bits, inner.pattern ^ (1 << inner.bits >> 1))
        if token.text == "+":
            return self.factor()
        if token.text == "~":
            inner = self.factor()
            return Imm(~int(inner.value))
        if token.text == "(":
            inner = self.expression()
            self.expect(")")
            return inner
        if token.kind == "int":
            return Imm(_integer(token.text))
        if token.kind == "float":
            return _float(token.text)
        if token.text == "WARP_SZ":
            return Imm(32)
        self.at -= 1
        raise self.fail(f"expected a constant, found {token.text!r}")

    # -- module level

    def parse(self) -> Module:
        while self.token.kind != "end":
            self.module_statement()
        if not self.module.version:
            raise FormatError("no .version directive: this is not PTX", code="ptx.version-missing")
        return self.module

    def module_statement(self) -> None:
        word = self.token.text
        if word == ".version":
            self.next()
            self.module.version = self.next().text
        elif word == ".target":
            self.next()
            names = [self.name()]
            while self.accept(","):
                names.append(self.name())
            self.module.target = ",".join(names)
        elif word == ".address_size":
            self.next()
            self.module.address_size = self.integer()
            if self.module.address_size != 64:
                found = self.module.address_size
                raise UnsupportedError(f"PTX with .address_size {found}; only 64 is handled", code="ptx.address-size")
        elif word in (".file", ".loc", ".pragma", ".section"):
            self.debug_statement()
        elif word == ";":
            self.next()
        else:
            self.declaration()

    def debug_statement(self) -> None:
        """`.file`, `.loc`, `.pragma` and `.section`, which carry no semantics; the first two feed `Instruction.loc`."""
        word, line = self.next().text, self.token.line
        if word == ".file":
            number = self.integer()
            self.module.files[number] = self.next().text.strip('"')
            while self.accept(","):
                self.integer()
        elif word == ".loc":
            self.loc = self.location()
            if self.accept(","):
                inlined = None
                while True:
                    item = self.name()
                    if item == "function_name":
                        self.name()
                        if self.accept("+"):
                            self.integer()
                    elif item == "inlined_at":
                        inlined = self.location()
                    else:
                        raise self.fail(f"unknown .loc attribute {item!r}")
                    if not self.accept(","):
                        break
                self.loc = replace(self.loc, inlined_at=inlined)
        elif word == ".pragma":
            while not self.accept(";"):
                self.next()
        else:  # .section name { … }
            self.name()
            self.expect("{")
            depth = 1
            while depth:
                token = self.next()
                depth += (token.text == "{") - (token.text == "}")
                if token.kind == "end":
                    raise FormatError(f"PTX line {line}: .section is never closed", code="ptx.truncated")

    def location(self) -> Location:
        words = [self.next() for _ in range(3)]
        if any(word.kind != "int" for word in words):
            raise self.fail("expected file, line and column")
        if any(len(word.text) > MOST_DIGITS for word in words):
            raise self.fail("a number too long for a location", "ptx.constant")
        number, line, column = (int(word.text) for word in words)
        return Location(self.module.files.get(number, f"file {number}"), line, column)

    def declaration(self) -> None:
        """A module-level variable or function."""
        linkage = set()
        while self.token.text in _LINKAGE:
            linkage.add(self.next().text)
        word = self.token.text
        if word in (".entry", ".func"):
            self.next()
            self.function(word == ".entry")
        elif word.lstrip(".") in _SPACES:
            for variable in self.variable(extern=".extern" in linkage):
                self.module.variables[variable.name] = variable
            self.expect(";")
        else:
            raise self.fail(f"unknown directive or statement {word!r}")

    # -- variables

    def variable(self, extern: bool = False, parameter: bool = False) -> list[Variable]:
        """`.space [.align N] [.vK] .type name[dims] [= init] {, name …}`; registers are not variables."""
        line = self.token.line
        space = self.name().lstrip(".").split("::")[0]
        align, vector, kind = 0, 1, ""
        while self.token.kind == "name" and self.token.text.startswith("."):
            word = self.next().text[1:]
            if word == "align":
                align = self.alignment()
            elif word in ("v2", "v4", "v8"):
                vector = int(word[1:])
            elif word == "ptr":
                while self.token.text in (".const", ".global", ".local", ".shared", ".align"):
                    if self.next().text == ".align":
                        self.integer()
            elif word == "attribute":
                self.expect("(")
                while not self.accept(")"):
                    self.next()
            elif word in TYPE_BYTES:
                kind = word
            else:
                raise self.unsupported(f"variable type or attribute .{word}", "ptx.variable-type", line)
        if not kind:
            raise self.fail("a variable without a type")
        out = []
        while True:
            name = self.name()
            count: int | None = None
            if self.accept("<"):
                raise self.fail("parameterised names are for registers")
            while self.accept("["):
                size = 0 if self.token.text == "]" else self.integer()
                count = size if count is None else count * size
                self.expect("]")
            element = TYPE_BYTES[kind] * vector
            data: bytes | None = None
            pointers: dict[int, tuple[str, int]] = {}
            if not parameter and self.accept("="):
                data, pointers = self.initialiser(kind)
                if count == 0:
                    count = len(data) // element
            nbytes = element * (1 if count is None else count)
            self.reserve(name, nbytes)
            if data is not None:
                data = data.ljust(nbytes, b"\0")
            out.append(Variable(space, name, kind, align or element, nbytes, data, pointers, extern, count, line))
            if parameter or not self.accept(","):
                return out

    def alignment(self) -> int:
        align = self.integer()
        if not 1 <= align <= MOST_ALIGN or align & (align - 1):
            raise self.fail(f"an alignment of {align}; a power of two up to {MOST_ALIGN} is one", "ptx.alignment")
        return align

    def reserve(self, name: str, nbytes: int) -> None:
        """Count a variable's bytes before they are made."""
        if nbytes < 0:
            raise self.fail(f"{name!r} has {nbytes} bytes", "ptx.variable-size")
        self.data_bytes += nbytes
        if self.data_bytes > MOST_DATA:
            said = f"the variables up to {name!r} need {self.data_bytes} bytes; at most {MOST_DATA} are taken"
            raise self.unsupported(said, "ptx.variables-limit")

    def initialiser(self, kind: str) -> tuple[bytes, dict[int, tuple[str, int]]]:
        data = bytearray()
        pointers: dict[int, tuple[str, int]] = {}

        def put() -> None:
            if self.accept("{"):
                while not self.accept("}"):
                    put()
                    self.accept(",")
                return
            if self.token.kind == "name" and self.token.text != "WARP_SZ":
                symbol = self.name()
                if symbol == "generic":
                    self.expect("(")
                    symbol = self.name()
                    self.expect(")")
                addend = 0
                if self.token.text in ("+", "-"):
                    sign = -1 if self.next().text == "-" else 1
                    addend = sign * self.integer()
                if TYPE_BYTES[kind] != 8:
                    raise self.fail(f"the address of {symbol} does not fit into .{kind}")
                pointers[len(data)] = (symbol, addend)
                data.extend(bytes(8))
                return
            data.extend(constant_bytes(self.expression(), kind))

        put()
        return bytes(data), pointers

    # -- functions

    def parameters(self) -> list[Variable]:
        out: list[Variable] = []
        self.expect("(")
        while not self.accept(")"):
            if self.token.text == ".reg":
                self.next()
                kind = self.name().lstrip(".")
                if kind not in TYPE_BYTES:
                    raise self.unsupported(f"parameter register of type .{kind}", "ptx.register-type")
                name = self.name()
                out.append(Variable("reg", name, kind, 0, TYPE_BYTES[kind]))
            else:
                out += self.variable(parameter=True)
            self.accept(",")
        return out

    def function(self, entry: bool) -> None:
        line = self.token.line
        returns: list[Variable] = []
        if not entry and self.token.text == "(":
            returns = self.parameters()
        name = self.name()
        params = self.parameters() if self.token.text == "(" else []
        function = Function(name, entry, params, returns, line=line)
        while self.token.text not in ("{", ";"):
            word = self.next().text
            if not word.startswith("."):
                raise self.fail(f"unexpected {word!r} after the parameters of {name}")
            values: list[int] = []
            if word == ".pragma":
                self.next()
            elif word == ".attribute":
                while not self.accept(")"):
                    self.next()
            elif self.token.kind == "int":
                values.append(self.integer())
                while self.accept(","):
                    values.append(self.integer())
            function.directives[word[1:]] = tuple(values)
        if self.accept(";"):
            self.module.functions.setdefault(name, function)
            return
        self.loc = None
        function.defined = True
        self.module.functions[name] = function
        for variable in (*params, *returns):
            if variable.space == "reg":
                function.registers[variable.name] = variable.type
        self.expect("{")
        self.scopes = [{}]
        while not self.accept("}"):
            self.statement(function)
        self.scopes = []

    def declare(self, name: str, function: Function) -> str:
        """The unique name of a variable of the current scope; an inner scope may reuse an outer one's name."""
        taken = name in function.registers or name in function.variables
        if taken:
            self.renames += 1
        unique = f"{name}@{self.renames}" if taken else name
        self.scopes[-1][name] = unique
        return unique

    def lookup(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def statement(self, function: Function) -> None:
        token = self.token
        if token.kind == "end":
            raise self.fail(f"the body of {function.name} is never closed")
        if token.text == "{":
            self.next()
            self.scopes.append({})
            while not self.accept("}"):
                self.statement(function)
            self.scopes.pop()
        elif token.text in (".loc", ".file", ".pragma", ".section"):
            self.debug_statement()
        elif token.text == ";":
            self.next()
        elif token.text == ".reg":
            self.registers(function)
        elif token.text.lstrip(".").split("::")[0] in _SPACES and token.text.startswith("."):
            for variable in self.variable():
                unique = self.declare(variable.name, function)
                function.variables[unique] = replace(variable, name=unique)
            self.expect(";")
        elif token.text == "@":
            self.instruction(function)
        elif token.kind == "name" and self.tokens[self.at + 1].text == ":":
            name = self.name()
            self.next()
            if self.token.text == ".branchtargets":
                self.next()
                targets = [self.name()]
                while self.accept(","):
                    targets.append(self.name())
                self.expect(";")
                function.body.append(BranchTargets(name, tuple(targets)))
            elif self.token.text in (".callprototype", ".calltargets"):
                raise self.unsupported(f"indirect call ({self.token.text})", "ptx.indirect-call", token.line)
            else:
                function.body.append(Label(name, token.line))
        elif token.kind == "name" and not token.text.startswith((".", "%")):
            self.instruction(function)
        else:
            raise self.fail(f"unexpected {token.text!r}")

    def registers(self, function: Function) -> None:
        self.next()
        kind = self.name().lstrip(".")
        if kind in ("v2", "v4"):
            raise self.unsupported(f"vector registers (.reg .{kind})", "ptx.register-type")
        if kind not in TYPE_BYTES:
            raise self.unsupported(f"register type .{kind}", "ptx.register-type")
        while True:
            name = self.name()
            if self.accept("<"):
                count = self.integer()
                self.expect(">")
                self.count_registers(count)
                for i in range(count):
                    function.registers[self.declare(f"{name}{i}", function)] = kind
            else:
                self.count_registers(1)
                function.registers[self.declare(name, function)] = kind
            if not self.accept(","):
                break
        self.expect(";")

    def count_registers(self, more: int) -> None:
        """Count registers before they are made."""
        if more < 0:
            raise self.fail(f"{more} registers", "ptx.register-count")
        self.declared += more
        if self.declared > MOST_REGISTERS:
            said = f"{self.declared} registers are declared up to here; at most {MOST_REGISTERS} are taken"
            raise self.unsupported(said, "ptx.registers-limit")

    # -- instructions

    def instruction(self, function: Function) -> None:
        line, guard, negated = self.token.line, None, False
        if self.accept("@"):
            negated = self.accept("!")
            guard = self.lookup(self.name())
        opcode = self.name()
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self.operand())
            if not self.accept(",") and self.token.text != ";":
                raise self.fail(f"expected ',' or ';' after an operand of {opcode}, found {self.token.text!r}")
        function.body.append(Instruction(opcode, tuple(operands), guard, negated, line, self.loc))

    def operand(self) -> Operand:
        first = self.simple_operand()
        if self.accept("|"):
            return ValueAndPredicate(first, self.simple_operand())
        return first

    def simple_operand(self) -> Operand:
        token = self.token
        if token.text == "[":
            self.next()
            address = self.address()
            self.expect("]")
            return address
        if token.text == "{":
            self.next()
            items = []
            while not self.accept("}"):
                items.append(self.operand())
                self.accept(",")
            return VectorOperand(tuple(items))
        if token.text == "(" and self.tokens[self.at + 1].kind == "name":
            self.next()
            items = []
            while not self.accept(")"):
                items.append(self.operand())
                self.accept(",")
            return Group(tuple(items))
        if token.text == "(" and self.tokens[self.at + 1].text == ")":
            self.at += 2
            return Group(())
        if token.text == "!":
            self.next()
            return Not(self.simple_operand())
        if token.kind == "name" and token.text != "WARP_SZ":
            name = self.lookup(self.name())
            if self.token.text in ("+", "-") and not name.startswith("%"):  # symbol + constant as a value
                sign = -1 if self.next().text == "-" else 1
                return Address(name, sign * self.integer())
            return Reg(name)
        return self.expression()

    def address(self) -> Address:
        if self.token.kind != "name":
            return Address(None, self.integer())
        base, offset = self.lookup(self.name()), 0
        while self.token.text in ("+", "-"):
            sign = -1 if self.next().text == "-" else 1
            value = self.factor().value
            offset += sign * int(value)
        return Address(base, offset)


def _integer(text: str) -> int:
    digits = text.rstrip("U")
    if len(digits) > MOST_DIGITS + 2:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits, 8 if len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567" else 0)


def _constant(value: int | float) -> Imm:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError(f"a constant of {value.bit_length()} bits")
    return Imm(value) if isinstance(value, int) else Imm(value, 64, int.from_bytes(struct.pack("<d", value), "little"))


def _float(text: str) -> Imm:
    if text[1] in "fFdD":
        single, pattern = text[1] in "fF", bytes.fromhex(text[2:])
        return Imm(struct.unpack(">f" if single else ">d", pattern)[0], 32 if single else 64, int(text[2:], 16))
    return _constant(float(text))


def constant_bytes(value: Imm, kind: str) -> bytes:
    """Little-endian bytes of one constant of PTX type `kind`; integers wrap, as ptxas lets them."""
    size = TYPE_BYTES[kind]
    if value.bits == 8 * size:
        return value.pattern.to_bytes(size, "little")
    if kind in ("f32", "f64") or value.bits:
        if size not in (4, 8):
            raise FormatError(f"a float constant does not fit into .{kind}", code="ptx.constant")
        return struct.pack("<f" if size == 4 else "<d", value.value)
    return (int(value.value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def parse(text: str) -> Module:
    """The module in `text`. Raises `FormatError` with the PTX line where it breaks the grammar, `UnsupportedError` by
    name.
    """
    parser = _Parser(text)
    try:
        return parser.parse()
    except (ValueError, ArithmeticError, IndexError) as error:  # a number such as 09, 1/0, a constant that is no number
        raise parser.fail(f"cannot read this ({error})", "ptx.constant") from error
    except RecursionError:
        raise parser.fail("nested too deeply", "ptx.nesting") from None
