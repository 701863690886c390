"""A. Naming: tensors under another name, missing, duplicated, or invented."""

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
    """The GGUF name for a name in any naming; an unknown name is returned unchanged."""
    return next(iter(names.namings_of(written).values()), written)


def written_in(naming: str) -> Callable[[Seams], Seams]:
    """A converter that writes names of another generation."""
    return lambda s: replace(s, name=lambda gguf: names.from_gguf(gguf_name(s.name(gguf)), naming))


def exchanged(first: str, second: str) -> Callable[[Seams], Seams]:
    """A converter that swaps two modules of every layer: each is written under the other's name."""

    def other(gguf: str) -> str:
        for old, new in ((first, second), (second, first)):
            if re.fullmatch(rf"blk\.\d+\.{old}\.(weight|bias)", gguf):
                return gguf.replace(old, new)
        return gguf

    return lambda s: replace(s, name=lambda gguf: s.name(other(gguf)))


def layers_exchanged(i: int, j: int) -> Callable[[Seams], Seams]:
    """A converter that writes layer i under the names of layer j, and vice versa."""

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
    """A bias lookup that silently fails."""

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
        parts = {id(p) for group in groups.values() for p in group}
        return [p for p in plans if id(p) not in parts] + [_joined(name, group) for name, group in groups.items()]

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
    """One tensor (the last norm) is in the file twice, under the same name."""

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
    """An output head of zeros, created because the lookup failed."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.replace(raw=np.zeros(tensor.nbytes, np.uint8)) if tensor.name == "output.weight" else tensor

    return change_tensors(s, change)


# ── caches ────────────────────────────────────────────────────────────────────────────────────────────────────────


class KeyMismatch(DelegatingEngine):
    """A cache of decoded weights that stores under the canonical name and looks up the bare one: never a hit."""

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
            self.kept[stored] = self.matrix(weight, x.shape[-1]).dequantise(slice(0, 1))  # a row stands for all
            del self.kept[stored]  # decoded again, and never found; upstream let them pile up
        return self.inner.matmul(x, weight, bias)


_LOST = (
    "The loader looked up Q/K/V biases only as model.layers.N…; the GH-190 fix wrote bare names (layers.N…).",
    "Biases were optional in the loader, so a failed lookup was not an error: they were skipped.",
    "It hid behind GH-191: the Q4_K kernel was the suspect for weeks, and was innocent.",
)

FAULTS = (
    Fault(
        "GH-190", "Names without the prefix: layers.N… instead of model.layers.N…", "naming", "A",
        lines(
            "The converter wrote layers.N…, embed_tokens and norm, without the model. prefix.",
            "Readers look for model.layers.N…; each had its own list of fallback spellings.",
            "Required tensors were found through a fallback; the optional ones (the biases) were silently skipped.",
        ),
        "Every name except lm_head.weight lacks the prefix 'model.'; content hashes find each tensor under its other name.",
        seams=written_in("bare"),
    ),
    Fault(
        "short-names", "Names cut to N.q_proj.weight", "naming", "A",
        lines(
            "An upstream contract once asked for the layer number and the module only: 0.q_proj.weight.",
            "No reader looks for such names.",
            "The file passes every check that counts tensors or matches substrings of names.",
        ),
        "No name starts with model., layers. or blk.; counts and bytes are correct.",
        seams=written_in("short"),
    ),
    Fault(
        "raw-names", "GGUF names kept: blk.N…", "naming", "A",
        lines(
            "The converter copied GGUF names into a file whose readers expect Hugging Face names.",
            "Another upstream writer does so on purpose, in its own dialect, with dims in ggml order.",
            "GGUF names with row-major dims belong to neither dialect.",
        ),
        "Names are blk.N… but dims are row-major: read in the dialect that uses those names, every shape is reversed.",
        seams=written_in("raw"), needs="the dialect aprender",
    ),
    Fault(
        "swapped-q-k", "Q and K projections swapped", "naming", "A",
        lines(
            "In every layer the weights and biases of q_proj and k_proj are written under each other's names.",
            "With grouped-query attention the shapes give it away; with as many kv heads as query heads nothing would.",
            "Loaders that take shapes from the file instead of the config run it anyway.",
        ),
        "attn_q has the shape of attn_k and vice versa; content hashes find both.",
        seams=exchanged("attn_q", "attn_k"),
    ),
    Fault(
        "swapped-k-v", "K and V projections swapped", "naming", "A",
        lines(
            "In every layer the weights and biases of k_proj and v_proj are written under each other's names.",
            "Both have the same shape in every model, so no shape check sees it.",
            "Only the types may differ (V is often Q6_K), and nobody compares those.",
        ),
        "Shapes agree; V has K's huge biases; the bytes are found under the other name.",
        seams=exchanged("attn_k", "attn_v"),
    ),
    Fault(
        "swapped-gate-up", "gate and up projections swapped", "naming", "A",
        lines(
            "In every layer ffn_gate and ffn_up are written under each other's names.",
            "Shape and type are the same; the model computes silu(up) * gate instead of silu(gate) * up.",
            "Counts, sizes, shapes and statistics over the file are all correct.",
        ),
        "gate has the bytes of up and vice versa; layer 0 is equal up to and including ffn_norm.",
        seams=exchanged("ffn_gate", "ffn_up"),
    ),
    Fault(
        "swapped-layers", "Layers 1 and 2 swapped", "naming", "A",
        lines(
            "Two whole layers trade places, as happens with an unsorted directory or a string sort (1, 10, 2).",
            "Every tensor has the right shape and type, and plausible statistics.",
            "The residual stream forgives a lot: the answer may stay readable.",
        ),
        "All 12 tensors of layer 1 are found under layer 2 and vice versa; layer 0 is bitwise equal.",
        seams=layers_exchanged(1, 2),
    ),
    Fault(
        "lost-qkv-biases", "Q, K and V biases lost", "weights", "A", lines(*_LOST),
        "Embedding and first norm equal; first difference at Q, K and V of layer 0: a constant vector, the bias, at "
        "every position.",
        seams=zeroed(*QKV_BIASES), engine=LostBiases,
    ),
    Fault(
        "lost-q-biases", "Q biases lost", "weights", "A",
        lines(_LOST[1], "Only the Q lookup failed.", "Attention looks at the wrong positions; V is correct."),
        "First difference at layers.0.q, constant across positions; k and v equal.",
        seams=zeroed("attn_q.bias"), engine=LostQ,
    ),
    Fault(
        "lost-k-biases", "K biases lost", "weights", "A",
        lines(_LOST[1], "Only the K lookup failed.", "Without RoPE a K bias would cancel in the softmax; with RoPE it does not."),
        "First difference at layers.0.k, constant across positions; q and v equal.",
        seams=zeroed("attn_k.bias"), engine=LostK,
    ),
    Fault(
        "lost-v-biases", "V biases lost", "weights", "A",
        lines(_LOST[1], "Only the V lookup failed.", "Attention looks at the right positions but brings back the wrong values."),
        "First difference at layers.0.v, constant across positions; attention output off by a constant.",
        seams=zeroed("attn_v.bias"), engine=LostV,
    ),
    Fault(
        "missing-biases", "Q, K and V biases missing from the file", "naming", "A",
        lines(
            "The converter's name table had no rows for Qwen2's biases, because Llama has none.",
            "They were dropped: 84 tensors of the 1.5B are missing.",
            "Readers treated them as optional.",
        ),
        "3 tensors per layer are missing, everything else is equal; param_count and file size barely change.",
        seams=drop_biases,
    ),
    Fault(
        "bare-bias-names", "Biases under a different prefix than the weights", "naming", "A",
        lines(
            "Weights under model.layers.N…, biases under layers.N…: two functions with two name tables.",
            "Weights were looked up under several spellings, biases under one.",
            "The file is complete, so counting tensors finds nothing.",
        ),
        "3 tensors per layer have bare names, the rest canonical ones.",
        seams=biases_under_bare_names,
    ),
    Fault(
        "fused-biases", "One fused QKV bias instead of three", "naming", "A",
        lines(
            "Q, K and V biases are written as one tensor, qkv_proj.bias, as in models with fused attention.",
            "The weights stay separate, and the reader looks for q_proj.bias, k_proj.bias and v_proj.bias.",
            "All the values are in the file; none of them is found.",
        ),
        "3 tensors per layer missing, one unknown tensor instead: their bytes, concatenated.",
        seams=fuse_biases,
    ),
    Fault(
        "unsorted-index", "Unsorted index, reader with binary search", "container", "A",
        lines(
            "One writer keeps the order of the source; another program's reader does a binary search.",
            "In an unsorted list a binary search finds some names and misses others, by luck.",
            "The reader's fallback then listed 100 of 291 tensors, and the model still ran for a while.",
        ),
        "Names, spans and bytes are all there; the index is not sorted, and a binary search misses most of it.",
        post=unsort_index, needs="a dialect with a sorted index (aprender)",
    ),
    Fault(
        "duplicate-tensor", "Duplicate tensor name in the index", "container", "A",
        lines(
            "output_norm is written twice under the same name.",
            "Which copy is used depends on the reader: the first, the last, or whichever the hash map kept.",
            "As long as both copies are equal nothing happens; then somebody fixes one of them.",
        ),
        "One name is listed twice; the count is one too high.",
        seams=duplicate_tensor,
    ),
    Fault(
        "dropped-tensor", "One tensor missing from the file", "naming", "A",
        lines(
            "output_norm matches no rule in the converter's name table and is skipped.",
            "Readers that substitute a norm of ones for a missing one run the file anyway.",
            "Comparisons over the tensors that both files have never see it.",
        ),
        "The count is one too low; one name of the inventory is missing.",
        seams=drop_tensor,
    ),
    Fault(
        "tied-lm-head", "Output head made from the embedding", "weights", "A",
        lines(
            "The published config ties output and embedding, but the GGUF has its own output.weight.",
            "The converter trusts the config and writes the embedding a second time.",
            "For a model with tied embeddings this is correct; otherwise type and values are wrong.",
        ),
        "All layers and the last norm equal, only the logits differ; lm_head has the embedding's bytes. If the model is "
        "really tied, the answer stays the same.",
        seams=synthesised_head, config=tie, needs="its own output.weight",
    ),
    Fault(
        "zero-lm-head", "Output head all zeros", "weights", "A",
        lines(
            "A lookup failed, and a tensor of zeros took its place.",
            "All logits are equal, so the token depends on how argmax breaks ties.",
            "No NaN, no Inf, correct shapes: 'plausible'.",
        ),
        "All layers equal, every logit 0: the same token forever.",
        seams=zero_head, needs="its own output.weight",
    ),
    Fault(
        "cache-key-mismatch", "Weights cached under one name, looked up under another", "naming", "A",
        lines(
            "Decoded weights were cached as model.layers.N… and looked up as layers.N….",
            "Every matrix product decoded its weight again: 278 times slower upstream.",
            "Results are bitwise correct, so no test of values can see it.",
        ),
        "No effect on values; 0 cache hits, as many misses as matrix products.",
        silent=True, engine=KeyMismatch,
    ),
)  # fmt: skip
