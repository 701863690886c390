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

from aprlab.engines.blas import blas_threads
from aprlab.errors import FormatError, UsageError
from aprlab.formats import open_model
from aprlab.formats.identity import something_else
from aprlab.instruments.hashes import checksum
from aprlab.instruments.summary_statistics import PERCENTILES, RunningFigures, Statistics, statistics
from aprlab.model.content import drop_pages
from aprlab.model.decode_hooks import notify
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.paths import cores
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


def fingerprint(thing: Model | Tensor | str | Path, progress: Callable[[int], object] | None = None) -> list[Fingerprint]:
    """Fingerprints of every tensor of a model (or of one tensor); decodes each once, some tensors at a time.

    Args:
        thing: a model, its path, or a tensor.
        progress: called with the bytes of each tensor that is done, in the file's order.

    Raises:
        FormatError: the strict reader refuses the file, or there is nothing in it.
    """
    if isinstance(thing, Tensor):
        return [_fingerprint(thing)]
    model = thing if isinstance(thing, Model) else open_model(thing)
    if not model.tensors:
        raise FormatError("holds no tensors", code="instruments.no-tensors", path=model.path)
    sizes = sum(tensor.size for tensor in model.tensors.values())
    one = partial(_fingerprint, kernels=_kernels() if sizes > MANY else None)
    found = []
    # A second BLAS thread would have nothing to do but spin; each of ours holds some 30 MiB.
    with blas_threads(1), ThreadPoolExecutor(min(4, cores()), "aprlab-fingerprint") as pool:
        for tensor, seen in zip(model.tensors.values(), pool.map(one, model.tensors.values()), strict=True):
            found.append(seen)
            if progress is not None:
                progress(tensor.raw.nbytes)
    return found


def _fingerprint(tensor: Tensor, kernels: ModuleType | None = None) -> Fingerprint:
    if tensor.size > (LARGE if kernels is None else PART) and tensor.rows > 1:
        return _in_parts(tensor, kernels)
    values = tensor.dequantise()
    flat = np.ascontiguousarray(values).reshape(-1)
    hashes = [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).data) for part in (tensor.raw, flat.view(np.uint8))]
    drop_pages(tensor.raw)
    return Fingerprint(tensor.name, tensor.type.name, tensor.shape, hashes[0], hashes[1], statistics(values))


LARGE = 1 << 22  # values of a tensor that is looked at in parts, so that memory does not grow with it
PART = 1 << 18  # values of a part, which stay in a core's cache
MANY = 1 << 27  # values of a model that repay loading compiled kernels


def _kernels() -> ModuleType | None:
    """The compiled kernels, None where they do not load: NumPy gives the same fingerprint, later."""
    try:
        from aprlab.kernels.simd import kernels
    except Exception:
        return None
    return kernels


def _decoder(tensor: Tensor, kernels: ModuleType | None) -> Callable[[slice], np.ndarray]:
    """Values of rows, one after another: the kernels' where they have the type and decode the first row to NumPy's bits."""
    kind = kernels.KINDS.get(tensor.type) if kernels is not None and tensor.in_file else None
    if kind is None:
        return lambda rows: np.ascontiguousarray(tensor.dequantise(rows)).reshape(-1)
    space = np.empty(max(PART, tensor.cols), np.float32)

    def decoded(rows: slice) -> np.ndarray:
        notify(tensor.name)
        values = space[: (rows.stop - rows.start) * tensor.cols]
        kernels.decode(kind, kernels.frozen(tensor.blocks()[rows]), values.size, values)  # type: ignore[union-attr]
        return values

    first = slice(0, 1)
    expected = np.ascontiguousarray(tensor.dequantise(first)).reshape(-1).view(np.uint32)
    return decoded if np.array_equal(decoded(first).view(np.uint32), expected) else _decoder(tensor, None)


def _in_parts(tensor: Tensor, kernels: ModuleType | None) -> Fingerprint:
    """The same fingerprint, a few rows at a time. Hashes are equal to the bit, mean and spread to a rounding of float64."""
    raw, hashed = xxhash.xxh3_64(), xxhash.xxh3_64()
    raw.update(np.ascontiguousarray(tensor.raw[: tensor.type.tensor_bytes]).data)
    step, figures, values_of = max(1, PART // tensor.cols), RunningFigures(tensor.size, kernels), _decoder(tensor, kernels)
    for start in range(0, tensor.rows, step):
        rows = slice(start, min(start + step, tensor.rows))
        blocks, values = tensor.blocks()[rows], values_of(rows)
        raw.update(np.ascontiguousarray(blocks).reshape(-1).data)
        hashed.update(values.view(np.uint8).data)
        drop_pages(tensor.blocks()[: rows.stop])  # from the start: reading on maps the rest again
        figures.add(values)
    drop_pages(tensor.raw)
    return Fingerprint(
        tensor.name, tensor.type.name, tensor.shape, raw.hexdigest(), hashed.hexdigest(), figures.statistics()
    )


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


def diff(a: Model | str | Path, b: Model | str | Path, *, headers: bool = False) -> Comparison:
    """Every tensor of the union, every config value, every part of the tokenizer: `aprlab.compare.compare_models`.

    `headers`: compare what the headers say alone, and read no tensor.
    """
    with contextlib.ExitStack() as stack:
        left, right = (s if isinstance(s, Model) else stack.enter_context(open_model(s)) for s in (a, b))
        _check_kinds(left, right)
        return compare_models(left, right, headers=headers)


def _check_kinds(a: Model, b: Model) -> None:
    """Two models, or two files of another kind (adapters, projectors); one of each is refused by what it is."""
    left, right = something_else(a), something_else(b)
    error = left if left is not None else right
    if error is not None and (left is None or right is None or left.code != right.code):
        raise error
