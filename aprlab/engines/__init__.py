"""Engines: one forward pass, several ways to do its arithmetic."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from aprlab.engines.base import Array, Cache, Engine
from aprlab.errors import UsageError
from aprlab.model.model import Model

# name -> module and class; imported when asked for, since each brings its own library
_ENGINES: dict[str, tuple[str, str]] = {
    "reference": ("aprlab.engines.reference", "ReferenceEngine"),
    "jit": ("aprlab.engines.jit", "JitEngine"),
    "cuda": ("aprlab.engines.cuda", "CudaEngine"),
    "ptx": ("aprlab.engines.ptx", "PtxEngine"),
}
NAMES: tuple[str, ...] = tuple(_ENGINES)


def known(name: str) -> str:
    """`name`, if an engine has it; raises UsageError if none has."""
    if name not in _ENGINES:
        raise UsageError(f"unknown engine {name!r}; known: {', '.join(NAMES)}", code="engines.unknown")
    return name


def create(name: str, model: Model, threads: int | None = None, *, stream: bool = False, **options: Any) -> Engine:
    """The engine called `name` over `model`'s weights; `options` are that engine's own.

    With `stream`, weights are read from the file for every pass and dropped after use, so that a model
    larger than memory runs: nothing decoded is kept, and the pages of a matrix are released after its product.

    Where numba is not installed, ``jit`` in contract f32 becomes ``reference``, which computes the same more slowly, with
    a warning the first time.

    Args:
        name: one of `NAMES`.
        model: its tensors are the weights.
        threads: CPU threads; None leaves the number to the engine.
        stream: read weights again for every pass.
        options: the engine's own, such as ``contract="q8"``.

    Raises:
        UsageError: no engine has this name, or its library is not installed on this machine.
    """
    module, attribute = _ENGINES[known(name)]
    try:
        kind: type[Engine] = getattr(import_module(module), attribute)
    except ImportError as error:
        if name == "jit" and options.get("contract", "f32") == "f32":
            warnings.warn(f"engine 'jit' is not available here ({error}); 'reference' takes its place", stacklevel=2)
            return create("reference", model, threads, stream=stream)
        raise UsageError(f"engine {name!r} is not available here: {error}", code="engines.unavailable") from error
    if not stream:
        return kind(model, threads, **options)
    if name not in ("reference", "jit"):
        raise UsageError(f"engine {name!r} cannot stream weights; reference and jit can", code="engines.cannot-stream")
    lean = {"reference": {"cache_weights": False}, "jit": {"repack": False}}[name]
    engine = kind(model, threads, **(lean | options))
    engine.add_hook("matmul", lambda y, x, weight, bias=None: engine.model.tensor(weight).release())
    return engine


__all__ = ["NAMES", "Array", "Cache", "Engine", "create", "known"]
