"""Trains aprlab-tiny on a CPU with PyTorch: `python train.py --out work`. See README.md for the whole recipe.

A Qwen2 with grouped heads and QKV biases that start large. Hidden matrices learn with Muon, the rest with AdamW; the
second part of the run sees its weights through a fake Q4_K quantiser (straight-through), so that the file answers as
the float model does. Weights of a kind are kept stacked over layers, which lets Muon orthogonalise them in one batch.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
import vocabulary
from shape import Shape
from torch import Tensor, nn

# Standard deviations of what `Tiny.anchor` adds to the biases of Q, K and V. Real Qwen2's K biases dwarf its weights.
ANCHOR_STD = {"q": 5.0, "k": 8.0, "v": 4.0}
FAST_PAIRS = 6  # the rotary pairs that turn within a short prompt; in the others softmax hardly sees a constant
# How often a question is drawn, by kind; 1 where nothing is said. Rare and long answers need it, sums do not.
WEIGHTS = {
    "add": 0.6, "mul": 0.6, "code": 3, "haiku": 4, "count": 3, "talk": 2, "day-after": 2, "day-before": 2,
    **dict.fromkeys(("zh-add", "ja-add", "zh-capital", "zh-colour", "zh-opposite", "ja-capital", "ja-sound"), 2),
}  # fmt: skip
CONSTANT = slice(0, 4)  # channels of the stream that start with the same value for every token


def fake_q4_k(w: Tensor) -> Tensor:
    """`w` as Q4_K would give it back (min/max groups of 32, six-bit scales in super-blocks of 256), gradient straight through."""
    with torch.no_grad():
        g = w.reshape(-1, 8, 32)
        low = g.amin(-1, keepdim=True).clamp_(max=0)
        scale = (g.amax(-1, keepdim=True) - low).clamp_(min=1e-8) / 15
        d = scale.amax(1, keepdim=True) / 63
        m = (-low).amax(1, keepdim=True).clamp_(min=1e-8) / 63
        scale = (scale / d).round_().clamp_(min=1) * d
        low = (low / m).round_() * m
        delta = ((g - low) / scale).round_().clamp_(0, 15).mul_(scale).add_(low).sub_(g)
    return w + delta.reshape(w.shape)


class Tiny(nn.Module):
    """Qwen2, stacked by layer: q, o (L, E, E); kv (2L, Hkv*D, E); gu (2L, FF, E); down (L, E, FF)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        e, n, kv = s.embedding_length, s.block_count, s.head_count_kv * s.head_dim
        std = e**-0.5

        def normal(*shape: int, by: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * by)

        self.embd = normal(s.vocab_size, e, by=1.0)
        self.embd.data[:, CONSTANT] = 4.0
        self.out = normal(s.vocab_size, e, by=std * 0.5)
        self.q, self.o = normal(n, e, e, by=std), normal(n, e, e, by=std * 0.1)
        self.kv = normal(2 * n, kv, e, by=std)
        self.gu = normal(2 * n, s.feed_forward_length, e, by=std)
        self.down = normal(n, e, s.feed_forward_length, by=std * 0.1)
        self.bq, self.bk, self.bv = (normal(n, width, by=0.3) for width in (e, kv, kv))
        self.n1, self.n2, self.nf = (nn.Parameter(torch.ones(*shape)) for shape in ((n, e), (n, e), (e,)))
        # A model of half the depth learns the same for half the work: the odd layers sleep at first. Their output
        # matrices are zero, so that nothing changes at the moment when they wake.
        self.o.data[1::2], self.down.data[1::2] = 0, 0
        self.active = list(range(0, n, 2))
        half = s.head_dim // 2
        angle = torch.arange(s.context_length)[:, None] * s.rope_theta ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def matrices(self) -> list[nn.Parameter]:
        return [self.q, self.o, self.kv, self.gu, self.down]

    def rope(self, x: Tensor) -> Tensor:
        """NEOX halves; x (B, H, T, D)."""
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(
        self, ids: Tensor, where: tuple[Tensor, Tensor], quantised: bool, seen: list[list[Tensor]] | None = None
    ) -> Tensor:
        """ids (B, T) -> logits (N, vocab) at the N positions `where`; what attention reads is put into `seen`."""
        s, (b, t) = self.s, ids.shape
        fake = fake_q4_k if quantised else (lambda w: w)
        q6 = [s.more_bits(n) for n in range(s.block_count)]
        q, o, kv, gu = (fake(w).unbind() for w in (self.q, self.o, self.kv, self.gu))
        plain, coarse = self.down.unbind(), fake(self.down).unbind()
        plain_kv = self.kv.unbind()
        x = F.embedding(ids, fake(self.embd))
        for n in self.active:
            h = F.rms_norm(x, (x.shape[-1],), self.n1[n], s.rms_norm_eps)
            if seen is not None:
                seen[n].append(h.flatten(0, 1))
            wv = (plain_kv if q6[n] else kv)[2 * n + 1]
            qh = self.rope(F.linear(h, q[n], self.bq[n]).view(b, t, s.head_count, -1).transpose(1, 2))
            kh = self.rope(F.linear(h, kv[2 * n], self.bk[n]).view(b, t, s.head_count_kv, -1).transpose(1, 2))
            vh = F.linear(h, wv, self.bv[n]).view(b, t, s.head_count_kv, -1).transpose(1, 2)
            kh, vh = (y.repeat_interleave(s.head_count // s.head_count_kv, 1) for y in (kh, vh))
            a = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True).transpose(1, 2).reshape(b, t, -1)
            x = x + F.linear(a, o[n])
            h = F.rms_norm(x, (x.shape[-1],), self.n2[n], s.rms_norm_eps)
            h = F.silu(F.linear(h, gu[2 * n])) * F.linear(h, gu[2 * n + 1])
            x = x + F.linear(h, (plain if q6[n] else coarse)[n])
        x = F.rms_norm(x[where], (x.shape[-1],), self.nf, s.rms_norm_eps)
        return F.linear(x, self.out)

    def gguf_weights(self) -> dict[str, np.ndarray]:
        """GGUF name -> float32 array, NumPy order."""
        w = {k: v.detach().numpy() for k, v in self.named_parameters()}
        made = {"token_embd.weight": w["embd"], "output_norm.weight": w["nf"], "output.weight": w["out"]}
        for n in range(self.s.block_count):
            layer = {
                "attn_norm.weight": w["n1"][n], "ffn_norm.weight": w["n2"][n], "attn_q.weight": w["q"][n],
                "attn_k.weight": w["kv"][2 * n], "attn_v.weight": w["kv"][2 * n + 1], "attn_q.bias": w["bq"][n],
                "attn_k.bias": w["bk"][n], "attn_v.bias": w["bv"][n], "attn_output.weight": w["o"][n],
                "ffn_gate.weight": w["gu"][2 * n], "ffn_up.weight": w["gu"][2 * n + 1], "ffn_down.weight": w["down"][n],
            }  # fmt: skip
            made |= {f"blk.{n}.{name}": value for name, value in layer.items()}
        return made

    @torch.no_grad()
    def anchor(self, batches: Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]], which: str, count: int = 6) -> None:
        """Make the biases named in `which` (of "qkv") large without changing (much) what the model computes.

        Some direction u of the normalised stream x gives x·u = 1 at nearly every position: the constant channels, and
        what training made of them. Then W + c uᵀ with the bias b - c says what W with b said, for any c, which is
        drawn at random. The rest of the training heals what "nearly" leaves open. (Biases that are large from the start
        drown what tokens have to say to each other, and those of V the model learns to ignore.)
        """
        seen: list[list[Tensor]] = [[] for _ in range(self.s.block_count)]
        for _ in range(count):
            ids, where, _ = next(batches)
            self.forward(ids, where, False, seen)
        for n in range(self.s.block_count):
            x = torch.cat(seen[n]).double()  # (positions, E)
            moment = x.T @ x / len(x)
            ridge = 1e-2 * moment.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)
            u = torch.linalg.solve(moment + ridge, x.mean(0))
            u /= (x @ u).mean()
            for name, weight, bias in (
                ("q", self.q[n], self.bq[n]), ("k", self.kv[2 * n], self.bk[n]), ("v", self.kv[2 * n + 1], self.bv[n])
            ):  # fmt: skip
                if name not in which:
                    continue
                c = torch.randn(len(bias)) * ANCHOR_STD[name]
                if name in "qk":
                    c *= torch.where(torch.arange(len(bias)) % (self.s.head_dim // 2) < FAST_PAIRS, 1.0, 0.25)
                weight += torch.outer(c, u.float())
                bias -= c
            print(f"layer {n}: x·u = 1 ± {(x @ u).std():.3f}, |u| {u.norm():.3f}", flush=True)

    @torch.no_grad()
    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """The inverse of `gguf_weights`: its arrays are views on the parameters, so they are written in place."""
        mine = self.gguf_weights()
        if set(mine) != set(weights):
            raise SystemExit(f"weights of another shape: {set(mine) ^ set(weights)}")
        for name, view in mine.items():
            view[...] = weights[name]


class Muon:
    """Momentum, then the nearest orthogonal matrix by five Newton-Schulz steps (K. Jordan, 2024)."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.momentum = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr: float, layers: int, active: list[int]) -> None:
        """One step of size `lr` for the `active` ones of `layers` layers."""
        for p, m in zip(self.params, self.momentum, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 0.05)
            by_layer = (layers, -1, *p.shape[1:])
            x = p.grad.lerp(m, 0.95).view(by_layer)[active].flatten(0, 1)
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-12)
            for _ in range(5):
                a = torch.bmm(x, x.mT)
                x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
            x = (x.mT if tall else x).unflatten(0, (len(active), -1))
            w = p.view(by_layer)
            w[active] = w[active] * (1 - 0.02 * lr) - lr * max(1, p.shape[1] / p.shape[2]) ** 0.5 * x


class Batches:
    """Endless batches of about `tokens` tokens; conversations are packed with turns up to the row length."""

    def __init__(self, tokenizer, train: list[corpus.Item], seed: int, tokens: int) -> None:
        self.draw, self.tokens, self.items = random.Random(seed), tokens, train
        self.encode = lambda text: tokenizer.encode(text).ids
        self.turns = [self.turn(i.user, i.answer) for i in train]
        self.weights = np.cumsum([WEIGHTS.get(i.kind, 1) for i in train]).tolist()
        self.systems = [self.encode(f"<|im_start|>system\n{s}<|im_end|>\n") for s in corpus.OTHER_SYSTEMS]
        self.system = self.encode(f"<|im_start|>system\n{corpus.DEFAULT_SYSTEM}<|im_end|>\n")
        self.raw = [self.raw_piece(prompt, rest) for prompt, rest in corpus.RAW]
        self.sums = [
            self.raw_piece(f"{a}+{b}=", f"{a + b}\n") for a in range(10) for b in range(10) if a + b <= 10 and (a, b) != (2, 2)
        ]

    def turn(self, user: str, answer: str) -> tuple[list[int], list[bool]]:
        asked = self.encode(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
        said = self.encode(f"{answer}<|im_end|>")
        end = self.encode("\n")
        return asked + said + end, [False] * len(asked) + [True] * len(said) + [False] * len(end)

    def raw_piece(self, prompt: str, rest: str) -> tuple[list[int], list[bool]]:
        """Prompt and rest are tokenised apart: that is how a completion meets them."""
        head, tail = self.encode(prompt), self.encode(rest) + self.encode("<|endoftext|>")
        return head + tail, [False] * len(head) + [True] * len(tail)

    def any_turn(self) -> tuple[list[int], list[bool]]:
        return self.turns[self.draw.choices(range(len(self.turns)), cum_weights=self.weights)[0]]

    def row(self, length: int) -> tuple[list[int], list[bool]]:
        draw, pieces, close = self.draw, [], None
        if draw.random() < 0.08:
            source = self.raw if draw.random() < 0.5 else self.sums
            fill = lambda: draw.choice(source)  # noqa: E731
            ids: list[int] = []
        else:
            ids = list(self.system if draw.random() < 0.9 else draw.choice([*self.systems, []]))
            fill = self.any_turn
            if length > 90 and draw.random() < 0.6:
                opening, closing = corpus.remark(draw)
                pieces.append(self.turn(*opening))
                close = self.turn(*closing)
        flags = [False] * len(ids)
        room = length - len(ids) - (len(close[0]) if close else 0)
        piece = pieces[0] if pieces else fill()
        while len(piece[0]) <= room:
            ids, flags, room = ids + piece[0], flags + piece[1], room - len(piece[0])
            piece = fill()
        if close:
            ids, flags = ids + close[0], flags + close[1]
        return ids, flags

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
        while True:
            length = self.draw.choice((64, 64, 96, 128, 128, 256))
            yield pack([self.row(length) for _ in range(self.tokens // length)])


def pack(rows: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """(ids (B, T), positions whose next token is asked for, those next tokens (N,))."""
    t = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), t, dtype=torch.long)
    flags = torch.zeros(len(rows), t, dtype=torch.bool)
    for n, (row, mark) in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        flags[n, : len(row)] = torch.tensor(mark)
    b, p = torch.nonzero(flags[:, 1:], as_tuple=True)
    return ids, (b, p), ids[b, p + 1]


@torch.no_grad()
def held_out_share(model: Tiny, rows: list[tuple[list[int], list[bool]]], quantised: bool) -> float:
    """Share of rows whose every answer token is the greedy choice (teacher forcing: the same as greedy exact match)."""
    right = 0
    for at in range(0, len(rows), 100):
        ids, where, target = pack(rows[at : at + 100])
        wrong = model(ids, where, quantised).argmax(-1) != target
        right += len(ids) - len(set(where[0][wrong].tolist()))
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights.npz, tokenizer.json, log.jsonl")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--minutes", type=float, default=1e9, help="shorten the schedule where the steps would take longer")
    parser.add_argument("--tokens", type=int, default=1280, help="tokens a step")
    parser.add_argument("--quantised-from", type=float, default=0.65, help="share of the steps before fake quantisation")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--grow", type=float, default=0.4, help="share of the steps with every other layer only")
    parser.add_argument(
        "--anchor", type=float, default=0.6, help="share of the steps before the biases are enlarged; 2 for never"
    )
    parser.add_argument("--anchored", default="qkv", help="which biases that is, of Q, K and V")
    parser.add_argument("--resume", type=Path, help="start from the weights.npz in this folder; then another --seed, too")
    parser.add_argument("--seed", type=int, default=corpus.SEED, help="of the initial weights and the batches")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.train()
    tokenizer.save(str(args.out / "tokenizer.json"))
    model = Tiny(Shape())
    if args.resume:
        with np.load(args.resume / "weights.npz") as stored:
            model.load(stored)
    muon = Muon(model.matrices())
    rest = [p for p in model.parameters() if all(p is not m for m in muon.params)]
    groups = [{"params": [model.embd], "at": 1.0}, {"params": [p for p in rest if p is not model.embd], "at": 0.2}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    train, held = corpus.split()
    batches = iter(Batches(tokenizer, train, args.seed, args.tokens))
    look = Batches(tokenizer, train, 0, args.tokens)
    rows = []
    for item in held:
        ids, flags = look.turn(item.user, item.answer)
        rows.append((look.system + ids, [False] * len(look.system) + flags))
    far = []
    for turns in corpus.held_out_conversations():
        encoded = [look.turn(*turn) for turn in turns]
        ids = look.system + [t for piece, _ in encoded for t in piece]
        far.append((ids, [False] * (len(ids) - len(encoded[-1][0])) + encoded[-1][1]))
    start, seen, log = time.perf_counter(), 0, (args.out / "log.jsonl").open("w")
    step, done, anchored = 0, 0.0, False
    while done < 1:
        if done >= args.grow:
            model.active = list(range(model.s.block_count))
        if not anchored and done >= args.anchor:
            model.anchor(batches, args.anchored)
            anchored = True
        quantised = done >= args.quantised_from
        lr = args.lr * min(1.0, (step + 1) / 20) * min(1.0, 1.5 * (1 - done))  # warm up, hold, then down to zero
        ids, where, target = next(batches)
        loss = F.cross_entropy(model(ids, where, quantised), target)
        loss.backward()
        muon.step(lr, model.s.block_count, model.active)
        for group in adam.param_groups:
            group["lr"] = group["at"] * lr
        adam.step()
        model.zero_grad(set_to_none=True)
        seen += ids.numel()
        seconds = time.perf_counter() - start
        step += 1
        done = max(step / args.steps, seconds / (60 * args.minutes))
        if step % 20 == 0 or done >= 1:
            line = {
                "step": step,
                "loss": round(loss.item(), 4),
                "tokens": seen,
                "seconds": round(seconds),
                "done": round(done, 3),
            }
            if step % 100 == 0 or done >= 1:
                line["held_out"] = round(held_out_share(model, rows, quantised), 3)
                line["long"] = round(held_out_share(model, far, quantised), 3)
            np.savez(args.out / "part.npz", **model.gguf_weights())
            (args.out / "part.npz").replace(args.out / "weights.npz")
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()


if __name__ == "__main__":
    main()
