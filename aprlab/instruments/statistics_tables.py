"""Tables of tensor statistics that other programs published, read by the names of their columns.

JSON (a list of rows, or an object with one), CSV or TSV. What a column means is looked up in `COLUMNS`; a column that is
not there is listed and left out, never guessed. A figure keeps how exactly it was printed: a table says no more than its
digits do.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, FormatError, UsageError
from aprlab.formats.reading import read_bytes
from aprlab.instruments.summary_statistics import PERCENTILES
from aprlab.model.names import namings_of
from aprlab.quants import types

COLUMNS: dict[str, tuple[str, ...]] = {  # figure -> names that columns have been given, lower case
    "count": ("count", "numel", "elements", "n_elements", "num_elements", "size"),
    "mean": ("mean", "avg", "average"),
    "std": ("std", "stddev", "std_dev", "sigma"),
    "variance": ("var", "variance"),
    "min": ("min", "minimum"),
    "max": ("max", "maximum"),
    "sum": ("sum", "total"),
    "l2": ("l2", "l2_norm", "norm"),
    "zeros": ("zeros", "zero_count", "zeros_count", "num_zeros"),
    "zero_fraction": ("zero_fraction", "zero_share", "sparsity"),
    "nan": ("nan", "nan_count", "nans", "num_nan"),
    "inf": ("inf", "inf_count", "infs", "num_inf"),
    "checksum": ("checksum",),
    "raw": ("raw",),
    "values": ("values",),
    "p50": ("median",),
}
_NAMES = ("name", "tensor", "tensor_name")
_TYPES = ("type", "dtype", "qtype", "ggml_type")
_SHAPES = ("shape", "dims")
_FIGURE_OF = {alias: figure for figure, aliases in COLUMNS.items() for alias in aliases}
FILE_LIMIT = 64 << 20  # bytes of a table
ROWS_LIMIT = 250_000  # of a table; a model of 10,000 layers, the most there are, has 120,003 tensors
_CODE = re.compile(r"[0-9]{1,9}")
_PERCENTILE = re.compile(r"(?:p|q|pct|percentile)_?0*(\d{1,2}(?:\.\d+)?)")
COUNTS = ("count", "zeros", "nan", "inf", "checksum")  # whole numbers, compared exactly
HASHES = ("raw", "values")  # texts


@dataclass(frozen=True, slots=True)
class Figure:
    """A number as printed: its value, and by how much the true one may differ from it because digits were left out."""

    value: float
    half_unit: float


@dataclass(frozen=True, slots=True)
class TableRow:
    """One tensor of a table.

    Attributes:
        name: as printed; `gguf` is the GGUF name that it stands for.
        type: name of the type where the table has one, as ggml calls it; '' else.
        shape: as printed, whichever order that is.
        figures: figure -> number; percentiles are ``p5``, ``p99.9``.
        hashes: ``raw`` and ``values``, hexadecimal.
    """

    name: str
    gguf: str
    type: str
    shape: tuple[int, ...]
    figures: Mapping[str, Figure]
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class StatisticsTable:
    """A whole table.

    Attributes:
        path: where it was read.
        rows: GGUF name -> row.
        left_out: columns whose meaning is not known.
        sampled: whether percentiles of large tensors are those of a sample, as `fingerprint` takes it.
    """

    path: Path
    rows: Mapping[str, TableRow] = field(repr=False)
    left_out: tuple[str, ...] = ()
    sampled: bool = False


def read_statistics(path: str | Path) -> StatisticsTable:
    """Read a table of statistics.

    Raises:
        UsageError: there is no such file.
        FormatError: it is no table, has more than `ROWS_LIMIT` rows, has no column for names or none with a figure that is
            known, a figure is no number, or one tensor is listed twice.
    """
    path = Path(path)
    try:
        text = read_bytes(path, FILE_LIMIT).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", code="statistics.cannot-read", path=path) from None
    except UnicodeDecodeError:
        raise FormatError("is not text", code="statistics.not-text", path=path) from None
    sampled, raw = _records(text, path)
    columns = list(dict.fromkeys(key for record in raw for key in record))
    if not any(column.lower() in _NAMES for column in columns):
        raise FormatError(
            f"has no column for the tensor's name ({', '.join(_NAMES)}); it has {', '.join(columns[:8]) or 'none'}",
            code="statistics.no-names", path=path,
        )  # fmt: skip
    known = {column: figure for column in columns if (figure := _figure_of(column))}
    if not known:
        raise FormatError("has no column with a figure that is known", code="statistics.no-figures", path=path)
    used = {*_NAMES, *_TYPES, *_SHAPES}
    left_out = tuple(column for column in columns if column not in known and column.lower() not in used)
    digits = {figure: _digits(record.get(column) for record in raw) for column, figure in known.items()}
    rows: dict[str, TableRow] = {}
    for record in raw:
        row = _row(record, known, digits, path)
        if row.gguf in rows:
            raise FormatError("is listed twice", code="statistics.listed-twice", path=path, tensor=row.name)
        rows[row.gguf] = row
    return StatisticsTable(path, rows, left_out, sampled)


# ── records ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _records(text: str, path: Path) -> tuple[bool, list[dict[str, str]]]:
    """(whether it is our own `fingerprint --json`, every row as texts by column)."""
    if text.lstrip()[:1] in "[{" and text.strip():
        try:
            whole = json.loads(text, parse_float=_Printed, parse_int=_Printed)
        except json.JSONDecodeError as error:
            raise FormatError(f"is not JSON: {error.msg}", code="statistics.not-json", path=path, offset=error.pos) from None
        except RecursionError:
            raise FormatError("is not JSON: too many parts inside each other", code="statistics.not-json", path=path) from None
        rows = whole if isinstance(whole, list) else _list_in(whole)
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise FormatError("holds no list of rows", code="statistics.no-rows", path=path)
        _few(len(rows), path)
        own = isinstance(whole, dict) and "schema" in whole and "raw" in rows[0]
        return own or {"raw", "values", "total"} <= set(rows[0]), [_flat(row) for row in rows]
    first = text.splitlines()[0] if text.strip() else ""
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in first else ",")
    try:
        few = itertools.islice(reader, ROWS_LIMIT + 1)
        found = [{str(key).strip(): str(value or "").strip() for key, value in row.items() if key is not None} for row in few]
    except csv.Error as error:
        raise FormatError(f"is no table: line {reader.line_num + 1}: {error}", code="statistics.not-text", path=path) from None
    if not found:
        raise FormatError("holds no rows", code="statistics.no-rows", path=path)
    _few(len(found), path)
    return False, found


def _few(count: int, path: Path) -> None:
    if count > ROWS_LIMIT:
        raise FormatError(f"has more than {ROWS_LIMIT:,} rows, one for each tensor", code="statistics.too-many-rows", path=path)


class _Printed(str):
    """A number of a JSON file, as printed."""


def _list_in(whole: Mapping[str, Any]) -> list[Any]:
    """The longest list of objects: ``fingerprints``, ``tensors``, ``rows``, whatever it is called."""
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return max(lists, key=len, default=[])


def _flat(row: Mapping[str, Any]) -> dict[str, str]:
    """One level: an object's entries become columns of their own, and a list of percentiles does."""
    flat: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value)
        elif key == "percentiles" and isinstance(value, list):
            flat |= {f"p{p}": str(v) for p, v in zip(PERCENTILES, value, strict=False)}
        elif isinstance(value, list):
            flat[key] = ",".join(str(part) for part in value)
        elif value is not None:
            flat[key] = str(value)
    return flat


def _figure_of(column: str) -> str:
    """The figure that a column holds, or ''."""
    lower = column.strip().lower()
    if found := _PERCENTILE.fullmatch(lower):
        return f"p{found[1]}"
    return _FIGURE_OF.get(lower, "")


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _digits(texts: Iterable[str | None]) -> tuple[int, int]:
    """(most decimals, most significant digits) that a column was printed with."""
    decimals = significant = 0
    for text in texts:
        value = _decimal(text) if text else None
        if value is None or not value.is_finite():
            continue
        _, digits, exponent = value.as_tuple()
        assert isinstance(exponent, int)
        decimals, significant = max(decimals, -exponent), max(significant, len(digits) if value else 0)
    return decimals, significant


def _half_unit(value: float, digits: tuple[int, int]) -> float:
    """Half of the last printed place: as many decimals, or as many significant digits, as the column has, whichever is less
    exact. Most writers drop zeros at the end, so one number alone does not say how exactly it was printed."""
    decimals, significant = digits
    places = 0.5 * 10.0**-decimals
    if not value or not significant or not math.isfinite(value):
        return places
    return max(places, 0.5 * 10.0 ** (math.floor(math.log10(abs(value))) - significant + 1))


def _row(record: Mapping[str, str], known: Mapping[str, str], digits: Mapping[str, tuple[int, int]], path: Path) -> TableRow:
    lower = {key.lower(): value for key, value in record.items()}
    name = next((lower[key] for key in _NAMES if lower.get(key)), "")
    if not name:
        raise FormatError("has a row without a name", code="statistics.no-name", path=path)
    figures: dict[str, Figure] = {}
    hashes: dict[str, str] = {}
    for column, figure in known.items():
        text = record.get(column, "")
        if not text:
            continue
        if figure in HASHES:
            hashes[figure] = text
            continue
        try:
            value = float(text)
        except ValueError:
            raise FormatError(
                f"column {column!r} has {text!r}, which is no number", code="statistics.not-a-number", path=path, tensor=name
            ) from None
        figures[figure] = Figure(value, 0.0 if figure in COUNTS else _half_unit(value, digits[figure]))
    shape = tuple(int(part) for part in re.findall(r"[0-9]{1,18}", next((lower[key] for key in _SHAPES if lower.get(key)), "")))
    kind = next((lower[key] for key in _TYPES if lower.get(key)), "")
    return TableRow(name, _gguf(name), _type_name(kind), shape, figures, hashes)


def _gguf(name: str) -> str:
    found = namings_of(name)
    return found.get("raw") or next(iter(found.values()), name)


def _type_name(text: str) -> str:
    """ggml's name of a type that was printed as name or number; as printed where it is neither."""
    try:
        return (types.by_code(int(text)) if _CODE.fullmatch(text) else types.by_name(text)).name if text else ""
    except AprlabError:
        return text
