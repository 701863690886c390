"""Faults of the catalogue that leave exactly these fields of config and tokenizer: asked of the faults' own converters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aprlab.conversion.seams import healthy_seams
from aprlab.errors import BROKEN
from aprlab.faults import FAULTS
from aprlab.formats import apr
from aprlab.formats.raw import MISSING, TOKENIZER_KEYS, Wrong, unusable
from aprlab.model import rope
from aprlab.onion.file_case import Deviation, FileCase

_SCALING = "rope_scaling"

# What a field may have been before, where only the fault knows what it made of it.
_BEFORE: dict[str, Any] = {
    "merges": ["Ġ t"], "chat_template": "{{ messages }}", "tokens": ["x"], "token_types": [1, 3], "pre": "qwen2",
    "eos_token_id": 1, "rope_type": 2, "rope_theta": 1.0, "rms_norm_eps": 1.0, "head_count_kv": 1,
}  # fmt: skip


def faults_of_fields(case: FileCase) -> dict[str, list[Deviation]]:
    """Fault id -> the deviations of config and tokenizer that it alone leaves; {} where none leaves them all."""
    work = [d for d in case.deviations if d.kind in ("config", "tokenizer") and not d.harmless]
    if not work:
        return {}
    after = _metadata(case)
    named: dict[str, list[Deviation]] = {}
    for kind in ("config", "tokenizer"):
        part = [d for d in work if d.kind == kind]
        if [d.code for d in part] == ["tokenizer.template-nests"]:
            named["template-doubled"] = part  # applied once more it nests deeper; it is told by the prompt, not by the field
            continue
        for fault in FAULTS.values() if part else ():
            if fault.seams is None or fault.layer != kind:
                continue
            try:
                change = fault.seams(healthy_seams(apr.DIALECTS["aprender"])).metadata
                again = {key: _as_written(value) for key, value in change(after).items()}
                if again == after and _makes(change, after, part):
                    named[fault.id] = part
                    break
            except (*BROKEN, LookupError, ArithmeticError, StopIteration):
                continue
    return named


def _makes(change: Any, after: dict[str, Any], work: Sequence[Deviation]) -> bool:
    """Whether the fault makes each of these fields what it is, of something else, and leaves all others alone."""
    fields = {d.tensor for d in work}
    before = dict(after)
    possible = {**_BEFORE, "token_types": [3] * len(after.get(_key("token_types")) or ())}
    if not fields <= _BEFORE.keys():
        return False
    for name in fields:
        key = _key(name)
        before[key] = possible[name] if possible[name] != after.get(key) else None
    made = {key: _as_written(value) for key, value in change(before).items()}
    changed = {key for key in {*before, *made} if made.get(key) != before.get(key)}
    return changed == {_key(name) for name in fields} and made == after


def _metadata(case: FileCase) -> dict[str, Any]:
    """Config and tokenizer of the file as APR metadata, each field under its first key."""
    both = {**case.file.config, **case.file.tokenizer}
    fields = {name: value for name, value in both.items() if name in apr.CONFIG_KEYS or name in TOKENIZER_KEYS}
    found = {_key(name): value for name, value in fields.items() if value != MISSING and not isinstance(value, Wrong)}
    codes = {name: code for code, name in apr.ROPE_TYPES.items()}
    if (kind := found.get("rope_type")) in codes:
        found["rope_type"] = codes[kind]
    if isinstance(scaling := found.get(_SCALING), rope.RopeScaling):
        found[_SCALING] = rope.to_huggingface(scaling)
    return {key: _as_written(value) for key, value in found.items() if not unusable(value)}


def _as_written(value: Any) -> Any:
    """Floats are float32 in every file."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _key(name: str) -> str:
    if name == _SCALING:  # an object, and no key of `CONFIG_KEYS`
        return name
    return apr.CONFIG_KEYS[name][0][0] if name in apr.CONFIG_KEYS else TOKENIZER_KEYS[name][0][0]


__all__ = ["faults_of_fields"]
