"""What a kernel must not do, found while it runs: accesses out of bounds, misaligned or uninitialised, races,
divergent barriers.

Bounds and alignment are the memory system's own; this module keeps the shadow state for the rest. Two accesses to a
byte race when they come from different threads, at least one writes, not both are atomic or volatile, and no barrier
orders them: `bar.sync` orders a block, `bar.warp.sync` a warp, nothing orders two blocks of a launch. Stale but
initialised data is invisible here: only values show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab.kernels.ptx.memory import Buffer, Lanes
from aprlab.kernels.ptx.parser import Location

if TYPE_CHECKING:
    from aprlab.kernels.ptx.machine import LaunchInProgress, State
    from aprlab.kernels.ptx.program import Access

Index3 = tuple[int, int, int]


@dataclass
class KernelFinding:
    """One kind of mistake at one instruction: the first thread that made it, and how many times it was seen.

    `offset` is in bytes from the start of `buffer`. `other` is the second thread of a race.
    """

    kind: str
    message: str
    entry: str
    block: Index3
    thread: Index3
    buffer: str
    offset: int | None
    pc: int
    ptx_line: int
    source: Location | None
    instruction: str
    count: int = 1
    other: tuple[Index3, Index3] | None = None

    def __str__(self) -> str:
        where = f"{self.source}" if self.source else f"PTX line {self.ptx_line}"
        more = f" ({self.count} times)" if self.count > 1 else ""
        return f"{where}: {self.kind}: block {self.block} thread {self.thread} {self.message}{more}; {self.instruction!r}"


@dataclass
class _Read:
    """One load instruction: first byte of each lane's access, its size, who, when."""

    first: Any
    size: int
    threads: Any
    epoch: Any
    warp_epoch: Any
    strong: bool


class _Shadow:
    """Who touched each byte of a buffer last. Threads are numbered through the grid; −1 is no thread."""

    def __init__(self, nbytes: int) -> None:
        self.writer = np.full(nbytes, -1, np.int64)
        self.write_epoch = np.zeros(nbytes, np.int32)
        self.write_warp_epoch = np.zeros(nbytes, np.int32)
        self.write_strong = np.zeros(nbytes, bool)
        # The lowest and highest reader since the last barrier: if any reader is of another warp, one of these two is.
        self.first_reader = np.full(nbytes, -1, np.int64)
        self.last_reader = np.full(nbytes, -1, np.int64)
        self.read_epoch = np.zeros(nbytes, np.int32)
        self.read_warp_epoch = np.zeros(nbytes, np.int32)
        self.weak_read = np.zeros(nbytes, bool)

    def note_read(self, threads: int, read: _Read) -> None:
        """Remember a load by blocks of `threads` threads."""
        flat = (read.first[:, None] + np.arange(read.size)).reshape(-1)
        ident, epoch, warp_epoch = (np.repeat(v, read.size) for v in (read.threads, read.epoch, read.warp_epoch))
        first, last = self.first_reader[flat], self.last_reader[flat]
        mine = ident // threads
        # Earlier readers that a barrier orders before everything from here on need not be remembered.
        same_block = (first // threads == mine) & (last // threads == mine)
        warp = (ident % threads) // 32
        one_warp = ((first % threads) // 32 == warp) & ((last % threads) // 32 == warp)
        older = (self.read_epoch[flat] < epoch) | (one_warp & (self.read_warp_epoch[flat] < warp_epoch))
        fresh = flat[(first < 0) | (same_block & older)]
        self.first_reader[fresh] = np.iinfo(np.int64).max
        self.last_reader[fresh] = -1
        self.weak_read[fresh] = False
        np.minimum.at(self.first_reader, flat, ident)
        np.maximum.at(self.last_reader, flat, ident)
        self.read_epoch[flat] = epoch
        self.read_warp_epoch[flat] = warp_epoch
        if not read.strong:
            self.weak_read[flat] = True


class Checks:
    """The findings and shadow state of one launch."""

    MOST = 200  # findings kept; a broken kernel repeats itself

    def __init__(self, launch: LaunchInProgress) -> None:
        self.launch = launch
        self.findings: list[KernelFinding] = []
        self._known: dict[tuple[str, int, str], KernelFinding] = {}
        self._shadows: dict[int, _Shadow] = {}
        self._reads: dict[int, list[_Read]] = {}
        self._chunk: tuple[State, _Shadow] | None = None
        self._inside: dict[str, Any] = {}
        for space, table, nbytes in (
            ("shared", launch.program.shared, launch.program.shared_bytes),
            ("local", launch.program.local, launch.program.local_bytes),
        ):
            valid = np.zeros(nbytes + 1, np.int32)  # number of the variable that owns the byte, 0 for a gap
            for number, (start, size) in enumerate(table.values(), 1):
                valid[start : nbytes if size < 0 else start + size] = number
            if not table:
                valid[:nbytes] = 1
            self._inside[space] = valid

    def add(self, finding: KernelFinding) -> None:
        key = (finding.kind, finding.pc, finding.buffer)
        known = self._known.get(key)
        if known is not None:
            known.count += finding.count
        elif len(self.findings) < self.MOST:
            self._known[key] = finding
            self.findings.append(finding)

    def inside_variable(self, space: str, offset: Any, size: int) -> Any:
        """Per lane: does a shared or local access stay inside one declared variable?"""
        valid = self._inside.get(space)
        if valid is None:
            return np.ones(len(offset), bool)
        first = np.minimum(offset, len(valid) - 1).astype(np.int64)
        last = np.minimum(offset + np.uint64(size - 1), len(valid) - 1).astype(np.int64)
        return (valid[first] > 0) & (valid[first] == valid[last])

    # ---- accesses

    def access(self, state: State, access: Access, buffer: Buffer, lanes: Any, cells: Any, rows: Any) -> None:
        """One instruction's accesses to one buffer: `lanes` (k,) chunk lanes, `cells` (k, bytes) flat offsets, `rows`
        the bytes stored.
        """
        if buffer.written is not None:
            if access.kind != "store":
                bad = ~buffer.written[cells].all(axis=1)
                if bad.any():
                    self._report(
                        state, access, buffer, "uninitialised read", lanes, cells, bad, "reads bytes never written", None
                    )
            if access.kind != "load":
                buffer.written[cells] = True
        if access.space in ("const", "param") or not buffer.writeable or buffer is state.local or buffer is state.param:
            return
        self._races(state, access, buffer, lanes, cells, rows)

    def _shadow(self, state: State, buffer: Buffer) -> _Shadow:
        if buffer is state.shared:  # one a chunk: blocks of different chunks do not share
            if self._chunk is None or self._chunk[0] is not state:
                self._chunk = (state, _Shadow(len(buffer.bytes)))
            return self._chunk[1]
        found = self._shadows.get(id(buffer))
        if found is None:
            found = self._shadows[id(buffer)] = _Shadow(len(buffer.bytes))
            for read in self._reads.pop(id(buffer), []):
                found.note_read(state.shape[1], read)
        return found

    def _races(self, state: State, access: Access, buffer: Buffer, lanes: Any, cells: Any, rows: Any) -> None:
        threads = state.shape[1]
        size = cells.shape[1]
        block = lanes // threads
        thread = lanes % threads
        warp_key = block * ((threads + 31) // 32) + thread // 32
        read = _Read(
            cells[:, 0],
            size,
            state.block_numbers[block] * threads + thread,
            state.block_epoch[block],
            state.warp_epoch[warp_key],
            access.strong,
        )
        if access.kind == "load" and buffer is not state.shared and id(buffer) not in self._shadows:
            # Most buffers are never written: their reads wait in a list until one is.
            self._reads.setdefault(id(buffer), []).append(read)
            return
        shadow = self._shadow(state, buffer)
        ident, epoch, warp_epoch = (np.repeat(v, size) for v in (read.threads, read.epoch, read.warp_epoch))
        flat = cells.reshape(-1)
        strong = access.strong
        writes = access.kind != "load"

        def unordered(other: Any, other_epoch: Any, other_warp_epoch: Any) -> Any:
            """Is the earlier access by `other` not ordered before this one?"""
            foreign = (other >= 0) & (other != ident)
            if not foreign.any():
                return foreign
            same_block = other // threads == ident // threads
            same_warp = same_block & ((other % threads) // 32 == (ident % threads) // 32)
            return foreign & (~same_block | ((other_epoch == epoch) & (~same_warp | (other_warp_epoch == warp_epoch))))

        writer = shadow.writer[flat]
        clash = unordered(writer, shadow.write_epoch[flat], shadow.write_warp_epoch[flat])
        if strong:
            clash &= ~shadow.write_strong[flat]
        if rows is not None and buffer is state.shared:
            # Threads of a block that write one value to one place do no harm.
            clash &= buffer.bytes[flat] != rows.reshape(-1)
        if clash.any():
            verb = "writes" if writes else "reads"
            self._report_race(
                state, access, buffer, lanes, cells, clash, writer, f"{verb} what", "wrote, with no barrier between"
            )
        seen = clash
        if writes:
            for reader in (shadow.first_reader[flat], shadow.last_reader[flat]):
                clash = unordered(reader, shadow.read_epoch[flat], shadow.read_warp_epoch[flat])
                if strong:
                    clash &= shadow.weak_read[flat]
                if rows is not None and buffer is state.shared:
                    clash &= buffer.bytes[flat] != rows.reshape(-1)
                if clash.any():
                    self._report_race(
                        state, access, buffer, lanes, cells, clash, reader, "overwrites what", "read, with no barrier between"
                    )
                    break
        if writes:
            if not strong:
                self._same_instruction(state, access, buffer, lanes, cells, rows, ident, seen)
            shadow.writer[flat] = ident
            shadow.write_epoch[flat] = epoch
            shadow.write_warp_epoch[flat] = warp_epoch
            shadow.write_strong[flat] = strong
        else:
            shadow.note_read(threads, read)

    def _same_instruction(
        self, state: State, access: Access, buffer: Buffer, lanes: Any, cells: Any, rows: Any, ident: Any, seen: Any
    ) -> None:
        """Two lanes of one store that write the same byte; `seen` marks what has been reported already."""
        flat = cells.reshape(-1)
        order = np.argsort(flat, kind="stable")
        sorted_cells = flat[order]
        twice = sorted_cells[1:] == sorted_cells[:-1]
        if not twice.any():
            return
        clash = np.zeros(len(flat), bool)
        if rows is not None and buffer is state.shared:
            data = rows.reshape(-1)[order]
            twice = twice & (data[1:] != data[:-1])
        clash[order[1:]] = twice
        clash &= ~seen
        if clash.any():
            other = np.full(len(flat), -1, np.int64)
            other[order[1:]] = ident[order[:-1]]
            self._report_race(
                state, access, buffer, lanes, cells, clash, other, "writes what", "writes too, in the same instruction"
            )

    # ---- reports

    def _report(
        self, state: State, access: Access, buffer: Buffer, kind: str, lanes: Any, cells: Any, bad: Any, message: str, other: Any
    ) -> None:
        at = int(np.argmax(bad))
        name, offset = self._where(state, buffer, int(cells[at, 0]), int(lanes[at]))
        text = f"{message} ({access.nbytes} bytes at offset {offset} of {name})"
        finding = state.finding(kind, access.pc, int(lanes[at]), text, buffer=name, offset=offset)
        finding.count = int(np.count_nonzero(bad))
        finding.other = other
        self.add(finding)

    def _where(self, state: State, buffer: Buffer, cell: int, lane: int) -> tuple[str, int]:
        if buffer is state.shared:
            return state.variable("shared", cell - lane // state.shape[1] * state.shared_stride)
        if buffer is state.local:
            return state.variable("local", cell - lane * state.local_stride)
        return buffer.name, cell

    def _report_race(
        self,
        state: State,
        access: Access,
        buffer: Buffer,
        lanes: Any,
        cells: Any,
        clash: Any,
        other: Any,
        before: str,
        after: str,
    ) -> None:
        number = int(other[int(np.argmax(clash))])
        block, thread = state.launch_place(number // state.shape[1], number % state.shape[1])
        bad = clash.reshape(cells.shape).any(axis=1)
        self._report(
            state, access, buffer, "race", lanes, cells, bad, f"{before} block {block} thread {thread} {after}", (block, thread)
        )

    # ---- barriers

    def barrier(self, state: State, done: Any, freed: dict[int, Lanes]) -> None:
        """A barrier has let the blocks `done` go; `freed` says which lanes were at which pc. All threads of a block
        belong to one.
        """
        threads = state.shape[1]
        if len(freed) > 1:
            pcs = sorted(freed)
            owner = np.full(state.shape[0], -1, np.int64)
            for pc in pcs:
                blocks = np.unique(freed[pc].blocks)
                mixed = blocks[owner[blocks] >= 0]
                if len(mixed):
                    lane = int(freed[pc].index[int(np.argmax(freed[pc].blocks == mixed[0]))])
                    first = state.program.ops[int(owner[mixed[0]])].instruction
                    message = f"waits here while others of its block wait at PTX line {first.line}"
                    self.add(state.finding("divergent barrier", pc, lane, message))
                owner[blocks] = pc
        for pc, lanes in freed.items():
            counts = np.bincount(lanes.blocks, minlength=state.shape[0])
            short = (counts > 0) & (counts < threads) & done
            if short.any() and len(freed) == 1:
                block = int(np.argmax(short))
                lane = int(lanes.index[int(np.argmax(lanes.blocks == block))])
                gone = int(threads - np.count_nonzero(state.live.reshape(state.shape)[block]))
                if gone:
                    message = f"waits here, but {gone} threads of its block have ended without coming"
                    self.add(state.finding("divergent barrier", pc, lane, message))
