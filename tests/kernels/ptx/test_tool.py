# ruff: noqa: E501 – PTX and tables of cases read better on one line
"""Anyone's PTX on a tensor: right kernels pass, wrong ones are told apart, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aprlab import quants
from aprlab.cli.app import app_of, run_cli
from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.kernels.cuda import compile as cuda
from aprlab.kernels.ptx import Machine, parse, tool
from aprlab.model.tensor import Origin, Tensor
from aprlab.quants.types import by_name

SOURCE = """
typedef unsigned char u8;
__device__ float half(const u8* p) { float f; unsigned short h = p[0] | p[1] << 8; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
extern "C" __global__ void dequantise(const u8* w, float* out, int blocks) {
  int b = blockIdx.x * 4 + threadIdx.x / 32, i = threadIdx.x % 32;
  if (b >= blocks) return;
  out[b * 32 + i] = __fmul_rn(half(w + b * 34), (float)(signed char)w[b * 34 + 2 + i]);
}
extern "C" __global__ void matvec(const u8* w, const float* x, float* out, int rows, int cols) {
  int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float sum = 0;
  for (int b = 0; b < cols / 32; ++b) {
    const u8* p = w + (row * (cols / 32) + b) * 34;
    sum = __fmaf_rn(__fmul_rn(half(p), (float)(signed char)p[2 + lane]), x[b * 32 + lane], sum);
  }
  for (int o = 16; o; o >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, o));
  if (lane == 0) out[row] = sum;
}
extern "C" __global__ void twice(const float* x, float* out, int n) {
  int i = blockIdx.x * 128 + threadIdx.x;
  if (i < n) out[i] = x[i];
}
"""
MATVEC = ("weights", "x", "out", "rows", "cols")


def ptx(source: str) -> str:
    if not cuda.available():
        pytest.skip("no NVRTC here (the wheel nvidia-cuda-nvrtc-cu12)")
    return cuda.compile_source(source).ptx


@pytest.fixture(scope="module")
def text() -> str:
    return ptx(SOURCE)


@pytest.fixture(scope="module")
def tensor() -> Tensor:
    type_ = by_name("Q8_0")
    values = np.random.default_rng(0).standard_normal((42, 96)).astype(np.float32)
    raw = quants.quantise(values, type_).reshape(-1)
    return Tensor("test.weight", type_, (42, 96), raw, Origin(Path("memory"), "test.weight", 0))


def job(text: str, tensor: Tensor, entry: str, args: tuple[str, ...], grid: str = "rows/4", **options: int) -> tool.Job:
    return tool.Job(tool.parse(text), tensor, [tool.PlannedLaunch(entry, grid, "128", args)], **options)


def test_right_kernels_pass(text: str, tensor: Tensor) -> None:
    outcome = tool.check(job(text, tensor, "dequantise", ("weights", "out", "blocks"), "blocks/4"))
    assert outcome.comparison.right
    assert outcome.comparison.operation == "dequantise"
    assert outcome.comparison.worst == 0
    assert outcome.report.clean
    for rows in (0, 7):
        outcome = tool.check(job(text, tensor, "matvec", MATVEC, rows=rows))
        assert outcome.comparison.right
        assert outcome.comparison.values == (rows or 42)
        assert 0 < outcome.comparison.worst <= outcome.comparison.allowed
        assert outcome.report.clean


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("p[2 + lane]", "p[1 + lane]"), ("x[b * 32 + lane]", "x[b * 32 + (lane ^ 1)]"), ("(signed char)p", "(u8)p"),
        ("cols / 32; ++b", "cols / 32 - 1; ++b"), ("int o = 16", "int o = 8"),
    ],
)  # fmt: skip
def test_wrong_kernels_are_reported(tensor: Tensor, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    comparison = tool.run(job(ptx(SOURCE.replace(old, new)), tensor, "matvec", MATVEC)).comparison
    assert not comparison.right
    assert comparison.wrong > 30
    assert comparison.worst > 100 * comparison.allowed


def test_one_wrong_bit_and_missing_values_are_reported(text: str, tensor: Tensor) -> None:
    args = ("weights", "out", "blocks")
    source = SOURCE.replace("out[b * 32 + i] =", "if (b != 5) out[b * 32 + i] =")
    comparison = tool.run(job(ptx(source), tensor, "dequantise", args, "blocks/4")).comparison
    assert (comparison.unwritten, comparison.wrong) == (32, 0)
    assert not comparison.right
    each = job(text, tensor, "dequantise", args, "blocks/4")
    each.launch()
    assert each.out is not None
    each.out[3, 17] = np.nextafter(each.out[3, 17], np.float32(np.inf))
    comparison = each.compare()
    assert (comparison.wrong, comparison.at) == (1, (3, 17))


def test_activations_as_blocks_mean_what_they_say() -> None:
    x = np.random.default_rng(1).standard_normal(96).astype(np.float32)
    for kind, nbytes in (("q8_0", 34), ("q8_1", 36)):
        raw, meant = tool.activations(x, kind)
        assert raw.shape == (3, nbytes)
        d = raw[:, :2].copy().view(np.float16).astype(np.float64)
        quants_ = raw[:, nbytes - 32 :].view(np.int8)
        np.testing.assert_array_equal((d * quants_).reshape(-1), meant)
        assert np.abs(meant - x).max() < np.abs(x).max() / 127 * 0.6
    np.testing.assert_array_equal(tool.activations(x, "q8_0")[0].reshape(-1), quants.quantise(x, by_name("Q8_0")).reshape(-1))
    sums = tool.activations(x, "q8_1")[0][:, 2:4].copy().view(np.float16).reshape(-1)
    np.testing.assert_allclose(sums, x.reshape(3, 32).sum(axis=1), atol=0.2)
    with pytest.raises(UsageError, match="multiple of 32"):
        tool.activations(x[:40], "q8_1")


def test_launches_before_and_named_buffers(text: str, tensor: Tensor) -> None:
    steps = [
        tool.PlannedLaunch("twice", "cols/128", "128", ("x", "copy:cols*4", "cols")),
        tool.PlannedLaunch("matvec", "rows/4", "128", ("weights", "copy", "out", "n=rows", "m=cols+0")),
    ]
    each = tool.Job(tool.parse(text), tensor, steps)
    assert each.operation == "matvec"
    assert tool.run(each).comparison.right
    stepper = tool.step(each, warp=2)
    while not stepper.step("line").finished:
        pass
    assert each.out is not None
    assert np.isfinite(each.out[2])
    assert np.isnan(each.out[4:]).all()


def test_expressions() -> None:
    names = {"rows": 42, "cols": 96}
    for expression, value in (("rows/4", 11), ("rows//4", 10), ("(rows+1)*cols", 4128), ("7", 7), ("-rows % 4", 2)):
        assert tool.evaluate(expression, names) == value
    for bad in ("import os", "rows.real", "f(1)", "2.5", "unknown", "rows/0", ""):
        with pytest.raises(UsageError):
            tool.evaluate(bad, names)


def test_bad_requests_are_refused(text: str, tensor: Tensor) -> None:
    for args, match in (
        (("weights", "x:int7", "out", "rows", "cols"), "activations as"), (("weights", "x", "out:f64", "rows", "cols"), "output as"),
        (("weights", "x", "out", "y", "cols"), "unknown argument 'y'"), (("weights", "x", "out"), "takes 5 arguments"),
        (("weights", "x", "null", "n=1", "m=32"), "there would be nothing to compare"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            tool.run(job(text, tensor, "matvec", args, grid="1"))


def test_a_file_that_is_not_ptx(tmp_path: Path) -> None:
    path = tmp_path / "x.ptx"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"x\.ptx: not PTX"):
        tool.load(path)
    path.write_text("int main() {}")
    with pytest.raises(FormatError, match=r"x\.ptx: PTX line 1"):
        tool.load(path)
    with pytest.raises(UsageError, match="no such file"):
        tool.load(tmp_path / "none.ptx")


def test_damaged_ptx_is_refused_or_read_and_never_trips_the_parser() -> None:
    """Cut off anywhere, or with a line lost, cut or spoilt: one of our errors, or another program, but no IndexError."""
    whole = cuda.one_entry(cuda.shipped_ptx("dequantise"), "dequantise_q8_0_f32")
    lines, rng, refused = whole.split("\n"), np.random.default_rng(1), 0
    texts = [whole[:cut] for cut in range(0, len(whole), len(whole) // 40)]
    for n in range(40):
        line, spoilt = int(rng.integers(len(lines))), list(lines)
        spoilt[line] = ("", lines[line][: len(lines[line]) // 2], lines[line].replace(",", "", 1), lines[line] + " $%&")[n % 4]
        texts.append("\n".join(spoilt))
    for text in texts:
        try:
            module = parse(text)
            for entry in module.entries:
                Machine(module).program(entry, checks=False, dynamic_shared=0)
        except AprlabError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--grid", "99999999999"], "CUDA allows 2147483647"),
        (["--grid", "1", "--shared", "99999999"], "bytes of dynamic shared memory; CUDA allows"),
        (["--grid", "1", "--block", "5000"], "5000 threads"),
        (["--grid", "hello"], "known names: rows, cols"),
        (["--grid", "1", "--seed", "-1"], "--seed"),
        (["--grid", "1", "--before", "x"], "ENTRY;GRID;BLOCK;ARGS"),
    ],
)
def test_an_impossible_launch_is_one_line(options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q8.ptx"
    path.write_text(cuda.one_entry(cuda.shipped_ptx("dequantise"), "dequantise_q8_0_f32"))
    args = [word for arg in ("weights", "out", "quads=elements//4") for word in ("--arg", arg)]
    assert run_cli(["ptx", "run", str(path), "--entry", "dequantise_q8_0_f32", "--rows", "1", *args, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aprlab: ")
    assert says in line


def test_the_command_line(text: str, tmp_path: Path, tiny: Path) -> None:
    if not tiny.is_file():
        pytest.skip("no embedded model yet")
    from aprlab.formats import open_model

    with open_model(tiny) as model:
        names = [t.name for t in model.tensors.values() if t.type.name == "Q6_K"]
    shipped = tmp_path / "dequantise.ptx"
    shipped.write_text(cuda.one_entry(cuda.shipped_ptx("dequantise"), "dequantise_q6_k_f32"))
    runner = CliRunner()
    result = runner.invoke(app_of(), ["ptx", "entries", str(shipped)])
    assert result.exit_code == 0
    assert "dequantise_q6_k_f32(.u64" in result.output
    base = [
        str(shipped),
        "--entry",
        "dequantise_q6_k_f32",
        "--grid",
        "elements/1024",
        "--block",
        "256",
        "--tensor",
        names[0],
        "--rows",
        "8",
    ]
    args = ["--arg", "weights", "--arg", "out", "--arg", "quads=elements//4"]
    for command in ("run", "check", "profile"):
        result = runner.invoke(app_of(), ["ptx", command, *base, *args])
        assert result.exit_code == 0, result.output
        assert "right" in result.output
        assert "bit for bit" in result.output
    wrong = ["--arg", "weights", "--arg", "out", "--arg", "quads=elements//4 - 1"]
    result = runner.invoke(app_of(), ["ptx", "run", *base, *wrong])
    assert result.exit_code == 1
    assert "WRONG: 4 of" in result.output
    assert run_cli(["ptx", "run", *base, *wrong]) == 1  # also through the front door
    assert run_cli(["ptx", "run", *base, *args]) == 0
    result = runner.invoke(app_of(), ["ptx", "step", *base, *args, "--count", "5", "--by", "instruction"])
    assert result.exit_code == 0
    assert "32 lanes" in result.output
