"""A model that llama.cpp split into several files, ``NAME-00002-of-00005.gguf``: any of them stands for all.

The first part has the keys, each part some of the tensors; the keys ``split.…`` say which part it is and of how many.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats import gguf
from aprlab.formats.gguf import Header

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
MOST = 1000  # parts that are looked for


def number(header: Header, key: str) -> int | None:
    """A whole number under `key`; None where there is none."""
    value = header.value(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def count_of(header: Header) -> int:
    """Into how many files the model is split; 1 where it is not."""
    count = number(header, "split.count")
    return count if count is not None and count > 1 else 1


def siblings(path: Path, count: int) -> dict[int, Path] | None:
    """Number from 1 on -> where that part should be; None where the file's name does not tell."""
    named = SHARD.fullmatch(path.name)
    if named is None or int(named[3]) != count or count > MOST:
        return None
    return {n: path.with_name(f"{named[1]}-{n:05d}-of-{named[3]}{named[4]}") for n in range(1, count + 1)}


def joined(header: Header) -> Header:
    """The header of the whole model, given that of one part: the first part's keys, every part's tensors.

    Offsets in it are those of the one file that the parts would be joined to; `parts` has where the bytes are.

    Raises:
        UnsupportedError: a part is missing, by name, or the file's name does not follow the pattern.
        FormatError: the parts do not belong together.
    """
    count = count_of(header)
    if count == 1:
        return header
    there = siblings(header.path, count)
    missing = [] if there is None or header.remote else [path.name for path in there.values() if not path.is_file()]
    if there is None or missing:
        raise UnsupportedError(
            "; ".join(says(header, count, missing)), code="identity.part-of-several", path=header.path
        )
    parts = [header if path.name == header.path.name else gguf.read_header(path) for path in there.values()]
    _check(parts, count)
    first = parts[0]
    fields = {key: item for key, item in first.fields.items() if not key.startswith("split.")}
    infos = [info for part in parts for info in part.infos]
    at = 0
    laid: list[gguf.TensorInfo] = []
    for info in infos:
        laid.append(replace(info, offset=at))
        at += gguf.tensor_type(first, info).nbytes(info.ne[::-1])
        at += -at % first.alignment
    return Header(first.path, first.version, fields, laid, first.alignment, 0, at, np.zeros(0, np.uint8), tuple(parts))


def says(header: Header, count: int, missing: list[str]) -> tuple[str, str]:
    """What a part is and which others are missing; what to do."""
    place = number(header, "split.no")
    which = f"part {place + 1} of {count}" if place is not None else f"one part of {count}"
    said = f"is {which} of a model split into {count} files"
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        return f"{said} (missing here: {shown})", "put all parts into one folder"
    pattern = f"NAME-{(place or 0) + 1:05d}-of-{count:05d}.gguf"
    return (
        f"{said}, and its name is not {pattern}, by which the others are found",
        "name all parts so, or join them (llama-gguf-split --merge FIRST-PART OUT)",
    )


def _check(parts: list[Header], count: int) -> None:
    """Every part is the one that its name says, of one model; no tensor is in two of them."""
    seen: dict[str, Path] = {}
    for n, part in enumerate(parts):
        if number(part, "split.no") != n or count_of(part) != count:
            raise FormatError(
                f"is called part {n + 1} of {count}, and its keys say split.no {part.value('split.no')!r} of split.count "
                f"{part.value('split.count')!r}", code="gguf.split-number", path=part.path,
            )  # fmt: skip
        if part.version != parts[0].version or part.alignment != parts[0].alignment:
            raise FormatError(
                f"has version {part.version} and alignment {part.alignment}, the first part {parts[0].version} and "
                f"{parts[0].alignment}: they are not parts of one model", code="gguf.split-unlike", path=part.path,
            )  # fmt: skip
        for info in part.infos:
            if info.name in seen:
                raise FormatError(
                    f"is in {seen[info.name].name} already", code="reading.duplicate-tensor", path=part.path, tensor=info.name,
                    offset=info.at,
                )  # fmt: skip
            seen[info.name] = part.path
    stated = number(parts[0], "split.tensors.count")
    if stated is not None and stated != len(seen):
        raise FormatError(
            f"split.tensors.count is {stated}, the {count} parts hold {len(seen)} tensors", code="gguf.split-count",
            path=parts[0].path,
        )  # fmt: skip


__all__ = ["SHARD", "count_of", "joined", "number", "says", "siblings"]
