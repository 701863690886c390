"""The jit engine as a whole: instruction sets, contracts, threads, types without a kernel, a missing numba, the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import CONFIG, random_model, tensor

from aprlab import engines
from aprlab.architectures import forward
from aprlab.conversion.converter import convert
from aprlab.engines.base import Engine
from aprlab.engines.jit import FUSED, JitEngine
from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.kernels.simd import isa as isas
from aprlab.kernels.simd import shipped
from aprlab.model.content import Held, Rows
from aprlab.model.model import Model
from aprlab.quants import types
from aprlab.quants.nonlinear import iq4_nl_as_q8_0

TOKENS = [5, 250, 17, 99, 3, 3, 120, 64, 299, 0]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


def logits(engine: Engine, tokens: list[int], steps: int = 1) -> np.ndarray:
    """Logits of all `tokens`, given to the engine in `steps` of equal length."""
    cache = engine.new_cache(CONFIG, len(tokens))
    size = len(tokens) // steps
    parts = [forward(engine, CONFIG, tokens[i : i + size], cache) for i in range(0, len(tokens), size)]
    return np.concatenate([engine.to_numpy(part) for part in parts])


@pytest.mark.parametrize("contract", ["f32", "q8"])
def test_results_do_not_depend_on_threads(contract: str) -> None:
    model = random_model(mix=(types.Q4_K, types.Q6_K, types.Q5_0, types.Q8_0))  # each way to multiply: kernels compile slowly
    one, two = (JitEngine(model, threads, contract=contract) for threads in (1, 2))
    assert two.tasks == 2
    for steps in (1, 5, 10):  # tiles and BLAS, fused for two, fused for one
        np.testing.assert_array_equal(logits(one, TOKENS, steps), logits(two, TOKENS, steps))
    np.testing.assert_array_equal(logits(one, TOKENS, 5), logits(one, TOKENS, 10))  # fused kernels: no batch effect
    assert len(TOKENS) > FUSED


@pytest.mark.parametrize("contract", ["f32", "q8"])
def test_both_files_of_a_model_give_the_same_bits(tiny: Path, tmp_path: Path, contract: str) -> None:
    convert(tiny, tmp_path / "tiny.apr")
    found = []
    for path in (tiny, tmp_path / "tiny.apr"):
        with open_model(path) as model:
            engine = JitEngine(model, 2, contract=contract)
            cache = engine.new_cache(model.config, 16)
            parts = [forward(engine, model.config, tokens, cache) for tokens in ([1, 2, 3, 4, 5, 6, 7], [8], [9, 10])]
            found.append(np.concatenate(parts))
            engine.close()
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


def test_contracts_differ_as_they_should(model: Model) -> None:
    want = logits(engines.create("reference", model), TOKENS)
    exact = logits(JitEngine(model, 1), TOKENS, 10)
    rounded = logits(JitEngine(model, 1, contract="q8"), TOKENS, 10)
    spread = want.std()
    assert np.abs(exact - want).max() < 1e-5 * spread
    assert 1e-3 * spread < np.abs(rounded - want).max() < 0.5 * spread


@pytest.mark.parametrize("contract", ["f32", "q8"])
@pytest.mark.parametrize("type_", [types.Q4_K, types.Q5_0, types.F16, types.BF16], ids=str)
def test_tiles_and_fused_kernels_keep_the_same_contract(contract: str, type_: types.TensorType) -> None:
    """One product, since over a whole pass a last bit turns one rounding of activations into another."""
    rng = np.random.default_rng(8)
    w, x = rng.normal(size=(600, 256)).astype(np.float32), rng.normal(size=(FUSED + 3, 256)).astype(np.float32)
    model = random_model()
    model.tensors["w"] = tensor("w", w, type_)
    engine = JitEngine(model, 2, contract=contract)
    tiled = engine.matmul(x, "w")
    fused = np.concatenate([engine.matmul(x[t : t + 1], "w") for t in range(len(x))])
    bound = 600 * 2.0**-24 * (np.abs(x) @ np.abs(model.tensors["w"].dequantise().T))
    assert (np.abs(tiled - fused) <= bound).all()
    other = JitEngine(model, 2, contract="q8" if contract == "f32" else "f32").matmul(x, "w")
    assert (np.abs(other - fused) > bound).any()


@pytest.mark.parametrize("simd", [isa.name for isa in isas.ALL if isa is not isas.AVX2 or isas.supported(isa)])
def test_instruction_sets_agree(model: Model, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isas.ENVIRONMENT, simd)
    engine = JitEngine(model, 1)
    assert engine.isa.name == simd
    # one matrix of a type that every real model has; each kernel has its own test for every set
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    got = engine.matmul(x, "blk.0.attn_q.weight", "blk.0.attn_q.bias")
    want = engines.create("reference", model).matmul(x, "blk.0.attn_q.weight", "blk.0.attn_q.bias")
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("contract", ["f32", "q8"])
def test_iq4_nl_is_kept_as_q8_0_with_the_same_values(contract: str) -> None:
    rng = np.random.default_rng(11)
    w, x = rng.normal(size=(70, 96)).astype(np.float32), rng.normal(size=(FUSED + 2, 96)).astype(np.float32)
    model = random_model()
    model.tensors["w"] = tensor("w", w, types.by_name("IQ4_NL"))
    values = model.tensors["w"].dequantise()
    model.tensors["same"] = tensor("same", values, types.F32).replace(
        type=types.Q8_0, raw=iq4_nl_as_q8_0(model.tensors["w"].raw)
    )
    np.testing.assert_array_equal(model.tensors["same"].dequantise(), values)
    engine = JitEngine(model, 1, contract=contract)
    np.testing.assert_array_equal(engine.embed(np.array([3, 0, 69]), "w"), values[[3, 0, 69]])
    for part in (x, x[:1]):
        found = engine.matmul(part, "w")
        np.testing.assert_array_equal(found, engine.matmul(part, "same"))
        if contract == "f32":
            np.testing.assert_allclose(found, part.astype(np.float64) @ values.T.astype(np.float64), atol=1e-4)
    assert engine.memory()["weights"] == 70 * 3 * 34


def test_types_without_a_kernel_are_decoded_once(model: Model) -> None:
    w = np.random.default_rng(4).normal(size=(6, 64)).astype(np.float32)
    changed = random_model()
    changed.tensors["odd"] = tensor("odd", w, types.APR_Q8)
    engine = JitEngine(changed, 1)
    assert engine.memory()["weights"] == 0
    x = np.random.default_rng(5).normal(size=(1, 64)).astype(np.float32)
    np.testing.assert_allclose(engine.matmul(x, "odd"), x @ changed.tensors["odd"].dequantise().T, atol=1e-4)
    assert engine.memory()["weights"] == w.nbytes
    engine.close()
    assert engine.memory()["weights"] == 0


def test_activations_for_floats_take_the_plain_way_each_by_itself(model: Model) -> None:
    engine, name = JitEngine(model, 2), "blk.0.attn_q.weight"
    x = np.random.default_rng(9).normal(size=(3, 256)).astype(np.float32)
    x[1, 7] = 1e6  # 2^20 times the others
    got = engine.matmul(x, name)
    w = model.tensor(name).dequantise().astype(np.float64)
    assert (np.abs(got - x @ w.T) <= 260 * 2.0**-24 * (np.abs(x) @ np.abs(w.T))).all()
    for t in (0, 1, 2):
        np.testing.assert_array_equal(engine.matmul(x[t : t + 1], name)[0], got[t])
    assert engine.memory()["packed"] == model.tensor(name).nbytes
    x[1, 7] = np.nan
    got = engine.matmul(x, name)
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


def test_a_tensor_that_decodes_in_its_own_way_is_used_as_it_decodes(model: Model) -> None:
    class Doubled(Held):
        as_stored = False

        def values(self, kind: types.TensorType, shape: tuple[int, ...], rows: Rows | None = None) -> np.ndarray:
            return 2 * super().values(kind, shape, rows)

    plain = model.tensor("output.weight")
    changed = random_model()
    changed.tensors["output.weight"] = plain.replace(content=Doubled(plain.raw))
    x = np.random.default_rng(6).normal(size=(1, 256)).astype(np.float32)
    np.testing.assert_allclose(
        JitEngine(changed, 1).matmul(x, "output.weight"), 2 * JitEngine(model, 1).matmul(x, "output.weight"), rtol=1e-4, atol=1e-4
    )


def test_misuse(model: Model) -> None:
    with pytest.raises(UsageError, match=r"'q4'.*f32, q8"):
        engines.create("jit", model, contract="q4")
    with pytest.raises(UsageError, match="100000 threads"):
        engines.create("jit", model, threads=100_000)
    with pytest.raises(UsageError, match="'mmx'"):
        engines.create("jit", model, simd="mmx")


WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
sys.path.insert(0, sys.argv[1])
from builders import random_model
from aprlab import engines
from aprlab.errors import UsageError
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("default")
    made = [engines.create("jit", random_model(), simd="portable").name for _ in range(2)]
print(*made, len(seen), seen[0].message)
try:
    engines.create("jit", random_model(), contract="q8")  # the reference has no such contract to offer
except UsageError as error:
    print(error)
"""


def test_without_numba_the_reference_takes_its_place() -> None:
    tests = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA, tests], capture_output=True, text=True, check=True)
    created, refused = done.stdout.splitlines()
    assert created.startswith("reference reference 1 engine 'jit' is not available here (")
    assert created.endswith("'reference' takes its place")
    assert refused.startswith("engine 'jit' is not available here: ")


CACHED = """
import numpy as np, sys
from aprlab.kernels.simd import isa, kernels
from aprlab.quants.types import Q8_0
raw = kernels.frozen(np.arange(68, dtype=np.uint8) % 7)
out = np.empty((1, 2), np.float32)
chosen = isa.choose(sys.argv[1])
x, none, odd = np.ones((1, 32), np.float32), np.empty(0, np.float32), np.zeros(1, np.uint8)
kernels.matmul_q8(chosen, kernels.KINDS[Q8_0], raw, 34, x, none, out, odd, 0, 2)
stats = kernels.matmul_q8.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), out.tolist())
"""


def test_kernels_are_cached_on_disk_for_each_instruction_set(tmp_path: Path) -> None:
    def run(simd: str) -> list[str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", CACHED, simd], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split(maxsplit=2)

    first, again, other = run("portable"), run("portable"), run("avx512")
    assert first[:2] == ["0", "1"]
    assert again[:2] == ["1", "0"], "the second start compiles again"
    assert len(list(tmp_path.rglob("*.matmul_q8-*.nbc"))) == 2, "one set's kernel was taken for another's"
    assert first[2] == again[2] == other[2]


COUNTED = """
import sys
sys.path.insert(0, sys.argv[1])
from numba.core import event
from builders import CONFIG, random_model
from aprlab.architectures import forward
from aprlab.engines.jit import JitEngine
from aprlab.quants import types

compiled = []

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(f"{event.data['dispatcher'].py_func.__name__}{event.data['args']}")
    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
model = random_model(mix=(types.Q4_K, types.Q5_0, types.Q8_0, types.Q3_K, types.F16))
for contract in ("f32", "q8"):
    for threads in (1, 2):
        engine = JitEngine(model, threads, contract=contract)
        cache = engine.new_cache(CONFIG, 300)
        for tokens in [list(range(260)), [8], [9, 10]]:
            forward(engine, CONFIG, tokens, cache)
print("\\n".join(compiled))
"""


def test_the_engine_compiles_nothing(tmp_path: Path) -> None:
    """All that it calls is shipped, with the very types that it is called with."""
    if not shipped.fits():
        pytest.skip("the shipped modules are for another release of numba, or another platform")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COUNTED, str(Path(__file__).parents[2])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.real
def test_real_model_agrees_with_the_reference(real_05b: Path) -> None:
    """24 layers in float32 leave about 2e-5; a wrong scale or sign leaves whole units."""
    with open_model(real_05b) as real:
        config, tokens = real.config, [785, 6722, 315, 9625, 374]
        engine, reference = JitEngine(real, 1), engines.create("reference", real, 1, cache_weights=False)
        found = []
        for each in (engine, reference):
            cache = each.new_cache(config, len(tokens))
            found.append(each.to_numpy(forward(each, config, tokens, cache, last_only=True))[0].astype(np.float64))
        got, want = found
        assert np.abs(got - want).max() < 2e-4
        assert got.argmax() == want.argmax()
        # one token at a time, fused kernels only
        cache = engine.new_cache(config, len(tokens))
        for token in tokens:
            last = engine.to_numpy(forward(engine, config, [token], cache))[0]
        assert np.abs(last - want).max() < 2e-4
        rounded = JitEngine(real, 1, contract="q8")
        cache = rounded.new_cache(config, len(tokens))
        for token in tokens:
            last = rounded.to_numpy(forward(rounded, config, [token], cache))[0]
        assert divergence(want, last) < 1e-2
        assert 1e-2 < np.abs(last - want).max() < 2, "eight bits must show, and no more than in llama.cpp"


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two rows of logits, nats."""
    a, b = (x.astype(np.float64) - x.max() for x in (p, q))
    a, b = (x - np.log(np.exp(x).sum()) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum())
