"""Engines: one forward pass, several ways to do its arithmetic."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from aprlab.engines.base import Array, Cache, Engine
from aprlab.engines.choice import AUTO, STREAMING, Choice, choose, known, parse
from aprlab.engines.choice import ENGINES as _ENGINES
from aprlab.errors import UsageError
from aprlab.model.model import Model

NAMES: tuple[str, ...] = tuple(_ENGINES)


def create(
    name: str | Choice | None, model: Model, threads: int | None = None, *, stream: bool = False, **options: Any
) -> Engine:
    """The engine called `name` over `model`'s weights; `options` are that engine's own.

    With `stream`, weights are read from the file for every pass and dropped after use, so that a model
    larger than memory runs: nothing decoded is kept, and the pages of a matrix are released after its product.

    Where numba is not installed, ``jit`` in contract f32 becomes ``reference``, which computes the same more slowly, with
    a warning the first time.

    Args:
        name: one of `NAMES`, with a contract or without (``jit``, ``jit:q8``), ``auto`` (`aprlab.engines.choice` has the
            rule), or a choice that was made already.
        model: its tensors are the weights.
        threads: CPU threads; None leaves the number to the engine.
        stream: read weights again for every pass.
        options: the engine's own, such as ``simd="avx2"``; ``contract="q8"`` is another way to say ``:q8``.

    Raises:
        UsageError: no engine has this name or this contract, or its library is not installed on this machine.
    """
    if name in (None, "", AUTO) and "contract" in options:
        name = f"{AUTO}:{options['contract']}"
    choice = choose(name, model, threads=threads, stream=stream)
    engine = _made(choice, model, threads, stream, options)
    engine.asked = choice.asked
    return engine


def _made(choice: Choice, model: Model, threads: int | None, stream: bool, options: dict[str, Any]) -> Engine:
    name = choice.name
    if choice.contract != "f32":
        if options.get("contract", choice.contract) != choice.contract:
            raise UsageError(
                f"engine {choice.asked!r} and contract {options['contract']!r}: which of them?", code="engines.two-contracts"
            )
        options = {**options, "contract": choice.contract}
    module, attribute = _ENGINES[name]
    try:
        kind: type[Engine] = getattr(import_module(module), attribute)
    except ImportError as error:
        if name == "jit" and options.get("contract", "f32") == "f32":
            warnings.warn(f"engine 'jit' is not available here ({error}); 'reference' takes its place", stacklevel=3)
            return create("reference", model, threads, stream=stream)
        raise UsageError(f"engine {name!r} is not available here: {error}", code="engines.unavailable") from error
    if not stream:
        return kind(model, threads, **options)
    if name not in STREAMING:
        raise UsageError(f"engine {name!r} cannot stream weights; reference and jit can", code="engines.cannot-stream")
    lean = {"reference": {"cache_weights": False}, "jit": {"repack": False}}[name]
    engine = kind(model, threads, **(lean | options))
    engine.add_hook("matmul", lambda y, x, weight, bias=None: engine.model.tensor(weight).release())
    return engine


__all__ = ["AUTO", "NAMES", "Array", "Cache", "Choice", "Engine", "choose", "create", "known", "parse"]
