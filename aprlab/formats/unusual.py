"""What is unusual about a model file, whether it does harm or not: what somebody who looks at it should know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aprlab.errors import FormatError
from aprlab.formats import gguf
from aprlab.formats.gguf_record import header_of, keeps_names
from aprlab.formats.split import number
from aprlab.model import keys, window
from aprlab.model.architecture import ARCHITECTURES
from aprlab.model.model import Model
from aprlab.model.vocabulary import UNUSED


@dataclass(frozen=True, slots=True)
class Unusual:
    """One thing, with a stable code.

    Attributes:
        code: ``unusual.…``.
        says: a line for people.
    """

    code: str
    says: str

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"code": self.code, "says": self.says}


def unusual(model: Model) -> list[Unusual]:
    """What is unusual about the keys and the tensor table of a GGUF file, or of an APR file that keeps its keys."""
    if not isinstance(model.metadata, gguf.FieldView) and not keeps_names(model.metadata):
        return []
    try:
        header = header_of(model)
    except FormatError:
        return []
    looks = (_container, _arrays, _vocabulary, _output, _rope, _window, _types)
    return [found for look in looks for found in look(model, header)]


def _container(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    if header.parts:
        yield Unusual("unusual.split", f"the model is in {len(header.parts)} files")
    if header.version != 3:
        yield Unusual("unusual.version", f"GGUF version {header.version}; files of today are version 3")
    if header.alignment != gguf.DEFAULT_ALIGNMENT:
        yield Unusual("unusual.alignment", f"data is aligned to {header.alignment} bytes, not {gguf.DEFAULT_ALIGNMENT}")
    if "general.architecture" not in header.fields:
        yield Unusual("unusual.no-architecture", "there is no general.architecture: no program knows how to run it")
    odd = [t for t in model.tensors.values() if len(t.shape) > 1 and t.type.name in ("F64", "I8", "I16", "I32", "I64")]
    if odd:
        yield Unusual("unusual.types", f"{len(odd)} matrices of type {odd[0].type.name}, first {odd[0].name}")
    scales = [name for name in model.tensors if name.endswith(".scale")]
    if scales and any(t.type.name == "NVFP4" for t in model.tensors.values()):
        yield Unusual("unusual.tensor-scales", f"{len(scales)} NVFP4 tensors have a scale tensor of their own, first {scales[0]}")


def _arrays(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    for key, item in header.fields.items():
        if item.element is not None and len(item.value) == 0:
            yield Unusual("unusual.empty-array", f"key {key!r} is an array without entries")


def _vocabulary(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    tokens = header.value("tokenizer.ggml.tokens")
    if not isinstance(tokens, gguf.Strings | list):
        return
    if "tokenizer.ggml.pre" not in header.fields:
        yield Unusual("unusual.no-pre", "there is no tokenizer.ggml.pre: llama.cpp cuts text as 'default'")
    if header.value("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.merges" not in header.fields:
        yield Unusual("unusual.no-merges", "there is no tokenizer.ggml.merges: every text falls apart into bytes")
    embedding = model.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != len(tokens):
        yield Unusual("unusual.rows", f"token_embd.weight has {embedding.shape[0]} rows for {len(tokens)} tokens")
    kinds = header.value("tokenizer.ggml.token_type")
    if isinstance(kinds, np.ndarray | list):
        listed = np.asarray(kinds)
        behind = listed.size - int(np.max(np.flatnonzero(listed != UNUSED), initial=-1)) - 1
        if behind:
            yield Unusual("unusual.padded", f"the last {behind} of {listed.size} tokens are unused: the vocabulary is padded")
    for key in ("bos", "eos", "padding", "unknown"):
        id = number(header, f"tokenizer.ggml.{key}_token_id")
        if id is not None and not 0 <= id < len(tokens):
            yield Unusual("unusual.special-out-of-range", f"the {key} token {id} is outside the vocabulary of {len(tokens)}")
    if "tokenizer.chat_template" not in header.fields:
        yield Unusual("unusual.no-template", "there is no chat template: prompts go in as they are")


def _output(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    if "token_embd.weight" in model.tensors and "output.weight" not in model.tensors:
        yield Unusual("unusual.tied", "there is no output.weight: the embedding makes the logits")


def _rope(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    name = header.value("general.architecture")
    for key in (f"{name}.rope.scaling.type", f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear"):
        value = header.value(key)
        if value not in (None, "none", 1.0, 0.0):
            yield Unusual("unusual.rope-scaling", f"{key} is {value!r}: positions are scaled")


def _window(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    name = header.value("general.architecture")
    length = header.value(f"{name}.context_length")
    seen = number(header, f"{name}.{window.GGUF_KEY}")
    if name in ARCHITECTURES and seen and isinstance(length, int) and seen < length:
        yield Unusual(
            "unusual.sliding-window", f"attention sees the last {seen} positions alone; llama.cpp does not read that of this "
            f"architecture, and lets it see all {length}"
        )  # fmt: skip


def _types(model: Model, header: gguf.Header) -> Iterator[Unusual]:
    for key, item in header.fields.items():
        expected = keys.gguf_type(key)
        if expected is not None and item.type_name != expected:
            yield Unusual("unusual.key-type", f"key {key!r} is a {item.type_name}; llama.cpp expects {expected}")


__all__ = ["Unusual", "unusual"]
