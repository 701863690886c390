"""Shipped modules: what the sources give, used where they fit and nowhere else, and the same results as compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numba.core.registry import cpu_target

from aprlab.kernels.simd import emission, kernels, shipped
from aprlab.kernels.simd import isa as isas

CODEGEN = cpu_target.target_context.codegen()
RMS_NORM = emission.F2, emission.F1, emission.F64, emission.F2
BEST = next(isa for isa in isas.ALL if isas.supported(isa))
HERE = "the shipped modules are for another release of numba, or another platform"
STALE = "the kernels' sources have changed: run docs/make/kernel_modules.py"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of archives that a test may change."""
    for isa in shipped.SHIPPED:
        (tmp_path / shipped.path(isa).name).write_bytes(shipped.path(isa).read_bytes())
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped._modules.cache_clear()
    yield tmp_path
    shipped._modules.cache_clear()


@pytest.mark.parametrize("isa", shipped.SHIPPED, ids=lambda isa: isa.name)
def test_archives_are_of_these_sources(isa: isas.Isa) -> None:
    archive = shipped.read(isa)
    assert archive.made_with["sources"] == isas.source_digest(), STALE
    assert set(archive.modules) == {shipped.key(kernel.py_func, sig) for kernel, sig in emission.wanted(isa)}, STALE


EMIT = """
import sys
from pathlib import Path
from aprlab.kernels.simd import emission, isa, shipped
shipped.FOLDER = Path(sys.argv[1])
shipped.write(isa.AVX2, emission.emit(isa.AVX2, 3))
"""


def test_a_fresh_emission_is_what_is_shipped(own_folder: Path) -> None:
    """Of the first kernels; `docs/make/kernel_modules.py --check` compares all, in minutes."""
    there = shipped.read(isas.AVX2)
    if there.made_with != shipped.made_with(CODEGEN):
        pytest.skip(HERE)
    environment = os.environ | emission.environment(isas.AVX2)
    subprocess.run([sys.executable, "-c", EMIT, str(own_folder)], env=environment, check=True)
    made = shipped.read(isas.AVX2).modules
    assert len(made) == 3
    for name, module in made.items():
        assert module == there.modules[name], name


def test_no_path_of_the_maker_is_shipped() -> None:
    for isa in shipped.SHIPPED:
        for module in shipped.read(isa).modules.values():
            assert b"site-packages" not in module.rest and b"/aprlab/" not in module.rest
            assert "/aprlab/" not in module.text


@pytest.mark.parametrize("what", ["sources", "numba", "llvmlite", "triple", "layout", "objects"])
def test_an_archive_that_does_not_fit_is_not_used(own_folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = shipped.read(BEST)
    other = replace(archive, made_with=archive.made_with | {what: "other"})
    monkeypatch.setattr(shipped, "read", {BEST: other}.__getitem__)
    assert shipped.generate(kernels.rms_norm.py_func, RMS_NORM, CODEGEN) is None


@pytest.mark.parametrize("damage", ["torn", "empty", "gone", "not a pickle"])
def test_a_damaged_archive_is_not_used(own_folder: Path, damage: str) -> None:
    path = shipped.path(BEST)
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"torn": content[: len(content) // 2], "empty": b"", "not a pickle": b"abc"}[damage])
    assert shipped.generate(kernels.rms_norm.py_func, RMS_NORM, CODEGEN) is None


def test_releases() -> None:
    assert shipped.release("0.68.1") == shipped.release("0.68.0rc1") == "0.68" != shipped.release("0.69.0")


SUMS = """
import sys
import numpy as np
from pathlib import Path
from aprlab.kernels.simd import isa, kernels, shipped
if sys.argv[1:]:
    shipped.FOLDER = Path(sys.argv[1])
x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
out = np.empty_like(x)
kernels.rms_norm(x, np.ones(40, np.float32), 1e-6, out)
print(out.tobytes().hex(), sum(kernels.rms_norm.stats.cache_hits.values()))
"""


def test_without_a_module_a_kernel_is_compiled_to_the_same(tmp_path: Path) -> None:
    if not shipped.fits(BEST):
        pytest.skip(HERE)

    def run(cache: str, *more: str, **switch: str) -> list[str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / cache), **switch}
        command = [sys.executable, "-c", SUMS, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    made, compiled = run("a"), run("b", str(tmp_path))
    assert (made[0], made[1], compiled[1]) == (compiled[0], "1", "0")
    assert list((tmp_path / "a").rglob("*.nbc")) and list((tmp_path / "b").rglob("*.nbc"))
    assert run("c", APRLAB_KERNEL_CACHE="off") == compiled
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").rglob("*.nbc"))
