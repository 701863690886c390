"""Every arithmetic opcode against plain Python integers or exact fractions, over random operands and every edge."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from aprlab.errors import UnsupportedError
from aprlab.kernels.ptx import Machine, ops, parse

from .harness import FORMATS, HEADER, execute, ints, is_nan, operands, round_to, to_fraction, wrap

N = 960
INTS = ["u16", "s16", "u32", "s32", "u64", "s64"]


def rng_for(text: str) -> np.random.Generator:
    return np.random.default_rng(list(text.encode()))


def check_ints(
    opcode: str, kinds: list[str], result: str, law: Callable[..., int], text: str | None = None, small: tuple[int, ...] = ()
) -> None:
    """Run over N operands and compare with `law` on Python ints; `small` are the sources kept below 256."""
    rng = rng_for(opcode)
    values = [operands(kind, N, rng) for kind in kinds]
    for i in small:
        values[i] = (values[i].view(np.dtype(f"u{values[i].dtype.itemsize}")) % 256).astype(values[i].dtype)
    register = {k: k if k != "pred" else "pred" for k in kinds}
    text = text or f"{opcode} {{d0}}, " + ", ".join(f"{{a{i}}}" for i in range(len(kinds)))
    (got,) = execute(text, [(register[k], v) for k, v in zip(kinds, values, strict=True)], [result])
    rows = zip(*[ints(v, k) for k, v in zip(kinds, values, strict=True)], strict=True)
    want = [wrap(law(*row), result) for row in rows]
    raw = got.view(np.dtype(f"u{got.dtype.itemsize}")).tolist()
    bad = [i for i in range(N) if raw[i] != want[i]]
    assert not bad, (
        f"{opcode}: {len(bad)} of {N} wrong, first {[v[bad[0]] for v in values]}: {raw[bad[0]]:#x}, not {want[bad[0]]:#x}"
    )


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def width(kind: str) -> int:
    return int(kind[1:])


@pytest.mark.parametrize("kind", INTS)
def test_integer_arithmetic(kind: str) -> None:
    bits = width(kind)
    check_ints(f"add.{kind}", [kind, kind], kind, lambda a, b: a + b)
    check_ints(f"sub.{kind}", [kind, kind], kind, lambda a, b: a - b)
    check_ints(f"mul.lo.{kind}", [kind, kind], kind, lambda a, b: a * b)
    check_ints(f"mul.hi.{kind}", [kind, kind], kind, lambda a, b: a * b >> bits)
    check_ints(f"mad.lo.{kind}", [kind] * 3, kind, lambda a, b, c: a * b + c)
    check_ints(f"mad.hi.{kind}", [kind] * 3, kind, lambda a, b, c: (a * b >> bits) + c)
    check_ints(f"div.{kind}", [kind, kind], kind, quotient)
    check_ints(f"rem.{kind}", [kind, kind], kind, lambda a, b: a - quotient(a, b) * b if b else a)
    check_ints(f"min.{kind}", [kind, kind], kind, min)
    check_ints(f"max.{kind}", [kind, kind], kind, max)
    check_ints(f"sad.{kind}", [kind] * 3, kind, lambda a, b, c: c + abs(a - b))
    if kind[0] == "s":
        check_ints(f"abs.{kind}", [kind], kind, abs)
        check_ints(f"neg.{kind}", [kind], kind, lambda a: -a)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        check_ints(f"mul.wide.{kind}", [kind, kind], wide, lambda a, b: a * b)
        check_ints(f"mad.wide.{kind}", [kind, kind, wide], wide, lambda a, b, c: a * b + c)


def test_saturating_and_24_bit_arithmetic() -> None:
    def clamp(v: int) -> int:
        return max(-(2**31), min(2**31 - 1, v))

    def low24(v: int, signed: bool) -> int:
        v &= 0xFFFFFF
        return v - (1 << 24) if signed and v >> 23 else v

    check_ints("add.sat.s32", ["s32", "s32"], "s32", lambda a, b: clamp(a + b))
    check_ints("sub.sat.s32", ["s32", "s32"], "s32", lambda a, b: clamp(a - b))
    check_ints("mad.hi.sat.s32", ["s32"] * 3, "s32", lambda a, b, c: clamp((a * b >> 32) + c))
    for kind in ("u32", "s32"):
        s = kind == "s32"
        check_ints(f"mul24.lo.{kind}", [kind, kind], kind, lambda a, b, s=s: low24(a, s) * low24(b, s))
        check_ints(f"mul24.hi.{kind}", [kind, kind], kind, lambda a, b, s=s: low24(a, s) * low24(b, s) >> 16)
        check_ints(f"mad24.lo.{kind}", [kind] * 3, kind, lambda a, b, c, s=s: low24(a, s) * low24(b, s) + c)


@pytest.mark.parametrize(("kind", "law"), [("u32", 32), ("u64", 64)])
def test_carries_make_wide_arithmetic(kind: str, law: int) -> None:
    """add.cc/addc, sub.cc/subc and mad.lo.cc/madc.hi as a compiler chains them: twice the width."""
    rng = rng_for(kind)
    a, b, c, d = (operands(kind, N, rng) for _ in range(4))
    sources = [(kind, v) for v in (a, b, c, d)]
    rows = list(zip(*[ints(v, kind) for v in (a, b, c, d)], strict=True))
    mask = (1 << law) - 1
    low, high = execute(f"add.cc.{kind} {{d0}}, {{a0}}, {{a2}}; addc.{kind} {{d1}}, {{a1}}, {{a3}}", sources, [kind, kind])
    want = [((r[0] | r[1] << law) + (r[2] | r[3] << law)) for r in rows]
    assert low.tolist() == [w & mask for w in want]
    assert high.tolist() == [w >> law & mask for w in want]
    low, high = execute(f"sub.cc.{kind} {{d0}}, {{a0}}, {{a2}}; subc.{kind} {{d1}}, {{a1}}, {{a3}}", sources, [kind, kind])
    want = [((r[0] | r[1] << law) - (r[2] | r[3] << law)) for r in rows]
    assert low.tolist() == [w & mask for w in want]
    assert high.tolist() == [w >> law & mask for w in want]
    low, high = execute(
        f"mad.lo.cc.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}}; madc.hi.{kind} {{d1}}, {{a0}}, {{a1}}, {{a3}}", sources, [kind, kind]
    )
    want = [r[0] * r[1] + (r[2] | r[3] << law) for r in rows]
    assert low.tolist() == [w & mask for w in want]
    assert high.tolist() == [w >> law & mask for w in want]
    _, flag = execute(f"sub.cc.{kind} {{d0}}, {{a0}}, {{a2}}; addc.{kind} {{d1}}, 0, 0", sources, [kind, kind])
    assert flag.tolist() == [int(r[0] >= r[2]) for r in rows]  # what a GPU's flag holds: no borrow
    chain = f"add.cc.{kind} {{d0}}, {{a0}}, {{a1}}; addc.cc.{kind} {{d0}}, {{a2}}, {{a3}}; addc.{kind} {{d1}}, 0, 0"
    _, carry = execute(chain, sources, [kind, kind])
    assert carry.tolist() == [(r[2] + r[3] + (r[0] + r[1] >> law)) >> law for r in rows]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic_and_shifts(kind: str) -> None:
    bits = width(kind)
    unsigned, signed = f"u{bits}", f"s{bits}"
    check_ints(f"and.{kind}", [unsigned] * 2, unsigned, lambda a, b: a & b)
    check_ints(f"or.{kind}", [unsigned] * 2, unsigned, lambda a, b: a | b)
    check_ints(f"xor.{kind}", [unsigned] * 2, unsigned, lambda a, b: a ^ b)
    check_ints(f"not.{kind}", [unsigned], unsigned, lambda a: ~a)
    check_ints(f"cnot.{kind}", [unsigned], unsigned, lambda a: int(a == 0))
    check_ints(f"shl.{kind}", [unsigned, "u32"], unsigned, lambda a, b: a << b if b < bits else 0)
    check_ints(f"shr.u{bits}", [unsigned, "u32"], unsigned, lambda a, b: a >> min(b, bits))
    check_ints(f"shr.s{bits}", [signed, "u32"], signed, lambda a, b: a >> min(b, bits))
    for n in (0, 1, 15, 31, 40, 63, 64):
        check_ints(f"shl.{kind}", [unsigned], unsigned, lambda a, n=n: a << n, f"shl.{kind} {{d0}}, {{a0}}, {n}")
        check_ints(f"shr.s{bits}", [signed], signed, lambda a, n=n: a >> n, f"shr.s{bits} {{d0}}, {{a0}}, {n}")
        check_ints(f"shr.b{bits}", [unsigned], unsigned, lambda a, n=n: a >> n, f"shr.b{bits} {{d0}}, {{a0}}, {n}")


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits: int) -> None:
    b, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    check_ints(f"popc.{b}", [u], "u32", lambda a: a.bit_count())
    check_ints(f"clz.{b}", [u], "u32", lambda a: bits - a.bit_length())
    check_ints(f"brev.{b}", [u], u, lambda a: int(f"{a:0{bits}b}"[::-1], 2))
    check_ints(f"bfind.{u}", [u], "u32", lambda a: a.bit_length() - 1)
    check_ints(f"bfind.{s}", [s], "u32", lambda a: (~a if a < 0 else a).bit_length() - 1)
    check_ints(f"bfind.shiftamt.{u}", [u], "u32", lambda a: bits - a.bit_length() if a else -1)

    def extract(a: int, position: int, length: int) -> int:
        """The ISA's own pseudocode, bit by bit."""
        position, length = position & 255, length & 255
        top = min(position + length - 1, bits - 1)
        sign = 0 if length == 0 or (a >= 0 and not a >> top & 1) else a >> top & 1
        signed_kind = a < 0 or sign_matters
        fill = sign if signed_kind else 0
        out = 0
        for i in range(bits):
            bit = (a >> (position + i)) & 1 if i < length and position + i < bits else fill
            out |= bit << i
        return out

    sign_matters = False
    check_ints(f"bfe.{u}", [u, "u32", "u32"], u, extract, small=(1, 2))
    sign_matters = True
    check_ints(f"bfe.{s}", [s, "u32", "u32"], s, lambda a, p, n: extract(a & (1 << bits) - 1, p, n), small=(1, 2))

    def insert(a: int, b: int, position: int, length: int) -> int:
        for i in range(length & 255):
            if (position & 255) + i < bits:
                at = (position & 255) + i
                b = b & ~(1 << at) | (a >> i & 1) << at
        return b

    check_ints(f"bfi.{b}", [u, u, "u32", "u32"], u, insert, small=(2, 3))


def test_lop3_is_its_table() -> None:
    for table in (0x00, 0xFF, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B, 0x6C, 0x35):

        def law(a: int, b: int, c: int, table: int = table) -> int:
            return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

        check_ints("lop3.b32", ["u32"] * 3, "u32", law, f"lop3.b32 {{d0}}, {{a0}}, {{a1}}, {{a2}}, {table}")


def test_prmt_and_funnel_shifts() -> None:
    def byte(pool: int, selector: int) -> int:
        value = pool >> 8 * (selector & 7) & 255
        return (255 if value >> 7 else 0) if selector & 8 else value

    def permute(a: int, b: int, c: int) -> int:
        return sum(byte(b << 32 | a, c >> 4 * i) << 8 * i for i in range(4))

    check_ints("prmt.b32", ["u32"] * 3, "u32", permute)
    for code in (0x3210, 0x4321, 0x0040, 0x7531, 0x9999, 0xBA98, 0x5410, 0x7632, 0x0CDE):
        check_ints(
            "prmt.b32", ["u32"] * 2, "u32", lambda a, b, c=code: permute(a, b, c), f"prmt.b32 {{d0}}, {{a0}}, {{a1}}, {code}"
        )
    modes = {
        "f4e": lambda c, i: c + i, "b4e": lambda c, i: c - i, "rc8": lambda c, i: c,
        "ecl": lambda c, i: max(c, i), "ecr": lambda c, i: min(c, i), "rc16": lambda c, i: (c & 1) * 2 + (i & 1),
    }  # fmt: skip
    for mode, source in modes.items():

        def law(a: int, b: int, c: int, source: Callable[[int, int], int] = source) -> int:
            return sum(byte(b << 32 | a, source(c & 3, i) & 7) << 8 * i for i in range(4))

        check_ints(f"prmt.b32.{mode}", ["u32"] * 3, "u32", law)
    for mode in ("wrap", "clamp"):

        def count(c: int, mode: str = mode) -> int:
            return min(c, 32) if mode == "clamp" else c & 31

        check_ints(f"shf.l.{mode}.b32", ["u32"] * 3, "u32", lambda a, b, c, k=count: ((b << 32 | a) << k(c)) >> 32)
        check_ints(f"shf.r.{mode}.b32", ["u32"] * 3, "u32", lambda a, b, c, k=count: (b << 32 | a) >> k(c))


@pytest.mark.parametrize("first", ["u32", "s32"])
@pytest.mark.parametrize("second", ["u32", "s32"])
def test_dot_products(first: str, second: str) -> None:
    def part(v: int, i: int, bits: int, signed: bool) -> int:
        v = v >> bits * i & (1 << bits) - 1
        return v - (1 << bits) if signed and v >> (bits - 1) else v

    s, t = first == "s32", second == "s32"
    check_ints(
        f"dp4a.{first}.{second}",
        ["u32"] * 3,
        "u32",
        lambda a, b, c: c + sum(part(a, i, 8, s) * part(b, i, 8, t) for i in range(4)),
    )
    for half, at in (("lo", 0), ("hi", 2)):
        check_ints(
            f"dp2a.{half}.{first}.{second}",
            ["u32"] * 3,
            "u32",
            lambda a, b, c, at=at: c + sum(part(a, i, 16, s) * part(b, at + i, 8, t) for i in range(2)),
        )


# ---- floats ----------------------------------------


def check_floats(
    opcode: str,
    kind: str,
    arity: int,
    mode: str,
    law: Callable[..., Fraction | None],
    zero: Callable[..., int] | None = None,
    n: int = N,
) -> None:
    """Compare with the exact value rounded once. `law` returns None where the result is not a finite number ≠ 0;
    there NumPy's float64 arithmetic says what IEEE wants, through `zero`.
    """
    rng = rng_for(opcode)
    values = [operands(kind, n, rng) for _ in range(arity)]
    (got,) = execute(f"{opcode} {{d0}}, " + ", ".join(f"{{a{i}}}" for i in range(arity)), [(kind, v) for v in values], [kind])
    size = got.dtype.itemsize
    got_bits = got.view(np.dtype(f"u{size}")).tolist()
    patterns = [v.view(np.dtype(f"u{size}")).tolist() for v in values]
    exact = 0
    for i, row in enumerate(zip(*patterns, strict=True)):
        terms = [to_fraction(p, kind) for p in row]
        if any(isinstance(t, str) for t in terms):
            continue
        want = law(*terms)
        if want is None or want == 0:
            continue
        exact += 1
        bits = round_to(want, kind, mode)
        assert got_bits[i] == bits, f"{opcode} {[hex(p) for p in row]}: {got_bits[i]:#x}, not {bits:#x}"
    assert exact > n // 3


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_arithmetic_rounds_once(kind: str, mode: str) -> None:
    n = N if kind == "f32" else 192
    check_floats(f"add.{mode}.{kind}", kind, 2, mode, lambda a, b: a + b, n=n)
    check_floats(f"sub.{mode}.{kind}", kind, 2, mode, lambda a, b: a - b, n=n)
    check_floats(f"mul.{mode}.{kind}", kind, 2, mode, lambda a, b: a * b, n=n)
    check_floats(f"fma.{mode}.{kind}", kind, 3, mode, lambda a, b, c: a * b + c, n=n)
    check_floats(f"div.{mode}.{kind}", kind, 2, mode, lambda a, b: a / b if b else None, n=n)
    check_floats(f"rcp.{mode}.{kind}", kind, 1, mode, lambda a: 1 / a if a else None, n=n)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_arithmetic_rounds_once(kind: str) -> None:
    check_floats(f"add.rn.{kind}", kind, 2, "rn", lambda a, b: a + b)
    check_floats(f"sub.rn.{kind}", kind, 2, "rn", lambda a, b: a - b)
    check_floats(f"mul.rn.{kind}", kind, 2, "rn", lambda a, b: a * b)
    check_floats(f"fma.rn.{kind}", kind, 3, "rn", lambda a, b, c: a * b + c)


def test_fma_of_hard_cases() -> None:
    """Products that land on a tie of float32 and a third term far below it: where rounding twice goes wrong."""
    rng = np.random.default_rng(5)
    n = 64_000
    a = (rng.integers(1 << 23, 1 << 24, n) | 1).astype(np.float32)
    b = np.float32(1) + np.ldexp(np.float32(1), -rng.integers(1, 24, n)).astype(np.float32)
    c = (rng.choice([-1.0, 1.0], n) * np.ldexp(1.0, -rng.integers(20, 120, n))).astype(np.float32)
    (got,) = execute("fma.rn.f32 {d0}, {a0}, {a1}, {a2}", [("f32", a), ("f32", b), ("f32", c)], ["f32"])
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    differ = np.flatnonzero(got != twice)
    assert len(differ) > 100  # the set is hard: rounding twice fails on it
    for i in [*differ[:200], *range(0, n, 997)]:
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert int(got[i : i + 1].view(np.uint32)[0]) == round_to(exact, "f32", "rn")


def test_fma_with_subnormals() -> None:
    rng = np.random.default_rng(6)
    a = rng.integers(0, 1 << 24, 4096, dtype=np.uint32).view(np.float32)
    b = (rng.standard_normal(4096) * 2.0 ** rng.integers(-30, 90, 4096)).astype(np.float32)
    c = (rng.standard_normal(4096) * 2.0 ** rng.integers(-149, -100, 4096)).astype(np.float32)
    (got,) = execute("fma.rn.f32 {d0}, {a0}, {a1}, {a2}", [("f32", a), ("f32", b), ("f32", c)], ["f32"])
    for i in range(0, 4096, 3):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            assert int(got[i : i + 1].view(np.uint32)[0]) == round_to(exact, "f32", "rn")


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_special_values_follow_ieee(kind: str) -> None:
    """Zeros with their signs, infinities and NaN in rn: NumPy's own arithmetic in the same type is the reference."""
    rng = rng_for(kind)
    dtype = ops.DTYPES[kind]
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45 if kind == "f32" else 5e-324], dtype)
    a, b = (v.reshape(-1) for v in np.meshgrid(edges, edges))
    c = rng.choice(edges, 64)
    with np.errstate(all="ignore"):
        table = {f"add.{kind}": a + b, f"sub.{kind}": a - b, f"mul.{kind}": a * b, f"div.rn.{kind}": a / b}
        for opcode, want in table.items():
            (got,) = execute(f"{opcode} {{d0}}, {{a0}}, {{a1}}", [(kind, a), (kind, b)], [kind])
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want), opcode)
            sane = ~np.isnan(want)
            np.testing.assert_array_equal(got[sane].view(f"u{dtype.itemsize}"), want[sane].view(f"u{dtype.itemsize}"), opcode)
            if kind == "f32":
                assert set(got[~sane].view(np.uint32).tolist()) <= {0x7FFFFFFF}, opcode
        (got,) = execute(f"fma.rn.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}}", [(kind, a), (kind, b), (kind, c)], [kind])
        want = a * b + c
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        sane = ~np.isnan(want) & ((a * b == 0) | np.isinf(want))
        np.testing.assert_array_equal(np.signbit(got[sane]), np.signbit(want[sane]))
    (got,) = execute(
        f"add.rm.{kind} {{d0}}, {{a0}}, {{a1}}",
        [(kind, np.array([1.0, 0.0, -0.0, 0.0], dtype)), (kind, np.array([-1.0, 0.0, 0.0, -0.0], dtype))],
        [kind],
    )
    assert np.signbit(got).tolist() == [True, False, True, True]


def test_min_max_abs_neg_of_floats() -> None:
    rng = np.random.default_rng(8)
    a, b = operands("f32", N, rng), operands("f32", N, rng)
    pair = [("f32", a), ("f32", b)]
    bits = lambda v: np.asarray(v, np.float32).view(np.uint32)  # noqa: E731

    def order(v: np.ndarray) -> np.ndarray:
        size = (bits(v) & 0x7FFFFFFF).astype(np.int64)
        return np.where(bits(v) >> 31, -size - 1, size)

    for opcode, larger in (("min.f32", False), ("max.f32", True)):
        (got,) = execute(f"{opcode} {{d0}}, {{a0}}, {{a1}}", pair, ["f32"])
        first = (order(a) > order(b)) if larger else (order(a) < order(b))  # −0 below +0, as the ISA orders them
        want = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.where(first, a, b)))
        both = np.isnan(a) & np.isnan(b)
        np.testing.assert_array_equal(bits(got)[~both], bits(want)[~both])
        assert (bits(got)[both] == 0x7FFFFFFF).all()
        (got,) = execute(f"{opcode.replace('.', '.NaN.')} {{d0}}, {{a0}}, {{a1}}", pair, ["f32"])
        np.testing.assert_array_equal(np.isnan(got), np.isnan(a) | np.isnan(b))
    (got,) = execute("neg.f32 {d0}, {a0}", pair[:1], ["f32"])
    np.testing.assert_array_equal(bits(got), bits(a) ^ 0x80000000)
    (got,) = execute("abs.f32 {d0}, {a0}", pair[:1], ["f32"])
    np.testing.assert_array_equal(bits(got), bits(a) & 0x7FFFFFFF)
    (got,) = execute("copysign.f32 {d0}, {a0}, {a1}", pair, ["f32"])
    np.testing.assert_array_equal(bits(got), bits(b) & 0x7FFFFFFF | bits(a) & 0x80000000)
    (got,) = execute("abs.ftz.f32 {d0}, {a0}", pair[:1], ["f32"])
    np.testing.assert_array_equal(bits(got), np.where(bits(a) & 0x7F800000 == 0, 0, bits(a) & 0x7FFFFFFF))


def test_flush_and_saturate() -> None:
    a = np.array([2.0**-126, 2.0**-127, -(2.0**-140), 1.5, -1.5, np.nan, np.inf, 0.25], np.float32)
    one = np.ones(8, np.float32)
    (got,) = execute("mul.ftz.f32 {d0}, {a0}, {a1}", [("f32", a), ("f32", one)], ["f32"])
    assert got[:3].tolist() == [2.0**-126, 0.0, 0.0]
    assert np.signbit(got[2])
    (got,) = execute("mul.ftz.f32 {d0}, {a0}, {a1}", [("f32", a), ("f32", one / 2)], ["f32"])
    assert got[0] == 0
    (got,) = execute("mul.sat.f32 {d0}, {a0}, {a1}", [("f32", a), ("f32", one)], ["f32"])
    assert got[3:].tolist() == [1.0, 0.0, 0.0, 1.0, 0.25]
    (got,) = execute("fma.rn.ftz.sat.f32 {d0}, {a0}, {a1}, {a0}", [("f32", a), ("f32", one)], ["f32"])
    assert got[[1, 3, 4, 7]].tolist() == [0.0, 1.0, 0.0, 0.5]


def test_square_root_rounds_once() -> None:
    values = np.abs(operands("f32", N, np.random.default_rng(9)))
    for mode in ("rn", "rz", "rm", "rp"):
        (got,) = execute(f"sqrt.{mode}.f32 {{d0}}, {{a0}}", [("f32", values)], ["f32"])
        for x, y in zip(values.tolist(), got.tolist(), strict=True):
            if not 0 < x < float("inf"):
                continue
            exact, root = Fraction(x), Fraction(y)
            below, above = (Fraction(float(np.nextafter(np.float32(y), np.float32(s), dtype=np.float32))) for s in (0, np.inf))
            if mode == "rn":
                assert ((below + root) / 2) ** 2 <= exact <= ((root + above) / 2) ** 2
            elif mode == "rp":
                assert below**2 < exact <= root**2
            else:
                assert root**2 <= exact < above**2


@pytest.mark.parametrize(
    ("opcode", "law", "bound"),
    [  # the bounds that the ISA documents: ulps of the result, or absolute
        ("ex2.approx.f32", lambda x: np.exp2(x), 2 * 2.0**-23),
        ("rcp.approx.f32", lambda x: 1 / x, 2.0**-23),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(np.abs(x)), 2.0**-22.9),
        ("sqrt.approx.f32", lambda x: np.sqrt(np.abs(x)), 2.0**-23),
        ("sin.approx.f32", np.sin, None),
        ("cos.approx.f32", np.cos, None),
        ("tanh.approx.f32", np.tanh, 2.0**-11),
        ("lg2.approx.f32", lambda x: np.log2(np.abs(x)), None),
    ],
)
def test_approximations_stay_within_their_bound(
    opcode: str, law: Callable[[np.ndarray], np.ndarray], bound: float | None
) -> None:
    x = np.random.default_rng(10).uniform(-3, 3, N).astype(np.float32)
    if opcode.split(".")[0] in ("rsqrt", "sqrt", "lg2"):
        x = np.abs(x)
    (got,) = execute(f"{opcode} {{d0}}, {{a0}}", [("f32", x)], ["f32"])
    want = law(x.astype(np.float64))
    error = np.abs(got - want)
    assert (error <= (2.0**-20.9 if bound is None else bound * np.abs(want))).all()


def test_approximate_instructions_are_labelled() -> None:
    body = ".reg .f32 %f<3>; mov.f32 %f0, 0f40000000; {} ret;"
    exact = Machine(parse(f"{HEADER}.visible .entry k() {{ {body.format('add.rn.f32 %f1, %f0, %f0;')} }}")).launch("k", 1, 32, [])
    loose = Machine(parse(f"{HEADER}.visible .entry k() {{ {body.format('ex2.approx.ftz.f32 %f1, %f0;')} }}")).launch(
        "k", 1, 32, []
    )
    assert exact.exact
    assert not loose.exact
    assert [loose.instructions[pc] for pc in loose.approximate] == ["ex2.approx.ftz.f32 %f1, %f0"]


# ---- comparison and selection ----------------------------------------

_ORDER: dict[str, Callable[[object, object], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", [*INTS, "f32", "f64"])
def test_setp_and_its_complement(kind: str) -> None:
    rng = rng_for(kind)
    a, b, c = operands(kind, N, rng), operands(kind, N, rng), operands("pred", N, rng)
    b = np.where(rng.random(N) < 0.3, a, b)
    floats = kind[0] == "f"
    values = list(zip(a.tolist(), b.tolist(), strict=True))
    for name, law in _ORDER.items():
        unordered = [floats and (x != x or y != y) for x, y in values]
        plain = [law(x, y) and not u for (x, y), u in zip(values, unordered, strict=True)]
        hit, miss = execute(f"setp.{name}.{kind} {{d0}}|{{d1}}, {{a0}}, {{a1}}", [(kind, a), (kind, b)], ["pred", "pred"])
        assert hit.tolist() == plain
        assert miss.tolist() == [not p for p in plain]
        if floats:
            (hit,) = execute(f"setp.{name}u.{kind} {{d0}}, {{a0}}, {{a1}}", [(kind, a), (kind, b)], ["pred"])
            assert hit.tolist() == [law(x, y) or u for (x, y), u in zip(values, unordered, strict=True)]
        for join, combine in (("and", lambda p, q: p and q), ("or", lambda p, q: p or q), ("xor", lambda p, q: p != q)):
            (hit,) = execute(
                f"setp.{name}.{join}.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}}", [(kind, a), (kind, b), ("pred", c)], ["pred"]
            )
            assert hit.tolist() == [combine(p, bool(q)) for p, q in zip(plain, c, strict=True)]
    (hit,) = execute(f"setp.{'lt'}.and.{kind} {{d0}}, {{a0}}, {{a1}}, !{{a2}}", [(kind, a), (kind, b), ("pred", c)], ["pred"])
    assert hit.tolist() == [x < y and not q for (x, y), q in zip(values, c, strict=True)]


def test_unsigned_comparisons_and_number_tests() -> None:
    rng = np.random.default_rng(11)
    a, b = operands("u32", N, rng), operands("u32", N, rng)
    for name, law in (("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal)):
        (hit,) = execute(f"setp.{name}.u32 {{d0}}, {{a0}}, {{a1}}", [("u32", a), ("u32", b)], ["pred"])
        np.testing.assert_array_equal(hit, law(a, b))
    x, y = operands("f32", N, rng), operands("f32", N, rng)
    nan = np.isnan(x) | np.isnan(y)
    for name, want in (("num", ~nan), ("nan", nan)):
        (hit,) = execute(f"setp.{name}.f32 {{d0}}, {{a0}}, {{a1}}", [("f32", x), ("f32", y)], ["pred"])
        np.testing.assert_array_equal(hit, want)
    tiny = np.float32(2.0**-126)
    kinds = {
        "finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": (x != 0) & (np.abs(x) < tiny),
    }  # fmt: skip
    for name, want in kinds.items():
        (hit,) = execute(f"testp.{name}.f32 {{d0}}, {{a0}}", [("f32", x)], ["pred"])
        np.testing.assert_array_equal(hit, want, name)


def test_selection() -> None:
    rng = np.random.default_rng(12)
    a, b, p = operands("u32", N, rng), operands("u32", N, rng), operands("pred", N, rng)
    (got,) = execute("selp.b32 {d0}, {a0}, {a1}, {a2}", [("u32", a), ("u32", b), ("pred", p)], ["u32"])
    np.testing.assert_array_equal(got, np.where(p, a, b))
    (got,) = execute("selp.b32 {d0}, {a0}, {a1}, 0", [("u32", a), ("u32", b)], ["u32"])
    np.testing.assert_array_equal(got, b)
    c = operands("s32", N, rng)
    (got,) = execute("slct.b32.s32 {d0}, {a0}, {a1}, {a2}", [("u32", a), ("u32", b), ("s32", c)], ["u32"])
    np.testing.assert_array_equal(got, np.where(c >= 0, a, b))
    (got,) = execute("set.lt.u32.u32 {d0}, {a0}, {a1}", [("u32", a), ("u32", b)], ["u32"])
    np.testing.assert_array_equal(got, np.where(a < b, 0xFFFFFFFF, 0))
    (got,) = execute("set.lt.f32.u32 {d0}, {a0}, {a1}", [("u32", a), ("u32", b)], ["f32"])
    np.testing.assert_array_equal(got, (a < b).astype(np.float32))
    for name, law in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        q = operands("pred", N, rng)
        (got,) = execute(f"{name}.pred {{d0}}, {{a0}}, {{a1}}", [("pred", p), ("pred", q)], ["pred"])
        np.testing.assert_array_equal(got, law(p, q))


# ---- conversions ----------------------------------------

REGISTER = {"u8": "u16", "s8": "s16"}
KINDS = ["u8", "s8", *INTS]


def source_of(kind: str, rng: np.random.Generator, n: int = N) -> tuple[str, np.ndarray]:
    """(register type, values); 8-bit types live in 16-bit registers, whose upper half cvt must ignore."""
    register = REGISTER.get(kind, kind)
    return register, operands(register, n, rng)


@pytest.mark.parametrize("source", KINDS)
def test_integer_conversions(source: str) -> None:
    register, values = source_of(source, rng_for(source))
    bits = width(source)
    numbers = [v & (1 << bits) - 1 for v in ints(values, "u" + register[1:])]
    if source[0] == "s":
        numbers = [v - (1 << bits) if v >> (bits - 1) else v for v in numbers]
    for target in KINDS:
        wide = REGISTER.get(target, target)
        size = width(target)
        low, high = (-(1 << size - 1), (1 << size - 1) - 1) if target[0] == "s" else (0, (1 << size) - 1)
        (got,) = execute(f"cvt.{target}.{source} {{d0}}, {{a0}}", [(register, values)], [wide])
        want = [v & (1 << size) - 1 for v in numbers]
        want = [v - (1 << size) if target[0] == "s" and v >> (size - 1) else v for v in want]
        assert got.view(f"u{got.dtype.itemsize}").tolist() == [wrap(v, wide) for v in want]
        (got,) = execute(f"cvt.sat.{target}.{source} {{d0}}, {{a0}}", [(register, values)], [wide])
        assert got.view(f"u{got.dtype.itemsize}").tolist() == [wrap(max(low, min(high, v)), wide) for v in numbers]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integers_to_floats(mode: str) -> None:
    for source in KINDS:
        register, values = source_of(source, rng_for(source), 480)
        bits = width(source)
        numbers = [v & (1 << bits) - 1 for v in ints(values, "u" + register[1:])]
        numbers = [v - (1 << bits) if source[0] == "s" and v >> (bits - 1) else v for v in numbers]
        for target in ("f16", "bf16", "f32", "f64"):
            out = "b16" if target.endswith("f16") else target
            (got,) = execute(f"cvt.{mode}.{target}.{source} {{d0}}, {{a0}}", [(register, values)], [out])
            raw = got.view(f"u{got.dtype.itemsize}").tolist()
            assert raw == [round_to(Fraction(v), target, mode) if v else 0 for v in numbers], f"{source} to {target}"


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_floats_to_integers_clamp(mode: str) -> None:
    rng = rng_for(mode)
    for source in ("f16", "f32", "f64"):
        values = operands(source, N, rng)
        patterns = values.view(f"u{values.dtype.itemsize}").tolist()
        for target in INTS:
            size = width(target)
            low, high = (-(1 << size - 1), (1 << size - 1) - 1) if target[0] == "s" else (0, (1 << size) - 1)
            (got,) = execute(
                f"cvt.{mode}.{target}.{source} {{d0}}, {{a0}}", [("b16" if source == "f16" else source, values)], [target]
            )
            for pattern, number in zip(patterns, got.tolist(), strict=True):
                value = to_fraction(pattern, source)
                if isinstance(value, str):
                    want = {"nan": 0, "inf": high, "-inf": low}[value]
                else:
                    rounded = {"rni": round, "rzi": int, "rmi": lambda v: v.__floor__(), "rpi": lambda v: v.__ceil__()}[mode](
                        value
                    )
                    want = max(low, min(high, rounded))
                assert number == want, f"cvt.{mode}.{target}.{source} of {pattern:#x}"


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_floats_to_narrower_floats(mode: str) -> None:
    rng = rng_for(mode)
    for source, targets in (("f32", ["f16", "bf16"]), ("f64", ["f32", "f16"])):
        values = operands(source, N, rng)
        for target in targets:
            out = "b16" if target.endswith("f16") else target
            (got,) = execute(f"cvt.{mode}.{target}.{source} {{d0}}, {{a0}}", [(source, values)], [out])
            for pattern, number in zip(
                values.view(f"u{values.dtype.itemsize}").tolist(), got.view(f"u{got.dtype.itemsize}").tolist(), strict=True
            ):
                value = to_fraction(pattern, source)
                if value == "nan":
                    assert is_nan(number, target)
                elif not isinstance(value, str) and value:
                    assert number == round_to(value, target, mode), f"{source} {pattern:#x} to {target}"


def test_every_half_widens_exactly() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    for source in ("f16", "bf16"):
        (got,) = execute(f"cvt.f32.{source} {{d0}}, {{a0}}", [("b16", patterns)], ["f32"])
        for pattern, number in zip(range(0, 65536, 7), got.view(np.uint32)[::7].tolist(), strict=True):
            value = to_fraction(pattern, source)
            if isinstance(value, str):
                assert to_fraction(number, "f32") == value
            else:
                assert to_fraction(number, "f32") == value
                assert number >> 31 == pattern >> 15


def test_packed_halves() -> None:
    rng = np.random.default_rng(13)
    a, b = operands("f32", N, rng), operands("f32", N, rng)
    (got,) = execute("cvt.rn.f16x2.f32 {d0}, {a0}, {a1}", [("f32", a), ("f32", b)], ["b32"])
    with np.errstate(all="ignore"):
        high, low = a.astype(np.float16), b.astype(np.float16)
    sane = ~(np.isnan(a) | np.isnan(b))
    np.testing.assert_array_equal((got >> 16)[sane], high.view(np.uint16)[sane])
    np.testing.assert_array_equal((got & 0xFFFF)[sane], low.view(np.uint16)[sane])
    x, y = rng.standard_normal((2, N, 2)).astype(np.float16)
    (got,) = execute(
        "add.rn.f16x2 {d0}, {a0}, {a1}", [("b32", x.reshape(-1).view(np.uint32)), ("b32", y.reshape(-1).view(np.uint32))], ["b32"]
    )
    np.testing.assert_array_equal(got.view(np.float16), (x.astype(np.float64) + y).astype(np.float16).reshape(-1))


def test_integral_rounding_of_floats() -> None:
    values = operands("f32", N, np.random.default_rng(14))
    for mode, law in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        (got,) = execute(f"cvt.{mode}.f32.f32 {{d0}}, {{a0}}", [("f32", values)], ["f32"])
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(got, law(values))


# ---- what is not known ----------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.b32 %r0, %r1;",
        "add.frob.s32 %r0, %r1, %r1;",
        "add.b128 %r0, %r1, %r1;",
        "wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {%r0, %r1}, [%d0];",
        "cvt.f32.s32 %f0, %r0;",
        "mov.u32 %r0, %envreg3;",
        "shfl.up.b32 %r0, %r1, 1, 0;",
        "ld.global.v4.f64 {%d0, %d0, %d0, %d0}, [%d0];",
    ],
)
def test_the_unknown_is_refused_with_its_line(line: str) -> None:
    text = f"{HEADER}.visible .entry k()\n{{\n.reg .b32 %r<4>; .reg .b64 %d<4>; .reg .f32 %f<4>;\n{line}\nret;\n}}\n"
    with pytest.raises(UnsupportedError, match="PTX line 7"):
        Machine(parse(text)).launch("k", 1, 32, [])


def test_every_row_of_the_table_is_tested_here() -> None:
    here = __import__("pathlib").Path(__file__).read_text(encoding="utf-8")
    missing = [name for name in ops.opcodes() if f"{name}." not in here and f'"{name}"' not in here]
    assert not missing
    assert FORMATS
