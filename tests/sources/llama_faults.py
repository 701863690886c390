"""llama.cpp made faulty from outside: at each point its value is replaced by what a faulty operation gives on its own inputs.

`catalogue` takes a fault's engine, config or decoder; `own` has faults that no code of the package knows, in plain NumPy.
Only what the fault changes is written; all else stays llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aprlab.architectures import points
from aprlab.engines.base import Engine
from aprlab.engines.contract_engine import ContractEngine
from aprlab.engines.contracts import Contract
from aprlab.faults import FAULTS
from aprlab.faults.apply import misread
from aprlab.formats import open_model
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import output_weight
from aprlab.model.model import Model
from aprlab.quants import REGISTRY

Edit = Callable[[str, np.ndarray, int], "np.ndarray | None"]


class Replay:
    """The operation that ends in a point, from the points that llama.cpp gave before it in the same pass."""

    def __init__(self, engine: Engine, config: Any, tokens: list[int]) -> None:
        self.engine, self.config, self.tokens = engine, config, tokens
        self.cache = engine.new_cache(config, len(tokens))
        self.positions = np.zeros(0, np.int64)
        self.shapes = points(config)

    def begin(self, count: int) -> None:
        if len(self.positions):
            self.cache.advance(len(self.positions))
        self.positions = self.cache.positions(count)

    def __call__(self, point: str, seen: dict[str, np.ndarray], start: int) -> np.ndarray:
        e, c, step = self.engine, self.config, point.split(".")[-1]
        n = int(point.split(".")[1]) if "." in point else c.block_count

        def x(name: str) -> Any:
            value = seen[name]
            return e.from_numpy(value.reshape(len(value), *self.shapes[name]))

        at, w = f"layers.{n}", f"blk.{n}"
        before = f"layers.{n - 1}.out" if n else "embed"
        products = {"q": "attn_q", "k": "attn_k", "v": "attn_v"}
        plain = {
            "attn_out": ("attn", "attn_output"), "gate": ("ffn_norm", "ffn_gate"), "up": ("ffn_norm", "ffn_up"),
            "down": ("swiglu", "ffn_down"),
        }  # fmt: skip
        if step == "embed":
            out = e.embed(np.array(self.tokens[start : start + len(self.positions)]), "token_embd.weight")
        elif step in ("attn_norm", "norm", "ffn_norm"):
            source = f"{at}.ffn_inp" if step == "ffn_norm" else before
            out = e.norm(x(source), "output_norm.weight" if step == "norm" else f"{w}.{step}.weight", c.rms_norm_eps)
        elif step in products:
            out = e.matmul(x(f"{at}.attn_norm"), f"{w}.{products[step]}.weight", f"{w}.{products[step]}.bias")
        elif step in plain:
            out = e.matmul(x(f"{at}.{plain[step][0]}"), f"{w}.{plain[step][1]}.weight")
        elif step in ("q_rope", "k_rope"):
            out = e.rope(x(f"{at}.{step[0]}"), self.positions, c.rope_theta, c.rope_type)
        elif step == "attn":
            q, k, v = (x(f"{at}.{name}") for name in ("q_rope", "k_rope", "v"))
            out = e.attend(q, k, v, self.cache, n, self.positions)
        elif step == "swiglu":
            out = e.swiglu(x(f"{at}.gate"), x(f"{at}.up"))
        elif step == "logits":
            out = e.matmul(x("norm"), output_weight(c))
        else:
            a, b = (before, f"{at}.attn_out") if step == "ffn_inp" else (f"{at}.ffn_inp", f"{at}.down")
            out = e.add(x(a), x(b))
        return np.array(e.to_numpy(out))


def faulty(opened: Model, contract: str, faults: list[str]) -> tuple[Engine, ModelConfig]:
    """An engine by this contract with faults of the catalogue, and the config that goes with it."""
    config, seen_as, registry = opened.config, opened, REGISTRY
    for fault in (FAULTS[id] for id in faults):
        config = fault.config(config) if fault.config is not None else config
        registry = fault.registry(registry) if fault.registry is not None else registry
    if registry is not REGISTRY:
        seen_as = misread(opened, registry, as_floats=False)
    engine: Engine = ContractEngine(seen_as, Contract.parse(contract))
    for fault in (FAULTS[id] for id in faults):
        engine = fault.engine(engine) if fault.engine is not None else engine
    return engine, config


def catalogue(model: str, contract: str, tokens: list[int], faults: list[str]) -> Edit:
    """Faults of the catalogue, by id."""
    opened = open_model(model)
    healthy = Replay(ContractEngine(opened, Contract.parse(contract)), opened.config, tokens)
    broken = Replay(*faulty(opened, contract, faults), tokens)
    seen: dict[str, np.ndarray] = {}

    def edit(point: str, values: np.ndarray, start: int) -> np.ndarray | None:
        if point == "embed":
            healthy.begin(len(values))
            broken.begin(len(values))
        right, found = (side(point, seen, start) for side in (healthy, broken))
        same = right.shape == found.shape and np.array_equal(right, found, equal_nan=True)
        seen[point] = values if same else found.reshape(values.shape)
        return None if same else seen[point]

    return edit


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


# step -> from its value, and the points seen before (by step, in the same layer), another value
OWN: dict[str, tuple[str, Callable[[np.ndarray, dict[str, np.ndarray]], np.ndarray]]] = {
    "gelu": ("swiglu", lambda y, s: _gelu(s["gate"].astype(np.float64)) * s["up"]),
    "relu": ("swiglu", lambda y, s: np.maximum(s["gate"], 0) * s["up"]),
    "gate-for-up": ("swiglu", lambda y, s: s["up"] / (1 + np.exp(-s["up"].astype(np.float64))) * s["gate"]),
    "q-not-rotated": ("q_rope", lambda y, s: s["q"].reshape(y.shape)),
    "no-residual": ("ffn_inp", lambda y, s: s["attn_out"]),
    "mlp-skipped": ("out", lambda y, s: s["ffn_inp"]),
    "residual-twice": ("out", lambda y, s: y + s["ffn_inp"].astype(np.float64)),
    "half": ("down", lambda y, s: y * 0.5),
    "constant": ("v", lambda y, s: y + np.linspace(-1, 1, y.shape[-1])),
    "one-channel": ("up", lambda y, s: np.where(np.arange(y.shape[-1]) == 7, 0, y)),
    "one-head": ("q", lambda y, s: np.where(np.arange(y.shape[-1]) // 32 == 2, 0, y)),
    "channels-reversed": ("attn_out", lambda y, s: y[..., ::-1]),
    "heads-first": ("attn", lambda y, s: y.reshape(len(y), 8, -1).transpose(1, 0, 2).reshape(y.shape)),
    "not-a-number": ("gate", lambda y, s: np.where(np.arange(y.shape[-1]) == 3, np.nan, y)),
}  # fmt: skip


def own(name: str, layers: list[int] | None = None, first: int = 0) -> Edit:
    """One of `OWN`, in all layers or some, from one position on."""
    at, change = OWN[name]
    seen: dict[str, dict[str, np.ndarray]] = {}

    def edit(point: str, values: np.ndarray, start: int) -> np.ndarray | None:
        if not point.startswith("layers."):
            return None
        _, layer, step = point.split(".")
        here = seen.setdefault(layer, {})
        here[step] = values
        if step != at or (layers is not None and int(layer) not in layers) or start + len(values) <= first:
            return None
        changed = values.copy()
        wrong = np.asarray(change(values, here), np.float32)
        changed[max(0, first - start) :] = wrong[max(0, first - start) :]
        here[step] = changed
        return changed

    return edit
