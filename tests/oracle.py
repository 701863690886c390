"""Qwen2, Qwen3 and Llama in float64, written without looking at aprlab's own: no cache, no engine, attention by position.

Given a random generator it also errs at every step as much as float32 rounding would, which tells how far an honest
float32 engine may be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from aprlab.model.config import ModelConfig
from aprlab.model.model import Model

UNIT = 2.0**-24  # of float32


@dataclass
class Oracle:
    """float64 forward pass of `model` under `config`; with `rng` every step errs as float32 would."""

    model: Model
    config: ModelConfig
    rng: np.random.Generator | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def w(self, name: str) -> np.ndarray:
        if name not in self.weights:
            self.weights[name] = self.model.tensors[name].dequantise().astype(np.float64)
        return self.weights[name]

    def off(self, x: np.ndarray, terms: int, size: np.ndarray | None = None) -> np.ndarray:
        """x with an error of up to ``sqrt(terms) * UNIT`` relative to `size`, the sum of magnitudes that went into x.

        A sum of n products is off by at most ``n * UNIT * size``; as roundings go both ways, ``sqrt(n)`` is what that
        comes to with all but certainty (Higham and Mary, 2019).
        """
        if self.rng is None:
            return x
        return x + self.rng.uniform(-1, 1, x.shape) * np.sqrt(terms) * UNIT * (np.abs(x) if size is None else size)

    def linear(self, x: np.ndarray, name: str, bias: str | None = None) -> np.ndarray:
        w = self.w(name)
        y = self.off(np.einsum("tc,rc->tr", x, w), w.shape[1], np.einsum("tc,rc->tr", abs(x), abs(w)))
        return y if bias is None else self.off(y + self.w(bias), 1)

    def rms(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.off(np.array([row / np.sqrt(row @ row / len(row) + self.config.rms_norm_eps) for row in x]) * self.w(name), 4)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Complex numbers: pair i at position t is multiplied by exp(1j * t * theta**(-2i/D))."""
        count, _, size = x.shape
        half = size // 2
        turns = [self.turn(i, half) for i in range(half)]
        turn = np.exp(1j * np.outer(np.arange(count), [angle for angle, _ in turns])) * [length for _, length in turns]
        if self.config.rope_type == "neox":
            z = (x[..., :half] + 1j * x[..., half:]) * turn[:, None, :]
            return self.off(np.concatenate([z.real, z.imag], -1), 8)
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None, :]
        return self.off(np.stack([z.real, z.imag], -1).reshape(x.shape), 8)

    def turn(self, i: int, half: int) -> tuple[float, float]:
        """Angle of pair i at position 1, and what the pair is multiplied by; one pair at a time, as ggml's `rope_yarn` has it."""
        scaling, theta = self.config.rope_scaling, self.config.rope_theta
        fast = float(theta ** (-2.0 * i / (2 * half)))
        if self.config.rope_factors:
            fast /= float(self.w("rope_freqs.weight")[i])
        if scaling is None:
            return fast, 1.0
        slow = fast / scaling.factor
        if scaling.kind == "linear":
            return slow, 1.0
        corner = [2 * half * math.log(scaling.original_context / (beta * 2 * math.pi)) / (2 * math.log(theta))
                  for beta in (scaling.beta_fast, scaling.beta_slow)]  # fmt: skip
        low, high = max(0, math.floor(corner[0])), min(2 * half - 1, math.ceil(corner[1]))
        ramp = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
        return slow * (1 - ramp) + fast * ramp, scaling.attention_factor * (1 + 0.1 * math.log(scaling.factor))

    def heads(self, x: np.ndarray, name: str) -> np.ndarray:
        """Qwen3: each head is normalised for itself; the others leave it as it is."""
        if self.config.architecture != "qwen3":
            return x
        return np.stack([self.rms(x[:, head], name) for head in range(x.shape[1])], axis=1)

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        count, heads, size = q.shape
        out = np.zeros((count, heads, size))
        for t in range(count):
            seen = slice(max(0, t + 1 - (self.config.sliding_window or count)), t + 1)
            for head in range(heads):
                mate = head // (heads // k.shape[1])
                score = k[seen, mate] @ q[t, head] / np.sqrt(size)
                score = self.off(score, size, np.abs(k[seen, mate]) @ np.abs(q[t, head]) / np.sqrt(size))
                p = np.exp(score - score.max())
                out[t, head] = self.off(p @ v[seen, mate] / p.sum(), t + 8, p @ np.abs(v[seen, mate]) / p.sum())
        return out.reshape(count, -1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float64 (T, V)."""
        c = self.config
        x = self.w("token_embd.weight")[tokens]
        for n in range(c.block_count):
            b = f"blk.{n}."
            h = self.rms(x, b + "attn_norm.weight")
            biased = c.architecture == "qwen2"
            q, k, v = (self.linear(h, f"{b}attn_{s}.weight", f"{b}attn_{s}.bias" if biased else None) for s in "qkv")
            q, k, v = (y.reshape(len(tokens), -1, c.head_dim) for y in (q, k, v))
            q, k = self.heads(q, b + "attn_q_norm.weight"), self.heads(k, b + "attn_k_norm.weight")
            x = self.off(x + self.linear(self.attention(self.rotate(q), self.rotate(k), v), b + "attn_output.weight"), 1)
            h = self.rms(x, b + "ffn_norm.weight")
            gate, up = self.linear(h, b + "ffn_gate.weight"), self.linear(h, b + "ffn_up.weight")
            x = self.off(x + self.linear(self.off(gate / (1 + np.exp(-gate)) * up, 8), b + "ffn_down.weight"), 1)
        return self.linear(self.rms(x, "output_norm.weight"), "token_embd.weight" if c.tied_embeddings else "output.weight")


def logits_and_tolerance(model: Model, config: ModelConfig, tokens: list[int]) -> tuple[np.ndarray, float]:
    """float64 logits (T, V), and the largest error that float32 rounding can be expected to leave on any of them.

    Six runs err at random within the probabilistic bound of every step; the worst of them is doubled.
    """
    exact = Oracle(model, config)
    truth = exact.logits(tokens)
    runs = (Oracle(model, config, np.random.default_rng(seed), exact.weights).logits(tokens) for seed in range(6))
    return truth, 2 * max(float(np.abs(run - truth).max()) for run in runs)
