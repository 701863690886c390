"""Two things compared, as a table: arrays, logits, token sequences, traces, model files.

Every comparison says how much it compared and refuses to compare nothing; what is on one side only is a row of
its own, never dropped. `equal` means equal bit for bit: a tolerance is the caller's business and is named by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aprlab.display.html import Cell, table
from aprlab.errors import AprlabError, UsageError
from aprlab.formats import open_model
from aprlab.formats.gguf import Field, pack_field
from aprlab.formats.gguf_record import header_of, plain_value
from aprlab.formats.identity import file_only
from aprlab.model.model import Model

if TYPE_CHECKING:
    from aprlab.tracing.traces import Point, Trace

MISSING = "-"  # what a table shows where one side has nothing


@dataclass(frozen=True)
class Comparison:
    """A table of what was compared.

    Attributes:
        title: what is compared with what.
        columns: names of the columns, in order; each row is a dict with these keys.
        rows: one per thing compared, equal or not.
        equal: True when every row is equal bit for bit.
        summary: one sentence with counts, free of anything that differs from machine to machine.
        first: index of the first row that differs, None when none does.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]] = field(repr=False)
    equal: bool
    summary: str
    first: int | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise UsageError(f"{self.title}: nothing to compare", code="trace.nothing-to-compare")

    def differing(self) -> list[dict[str, Any]]:
        """The rows that are not equal."""
        return [row for row in self.rows if not row["equal"]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: tuples as lists, NaN and Inf as words."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def table(self, rows: Sequence[dict[str, Any]] | None = None) -> str:
        """The rows (all by default) as fixed-width text with a heading."""
        body = [[format_cell(row.get(c, MISSING)) for c in self.columns] for row in (self.rows if rows is None else rows)]
        widths = [max(len(c), *(len(line[i]) for line in body)) if body else len(c) for i, c in enumerate(self.columns)]
        lines = [list(self.columns), *body]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def __str__(self) -> str:
        return f"{self.title}: {self.summary}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [[self._cell(c, row) for c in self.columns] for row in self.rows]
        strong = [not row["equal"] for row in self.rows]
        caption = Cell(str(self), "good" if self.equal else "bad")
        return table(self.columns, rows, caption=caption, strong=strong, height="30em" if len(rows) > 30 else "")

    @staticmethod
    def _cell(column: str, row: dict[str, Any]) -> Any:
        value = row.get(column, MISSING)
        if column in ("equal", "finding"):
            return Cell(format_cell(value), "good" if row["equal"] else "bad")
        return value if type(value) is int else format_cell(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def format_cell(value: Any) -> str:
    """How a table shows a value: floats to four digits, yes and no for booleans, a dash for None."""
    if value is None:
        return MISSING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return " × ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _comparison(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]], what: str) -> Comparison:
    """The table, with the summary all comparisons share: how many were compared, how many are equal, where it starts."""
    same = sum(bool(row["equal"]) for row in rows)
    first = next((i for i, row in enumerate(rows) if not row["equal"]), None)
    summary = f"{len(rows)} {what} compared, {same} equal bit for bit"
    if first is not None:
        summary += f", first difference at {rows[first][columns[0]]}"
    return Comparison(title, columns, rows, first is None, summary, first)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two arrays of one shape are apart, computed in float64.

    Attributes:
        count: values compared.
        equal: every value has the same bits (so NaN equals NaN, and 0.0 differs from -0.0).
        max_abs: largest absolute difference (NaN where one side alone is NaN or Inf).
        rel_l2: ``|a - b| / |a|``; 0 where both are zero, inf where only `a` is.
        cosine: of the angle between both, None where either is all zero.
        worst: index of `max_abs`, None where equal.
    """

    count: int
    equal: bool
    max_abs: float
    rel_l2: float
    cosine: float | None
    worst: tuple[int, ...] | None


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compare two arrays of the same shape and dtype; raises UsageError for unlike or empty ones."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise UsageError(f"unlike arrays: {a.dtype}{a.shape} against {b.dtype}{b.shape}", code="trace.arrays-unlike")
    if not a.size:
        raise UsageError(f"nothing to compare: both arrays are empty, shape {a.shape}", code="trace.nothing-to-compare")
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if np.array_equal(a.view(np.uint8), b.view(np.uint8)) if a.ndim else a.tobytes() == b.tobytes():
        return Difference(a.size, True, 0.0, 0.0, 1.0 if np.any(a) else None, None)
    with np.errstate(invalid="ignore", over="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        delta = np.abs(x - y)
        norm_x, norm_y = float(np.linalg.norm(x)), float(np.linalg.norm(y))
        norm_delta = float(np.linalg.norm(delta))
        relative = norm_delta / norm_x if norm_x else (float("inf") if norm_delta else 0.0)
        cosine = float(np.vdot(x, y)) / (norm_x * norm_y) if norm_x and norm_y else None
        worst = np.unravel_index(int(np.argmax(np.where(np.isnan(delta), np.inf, delta))), delta.shape)
    return Difference(a.size, False, float(np.max(delta)), relative, cosine, tuple(int(i) for i in worst))


def compare_arrays(a: np.ndarray, b: np.ndarray, title: str = "a against b") -> Comparison:
    """`difference` of two arrays as a table of one row."""
    row = {"array": "all", "shape": a.shape, **asdict(difference(a, b))}
    return _comparison(title, ("array", "shape", "equal", "max_abs", "rel_l2", "cosine", "worst"), [row], "array")


def compare_tokens(
    a: Sequence[int], b: Sequence[int], text: Callable[[int], str] = str, title: str = "tokens, a against b"
) -> Comparison:
    """Two token sequences side by side; the longer one's rest counts as different. `text` makes an id readable."""
    rows = []
    for step in range(max(len(a), len(b))):
        left, right = (side[step] if step < len(side) else None for side in (a, b))
        row: dict[str, Any] = {"step": step, "a": left, "a text": None if left is None else repr(text(left))}
        row |= {"b": right, "b text": None if right is None else repr(text(right)), "equal": left == right}
        rows.append(row)
    return _comparison(title, ("step", "a", "a text", "b", "b text", "equal"), rows, "tokens")


def compare_logits(a: np.ndarray, b: np.ndarray, title: str = "logits, a against b") -> Comparison:
    """Logits of the same positions: ``(positions, vocab)`` or ``(vocab,)``, float32.

    Beside the plain difference, each row has the Kullback-Leibler divergence KL(a || b) in nats, the top token of
    both, and the margin of a's top token over its second.
    """
    if a.shape != b.shape or a.ndim not in (1, 2):
        raise UsageError(f"unlike logits: {a.shape} against {b.shape}", code="trace.logits-unlike")
    rows = []
    for position, (x, y) in enumerate(zip(np.atleast_2d(a), np.atleast_2d(b), strict=True)):
        log_p, log_q = log_softmax(x), log_softmax(y)
        top = np.sort(x.astype(np.float64))[-2:]
        row = {"position": position, **asdict(difference(x, y)), "kl": float(kl_divergence(log_p, log_q))}
        rows.append(row | {"a top": int(np.argmax(x)), "b top": int(np.argmax(y)), "margin": float(top[1] - top[0])})
    columns = ("position", "equal", "max_abs", "rel_l2", "kl", "a top", "b top", "margin")
    return _comparison(title, columns, rows, "positions")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (…, vocab) to log-probabilities, float64 (…, vocab)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Of q from p, nats, float64 (…), from their log-probabilities (…, vocab)."""
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))


DIFFERENCES = {  # code of a row of `compare_models` -> what a table shows
    "diff.same": "same", "diff.only-in-a": "only in a", "diff.only-in-b": "only in b", "diff.type": "type",
    "diff.shape": "shape", "diff.bytes": "bytes", "diff.value": "value", "diff.unreadable": "unreadable",
    "diff.not-read": "not read",
}  # fmt: skip


def compare_models(a: Model, b: Model, *, headers: bool = False, same: Mapping[str, bool] | None = None) -> Comparison:
    """Two opened files: every tensor of the union, every config value, every part of the tokenizer.

    A tensor's `finding` is ``same``, or the first of ``only in a``, ``only in b``, ``type``, ``shape``, ``bytes`` that
    holds. Names are GGUF's, so a rename between formats is not a difference; bytes are the raw blocks. Two models that
    cannot be run have no config: there every key of the files is compared. `headers`: no byte of a tensor is read, and its
    finding is ``not read`` where nothing else differs. `same`: whether the bytes of a tensor are the same, where somebody
    else has looked; the others are looked at here.
    """
    tensors = _tensor_rows(a, b, headers=headers, same=same or {})
    if file_only(a) is not None and file_only(b) is not None:
        rows = [*tensors, *_key_rows(header_of(a).fields, header_of(b).fields)]
    else:
        rows = [*tensors, *_record_rows("config", a, b), *_record_rows("tokenizer", a, b)]
    return _comparison(f"{a.path.name} against {b.path.name}", ("what", "finding", "a", "b", "equal"), rows, "things")


def _tensor_rows(a: Model, b: Model, *, headers: bool, same: Mapping[str, bool]) -> Iterator[dict[str, Any]]:
    for name in [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]:
        left, right = a.tensors.get(name), b.tensors.get(name)
        if left is None or right is None:
            kind = "only-in-b" if left is None else "only-in-a"
        elif left.type != right.type:
            kind = "type"
        elif left.shape != right.shape:
            kind = "shape"
        elif headers:
            kind = "not-read"
        else:
            kind = "same" if (same[name] if name in same else left.same_bytes(right)) else "bytes"
        shown = [None if t is None else f"{t.type.name} {format_cell(t.shape)}" for t in (left, right)]
        yield _difference_row(name, kind, *shown)


def _difference_row(what: str, kind: str, a: str | None, b: str | None) -> dict[str, Any]:
    """One thing of two files: `code` is for programs, `finding` says the same to people."""
    code = f"diff.{kind}"
    return {"what": what, "code": code, "finding": DIFFERENCES[code], "a": a, "b": b, "equal": kind in ("same", "not-read")}


def _key_rows(a: Mapping[str, Field], b: Mapping[str, Field]) -> Iterator[dict[str, Any]]:
    """One row for each key of either file; values are compared as they are written, so that a NaN is itself."""
    for key in [*a, *(key for key in b if key not in a)]:
        left, right = a.get(key), b.get(key)
        if left is None or right is None:
            kind = "only-in-b" if left is None else "only-in-a"
        elif left.type_name != right.type_name:
            kind = "type"
        else:
            kind = "same" if pack_field(left) == pack_field(right) else "value"
        sides = (None if x is None else f"{x.type_name} {_short(plain_value(x.value))}" for x in (left, right))
        yield _difference_row(key, kind, *sides)


def _record_rows(part: str, a: Model, b: Model) -> Iterator[dict[str, Any]]:
    """One row per field of the config or the tokenizer; one row in all where a side lacks the record."""
    records: list[Any] = []
    for model in (a, b):
        try:
            records.append(getattr(model, part))
        except AprlabError as error:
            records.append(error)
    if any(isinstance(record, AprlabError) for record in records):
        shown = [record.message if isinstance(record, AprlabError) else "present" for record in records]
        yield _difference_row(part, "unreadable", *shown)
        return
    for item in fields(records[0]):
        left, right = (getattr(record, item.name) for record in records)
        kind = "same" if left == right else "value"
        yield _difference_row(f"{part}.{item.name}", kind, _short(left), _short(right))


def _short(value: Any) -> str:
    """A config value as it is; of a long list or text only its length."""
    if isinstance(value, list) or (isinstance(value, str) and len(value) > 40):
        return f"{len(value)} {'entries' if isinstance(value, list) else 'characters'}"
    return format_cell(value)


def compare_traces(a: Trace, b: Trace, title: str = "trace, a against b") -> Comparison:
    """Every point of the union of two traces of the same tokens, in the order of the pass.

    Raises:
        UsageError: other tokens, or a point that both have under unlike positions, activation contract or shape:
            such values differ for reasons that are no fault, and a figure from them would be taken for one.
    """
    if a.tokens != b.tokens:
        said = f"the traces ran other tokens: {len(a.tokens)} against {len(b.tokens)}, see `compare_tokens`"
        raise UsageError(said, code="trace.tokens-unlike")
    rows: list[dict[str, Any]] = []
    for name in [*a.points, *(name for name in b.points if name not in a.points)]:
        left, right = a.points.get(name), b.points.get(name)
        row: dict[str, Any] = {"point": name, "shape": (left or right).values.shape}  # type: ignore[union-attr]
        if left is None or right is None:
            rows.append({**row, "equal": False, "only in": "a" if right is None else "b"})
            continue
        _refuse_unlike(left, right)
        row |= asdict(difference(left.values, right.values))
        for side, seen in (("a", left.summary()), ("b", right.summary())):
            row |= {f"{side} {figure}": getattr(seen, figure) for figure in ("mean", "std", "l2")}
        rows.append(row)
    columns = ("point", "shape", "a mean", "b mean", "a std", "b std", "a l2", "b l2", "equal", "max_abs", "rel_l2", "cosine")
    return _comparison(title, columns, rows, "points")


def layer_rows(trace: Trace, step: str = "out") -> list[dict[str, Any]]:
    """Summaries of one step of every layer (``layers.N.<step>``) in layer order: ``layer``, ``mean``, ``std``, ``l2``, …"""
    return [{"layer": n, **asdict(trace[name].summary())} for n, name in layer_steps(trace, step)]


def layer_steps(trace: Trace, step: str) -> list[tuple[int, str]]:
    """Number and point of each layer that the trace has this step of; raises UsageError where it has none."""
    names = [(n, f"layers.{n}.{step}") for n in range(trace.config.block_count)]
    found = [(n, name) for n, name in names if name in trace]
    if not found:
        raise UsageError(f"the trace holds no point 'layers.*.{step}'", code="trace.point-missing")
    return found


def layer_errors(a: Trace, b: Trace) -> tuple[list[str], np.ndarray]:
    """Relative l2 error of b against a, by layer and step: names of the steps, and float64 ``(layers, steps)``.

    0 means equal bit for bit; a NaN or Inf in b gives inf. Both traces must hold the same points.
    """
    steps = list(dict.fromkeys(name.split(".")[2] for name in a if name.startswith("layers.")))
    if not steps:
        raise UsageError("the trace holds no points of layers", code="trace.point-missing")
    names = [[f"layers.{n}.{step}" for step in steps] for n in range(a.config.block_count)]
    errors = [[difference(a[name].values, b[name].values).rel_l2 for name in row] for row in names]
    return steps, np.nan_to_num(np.array(errors), nan=np.inf, posinf=np.inf)


def agreement_rows(a: Trace, b: Trace, step: str = "out") -> list[dict[str, Any]]:
    """How far b agrees with a, for one step of every layer: ``layer``, ``snr`` in dB, ``cosine``, ``equal``.

    The signal-to-noise ratio is 20 log10(‖a‖ / ‖b - a‖), over all positions: inf where they are equal bit for bit, 0
    where the error is as large as the signal, nan where b holds NaN or Inf. Layers that b does not give have no row.

    Raises:
        UsageError: b gives this step of no layer.
    """
    rows = []
    given = {name for _, name in layer_steps(b, step)}
    for n, name in layer_steps(a, step):
        if name not in given:
            continue
        d = difference(a[name].values, b[name].values)
        snr = math.inf if d.rel_l2 == 0 else -20 * math.log10(d.rel_l2) if math.isfinite(d.rel_l2) else math.nan
        rows.append({"layer": n, "snr": snr, "cosine": d.cosine, "equal": d.equal})
    return rows


def position_errors(a: Trace, b: Trace, step: str = "out") -> np.ndarray:
    """Relative l2 error of ``layers.N.<step>`` at each position alone: float64 ``(layers, positions)``."""
    names = [f"layers.{n}.{step}" for n in range(a.config.block_count)]
    errors = [[difference(x, y).rel_l2 for x, y in zip(a[name].values, b[name].values, strict=True)] for name in names]
    return np.nan_to_num(np.array(errors), nan=np.inf, posinf=np.inf)


def _refuse_unlike(a: Point, b: Point) -> None:
    facts = {
        "positions": (a.positions.tolist(), b.positions.tolist()),
        "contract": (a.contract, b.contract),
        "shape": (a.values.shape, b.values.shape),
    }
    for what, (left, right) in facts.items():
        if left != right:
            said = f"{a.name}: unlike trace points, {what} {left} against {right}"
            if what == "contract":
                said += "; trace both under one, or let `aprlab peel --source` judge each under its own"
            raise UsageError(said, code="trace.points-unlike")


def compare(a: Any, b: Any) -> Comparison:
    """Compare two things of one kind: model files (paths or opened), traces, arrays, token lists.

    Args:
        a, b: both of one kind; arrays have the same shape.

    Returns:
        A table with a row for each thing compared; `equal` says whether all are equal, bit for bit.

    Raises:
        UsageError: different kinds, or a kind that cannot be compared.
    """
    from aprlab.tracing.traces import Trace

    if isinstance(a, str | Path | Model) and isinstance(b, str | Path | Model):
        left, right = (side if isinstance(side, Model) else open_model(side) for side in (a, b))
        return compare_models(left, right)
    if isinstance(a, Trace) and isinstance(b, Trace):
        return compare_traces(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return compare_arrays(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return compare_tokens(a, b)
    said = f"cannot compare {type(a).__name__} with {type(b).__name__}; known: models, traces, arrays, token lists"
    raise UsageError(said, code="trace.kinds-unlike")
