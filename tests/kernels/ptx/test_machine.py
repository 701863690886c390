# ruff: noqa: E501 – PTX and tables of cases read better on one line
"""Control flow, memory spaces, warp-wide instructions and the parser, each against a few lines of NumPy."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.kernels.ptx import Machine, Pointer, parse
from aprlab.kernels.ptx import machine as machine_module
from aprlab.kernels.ptx.memory import AddressSpace

from .harness import HEADER, kernel
from .kernels import compiled

PRE = """.reg .b64 %x<8>; .reg .b32 %t<16>; .reg .pred %q<8>; .reg .f32 %f<8>; .reg .b16 %h<8>;
mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %tid.x; mad.lo.s32 %t3, %t0, %t1, %t2;
ld.param.u64 %x0, [in]; ld.param.u64 %x1, [out]; mul.wide.u32 %x2, %t3, 4; add.s64 %x3, %x0, %x2; add.s64 %x4, %x1, %x2;
"""


def launch(body: str, source: Any, out: Any, grid: Any = 1, block: Any = 32, **options: Any) -> Any:
    module = parse(kernel(PRE + body, ".param .u64 in, .param .u64 out"))
    return Machine(module).launch("k", grid, block, [source, out], **options)


# ---- control flow ----------------------------------------


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return steps


@pytest.mark.parametrize("chunk", [1, 1 << 14])
@pytest.mark.parametrize("block", [32, 50, 96])
def test_divergent_loops_reconverge(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    """Every thread its own trip count and branch pattern, in whole and broken warps, one block at a time or all at
    once.
    """
    monkeypatch.setattr(machine_module, "LANES_A_CHUNK", chunk)
    body = """
    ld.global.u32 %t4, [%x3]; mov.u32 %t5, 0;
    LOOP: setp.eq.u32 %q0, %t4, 1;
    @%q0 bra DONE;
    and.b32 %t6, %t4, 1; setp.eq.u32 %q1, %t6, 0;
    @!%q1 bra ODD;
    shr.u32 %t4, %t4, 1; bra NEXT;
    ODD: mad.lo.u32 %t4, %t4, 3, 1;
    NEXT: add.u32 %t5, %t5, 1; bra LOOP;
    DONE: st.global.u32 [%x4], %t5; ret;"""
    values = np.arange(1, 4 * block + 1, dtype=np.uint32)
    out = np.zeros_like(values)
    report = launch(body, values, out, 4, block)
    assert out.tolist() == [collatz(int(v)) for v in values]
    at_end = report.instructions.index("st.global.u32 [%x4], %t5")
    assert report.thread_counts[at_end] == len(values)
    assert report.warp_counts[at_end] == 4 * -(-block // 32)  # all lanes of a warp are together again


def test_guards_work_on_every_kind_of_instruction() -> None:
    body = """
    setp.lt.u32 %q0, %t2, 10;
    mov.u32 %t5, 1;
    @%q0 mov.u32 %t5, 2;
    @!%q0 ld.global.u32 %t5, [%x3];
    setp.gt.u32 %q1, %t2, 20;
    @%q1 st.global.u32 [%x4], %t5;
    @%q1 ret;
    add.u32 %t5, %t5, 100;
    @%q0 bar.sync 1, 10;
    st.global.u32 [%x4], %t5; ret;"""
    values = np.arange(1000, 1064, dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    launch(body, values, out, 1, 64)
    want = [v if t > 20 else (2 if t < 10 else v) + 100 for t, v in enumerate(values.tolist())]
    assert out.tolist() == want


def test_branch_tables() -> None:
    body = """
    and.b32 %t4, %t2, 3;
    TABLE: .branchtargets A, B, C, A;
    brx.idx %t4, TABLE;
    A: mov.u32 %t5, 10; bra END;
    B: mov.u32 %t5, 20; bra END;
    C: mov.u32 %t5, 30;
    END: st.global.u32 [%x4], %t5; ret;"""
    out = np.zeros(64, np.uint32)
    launch(body, out, out, 2)
    assert out.tolist() == [10, 20, 30, 10] * 16


def test_writes_of_a_branch_do_not_leak_through_copies() -> None:
    """A register copied by mov is another register, also when one of the two is later written by some lanes only."""
    body = """
    ld.global.u32 %t4, [%x3]; mov.u32 %t5, %t4;
    setp.lt.u32 %q0, %t2, 7;
    @%q0 bra THEN;
    bra END;
    THEN: add.u32 %t4, %t4, 1; mov.u32 %t6, %t4; add.u32 %t4, %t4, 1;
    END: sub.u32 %t7, %t4, %t5; st.global.u32 [%x4], %t7; ret;"""
    out = np.zeros(32, np.uint32)
    launch(body, np.arange(32, dtype=np.uint32), out)
    assert out.tolist() == [2] * 7 + [0] * 25


def test_functions_are_called() -> None:
    text = f"""{HEADER}
    .func (.param .b32 r) triple(.param .b32 a, .param .align 4 .b8 pair[8])
    {{
      .reg .b32 %r<6>; .reg .pred %p;
      ld.param.u32 %r0, [a]; ld.param.u32 %r1, [pair+0]; ld.param.u32 %r2, [pair+4];
      setp.gt.u32 %p, %r0, 5;
      @%p bra BIG;
      mad.lo.u32 %r3, %r0, 3, %r1; st.param.b32 [r], %r3; ret;
      BIG: add.u32 %r3, %r0, %r2; st.param.b32 [r], %r3; ret;
    }}
    .visible .entry k(.param .u64 out)
    {{
      .reg .b32 %r<6>; .reg .b64 %d<3>;
      mov.u32 %r0, %tid.x;
      {{ .param .b32 p0; .param .align 4 .b8 p1[8]; .param .b32 back;
         st.param.b32 [p0], %r0; st.param.v2.b32 [p1], {{7, 1000}};
         call.uni (back), triple, (p0, p1); ld.param.b32 %r1, [back]; }}
      {{ .param .b32 p0; .param .align 4 .b8 p1[8]; .param .b32 back;
         st.param.b32 [p0], %r1; st.param.v2.b32 [p1], {{1, 2}};
         call (back), triple, (p0, p1); ld.param.b32 %r1, [back]; }}
      ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %r0, 4; add.u64 %d2, %d0, %d1; st.global.u32 [%d2], %r1; ret;
    }}"""
    out = np.zeros(32, np.uint32)
    report = Machine(parse(text)).launch("k", 1, 32, [out], checks=True)

    def triple(a: int, pair: tuple[int, int]) -> int:
        return a + pair[1] if a > 5 else 3 * a + pair[0]

    assert out.tolist() == [triple(triple(t, (7, 1000)), (1, 2)) for t in range(32)]
    assert report.clean
    recursive = f"{HEADER}.func f() {{ call f; ret; }} .visible .entry k() {{ call f; ret; }}"
    with pytest.raises(UnsupportedError, match="recursive"):
        Machine(parse(recursive)).launch("k", 1, 1, [])


def test_barrier_reduction_and_three_dimensions() -> None:
    body = """
    mov.u32 %t4, %tid.y; mov.u32 %t5, %tid.z; mov.u32 %t6, %ntid.y;
    mad.lo.u32 %t7, %t5, %t6, %t4; mad.lo.u32 %t7, %t7, %t1, %t2;
    and.b32 %t8, %t7, 3; setp.eq.u32 %q0, %t8, 0;
    bar.red.popc.u32 %t9, 0, %q0;
    mov.u32 %t10, %ctaid.y; mad.lo.u32 %t9, %t10, 1000, %t9;
    mov.u32 %t11, %nctaid.x; mad.lo.u32 %t12, %t10, %t11, %t0;
    mul.lo.u32 %t12, %t12, 40; add.u32 %t7, %t7, %t12;
    mul.wide.u32 %x2, %t7, 4; add.s64 %x4, %x1, %x2; st.global.u32 [%x4], %t9; ret;"""
    out = np.zeros((2, 3, 40), np.uint32)
    launch(body, out, out, (3, 2), (5, 4, 2))
    assert (out[0] == 10).all()
    assert (out[1] == 1010).all()


# ---- memory ----------------------------------------


@pytest.mark.parametrize(
    ("kind", "vector"),
    [("u8", 1), ("s8", 1), ("u16", 1), ("s16", 1), ("u8", 4), ("b16", 4), ("u32", 2), ("f32", 4), ("b64", 2), ("u16", 2)],
)
@pytest.mark.parametrize("space", ["global", "shared", "generic", "local"])
def test_loads_and_stores_of_every_width(kind: str, vector: int, space: str) -> None:
    size = {"8": 1, "6": 2, "2": 4, "4": 8}[kind[-1]]
    total = size * vector
    v = f".v{vector}" if vector > 1 else ""
    register = "b64" if size == 8 else "f32" if kind == "f32" else "b32" if size == 4 else "b16"
    names = [f"%v{i}" for i in range(vector)]
    group = "{" + ", ".join(names) + "}" if vector > 1 else names[0]
    stage = {
        "global": f"st.global{v}.{kind} [%x4], {group};",
        "generic": f"st{v}.{kind} [%x4], {group};",
        "shared": f"mov.u32 %t5, buf; mad.lo.u32 %t5, %t2, {total}, %t5; st.shared{v}.{kind} [%t5], {group}; bar.sync 0; ld.shared{v}.{kind} {group}, [%t5]; st.global{v}.{kind} [%x4], {group};",
        "local": f"mov.u64 %x5, loc; cvta.local.u64 %x5, %x5; st{v}.{kind} [%x5+16], {group}; ld{v}.{kind} {group}, [%x5+16]; st.global{v}.{kind} [%x4], {group};",
    }[space]
    body = f"""
    .reg .{register} %v<4>; .shared .align 16 .b8 buf[2048]; .local .align 16 .b8 loc[64];
    mul.wide.u32 %x2, %t3, {total}; add.s64 %x3, %x0, %x2; add.s64 %x4, %x1, %x2;
    ld{".global" if space != "generic" else ""}{v}.{kind} {group}, [%x3];
    {stage} ret;"""
    data = np.random.default_rng(1).integers(0, 256, 192 * total, dtype=np.uint8)
    for checks in (False, True):
        out = np.zeros_like(data)
        report = launch(body, data, Pointer(out, initialised=False), 2, 96, checks=checks)
        np.testing.assert_array_equal(out, data)
        assert report.clean


def test_narrow_loads_extend() -> None:
    data = np.array([0x80, 0xFF, 0x7F, 0x01] * 8, np.uint8)
    for kind, dtype in (("u8", np.uint8), ("s8", np.int8)):
        body = f"cvt.u64.u32 %x5, %t3; add.s64 %x5, %x0, %x5; ld.global.{kind} %t5, [%x5]; st.global.u32 [%x4], %t5; ret;"
        out = np.zeros(32, np.int32)
        launch(body, data, out)
        assert out.tolist() == data.view(dtype).astype(np.int32).tolist()
    # A float in a wider register is its bits.
    wide = "ld.global.f32 %x5, [%x3]; st.global.f32 [%x4], %x5; ret;"
    out = np.zeros(32, np.float32)
    launch(wide, np.linspace(-1, 1, 32, dtype=np.float32), out)
    assert out.tolist() == np.linspace(-1, 1, 32, dtype=np.float32).tolist()


def test_addresses_on_odd_offsets_still_load() -> None:
    """Rows of 18 bytes: 2-aligned bases with constant offsets, the common case of ggml's blocks."""
    body = """
    mul.wide.u32 %x2, %t3, 18; add.s64 %x3, %x0, %x2;
    ld.global.u16 %h0, [%x3]; ld.global.u16 %h1, [%x3+2]; ld.global.u8 %h2, [%x3+17]; ld.global.u16 %h3, [%x3+4];
    add.u16 %h0, %h0, %h1; add.u16 %h0, %h0, %h2; add.u16 %h0, %h0, %h3; cvt.u32.u16 %t5, %h0; st.global.u32 [%x4], %t5; ret;"""
    data = np.random.default_rng(2).integers(0, 256, (64, 18), dtype=np.uint8)
    out = np.zeros(64, np.uint32)
    launch(body, data, out, 2)
    halves = data.view(np.uint16).astype(np.uint32)
    assert out.tolist() == ((halves[:, 0] + halves[:, 1] + data[:, 17] + halves[:, 2]) & 0xFFFF).tolist()


def test_unaligned_host_arrays_and_several_buffers_by_one_pointer() -> None:
    raw = np.zeros(4 * 32 + 1, np.uint8)
    source = raw[1:].view(np.uint32)
    source[:] = np.arange(32)
    assert source.ctypes.data % 4
    out = np.zeros(32, np.uint32)
    launch("ld.global.u32 %t4, [%x3]; add.u32 %t4, %t4, 1; st.global.u32 [%x3], %t4; st.global.u32 [%x4], %t4; ret;", source, out)
    assert out.tolist() == source.tolist() == list(range(1, 33))
    # A pointer that is another buffer in every other lane.
    body = "and.b32 %t5, %t2, 1; setp.eq.u32 %q0, %t5, 0; selp.b64 %x5, %x3, %x4, %q0; ld.global.u32 %t4, [%x5]; add.u32 %t4, %t4, 5; st.global.u32 [%x4], %t4; ret;"
    a, b = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    launch(body, a, b)
    assert b.tolist() == [t + 5 if t % 2 == 0 else t + 105 for t in range(32)]


def test_module_variables_constants_and_struct_parameters() -> None:
    text = f"""{HEADER}
    .const .align 4 .b8 table[16] = {{1, 0, 0, 0, 2, 0, 0, 0, 3}};
    .global .align 4 .u32 counter = 40;
    .global .align 8 .u64 where = generic(counter);
    .global .align 4 .f32 values[2] = {{0f3F800000, 2.5}};
    .visible .entry k(.param .u64 out, .param .align 8 .b8 s[24], .param .f32 scale, .param .u16 small)
    {{
      .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f32 %f<5>; .reg .b16 %h;
      ld.const.u32 %r0, [table+4]; mov.u64 %d0, table; ld.const.u32 %r1, [%d0+8];
      ld.global.u64 %d1, [where]; ld.u32 %r2, [%d1]; add.u32 %r2, %r2, %r0; st.u32 [%d1], %r2;
      ld.param.b64 %d2, [s+16]; ld.param.v2.u32 {{%r3, %r4}}, [s];
      mov.u64 %d3, s; ld.param.u32 %r5, [%d3+4];
      ld.param.f32 %f0, [scale]; ld.global.f32 %f1, [values+4]; fma.rn.f32 %f0, %f0, %f1, 0f00000000;
      ld.param.u16 %h, [small]; cvt.u32.u16 %r6, %h;
      ld.param.u64 %d4, [out];
      st.global.v4.u32 [%d4], {{%r0, %r1, %r2, %r3}}; st.global.v4.u32 [%d4+16], {{%r4, %r5, %r6, 9}};
      st.global.f32 [%d4+32], %f0; st.global.b64 [%d4+40], %d2; ret;
    }}"""
    machine = Machine(parse(text))
    for round_ in (1, 2):  # .global variables live from launch to launch
        out = np.zeros(12, np.uint32)
        machine.launch("k", 1, 1, {"out": out, "s": struct.pack("<IIqd", 11, 22, -1, 6.5), "scale": 3.0, "small": 65535})
        assert out[:8].tolist() == [2, 3, 40 + 2 * round_, 11, 22, 22, 65535, 9]
        assert out[8:9].view(np.float32)[0] == 7.5
        assert out[10:].view(np.float64)[0] == 6.5


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_apply_one_after_the_other(space: str) -> None:
    operations = {
        "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF, "min.u32": min, "max.u32": max, "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b, "exch.b32": lambda a, b: b,
        "inc.u32": lambda a, b: 0 if a >= b else a + 1, "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
    }  # fmt: skip
    values = np.random.default_rng(4).integers(0, 50, 64, dtype=np.uint32)
    for name, law in operations.items():
        where = "%x1+256" if space == "global" else "cell"
        body = f"""
        .shared .align 4 .u32 cell; ld.global.u32 %t4, [%x3];
        mov.u32 %t5, 20; st.{space}.u32 [{where}], %t5; bar.sync 0;
        atom.{space}.{name} %t6, [{where}], %t4; st.global.u32 [%x4], %t6; bar.sync 0; ld.{space}.u32 %t7, [{where}];
        setp.eq.u32 %q0, %t2, 0; @%q0 st.global.u32 [%x1+260], %t7; ret;"""
        out = np.zeros(66, np.uint32)
        launch(body, values, out, 1, 64)
        state = 20
        for i, v in enumerate(values.tolist()):
            assert out[i] == state, name
            state = law(state, v)
        assert out[65] == state, name
    body = f"atom.{space}.cas.b32 %t6, [{'%x1+256' if space == 'global' else 'cell'}], %t2, 77; st.global.u32 [%x4], %t6; ret;"
    out = np.zeros(66, np.uint32)
    launch(".shared .align 4 .u32 cell; " + body, values, out, 1, 64)
    assert out[:64].tolist() == [0] + [77] * 63


def test_float_atomics_are_labelled() -> None:
    out = np.zeros(33, np.float32)
    report = launch("ld.global.f32 %f0, [%x3]; red.global.add.f32 [%x1], %f0; ret;", np.full(64, 0.5, np.float32), out, 2)
    assert out[0] == 32
    assert any("another order" in note for note in report.notes)


# ---- warp-wide ----------------------------------------


def shuffled(mode: str, values: list[int], b: int, c: int) -> list[int]:
    """The ISA's pseudocode for one warp (or its broken rest)."""
    out = []
    for lane, own in enumerate(values):
        clamp, segment = c & 31, c >> 8 & 31
        low = lane & segment
        high = low | clamp & ~segment
        j, ok = {
            "up": (lane - b, lane - b >= high), "down": (lane + b, lane + b <= high),
            "bfly": (lane ^ b, (lane ^ b) <= high), "idx": (low | b & ~segment, (low | b & ~segment) <= high),
        }[mode]  # fmt: skip
        out.append(values[j] if ok and j < len(values) else own)
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    values = np.random.default_rng(5).integers(0, 1 << 32, 224, dtype=np.uint32)
    for block in (64, 50):
        for b, c in ((1, 0x1F), (16, 0x1F), (3, 0x1807), (5, 0x1C03), (31, 0x1F), (2, 0x181F)):
            clamp = c & ~31 if mode == "up" else c
            for divergent in (False, True):
                out = np.zeros(224, np.uint32)
                guard = "mov.u32 %t6, %laneid; setp.ge.u32 %q0, %t6, 0; @!%q0 ret;" if divergent else ""
                amount = (
                    "mov.u32 %t7, %t2; and.b32 %t7, %t7, 0; add.u32 %t7, %t7, " + str(b) + ";"
                    if divergent
                    else f"mov.u32 %t7, {b};"
                )
                body = f"{guard} ld.global.u32 %t4, [%x3]; {amount} shfl.sync.{mode}.b32 %t5|%q1, %t4, %t7, {clamp}, -1; st.global.u32 [%x4], %t5; ret;"
                grid = len(values) // block
                launch(body, values, out, grid, block)
                for start in range(0, grid * block, block):
                    part = values[start : start + block].tolist()
                    want = [v for w in range(0, block, 32) for v in shuffled(mode, part[w : w + 32], b, clamp)]
                    assert out[start : start + block].tolist() == want, (mode, b, hex(clamp), block, divergent)


def test_votes_matches_and_reductions() -> None:
    values = np.random.default_rng(6).integers(0, 4, 100, dtype=np.int32) - 2
    out = np.zeros((100, 8), np.int32)
    body = """
    mul.wide.u32 %x2, %t3, 32; add.s64 %x4, %x1, %x2;
    ld.global.u32 %t4, [%x3]; setp.gt.s32 %q0, %t4, 0;
    vote.sync.ballot.b32 %t5, %q0, -1; st.global.u32 [%x4], %t5;
    vote.sync.any.pred %q1, %q0, -1; selp.u32 %t5, 1, 0, %q1; st.global.u32 [%x4+4], %t5;
    vote.sync.all.pred %q1, %q0, -1; selp.u32 %t5, 1, 0, %q1; st.global.u32 [%x4+8], %t5;
    activemask.b32 %t5; st.global.u32 [%x4+12], %t5;
    redux.sync.add.s32 %t5, %t4, -1; st.global.u32 [%x4+16], %t5;
    redux.sync.min.s32 %t5, %t4, -1; st.global.u32 [%x4+20], %t5;
    match.any.sync.b32 %t5, %t4, -1; st.global.u32 [%x4+24], %t5;
    setp.lt.s32 %q2, %t4, 1;
    @%q2 bra LOW; bra END;
    LOW: activemask.b32 %t5; redux.sync.max.s32 %t6, %t4, %t5; mad.lo.u32 %t6, %t6, 1, 0; popc.b32 %t5, %t5; mad.lo.s32 %t5, %t5, 16, %t6; st.global.u32 [%x4+28], %t5;
    END: ret;"""
    launch(body, values, out, 2, 50)
    for start in (0, 32, 50, 82):
        w = values[start : start + (32 if start in (0, 50) else 18)]
        rows = out[start : start + len(w)]
        bits = lambda flags: int(sum(1 << i for i, f in enumerate(flags) if f))  # noqa: E731
        assert (rows[:, 0].view(np.uint32) == bits(w > 0)).all()
        assert (rows[:, 1] == (w > 0).any()).all()
        assert (rows[:, 2] == (w > 0).all()).all()
        assert (rows[:, 3].view(np.uint32) == (1 << len(w)) - 1).all()
        assert (rows[:, 4] == w.sum()).all()
        assert (rows[:, 5] == w.min()).all()
        assert rows[:, 6].view(np.uint32).tolist() == [bits(w == v) for v in w]
        low = w < 1
        assert (rows[low, 7] == 16 * low.sum() + w[low].max()).all()
        assert (rows[~low, 7] == 0).all()


# ---- arguments and parsing ----------------------------------------


def test_arguments_must_fit_the_parameters() -> None:
    machine = Machine(parse(kernel("ret;", ".param .u64 a, .param .u32 n, .param .f32 s")))
    a = np.zeros(4, np.float32)
    machine.launch("k", 1, 32, [a, 3, 1.5])
    for args, match in (
        ([a, 3], "takes 3 arguments"), ([3.5, 3, 1.0], "a float for a .u64"), ([a, a, 1.0], "an array for a .u32"),
        ([a, 3, "x"], "str for a .f32"), ([a[::2], 3, 1.0], "C-contiguous"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            machine.launch("k", 1, 32, args)
    for grid, block in ((0, 32), (1, 2048), ((1, 1, 1, 1), 32)):
        with pytest.raises(UsageError):
            machine.launch("k", grid, block, [a, 3, 1.0])
    with pytest.raises(UsageError, match="no entry 'other'; the module has k"):
        machine.launch("other", 1, 1, [])


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("hello", FormatError, "line 1"),
        ("", FormatError, "not PTX"),
        (".version 8.0\n.target sm_80\n.address_size 32\n", UnsupportedError, "address_size 32"),
        (HEADER + ".visible .entry k() {\n add.u32 %r0, %r1 %r2;\n}", FormatError, "PTX line 5"),
        (HEADER + ".visible .entry k() {\n .reg .u32 %r<3>;\n", FormatError, "never closed"),
        (HEADER + ".visible .entry k() {\n .reg .v4 .f32 %r;\n}", UnsupportedError, "vector registers"),
    ],
)
def test_bad_text_is_refused(text: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        parse(text)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("add.u32 %r0, %r1, %r9;", "'%r9'"), ("bra NOWHERE;", "no label"), ("add.u32 %r0, %r1;", "takes 2 operands"),
        ("add.u64 %r0, %r1, %r1;", "too narrow"), ("mov.u32 %r0, nothing;", "unknown name"), ("add.u32 %p0, %r0, %r0;", "is .pred"),
    ],
)  # fmt: skip
def test_bad_instructions_are_refused_with_their_line(line: str, match: str) -> None:
    text = f"{HEADER}.visible .entry k() {{\n.reg .b32 %r<3>; .reg .pred %p<2>;\n{line}\nret; }}"
    with pytest.raises((FormatError, UnsupportedError), match=match) as error:
        Machine(parse(text)).launch("k", 1, 1, [])
    assert "line 6" in str(error.value)


def test_line_information_and_scopes() -> None:
    text = f"""{HEADER}
    .visible .entry k(.param .u64 out) .maxntid 64, 1, 1
    {{
      .reg .b32 %r<3>; .reg .b64 %d;
      .loc 1 10 3
      mov.u32 %r0, 5;
      .loc 1 11 3, function_name $L__info0, inlined_at 1 20 7
      {{ .reg .b32 %r0; mov.u32 %r0, 100; add.u32 %r1, %r0, 1; }} // an inner %r0
      add.u32 %r2, %r0, %r1; ld.param.u64 %d, [out]; st.global.u32 [%d], %r2; ret;
    }}
    .file 1 "/some/kernel.cu"
    .section .debug_str {{ $L__info0: .b8 102,0 }}"""
    module = parse(text)
    out = np.zeros(1, np.uint32)
    report = Machine(module).launch("k", 1, 1, [out])
    assert out[0] == 106
    assert [str(loc) for loc in report.locations[:2]] == ["/some/kernel.cu:10", "/some/kernel.cu:11"]
    assert str(report.locations[1].inlined_at) == "/some/kernel.cu:20"
    with pytest.raises(UsageError, match="at most 64"):
        Machine(module).launch("k", 1, 65, [out])


def test_addresses_name_the_buffer_they_meant() -> None:
    space = AddressSpace()
    a, b = space.add(np.zeros(10), "a"), space.add(np.zeros(10), "b")
    assert space.describe(a.base + 3) == ("a", 3)
    assert space.describe(b.base - 8) == ("b", -8)
    assert space.describe(a.base + 1000) == ("a", 1000)
    assert space.describe(16)[0] == "(no buffer)"


def test_compiled_code_with_everything() -> None:
    """One CUDA kernel of many features through NVRTC, against the same formulas in NumPy."""
    source = """
    __constant__ float table[4] = {1.f, 2.f, 3.f, -0.5f};
    __device__ __noinline__ float power(float x, int n) { float s = 1; for (int i = 0; i < n; i++) s = s * x; return s; }
    extern "C" __global__ void k(const float* x, float* out, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      float v = x[i];
      switch (i % 5) {
        case 0: v = power(v, i % 4); break;
        case 1: v = v / 3.f; break;
        case 2: v = sqrtf(fabsf(v)); break;
        case 3: v = v > 0 ? floorf(v) : ceilf(v); break;
        default: v = fmaf(v, table[i & 3], (float)(i / 7));
      }
      out[i] = v;
    }"""
    x = (np.random.default_rng(8).standard_normal(300) * 4).astype(np.float32)
    out = np.zeros(300, np.float32)
    report = Machine(compiled(source)).launch("k", 5, 60, [x, out, 300], checks=True)
    table = np.array([1, 2, 3, -0.5], np.float32)
    for i, v in enumerate(x):
        power = np.float32(1)
        for _ in range(i % 4):
            power = power * v
        want = [power, v / np.float32(3), np.sqrt(np.abs(v)), np.trunc(v), np.float32(np.float64(v) * table[i & 3] + i // 7)][
            i % 5
        ]
        assert out[i] == want, i
    assert report.clean
    assert report.exact
