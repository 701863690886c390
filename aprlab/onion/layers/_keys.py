"""Key by key: what there is to compare of a model that cannot be run, and so has no config here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aprlab.formats.gguf_record import keys_of
from aprlab.formats.raw import MISSING
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.layers._fields import difference
from aprlab.onion.words import Mechanism

# Keys that say how a file is written or describe it; `general.architecture` decides everything.
_DESCRIBES = ("general.", "split.", "tokenizer.huggingface.json")
_DECIDES = ("general.architecture", "general.type")


def key_deviations(case: FileCase, *, of_tokenizer: bool) -> Iterator[Deviation]:
    """Keys of the tokenizer, or all others, that differ from the reference's; nothing without a reference."""
    if case.ref is None:
        return
    found, expected = case.file.keys, keys_of(case.ref.model)
    for key in dict.fromkeys([*expected, *found]):
        if key.startswith("tokenizer.") is not of_tokenizer:
            continue
        value, good = found.get(key, MISSING), expected.get(key, MISSING)
        if same(value, good):
            continue
        quiet = key.startswith(_DESCRIBES) and key not in _DECIDES
        if of_tokenizer:
            cause, evidence = difference(key, value, good)
            yield Deviation("tokenizer", key, value, good, cause, evidence=evidence, harmless=quiet)
        else:
            yield Deviation("config", key, value, good, _cause(key, value, good), harmless=quiet)


def same(a: Any, b: Any) -> bool:
    """Equal, a NaN with itself, and a number with the same number only: True is not 1."""
    if type(a) is not type(b):
        return False
    return bool(a == b) or repr(a) == repr(b)


def _cause(key: str, value: Any, good: Any) -> Mechanism:
    if value == MISSING:
        return Mechanism("config.key-missing", {"field": key})
    if good == MISSING:
        return Mechanism("config.key-unexpected", {"field": key})
    if isinstance(value, list) or isinstance(good, list) or len(str(value)) > 80:
        return Mechanism("config.field-differs", {"field": key})
    return Mechanism("config.value-differs", {"field": key, "found": value, "expected": good})


__all__ = ["key_deviations", "same"]
