"""Faults of llama.cpp, found and named: `python tests/sources/foreign_evidence.py [ID …]` prints a line for each.

llama.cpp is made faulty in three ways: by operations of the catalogue that are put in from outside, by operations that
no code of the package knows (`llama_faults.OWN`), and by edited files, so that llama.cpp itself computes wrongly. The
judge has the healthy file, the embedded model.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]  # the package, and helpers of the tests

from variants import variant  # noqa: E402

from aprlab.architectures import forward  # noqa: E402
from aprlab.engines.contract_engine import ContractEngine  # noqa: E402
from aprlab.faults import FAULTS, Fault  # noqa: E402
from aprlab.formats import open_model  # noqa: E402
from aprlab.model.model import Model  # noqa: E402
from aprlab.model.tensor import Tensor  # noqa: E402
from aprlab.onion import source_peeling  # noqa: E402
from aprlab.onion.verdict import Verdict  # noqa: E402
from aprlab.paths import embedded_model  # noqa: E402
from aprlab.quants import REGISTRY  # noqa: E402
from aprlab.sources.llama_cpp import LlamaSource  # noqa: E402

PROMPT = "What is 2+2?"
# Every value is right in these: loops; wasted work; a rounding to 8 bits of what llama.cpp rounds to 8 bits itself.
NOT_OPERATIONS = ("kv-refed", "last-token-twice", "cache-key-mismatch", "prefill-decode", "q8-activations")


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        kind: ``catalogue``, ``own`` or ``file``.
        step: where it is introduced; '' where the faulty run itself says it (`expected_step`).
        names: any of these is the right name: a fault's id, a form, or a mark of what is known.
        keys, tensors: of an edited file.
        given: more for `llama_faults.own`.
    """

    id: str
    kind: str
    step: str
    names: tuple[str, ...]
    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Model], Mapping[str, Tensor]] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


def zeroed(*names: str) -> Callable[[Model], Mapping[str, Tensor]]:
    """Tensors of zeros."""
    return lambda m: {n: t.replace(raw=np.zeros(t.nbytes, np.uint8)) for n, t in m.tensors.items() if n.endswith(names)}


def exchanged(first: str, second: str) -> Callable[[Model], Mapping[str, Tensor]]:
    """Two roles under each other's name, in every layer."""

    def change(model: Model) -> Mapping[str, Tensor]:
        out = {}
        for n in range(model.config.block_count):
            a, b = (model.tensor(f"blk.{n}.{role}") for role in (first, second))
            out |= {a.name: b.replace(name=a.name), b.name: a.replace(name=b.name)}
        return out

    return change


def floats(role: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Model], Mapping[str, Tensor]]:
    """Another content of one role of F32, in every layer."""
    return lambda m: {
        n: t.replace(raw=np.frombuffer(change(t.dequantise()).astype(np.float32).tobytes(), np.uint8))
        for n, t in m.tensors.items()
        if n.endswith(role)
    }


def rows(role: str, order: Callable[[int], np.ndarray]) -> Callable[[Model], Mapping[str, Tensor]]:
    """The rows of one role in another order: whole blocks, nothing decoded."""
    return lambda m: {
        n: t.replace(raw=np.ascontiguousarray(t.blocks()[order(t.rows)]).reshape(-1))
        for n, t in m.tensors.items()
        if n.endswith(role)
    }


def _interleaved(count: int) -> np.ndarray:
    """Llama's permutation of Q and K for the other rotation, heads of 32."""
    return np.arange(count).reshape(-1, 2, 16).transpose(0, 2, 1).reshape(-1)


def layer_from(role: str, by: int) -> Callable[[Model], Mapping[str, Tensor]]:
    """One role of each layer from a neighbour."""

    def change(model: Model) -> Mapping[str, Tensor]:
        count = model.config.block_count
        pairs = [(f"blk.{n}.{role}", f"blk.{n + by}.{role}") for n in range(count) if 0 <= n + by < count]
        same = [(a, b) for a, b in pairs if model.tensor(a).type == model.tensor(b).type]
        return {a: model.tensor(b).replace(name=a) for a, b in same}

    return change


EPS, BASE = "qwen2.attention.layer_norm_rms_epsilon", "qwen2.rope.freq_base"
FILES = (
    Case("file theta 1e4", "file", "q_rope", ("rope-theta",), {BASE: 10_000.0}),
    Case("file theta 5e5", "file", "q_rope", ("rope-theta",), {BASE: 500_000.0}),
    Case("file theta 8e6", "file", "q_rope", ("rope-theta",), {BASE: 8e6}),
    Case("file eps 1e-5", "file", "attn_norm", ("norm-eps",), {EPS: 1e-5}),
    Case("file eps 1e-3", "file", "attn_norm", ("wrong-eps", "norm-eps"), {EPS: 1e-3}),
    Case("file rope scaling", "file", "q_rope", ("rope-positions-scaled",),
         {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}),
    Case("file q bias 0", "file", "q", ("lost-q-biases", "bias-missing"), tensors=zeroed("attn_q.bias")),
    Case("file k bias 0", "file", "k", ("lost-k-biases", "bias-missing"), tensors=zeroed("attn_k.bias")),
    Case("file v bias 0", "file", "v", ("lost-v-biases", "bias-missing"), tensors=zeroed("attn_v.bias")),
    Case("file qkv biases 0", "file", "q", ("lost-qkv-biases",),
         tensors=zeroed("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    Case("file k bias doubled", "file", "k", ("bias-twice",), tensors=floats("attn_k.bias", lambda b: 2 * b)),
    Case("file k bias negative", "file", "k", ("bias-subtracted",), tensors=floats("attn_k.bias", lambda b: -b)),
    Case("file k and v biases exchanged", "file", "k", ("other-bias",), tensors=exchanged("attn_k.bias", "attn_v.bias")),
    Case("file gate and up exchanged", "file", "gate", ("other-weight",),
         tensors=exchanged("ffn_gate.weight", "ffn_up.weight")),
    Case("file norms exchanged", "file", "attn_norm", ("wrong-norm", "other-norm"),
         tensors=exchanged("attn_norm.weight", "ffn_norm.weight")),
    Case("file norm plus one", "file", "attn_norm", ("norm-weight-plus-one",),
         tensors=floats("attn_norm.weight", lambda w: w + 1)),
    Case("file norm ones", "file", "attn_norm", ("unweighted-norm",),
         tensors=lambda m: {**floats("_norm.weight", np.ones_like)(m)}),
    Case("file up of the layer before", "file", "up", ("other-weight",), tensors=layer_from("ffn_up.weight", -1)),
    Case("file q rows interleaved", "file", "q", ("rows-interleaved", "rows-deinterleaved"),
         tensors=rows("attn_q.weight", _interleaved)),
    Case("file embedding rows shifted", "file", "embed", ("embedding-rows-shifted",),
         tensors=rows("token_embd.weight", lambda n: np.roll(np.arange(n), -1))),
)  # fmt: skip
OWN = (
    Case("gelu", "own", "swiglu", ("mlp-gelu",)), Case("relu", "own", "swiglu", ("mlp-relu",)),
    Case("gate-for-up", "own", "swiglu", ("mlp-gate-and-up-exchanged",)),
    Case("q-not-rotated", "own", "q_rope", ("rope-missing",)), Case("no-residual", "own", "ffn_inp", ("residual-missing",)),
    Case("mlp-skipped", "own", "out", ("step-skipped",)), Case("residual-twice", "own", "out", ("residual-twice",)),
    Case("half", "own", "down", ("scaled_by",)), Case("constant", "own", "v", ("constant_added",)),
    Case("one-channel", "own", "up", ("channels",)), Case("one-head", "own", "q", ("heads",)),
    Case("channels-reversed", "own", "attn_out", ("permuted",)),
    Case("heads-first", "own", "attn", ("attention-heads-first", "permuted")),
    Case("not-a-number", "own", "gate", ("not_finite",)),
    Case("relu in layer 3 while decoding", "own", "swiglu", ("mlp-relu",), given={"name": "relu", "layers": [3], "first": 30}),
)  # fmt: skip


def catalogue_cases() -> list[Case]:
    """Run forms of the catalogue that are operations, and that change something in this model."""
    model = open_model(embedded_model())
    kinds = {t.type for t in model.tensors.values()}

    def enters(fault: Fault) -> bool:
        if fault.id in NOT_OPERATIONS or not fault.fits(model):
            return False
        if fault.registry is not None:
            registry = fault.registry(REGISTRY)
            return any(registry.get(kind) is not REGISTRY.get(kind) for kind in kinds)
        if fault.config is not None:
            changed = fault.config(model.config)
            return any(getattr(changed, n) != getattr(model.config, n) for n in ("rms_norm_eps", "rope_theta", "rope_type"))
        return fault.engine is not None

    return [Case(id, "catalogue", "", (id,)) for id, fault in FAULTS.items() if enters(fault)]


CONTRACT = "q8, cache f16"


def source_for(case: Case, tokens: list[int], folder: Path) -> LlamaSource:
    """llama.cpp with the fault in it."""
    model = embedded_model()
    if case.kind == "file":
        tensors = case.tensors(open_model(model)) if case.tensors is not None else None
        edited = variant(model, folder / "edited.gguf", keys=case.keys, tensors=tensors)
        return LlamaSource(replace(open_model(model), path=edited))  # our reader would refuse some of them
    if case.kind == "own":
        return LlamaSource(model, edit=("llama_faults:own", {"name": case.id, **case.given}))
    given = {"model": str(model), "contract": CONTRACT, "tokens": tokens, "faults": [case.id]}
    return LlamaSource(model, edit=("llama_faults:catalogue", given))


def expected_step(case: Case, tokens: list[int], asked: int) -> str:
    """Where the fault first changes a run of ours, prompt and then decoding."""
    if case.step:
        return case.step
    from llama_faults import faulty

    model = open_model(embedded_model())
    runs = []
    for engine, config in ((ContractEngine(model), model.config), faulty(model, "f32", [case.id])):
        seen: list[tuple[str, np.ndarray]] = []
        cache = engine.new_cache(config, len(tokens))
        for some in (tokens[:asked], *([t] for t in tokens[asked:])):
            forward(engine, config, some, cache, lambda p, x, seen=seen, e=engine: (seen.append((p, e.to_numpy(x))), x)[1])
        runs.append(seen)
    pairs = zip(*runs, strict=True)
    return next((p.split(".")[-1] for (p, a), (_, b) in pairs if not np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)), "none")


def named(verdict: Verdict) -> set[str]:
    """Everything that the findings call it."""
    out: set[str] = set()
    for finding in verdict.findings:
        out |= {finding.fault or "", str(finding.parameters.get("form", "")), str(finding.parameters.get("field", ""))}
        out |= set(finding.evidence.get("computes_the_same_as", ())) | set(finding.evidence.get("looks_like", {}))
    return out


def examine(case: Case, folder: Path) -> tuple[Verdict, bool, bool, str]:
    """The verdict, whether the step is right, whether the name is, and the step that was expected."""
    model = open_model(embedded_model())
    tokens, asked = source_peeling.tokens_for(model, PROMPT, None)
    expected = expected_step(case, tokens, asked)
    with source_for(case, tokens, folder) as source:
        verdict = source_peeling.peel_sources(model, [source], prompt=PROMPT)
    first = (verdict.first_divergence or {}).get("point", "nowhere").split(".")[-1]
    return verdict, first == expected, bool(named(verdict) & set(case.names)), expected


def main(only: list[str]) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    right = called = proved = count = 0
    for case in (*FILES, *OWN, *catalogue_cases()):
        if only and case.id not in only:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            verdict, step, name, expected = examine(case, Path(folder))
        proof = verdict.repair.proof if verdict.repair is not None else {}
        restored = proof.get("with the right values injected", {}).get("likeliest token equal", "none")
        whole = restored.split(" of ")[0] == restored.split(" of ")[-1] and restored != "none"
        count, right, called, proved = count + 1, right + step, called + name, proved + whole
        what = [f.fault or f.parameters.get("form") or f.evidence.get("looks_like", f.code) for f in verdict.findings]
        words = f"{verdict.verdict:10} step {'ok' if step else f'WRONG, expected {expected}'} name {'ok' if name else 'OTHER'}"
        print(f"{case.kind:9} {case.id:32} {words} {what} restored {restored} {time.perf_counter() - started:.1f} s", flush=True)
    print(f"{count} faults: step right {right}, named {called}, answer restored by injection {proved}")


if __name__ == "__main__":
    main(sys.argv[1:])
