"""The SIMD layer: instruction sets are chosen right, and the one operation that differs between them is the same in all."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding, ir
from numba import njit

from aprlab.errors import UsageError
from aprlab.kernels.simd import isa as isas
from aprlab.kernels.simd import ops, plain, vectors
from aprlab.kernels.simd.vectors import (
    dot4,
    dot4_scaled,
    load_i8x32,
    load_i32x8,
    magnitude,
    scale_halves,
    store_f32x8,
    to_f32,
    with_sign,
)

RUNNABLE = [isa for isa in isas.ALL if isa is not isas.AVX2 or isas.supported(isa)]


@njit
def _leaf(isa, acc, unsigned, signed, scales, out):
    start, u, s = load_i32x8(acc, 0), load_i8x32(unsigned, 0), load_i8x32(signed, 0)
    store_f32x8(out, 0, to_f32(dot4(isa, start, u, s)))
    store_f32x8(out, 8, to_f32(dot4_scaled(isa, start, u, s, scale_halves(isa, scales[0], scales[0]))))
    store_f32x8(out, 16, to_f32(dot4_scaled(isa, start, u, s, scale_halves(isa, scales[0], scales[1]))))
    store_f32x8(out, 24, to_f32(dot4(isa, start, magnitude(s), with_sign(isa, s, s))))


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
def test_dot_products_of_bytes_are_exact_in_every_set(isa: isas.Isa) -> None:
    rng = np.random.default_rng(1)
    cases = [(rng.integers(0, 129, 32), rng.integers(-127, 128, 32)) for _ in range(20)]
    cases += [(np.full(32, 128), np.full(32, value)) for value in (-127, 127)]  # the most that 16 bits must hold
    for n, (u, s) in enumerate(cases):
        unsigned, signed = u.astype(np.uint8), s.astype(np.int8)
        acc = rng.integers(-1000, 1000, 8).astype(np.int32)
        scales = np.array([-128, 127] if n == 0 else rng.integers(-128, 128, 2), np.int8)
        out = np.empty(32, np.float32)
        _leaf(isa, acc, unsigned, signed, scales, out)
        one, two = np.full(8, scales[0]), np.repeat(scales, 4)
        squares = plain.dot4(acc, np.abs(s).astype(np.uint8), np.abs(signed))
        wanted = [plain.dot4(acc, unsigned, signed, factor) for factor in (None, one, two)]
        for i, want in enumerate([*wanted, squares]):
            np.testing.assert_array_equal(out[8 * i : 8 * i + 8], want, err_msg=f"case {n}, operation {i}")


def test_the_best_set_that_the_machine_has_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isas.ENVIRONMENT, raising=False)
    for features, best in (
        (isas.AVX512.features + isas.AVX2.features, isas.AVX512),
        (isas.AVX512.features[:3] + isas.AVX2.features, isas.AVX2),  # AVX-512 without VNNI
        (("avx2",), isas.PORTABLE),
    ):
        monkeypatch.setattr(isas, "host_features", lambda features=features: frozenset(features))
        assert isas.choose() is best
    monkeypatch.setenv(isas.ENVIRONMENT, "portable")
    assert isas.choose() is isas.PORTABLE
    assert isas.choose("avx512") is isas.AVX512, "a parameter goes before the environment"
    with pytest.raises(UsageError, match="no AVX2"):
        isas.choose("avx2")
    with pytest.raises(UsageError, match=r"'sse'.*avx512, avx2, portable"):
        isas.choose("sse")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="assembles for x86")
def test_avx512_becomes_one_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static: no machine with AVX-512 is needed to see what LLVM makes of the set's own code."""
    monkeypatch.setattr(isas, "supported", lambda isa: True)
    byte, word = vectors.i8x32.llvm, vectors.i32x8.llvm
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(word, [word, byte, byte]), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(vectors._dot4_avx512(builder, *function.args))
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(binding.get_process_triple())
    features = ",".join(f"+{name}" for name in isas.AVX512.features)
    machine = target.create_target_machine(features=features, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    assembly = machine.emit_assembly(parsed)
    assert "vpdpbusd" in assembly
    assert "vpmull" not in assembly


@njit
def _exp(x, out):
    for i in range(0, x.size, 8):
        store_f32x8(out, i, ops.exp8(vectors.load_f32x8(x, i)))


def test_exponential() -> None:
    edge = [0.0, -0.0, -np.inf, np.inf, np.nan, 88.6, 88.8, -87.2, -88.0, -104.0, 1e30, -1e30]
    x = np.concatenate([edge, np.linspace(-87, 88, 4100)]).astype(np.float32)
    out = np.empty_like(x)
    _exp(x, out)
    with np.errstate(over="ignore"):
        want = np.exp(x.astype(np.float64))
    assert np.isnan(out[4])
    assert out[3] == np.inf
    assert out[10] == np.inf
    assert out[6] == np.inf
    assert out[2] == out[8] == out[9] == out[11] == 0
    inside = (x > -87.3) & (x < 88.36)
    assert inside.sum() > 4000
    ulps = np.abs(out[inside] - want[inside]) / np.spacing(want[inside].astype(np.float32))
    assert ulps.max() < 2


def test_only_the_kernels_need_numba() -> None:
    code = "import sys, aprlab.engines, aprlab.kernels.simd.isa, aprlab.kernels.simd.plain; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kernel_source_is_part_of_the_cache_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = isas.source_digest()
    copy = tmp_path / "simd"
    copy.mkdir()
    for path in Path(isas.__file__).parent.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(isas, "__file__", str(copy / "isa.py"))
    assert isas.source_digest.__wrapped__() == before
    with open(copy / "blocks.py", "a") as file:
        file.write("#\n")
    assert isas.source_digest.__wrapped__() != before
    assert before in vectors._ISA_MARKERS[isas.AVX2].name
