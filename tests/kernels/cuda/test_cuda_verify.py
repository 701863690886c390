"""`aprlab gpu`: the report, its verdict, and what it says without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from aprlab.cli.app import app_of
from aprlab.engines import cuda
from aprlab.engines.ptx import PtxDevice
from aprlab.errors import NumericError, UnsupportedError
from aprlab.kernels.cuda import compile as nvrtc
from aprlab.kernels.cuda import mutations, verify
from aprlab.kernels.cuda.launch import Launch
from aprlab.quants import types

CASES = [
    verify.matvec_case(types.Q4_K, "f32", 1, 3, 256, with_bias=True),
    verify.dequantise_case(types.Q4_K, "f32", verify.random_weights(types.Q4_K, 1, 512), 512),
    verify.add_case(),
]


class FakeGpu(PtxDevice):
    """The PTX machine in place of a GPU, with what only a GPU's device has."""

    def __init__(self, device: int = 0, **options: Any) -> None:
        super().__init__(**options)

    def describe(self) -> dict[str, Any]:
        return {"device": "none at all"}

    def seconds(self, *launches: Launch) -> float:
        return 0.5


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "cases", lambda: iter(CASES))
    monkeypatch.setattr(verify, "TIMED_BYTES", 1 << 16)


def run(*words: str) -> Any:
    return CliRunner().invoke(app_of(), ["gpu", *words])


def test_verify_writes_device_versions_results_and_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CudaDevice", FakeGpu)
    result = run("verify", "--output", str(tmp_path / "gpu.json"))
    assert result.exit_code == 0
    assert "3 of 3 cases passed on none at all" in result.output
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["passed"] is True
    assert [case["case"] for case in report["cases"]] == [case.name for case in CASES]
    assert {"aprlab", "machine", "python", "numpy", "when"} <= set(report)
    (timed,) = [t for t in report["timings"] if (t["type"], t["contract"]) == ("Q4_K", "f32")]
    assert timed["bytes_a_second"] == timed["rows"] * types.Q4_K.row_bytes(timed["cols"]) / 0.5
    assert len(report["timings"]) == 18
    assert [case["as_the_machine"] for case in report["cases"]] == [None, None, True]  # the first two are no cases of the file


def test_each_shape_is_timed_for_the_types_that_have_it() -> None:
    timed = verify.timings(FakeGpu(), [(4, 256), (8, 96)])
    assert len(timed) == 18 + 12  # rows of 96 are no whole blocks of a K type
    assert {(t["rows"], t["cols"]) for t in timed if t["type"] == "Q4_K"} == {(4, 256)}
    assert all(t["bytes_a_second"] == t["rows"] * types.by_name(t["type"]).row_bytes(t["cols"]) / 0.5 for t in timed)


def test_verify_fails_with_a_faulty_kernel_and_names_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CudaDevice", lambda device: FakeGpu(**mutations.options("q4k-min-lost")))
    result = run("verify", "--output", str(tmp_path / "gpu.json"))
    assert isinstance(result.exception, NumericError)
    assert "2 cases failed: matvec Q4_K f32 3x256 T=1, dequantise Q4_K to f32" in str(result.exception)
    assert json.loads((tmp_path / "gpu.json").read_text())["passed"] is False


def test_a_launch_that_dies_fails_its_case_and_the_next_one_runs() -> None:
    class Dying(PtxDevice):
        def run(self, launch: Launch) -> None:
            if launch.kernel.entry.startswith("matvec"):
                raise RuntimeError("an illegal memory access")
            super().run(launch)

    results = verify.verify(Dying())
    assert [r["passed"] for r in results] == [False, True, True]
    assert results[0]["fault"] == "RuntimeError: an illegal memory access"


def test_without_a_gpu_verify_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    result = run("verify", "--output", str(tmp_path / "gpu.json"))
    assert isinstance(result.exception, UnsupportedError)
    assert not (tmp_path / "gpu.json").exists()


def test_faults_are_listed() -> None:
    output = run("faults").output
    assert all(name in output for name in mutations.MUTATIONS)


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC on this machine")
def test_compile_reports_resources_and_refuses_unknown_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "MODULES", ("dequantise",))
    result = run("compile", "--arch", "90")
    assert result.exit_code == 0
    assert "dequantise_q4_k_f32" in result.output
    assert isinstance(run("compile", "--arch", "33").exception, UnsupportedError)


def test_outcomes_judge() -> None:
    assert verify.KernelOutcome(0, True).passed
    assert not verify.KernelOutcome(1, True).passed
    assert verify.KernelOutcome(1.0, False).passed
    assert not verify.KernelOutcome(1.01, False).passed
    nan, one = np.array([np.nan], np.float32), np.array([1], np.float32)
    assert not verify.within(nan, np.array([1.0]), 1.0).passed
    assert verify.unequal(nan, -nan).passed
    assert not verify.unequal(nan, one).passed
    assert not verify.unequal(np.array([0.0], np.float32), np.array([-0.0], np.float32)).passed
