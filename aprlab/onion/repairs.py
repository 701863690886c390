"""What a repair changes, how sure each change is, and the fixed file, written. `aprlab.gates.repairs` judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from aprlab.conversion.converter import convert, export
from aprlab.conversion.seams import Seams
from aprlab.formats import apr
from aprlab.formats.raw import TOKENIZER_KEYS, Seen
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.fixes import Fix

Certainty = Literal["exact", "guess"]
Origin = Literal["reference", "file", "convention"]


@dataclass(frozen=True)
class Change:
    """One finding as it was fixed.

    Attributes:
        what: label of the finding.
        tensors: GGUF names, or fields of config and tokenizer.
        certainty: ``exact`` where what was written is known, ``guess`` where something had to be assumed.
        source: where it was taken from: the ``reference``, the ``file`` itself, or the ``convention`` of such models.
    """

    what: str
    tensors: tuple[str, ...]
    certainty: Certainty
    source: Origin

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"what": self.what, "tensors": list(self.tensors), "certainty": self.certainty, "source": self.source}

    def __str__(self) -> str:
        return f"{self.what}: {self.certainty}, from the {self.source}"


def changes_of(case: FileCase, fixes: Sequence[Fix]) -> list[Change]:
    """What these fixes change, in their order; a fix is as sure as the least sure of its parts."""
    changes = []
    for fix in fixes:
        sources = [_source(case, d) for d in fix.deviations] or ["file"]
        worst = max(sources, key=("file", "reference", "convention").index)
        sure = all(_sure(case, d) for d in fix.deviations)
        concerned = tuple(dict.fromkeys(d.tensor for d in fix.deviations if d.tensor))
        changes.append(Change(fix.label, concerned, "exact" if sure else "guess", worst))
    return changes


def _source(case: FileCase, deviation: Deviation) -> Origin:
    if deviation.kind in ("seal", "span", "extra") or (case.ref is None and deviation.kind in ("name", "type", "dims", "bytes")):
        return "file"
    return "reference" if case.ref is not None else "convention"


def _sure(case: FileCase, deviation: Deviation) -> bool:
    """Whether what is written is known: from a reference, or from the file where only one reading of it is lawful."""
    if deviation.ambiguous:
        return False
    if case.ref is not None:
        return deviation.confidence == 1.0 or isinstance(deviation.expected, Tensor) or deviation.kind in ("config", "tokenizer")
    if deviation.code in ("container.checksum", "container.header-changed"):
        return False  # sealed anew, whatever was changed
    return deviation.confidence == 1.0 and deviation.kind not in ("config", "tokenizer")


def not_understood(case: FileCase, fixes: Sequence[Fix]) -> list[str]:
    """Names, as written, of tensors that a repair would delete although nobody knows what they are for.

    Understood is a row that is listed twice with the same bytes (or, with a reference, twice at all), a tensor that Qwen2 has
    and this model has not, one whose bytes are those of tensors that are missing, and what a fault of the catalogue explains.
    """
    strange = []
    for fix in fixes:
        if fix.finding.fault is not None and case.ref is not None:
            continue
        for d in fix.deviations:
            if d.kind == "extra" and d.match is not None and not _understood(case, d):
                strange.append(d.match.piece.name)
    return strange


def _understood(case: FileCase, extra: Deviation) -> bool:
    assert extra.match is not None
    piece = extra.match.piece
    twins = [m.piece for m in case.matches if m.piece.name == piece.name and m is not extra.match]
    if twins:
        return case.ref is not None or any(twin.hash == piece.hash for twin in twins)
    if case.ref is not None and piece.stated is not None:
        return True
    parts = [d.expected.nbytes for d in case.deviations if d.kind == "missing" and isinstance(d.expected, Tensor)
             and d.evidence.get("its_bytes_stand_in") == piece.name]  # fmt: skip
    return bool(parts) and sum(parts) == piece.size


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def write_repaired(file: Seen, model: Model, output: Path) -> None:
    """Write the fixed model, keeping of the broken file's own metadata, dialect and compression what was right.

    Args:
        file: as it was.
        model: as it should be.
        output: a ``.gguf`` or APR file; for a SafeTensors candidate also a new directory, its weights in the type that most
            of the candidate's have.

    Raises:
        AprlabError: this model cannot be held in this format.
    """
    if file.format == "safetensors" and output.suffix not in (".apr", ".gguf"):
        sizes: dict[str, int] = {}
        for tensor in model.tensors.values():
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
        most = max(sizes, key=lambda name: sizes[name])
        export(model, output, format="safetensors", dtype=most.lower())
    elif file.format == "apr" and output.suffix != ".gguf":
        compress = None if file.box is None else file.box.compression
        convert(model, output, dialect=file.dialect.name, compress=compress, seams=lambda seams: _keeping(seams, file, model))
    else:
        convert(model, output)


def _keeping(seams: Seams, file: Seen, model: Model) -> Seams:
    """Seams whose metadata are the file's own, but for what was repaired and what follows from the tensors."""
    return replace(seams, metadata=lambda made: kept_metadata(made, file, model))


_FOLLOWS = ("param_count", "quantization", "tied_embeddings", "model_type", "tokenizer.vocab_size")


def kept_metadata(made: dict[str, Any], file: Seen, model: Model) -> dict[str, Any]:
    """The metadata of a repaired APR file: unknown keys stay, known ones are `made` where they were wrong."""
    own = dict(file.metadata)
    wrong: set[str] = set(_FOLLOWS)
    for name, value in file.config.items():
        if value != getattr(model.config, name):
            wrong |= set(apr.CONFIG_KEYS[name][0])
    for name, value in file.tokenizer.items():
        if value != getattr(model.tokenizer, name):
            wrong |= set(TOKENIZER_KEYS[name][0])
    kept = {key: value for key, value in own.items() if key not in wrong}
    # A file that never said where it comes from is not given a record of it.
    fresh = {key: value for key, value in made.items() if key in wrong or key not in ("source_metadata", "original_format")}
    merged = {**fresh, **kept}
    order = [key for key in own if key in merged] if set(own) >= set(fresh) else [*(k for k in made if k in merged), *own]
    return {key: merged[key] for key in dict.fromkeys([*order, *merged]) if key in merged}


__all__ = ["Change", "changes_of", "kept_metadata", "not_understood", "write_repaired"]
