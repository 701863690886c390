"""The keys of a GGUF file, wherever they are now: in that file, or in the record that an APR file made of it holds.

A model of an architecture that has no forward pass here has no config either. Its keys are what can be compared, converted
and given back.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.errors import FormatError
from aprlab.formats import gguf
from aprlab.model.model import Model

# An APR file whose tensors have the names of the GGUF file that it was made of, since no other naming knows them.
NAMES_KEY, NAMES = "tensor_names", "gguf"


def keeps_names(metadata: Mapping[str, Any]) -> bool:
    """Whether an APR file with this metadata has GGUF's names, whatever they are."""
    return bool(metadata.get(NAMES_KEY) == NAMES)


def recorded_fields(metadata: Mapping[str, Any], record: Mapping[str, Any]) -> list[gguf.Field]:
    """The key-value pairs of a record, with their types; arrays that are in the metadata anyway are taken from there.

    Raises:
        LookupError, TypeError, ValueError: the record is damaged.
    """
    fields = []
    for key, type_name, value in record["kv"]:
        if isinstance(value, dict) and "same_as" in value:
            value = metadata[value["same_as"]]
        elif isinstance(value, dict):
            bits = np.frombuffer(base64.b64decode(value["base64"]), "<f4" if "float32" in type_name else "<f8")
            value = bits if type_name.startswith("array[") else float(bits[0])
        fields.append(gguf.field_of(key, type_name, value))
    return fields


def recorded_header(metadata: Mapping[str, Any], path: Path) -> gguf.Header:
    """The header of the GGUF file that an APR file was made of, as far as keys and the tensor table go.

    Raises:
        FormatError: there is no such record, or it is damaged.
    """
    try:
        record = metadata["source_metadata"]["gguf"]
        fields = recorded_fields(metadata, record)
        for item in fields:
            gguf.pack_field(item)  # whatever cannot be written again is damaged
        infos = [gguf.TensorInfo(str(name), tuple(map(int, ne)), int(code), 0, 0) for name, ne, code in record["tensors"]]
        version, alignment = int(record["version"]), int(record["alignment"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        raise FormatError(
            f"source_metadata.gguf, which has the keys of this model, is damaged: {type(error).__name__}: {error}",
            code="apr.record-damaged", path=path,
        ) from None  # fmt: skip
    return gguf.Header(path, version, {f.key: f for f in fields}, infos, alignment, 0, 0, np.zeros(0, np.uint8))


def header_of(model: Model) -> gguf.Header:
    """The header with a model's keys: its own, or the recorded one; raises FormatError where there is none."""
    if isinstance(model.metadata, gguf.FieldView):
        return model.metadata.header
    return recorded_header(model.metadata, model.path)


def keys_of(model: Model) -> dict[str, Any]:
    """Every key with a plain value: arrays as lists. Raises FormatError where there are none, or a string is no UTF-8."""
    return plain_keys(header_of(model))


def plain_keys(header: gguf.Header) -> dict[str, Any]:
    """Every key of a header with a plain value: arrays as lists."""
    return {key: plain_value(item.value) for key, item in header.fields.items()}


def plain_value(value: Any) -> Any:
    """A value of a key as Python has it: arrays and lists of strings as lists."""
    return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, gguf.Strings) else value


__all__ = [
    "NAMES", "NAMES_KEY", "header_of", "keeps_names", "keys_of", "plain_keys", "plain_value", "recorded_fields",
    "recorded_header",
]  # fmt: skip
