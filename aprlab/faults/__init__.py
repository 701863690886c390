"""The catalogue of faults: every known way this conversion went wrong, each by name, each to be switched on.

>>> convert_with("model.gguf", "broken.apr", ["GH-191", "GH-190"])   # a file as the writers of the time made it
>>> session_with(model, ["lost-qkv-biases"]).generate("What is 2+2?")  # a healthy file, read by a faulty reader
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aprlab.conversion.report import ConversionReport
from aprlab.engines import Choice, parse
from aprlab.faults import (
    architectures,
    attention,
    borrowed_kernels,
    decode,
    dtypes,
    forward,
    instruments,
    layout,
    naming,
    products,
    text,
    vocabularies,
)
from aprlab.faults.apply import convert_faulty, find, session_faulty
from aprlab.faults.base import LAYERS, SECTIONS, Fault, Layer
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model

_MODULES = (
    naming, dtypes, layout, decode, borrowed_kernels, forward, attention, products, architectures, text,
    vocabularies, instruments,
)  # sections A to G  # fmt: skip
FAULTS: dict[str, Fault] = {fault.id: fault for module in _MODULES for fault in module.FAULTS}
OTHER_ARCHITECTURES = frozenset(fault.id for fault in architectures.FAULTS)  # change nothing in an unscaled Qwen2
assert len(FAULTS) == sum(len(module.FAULTS) for module in _MODULES), "two faults have one id"


def by_id(id: str) -> Fault:
    """The fault called `id` (case does not matter); raises UsageError listing near matches."""
    return find([id], FAULTS)[0]


def file_faults() -> dict[str, Fault]:
    """Faults that a file can have."""
    return {id: fault for id, fault in FAULTS.items() if fault.file_seam is not None}


def run_faults() -> dict[str, Fault]:
    """Faults that a reader of a healthy file can have."""
    return {id: fault for id, fault in FAULTS.items() if fault.run_seam is not None}


def instrument_faults() -> dict[str, Fault]:
    """Faults of measurements."""
    return {id: fault for id, fault in FAULTS.items() if fault.instrument is not None}


def convert_with(
    source: str | Path | Model, output: str | Path, faults: Iterable[str | Fault], **options: Any
) -> ConversionReport:
    """Convert `source` to APR with these faults, each on top of the one before.

    The file is on its own: unlike a healthy conversion it carries no record of its source. `faults` may be empty,
    which gives the healthy file to compare a broken one with.

    Args:
        source, output, options: as for `aprlab.conversion.converter.convert`.
        faults: ids, or faults.

    Raises:
        UsageError: an unknown id, one named twice, one without a file form, or one that changes nothing in this model
            (it names what is needed); and whatever `convert` raises. No file is left behind.
    """
    return convert_faulty(source, output, find(faults, FAULTS), **options)


def session_with(
    model: Model | str | Path | Session,
    faults: Iterable[str | Fault],
    engine: str | Choice | None = "auto",
    threads: int | None = None,
    **options: Any,
) -> Session:
    """A session over a healthy model that reads, computes or speaks with these faults.

    Faults that only files can have are put into a temporary file first, which is then opened by the strict reader: what
    that refuses is raised here.

    Args:
        model: an opened model, a path, or a healthy session, whose engine, tokenizer and cache are then used as far as the
            faults allow (so the two must not run at the same time).
        faults: ids, or faults; the later ones wrap the earlier ones. With engine ``ptx`` or ``cuda`` (asked for by name)
            also a fault of the kernels by name (`aprlab.kernels.cuda.mutations`), which goes before one of the same id here.
        engine, threads, options: the engine to make; where a session is given, it is one like that session's. Faulty
            decoders hand their values to engines other than ``reference`` as F32 tensors.

    Raises:
        UsageError: an unknown id, one named twice, an instrument's, or one that changes nothing in this model.
        FormatError: the broken config or file is one that cannot be run.
    """
    from aprlab.kernels.cuda import mutations  # kernels are another seam, which only the engines have that run them

    if isinstance(model, Session):
        asked: str | None = model.engine.asked or model.engine.name
    else:
        asked = engine.asked if isinstance(engine, Choice) else engine
    name = parse(asked)[0]
    others, kernels = mutations.select(faults, name, FAULTS)
    if kernels:
        if isinstance(model, Session):
            engine, threads, options = model.engine.name, model.engine.threads, options | model.engine.alike
            model = model.model
        elif not isinstance(model, Model):
            model = open_model(model)
        model = Session(model, engine=engine, threads=threads, **options | kernels)
        if not others:
            return model
    return session_faulty(model, find(others, FAULTS), engine, threads, **options)


__all__ = [
    "FAULTS", "LAYERS", "SECTIONS", "Fault", "Layer", "by_id", "convert_with", "file_faults", "instrument_faults",
    "run_faults", "session_with",
]  # fmt: skip
