"""The same fault of the catalogue written into GGUF, APR and SafeTensors, by one function: a file, or why there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aprlab.conversion.recode import chunks_of
from aprlab.conversion.seams import Seams, healthy_seams
from aprlab.formats import apr, gguf, open_model
from aprlab.formats.raw import GGUF_CONFIG, TOKENIZER_KEYS
from aprlab.formats.safetensors import DTYPES
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor

FORMATS = ("gguf", "apr", "safetensors")
_HUGGING_FACE = {  # key of APR's metadata -> (file, key) of a Hugging Face folder
    "rope_theta": ("config.json", "rope_theta"),
    "rms_norm_eps": ("config.json", "rms_norm_eps"),
    "chat_template": ("tokenizer_config.json", "chat_template"),
}


class NotHeld(Exception):
    """Why a format cannot hold a fault, in one line."""


def write_with(change: Callable[[Seams], Seams], source: Path, output: Path, format: str) -> Path:
    """`source`, a healthy model in `format`, as `output` with the decisions of its writer changed.

    Raises:
        NotHeld: the format has no place for it, or the fault changes nothing in it.
    """
    dialect = apr.DIALECTS["realizar" if format == "gguf" else "aprender"]
    with open_model(source) as model:
        right = healthy_seams(dialect)
        seams = change(right)
        tensors = list(model.tensors.values())
        changed = [seams.tensor(tensor) for tensor in tensors]
        before = apr.metadata_of(model, tensors, dialect)
        after = seams.metadata(dict(before))
        fields = {key: after.get(key) for key in {*before, *after} if before.get(key) != after.get(key)}
        plans = [_plan(t, seams) for t in changed]
        listed = seams.plans(plans)
        same = listed == plans and [p.name for p in plans] == [right.name(t.name) for t in tensors]
        same = same and [(p.code, p.dims) for p in plans] == [(right.code(t.type), right.dims(t.shape)) for t in tensors]
        if same and not fields and all(a is b for a, b in zip(changed, tensors, strict=True)):
            raise NotHeld("changes nothing here")
        _WRITERS[format](model, source, listed, fields, after, output)
    return output


def _plan(tensor: Tensor, seams: Seams) -> apr.Plan:
    return apr.Plan(seams.name(tensor.name), seams.code(tensor.type), seams.dims(tensor.shape), tensor.nbytes, chunks_of(tensor))


def _data(plans: list[apr.Plan]) -> list[bytes]:
    return [b"".join(bytes(chunk) for chunk in plan.chunks()) for plan in plans]


def _gguf(model: Model, source: Path, plans: list[apr.Plan], fields: dict[str, Any], _: Any, output: Path) -> None:
    header = gguf.read_header(source)
    keys = {apr.DIALECTS["realizar"].keys[name]: f"qwen2.{key}" for name, key in GGUF_CONFIG.items()}
    keys |= {names[-1]: key for names, key in TOKENIZER_KEYS.values()} | {"chat_template": "tokenizer.chat_template"}
    listed = dict(header.fields)
    for key, value in fields.items():
        if key not in keys:
            raise NotHeld(f"GGUF has no key for {key}")
        listed.pop(keys[key], None)
        if value is not None:
            kind = header.fields[keys[key]].type_name if keys[key] in header.fields else "string"
            listed[keys[key]] = gguf.field_of(keys[key], kind, value)
    infos, parts, at = [], [], 0
    for plan, raw in zip(plans, _data(plans), strict=True):
        infos.append(gguf.TensorInfo(plan.name, tuple(plan.dims), plan.code, at, 0))
        parts.append(raw + bytes(-len(raw) % gguf.DEFAULT_ALIGNMENT))
        at += len(parts[-1])
    output.write_bytes(gguf.pack_header(list(listed.values()), infos) + b"".join(parts))


def _apr(model: Model, source: Path, plans: list[apr.Plan], fields: Any, after: dict[str, Any], output: Path) -> None:
    apr.write(output, after, plans, apr.DIALECTS["aprender"])


def _safetensors(model: Model, source: Path, plans: list[apr.Plan], fields: dict[str, Any], _: Any, output: Path) -> None:
    names = {kind.code: name for name, kind in DTYPES.items()}
    head: dict[str, Any] = {}
    parts, at = [], 0
    for plan, raw in zip(plans, _data(plans), strict=True):
        if plan.code not in names:
            raise NotHeld(f"SafeTensors has no label for type code {plan.code}: floats alone, each by its name")
        if plan.name in head:
            raise NotHeld("a header of SafeTensors is a JSON object: it has each name once")
        head[plan.name] = {"dtype": names[plan.code], "shape": list(plan.dims), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        parts.append(raw)
    missing = [key for key in fields if key not in _HUGGING_FACE]
    if missing:
        raise NotHeld(f"a Hugging Face folder has no one key for {missing[0]}")
    shutil.copytree(source, output)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    (output / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    for key, value in fields.items():
        file, name = _HUGGING_FACE[key]
        said = json.loads((output / file).read_text(encoding="utf-8"))
        said[name] = value
        (output / file).write_text(json.dumps({k: v for k, v in said.items() if v is not None}), encoding="utf-8")


_WRITERS: dict[str, Callable[..., None]] = {"gguf": _gguf, "apr": _apr, "safetensors": _safetensors}
