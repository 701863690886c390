"""One engine for every machine that runs the kernels. A device moves bytes and runs launches; all else is here.

`aprlab.engines.cuda` (a GPU) and `aprlab.engines.ptx` (the PTX machine) are this class over two devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from aprlab.engines.base import Cache, Engine
from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.kernels.cuda import launch as launches
from aprlab.kernels.cuda.device import Device, DeviceArray
from aprlab.kernels.cuda.launch import Launch
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling, frequencies
from aprlab.model.tensor import Tensor
from aprlab.quants import types


def no_more_options(engine: str, unknown: Mapping[str, Any]) -> None:
    """Raises UsageError if there are options left that an engine does not have."""
    if unknown:
        raise UsageError(f"engine {engine!r} has no option {min(unknown)!r}", code="engines.unknown-option")


class KernelEngine(Engine):
    """The primitives as launches of `aprlab.kernels.cuda.launch`.

    Args:
        model: the weights; they go to the device in the bytes of their file.
        device: where the kernels run.
        contract: ``f32``, or ``q8``: activations rounded to 8 bits by blocks of 32 in front of every mat-vec with a
            quantised weight (weights of plain floats are multiplied in float32 anyway).
    """

    def __init__(self, model: Model, threads: int | None, device: Device, contract: str) -> None:
        super().__init__(model, threads)
        launches.prepared_bytes(contract, 1, 32)  # refuses an unknown contract
        self.contract = contract  # of this object: the kernels know both
        self.device = device
        self._weights: dict[str, Any] = {}
        self._held = {"weights": 0, "cache": 0}
        self._prepared: tuple[DeviceArray, DeviceArray] | None = None
        self._uploads: dict[str, tuple[Any, DeviceArray]] = {}
        self._check_fit()

    # -- weights -------------------------------------------------------------------------------------------------------

    def needed_bytes(self) -> int:
        """Device memory that the weights take once all are uploaded."""
        return sum(_device_bytes(tensor) for tensor in self.model.tensors.values())

    def _check_fit(self) -> None:
        """Before anything is uploaded. Raises UnsupportedError with both figures."""
        free, needed = self.device.free_bytes(), self.needed_bytes()
        if free is not None and needed > free:
            raise UnsupportedError(
                f"the model's weights take {needed} bytes ({needed / 2**20:.0f} MiB) of device memory, "
                f"{free} bytes ({free / 2**20:.0f} MiB) are free",
                code="cuda.out-of-memory",
                path=self.model.path,
            )

    def _weight(self, tensor: Tensor) -> Any:
        """Pointer to a matrix in its own blocks, or to a vector as float32; uploaded the first time."""
        if tensor.name not in self._weights:
            nbytes = _device_bytes(tensor)
            data = tensor.raw if len(tensor.shape) > 1 else tensor.dequantise().view(np.uint8)
            self._weights[tensor.name] = self.device.upload(np.ascontiguousarray(data), nbytes)
            self._held["weights"] += nbytes
        return self.device.pointer(self._weights[tensor.name], 0)

    def warm(self) -> None:
        """Upload all weights."""
        for tensor in self.model.tensors.values():
            self._weight(tensor)

    def load_line(self) -> str:
        """What is on the device now, e.g. ``339 tensors: 198 quantised, 141 F32; 1060.5 MiB (…)``."""
        on = [self.model.tensors[name] for name in self._weights]
        kinds = [t.type.name for t in on]
        quantised = sum(t.type.quantised for t in on)
        plain = ", ".join(f"{kinds.count(k)} {k}" for k in sorted({t.type.name for t in on if not t.type.quantised}))
        whole = 4 * sum(t.size for t in on)
        return (
            f"{len(on)} tensors: {', '.join(filter(None, [f'{quantised} quantised', plain]))}; "
            f"{self._held['weights'] / 2**20:.1f} MiB (as float32 they would take {whole / 2**20:.1f})"
        )

    def memory(self) -> dict[str, int]:
        """Bytes on the device: weights in their own types, and key/value caches made so far."""
        return dict(self._held)

    def close(self) -> None:
        """Free all device memory this engine holds."""
        self._weights.clear()
        self._uploads.clear()
        self._prepared = None
        self.device.close()

    # -- moving in and out ---------------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray) -> DeviceArray:
        data = np.ascontiguousarray(x, np.float32)
        return self._upload(data)

    def to_numpy(self, x: DeviceArray) -> np.ndarray:
        return self.device.download(x.buffer, x.offset, 4 * x.size).view(np.float32).reshape(x.shape)

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        shape = (config.block_count, capacity, config.head_count_kv * config.head_dim)
        self._held["cache"] += 2 * 4 * prod(shape)
        return Cache(self._empty(shape), self._empty(shape), capacity, window=config.sliding_window)

    def _upload(self, data: np.ndarray) -> DeviceArray:
        """Four-byte elements as they are."""
        raw = data.reshape(-1).view(np.uint8)
        return DeviceArray(self.device.upload(raw, launches.padded(raw.nbytes)), data.shape)

    def _upload_once(self, purpose: str, key: Any, make: Callable[[], np.ndarray]) -> DeviceArray:
        """Uploads what `make` makes, unless the last upload for `purpose` had the same `key`."""
        if purpose not in self._uploads or self._uploads[purpose][0] != key:
            self._uploads[purpose] = (key, self._upload(make()))
        return self._uploads[purpose][1]

    def _empty(self, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self.device.empty(launches.padded(4 * prod(shape))), shape)

    def _at(self, x: DeviceArray, element: int = 0) -> Any:
        return self.device.pointer(x.buffer, x.offset + 4 * element)

    def _positions(self, positions: np.ndarray) -> DeviceArray:
        return self._upload_once("positions", positions.tobytes(), lambda: positions.astype(np.int32))

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def embed(self, tokens: np.ndarray | DeviceArray, weight: str) -> DeviceArray:
        """As the base class says; `tokens` may also be what `argmax` returned."""
        tensor = self.matrix(weight)
        ids = tokens if isinstance(tokens, DeviceArray) else self._upload(tokens.astype(np.int32))
        y = self._empty((ids.size, tensor.cols))
        self._run(launches.embed, tensor, self._weight(tensor), self._at(ids), self._at(y), ids.size, tensor.cols)
        return y

    def norm(self, x: DeviceArray, weight: str, eps: float) -> DeviceArray:
        count, n = x.shape
        y = self._empty(x.shape)
        vector = self._weight(self.vector(weight, n))
        self.device.run(launches.rms_norm(self._at(x), vector, self._at(y), count, n, eps))
        return y

    def matmul(self, x: DeviceArray, weight: str, bias: str | None = None) -> DeviceArray:
        count, cols = x.shape
        tensor = self.matrix(weight, cols)
        y = self._empty((count, tensor.rows))
        w = self._weight(tensor)
        b = launches.NULL if bias is None else self._weight(self.vector(bias, tensor.rows))
        ready = self._prepare(x) if tensor.type in launches.PACKED else x
        ends = (self._at(ready), b, self._at(y), count, tensor.rows, cols)
        self._run(lambda kind, *rest: launches.matvec(kind, self.contract, *rest), tensor, w, *ends)
        return y

    def _prepare(self, x: DeviceArray) -> DeviceArray:
        """Activations as the mat-vec kernels need them. Q, K and V, then gate and up, ask for the same ones in a row."""
        if self._prepared is None or self._prepared[0] is not x:
            count, cols = x.shape
            out = self._empty((launches.prepared_bytes(self.contract, count, cols) // 4,))
            self.device.run(launches.prepare(self.contract, self._at(x), self._at(out), count, cols))
            self._prepared = (x, out)
        return self._prepared[1]

    def rope(
        self, x: DeviceArray, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> DeviceArray:  # fmt: skip
        count, heads, size = x.shape
        half = size // 2

        def table() -> np.ndarray:
            divisors = None if factors is None else self.vector(factors, half).dequantise()
            angles = positions[:, None] * frequencies(theta, half, scaling, divisors)  # float64 (T, D/2)
            length = 1.0 if scaling is None else scaling.length
            return (np.stack([np.cos(angles), np.sin(angles)], -1) * length).astype(np.float32)

        turns = self._upload_once("turns", (positions.tobytes(), theta, half, scaling, factors), table)
        y = self._empty(x.shape)
        self.device.run(launches.rope(style, self._at(x), self._at(turns), self._at(y), count, heads, size))
        return y

    def attend(
        self, q: DeviceArray, k: DeviceArray, v: DeviceArray, cache: Cache, layer: int, positions: np.ndarray
    ) -> DeviceArray:
        (count, heads, size), kv_heads = q.shape, k.shape[1]
        if heads % kv_heads:
            raise FormatError(
                f"{heads} query heads do not share {kv_heads} key/value heads evenly", code="config.heads-not-shared"
            )
        n = kv_heads * size
        at = self._at(self._positions(positions))
        keys, values = (self._at(part, layer * cache.capacity * n) for part in (cache.k, cache.v))
        y = self._empty((count, heads * size))
        self.device.run(launches.remember(self._at(k), self._at(v), at, keys, values, count, n))
        inside = count if cache.window is None else min(count, max(0, cache.window - int(positions[0])))
        if inside:
            self.device.run(launches.attend(self._at(q), keys, values, at, self._at(y), inside, heads, kv_heads, size))
        for t in range(inside, count):  # the kernel sees all positions from the first on: it is given a later first one
            assert cache.window is not None
            skipped = (layer * cache.capacity + int(positions[t]) + 1 - cache.window) * n
            keys, values = (self._at(part, skipped) for part in (cache.k, cache.v))
            last = self._at(self._positions(np.array([cache.window - 1])))
            one = self._at(q, t * heads * size), keys, values, last, self._at(y, t * heads * size)
            self.device.run(launches.attend(*one, 1, heads, kv_heads, size))
        return y

    def swiglu(self, gate: DeviceArray, up: DeviceArray) -> DeviceArray:
        y = self._empty(gate.shape)
        self.device.run(launches.swiglu(self._at(gate), self._at(up), self._at(y), gate.size))
        return y

    def add(self, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        y = self._empty(a.shape)
        self.device.run(launches.add(self._at(a), self._at(b), self._at(y), a.size))
        return y

    def argmax(self, x: DeviceArray) -> DeviceArray:
        """int32 ``(T,)`` on the device: the first of the largest of each row of x ``(T, n)``, -1 where there is a NaN."""
        count, n = x.shape
        ids = self._empty((count,))
        self.device.run(launches.argmax(self._at(x), self._at(ids), count, n))
        return ids

    def ids(self, x: DeviceArray) -> np.ndarray:
        """What `argmax` returned, as int64 ``(T,)`` in NumPy."""
        return self.device.download(x.buffer, x.offset, 4 * x.size).view(np.int32).astype(np.int64)

    def _run(self, make: Callable[..., Launch], tensor: Tensor, *arguments: Any) -> None:
        """Runs a launch that depends on a tensor's type; an unsupported type is reported with the tensor's name."""
        try:
            launch = make(tensor.type, *arguments)
        except UnsupportedError as error:
            raise UnsupportedError(error.message, code=error.code, path=self.model.path, tensor=tensor.name) from None
        self.device.run(launch)


def _device_bytes(tensor: Tensor) -> int:
    """Matrices keep their blocks; vectors are float32."""
    if len(tensor.shape) > 1:
        return launches.padded(tensor.nbytes)
    return launches.padded(types.F32.nbytes(tensor.shape))
