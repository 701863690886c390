"""What must hold of the compiled kernels on every architecture, and that each gate can fail. Needs NVRTC, no GPU."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from aprlab.engines.ptx import PtxDevice
from aprlab.errors import AprlabError, UnsupportedError
from aprlab.kernels.cuda import compile as nvrtc
from aprlab.kernels.cuda import cost_model, static
from aprlab.kernels.cuda.compile import Compiled, Resources
from aprlab.kernels.cuda.launch import KERNELS
from aprlab.quants.types import by_name

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC on this machine")


@cache
def compiled(module: str, arch: int) -> Compiled:
    return nvrtc.compile_source(nvrtc.source(module), arch, machine_code=True)


# ---- gates -----------------------------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("module", nvrtc.MODULES)
def test_every_module_passes_the_gates_on_every_architecture(module: str, arch: int) -> None:
    if arch not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know compute capability {arch}")
    result = compiled(module, arch)
    assert static.findings(result) == []
    assert set(result.resources) == {name for name, kernel in KERNELS.items() if kernel.module == module}
    assert result.cubin.startswith(b"\x7fELF")


@needs_nvrtc
@pytest.mark.parametrize("module", nvrtc.MODULES)
def test_the_shipped_ptx_is_what_the_source_compiles_to(module: str) -> None:
    if nvrtc.version() != (12, 9):
        pytest.skip(f"the shipped text was made by NVRTC 12.9, this is {nvrtc.version()}")
    assert compiled(module, nvrtc.SHIPPED).ptx == nvrtc.shipped_ptx(module)


def test_the_shipped_ptx_passes_the_gates_that_need_no_compiler() -> None:
    for module in nvrtc.MODULES:
        assert static.findings(Compiled(nvrtc.shipped_ptx(module), b"", {})) == []


def test_no_path_of_a_machine_is_in_the_shipped_ptx() -> None:
    for module in nvrtc.MODULES:
        files = re.findall(r'\.file\s+\d+ "([^"]+)"', nvrtc.shipped_ptx(module))
        assert files
        assert all("/" not in file for file in files)


# ---- each gate can fail ----------------------------------------------------------------------------------------------

SHIPPED = nvrtc.shipped_ptx("matvec")
Q4_K = nvrtc.one_entry(SHIPPED, "matvec_q4_k")


@pytest.mark.parametrize(
    ("find", "replace", "finding"),
    [
        ("mul.rn.f32", "mul.f32", "rounding left open: mul.f32"),
        ("add.rn.f32", "add.ftz.f32", "rounding left open: add.ftz.f32"),
        ("add.rn.f32", "ex2.approx.f32", "approximate: ex2.approx.f32"),
        ("fma.rn.f32", "fma.rn.ftz.f32", "approximate: fma.rn.ftz.f32"),
        ("ld.global.nc.v4.u32", "ld.global.nc.v2.u32", "no 16-byte loads of weights"),
        ("ld.global.nc.v4.f32", "ld.global.nc.v2.f32", "no 16-byte loads of activations"),
        ("st.global.f32", "st.local.f32", "uses local memory"),
        ("matvec_q4_k", "matvec_q4_z", "not in the launch table"),
        ("bfe.u32", "dp4a.s32.s32", "dp4a in a kernel of contract f32"),
    ],
)
def test_a_gate_falls(find: str, replace: str, finding: str) -> None:
    assert static.findings(Compiled(Q4_K, b"", {})) == []
    assert find in Q4_K
    assert any(finding in line for line in static.findings(Compiled(Q4_K.replace(find, replace), b"", {})))


def test_the_gates_for_staging_and_dp4a_fall() -> None:
    staged = nvrtc.one_entry(SHIPPED, "matvec_q6_k").replace("st.shared.v4", "st.shared.v2")
    assert any("shared memory in 16-byte pieces" in line for line in static.findings(Compiled(staged, b"", {})))
    q8 = nvrtc.one_entry(nvrtc.shipped_ptx("matvec_q8"), "matvec_q4_k_q8").replace("dp4a", "dp2a")
    assert "matvec_q4_k_q8: no dp4a" in static.findings(Compiled(q8, b"", {}))


@pytest.mark.parametrize(
    ("resources", "finding"),
    [
        (Resources(129, 0, 0, 0, 0), "129 registers"),
        (Resources(64, 8, 0, 0, 0), "8 bytes of stack"),
        (Resources(64, 0, 4, 4, 0), "4 \\+ 4 spilled"),
    ],
)
def test_the_gates_on_resources_fall(resources: Resources, finding: str) -> None:
    assert static.findings(Compiled(Q4_K, b"", {"matvec_q4_k": Resources(128, 0, 0, 0, 0)})) == []
    (line,) = static.findings(Compiled(Q4_K, b"", {"matvec_q4_k": resources}))
    assert re.search(finding, line)
    assert static.findings(Compiled(Q4_K, b"", {"other": resources})) == ["matvec_q4_k: the assembler does not report it"]


ADD = "y[i] = __fadd_rn(a[i], b[i]);"


@needs_nvrtc
def test_a_plain_product_in_the_source_is_found() -> None:
    text = nvrtc.source("qwen2").replace(ADD, "y[i] = a[i] * 3.0f;")
    assert any(re.search(r"add: rounding left open: mul\.f32", line) for line in static.findings(nvrtc.compile_source(text)))


@needs_nvrtc
@pytest.mark.parametrize("module", nvrtc.MODULES)
def test_forbidding_fused_operations_changes_nothing(module: str) -> None:
    """No product and sum of the source is left to the compiler to fuse: with and without its leave the text is the same."""
    assert nvrtc.compile_source(nvrtc.source(module), options=("--fmad=false",)).ptx == compiled(module, nvrtc.SHIPPED).ptx


@needs_nvrtc
def test_a_sum_that_the_compiler_may_fuse_is_found() -> None:
    text = nvrtc.source("qwen2").replace(ADD, "y[i] = a[i] * 3.0f + b[i];")
    assert static.findings(nvrtc.compile_source(text)) == []  # the gate on PTX alone would miss it: it is an fma.rn by then
    assert nvrtc.compile_source(text, options=("--fmad=false",)).ptx != nvrtc.compile_source(text).ptx


# ---- the compiler's driver -------------------------------------------------------------------------------------------

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4128 bytes smem, 388 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 16 bytes cumulative stack size, 388 bytes cmem[0]
"""


def test_the_assemblers_log_is_read() -> None:
    assert nvrtc.parse_log(LOG) == {"one": Resources(40, 0, 4, 8, 4128), "two": Resources(12, 16, 0, 0, 0)}


def test_an_incomplete_log_is_an_error() -> None:
    with pytest.raises(AprlabError, match="kernel two"):
        nvrtc.parse_log(LOG[: LOG.index("ptxas info    : Used 12")])


@needs_nvrtc
def test_a_broken_source_raises_with_the_compilers_words_and_line() -> None:
    broken = nvrtc.source("qwen2").replace("y[i] = __fadd_rn(a[i], b[i]);", "y[i] = nonsense;")
    line = nvrtc.texts()["qwen2.cu"].split("y[i] = __fadd_rn(a[i], b[i]);")[0].count("\n") + 1
    with pytest.raises(nvrtc.CompileError, match=rf'qwen2\.cu\({line}\): error: identifier "nonsense"'):
        nvrtc.compile_source(broken)


def test_unknown_modules_and_kernels_are_named() -> None:
    with pytest.raises(UnsupportedError, match=r"'softmax'.*dequantise, matvec"):
        nvrtc.source("softmax")
    with pytest.raises(UnsupportedError, match="'softmax'"):
        nvrtc.shipped_ptx("softmax")
    with pytest.raises(UnsupportedError, match="'matvec_q9'"):
        nvrtc.one_entry(SHIPPED, "matvec_q9")


# ---- what a mat-vec costs ----------------------------------------------------------------------------------------------


def test_thread_instructions_of_q4_k() -> None:
    """The budget: 2.6 executed PTX instructions a weight, prologue and reduction included, at rows of 8,960."""
    device = PtxDevice()
    exact, rounded = (cost_model.count(device, by_name("Q4_K"), contract) for contract in ("f32", "q8"))
    assert 2.0 < exact.thread_instructions <= 2.6
    assert rounded.thread_instructions <= 1.3
    assert exact.warp_instructions >= exact.thread_instructions  # idle lanes only add
    for cost in (exact, rounded):  # what the documentation says is what is counted
        cells = f"| Q4_K | {cost.contract} | 0.5625 | {cost.thread_instructions:.2f} | {cost.warp_instructions:.2f} |"
        assert cells in (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_roofline() -> None:
    gpu = cost_model.Gpu.of("half a terabyte", 500, 10, 1.0)
    assert gpu.allowed(by_name("Q4_K")) == pytest.approx(128 * 10 * 0.5625 / 500)
    cost = cost_model.MatvecCost(by_name("Q4_K"), "f32", 2.0, 2.5)
    rows, cols = 8, 1024
    assert cost.predicted(gpu, rows, cols) == pytest.approx(rows * cols * 2.5 / (128 * 10 * 1e9))  # bound by issuing
    idle = cost_model.MatvecCost(by_name("Q4_K"), "f32", 2.0, 0.5)
    assert idle.predicted(gpu, rows, cols) == pytest.approx(rows * cols * 0.5625 / 500e9)  # bound by memory
