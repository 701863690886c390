"""Step a kernel by source line or instruction and look at one warp: registers, shared memory, who is active.

Only the chosen warp's block runs, so other blocks' writes are not seen. Everything a `WarpView` holds is plain Python,
ready for a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprlab.errors import UsageError
from aprlab.kernels.ptx.checks import KernelFinding
from aprlab.kernels.ptx.machine import Dim, LaunchInProgress, LaunchReport, Machine, State
from aprlab.kernels.ptx.ops import DTYPES
from aprlab.kernels.ptx.parser import Location

Number = int | float | bool


@dataclass(frozen=True)
class WarpView:
    """The warp just before its next instruction.

    `active[i]` says whether lane i takes part in it; `registers` has one value a lane for each register that was
    written; `changed` names those that differ from the last view. When `finished`, the warp has ended and there is no
    next instruction.
    """

    step: int
    finished: bool
    block: tuple[int, int, int]
    warp: int
    pc: int = -1
    instruction: str = ""
    ptx_line: int = 0
    source: Location | None = None
    active: list[bool] = field(default_factory=list)
    registers: dict[str, list[Number]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    @property
    def file(self) -> str:
        return self.source.file if self.source else ""

    @property
    def line(self) -> int:
        """The source line (0: the PTX has no line information)."""
        return self.source.line if self.source else 0


class Stepper:
    """One block of a launch, advanced by hand. Arguments are those of `Machine.launch`; `block_number` counts x
    fastest.
    """

    def __init__(
        self,
        machine: Machine,
        entry: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Any] | Mapping[str, Any],
        *,
        block_number: int = 0,
        warp: int = 0,
        shared: int = 0,
        checks: bool = False,
        max_steps: int = 1_000_000,
    ) -> None:
        self.launch = LaunchInProgress(
            machine,
            entry,
            grid,
            block,
            args,
            shared=shared,
            checks=checks,
            counters=False,
            blocks=[block_number],
            max_steps=max_steps,
        )
        self.state: State = next(self.launch.chunks())
        warps = (self.launch.threads + 31) // 32
        if not 0 <= warp < warps:
            raise UsageError(f"warp {warp} of a block with {warps}", code="ptx.warp-number")
        self.warp = warp
        self.lanes = slice(32 * warp, min(32 * warp + 32, self.launch.threads))
        self._run = self.state.run(stepping=True)
        self._steps = 0
        self._before: dict[str, list[Number]] = {}
        self._pc = -1
        self._advance()
        self.view = self._look()

    @property
    def finished(self) -> bool:
        return self._pc < 0

    @property
    def findings(self) -> list[KernelFinding]:
        return self.launch.checks.findings if self.launch.checks else []

    def step(self, by: str = "line", count: int = 1) -> WarpView:
        """Go on by `count` source lines or instructions of the warp ("line", "instruction"); returns the new view,
        also kept as `view`.
        """
        if by not in ("line", "instruction"):
            raise UsageError(f"step by {by!r}; known: line, instruction", code="ptx.step-unit")
        for _ in range(count):
            if self.finished:
                break
            start = self._line()
            self._advance()
            while by == "line" and not self.finished and self._line() == start:
                self._advance()
        self.view = self._look()
        return self.view

    def run_to(self, line: int, file: str = "") -> WarpView:
        """Go on until the warp is at source line `line` (of a file whose name ends in `file`), or ends."""
        while not self.finished:
            self._advance()
            source = self._source()
            if source is not None and source.line == line and source.file.endswith(file):
                break
        self.view = self._look()
        return self.view

    def finish(self) -> LaunchReport:
        """Run the block to its end and report; arguments hold their final values."""
        while not self.finished:
            self._advance()
        self.view = self._look()
        return self.launch.finish()

    def register(self, name: str, kind: str = "") -> list[Number]:
        """One register of the warp's lanes, read as PTX type `kind` (its declared type if empty)."""
        number = self.launch.program.registers.get(name)
        if number is None:
            raise UsageError(f"no register {name!r}", code="ptx.no-such-register")
        value = self.state.regs[number]
        if value is None:
            raise UsageError(f"register {name!r} has not been written", code="ptx.register-unwritten")
        return self._values(value, kind or self.launch.program.types[number])

    def shared(self, name: str = "", kind: str = "u32") -> list[Number]:
        """A shared variable of the block (all of its shared memory if unnamed) as elements of PTX type `kind`."""
        program = self.launch.program
        start, size = program.shared[name] if name else (0, program.shared_bytes)
        if size < 0:
            size = program.shared_bytes - start
        data = self.state.shared.bytes[start : start + size // DTYPES[kind].itemsize * DTYPES[kind].itemsize]
        return data.copy().view(DTYPES[kind]).tolist()

    @property
    def shared_names(self) -> list[str]:
        return list(self.launch.program.shared)

    # ---- inside

    def _advance(self) -> None:
        """Run until the warp is about to execute again."""
        with np.errstate(all="ignore"):
            for pc in self._run:
                self._steps += 1
                index = self.state.lanes.index
                first = int(np.searchsorted(index, self.lanes.start))
                if first < len(index) and index[first] < self.lanes.stop:
                    self._pc = pc
                    return
        self._pc = -1
        self.launch.memory.write_back()

    def _source(self) -> Location | None:
        return self.launch.program.ops[self._pc].instruction.loc

    def _line(self) -> tuple[str, int]:
        source = self._source()
        return (source.file, source.line) if source else ("", 0)

    def _values(self, value: Any, kind: str) -> list[Number]:
        dtype = DTYPES[kind] if kind != "pred" else np.dtype(bool)
        full = np.ascontiguousarray(np.broadcast_to(value, self.state.shape)[0, self.lanes])
        if full.dtype.itemsize > dtype.itemsize:
            full = full.view(f"u{full.dtype.itemsize}").astype(f"u{dtype.itemsize}")
        out: list[Number] = full.view(dtype).tolist()
        return out

    def _look(self) -> WarpView:
        place = self.state.place(self.lanes.start)[0]
        if self.finished:
            return WarpView(self._steps, True, place, self.warp)
        program = self.launch.program
        registers = {
            name: self._values(self.state.regs[number], program.types[number])
            for name, number in program.registers.items()
            if self.state.regs[number] is not None
        }
        changed = [name for name, values in registers.items() if repr(self._before.get(name)) != repr(values)]
        self._before = registers
        index = self.state.lanes.index
        active = np.isin(np.arange(self.lanes.start, self.lanes.stop), index).tolist()
        item = program.ops[self._pc].instruction
        now = (self._pc, str(item), item.line, item.loc)
        return WarpView(self._steps, False, place, self.warp, *now, active, registers, changed)
