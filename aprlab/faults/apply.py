"""Faults at work: a conversion that goes wrong on purpose, and a session that does."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from aprlab import engines
from aprlab.conversion.converter import convert
from aprlab.conversion.report import ConversionReport
from aprlab.conversion.seams import Seams
from aprlab.engines.base import Engine
from aprlab.engines.delegating import BorrowedEngine
from aprlab.errors import UsageError
from aprlab.faults.base import Fault, Registry
from aprlab.formats import open_model
from aprlab.formats.leftovers import temporary_folder
from aprlab.formats.writing import check_output, drafted
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.content import Held, Rows
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import REGISTRY, types
from aprlab.quants import dequantise as decode_tensor
from aprlab.quants.types import TensorType


def find(faults: Iterable[str | Fault], catalogue: dict[str, Fault]) -> list[Fault]:
    """Faults by id; an unknown id raises UsageError with the ids nearest to it, one named twice too."""
    found: list[Fault] = []
    for wanted in faults:
        fault = wanted if isinstance(wanted, Fault) else _named(wanted, catalogue)
        if fault in found:
            raise UsageError(f"fault {fault.id!r} is named twice", code="faults.named-twice")
        found.append(fault)
    return found


def _named(id: str, catalogue: dict[str, Fault]) -> Fault:
    folded = {known.lower(): known for known in catalogue}
    if id.strip().lower() in folded:
        return catalogue[folded[id.strip().lower()]]
    near = [folded[name] for name in difflib.get_close_matches(id.strip().lower(), folded, 4, 0.5)]
    near += [known for known in catalogue if known not in near and id.strip() and id.strip().lower() in known.lower()][:4]
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UsageError(f"unknown fault {id!r}{hint} (`aprlab faults` lists all {len(catalogue)})", code="faults.unknown")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def convert_faulty(source: str | Path | Model, output: str | Path, faults: Sequence[Fault], **options: Any) -> ConversionReport:
    """See `aprlab.faults.convert_with`."""
    for fault in faults:
        if fault.file_seam is None:
            raise UsageError(
                f"fault {fault.id!r} has no file form: it shows when a healthy file is run (`run --fault`)",
                code="faults.not-for-files",
            )  # fmt: skip
        if fault.post is not None and options.get("compress") is not None:
            raise UsageError(
                f"fault {fault.id!r} edits the finished file, which must not be compressed", code="faults.needs-uncompressed"
            )
    output = Path(output)
    path = source.path if isinstance(source, Model) else Path(source)
    force = bool(options.pop("force", False))
    check_output(output, [path], force=force)
    touched: set[str] = set()

    def seams(healthy: Seams) -> Seams:
        return reduce(lambda s, fault: _watched(fault, s, touched), (f for f in faults if f.seams), _historic(healthy))

    with drafted(output, force=force) as draft:
        report = convert(source, draft, seams=seams, **options)
        for fault in faults:
            if fault.post is not None:
                before = draft.stat().st_size, _head(draft)
                fault.post(draft)
                if before != (draft.stat().st_size, _head(draft)):
                    touched.add(fault.id)
        for fault in faults:
            if fault.id not in touched:
                raise UsageError(
                    f"fault {fault.id!r} changes nothing here; it needs {fault.needs or 'another model'}",
                    code="faults.changes-nothing", path=path,
                )  # fmt: skip
        report.bytes_out = draft.stat().st_size
    report.output = output
    report.notes += [f"fault {fault.id}: {fault.title}" for fault in faults]
    return report


def _historic(healthy: Seams) -> Seams:
    """Files of the day carried no record of their source, from which a reader could learn the truth."""
    return replace(healthy, metadata=lambda metadata: {k: v for k, v in metadata.items() if k != "source_metadata"})


def _head(path: Path) -> bytes:
    """The part of the file that edits change: everything before the data, at most 64 MiB."""
    with open(path, "rb") as file:
        return file.read(1 << 26)


def _watched(fault: Fault, before: Seams, touched: set[str]) -> Seams:
    """The fault's seams on top of `before`; `touched` learns its id when one of its decisions differs."""
    assert fault.seams is not None
    last: list[Any] = [None]

    def remember(tensor: Tensor) -> Tensor:
        last[0] = before.tensor(tensor)
        return last[0]

    after = fault.seams(replace(before, tensor=remember))

    def watch(name: str) -> Callable[[Any], Any]:
        faulty, healthy = getattr(after, name), getattr(before, name)
        if faulty is healthy:
            return healthy

        def decide(x: Any) -> Any:
            result = faulty(x)
            if result != healthy(x):
                touched.add(fault.id)
            return result

        return decide

    def tensor(x: Tensor) -> Tensor:
        result = after.tensor(x)
        if result is not last[0]:
            touched.add(fault.id)
        return result

    return Seams(tensor=tensor, **{name: watch(name) for name in ("name", "code", "dims", "metadata", "plans")})


# ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Misread(Held):
    """Bytes that are decoded by a faulty registry whenever values are asked for."""

    __slots__ = ("registry",)
    as_stored = False

    def __init__(self, array: np.ndarray, registry: Registry) -> None:
        super().__init__(array)
        self.registry = registry

    def values(self, kind: TensorType, shape: tuple[int, ...], rows: Rows | None = None) -> np.ndarray:
        # The whole tensor, as a faulty block size does not stop at a row; what it gives is kept by the engine.
        values = decode_tensor(self.array, kind, shape, registry=self.registry)
        return values if rows is None else values[rows]


def misread(model: Model, registry: Registry, *, as_floats: bool) -> Model:
    """`model` as a reader with this registry sees it.

    Args:
        as_floats: hand the wrong values over as F32 tensors, for engines that decode blocks themselves.
    """
    wrong = {kind for kind in registry if registry[kind] is not REGISTRY.get(kind)}
    if not wrong:
        return model
    tensors = {}
    for name, tensor in model.tensors.items():
        if tensor.type in wrong:
            seen = tensor.replace(content=Misread(tensor.raw, registry))
            if as_floats:
                seen = tensor.replace(type=types.F32, content=seen.dequantise().reshape(-1).view(np.uint8))
            tensor = seen
        tensors[name] = tensor
    return model.with_changes(tensors=tensors)


def for_other_engines(model: Model, faults: Sequence[Fault]) -> Model:
    """`model` with faulty decoders for an engine that decodes blocks itself.

    Where the fault has a file form, the blocks are rewritten and stay blocks; else their values become F32 tensors.
    """
    registry: Registry = REGISTRY
    for fault in faults:
        assert fault.registry is not None
        if fault.seams is not None:
            change = fault.seams(_AS_IS).tensor
            model = model.with_changes(tensors={name: change(tensor) for name, tensor in model.tensors.items()})
        else:
            registry = fault.registry(registry)
    return misread(model, registry, as_floats=True)


_AS_IS = Seams(name=lambda name: name, code=lambda kind: kind.code, dims=lambda shape: shape, tensor=lambda tensor: tensor)


def session_faulty(
    model: Model | str | Path | Session,
    faults: Sequence[Fault],
    engine: str | engines.Choice | None = "auto",
    threads: int | None = None,
    **options: Any,
) -> Session:
    """See `aprlab.faults.session_with`."""
    for fault in faults:
        if fault.instrument is not None:
            raise UsageError(
                f"fault {fault.id!r} is a fault of an instrument: it changes what is measured, not what is computed",
                code="faults.instrument",
            )  # fmt: skip
    files = [fault for fault in faults if fault.run_seam is None]
    runs = [fault for fault in faults if fault.run_seam is not None]
    owner = model if isinstance(model, Session) else None
    if owner is not None:
        model, engine, threads = owner.model, owner.engine.name, owner.engine.threads
        options |= owner.engine.alike
    elif isinstance(model, str | Path):
        model = open_model(model)
    assert isinstance(model, Model)
    if files:
        with temporary_folder() as folder:  # the mapping outlives the name
            convert_faulty(model, folder / "broken.apr", files)
            model = open_model(folder / "broken.apr")

    config, data, registry = _faulty_parts(model, runs)
    tokenizer = owner.tokenizer if owner is not None and data is owner.model.tokenizer else Qwen2Tokenizer(data)
    if owner is not None and registry is REGISTRY and not files:
        runner: Engine = BorrowedEngine(owner.engine, model.with_changes(tokenizer=data))
    else:
        engine = engines.choose(engine, model, threads=threads)
        if engine.name == "reference":
            model = misread(model, registry, as_floats=False)
        else:
            model = for_other_engines(model, [fault for fault in runs if fault.registry is not None])
        runner = engines.create(engine, model.with_changes(tokenizer=data), threads, **options)
    plain = runner
    for fault in runs:
        if fault.engine is not None:
            runner = fault.engine(runner)
    for fault in runs:
        if fault.prompt is not None:
            tokenizer = fault.prompt(tokenizer)
    loop = loop_of(runs)
    # where the passes are healthy, what is cached is
    healthy = isinstance(plain, BorrowedEngine) and runner is plain and loop is Session
    same = healthy and owner is not None and config == owner.config
    return loop(runner, config=config, tokenizer=tokenizer, cache_of=owner if same else None)


def _faulty_parts(model: Model, faults: Sequence[Fault]) -> tuple[ModelConfig, TokenizerData, Registry]:
    """Config, tokenizer data and decoders with these faults; raises UsageError for one that changes nothing in `model`."""
    config, data = model.config, model.tokenizer
    registry: Registry = REGISTRY
    for fault in faults:
        if fault.config is not None:
            config = _changed(fault, config, fault.config(config))
        if fault.tokenizer is not None:
            data = _changed(fault, data, fault.tokenizer(data))
        if fault.registry is not None:
            faulty = fault.registry(registry)
            if not any(t.type in faulty and faulty[t.type] is not registry.get(t.type) for t in model.tensors.values()):
                _no_use(fault)
            registry = faulty
        if not fault.fits(model):
            _no_use(fault)
    return config, data, registry


def loop_of(faults: Sequence[Fault]) -> type[Session]:
    """The loop around the engine with these faults, the later ones around the earlier; `Session` itself without any."""
    loops = tuple(fault.session for fault in reversed(faults) if fault.session is not None)
    return type("Loop", loops, {}) if loops else Session


def _changed(fault: Fault, before: Any, after: Any) -> Any:
    return _no_use(fault) if after == before else after


def _no_use(fault: Fault) -> NoReturn:
    raise UsageError(
        f"fault {fault.id!r} changes nothing here; it needs {fault.needs or 'another model'}", code="faults.changes-nothing"
    )
