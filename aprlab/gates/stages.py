"""Ten stages from the tokenizer to the next word, each looked at in one file, without another to hold it against.

Upstream's check had ten stages of these names; it looked for parts of names, and at whether a softmax sums to 1. Here
every stage computes what the file must hold and what its engine must do, from first principles in float64, and every
stage has a fault that it is known to notice. What one file alone cannot tell (a value that is wrong and plausible) is
`peel`'s and the gates' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import engines, paths
from aprlab.architectures.qwen2 import output_weight, shapes
from aprlab.errors import AprlabError, NumericError
from aprlab.formats import open_model
from aprlab.gates.gates import PROBES
from aprlab.inference.session import Sampling, Session
from aprlab.inference.tokenizer import CONTROL, Qwen2Tokenizer
from aprlab.instruments.garbage_detector import is_garbage
from aprlab.instruments.ticket import norm as can_be_a_norm
from aprlab.model.content import map_file
from aprlab.model.model import Model
from aprlab.published import ANSWER, QUESTION, known_models
from aprlab.tracing.traces import Trace, trace

# How far an engine's float32 may be from float64 over one operation, relative to the result's norm; and one whose
# contract is to round activations to 8 bits.
TOLERANCE = {"f32": 1e-4, "q8": 5e-2}
ROWS = 16  # rows of a matrix that are computed again


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one stage found: `detail` says what was looked at, or what is wrong."""

    name: str
    ok: bool
    detail: str


class _Wrong(Exception):
    """A stage found something; the message says what."""


def _want(holds: object, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


class _Patient:
    """The file, opened as far as it can be; what cannot be had raises where it is asked for."""

    def __init__(self, file: Path | Model, session: Session | None, engine: str) -> None:
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
    def tokens(self) -> list[int]:
        return self.session.chat_tokens(QUESTION)

    @cached_property
    def trace(self) -> Trace:
        last = self.session.config.block_count - 1
        steps = ("attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn", "ffn_inp", "ffn_norm", "gate", "up", "swiglu", "out")
        wanted = [f"layers.{n}.{step}" for n in sorted({0, 1, last} & set(range(last + 1))) for step in steps]
        return trace(self.session, self.tokens, ["embed", *wanted, "norm", "logits"])

    @property
    def layers(self) -> list[int]:
        """The layers that are traced."""
        return sorted({int(name.split(".")[1]) for name in self.trace if name.startswith("layers.")})

    def point(self, name: str) -> np.ndarray:
        """Values of a trace point, float64; raises `_Wrong` where they are not finite."""
        values = self.trace[name].values
        _want(np.isfinite(values).all(), f"{name} holds values that are not finite")
        return values.astype(np.float64)

    def values(self, name: str) -> np.ndarray:
        """Decoded values of a tensor in the shape that the config demands, finite."""
        tensor, due = self.model.tensor(name), shapes(self.session.config)[name]
        _want(tensor.shape == due, f"{name} has shape {tensor.shape}, {due} is due")
        values = tensor.dequantise()
        _want(np.isfinite(values).all(), f"{name} holds values that are not finite")
        return values

    def close(self, what: str, got: np.ndarray, due: np.ndarray) -> float:
        """How far an engine's result is from float64's, relative; raises `_Wrong` beyond the contract's tolerance."""
        far = float(np.linalg.norm(got - due) / (np.linalg.norm(due) or 1.0))
        allowed = TOLERANCE[self.session.engine.contract]
        _want(far <= allowed, f"{what} is off by {far:.2g} of its norm, {allowed:g} is the contract's")
        return far

    def product(self, point: str, x: np.ndarray, name: str, bias: str | None = None) -> float:
        """Some rows of a matrix product once more: x (T, cols) times `name`, plus a bias."""
        weights = self.values(name)
        rows = seen_rows(len(weights))
        due = x @ weights[rows].astype(np.float64).T
        if bias is not None:
            due = due + self.values(bias)[rows]
        got = self.point(point).reshape(len(x), -1)[:, rows]
        return self.close(point, got, due)


def seen_rows(count: int) -> np.ndarray:
    """A few row numbers, spread."""
    return np.unique(np.linspace(0, count - 1, min(count, ROWS)).astype(np.int64))


Look = Callable[[_Patient], str]
STAGES: dict[str, Look] = {}


def _stage(name: str) -> Callable[[Look], Look]:
    def keep(look: Look) -> Look:
        STAGES[name] = look
        return look

    return keep


@_stage("tokenizer")
def _tokenizer(p: _Patient) -> str:
    data = p.model.tokenizer if p.given is None else p.given.model.tokenizer
    tokenizer = Qwen2Tokenizer(data) if p.given is None else p.given.tokenizer
    known = set(data.tokens)
    _want(len(known) == len(data.tokens), f"{len(data.tokens) - len(known)} tokens stand there twice")
    _want(data.merges, "there are no merges: every prompt falls apart into bytes")
    lost = [m for m in data.merges if m.replace(" ", "") not in known]
    _want(not lost, f"{len(lost)} merges make no token, first {lost[0] if lost else ''!r}")
    for text in PROBES:
        back = tokenizer.decode(tokenizer.encode(text))
        _want(back == text, f"{text!r} comes back as {back!r}")
    control = [n for n, kind in enumerate(data.token_types) if kind == CONTROL]
    _want(data.eos_token_id in control, f"the end of an answer, {data.eos_token_id}, is no control token")
    _want(data.eos_token_id in tokenizer.eog, f"{data.eos_token_id} does not end an answer")
    _want(data.chat_template, "there is no chat template")
    ids = p.tokens
    marks = [n for n in ids if n in control]
    _want(marks, "the prompt holds no control token: the template is missing, or split into letters")
    question = tokenizer.encode(QUESTION)
    found = sum(ids[n : n + len(question)] == question for n in range(len(ids)))
    _want(found == 1, f"the question stands {found} times in its prompt")
    _want(ids.count(marks[0]) <= 3, f"the prompt opens {ids.count(marks[0])} turns; system, user and assistant are due")
    return f"{len(known)} tokens, {len(data.merges)} merges, {len(PROBES)} texts there and back, a prompt of {len(ids)}"


@_stage("embedding")
def _embedding(p: _Patient) -> str:
    values = p.values("token_embd.weight")
    spread = values.std(axis=1)
    dead = int((spread == 0).sum())
    _want(dead < 0.5 * len(values), f"{dead} of {len(values)} rows are constant")
    rows = np.unique(values[:: max(1, len(values) // 4096)], axis=0)
    _want(len(rows) > 0.4 * min(len(values), 4096), f"only {len(rows)} rows differ from each other")
    got = p.point("embed")
    p.close("embed", got, values[np.asarray(p.tokens)].astype(np.float64))
    _want(float(np.abs(values).max()) < 1e4, f"values up to {np.abs(values).max():.3g}")
    return f"{values.shape[0]} rows of {values.shape[1]}, std {values.std():.3g}; the prompt's rows are what the engine looks up"


@_stage("positions")
def _positions(p: _Patient) -> str:
    config = p.session.config
    _want(config.rope_type == "neox", f"rope_type is {config.rope_type!r}: Qwen2 turns halves (neox)")
    for known in known_models().values():
        numbers = {k: v for k, v in known.config.items() if k in ("block_count", "embedding_length", "feed_forward_length")}
        if all(getattr(config, k) == v for k, v in numbers.items()):
            due = known.config.get("rope_theta", config.rope_theta)
            _want(config.rope_theta == due, f"rope_theta is {config.rope_theta:g}; {known.name} has {due:g}")
            eps = known.config.get("rms_norm_eps", config.rms_norm_eps)
            _want(abs(config.rms_norm_eps / eps - 1) < 1e-6, f"rms_norm_eps is {config.rms_norm_eps:g}; {known.name} has {eps:g}")
    worst = 0.0
    positions = np.arange(len(p.tokens), dtype=np.float64)
    half = config.head_dim // 2
    angle = positions[:, None] * config.rope_theta ** (-2.0 * np.arange(half) / config.head_dim)  # (T, D/2)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    for n in p.layers:
        for part in ("q", "k"):
            x = p.point(f"layers.{n}.{part}")
            _want(x.shape[-1] == config.head_dim, f"heads of {x.shape[-1]}, {config.head_dim} is due")
            a, b = x[..., :half], x[..., half:]
            due = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
            worst = max(worst, p.close(f"layers.{n}.{part}_rope", p.point(f"layers.{n}.{part}_rope"), due))
    return f"theta {config.rope_theta:g}, turned as float64 turns it to {worst:.1g}, position 0 not at all"


@_stage("q, k, v")
def _projections(p: _Patient) -> str:
    worst = 0.0
    for n in p.layers:
        x = p.point(f"layers.{n}.attn_norm")
        for part in "qkv":
            bias = f"blk.{n}.attn_{part}.bias"
            _want(np.any(p.values(bias) != 0), f"{bias} is all zeros: Qwen2 has biases, and they are lost here")
            worst = max(worst, p.product(f"layers.{n}.{part}", x, f"blk.{n}.attn_{part}.weight", bias))
    for n in range(p.session.config.block_count):
        lost = [s for s in "qkv" if not np.any(p.values(f"blk.{n}.attn_{s}.bias"))]
        _want(not lost, f"blk.{n}.attn_{lost[0] if lost else ''}.bias is all zeros")
    return f"biases everywhere, products of layers {', '.join(map(str, p.layers))} as in float64 to {worst:.1g}"


@_stage("attention")
def _attention(p: _Patient) -> str:
    config, worst = p.session.config, 0.0
    group = config.head_count // config.head_count_kv
    for n in p.layers:
        q, k, v = (p.point(f"layers.{n}.{part}") for part in ("q_rope", "k_rope", "v"))
        _want(q.shape[1] == config.head_count and k.shape[1] == config.head_count_kv, "other numbers of heads than the config's")
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # (T, H, D): head h looks at kv head h // group
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        due = np.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)
        worst = max(worst, p.close(f"layers.{n}.attn", p.point(f"layers.{n}.attn"), due))
    serial = trace(p.session, p.tokens[:6], "layers.0.attn", chunk=1)["layers.0.attn"].values.astype(np.float64)
    p.close("layers.0.attn, one token after another,", serial, p.point("layers.0.attn")[:6])
    return f"{config.head_count} heads on {config.head_count_kv}, causal, as in float64 to {worst:.1g}, prefill and decode alike"


@_stage("feed forward")
def _feed_forward(p: _Patient) -> str:
    worst = 0.0
    for n in p.layers:
        x = p.point(f"layers.{n}.ffn_norm")
        for part in ("gate", "up"):
            worst = max(worst, p.product(f"layers.{n}.{part}", x, f"blk.{n}.ffn_{part}.weight"))
        gate, up, h = (p.point(f"layers.{n}.{part}") for part in ("gate", "up", "swiglu"))
        p.close(f"layers.{n}.swiglu", h, gate / (1 + np.exp(-np.clip(gate, -500, 500))) * up)
        down = p.values(f"blk.{n}.ffn_down.weight")
        rows = seen_rows(len(down))
        due = p.point(f"layers.{n}.ffn_inp")[:, rows] + h @ down[rows].astype(np.float64).T
        worst = max(worst, p.close(f"layers.{n}.out", p.point(f"layers.{n}.out")[:, rows], due))
    for n in range(p.session.config.block_count):
        for part in ("gate", "up", "down"):
            values = p.values(f"blk.{n}.ffn_{part}.weight")
            _want(np.any(values[0] != values[0, 0]), f"blk.{n}.ffn_{part}.weight: a row of one value")
            _want(float(np.abs(values).max()) < 1e4, f"blk.{n}.ffn_{part}.weight: values up to {np.abs(values).max():.3g}")
    return f"layers {', '.join(map(str, p.layers))} as in float64 to {worst:.1g}"


@_stage("norms")
def _norms(p: _Patient) -> str:
    config, worst = p.session.config, 0.0
    names = [n for n in shapes(config) if n.endswith("norm.weight")]
    for name in names:
        _want(can_be_a_norm(p.values(name)), f"{name} cannot be a norm's weights: zeros, one value, or not finite")
    pairs = [(f"layers.{n}.ffn_inp", f"layers.{n}.ffn_norm", f"blk.{n}.ffn_norm.weight") for n in p.layers]
    pairs = [("embed", "layers.0.attn_norm", "blk.0.attn_norm.weight"), *pairs]
    pairs += [("layers.0.out", "layers.1.attn_norm", "blk.1.attn_norm.weight")] if 1 in p.layers else []
    pairs += [(f"layers.{config.block_count - 1}.out", "norm", "output_norm.weight")]
    for before, after, weight in pairs:
        x = p.point(before)
        due = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * p.values(weight)
        worst = max(worst, p.close(after, p.point(after), due))
    return f"{len(names)} weights, {len(pairs)} RMS norms as in float64 to {worst:.1g}"


@_stage("output head")
def _head(p: _Patient) -> str:
    name = output_weight(p.session.config)
    worst = p.product("logits", p.point("norm"), name)
    logits = p.point("logits")
    values = p.values(name)
    flat = int((values.std(axis=1) == 0).sum())
    _want(flat < 0.5 * len(values), f"{flat} of {len(values)} rows of {name} are constant")
    if name != "token_embd.weight":
        same = np.array_equal(p.model.tensor(name).raw, p.model.tensor("token_embd.weight").raw)
        _want(not same, "output.weight is the embedding's copy, where a model that needs one has its own")
    _want(np.ptp(logits, axis=1).min() > 1e-3, "all tokens are equally likely")
    return f"{name}, {len(seen_rows(len(values)))} of {len(values)} rows as in float64 to {worst:.1g}"


@_stage("probabilities")
def _probabilities(p: _Patient) -> str:
    answer = p.session.tokenizer.encode(ANSWER)
    tokens = [*p.tokens, *answer]
    logits = trace(p.session, tokens, "logits")["logits"].values.astype(np.float64)
    _want(np.isfinite(logits).all(), "logits that are not finite")
    logits = logits[len(p.tokens) - 1 : -1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    surprise = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(answer)), answer]
    mean, even = float(surprise.mean()), float(np.log(logits.shape[1]))
    _want(mean < 0.35 * even, f"{ANSWER!r} costs {mean:.2f} nats a token; knowing nothing costs {even:.2f}")
    return f"{ANSWER!r} costs {mean:.2f} nats a token, knowing nothing would cost {even:.2f}"


@_stage("sampler")
def _sampler(p: _Patient) -> str:
    answer = p.session.generate(QUESTION, max_tokens=32)
    bad, why = is_garbage(answer.text)
    _want(not bad, f"{answer.text[:40]!r}: {why}")
    _want(answer.stop == "eos", f"{answer.text[:40]!r} does not end within 32 tokens")
    again = p.session.generate(QUESTION, max_tokens=32)
    _want(again.tokens == answer.tokens, "asked twice, the model says two things at temperature 0")
    warm = [p.session.generate(QUESTION, max_tokens=6, sampling=Sampling(1.0, 0.9, 7)).tokens for _ in range(2)]
    _want(warm[0] == warm[1], "one seed gives two answers")
    return f"{answer.text!r}, then the end; the same when asked again"


def check(
    file: str | Path | Model, session: Session | None = None, *, engine: str = "reference"
) -> list[StageResult]:
    """Look at a file in ten stages; each speaks, whatever the others found.

    Args:
        file: GGUF, APR or SafeTensors.
        session: to be asked instead of a new one over the file.
        engine: for the new one.

    Raises:
        UsageError: there is no such file, or no such engine.
        UnsupportedError: the engine does not run on this machine.
    """
    engines.known(engine)
    patient = _Patient(file if isinstance(file, Model) else Path(file), session, engine)
    if not isinstance(file, Model) and not patient.path.is_dir():
        map_file(patient.path)  # raises where there is none
    try:
        _ = patient.session
    except AprlabError:
        with open_model(paths.embedded_model()) as sound:
            engines.create(engine, sound)  # raises where it is the engine that is at fault, and not the file
    found = []
    for name, look in STAGES.items():
        try:
            detail, ok = look(patient), True
        except _Wrong as wrong:
            detail, ok = str(wrong), False
        except NumericError as error:
            detail, ok = error.message, False
        except AprlabError as error:
            detail, ok = str(error), False
        found.append(StageResult(name, ok, detail))
    return found


def passed(results: list[StageResult]) -> tuple[int, int]:
    """How many stages passed, of how many."""
    return sum(r.ok for r in results), len(results)


def to_json(results: list[StageResult]) -> list[dict[str, Any]]:
    """Plain data."""
    return [{"stage": r.name, "ok": r.ok, "detail": r.detail} for r in results]
