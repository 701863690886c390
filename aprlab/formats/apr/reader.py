"""The strict reader: the first thing that is wrong with an APR file is raised."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aprlab.errors import FormatError
from aprlab.formats.apr.labels import naming_of, type_of
from aprlab.formats.apr.layout import DIALECTS, FLAGS, Container, Dialect
from aprlab.formats.apr.metadata import config, tokenizer
from aprlab.formats.apr.scanner import scan
from aprlab.formats.gguf_record import keeps_names, recorded_header
from aprlab.formats.identity import of_keys, refusing
from aprlab.model import names
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor


def open_model(path: str | Path, *, verify: bool = True) -> Model:
    """Open an APR file of a known dialect, strictly: the first thing that is wrong is raised.

    Args:
        path: the file.
        verify: check the footer's CRC-32 (reads the whole file once).
    """
    return model_of(scan(path, verify=verify))


def model_of(box: Container) -> Model:
    """The file that was scanned, as a model; the first thing that is wrong with it is raised."""
    if box.problems:
        raise box.problems[0]
    kept = keeps_names(box.metadata)
    naming = "gguf" if kept else naming_of(box.entries)
    if naming not in ("canonical", "raw", "gguf"):
        example = box.entries[0].name if box.entries else "none"
        found = f"the historic naming {naming!r}" if naming else "no known naming"
        raise FormatError(
            f"tensor names follow {found} (first: {example!r}); expected 'model.layers.N…' or 'blk.N…'. "
            "`aprlab peel` tells more, `aprlab repair` can rename",
            code="apr.foreign-naming",
            path=box.path,
        )
    dialect = dialect_of(box) if kept else next(d for d in DIALECTS.values() if d.naming == naming)
    tensors: dict[str, Tensor] = {}
    for entry in box.entries:
        gguf = entry.name if kept else names.to_gguf(entry.name, naming)
        if gguf is None:
            raise FormatError(
                f"unknown tensor name; {naming} names look like {names.from_gguf('blk.0.attn_q.weight', naming)!r}",
                code="names.unknown-tensor", path=box.path, tensor=entry.name, offset=entry.at,
            )  # fmt: skip
        shape = entry.dims if dialect.dims == "rows" else entry.dims[::-1]
        if 0 in shape or np.prod([float(n) for n in shape]) > 2**62:
            raise FormatError(
                f"has the impossible dimensions {list(shape)}",
                code="reading.impossible-dimensions", path=box.path, tensor=entry.name, offset=entry.at,
            )  # fmt: skip
        kind = type_of(box, entry, shape)
        start = box.data_offset + entry.offset
        origin = Origin(box.path, entry.name, start if box.compression is None else -1)
        tensors[gguf] = Tensor(gguf, kind, shape, box.content(entry), origin)
    footer = "" if box.footer is not None or not dialect.footer else " without footer"
    model = Model(
        path=box.path,
        format="apr",
        dialect=dialect.name + footer,
        tensors=tensors,
        metadata=box.metadata,
        make_config=lambda: config(box.metadata, tensors, box.path),
        make_tokenizer=lambda: tokenizer(box.metadata, box.path),
        warnings=[*_false_flags(box, tensors), *_not_checked(box)],
        header={
            "version": ".".join(map(str, box.version)), "flags": box.flag_names, "compression": box.compression,
            "data_offset": box.data_offset, "footer_crc": box.footer,
        },
    )  # fmt: skip
    return _refusing(model) if kept else model


def dialect_of(box: Container) -> Dialect:
    """The dialect of a file whose names do not tell it: by the flag that upstream's writer sets and realizar's does not."""
    return DIALECTS["aprender" if box.flags & FLAGS["row_major"] else "realizar"]


def _refusing(model: Model) -> Model:
    """A model with GGUF's names: its keys say what it is, and why it cannot be run."""
    found = of_keys(recorded_header(model.metadata, model.path))
    if found is None or found.error is None:
        raise FormatError(
            "has the tensor names of its GGUF file, which only models that cannot be run keep; convert it again",
            code="apr.kept-names", path=model.path,
        )  # fmt: skip
    refusing(model, found.error)
    model.warnings.append(str(found))
    return model


def _not_checked(box: Container) -> list[str]:
    """What would need the whole of a file that is read in ranges."""
    if box.remote is None or box.footer is None:
        return []
    return ["the footer's CRC-32 is not checked by URL: it is of every byte of the file"]


def _false_flags(box: Container, tensors: dict[str, Tensor]) -> list[str]:
    """Flags that are wrong; upstream leaves some clear, so it is a warning. realizar knows only one flag."""
    truth = {"quantized": any(t.type.quantised for t in tensors.values())}
    if box.flags & FLAGS["row_major"]:
        truth["has_vocabulary"] = "tokenizer.vocabulary" in box.metadata
    return [
        f"flag {name!r} is {'clear, but the file has' if true else 'set, but the file has no'} such content"
        for name, true in truth.items()
        if bool(box.flags & FLAGS[name]) != true
    ]
