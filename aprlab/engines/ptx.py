"""The PTX engine: the CUDA kernels' own PTX, executed by the PTX machine on the CPU, with NumPy alone.

For looking, not for speed: every launch of a forward pass can be stepped, profiled and checked, and a kernel fault can be put
in place of a kernel. Same launches, same bits as on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import numpy as np

from aprlab.engines.kernel_engine import KernelEngine, no_more_options
from aprlab.kernels.cuda.compile import one_entry, shipped_ptx
from aprlab.kernels.cuda.device import module_texts
from aprlab.kernels.cuda.launch import Launch
from aprlab.kernels.ptx import LaunchReport, Machine, Pointer, parse
from aprlab.model.model import Model


class PtxDevice:
    """NumPy arrays for memory, the PTX machine for launches.

    Args:
        kernels: PTX text by module; modules not named here are the shipped ones.
        checks: look for out-of-bounds, races and the like in every launch; `findings` collects them.
        overrun: uploads get this many times their length, for kernels that read behind a tensor's end.
    """

    def __init__(self, kernels: Mapping[str, str] | None = None, checks: bool = False, overrun: float = 1.0) -> None:
        self._texts = module_texts(kernels)
        self._machines: dict[str, Machine] = {}  # of kernels in other modules than the shipped ones
        self.checks, self.overrun = checks, overrun
        self.findings: list[str] = []
        self.last: LaunchReport | None = None

    def machine(self, entry: str, module: str) -> Machine:
        """The machine with this kernel loaded; parsed when first asked for."""
        if module not in self._texts:
            return shipped_machine(entry, module)
        if entry not in self._machines:
            self._machines[entry] = Machine(parse(one_entry(self._texts[module], entry)))
        return self._machines[entry]

    def upload(self, data: np.ndarray, nbytes: int) -> np.ndarray:
        if self.overrun > 1:
            nbytes = int(nbytes * self.overrun) + 16
        if data.nbytes == nbytes and data.ctypes.data % 16 == 0:
            return data  # a view on the mapped file; the machine refuses to write to it
        buffer = self.empty(nbytes)
        buffer[: data.nbytes] = data
        buffer[data.nbytes :] = 0
        return buffer

    def empty(self, nbytes: int) -> np.ndarray:
        memory = np.empty(nbytes + 16, np.uint8)
        start = -memory.ctypes.data % 16
        return memory[start : start + nbytes]

    def download(self, buffer: np.ndarray, offset: int, nbytes: int) -> np.ndarray:
        return buffer[offset : offset + nbytes].copy()

    def pointer(self, buffer: np.ndarray, offset: int) -> Pointer:
        return Pointer(buffer, offset)

    def run(self, launch: Launch) -> None:
        kernel = launch.kernel
        report = self.machine(kernel.entry, kernel.module).launch(
            kernel.entry, launch.grid, launch.block, launch.arguments, shared=launch.shared, checks=self.checks
        )
        self.findings += map(str, report.findings)
        self.last = report

    def free_bytes(self) -> None:
        return None

    def close(self) -> None:
        self._machines.clear()


@cache
def shipped_machine(entry: str, module: str) -> Machine:
    """A machine with one shipped kernel. The kernels keep no state from launch to launch, so one machine serves all."""
    return Machine(parse(one_entry(shipped_ptx(module), entry)))


class PtxEngine(KernelEngine):
    """The kernels on the PTX machine.

    Args:
        model: the weights.
        threads: not used; the machine runs on one.
        contract: ``f32`` or ``q8``.
        kernels: PTX text in place of shipped modules, by module name; `aprlab.kernels.cuda.mutations.ptx` makes faulty ones.
        checks: collect the machine's findings in `device.findings`.
        overrun: room behind every tensor, see `PtxDevice`.
    """

    name: ClassVar[str] = "ptx"
    device: PtxDevice

    def __init__(
        self,
        model: Model,
        threads: int | None = None,
        contract: str = "f32",
        kernels: Mapping[str, str] | None = None,
        checks: bool = False,
        overrun: float = 1.0,
        **unknown: Any,
    ) -> None:
        no_more_options(self.name, unknown)
        super().__init__(model, threads, PtxDevice(kernels, checks, overrun), contract)
