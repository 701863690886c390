"""The SIMT machine: runs one entry over a grid, all threads of many blocks at once, every register an array.

A group is a set of lanes (threads) at one pc. The group with the lowest pc runs first and merges with any group that
waits where it arrives, which is how divergent threads converge again. While all live lanes are in one group, results
replace whole arrays and nothing is masked. A register that is the same for all threads, for all threads of a block,
or for all blocks stays a scalar, (B, 1) or (1, T) array until it meets one that is not, so address and loop
arithmetic cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, UsageError
from aprlab.kernels.ptx.checks import Checks, KernelFinding
from aprlab.kernels.ptx.counters import Counters, LineProfile
from aprlab.kernels.ptx.memory import AddressSpace, Buffer, Lanes, Pointer, merge
from aprlab.kernels.ptx.parser import TYPE_BYTES, Location, Module
from aprlab.kernels.ptx.program import MOST_SHARED, Access, Getter, Program, Setter, build

Dim = int | Sequence[int]
_CONTAINERS: dict[int, np.dtype[Any]] = {
    size: np.dtype(code) for size, code in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))
}
_NEVER = 1 << 60
LANES_A_CHUNK = 1 << 14
BYTES_A_CHUNK = 64 << 20  # of shared and local memory; one block is run whatever it takes


class KernelFault(AprlabError):
    """A kernel did what a GPU would stop for: an illegal address, a deadlock, a trap. `finding` says where."""

    def __init__(self, finding: KernelFinding) -> None:
        super().__init__(str(finding), code="ptx.fault")
        self.finding = finding

    def __reduce__(self) -> tuple[Any, ...]:
        return KernelFault, (self.finding,)


@dataclass
class LaunchReport:
    """What one launch did.

    `warp_instructions[pc]` and `thread_instructions[pc]` count issues of an instruction and the threads in them.
    `approximate` lists the instructions that were executed and whose last bits the ISA leaves open. `findings` is
    empty unless checks were on.
    """

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    blocks_run: int
    instructions: list[str]
    locations: list[Location | None]
    ptx_lines: list[int]
    warp_counts: list[int]
    thread_counts: list[int]
    approximate: list[int] = field(default_factory=list)
    findings: list[KernelFinding] = field(default_factory=list)
    counters: Counters | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.findings

    @property
    def exact(self) -> bool:
        """No instruction ran whose result the ISA leaves open."""
        return not self.approximate

    @property
    def warp_instructions(self) -> int:
        return sum(self.warp_counts)

    @property
    def thread_instructions(self) -> int:
        return sum(self.thread_counts)

    def by_line(self) -> list[LineProfile]:
        """Counts and, where counters were on, memory traffic for each source line that ran, in order of file and
        line.
        """
        lines: dict[tuple[str, int], LineProfile] = {}
        for pc, (loc, warps, threads) in enumerate(zip(self.locations, self.warp_counts, self.thread_counts, strict=True)):
            if not warps:
                continue
            key = (loc.file, loc.line) if loc else ("", 0)
            profile = lines.setdefault(key, LineProfile(*key))
            profile.warp_instructions += warps
            profile.thread_instructions += threads
            if self.counters is not None:
                profile.add(self.counters.by_pc.get(pc))
        return [lines[key] for key in sorted(lines)]


class Machine:
    """Runs the entries of one module. Module variables (`.global`) keep their values from launch to launch, as on a
    GPU.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self._programs: dict[tuple[str, bool, int], Program] = {}
        self._globals: dict[str, np.ndarray[Any, Any]] = {
            name: np.zeros(v.nbytes, np.uint8) if v.data is None else np.frombuffer(bytearray(v.data), np.uint8)
            for name, v in module.variables.items()
            if v.space in ("global", "const")
        }

    def program(self, entry: str, *, checks: bool = False, dynamic_shared: int = 0) -> Program:
        """The decoded entry. Raises as `program.build` does."""
        key = (entry, checks, dynamic_shared)
        if key not in self._programs:
            self._programs[key] = build(self.module, entry, checks=checks, dynamic_shared=dynamic_shared)
        return self._programs[key]

    def launch(
        self,
        entry: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Any] | Mapping[str, Any],
        *,
        shared: int = 0,
        checks: bool = False,
        counters: bool = False,
        blocks: Sequence[int] | None = None,
        max_steps: int = 50_000_000,
    ) -> LaunchReport:
        """Run `entry` over the grid; arrays among `args` are global memory and change in place.

        grid, block: 1 to 3 extents, x first. args: one for each parameter in order (a mapping also names the buffers
        in reports): a NumPy array or `Pointer` for an address, a number for a scalar, `bytes` for a struct. shared:
        bytes of dynamic shared memory. blocks: linear numbers (x fastest) of the only blocks to run; None runs all.
        Raises `KernelFault` for what a GPU would stop for, unless `checks` collects it in the report; `UsageError` if
        arguments and parameters do not match.
        """
        run = LaunchInProgress(
            self, entry, grid, block, args, shared=shared, checks=checks, counters=counters, blocks=blocks, max_steps=max_steps
        )
        with np.errstate(all="ignore"):
            for chunk in run.chunks():
                for _ in chunk.run():
                    pass
        return run.finish()


def extents(value: Dim, what: str) -> tuple[int, int, int]:
    """1 to 3 extents as three. Raises `UsageError` for anything else or below 1."""
    numbers = [int(value)] if isinstance(value, int | np.integer) else [int(v) for v in value]
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise UsageError(f"{what} must be 1 to 3 numbers ≥ 1, not {value!r}", code="ptx.extents")
    x, y, z = [*numbers, 1, 1][:3]
    return x, y, z


class LaunchInProgress:
    """One launch in progress: arguments mapped into memory, then one `State` a chunk of blocks."""

    def __init__(
        self,
        machine: Machine,
        entry: str,
        grid: Dim,
        block: Dim,
        args: Sequence[Any] | Mapping[str, Any],
        *,
        shared: int,
        checks: bool,
        counters: bool,
        blocks: Sequence[int] | None,
        max_steps: int,
    ) -> None:
        if np.multiply(np.float32(2.0**-149), np.float32(1)) == 0:
            raise AprlabError(
                "this process flushes subnormal floats to zero (a library has switched the CPU's mode): PTX would run wrong",
                code="ptx.subnormals-flushed",
            )
        self.machine = machine
        self.program = machine.program(entry, checks=checks, dynamic_shared=shared)
        self.dynamic_shared = shared
        self.grid, self.block = extents(grid, "grid"), extents(block, "block")
        self.threads = math.prod(self.block)
        if self.threads > 1024:
            raise UsageError(f"a block of {self.threads} threads; CUDA allows 1024", code="ptx.block-size")
        if any(count > most for count, most in zip(self.grid, (2**31 - 1, 65535, 65535), strict=False)):
            said = f"a grid of {self.grid} blocks; CUDA allows 2147483647, 65535 and 65535"
            raise UsageError(said, code="ptx.grid-size")
        if not 0 <= shared <= MOST_SHARED:
            said = f"{shared} bytes of dynamic shared memory; CUDA allows {MOST_SHARED} at most"
            raise UsageError(said, code="ptx.shared-memory")
        limit = self.program.entry.directives.get("maxntid") or self.program.entry.directives.get("reqntid")
        if limit and self.threads > math.prod(limit):
            said = f"a block of {self.threads} threads; {entry!r} was compiled for at most {math.prod(limit)}"
            raise UsageError(said, code="ptx.block-size")
        self.blocks: Sequence[int] = range(math.prod(self.grid)) if blocks is None else [int(b) for b in blocks]
        if blocks is not None and self.blocks and not 0 <= min(self.blocks) <= max(self.blocks) < math.prod(self.grid):
            raise UsageError(f"block numbers beyond the grid of {math.prod(self.grid)}", code="ptx.block-number")
        self.max_steps = max_steps
        self.memory = AddressSpace()
        self.params = self._parameters(args)
        self.symbols: dict[str, int] = {}
        for name, data in machine._globals.items():
            if data.size:
                self.symbols[name] = self.memory.add(data, name).base
        for name, variable in machine.module.variables.items():
            for offset, (target, addend) in variable.pointers.items():
                machine._globals[name][offset : offset + 8].view(np.uint64)[0] = self.symbols[target] + addend
        self.checks = Checks(self) if checks else None
        self.counters = Counters(len(self.program.ops)) if counters else None
        self.warp_counts = [0] * len(self.program.ops)
        self.thread_counts = [0] * len(self.program.ops)
        self.notes: list[str] = []
        self.stopped = False

    def _parameters(self, args: Sequence[Any] | Mapping[str, Any]) -> bytes:
        params = self.program.entry.params
        names = list(args) if isinstance(args, Mapping) else [p.name for p in params]
        values = list(args.values()) if isinstance(args, Mapping) else list(args)
        if len(values) != len(params):
            said = f"{self.program.entry.name!r} takes {len(params)} arguments, {len(values)} given"
            raise UsageError(said, code="ptx.arguments")
        out = bytearray(self.program.param_bytes)
        for param, name, value in zip(params, names, values, strict=True):
            start = self.program.params[param.name]
            out[start : start + param.nbytes] = self._argument(param.type, param.nbytes, param.count, name, value)
        return bytes(out)

    def _argument(self, kind: str, nbytes: int, count: int | None, name: str, value: Any) -> bytes:
        if count is not None:
            raw = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else np.asarray(value).tobytes()
            if len(raw) != nbytes:
                said = f"argument {name!r}: {len(raw)} bytes for a parameter of {nbytes}"
                raise UsageError(said, code="ptx.argument-type")
            return raw
        if isinstance(value, np.ndarray) and value.ndim:
            value = Pointer(value)
        if isinstance(value, Pointer):
            if TYPE_BYTES[kind] != 8:
                raise UsageError(f"argument {name!r}: an array for a .{kind} parameter", code="ptx.argument-type")
            buffer = self.memory.add(value.array, value.name or name, value.initialised)
            return (buffer.base + value.offset).to_bytes(8, "little")
        if not isinstance(value, int | float | np.integer | np.floating | np.bool_):
            said = f"argument {name!r}: {type(value).__name__} for a .{kind} parameter"
            raise UsageError(said, code="ptx.argument-type")
        if kind in ("f32", "f64") or (isinstance(value, float | np.floating) and kind in ("b32", "b64")):
            return np.array(value, f"f{nbytes}").tobytes()
        if isinstance(value, float | np.floating):
            raise UsageError(f"argument {name!r}: a float for a .{kind} parameter", code="ptx.argument-type")
        return (int(value) & ((1 << (8 * nbytes)) - 1)).to_bytes(nbytes, "little")

    def chunks(self) -> Generator[State, None, None]:
        nbytes = self.program.shared_bytes + self.threads * self.program.local_bytes
        a_chunk = max(1, min(LANES_A_CHUNK // self.threads, BYTES_A_CHUNK // max(nbytes, 1)))
        count = -(-len(self.blocks) // a_chunk) or 1
        a_chunk = -(-len(self.blocks) // count)  # even chunks
        for start in range(0, len(self.blocks), max(a_chunk, 1)):
            if not self.stopped:
                yield State(self, self.blocks[start : start + a_chunk])

    def finish(self) -> LaunchReport:
        self.memory.write_back()
        ops = self.program.ops
        return LaunchReport(
            self.program.entry.name,
            self.grid,
            self.block,
            len(self.blocks),
            *self.program.listing,
            self.warp_counts,
            self.thread_counts,
            [pc for pc, op in enumerate(ops) if op.approximate and self.warp_counts[pc]],
            self.checks.findings if self.checks else [],
            self.counters,
            self.notes,
        )


@dataclass
class _AddressInfo:
    """What is known of a base address on some lanes: the buffer all of them point into, their flat byte offsets,
    bounds and low bits.
    """

    source: Any
    lanes: Lanes | None
    buffer: Buffer
    flat: Any  # int64 offsets into buffer.bytes
    low: int  # smallest and largest offset from the buffer's (or the block's, the thread's) start
    high: int
    bits: int  # all low bits that any address has
    shifted: dict[int, Any] = field(default_factory=dict)


class State:
    """One chunk of blocks in flight. B blocks × T threads; n = B · T lanes, block-major."""

    def __init__(self, launch: LaunchInProgress, blocks: Sequence[int]) -> None:
        self.launch, self.program, self.memory = launch, launch.program, launch.memory
        self.checks, self.counters = launch.checks, launch.counters
        self.watched = self.checks is not None or self.counters is not None
        self.block_numbers = np.asarray(blocks, np.int64)
        self.shape = (len(blocks), launch.threads)
        self.n = len(blocks) * launch.threads
        self.params, self.symbols = launch.params, launch.symbols
        self.regs: list[Any] = [None] * len(self.program.types)
        self.owned = [False] * len(self.program.types)
        self.valid: list[Any] | None = [None] * len(self.program.types) if self.checks else None
        self.everyone = Lanes(np.arange(self.n), self.shape)
        self.live = np.ones(self.n, bool)
        self.live_count = self.n
        self.lanes = self.everyone
        self.sel: Lanes | None = None
        self.dead = False
        self.ready: dict[int, list[Lanes]] = {}
        self.waiting: dict[int, list[tuple[int, Lanes, Any]]] = {}
        self.reductions: dict[int, tuple[str, Setter]] = {}
        self.expected: dict[int, int | None] = {}
        self.steps = 0
        self._info: dict[int, _AddressInfo] = {}
        self._specials: dict[str, Any] = {}
        self._permutations: dict[tuple[str, int, int], tuple[Any, Any]] = {}
        warps = (launch.threads + 31) // 32
        self.block_epoch = np.zeros(self.shape[0], np.int32)
        self.warp_epoch = np.zeros(self.shape[0] * warps, np.int32)
        self.shared, self.shared_stride = self._private("shared", self.program.shared_bytes, self.shape[0])
        self.local, self.local_stride = self._private("local", self.program.local_bytes, self.n)
        param = np.frombuffer(self.params, np.uint8)
        self.param = Buffer("parameters", param, 0, len(param), writeable=False)
        self.starts_shared = np.arange(self.shape[0], dtype=np.int64)[:, None] * self.shared_stride
        self.starts_local = np.arange(self.n, dtype=np.int64).reshape(self.shape) * self.local_stride

    def _private(self, name: str, nbytes: int, copies: int) -> tuple[Buffer, int]:
        stride = -(-nbytes // 16) * 16
        data = np.zeros(copies * stride + 16, np.uint8)
        start = -data.ctypes.data % 16
        data = data[start : start + copies * stride]
        return Buffer(name, data, 0, nbytes, written=np.zeros(len(data), bool) if self.checks else None), stride

    # ---- scheduling

    def enter(self, lanes: Lanes) -> None:
        self.lanes = lanes
        everyone = lanes.count == self.live_count
        self.sel = None if everyone else lanes
        self.dead = everyone and lanes.count < self.n

    def push(self, pc: int, lanes: Lanes) -> None:
        self.ready.setdefault(pc, []).append(lanes)

    def run(self, stepping: bool = False) -> Generator[int, None, None]:
        """Run the chunk to its end, NumPy's warnings being off. With `stepping`, yields the pc before each
        instruction; `lanes` then holds who will execute it.
        """
        ops = self.program.ops
        runs, controls = [op.run for op in ops], [op.control for op in ops]
        warp_counts, thread_counts = self.launch.warp_counts, self.launch.thread_counts
        ready = self.ready
        self.push(0, self.everyone)
        while ready:
            pc = min(ready)
            self.enter(merge(ready.pop(pc), self.shape))
            limit = min(ready, default=_NEVER)
            lanes = self.lanes
            warps, threads = lanes.warps, lanes.count
            while pc < limit:
                if stepping:
                    yield pc
                warp_counts[pc] += warps
                thread_counts[pc] += threads
                self.steps += 1
                if self.steps > self.launch.max_steps:
                    said = f"{self.program.entry.name!r} did not end within {self.launch.max_steps} steps"
                    raise UsageError(said, code="ptx.steps-limit")
                control = controls[pc]
                if control is None:
                    runs[pc](self)  # type: ignore[misc]
                    pc += 1
                    continue
                pc = control(self, pc)
                if self.launch.stopped:
                    return
                if pc < 0:
                    break
                limit = min(ready, default=_NEVER)
                if self.lanes is not lanes:
                    lanes = self.lanes
                    warps, threads = lanes.warps, lanes.count
            else:
                self.push(pc, self.lanes)
        if self.waiting:
            self._deadlock()

    def _flags(self, value: Any) -> Any:
        """A predicate as one bool for each lane of the current group, or a scalar."""
        if value.ndim == 0 or self.sel is not None:
            return value
        if self.dead:
            return self.lanes.pick(value)
        return np.broadcast_to(value, self.shape).reshape(-1)

    def _split(self, flags: Any) -> tuple[Lanes | None, Lanes | None]:
        """(lanes where the flags hold, the others); None for an empty side."""
        lanes = self.lanes
        if flags.ndim == 0:
            return (lanes, None) if flags else (None, lanes)
        hits = int(np.count_nonzero(flags))
        if hits == lanes.count:
            return lanes, None
        if hits == 0:
            return None, lanes
        return Lanes(lanes.index[flags], self.shape), Lanes(lanes.index[~flags], self.shape)

    def branch(self, taken: Any, target: int, fall: int) -> int:
        """Both sides of a conditional branch; target −1 is an exit."""
        yes, no = self._split(self._flags(taken))
        if target < 0:
            if yes is not None:
                self._retire(yes)
            if no is None:
                return -1
            self.enter(no)
            return fall
        if no is None:
            return target
        if yes is None:
            return fall
        self.push(target, yes)
        self.push(fall, no)
        return -1

    def part(self, hit: Any, elsewhere: int) -> bool:
        """Go on with the lanes where `hit` holds, the others at another pc; False if there are none."""
        yes, no = self._split(self._flags(hit))
        if yes is None:
            return False
        if no is not None:
            self.push(elsewhere, no)
            self.enter(yes)
        return True

    def jump(self, index: Any, targets: list[int], pc: int) -> int:
        """brx.idx: every lane to its own target."""
        lanes = self.lanes
        flat = self.lanes.flat(index) if self.sel is None else np.broadcast_to(index, (lanes.count,))
        if int(flat.max()) >= len(targets):
            self._stop(
                "illegal branch", pc, int(lanes.index[int(flat.argmax())]), f"index {int(flat.max())} of {len(targets)} targets"
            )
            return -1
        for number in np.unique(flat):
            self.push(targets[int(number)], Lanes(lanes.index[flat == number], self.shape))
        return -1

    def only(self, hit: Any, run: Callable[[State], None]) -> None:
        """A guarded instruction: run it where `hit` holds."""
        yes, no = self._split(self._flags(hit))
        if yes is None:
            return
        if no is None:
            run(self)
            return
        saved = self.lanes, self.sel, self.dead
        self.lanes, self.sel, self.dead = yes, yes, False
        run(self)
        self.lanes, self.sel, self.dead = saved

    def exit(self) -> int:
        self._retire(self.lanes)
        return -1

    def _retire(self, lanes: Lanes) -> None:
        self.live[lanes.key] = False
        self.live_count -= lanes.count
        if self.waiting:
            self._release()

    def trap(self, pc: int) -> int:
        self._stop("trap", pc, int(self.lanes.index[0]), "the kernel executed trap")
        return -1

    def _stop(self, kind: str, pc: int, lane: int, message: str) -> None:
        """End the launch over a finding; raises unless checks collect it."""
        finding = self.finding(kind, pc, lane, message)
        if self.checks is None:
            raise KernelFault(finding)
        self.checks.add(finding)
        self.launch.stopped = True

    # ---- barriers

    def barrier(self, pc: int, number: Any, count: Any, reduction: tuple[str, Getter, Setter] | None) -> int:
        """bar.sync and bar.red: wait until all live threads of the block (or `count` threads) are here."""
        ident = int(number if number.ndim == 0 else number.reshape(-1)[0])
        wanted = None if count is None else int(count if count.ndim == 0 else count.reshape(-1)[0])
        value = None
        if reduction is not None:
            operation, get, put = reduction
            flags = self._flags(get(self))
            value = np.full(self.lanes.count, flags) if flags.ndim == 0 else flags
            self.reductions[pc] = (operation, put)
        elif self.lanes.count == self.live_count and not self.waiting and wanted in (None, self.shape[1]):
            if self.checks is not None and self.dead:
                self.checks.barrier(self, self.live.reshape(self.shape).any(axis=1), {pc: self.lanes})
            self.block_epoch += 1
            self.warp_epoch += 1
            return pc + 1
        self.waiting.setdefault(ident, []).append((pc, self.lanes, value))
        self.expected[ident] = wanted
        self._release()
        return -1

    def _release(self) -> None:
        live = np.count_nonzero(self.live.reshape(self.shape), axis=1)
        for ident in list(self.waiting):
            entries = self.waiting[ident]
            arrived = np.zeros(self.shape[0], np.int64)
            for _, lanes, _ in entries:
                arrived += np.bincount(lanes.blocks, minlength=self.shape[0])
            wanted = self.expected[ident]
            done = (arrived > 0) & (arrived >= (live if wanted is None else np.full_like(live, wanted)))
            if not done.any():
                continue
            left: list[tuple[int, Lanes, Any]] = []
            freed: dict[int, Lanes] = {}
            for pc, lanes, value in entries:
                go = done[lanes.blocks]
                if not go.all():
                    stay = ~go
                    left.append((pc, Lanes(lanes.index[stay], self.shape), None if value is None else value[stay]))
                if go.any():
                    out = lanes if go.all() else Lanes(lanes.index[go], self.shape)
                    if value is not None:
                        self._reduce(pc, out, value[go])
                    self.push(pc + 1, out)
                    freed[pc] = out if pc not in freed else merge([freed[pc], out], self.shape)
            if self.checks is not None:
                self.checks.barrier(self, done, freed)
            if left:
                self.waiting[ident] = left
            else:
                del self.waiting[ident]
            self.block_epoch[done] += 1
            warps = len(self.warp_epoch) // self.shape[0]
            self.warp_epoch.reshape(-1, warps)[done] += 1

    def _reduce(self, pc: int, lanes: Lanes, flags: Any) -> None:
        operation, put = self.reductions[pc]
        hits = np.bincount(lanes.blocks, weights=flags, minlength=self.shape[0]).astype(np.uint32)
        present = np.bincount(lanes.blocks, minlength=self.shape[0])
        result = {"popc": hits, "and": hits == present, "or": hits > 0}[operation]
        saved = self.sel
        self.sel = lanes
        put(self, result[lanes.blocks])
        self.sel = saved

    def _deadlock(self) -> None:
        entries = next(iter(self.waiting.values()))
        pc, lanes, _ = entries[0]
        wanted = next(iter(self.expected.values()))
        why = f"{wanted} threads were to come" if wanted else "not all threads of the block come"
        self._stop("divergent barrier", pc, int(lanes.index[0]), f"deadlock: {lanes.count} threads wait here forever, {why}")

    def warp_sync(self, pc: int, mask: Any) -> None:
        self._members(pc, mask, "bar.warp.sync")
        self.warp_epoch[np.unique(self.lanes.warp_keys)] += 1

    # ---- registers

    def scatter(self, number: int, value: Any, size: int) -> None:
        """Write 1-D values (or a scalar) for the selected lanes; other lanes keep theirs."""
        assert self.sel is not None
        current = self.regs[number]
        if current is None or not self.owned[number]:
            fresh = np.empty(self.shape, value.dtype)
            if current is None:
                fresh[...] = 0
                if self.valid is not None:
                    self.valid[number] = np.zeros(self.n, bool)
            else:
                fresh[...] = current.view(value.dtype) if current.ndim else np.asarray(current).view(value.dtype)
            self.regs[number] = current = fresh
            self.owned[number] = True
            self._info.pop(number, None)
        elif number in self._info:
            del self._info[number]
        current.view(value.dtype).reshape(-1)[self.sel.key] = value
        if self.valid is not None and self.valid[number] is not None:
            self.valid[number][self.sel.key] = True

    def unwritten(self, pc: int, number: int, name: str) -> None:
        self._unwritten(pc, name, int(self.lanes.index[0]))

    def check_written(self, pc: int, number: int, name: str) -> None:
        assert self.valid is not None
        valid = self.valid[number]
        if valid is not None:
            here = valid[self.lanes.key]
            if not here.all():
                self._unwritten(pc, name, int(self.lanes.index[int(np.argmin(here))]))

    def _unwritten(self, pc: int, name: str, lane: int) -> None:
        assert self.checks is not None
        self.checks.add(self.finding("uninitialised register", pc, lane, f"{name} is read before it is written", buffer=name))

    def special(self, name: str) -> Any:
        found = self._specials.get(name)
        if found is None:
            found = self._special(name)
            if not name.startswith(("%clock", "%globaltimer")):
                self._specials[name] = found
        return found

    def _special(self, name: str) -> Any:
        u32 = np.uint32
        bx, by, _ = self.launch.block
        gx, gy, _ = self.launch.grid
        thread = np.arange(self.shape[1], dtype=u32)[None]
        number = self.block_numbers.astype(u32)[:, None]
        kind, _, axis = name.partition(".")
        if axis:
            place = "xyz".index(axis)
            if kind in ("%ntid", "%nctaid"):
                return u32((self.launch.block if kind == "%ntid" else self.launch.grid)[place])
            sizes, index = ((bx, by), thread) if kind == "%tid" else ((gx, gy), number)
            parts = (index % u32(sizes[0]), index // u32(sizes[0]) % u32(sizes[1]), index // u32(sizes[0] * sizes[1]))
            value = parts[place]
            return value.reshape(())[()] if value.size == 1 else value if np.any(value != value.flat[0]) else value.flat[0]
        lane = thread & u32(31)
        one = u32(1)
        table: dict[str, Callable[[], Any]] = {
            "%laneid": lambda: lane,
            "%warpid": lambda: thread >> u32(5),
            "%nwarpid": lambda: u32((self.shape[1] + 31) // 32),
            "%smid": lambda: u32(0),
            "%nsmid": lambda: u32(1),
            "%gridid": lambda: np.uint64(0),
            "%clock": lambda: u32(self.steps & 0xFFFFFFFF),
            "%clock_hi": lambda: u32(self.steps >> 32),
            "%clock64": lambda: np.uint64(self.steps),
            "%globaltimer": lambda: np.uint64(self.steps),
            "%globaltimer_lo": lambda: u32(self.steps & 0xFFFFFFFF),
            "%lanemask_eq": lambda: one << lane,
            "%lanemask_lt": lambda: (one << lane) - one,
            "%lanemask_le": lambda: ((one << lane) - one) | (one << lane),
            "%lanemask_gt": lambda: ~(((one << lane) - one) | (one << lane)),
            "%lanemask_ge": lambda: ~((one << lane) - one),
            "%dynamic_smem_size": lambda: u32(self.launch.dynamic_shared),
            "%total_smem_size": lambda: u32(self.program.shared_bytes),
        }
        return table[name]()

    # ---- memory

    def load(self, access: Access, number: int | None, base: Getter, offset: int) -> list[Any]:
        """One array for each element of the vector, for the active lanes."""
        address = base(self)
        if not self.watched:
            found = self._fast(access, number, address, offset)
            if found is not None:
                buffer, index = found
                view = buffer.view(_CONTAINERS[access.nbytes])
                raw = view[index] if index.ndim == 0 else np.take(view, index, mode="clip")
                if self.dead and raw.ndim:
                    full = np.zeros(self.n, raw.dtype)
                    full[self.lanes.key] = raw
                    raw = full.reshape(self.shape)
                return _elements(raw, access)
        rows = self._slow_load(access, address, offset)  # (lanes, bytes)
        values = rows.view(access.dtype)
        out = []
        for i in range(access.lanes):
            value = np.ascontiguousarray(values[:, i])
            if self.sel is None:
                full = np.zeros(self.n, access.dtype)
                full[self.lanes.key] = value
                value = full.reshape(self.shape)
            out.append(value)
        return out

    def store(self, access: Access, number: int | None, base: Getter, offset: int, values: list[Any]) -> None:
        """Write one value (an array a vector element) for each active lane."""
        address = base(self)
        if self.dead:
            values = [self.lanes.pick(value) for value in values]
        if not self.watched:
            found = self._fast(access, number, address, offset)
            if found is not None and found[0].writeable:
                buffer, index = found
                if len(values) == 1:
                    value, view = values[0], buffer.view(access.dtype)
                else:
                    shape = np.broadcast_shapes(*[v.shape for v in values])
                    packed = np.empty((*shape, access.lanes), access.dtype)
                    for i, v in enumerate(values):
                        packed[..., i] = v
                    container = _CONTAINERS[access.nbytes]
                    value, view = packed.view(container)[..., 0], buffer.view(container)
                if index.ndim == 0:
                    view[index] = value if value.ndim == 0 else value.reshape(-1)[-1]
                elif value.ndim and value.shape != index.shape:
                    index, value = np.broadcast_arrays(index, value)
                    view[index] = value
                else:
                    view[index] = value
                return
        lanes = self.lanes
        rows = np.empty((lanes.count, access.lanes), access.dtype)
        for i, v in enumerate(values):
            rows[:, i] = lanes.pick(v) if v.ndim == 2 else v
        self._slow_store(access, address, offset, rows.view(np.uint8))

    def _fast(self, access: Access, number: int | None, address: Any, offset: int) -> tuple[Buffer, Any] | None:
        """(buffer, element index in units of the whole access), or None where something needs the slow road."""
        info = self._info.get(number) if number is not None else None
        source = self.regs[number] if number is not None else None
        lanes = self.sel or (self.lanes if self.dead else None)
        if info is None or info.source is not source or info.lanes is not lanes:
            picked = self.lanes.pick(address) if self.dead else address
            info = self._analyse(access.space, picked, lanes, source)
            if info is None:
                return None
            if number is not None:
                self._info[number] = info
        size = access.nbytes
        if info.low + offset < 0 or info.high + offset + size > info.buffer.limit:
            return None
        shift = size.bit_length() - 1
        if (info.bits | offset) & (size - 1) == 0:
            index = info.shifted.get(shift)
            if index is None:
                index = info.shifted[shift] = info.flat >> shift
            return info.buffer, index + (offset >> shift) if offset else index
        moved = info.flat + offset
        if int(np.bitwise_or.reduce(moved, axis=None)) & (size - 1):
            return None
        return info.buffer, moved >> shift

    def _analyse(self, space: str, address: Any, lanes: Lanes | None, source: Any) -> _AddressInfo | None:
        low, high = int(address.min()), int(address.max())
        if space == "generic":
            window = low >> 60
            if high >> 60 != window:
                return None
            space = ("global", "shared", "local", "param")[window] if window < 4 else "global"
            if window:
                address = address - np.uint64(window << 60)
                low, high = low - (window << 60), high - (window << 60)
        if space in ("global", "const"):
            buffer = self.memory.at(low)
            if buffer is None or self.memory.at(high) is not buffer:
                return None
            flat = (address - np.uint64(buffer.base)).astype(np.int64)
            low, high = low - buffer.base, high - buffer.base
        else:
            buffer = {"shared": self.shared, "local": self.local, "param": self.param}[space]
            if high > 1 << 40:
                return None
            flat = address.astype(np.int64)
            if space != "param":
                starts = self.starts_shared if space == "shared" else self.starts_local
                flat = flat + (starts if lanes is None else lanes.pick(starts))
        bits = int(np.bitwise_or.reduce(flat, axis=None)) if flat.ndim else int(flat)
        return _AddressInfo(source, lanes, buffer, flat, low, high, bits & 15)

    def _addresses(self, address: Any, offset: int) -> Any:
        """1-D uint64 addresses of the current group's lanes."""
        lanes = self.lanes
        flat = lanes.flat(address) if self.sel is None else np.broadcast_to(address, (lanes.count,))
        return flat.astype(np.uint64) + np.uint64(offset & (2**64 - 1))

    def _segments(self, access: Access, address: Any) -> Generator[tuple[Buffer, Any, Any, Any], None, None]:
        """Sort lanes by the buffer they touch: (buffer, positions in the group, offsets, flat offsets), faulty lanes
        reported and left out.
        """
        for window in np.unique(address >> np.uint64(60)) if access.space == "generic" else (None,):
            if window is None:
                space, where, local = access.space, np.arange(len(address)), address
            else:
                if int(window) > 3:
                    where = np.flatnonzero(address >> np.uint64(60) == window)
                    self._bad(access, "out of bounds", where, "(no buffer)", address[where])
                    continue
                space = ("global", "shared", "local", "param")[int(window)]
                where = np.flatnonzero(address >> np.uint64(60) == window)
                local = address[where] & np.uint64((1 << 60) - 1)
            if space not in ("global", "const"):
                buffer = {"shared": self.shared, "local": self.local, "param": self.param}[space]
                yield from self._segment(access, space, buffer, where, local)
                continue
            numbers = local >> np.uint64(36)
            for number in np.unique(numbers):
                here = np.flatnonzero(numbers == number)
                found = self.memory.at(int(number) << 36)
                if found is None:
                    self._bad(access, "out of bounds", where[here], "", local[here])
                    continue
                yield from self._segment(access, space, found, where[here], local[here] - np.uint64(found.base))

    def _segment(
        self, access: Access, space: str, buffer: Buffer, where: Any, offset: Any
    ) -> Generator[tuple[Buffer, Any, Any, Any], None, None]:
        size = access.nbytes
        inside = (offset < buffer.limit) & (offset + np.uint64(size) <= buffer.limit)
        if self.checks is not None and inside.any():
            inside &= self.checks.inside_variable(space, offset, size)
        if not inside.all():
            bad = ~inside
            self._bad(access, "out of bounds", where[bad], buffer.name, offset[bad] + np.uint64(buffer.base), buffer)
        aligned = offset & np.uint64(size - 1) == 0
        if not aligned[inside].all():
            bad = inside & ~aligned
            self._bad(access, "misaligned", where[bad], buffer.name, offset[bad] + np.uint64(buffer.base), buffer)
            inside &= aligned
        if access.kind != "load" and not buffer.writeable:
            self._bad(access, "read-only", where[inside], buffer.name, offset[inside] + np.uint64(buffer.base), buffer)
            return
        if not inside.any():
            return
        where, offset = where[inside], offset[inside].astype(np.int64)
        flat = offset
        index = self.lanes.index[where]
        if space == "shared":
            flat = offset + (index // self.shape[1]) * self.shared_stride
        elif space == "local":
            flat = offset + index * self.local_stride
        yield buffer, where, offset, flat

    def _bad(self, access: Access, kind: str, where: Any, name: str, address: Any, buffer: Buffer | None = None) -> None:
        if len(where) == 0:
            return
        first = int(address[0])
        if buffer is not None and buffer.origin is None:
            space_name, offset = self.variable(buffer.name, first)
        else:
            space_name, offset = self.memory.describe(first)
        target = next((b for b in self.memory.buffers if b.name == space_name), None)
        limit = buffer.limit if buffer is not None else target.limit if target else 0
        size = f" of {limit} bytes" if limit else ""
        verb = {"load": "reads", "store": "writes", "atomic": "updates"}[access.kind]
        message = {
            "out of bounds": f"{verb} {access.nbytes} bytes at offset {offset} of {space_name}{size}",
            "misaligned": f"{verb} {access.nbytes} bytes at offset {offset} of {space_name}, no multiple of {access.nbytes}",
            "read-only": f"{verb} {access.nbytes} bytes at offset {offset} of {space_name}, which is read-only",
        }[kind]
        finding = self.finding(kind, access.pc, int(self.lanes.index[int(where[0])]), message, buffer=space_name, offset=offset)
        finding.count = len(where)
        if self.checks is None:
            raise KernelFault(finding)
        self.checks.add(finding)

    def variable(self, space: str, offset: int) -> tuple[str, int]:
        """(variable, offset in it) of a shared or local address; the last one that starts at or before it."""
        table = self.program.shared if space == "shared" else self.program.local if space == "local" else {}
        best = max(((start, name) for name, (start, _) in table.items() if start <= offset), default=None)
        return (f"{space} {best[1]}", offset - best[0]) if best else (space, offset)

    def _slow_load(self, access: Access, address: Any, offset: int) -> Any:
        addresses = self._addresses(address, offset)
        rows = np.zeros((self.lanes.count, access.nbytes), np.uint8)
        span = np.arange(access.nbytes)
        for buffer, where, offsets, flat in self._segments(access, addresses):
            cells = flat[:, None] + span
            self._watch(access, buffer, where, offsets, cells, None)
            rows[where] = buffer.bytes[cells]
        return rows

    def _slow_store(self, access: Access, address: Any, offset: int, rows: Any) -> None:
        addresses = self._addresses(address, offset)
        span = np.arange(access.nbytes)
        for buffer, where, offsets, flat in self._segments(access, addresses):
            cells = flat[:, None] + span
            self._watch(access, buffer, where, offsets, cells, rows[where])
            buffer.bytes[cells] = rows[where]

    def _watch(self, access: Access, buffer: Buffer, where: Any, offsets: Any, cells: Any, rows: Any) -> None:
        lanes = self.lanes
        if self.counters is not None:
            self.counters.access(self, access, buffer, lanes, where, offsets)
        if self.checks is not None:
            self.checks.access(self, access, buffer, lanes.index[where], cells, rows)

    def atomic(
        self, access: Access, number: int | None, base: Getter, offset: int, values: list[Any], law: Any, operation: str
    ) -> Any:
        """Lane by lane in order of the lane's number; returns the old values. The order is one of many that a GPU may
        choose.
        """
        lanes = self.lanes
        addresses = self._addresses(base(self), offset)
        operands = [np.broadcast_to(lanes.pick(v) if v.ndim == 2 else v, (lanes.count,)) for v in values]
        old = np.zeros(lanes.count, access.dtype)
        span = np.arange(access.nbytes)
        if access.dtype.kind == "f" and operation == "add":
            note = f"{self.program.ops[access.pc].instruction.opcode}: a GPU may add in another order, and round otherwise"
            if note not in self.launch.notes:
                self.launch.notes.append(note)
        for buffer, where, offsets, flat in self._segments(access, addresses):
            if self.watched:
                self._watch(access, buffer, where, offsets, flat[:, None] + span, None)
            view, cells = buffer.view(access.dtype), flat // access.nbytes
            for place, cell in zip(where.tolist(), cells.tolist(), strict=True):
                before = view[cell]
                old[place] = before
                view[cell] = law(before, *[operand[place] for operand in operands])
        if self.sel is not None:
            return old
        full = np.zeros(self.n, access.dtype)
        full[lanes.key] = old
        return full.reshape(self.shape)

    # ---- warp-wide

    def _spread(self, value: Any, dtype: Any) -> Any:
        """The value of every lane of the chunk, as (n,); lanes outside the group hold 0."""
        if self.sel is None:
            return np.broadcast_to(value, self.shape).reshape(-1)
        out = np.zeros(self.n, dtype)
        out[self.lanes.key] = value
        return out

    def _members(self, pc: int, mask: Any, what: str) -> None:
        """Report lanes that the member mask names and that are not here, and lanes here that it does not name."""
        if self.checks is None:
            return
        lanes = self.lanes
        flat = np.broadcast_to(self.lanes.pick(mask) if mask.ndim == 2 else mask, (lanes.count,))
        lane_bit = np.uint32(1) << (lanes.threads % 32).astype(np.uint32)
        keys = lanes.warp_keys
        present = np.zeros(len(self.warp_epoch), np.uint32)
        np.bitwise_or.at(present, keys, lane_bit)
        existing = np.uint32(0xFFFFFFFF)
        warps = (self.shape[1] + 31) // 32
        tail = self.shape[1] - 32 * (warps - 1)
        # A full mask in a partial last warp names threads that never were; CUDA allows it.
        exists = np.where(keys % warps == warps - 1, np.uint32((1 << tail) - 1), existing)
        absent = flat & exists & ~present[keys]
        stranger = flat & lane_bit == 0
        if absent.any():
            at = int(np.argmax(absent != 0))
            who = [i for i in range(32) if int(absent[at]) >> i & 1]
            message = f"{what} waits for lanes {who} of the warp, which are not here"
            self.checks.add(self.finding("divergent warp operation", pc, int(lanes.index[at]), message))
        if stranger.any():
            at = int(np.argmax(stranger))
            message = f"{what} by a lane that its member mask {int(flat[at]):#010x} does not name"
            self.checks.add(self.finding("divergent warp operation", pc, int(lanes.index[at]), message))

    def shuffle(self, pc: int, mode: str, value: Any, b: Any, c: Any, mask: Any, want_hit: bool) -> tuple[Any, Any]:
        self._members(pc, mask, f"shfl.{mode}")
        constant = b.ndim == 0 and c.ndim == 0
        if constant and self.sel is None and not self.dead and self.shape[1] % 32 == 0:
            key = (mode, int(b), int(c))
            if key not in self._permutations:
                self._permutations[key] = _source_lanes(mode, np.arange(32), int(b), int(c))
            source, hit = self._permutations[key]
            if value.ndim == 0 or value.shape[1] == 1:
                out = value
            else:
                out = value.reshape(-1, 32)[:, source].reshape(value.shape)
            return out, np.tile(hit, self.shape[1] // 32)[None] if want_hit else None
        lanes = self.lanes
        b1 = np.broadcast_to(lanes.pick(b) if b.ndim == 2 else b, (lanes.count,)).astype(np.int64)
        c1 = np.broadcast_to(lanes.pick(c) if c.ndim == 2 else c, (lanes.count,)).astype(np.int64)
        lane = (lanes.threads % 32).astype(np.int64)
        source, hit = _source_lanes(mode, lane, b1, c1)
        thread = lanes.threads - lane + source
        exists = thread < self.shape[1]
        flat = np.where(exists, lanes.index - lane + source, lanes.index)
        here = np.zeros(self.n, bool)
        here[lanes.key] = True
        if self.checks is not None and not here[flat].all():
            at = int(np.argmin(here[flat]))
            message = f"shfl.{mode} reads lane {int(source[at])}, which is not here"
            self.checks.add(self.finding("divergent warp operation", pc, int(lanes.index[at]), message))
        result = self._spread(value, value.dtype)[flat]
        if self.sel is None:
            full = np.zeros(self.n, value.dtype)
            full[lanes.key] = result
            all_hits = np.zeros(self.n, bool)
            all_hits[lanes.key] = hit
            return full.reshape(self.shape), all_hits.reshape(self.shape)
        return result, hit

    def _ballot(self, flags: Any) -> Any:
        """A 32-bit word for each warp of the chunk: the lanes of this group where the flag holds."""
        lanes = self.lanes
        picked = self._flags(flags)
        hit = np.broadcast_to(picked, (lanes.count,))
        words = np.zeros(len(self.warp_epoch), np.uint32)
        np.bitwise_or.at(words, lanes.warp_keys[hit], np.uint32(1) << (lanes.threads[hit] % 32).astype(np.uint32))
        return words

    def _per_lane(self, words: Any) -> Any:
        """A value for each warp → the form of results."""
        if self.sel is None:
            warps = len(words) // self.shape[0]
            return np.repeat(words.reshape(self.shape[0], warps), 32, axis=1)[:, : self.shape[1]].copy()
        return words[self.lanes.warp_keys]

    def vote(self, pc: int, mode: str, flags: Any, mask: Any) -> Any:
        members = np.uint32(0xFFFFFFFF)
        if mask is not None:
            self._members(pc, mask, f"vote.{mode}")
            members = mask
        hits = self._per_lane(self._ballot(flags)) & members
        if mode == "ballot":
            return hits
        present = self._per_lane(self._ballot(np.bool_(True))) & members
        if mode == "any":
            return hits != 0
        return hits == present if mode == "all" else (hits == present) | (hits == 0)

    def redux(self, pc: int, operation: str, value: Any, mask: Any) -> Any:
        self._members(pc, mask, f"redux.{operation}")
        lanes = self.lanes
        values = np.broadcast_to(lanes.pick(value) if value.ndim == 2 else value, (lanes.count,))
        members = np.broadcast_to(lanes.pick(mask) if mask.ndim == 2 else mask, (lanes.count,))
        # Lanes of one warp with different masks are different reductions.
        keys, group = np.unique(lanes.warp_keys.astype(np.int64) << 32 | members, return_inverse=True)
        ufunc = {
            "add": np.add, "min": np.minimum, "max": np.maximum,
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        }[operation]  # fmt: skip
        order = np.argsort(group, kind="stable")
        first = np.searchsorted(group[order], np.arange(len(keys)))
        result = ufunc.reduceat(values[order], first).astype(value.dtype)[group]
        if self.sel is not None:
            return result
        full = np.zeros(self.n, value.dtype)
        full[lanes.key] = result
        return full.reshape(self.shape)

    def match(self, pc: int, mode: str, value: Any, mask: Any) -> tuple[Any, Any]:
        self._members(pc, mask, f"match.{mode}")
        lanes = self.lanes
        values = np.broadcast_to(lanes.pick(value) if value.ndim == 2 else value, (lanes.count,))
        members = np.broadcast_to(lanes.pick(mask) if mask.ndim == 2 else mask, (lanes.count,))
        words, agree = np.zeros(lanes.count, np.uint32), np.zeros(lanes.count, bool)
        keys = lanes.warp_keys
        for key in np.unique(keys):
            here = np.flatnonzero(keys == key)
            bit = np.uint32(1) << (lanes.threads[here] % 32).astype(np.uint32)
            for at in here:
                same = (values[here] == values[at]) & (bit & members[at] != 0)
                words[at] = np.bitwise_or.reduce(bit[same])
                agree[at] = words[at] == np.bitwise_or.reduce(bit[bit & members[at] != 0])
                if mode == "all" and not agree[at]:
                    words[at] = 0
        if self.sel is not None:
            return words, agree
        full, flags = np.zeros(self.n, np.uint32), np.zeros(self.n, bool)
        full[lanes.key], flags[lanes.key] = words, agree
        return full.reshape(self.shape), flags.reshape(self.shape)

    # ---- reports

    def place(self, lane: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(block index, thread index) of a lane, x first."""
        return self.launch_place(int(self.block_numbers[lane // self.shape[1]]), lane % self.shape[1])

    def launch_place(self, block: int, thread: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        gx, gy, _ = self.launch.grid
        bx, by, _ = self.launch.block
        return (block % gx, block // gx % gy, block // (gx * gy)), (thread % bx, thread // bx % by, thread // (bx * by))

    def finding(
        self, kind: str, pc: int, lane: int, message: str, *, buffer: str = "", offset: int | None = None
    ) -> KernelFinding:  # fmt: skip
        block, thread = self.place(lane)
        item = self.program.ops[pc].instruction
        where = (self.program.entry.name, block, thread, buffer, offset, pc, item.line, item.loc, str(item))
        return KernelFinding(kind, message, *where)


def _elements(raw: Any, access: Access) -> list[Any]:
    """Split loaded containers into the vector's elements."""
    if access.lanes == 1:
        if raw.dtype is access.dtype:
            return [raw]
        return [raw.view(access.dtype) if raw.ndim else np.asarray(raw).view(access.dtype)[()]]
    parts = np.asarray(raw)[..., None].view(access.dtype)
    return [parts[..., i].copy() if parts.ndim > 1 else parts[i] for i in range(access.lanes)]


def _source_lanes(mode: str, lane: Any, b: Any, c: Any) -> tuple[Any, Any]:
    """shfl.sync's lane arithmetic: (source lane, in range?) for each lane."""
    clamp, segment = c & 31, (c >> 8) & 31
    low = lane & segment
    high = low | (clamp & ~segment & 31)
    count = b & 31
    if mode == "up":
        source = lane - count
        hit = source >= high
    elif mode == "down":
        source = lane + count
        hit = source <= high
    elif mode == "bfly":
        source = lane ^ count
        hit = source <= high
    else:
        source = low | (count & ~segment & 31)
        hit = source <= high
    return np.where(hit, source, lane), hit
