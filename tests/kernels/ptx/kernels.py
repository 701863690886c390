"""Small clean CUDA kernels, each with a launch and the right answer, and the bugs that are seeded into them by find
and replace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

from aprlab.kernels.cuda import compile as cuda
from aprlab.kernels.ptx import LaunchReport, Machine, Module, Pointer, parse

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """A clean kernel: its source (one entry, `k`), a maker of fresh arguments, and the expected output from them."""

    source: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: Callable[[], Arrays]
    expected: Callable[[Arrays], Any]
    output: str = "out"
    shared: int = 0


@dataclass(frozen=True)
class Bug:
    """A mutation that must match exactly once; `kind` is the finding it must lead to, `at` stands in the source line
    that is blamed.
    """

    kernel: str
    old: str
    new: str
    kind: str
    at: str
    also: frozenset[str] = field(default_factory=frozenset)
    shared: int | None = None
    block: tuple[int, ...] | None = None


@cache
def compiled(source: str) -> Module:
    if not cuda.available():
        pytest.skip("no NVRTC here (the wheel nvidia-cuda-nvrtc-cu12)")
    return parse(cuda.compile_source(source).ptx)


def mutated(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{old!r} matches {source.count(old)} times"
    return source.replace(old, new)


def run(kernel: Kernel, bug: Bug | None = None, **options: Any) -> tuple[LaunchReport, Arrays, str]:
    source = kernel.source if bug is None else mutated(kernel.source, bug.old, bug.new)
    arguments = kernel.arguments()
    shared = kernel.shared if bug is None or bug.shared is None else bug.shared
    block = kernel.block if bug is None or bug.block is None else bug.block
    report = Machine(compiled(source)).launch("k", kernel.grid, block, arguments, shared=shared, **options)
    return report, arguments, source


def floats(*shape: int) -> np.ndarray:
    # Small whole numbers: sums are exact in any order.
    return np.random.default_rng(7).integers(-8, 9, shape).astype(np.float32)


def blank(*shape: int) -> Pointer:
    return Pointer(np.full(shape, np.nan, np.float32), initialised=False)


ROWS, COLS = 6, 300

CLEAN = {
    "reduce": Kernel(
        """extern "C" __global__ void k(float* x, float* out, int n) {
  __shared__ float part[128];
  int t = threadIdx.x, row = blockIdx.x;
  float s = 0;
  for (int i = t; i < n; i += 128)
    s += x[row * n + i];
  part[t] = s;
  __syncthreads();  // first
#pragma unroll 1
  for (int o = 64; o > 0; o >>= 1) {
    if (t < o)
      part[t] += part[t + o];
    __syncthreads();  // second
  }
  if (t == 0)
    out[row] = part[0];
}
""",
        (ROWS,),
        (128,),
        lambda: {"x": floats(ROWS, COLS), "out": blank(ROWS), "n": COLS},
        lambda a: a["x"].sum(axis=1),
    ),
    "dynamic": Kernel(
        """extern "C" __global__ void k(const float* x, float* out) {
  extern __shared__ float buffer[];
  int t = threadIdx.x;
  buffer[t] = x[blockIdx.x * blockDim.x + t];
  __syncthreads();
  out[blockIdx.x * blockDim.x + t] = buffer[blockDim.x - 1 - t];
}
""",
        (3,),
        (96,),
        lambda: {"x": floats(3, 96), "out": blank(3, 96)},
        lambda a: a["x"][:, ::-1],
        shared=384,
    ),
    "warp": Kernel(
        """extern "C" __global__ void k(const float* x, float* out, int rows, int n) {
  int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= rows) return;
  float s = 0;
  for (int i = lane; i < n; i += 32) s += x[row * n + i];
  for (int o = 16; o > 0; o >>= 1)
    s += __shfl_xor_sync(0xffffffffu, s, o);
  if (lane == 0)
    out[row] = s;
}
""",
        (2,),
        (128,),
        lambda: {"x": floats(ROWS, COLS), "out": blank(ROWS), "rows": ROWS, "n": COLS},
        lambda a: a["x"].sum(axis=1),
    ),
    "transpose": Kernel(
        """extern "C" __global__ void k(const float* x, float* out, int rows, int cols) {
  __shared__ float tile[32][33];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (r + j < rows && c < cols)
      tile[threadIdx.y + j][threadIdx.x] = x[(r + j) * cols + c];
  __syncthreads();
  int a = blockIdx.y * 32 + threadIdx.x, b = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (a < rows && b + j < cols)
      out[(b + j) * rows + a] = tile[threadIdx.x][threadIdx.y + j];
}
""",
        (3, 2),
        (32, 8),
        lambda: {"x": floats(45, 70), "out": blank(70, 45), "rows": 45, "cols": 70},
        lambda a: a["x"].T,
    ),
    "rounds": Kernel(
        """extern "C" __global__ void k(const float* x, float* out, int n) {
  __shared__ float tile[64];
  int t = threadIdx.x;
  float s = 0;
  for (int i = 0; i < n; i += 64) {
    tile[t] = x[i + t];
    __syncthreads();  // filled
    s += tile[(t + 1) & 63] - tile[(t + 40) & 63];
    __syncthreads();  // used
  }
  out[blockIdx.x * 64 + t] = s;
}
""",
        (2,),
        (64,),
        lambda: {"x": floats(4, 64), "out": blank(2, 64), "n": 256},
        lambda a: np.tile((np.roll(a["x"], -1, 1) - np.roll(a["x"], -40, 1)).sum(axis=0), (2, 1)),
    ),
    "ragged": Kernel(  # blocks part ways, and pass the same barriers at different times
        """extern "C" __global__ void k(const float* x, float* out) {
  __shared__ float tile[64];
  int t = threadIdx.x;
  float s = 0;
#pragma unroll 1
  for (int i = 0; i <= blockIdx.x; ++i) {
    tile[t] = x[i * 64 + t];
    __syncthreads();
    s += tile[(t + 9) & 63];
    __syncthreads();
  }
  out[blockIdx.x * 64 + t] = s;
}
""",
        (5,),
        (64,),
        lambda: {"x": floats(5, 64), "out": blank(5, 64)},
        lambda a: np.roll(a["x"], -9, 1).cumsum(axis=0),
    ),
    "exchange": Kernel(
        """extern "C" __global__ void k(const float* x, float* out) {
  __shared__ float cell[64];
  int t = threadIdx.x, i = blockIdx.x * 64 + t;
  cell[t] = x[i];
  __syncwarp();
  float other = cell[t ^ 1];
  out[i] = other;
}
""",
        (3,),
        (64,),
        lambda: {"x": floats(192), "out": blank(192)},
        lambda a: a["x"].reshape(-1, 2)[:, ::-1].reshape(-1),
    ),
    "count": Kernel(
        """extern "C" __global__ void k(const unsigned* x, unsigned* out, unsigned n) {
  __shared__ unsigned bins[16];
  if (threadIdx.x < 16) bins[threadIdx.x] = 0;
  __syncthreads();
  unsigned i = blockIdx.x * 64 + threadIdx.x;
  if (i < n)
    atomicAdd(&bins[x[i] & 15], 1u);
  __syncthreads();
  if (threadIdx.x < 16)
    atomicAdd(&out[threadIdx.x], bins[threadIdx.x]);
}
""",
        (5,),
        (64,),
        lambda: {"x": np.random.default_rng(3).integers(0, 99, 300, dtype=np.uint32), "out": np.zeros(16, np.uint32), "n": 300},
        lambda a: np.bincount(a["x"] & 15, minlength=16),
    ),
    "local": Kernel(
        """extern "C" __global__ void k(const float* x, const int* pick, float* out) {
  float own[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    own[j] = x[threadIdx.x * 4 + j];
  out[threadIdx.x] = own[pick[threadIdx.x]];
}
""",
        (1,),
        (64,),
        lambda: {"x": floats(64, 4), "pick": np.arange(64, dtype=np.int32) % 4, "out": blank(64)},
        lambda a: a["x"][np.arange(64), a["pick"]],
    ),
    "vector": Kernel(
        """extern "C" __global__ void k(const float* x, float* out, int n) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) {
    float4 v = ((const float4*)x)[i];
    out[i] = v.x + v.y * v.z - v.w;
  }
}
""",
        (2,),
        (64,),
        lambda: {"x": floats(100, 4), "out": blank(100), "n": 100},
        lambda a: a["x"][:, 0] + a["x"][:, 1] * a["x"][:, 2] - a["x"][:, 3],
    ),
    "ballot": Kernel(
        """extern "C" __global__ void k(const float* x, float* out) {
  int i = blockIdx.x * 64 + threadIdx.x;
  unsigned up = __ballot_sync(0xffffffffu, x[i] > 0);
  int same = __any_sync(0xffffffffu, x[i] == 8) + 2 * __all_sync(0xffffffffu, x[i] > -9);
  out[i] = (float)(__popc(up & ((1u << (threadIdx.x & 31)) - 1)) * 4 + same);
}
""",
        (2,),
        (64,),
        lambda: {"x": floats(128), "out": blank(128)},
        lambda a: np.concatenate(
            [(np.cumsum(w > 0) - (w > 0)) * 4 + (w == 8).any() + 2 * (w > -9).all() for w in a["x"].reshape(-1, 32)]
        ),
    ),
}

RACE, BOUNDS, BARRIER, WARP = "race", "out of bounds", "divergent barrier", "divergent warp operation"
UNSET, ALIGN, CONST = "uninitialised read", "misaligned", "read-only"

BUGS = {
    "first barrier missing": Bug("reduce", "__syncthreads();  // first", "", RACE, "part[t] += part[t + o]"),
    "loop barrier missing": Bug("reduce", "__syncthreads();  // second", "", RACE, "part[", frozenset({RACE})),
    "barrier under a condition": Bug(
        "reduce",
        "part[t] += part[t + o];\n    __syncthreads();",
        "{ part[t] += part[t + o];\n    __syncthreads(); }",
        BARRIER,
        "",
    ),
    "shared array too small": Bug("reduce", "part[128]", "part[100]", BOUNDS, "part[t] = s"),
    "one value too many": Bug("reduce", "i < n", "i <= n", BOUNDS, "s += x"),
    "row number off by one": Bug("reduce", "out[row] =", "out[row + 1] =", BOUNDS, "out[row + 1]"),
    "two blocks on one row": Bug("reduce", "out[row] =", "out[row / 2] =", RACE, "out[row / 2]"),
    "every thread writes": Bug("reduce", "if (t == 0)", "", RACE, "out[row]"),
    "threads leave before a barrier": Bug(
        "reduce", "  part[t] = s;", "  if (t >= 96) return;\n  part[t] = s;", BARRIER, "first", frozenset({UNSET})
    ),
    "half of shared memory unset": Bug("reduce", "  part[t] = s;", "  if (t < 64) part[t] = s;", UNSET, "part[t] += part[t + o]"),
    "partner off by one": Bug("reduce", "part[t + o];", "part[t + o + 1];", BOUNDS, "part[t + o + 1]", frozenset({RACE})),
    "base address two bytes off": Bug("reduce", "x[row * n + i]", "*(float*)((char*)(x + row * n + i) + 2)", ALIGN, "s +="),
    "output read before written": Bug("reduce", "out[row] =", "out[row] +=", UNSET, "out[row]"),
    "input from before the start": Bug("reduce", "x[row * n + i]", "x[row * n + i - 1]", BOUNDS, "s += x"),
    "barrier in a loop of unequal length": Bug(
        "reduce", "s += x[row * n + i];", "{ s += x[row * n + i]; __syncthreads(); }", BARRIER, ""
    ),
    "dynamic shared memory too small": Bug(
        "dynamic", "int t = threadIdx.x;", "int t = threadIdx.x ;", BOUNDS, "buffer[t]", shared=256
    ),
    "more threads than the grid was made for": Bug(
        "dynamic", "int t = threadIdx.x;", "int t = threadIdx.x ;", BOUNDS, "", shared=512, block=(128,)
    ),
    "shuffle by half a warp": Bug("warp", "    s += __shfl", "    if (lane < 16) s += __shfl", WARP, "__shfl"),
    "rows guard missing": Bug("warp", "if (row >= rows) return;", "", BOUNDS, "s += x"),
    "all lanes store": Bug("warp", "if (lane == 0)", "", RACE, "out[row] = s"),
    "tile read before it is full": Bug("transpose", "__syncthreads();", "", RACE, "tile[threadIdx.x]", frozenset({UNSET})),
    "edge of the matrix forgotten": Bug("transpose", "r + j < rows && c < cols", "r + j < rows", BOUNDS, "x[(r + j)"),
    "tile a column short": Bug("transpose", "tile[32][33]", "tile[31][33]", BOUNDS, "tile[threadIdx"),
    "tile refilled while in use": Bug("rounds", "__syncthreads();  // used", "", RACE, "tile[t] ="),
    "neighbour's cell without __syncwarp": Bug("exchange", "__syncwarp();", "", RACE, "cell["),
    "histogram without atomics": Bug("count", "atomicAdd(&bins[x[i] & 15], 1u);", "bins[x[i] & 15] += 1u;", RACE, "bins[x[i]"),
    "totals without atomics": Bug(
        "count", "atomicAdd(&out[threadIdx.x], bins[threadIdx.x]);", "out[threadIdx.x] += bins[threadIdx.x];", RACE, "out["
    ),
    "counting before all bins are clear": Bug(
        "count", "  __syncthreads();\n  unsigned i", "  unsigned i", RACE, "atomicAdd(&bins"
    ),
    "reading bins while others count": Bug(
        "count",
        "  __syncthreads();\n  if (threadIdx.x < 16)\n    atomicAdd(&out",
        "  if (threadIdx.x < 16)\n    atomicAdd(&out",
        RACE,
        "bins[threadIdx.x]",
    ),
    "bins never cleared": Bug("count", "if (threadIdx.x < 16) bins[threadIdx.x] = 0;", "", UNSET, "atomicAdd"),
    "local index beyond the array": Bug("local", "own[pick[threadIdx.x]]", "own[pick[threadIdx.x] + 1]", BOUNDS, "own["),
    "local array half set": Bug("local", "j < 4", "j < 3", UNSET, "own["),
    "vector load from an odd float": Bug("vector", "((const float4*)x)[i]", "*(const float4*)(x + 4 * i + 1)", ALIGN, "float4 v"),
    "vector load too far": Bug("vector", "((const float4*)x)[i]", "((const float4*)x)[i + 1]", BOUNDS, "float4 v"),
    "vote of the odd lanes only": Bug("ballot", "  unsigned up =", "  unsigned up = 0; if (i & 1) up =", WARP, "__ballot"),
}
