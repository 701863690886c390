"""From a table of statistics to the bug: which faulty decoder, label or conversion has exactly these figures?

No engine runs. Every row is compared with the model's own values; where it differs, every reading of the tensor's bytes that
the catalogue knows is tried, and the ones that give all figures within the digits printed are the answer.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aprlab.engines.blas import blas_threads
from aprlab.errors import AprlabError, UsageError
from aprlab.forensics import readings
from aprlab.forensics.readings import TensorReading
from aprlab.formats import open_model
from aprlab.instruments.measured_figures import Agreement, MeasuredFigures, agreement, screen
from aprlab.instruments.statistics_tables import StatisticsTable, TableRow, read_statistics
from aprlab.model.content import drop_pages
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.paths import cores
from aprlab.quants.types import TensorType

PAIRS_ON = 2  # unexplained tensors of a type on which pairs are tried; what explains one of them is tried on all
SURE = 8.0  # standard errors by which a sample of blocks has to be off before it counts


@dataclass(frozen=True, slots=True)
class ReadingFit:
    """A reading that has all figures of a row.

    Attributes:
        faults: ids; none where the catalogue has no name for it.
        form: ``decoder``, ``label``, ``file``, or ``decoder or file`` where the file form was checked to have them too.
        how: in words.
        residual: largest distance of a figure, in standard deviations of the values.
        exact: whether a checksum or hash of the values agrees, too.
    """

    faults: tuple[str, ...]
    form: str
    how: str
    residual: float
    exact: bool

    @property
    def name(self) -> str:
        """The faults, or what it does."""
        return " + ".join(self.faults) or self.how


@dataclass(frozen=True, slots=True)
class RowFinding:
    """One row of the table.

    Attributes:
        name, type: the tensor's GGUF name, and the model's type of it ('' where the model has no such tensor).
        agree, differ: figures compared with the model's own values.
        explained: readings that have all figures; empty where the row agrees or nothing does.
        other: another tensor of the model that has these figures, or ''.
    """

    name: str
    type: str
    agree: tuple[str, ...]
    differ: tuple[str, ...]
    explained: tuple[ReadingFit, ...] = ()
    other: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = [
            {"faults": list(e.faults), "form": e.form, "how": e.how, "residual": e.residual, "exact": e.exact}
            for e in self.explained
        ]
        return {
            "name": self.name, "type": self.type, "agree": list(self.agree), "differ": list(self.differ), "explained": found,
            "other": self.other,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class TypeAnswer:
    """What a table says about one type.

    Attributes:
        type: its name.
        rows, agree, differ: how many rows there are, agree with the model, differ from it.
        explanations: (reading, rows it explains, rows that are exact, worst residual), the one that explains most first.
        unexplained: rows that differ and that nothing explains.
    """

    type: str
    rows: int
    agree: int
    differ: int
    explanations: tuple[tuple[str, int, int, float], ...]
    unexplained: tuple[str, ...]

    @property
    def words(self) -> str:
        """One line."""
        if not self.differ:
            return f"{self.type}: all {self.rows} agree with the model"
        alike: dict[tuple[int, int, float], list[str]] = {}
        for name, *figures in self.explanations:
            alike.setdefault((int(figures[0]), int(figures[1]), figures[2]), []).append(name)
        parts = [
            f"{' or '.join(names)} {'have' if len(names) > 1 else 'has'} all figures of {count} of {self.differ}"
            f" (worst residual {worst:.1e} standard deviations"
            + (f"; checksum or hash equal in {exact}" if exact else "")
            + ("; figures that ignore the order cannot tell them apart)" if len(names) > 1 else ")")
            for (count, exact, worst), names in alike.items()
        ]
        if self.unexplained:
            parts.append(f"no fault explains {len(self.unexplained)}, first {self.unexplained[0]}")
        return f"{self.type}: {self.agree} of {self.rows} agree with the model; " + "; ".join(parts)


@dataclass
class StatisticsForensics:
    """What was found out about a table.

    Attributes:
        table, model: their paths.
        rows: in the table's order.
        missing: tensors of the model that the table does not list.
        left_out: columns whose meaning is not known.
        tried: how many readings there were, by type.
    """

    table: Path
    model: Path
    rows: list[RowFinding] = field(repr=False)
    missing: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    tried: dict[str, int] = field(default_factory=dict)

    @property
    def differing(self) -> list[RowFinding]:
        """Rows that are not the model's."""
        return [row for row in self.rows if row.differ or not row.agree]

    @property
    def types(self) -> list[TypeAnswer]:
        """The answer by type, in the order of the table."""
        return [_answer(kind, [r for r in self.rows if r.type == kind]) for kind in dict.fromkeys(r.type for r in self.rows)]

    @property
    def faults(self) -> list[str]:
        """The best explanation of each type that differs."""
        return [answer.explanations[0][0] for answer in self.types if answer.explanations]

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if not self.differing:
            return f"all {len(self.rows)} rows are the model's own"
        left = sum(len(answer.unexplained) for answer in self.types)
        because = f"explained by {', '.join(dict.fromkeys(self.faults))}" if self.faults else "not explained"
        return f"{len(self.differing)} of {len(self.rows)} rows are not the model's: {because}; {left or 'none'} left unexplained"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        answers = [
            {
                "type": a.type, "rows": a.rows, "agree": a.agree, "differ": a.differ, "unexplained": list(a.unexplained),
                "explanations": [
                    {"reading": name, "rows": count, "exact": exact, "residual": worst}
                    for name, count, exact, worst in a.explanations
                ],
            }
            for a in self.types
        ]  # fmt: skip
        return {
            "table": str(self.table), "model": str(self.model), "conclusion": self.conclusion, "types": answers,
            "rows": [row.to_json() for row in self.rows], "missing": self.missing, "left_out": list(self.left_out),
            "tried": self.tried,
        }  # fmt: skip

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{html.escape(answer.words)}</li>" for answer in self.types)
        return f"<p>{html.escape(self.conclusion)}</p><ul>{lines}</ul>"


def _answer(kind: str, rows: list[RowFinding]) -> TypeAnswer:
    differ = [row for row in rows if row.differ or not row.agree]
    count: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    worst: dict[str, float] = {}
    for row in differ:
        for each in row.explained:
            count[each.name] += 1
            exact[each.name] += each.exact
            worst[each.name] = max(worst.get(each.name, 0.0), each.residual)
        if row.other:
            count["another tensor's figures"] += 1
            worst.setdefault("another tensor's figures", 0.0)
    explanations = tuple((name, n, exact[name], worst[name]) for name, n in count.most_common())
    unexplained = tuple(row.name for row in differ if not row.explained and not row.other)
    return TypeAnswer(kind or "(not in the model)", len(rows), len(rows) - len(differ), len(differ), explanations, unexplained)


# ── the search ────────────────────────────────────────────────────────────────────────────────────────────────────


def explain_statistics(
    model: Model | str | Path,
    table: StatisticsTable | str | Path,
    *,
    pairs: bool = True,
    progress: Callable[[int], object] | None = None,
) -> StatisticsForensics:
    """Compare a table of statistics with a healthy model and find the faults that have its figures.

    Args:
        model: a healthy model, opened or as a path.
        table: read already, or its path.
        pairs: also try two faulty decoders of a type at once, where no single one has the figures.
        progress: called with the bytes of each tensor that is done.

    Raises:
        UsageError: no row of the table is a tensor of the model.
        FormatError: the table cannot be read, or the model.
    """
    model = model if isinstance(model, Model) else open_model(model)
    table = table if isinstance(table, StatisticsTable) else read_statistics(table)
    known = [row for row in table.rows.values() if row.gguf in model.tensors]
    if not known:
        raise UsageError(
            f"none of its {len(table.rows)} rows is a tensor of {model.path}", code="statistics.other-model", path=table.path
        )
    search = _Search(model, table)
    order = sorted(known, key=lambda row: -model.tensors[row.gguf].size)  # the longest first, so that nobody waits at the end
    with blas_threads(1), ThreadPoolExecutor(min(4, cores()), "aprlab-statistics") as pool:
        for row, found in zip(order, pool.map(search.row, order), strict=True):
            search.found[row.gguf] = found
            if progress is not None:
                progress(model.tensors[row.gguf].nbytes)
        if pairs:
            search.try_pairs(pool)
    search.name_others(known)
    rows = [search.found.get(row.gguf) or RowFinding(row.name, "", (), ()) for row in table.rows.values()]
    missing = [name for name in model.tensors if name not in table.rows]
    return StatisticsForensics(table.path, Path(model.path), rows, missing, table.left_out, search.tried)


class _Search:
    """One search: the model, the table, the readings by type, and what was found so far."""

    def __init__(self, model: Model, table: StatisticsTable) -> None:
        self.model, self.table = model, table
        self.found: dict[str, RowFinding] = {}
        self.healthy: dict[str, MeasuredFigures] = {}
        kinds = dict.fromkeys(model.tensors[name].type for name in table.rows if name in model.tensors)
        self.readings = {kind: [*readings.decoders(kind), *readings.labels(kind)] for kind in kinds}
        self.tried = {kind.name: len(found) for kind, found in self.readings.items()}

    def row(self, row: TableRow) -> RowFinding:
        """One row, by the model's own values, then by every single reading."""
        tensor = self.model.tensors[row.gguf]
        measured = self.measure(row, readings.stored(tensor))
        assert measured is not None
        self.healthy[row.gguf] = measured
        raw = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tensor.raw).data) if "raw" in row.hashes else ""
        own = agreement(row, measured, sampled=self.table.sampled, raw=raw)
        explained: tuple[ReadingFit, ...] = ()
        if not own.whole:
            explained = self.explain(row, self.readings[tensor.type]) or self.explain(row, readings.files(tensor))
        drop_pages(tensor.raw)
        return RowFinding(row.gguf, tensor.type.name, own.agree, own.differ, explained)

    def explain(self, row: TableRow, tries: Iterable[TensorReading]) -> tuple[ReadingFit, ...]:
        """The readings that have all figures of a row."""
        tensor = self.model.tensors[row.gguf]
        found = []
        for reading in tries:
            try:
                sample = reading.sample
                if sample is not None and any(self.refuted(row, sample(tensor, count)) for count in readings.SAMPLES):
                    continue
                measured = self.measure(row, reading.values(tensor), early=True)
            except AprlabError:
                continue  # this reader refuses the bytes
            if measured is None:
                continue
            seen = agreement(row, measured, sampled=self.table.sampled)
            if seen.whole:
                found.append(self.explanation(row, tensor, reading, seen))
        return tuple(found)

    def explanation(self, row: TableRow, tensor: Tensor, reading: TensorReading, seen: Agreement) -> ReadingFit:
        """With its file form, where that has the figures, too; a large tensor is not written again to find out."""
        form = reading.form
        if form == "decoder" and tensor.size <= readings.RECODED_LIMIT:
            changed = readings.in_file(tensor, reading.faults)
            if changed is not None:
                again = self.measure(row, readings.stored(changed))
                if again is not None and agreement(row, again, sampled=self.table.sampled).whole:
                    form = "decoder or file"
        return ReadingFit(reading.faults, form, reading.how, seen.residual, seen.exact)

    def measure(self, row: TableRow, chunks: Iterable[np.ndarray], *, early: bool = False) -> MeasuredFigures | None:
        """Figures of the values in chunks; None where there are none, or, with `early`, as soon as they cannot be the row's."""
        wanted = {name: figure for name, figure in row.figures.items() if name[0] == "p" and name[1:2].isdigit()}
        measured = MeasuredFigures(wanted, hashed="values" in row.hashes)
        for chunk in chunks:
            measured.add(chunk)
            if early and screen(row, measured):
                return None
        return measured if measured.count else None

    def refuted(self, row: TableRow, sample: np.ndarray) -> bool:
        """Whether values of some blocks, float32 ``(blocks, values)``, already say that these are not the row's."""
        measured = self.measure(row, [sample])
        if measured is None or screen(row, measured):
            return True
        if measured.nan or measured.inf or len(sample) < 64:
            return False
        for name, printed in measured.percentiles.items():
            share, slack = float(name[1:]) / 100, printed.half_unit
            if _off((sample < printed.value - slack).mean(1), share, above=True):
                return True
            if _off((sample <= printed.value + slack).mean(1), share, above=False):
                return True
        return _spread_refuted(row, sample)

    def try_pairs(self, pool: ThreadPoolExecutor) -> None:
        """Two decoders at once, for the types with rows that no single reading explains."""
        for kind in self.readings:
            left = self.unexplained(kind)
            if not left:
                continue
            alone = frozenset(f for r in self.found.values() if r.type == kind.name for e in r.explained for f in e.faults)
            pairs = readings.decoder_pairs(kind, alone)
            self.tried[kind.name] += len(pairs)
            few = sorted(left, key=lambda row: self.model.tensors[row.gguf].size)[:PAIRS_ON]
            good = {e.faults for found in pool.map(partial(self.explain, tries=pairs), few) for e in found}
            chosen = [pair for pair in pairs if pair.faults in good]
            for row, found in zip(left, pool.map(partial(self.explain, tries=chosen), left), strict=True):
                before = self.found[row.gguf]
                self.found[row.gguf] = RowFinding(before.name, before.type, before.agree, before.differ, found)

    def unexplained(self, kind: TensorType) -> list[TableRow]:
        """Rows of a type that differ and that nothing explains."""
        return [
            self.table.rows[name]
            for name, found in self.found.items()
            if found.type == kind.name and (found.differ or not found.agree) and not found.explained
        ]

    def name_others(self, rows: Iterable[TableRow]) -> None:
        """For rows that nothing explains: the other tensor that has their figures, if there is one."""
        for row in rows:
            found = self.found[row.gguf]
            if found.explained or not (found.differ or not found.agree):
                continue
            for name, measured in self.healthy.items():
                plain = {key: figure for key, figure in row.figures.items() if key in measured.figures() or key == "checksum"}
                bare = TableRow(row.name, row.gguf, row.type, row.shape, plain, {})
                if name != row.gguf and len(plain) >= 3 and agreement(bare, measured).whole:
                    self.found[row.gguf] = RowFinding(found.name, found.type, found.agree, found.differ, (), name)
                    break


def _off(shares: np.ndarray, expected: float, *, above: bool) -> bool:
    """Whether the mean of the blocks' shares is surely above (or below) `expected`, by their spread among themselves."""
    error = float(shares.std()) / len(shares) ** 0.5 + 1 / len(shares)
    distance = float(shares.mean()) - expected
    return (distance if above else -distance) > SURE * error


def _spread_refuted(row: TableRow, sample: np.ndarray) -> bool:
    """Whether the mean of the squares is far from the row's; asked where there are no percentiles.

    A few blocks may hold most of the squares, and a sample may lack them: only too much of them counts, or far too little.
    """
    if "std" not in row.figures or len(sample) < 256 or any(name[0] == "p" for name in row.figures):
        return False
    blocks = (sample.astype(np.float64) ** 2).mean(1)
    printed = row.figures["std"].value ** 2 + (row.figures["mean"].value ** 2 if "mean" in row.figures else 0.0)
    here, error = float(blocks.mean()), float(blocks.std() / len(blocks) ** 0.5)
    return here - printed > 4 * SURE * error or here < 0.25 * printed


# ── a table of our own ────────────────────────────────────────────────────────────────────────────────────────────


def table_rows(model: Model, faults: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Statistics of every tensor as a program with these faulty decoders publishes them, in upstream's columns.

    Raises:
        UsageError: a fault is unknown.
    """
    from aprlab.faults import by_id
    from aprlab.quants import REGISTRY

    registry = dict(REGISTRY)
    for fault in map(by_id, faults):
        if fault.registry is None:
            raise UsageError(f"fault {fault.id!r} is no decoder's", code="statistics.no-decoder")
        registry = dict(fault.registry(registry))
    return [_published(tensor, registry[tensor.type].dequantise(tensor.raw, tensor.shape)) for tensor in model.tensors.values()]


def _published(tensor: Tensor, values: np.ndarray) -> dict[str, Any]:
    measured = MeasuredFigures()
    measured.add(np.ascontiguousarray(values))
    ordered = np.sort(values[np.isfinite(values)].reshape(-1))
    single = {"mean": measured.mean, "std": measured.std, "min": measured.min, "max": measured.max}
    single |= {f"p{p}": ordered[int(p / 100 * (ordered.size - 1))] for p in (5, 25, 50, 75, 95) if ordered.size}
    row: dict[str, Any] = {"name": tensor.name, "shape": list(tensor.shape), "dtype": str(tensor.type.code)}
    row |= {key: float(str(np.float32(value))) for key, value in single.items()}
    row |= {"nan_count": measured.nan, "inf_count": measured.inf}
    row |= {"zero_fraction": float(str(np.float32(measured.zeros / max(measured.finite, 1))))}
    return row | {"checksum": measured.checksum("bits-sum-32")}
