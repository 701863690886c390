"""Gates: what has to hold before a converted model may be used, and the proof that each of them can fail.

`run` holds a candidate against its reference: the ticket's six gates, the invariants I-1 to I-5, and four of this
project's own for what those do not see. `kill_matrix` runs all of them against every fault of the catalogue.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import instruments
from aprlab.conversion.converter import convert, export
from aprlab.display.html import Cell, table
from aprlab.errors import AprlabError, FormatError, NumericError, UsageError
from aprlab.faults import FAULTS, convert_with, session_with, upstream
from aprlab.faults.base import Fault
from aprlab.formats import open_model
from aprlab.formats.raw import Piece, Seen, content_hash, look
from aprlab.formats.writing import write_text
from aprlab.inference.session import Generation, Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.instruments.self_test import InstrumentResult
from aprlab.instruments.summary_statistics import PERCENTILES, Statistics
from aprlab.model import names
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.decode_counts import decodings
from aprlab.published import QUESTION
from aprlab.quants import types
from aprlab.quants.types import TensorType
from aprlab.tracing.comparisons import compare_models
from aprlab.tracing.traces import trace

PROMPTS = (QUESTION, "Write a haiku about snow.")
MAX_TOKENS = 12
MATRIX_TOKENS = 6  # of an answer in the kill matrix: what is garbage or other shows by then
# Texts whose ids and whose way back a tokenizer has to get right; spaces, numbers, capitals, line ends, other scripts.
PROBES = (
    "What is 2+2?", "in 2026, 12345 days", "I'LL say: it's DON'T", "def f(x):\n    return x[1:-1]  # ok\n\n\n", "  two  spaces ",
    "日本の首都は東京です。", "2+2等于4。", "Größe, naïve, Привет", "🙂 tab\tand\r\nline", "<|im_start|>user\nhi<|im_end|>\n",
)  # fmt: skip
# How far statistics of a type's values may be from those of their source, as a share of their spread (upstream's figures).
TOLERANCE: dict[str, float] = {
    "F32": 0.0, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q6_K": 0.02, "Q5_K": 0.03, "Q5_0": 0.03, "Q5_1": 0.03, "Q4_K": 0.05,
    "Q4_0": 0.05, "Q4_1": 0.05, "AprQ4": 0.05, "AprQ8": 0.01, "Q3_K": 0.08, "Q2_K": 0.15,
}  # fmt: skip
SERIAL_TOLERANCE = 1e-3  # float32 sums in another order stay below 1e-5; 8-bit activations are at 1e-2


@dataclass(frozen=True, slots=True)
class GateResult:
    """What one gate says.

    Attributes:
        id, assertion: of the gate.
        passed: None where the gate rests on an instrument that failed its own test: no statement.
        figure: what was measured, or why the candidate could not even be measured.
        refused: the candidate was refused by the strict reader before the gate could look.
    """

    id: str
    passed: bool | None
    figure: str
    assertion: str
    refused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {n: getattr(self, n) for n in ("id", "passed", "figure", "assertion", "refused")}


class Gates(list[GateResult]):
    """What all gates say; a table in a notebook."""

    def _repr_html_(self) -> str:
        tones = {True: "good", False: "bad", None: "open"}
        words = {True: "passed", False: "failed", None: "void"}
        rows = [[r.id, Cell("refused" if r.refused else words[r.passed], tones[r.passed]), r.figure, r.assertion] for r in self]
        held = sum(r.passed is True for r in self)
        caption = Cell(f"{held} of {len(self)} gates passed", "good" if held == len(self) else "bad")
        return table(("gate", "", "figure", "what must hold"), rows, caption=caption)


# ── evidence ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Reference:
    """The side that is believed: a model, its session, its answers; everything is computed once, when first asked for."""

    def __init__(
        self,
        model: Model,
        session: Session | None,
        engine: str,
        prompts: Sequence[str],
        max_tokens: int,
        threads: int | None = None,
    ) -> None:
        self.model, self.engine, self.threads = model, engine, threads
        self.prompts, self.max_tokens = tuple(prompts), max_tokens
        self._session = session
        self._seen: dict[str, tuple[Statistics, int]] = {}
        self._hashes: dict[str, tuple[int, int]] = {}

    @cached_property
    def session(self) -> Session:
        return self._session if self._session is not None else Session(self.model, engine=self.engine, threads=self.threads)

    @property
    def raw(self) -> bool:
        """Both sides are given texts as they are, since this one has no chat template."""
        return self.session.wants_raw

    @cached_property
    def answers(self) -> list[Generation]:
        return [self.session.generate(p, max_tokens=self.max_tokens, raw=self.raw, keep_logits=True) for p in self.prompts]

    @cached_property
    def work(self) -> int:
        return decodes(self.session, self.raw)

    def hash(self, name: str) -> tuple[int, int]:
        if name not in self._hashes:
            self._hashes[name] = content_hash(self.model.tensors[name].raw)
        return self._hashes[name]

    def figures(self, name: str) -> tuple[Statistics, int]:
        """Statistics of a tensor's values, and their checksum."""
        if name not in self._seen:
            values = self.model.tensors[name].dequantise()
            self._seen[name] = instruments.statistics(values), instruments.checksum(values)
        return self._seen[name]


class CandidateFile:
    """A file that is not believed: as it stands (`seen`), and as the strict reader takes it (`model`, which may raise)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def seen(self) -> Seen:
        return look(self.path)

    @cached_property
    def model(self) -> Model:
        model = open_model(self.path)
        _ = model.config, model.tokenizer  # made when first asked for, and refused there
        return model

    @cached_property
    def named(self) -> dict[str, Piece]:
        """Pieces by the GGUF name that theirs stands for in the file's own naming."""
        naming = self.seen.dialect.naming if self.seen.format == "apr" else "raw"
        return {p.stated: p for p in self.seen.pieces if p.stated is not None and p.naming == naming}

    @cached_property
    def back(self) -> Model:
        """The file converted once more, opened: into GGUF, or, for types that GGUF lacks, into APR's other dialect."""
        with tempfile.TemporaryDirectory() as folder:  # the mapping outlives the name
            if self.model.format == "gguf":
                convert(self.model, Path(folder) / "back.apr")
                return open_model(Path(folder) / "back.apr")
            if any(t.type in (types.APR_Q4, types.APR_Q8) for t in self.model.tensors.values()):
                other = "realizar" if self.model.dialect.startswith("aprender") else "aprender"
                convert(self.model, Path(folder) / "back.apr", dialect=other)
                return open_model(Path(folder) / "back.apr")
            export(self.model, Path(folder) / "back.gguf")
            return open_model(Path(folder) / "back.gguf")


@dataclass(eq=False)
class Case:
    """A reference and a candidate: a file, and a session over it (its own, or one with faults).

    `origin` is what the reference was re-encoded from, where that was meant: F-ROSETTA-STATS-001 looks at it instead.
    """

    ref: Reference
    file: CandidateFile
    given: Session | None = None
    origin: Reference | None = None
    replaced: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @cached_property
    def session(self) -> Session:
        if self.given is not None:
            return self.given
        return Session(self.file.model, engine=self.ref.engine, threads=self.ref.threads)

    @cached_property
    def answers(self) -> list[Generation]:
        ref = self.ref
        return [self.session.generate(p, max_tokens=ref.max_tokens, raw=ref.raw, keep_logits=True) for p in ref.prompts]

    @property
    def source(self) -> Reference:
        """What a gate with a tolerance for types holds the candidate against."""
        return self.ref if self.origin is None else self.origin

    @cached_property
    def selftest(self) -> list[InstrumentResult]:
        return instruments.selftest(self.replaced)

    @cached_property
    def figures(self) -> dict[str, tuple[Statistics, int, TensorType]]:
        """Statistics and checksum of every tensor as the candidate's reader decodes it, and its type."""
        found = {}
        model = self.session.engine.model if self.given is not None else self.file.model
        for name, tensor in model.tensors.items():
            of = self.ref.model.tensors.get(name)
            alike = of is not None and tensor.content.as_stored and tensor.type is of.type and tensor.shape == of.shape
            if alike and np.array_equal(tensor.raw, of.raw):  # type: ignore[union-attr]
                found[name] = (*self.ref.figures(name), tensor.type)  # the same blocks, the same decoder
                continue
            values = tensor.dequantise()
            found[name] = (instruments.statistics(values), instruments.checksum(values), tensor.type)
        return found


def decodes(session: Session, raw: bool = False) -> int:
    """How many times a warm pass of one token decodes a tensor's blocks."""
    return sum(decodings(session.engine, session.config, session.prompt_tokens(QUESTION, raw=raw)[0]).values())


# ── the gates ─────────────────────────────────────────────────────────────────────────────────────────────────────

Look = Callable[[Case], tuple[bool, str]]


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate: what it asserts, how it looks, and the instruments that its word rests on."""

    id: str
    assertion: str
    look: Look
    rests_on: tuple[str, ...]


GATES: dict[str, Gate] = {}


def _gate(id: str, assertion: str, *rests_on: str) -> Callable[[Look], Look]:
    def keep(look: Look) -> Look:
        GATES[id] = Gate(id, assertion, look, rests_on)
        return look

    return keep


@_gate("F-GOLDEN-RULE-001", "convert(gguf) → inference == gguf inference", "comparison")
def _golden_tokens(case: Case) -> tuple[bool, str]:
    same = 0
    for prompt, a, b in zip(case.ref.prompts, case.ref.answers, case.answers, strict=True):
        if (a.tokens, a.text, a.stop) != (b.tokens, b.text, b.stop):
            return False, f"{prompt!r}: {a.text[:40]!r} ({a.stop}) became {b.text[:40]!r} ({b.stop})"
        same += len(a.tokens)
    return same > 0, f"{same} tokens of {len(case.ref.prompts)} answers are the same"


@_gate("F-GOLDEN-RULE-002", "converted tensor count matches the source's", "all-hold")
def _counts(case: Case) -> tuple[bool, str]:
    a, b = len(case.ref.model.tensors), len(case.file.seen.pieces)
    values_a = sum(t.size for t in case.ref.model.tensors.values())
    values_b = sum(math.prod(p.shape) for p in case.file.seen.pieces)
    return (a, values_a) == (b, values_b), f"{a} tensors of {values_a} values, {b} of {values_b}"


@_gate("F-GOLDEN-RULE-003", "no garbage in the converted model's output", "garbage")
def _no_garbage(case: Case) -> tuple[bool, str]:
    for prompt, answer in zip(case.ref.prompts, case.answers, strict=True):
        bad, reason = is_garbage(answer.text)
        if bad:
            return False, f"{prompt!r}: {answer.text[:40]!r}: {reason}"
    return True, f"{len(case.answers)} answers read like answers"


@_gate("F-ROSETTA-FP-001", "tensor checksums match, over the union of both sides", "checksum", "same")
def _checksums(case: Case) -> tuple[bool, str]:
    wanted, found = case.ref.model.tensors, case.file.named
    stray = len(case.file.seen.pieces) - len(found)
    missing = [n for n in wanted if n not in found]
    other = [n for n in wanted if n in found and found[n].hash != case.ref.hash(n)]
    extra = [n for n in found if n not in wanted]
    figure = f"{len(wanted)} tensors: {len(other)} other, {len(missing)} missing, {len(extra) + stray} unknown"
    first = next(iter([*other, *missing, *extra]), None)
    return not (missing or other or extra or stray), figure + (f", first {first}" if first else "")


@_gate("F-ROSETTA-STATS-001", "mean, std, min and max within the type's tolerance", "statistics")
def _within(case: Case) -> tuple[bool, str]:
    worst, at = 0.0, ""
    for name in case.source.model.tensors:
        if name not in case.figures:
            return False, f"{name} is missing"
        (a, _), (b, _, kind) = case.source.figures(name), case.figures[name]
        if b.nan or b.inf:
            return False, f"{name}: {b.nan} NaN, {b.inf} Inf"
        (mean, std, least, most), (mean_b, std_b, least_b, most_b) = _four(a), _four(b)
        spread, reach = std or 1.0, most - least or 1.0
        off = max(abs(mean - mean_b) / spread, abs(std - std_b) / spread)
        off = max(off, abs(least - least_b) / reach, abs(most - most_b) / reach)
        allowed = max(TOLERANCE[kind.name], 1e-6)
        if off / allowed > worst:
            worst, at = off / allowed, f"{name} ({kind.name}) is off by {off:.3g} of its spread, {allowed:g} allowed"
    return worst <= 1, at or f"{len(case.source.model.tensors)} tensors, none off"


def _four(seen: Statistics) -> tuple[float, float, float, float]:
    """Mean, std, min, max; NaN where there is not one finite value."""
    return tuple(float("nan") if v is None else v for v in (seen.mean, seen.std, seen.min, seen.max))  # type: ignore[return-value]


@_gate("F-APR-FORMAT-001", "dtype metadata matches the actual tensor data layout", "verify")
def _layout(case: Case) -> tuple[bool, str]:
    seen = case.file.seen
    if seen.problems:
        return False, str(seen.problems[0].message)
    by_content = {case.ref.hash(name): tensor for name, tensor in case.ref.model.tensors.items()}
    for piece in seen.pieces:
        fits = piece.fitting()
        if len(fits) != 1:
            held = [t.name for t in types.TYPES if t.fits(piece.shape, piece.size)]
            return False, f"{piece.name}: byte {piece.code}, {piece.size} bytes as {piece.shape}: {_or(held)} would fit"
        if fits[0].code != piece.code:
            return False, f"{piece.name}: {fits[0].name} goes by the byte {piece.code}, which is not its own"
        true = by_content.get(piece.hash)
        if true is not None and (true.type, true.shape) != (fits[0], piece.shape):
            return False, f"{piece.name}: labelled {fits[0].name} {piece.shape}, its bytes are {true.type.name} {true.shape}"
        due = case.ref.model.tensors.get(piece.stated or "")
        if due is not None and due.shape != piece.shape:
            return False, f"{piece.name}: dims {piece.shape}, {due.shape} is due"
    return True, f"{len(seen.pieces)} tensors obey the size law, each by one type with its own byte"


def _or(listed: Sequence[str]) -> str:
    return " or ".join(listed) if listed else "nothing"


@_gate("I-1", "round trip: converted back, every tensor, number and token is the source's", "same", "comparison")
def _round_trip(case: Case) -> tuple[bool, str]:
    found = compare_models(case.ref.model, case.file.back)
    return found.equal, found.summary


@_gate("I-2", "names are a bijection: one name for each tensor, and each name leads back", "same")
def _names(case: Case) -> tuple[bool, str]:
    seen = case.file.seen
    naming = seen.dialect.naming if seen.format == "apr" else "raw"
    written = [p.name for p in seen.pieces]
    due = {names.from_gguf(name, naming) for name in case.ref.model.tensors}
    strange, lost = [n for n in written if n not in due], sorted(due - set(written))
    twice = len(written) - len(set(written))
    crooked = [n for n in written if (g := names.to_gguf(n, naming)) is None or names.from_gguf(g, naming) != n]
    figure = f"{len(written)} names: {len(strange)} unknown, {len(lost)} missing, {twice} twice"
    return not (strange or lost or twice or crooked), figure + (f", first {(strange + lost)[0]}" if strange or lost else "")


@_gate("I-3", "an unknown dtype, name or key is an error, and there is none", "verify")
def _strict(case: Case) -> tuple[bool, str]:
    try:
        model = case.file.model
        model.check_values()
        Session(model, engine="reference", cache_weights=False)  # shapes against the config
        Qwen2Tokenizer(model.tokenizer)
    except AprlabError as error:
        return False, error.message
    return True, "the strict reader takes it"


@_gate("I-4", "per-tensor statistics are kept: percentiles, NaN; every value where the type is kept", "statistics", "checksum")
def _kept(case: Case) -> tuple[bool, str]:
    exact = 0
    for name, tensor in case.ref.model.tensors.items():
        if name not in case.figures:
            return False, f"{name} is missing"
        (a, sum_a), (b, sum_b, kind) = case.ref.figures(name), case.figures[name]
        if (a.count, a.nan, a.inf) != (b.count, b.nan, b.inf):
            return False, f"{name}: {a.count} values, {a.nan} NaN, {a.inf} Inf became {b.count}, {b.nan}, {b.inf}"
        if kind is tensor.type and sum_a != sum_b:
            return False, f"{name}: still {kind.name}, but other values"
        exact += sum_a == sum_b
        allowed = max(TOLERANCE[kind.name], 1e-6) * (a.std or 1.0)
        for p, x, y in zip(PERCENTILES, a.percentiles, b.percentiles, strict=True):
            if abs(x - y) > allowed:
                return False, f"{name}: percentile {p} moved from {x:.4g} to {y:.4g}"
    return True, f"{exact} of {len(case.ref.model.tensors)} tensors hold the same values"


@_gate("I-5", "tokenizer round trip: the same ids, the same text back, the same prompt, the same end", "same")
def _tokenizer(case: Case) -> tuple[bool, str]:
    a, b = case.ref.session, case.session
    for text in PROBES:
        ids, found = a.tokenizer.encode(text), b.tokenizer.encode(text)
        if ids != found:
            return False, f"{text!r}: {len(ids)} ids became {len(found)} others"
        if b.tokenizer.decode(ids) != a.tokenizer.decode(ids):
            return False, f"{text!r} comes back as {b.tokenizer.decode(ids)!r}"
    if a.wants_raw and not b.wants_raw:
        return False, "there is a chat template that the source has not"
    due = a.prompt_tokens(QUESTION, raw=case.ref.raw)
    try:
        prompt = b.prompt_tokens(QUESTION, raw=case.ref.raw)
    except UsageError as error:
        return False, error.message
    if due != prompt:
        return False, f"a prompt of {len(due)} tokens became {len(prompt)}{' others' * (len(due) == len(prompt))}"
    if a.tokenizer.eog != b.tokenizer.eog:
        return False, f"ends of an answer {sorted(a.tokenizer.eog)}, then {sorted(b.tokenizer.eog)}"
    return True, f"{len(PROBES)} texts and a prompt"


@_gate("A-LOGITS", "the same engine gives the same logits, bit for bit, at every step of the answers", "comparison")
def _logits(case: Case) -> tuple[bool, str]:
    steps = 0
    for prompt, a, b in zip(case.ref.prompts, case.ref.answers, case.answers, strict=True):
        if a.logits is None or b.logits is None:
            raise UsageError("the answers were given without their logits")
        if a.prompt_tokens != b.prompt_tokens:
            return False, f"{prompt!r}: other prompt tokens"
        for step, (x, y) in enumerate(zip(a.logits, b.logits, strict=False)):
            if not np.array_equal(x, y):
                far = float(np.linalg.norm(x - y) / (np.linalg.norm(x) or 1))
                return False, f"{prompt!r}, step {step}: off by {far:.3g} of their norm"
            steps += 1
        if len(a.logits) != len(b.logits):
            return False, f"{prompt!r}: {len(a.logits)} steps, then {len(b.logits)}"
    return steps > 0, f"{steps} steps, every logit the same"


@_gate("A-SERIAL", f"tokens together or one by one: logits within {SERIAL_TOLERANCE:g}", "comparison", "trace")
def _serial(case: Case) -> tuple[bool, str]:
    tokens = case.session.prompt_tokens(QUESTION, raw=case.ref.raw)[:6]
    together, single = (trace(case.session, tokens, "logits", chunk=chunk)["logits"].values for chunk in (None, 1))
    size = np.linalg.norm(together, axis=1)
    far = np.linalg.norm(together - single, axis=1) / np.where(size > 0, size, 1)
    at = int(np.argmax(far))
    return bool(np.max(far) <= SERIAL_TOLERANCE), f"off by {far[at]:.2g} of their norm at position {at}"


@_gate("A-WORK", "a warm pass decodes no more tensors than the reference's", "comparison")
def _work(case: Case) -> tuple[bool, str]:
    a, b = case.ref.work, decodes(case.session, case.ref.raw)
    return b <= a, f"{a} decoded, then {b}"


@_gate("A-SELFTEST", "every instrument tells known pairs apart")
def _selftest(case: Case) -> tuple[bool, str]:
    bad = [r for r in case.selftest if not r.ok]
    return not bad, "; ".join(f"{r.name} {r.detail}" for r in bad) or f"{len(case.selftest)} instruments"


def run(
    ref: Model | str | Path,
    cand: str | Path,
    session_ref: Session | None = None,
    session_cand: Session | None = None,
    *,
    engine: str = "reference",
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
    replaced: Mapping[str, Callable[..., Any]] | None = None,
    ids: Iterable[str] | None = None,
    requantised: str | None = None,
) -> Gates:
    """Hold a candidate file against its reference; every gate speaks, whatever the others say.

    Args:
        ref: the model that is believed.
        cand: the file that is not.
        session_ref, session_cand: to be asked instead of new ones over these files.
        engine: for those new ones; both sides run on the same.
        prompts, max_tokens: what both are asked, greedily.
        requantised: the type that the candidate was re-encoded to on purpose. The gates then demand what a right
            re-encoding gives, byte for byte; F-ROSETTA-STATS-001 holds it against the source itself.
        replaced: instruments to be replaced (see `instruments.selftest`); gates that rest on one that fails are void.
        ids: only these gates.

    Raises:
        UsageError, FormatError, UnsupportedError: the reference cannot be read, or the engine is not to be had.
    """
    model = ref if isinstance(ref, Model) else open_model(ref)
    if not Path(cand).is_file():
        raise UsageError("there is no such file", path=cand)
    origin = None
    if requantised is not None:
        origin = Reference(model, session_ref, engine, prompts, max_tokens)
        model, session_ref = _requantised(model, requantised), None
    reference = Reference(model, session_ref, engine, prompts, max_tokens)
    _ = reference.session  # what the believed side or its engine refuses is raised here: no fault of the candidate's
    return results(Case(reference, CandidateFile(Path(cand)), session_cand, origin, replaced or {}), ids)


def _requantised(model: Model, kind: str) -> Model:
    """What a right converter makes of a model that is re-encoded to `kind` on purpose."""
    with tempfile.TemporaryDirectory() as folder:  # the mapping outlives the name
        convert(model, Path(folder) / "requantised.apr", quantize=kind)
        return open_model(Path(folder) / "requantised.apr")


def results(case: Case, ids: Iterable[str] | None = None) -> Gates:
    """Every gate's word on a case, or only that of some."""
    void = instruments.void(case.selftest)
    said = Gates()
    for gate in GATES.values() if ids is None else [GATES[id] for id in ids]:
        if broken := void & set(gate.rests_on):
            word = GateResult(gate.id, None, f"void: {', '.join(sorted(broken))} failed", gate.assertion)
        else:
            word = _ask(gate, case)
        said.append(word)
    return said


def _ask(gate: Gate, case: Case) -> GateResult:
    try:
        passed, figure = gate.look(case)
    except NumericError as error:
        return GateResult(gate.id, False, error.message, gate.assertion)
    except AprlabError as error:
        return GateResult(gate.id, False, f"refused: {error.message}", gate.assertion, refused=True)
    return GateResult(gate.id, bool(passed), figure, gate.assertion)


# ── the kill matrix ───────────────────────────────────────────────────────────────────────────────────────────────

KILL, REFUSED, PASS, VOID = "kill", "refused", "pass", "void"


@dataclass(frozen=True, slots=True)
class Row:
    """One fault in one form against all gates.

    Attributes:
        fault: id; '' for the healthy control.
        form: ``file``, ``run`` or ``instrument``.
        layer: of the fault.
        cells: gate id -> `KILL` (looked and said no), `REFUSED` (could not look: the strict reader refuses the file),
            `PASS`, `VOID` (rests on a failed instrument).
        upstream: upstream's ten checks, stage -> passed; empty where not even its reader could load the file.
        figures: gate id -> what was measured.
    """

    fault: str
    form: str
    layer: str
    cells: dict[str, str]
    upstream: dict[str, bool]
    figures: dict[str, str] = field(repr=False)

    @property
    def killers(self) -> list[str]:
        """The gates that looked and said no."""
        return [id for id, cell in self.cells.items() if cell == KILL]


@dataclass(frozen=True)
class KillMatrix:
    """Gates × faults. `control` is the healthy conversion, for each source; it must pass everywhere."""

    rows: list[Row]
    control: list[Row]

    def kills(self, gate: str) -> list[Row]:
        """The rows that a gate kills."""
        return [row for row in self.rows if row.cells[gate] == KILL]

    def survivors(self) -> list[Row]:
        """Rows that no gate kills: there must be none."""
        return [row for row in self.rows if not row.killers]

    def idle(self) -> list[str]:
        """Gates that kill nothing: there must be none."""
        return [gate for gate in GATES if not self.kills(gate)]

    def upstream_kills(self) -> list[Row]:
        """Rows at which one of upstream's ten checks says no."""
        return [row for row in self.rows if row.upstream and not all(row.upstream.values())]


def kill_matrix(
    model: Model | str | Path,
    faults: Iterable[str | Fault] | None = None,
    *,
    engine: str = "reference",
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = MATRIX_TOKENS,
    progress: Callable[[str], None] = lambda id: None,
) -> KillMatrix:
    """Every fault, in each of its forms, against every gate.

    A fault that needs what `model` has not (other types, rows that are no multiple of 256) is tried on `sibling(model)`.

    Args:
        model: a healthy GGUF model; small, as everything is run on it.
        faults: ids or faults; all of the catalogue without it.
        progress: called with each fault's id before it is tried.
    """
    source = model if isinstance(model, Model) else open_model(model)
    chosen = [FAULTS[f] if isinstance(f, str) else f for f in (FAULTS if faults is None else faults)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = _Bench(source, folder / "plain.apr", engine, prompts, max_tokens)
        other: _Bench | None = None
        for fault in chosen:
            progress(fault.id)
            for form in [f for f, seam in (("file", fault.file_seam), ("run", fault.run_seam)) if seam] or ["instrument"]:
                try:
                    rows.append(plain.row(fault, form, folder))
                except _Unfit:
                    if other is None:
                        other = _Bench(sibling(source, folder), folder / "other.apr", engine, prompts, max_tokens)
                    rows.append(other.row(fault, form, folder))
        benches = [plain] if other is None else [plain, other]
        return KillMatrix(rows, [bench.control for bench in benches])


class _Unfit(Exception):
    """The fault changes nothing in this model."""


class _Bench:
    """One healthy source with its reference, and its healthy conversion."""

    def __init__(self, source: Model, path: Path, engine: str, prompts: Sequence[str], max_tokens: int) -> None:
        self.source = source
        self.ref = Reference(source, None, engine, prompts, max_tokens, threads=1)  # small matrices: more threads only wait
        convert_with(source, path, [])
        self.healthy = CandidateFile(path)
        self.selftest = instruments.selftest()

    @cached_property
    def control(self) -> Row:
        return self._judge("", "file", "", Case(self.ref, self.healthy))

    def row(self, fault: Fault, form: str, folder: Path) -> Row:
        if fault.instrument is not None:
            case = Case(self.ref, self.healthy, self.ref.session, replaced={fault.ruler: fault.instrument})
            case.__dict__["selftest"] = [
                instruments.show(instruments.INSTRUMENTS[r.name], fault.instrument) if r.name == fault.ruler else r
                for r in self.selftest
            ]
            case.__dict__["answers"] = self.ref.answers
            return self._judge(fault.id, form, fault.layer, case)
        try:
            if form == "file":
                path = folder / f"{fault.id}.apr"
                convert_with(self.source, path, [fault], force=True)
                case = Case(self.ref, CandidateFile(path))
            else:
                given = session_with(self.ref.session, [fault])
                given._cache, given._cached = None, []  # bit for bit: the same tokens have to go through the same passes
                case = Case(self.ref, self.healthy, given)
        except FormatError as error:
            case = Case(self.ref, _Refused(self.healthy.path, error))  # the session itself refuses to start
        except UsageError as error:
            if "changes nothing here" in str(error):
                raise _Unfit(fault.id) from None
            raise
        row = self._judge(fault.id, form, fault.layer, case)
        if form == "file":
            case.file.path.unlink(missing_ok=True)
        return row

    def _judge(self, id: str, form: str, layer: str, case: Case) -> Row:
        case.__dict__.setdefault("selftest", self.selftest)
        said = results(case)
        cells = {r.id: VOID if r.passed is None else PASS if r.passed else REFUSED if r.refused else KILL for r in said}
        return Row(id, form, layer, cells, _upstream(case, form), {r.id: r.figure for r in said})


class _Refused(CandidateFile):
    """A sound file that a faulty reader refuses."""

    def __init__(self, path: Path, error: FormatError) -> None:
        super().__init__(path)
        self.error = error

    @property
    def model(self) -> Model:
        raise self.error


def _upstream(case: Case, form: str) -> dict[str, bool]:
    """Upstream's ten checks on the same candidate, read by upstream's own reader where it is a file."""
    try:
        written = [p.name for p in case.file.seen.pieces]
        session = upstream.session(case.file.path, threads=1) if form == "file" else case.session
        tokens = session.tokenizer.encode("Hello")
        logits = trace(session, tokens[:1], "logits", positions="last")["logits"].values[-1]
        return upstream.ten_checks(written, tokens, logits)
    except (AprlabError, ValueError, IndexError, KeyError, ZeroDivisionError):
        return {}


# ── a sibling with everything that the embedded model lacks ───────────────────────────────────────────────────────

# tensor of the last layers but one -> type: one of each kind that a fault may need
_KINDS: dict[str, TensorType] = {
    "blk.{a}.attn_q.weight": types.Q8_0, "blk.{a}.attn_k.weight": types.Q4_0, "blk.{a}.attn_v.weight": types.Q5_K,
    "blk.{a}.attn_output.weight": types.Q5_1, "blk.{a}.ffn_gate.weight": types.BF16, "blk.{a}.ffn_up.weight": types.APR_Q8,
    "blk.{b}.attn_k.weight": types.Q3_K, "blk.{b}.attn_v.weight": types.Q2_K, "blk.{b}.attn_q.weight": types.Q4_1,
    "blk.{b}.attn_output.weight": types.APR_Q4, "blk.{b}.ffn_gate.weight": types.F16,
}  # fmt: skip


def sibling(model: Model, folder: Path) -> Model:
    """A model much like this one, with a tensor of every type and a feed-forward width that no 256-block divides.

    The 32 weakest neurons of every layer's feed-forward part are taken out, so that rows of ffn_down end in the middle
    of a 256-block; those become Q5_0, as llama.cpp has it. Written to `folder` as APR, since two types are APR's own.
    """
    config = model.config
    width = config.feed_forward_length - 32
    tensors: dict[str, Tensor] = {}
    middle = config.block_count // 2
    kinds = {name.format(a=middle, b=middle - 1): kind for name, kind in _KINDS.items()}
    for n in range(config.block_count):
        up, down = (model.tensor(f"blk.{n}.ffn_{part}.weight").dequantise() for part in ("up", "down"))
        strength = np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0)
        kept = np.sort(np.argsort(strength)[32:])
        for part in ("gate", "up"):
            tensor = model.tensor(f"blk.{n}.ffn_{part}.weight")
            tensors[tensor.name] = _made(tensor, np.ascontiguousarray(tensor.blocks()[kept]), (width, tensor.cols), tensor.type)
        name = f"blk.{n}.ffn_down.weight"
        tensors[name] = _encoded(model.tensor(name), np.ascontiguousarray(down[:, kept]), types.Q5_0)
    changed = {name: tensors.get(name, tensor) for name, tensor in model.tensors.items()}
    for name, kind in kinds.items():
        changed[name] = _encoded(changed[name], changed[name].dequantise(), kind)
    smaller = replace(config, feed_forward_length=width)
    draft = Model(
        path=model.path, format="apr", dialect="aprender", tensors=changed, metadata={},
        make_config=lambda: smaller, make_tokenizer=lambda: model.tokenizer,
    )  # fmt: skip
    convert(draft, folder / "sibling.apr")
    return open_model(folder / "sibling.apr")


def _made(tensor: Tensor, raw: np.ndarray, shape: tuple[int, ...], kind: TensorType) -> Tensor:
    return Tensor(tensor.name, kind, shape, raw.reshape(-1).view(np.uint8), replace(tensor.origin, offset=-1))


def _encoded(tensor: Tensor, values: np.ndarray, kind: TensorType) -> Tensor:
    from aprlab.quants import quantise

    return _made(tensor, np.ascontiguousarray(quantise(values, kind)), values.shape, kind)


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────

_SIGN = {KILL: "✗", REFUSED: "–", PASS: "", VOID: "?"}
_PAGE = """\
# The kill matrix

Which gate kills which fault. Every fault of the catalogue, in each form it has (*file*: a file with the fault, read by
healthy code; *run*: a healthy file, read or run by code with the fault), is held against every gate, on the embedded
model. A test computes this table anew: every fault has to die at some gate, every gate has to kill something, and the
healthy conversion has to pass them all.
Answers are cut at six tokens here: with longer ones the two text gates, GR-1 and GR-3, kill more.

✗ the gate looked and said no; – the gate could not look, since the strict reader refuses the file (I-3 is the gate that
counts this as a kill); ? the gate rests on an instrument that failed its own test, and says nothing. *Upstream* counts
how many of upstream's ten checks pass, with its own reader; – where not even that could load the file.

| gate | asserts | kills |
|---|---|---|
{gates}

{rows} rows, {faults} faults. Upstream's ten checks say no in {upstream} of the {loaded} rows that its reader loads.

| fault | form | layer | {heads} | upstream |
|---|---|---|{lines}|---|
{table}

![The same as a figure](kill-matrix.svg)

Faults that need what the embedded model has not (other types, rows that no 256-block divides) are tried on a sibling
made from it (`aprlab.gates.sibling`). This page is generated: `python -m aprlab.gates docs/kill-matrix.md`.
"""


def short(gate: str) -> str:
    """A gate's name at the head of a column."""
    plain = gate.removeprefix("F-").replace("ROSETTA-", "").replace("APR-", "")
    return plain.replace("GOLDEN-RULE-00", "GR-") if "GOLDEN" in plain else plain.removesuffix("-001")


def figure_cells(matrix: KillMatrix) -> dict[str, list[str]]:
    """What `aprlab.figures.kill_plot` draws: fault (and form) -> the word of each gate, in order."""
    return {f"{row.fault} ({row.form})": [row.cells[id] for id in GATES] for row in matrix.rows}


def markdown(matrix: KillMatrix) -> str:
    """`docs/kill-matrix.md`."""
    gates = [f"| {id} | {gate.assertion} | {len(matrix.kills(id))} |" for id, gate in GATES.items()]
    table = []
    for row in [*matrix.control, *matrix.rows]:
        passed = f"{sum(row.upstream.values())}/10" if row.upstream else "–"
        cells = " | ".join(_SIGN[row.cells[id]] for id in GATES)
        table.append(f"| {row.fault or 'none (healthy)'} | {row.form} | {row.layer} | {cells} | {passed} |")
    return _PAGE.format(
        gates="\n".join(gates), rows=len(matrix.rows), faults=len({row.fault for row in matrix.rows}),
        upstream=len(matrix.upstream_kills()), loaded=sum(bool(row.upstream) for row in matrix.rows),
        heads=" | ".join(short(id) for id in GATES), lines="|".join("---" for _ in GATES), table="\n".join(table),
    )  # fmt: skip


__all__ = [
    "GATES", "PROMPTS", "Gate", "GateResult", "KillMatrix", "Row", "figure_cells", "kill_matrix", "markdown", "run", "sibling",
]  # fmt: skip

if __name__ == "__main__":
    import sys

    import matplotlib as mpl
    from matplotlib.figure import Figure

    from aprlab import figures, paths

    page = Path(sys.argv[1])
    found = kill_matrix(paths.embedded_model(), progress=lambda id: print(id, file=sys.stderr))
    write_text(page, markdown(found))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aprlab"}):
        axes = figures.kill_plot(figure_cells(found), [short(id) for id in GATES])
        assert isinstance(axes.figure, Figure)
        axes.figure.savefig(page.with_suffix(".svg"), metadata={"Date": None, "Creator": None}, bbox_inches="tight")
