"""Dequantisation, one thread: aprlab's jit kernels, ggml's C (extra `peer`), gguf's NumPy; interleaved in one run.

    OPENBLAS_NUM_THREADS=1 python benchmarks/bench_dequantise.py [--megabytes 16] [--rounds 9] [--types Q4_K,Q6_K]

GB/s of float32 written, into buffers that are reused. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from aprlab.kernels.simd import isa, kernels
from aprlab.quants.types import by_name


def ggml() -> ctypes.CDLL | None:
    """ggml's C functions out of llama.cpp's Python package, None where it is not installed."""
    try:
        import xllamacpp
    except ImportError:
        return None
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_cpu_init()
    return library


def seconds(action: Callable[[], object]) -> float:
    """Of the second of two runs: the first finds the caches as the contender before it left them."""
    action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=16, help="of float32; small ones stay in a cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--types", default="Q8_0,Q5_0,Q4_0,Q4_K,Q6_K,Q5_K,Q2_K,Q3_K,Q4_1,Q5_1,F16,BF16")
    options = parser.parse_args()
    library, rng = ggml(), np.random.default_rng(0)
    count = options.megabytes * (1 << 18)
    print(f"{isa.choose().name}, {count * 4 / 1e6:.0f} MB of float32, {options.rounds} rounds; GB/s: median (min … max)\n")
    print(f"| | jit | ggml C | gguf NumPy | jit / C | jit / NumPy |\n{'|---' * 6}|")
    for name in options.types.split(","):
        kind = kernels.KINDS[by_name(name)]
        source = rng.integers(0, 256, kind.type.row_bytes(count), dtype=np.uint8)
        if kind.type.block_elements == 1:  # plain halves: keep clear of NaN, which is slow in C
            source &= 0x3F
        raw, out = kernels.frozen(source), np.zeros(count, np.float32)
        actions: dict[str, Callable[[], object]] = {"jit": lambda: kernels.decode(kind, raw, count, out)}  # noqa: B023
        own = f"dequantize_row_{name.lower().replace('_k', '_K')}"
        if library is not None and hasattr(library, own):
            args = ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(count)
            actions["c"] = lambda: getattr(library, own)(*args)  # noqa: B023
        code = gguf.GGMLQuantizationType(kind.type.code)
        with np.errstate(all="ignore"):
            actions["numpy"] = lambda: gguf.quants.dequantize(raw, code)  # noqa: B023
            for action in actions.values():
                action()
            rounds = []
            for n in range(options.rounds):  # a different one begins each time
                order = [*actions][n % len(actions) :] + [*actions][: n % len(actions)]
                rounds.append({key: seconds(actions[key]) for key in order})
        columns = []
        for key in ("jit", "c", "numpy"):
            speeds = [count * 4 / each[key] / 1e9 for each in rounds if key in each]
            columns.append(spread(speeds) if speeds else "-")
        ratios = [spread([each[key] / each["jit"] for each in rounds]) if key in rounds[0] else "-" for key in ("c", "numpy")]
        print(f"| {name} | {' | '.join(columns + ratios)} |", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
