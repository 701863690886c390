"""Config: the numbers of the forward pass, field by field."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from aprlab.formats import apr
from aprlab.formats.raw import CONFIG_FIELDS, MISSING, Conflict, Wrong
from aprlab.model.architecture import ARCHITECTURES
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.layers._keys import key_deviations
from aprlab.onion.layers.layer import Layer
from aprlab.onion.words import Mechanism
from aprlab.published import known_models

EPSILONS = (float(np.float32(1e-6)), float(np.float32(1e-5)))  # all that Qwen2 models were published with

# Numbers that no run can notice: the context only bounds it.
_QUIET = ("context_length",)


class ConfigLayer(Layer):
    """Against the reference's config, or against what is known of models of this shape."""

    name: ClassVar[str] = "config"
    kinds: ClassVar[tuple[str, ...]] = ("config",)
    shown: ClassVar[tuple[str, ...]] = ("config",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        if case.file.unrun is not None:
            return list(key_deviations(case, of_tokenizer=False))
        known = case.expected_config or {**prior(case.file.config), **by_shapes(case)}
        found = []
        for name in CONFIG_FIELDS:
            value = case.file.config[name]
            expected = known.get(name, value)
            if value == MISSING or isinstance(value, Conflict):
                keys, default = apr.CONFIG_KEYS[name]  # rotary scaling is never missing: none is a value
                cause = Mechanism("config.missing", {"field": name, "default": default})
                if value != MISSING:
                    cause = Mechanism("config.conflict", {"field": name, "found": str(value)})
                found.append(Deviation("config", name, str(value), expected, cause, evidence={"keys": list(keys)}))
            elif isinstance(value, Wrong):
                cause = Mechanism("config.wrong-kind", {"field": name, "found": str(value)})
                known_value = None if expected is value else expected
                found.append(Deviation("config", name, str(value), known_value, cause))
            elif value != expected:
                harmless = name in _QUIET and isinstance(value, int) and value >= 1
                cause = Mechanism("config.value-differs", {"field": name, "found": value, "expected": expected})
                sure = 1.0 if case.ref is not None else 0.9
                found.append(Deviation("config", name, value, expected, cause, confidence=sure, harmless=harmless))
        return found

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        draft.config[deviation.tensor] = deviation.expected


def prior(config: dict[str, Any]) -> dict[str, Any]:
    """What is known about the model these numbers belong to: by its architecture, and by its width and depth."""
    known: dict[str, Any] = {}
    kind = ARCHITECTURES.get(str(config.get("architecture")))
    if kind is not None:
        known["rope_type"] = kind.rope_type
    if config.get("architecture") == "qwen2" and isinstance(eps := config.get("rms_norm_eps"), float) and eps not in EPSILONS:
        known["rms_norm_eps"] = EPSILONS[0]
    for model in known_models().values():
        if all(model.config.get(key) == config.get(key) for key in ("block_count", "embedding_length")):
            known |= {k: v for k, v in model.config.items() if k in CONFIG_FIELDS}
            for name in ("rope_theta", "rms_norm_eps"):
                known[name] = float(np.float32(known[name]))
            known["head_dim"] = known["embedding_length"] // known["head_count"]
            known.pop("vocab_size", None)  # published twice: with and without padding
    return known


def by_shapes(case: FileCase) -> dict[str, Any]:
    """Numbers of the config that all layers' matrices agree on and the config contradicts: how many heads keys have."""
    config = case.file.config
    size, heads, width = (config[name] for name in ("head_dim", "head_count", "embedding_length"))
    shapes = {m.true: m.piece.shape for m in case.matches if m.true is not None}
    keys = [(name, shape) for name, shape in shapes.items() if name.endswith("attn_k.weight")]
    if not keys or not all(isinstance(n, int) and n > 0 for n in (size, heads, width)):
        return {}
    queries = {shape for name, shape in shapes.items() if name.endswith("attn_q.weight")}
    if queries != {(heads * size, width)}:
        return {}
    rows = {shape[0] for _, shape in keys if shape[1:] == (width,)}
    biases = {shapes.get(name.replace("weight", "bias")) for name, _ in keys}
    if len(rows) != 1 or biases - {None, (min(rows),)} or any(shape[1:] != (width,) for _, shape in keys):
        return {}
    count, left = divmod(min(rows), size)
    return {"head_count_kv": count} if not left and count and not heads % count else {}


__all__ = ["EPSILONS", "ConfigLayer", "by_shapes", "prior"]
