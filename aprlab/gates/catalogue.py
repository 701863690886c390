"""The gates: the ticket's six, the invariants I-1 to I-5, and four of this project's own for what those do not see.

A gate is one function. It gets a case, and of the instruments those that it names: it cannot measure with another.
To add one, write it here with its codes in `aprlab.gates.words`; the kill matrix shows whether it kills anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprlab.errors import AprlabError, UsageError
from aprlab.formats.gguf import pack_field
from aprlab.formats.gguf_record import header_of
from aprlab.formats.identity import file_only
from aprlab.formats.raw import Piece
from aprlab.gates.evidence import GateCase, as_bytes, decodes
from aprlab.gates.results import GateFinding, fails, holds
from aprlab.inference.session import Generation, Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.instruments.self_test import InstrumentSet
from aprlab.instruments.summary_statistics import PERCENTILES, Statistics
from aprlab.model import names
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.model import Model
from aprlab.published import QUESTION
from aprlab.quants import types
from aprlab.quants.bounds import LOST
from aprlab.quants.types import TensorType
from aprlab.tracing.comparisons import compare_models
from aprlab.tracing.traces import trace

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
QUOTED = 40  # characters of an answer that a figure shows


def tolerance(kind: TensorType) -> float:
    """How far statistics of values held in this type may be off; of types that upstream has no figure for, what a row loses."""
    return TOLERANCE[kind.name] if kind.name in TOLERANCE else LOST.get(kind.name, 0.0)


GateLook = Callable[[GateCase, InstrumentSet], GateFinding]


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate: what it asserts, how it looks, the instruments that it measures with, and whether a model has to run for it."""

    id: str
    assertion: str
    look: GateLook
    rests_on: tuple[str, ...]
    runs: bool = False


GATES: dict[str, Gate] = {}


def _gate(id: str, assertion: str, *rests_on: str, runs: bool = False) -> Callable[[GateLook], GateLook]:
    def keep(look: GateLook) -> GateLook:
        GATES[id] = Gate(id, assertion, look, rests_on, runs)
        return look

    return keep


# ── of the ticket ─────────────────────────────────────────────────────────────────────────────────────────────────


@_gate("F-GOLDEN-RULE-001", "convert(gguf) → inference == gguf inference", "comparison", runs=True)
def _golden_tokens(case: GateCase, tools: InstrumentSet) -> GateFinding:
    tokens = 0
    for prompt, a, b in zip(case.ref.prompts, case.ref.answers, case.answers, strict=True):
        if not tools["comparison"](*_as_long(*(as_bytes((said.tokens, said.text, said.stop)) for said in (a, b)))).equal:
            return fails(
                "gate.answer-differs", prompt=prompt, expected=a.text[:QUOTED], expected_stop=a.stop,
                found=b.text[:QUOTED], found_stop=b.stop,
            )  # fmt: skip
        tokens += len(a.tokens)
    if not tokens:
        return fails("gate.answers-empty", answers=len(case.ref.prompts))
    return holds("gate.answers-same", tokens=tokens, answers=len(case.ref.prompts))


def _as_long(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with zeros behind, up to one length; the bytes of `as_bytes` hold no zeros of their own."""
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))), np.pad(b, (0, size - len(b)))


@_gate("F-GOLDEN-RULE-002", "converted tensor count matches the source's", "all-hold")
def _counts(case: GateCase, tools: InstrumentSet) -> GateFinding:
    a, b = len(case.ref.model.tensors), len(case.file.seen.pieces)
    values_a = sum(t.size for t in case.ref.model.tensors.values())
    values_b = sum(math.prod(p.shape) for p in case.file.seen.pieces)
    paired = [n < a and n < b for n in range(max(a, b))]  # every place of either list has one in the other
    same = tools["all-hold"]([*paired, values_a == values_b])
    counted = {"expected": a, "expected_values": values_a, "found": b, "found_values": values_b}
    return holds("gate.counts-same", **counted) if same else fails("gate.counts-differ", **counted)


@_gate("F-GOLDEN-RULE-003", "no garbage in the converted model's output", "garbage", runs=True)
def _no_garbage(case: GateCase, tools: InstrumentSet) -> GateFinding:
    for prompt, answer in zip(case.ref.prompts, case.answers, strict=True):
        if tools["garbage"](answer.text):
            reason = is_garbage(answer.text)[1]
            return fails("gate.garbage", prompt=prompt, text=answer.text[:QUOTED], reason=reason)
    return holds("gate.no-garbage", answers=len(case.answers))


@_gate("F-ROSETTA-FP-001", "tensor checksums match, over the union of both sides", "checksum", "same")
def _checksums(case: GateCase, tools: InstrumentSet) -> GateFinding:
    checksum, named = tools["checksum"], case.file.named
    expected = {name: as_bytes(case.ref.of_blocks(checksum, name)) for name in case.ref.model.tensors}
    found = {name: as_bytes(checksum(piece.raw)) for name, piece in named.items()}
    stray = len(case.file.seen.pieces) - len(named)
    nameless = {f"{n} of {stray} without a name of their own": as_bytes(n) for n in range(stray)}
    missing = [n for n in expected if n not in found]
    other = [n for n in expected if n in found and not np.array_equal(found[n], expected[n])]
    extra = [n for n in found if n not in expected]
    counted = {
        "tensors": len(expected), "other": len(other), "missing": len(missing), "unknown": len(extra) + stray,
        "first": next(iter([*other, *missing, *extra]), None),
    }  # fmt: skip
    if tools["same"](expected, found | nameless):
        return holds("gate.checksums-same", **counted)
    return fails("gate.checksums-differ", **counted)


@_gate("F-ROSETTA-STATS-001", "mean, std, min and max within the type's tolerance", "statistics")
def _within(case: GateCase, tools: InstrumentSet) -> GateFinding:
    worst, at = 0.0, dict[str, Any]()
    for name in case.source.model.tensors:
        if name not in case.tensors:
            return fails("gate.tensor-missing", tensor=name)
        a, b = case.source.of_values(tools["statistics"], name), case.of_values(tools["statistics"], name)
        kind = case.tensors[name].type
        if b.nan or b.inf:
            return fails("gate.values-not-finite", tensor=name, nan=b.nan, inf=b.inf)
        off, allowed = _far(a, b), max(tolerance(kind), 1e-6)
        if off / allowed > worst:
            worst, at = off / allowed, {"tensor": name, "type": kind.name, "off": off, "allowed": allowed}
    if not at:
        return holds("gate.statistics-same", tensors=len(case.source.model.tensors))
    return holds("gate.statistics-within", **at) if worst <= 1 else fails("gate.statistics-off", **at)


def _far(a: Statistics, b: Statistics) -> float:
    """How far mean, std, min and max are apart, as a share of the spread or of the reach; NaN without finite values."""
    (mean, std, least, most), (mean_b, std_b, least_b, most_b) = _four(a), _four(b)
    spread, reach = std or 1.0, most - least or 1.0
    off = max(abs(mean - mean_b) / spread, abs(std - std_b) / spread)
    return max(off, abs(least - least_b) / reach, abs(most - most_b) / reach)


def _four(seen: Statistics) -> tuple[float, float, float, float]:
    """Mean, std, min, max; NaN where there is not one finite value."""
    return tuple(float("nan") if v is None else v for v in (seen.mean, seen.std, seen.min, seen.max))  # type: ignore[return-value]


@_gate("F-APR-FORMAT-001", "dtype metadata matches the actual tensor data layout", "verify")
def _layout(case: GateCase, tools: InstrumentSet) -> GateFinding:
    """The strict reader vouches for container and size law; a label that obeys the law may still be wrong."""
    seen, sound = case.file.seen, case.file.of_file(tools["verify"])
    if seen.problems and not sound:
        problem = seen.problems[0]
        return fails("gate.file-problem", error=problem.code, message=str(problem.message))
    for piece in seen.pieces:
        if not sound and len(piece.fitting()) != 1:
            fit = [t.name for t in types.TYPES if t.fits(piece.shape, piece.size)]
            return fails("gate.size-law", tensor=piece.name, byte=piece.code, size=piece.size, shape=piece.shape, fit=fit)
        if wrong := _wrong_label(case, piece):
            return wrong
    return holds("gate.layout-holds", tensors=len(seen.pieces))


def _wrong_label(case: GateCase, piece: Piece) -> GateFinding | None:
    """What is wrong with the label of a tensor that obeys the size law."""
    fits = piece.fitting()
    if len(fits) == 1:
        if fits[0].code != piece.code:
            return fails("gate.byte-of-another-type", tensor=piece.name, type=fits[0].name, byte=piece.code)
        true = case.ref.by_content.get(piece.hash)
        if true is not None and (true.type, true.shape) != (fits[0], piece.shape):
            return fails(
                "gate.label-of-another-type", tensor=piece.name, found=fits[0].name, found_shape=piece.shape,
                expected=true.type.name, expected_shape=true.shape,
            )  # fmt: skip
    expected = case.ref.model.tensors.get(piece.stated or "")
    if expected is not None and expected.shape != piece.shape:
        return fails("gate.dims-differ", tensor=piece.name, found=piece.shape, expected=expected.shape)
    return None


# ── invariants ────────────────────────────────────────────────────────────────────────────────────────────────────


@_gate("I-1", "round trip: converted back, every tensor, number and token is the source's", "same")
def _round_trip(case: GateCase, tools: InstrumentSet) -> GateFinding:
    back = case.file.back
    compared = compare_models(case.ref.model, back)  # says what differs; whether anything does is the instrument's word
    counted = {
        "compared": len(compared.rows), "same": sum(bool(row["equal"]) for row in compared.rows),
        "first": None if compared.first is None else compared.rows[compared.first]["what"],
    }  # fmt: skip
    if tools["same"](_contents(case.ref.model), _contents(back)):
        return holds("gate.round-trip-same", **counted)
    return fails("gate.round-trip-differs", **counted)


def _contents(model: Model) -> dict[str, np.ndarray]:
    """Everything in a model by name: tensors' labels and raw bytes, config values, parts of the tokenizer."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.tensors.items():
        found |= {f"{name} is": as_bytes((tensor.type.name, tensor.shape)), name: tensor.raw}
    if file_only(model) is not None:
        return found | {f"key {key}": as_bytes((f.type_name, pack_field(f))) for key, f in header_of(model).fields.items()}
    for part, of in (("config", ModelConfig), ("tokenizer", TokenizerData)):
        record = getattr(model, part)
        found |= {f"{part}.{field}": as_bytes(getattr(record, field)) for field in of.__dataclass_fields__}
    return found


@_gate("I-2", "names are a bijection: one name for each tensor, and each name leads back", "same")
def _names(case: GateCase, tools: InstrumentSet) -> GateFinding:
    naming = case.file.naming
    written = Counter(p.name for p in case.file.seen.pieces)
    if case.unrun is not None:  # GGUF's names are kept
        expected, found = {n: as_bytes(n) for n in case.ref.model.tensors}, {n: as_bytes(n) for n in written}
    else:
        expected = {names.from_gguf(name, naming): as_bytes(name) for name in case.ref.model.tensors}
        found = {name: as_bytes(names.to_gguf(name, naming)) for name in written}
    repeated = {f"{name}, {n} more": as_bytes(n) for name, count in written.items() if (n := count - 1)}
    strange, lost = [n for n in written if n not in expected], sorted(expected.keys() - written.keys())
    counted = {
        "names": written.total(), "unknown": sum(written[n] for n in strange), "missing": len(lost),
        "twice": written.total() - len(written), "first": next(iter(strange + lost), None),
    }  # fmt: skip
    if tools["same"](expected, found | repeated):
        return holds("gate.names-lead-back", **counted)
    return fails("gate.names-differ", **counted)


@_gate("I-3", "an unknown dtype, name or key is an error, and there is none", "verify")
def _strict(case: GateCase, tools: InstrumentSet) -> GateFinding:
    try:
        model = case.file.model
        if not case.file.of_file(tools["verify"]):
            model.check_values()  # says which
            return fails("gate.file-not-sound")
        if case.unrun is not None:
            return holds("gate.strict-reader-takes")
        Session(model, engine="reference", cache_weights=False)  # shapes against the config
        Qwen2Tokenizer(model.tokenizer, model.path)
    except AprlabError as error:
        return fails("gate.strict-reader-refuses", error=error.code, message=error.message)
    return holds("gate.strict-reader-takes")


@_gate("I-4", "per-tensor statistics are kept: percentiles, NaN; every value where the type is kept", "statistics", "checksum")
def _kept(case: GateCase, tools: InstrumentSet) -> GateFinding:
    exact = 0
    statistics, checksum = tools["statistics"], tools["checksum"]
    for name, tensor in case.ref.model.tensors.items():
        if name not in case.tensors:
            return fails("gate.tensor-missing", tensor=name)
        a, b, kind = case.ref.of_values(statistics, name), case.of_values(statistics, name), case.tensors[name].type
        if (a.count, a.nan, a.inf) != (b.count, b.nan, b.inf):
            return fails(
                "gate.value-counts-differ", tensor=name, expected=a.count, expected_nan=a.nan, expected_inf=a.inf,
                found=b.count, found_nan=b.nan, found_inf=b.inf,
            )  # fmt: skip
        same = case.ref.of_values(checksum, name) == case.of_values(checksum, name)
        if kind is tensor.type and not same:
            return fails("gate.values-changed", tensor=name, type=kind.name)
        exact += same
        allowed = max(tolerance(kind), 1e-6) * (a.std or 1.0)
        for p, x, y in zip(PERCENTILES, a.percentiles, b.percentiles, strict=True):
            if abs(x - y) > allowed:
                return fails("gate.percentile-moved", tensor=name, percentile=p, expected=x, found=y)
    return holds("gate.statistics-kept", same=exact, tensors=len(case.ref.model.tensors))


@_gate("I-5", "tokenizer round trip: the same ids, the same text back, the same prompt, the same end", "same", runs=True)
def _tokenizer(case: GateCase, tools: InstrumentSet) -> GateFinding:
    a, b, same = case.ref.session, case.session, tools["same"]
    for text in PROBES:
        ids, found = a.tokenizer.encode(text), b.tokenizer.encode(text)
        if not same({"ids": as_bytes(ids)}, {"ids": as_bytes(found)}):
            return fails("gate.ids-differ", text=text, expected=len(ids), found=len(found))
        back, theirs = a.tokenizer.decode(ids), b.tokenizer.decode(ids)
        if not same({"text": as_bytes(back)}, {"text": as_bytes(theirs)}):
            return fails("gate.text-differs", text=text, found=theirs)
    expected = _habits(a) | {"prompt": as_bytes(a.prompt_tokens(QUESTION, raw=case.ref.raw))}
    habits, refusal = _habits(b), None
    try:
        habits["prompt"] = as_bytes(b.prompt_tokens(QUESTION, raw=case.ref.raw))
    except UsageError as error:
        refusal = error  # what the candidate cannot do has no entry
    return holds("gate.tokenizer-same", texts=len(PROBES)) if same(expected, habits) else _other_habits(case, refusal)


def _habits(session: Session) -> dict[str, np.ndarray]:
    """Whether a session has a chat template, and how it knows the end of an answer."""
    ends = {"ends": as_bytes(sorted(session.tokenizer.eog))}
    return ends if session.wants_raw else ends | {"template": as_bytes(True)}


def _other_habits(case: GateCase, refusal: UsageError | None) -> GateFinding:
    """What differs first."""
    a, b = case.ref.session, case.session
    if a.wants_raw and not b.wants_raw:
        return fails("gate.template-unexpected")
    if refusal is not None:
        return fails("gate.prompt-refused", error=refusal.code, message=refusal.message)
    expected, found = (session.prompt_tokens(QUESTION, raw=case.ref.raw) for session in (a, b))
    if len(expected) != len(found):
        return fails("gate.prompt-length-differs", expected=len(expected), found=len(found))
    if expected != found:
        return fails("gate.prompt-ids-differ", tokens=len(expected))
    return fails("gate.ends-differ", expected=sorted(a.tokenizer.eog), found=sorted(b.tokenizer.eog))


# ── of this project ───────────────────────────────────────────────────────────────────────────────────────────────


@_gate("A-LOGITS", "the same engine gives the same logits, bit for bit, at every step of the answers", "comparison", runs=True)
def _logits(case: GateCase, tools: InstrumentSet) -> GateFinding:
    steps = 0
    for prompt, a, b in zip(case.ref.prompts, case.ref.answers, case.answers, strict=True):
        expected, found = _kept_logits(a), _kept_logits(b)
        if a.prompt_tokens != b.prompt_tokens:
            return fails("gate.prompt-tokens-differ", prompt=prompt)
        for step, (x, y) in enumerate(zip(expected, found, strict=False)):
            compared = tools["comparison"](x, y)
            if not compared.equal:
                return fails("gate.logits-differ", prompt=prompt, step=step, off=compared.rel_l2)
            steps += 1
        if len(expected) != len(found):
            return fails("gate.steps-differ", prompt=prompt, expected=len(expected), found=len(found))
    return holds("gate.logits-same", steps=steps) if steps > 0 else fails("gate.no-steps")


def _kept_logits(answer: Generation) -> Sequence[np.ndarray]:
    if answer.logits is None:
        raise UsageError("the answers were given without their logits", code="gates.no-logits")
    return list(answer.logits)


@_gate("A-SERIAL", f"tokens together or one by one: logits within {SERIAL_TOLERANCE:g}", "comparison", runs=True)
def _serial(case: GateCase, tools: InstrumentSet) -> GateFinding:
    tokens = case.session.prompt_tokens(QUESTION, raw=case.ref.raw)[:6]
    together, single = (trace(case.session, tokens, "logits", chunk=chunk)["logits"].values for chunk in (None, 1))
    finite = np.isfinite(together).all(axis=1) & np.isfinite(single).all(axis=1)
    if not finite.all():
        return fails("gate.logits-not-finite", position=int(np.argmin(finite)))
    far = [tools["comparison"](x, y).rel_l2 for x, y in zip(together, single, strict=True)]
    at = int(np.argmax(far))
    if float(np.max(far)) <= SERIAL_TOLERANCE:
        return holds("gate.serial-same", off=far[at], position=at)
    return fails("gate.serial-differs", off=far[at], position=at)


@_gate("A-WORK", "a warm pass decodes no more tensors than the reference's", "comparison", runs=True)
def _work(case: GateCase, tools: InstrumentSet) -> GateFinding:
    a, b = case.ref.work, decodes(case.session, case.ref.raw)
    if b < a or tools["comparison"](np.array([a]), np.array([b])).equal:
        return holds("gate.work-same", expected=a, found=b)
    return fails("gate.more-work", expected=a, found=b)


@_gate("A-SELFTEST", "every instrument distinguishes known pairs")
def _selftest(case: GateCase, tools: InstrumentSet) -> GateFinding:
    bad = [result for result in case.selftest if not result.ok]
    if not bad:
        return holds("gate.instruments-hold", instruments=len(case.selftest))
    return fails("gate.instruments-fail", instruments=[r.name for r in bad], details=[f"{r.name} {r.detail}" for r in bad])
