"""CPU time of the PTX machine on the shipped Q4_K mat-vecs, 1536 × 8960: plain, with counters, with checks, with both.

    OMP_NUM_THREADS=1 python benchmarks/bench_ptx.py

Times are `process_time`, the best of five plain runs and of two others; the values are compared with the float64 product.
"""

from __future__ import annotations

import time

import numpy as np

from aprlab import quants
from aprlab.kernels.cuda.compile import one_entry, shipped_ptx
from aprlab.kernels.cuda.launch import matvec, prepare, prepared_bytes
from aprlab.kernels.ptx import Machine, Pointer, parse
from aprlab.quants.types import Q4_K

ROWS, COLS = 1536, 8960
MODES = {"nothing": {}, "counters": {"counters": True}, "checks": {"checks": True}, "both": {"checks": True, "counters": True}}


def aligned(nbytes: int) -> np.ndarray:
    data = np.zeros(nbytes + 16, np.uint8)
    start = -data.ctypes.data % 16
    return data[start : start + nbytes]


def main() -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (ROWS * COLS // 256, 144), dtype=np.uint8)
    for at in (0, 2):
        raw[:, at : at + 2] = (rng.random(len(raw)) * 0.01).astype(np.float16)[:, None].view(np.uint8)
    weights = quants.dequantise(raw.reshape(-1), Q4_K, (ROWS, COLS)).astype(np.float64)
    x = rng.standard_normal((1, COLS)).astype(np.float32)
    want = weights @ x[0].astype(np.float64)
    print(f"{'kernel':16} " + " ".join(f"{mode:>9}" for mode in MODES) + "   largest difference")
    for contract in ("f32", "q8"):
        scratch, y = aligned(prepared_bytes(contract, 1, COLS)), np.zeros(ROWS, np.float32)
        first = prepare(contract, x, scratch, 1, COLS)
        second = matvec(Q4_K, contract, Pointer(raw), scratch, 0, y, 1, ROWS, COLS)
        times = []
        for launch in (first, second):
            kernel = launch.kernel
            machine = Machine(parse(one_entry(shipped_ptx(kernel.module), kernel.entry)))
            machine.launch(kernel.entry, launch.grid, launch.block, launch.arguments)
        for mode, options in MODES.items():
            best = np.inf
            for _ in range(5 if mode == "nothing" else 2):
                start = time.process_time()
                machine.launch(kernel.entry, launch.grid, launch.block, launch.arguments, **options)
                best = min(best, time.process_time() - start)
            times.append(best)
        error = np.abs(y - want).max() / np.abs(want).max()
        print(f"{kernel.entry:16} " + " ".join(f"{t:8.2f}s" for t in times) + f"   {error:.1e} of the largest value")


if __name__ == "__main__":
    main()
