"""A trace's file, checked before it is loaded: how large its members are, and whether its header has the right types.

A trace is an ``.npz``: a zip archive. What a member unpacks to is looked at in the archive's own directory, before NumPy reads
it; zipfile never gives more bytes than are stated there.
"""

from __future__ import annotations

import json
import math
import types
import typing
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from aprlab.errors import FormatError
from aprlab.formats.reading import open_regular
from aprlab.model.config import ModelConfig
from aprlab.model.rope import RopeScaling

HEADER_LIMIT = 8 << 20  # bytes of the JSON header; a trace of 100,000 tokens has 2 MB
EXPANSION, EXPANSION_FREE = 8, 64 << 20  # `save` packs nothing; float32 activations hardly shrink
TOKENS_LIMIT = 1 << 22
LAYERS_LIMIT = 10_000


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The archive as `np.load` gives it, once its directory is sound.

    Raises:
        OSError: as the system says it.
        FormatError: it unpacks to more than a file of its length can plausibly hold.
        zipfile.BadZipFile, ValueError: it is no such archive.
    """
    with open_regular(path) as file:
        _weigh(file, path)
        file.seek(0)
        with np.load(file, allow_pickle=False) as stored:
            yield stored


def weighed(path: Path) -> None:
    """Raise, as `opened` does, where an archive unpacks to more than its length can hold; nothing is read."""
    with open_regular(path) as file:
        _weigh(file, path)


def _weigh(file: IO[bytes], path: Path) -> None:
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    most = EXPANSION_FREE + EXPANSION * size
    total = sum(member.file_size for member in members)
    if total > most:
        said = f"unpacks to {total} bytes; a trace of {size} bytes may have {most}"
        raise FormatError(said, code="trace.expansion", path=path)
    for member in members:
        if member.filename == "header.npy" and member.file_size > HEADER_LIMIT:
            said = f"has a header of {member.file_size} bytes; at most {HEADER_LIMIT} are read"
            raise FormatError(said, code="trace.header-limit", path=path)


def header_of(stored: Any, path: Path) -> dict[str, Any]:
    """The JSON header, every part of the type that it must have.

    Raises:
        FormatError: a part that is missing or of another kind, by name.
        ValueError: no JSON.
    """
    raw = stored["header"]
    if raw.dtype != np.uint8 or raw.ndim != 1:
        raise FormatError(f"the header is {raw.dtype}{raw.shape}, not bytes", code="trace.header", path=path)
    header = json.loads(raw.tobytes(), parse_constant=_no_number)

    def need(good: bool, what: str) -> None:
        if not good:
            raise FormatError(f"the header's {what} is missing or of another kind", code="trace.header", path=path)

    need(isinstance(header, dict), "JSON object")
    for key in ("kind", "engine", "contract"):
        need(isinstance(header.get(key), str), key)
    need(_whole(header.get("version")), "version")
    need(header.get("prompt") is None or _whole(header["prompt"]), "prompt")
    tokens, source, spans, points = (header.get(key) for key in ("tokens", "source", "positions", "points"))
    need(isinstance(tokens, list) and len(tokens) <= TOKENS_LIMIT and all(map(_whole, tokens)), "tokens")
    need(isinstance(source, dict) and {"path", "format"} <= source.keys(), "source")
    need(all(isinstance(value, str) for value in source.values()), "source")
    need(isinstance(spans, list) and all(isinstance(span, list) and all(map(_whole, span)) for span in spans), "positions")
    need(isinstance(points, dict), "points")
    for name, entry in points.items():
        need(isinstance(entry, dict) and _whole(entry.get("positions")) and entry["positions"] < len(spans), f"point {name!r}")
        need(all(isinstance(entry.get(key), str) for key in ("engine", "contract")), f"point {name!r}")
        need(isinstance(entry.get("shape"), list) and all(map(_whole, entry["shape"])), f"shape of {name!r}")
    need(isinstance(header.get("config"), dict), "config")
    return header


def config_of(header: dict[str, Any], path: Path) -> ModelConfig:
    """The config in the header, each value of the type that the field has."""
    hints, given = typing.get_type_hints(ModelConfig), dict(header["config"])
    if isinstance(given.get("rope_scaling"), dict):
        given["rope_scaling"] = _rope_scaling(given["rope_scaling"], path)
    for name, value in given.items():
        if name not in hints or not _fits(value, hints[name]):
            raise FormatError(f"config {name!r} is {value!r:.60}", code="trace.config", path=path)
    try:
        config = ModelConfig(**given)
    except TypeError as error:  # a field that is missing
        raise FormatError(f"the config is not whole: {error}", code="trace.config", path=path) from None
    if not 0 <= config.block_count <= LAYERS_LIMIT:
        said = f"{config.block_count} layers; at most {LAYERS_LIMIT} are handled"
        raise FormatError(said, code="trace.config", path=path)
    return config


def _rope_scaling(given: dict[str, Any], path: Path) -> RopeScaling:
    """The rotary scaling in the header, each value of the type that the field has."""
    hints = typing.get_type_hints(RopeScaling)
    if given.keys() != {f.name for f in fields(RopeScaling)} or not all(_fits(v, hints[k]) for k, v in given.items()):
        raise FormatError(f"config 'rope_scaling' is {given!r:.120}", code="trace.config", path=path)
    return RopeScaling(**given)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be a field of this type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is int:
        return _whole(value)
    if hint is float:
        return type(value) in (int, float) and abs(value) < 3.5e38 and math.isfinite(value)
    if hint in (str, bool, types.NoneType):
        return type(value) is hint
    if hint is RopeScaling:
        return isinstance(value, RopeScaling)
    kind = typing.get_origin(hint) or hint
    return isinstance(value, list) if kind in (tuple, list) else isinstance(value, dict)


__all__ = ["config_of", "header_of", "opened"]
