"""Kernel stepper: one of the CUDA kernels on the PTX machine, by source line or instruction; NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.kernels.cuda import compile as nvrtc
from aprlab.kernels.cuda import launch, mutations
from aprlab.kernels.ptx import Machine, parse
from aprlab.kernels.ptx.counters import LineProfile
from aprlab.kernels.ptx.machine import LaunchReport
from aprlab.kernels.ptx.memory import Pointer
from aprlab.kernels.ptx.stepper import Number, Stepper, WarpView
from aprlab.kernels.ptx.tool import KernelComparison, compare_exactly, compare_product
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.widgets.models.base import Observable, Stopped

OPERATIONS = ("dequantise", "matvec")
ROWS = 8  # of the tensor that a kernel is run on: a block of the mat-vec does eight


@dataclass(frozen=True)
class ListingLine:
    """One line of a text: its number, its text, and what it cost in the whole launch (None: nothing)."""

    number: int
    text: str
    cost: LineProfile | None = None


class _WatchedStepper(Stepper):
    """A stepper that calls `tick` after every 256 instructions of its warp; what that raises ends the run."""

    def __init__(self, tick: Callable[[], None], *args: Any, **options: Any) -> None:
        self._tick, self._advanced = tick, 0
        super().__init__(*args, **options)

    def _advance(self) -> None:
        super()._advance()
        self._advanced += 1
        if self._advanced % 256 == 0:
            self._tick()


class KernelStepper(Observable):
    """A kernel on the first rows of a tensor, stopped before the next instruction of one warp.

    Attributes:
        operation: ``dequantise`` or ``matvec``.
        name: of the tensor.
        fault: a seeded bug of the kernels, or ''.
        block_number, warp, lane: who is watched.
        register: the register whose lanes are shown, or ''.
        report: of a launch of all blocks, with counters.
        comparison: its result compared with the right one.
    """

    def __init__(self, model: str | Path | None = None, name: str = "", operation: str = "dequantise", fault: str = "") -> None:
        super().__init__()
        self.model = open_model(model if model is not None else paths.embedded_model())
        self.operation, self.fault = operation, ""
        self.block_number, self.warp, self.lane, self.register = 0, 0, 0, ""
        self.report: LaunchReport | None = None
        self.comparison: KernelComparison | None = None
        quantised = [n for n, t in self.model.tensors.items() if t.type is types.Q4_K and len(t.shape) == 2] or self.names
        if not name and not quantised:
            kinds = ", ".join(sorted(kind.name for kind in launch.PACKED))
            raise UsageError(
                f"no matrix of a type that there is a kernel for: {kinds}", code="widgets.no-kernel-matrix", path=self.model.path
            )
        self.name = name or quantised[0]
        self._load(operation, self.name, fault)

    # -- what to run

    @property
    def names(self) -> list[str]:
        """Tensors that the kernels can be run on."""
        return [n for n, t in self.model.tensors.items() if t.type in launch.PACKED and len(t.shape) == 2]

    @property
    def faults(self) -> list[str]:
        """Seeded bugs that change the kernel which is loaded."""
        return _changing(self.kernel.module, self.kernel.entry)

    def choose(self, *, operation: str | None = None, name: str | None = None, fault: str | None = None) -> None:
        """Load another kernel, tensor or seeded bug, and begin again."""
        self.work.free()
        other = (operation or self.operation) != self.operation or (name or self.name) != self.name
        wanted = self.fault if fault is None and not other else fault or ""
        self._load(operation or self.operation, name or self.name, wanted)
        self.changed()

    def watch(
        self, *, block_number: int | None = None, warp: int | None = None, lane: int | None = None, register: str | None = None
    ) -> None:
        """Look at another warp (which begins again), lane or register."""
        self.work.free()
        if lane is not None:
            self.lane = min(max(lane, 0), 31)
        if register is not None:
            self.register = register
        if block_number is not None or warp is not None:
            self._begin(self.block_number if block_number is None else block_number, self.warp if warp is None else warp)
        self.changed()

    def _load(self, operation: str, name: str, fault: str) -> None:
        if operation not in OPERATIONS:
            raise UsageError(f"unknown operation {operation!r}; known: {', '.join(OPERATIONS)}", code="widgets.unknown-operation")
        tensor = self.model.tensor(name)
        kernel = self._kernel(operation, tensor)
        text = nvrtc.shipped_ptx(kernel.module)
        if fault:
            known = _changing(kernel.module, kernel.entry)
            if fault not in known:
                raise UsageError(
                    f"seeded bug {fault!r} does not change {kernel.entry}; these do: {', '.join(known) or 'none'}",
                    code="widgets.fault-not-for-kernel",
                )  # fmt: skip
            text = mutations.ptx(fault)[kernel.module]
        self.operation, self.name, self.fault, self.kernel = operation, name, fault, kernel
        self.__dict__.pop("sources", None)
        self._text = nvrtc.one_entry(text, kernel.entry)
        self._machine = Machine(parse(self._text))
        self.report = self.comparison = None
        self._begin(0, 0)

    @staticmethod
    def _kernel(operation: str, tensor: Tensor) -> launch.Kernel:
        kind = tensor.type.name.lower()
        entry = f"dequantise_{kind}_f32" if operation == "dequantise" else f"matvec_{kind}"
        if entry not in launch.KERNELS:
            raise UsageError(f"there is no kernel {entry!r}", code="widgets.no-kernel", tensor=tensor.name)
        return launch.KERNELS[entry]

    def _launch(self) -> tuple[launch.Launch, np.ndarray, Callable[[], KernelComparison]]:
        """The launch on fresh buffers, its result, and what holds it against the right one."""
        tensor = self.model.tensor(self.name)
        rows, cols = min(ROWS, tensor.rows), tensor.cols
        raw = np.ascontiguousarray(tensor.blocks()[:rows]).reshape(-1)
        raw = np.concatenate([raw, np.zeros(launch.padded(len(raw)) - len(raw), np.uint8)])
        weights = tensor.dequantise(slice(0, rows))
        shape = (rows, cols) if self.operation == "dequantise" else (1, rows)
        out = np.full(shape, np.nan, np.float32)
        target = Pointer(out, name="y", initialised=False)
        if self.operation == "dequantise":
            return launch.dequantise(tensor.type, raw, target, rows * cols), out, lambda: compare_exactly(out, weights)
        x = np.random.default_rng(0).standard_normal((1, cols)).astype(np.float32)
        prepared = np.zeros(launch.prepared_bytes("f32", 1, cols), np.uint8)
        first = launch.prepare("f32", x, prepared, 1, cols)
        module = parse(nvrtc.one_entry(nvrtc.shipped_ptx(first.kernel.module), first.kernel.entry))
        Machine(module).launch(first.kernel.entry, first.grid, first.block, first.arguments)
        made = launch.matvec(tensor.type, "f32", raw, prepared, launch.NULL, target, 1, rows, cols)
        return made, out, lambda: compare_product(out[0], weights, x[0].astype(np.float64))

    def _begin(self, block_number: int, warp: int) -> None:
        made, _, _ = self._launch()
        blocks = int(np.prod(made.grid))
        if not 0 <= block_number < blocks:
            raise UsageError(f"block {block_number} of {blocks}", code="widgets.no-such-block")
        self.grid, self.threads = made.grid, made.kernel.threads
        self.stepper = _WatchedStepper(
            self._tell, self._machine, made.kernel.entry, made.grid, made.block, made.arguments, block_number=block_number,
            warp=warp, shared=made.shared,
        )  # fmt: skip
        self.block_number, self.warp = block_number, warp

    # -- going on

    @property
    def view(self) -> WarpView:
        """The warp now."""
        return self.stepper.view

    def _tell(self) -> None:
        """Go on, unless asked to stop."""
        if self.work.busy:
            self.work.tell(self.work.doing, self.work.done)

    def restart(self) -> None:
        """From the first instruction."""
        self.work.free()
        self._begin(self.block_number, self.warp)
        self.changed()

    def step(self, by: str = "line", count: int = 1) -> None:
        """Go on by source lines or instructions."""
        self.work.free()
        self.stepper.step(by, count)
        self.changed()

    def run_to(self, line: int, file: str = "") -> None:
        """Go on to a source line (at least one instruction), in the background: it may never be reached."""
        self._go(f"running to line {line}", lambda: self.stepper.run_to(line, file or self.view.file))

    def run_to_ptx(self, line: int) -> None:
        """Go on to an instruction, by its line in the PTX text."""

        def run() -> None:
            while not self.stepper.step("instruction").finished and self.stepper.view.ptx_line != line:
                pass

        self._go(f"running to PTX line {line}", run)

    def _go(self, what: str, run: Callable[[], object]) -> None:
        """Run the warp in the background; it stays where it is stopped."""

        def job() -> None:
            try:
                run()
            except Stopped:
                self.stepper.step("instruction", 0)  # only looks
                raise

        self.work.start(what, job)

    def profile(self) -> None:
        """Run all blocks with counters, in the background, and compare the result with the right one."""

        def job() -> None:
            made, _, compare = self._launch()
            self._tell()
            self.report = self._machine.launch(made.kernel.entry, made.grid, made.block, made.arguments, counters=True)
            self.comparison = compare()

        self.work.start("running all blocks with counters", job)

    # -- what is shown

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        """Lines of each CUDA source file that is loaded, the seeded bug in place."""
        files = mutations.files(self.fault) if self.fault else nvrtc.texts()
        return {name: text.splitlines() for name, text in files.items()}

    @property
    def file(self) -> str:
        """The source file in which the warp is (or was last)."""
        return self.view.file or f"{self.kernel.module}.cu"

    def source(self, file: str = "") -> list[ListingLine]:
        """A source file with its costs."""
        name = file or self.file
        costs = {p.line: p for p in self.report.by_line() if p.file == name} if self.report is not None else {}
        return [ListingLine(n, text, costs.get(n)) for n, text in enumerate(self.sources.get(name, []), 1)]

    def ptx(self) -> list[ListingLine]:
        """The PTX text of this kernel alone."""
        return [ListingLine(n, text.expandtabs(4)) for n, text in enumerate(self._text.splitlines(), 1)]

    def registers(self) -> list[tuple[str, Number, bool]]:
        """(name, value in the watched lane, whether the last step changed it), changed ones first."""
        view = self.view
        rows = [(name, values[min(self.lane, len(values) - 1)], name in view.changed) for name, values in view.registers.items()]
        return sorted(rows, key=lambda row: not row[2])

    def lanes(self) -> list[Number]:
        """The watched register in every lane; [] where it has not been written."""
        return self.view.registers.get(self.register, [])

    def shared(self, kind: str = "f32") -> dict[str, list[Number]]:
        """Shared variable -> its elements as PTX type `kind`."""
        return {name: self.stepper.shared(name, kind) for name in self.stepper.shared_names}

    def words(self) -> str:
        """Where it stands, in one line."""
        view = self.view
        where = f"block {'.'.join(map(str, view.block))}, warp {view.warp}, {view.step} instructions done"
        if view.finished:
            return f"{where}: the warp has ended"
        active = sum(view.active)
        return f"{where}: next is {view.file}:{view.line}, {active} of {len(view.active)} lanes active"


@cache
def _changing(module: str, entry: str) -> list[str]:
    """Seeded bugs that change one kernel."""
    healthy = nvrtc.one_entry(nvrtc.shipped_ptx(module), entry)
    texts = {name: mutations.ptx(name).get(module) for name in mutations.MUTATIONS}
    return [name for name, text in texts.items() if text is not None and nvrtc.one_entry(text, entry) != healthy]


__all__ = ["OPERATIONS", "KernelStepper", "ListingLine"]
