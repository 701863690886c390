"""What a model file holds, as plain data: header, config, inventory by type, tensor table. `aprlab inspect` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from aprlab.errors import AprlabError
from aprlab.model.inventory import shapes


def describe(model: Any, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything `inspect` shows of a `Model`, fit for JSON.

    Args:
        model: the model.
        keys: those of its GGUF file, where it has no config here: then they are what there is to show.

    Keys: ``path, format, dialect, bytes`` (of all tensors), ``header`` (scalars of the container's own header),
    ``config`` (or ``{"error": …}`` where the file lacks a value), ``tokenizer`` (sizes and ids, not the lists),
    ``by_type`` ({type: {tensors, bytes, values}}), ``missing`` and ``unexpected`` (GGUF names against a whole model of its
    architecture), ``warnings``, ``metadata`` and ``keys`` (scalars as they are, lists by their length) and ``tensors``
    (name, name in the file, type, shape in NumPy order, offset, bytes; in the order of the file).
    """
    by_type: dict[str, dict[str, int]] = {}
    for tensor in model.tensors.values():
        row = by_type.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0, "values": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.nbytes
        row["values"] += tensor.size
    return {
        "path": str(model.path),
        "format": model.format,
        "dialect": model.dialect,
        "bytes": model.nbytes,
        "header": {key: _scalar(value) for key, value in model.header.items()},
        "config": _config(model),
        "tokenizer": _tokenizer(model),
        "by_type": dict(sorted(by_type.items(), key=lambda item: -item[1]["bytes"])),
        **_inventory(model),
        "warnings": list(model.warnings),
        "metadata": {key: _scalar(value) for key, value in model.metadata.items()},
        "keys": {key: _scalar(value) for key, value in (keys or {}).items()},
        "tensors": [
            {
                "name": t.name,
                "name_in_file": t.origin.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "offset": t.origin.place(),
                "bytes": t.nbytes,
            }
            for t in model.tensors.values()
        ],
    }


def _config(model: Any) -> dict[str, Any]:
    try:
        return asdict(model.config)
    except AprlabError as error:
        return {"error": error.message}


def _tokenizer(model: Any) -> dict[str, Any]:
    try:
        data = model.tokenizer_glance()
    except AprlabError as error:
        return {"error": error.message}
    values = {each.name: getattr(data, each.name) for each in fields(data)}  # not `asdict`: that copies every token
    left_out = ("tokens", "token_types", "merges", "chat_template", "scores")
    scalars = {key: value for key, value in values.items() if key not in left_out}
    sizes = {"tokens": len(data.tokens), "merges": len(data.merges)}
    return {**scalars, **sizes, "chat_template": None if data.chat_template is None else f"{len(data.chat_template)} characters"}


def _inventory(model: Any) -> dict[str, list[str]]:
    """Tensors that a whole model of this config would have and the file has not, and the other way round.

    Where the config is unreadable the number of layers is unknown, and both lists are empty.
    """
    try:
        config = model.config
    except AprlabError:
        return {"missing": [], "unexpected": []}
    whole = set(shapes(config))
    found = set(model.tensors)
    return {"missing": sorted(whole - found), "unexpected": sorted(found - whole)}


def _scalar(value: Any) -> Any:
    """A metadata value fit for a screen: long lists and texts by their length, NumPy scalars as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if isinstance(value, bytes | bytearray):
        return value.hex() if len(value) <= 32 else f"{len(value)} bytes"
    if isinstance(value, str):
        return value if len(value) <= 400 else f"{len(value)} characters"
    if isinstance(value, dict):
        return {str(key): _scalar(item) for key, item in value.items()} if len(value) <= 64 else f"{len(value)} entries"
    if isinstance(value, bool | int | float) or value is None:
        return value
    try:
        size = len(value)
    except TypeError:
        return str(value)
    return [_scalar(item) for item in value] if size <= 16 else f"{size} entries"
