"""Which engine runs a model: what `--engine` may say, and the one rule behind ``auto``.

An engine is asked for as ``jit`` or ``jit:q8``: a name, and a contract where it is not f32. ``auto`` leaves it to the rule:

1. a model of fewer than `aprlab.engines.base.SMALL` weights: ``reference``, which needs no start-up and decodes everything once;
2. a GPU that has kernels for all its types and room for its weights: ``cuda``;
3. ``jit``, where it runs;
4. ``reference``, which runs everywhere.

Every engine gives the same tokens under the same contract, and ``auto`` means contract f32: which one it takes is a question
of time alone. ``auto:q8`` asks the rule for an engine that rounds activations; `reference` has no such contract.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
from dataclasses import dataclass
from functools import cache

from aprlab.engines.base import is_small, spelled, weights
from aprlab.errors import AprlabError, UsageError, reason
from aprlab.model.model import Model

AUTO = "auto"
# name -> module and class; imported when asked for, since each brings its own library
ENGINES: dict[str, tuple[str, str]] = {
    "reference": ("aprlab.engines.reference", "ReferenceEngine"),
    "jit": ("aprlab.engines.jit", "JitEngine"),
    "cuda": ("aprlab.engines.cuda", "CudaEngine"),
    "ptx": ("aprlab.engines.ptx", "PtxEngine"),
}
CONTRACTS = ("f32", "q8")  # what a matmul may do to its activations, see `Engine.contract`
F32_ONLY = ("reference",)  # engines without the others
STREAMING = ("reference", "jit")  # engines that can read weights again for every pass
_RESERVE = 256 << 20  # bytes of a GPU's memory that are left for the cache, activations and compiled kernels
_LOG = logging.getLogger(__name__)  # `--verbose` shows it


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine to make, and why it is this one.

    Attributes:
        name: of the engine.
        contract: ``f32`` or ``q8``, see `Engine.contract`.
        asked: what was asked for: ``auto``, ``jit:q8``.
        reason: why the rule took it; empty where the engine was named.
        second: the rule would rather have taken another one, and `reason` says why it could not.
    """

    name: str
    contract: str
    asked: str
    reason: str = ""
    second: bool = False

    @property
    def spec(self) -> str:
        """What asks for exactly this engine: ``jit``, ``jit:q8``."""
        return spelled(self.name, self.contract)

    def __str__(self) -> str:
        why = f": {self.reason}" if self.second else ""
        return f"{self.spec} ({self.asked}{why})" if self.reason else self.spec


def parse(spec: str | None) -> tuple[str, str]:
    """(name, contract) of what was asked for; nothing and ``""`` ask for ``auto``.

    Raises:
        UsageError: no such engine, no such contract, or one that this engine does not have.
    """
    name, colon, contract = (spec or AUTO).partition(":")
    if name not in (*ENGINES, AUTO):
        raise UsageError(f"unknown engine {name!r}; known: {', '.join((*ENGINES, AUTO))}", code="engines.unknown")
    if not colon:
        return name, "f32"
    if contract not in CONTRACTS:
        raise UsageError(
            f"engine {spec!r}: unknown activation contract {contract!r}; known: {', '.join(CONTRACTS)}",
            code="engines.unknown-contract",
        )
    if contract != "f32" and name in F32_ONLY:
        others = ", ".join(each for each in ENGINES if each not in F32_ONLY)
        raise UsageError(
            f"engine {spec!r}: {name!r} has contract f32 only; engines with {contract}: {others}",
            code="engines.contract-not-of-engine",
        )
    return name, contract


def known(spec: str) -> str:
    """`spec` itself; raises UsageError where no engine is asked for like that."""
    parse(spec)
    return spec


def choose(spec: str | Choice | None, model: Model, *, threads: int | None = None, stream: bool = False) -> Choice:
    """The engine that `spec` asks for; for ``auto``, the one that the rule gives `model` on this machine.

    Args:
        spec: an engine's name, with a contract or without; ``auto``, ``""`` or None for the rule. A choice is what it is.
        model: what will be run.
        threads: as many must the engine be able to use.
        stream: the engine must be able to stream weights.

    Raises:
        UsageError: see `parse`; or no engine with the contract runs here.
    """
    if isinstance(spec, Choice):
        return spec
    asked = spec or AUTO
    name, contract = parse(spec)
    if name != AUTO:
        _LOG.info("engine %s, contract %s, as asked", name, contract)
        return Choice(name, contract, asked)
    refused: list[str] = []
    for name in ("reference", "cuda", "jit") if is_small(model) else ("cuda", "jit", "reference"):
        why_not = _refusal(name, model, contract, threads, stream)
        if why_not is None:
            why = "; ".join([f"{weights(model):,} weights", *refused])
            found = Choice(name, contract, asked, why, second=name == "reference" and bool(refused))
            _LOG.info("engine %s, contract %s, taken by %s: %s", name, contract, asked, why)
            return found
        refused.append(f"not {name}: {why_not}")
    raise UsageError(f"no engine here has contract {contract}: {'; '.join(refused)}", code="engines.none-with-contract")


def _refusal(name: str, model: Model, contract: str, threads: int | None, stream: bool) -> str | None:
    """Why an engine cannot be taken, None where it can."""
    if contract != "f32" and name in F32_ONLY:
        return f"it has no contract {contract}"
    if stream and name not in STREAMING:
        return "it cannot stream weights"
    if name == "cuda":
        return cuda_refusal(model, contract)
    return jit_refusal(model, contract, threads) if name == "jit" else None


# -- what an engine needs of a machine and a model -----------------------------------------------------------------------


def jit_refusal(model: Model, contract: str = "f32", threads: int | None = None) -> str | None:
    """Why engine jit cannot run `model` here, None where it can."""
    try:
        from aprlab.engines.jit import JitEngine

        if (_head_dim(model) or 0) % 8:
            return f"heads of {_head_dim(model)} values"
        JitEngine(model, threads, contract=contract).close()
    except Exception as error:  # no numba, another numba, another processor: whatever it is, other engines run
        return reason(error)
    return None


def cuda_refusal(model: Model, contract: str = "f32") -> str | None:
    """Why engine cuda cannot run `model` here, None where it can: a GPU, kernels for all types, room for the weights."""
    if not gpus():
        return "no GPU"
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed"
    from aprlab.engines.cuda import CudaEngine
    from aprlab.kernels.cuda import launch

    kinds = {tensor.type for tensor in model.tensors.values() if len(tensor.shape) > 1}
    if without := sorted(kind.name for kind in kinds - {*launch.PACKED, *launch.PLAIN}):
        return f"no kernels for {', '.join(without)}"
    if _head_dim(model) not in (None, *launch.HEAD_DIMS):
        return f"heads of {_head_dim(model)} values"
    try:
        engine = CudaEngine(model, contract=contract)
        needed, free = engine.needed_bytes() + _RESERVE, engine.device.free_bytes()
    except Exception as error:  # a driver that does not fit, a GPU that is full: other engines run
        return reason(error)
    if needed > free:
        return f"{needed >> 20} MiB are needed on the GPU, {free >> 20} are free"
    return None


def _head_dim(model: Model) -> int | None:
    """None where the file's config cannot be read: whoever runs the model says so."""
    try:
        return model.config.head_dim
    except AprlabError:
        return None


@cache
def gpus() -> int:
    """NVIDIA GPUs that this process may use, by the driver itself; 0 without a driver. Takes no library of Python's."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
    except (OSError, AttributeError):
        return 0
