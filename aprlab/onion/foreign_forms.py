"""Forms of an operation: the right one done wrongly in a way that somebody has met, to be tried on the inputs of a trace.

Forms are made for one operation, with parameters that are fitted from its data (a base, an epsilon). Faults of the catalogue
are forms of themselves: their engine, their config or their decoder computes the operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from aprlab.engines import roundings
from aprlab.engines.base import Engine
from aprlab.engines.contract_engine import ContractEngine
from aprlab.errors import BROKEN
from aprlab.faults import FAULTS, Fault
from aprlab.faults.apply import misread
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.onion.foreign_shadow import Judges, Operation
from aprlab.quants import REGISTRY

Compute = Callable[[Engine, Operation], Any]  # with an engine, on an operation's inputs -> that engine's array
Mask = Callable[[int, int], np.ndarray]  # numbers of queries and keys -> which query sees which key, bool (queries, keys)


@dataclass(frozen=True)
class Form:
    """One way to do an operation.

    Attributes:
        name: in the table of forms, `rope-theta` or `bias-missing`.
        compute: does it.
        fault: id in the catalogue, if it is one.
        parameters: what was fitted from the data.
        engine: the engine to do it with, instead of the judge's own (a fault's), from that one.
    """

    name: str
    compute: Compute
    fault: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    engine: Callable[[Engine], Engine] | None = None

    def values(self, engine: Engine, operation: Operation) -> np.ndarray:
        """What it gives, float64, at the positions that the trace holds."""
        engine = engine if self.engine is None else self.engine(engine)
        with np.errstate(all="ignore"):
            out = np.asarray(self.compute(engine, operation), np.float64)
        return out.reshape(-1, *operation.given.shape[1:])[operation.rows]


def again(engine: Engine, operation: Operation, **changes: Any) -> Any:
    """The operation as it is, with some arguments changed by name."""
    give = engine.from_numpy
    args = operation.args
    match operation.op:
        case "embed":
            tokens, weight = args
            return engine.embed(changes.get("tokens", tokens), changes.get("weight", weight))
        case "norm":
            x, weight, eps = args
            return engine.norm(give(changes.get("x", x)), changes.get("weight", weight), changes.get("eps", eps))
        case "matmul":
            x, weight, bias = args
            return engine.matmul(give(changes.get("x", x)), changes.get("weight", weight), changes.get("bias", bias))
        case "rope":
            x, _, theta, style, *scaled = args
            theta, style = changes.get("theta", theta), changes.get("style", style)
            positions = changes["positions"] if "positions" in changes else _positions(engine, operation)
            return engine.rope(give(x), positions, theta, style, *scaled)
        case "attend":
            return _attend(engine, operation, *(changes.get(name, arg) for name, arg in zip("qkv", args, strict=False)))
        case "swiglu":
            return engine.swiglu(give(changes.get("gate", args[0])), give(changes.get("up", args[1])))
        case _:
            return engine.add(give(args[0]), give(args[1]))


def instead(**changes: Any) -> Compute:
    """The operation with these arguments."""
    return lambda engine, operation: again(engine, operation, **changes)


def _passes(operation: Operation, count: int) -> list[slice]:
    """The prompt at once, then position by position."""
    first = operation.prompt or count
    return [slice(0, first), *(slice(n, n + 1) for n in range(first, count))]


def _positions(engine: Engine, operation: Operation) -> np.ndarray:
    """Where the engine's own cache says that the positions are."""
    count = len(operation.args[0])
    cache, found = engine.new_cache(engine.model.config, count), []
    for some in _passes(operation, count):
        found.append(cache.positions(some.stop - some.start))
        cache.advance(some.stop - some.start)
    return np.concatenate(found)


def _attend(engine: Engine, operation: Operation, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Any:
    config = replace(engine.model.config, head_count_kv=k.shape[1], head_dim=k.shape[2])
    cache, out = engine.new_cache(config, len(q)), []
    for some in _passes(operation, len(q)):
        at = cache.positions(some.stop - some.start)
        a, b, c = (engine.from_numpy(np.ascontiguousarray(x[some])) for x in (q, k, v))
        out.append(np.asarray(engine.attend(a, b, c, cache, operation.args[3], at)))
        cache.advance(len(at))
    return np.concatenate(out)


def forms(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    """Everything to try, the catalogue first."""
    yield from _catalogue(operation, judges, config)
    yield from _OWN[operation.op](operation, judges, config)
    if operation.op == "matmul":
        yield from _other_weights(operation, judges)


# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────


def _catalogue(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    for fault in FAULTS.values():
        if not fault.fits(judges.model):
            continue
        if fault.engine is not None:
            yield Form(fault.id, again, fault.id, engine=fault.engine)
        elif fault.config is not None:
            yield from _by_config(fault, operation, config)
        elif fault.registry is not None and operation.op in ("embed", "matmul"):
            yield from _by_decoder(fault, operation, judges)


def _by_config(fault: Fault, operation: Operation, config: ModelConfig) -> Iterator[Form]:
    assert fault.config is not None
    changed = fault.config(config)
    names = {"norm": {"eps": "rms_norm_eps"}, "rope": {"theta": "rope_theta", "style": "rope_type"}}.get(operation.op, {})
    changes = {to: getattr(changed, name) for to, name in names.items() if getattr(changed, name) != getattr(config, name)}
    if changes:
        yield Form(fault.id, instead(**changes), fault.id)


def _by_decoder(fault: Fault, operation: Operation, judges: Judges) -> Iterator[Form]:
    assert fault.registry is not None
    registry = fault.registry(REGISTRY)
    weight = operation.args[1]
    kind = judges.model.tensor(weight).type
    if registry.get(kind) is not REGISTRY.get(kind):
        wrong = misread(judges.model, registry, as_floats=False)
        yield Form(fault.id, again, fault.id, engine=partial(_over, wrong))


def _over(model: Model, engine: Engine) -> Engine:
    assert isinstance(engine, ContractEngine)
    return engine.over(model)


# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _norm(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    x, weight, _ = operation.args
    w = judges.model.tensor(weight).dequantise().astype(np.float64)
    yield Form("norm-weight-plus-one", lambda e, op: np.asarray(again(e, op)) * (1 + 1 / w))
    for other in _roles(weight, judges):
        yield Form("other-norm", instead(weight=other), parameters={"weight": _role(other, op_name(operation))})
    given = operation.given.reshape(-1, x.shape[-1]).astype(np.float64)  # a norm of each head has a row for each
    rows = x.reshape(-1, *operation.given.shape[1:])[operation.rows].reshape(given.shape).astype(np.float64)
    square = np.mean(rows**2, axis=-1)
    with np.errstate(all="ignore"):
        channel = np.argmax(np.abs(rows * w), axis=-1)
        at = np.arange(len(rows)), channel
        found = (rows[at] * w[channel] / given[at]) ** 2 - square
    sure = found[np.argsort(square)][: max(1, len(found) // 2)]  # where the stream is small, eps weighs most
    eps = float(np.median(sure)) if np.isfinite(sure).all() else 0.0
    if eps > 0:
        yield Form("norm-eps", instead(eps=_nice(eps)), parameters={"eps": _nice(eps)})
        yield Form("norm-eps", instead(eps=eps), parameters={"eps": eps})


def _nice(x: float) -> float:
    """The nearest of 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(x))
    return float(f"{min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda y: abs(math.log(y / x))):.12g}")


# ── rotation ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _rope(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    x, positions, theta, *_ = operation.args
    half = x.shape[-1] // 2
    yield Form("rope-missing", lambda e, op: op.args[0])
    yield Form("rope-backwards", instead(positions=-positions))
    yield Form("rope-interleaved", instead(style="norm"), "rope-norm")
    for by in (1, -1, 2, 5):
        yield Form(
            "rope-positions-shifted", instead(positions=positions + by), parameters={"by": by}
        )
    for last in (half // 2, half // 4):  # pairs that turn; the others stay
        yield Form("rope-partial", _partial(last), parameters={"turned": 2 * last})
    with np.errstate(all="ignore"):
        turned = _angles(x[operation.rows], operation.given, half)  # (P, D/2)
    at = positions[operation.rows].astype(np.float64)
    rates = {pair: _rate(turned[:, pair], at) for pair in range(half)}
    rate = rates[0]
    if rate > 0:
        yield Form(
            "rope-positions-scaled", instead(positions=positions * _nice(rate)), parameters={"by": _nice(rate)}
        )
    for pair in (half // 2, half // 4, 1, half - 1):
        if 0 < pair < half and rates[pair] > 0:
            base = rates[pair] ** (-half / pair)
            for found in {_nice(base), float(f"{base:.1e}"), base} if 1 < base < 1e12 else ():
                name = "rope-theta" if found == 1e4 and theta == 1e6 else None
                yield Form("rope-theta", instead(theta=found), name, {"theta": found})


def _angles(x: np.ndarray, y: np.ndarray, half: int) -> np.ndarray:
    """By how much each pair of halves turned, over all heads: radians ``(P, D/2)``."""
    a = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    b = y[..., :half].astype(np.float64) + 1j * y[..., half:]
    return np.angle(np.sum(b * np.conj(a), axis=1))


def _rate(turned: np.ndarray, positions: np.ndarray) -> float:
    """Radians a position, from the first positions, where no turn is whole yet; 0 where none can be told."""
    for at in (1, 2, 3):
        where = np.flatnonzero(positions == at)
        if where.size and np.isfinite(turned[where[0]]) and turned[where[0]] > 0:
            rough = turned[where[0]] / at
            later = [(p, t) for p, t in zip(positions, turned, strict=True) if p > at]
            for p, t in later:  # each later position says it more exactly, once the whole turns before it are known
                rough = (t + 2 * np.pi * np.rint((rough * p - t) / (2 * np.pi))) / p
            return float(rough)
    return 0.0


def _partial(last: int) -> Compute:
    """Only the first `last` pairs turn."""

    def compute(engine: Engine, operation: Operation) -> Any:
        x = np.asarray(operation.args[0], np.float64)
        y, half = np.array(again(engine, operation), np.float64), x.shape[-1] // 2
        for start in (0, half):
            y[..., start + last : start + half] = x[..., start + last : start + half]
        return y

    return compute


# ── attention ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _attention(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    q, k, _, _, _ = operation.args
    (_, heads, size), kv_heads = q.shape, k.shape[1]
    tried = {"none": float(size) ** 0.5, "1/D": float(size) ** -0.5, "1/√(D/2)": 2**0.5, "1/√(2D)": 2**-0.5, "twice": 2.0}
    tried |= {"1/√E": (size / config.embedding_length) ** 0.5, "1/8": math.sqrt(size) / 8, "1/√128": (size / 128) ** 0.5}
    for name, factor in tried.items():
        if abs(factor - 1) > 1e-9:
            yield Form(
                "attention-scale", _scaled(factor), parameters={"scale": name}
            )
    yield Form("attention-not-causal", _masked(lambda t, n: np.ones((t, n), bool)))
    yield Form("attention-blind-to-itself", _masked(lambda t, n: np.tri(t, n, -1, bool)))
    for window in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        if window < len(q):
            yield Form("attention-window", _masked(_window(window)), parameters={"window": window})
    first = operation.rows[np.flatnonzero(operation.wrong)[0]] if operation.wrong.any() else 0
    if first > 1:  # from some position on only what came after it is seen: another cache than the prompt's
        for name, since in (("attention-cache-empty", None), ("attention-cache-lost", int(first))):
            yield Form(
                name, _masked(_cut(int(first), since)), "kv-empty" if since is None else None, {"from": int(first)},
            )  # fmt: skip
    order = np.arange(heads).reshape(-1, kv_heads).T.reshape(-1)
    yield Form("attention-heads-dealt", lambda e, op: again(e, op, q=np.ascontiguousarray(op.args[0][:, order])))
    last = int(operation.rows[operation.wrong][-1]) + 1 if operation.wrong.any() else len(q)  # of the pass that had several
    yield Form("attention-heads-first", _heads_first(last))
    for head in (1, kv_heads - 1):
        rolled = np.roll(np.arange(kv_heads), head)
        yield Form("attention-kv-heads-rotated", _rotated(rolled), parameters={"by": head})


def _scaled(factor: float) -> Compute:
    def compute(engine: Engine, operation: Operation) -> Any:
        if not isinstance(engine, ContractEngine):
            return again(engine, operation, q=operation.args[0] * np.float32(factor))
        engine.scale_by = factor  # of the scores: q is rounded before
        try:
            return again(engine, operation)
        finally:
            engine.scale_by = 1.0

    return compute


def _rotated(order: np.ndarray) -> Compute:
    def compute(engine: Engine, operation: Operation) -> Any:
        k, v = (np.ascontiguousarray(x[:, order]) for x in operation.args[1:3])
        return again(engine, operation, k=k, v=v)

    return compute


def _window(width: int) -> Mask:
    return lambda count, keys: np.tri(count, keys, 0, bool) & ~np.tri(count, keys, -width, bool)


def _cut(first: int, since: int | None) -> Mask:
    """From query `first` on, keys before `since` are not seen; None: a query sees itself alone."""

    def mask(count: int, keys: int) -> np.ndarray:
        seen = np.tri(count, keys, 0, bool)
        if since is None:
            seen[first:] = np.eye(count, keys, dtype=bool)[first:]
        else:
            seen[first:, :since] = False
        return seen

    return mask


def _masked(mask: Mask) -> Compute:
    """Attention with another mask, in float64; what the cache rounds is rounded before."""

    def compute(engine: Engine, operation: Operation) -> np.ndarray:
        rounding = roundings.FLOATS[engine.rules.cache if isinstance(engine, ContractEngine) else "f32"]
        q, k, v = (rounding(x).astype(np.float64) for x in operation.args[:3])
        (count, heads, size), kv_heads = q.shape, k.shape[1]
        group = heads // kv_heads
        scores = np.einsum("thd,nhd->htn", q, np.repeat(k, group, axis=1)) / math.sqrt(size)
        scores = np.where(mask(count, len(k)), scores, -np.inf)
        scores = np.exp(scores - np.max(scores, -1, keepdims=True, initial=-1e300))
        total = scores.sum(-1, keepdims=True)
        scores = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
        return np.einsum("htn,nhd->thd", scores, np.repeat(v, group, axis=1)).reshape(count, heads * size)

    return compute


def _heads_first(count: int) -> Compute:
    """The result of the first `count` positions read as if heads came before positions."""

    def compute(engine: Engine, operation: Operation) -> Any:
        heads, size = operation.args[0].shape[1:]
        y = np.array(again(engine, operation)).reshape(-1, heads, size)
        y[:count] = y[:count].transpose(1, 0, 2).reshape(count, heads, size)
        return y.reshape(len(y), -1)

    return compute


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _silu(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    def of(activation: Callable[[np.ndarray], np.ndarray]) -> Compute:
        return lambda e, op: activation(op.args[0].astype(np.float64)) * op.args[1]

    yield Form("mlp-gate-and-up-exchanged", lambda e, op: again(e, op, gate=op.args[1], up=op.args[0]))
    yield Form("mlp-gelu", of(lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))))
    yield Form("mlp-gelu-erf", of(lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))))
    yield Form("mlp-gelu-quick", of(lambda z: z / (1 + np.exp(-1.702 * z))))
    yield Form("mlp-relu", of(lambda z: np.maximum(z, 0)))
    yield Form("mlp-sigmoid", of(lambda z: 1 / (1 + np.exp(-z))))
    yield Form("mlp-no-activation", of(lambda z: z))
    yield Form("mlp-gate-ignored", lambda e, op: op.args[1])
    yield Form("mlp-up-ignored", lambda e, op: op.args[0].astype(np.float64) / (1 + np.exp(-op.args[0].astype(np.float64))))


def _sum(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    yield Form("residual-missing", lambda e, op: op.args[1])
    yield Form("step-skipped", lambda e, op: op.args[0])
    yield Form("residual-twice", lambda e, op: 2 * op.args[0].astype(np.float64) + op.args[1])
    yield Form("residual-subtracted", lambda e, op: op.args[0].astype(np.float64) - op.args[1])


def _product(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    weight, bias = operation.args[1:]
    if bias is not None:
        yield Form("bias-missing", lambda e, op: again(e, op, bias=None))
        b = judges.model.tensor(bias).dequantise().astype(np.float64)
        yield Form("bias-twice", lambda e, op: np.asarray(again(e, op)) + b)
        yield Form("bias-subtracted", lambda e, op: np.asarray(again(e, op)) - 2 * b)
        for other in _roles(bias, judges):
            yield Form("other-bias", instead(bias=other), parameters={"bias": _role(other, op_name(operation))})
    if operation.step in ("q", "k"):  # the order that Llama's converter gives the rows for the other rotation
        count, half = math.prod(operation.given.shape[1:]), config.head_dim // 2
        there = np.arange(count).reshape(-1, 2, half).transpose(0, 2, 1).reshape(-1)
        for name, order in (("rows-interleaved", there), ("rows-deinterleaved", np.argsort(there))):
            yield Form(name, _ordered(order, judges, bias_too=False))
            yield Form(f"{name}-with-bias", _ordered(order, judges, bias_too=True))
    rows, cols = judges.model.tensor(weight).shape
    if rows == cols:
        yield Form("weight-transposed", lambda e, op: _transposed(op, judges))
    yield Form("step-left-out", lambda e, op: np.zeros(op.given.shape)[np.argsort(np.argsort(op.rows))])


def _ordered(order: np.ndarray, judges: Judges, *, bias_too: bool) -> Compute:
    """The rows of the weight in another order, with or without those of the bias."""

    def compute(engine: Engine, operation: Operation) -> Any:
        bias = operation.args[2]
        y = np.asarray(again(engine, operation, bias=None))[:, order]
        if bias is None:
            return y
        b = judges.model.tensor(bias).dequantise()
        return y + (b[order] if bias_too else b)

    return compute


def _transposed(operation: Operation, judges: Judges) -> np.ndarray:
    x, weight, bias = operation.args
    y = x.astype(np.float64) @ judges.model.tensor(weight).dequantise().astype(np.float64)
    return y if bias is None else y + judges.model.tensor(bias).dequantise()


def _other_weights(operation: Operation, judges: Judges) -> Iterator[Form]:
    """The same product with the matrix of another place: another role in this layer, the same role in another."""
    for other in _roles(operation.args[1], judges):
        yield Form("other-weight", instead(weight=other), parameters={"weight": _role(other, op_name(operation))})


def _roles(name: str, judges: Judges) -> list[str]:
    """Tensors of the same shape: of the same layer first, then the same role in the neighbouring layers."""
    tensors = judges.model.tensors
    parts = name.split(".")
    if parts[0] != "blk":
        return [other for other in ("output_norm.weight",) if other in tensors and other != name]
    here = [other for other in tensors if other.startswith(f"blk.{parts[1]}.") and tensors[other].shape == tensors[name].shape]
    there = [f"blk.{int(parts[1]) + by}.{'.'.join(parts[2:])}" for by in (-1, 1)]
    return [other for other in (*here, *there) if other in tensors and other != name]


def op_name(operation: Operation) -> str:
    """The weight that an operation has."""
    name: str = operation.args[1]
    return name


def _role(other: str, own: str) -> str:
    """A tensor's name without its layer, or by how many layers it is off: alike in all layers."""
    parts, mine = other.split("."), own.split(".")
    if parts[0] != "blk" or mine[0] != "blk":
        return other
    by = int(parts[1]) - int(mine[1])
    return f"blk.N{by:+d}.{'.'.join(parts[2:])}" if by else f"blk.N.{'.'.join(parts[2:])}"


def _embedding(operation: Operation, judges: Judges, config: ModelConfig) -> Iterator[Form]:
    vocabulary = config.vocab_size
    yield Form("embedding-scaled", lambda e, op: np.asarray(again(e, op)) * math.sqrt(config.embedding_length))
    for by in (1, -1):
        shifted = (operation.args[0] + by) % vocabulary
        yield Form("embedding-rows-shifted", instead(tokens=shifted), parameters={"by": by})


_OWN: dict[str, Callable[[Operation, Judges, ModelConfig], Iterator[Form]]] = {
    "norm": _norm, "rope": _rope, "attend": _attention, "swiglu": _silu, "add": _sum, "matmul": _product, "embed": _embedding,
}  # fmt: skip


def tried(form: Form, engine: Engine, operation: Operation) -> np.ndarray | None:
    """What a form gives, or None where it cannot be computed there."""
    try:
        values = form.values(engine, operation)
    except BROKEN:
        return None
    if values.shape != operation.given.shape:
        return None
    return engine.as_value(values) if isinstance(engine, ContractEngine) else values
