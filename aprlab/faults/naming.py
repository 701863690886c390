"""A. Naming: tensors under another name, under no name, twice, or made up."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from aprlab.conversion.seams import Seams
from aprlab.engines.base import Array, Engine
from aprlab.engines.delegating import DelegatingEngine
from aprlab.faults.base import Fault, lines
from aprlab.faults.tensors import change_plans, change_tensors, edit_index, is_
from aprlab.formats.apr import Entry, Plan
from aprlab.model import names
from aprlab.model.config import ModelConfig
from aprlab.model.tensor import Tensor

QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")

# ── other names ───────────────────────────────────────────────────────────────────────────────────────────────────


def gguf_name(written: str) -> str:
    """The GGUF name of a name in a file of whatever naming; one that nobody knows stays as it is."""
    return next(iter(names.namings_of(written).values()), written)


def written_in(naming: str) -> Callable[[Seams], Seams]:
    """A converter that writes names of another generation."""
    return lambda s: replace(s, name=lambda gguf: names.from_gguf(gguf_name(s.name(gguf)), naming))


def exchanged(first: str, second: str) -> Callable[[Seams], Seams]:
    """A converter that confuses two modules of every layer: each is written under the other's name."""

    def other(gguf: str) -> str:
        for old, new in ((first, second), (second, first)):
            if re.fullmatch(rf"blk\.\d+\.{old}\.(weight|bias)", gguf):
                return gguf.replace(old, new)
        return gguf

    return lambda s: replace(s, name=lambda gguf: s.name(other(gguf)))


def layers_exchanged(i: int, j: int) -> Callable[[Seams], Seams]:
    """A converter that writes layer i under the names of layer j, and the other way round."""

    def other(gguf: str) -> str:
        for old, new in ((i, j), (j, i)):
            if gguf.startswith(f"blk.{old}."):
                return gguf.replace(f"blk.{old}.", f"blk.{new}.", 1)
        return gguf

    return lambda s: replace(s, name=lambda gguf: s.name(other(gguf)))


# ── biases ────────────────────────────────────────────────────────────────────────────────────────────────────────


def zeroed(*templates: str) -> Callable[[Seams], Seams]:
    """A file in which these vectors are zeros."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.replace(raw=np.zeros(tensor.nbytes, np.uint8)) if is_(tensor.name, *templates) else tensor

    return lambda s: change_tensors(s, change)


class LostBiases(DelegatingEngine):
    """A look-up of biases that misses and says nothing."""

    lost: tuple[str, ...] = QKV_BIASES

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self.inner.matmul(x, weight, None if bias is not None and is_(bias, *self.lost) else bias)


class LostQ(LostBiases):
    lost = ("attn_q.bias",)


class LostK(LostBiases):
    lost = ("attn_k.bias",)


class LostV(LostBiases):
    lost = ("attn_v.bias",)


def drop_biases(s: Seams) -> Seams:
    """A file without any Q, K, V bias: the writer's name table had no row for them."""
    return change_plans(s, lambda plans: [p for p in plans if not is_(gguf_name(p.name), *QKV_BIASES)])


def biases_under_bare_names(s: Seams) -> Seams:
    """Biases under another prefix than the weights'."""

    def name(gguf: str) -> str:
        return names.from_gguf(gguf_name(s.name(gguf)), "bare") if is_(gguf, *QKV_BIASES) else s.name(gguf)

    return replace(s, name=name)


def fuse_biases(s: Seams) -> Seams:
    """Q, K and V bias of a layer as one tensor, ``…qkv_proj.bias``, as other models of that time had it."""

    def fused(plans: list[Plan]) -> list[Plan]:
        groups: dict[str, list[Plan]] = {}
        for plan in plans:
            if is_(gguf_name(plan.name), *QKV_BIASES):
                groups.setdefault(re.sub(r"([._])[qkv]((?:_proj)?\.bias)$", r"\1qkv\2", plan.name), []).append(plan)
        parts = [p for group in groups.values() for p in group]
        return [p for p in plans if p not in parts] + [_joined(name, group) for name, group in groups.items()]

    return change_plans(s, fused)


def _joined(name: str, parts: list[Plan]) -> Plan:
    rows = sum(plan.dims[0] for plan in parts)

    def chunks():  # type: ignore[no-untyped-def]
        for plan in parts:
            yield from plan.chunks()

    return Plan(name, parts[0].code, (rows,), sum(plan.nbytes for plan in parts), chunks)


# ── counts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def unsort_index(path: Path) -> None:
    """The index in the order of the tensors' data in the source (embedding, output, layers), not sorted by name."""

    def shuffled(entries: list[Entry]) -> list[Entry]:
        order = {name: n for n, (name, _) in enumerate(names.PAIRS)}

        def key(entry: Entry) -> tuple[int, int]:
            gguf = gguf_name(entry.name)
            layer = re.match(r"blk\.(\d+)\.", gguf)
            return (int(layer.group(1)) if layer else -1), order.get(names.template_of(gguf), len(order))

        return sorted(entries, key=key)

    edit_index(path, shuffled)


def found_by_binary_search(listed: list[str]) -> list[str]:
    """Those of `listed` that a binary search for each name finds: all of them only if the list is sorted."""

    def finds(name: str) -> bool:
        low, high = 0, len(listed)
        while low < high:
            middle = (low + high) // 2
            if listed[middle] == name:
                return True
            low, high = (middle + 1, high) if listed[middle] < name else (low, middle)
        return False

    return [name for name in listed if finds(name)]


def duplicate_tensor(s: Seams) -> Seams:
    """One tensor (the last layer norm's) stands in the file twice, under one name."""

    def twice(plans: list[Plan]) -> list[Plan]:
        return plans + [p for p in plans if gguf_name(p.name) == "output_norm.weight"]

    return change_plans(s, twice)


def drop_tensor(s: Seams) -> Seams:
    """`output_norm` is lost on the way: no rule of the name table matched."""
    return change_plans(s, lambda plans: [p for p in plans if gguf_name(p.name) != "output_norm.weight"])


# ── the output head ───────────────────────────────────────────────────────────────────────────────────────────────


def synthesised_head(s: Seams) -> Seams:
    """lm_head written from the embedding, although the source has an output.weight of its own."""

    def copied(plans: list[Plan]) -> list[Plan]:
        by_name = {gguf_name(plan.name): plan for plan in plans}
        embedding = by_name["token_embd.weight"]
        return [replace(embedding, name=p.name) if p is by_name.get("output.weight") else p for p in plans]

    return change_plans(s, copied)


def tie(config: ModelConfig) -> ModelConfig:
    """Embeddings taken for tied: the embedding makes the logits."""
    return replace(config, tied_embeddings=True)


def zero_head(s: Seams) -> Seams:
    """An output head of zeros, made up because the look-up missed."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.replace(raw=np.zeros(tensor.nbytes, np.uint8)) if tensor.name == "output.weight" else tensor

    return change_tensors(s, change)


# ── caches ────────────────────────────────────────────────────────────────────────────────────────────────────────


class KeyMismatch(DelegatingEngine):
    """A cache of decoded weights that stores under the canonical name and asks under the bare one: never a hit."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.kept: dict[str, np.ndarray] = {}
        self.hits = self.misses = 0

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        asked, stored = (names.from_gguf(weight, naming) for naming in ("bare", "canonical"))
        if asked in self.kept:
            self.hits += 1
        else:
            self.misses += 1
            self.kept[stored] = self.matrix(weight, x.shape[-1]).dequantise()  # decoded anew, and never found again
            del self.kept[stored]  # upstream let them pile up; here only the time is lost
        return self.inner.matmul(x, weight, bias)


_LOST = (
    "Q/K/V biases were looked up only as model.layers.N…; the naming fix of GH-190 wrote bare names.",
    "Biases were optional in the loader, so a look-up that missed was no error: they were skipped.",
    "It hid behind GH-191: the Q4_K kernel was suspected for weeks, and was innocent.",
)

FAULTS = (
    Fault(
        "GH-190", "Names without the prefix: layers.N… instead of model.layers.N…", "naming", "A",
        lines(
            "The converter wrote layers.N…, embed_tokens and norm, one generation of names back.",
            "Readers looked for model.layers.N…; each had its own list of other spellings to try.",
            "What was found worked, what was optional (the biases) vanished without a word.",
        ),
        "Every name but lm_head.weight lacks 'model.'; content hashes find each tensor under its other name.",
        seams=written_in("bare"),
    ),
    Fault(
        "short-names", "Names cut to N.q_proj.weight", "naming", "A",
        lines(
            "A contract upstream once asked for layer number and module alone: 0.q_proj.weight.",
            "No reader looks for these names.",
            "Files pass every check that counts tensors or looks for parts of names.",
        ),
        "No name starts with model., layers. or blk.; counts and bytes are right.",
        seams=written_in("short"),
    ),
    Fault(
        "raw-names", "GGUF names left as they are: blk.N…", "naming", "A",
        lines(
            "The converter copied GGUF's names into a file whose readers expect Hugging Face's.",
            "Another writer upstream does so on purpose, in a dialect of its own with dims in ggml's order.",
            "The mixture, GGUF names with row-major dims, belongs to neither.",
        ),
        "Names are blk.N…, but dims are rows first: read as the dialect of those names, every shape is reversed.",
        seams=written_in("raw"), needs="the dialect aprender",
    ),
    Fault(
        "swapped-q-k", "Q and K projections under each other's names", "naming", "A",
        lines(
            "Weights and biases of q_proj and k_proj are exchanged in every layer.",
            "With grouped heads the shapes tell at once; with as many kv heads as heads nothing would.",
            "Loaders that take shapes from the file instead of the config run it all the same.",
        ),
        "attn_q has the shape of attn_k and the reverse; content hashes find both.",
        seams=exchanged("attn_q", "attn_k"),
    ),
    Fault(
        "swapped-k-v", "K and V projections under each other's names", "naming", "A",
        lines(
            "Weights and biases of k_proj and v_proj are exchanged in every layer.",
            "Both have the same shape in every model, so no check of shapes sees it.",
            "Only the types may differ (V is often Q6_K), which no one compares.",
        ),
        "Shapes agree; K's huge biases stand in V; the bytes are found under the other name.",
        seams=exchanged("attn_k", "attn_v"),
    ),
    Fault(
        "swapped-gate-up", "gate and up projections under each other's names", "naming", "A",
        lines(
            "ffn_gate and ffn_up are exchanged in every layer.",
            "They have the same shape and type: silu(up) * gate is computed instead of silu(gate) * up.",
            "Statistics per file, counts, sizes and shapes are all right.",
        ),
        "Bytes of gate stand under up and the reverse; the first layer differs from swiglu on, not before.",
        seams=exchanged("ffn_gate", "ffn_up"),
    ),
    Fault(
        "swapped-layers", "Layers 1 and 2 under each other's numbers", "naming", "A",
        lines(
            "Two layers are exchanged whole, as an unsorted directory or a string sort (1, 10, 2) does it.",
            "Every tensor has the right shape, type and statistics of its kind.",
            "Residual streams forgive much: the answer may stay readable.",
        ),
        "All 12 tensors of layer 1 are found under layer 2 and the reverse; layer 0 is equal to the last bit.",
        seams=layers_exchanged(1, 2),
    ),
    Fault(
        "lost-qkv-biases", "Q, K and V biases lost", "weights", "A", lines(*_LOST),
        "Embedding and first norm equal; first difference at Q, K and V of layer 0: one constant vector, the bias, at "
        "every position.",
        seams=zeroed(*QKV_BIASES), engine=LostBiases,
    ),
    Fault(
        "lost-q-biases", "Q biases lost", "weights", "A",
        lines(_LOST[1], "Only the Q look-up missed.", "The attention looks at the wrong places; V is right."),
        "First difference at layers.0.q, constant over the positions; k and v equal.",
        seams=zeroed("attn_q.bias"), engine=LostQ,
    ),
    Fault(
        "lost-k-biases", "K biases lost", "weights", "A",
        lines(_LOST[1], "Only the K look-up missed.", "Before RoPE a K bias would cancel in the softmax; after it does not."),
        "First difference at layers.0.k, constant over the positions; q and v equal.",
        seams=zeroed("attn_k.bias"), engine=LostK,
    ),
    Fault(
        "lost-v-biases", "V biases lost", "weights", "A",
        lines(_LOST[1], "Only the V look-up missed.", "The attention looks at the right places and brings back too little."),
        "First difference at layers.0.v, constant over the positions; attention output off by a constant.",
        seams=zeroed("attn_v.bias"), engine=LostV,
    ),
    Fault(
        "missing-biases", "Q, K and V biases not in the file", "naming", "A",
        lines(
            "The converter's table knew no row for Qwen2's biases, since Llama has none.",
            "They were left out; 84 tensors of the 1.5B are not there.",
            "Readers took them for optional.",
        ),
        "3 tensors a layer are missing, everything else is equal; param_count and sizes shrink by next to nothing.",
        seams=drop_biases,
    ),
    Fault(
        "bare-bias-names", "Biases under another prefix than the weights", "naming", "A",
        lines(
            "Weights under model.layers.N…, biases under layers.N…: two functions, two tables.",
            "Weights were looked up under several forms, biases under one.",
            "The file is complete: counting tensors finds nothing.",
        ),
        "3 tensors a layer under bare names beside canonical ones.",
        seams=biases_under_bare_names,
    ),
    Fault(
        "fused-biases", "Only a fused QKV bias in the file", "naming", "A",
        lines(
            "Q, K and V bias written as one tensor qkv_proj.bias, as models with fused attention have it.",
            "The weights stay apart, and the reader looks for q_proj.bias, k_proj.bias, v_proj.bias.",
            "All values are in the file, none is found.",
        ),
        "3 tensors a layer missing, one unknown one instead, whose bytes are theirs in a row.",
        seams=fuse_biases,
    ),
    Fault(
        "unsorted-index", "Index in file order, reader with binary search", "container", "A",
        lines(
            "One writer keeps the order of the source, the other's reader searches by halves.",
            "A binary search in an unsorted list finds some and misses others, by luck.",
            "The reader's fallback then showed 100 of 291 tensors, and the model ran on for a while.",
        ),
        "Names, spans and bytes are all there; the index is not sorted and a binary search misses most of it.",
        post=unsort_index, needs="a dialect with a sorted index (aprender)",
    ),
    Fault(
        "duplicate-tensor", "One tensor twice in the index", "container", "A",
        lines(
            "output_norm is written twice under one name.",
            "Which one is read depends on the reader: the first, the last, the one a hash map kept.",
            "As long as both are equal nothing happens; then one of them is mended.",
        ),
        "One name stands twice; the count is one too high.",
        seams=duplicate_tensor,
    ),
    Fault(
        "dropped-tensor", "One tensor not in the file", "naming", "A",
        lines(
            "output_norm matches no rule of the converter's name table and is skipped.",
            "Readers that make a norm of ones up when they find none run it all the same.",
            "Comparisons over the tensors common to both files never see it.",
        ),
        "The count is one too low, one name of the inventory is missing.",
        seams=drop_tensor,
    ),
    Fault(
        "tied-lm-head", "Output head made from the embedding", "weights", "A",
        lines(
            "The published config ties output and embedding, the GGUF has an output.weight of its own.",
            "The converter believes the config and writes the embedding once more.",
            "For a model that is really tied this is right; the bytes differ in type and values otherwise.",
        ),
        "All layers and the last norm equal, only logits differ; lm_head's bytes are the embedding's. Where the model is "
        "really tied the answer stays.",
        seams=synthesised_head, config=tie, needs="an output.weight of its own",
    ),
    Fault(
        "zero-lm-head", "Output head of zeros", "weights", "A",
        lines(
            "A look-up missed, and a tensor of zeros was made up in its place.",
            "All logits are equal, and the argmax takes whatever it takes among equals.",
            "No NaN, no Inf, shapes right: 'plausible'.",
        ),
        "All layers equal, every logit 0: one token for ever.",
        seams=zero_head, needs="an output.weight of its own",
    ),
    Fault(
        "cache-key-mismatch", "Weights cached under one name, asked for under another", "naming", "A",
        lines(
            "Decoded weights were stored as model.layers.N… and looked up as layers.N….",
            "Every matrix product decoded its weight anew: 278 times slower upstream.",
            "Results are right to the last bit, so no test of values can see it.",
        ),
        "Nothing in values; 0 hits, as many misses as products.",
        silent=True, engine=KeyMismatch,
    ),
)  # fmt: skip
