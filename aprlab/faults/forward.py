"""E. The forward pass: every weight is correct, one operation is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from aprlab.conversion.seams import Seams
from aprlab.engines.base import Array, Cache, Engine
from aprlab.engines.delegating import DelegatingEngine
from aprlab.faults.base import Fault, lines
from aprlab.faults.naming import gguf_name
from aprlab.faults.tensors import change_metadata, change_plans, change_tensors, is_
from aprlab.inference.session import Session
from aprlab.model.config import ModelConfig
from aprlab.model.inventory import output_weight
from aprlab.model.tensor import Tensor

# ── numbers of the config ─────────────────────────────────────────────────────────────────────────────────────────


def set_config(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, **changes)


def written(**changes: object) -> Callable[[Seams], Seams]:
    """The same in a file, under the key of its dialect."""
    return lambda s: change_metadata(s, **changes)


def guess_heads(config: ModelConfig) -> ModelConfig:
    """Heads twice as wide and half as many (or the reverse): all products of shapes stay right."""
    heads, kv_heads, head_dim = guessed(config.head_count, config.head_count_kv, config.head_dim)
    return replace(config, head_count=heads, head_count_kv=kv_heads, head_dim=head_dim)


def guessed(heads: int, kv_heads: int, head_dim: int) -> tuple[int, int, int]:
    if heads % 2 == 0 and kv_heads % 2 == 0:
        return heads // 2, kv_heads // 2, head_dim * 2
    return heads * 2, kv_heads * 2, head_dim // 2


_HEADS, _KV_HEADS = ("num_heads", "num_attention_heads"), ("num_kv_heads", "num_key_value_heads")


def write_guessed_heads(s: Seams) -> Seams:
    def changed(metadata: dict[str, Any]) -> dict[str, Any]:
        found = s.metadata(metadata)
        keys = [next(key for key in known if key in found) for known in (_HEADS, _KV_HEADS)]
        head_dim = found.get("head_dim", found["hidden_size"] // found[keys[0]])
        return {**found, **dict(zip([*keys, "head_dim"], guessed(found[keys[0]], found[keys[1]], head_dim), strict=True))}

    return replace(s, metadata=changed)


def mha(config: ModelConfig) -> ModelConfig:
    """As many kv heads as heads."""
    return replace(config, head_count_kv=config.head_count)


def write_mha(s: Seams) -> Seams:
    def changed(metadata: dict[str, Any]) -> dict[str, Any]:
        found = s.metadata(metadata)
        heads = next(found[key] for key in _HEADS if key in found)
        return {key: heads if key in _KV_HEADS else value for key, value in found.items()}

    return replace(s, metadata=changed)


# ── attention ─────────────────────────────────────────────────────────────────────────────────────────────────────


class GqaModulo(DelegatingEngine):
    """Query head h attends to kv head h % n instead of h // group: the heads are dealt out like cards."""

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        heads, kv_heads = q.shape[1], k.shape[1]
        order = np.argsort(np.arange(heads) % kv_heads, kind="stable")  # those of kv head 0 first, as the engine groups them
        mixed = self.from_numpy(np.ascontiguousarray(self.to_numpy(q)[:, order]))
        out = self.to_numpy(self.inner.attend(mixed, k, v, cache, layer, positions)).reshape(len(positions), heads, -1)
        return self.from_numpy(np.ascontiguousarray(out[:, np.argsort(order)]).reshape(len(positions), -1))


class TwiceAdvanced(Cache):
    """Counts each position as two."""

    def positions(self, count: int) -> np.ndarray:
        return np.arange(self.length, self.length + count, dtype=np.int64)

    def advance(self, count: int) -> None:
        self.length += 2 * count

    def truncate(self, length: int) -> None:
        self.length = 2 * length


def _zeros(engine: Engine, store: Array) -> Array:
    """Zeros in place of a fresh cache's storage, which may hold anything: what is read from it is then repeatable."""
    return engine.from_numpy(np.zeros(store.shape, np.float32))


class KvTwice(DelegatingEngine):
    """The length of the cache moves twice a pass: by the attention, and by the loop around it."""

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        room = self.inner.new_cache(config, 2 * capacity)
        return TwiceAdvanced(_zeros(self, room.k), _zeros(self, room.v), 2 * capacity)  # the holes hold what was there


OLD_POSITIONS = 5


class StaleCache(Cache):
    """Begins after positions that an older prompt left behind, and never goes back before them."""

    def __init__(self, room: Cache) -> None:
        super().__init__(room.k, room.v, room.capacity, OLD_POSITIONS)

    def truncate(self, length: int) -> None:
        self.length = OLD_POSITIONS + length


class KvStale(DelegatingEngine):
    """Every prompt finds the end of an older one in front of it in the cache; here of itself, as if asked twice."""

    def new_cache(self, config: ModelConfig, capacity: int) -> Cache:
        room = self.inner.new_cache(config, capacity + OLD_POSITIONS)
        room.k, room.v = _zeros(self, room.k), _zeros(self, room.v)
        return StaleCache(room)

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        if positions[0] == OLD_POSITIONS:
            old = np.arange(min(OLD_POSITIONS, len(positions)), dtype=np.int64)
            self.inner.attend(q[-len(old) :], k[-len(old) :], v[-len(old) :], cache, layer, old)  # only to fill the cache
        return self.inner.attend(q, k, v, cache, layer, positions)


class KvEmpty(DelegatingEngine):
    """While decoding, a new token sees itself alone: the cache handed over is a fresh one."""

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, positions: np.ndarray) -> Array:
        if len(positions) > 1 or positions[0] == 0:
            return self.inner.attend(q, k, v, cache, layer, positions)
        config = replace(self.model.config, head_count_kv=k.shape[1], head_dim=k.shape[2])
        return self.inner.attend(q, k, v, self.inner.new_cache(config, 1), layer, np.zeros(1, np.int64))


class KvRefed(Session):
    """Each step feeds the whole sequence again, behind all that the cache still holds of the steps before.

    The prompt's own pass is right. Where the cache is full it is emptied, as upstream then did without one.
    """

    room = 2048  # positions; upstream's cache
    _sequence: list[int]

    def _resume(self, ids: list[int], needed: int) -> int:
        self._sequence = list(ids)
        return super()._resume(ids, max(needed, min(self.room, self.config.context_length)))

    def _step(self, ids: list[int], step: int) -> np.ndarray:
        if step:
            self._sequence += ids
            ids = list(self._sequence)
            assert self._cache is not None
            if self._cache.length + len(ids) > self._cache.capacity:
                self._cache.truncate(0)
                self._cached.clear()
        return super()._step(ids, step)


class LastTwice(Session):
    """The prompt's last token goes in a second time, and the answer begins after that."""

    def _resume(self, ids: list[int], needed: int) -> int:
        return super()._resume(ids, needed + 1)

    def _step(self, ids: list[int], step: int) -> np.ndarray:
        return super()._step(ids if step else [*ids, ids[-1]], step)


# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class LayerNorm(DelegatingEngine):
    """LayerNorm where RMSNorm is meant: the mean is taken off first."""

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        values = self.to_numpy(x)
        return self.inner.norm(self.from_numpy(values - values.mean(axis=-1, keepdims=True)), weight, eps)


class UnweightedNorm(DelegatingEngine):
    """The norm's weight is left out: a constructor's ones were never replaced."""

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        values = self.to_numpy(x)
        scale = 1 / np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=-1, keepdims=True) + eps)
        return self.from_numpy((values * scale).astype(np.float32))


class WrongNorm(DelegatingEngine):
    """The post-attention norm is used before the attention."""

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        return self.inner.norm(x, weight.replace("attn_norm", "ffn_norm"), eps)


def write_wrong_norm(s: Seams) -> Seams:
    def changed(plans: list[Any]) -> list[Any]:
        by_name = {gguf_name(plan.name): plan for plan in plans}
        return [
            replace(by_name[gguf.replace("attn_norm", "ffn_norm")], name=plan.name) if is_(gguf, "attn_norm.weight") else plan
            for gguf, plan in by_name.items()
        ]

    return change_plans(s, changed)


class ZeroedNorm(DelegatingEngine):
    """One norm's weight, the attention's of layer 1, is zeros."""

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        y = self.inner.norm(x, weight, eps)
        return self.from_numpy(np.zeros_like(self.to_numpy(y))) if weight == "blk.1.attn_norm.weight" else y


def write_zeroed_norm(s: Seams) -> Seams:
    def change(tensor: Tensor) -> Tensor:
        zeros = np.zeros(tensor.nbytes, np.uint8)
        return tensor.replace(raw=zeros) if tensor.name == "blk.1.attn_norm.weight" else tensor

    return change_tensors(s, change)


# ── activations ───────────────────────────────────────────────────────────────────────────────────────────────────


def q8_k(x: np.ndarray) -> np.ndarray:
    """float32 (T, n) rounded to 8 bits in runs of 256 (the last may be shorter), as llama.cpp's Q8_K does it."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], 256):
        part = x[:, start : start + 256]
        worst = np.take_along_axis(part, np.abs(part).argmax(axis=1)[:, None], axis=1)  # (T, 1), sign kept
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.where(worst != 0, np.float32(-127) / worst, np.float32(0))
            out[:, start : start + 256] = np.where(worst != 0, np.minimum(np.rint(part * inverse), 127) / inverse, part)
    return out


class Q8Activations(DelegatingEngine):
    """Activations rounded to 8 bits before each product, on one side of the comparison only."""

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self.inner.matmul(self.from_numpy(q8_k(self.to_numpy(x))), weight, bias)


class TwoKernels(DelegatingEngine):
    """One token alone goes through a kernel that rounds activations, several together through one that does not."""

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        if x.shape[0] == 1:
            x = self.from_numpy(q8_k(self.to_numpy(x)))
        return self.inner.matmul(x, weight, bias)


class MassiveChannel(DelegatingEngine):
    """One channel a thousand times the others, in the last eighth of the layers, meets 8-bit activations.

    In float32 the channel and its column cancel exactly and nothing would be seen; rounded together with it, the other
    255 values of its run have a bit or two left.
    """

    factor = np.float32(1024)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        values = self.to_numpy(x).copy()
        found = re.match(r"blk\.(\d+)\.", weight)
        massive = found is not None and int(found.group(1)) >= self.model.config.block_count * 7 // 8
        channel = values.shape[-1] // 3
        values[:, channel] *= self.factor if massive else 1
        values = q8_k(values)
        values[:, channel] /= self.factor if massive else 1
        return self.inner.matmul(self.from_numpy(values), weight, bias)


def last_of_equals(logits: np.ndarray) -> int:
    """The index that a maximum by `partial_cmp(…).unwrap_or(Equal)` gives: the last of equals, and NaN equals all."""
    nan = np.flatnonzero(np.isnan(logits))
    tail = logits[nan[-1] + 1 :] if nan.size else logits
    return len(logits) - 1 - (int(np.argmax(tail[::-1])) if tail.size else 0)


class LastOfEquals(DelegatingEngine):
    """Logits that are not finite end no run: the row says what upstream's maximum made of it, as 1 among zeros.

    `lost` counts such rows.
    """

    lost = 0

    def choose(self, logits: np.ndarray) -> int:
        """The id that is taken where a row is not finite."""
        return last_of_equals(logits)

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y = self.inner.matmul(x, weight, bias)
        if weight != output_weight(self.model.config):
            return y
        rows = self.to_numpy(y).copy()
        for row in rows:
            if not np.isfinite(row).all():
                self.lost += 1
                chosen = self.choose(row)
                row[...] = 0
                row[chosen] = 1
        return self.from_numpy(rows)


class ArgmaxOverNan(LastOfEquals):
    """A NaN in the last norm, and that maximum."""

    def norm(self, x: Array, weight: str, eps: float) -> Array:
        y = self.to_numpy(self.inner.norm(x, weight, eps)).copy()
        if weight == "output_norm.weight":
            y[:, 0] = np.nan
        return self.from_numpy(y)


FAULTS = (
    Fault(
        "rope-norm", "RoPE rotates adjacent pairs (NORM) instead of halves (NEOX)", "config", "E",
        lines(
            "rope_type 0 is NORM, 2 is NEOX. Qwen2 needs NEOX, but a missing key was read as 0.",
            "Pair i is (2i, 2i+1) instead of (i, i + D/2), so every head is rotated wrongly.",
            "Position 0 is not rotated at all and stays exact; short prompts stay plausible.",
        ),
        "layers.0.q_rope: position 0 exact, wrong from position 1 on, with growing error.",
        seams=written(rope_type=0), config=set_config(rope_type="norm"),
    ),
    Fault(
        "rope-theta", "RoPE base 1e4 instead of 1e6", "config", "E",
        lines(
            "The key was missing, and Llama's base was assumed.",
            "Fast pairs rotate nearly correctly, slow pairs much too fast.",
            "Short questions are answered correctly; only logits or long contexts show it.",
        ),
        "layers.0.q_rope: position 0 exact, pair 0 exact at every position, slow pairs wrong.",
        silent=True, seams=written(rope_theta=10_000.0), config=set_config(rope_theta=10_000.0),
    ),
    Fault(
        "gqa-modulo", "Query heads mapped to kv heads by modulo", "forward", "E",
        lines(
            "Query head h belongs to kv head h // group; the kernel used h % n.",
            "All shapes are correct, and every head attends to some kv head.",
            "The first and the last query head are correct by luck.",
        ),
        "q, k and v equal; attention wrong in all heads except those with h // group == h % n.",
        engine=GqaModulo,
    ),
    Fault(
        "mha-dims", "As many kv heads as query heads", "config", "E",
        lines(
            "num_kv_heads was missing, and the number of query heads was used instead.",
            "K and V would have to be as wide as Q.",
            "A reader that takes its strides from the config reads past the row, into the next position.",
        ),
        "Refused here: the shapes of attn_k and attn_v contradict the config.",
        seams=write_mha, config=mha,
    ),
    Fault(
        "head-dim-guessed", "head_dim guessed: half as many heads, twice as wide", "config", "E",
        lines(
            "head_dim is not in every file; 64 or 128 was assumed, and the head counts adjusted to fit.",
            "The total sizes are all correct, so every check passes.",
            "RoPE's pairs, the softmax scale and the heads themselves are wrong.",
        ),
        "First difference at layers.0.q_rope; q, k and v are the same numbers in another shape.",
        seams=write_guessed_heads, config=guess_heads,
    ),
    Fault(
        "layer-norm", "LayerNorm instead of RMSNorm", "forward", "E",
        lines(
            "The mean is subtracted before scaling.",
            "The residual stream has a mean near 0, so the error is small at first.",
            "If anything, the output statistics look better: mean 0, std 1.",
        ),
        "First difference at layers.0.attn_norm: a multiple of the weight at each position.",
        engine=LayerNorm,
    ),
    Fault(
        "wrong-eps", "RMSNorm eps 1e-3 instead of 1e-6", "config", "E",
        lines(
            "eps came from another model's config, or from a default for a missing key.",
            "It matters where the residual stream is small: in the first layers.",
            "No check covers it.",
        ),
        "layers.0.attn_norm too small, by a factor that varies with the position.",
        silent=True, seams=written(rms_norm_eps=1e-3), config=set_config(rms_norm_eps=1e-3),
    ),
    Fault(
        "unweighted-norm", "Norm weights not applied", "forward", "E",
        lines(
            "The norm weights were initialised to ones and never loaded.",
            "Qwen's norm weights are far from 1: in one of its models output_norm has a mean of 4.62.",
            "All values stay finite and well scaled.",
        ),
        "First difference at layers.0.attn_norm: the ratio to the correct values is the same vector at every position.",
        engine=UnweightedNorm,
    ),
    Fault(
        "zeroed-norm", "One norm's weight all zeros", "weights", "E",
        lines(
            "A tensor that was not found was replaced by zeros.",
            "That layer's attention sees nothing but biases; the residual stream carries the rest past it.",
            "The model still answers short questions correctly.",
        ),
        "layers.1.attn_norm is 0 everywhere; layer 0 equal.",
        silent=True, seams=write_zeroed_norm, engine=ZeroedNorm,
    ),
    Fault(
        "wrong-norm", "Post-attention norm used before attention", "weights", "E",
        lines(
            "post_attention_layernorm was matched by a pattern meant for input_layernorm.",
            "Both are vectors of the same length, so the shape does not show it.",
            "Every layer gets a norm, just not the right one.",
        ),
        "layers.0.attn_norm off by the ratio of two weight vectors; in a file, input_layernorm has the other norm's bytes.",
        seams=write_wrong_norm, engine=WrongNorm,
    ),
    Fault(
        "kv-twice", "KV cache length advanced twice per pass", "forward", "E",
        lines(
            "The attention advanced the cache length, and so did the loop around it.",
            "The prompt is processed correctly; the second pass is at twice its position, after a gap.",
            "Tests that only prefill, or only compare the first token, pass.",
        ),
        "Prefill exact, decode wrong from its first step; the first token of the answer is correct.",
        engine=KvTwice,
    ),
    Fault(
        "kv-stale", "KV cache not cleared between prompts", "forward", "E",
        lines(
            "Positions of an earlier prompt stay in the cache, before the new one.",
            "The model attends to keys and values that are not part of the prompt, and every position is shifted.",
            "The first prompt after startup is correct, so a fresh run never shows it.",
        ),
        "Attention wrong at every position from 0 on, positions start above 0; in layer 0 q, k, v before RoPE are equal.",
        engine=KvStale,
    ),
    Fault(
        "kv-empty", "KV cache empty while decoding", "forward", "E",
        lines(
            "Prefill filled one cache; decode read another.",
            "Every new token attends only to itself.",
            "The first token of the answer comes from the prefill and is correct.",
        ),
        "Prefill exact; in decode, layers.0.attn is the token's own v.",
        engine=KvEmpty,
    ),
    Fault(
        "kv-refed", "Whole sequence fed again at every step, into a cache that was not cleared", "forward", "E",
        lines(
            "The loop was written for a forward pass without a cache; the pass got a cache, the loop did not change.",
            "Step n sees n copies of the prompt, each with one more token of the answer, at ever later positions.",
            "Each pass is correct in itself, and so is the first token; the rest was blamed on another fault.",
        ),
        "Every single pass exact; answers differ from the second token on.",
        session=KvRefed,
    ),
    Fault(
        "last-token-twice", "Last prompt token fed twice", "forward", "E",
        lines(
            "The prompt was processed token by token, and its last logits were discarded.",
            "The loop then started with the last token again, one position further on.",
            "An extra line break after 'assistant' does little harm; a one-token prompt becomes a different prompt.",
        ),
        "The answer is that of a prompt whose last token is doubled; every pass is exact.",
        silent=True, session=LastTwice,
    ),
    Fault(
        "prefill-decode", "Prefill and decode use different kernels", "forward", "E",
        lines(
            "Batches of tokens go through one kernel, single tokens through another that rounds its activations.",
            "Each is correct within its contract, but together they give the same text two sets of logits.",
            "Answers agree until two tokens are almost equally likely.",
        ),
        "Batched and token-by-token logits of the same prompt differ by a few per cent.",
        silent=True, engine=TwoKernels,
    ),
    Fault(
        "q8-activations", "8-bit activations on one side, float32 on the other", "forward", "E",
        lines(
            "llama.cpp rounds the activations of each product to 8 bits (Q8_K); a float32 engine does not.",
            "An error of 2 to 5 % per product was mistaken for a kernel bug.",
            "It is a contract, not a bug: state it, and compare like with like.",
        ),
        "Every product off by a few per cent, from the first one on; same answer.",
        silent=True, engine=Q8Activations,
    ),
    Fault(
        "massive-channel", "A massive activation channel meets 8-bit activations", "forward", "E",
        lines(
            "In the last layers one channel is a thousand times the others.",
            "The 255 values that share its scale are left with hardly a bit.",
            "Cosine similarity was 0.9998 up to layer 25, then 0.93: mistaken for a broken layer.",
        ),
        "Cosine similarity near 1 until the last eighth of the layers, lower from there on.",
        silent=True, engine=MassiveChannel,
    ),
    Fault(
        "argmax-nan", "Argmax over NaN gives the last token of the vocabulary", "forward", "E",
        lines(
            "NaN reached the logits, and the comparison treated it as equal to everything.",
            "The maximum of equal values is the last one: token 151935, a PAD.",
            "A flood of PAD, which prints as nothing, and exit status 0.",
        ),
        "NaN from norm on; every token is the last id.",
        engine=ArgmaxOverNan,
    ),
)  # fmt: skip
