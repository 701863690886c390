"""Whether one file, with nothing to compare it with, speaks: it is run on its own tokenizer and template, and measured.

Nats per token on a text of several languages and code and on a short conversation, greedy answers, the same logits
together and one by one, a long context next to a short one, everything finite. What is allowed was calibrated, see
`docs/peel.md`. A model of an unknown kind is never called broken for its language alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from aprlab import paths
from aprlab.architectures import forward
from aprlab.engines.choice import is_small
from aprlab.errors import BROKEN, AprlabError, FormatError, NumericError
from aprlab.formats import gguf
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.onion.verdict import Finding
from aprlab.onion.words import Mechanism, refused
from aprlab.published import QUESTION, known_models
from aprlab.tracing.comparisons import log_softmax

State = Literal["healthy", "suspect", "broken", "unproved"]

QUESTIONS = (QUESTION, "What is the capital of Japan?", "Write a Python function that adds two numbers.")
ANSWER = 20  # tokens of each answer, at most
LONG = 1200  # tokens of the long context, at most: the text twice
STEP = 128  # tokens a pass: logits of so many rows are in memory at once
SERIAL_TOLERANCE = 1e-3  # as gate A-SERIAL: float32 sums in another order stay below 1e-5, 8-bit activations are at 1e-2


@dataclass(frozen=True)
class Limits:
    """Nats per token up to which a model of some kind is healthy, and from which on it is broken; between, suspect.

    Attributes:
        talk: on the answers of the conversation.
        text: on the text; None where the kind knows no such texts.
        again: on a text that it has just read.
    """

    talk: tuple[float, float]
    text: tuple[float, float] | None = None
    again: tuple[float, float] | None = None

    def loosened(self, factor: float) -> Limits:
        """What is allowed of a file with few bits a weight."""
        text = None if self.text is None else (self.text[0] * factor, self.text[1] * factor)
        return Limits((self.talk[0] * factor, self.talk[1]), text, self.again)


@cache
def _measured() -> dict[str, Any]:
    """The table of limits, `data/health.toml`."""
    with open(paths.data_dir() / "health.toml", "rb") as file:
        return tomllib.load(file)


def limits_of(kind: str | None, bits: float) -> Limits:
    """What is allowed of a model of this kind.

    Args:
        kind: ``embedded``, the name of a published model, or None.
        bits: that a weight of a matrix has on average.
    """
    table = _measured()
    row = table["unknown" if kind is None else kind if kind in table else "published"]
    pairs = {key: (value["healthy"], value["broken"]) for key, value in row.items() if isinstance(value, dict)}
    limits = Limits(**pairs)
    return limits.loosened(row["coarse"]) if bits < table["coarse_bits"] else limits


@dataclass
class Health:
    """What a run alone says of a file.

    Attributes:
        state: what follows from the tests.
        figures: of every test, plain data.
        findings: tests that did not pass.
    """

    state: State = "healthy"
    figures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def fail(self, state: State, mechanism: Mechanism, sure: float, **evidence: Any) -> None:
        """A test that did not pass; the worst state stays."""
        order: tuple[State, ...] = ("healthy", "unproved", "suspect", "broken")
        self.state = max(self.state, state, key=order.index)
        self.findings.append(Finding(mechanism.layer, None, [], mechanism, evidence, sure))


def examine(session: Session, tell: Callable[[str], None] = lambda test: None) -> Health:
    """Run a file alone and judge it.

    Args:
        session: over the file, opened strictly.
        tell: called with the name of each test before it runs.
    """
    health = Health()
    kind, bits = kind_of(session.config), bits_of(session.model)
    limits = limits_of(kind, bits)
    health.figures |= {"kind": kind, "bits": round(bits, 2)}
    tests: dict[str, Callable[[], None]] = {
        "conversation": lambda: _talk(session, limits, health),
        "answers": lambda: _answers(session, kind, health),
        "text": lambda: _text(session, limits, health),  # the longest, and needed only where the others found nothing
    }
    for name, test in tests.items():
        if name == "text" and health.state == "broken":
            break
        tell(name)
        try:
            test()
        except NumericError as error:
            health.fail("broken", refused(error, "forward.not-finite"), 1.0)
            break
        except BROKEN as error:
            words = error if isinstance(error, AprlabError) else FormatError(str(error), code="onion.does-not-run")
            health.fail("broken", refused(words, "forward.refused"), 1.0)
            break
    return health


def kind_of(config: ModelConfig) -> str | None:
    """Which known kind of model has these sizes: ``embedded``, the name of a published one, or None."""
    names = ("block_count", "embedding_length", "feed_forward_length")
    for name, model in known_models().items():
        if all(model.config[key] == getattr(config, key) for key in names):
            return name
    own = _embedded_config()
    return "embedded" if all(getattr(own, key) == getattr(config, key) for key in (*names, "vocab_size")) else None


def bits_of(model: Model) -> float:
    """Bits that a weight of a matrix has on average in the file."""
    matrices = [t for t in model.tensors.values() if len(t.shape) > 1]
    return 8 * sum(t.nbytes for t in matrices) / max(sum(t.size for t in matrices), 1)


def allowed(model: Model) -> float:
    """Nats per token of the conversation up to which a model is healthy."""
    return limits_of(kind_of(model.config), bits_of(model)).talk[0]


@cache
def _embedded_config() -> ModelConfig:
    return gguf.open_model(paths.embedded_model()).config


@cache
def parts() -> tuple[str, tuple[str, ...]]:
    """The text, and the lines of the conversation: questions and answers in turn."""
    whole = (paths.data_dir() / "health-text.txt").read_text(encoding="utf-8")
    text, _, talk = whole.partition("== text\n")[2].partition("== talk\n")
    return text, tuple(talk.splitlines())


# ── the tests ─────────────────────────────────────────────────────────────────────────────────────────────────────


def surprises(session: Session, ids: Sequence[int]) -> np.ndarray:
    """-log p of each token but the first, float64 ``(len(ids) - 1,)``, each after all that precede it.

    Raises:
        NumericError: logits that are not finite.
    """
    engine, config = session.engine, session.config
    cache = engine.new_cache(config, len(ids))
    found = []
    for start in range(0, len(ids) - 1, STEP):
        some = ids[start : min(start + STEP, len(ids) - 1)]
        logits = engine.to_numpy(forward(engine, config, some, cache))
        if not np.isfinite(logits).all():
            raise NumericError(
                f"logits at positions {start} to {start + len(some) - 1} are not finite",
                code="session.logits-not-finite", path=session.model.path,
            )  # fmt: skip
        expected = np.asarray(ids[start + 1 : start + 1 + len(some)])
        found.append(-log_softmax(logits)[np.arange(len(some)), expected])
    return np.concatenate(found)


def conversation(session: Session, answers: int | None = None) -> np.ndarray:
    """Surprise of each token of the answers of the conversation, float64 ``(tokens,)``: the one measure of health.

    Args:
        session: over the file.
        answers: only the first so many, for a quick look; None takes all.

    Raises:
        NumericError: logits that are not finite.
    """
    lines = parts()[1][: None if answers is None else 2 * answers]
    if session.wants_raw:
        ids = session.raw_tokens("\n".join(lines))
    else:
        turns = [{"role": "assistant" if n % 2 else "user", "content": line} for n, line in enumerate(lines)]
        ids = session.chat_tokens(turns)
    ids = ids[: session.config.context_length]
    each = surprises(session, ids)
    mask = np.zeros(len(each), bool)
    at = 0
    for answer in lines[1::2]:
        wanted = session.tokenizer.encode(answer, parse_special=False)
        place = next((n for n in range(at, len(ids) - len(wanted) + 1) if ids[n : n + len(wanted)] == wanted), None)
        if place is not None and wanted:
            mask[max(place - 1, 0) : place - 1 + len(wanted)] = True
            at = place + len(wanted)
    return each[mask] if mask.any() else each


_TOKENIZERS: list[Qwen2Tokenizer] = []  # the last one that was built: variants of one file have the same


def _tokenizer(model: Model) -> Qwen2Tokenizer:
    """The tokenizer of a model, built once for files that differ in their weights alone."""
    if not (_TOKENIZERS and _TOKENIZERS[0].data == model.tokenizer):
        _TOKENIZERS[:] = [Qwen2Tokenizer(model.tokenizer, model.path)]
    return _TOKENIZERS[0]


def spoken(
    model: Model | AprlabError, engine: str | None = None, threads: int | None = None, answers: int | None = None
) -> np.ndarray | None:
    """`conversation` over a model; None where it does not run or is not finite."""
    if isinstance(model, AprlabError):
        return None
    try:
        session = Session(model, engine=engine, threads=threads, tokenizer=_tokenizer(model))
        with np.errstate(all="ignore"):
            return conversation(session, answers)
    except BROKEN:
        return None


def nats(
    model: Model | AprlabError, engine: str | None = None, threads: int | None = None, answers: int | None = None
) -> float:
    """Mean of `conversation` over a model; infinite where it does not run or is not finite."""
    each = spoken(model, engine, threads, answers)
    found = float("inf") if each is None else float(each.mean())
    return found if np.isfinite(found) else float("inf")


def _talk(session: Session, limits: Limits, health: Health) -> None:
    each = conversation(session)
    found = float(each.mean())
    health.figures["conversation"] = {"nats": round(found, 3), "tokens": len(each), "limit": limits.talk[0]}
    _judge(health, "conversation", found, limits.talk)


def _text(session: Session, limits: Limits, health: Health) -> None:
    once = session.tokenizer.encode(parts()[0], parse_special=False)
    room = session.config.context_length
    again = limits.text is not None and room > 2 * len(once) and not is_small(session.model)
    ids = (once * (LONG // len(once) + 1))[: min(LONG, room)] if again else once[: min(room, 2 * STEP)]
    each = surprises(session, ids)
    first = each[: len(once) - 1]
    quarters = [round(float(part.mean()), 3) for part in np.array_split(first, 4)]
    figures: dict[str, Any] = {"nats": round(float(first.mean()), 3), "by_position": quarters, "tokens": len(first)}
    if limits.text is not None:
        figures["limit"] = limits.text[0]
    health.figures["text"] = figures
    if limits.text is not None:
        _judge(health, "text", float(first.mean()), limits.text)
    if again and limits.again is not None:
        last = each[-min(len(once), len(each) - len(once)) :]
        health.figures["long context"] = {"nats": round(float(last.mean()), 3), "tokens": len(ids), "limit": limits.again[0]}
        _judge(health, "a text that it has just read", float(last.mean()), limits.again)


def _judge(health: Health, part: str, found: float, limits: tuple[float, float]) -> None:
    most, broken = limits
    if found <= most:
        return
    figures = {"part": part, "nats": round(found, 2), "allowed": most}
    if health.figures["kind"] is None:
        health.fail("unproved", Mechanism("forward.language-unknown", figures), 0.3)
    elif found > broken:
        health.fail("broken", Mechanism("forward.language", figures), 0.95)
    else:
        health.fail("suspect", Mechanism("forward.language", figures), 0.6)


def _answers(session: Session, kind: str | None, health: Health) -> None:
    said = {}
    garbage = {}
    for n, ids in enumerate(_prompts(session)):
        room = session.config.context_length - len(ids)
        answer = session.generate(ids, max_tokens=min(ANSWER, room), keep_logits=n == 0)
        said[QUESTIONS[n]] = answer.text
        bad, why = is_garbage(answer.text)
        if bad:
            garbage[QUESTIONS[n]] = why
        if n == 0 and answer.tokens:
            _serial(session, ids, answer.tokens, answer.logits, health)
    health.figures["answers"] = said
    if garbage:
        state: State = "unproved" if kind is None else "broken" if len(garbage) == len(QUESTIONS) else "suspect"
        cause = Mechanism("forward.garbage", {"garbage": len(garbage), "of": len(QUESTIONS)})
        health.fail(state, cause, 0.9 if state == "broken" else 0.5, answers=said, why=garbage)


def _prompts(session: Session) -> list[list[int]]:
    """Ids of the questions; the template is rendered once where its output has the question in it once."""
    tokenizer = session.tokenizer
    if session.wants_raw:
        return [tokenizer.encode(question) for question in QUESTIONS]
    first = session.chat_tokens(QUESTION)
    shown = tokenizer.decode(first)
    if shown.count(QUESTION) != 1 or tokenizer.encode(shown) != first:
        return [session.chat_tokens(question) for question in QUESTIONS]
    return [first, *(tokenizer.encode(shown.replace(QUESTION, question)) for question in QUESTIONS[1:])]


def _serial(session: Session, ids: list[int], tokens: list[int], logits: np.ndarray | None, health: Health) -> None:
    """The logits of an answer, made one by one, against those of one pass over prompt and answer."""
    assert logits is not None
    session.forget()
    together = session.follow(ids, tokens)
    alone = logits[: len(together)]
    off = float(np.linalg.norm(together.astype(np.float64) - alone) / (np.linalg.norm(alone.astype(np.float64)) or 1.0))
    health.figures["prefill beside decode"] = {"rel_l2": float(f"{off:.3g}"), "limit": SERIAL_TOLERANCE}
    if not off <= SERIAL_TOLERANCE:
        health.fail("suspect", Mechanism("forward.serial", {"off": off}), 0.6)


__all__ = [
    "LONG", "QUESTIONS", "Health", "Limits", "allowed", "bits_of", "conversation", "examine", "kind_of", "limits_of", "nats",
    "parts", "spoken", "surprises",
]  # fmt: skip
