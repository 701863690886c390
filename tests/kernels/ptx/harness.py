# ruff: noqa: E501 – PTX and tables of cases read better on one line
"""One-instruction kernels, operands with every edge in them, and a slow reference for floats: exact fractions."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from aprlab.kernels.ptx import Machine, parse
from aprlab.kernels.ptx.ops import DTYPES
from aprlab.kernels.ptx.parser import TYPE_BYTES

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def kernel(body: str, params: str, name: str = "k") -> str:
    return f"{HEADER}.visible .entry {name}({params})\n{{\n{body}\n}}\n"


def execute(instruction: str, sources: Sequence[tuple[str, Any]], results: Sequence[str]) -> list[np.ndarray]:
    """Run `instruction` ({d0} {d1} destinations, {a0} {a1} … sources) once a thread; sources are (PTX type, values).

    Types are those of the registers; predicates are given and returned as bool arrays.
    """
    n = len(sources[0][1])
    lines, params, args = [], [], []
    lines.append(".reg .b64 %x<4>; .reg .b32 %t<4>; .reg .pred %q<4>;")
    lines.append("mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %tid.x; mad.lo.s32 %t0, %t0, %t1, %t2;")
    names: dict[str, str] = {}
    for i, (kind, values) in enumerate(sources):
        names[f"a{i}"] = f"%a{i}"
        lines.append(f".reg .{kind} %a{i};")
        params.append(f".param .u64 p{i}")
        dtype = np.dtype("u1") if kind == "pred" else DTYPES[kind]
        args.append(np.ascontiguousarray(values).view(dtype) if kind != "pred" else np.asarray(values, "u1"))
        size = dtype.itemsize
        lines.append(f"ld.param.u64 %x0, [p{i}]; mul.wide.u32 %x1, %t0, {size}; add.s64 %x0, %x0, %x1;")
        if kind == "pred":
            lines.append(f"ld.global.u8 %t1, [%x0]; setp.ne.u32 %a{i}, %t1, 0;")
        else:
            lines.append(f"ld.global.b{8 * size} %a{i}, [%x0];")
    for i, kind in enumerate(results):
        names[f"d{i}"] = f"%d{i}"
        lines.append(f".reg .{kind} %d{i};")
    lines.append(instruction.format(**names) + ";")
    outs = []
    for i, kind in enumerate(results):
        dtype = np.dtype("u4") if kind == "pred" else DTYPES[kind]
        params.append(f".param .u64 o{i}")
        outs.append(np.full(n, 0xAB, np.dtype(f"u{dtype.itemsize}")).view(dtype))
        lines.append(f"ld.param.u64 %x0, [o{i}]; mul.wide.u32 %x1, %t0, {dtype.itemsize}; add.s64 %x0, %x0, %x1;")
        if kind == "pred":
            lines.append(f"selp.u32 %t1, 1, 0, %d{i}; st.global.u32 [%x0], %t1;")
        else:
            lines.append(f"st.global.b{8 * dtype.itemsize} [%x0], %d{i};")
    lines.append("ret;")
    block = next(size for size in (96, 64, 32, 1) if n % size == 0)
    Machine(parse(kernel("\n".join(lines), ", ".join(params)))).launch("k", n // block, block, [*args, *outs])
    return [out != 0 if kind == "pred" else out for out, kind in zip(outs, results, strict=True)]


# ---- operands ----------------------------------------

_FLOAT_EDGES = [
    0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1.5, 2.5, -2.5, 3.0, 127.0, 255.5, 65504.0, 65520.0, 2.0**31, -(2.0**31), 2.0**32, 2.0**63, 2.0**64,
    float("inf"), float("-inf"), float("nan"), 2.0**-126, -(2.0**-126), 2.0**-149, -(2.0**-149), 2.0**-130, 2.0**-24, 2.0**-14, 2.0**-25,
    1 + 2.0**-23, 1 - 2.0**-24, 1 + 2.0**-11, 1 + 2.0**-10, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4028234663852886e38, 1e30, 1e-30,
]  # fmt: skip


def operands(kind: str, n: int, rng: np.random.Generator, dense: bool = True) -> np.ndarray:
    """(n,) values of a PTX type: a third edges, a third random bits, a third of ordinary size."""
    dtype = DTYPES[kind]
    if kind == "pred":
        return rng.random(n) < 0.5
    size = dtype.itemsize
    random_bits = rng.integers(0, 256, (n, size), dtype=np.uint8).reshape(-1).view(dtype)
    if kind in ("f32", "f64"):
        edges = np.array(_FLOAT_EDGES, dtype)
        ordinary = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4, n)).astype(dtype)
    elif kind in ("f16", "bf16"):
        with np.errstate(all="ignore"):
            edges = (np.array(_FLOAT_EDGES, np.float32).astype(np.float16)).view(np.uint16)
        ordinary = rng.standard_normal(n).astype(np.float16).view(np.uint16)
        if kind == "bf16":
            edges = (np.array(_FLOAT_EDGES, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            ordinary = (rng.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        width = 8 * size
        numbers = [
            0,
            1,
            2,
            3,
            7,
            8,
            15,
            16,
            31,
            32,
            33,
            63,
            64,
            65,
            100,
            255,
            256,
            -1,
            -2,
            1 << (width - 1),
            (1 << (width - 1)) - 1,
            0x5555,
        ]
        edges = np.array([v & ((1 << width) - 1) for v in numbers], np.dtype(f"u{size}")).view(dtype)
        ordinary = rng.integers(0, 100, n).astype(dtype)
    pick = rng.integers(0, 3, n)
    return np.where(pick == 0, rng.choice(edges, n), np.where(pick == 1, random_bits, ordinary))


def ints(values: Any, kind: str) -> list[int]:
    """Bits of `values` as Python ints of PTX integer type `kind`."""
    sign, width = kind[0], TYPE_BYTES[kind] * 8
    raw = np.asarray(values).view(np.dtype(f"u{width // 8}")).tolist()
    return [v - (1 << width) if sign == "s" and v >> (width - 1) else v for v in raw]


def wrap(value: int, kind: str) -> int:
    """Python int → the bits of PTX type `kind`."""
    return value & ((1 << 8 * TYPE_BYTES[kind]) - 1)


# ---- floats by the book ----------------------------------------

# mantissa bits (with the hidden one), smallest and largest exponent
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def to_fraction(pattern: int, kind: str) -> Fraction | str:
    """Float bits → exact value, or "nan", "inf", "-inf"; zeros lose their sign."""
    mantissa, _, high = FORMATS[kind]
    width = 8 * TYPE_BYTES[kind]
    negative, field = pattern >> (width - 1), pattern >> (mantissa - 1) & (1 << (width - mantissa)) - 1
    tail = pattern & (1 << (mantissa - 1)) - 1
    if field == (1 << (width - mantissa)) - 1:
        return "nan" if tail else "-inf" if negative else "inf"
    value = Fraction(tail, 1 << (mantissa - 1)) + (1 if field else 0)
    value *= Fraction(2) ** (max(field, 1) - high)
    return -value if negative else value


def round_to(value: Fraction, kind: str, mode: str) -> int:
    """Exact value ≠ 0 → float bits of `kind`, rounded in `mode`."""
    mantissa, low, high = FORMATS[kind]
    width = 8 * TYPE_BYTES[kind]
    negative, size = value < 0, abs(value)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length(), low)
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    while exponent > low and Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (exponent - mantissa + 1)
    steps, rest = divmod(size, unit)
    number = int(steps)
    if rest:
        half = rest * 2 / unit
        away = {"rn": half > 1 or (half == 1 and number & 1), "rz": False, "rm": negative, "rp": not negative}[mode]
        number += bool(away)
    if number >> mantissa:
        number >>= 1
        exponent += 1
    if exponent > high:
        to_infinity = mode == "rn" or mode == ("rm" if negative else "rp")
        pattern = (
            ((1 << (width - mantissa)) - 1) << (mantissa - 1)
            if to_infinity
            else (((1 << (width - mantissa)) - 1) << (mantissa - 1)) - 1
        )
    elif number >> (mantissa - 1):
        pattern = (exponent + high) << (mantissa - 1) | number & (1 << (mantissa - 1)) - 1
    else:
        pattern = number
    return pattern | negative << (width - 1)


def is_nan(pattern: int, kind: str) -> bool:
    return to_fraction(pattern, kind) == "nan"


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]
