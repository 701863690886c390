"""Ten stages from the tokenizer to the next word, each checked in one file alone, with nothing to compare it with.

Upstream's check had ten stages of these names; it looked for parts of names, and at whether a softmax sums to 1. Here
every stage computes what the file must hold and what its engine must do, from first principles in float64, and every
stage has a fault that it is known to notice. What one file alone cannot show (a value that is wrong but plausible) is
left to `peel` and the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import engines, paths
from aprlab.architectures import points
from aprlab.errors import AprlabError, NumericError
from aprlab.formats import open_model
from aprlab.formats.identity import FILE_ONLY
from aprlab.gates.catalogue import PROBES
from aprlab.gates.results import SCHEMA, plain_data
from aprlab.gates.words import words
from aprlab.inference.session import Sampling, Session
from aprlab.inference.tokenizer import CONTROL, Qwen2Tokenizer
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.instruments.predicates import norm as can_be_a_norm
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.content import map_file
from aprlab.model.inventory import output_weight, shapes
from aprlab.model.model import Model
from aprlab.model.rope import FACTORS, frequencies
from aprlab.model.window import hidden
from aprlab.published import ANSWER, QUESTION, known_models
from aprlab.tracing.traces import Trace, trace

# How far an engine's float32 may be from float64 over one operation, relative to the result's norm; and one whose
# contract is to round activations to 8 bits.
TOLERANCE = {"f32": 1e-4, "q8": 5e-2}
ROWS = 16  # rows of a matrix that are computed again


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one stage found.

    Attributes:
        name: of the stage.
        ok: nothing is wrong.
        code: what was looked at, or what is wrong, such as ``stage.positions.theta``; listed in docs/gates.md.
        parameters: its numbers and names.
    """

    name: str
    ok: bool
    code: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def detail(self) -> str:
        """What was looked at, or what is wrong, in words."""
        return words(self.code, self.parameters)


class StageResults(list[StageResult]):
    """What all stages found.

    Attributes:
        engine, engine_asked: which engine the file was asked on (empty: none could be made), and what was asked for.
    """

    engine: str = ""
    engine_asked: str = ""


Q_NORM = "attn_q_norm.weight"  # of Qwen3's heads
Found = tuple[str, dict[str, Any]]  # a code and its parameters


class StageFailure(Exception):
    """A stage found something wrong: a code with its parameters."""

    def __init__(self, code: str, parameters: dict[str, Any]) -> None:
        super().__init__(code)
        self.code, self.parameters = code, parameters


def _want(holds: object, code: str, **parameters: Any) -> None:
    if not holds:
        raise StageFailure(code, parameters)


def _found(code: str, **parameters: Any) -> Found:
    return code, parameters


class CheckedFile:
    """The file, opened as far as it can be; what cannot be had raises where it is asked for."""

    def __init__(self, file: Path | Model, session: Session | None, engine: str | None) -> None:
        self.path = file.path if isinstance(file, Model) else Path(file)
        self._model = file if isinstance(file, Model) else None
        self.given, self._engine = session, engine

    @cached_property
    def model(self) -> Model:
        return self._model if self._model is not None else open_model(self.path)

    @cached_property
    def session(self) -> Session:
        return self.given if self.given is not None else Session(self.model, engine=self._engine)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that the config demands; made once, since each look at a tensor asks for it."""
        return shapes(self.session.config)

    @cached_property
    def tokens(self) -> list[int]:
        return self.session.chat_tokens(QUESTION)

    @cached_property
    def trace(self) -> Trace:
        last = self.session.config.block_count - 1
        skipped = ("attn_out", "down")
        chosen = {f"layers.{n}" for n in sorted({0, 1, last} & set(range(last + 1)))}
        every = [name.rpartition(".") for name in points(self.session.config)]
        wanted = [f"{layer}.{step}" for layer, _, step in every if layer in chosen and step not in skipped]
        return trace(self.session, self.tokens, ["embed", *wanted, "norm", "logits"])

    @property
    def layers(self) -> list[int]:
        """The layers that are traced."""
        return sorted({int(name.split(".")[1]) for name in self.trace if name.startswith("layers.")})

    def point(self, name: str) -> np.ndarray:
        """Values of a trace point, float64; raises `StageFailure` where they are not finite."""
        values = self.trace[name].values
        _want(np.isfinite(values).all(), "stage.not-finite", what=name)
        return values.astype(np.float64)

    def values(self, name: str) -> np.ndarray:
        """Decoded values of a tensor in the shape that the config demands, finite."""
        tensor, expected = self.model.tensor(name), self.shapes[name]
        _want(tensor.shape == expected, "stage.shape", tensor=name, found=tensor.shape, expected=expected)
        values = tensor.dequantise()
        _want(np.isfinite(values).all(), "stage.not-finite", what=name)
        return values

    def close(self, what: str, got: np.ndarray, expected: np.ndarray) -> float:
        """How far an engine's result is from float64's, relative; raises `StageFailure` beyond the contract's tolerance."""
        far = float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0))
        allowed = TOLERANCE[self.session.engine.contract]
        _want(far <= allowed, "stage.far-from-float64", what=what, off=far, allowed=allowed)
        return far

    def product(self, point: str, x: np.ndarray, name: str, bias: str | None = None) -> float:
        """Some rows of a matrix product, computed again: x (T, cols) times `name`, plus a bias."""
        weights = self.values(name)
        rows = seen_rows(len(weights))
        expected = x @ weights[rows].astype(np.float64).T
        if bias is not None:
            expected = expected + self.values(bias)[rows]
        got = self.point(point).reshape(len(x), -1)[:, rows]
        return self.close(point, got, expected)


def seen_rows(count: int) -> np.ndarray:
    """A few row numbers, spread."""
    return np.unique(np.linspace(0, count - 1, min(count, ROWS)).astype(np.int64))


StageLook = Callable[[CheckedFile], Found]
STAGES: dict[str, StageLook] = {}


def _stage(name: str) -> Callable[[StageLook], StageLook]:
    def keep(look: StageLook) -> StageLook:
        STAGES[name] = look
        return look

    return keep


@_stage("tokenizer")
def _tokenizer(p: CheckedFile) -> Found:
    data = p.model.tokenizer if p.given is None else p.given.model.tokenizer
    tokenizer = Qwen2Tokenizer(data) if p.given is None else p.given.tokenizer
    known = set(data.tokens)
    _want(len(known) == len(data.tokens), "stage.tokenizer.duplicate-tokens", count=len(data.tokens) - len(known))
    pieces = data.model == "llama"  # SentencePiece: it has scores in place of merges, and puts a space in front
    _want(data.merges or pieces, "stage.tokenizer.no-merges")
    lost = [m for m in data.merges if m.replace(" ", "") not in known]
    _want(not lost, "stage.tokenizer.merges-without-token", count=len(lost), first=next(iter(lost), ""))
    for text in PROBES:
        back = tokenizer.decode(tokenizer.encode(text, parse_special=not pieces)[0 if tokenizer.first is None else 1 :])
        back = back.removeprefix(" ") if pieces and data.add_space_prefix is not False else back
        _want(back == text, "stage.tokenizer.text-changed", text=text, found=back)
    control = [n for n, kind in enumerate(data.token_types) if kind == CONTROL]
    _want(data.eos_token_id in control, "stage.tokenizer.end-no-control", end=data.eos_token_id)
    _want(data.eos_token_id in tokenizer.eog, "stage.tokenizer.end-ignored", end=data.eos_token_id)
    _want(data.chat_template, "stage.tokenizer.no-template")
    ids = p.tokens
    marks = [n for n in ids if n in control]
    _want(marks, "stage.tokenizer.no-control-tokens")
    question = tokenizer.encode(QUESTION)[0 if tokenizer.first is None else 1 :]
    found = sum(ids[n : n + len(question)] == question for n in range(len(ids)))
    if pieces:  # it cuts a text differently behind other text
        found = tokenizer.decode(ids).count(QUESTION)
    _want(found == 1, "stage.tokenizer.question-count", count=found)
    _want(ids.count(marks[0]) <= 3, "stage.tokenizer.turn-count", count=ids.count(marks[0]))
    return _found(
        "stage.tokenizer", tokens=len(known), merges=len(data.merges), texts=len(PROBES), prompt=len(ids)
    )  # fmt: skip


@_stage("embedding")
def _embedding(p: CheckedFile) -> Found:
    values = p.values("token_embd.weight")
    spread = values.std(axis=1)
    dead = int((spread == 0).sum())
    _want(dead < 0.5 * len(values), "stage.embedding.constant-rows", count=dead, rows=len(values))
    rows = np.unique(values[:: max(1, len(values) // 4096)], axis=0)
    _want(len(rows) > 0.4 * min(len(values), 4096), "stage.embedding.same-rows", count=len(rows))
    got = p.point("embed")
    p.close("embed", got, values[np.asarray(p.tokens)].astype(np.float64))
    largest = float(np.abs(values).max())
    _want(largest < 1e4, "stage.embedding.large", largest=largest)
    return _found("stage.embedding", rows=values.shape[0], columns=values.shape[1], std=float(values.std()))


@_stage("positions")
def _positions(p: CheckedFile) -> Found:
    config = p.session.config
    kind = ARCHITECTURES[config.architecture]
    _want(
        config.rope_type == kind.rope_type, "stage.positions.rope-type",
        found=config.rope_type, architecture=kind.title, expected=kind.rope_type,
    )  # fmt: skip
    for known in known_models().values():
        numbers = {k: v for k, v in known.config.items() if k in ("block_count", "embedding_length", "feed_forward_length")}
        if all(getattr(config, k) == v for k, v in numbers.items()):
            theta, found = known.config.get("rope_theta", config.rope_theta), config.rope_theta
            _want(found == theta, "stage.positions.theta", found=found, model=known.name, expected=theta)
            eps, found = known.config.get("rms_norm_eps", config.rms_norm_eps), config.rms_norm_eps
            _want(abs(found / eps - 1) < 1e-6, "stage.positions.epsilon", found=found, model=known.name, expected=eps)
    worst = 0.0
    positions = np.arange(len(p.tokens), dtype=np.float64)
    half = config.head_dim // 2
    factors = p.values(FACTORS) if config.rope_factors else None
    angle = positions[:, None] * frequencies(config.rope_theta, half, config.rope_scaling, factors)  # (T, D/2)
    length = 1.0 if config.rope_scaling is None else config.rope_scaling.length
    cos, sin = length * np.cos(angle)[:, None], length * np.sin(angle)[:, None]
    normed = "_norm" if any(row[0].endswith(Q_NORM) for row in kind.layer) else ""
    for n in p.layers:
        for part in ("q", "k"):
            x = p.point(f"layers.{n}.{part}{normed}")
            _want(x.shape[-1] == config.head_dim, "stage.positions.head-size", found=x.shape[-1], expected=config.head_dim)
            expected = _rotated(x, cos, sin, config.rope_type)
            worst = max(worst, p.close(f"layers.{n}.{part}_rope", p.point(f"layers.{n}.{part}_rope"), expected))
    return _found("stage.positions", theta=config.rope_theta, off=worst)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> np.ndarray:
    """x ``(T, heads, D)`` with its pairs turned: halves (neox), or neighbours (norm)."""
    half = x.shape[-1] // 2
    first, second = (slice(0, half), slice(half, None)) if style == "neox" else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first], x[..., second]
    out = np.empty_like(x)
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


@_stage("q, k, v")
def _projections(p: CheckedFile) -> Found:
    worst = 0.0
    kind = ARCHITECTURES[p.session.config.architecture]
    biased = any(row[0] == "blk.N.attn_q.bias" for row in kind.layer)
    for n in p.layers:
        x = p.point(f"layers.{n}.attn_norm")
        for part in "qkv":
            bias = f"blk.{n}.attn_{part}.bias" if biased else None
            if bias is not None:
                _want(np.any(p.values(bias) != 0), "stage.projections.bias-lost", tensor=bias)
            worst = max(worst, p.product(f"layers.{n}.{part}", x, f"blk.{n}.attn_{part}.weight", bias))
    if not biased:
        return _found("stage.projections.unbiased", architecture=kind.title, layers=p.layers, off=worst)
    for n in range(p.session.config.block_count):
        lost = [s for s in "qkv" if not np.any(p.values(f"blk.{n}.attn_{s}.bias"))]
        _want(not lost, "stage.projections.bias-zero", tensor=f"blk.{n}.attn_{next(iter(lost), '')}.bias")
    return _found("stage.projections", layers=p.layers, off=worst)


@_stage("attention")
def _attention(p: CheckedFile) -> Found:
    config, worst = p.session.config, 0.0
    group = config.head_count // config.head_count_kv
    for n in p.layers:
        q, k, v = (p.point(f"layers.{n}.{part}") for part in ("q_rope", "k_rope", "v"))
        _want(q.shape[1] == config.head_count and k.shape[1] == config.head_count_kv, "stage.attention.head-counts")
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # (T, H, D): head h looks at kv head h // group
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(config.head_dim)
        scores = np.where(hidden(len(q), np.arange(len(q)), config.sliding_window), -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)
        worst = max(worst, p.close(f"layers.{n}.attn", p.point(f"layers.{n}.attn"), expected))
    serial = trace(p.session, p.tokens[:6], "layers.0.attn", chunk=1)["layers.0.attn"].values.astype(np.float64)
    p.close("layers.0.attn, one token after another,", serial, p.point("layers.0.attn")[:6])
    return _found("stage.attention", heads=config.head_count, kv_heads=config.head_count_kv, off=worst)


@_stage("feed forward")
def _feed_forward(p: CheckedFile) -> Found:
    worst = 0.0
    for n in p.layers:
        x = p.point(f"layers.{n}.ffn_norm")
        for part in ("gate", "up"):
            worst = max(worst, p.product(f"layers.{n}.{part}", x, f"blk.{n}.ffn_{part}.weight"))
        gate, up, h = (p.point(f"layers.{n}.{part}") for part in ("gate", "up", "swiglu"))
        p.close(f"layers.{n}.swiglu", h, gate / (1 + np.exp(-np.clip(gate, -500, 500))) * up)
        down = p.values(f"blk.{n}.ffn_down.weight")
        rows = seen_rows(len(down))
        expected = p.point(f"layers.{n}.ffn_inp")[:, rows] + h @ down[rows].astype(np.float64).T
        worst = max(worst, p.close(f"layers.{n}.out", p.point(f"layers.{n}.out")[:, rows], expected))
    for n in range(p.session.config.block_count):
        for part in ("gate", "up", "down"):
            name = f"blk.{n}.ffn_{part}.weight"
            values = p.values(name)
            largest = float(np.abs(values).max())
            _want(np.any(values[0] != values[0, 0]), "stage.feed-forward.constant-row", tensor=name)
            _want(largest < 1e4, "stage.feed-forward.large", tensor=name, largest=largest)
    return _found("stage.feed-forward", layers=p.layers, off=worst)


@_stage("norms")
def _norms(p: CheckedFile) -> Found:
    config, worst = p.session.config, 0.0
    names = [n for n in p.shapes if n.endswith("norm.weight")]
    for name in names:
        _want(can_be_a_norm(p.values(name)), "stage.norms.no-norm", tensor=name)
    pairs = [(f"layers.{n}.ffn_inp", f"layers.{n}.ffn_norm", f"blk.{n}.ffn_norm.weight") for n in p.layers]
    pairs = [("embed", "layers.0.attn_norm", "blk.0.attn_norm.weight"), *pairs]
    pairs += [("layers.0.out", "layers.1.attn_norm", "blk.1.attn_norm.weight")] if 1 in p.layers else []
    if f"blk.0.{Q_NORM}" in names:
        pairs += [(f"layers.{n}.q", f"layers.{n}.q_norm", f"blk.{n}.{Q_NORM}") for n in p.layers]
        pairs += [(f"layers.{n}.k", f"layers.{n}.k_norm", f"blk.{n}.attn_k_norm.weight") for n in p.layers]
    pairs += [(f"layers.{config.block_count - 1}.out", "norm", "output_norm.weight")]
    for before, after, weight in pairs:
        x = p.point(before)
        expected = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * p.values(weight)
        worst = max(worst, p.close(after, p.point(after), expected))
    return _found("stage.norms", weights=len(names), norms=len(pairs), off=worst)


@_stage("output head")
def _head(p: CheckedFile) -> Found:
    name = output_weight(p.session.config)
    worst = p.product("logits", p.point("norm"), name)
    logits = p.point("logits")
    values = p.values(name)
    flat = int((values.std(axis=1) == 0).sum())
    _want(flat < 0.5 * len(values), "stage.head.constant-rows", count=flat, rows=len(values), tensor=name)
    if name != "token_embd.weight":
        same = np.array_equal(p.model.tensor(name).raw, p.model.tensor("token_embd.weight").raw)
        _want(not same, "stage.head.embedding-copied")
    _want(np.ptp(logits, axis=1).min() > 1e-3, "stage.head.flat-logits")
    return _found("stage.head", tensor=name, computed=len(seen_rows(len(values))), rows=len(values), off=worst)


@_stage("probabilities")
def _probabilities(p: CheckedFile) -> Found:
    answer = p.session.tokenizer.encode(ANSWER)
    tokens = [*p.tokens, *answer]
    logits = trace(p.session, tokens, "logits")["logits"].values.astype(np.float64)
    _want(np.isfinite(logits).all(), "stage.not-finite", what="logits")
    logits = logits[len(p.tokens) - 1 : -1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    surprise = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(answer)), answer]
    mean, even = float(surprise.mean()), float(np.log(logits.shape[1]))
    _want(mean < 0.35 * even, "stage.probabilities.surprised", answer=ANSWER, nats=mean, even=even)
    return _found("stage.probabilities", answer=ANSWER, nats=mean, even=even)


@_stage("sampler")
def _sampler(p: CheckedFile) -> Found:
    answer = p.session.generate(QUESTION, max_tokens=32)
    bad, why = is_garbage(answer.text)
    _want(not bad, "stage.sampler.garbage", answer=answer.text[:40], reason=why)
    _want(answer.stop == "eos", "stage.sampler.no-end", answer=answer.text[:40], tokens=32)
    again = p.session.generate(QUESTION, max_tokens=32)
    _want(again.tokens == answer.tokens, "stage.sampler.two-answers")
    warm = [p.session.generate(QUESTION, max_tokens=6, sampling=Sampling(1.0, 0.9, 7)).tokens for _ in range(2)]
    _want(warm[0] == warm[1], "stage.sampler.seed-ignored")
    return _found("stage.sampler", answer=answer.text)


def check(file: str | Path | Model, session: Session | None = None, *, engine: str | None = "auto") -> StageResults:
    """Look at a file in ten stages; each speaks, whatever the others found.

    Args:
        file: GGUF, APR or SafeTensors.
        session: to be asked instead of a new one over the file.
        engine: for the new one, see `aprlab.engines.create`.

    Raises:
        UsageError: there is no such file, or no such engine.
        UnsupportedError: the engine does not run on this machine; a sound file of a model that no engine runs.
    """
    engines.parse(engine)
    checked = CheckedFile(file if isinstance(file, Model) else Path(file), session, engine)
    if not isinstance(file, Model) and not checked.path.is_dir():
        map_file(checked.path)  # raises where there is none
    found = StageResults()
    found.engine_asked = engine or engines.AUTO if session is None else session.engine.spec
    try:
        _ = checked.session
    except AprlabError as error:
        if error.code in FILE_ONLY:
            raise  # a sound file of a model that cannot be run: no stage is at fault
        with open_model(paths.embedded_model()) as sound:
            engines.create(engine, sound)  # raises where it is the engine that is at fault, and not the file
    else:
        found.engine = checked.session.engine.spec
    for name, look in STAGES.items():
        try:
            (code, parameters), ok = look(checked), True
        except StageFailure as failure:
            code, parameters, ok = failure.code, failure.parameters, False
        except AprlabError as error:
            message = error.message if isinstance(error, NumericError) else str(error)
            code, parameters, ok = "stage.refused", {"error": error.code, "message": message}, False
        found.append(StageResult(name, ok, code, parameters))
    return found


def passed(results: list[StageResult]) -> tuple[int, int]:
    """How many stages passed, of how many."""
    return sum(r.ok for r in results), len(results)


def to_json(results: StageResults) -> dict[str, Any]:
    """Plain data, with the version of its schema."""
    rows = [
        {"stage": r.name, "ok": r.ok, "code": r.code, "detail": r.detail, "parameters": plain_data(r.parameters)} for r in results
    ]
    return {"schema": SCHEMA, "engine": results.engine, "engine_asked": results.engine_asked, "stages": rows}
