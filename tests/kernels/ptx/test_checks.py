# ruff: noqa: E501 – PTX and tables of cases read better on one line
"""The checks find every seeded bug, blame the right line, and leave clean kernels alone."""

from __future__ import annotations

import numpy as np
import pytest

from aprlab.errors import AprlabError
from aprlab.kernels.ptx import KernelFault, Machine, Pointer, parse

from .harness import HEADER
from .kernels import BUGS, CLEAN, compiled, run


@pytest.mark.parametrize("name", list(CLEAN))
def test_clean_kernels_are_right_and_stay_clean(name: str) -> None:
    kernel = CLEAN[name]
    for options in ({"checks": True}, {}, {"counters": True}):
        report, arguments, _ = run(kernel, **options)
        out = arguments[kernel.output]
        out = out.array if isinstance(out, Pointer) else out
        np.testing.assert_array_equal(out, kernel.expected(arguments))
        assert not report.findings, str(report.findings[0])


@pytest.mark.parametrize("name", list(BUGS))
def test_seeded_bugs_are_found(name: str) -> None:
    bug = BUGS[name]
    report, _, source = run(CLEAN[bug.kernel], bug, checks=True)
    found = [f for f in report.findings if f.kind == bug.kind]
    assert found, f"found only {[str(f) for f in report.findings]}"
    lines = source.splitlines()
    assert any(f.source is not None and bug.at in lines[f.source.line - 1] for f in found), [str(f) for f in found]
    for finding in report.findings:
        assert finding.ptx_line
        assert finding.instruction
        assert finding.count >= 1


def test_there_are_enough_bugs_of_every_kind() -> None:
    assert len(BUGS) >= 15
    assert {bug.kind for bug in BUGS.values()} == {
        "race", "out of bounds", "divergent barrier", "divergent warp operation", "uninitialised read", "misaligned",
    }  # fmt: skip


def test_a_finding_says_who_where_and_what() -> None:
    report, _, _ = run(CLEAN["reduce"], BUGS["row number off by one"], checks=True)
    (finding,) = report.findings
    assert (finding.block, finding.thread, finding.buffer, finding.offset) == ((5, 0, 0), (0, 0, 0), "out", 24)
    assert "24 bytes" in finding.message
    report, _, _ = run(CLEAN["reduce"], BUGS["two blocks on one row"], checks=True)
    (finding,) = report.findings
    assert finding.buffer == "out"
    assert finding.other is not None
    assert finding.other[0][0] // 2 == finding.block[0] // 2
    report, _, _ = run(CLEAN["reduce"], BUGS["input from before the start"], checks=True)
    assert [(f.buffer, f.offset) for f in report.findings] == [("x", -4)]
    report, _, _ = run(CLEAN["reduce"], BUGS["shared array too small"], checks=True)
    first = report.findings[0]
    assert first.buffer.startswith("shared ")
    assert (first.thread, first.offset) == ((100, 0, 0), 400)


def test_without_checks_only_what_a_gpu_stops_for_stops() -> None:
    with pytest.raises(KernelFault) as fault:
        run(CLEAN["reduce"], BUGS["row number off by one"])
    assert fault.value.finding.kind == "out of bounds"
    with pytest.raises(KernelFault) as fault:
        run(CLEAN["reduce"], BUGS["base address two bytes off"])
    assert fault.value.finding.kind == "misaligned"
    report, _, _ = run(CLEAN["reduce"], BUGS["two blocks on one row"])
    assert not report.findings


def test_a_deadlock_ends() -> None:
    body = """
    .reg .pred %p; .reg .b32 %r<3>;
    mov.u32 %r0, %tid.x; setp.lt.u32 %p, %r0, 16;
    @%p bra LEFT;
    bar.sync 1, 64;
    LEFT: ret;"""
    module = parse(f"{HEADER}.visible .entry k() {{ {body} }}")
    with pytest.raises(KernelFault, match="deadlock"):
        Machine(module).launch("k", 1, 32, [])
    report = Machine(module).launch("k", 1, 32, [], checks=True)
    assert [f.kind for f in report.findings] == ["divergent barrier"]


def test_an_endless_loop_ends() -> None:
    module = parse(f"{HEADER}.visible .entry k() {{ AGAIN: bra AGAIN; }}")
    with pytest.raises(AprlabError, match="did not end within 1000 steps"):
        Machine(module).launch("k", 1, 32, [], max_steps=1000)


def test_read_only_and_null() -> None:
    text = f"{HEADER}.visible .entry k(.param .u64 p) {{ .reg .b64 %d; .reg .b32 %r; ld.param.u64 %d, [p]; mov.u32 %r, 1; st.global.u32 [%d], %r; ret; }}"
    machine = Machine(parse(text))
    locked = np.zeros(4, np.uint32)
    locked.flags.writeable = False
    with pytest.raises(KernelFault, match="read-only"):
        machine.launch("k", 1, 1, [locked])
    with pytest.raises(KernelFault, match="no buffer"):
        machine.launch("k", 1, 1, [0])
    report = machine.launch("k", 1, 1, [locked], checks=True)
    assert [f.kind for f in report.findings] == ["read-only"]
    assert not locked.any()


def test_unwritten_registers_are_seen() -> None:
    body = """
    .reg .pred %p; .reg .b32 %r<4>; .reg .b64 %d;
    ld.param.u64 %d, [p]; mov.u32 %r0, %tid.x; setp.lt.u32 %p, %r0, {limit};
    @%p mov.u32 %r1, 7;
    st.global.u32 [%d], %r1; ret;"""
    for limit, clean in ((32, True), (20, False), (0, False)):
        text = f"{HEADER}.visible .entry k(.param .u64 p) {{ {body.replace('{limit}', str(limit))} }}"
        report = Machine(parse(text)).launch("k", 1, 32, [np.zeros(1, np.uint32)], checks=True)
        kinds = {f.kind for f in report.findings}
        assert ("uninitialised register" in kinds) is not clean
        if limit == 20:
            assert [f.thread for f in report.findings if f.kind == "uninitialised register"] == [(20, 0, 0)]


def test_races_between_chunks_of_the_grid_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are simulated one after the other still belong to one launch."""
    monkeypatch.setattr("aprlab.kernels.ptx.machine.LANES_A_CHUNK", 1024)
    kernel = CLEAN["reduce"]
    source = kernel.source.replace("out[row] =", "out[row % 3] =")
    out = Pointer(np.zeros(3, np.float32))
    rows = 100
    x = np.ones((rows, 10), np.float32)
    report = Machine(compiled(source)).launch("k", rows, 128, {"x": x, "out": out, "n": 10}, checks=True)
    races = [f for f in report.findings if f.kind == "race"]
    assert races
    assert races[0].count == rows - 3
