"""What differs between two runs, part by part: operations, config, tokenizer, loop, cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from aprlab.engines.base import Array
from aprlab.errors import BROKEN, AprlabError
from aprlab.faults import FAULTS, Fault
from aprlab.faults.apply import loop_of
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import ModelConfig
from aprlab.onion.decode_counts import decodings
from aprlab.onion.operation_search import OperationSearch, find_pair
from aprlab.onion.shadow import Call, Group, Shadow
from aprlab.onion.verdict import Finding, known
from aprlab.onion.words import Mechanism

_TEXTS = (
    "What is 2+2?", "Add 12 and 345:\n\n  x = 7\r\n", "<|im_start|>user\nhello<|im_end|>\n", "naïve Übung, 你好", "don't   stop",
)  # fmt: skip


@dataclass(eq=False)
class RunPart:
    """Something that differs between two sides, and how to put it right on the broken one."""

    finding: Finding
    groups: set[Group] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: bool = False
    data: tuple[str, ...] = ()
    loop: bool = False


def operation_parts(a: Session, b: Session, seen: Shadow) -> list[RunPart]:
    """Findings about operations: faults of the catalogue that give what was seen, exactly; then what is left."""
    wrong = [c for c in seen.calls if c.difference is not None]
    groups = {c.group for c in wrong}
    parts: list[RunPart] = []
    if not groups:
        return parts
    guesses = OperationSearch(a, b.engine.name, seen)
    holders: list[tuple[Fault, set[Group]]] = []
    partial: list[Fault] = []
    for fault in FAULTS.values():
        if fault.engine is None and fault.registry is None:
            continue
        touched, held = guesses.touched([fault])
        if touched and touched == held:
            holders.append((fault, touched))
        elif touched and touched <= groups:
            partial.append(fault)
    left, chosen = set(groups), []
    while holders and left:
        fault, marks = max(holders, key=lambda pair: (len(pair[1] & left), -len(pair[1])))
        if not marks & left:
            break
        chosen.append((fault, marks, [f.id for f, m in holders if f is not fault and m == marks]))
        left -= marks
        holders = [(f, m) for f, m in holders if f is not fault]
    if left:
        own = [f for f, _, _ in chosen]
        pair = find_pair(guesses, own, [*own, *(f for f, _ in holders), *partial])
        if pair is not None:
            chosen = [(f, guesses.touched([f])[0] or groups, []) for f in pair]
            left = set()
    for fault, marks, same in chosen:
        evidence = _figures([c for c in wrong if c.group in marks])
        if same:
            evidence["computes_the_same_as"] = same
        tensors = _weights([c for c in wrong if c.group in marks])
        parts.append(RunPart(Finding(fault.layer, fault.id, tensors, known(fault), evidence), marks))
    if left:
        rest = [c for c in wrong if c.group in left]
        evidence = _figures(rest)
        cause = _guess_cause(a, rest)
        parts.append(RunPart(Finding(cause.layer, None, _weights(rest), cause, evidence, 0.8), left))
    return parts


def _figures(calls: list[Call]) -> dict[str, Any]:
    """Where operations differ on the same input: how many, the first, prompt or decoding, position 0 or later."""
    first = calls[0]
    found: dict[str, Any] = {
        "operations": sorted({c.op for c in calls}),
        "calls": len(calls),
        "introduced_at": {"operation": first.op, **(first.difference or {})},
        "in_prefill": any(c.group[2] == "prefill" for c in calls),
        "in_decode": any(c.group[2] == "decode" for c in calls),
    }
    zero = [
        c.difference["position_0_equal"] for c in calls if c.difference and "position_0_equal" in c.difference and len(c.out) > 1
    ]
    if zero:
        found["position_0_equal"] = all(zero)
    return found


def _weights(calls: list[Call]) -> list[str]:
    return list(dict.fromkeys(c.args[1] for c in calls if c.op in ("embed", "norm", "matmul")))


def _guess_cause(a: Session, calls: list[Call]) -> Mechanism:
    """A cause for operations that no known fault explains."""
    ops = {c.op for c in calls}
    kinds = {a.model.tensors[c.args[1]].type.name for c in calls if c.op in ("embed", "matmul") and c.args[1] in a.model.tensors}
    constant = [c for c in calls if c.op == "matmul" and c.other is not None and len(c.out) > 1 and _constant(c)]
    if constant and len(constant) == sum(c.op == "matmul" and len(c.out) > 1 for c in calls) and ops == {"matmul"}:
        return Mechanism("weights.constant-added")
    if ops <= {"embed", "matmul"}:
        return Mechanism("decode.products-differ", {"types": sorted(kinds)})
    return Mechanism("forward.operations-differ", {"operations": sorted(ops)})


def _constant(call: Call) -> bool:
    assert call.other is not None
    delta = call.other.astype(np.float64) - call.out
    scale = np.abs(delta).max() or 1.0
    return bool(np.abs(delta - delta[0]).max() < 1e-4 * scale)


# ── config and tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────


def config_parts(a: Session, b: Session) -> list[RunPart]:
    """Fields of the config that differ, put together by the faults that set them so."""
    differ = {
        f.name: getattr(b.config, f.name) for f in fields(ModelConfig) if getattr(a.config, f.name) != getattr(b.config, f.name)
    }
    return _records(a.config, differ, "config", lambda fault: fault.config)


def tokenizer_data_parts(a: Session, b: Session) -> list[RunPart]:
    """Fields of the tokenizer data that differ."""
    left, right = a.model.tokenizer, b.model.tokenizer
    differ = {f.name: getattr(right, f.name) for f in fields(type(left)) if getattr(left, f.name) != getattr(right, f.name)}
    return _records(left, differ, "tokenizer", lambda fault: fault.tokenizer)


def _records(expected: Any, differ: dict[str, Any], layer: str, seam: Callable[[Fault], Any]) -> list[RunPart]:
    parts: list[RunPart] = []
    left = dict(differ)
    for fault in FAULTS.values():
        change = seam(fault)
        if change is None or not left:
            continue
        try:
            after = change(expected)
        except (AprlabError, ValueError):
            continue
        new = {f.name: getattr(after, f.name) for f in fields(type(expected))}
        changed = {name: value for name, value in new.items() if value != getattr(expected, name)}
        if changed and all(name in left and left[name] == value for name, value in changed.items()):
            found = {name: _brief(value) for name, value in changed.items()}
            evidence = {"found": found, "expected": {name: _brief(getattr(expected, name)) for name in changed}}
            parts.append(RunPart(Finding(fault.layer, fault.id, [], known(fault), evidence), data=tuple(changed)))
            for name in changed:
                left.pop(name)
    for name, value in left.items():
        evidence = {"found": _brief(value), "expected": _brief(getattr(expected, name))}
        cause = Mechanism(f"{layer}.field-differs", {"field": name})
        parts.append(RunPart(Finding(layer, None, [], cause, evidence), data=(name,)))
    for part in parts:
        if layer == "config":
            part.config = {name: getattr(expected, name) for name in part.data}
    return parts


def _brief(value: Any) -> Any:
    return (
        f"{len(value)} entries"
        if isinstance(value, list)
        else (value if len(str(value)) < 80 else f"{len(str(value))} characters")
    )


def _behaviour(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """What a tokenizer does: ids of some texts, bytes of every token, ids that end an answer."""
    step = max(1, tokenizer.vocab_size // 5000)
    return {
        "encoding": [tokenizer.encode(text) for text in _TEXTS],
        "text of tokens": [tokenizer.token_bytes(n) for n in range(0, tokenizer.vocab_size, step)],
        "ends of answers": sorted(tokenizer.eog),
    }


def tokenizer_parts(b: Session) -> list[RunPart]:
    """Where the tokenizer does not do what its own data require: encoding, printing, stopping."""
    sound = Qwen2Tokenizer(b.model.tokenizer)
    expected, found = _behaviour(sound), _behaviour(b.tokenizer)
    wrong = {name for name in expected if expected[name] != found[name]}
    if not wrong:
        return []
    prompts = [f for f in FAULTS.values() if f.prompt is not None]
    guesses: list[tuple[list[Fault], dict[str, Any]]] = []
    for some in [[f] for f in prompts] + [[f, g] for f in prompts for g in prompts if f is not g]:
        tokenizer = sound
        for fault in some:
            assert fault.prompt is not None
            tokenizer = fault.prompt(tokenizer)
        guesses.append((some, _behaviour(tokenizer)))
        if guesses[-1][1] == found:
            break
    exact = [some for some, did in guesses if did == found]
    if exact:
        out = []
        for fault in exact[0]:
            assert fault.prompt is not None
            did = _behaviour(fault.prompt(sound))
            evidence = {"differs_in": sorted(name for name in expected if did[name] != expected[name])}
            out.append(RunPart(Finding(fault.layer, fault.id, [], known(fault), evidence), tokenizer=True))
        return out
    cause = Mechanism("tokenizer.behaviour-differs", {"what": sorted(wrong)})
    return [RunPart(Finding("tokenizer", None, [], cause), tokenizer=True)]


# ── loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────


_FED = 4  # tokens of an answer for which a loop is watched


def fed(loop: type[Session], a: Session, ids: Sequence[int]) -> list[tuple[int, list[int]]]:
    """What a loop feeds to a sound engine for a prompt: position of the first token and tokens of each pass."""
    passes: list[tuple[int, list[int]]] = []

    def on_embed(y: Array, tokens: np.ndarray, weight: str) -> None:
        passes.append((-1, np.asarray(tokens).tolist()))

    def on_rope(y: Array, x: Array, positions: np.ndarray, *turn: Any) -> None:
        passes[-1] = (int(positions[0]), passes[-1][1])

    session = loop(a.engine, config=a.config, tokenizer=a.tokenizer)
    with a.engine.hooked("embed", on_embed), a.engine.hooked("rope", on_rope):
        session.generate(list(ids), max_tokens=_FED)
    return passes


def loop_parts(a: Session, b: Session, ids: Sequence[int]) -> list[RunPart]:
    """Where the loop around the engine feeds it something else, although each pass is right in itself."""
    if type(b) is type(a):
        return []
    expected, found = fed(type(a), a, ids), fed(type(b), a, ids)
    if expected == found:
        return []
    loops = [f for f in FAULTS.values() if f.session is not None]
    both = {"expected": expected, "found": found}
    at = next((n for n, (x, y) in enumerate(zip(expected, found, strict=False)) if x != y), min(map(len, both.values())))
    evidence = {"differs_at_pass": at, **{word: _pass(passes[at]) for word, passes in both.items() if at < len(passes)}}
    for some in [[f] for f in loops] + [list(pair) for pair in itertools.permutations(loops, 2)]:
        if fed(loop_of(some), a, ids) == found:
            return [RunPart(Finding(f.layer, f.id, [], known(f), evidence), loop=True) for f in some]
    return [RunPart(Finding("forward", None, [], Mechanism("forward.loop-differs"), evidence), loop=True)]


def _pass(one: tuple[int, list[int]]) -> str:
    start, tokens = one
    return f"{len(tokens)} token{'s' * (len(tokens) != 1)} from position {start} on, the last {tokens[-1]}"


# ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def cost_parts(a: Session, b: Session, token: int) -> list[RunPart]:
    """Wasted work: values right, weights decoded again for every product."""
    try:
        mine, theirs = decodings(a.engine, a.config, token), decodings(b.engine, a.config, token)
    except BROKEN:
        return []
    more = sorted(name for name, count in theirs.items() if count > mine.get(name, 0))
    if not more:
        return []
    evidence = {"decoded_again": len(more), "expected": sum(mine.values())}
    for fault in FAULTS.values():
        if fault.engine is not None and fault.silent and fault.fits(a.model) and a.engine.name == b.engine.name:
            try:
                if decodings(fault.engine(a.engine), a.config, token) == theirs:
                    return [RunPart(Finding(fault.layer, fault.id, more, known(fault), evidence, harmless=True))]
            except BROKEN:
                continue
    return [RunPart(Finding("forward", None, more, Mechanism("forward.decoded-again"), evidence, harmless=True))]
