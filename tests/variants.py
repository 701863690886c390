"""GGUF files that differ from a healthy one in one respect: keys, tensors, order, alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aprlab.formats import gguf
from aprlab.model import Model, Tensor


def typed(key: str, value: Any) -> gguf.Field:
    """A key-value pair of the type that writers give such a value: bool, uint32, float32, string, array of strings."""
    if isinstance(value, gguf.Field):
        return value
    if isinstance(value, list):
        return gguf.field_of(key, "array[string]" if isinstance(value[0], str) else "array[int32]", value)
    names = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    return gguf.field_of(key, names[type(value)], value)


def variant(
    source: Path, output: Path, *, keys: Mapping[str, Any] | None = None, drop: tuple[str, ...] = (),
    tensors: Mapping[str, Tensor | None] | None = None, alignment: int = gguf.DEFAULT_ALIGNMENT, reverse: bool = False,
) -> Path:  # fmt: skip
    """`source` (GGUF) as `output`, with keys set or dropped, tensors added, replaced or (None) left out."""
    header = gguf.read_header(source)
    model = gguf.open_model(source)
    fields = {key: item for key, item in header.fields.items() if key not in drop}
    fields |= {key: typed(key, value) for key, value in (keys or {}).items()}
    if alignment != gguf.DEFAULT_ALIGNMENT:
        fields["general.alignment"] = typed("general.alignment", alignment)
    kept = {name: tensor for name, tensor in {**model.tensors, **(tensors or {})}.items() if tensor is not None}
    if reverse:
        kept = dict(reversed(kept.items()))
        fields = {"general.architecture": fields.pop("general.architecture"), **dict(reversed(fields.items()))}
    infos = gguf.layout([(name, t.type, t.shape) for name, t in kept.items()], alignment)
    with open(output, "wb") as file:
        file.write(gguf.pack_header(list(fields.values()), infos, alignment=alignment))
        for tensor in kept.values():
            file.write(tensor.raw.tobytes())
            file.write(bytes(-file.tell() % alignment))
    return output


def unpadded(source: Path, output: Path, *, header_too: bool = False) -> Path:
    """`source` (GGUF) as `output`, its data one tensor after the other without padding (`header_too`: nor behind the header)."""
    header, model, offset, infos = gguf.read_header(source), gguf.open_model(source), 0, []
    for info in header.infos:
        infos.append(replace(info, offset=offset))
        offset += model.tensors[info.name].nbytes
    head = gguf.pack_header(list(header.fields.values()), infos)
    last = infos[-1]
    rest = len(head) - header.infos[-1].at - (8 + len(last.name) + 4 + 8 * len(last.ne) + 4 + 8)  # the padding of the header
    data = b"".join(model.tensors[info.name].raw.tobytes() for info in infos)
    output.write_bytes(head[: len(head) - rest * header_too] + data)
    return output


def first_layers(model: Model, count: int) -> Model:
    """The model with its first layers only, in memory: enough for every operation, and quick."""
    deeper = tuple(f"blk.{n}." for n in range(count, model.config.block_count))
    tensors = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(deeper)}
    return model.with_changes(tensors=tensors, config=replace(model.config, block_count=count))


def shallow(source: Path, output: Path, layers: int = 1) -> Path:
    """`source` (GGUF) as `output` with its first layers only: a small model that runs, and says little of sense."""
    model = gguf.open_model(source)
    beyond = [name for name in model.tensors if name.startswith("blk.") and int(name.split(".")[1]) >= layers]
    return variant(source, output, keys={"qwen2.block_count": layers}, tensors=dict.fromkeys(beyond))
