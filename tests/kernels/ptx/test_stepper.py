"""Stepping: by line and by instruction, one warp among several, with values that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from aprlab.errors import UsageError
from aprlab.kernels.ptx import Machine, Stepper, parse

from .harness import kernel
from .kernels import CLEAN, compiled, mutated

BODY = """.reg .b32 %r<8>; .reg .b64 %d<4>; .reg .f32 %f<3>; .reg .pred %p<2>; .shared .align 4 .b8 cells[256];
mov.u32 %r0, %tid.x;
setp.lt.u32 %p0, %r0, 40;
@%p0 bra LOW;
mov.u32 %r1, 1000; bra JOIN;
LOW: add.u32 %r1, %r0, 5;
JOIN: cvt.rn.f32.u32 %f0, %r1;
shl.b32 %r2, %r0, 2; mov.u32 %r3, cells; add.u32 %r3, %r3, %r2; st.shared.f32 [%r3], %f0;
bar.sync 0;
ld.param.u64 %d0, [out]; mul.wide.u32 %d1, %r0, 4; add.s64 %d0, %d0, %d1; st.global.f32 [%d0], %f0; ret;"""


def stepper(warp: int = 0) -> tuple[Stepper, np.ndarray]:
    out = np.zeros(64, np.float32)
    return Stepper(Machine(parse(kernel(BODY, ".param .u64 out"))), "k", 1, 64, [out], warp=warp), out


def test_instructions_one_by_one() -> None:
    run, out = stepper(warp=1)
    assert run.view.instruction == "mov.u32 %r0, %tid.x"
    view = run.step("instruction")
    assert view.changed == ["%r0"]
    assert view.registers["%r0"] == list(range(32, 64))
    view = run.step("instruction")
    assert view.registers["%p0"] == [True] * 8 + [False] * 24
    seen = []
    while not view.finished:
        seen.append((view.instruction, sum(view.active)))
        view = run.step("instruction")
    assert ("mov.u32 %r1, 1000", 24) in seen
    assert ("add.u32 %r1, %r0, 5", 8) in seen
    assert ("cvt.rn.f32.u32 %f0, %r1", 32) in seen
    assert out.tolist() == [t + 5.0 if t < 40 else 1000.0 for t in range(64)]
    assert run.shared("cells", "f32") == out.tolist()
    assert run.step().finished


def test_the_view_is_plain_python() -> None:
    run, _ = stepper()
    run.step("instruction", count=6)
    again = json.loads(json.dumps(asdict(run.view)))
    assert again["registers"]["%f0" if "%f0" in again["registers"] else "%r1"]
    assert run.register("%r0", "u32") == list(range(32))
    assert all(type(v) is int for v in run.register("%r0"))
    with pytest.raises(UsageError, match="no register"):
        run.register("%z9")
    with pytest.raises(UsageError, match="not been written"):
        run.register("%d3")
    with pytest.raises(UsageError, match="warp 2 of a block with 2"):
        stepper(warp=2)
    with pytest.raises(UsageError, match="step by"):
        run.step("page")


def test_source_lines_of_a_compiled_kernel() -> None:
    kernel_ = CLEAN["reduce"]
    arguments = kernel_.arguments()
    run = Stepper(
        Machine(compiled(kernel_.source)), "k", kernel_.grid, kernel_.block, arguments, block_number=2, warp=0, checks=True
    )
    text = kernel_.source.splitlines()
    first_barrier = next(i for i, line in enumerate(text, 1) if "// first" in line)
    view = run.run_to(first_barrier)
    assert view.block == (2, 0, 0)
    assert "bar.sync" in view.instruction
    mine = run.shared(run.shared_names[0], "f32")[:32]  # the warp's own cells are filled already
    x = arguments["x"][2]
    assert mine == [float(x[t::128].sum()) for t in range(32)]
    lines = []
    while not run.view.finished:
        lines.append(run.view.line)
        run.step("line")
    assert text[lines[-1] - 1].strip() in ("out[row] = part[0];", "}")
    report = run.finish()
    assert report.clean
    out = arguments["out"].array
    assert out[2] == x.sum()
    assert np.isnan(out[[0, 1, 3, 4, 5]]).all()  # only the chosen block ran


def test_stepping_finds_what_running_finds() -> None:
    kernel_ = CLEAN["reduce"]
    source = mutated(kernel_.source, "__syncthreads();  // first", "")
    run = Stepper(Machine(compiled(source)), "k", kernel_.grid, kernel_.block, kernel_.arguments(), checks=True)
    while not run.step("line").finished:
        pass
    assert "race" in {f.kind for f in run.findings}
