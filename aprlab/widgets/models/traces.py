"""Trace explorer: where the forward passes of two sessions part, layer by layer and step by step, down to single values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.engines import choose
from aprlab.errors import UsageError
from aprlab.faults import FAULTS, Fault, session_with
from aprlab.figures import error_limits
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.onion.foreign_shadow import Judges, shadow_and_values
from aprlab.onion.source_peeling import made_source
from aprlab.onion.source_weights import check_shape
from aprlab.published import QUESTION
from aprlab.tracing.comparisons import compare_traces, layer_errors
from aprlab.tracing.traces import Trace, replay, trace
from aprlab.widgets.models.base import Observable
from aprlab.widgets.models.files import known_files

MODES = {
    "whole": "error of each side's own run (inherited and introduced)",
    "introduced": "error of each step on the healthy side's input (introduced alone)",
}


@dataclass(frozen=True, eq=False)
class PointDetail:
    """One point of both runs.

    Attributes:
        point: its name.
        healthy, other: float32 ``(positions, …)``.
        by_position: relative l2 error at each position, float64 ``(positions,)``.
        worst: rows of a table: position, index within it, both values, largest difference first.
    """

    point: str
    healthy: np.ndarray
    other: np.ndarray
    by_position: np.ndarray
    worst: list[tuple[int, int, float, float]]


class TraceExplorer(Observable):
    """A healthy run next to one with faults, or next to another program, as a map of layers × steps.

    Of another program, `introduced` compares each step with what its contract gives on the program's own input.

    Attributes:
        model: path of the model file.
        source: the other side, as `aprlab.source` takes it: a name, a recorded trace, a source; None for a session of ours.
        faults: ids of what is wrong with the other side; none makes it a second healthy run (an engine's, say).
        engine, other_engine: of both sides; '' takes the one that the rule has for the model.
        prompt: what is asked.
        mode: a key of `MODES`.
        chosen: the point looked at, or ''.
        detail: of it.
        text, other_text: prompt's last position as each side continues it: the most likely next token.
    """

    def __init__(
        self, model: str | Path, faults: Iterable[str] = (), *, other: str | Path | None = None, engine: str = "",
        other_engine: str = "", source: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.source = source
        self.model, self.other = Path(model), None if other is None else Path(other)
        self.faults: tuple[str, ...] = tuple(faults)
        self.engine, self.other_engine = engine, other_engine
        self.prompt, self.mode = QUESTION, "whole"
        self.chosen = ""
        self.detail: PointDetail | None = None
        self.runs: dict[str, Trace] = {}
        self.bases: dict[str, Trace] = {}  # by mode, what its run is compared with
        self._wrong: str | None = None  # of another program: the first point that its contract does not explain
        self._maps: dict[str, tuple[list[str], np.ndarray]] = {}  # by mode; drawn again at every click
        self.words = ""

    @property
    def choices(self) -> list[Fault]:
        """The faults that a session can have."""
        return [fault for fault in FAULTS.values() if fault.instrument is None]

    def choose(self, *, faults: Iterable[str] | None = None, prompt: str | None = None) -> None:
        """What to run next; what was run before is forgotten. Faults are those of a session: they end the look at a source."""
        self.work.free()
        self.source = self.source if faults is None else None
        self.faults = self.faults if faults is None else tuple(faults)
        self.prompt = self.prompt if prompt is None else prompt
        self._forget()
        self.changed()

    def open(self, reference: str, suspect: str = "") -> None:
        """Run other files next: by path or by the label of a known one; without `suspect` both sides run `reference`.

        Raises:
            UsageError, FormatError, UnsupportedError: a file that is not there or cannot be opened; nothing has changed.
        """
        self.work.free()
        known = known_files()
        given = [known.get(name.strip(), Path(name.strip())) for name in (reference, suspect) if name.strip()]
        if not reference.strip():
            raise UsageError("the reference is the path of a file", code="widgets.no-reference")
        for path in given:
            open_model(path).close()
        self.model, self.other = given[0], given[1] if len(given) > 1 else None
        self._forget()
        self.changed()

    def _forget(self) -> None:
        self.runs, self.bases, self._wrong = {}, {}, None
        self._maps, self.chosen, self.detail, self.words = {}, "", None, ""

    def run(self) -> None:
        """Trace both sides, and the other one's steps on the healthy inputs, in the background."""
        self.work.free()
        self._forget()
        self.work.start("opening the model", self._run)

    def _run(self) -> None:
        with open_model(self.model) as model:
            engine = choose(self.engine, model).spec
            self.work.tell(f"running the healthy side on {engine}", 0.1)
            healthy = Session(model, engine=engine)
            if self.source is not None:
                self._run_source(model, healthy)
                return
            whole = trace(healthy, self.prompt, raw=healthy.wants_raw)
            self.work.tell("running the other side", 0.4)
            with open_model(self.other if self.other is not None else self.model) as second:
                other = session_with(second, self.faults, self.other_engine or engine)
                theirs = trace(other, whole.tokens)
                self.work.tell("each step of the other side on the healthy input", 0.7)
                introduced = replay(other, whole)
                self.runs = {"healthy": whole, "whole": theirs, "introduced": introduced}
                self.bases = {"whole": whole, "introduced": whole}
                seen = compare_traces(whole, theirs)
                tokens = [healthy.tokenizer.decode([int(np.argmax(run["logits"].values[-1]))]) for run in (whole, theirs)]
        self.words = f"{seen.summary}. Most likely next token: {tokens[0]!r} against {tokens[1]!r}"

    def _run_source(self, model: Model, healthy: Session) -> None:
        self.work.tell("running the other program", 0.3)
        with made_source(self.source, model, None) as source:
            check_shape(source, model)
            prompt = healthy.prompt_tokens(self.prompt, raw=healthy.wants_raw)
            tokens, asked = source.recorded if source.recorded is not None else (prompt, len(prompt))
            theirs, name, contract = source.run(tokens, prompt=asked), source.name, source.contract
        self.work.tell("each step of the program on its own input", 0.6)
        operations, expected = shadow_and_values(theirs, Judges(model, contract), model.config)
        whole = trace(healthy, tokens)
        steps = _whole_steps(theirs, expected, whole)
        self.runs = {"healthy": whole.select(steps), "whole": theirs.select(steps), "introduced": theirs.select(steps)}
        self.bases = {"whole": self.runs["healthy"], "introduced": expected.select(steps)}
        wrong = [operation.point for operation in operations if not operation.fits]
        self._wrong = next((point for point in wrong if point in steps), "")
        count = len(operations)
        said = f"{len(wrong)} of {count} operations are not, the first is {wrong[0]}" if wrong else f"all {count} operations are"
        self.words = f"{name} within its contract ({contract}): {said}"
        if "logits" in steps:
            ends = [healthy.tokenizer.decode([int(np.argmax(run["logits"].values[-1]))]) for run in (whole, theirs)]
            self.words += f". Most likely next token: {ends[0]!r} against {ends[1]!r}"

    def set_mode(self, mode: str) -> None:
        """Show the whole error or the introduced one."""
        if mode not in MODES:
            raise UsageError(f"unknown mode {mode!r}; known: {', '.join(MODES)}", code="widgets.unknown-mode")
        self.mode = mode
        if self.chosen:
            self._look(self.chosen)
        self.changed()

    @property
    def ready(self) -> bool:
        """Both sides have been run."""
        return len(self.runs) == 3

    def map(self) -> tuple[list[str], np.ndarray]:
        """Names of the steps, and relative l2 errors ``(layers, steps)``; 0 is equal bit for bit, inf a NaN or Inf."""
        if not self.ready:
            raise UsageError("run it first", code="widgets.not-run")
        return self._map(self.mode)

    def _map(self, mode: str) -> tuple[list[str], np.ndarray]:
        if mode not in self._maps:
            self._maps[mode] = layer_errors(self.bases[mode], self.runs[mode])
        return self._maps[mode]

    def limits(self) -> tuple[float, float]:
        """Ends of the colour scale, the same for all modes: whole decades around their errors."""
        return error_limits(*(self._map(mode)[1] for mode in self.bases))

    def first(self) -> str:
        """The first point that differs (of another program: that its contract does not explain), '' where none does."""
        if self._wrong is not None:
            return self._wrong
        healthy, other = self.bases[self.mode], self.runs[self.mode]
        return next((name for name in healthy if not np.array_equal(_bits(healthy[name].values), _bits(other[name].values))), "")

    def click(self, point: str) -> None:
        """Look at one point."""
        if not self.ready:
            raise UsageError("run it first", code="widgets.not-run")
        if point not in self.runs["healthy"]:
            raise UsageError(f"no point {point!r}", code="widgets.no-such-point")
        self._look(point)
        self.changed()

    def _look(self, point: str, count: int = 12) -> None:
        a, b = self.bases[self.mode][point].values, self.runs[self.mode][point].values
        x, y = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1).astype(np.float64)
        with np.errstate(all="ignore"):
            apart = np.abs(x - y)
            norm = np.linalg.norm(x, axis=1)
            errors = np.linalg.norm(x - y, axis=1) / np.where(norm > 0, norm, 1)
        apart[np.isnan(apart)] = np.inf
        errors[~np.isfinite(errors)] = np.inf
        flat = apart.reshape(-1)
        order = [int(n) for n in np.argsort(-flat, kind="stable")[:count] if flat[n] > 0]
        width = x.shape[1]
        worst = [(n // width, n % width, float(x.flat[n]), float(y.flat[n])) for n in order]
        self.chosen, self.detail = point, PointDetail(point, a, b, errors, worst)


def _whole_steps(theirs: Trace, expected: Trace, whole: Trace) -> list[str]:
    """Points that all three have, those of a layer only where every layer has them; at the same positions."""
    alike = [
        name
        for name in theirs
        if name in expected and name in whole and np.array_equal(whole[name].positions, theirs[name].positions)
    ]
    steps = {name.split(".")[-1] for name in alike if name.count(".") == 2}
    complete = {step for step in steps if all(f"layers.{n}.{step}" in alike for n in range(theirs.config.block_count))}
    found = [name for name in alike if name.count(".") != 2 or name.split(".")[-1] in complete]
    if not complete:
        said = "the program gives no step of every layer at all positions; `aprlab peel --source` judges what there is"
        raise UsageError(said, code="widgets.no-steps")
    return found


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


__all__ = ["MODES", "PointDetail", "TraceExplorer"]
