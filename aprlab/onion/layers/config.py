"""Config: the numbers of the forward pass, field by field."""

from __future__ import annotations

from typing import Any, ClassVar

from aprlab.formats import apr
from aprlab.formats.raw import CONFIG_FIELDS, MISSING, Conflict
from aprlab.onion.layers.base import Case, Deviation, Layer
from aprlab.published import known_models

# Numbers that no run can notice: the context only bounds it.
_QUIET = ("context_length",)


class Config(Layer):
    """Against the reference's config, or against what is known of models of this shape."""

    name: ClassVar[str] = "config"

    def suspect(self, case: Case) -> list[Deviation]:
        due = case.due_config or prior(case.seen.config)
        found = []
        for name in CONFIG_FIELDS:
            value = case.seen.config[name]
            wanted = due.get(name, value)
            if value == MISSING or isinstance(value, Conflict):
                keys, default = apr.CONFIG_KEYS[name]
                lost = f"{name} is missing; upstream would assume {default}"
                how = lost if value == MISSING else f"{name} stands there twice: {value}"
                found.append(Deviation("config", "config", name, str(value), wanted, how, evidence={"keys": list(keys)}))
            elif value != wanted:
                harmless = name in _QUIET and isinstance(value, int) and value >= 1
                how = f"{name} is {value!r}, not {wanted!r}"
                sure = 1.0 if case.ref is not None else 0.9
                found.append(Deviation("config", "config", name, value, wanted, how, confidence=sure, harmless=harmless))
        return found


def prior(config: dict[str, Any]) -> dict[str, Any]:
    """What is known about the model these numbers belong to, by its width and depth; NEOX for every Qwen2."""
    due: dict[str, Any] = {}
    if config.get("architecture") == "qwen2":
        due["rope_type"] = "neox"
    for model in known_models().values():
        if all(model.config.get(key) == config.get(key) for key in ("block_count", "embedding_length")):
            import numpy as np

            due |= {k: v for k, v in model.config.items() if k in CONFIG_FIELDS}
            for name in ("rope_theta", "rms_norm_eps"):
                due[name] = float(np.float32(due[name]))
            due["head_dim"] = due["embedding_length"] // due["head_count"]
            due.pop("vocab_size", None)  # published twice: with and without padding
    return due
