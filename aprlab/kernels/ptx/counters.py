"""What a GPU's memory system would have to do for a launch, counted from the addresses.

Global memory moves in sectors of 32 bytes: a request (one instruction of one warp) costs as many as its lanes touch.
Shared memory has 32 banks of 4 bytes: a request costs as many wavefronts as the busiest bank has distinct words; 8-
and 16-byte accesses go by half and quarter warps. DRAM bytes are the distinct sectors of a buffer, as if the cache
never dropped one: a lower bound. Latency, occupancy and caches are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab.kernels.ptx.memory import Buffer, Lanes

if TYPE_CHECKING:
    from aprlab.kernels.ptx.machine import State
    from aprlab.kernels.ptx.program import Access

SECTOR = 32
BANKS = 32


@dataclass
class Traffic:
    """Memory work of one instruction. `requests` are warps, `bytes` what the lanes asked for."""

    space: str
    kind: str
    requests: int = 0
    sectors: int = 0
    wavefronts: int = 0
    bytes: int = 0

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / self.requests if self.requests else 0.0

    @property
    def wavefronts_per_request(self) -> float:
        return self.wavefronts / self.requests if self.requests else 0.0


@dataclass
class LineProfile:
    """Everything one source line cost; line 0 of file "" collects instructions without line information."""

    file: str
    line: int
    warp_instructions: int = 0
    thread_instructions: int = 0
    requests: int = 0
    sectors: int = 0
    wavefronts: int = 0
    bytes: int = 0

    def add(self, traffic: Traffic | None) -> None:
        if traffic is not None:
            self.requests += traffic.requests
            self.sectors += traffic.sectors
            self.wavefronts += traffic.wavefronts
            self.bytes += traffic.bytes


@dataclass
class Counters:
    """The memory counters of one launch: traffic by instruction, and the sectors of each buffer that were touched."""

    instructions: int
    by_pc: dict[int, Traffic] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)

    @property
    def sectors(self) -> int:
        return sum(t.sectors for t in self.by_pc.values())

    @property
    def wavefronts(self) -> int:
        return sum(t.wavefronts for t in self.by_pc.values())

    @property
    def dram_bytes(self) -> int:
        """Distinct sectors read plus distinct sectors written, in bytes."""
        return SECTOR * sum(int(np.count_nonzero(marks)) for marks in (*self.read.values(), *self.written.values()))

    def dram_bytes_of(self, buffer: str) -> tuple[int, int]:
        """(read, written) bytes of one buffer."""
        none = np.zeros(0, bool)
        return tuple(SECTOR * int(np.count_nonzero(side.get(buffer, none))) for side in (self.read, self.written))  # type: ignore[return-value]

    def access(self, state: State, access: Access, buffer: Buffer, lanes: Lanes, where: Any, offsets: Any) -> None:
        """Count one instruction: `where` are positions in `lanes` (ascending), `offsets` their byte offsets in the
        buffer, block or thread.
        """
        if access.space == "param":
            return
        space = "shared" if buffer is state.shared else "local" if buffer is state.local else "global"
        traffic = self.by_pc.setdefault(access.pc, Traffic(space, access.kind))
        warps = lanes.warp_keys[where]
        slots = lanes.threads[where] % 32
        starts = np.flatnonzero(np.r_[True, warps[1:] != warps[:-1]])
        row = np.cumsum(np.r_[False, warps[1:] != warps[:-1]])
        traffic.requests += len(starts)
        traffic.bytes += len(where) * access.nbytes
        if space == "shared":
            traffic.wavefronts += _wavefronts(offsets, row, slots, len(starts), access.nbytes)
            return
        if space == "local":  # interleaved by the hardware: equal offsets of neighbours lie side by side
            words = offsets // 4
            lines = np.full((len(starts), 32), -1, np.int64)
            lines[row, slots] = words
            traffic.sectors += _distinct(lines) * 4 * max(access.nbytes // 4, 1)
            return
        sectors = (offsets + buffer.base) // SECTOR
        table = np.full((len(starts), 32), -1, np.int64)
        table[row, slots] = sectors
        traffic.sectors += _distinct(table)
        numbers = offsets // SECTOR
        for side, wanted in ((self.read, access.kind != "store"), (self.written, access.kind != "load")):
            if wanted:
                if buffer.name not in side:
                    side[buffer.name] = np.zeros(len(buffer.bytes) // SECTOR + 1, bool)
                side[buffer.name][numbers] = True


def _distinct(table: Any) -> int:
    """Distinct entries ≥ 0 of each row, summed over rows."""
    ordered = np.sort(table, axis=1)
    fresh = np.ones(ordered.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int(np.count_nonzero(fresh & (ordered >= 0)))


def _wavefronts(offsets: Any, row: Any, slots: Any, rows: int, nbytes: int) -> int:
    """Bank wavefronts of one shared-memory instruction over all its requests."""
    words = max(nbytes // 4, 1)
    if words > 1:  # a half (8 bytes) or quarter (16 bytes) warp at a time
        row = row * words + slots * words // 32
        rows *= words
    touched = (offsets[:, None] // 4 + np.arange(words)).reshape(-1)
    group = np.repeat(row, words)
    pairs = np.unique(group.astype(np.int64) << 40 | touched)
    bank = (pairs >> 40) * BANKS + (pairs & ((1 << 40) - 1)) % BANKS
    load = np.bincount(bank, minlength=rows * BANKS).reshape(rows, BANKS)
    return int(load.max(axis=1).sum())
