"""Kernels against oracles, the same cases and inputs for every machine that runs kernels.

The tests run them on the PTX machine, with its checks on; ``aprlab gpu verify`` runs them on a GPU, times the mat-vecs, and
writes what it saw as JSON. Oracles: aprlab's NumPy decoders (bit for bit) and float64 arithmetic (within bounds derived from
the number of roundings a term passes through).
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Final

import numpy as np
import xxhash

from aprlab import quants
from aprlab.kernels.cuda import launch as launches
from aprlab.kernels.cuda.device import Device
from aprlab.kernels.cuda.launch import Launch
from aprlab.model.tensor import Tensor
from aprlab.quants import types
from aprlab.quants.types import TensorType
from aprlab.version import __version__

UNIT = 2.0**-24
SEED = 20_260_101

# Bytes of a block that hold quants, and what fills them so that every value is the one with the smallest unsigned quant:
# kernels sum unsigned quants and take the offset off afterwards, so rounding errors scale with both.
_LOWEST: dict[str, tuple[slice, int]] = {
    "Q4_0": (slice(2, 18), 0),
    "Q4_1": (slice(4, 20), 0),
    "Q5_0": (slice(2, 22), 0),
    "Q5_1": (slice(4, 24), 0),
    "Q8_0": (slice(2, 34), 0x80),
    "Q4_K": (slice(16, 144), 0),
    "Q5_K": (slice(16, 176), 0),
    "Q6_K": (slice(0, 192), 0),
}


@dataclass(frozen=True, slots=True)
class KernelOutcome:
    """`error`: the largest deviation in units of what is allowed, where bits must be equal the number of unequal values."""

    error: float
    exact: bool  # bits are compared

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed; NaN is not."""
        return self.error == 0 if self.exact else self.error <= 1


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One comparison: `run` takes a `Bench` and returns the outcome."""

    name: str
    run: Callable[[Bench], KernelOutcome]


class Bench:
    """A device with arrays put in and taken out by shape."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._alive: list[Any] = []  # launches may be under way when a case's own names are gone
        self._given, self._gotten = xxhash.xxh3_64(), xxhash.xxh3_64()

    def put(self, array: np.ndarray) -> Any:
        """Pointer to a copy, padded to 16 bytes."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._given.update(raw.data)
        return self._pointer(self.device.upload(raw, launches.padded(raw.nbytes)))

    def room(self, nbytes: int) -> tuple[Any, Any]:
        """(pointer, buffer) of zeros, room for a result, padded to 16 bytes."""
        size = launches.padded(nbytes)
        buffer = self.device.upload(np.zeros(size, np.uint8), size)
        return self._pointer(buffer), buffer

    def get(self, buffer: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What a buffer holds."""
        dtype = np.dtype(dtype)
        got = self.device.download(buffer, 0, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        plain = np.where(np.isnan(got), dtype.type(np.nan), got) if dtype.kind == "f" else got  # any NaN is any other
        self._gotten.update(np.ascontiguousarray(plain).reshape(-1).view(np.uint8).data)
        return got

    def bits(self) -> dict[str, str]:
        """XXH3-64 of all that was put in and of all that was taken out; two devices with one `given` must have one `got`."""
        return {"given": self._given.hexdigest(), "got": self._gotten.hexdigest()}

    def run(self, *many: Launch) -> None:
        """Launch, in order."""
        for launch in many:
            self.device.run(launch)

    def _pointer(self, buffer: Any) -> Any:
        self._alive.append(buffer)
        return self.device.pointer(buffer, 0)


def decode(device: Device, tensor: Tensor) -> np.ndarray:
    """All values by the device's dequantise kernel: float32 of the tensor's shape."""
    bench = Bench(device)
    at, room = bench.room(4 * tensor.size)
    bench.run(launches.dequantise(tensor.type, bench.put(tensor.raw), at, tensor.size))
    return bench.get(room, tensor.shape, np.float32)


def unequal(got: np.ndarray, expected: np.ndarray) -> KernelOutcome:
    """Bits compared; any NaN equals any other."""
    same = (got.view(f"u{got.itemsize}") == expected.view(f"u{got.itemsize}")) | (np.isnan(got) & np.isnan(expected))
    return KernelOutcome(float(np.count_nonzero(~same)), True)


def within(got: np.ndarray, truth: np.ndarray, bound: np.ndarray | float) -> KernelOutcome:
    """Deviation from float64 `truth`, in units of `bound`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.abs(got.astype(np.float64) - truth) / bound
    return KernelOutcome(float("inf") if np.isnan(off).any() else float(off.max()), False)


def rng(*key: int) -> np.random.Generator:
    """The same numbers on every machine."""
    return np.random.default_rng([SEED, *key])


# ---- weights -------------------------------------------------------------------------------------------------------


def random_bytes(kind: TensorType, rows: int, cols: int) -> np.ndarray:
    """Any bytes at all: scales of every size and sign, subnormal, infinite and NaN among them. uint8, 1-D."""
    return rng(kind.code, rows, cols).integers(0, 256, kind.nbytes((rows, cols)), dtype=np.uint8)


def random_weights(kind: TensorType, rows: int, cols: int) -> np.ndarray:
    """Encoded rows of different size, finite. uint8, 1-D."""
    draw = rng(kind.code, rows, cols, 1)
    values = draw.standard_normal((rows, cols)) * draw.uniform(0.1, 3, (rows, 1)) + draw.uniform(-0.5, 0.5, (rows, 1))
    return quants.quantise(values.astype(np.float32), kind).reshape(-1)


def magnitudes(raw: np.ndarray, kind: TensorType, rows: int, cols: int) -> np.ndarray:
    """float64 (rows, cols): how large the terms are that a kernel sums for each value, offsets included."""
    size = np.abs(quants.dequantise(raw, kind, (rows, cols)).astype(np.float64))
    if kind.name in _LOWEST:
        where, fill = _LOWEST[kind.name]
        lowest = raw.reshape(-1, kind.block_bytes).copy()
        lowest[:, where] = fill
        size += 2 * np.abs(quants.dequantise(lowest.reshape(-1), kind, (rows, cols)).astype(np.float64))
    return size


def random_activations(tokens: int, cols: int) -> np.ndarray:
    """float32 (tokens, cols), sizes spread over some powers of ten."""
    draw = rng(tokens, cols, 2)
    return (draw.standard_normal((tokens, cols)) * np.exp(1.5 * draw.standard_normal((tokens, cols)))).astype(np.float32)


def round_to_q8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 (…, cols), d float32 (…, cols / 32)): what contract q8 makes of x, step by step in float32."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    d = np.abs(groups).max(-1) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    scaled = (groups * inverse[..., None]).astype(np.float32)
    q = np.trunc(scaled + np.copysign(np.float32(0.49999997), scaled))
    return q.astype(np.int8).reshape(x.shape), d


# ---- cases ---------------------------------------------------------------------------------------------------------


def dequantise_case(kind: TensorType, to: str, raw: np.ndarray, values: int) -> KernelCase:
    """Bytes to values, bit for bit."""

    def run(bench: Bench) -> KernelOutcome:
        dtype = np.float32 if to == "f32" else np.float16
        at, room = bench.room(values * np.dtype(dtype).itemsize)
        bench.run(launches.dequantise(kind, bench.put(raw), at, values, to))
        with np.errstate(all="ignore"):
            expected = quants.dequantise(raw, kind, (1, values)).reshape(-1).astype(dtype)
        return unequal(bench.get(room, (values,), dtype), expected)

    return KernelCase(f"dequantise {kind.name} to {to}", run)


def embed_case(kind: TensorType, cols: int) -> KernelCase:
    """Rows by token, one of them NaN's word -1."""

    def run(bench: Bench) -> KernelOutcome:
        raw = random_weights(kind, 7, cols)
        ids = np.array([6, 0, -1, 3], np.int32)
        at, room = bench.room(4 * cols * 4)
        bench.run(launches.embed(kind, bench.put(raw), bench.put(ids), at, 4, cols))
        expected = quants.dequantise(raw, kind, (7, cols))[ids]
        expected[2] = 0
        return unequal(bench.get(room, (4, cols), np.float32), expected)

    return KernelCase(f"embed {kind.name}", run)


def matvec_case(kind: TensorType, contract: str, tokens: int, rows: int, cols: int, *, with_bias: bool) -> KernelCase:
    """W x + bias against float64. Under q8 the truth is the product with the *rounded* activations."""

    def run(bench: Bench) -> KernelOutcome:
        raw, x = random_weights(kind, rows, cols), random_activations(tokens, cols)
        bias = rng(rows).standard_normal(rows).astype(np.float32) if with_bias else np.zeros(rows, np.float32)
        at, room = bench.room(4 * tokens * rows)
        ready = bench.put(x)
        if kind in launches.PACKED:
            prepared, _ = bench.room(launches.prepared_bytes(contract, tokens, cols))
            bench.run(launches.prepare(contract, ready, prepared, tokens, cols))
            ready = prepared
        b = bench.put(bias) if with_bias else launches.NULL
        bench.run(launches.matvec(kind, contract, bench.put(raw), ready, b, at, tokens, rows, cols))

        used = x.astype(np.float64)
        if contract == "q8" and kind in launches.PACKED:
            q, d = round_to_q8(x)
            used = q.astype(np.float64) * np.repeat(d.astype(np.float64), 32, -1)
        w = quants.dequantise(raw, kind, (rows, cols)).astype(np.float64)
        truth = used @ w.T + bias
        size = np.abs(used) @ magnitudes(raw, kind, rows, cols).T + np.abs(bias)
        return within(bench.get(room, (tokens, rows), np.float32), truth, _roundings(kind, contract, cols) * UNIT * size)

    return KernelCase(f"matvec {kind.name} {contract} {rows}x{cols} T={tokens}", run)


def _roundings(kind: TensorType, contract: str, cols: int) -> int:
    """How many roundings a term passes through at most: its chain of additions, scale and offset, the tree, the bias."""
    if kind not in launches.PACKED:
        return -(-cols // 16) + 8
    steps = -(-cols // launches.STEP_VALUES)
    chain = 32 if contract == "f32" else 2  # integer sums do not round
    return chain + 8 * steps + 12


def quantise_case(tokens: int, cols: int) -> KernelCase:
    """The q8 activations themselves, bit for bit: quants, scales, and both kinds of sums."""

    def run(bench: Bench) -> KernelOutcome:
        x = random_activations(tokens, cols)
        x[0, 32:64] = 0  # a block without any size
        steps = -(-cols // launches.STEP_VALUES)
        at, room = bench.room(launches.prepared_bytes("q8", tokens, cols))
        bench.run(launches.prepare("q8", bench.put(x), at, tokens, cols))
        got = bench.get(room, (tokens, steps, 12, 16, 16), np.uint8)
        wide = np.zeros((tokens, steps * launches.STEP_VALUES), np.float32)
        wide[:, :cols] = x
        q, d = round_to_q8(wide)
        sums = q.reshape(tokens, -1, 16).astype(np.float32).sum(-1)
        halves = sums * np.repeat(d, 2, -1)
        wholes = sums.reshape(tokens, -1, 2).sum(-1) * d
        chunks = -(-cols // 128)  # lanes behind the last chunk are not written

        def lanes(values: np.ndarray, pieces: int) -> np.ndarray:  # (T, chunks' values) -> [T, step, piece, lane, 16 bytes]
            raw = np.ascontiguousarray(values).view(np.uint8).reshape(tokens, steps, 16, pieces, 16)
            return raw.transpose(0, 1, 3, 2, 4)

        expected = np.concatenate([lanes(q, 8), lanes(d, 1), lanes(halves, 2), lanes(wholes, 1)], 2)
        written = np.arange(steps * 16).reshape(steps, 16) < chunks
        differ = (got != expected) & written[None, :, None, :, None]
        return KernelOutcome(float(np.count_nonzero(differ)), True)

    return KernelCase(f"quantise T={tokens} {cols}", run)


def rms_norm_case(n: int) -> KernelCase:
    """Against float64."""

    def run(bench: Bench) -> KernelOutcome:
        x, w = random_activations(3, n), rng(n).standard_normal(n).astype(np.float32)
        at, room = bench.room(4 * 3 * n)
        bench.run(launches.rms_norm(bench.put(x), bench.put(w), at, 3, n, 1e-6))
        x64 = x.astype(np.float64)
        truth = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + np.float32(1e-6)) * w
        # squares add up in chains of n / 256, a tree and eight parts; half of that error under the root, and six more
        return within(bench.get(room, (3, n), np.float32), truth, ((-(-n // 256) + 14) / 2 + 6) * UNIT * np.abs(truth))

    return KernelCase(f"rms_norm {n}", run)


def rope_case(style: str, heads: int, head_dim: int) -> KernelCase:
    """Against complex float64."""

    def run(bench: Bench) -> KernelOutcome:
        half, positions = head_dim // 2, np.array([0, 1, 77])
        x = random_activations(3, heads * head_dim).reshape(3, heads, head_dim)
        angles = positions[:, None] * 1e6 ** (-np.arange(half) / half)
        table = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
        at, room = bench.room(x.nbytes)
        bench.run(launches.rope(style, bench.put(x), bench.put(table), at, 3, heads, head_dim))
        pairs = [(i, i + half) if style == "neox" else (2 * i, 2 * i + 1) for i in range(half)]
        first, second = (np.array(index) for index in zip(*pairs, strict=True))
        z = (x[..., first] + 1j * x[..., second].astype(np.float64)) * np.exp(1j * angles)[:, None, :]
        truth, size = np.empty(x.shape), np.empty(x.shape)
        truth[..., first], truth[..., second] = z.real, z.imag
        size[..., first] = size[..., second] = np.abs(x[..., first]).astype(np.float64) + np.abs(x[..., second])
        return within(bench.get(room, x.shape, np.float32), truth, 4 * UNIT * size)

    return KernelCase(f"rope {style} {heads}x{head_dim}", run)


def attend_case(head_dim: int, heads: int, kv_heads: int, seen: int) -> KernelCase:
    """Three queries behind `seen` cached positions, against float64."""

    def run(bench: Bench) -> KernelOutcome:
        tokens, n = 3, kv_heads * head_dim
        capacity = seen + tokens + 2
        draw = rng(head_dim, heads, seen)
        q = draw.standard_normal((tokens, heads, head_dim)).astype(np.float32) * 2
        k, v = (draw.standard_normal((capacity, kv_heads, head_dim)).astype(np.float32) for _ in range(2))
        positions = np.arange(seen, seen + tokens, dtype=np.int32)
        old = [part.copy() for part in (k, v)]
        for part in old:
            part[seen:] = np.nan  # what lies behind must not be looked at
        keys_at, values_at = map(bench.put, old)
        new = [bench.put(part[seen : seen + tokens]) for part in (k, v)]
        where, (at, room) = bench.put(positions), bench.room(q.nbytes)
        bench.run(
            launches.remember(new[0], new[1], where, keys_at, values_at, tokens, n),
            launches.attend(bench.put(q), keys_at, values_at, where, at, tokens, heads, kv_heads, head_dim),
        )
        truth, bound = np.empty(q.shape), np.empty(q.shape)
        for t, head in np.ndindex(tokens, heads):
            keys, values = (part[: seen + t + 1, head // (heads // kv_heads)].astype(np.float64) for part in (k, v))
            scores = keys @ q[t, head] / np.sqrt(head_dim)
            p = np.exp(scores - scores.max())
            p /= p.sum()
            truth[t, head] = p @ values
            # a score off by e multiplies its weight by exp(e); the sums run over all positions seen
            off = (head_dim / 32 + 8) * UNIT * (np.abs(keys) @ np.abs(q[t, head]) / np.sqrt(head_dim)).max()
            bound[t, head] = (2 * off + (2 * len(keys) / 4 + 24) * UNIT) * (p @ np.abs(values))
        return within(bench.get(room, q.shape, np.float32), truth, bound)

    return KernelCase(f"attend {heads}/{kv_heads}x{head_dim} behind {seen}", run)


def swiglu_case() -> KernelCase:
    """Gates from one end of float32's exponentials to the other."""

    def run(bench: Bench) -> KernelOutcome:
        gate = np.concatenate([np.linspace(-120, 120, 997), [0.0, -0.0, -87.5, -103.9, 1e30, -1e30]]).astype(np.float32)
        up = rng(1).standard_normal(len(gate)).astype(np.float32)
        at, room = bench.room(gate.nbytes)
        bench.run(launches.swiglu(bench.put(gate), bench.put(up), at, len(gate)))
        g = gate.astype(np.float64)
        with np.errstate(over="ignore"):
            truth = g / (1 + np.exp(-g)) * up
        # the exponential within 2 ulp, three more roundings; where e^-gate is infinite (gate < -88.7) the result is 0
        bound = 8 * UNIT * np.abs(truth) + 128 * 2.0**-128 * np.abs(up) + 2.0**-149
        return within(bench.get(room, gate.shape, np.float32), truth, bound)

    return KernelCase("swiglu", run)


def add_case() -> KernelCase:
    """Bit for bit."""

    def run(bench: Bench) -> KernelOutcome:
        a, b = (random_activations(i, 1000).reshape(-1)[:777] for i in (1, 2))
        at, room = bench.room(a.nbytes)
        bench.run(launches.add(bench.put(a), bench.put(b), at, len(a)))
        return unequal(bench.get(room, a.shape, np.float32), a + b)

    return KernelCase("add", run)


def argmax_case(n: int) -> KernelCase:
    """Ties go to the first; a NaN anywhere gives -1; all minus infinity gives 0."""

    def run(bench: Bench) -> KernelOutcome:
        x = rng(n).standard_normal((5, n)).astype(np.float32)
        x[1, [n - 1, n // 2]] = 9
        x[2, n - 2] = np.nan
        x[3] = -np.inf
        at, room = bench.room(4 * 5)
        bench.run(launches.argmax(bench.put(x), at, 5, n))
        expected = np.array([x[0].argmax(), n // 2, -1, 0, x[4].argmax()])
        return KernelOutcome(float(np.count_nonzero(bench.get(room, (5,), np.int32) != expected)), True)

    return KernelCase(f"argmax {n}", run)


def cases() -> Iterator[KernelCase]:
    """All of them: every kernel, shapes that are not square, rows that end inside a chunk, a step or a pair."""
    for kind in launches.DEQUANTISED:
        values = 24 * max(kind.block_elements, 44)
        for to in ("f32", "f16"):
            yield dequantise_case(kind, to, random_bytes(kind, 1, values), values)
    for kind in (*launches.PACKED, *launches.PLAIN):
        wide = kind.block_elements == 256
        yield embed_case(kind, 512 if wide else 96)
        for contract in launches.CONTRACTS if kind in launches.PACKED else ("f32",):
            yield matvec_case(kind, contract, 1, 11, 256 if wide else 96, with_bias=True)
            yield matvec_case(kind, contract, 2, 9, 2560 if wide else 2208, with_bias=False)
    for kind in (types.F16, types.BF16):
        yield matvec_case(kind, "f32", 1, 5, 43, with_bias=True)
    yield quantise_case(2, 2208)
    yield rms_norm_case(896)
    for style in ("neox", "norm"):
        yield rope_case(style, 3, 64)
    for head_dim in launches.HEAD_DIMS:
        yield attend_case(head_dim, 6, 2, 0 if head_dim == 96 else 37)
    yield swiglu_case()
    yield add_case()
    yield argmax_case(1000)


def machine_bits() -> dict[str, dict[str, str]]:
    """What the PTX machine puts in and gets out in each case, by name of the case (`docs/make/kernel_bits.py` makes the file)."""
    text = resources.files("aprlab.kernels.cuda").joinpath("ptx", "bits.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def as_the_machine(case: str, bits: dict[str, str], known: Mapping[str, dict[str, str]]) -> bool | None:
    """Whether the results are the PTX machine's bit for bit; None where the inputs already differ (another NumPy's numbers)."""
    expected = known.get(case)
    return bits["got"] == expected["got"] if expected is not None and bits["given"] == expected["given"] else None


def verify(device: Device) -> list[dict[str, Any]]:
    """Runs all cases. A kernel that fails to run fails its case, and the next one goes on."""
    results, known = [], machine_bits()
    for case in cases():
        start, bench, fault = time.perf_counter(), Bench(device), None
        try:
            outcome = case.run(bench)
        except Exception as error:  # a launch may die in as many ways as there are drivers
            outcome, fault = KernelOutcome(float("inf"), False), f"{type(error).__name__}: {error}"
        seconds, bits = time.perf_counter() - start, bench.bits()
        same = None if fault else as_the_machine(case.name, bits, known)
        results.append({
            "case": case.name, "passed": outcome.passed and same is not False, "as_the_machine": same, "fault": fault,
            "seconds": round(seconds, 4), **asdict(outcome), "bits": bits,
        })  # fmt: skip
    return results


# ---- timings, on a GPU only ----------------------------------------------------------------------------------------

TIMED_BYTES = 256 << 20
"""Weights of a timed mat-vec, or of its copies in turn: more than any cache holds, so that they come from memory."""
LONG: Final = ((0, 8960),)
"""One shape, rows and columns: as many rows as make `TIMED_BYTES`."""


def timings(device: Any, shapes: Sequence[tuple[int, int]] = LONG) -> list[dict[str, Any]]:
    """Mat-vecs of one token: seconds (the best of five rounds) and bytes of weights a second, by type, contract and shape."""
    results: list[dict[str, Any]] = []
    for kind in (*launches.PACKED, types.F16, types.BF16):
        for rows, cols in shapes:
            if cols % kind.block_elements == 0:
                results += _timed(device, kind, rows or TIMED_BYTES // kind.row_bytes(cols), cols)
    return results


def _timed(device: Any, kind: TensorType, rows: int, cols: int) -> Iterator[dict[str, Any]]:
    """One type and shape under each contract."""
    bench, nbytes = Bench(device), rows * kind.row_bytes(cols)
    matrix = np.resize(random_weights(kind, 8, cols), nbytes)
    copies = [bench.put(matrix) for _ in range(max(1, TIMED_BYTES // nbytes))]
    x, (y, _) = bench.put(random_activations(1, cols)), bench.room(4 * rows)
    for contract in launches.CONTRACTS if kind in launches.PACKED else ("f32",):
        ready = x
        if kind in launches.PACKED:
            ready, _ = bench.room(launches.prepared_bytes(contract, 1, cols))
            bench.run(launches.prepare(contract, x, ready, 1, cols))
        seconds = device.seconds(*(launches.matvec(kind, contract, w, ready, launches.NULL, y, 1, rows, cols) for w in copies))
        yield {"type": kind.name, "contract": contract, "rows": rows, "cols": cols, "seconds": seconds,
               "bytes_a_second": nbytes / seconds}  # fmt: skip


def report(device: Any, shapes: Sequence[tuple[int, int]] = LONG) -> dict[str, Any]:
    """Everything about one run on a GPU, ready for JSON; `passed` says whether every case did."""
    results = verify(device)
    return {
        "aprlab": __version__,
        "machine": device.describe(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "passed": all(result["passed"] for result in results),
        "cases": results,
        "timings": timings(device, shapes),
    }
