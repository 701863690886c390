# ruff: noqa: E501 – PTX and tables of cases read better on one line
"""The counters on textbook cases, where every figure is known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aprlab.kernels.ptx import LaunchReport, Machine, parse
from aprlab.kernels.ptx.counters import Traffic

from .harness import kernel
from .kernels import CLEAN, compiled

PRE = """.reg .b64 %x<8>; .reg .b32 %t<16>; .reg .pred %q<8>; .reg .f32 %f<8>;
mov.u32 %t0, %tid.x; ld.param.u64 %x0, [in];
"""


def launch(body: str, source: Any, block: int = 32, grid: int = 1) -> LaunchReport:
    return Machine(parse(kernel(PRE + body, ".param .u64 in"))).launch("k", grid, block, [source], counters=True)


def traffic(report: LaunchReport, opcode: str) -> Traffic:
    assert report.counters is not None
    (pc,) = [pc for pc in report.counters.by_pc if report.instructions[pc].startswith(opcode)]
    return report.counters.by_pc[pc]


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (1, 4), (2, 8), (4, 16), (8, 32), (32, 32)])
def test_sectors_of_strided_loads(stride: int, sectors: int) -> None:
    data = np.zeros(32 * 32 + 1, np.float32)
    report = launch(f"mul.wide.u32 %x1, %t0, {4 * stride}; add.s64 %x1, %x0, %x1; ld.global.f32 %f0, [%x1]; ret;", data)
    load = traffic(report, "ld.global")
    assert (load.requests, load.sectors, load.bytes) == (1, sectors, 128)
    assert report.counters is not None
    assert report.counters.dram_bytes == 32 * sectors
    assert report.counters.dram_bytes_of("in") == (32 * sectors, 0)


def test_a_misplaced_row_costs_one_sector_more() -> None:
    data = np.zeros(64, np.float32)
    report = launch("mul.wide.u32 %x1, %t0, 4; add.s64 %x1, %x0, %x1; ld.global.f32 %f0, [%x1+4]; ret;", data)
    assert traffic(report, "ld.global").sectors == 5


def test_vector_loads_and_repeated_reads() -> None:
    data = np.zeros((64, 4), np.float32)
    body = "mul.wide.u32 %x1, %t0, 16; add.s64 %x1, %x0, %x1; ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%x1]; ret;"
    report = launch(body, data, block=64, grid=3)
    load = traffic(report, "ld.global")
    assert (load.requests, load.sectors_per_request) == (6, 16)
    assert report.counters is not None
    assert report.counters.dram_bytes == 1024  # three blocks read the same kilobyte


def test_only_active_lanes_count() -> None:
    body = """mul.wide.u32 %x1, %t0, 4; add.s64 %x1, %x0, %x1; and.b32 %t1, %t0, 7; setp.eq.u32 %q0, %t1, 0;
    @%q0 st.global.u32 [%x1], %t0; @!%q0 bra END; add.u32 %t2, %t0, 1; END: ret;"""
    report = launch(body, np.zeros(64, np.uint32), block=64)
    store = traffic(report, "@%q0 st.global")
    assert (store.requests, store.sectors, store.bytes) == (2, 8, 32)
    assert report.counters is not None
    assert report.counters.dram_bytes_of("in") == (0, 256)
    pc = report.instructions.index("add.u32 %t2, %t0, 1")
    assert (report.warp_counts[pc], report.thread_counts[pc]) == (2, 8)


@pytest.mark.parametrize(
    ("stride", "nbytes", "wavefronts"),
    [(1, 4, 1), (2, 4, 2), (4, 4, 4), (32, 4, 32), (33, 4, 1), (0, 4, 1), (3, 4, 1), (1, 8, 2), (1, 16, 4), (2, 8, 4)],
)
def test_bank_wavefronts(stride: int, nbytes: int, wavefronts: int) -> None:
    kind = {4: "u32 %t5", 8: "v2.u32 {%t5, %t6}", 16: "v4.u32 {%t5, %t6, %t7, %t8}"}[nbytes]
    body = f".shared .align 16 .b8 s[8192]; mov.u32 %t4, s; mad.lo.u32 %t4, %t0, {stride * nbytes}, %t4; ld.shared.{kind.replace(' ', ' ', 1)}, [%t4]; ret;"
    report = launch(body, np.zeros(1, np.uint32))
    load = traffic(report, "ld.shared")
    assert (load.requests, load.wavefronts) == (1, wavefronts)


def test_wide_accesses_go_by_half_and_quarter_warps() -> None:
    """Both halves of the warp read the same 128 bytes: one wavefront each, by the rule that `counters` states."""
    for lanes, kind, wavefronts in ((16, "v2.u32 {%t5, %t6}", 2), (8, "v4.u32 {%t5, %t6, %t7, %t8}", 4)):
        body = f".shared .align 16 .b8 s[128]; and.b32 %t4, %t0, {lanes - 1}; mul.lo.u32 %t4, %t4, {128 // lanes}; mov.u32 %t9, s; add.u32 %t4, %t4, %t9; ld.shared.{kind}, [%t4]; ret;"
        assert traffic(launch(body, np.zeros(1, np.uint32)), "ld.shared").wavefronts == wavefronts


def test_the_transpose_with_and_without_padding() -> None:
    padded = CLEAN["transpose"]
    for width, per_request in ((33, 1), (32, 32)):
        source = padded.source.replace("tile[32][33]", f"tile[32][{width}]")
        out = np.zeros((64, 64), np.float32)
        x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
        report = Machine(compiled(source)).launch("k", (2, 2), (32, 8), [x, out, 64, 64], counters=True)
        np.testing.assert_array_equal(out, x.T)
        assert report.counters is not None
        shared = [t for t in report.counters.by_pc.values() if t.space == "shared"]
        loads, stores = ([t for t in shared if t.kind == kind] for kind in ("load", "store"))
        assert {t.wavefronts_per_request for t in stores} == {1}
        assert {t.wavefronts_per_request for t in loads} == {per_request}
        assert {t.sectors_per_request for t in report.counters.by_pc.values() if t.space == "global"} == {4}
        assert report.counters.dram_bytes == 2 * 64 * 64 * 4


def test_lines_add_up() -> None:
    kernel_ = CLEAN["reduce"]
    report = Machine(compiled(kernel_.source)).launch("k", kernel_.grid, kernel_.block, kernel_.arguments(), counters=True)
    lines = report.by_line()
    assert sum(line.thread_instructions for line in lines) == report.thread_instructions
    assert sum(line.warp_instructions for line in lines) == report.warp_instructions
    assert report.counters is not None
    assert sum(line.sectors for line in lines) == report.counters.sectors
    text = kernel_.source.splitlines()
    by_text = {text[line.line - 1].strip(): line for line in lines}
    rows, warps = 6, 4
    loads = by_text["s += x[row * n + i];"]
    assert loads.requests == rows * (2 * warps + 2)  # 300 = 128 + 128 + 44 columns
    assert by_text["out[row] = part[0];"].requests == 2 * rows  # a load from shared, a store of one lane
    assert by_text["__syncthreads();  // first"].warp_instructions == rows * warps


def test_counts_do_not_depend_on_how_the_grid_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_ = CLEAN["transpose"]
    reports = []
    for lanes in (1, 1 << 14):
        monkeypatch.setattr("aprlab.kernels.ptx.machine.LANES_A_CHUNK", lanes)
        reports.append(
            Machine(compiled(kernel_.source)).launch("k", kernel_.grid, kernel_.block, kernel_.arguments(), counters=True)
        )
    one, other = reports
    assert one.warp_counts == other.warp_counts
    assert one.thread_counts == other.thread_counts
    assert one.counters is not None
    assert other.counters is not None
    assert one.counters.by_pc == other.counters.by_pc
    assert one.counters.dram_bytes == other.counters.dram_bytes
