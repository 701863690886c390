"""A third kind of reference: a table of statistics that somebody published. Tensors whose figures differ are named.

It needs no second file: upstream's fingerprints, or `aprlab fingerprint --json` of a healthy copy. Figures are compared within
the digits that were printed. A table cannot repair anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprlab.errors import AprlabError
from aprlab.instruments.measured_figures import MeasuredFigures, agreement
from aprlab.instruments.statistics_tables import StatisticsTable, TableRow
from aprlab.model.tensor import Tensor
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.lost_information import tensors_of
from aprlab.onion.words import Mechanism

_VALUES = 1 << 20  # of a chunk
_TELLING = ("mean", "std", "min", "max")  # figures by which a tensor is recognised under another's name


def statistics_deviations(case: FileCase, table: StatisticsTable) -> list[Deviation]:
    """Tensors whose figures are not those of the table; tensors in another type than the table's are not judged.

    Args:
        case: with its layers done, without a reference.
        table: of a healthy file of the same model.
    """
    matches = {m.true: m for m in case.matches if m.true is not None}
    found = []
    for tensor in tensors_of(case):
        row = table.rows.get(tensor.name)
        if row is None or (row.type and row.type != tensor.type.name):
            continue
        measured = _measured(tensor, row)
        if measured is None:
            continue
        seen = agreement(row, measured, sampled=table.sampled)
        differ = [name for name in seen.differ if name not in ("raw", "values")] or list(seen.differ)
        if not differ:
            continue
        evidence = {"figures": differ, "table": table.path.name}
        if (other := _row_like(measured, tensor, table)) is not None:
            evidence["agrees_with"] = other
        cause = Mechanism("weights.statistics-differ", {"table": table.path.name})
        found.append(Deviation("bytes", tensor.name, None, None, cause, matches[tensor.name], evidence, 0.9))
    return found


def _measured(tensor: Tensor, row: TableRow) -> MeasuredFigures | None:
    """Figures of a tensor's values, a few rows at a time; None where it cannot be decoded."""
    percentiles = {name: figure for name, figure in row.figures.items() if name.startswith("p") and name[1:2].isdigit()}
    measured = MeasuredFigures(percentiles, hashed="values" in row.hashes)
    try:
        for values in _chunks(tensor):
            measured.add(values)
    except AprlabError:
        return None
    return measured


def _chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    if len(tensor.shape) < 2:
        yield np.ascontiguousarray(tensor.dequantise())
        return
    step = max(1, _VALUES // tensor.cols)
    for start in range(0, tensor.rows, step):
        yield np.ascontiguousarray(tensor.dequantise(slice(start, min(start + step, tensor.rows))))


def _row_like(measured: MeasuredFigures, tensor: Tensor, table: StatisticsTable) -> str | None:
    """The one other row of the table that these values have the figures of."""
    found = []
    for name, row in table.rows.items():
        figures = {key: row.figures[key] for key in _TELLING if key in row.figures}
        if name == tensor.name or len(figures) < len(_TELLING):
            continue
        told = TableRow(row.name, row.gguf, row.type, row.shape, figures, {})
        if agreement(told, measured).whole:
            found.append(name)
    return found[0] if len(found) == 1 else None


__all__ = ["statistics_deviations"]
