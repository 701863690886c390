"""The shared driver over both devices: a pass on the PTX machine, and the GPU's device without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from builders import CONFIG as WHOLE
from builders import random_model

from aprlab import engines
from aprlab.architectures import forward
from aprlab.engines.cuda import CudaDevice, CudaEngine
from aprlab.engines.kernel_engine import KernelEngine
from aprlab.engines.ptx import PtxDevice, PtxEngine
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.formats import open_model
from aprlab.kernels.cuda.device import DeviceArray
from aprlab.kernels.cuda.launch import Launch
from aprlab.model.model import Model
from aprlab.quants import types

CONFIG = replace(WHOLE, block_count=1)  # a layer tells what three would
TOKENS = np.array([7, 41, 299, 3])


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(config=CONFIG)


def logits(engine: engines.Engine) -> np.ndarray:
    """A prompt of three and one more token."""
    cache = engine.new_cache(CONFIG, 8)
    prompt = engine.to_numpy(forward(engine, CONFIG, TOKENS[:3], cache))
    return np.concatenate([prompt, engine.to_numpy(forward(engine, CONFIG, TOKENS[3:], cache))])


@pytest.fixture(scope="module")
def reference(model: Model) -> np.ndarray:
    return logits(engines.create("reference", model))


def test_a_whole_pass_agrees_with_the_reference_and_commits_no_offence(model: Model, reference: np.ndarray) -> None:
    engine = engines.create("ptx", model, checks=True)
    got = logits(engine)
    assert np.abs(got - reference).max() < 1e-4 * np.abs(reference).max()
    assert engine.device.findings == []
    assert engine.argmax(engine.from_numpy(got)).shape == (4,)
    np.testing.assert_array_equal(engine.ids(engine.argmax(engine.from_numpy(got))), reference.argmax(-1))


def test_the_embedded_model_says_the_same_on_the_ptx_machine(tiny: Path) -> None:
    """Its own types and sizes; the kernels as they ship. Five tokens of a prompt, then one of the answer."""
    with open_model(tiny) as model:
        said = {}
        for name in ("reference", "ptx"):
            engine = engines.create(name, model)
            cache = engine.new_cache(model.config, 6)
            prompt = engine.to_numpy(forward(engine, model.config, [220, 17, 10, 17, 30], cache))
            answer = engine.to_numpy(forward(engine, model.config, prompt[-1:].argmax(-1), cache))
            said[name] = np.concatenate([prompt, answer])
    np.testing.assert_array_equal(said["ptx"].argmax(-1), said["reference"].argmax(-1))
    assert np.abs(said["ptx"] - said["reference"]).max() < 1e-4 * np.abs(said["reference"]).max()


def test_contract_q8_is_off_by_what_it_declares(model: Model, reference: np.ndarray) -> None:
    engine = engines.create("ptx", model, contract="q8")
    assert engine.contract == "q8"
    off = np.abs(logits(engine) - reference).max() / np.abs(reference).max()
    assert 1e-4 < off < 0.1


def test_tokens_can_stay_on_the_device(model: Model) -> None:
    engine = engines.create("ptx", model)
    x = np.zeros((2, 300), np.float32)
    x[0, 17], x[1, 5] = 1, 1
    picked = engine.argmax(engine.from_numpy(x))
    rows = engine.to_numpy(engine.embed(picked, "token_embd.weight"))
    np.testing.assert_array_equal(rows, model.tensors["token_embd.weight"].dequantise()[[17, 5]])


class Watching(PtxDevice):
    """Counts uploads and launches and runs nothing; pretends to have `free` bytes."""

    def __init__(self, free: int | None = None) -> None:
        super().__init__()
        self.free, self.uploaded, self.launched = free, 0, [""][:0]

    def upload(self, data: np.ndarray, nbytes: int) -> np.ndarray:
        self.uploaded += nbytes
        return super().upload(data, nbytes)

    def run(self, launch: Launch) -> None:
        self.launched.append(launch.kernel.entry)

    def free_bytes(self) -> int | None:  # type: ignore[override]
        return self.free


class WatchedEngine(KernelEngine):
    name = "watched"
    device: Watching


def test_weights_go_up_in_their_own_types_once(model: Model) -> None:
    engine = WatchedEngine(model, None, Watching(), "f32")
    engine.warm()
    engine.warm()
    floats = 4 * sum(t.size for t in model.tensors.values())
    stored = sum(-(-t.nbytes // 16) * 16 for t in model.tensors.values())
    assert engine.memory()["weights"] == engine.device.uploaded == engine.needed_bytes() == stored < floats
    quantised = sum(t.type.quantised for t in model.tensors.values())
    line = engine.load_line()
    assert line.startswith(f"{len(model.tensors)} tensors: {quantised} quantised, ")
    assert f"{stored / 2**20:.1f} MiB (as float32 they would take {floats / 2**20:.1f})" in line


def test_a_model_that_does_not_fit_is_refused_with_both_figures_before_anything_is_uploaded(model: Model) -> None:
    needed = WatchedEngine(model, None, Watching(), "f32").needed_bytes()
    WatchedEngine(model, None, Watching(free=needed), "f32").warm()
    device = Watching(free=needed - 1)
    with pytest.raises(UnsupportedError, match=rf"{needed} bytes.*{needed - 1} bytes"):
        WatchedEngine(model, None, device, "f32")
    assert device.uploaded == 0


def test_q_k_and_v_share_their_prepared_activations(model: Model) -> None:
    engine = WatchedEngine(model, None, Watching(), "q8")
    h = engine.from_numpy(np.zeros((1, CONFIG.embedding_length), np.float32))
    for name in ("attn_q", "attn_k", "ffn_gate"):
        engine.matmul(h, f"blk.0.{name}.weight")
    packed = [model.tensors[f"blk.0.{name}.weight"].type.quantised for name in ("attn_q", "attn_k", "ffn_gate")]
    assert engine.device.launched.count("quantise") == 1
    assert sum(name.startswith("matvec") for name in engine.device.launched) == 3
    assert sum(packed) >= 2
    engine.matmul(engine.from_numpy(np.zeros((1, CONFIG.embedding_length), np.float32)), "blk.0.attn_q.weight")
    assert engine.device.launched.count("quantise") == 1 + packed[0]  # another array is prepared anew


def test_an_unsupported_type_is_reported_with_its_tensor() -> None:
    odd = random_model(config=CONFIG, mix=(types.Q2_K, types.Q4_K, types.Q2_K))
    engine = WatchedEngine(odd, None, Watching(), "f32")
    name = next(n for n, t in odd.tensors.items() if t.type is types.Q2_K and n.startswith("blk"))
    x = engine.from_numpy(np.zeros((1, odd.tensors[name].cols), np.float32))
    with pytest.raises(UnsupportedError, match=rf"'{name}'.*mat-vec kernel for Q2_K"):
        engine.matmul(x, name)


def test_misuse_is_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match=r"'q4'.*f32, q8"):
        engines.create("ptx", model, contract="q4")
    with pytest.raises(UsageError, match="no option 'flavour'"):
        engines.create("ptx", model, flavour=1)
    with pytest.raises(UsageError, match="'softmax'"):
        PtxDevice({"softmax": ""})
    engine = WatchedEngine(model, None, Watching(), "f32")
    q, k = (engine.from_numpy(np.zeros((1, heads, 32), np.float32)) for heads in (6, 4))
    with pytest.raises(FormatError, match="6 query heads do not share 4"):
        engine.attend(q, k, k, engine.new_cache(CONFIG, 4), 0, np.arange(1))


def test_device_arrays_are_views() -> None:
    x = DeviceArray(None, (4, 6), 8)
    assert x.reshape(-1, 3).shape == (8, 3)
    assert x.reshape((2, 12)).offset == 8
    assert (x[1:3].shape, x[1:3].offset) == ((2, 6), 8 + 24)
    assert (x[-1:].shape, x[-1:].offset, len(x)) == ((1, 6), 8 + 72, 4)
    for wrong in ((5, 5), (-1, -1), (-1, 5)):
        with pytest.raises(ValueError, match="cannot make"):
            x.reshape(wrong)
    with pytest.raises(UnsupportedError, match="steps of 1"):
        x[::2]


# ---- the GPU's device without a GPU ---------------------------------------------------------------------------------


def test_without_cupy_the_cuda_engine_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match="needs cupy"):
        engines.create("cuda", model)


class FakeError(Exception):
    pass


def fake_cupy(devices: int | None, free: int = 1 << 40) -> Any:
    """As much of cupy as the device touches: memory in NumPy, launches written down. None: there is no driver."""
    cupy: Any = ModuleType("cupy")

    class Array:
        def __init__(self, data: np.ndarray) -> None:
            self.held = data
            self.data = type("Memory", (), {"ptr": data.ctypes.data})

        def __getitem__(self, key: Any) -> Array:
            return Array(self.held[key])

        def __setitem__(self, key: Any, value: Any) -> None:
            self.held[key] = value

        def set(self, data: np.ndarray) -> None:
            self.held[:] = data

    class Module:
        def __init__(self, **how: Any) -> None:
            cupy.modules.append(how)

        def get_function(self, name: str) -> Any:
            return lambda *launch, **options: cupy.launches.append((name, *launch, options))

    def count() -> int:
        if devices is None:
            raise FakeError("cudaErrorInsufficientDriver")
        return devices

    cupy.modules, cupy.launches = [], []
    cupy.empty = lambda n, dtype: Array(np.full(n, 255, dtype))
    cupy.asnumpy = lambda array: array.held.copy()
    cupy.RawModule = Module
    cupy.get_default_memory_pool = lambda: type("Pool", (), {"free_bytes": lambda _: 0, "free_all_blocks": lambda _: None})()
    runtime = type("Runtime", (), {"getDeviceCount": staticmethod(count), "CUDARuntimeError": FakeError})
    runtime.memGetInfo = staticmethod(lambda: (free, free))  # type: ignore[attr-defined]
    device = type("Device", (), {"__init__": lambda self, n: setattr(self, "id", n), "use": lambda self: None})
    cupy.cuda = type("Cuda", (), {"runtime": runtime, "Device": device})
    return cupy


def test_without_a_driver_or_that_gpu_the_cuda_engine_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(None))
    with pytest.raises(UnsupportedError, match=r"no usable NVIDIA driver: cudaErrorInsufficientDriver"):
        engines.create("cuda", model)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1))
    with pytest.raises(UnsupportedError, match="no GPU 1, 1 found"):
        engines.create("cuda", model, device=1)


def test_the_cuda_device_passes_launches_on_as_the_table_has_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launches reach cupy as reach the PTX machine, arguments with the widths the kernels declare."""
    cupy = fake_cupy(1)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    engine = CudaEngine(model)
    wanted: list[Launch] = []
    run = engine.device.run
    engine.device.run = lambda launch: (wanted.append(launch), run(launch))[1]  # type: ignore[method-assign]
    forward(engine, CONFIG, TOKENS[:2], engine.new_cache(CONFIG, 4))
    assert len(wanted) == len(cupy.launches) > 20
    widths: dict[str, type] = {"p": np.uint64, "u": np.uint32, "f": np.float32}
    for launch, (name, grid, block, values, options) in zip(wanted, cupy.launches, strict=True):
        assert (name, grid, block, options) == (launch.kernel.entry, launch.grid, launch.block, {"shared_mem": 0})
        assert [type(v) for v in values] == [widths[kind] for kind in launch.kernel.parameters]
        expected = zip(launch.kernel.parameters, launch.arguments, strict=True)
        assert [float(v) for v in values] == [float(np.float32(v) if kind == "f" else v) for kind, v in expected]
    assert {how["backend"] for how in cupy.modules} == {"nvrtc"}
    assert all("#include" not in how["code"] for how in cupy.modules)

    ptx = PtxEngine(model)
    other: list[Launch] = []
    ptx.device.run = other.append  # type: ignore[method-assign]
    forward(ptx, CONFIG, TOKENS[:2], ptx.new_cache(CONFIG, 4))
    assert [(w.kernel, w.grid) for w in wanted] == [(o.kernel, o.grid) for o in other]


def test_the_cuda_device_moves_bytes_unchanged_and_pads_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1))
    device = CudaDevice()
    data = np.arange(18, dtype=np.uint8)
    buffer = device.upload(data, 32)
    np.testing.assert_array_equal(device.download(buffer, 0, 32), [*data, *[0] * 14])
    np.testing.assert_array_equal(device.download(buffer, 16, 4), [16, 17, 0, 0])
    assert device.pointer(buffer, 16) == buffer.data.ptr + 16


def test_a_gpu_that_is_too_small_is_reported_before_anything_is_uploaded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy(1, free=1000)
    cupy.empty = None  # an allocation would fail loudly
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(UnsupportedError, match=r"device memory, 1000 bytes"):
        engines.create("cuda", model)
