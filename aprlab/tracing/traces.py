"""Named points of a forward pass, kept: values, positions, and the contract they were computed under.

Points are called as in `aprlab.architectures.points`: ``embed``, ``layers.0.attn_norm``, ``layers.0.q`` … ``norm``,
``logits``. Which positions a value belongs to is part of it, since statistics over all positions on one side and over
the last on the other have been taken for a bug before.
"""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import engines
from aprlab.architectures import check, forward
from aprlab.architectures import points as all_points
from aprlab.display import html as richview
from aprlab.engines.base import Array, Engine
from aprlab.errors import FormatError, UsageError
from aprlab.formats.writing import atomic, check_output
from aprlab.inference.session import Session
from aprlab.inference.template import Message
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.tracing import _stored
from aprlab.version import __version__

_VERSION = 1
# what zipfile, NumPy and JSON raise on bytes that are not what they should be, and a header of another shape here
_BROKEN = (
    ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError, ArithmeticError, SyntaxError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """One point in one line. Mean to l2 are of the finite values, in float64; None where there are none."""

    name: str
    shape: tuple[int, ...]
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    l2: float | None
    nan: int
    inf: int

    def __str__(self) -> str:
        figures = "  ".join(f"{k} {_figure(getattr(self, k)):>11}" for k in ("mean", "std", "min", "max", "l2"))
        return f"{self.name:<20} {_shape(self.shape):<16} {figures}  NaN {self.nan}  Inf {self.inf}"


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """What one place of the forward pass computed.

    Attributes:
        name: e.g. ``layers.0.q_rope``.
        values: float32 ``(P, …)``, one entry a position; the rest is the shape that `points(config)` gives.
        positions: int64 ``(P,)``.
        engine: name of the engine that computed it.
        contract: that engine's contract in one line, ``f32`` or ``q8, cache f16, flash`` (`engines.contracts.Contract`).
    """

    name: str
    values: np.ndarray
    positions: np.ndarray
    engine: str
    contract: str

    def at(self, position: int) -> np.ndarray:
        """The value at one position; raises UsageError where it was not kept."""
        found = np.flatnonzero(self.positions == position)
        if not found.size:
            said = f"{self.name} holds positions {_span(self.positions)}, not {position}"
            raise UsageError(said, code="trace.position-missing")
        value: np.ndarray = self.values[found[0]]
        return value

    def summary(self) -> Summary:
        """Mean, standard deviation, least, greatest, l2 norm, and how many values are NaN or infinite."""
        finite = self.values[np.isfinite(self.values)].astype(np.float64)
        some = finite.size > 0
        return Summary(
            self.name,
            self.values.shape,
            float(finite.mean()) if some else None,
            float(finite.std()) if some else None,
            float(finite.min()) if some else None,
            float(finite.max()) if some else None,
            float(np.linalg.norm(finite)) if some else None,
            int(np.isnan(self.values).sum()),
            int(np.isinf(self.values).sum()),
        )


@dataclass(frozen=True, eq=False)
class Trace:
    """Points of one run, in the order of the pass.

    Attributes:
        points: by name.
        tokens: ids that were run, from position 0 on.
        engine: name of the engine.
        contract: what it may round, in one line.
        config: of the run, which a fault may have changed.
        source: path and format of the model file.
        prompt: so many tokens went in at once, the others one by one; None where that is not known.
    """

    points: dict[str, Point] = field(repr=False)
    tokens: list[int]
    engine: str
    contract: str
    config: ModelConfig
    source: dict[str, str]
    prompt: int | None = None

    def __getitem__(self, name: str) -> Point:
        try:
            return self.points[name]
        except KeyError:
            said = f"the trace holds no point {name!r}; it holds {_some(list(self.points))}"
            raise UsageError(said, code="trace.point-missing") from None

    def __contains__(self, name: object) -> bool:
        return name in self.points

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def select(self, pattern: str | Iterable[str]) -> Trace:
        """The part whose names match, e.g. ``layers.*.out``; raises UsageError where none does."""
        points = {name: self.points[name] for name in matching(pattern, list(self.points))}
        return Trace(points, self.tokens, self.engine, self.contract, self.config, self.source, self.prompt)

    def summary(self) -> list[Summary]:
        """One `Summary` a point, in order."""
        return [point.summary() for point in self.points.values()]

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write as ``.npz``: an array per point, and a JSON header under ``header``.

        Raises:
            UsageError: the file exists (unless `force`) or cannot be written.
        """
        path = Path(path)
        check_output(path, [], force=force)
        spans: list[list[int]] = []  # points share their positions, so each distinct list is stored once
        entries: dict[str, dict[str, Any]] = {}
        for name, point in self.points.items():
            positions = point.positions.tolist()
            if positions not in spans:
                spans.append(positions)
            entries[name] = {
                "shape": list(point.values.shape),
                "positions": spans.index(positions),
                "engine": point.engine,
                "contract": point.contract,
            }
        header = {
            "kind": "aprlab trace", "version": _VERSION, "written_by": f"aprlab {__version__}",
            "engine": self.engine, "contract": self.contract, "source": self.source, "config": asdict(self.config),
            "tokens": self.tokens, "positions": spans, "points": entries,
        }  # fmt: skip
        if self.prompt is not None:
            header["prompt"] = self.prompt
        arrays = {name: point.values for name, point in self.points.items()}
        with atomic(path, force=force) as file:
            np.savez(file, allow_pickle=False, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            UsageError: the file cannot be read.
            FormatError: it is no trace, of another version, or header and arrays contradict each other.
        """
        path = Path(path)
        try:
            with _stored.opened(path) as stored:
                return _from_npz(stored, path)
        except OSError as error:
            raise UsageError(f"cannot be read: {error.strerror or error}", code="trace.unreadable", path=path) from None
        except _BROKEN as error:
            said = f"is not a trace of aprlab: {' '.join(str(error).split())}"
            raise FormatError(said, code="trace.damaged", path=path) from None

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.summary())

    def __repr__(self) -> str:
        return f"Trace({len(self)} points, {len(self.tokens)} tokens, {self.engine} ({self.contract}), {self.source})"

    def _repr_html_(self) -> str:
        columns = ("point", "positions", "shape", "mean", "std", "min", "max", "l2", "NaN", "Inf")
        rows: list[list[Any]] = []
        bad = []
        for point in self.points.values():
            s = point.summary()
            figures = [_figure(x) for x in (s.mean, s.std, s.min, s.max, s.l2)]
            rows.append([s.name, _span(point.positions), _shape(s.shape), *figures, s.nan, s.inf])
            bad.append(bool(s.nan or s.inf))
        name = Path(self.source["path"]).name
        caption = f"{name}: {len(self)} points, {len(self.tokens)} tokens, engine {self.engine} ({self.contract})"
        return richview.table(columns, rows, caption=caption, strong=bad, height="30em")


class Recorder:
    """A tap that keeps the chosen points; give it to `forward` once or several times, pass after pass."""

    def __init__(self, engine: Engine, wanted: Iterable[str], *, last_only: bool = False) -> None:
        self._engine = engine
        self._last_only = last_only
        self._pieces: dict[str, list[np.ndarray]] = {name: [] for name in wanted}

    def __call__(self, point: str, x: Array) -> Array:
        if point in self._pieces:
            values = self._engine.to_numpy(x)
            self._pieces[point].append(values[-1:].copy() if self._last_only else values)
        return x

    def points(self, end: int) -> dict[str, Point]:
        """What was kept, the last position being ``end - 1``."""
        kept = {}
        for name, pieces in self._pieces.items():
            values = np.concatenate(pieces)[-1:] if self._last_only else np.concatenate(pieces)
            positions = np.arange(end - len(values), end, dtype=np.int64)
            kept[name] = Point(name, values, positions, self._engine.name, self._engine.contract)
        return kept


def trace(
    model: Model | Engine | Session,
    prompt: str | Sequence[Message] | Sequence[int],
    points: str | Iterable[str] = "*",
    *,
    raw: bool = False,
    system: str | None = None,
    positions: str = "all",
    chunk: int | None = None,
    config: ModelConfig | None = None,
    engine: str | None = "auto",
    threads: int | None = None,
) -> Trace:
    """Run `prompt` once and keep named points.

    Args:
        model: an opened model, an engine over one, or a session.
        prompt: as for `generate`; token ids are run as they are and need no tokenizer.
        points: a glob such as ``layers.*.out``, several with commas between or as a list; ``*`` keeps everything.
        raw, system: as for `generate`.
        positions: ``all``, or ``last`` to keep the last position of every point.
        chunk: tokens a pass; None runs all at once (prefill), 1 one after another (decode).
        config: instead of the model's own.
        engine, threads: which engine to make, where a model is given.

    Raises:
        UsageError: no point matches, an unknown id, an empty prompt, one beyond the context.
        FormatError: tensors are missing or misshapen.
    """
    if positions not in ("all", "last"):
        raise UsageError(f"positions {positions!r}; known: 'all', 'last'", code="trace.positions-unknown")
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk {chunk}: at least one token a pass is needed", code="trace.chunk")
    if isinstance(model, Session):
        runner, config = model.engine, config if config is not None else model.config
    else:
        runner = model if isinstance(model, Engine) else engines.create(engine, model, threads)
        config = config if config is not None else runner.model.config
    check(runner.model, config)
    wanted = matching(points, list(all_points(config)))
    tokens = _tokens(model if isinstance(model, Session) else runner, prompt, raw, system)
    if len(tokens) > config.context_length:
        raise UsageError(f"{len(tokens)} tokens exceed the context of {config.context_length}", code="trace.context")

    recorder = Recorder(runner, wanted, last_only=positions == "last")
    cache = runner.new_cache(config, len(tokens))
    step = chunk if chunk is not None else max(1, len(tokens))
    for start in range(0, max(1, len(tokens)), step):  # no tokens: forward says so
        forward(runner, config, tokens[start : start + step], cache, recorder, last_only=positions == "last")
    return Trace(
        recorder.points(len(tokens)),
        tokens,
        runner.name,
        runner.contract,
        config,
        {"path": str(runner.model.path), "format": runner.model.format},
    )


def replay(session: Session, given: Trace, *, chunk: int | None = None) -> Trace:
    """Every step of the pass as `session` computes it **on the inputs of `given`**, not on its own.

    The stream of `given` is put back after each step, so that no error is handed on: where the replay differs from
    `given`, that very step introduced the difference. (A trace of the session by itself shows what it inherited, too.)

    Args:
        session: runs the steps: its engine, its config.
        given: a whole trace, all points at all positions.
        chunk: tokens a pass, as for `trace`.

    Raises:
        UsageError: `given` lacks a point or positions, or a value of `session` has another shape.
    """
    engine, config, count = session.engine, session.config, len(given.tokens)
    wanted = list(all_points(config))
    for name in wanted:
        if len(given[name].positions) != count:
            said = f"{name} of the given trace holds {len(given[name].positions)} positions of {count}"
            raise UsageError(said, code="trace.positions-missing")
    recorder = Recorder(engine, wanted)
    cache, start = engine.new_cache(config, count), 0

    def put_back(point: str, x: Array) -> Array:
        expected = given[point].values[start : start + x.shape[0]]
        if x.shape != expected.shape:
            said = f"{point} has shape {x.shape} here and {expected.shape} in the given trace"
            raise UsageError(said, code="trace.shape-unlike")
        recorder(point, x)
        return engine.from_numpy(expected)

    step = chunk if chunk is not None else max(1, count)
    for start in range(0, count, step):
        forward(engine, config, given.tokens[start : start + step], cache, put_back)
    source = {"path": str(session.model.path), "format": session.model.format}
    return Trace(recorder.points(count), given.tokens, engine.name, engine.contract, config, source)


def matching(patterns: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of `names`, in their order, that match a pattern; raises UsageError for a pattern that matches nothing."""
    several = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    several = [pattern.strip() for pattern in several]
    for pattern in several:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no trace point matches {pattern!r}; there are {_some(names)}", code="trace.pattern-unmatched")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in several)]


def _tokens(model: Session | Engine, prompt: str | Sequence[Message] | Sequence[int], raw: bool, system: str | None) -> list[int]:
    if not isinstance(prompt, str) and all(isinstance(part, int | np.integer) for part in prompt):
        return [int(part) for part in prompt]  # type: ignore[arg-type]
    session = model if isinstance(model, Session) else Session(model)
    return session.prompt_tokens(prompt, raw=raw, system=system)


def _from_npz(stored: Any, path: Path) -> Trace:
    header = _stored.header_of(stored, path)
    if header["kind"] != "aprlab trace" or header["version"] != _VERSION:
        said = f"is a {header['kind']!r} of version {header['version']}, not a trace of {_VERSION}"
        raise FormatError(said, code="trace.version", path=path)
    config = _stored.config_of(header, path)
    spans = [np.array(span, np.int64) for span in header["positions"]]
    points = {}
    for name, entry in header["points"].items():
        values, positions = stored[name], spans[entry["positions"]]
        if values.dtype != np.float32 or values.shape != tuple(entry["shape"]) or len(positions) != len(values):
            raise FormatError(
                f"point {name!r} is {values.dtype}{values.shape} with {len(positions)} positions, the header says "
                f"float32{tuple(entry['shape'])}",
                code="trace.point-shape",
                path=path,
            )
        points[name] = Point(name, values, positions, entry["engine"], entry["contract"])
    return Trace(points, header["tokens"], header["engine"], header["contract"], config, header["source"], header.get("prompt"))


def _figure(x: float | None) -> str:
    return "–" if x is None else f"{x:.5g}"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _span(positions: np.ndarray) -> str:
    """`0…35`, or the one position there is."""
    first, last = int(positions[0]), int(positions[-1])
    return str(first) if first == last else f"{first}…{last}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:18])} … {', '.join(names[-2:])}"
