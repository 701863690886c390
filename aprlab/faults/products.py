"""E, continued: faults of products, norms, number formats and of the choice of a token."""

from __future__ import annotations

import math
import re

import numpy as np

from aprlab.conversion.seams import Seams
from aprlab.engines.base import Array, Engine
from aprlab.engines.choice import is_small
from aprlab.engines.delegating import DelegatingEngine
from aprlab.faults.base import Fault, lines
from aprlab.faults.forward import ArgmaxOverNan, LayerNorm
from aprlab.faults.layout import transpose_data, transposed
from aprlab.faults.tensors import change_tensors
from aprlab.model.model import Model
from aprlab.model.tensor import Tensor
from aprlab.quants import quantise

_SPAN = 1 << 20  # values of a matrix that are decoded at a time

# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────


class TransposedGemv(DelegatingEngine):
    """y_i = Σ_j flat[j·N + i] · x_j: the weight's numbers, row-major [N, K], read as if they were [K, N].

    Of a small model the numbers are kept; of a large one they would not fit, and are decoded span by span at each product.
    """

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.kept: dict[str, np.ndarray] = {}

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        tensor = self.matrix(weight, x.shape[-1])
        if is_small(self.model):
            if weight not in self.kept:
                self.kept[weight] = tensor.dequantise().reshape(tensor.cols, tensor.rows)
            y = self.to_numpy(x) @ self.kept[weight]
        else:
            y = self._by_spans(self.to_numpy(x), tensor)
        if bias is not None:
            if bias not in self.kept:
                self.kept[bias] = self.vector(bias, tensor.rows).dequantise()
            y += self.kept[bias]
        return self.from_numpy(y)

    def _by_spans(self, x: np.ndarray, tensor: Tensor) -> np.ndarray:
        plain: Engine = self.inner
        while isinstance(plain, DelegatingEngine):  # rows as they are stored: another fault may change an embedding
            plain = plain.inner
        y = np.zeros((x.shape[0], tensor.rows), np.float32)
        least = tensor.rows // math.gcd(tensor.rows, tensor.cols)  # so many rows hold whole rows of the other shape
        step = max(1, _SPAN // (least * tensor.cols)) * least
        for first in range(0, tensor.rows, step):
            numbers = np.arange(first, min(first + step, tensor.rows))
            flat = plain.to_numpy(plain.embed(numbers, tensor.name)).reshape(-1, tensor.rows)
            at = first * tensor.cols // tensor.rows
            y += x[:, at : at + len(flat)] @ flat
        return y

    def close(self) -> None:
        self.kept.clear()
        super().close()


class TurnedHead(DelegatingEngine):
    """The output weight turned round, and then read as if it were not: row i of the transpose's numbers is the logit of i."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.kept: np.ndarray | None = None

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        if weight != "output.weight":  # a tied head is the embedding, which the lookup needs as it is
            return self.inner.matmul(x, weight, bias)
        if self.kept is None:
            self.kept = transposed(self.matrix(weight, x.shape[-1]).dequantise())
        return self.from_numpy(self.to_numpy(x) @ self.kept.T)

    def close(self) -> None:
        self.kept = None
        super().close()


class ZeroProduct(DelegatingEngine):
    """A product whose width is no multiple of 256 is 0.0, its length error swallowed."""

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y = self.inner.matmul(x, weight, bias)
        return self.from_numpy(np.zeros_like(self.to_numpy(y))) if x.shape[-1] % 256 else y


def _narrow(model: Model) -> bool:
    return any(len(t.shape) == 2 and t.cols % 256 for name, t in model.tensors.items() if name != "token_embd.weight")


class LayersCut(DelegatingEngine):
    """Only as many layers as there are heads: later ones add nothing to the stream."""

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y = self.inner.matmul(x, weight, bias)
        found = re.fullmatch(r"blk\.(\d+)\.(?:attn_output|ffn_down)\.weight", weight)
        cut = found is not None and int(found[1]) >= cut_at(self.model)
        return self.from_numpy(np.zeros_like(self.to_numpy(y))) if cut else y


def cut_at(model: Model) -> int:
    """Layers that are left: as many as heads, or as kv heads where there are no fewer heads than layers."""
    config = model.config
    return config.head_count if config.head_count < config.block_count else config.head_count_kv


# ── number formats ────────────────────────────────────────────────────────────────────────────────────────────────


class HalfResidual(DelegatingEngine):
    """The residual stream and what the MLP adds to it are float16."""

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y = self.inner.matmul(x, weight, bias)
        return self._half(y) if weight.endswith("ffn_down.weight") else y

    def add(self, a: Array, b: Array) -> Array:
        return self._half(self.inner.add(a, b))

    def _half(self, x: Array) -> Array:
        with np.errstate(over="ignore"):
            return self.from_numpy(self.to_numpy(x).astype(np.float16).astype(np.float32))


def e4m3(x: np.ndarray) -> np.ndarray:
    """float32 rounded to FP8 E4M3: three bits of mantissa, steps of 2^-9 below 2^-6, nothing beyond 448."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(x))), -6)
    step = np.exp2(np.where(np.isfinite(exponent), exponent, -6) - 3).astype(np.float32)
    return np.clip(np.rint(x / step) * step, -448, 448).astype(np.float32)


class UnscaledEights(DelegatingEngine):
    """Activations in FP8 E4M3, without the scale that brings them into its range."""

    def matmul(self, x: Array, weight: str, bias: str | None = None) -> Array:
        return self.inner.matmul(self.from_numpy(e4m3(self.to_numpy(x))), weight, bias)


# ── norms and activations ─────────────────────────────────────────────────────────────────────────────────────────


def add_one(s: Seams) -> Seams:
    """Every norm's weight plus one."""

    def change(tensor: Tensor) -> Tensor:
        if not tensor.name.endswith("norm.weight"):
            return tensor
        return tensor.replace(raw=quantise(tensor.dequantise() + np.float32(1), tensor.type))

    return change_tensors(s, change)


class Phi(LayerNorm):
    """LayerNorm, and GELU in place of SiLU."""

    def swiglu(self, gate: Array, up: Array) -> Array:
        z = self.to_numpy(gate)
        with np.errstate(over="ignore"):
            gelu = np.float32(0.5) * z * (1 + np.tanh(np.float32(0.7978846) * (z + np.float32(0.044715) * z**3)))
        return self.from_numpy((gelu * self.to_numpy(up)).astype(np.float32))


# ── the choice of a token ─────────────────────────────────────────────────────────────────────────────────────────

TOP_K = 40


class NanSampled(ArgmaxOverNan):
    """NaN logits through top-k: the sort leaves equals alone and takes NaN for equal, so ids 0 … k-1 stay; the running sum
    is NaN and never reaches the random number, so that the last of them is taken."""

    def choose(self, logits: np.ndarray) -> int:
        return min(TOP_K, len(logits)) - 1


FAULTS = (
    Fault(
        "gemv-transposed", "Matrix-vector product over the transposed weight", "forward", "E",
        lines(
            "The kernel computed y_i = Σ_j A[j·N + i]·x_j for a row-major [N, K] weight.",
            "Every product mixes values of unrelated rows; for square weights it is exactly the transpose.",
            "Sizes agree and nothing is out of bounds; an early thread blamed the ratio of heads instead (aprender #559, #1651).",
        ),
        "layers.0.q uncorrelated with the correct values at every position; the biases alone are right.",
        engine=TransposedGemv,
    ),
    Fault(
        "lm-head-transposed", "Output weight transposed", "layout", "E",
        lines(
            "The output weight went through a code path of its own, which transposed it.",
            "All layers are exact; only the logits are not.",
            "Mean, spread and sums of the weight do not change.",
        ),
        "All trace points equal up to norm; logits uncorrelated with the correct ones.",
        seams=transpose_data("output.weight"), needs="an output weight of its own",
    ),
    Fault(
        "lm-head-turned", "Output weight transposed for a product that takes rows", "forward", "E",
        lines(
            "The head alone was still transposed before each product, for a kernel that took rows [N, K] since May 2026.",
            "Products of several rows went elsewhere and stayed right; the last token's logits are a product of one row.",
            "The CPU was right on the same file, no error was raised, and the layers were exact (aprender #1651, #3923, #3975).",
        ),
        "All trace points equal up to norm; logits uncorrelated with the correct ones; the file is right.",
        engine=TurnedHead, needs="an output weight of its own", fits=lambda model: "output.weight" in model.tensors,
    ),
    Fault(
        "zero-product", "Products over rows that are not whole super-blocks are 0.0", "forward", "E",
        lines(
            "Activations padded to 256 did not fit the weight; the length error was turned into 0.0.",
            "In the 0.5B (896 columns) every product but one of a layer vanishes, biases included.",
            "No error, no NaN; models whose widths are multiples of 256 are right.",
        ),
        "layers.0.q, k and v are 0 everywhere.",
        engine=ZeroProduct, needs="rows whose width is not a multiple of 256 (the 0.5B)", fits=_narrow,
    ),
    Fault(
        "layers-cut", "As many layers as heads", "forward", "E",
        lines(
            "The number of heads was taken for the number of layers: 14 of 24 in the 0.5B.",
            "The stream leaves the stack half way and goes into the last norm.",
            "Every layer that runs is exact.",
        ),
        "Trace equal up to a layer; after it every layer adds nothing.",
        engine=LayersCut, needs="more layers than heads or than kv heads",
        fits=lambda model: cut_at(model) < model.config.block_count,
    ),
    Fault(
        "fp16-residual", "Residual stream in float16", "forward", "E",
        lines(
            "The stream and the MLP's output were kept in float16 (vLLM #14126, transformers float16).",
            "Qwen2 has activations beyond 65504: infinite, then NaN, then a flood of one letter.",
            "Models without such activations only lose digits.",
        ),
        "layers.0.ffn_inp off by a few ten-thousandths; where the stream passes 65504, NaN from there on.",
        silent=True, engine=HalfResidual,
    ),
    Fault(
        "fp8-unscaled", "Activations in FP8 E4M3 without a scale", "forward", "E",
        lines(
            "The product took E4M3 inputs; the scale that brings a tensor into its range was left out.",
            "Beyond 448 everything is 448, below 0.001 everything is 0, and between there are three bits of mantissa.",
            "The products look plausible: correlation with the correct ones is about 0.99.",
        ),
        "Every product off by a few per cent, from layers.0.q on.",
        engine=UnscaledEights,
    ),
    Fault(
        "norm-plus-one", "Norm weights stored as 1 + w", "weights", "E",
        lines(
            "Some families store w − 1 and add one while running; a converter added the one to a model that does not.",
            "All norms are too large by the normalised stream itself.",
            "Shapes, types and counts agree; the values stay positive.",
        ),
        "Means of all norm weights exactly 1 above those of the source; everything else equal.",
        seams=add_one,
    ),
    Fault(
        "phi-for-qwen2", "Qwen2 run as Phi: LayerNorm and GELU", "forward", "E",
        lines(
            "The architecture was recognised by a test that Qwen2 passes, too (aprender #652).",
            "LayerNorm takes the mean off first, GELU is near SiLU but not it.",
            "All shapes and names fit.",
        ),
        "First difference at layers.0.attn_norm, as with layer-norm; swiglu differs, too.",
        engine=Phi,
    ),
    Fault(
        "nan-sampled", "NaN logits sampled through top-k: the last of ids 0 to 39", "forward", "E",
        lines(
            "NaN reached the logits; a stable sort that takes NaN for equal left them in order, and top-k kept ids 0 to 39.",
            "The running sum of probabilities is NaN and never reaches the random number, so the last one is taken.",
            "A flood of H (id 39), whatever the prompt, seed or temperature; with k = 50 it is R (id 49).",
        ),
        "NaN from norm on; every token is id k − 1.",
        engine=NanSampled,
    ),
)  # fmt: skip
