"""The doctor and the view of a file: each finds what is wrong when something is."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from aprlab.errors import FormatError
from aprlab.formats import open_model
from aprlab.lab import doctor
from aprlab.model.description import describe


def fake_packages(monkeypatch: pytest.MonkeyPatch, requires: list[str], installed: dict[str, str]) -> list[doctor.Check]:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda distribution: requires)
    monkeypatch.setattr(metadata, "version", version)
    return list(doctor.packages())


def test_packages_are_compared_with_the_declared_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "numpy>=2.0",
        "gguf>=0.17",
        "numba>=0.61",
        'cupy-cuda12x>=13.3; extra == "cuda12"',
        'nbval>=0.11; extra == "test"',
    ]
    seen = fake_packages(monkeypatch, requires, {"numpy": "2.10.1", "gguf": "0.9", "nbval": "0.11.0rc1"})
    assert [(check.name, check.status) for check in seen] == [
        ("numpy", "ok"),
        ("gguf", "fail"),
        ("numba", "fail"),
        ("cupy-cuda12x (extra cuda12)", "note"),
        ("nbval (extra test)", "ok"),
    ]
    assert seen[1].detail == "0.9, older than 0.17"


def test_every_declared_dependency_is_understood() -> None:
    declared = metadata.requires("aprlab") or []
    assert len(list(doctor.packages())) == len(declared) > 20


def test_the_instruction_set_and_who_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llvmlite")
    monkeypatch.delenv("APRLAB_SIMD", raising=False)
    monkeypatch.setattr("aprlab.kernels.simd.isa.supported", lambda isa: isa.name != "avx512")
    assert doctor.instructions() == doctor.Check("instructions", "ok", "avx2, the best of this machine")
    monkeypatch.setenv("APRLAB_SIMD", "portable")
    assert doctor.instructions().status == "note"
    assert doctor.instructions().detail == "portable, asked for by APRLAB_SIMD; this machine has avx2"
    monkeypatch.setenv("APRLAB_SIMD", "mmx")
    assert doctor.instructions().status == "fail"


def test_where_compiled_kernels_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    found = doctor.compiled_kernels()
    assert found.detail.split("; ")[1].startswith(f"0 kept in {tmp_path}")
    assert found.detail.endswith(".nbc, 0.0 MB")
    monkeypatch.setattr("aprlab.kernels.simd.shipped.fits", lambda: False)
    assert doctor.compiled_kernels().status == "note"
    monkeypatch.setenv("APRLAB_KERNEL_CACHE", "off")
    assert doctor.compiled_kernels().detail.endswith("in every process: no folder can be written")


def test_the_gpu_or_why_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert doctor.gpu().status == "note"
    assert "no NVIDIA driver" in doctor.gpu().detail

    def driver(count: int, status: int = 0) -> Callable[[str], SimpleNamespace]:
        def set_count(pointer) -> int:
            pointer._obj.value = count
            return status

        return lambda name: SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=set_count)

    monkeypatch.setattr(ctypes, "CDLL", driver(0))
    assert "finds no device" in doctor.gpu().detail
    monkeypatch.setattr(ctypes, "CDLL", driver(1, 100))
    assert "CUDA error 100" in doctor.gpu().detail
    monkeypatch.setattr(ctypes, "CDLL", driver(2))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert doctor.gpu().detail.startswith("2 found, but CuPy is not installed")


def test_memory_under_a_containers_limit(tmp_path: Path) -> None:
    assert doctor._cgroup_left(tmp_path) is None
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._cgroup_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert doctor._cgroup_left(tmp_path) == 700


def test_a_model_that_answers_wrong_or_is_broken_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "ANSWER", "2 + 2 equals 5.")
    assert doctor.embedded_model().status == "fail"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(doctor.paths, "embedded_model", lambda: tmp_path / "x.gguf")
    check = doctor.embedded_model()
    assert check.status == "fail"
    assert "x.gguf" in check.detail


def test_a_lost_bias_is_missing_and_a_stranger_unexpected(tiny: Path) -> None:
    with open_model(tiny) as model:
        lost = model.tensors.pop("blk.3.attn_k.bias")
        model.tensors["blk.3.attn_kk.bias"] = lost
        seen = describe(model)
    assert seen["missing"] == ["blk.3.attn_k.bias"]
    assert seen["unexpected"] == ["blk.3.attn_kk.bias"]
    json.dumps(seen, allow_nan=False)


def test_a_file_without_a_readable_config_can_still_be_looked_at(tiny: Path) -> None:
    def broken() -> None:
        raise FormatError("has no key 'qwen2.block_count'", code="gguf.missing-key")

    with open_model(tiny) as model:
        model.make_config = model.make_tokenizer = broken
        seen = describe(model)
    assert seen["config"] == seen["tokenizer"] == {"error": "has no key 'qwen2.block_count'"}
    assert seen["missing"] == seen["unexpected"] == []
    assert len(seen["tensors"]) == 99
