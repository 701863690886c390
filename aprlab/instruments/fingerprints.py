"""Fingerprints of tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xxhash

from aprlab import cluster
from aprlab.engines.blas import blas_threads
from aprlab.errors import FormatError, UsageError
from aprlab.formats import open_model
from aprlab.formats.identity import something_else
from aprlab.instruments.hashes import checksum
from aprlab.instruments.shares import Share, shares
from aprlab.instruments.summary_statistics import PART, PERCENTILES, RunningFigures, Statistics, statistics
from aprlab.model.content import drop_pages
from aprlab.model.decode_hooks import notify
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.paths import cores
from aprlab.quants import dequantise
from aprlab.tracing.comparisons import Comparison, compare_models

SCHEMA = 2  # of the JSON of `fingerprint` and `diff`; see docs/gates.md
FINDINGS = {  # code of a row -> what a table shows
    "fingerprint.same": "same", "fingerprint.values": "values", "fingerprint.blocks": "blocks",
    "fingerprint.only-in-a": "only in a", "fingerprint.only-in-b": "only in b",
    "fingerprint.finite": "finite", "fingerprint.not-finite": "not finite",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One tensor: order-sensitive hashes next to order-blind figures.

    Attributes:
        name: GGUF name; type, shape (NumPy order) as in the file.
        raw: XXH3-64 of the raw blocks, hexadecimal.
        values: XXH3-64 of the decoded float32 values in row order, hexadecimal.
        seen: statistics of the decoded values.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    raw: str
    values: str
    seen: Statistics

    def row(self) -> dict[str, Any]:
        """Flat, for tables: the percentiles as ``p1`` … ``p99``."""
        flat: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seen"}
        flat |= {k: v for k, v in asdict(self.seen).items() if k != "percentiles"}
        return flat | {f"p{p}": v for p, v in zip(PERCENTILES, self.seen.percentiles, strict=False)}


COLUMNS = ("name", "type", "shape", "raw", "values", "mean", "std", "min", "max", "p50", "zeros", "nan", "inf", "total")


def fingerprint(
    thing: Model | Tensor | str | Path, progress: Callable[[int], object] | None = None, *, scheduler: str | None = None
) -> list[Fingerprint]:
    """Fingerprints of every tensor of a model (or of one tensor); decodes each once, some tensors at a time.

    Args:
        thing: a model, its path, or a tensor.
        progress: called with the bytes of each tensor that is done (on a cluster: of those that became done together).
        scheduler: address of a Dask scheduler (``tcp://host:8786``) whose workers do it instead, each a share of the tensors;
            they need the file under the same path. The result is the same.

    Raises:
        FormatError: the strict reader refuses the file, or there is nothing in it.
        UsageError: no cluster at that address, or a worker that cannot do it; see `aprlab.cluster.connect`.
    """
    if isinstance(thing, Tensor):
        return [_fingerprint(thing)]
    model = thing if isinstance(thing, Model) else open_model(thing)
    if not model.tensors:
        raise FormatError("holds no tensors", code="instruments.no-tensors", path=model.path)
    if scheduler is not None:
        return _on_cluster(model, scheduler, progress)
    one = partial(_fingerprint, kernels=_kernels(model))
    found = []
    # A second BLAS thread would have nothing to do but spin; each of ours holds some 30 MiB.
    with blas_threads(1), ThreadPoolExecutor(min(4, cores()), "aprlab-fingerprint") as pool:
        for tensor, seen in zip(model.tensors.values(), pool.map(one, model.tensors.values()), strict=True):
            found.append(seen)
            if progress is not None:
                progress(tensor.nbytes)
    return found


def _on_cluster(model: Model, scheduler: str, progress: Callable[[int], object] | None) -> list[Fingerprint]:
    with cluster.connect(scheduler, [model.path]) as workers:
        parts = shares([cluster.path_on_all(model.path)], model.tensors.values(), workers.workers)
        sizes = [sum(model.tensors[name].nbytes for name in part.names) for part in parts]
        found = workers.map(fingerprint_share, parts, None if progress is None else lambda n: progress(sizes[n]))
    by_name = {seen.name: seen for part in found for seen in part}
    return [by_name[name] for name in model.tensors]


def fingerprint_share(share: Share) -> list[Fingerprint]:
    """What a worker does of `fingerprint`."""
    (model,) = share.models()
    kernels = _kernels(model)
    with blas_threads(1):
        return [_fingerprint(model.tensors[name], kernels) for name in share.names]


def equal_share(share: Share) -> list[bool]:
    """What a worker does of `diff`: whether the bytes of each tensor are the same in both files."""
    a, b = share.models()
    return [a.tensors[name].same_bytes(b.tensors[name]) for name in share.names]


def _fingerprint(tensor: Tensor, kernels: ModuleType | None = None) -> Fingerprint:
    if tensor.size > (LARGE if kernels is None else PART) and tensor.rows > 1:
        return _in_parts(tensor, kernels)
    if not tensor.at_hand and tensor.content.as_stored:
        tensor = tensor.replace(raw=tensor.raw)  # its bytes are fetched or made once
    values = tensor.dequantise()
    flat = np.ascontiguousarray(values).reshape(-1)
    hashes = [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).data) for part in (tensor.raw, flat.view(np.uint8))]
    drop_pages(tensor.raw)
    return Fingerprint(tensor.name, tensor.type.name, tensor.shape, hashes[0], hashes[1], statistics(values))


LARGE = 1 << 22  # values of a tensor that is looked at in parts, so that memory does not grow with it
SELDOM = 16  # parts after which their pages are given back: some megabytes, and a tenth of the time if it were each
MANY = 1 << 27  # values of a model that repay loading compiled kernels


def _kernels(model: Model) -> ModuleType | None:
    """The compiled kernels; None for a small model, and where they do not load: NumPy gives the same fingerprint, later."""
    if sum(tensor.size for tensor in model.tensors.values()) <= MANY:
        return None
    try:
        from aprlab.kernels.simd import kernels
    except Exception:
        return None
    return kernels


def _in_parts(tensor: Tensor, kernels: ModuleType | None) -> Fingerprint:
    """The same fingerprint, a few rows at a time. Hashes are equal to the bit, mean and spread to a rounding of float64."""
    raw, hashed = xxhash.xxh3_64(), xxhash.xxh3_64()
    raw.update(np.ascontiguousarray(tensor.content.read(0, tensor.type.tensor_bytes)).data)
    step, figures, decoded = max(1, PART // tensor.cols), RunningFigures(tensor.size, kernels), _decoder(tensor, kernels)
    for start in range(0, tensor.rows, step):
        rows = slice(start, min(start + step, tensor.rows))
        blocks, values = decoded(rows)
        raw.update(np.ascontiguousarray(blocks).data)
        hashed.update(values.view(np.uint8).data)
        figures.add(values)
        if start // step % SELDOM == SELDOM - 1:
            tensor.release(slice(0, rows.stop))  # from the start: reading on maps the rest again
    tensor.release()
    return Fingerprint(
        tensor.name, tensor.type.name, tensor.shape, raw.hexdigest(), hashed.hexdigest(), figures.statistics()
    )


RowsDecoder = Callable[[slice], tuple[np.ndarray, np.ndarray]]


def _decoder(tensor: Tensor, kernels: ModuleType | None) -> RowsDecoder:
    """What gives bytes and values of rows: the kernels, where they have the type and decode the first row to NumPy's bits."""
    kind = kernels.KINDS.get(tensor.type) if kernels is not None and tensor.in_file else None
    by_numpy = partial(_rows_of, tensor)
    if kind is None:
        return by_numpy
    space = np.empty(max(PART, tensor.cols), np.float32)

    def by_kernel(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        notify(tensor.name)
        blocks, values = _bytes_of(tensor, rows), space[: (rows.stop - rows.start) * tensor.cols]
        kernels.decode(kind, kernels.frozen(blocks), values.size, values)  # type: ignore[union-attr]
        return blocks, values

    first = slice(0, 1)
    seen, expected = (decoder(first)[1].view(np.uint32) for decoder in (by_kernel, by_numpy))
    return by_kernel if np.array_equal(seen, expected) else by_numpy


def _bytes_of(tensor: Tensor, rows: slice) -> np.ndarray:
    head, size = tensor.type.tensor_bytes, tensor.type.row_bytes(tensor.cols)
    return tensor.content.read(head + rows.start * size, head + rows.stop * size)


def _rows_of(tensor: Tensor, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Bytes ``uint8`` and values ``float32`` of some rows, both 1-D; bytes that are not at hand are asked for once."""
    blocks = _bytes_of(tensor, rows)
    if tensor.at_hand or tensor.type.tensor_bytes or not tensor.content.as_stored:
        values = tensor.dequantise(rows)
    else:
        values = dequantise(blocks, tensor.type, (rows.stop - rows.start, tensor.cols))
    return blocks, np.ascontiguousarray(values).reshape(-1)


def fingerprint_table(prints: Sequence[Fingerprint], title: str) -> Comparison:
    """Fingerprints as a table; `equal` says that all values are finite."""
    rows = []
    for p in prints:
        finite = not (p.seen.nan or p.seen.inf)
        rows.append({**p.row(), "code": "fingerprint.finite" if finite else "fingerprint.not-finite", "equal": finite})
    bad = [row["name"] for row in rows if not row["equal"]]
    first = next((n for n, row in enumerate(rows) if not row["equal"]), None)
    summary = f"{len(rows)} tensors" + (f", {len(bad)} with values that are not finite, first {bad[0]}" if bad else "")
    return Comparison(title, COLUMNS, rows, not bad, summary, first)


def compare_fingerprints(a: Sequence[Fingerprint], b: Sequence[Fingerprint], title: str = "a against b") -> Comparison:
    """Two lists of fingerprints over the union of their names.

    `equal` is the raw blocks' (and the type's); next to it are the decoded values' hash, the statistics, and what
    upstream's order-blind sum says, which calls a transposed tensor equal.

    Args:
        a, b: as `fingerprint` gives them.
        title: of the table.
    """
    left, right = ({p.name: p for p in side} for side in (a, b))
    rows: list[dict[str, Any]] = []
    for name in [*left, *(name for name in right if name not in left)]:
        x, y = left.get(name), right.get(name)
        if x is None or y is None:
            code = f"fingerprint.only-in-{'b' if x is None else 'a'}"
            rows.append({"name": name, "code": code, "finding": FINDINGS[code], "equal": False})
            continue
        raw, values = x.raw == y.raw and x.type == y.type, x.values == y.values and x.shape == y.shape
        code = f"fingerprint.{'same' if raw and values else 'values' if not values else 'blocks'}"
        rows.append({
            "name": name, "code": code, "finding": FINDINGS[code],
            "a": f"{x.type} {x.raw}", "b": f"{y.type} {y.raw}", "raw": raw, "values": values,
            "statistics": _close(x.seen, y.seen), "sum": _near(x.seen.total, y.seen.total, (x.seen.std or 0) * x.seen.count**0.5),
            "equal": raw and values,
        })  # fmt: skip
    if not rows:
        raise UsageError(f"{title}: nothing to compare", code="instruments.nothing-compared")
    differing = [n for n, row in enumerate(rows) if not row["equal"]]
    summary = f"{len(rows)} tensors compared, {len(rows) - len(differing)} equal bit for bit"
    if differing:
        summary += f", first difference at {rows[differing[0]]['name']}"
    columns = ("name", "finding", "a", "b", "raw", "values", "statistics", "sum")
    return Comparison(title, columns, rows, not differing, summary, differing[0] if differing else None)


def _close(a: Statistics, b: Statistics) -> bool:
    """Whether the order-blind figures agree to seven digits of the spread."""
    if (a.nan, a.inf, a.zeros, a.count) != (b.nan, b.inf, b.zeros, b.count) or a.std is None or b.std is None:
        return a == b
    pairs = [(a.mean, b.mean), (a.std, b.std), (a.min, b.min), (a.max, b.max)]
    return all(_near(x, y, a.std) for x, y in pairs)


def _near(x: float | None, y: float | None, scale: float) -> bool:
    return x is not None and y is not None and abs(x - y) <= 1e-6 * (scale + abs(x) * 1e-3)


def transposed_unseen(tensor: Tensor) -> dict[str, bool]:
    """What sees that a matrix was transposed: upstream's sum and the statistics do not, the hash does (GH-202)."""
    if len(tensor.shape) != 2:
        raise UsageError("only a matrix can be transposed", code="instruments.no-matrix", tensor=tensor.name)
    values = tensor.dequantise()
    other = np.ascontiguousarray(values.T).reshape(values.shape)
    a, b = statistics(values), statistics(other)
    scale = (a.std or 0) * a.count**0.5
    return {
        "sum": not _near(a.total, b.total, scale), "statistics": not _close(a, b),
        "hash": checksum(values) != checksum(other),
    }  # fmt: skip


def diff(
    a: Model | str | Path, b: Model | str | Path, *, headers: bool = False, scheduler: str | None = None
) -> Comparison:
    """Every tensor of the union, every config value, every part of the tokenizer: `aprlab.compare.compare_models`.

    Args:
        a, b: models or their paths.
        headers: compare what the headers say alone, and read no tensor.
        scheduler: as in `fingerprint`; the headers are compared here.
    """
    with contextlib.ExitStack() as stack:
        left, right = (s if isinstance(s, Model) else stack.enter_context(open_model(s)) for s in (a, b))
        _check_kinds(left, right)
        same = None if scheduler is None or headers else _equal_on_cluster(left, right, scheduler)
        return compare_models(left, right, headers=headers, same=same)


def _equal_on_cluster(a: Model, b: Model, scheduler: str) -> dict[str, bool]:
    """Whether the bytes are the same, of each tensor whose type and shape are."""
    pairs = [(t, b.tensors.get(name)) for name, t in a.tensors.items()]
    both = [t for t, other in pairs if other is not None and (t.type, t.shape) == (other.type, other.shape)]
    paths = [a.path, b.path]
    with cluster.connect(scheduler, paths) as workers:
        parts = shares([cluster.path_on_all(path) for path in paths], both, workers.workers)
        found = workers.map(equal_share, parts)
    return {name: same for part, flags in zip(parts, found, strict=True) for name, same in zip(part.names, flags, strict=True)}


def _check_kinds(a: Model, b: Model) -> None:
    """Two models, or two files of another kind (adapters, projectors); one of each is refused by what it is."""
    left, right = something_else(a), something_else(b)
    error = left if left is not None else right
    if error is not None and (left is None or right is None or left.code != right.code):
        raise error
