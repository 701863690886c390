"""The suspected file in memory, with some of its deviations fixed: a model where it can be one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aprlab.errors import FormatError
from aprlab.formats import apr, gguf
from aprlab.formats.raw import (
    CONFIG_FIELDS,
    GGUF_CONFIG,
    MISSING,
    TOKENIZER_FIELDS,
    TOKENIZER_KEYS,
    Wrong,
    needed,
    unusable,
)
from aprlab.model import names, rope, window
from aprlab.model.architecture import architecture_of
from aprlab.model.config import ModelConfig, TokenizerData, check_config
from aprlab.model.model import Model
from aprlab.model.tensor import Origin, Tensor
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.quants.types import TensorType


@dataclass(eq=False)
class Slot:
    """A row of the index in a draft.

    Attributes:
        stated: the GGUF name that its name stands for, None where no naming knows it.
        kind: its type, None where the label does not tell one.
        raw: its bytes, and `offset` where they stand in the file, -1 where they are not the file's.
        name: as written.
    """

    stated: str | None
    kind: TensorType | None
    shape: tuple[int, ...]
    raw: np.ndarray
    offset: int
    name: str


class Draft:
    """The file with some of its deviations fixed; the layers change its fields, see `aprlab.onion.layers`.

    Whatever is not fixed stays broken: a name of another naming is not found, a label that breaks the size law is refused, and
    so on, exactly as the strict reader would have it.

    Attributes:
        slots: place in the case's matches -> row; written by the layers naming, dtype, layout, weights, container.
        added: GGUF name -> tensor that the file lacks; written by the naming layer.
        config, tokenizer: field -> value; written by the layers of that name.
        seals: what is wrong with the container as a whole; removed by the container layer.
    """

    def __init__(self, case: FileCase) -> None:
        self.case = case
        naming = case.file.dialect.naming
        self.slots: dict[int, Slot] = {}
        for n, match in enumerate(case.matches):
            p = match.piece
            fitting = p.fitting()
            kind = fitting[0] if len(fitting) == 1 else None
            # Equal bytes are read from the reference's file: one copy in memory serves both sides.
            raw = match.of.raw if match.equal and match.of is not None else p.raw
            self.slots[n] = Slot(names.to_gguf(p.name, naming), kind, p.shape, raw, p.offset, p.name)
        self._order = {id(match): n for n, match in enumerate(case.matches)}
        self.config = dict(case.file.config)
        self.tokenizer = dict(case.file.tokenizer)
        self.added: dict[str, Tensor] = {}
        self.seals = {id(d): d for d in case.deviations if d.kind == "seal"}

    def slot(self, deviation: Deviation) -> Slot | None:
        """The row that a deviation concerns; None where another fix has taken it out."""
        return self.slots.get(self._order[id(deviation.match)]) if deviation.match is not None else None

    def drop(self, deviation: Deviation) -> None:
        """Take the row of a deviation out."""
        self.slots.pop(self._order[id(deviation.match)], None)

    def refill(self, deviation: Deviation) -> tuple[Slot, Tensor] | None:
        """Give a row the bytes of the expected tensor; the row and that tensor, None where the row is out."""
        slot, good = self.slot(deviation), deviation.expected
        if slot is None:
            return None
        slot.raw = good.raw
        slot.offset = good.origin.offset if good.origin.path == self.case.file.path else -1
        return slot, good

    def model(self) -> Model:
        """The draft as a model; raises FormatError for what a strict reader would refuse."""
        path = self.case.file.path
        for deviation in self.seals.values():
            raise FormatError(deviation.mechanism, code="onion.broken-container", path=path)
        tensors: dict[str, Tensor] = {}
        for slot in self.slots.values():
            if slot.stated is None:
                raise FormatError("unknown tensor name", code="onion.unknown-name", path=path, tensor=slot.name)
            if slot.stated in tensors:
                raise FormatError("is listed twice", code="onion.listed-twice", path=path, tensor=slot.name)
            if slot.kind is None or not slot.kind.fits(slot.shape, len(slot.raw)):
                raise FormatError("breaks the size law", code="onion.size-law", path=path, tensor=slot.name)
            origin = Origin(path, slot.name, slot.offset)
            tensors[slot.stated] = Tensor(slot.stated, slot.kind, slot.shape, slot.raw, origin)
        for name, tensor in self.added.items():
            tensors[name] = tensor.replace(name=name)
        tensors = self._in_order(tensors)
        config, data = self.config, self.tokenizer
        return Model(
            path=path, format="apr" if self.case.file.format == "apr" else "gguf", dialect=self.case.file.dialect.name,
            tensors=tensors, metadata=self._metadata(tensors),
            make_config=lambda: made_config(config, tensors, path), make_tokenizer=lambda: made_tokenizer(data, path),
        )  # fmt: skip

    def _in_order(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the data stand in the file; what was added, where the reference has it, if both are in one order."""
        starts = {slot.stated: self.case.matches[n].piece.start for n, slot in self.slots.items()}
        order = sorted(tensors, key=lambda name: starts.get(name, 1 << 62))
        if self.case.ref is not None:
            known = [name for name in self.case.ref.tensors if name in tensors]
            if [name for name in known if name in starts] == [name for name in order if name in starts]:
                order = [*known, *(name for name in order if name not in known)]
        return {name: tensors[name] for name in order}

    def _metadata(self, tensors: dict[str, Tensor]) -> Any:
        """The file's own metadata; in GGUF with what was repaired, so that all other keys stay as they are."""
        file = self.case.file
        if file.header is None:
            return file.metadata
        fields = dict(file.header.fields)
        prefix = self.config["architecture"]
        config_keys = {"architecture": "general.architecture"} | {name: f"{prefix}.{key}" for name, key in GGUF_CONFIG.items()}
        if self.config["rope_scaling"] != file.config["rope_scaling"]:
            for key in rope.GGUF_KEYS:
                fields.pop(f"{prefix}.{key}", None)
            for key, kind, value in rope.to_gguf(self.config["rope_scaling"]):
                fields[f"{prefix}.{key}"] = gguf.field_of(f"{prefix}.{key}", kind, value)
        if self.config["sliding_window"] != file.config["sliding_window"]:
            key, value = f"{prefix}.{window.GGUF_KEY}", self.config["sliding_window"]
            fields.pop(key, None)
            if value is not None:
                fields[key] = gguf.field_of(key, "uint32", value)
        for mine, found, keys in (
            (self.config, file.config, config_keys),
            (self.tokenizer, file.tokenizer, {name: key for name, (_, key) in TOKENIZER_KEYS.items()}),
        ):
            for name, key in keys.items():
                if mine[name] == found[name]:
                    continue
                if mine[name] == MISSING:
                    fields.pop(key, None)
                else:
                    kind = fields[key].type_name if key in fields else _gguf_type(key, mine[name])
                    fields[key] = gguf.field_of(key, kind, mine[name])
        infos = gguf.layout([(t.name, t.type, t.shape) for t in tensors.values()], file.header.alignment)
        return gguf.FieldView(replace(file.header, fields=fields, infos=infos))


def _gguf_type(key: str, value: Any) -> str:
    """The type that llama.cpp's converter gives a value."""
    if isinstance(value, list):
        return "array[string]" if value and isinstance(value[0], str) else "array[int32]"
    return {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]


def made_config(found: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> ModelConfig:
    """A config from fields, checked as the readers check theirs."""
    for name in CONFIG_FIELDS:
        value = found.get(name, MISSING)
        if unusable(value):
            raise FormatError(f"config field {name!r} is {value!r}", code="onion.config-field", path=path)
        others = name in ("architecture", "rope_type", "rope_scaling", "sliding_window")
        if not others and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise FormatError(f"config field {name!r} is {value!r}, not a number", code="onion.config-field", path=path)
    kind = architecture_of(str(found["architecture"]), path)
    if found["rope_type"] not in apr.ROPE_TYPES.values():
        raise FormatError(f"rope_type is {found['rope_type']!r}", code="onion.config-field", path=path)
    config = ModelConfig(
        **{name: found[name] for name in CONFIG_FIELDS},
        tied_embeddings="output.weight" not in tensors,
        rope_factors=kind.rope_factors and rope.FACTORS in tensors,
    )
    return check_config(config, path)


def made_tokenizer(found: dict[str, Any], path: Any) -> TokenizerData:
    """Tokenizer data from fields; what is optional may be missing."""
    for name in needed(found.get("model", MISSING)):
        if found.get(name, MISSING) == MISSING:
            raise FormatError(f"tokenizer has no {name!r}", code="onion.tokenizer-field", path=path)
    for name, value in found.items():
        if isinstance(value, Wrong):
            raise FormatError(f"tokenizer field {name!r} is {value!r}", code="onion.tokenizer-field", path=path)
    values: dict[str, Any] = {name: None if (v := found.get(name, MISSING)) == MISSING else v for name in TOKENIZER_FIELDS}
    return TokenizerData(**values)


__all__ = ["Draft", "Slot", "made_config", "made_tokenizer"]
