"""What an engine is: the primitives that every forward pass is written in.

An engine owns arithmetic and memory, nothing else. It knows no layers, no config and no order of steps: whatever a
primitive needs apart from its arrays and weights (eps, rotary base, head counts by shape) is handed to it at the call, so
that a config that is wrong on purpose reaches every engine the same way. Weights are asked for by GGUF name.

Arrays are the engine's own (NumPy or CuPy) and opaque to the caller except for `.shape`, `.reshape(...)` (a view, C
order) and slices of the first axis. They are float32, C-contiguous, T (positions) first. A primitive never changes its
inputs and returns an array that later calls leave alone; the cache is the one thing that is written in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from aprlab.errors import FormatError, UsageError
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.model.rope import RopeScaling
from aprlab.model.tensor import Tensor

Array = Any  # an engine's own array: float32, C order
Hook = Callable[..., None]  # gets what a primitive returned, then the arguments of the call
SMALL = 30_000_000  # weights: NumPy is quick enough below, and decoded copies of all of them are no burden
PRIMITIVES = ("embed", "norm", "matmul", "rope", "attend", "swiglu", "add")


def weights(model: Model) -> int:
    """Number of values in all tensors."""
    return sum(tensor.size for tensor in model.tensors.values())


def is_small(model: Model) -> bool:
    """Whether NumPy is quick enough and decoded copies of all weights are no burden."""
    return weights(model) < SMALL


@dataclass(slots=True)
class Cache:
    """Keys and values of the positions seen so far.

    Attributes:
        k: the engine's own storage of rotated keys, all layers; layout is the engine's choice.
        v: likewise for values.
        capacity: positions it can hold.
        window: how many of the last positions attention sees, itself included; None: all.
        length: positions it holds; `forward` moves it once a pass, by `advance`, after the last layer.
    """

    k: Any
    v: Any
    capacity: int
    length: int = 0
    window: int | None = None

    def positions(self, count: int) -> np.ndarray:
        """Positions of the next `count` tokens: int64 ``(count,)``; raises UsageError where they do not fit."""
        if self.length + count > self.capacity:
            raise UsageError(
                f"{self.length} + {count} positions do not fit into a cache of {self.capacity}", code="engines.cache-full"
            )
        return np.arange(self.length, self.length + count, dtype=np.int64)

    def advance(self, count: int) -> None:
        """The next `count` positions are filled in every layer."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot cut a cache of {self.length} positions to {length}", code="engines.cache-cut")
        self.length = length


def spelled(name: str, contract: str) -> str:
    """``jit`` for contract f32, ``jit:q8`` for another one."""
    return name if contract == "f32" else f"{name}:{contract}"


class Engine(ABC):
    """The primitives. T = positions in this call, H = query heads, Hkv = key/value heads, D = head size.

    Class attributes:
        name: as given to `engines.create`.
        contract: what a matmul does to its activations: ``f32`` keeps them, ``q8`` rounds each block of 32 (or 256,
            for K types) to 8 bits first, as llama.cpp does. Unlike contracts differ by per cents, and that is no bug.
    """

    name: ClassVar[str]
    contract: str
    asked = ""  # what it was asked for as, where `engines.create` made it: ``auto``, ``jit:q8``

    def __init__(self, model: Model, threads: int | None = None) -> None:
        """`threads`: CPU threads to use; None leaves the number to the engine's library."""
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads: at least one is needed", code="engines.threads")
        self.model = model
        self.threads = threads
        self._hooks: dict[str, list[Hook]] = {}

    # -- moving in and out ---------------------------------------------------------------------------------------

    @abstractmethod
    def from_numpy(self, x: np.ndarray) -> Array:
        """float32 array -> the engine's array of the same shape and values."""

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """The engine's array -> float32 array of the same shape. May be a view: copy it to change it."""

    @abstractmethod
    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        """Room for `capacity` positions of `block_count` layers, `head_count_kv` heads of `head_dim`."""

    # -- arithmetic ----------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, tokens: np.ndarray, weight: str) -> Array:
        """tokens int64 ``(T,)``, ids in range -> those rows of `weight`, dequantised: ``(T, cols)``."""

    @abstractmethod
    def norm(self, x: Array, weight: str, eps: float) -> Array:
        """RMSNorm of each row of x ``(T, n)``: ``x / sqrt(mean(x²) + eps) * weight`` with weight ``(n,)``."""

    @abstractmethod
    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        """x ``(T, cols)`` times the transpose of `weight` ``(rows, cols)``, plus `bias` ``(rows,)`` -> ``(T, rows)``.

        The weight may be of any type of the type table that the engine supports; others raise UnsupportedError naming
        type and tensor. A bias that is named must exist (`vector` raises): skipping it in silence is how Qwen2 breaks.
        """

    @abstractmethod
    def rope(
        self, x: Array, positions: np.ndarray, theta: float, style: str, scaling: RopeScaling | None = None,
        factors: str | None = None,
    ) -> Array:  # fmt: skip
        """Rotate x ``(T, heads, D)`` at `positions` int64 ``(T,)``: pair i turns by ``position * theta**(-2i/D)``.

        `style` says which two values make pair i: ``neox`` i and i + D/2, ``norm`` 2i and 2i + 1. Anything else raises
        UnsupportedError. ``(a, b) -> (a cos - b sin, a sin + b cos)``. `scaling` changes the angles and the length of what
        is rotated; `factors` names a vector ``(D/2,)`` that each angle is divided by first (`aprlab.model.rope`).
        """

    @abstractmethod
    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        """Causal grouped attention: q ``(T, H, D)``, k and v ``(T, Hkv, D)`` -> ``(T, H * D)``.

        First stores k and v in the cache at `positions` of `layer`; then query t sees positions 0 … positions[t].
        Query head h uses key/value head ``h // (H // Hkv)``. Scores are scaled by ``1/sqrt(D)`` and soft-maxed.
        `positions` rise by one and start at `cache.length`; the length itself is left alone.
        """

    @abstractmethod
    def swiglu(self, gate: Array, up: Array) -> Array:
        """``silu(gate) * up``, elementwise, both ``(T, n)``; silu(z) = z / (1 + exp(-z)), without overflow."""

    @abstractmethod
    def add(self, a: Array, b: Array) -> Array:
        """``a + b``, elementwise, of equal shape, into a new array."""

    # -- housekeeping --------------------------------------------------------------------------------------------

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes this engine holds now, not counting the mapped file, by purpose (e.g. ``weights``)."""

    def warm(self) -> None:  # noqa: B027 - an engine with nothing to prepare is whole
        """Do now what the first pass would otherwise do (decode, upload, compile), so that timings are of passes."""

    def close(self) -> None:  # noqa: B027 - an engine without resources is whole
        """Give back memory; the engine is not used afterwards."""

    @property
    def spec(self) -> str:
        """What asks `create` for an engine of this name and contract: ``jit``, ``jit:q8``."""
        return spelled(self.name, self.contract)

    @property
    def alike(self) -> dict[str, Any]:
        """Options for `create`, apart from name and threads, that make another engine compute as this one does."""
        return {} if self.contract == "f32" else {"contract": self.contract}

    # -- hooks ---------------------------------------------------------------------------------------------------

    def add_hook(self, primitive: str, hook: Hook) -> None:
        """Call `hook` after each call of a primitive of `PRIMITIVES`, hooks in the order in which they were added.

        A primitive without hooks costs nothing more than before.
        """
        if primitive not in PRIMITIVES:
            raise UsageError(
                f"an engine has no primitive {primitive!r}; known: {', '.join(PRIMITIVES)}", code="engines.unknown-primitive"
            )
        hooks = self._hooks.setdefault(primitive, [])
        hooks.append(hook)
        if len(hooks) == 1:
            plain = getattr(self, primitive)

            def watched(*args: Any, **named: Any) -> Array:
                result = plain(*args, **named)
                for each in tuple(hooks):
                    each(result, *args, **named)
                return result

            setattr(self, primitive, watched)

    def remove_hook(self, primitive: str, hook: Hook) -> None:
        """The hook that was added last of those equal to this one; raises ValueError where there is none."""
        hooks = self._hooks.get(primitive, [])
        if hook not in hooks:
            raise ValueError(f"no such hook on {primitive!r}")
        del hooks[len(hooks) - 1 - hooks[::-1].index(hook)]
        if not hooks:
            del self._hooks[primitive]
            delattr(self, primitive)  # the class's own method again

    @contextmanager
    def hooked(self, primitive: str, hook: Hook) -> Iterator[None]:
        """`hook` is there inside the block."""
        self.add_hook(primitive, hook)
        try:
            yield
        finally:
            self.remove_hook(primitive, hook)

    # -- shared checks -------------------------------------------------------------------------------------------

    def matrix(self, name: str, cols: int | None = None) -> Tensor:
        """The weight called `name`; raises FormatError where it is missing, not 2-D, or has not `cols` columns."""
        tensor = self.model.tensor(name)
        if len(tensor.shape) != 2 or cols not in (None, tensor.cols):
            expected = "two dimensions" if cols is None else f"(rows, {cols})"
            raise FormatError(
                f"has shape {tensor.shape}, expected {expected}", code="model.tensor-shape", path=self.model.path, tensor=name
            )
        return tensor

    def vector(self, name: str, length: int) -> Tensor:
        """The bias or norm weight called `name`; raises FormatError where it is missing or not ``(length,)``."""
        tensor = self.model.tensor(name)
        if tensor.shape != (length,):
            raise FormatError(
                f"has shape {tensor.shape}, expected ({length},)", code="model.tensor-shape", path=self.model.path, tensor=name
            )
        return tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.contract}, {str(self.model.path)!r})"
