"""The CUDA engine: the kernels on an NVIDIA GPU, through cupy. Launches come from the same table as the PTX machine's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from aprlab.engines.kernel_engine import KernelEngine, no_more_options
from aprlab.errors import UnsupportedError
from aprlab.kernels.cuda.compile import OPTIONS, source
from aprlab.kernels.cuda.device import module_texts
from aprlab.kernels.cuda.launch import Launch
from aprlab.model.model import Model

_SCALARS = {"p": np.uint64, "u": np.uint32, "f": np.float32}


class CudaDevice:
    """Device memory and launches on the current stream of one GPU.

    Args:
        kernels: CUDA text (self-contained) by module; modules not named here are the package's own.
        device: number of the GPU.

    Raises:
        UnsupportedError: no cupy, no driver, no GPU.
    """

    def __init__(self, kernels: Mapping[str, str] | None = None, device: int = 0) -> None:
        self.cupy, self.device = _cupy(device)
        self.device.use()
        self._texts = module_texts(kernels)
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}

    def upload(self, data: np.ndarray, nbytes: int) -> Any:
        buffer = self.empty(nbytes)
        buffer[: data.nbytes].set(np.ascontiguousarray(data))
        buffer[data.nbytes :] = 0
        return buffer

    def empty(self, nbytes: int) -> Any:
        return self.cupy.empty(nbytes, np.uint8)  # cupy's pool aligns to 512

    def download(self, buffer: Any, offset: int, nbytes: int) -> np.ndarray:
        return self.cupy.asnumpy(buffer[offset : offset + nbytes])

    def pointer(self, buffer: Any, offset: int) -> int:
        return int(buffer.data.ptr) + offset

    def run(self, launch: Launch) -> None:
        kinds = launch.kernel.parameters
        values = tuple(_SCALARS[kind](value) for kind, value in zip(kinds, launch.arguments, strict=True))
        self.function(launch.kernel.entry, launch.kernel.module)(launch.grid, launch.block, values, shared_mem=launch.shared)

    def function(self, entry: str, module: str) -> Any:
        """The compiled kernel; its module is compiled for this GPU when first asked for."""
        if entry not in self._functions:
            if module not in self._modules:
                text = self._texts.get(module) or source(module)
                self._modules[module] = self.cupy.RawModule(code=text, options=OPTIONS, backend="nvrtc")
            self._functions[entry] = self._modules[module].get_function(entry)
        return self._functions[entry]

    def free_bytes(self) -> int:
        free, _ = self.cupy.cuda.runtime.memGetInfo()
        return int(free) + int(self.cupy.get_default_memory_pool().free_bytes())

    def seconds(self, *launches: Launch, rounds: int = 5) -> float:
        """Time of a launch by the GPU's clock: the mean of all in turn, the best of `rounds` rounds of twenty or more."""
        repeats = -(-20 // len(launches))
        for launch in launches:
            self.run(launch)
        best = float("inf")
        for _ in range(rounds):
            start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            start.record()
            for _ in range(repeats):
                for launch in launches:
                    self.run(launch)
            end.record()
            end.synchronize()
            best = min(best, self.cupy.cuda.get_elapsed_time(start, end) / 1e3 / repeats / len(launches))
        return best

    def describe(self) -> dict[str, Any]:
        """The GPU and the versions that ran the kernels."""
        runtime = self.cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self.device.id)
        return {
            "device": properties["name"].decode(),
            "compute_capability": self.device.compute_capability,
            "memory_bytes": int(properties["totalGlobalMem"]),
            "multiprocessors": int(properties["multiProcessorCount"]),
            "driver": int(runtime.driverGetVersion()),
            "runtime": int(runtime.runtimeGetVersion()),
            "nvrtc": ".".join(map(str, self.cupy.cuda.nvrtc.getVersion())),
            "cupy": self.cupy.__version__,
        }

    def close(self) -> None:
        self._functions.clear()
        self._modules.clear()
        self.cupy.get_default_memory_pool().free_all_blocks()


def _cupy(device: int) -> tuple[Any, Any]:
    """(cupy, its device). Raises UnsupportedError saying which of library, driver and GPU is missing."""
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(f"engine 'cuda' needs cupy (extra cuda12 or cuda13): {error}", code="cuda.no-cupy") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UnsupportedError(f"engine 'cuda' finds no usable NVIDIA driver: {error}", code="cuda.no-driver") from error
    if not 0 <= device < count:
        raise UnsupportedError(f"engine 'cuda': there is no GPU {device}, {count} found", code="cuda.no-such-device")
    return cupy, cupy.cuda.Device(device)


class CudaEngine(KernelEngine):
    """The kernels on a GPU.

    Args:
        model: the weights; uploaded quantised, once it is known that they fit.
        threads: not used.
        contract: ``f32`` or ``q8``.
        kernels: CUDA text in place of the package's own modules, by module name; `aprlab.kernels.cuda.mutations.sources` makes
            faulty ones.
        device: number of the GPU.
    """

    name: ClassVar[str] = "cuda"
    device: CudaDevice

    def __init__(
        self,
        model: Model,
        threads: int | None = None,
        contract: str = "f32",
        kernels: Mapping[str, str] | None = None,
        device: int = 0,
        **unknown: Any,
    ) -> None:
        no_more_options(self.name, unknown)
        super().__init__(model, threads, CudaDevice(kernels, device), contract)
