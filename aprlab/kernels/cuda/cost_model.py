"""What a mat-vec costs, counted on the PTX machine, compared with what a GPU's memory allows.

A mat-vec of one token cannot be faster than its weights come from memory (the roofline), and it is no slower as long as its
instructions are issued in that time. Both sides are counted for each weight. Launches, caches, latency and occupancy are not
in the model: a prediction is a lower bound of the time, and measurements have a column of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprlab.kernels.cuda import launch as launches
from aprlab.kernels.cuda import verify
from aprlab.kernels.cuda.device import Device
from aprlab.quants import types
from aprlab.quants.types import TensorType

COLS = 8960
"""Length of a row in the counts: the feed-forward length of Qwen2.5 1.5B."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data-sheet figures. `issue`: thread instructions a second, i.e. 32 × 4 a clock and multiprocessor."""

    name: str
    bandwidth: float  # bytes a second
    issue: float

    @classmethod
    def of(cls, name: str, gigabytes: float, multiprocessors: int, gigahertz: float) -> Gpu:
        """From a data sheet's units."""
        return cls(name, gigabytes * 1e9, 128 * multiprocessors * gigahertz * 1e9)

    def allowed(self, kind: TensorType) -> float:
        """Thread instructions a weight at which issuing takes as long as reading the weight."""
        return self.issue * bytes_a_weight(kind) / self.bandwidth


GPUS = (Gpu.of("H100 SXM", 3350, 132, 1.755), Gpu.of("RTX 4090", 1008, 128, 2.52))


@dataclass(frozen=True, slots=True)
class MatvecCost:
    """Of one mat-vec kernel at `COLS`: executed PTX instructions by weight, as threads and as full warps."""

    kind: TensorType
    contract: str
    thread_instructions: float
    warp_instructions: float  # times 32: what is issued, idle lanes included

    def predicted(self, gpu: Gpu, rows: int, cols: int) -> float:
        """Seconds: the longer of reading the weights and issuing the instructions."""
        weights = rows * cols
        return max(rows * self.kind.row_bytes(cols) / gpu.bandwidth, weights * self.warp_instructions / gpu.issue)


def bytes_a_weight(kind: TensorType) -> float:
    """Bytes of weights read for one weight."""
    return kind.block_bytes / kind.block_elements


def count(device: Device, kind: TensorType, contract: str, rows: int = 8) -> MatvecCost:
    """Runs one block of rows on the PTX machine. `device` is a `PtxDevice`: it keeps the last launch's report."""
    bench = verify.Bench(device)
    raw, x = verify.random_weights(kind, rows, COLS), verify.random_activations(1, COLS)
    ready, (y, _) = bench.put(x), bench.room(4 * rows)
    if kind in launches.PACKED:
        prepared, _ = bench.room(launches.prepared_bytes(contract, 1, COLS))
        bench.run(launches.prepare(contract, ready, prepared, 1, COLS))
        ready = prepared
    bench.run(launches.matvec(kind, contract, bench.put(raw), ready, bench.put(np.zeros(rows, np.float32)), y, 1, rows, COLS))
    report = device.last  # type: ignore[attr-defined]
    weights = rows * COLS
    return MatvecCost(kind, contract, report.thread_instructions / weights, 32 * report.warp_instructions / weights)


def costs(device: Device) -> Iterator[MatvecCost]:
    """Every type under both contracts (plain floats know one)."""
    for kind in (*launches.PACKED, types.F16, types.BF16):
        for contract in launches.CONTRACTS if kind in launches.PACKED else ("f32",):
            yield count(device, kind, contract)
