"""A model of transformers made faulty by patching its modules; each function changes a live model, and nothing is put back.

    python tests/sources/torch_faults.py [NAME …]      # every one, found, named and proved: a line each (needs torch)
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

Change = Callable[[Any], None]


def _layers(live: Any) -> Any:
    return live.model.layers


def theta(base: float) -> Change:
    def change(live: Any) -> None:
        rotary = live.model.rotary_emb
        size = 2 * rotary.inv_freq.numel()
        import torch

        rotary.inv_freq = torch.tensor([base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float32)

    return change


def positions(by: int) -> Change:
    def change(live: Any) -> None:
        rotary = live.model.rotary_emb
        plain = rotary.forward
        rotary.forward = lambda x, position_ids, *a, **k: plain(x, position_ids + by, *a, **k)

    return change


def eps(value: float) -> Change:
    def change(live: Any) -> None:
        for layer in _layers(live):
            layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = value

    return change


def bias(names: str, factor: float) -> Change:
    def change(live: Any) -> None:
        for layer in _layers(live):
            for name in names:
                getattr(layer.self_attn, f"{name}_proj").bias.data.mul_(factor)

    return change


def scaling(of: Callable[[Any], float]) -> Change:
    def change(live: Any) -> None:
        for layer in _layers(live):
            layer.self_attn.scaling = of(layer.self_attn)

    return change


def exchanged(first: str, second: str) -> Change:
    def change(live: Any) -> None:
        for layer in _layers(live):
            a, b = layer.get_submodule(first).weight, layer.get_submodule(second).weight
            kept = a.data.clone()
            a.data.copy_(b.data)
            b.data.copy_(kept)

    return change


def norm(how: Callable[[Any], Any]) -> Change:
    def change(live: Any) -> None:
        for layer in _layers(live):
            layer.input_layernorm.weight.data = how(layer.input_layernorm.weight.data)

    return change


def unweighted(live: Any) -> None:
    import torch

    for each in [live.model.norm, *(n for x in _layers(live) for n in (x.input_layernorm, x.post_attention_layernorm))]:
        each.weight.data = torch.ones_like(each.weight.data)


def neighbour(live: Any) -> None:
    ups = [layer.mlp.up_proj.weight.data.clone() for layer in _layers(live)]
    for n in range(1, len(ups)):
        _layers(live)[n].mlp.up_proj.weight.data = ups[n - 1]


def activation(make: Callable[[], Callable[[Any], Any]]) -> Change:
    def change(live: Any) -> None:
        for layer in _layers(live):
            layer.mlp.act_fn = make()

    return change


def _functional(name: str, **more: Any) -> Callable[[], Callable[[Any], Any]]:
    def make() -> Callable[[Any], Any]:
        import torch

        module = torch.nn.Module()
        module.forward = lambda x: getattr(torch.nn.functional, name)(x, **more)
        return module

    return make


def attention_of(change_globals: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """Every attention's forward with other functions than its module's."""

    def change(live: Any) -> None:
        import inspect

        for layer in _layers(live):
            attention = layer.self_attn
            plain = inspect.unwrap(type(attention).forward)
            space = {**plain.__globals__, **change_globals(plain.__globals__)}
            forward = types.FunctionType(plain.__code__, space, plain.__name__, plain.__defaults__, plain.__closure__)
            kind = type(type(attention).__name__, (type(attention),), {"forward": forward})
            attention.__class__ = kind

    return change


def not_rotated(space: dict[str, Any]) -> dict[str, Any]:
    return {"apply_rotary_pos_emb": lambda q, k, cos, sin, **more: (q, k)}


def backwards(space: dict[str, Any]) -> dict[str, Any]:
    plain = space["apply_rotary_pos_emb"]
    return {"apply_rotary_pos_emb": lambda q, k, cos, sin, **more: plain(q, k, cos, -sin)}


def interleaved(space: dict[str, Any]) -> dict[str, Any]:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, **more: Any) -> Any:
        import torch

        half = cos.shape[-1] // 2
        c, s = (x[..., :half].repeat_interleave(2, -1).unsqueeze(1) for x in (cos, sin))

        def turn(x: Any) -> Any:
            return x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s

        return turn(q), turn(k)

    return {"apply_rotary_pos_emb": rotate}


def dealt_heads(space: dict[str, Any]) -> dict[str, Any]:
    """Keys and values repeated as a whole: query head h reads kv head h modulo their number."""
    plain = space["eager_attention_forward"]
    inner = {**plain.__globals__, "repeat_kv": lambda x, n: x.repeat(1, n, 1, 1)}
    eager = types.FunctionType(plain.__code__, inner, plain.__name__, plain.__defaults__, plain.__closure__)
    return {"eager_attention_forward": eager}


def without_residual(live: Any) -> None:
    for layer in _layers(live):
        layer.register_forward_pre_hook(lambda m, given: setattr(m, "_came", given[0].clone()))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, given, layer=layer: (given[0].sub_(layer._came),)  # in place: the stream is the same tensor
        )


def mlp_skipped(live: Any) -> None:
    for layer in _layers(live):
        layer.mlp.down_proj.register_forward_hook(lambda m, given, out: out * 0)


def embedding_scaled(live: Any) -> None:
    table = live.model.embed_tokens
    table.register_forward_hook(lambda m, given, out: out * math.sqrt(m.embedding_dim))


def rows_shifted(live: Any) -> None:
    table = live.model.embed_tokens
    table.register_forward_pre_hook(lambda m, given: ((given[0] + 1) % m.num_embeddings,))


def one_head(live: Any) -> None:
    def hook(m: Any, given: Any, out: Any) -> Any:
        out = out.clone()
        out[..., :32] *= 0.9
        return out

    for layer in _layers(live):
        layer.self_attn.q_proj.register_forward_hook(hook)


def channel(live: Any) -> None:
    def hook(m: Any, given: Any, out: Any) -> Any:
        out = out.clone()
        out[..., 5] = 0
        return out

    for layer in _layers(live):
        layer.mlp.up_proj.register_forward_hook(hook)


# name -> what is changed, the step that it shows at, and names that are right for it
FAULTS: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "theta 1e4": (theta(1e4), "q_rope", ("rope-theta",)), "theta 5e5": (theta(5e5), "q_rope", ("rope-theta",)),
    "positions + 1": (positions(1), "q_rope", ("rope-positions-shifted",)),
    "eps 1e-5": (eps(1e-5), "attn_norm", ("norm-eps",)), "eps 1e-3": (eps(1e-3), "attn_norm", ("wrong-eps", "norm-eps")),
    "q bias 0": (bias("q", 0), "q", ("lost-q-biases", "bias-missing")),
    "k bias 0": (bias("k", 0), "k", ("lost-k-biases", "bias-missing")),
    "v bias 0": (bias("v", 0), "v", ("lost-v-biases", "bias-missing")),
    "qkv biases 0": (bias("qkv", 0), "q", ("lost-qkv-biases",)),
    "k bias doubled": (bias("k", 2), "k", ("bias-twice",)), "k bias negative": (bias("k", -1), "k", ("bias-subtracted",)),
    "scale 1/8": (scaling(lambda a: 0.125), "attn", ("attention-scale",)),
    "scale 1": (scaling(lambda a: 1.0), "attn", ("unscaled-attention", "attention-scale")),
    "scale 1/D": (scaling(lambda a: 1 / a.head_dim), "attn", ("attention-scale",)),
    "gate and up exchanged": (exchanged("mlp.gate_proj", "mlp.up_proj"), "gate", ("other-weight",)),
    "norms exchanged": (exchanged("input_layernorm", "post_attention_layernorm"), "attn_norm", ("wrong-norm", "other-norm")),
    "norm plus one": (norm(lambda w: w + 1), "attn_norm", ("norm-weight-plus-one",)),
    "norms of ones": (unweighted, "attn_norm", ("unweighted-norm",)),
    "up of the layer before": (neighbour, "up", ("other-weight",)),
    "gelu": (activation(_functional("gelu")), "swiglu", ("mlp-gelu-erf",)),
    "relu": (activation(_functional("relu")), "swiglu", ("mlp-relu",)),
    "not rotated": (attention_of(not_rotated), "q_rope", ("no-rope", "rope-missing")),
    "rotated backwards": (attention_of(backwards), "q_rope", ("rope-backwards",)),
    "rotated in pairs": (attention_of(interleaved), "q_rope", ("rope-norm",)),
    "heads by modulo": (attention_of(dealt_heads), "attn", ("gqa-modulo", "attention-heads-dealt")),
    "no residual": (without_residual, "ffn_inp", ("residual-missing",)),
    "mlp skipped": (mlp_skipped, "down", ("step-left-out", "zeros")),
    "embedding scaled": (embedding_scaled, "embed", ("embedding-scaled",)),
    "embedding rows shifted": (rows_shifted, "embed", ("embedding-rows-shifted",)),
    "one head": (one_head, "q", ("heads",)), "one channel": (channel, "up", ("channels",)),
}  # fmt: skip


def load(folder: Path, dtype: str = "float32", attention: str = "eager") -> Any:
    """The model of a folder, ready to be patched."""
    import torch
    import transformers

    kind = getattr(torch, dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation=attention)


def main(only: list[str]) -> None:
    from foreign_evidence import named

    from aprlab.conversion.converter import export
    from aprlab.formats import open_model
    from aprlab.onion.source_peeling import peel_sources
    from aprlab.paths import embedded_model
    from aprlab.sources import source

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        export(embedded_model(), folder, format="safetensors", dtype="f32")
        model = open_model(folder)
        right = called = proved = count = 0
        for dtype in ("float32", "bfloat16"):
            for name, (change, step, names) in FAULTS.items():
                if only and name not in only:
                    continue
                live = load(folder, dtype)
                change(live)
                started = time.process_time()
                verdict = peel_sources(model, [source(live)], prompt="What is 2+2?")
                first = (verdict.first_divergence or {}).get("point", "nowhere").split(".")[-1]
                proof = verdict.repair.proof if verdict.repair is not None else {}
                restored = proof.get("with the right values injected", {}).get("likeliest token equal", "none")
                whole = restored != "none" and restored.split(" of ")[0] == restored.split(" of ")[-1]
                good, hit = first == step, bool(named(verdict) & set(names))
                count, right, called, proved = count + 1, right + good, called + hit, proved + whole
                what = [f.fault or f.parameters.get("form") or f.evidence.get("looks_like", f.code) for f in verdict.findings]
                words = f"step {'ok' if good else f'{first} INSTEAD OF {step}'} name {'ok' if hit else 'OTHER'}"
                took = time.process_time() - started
                print(f"{dtype} {name:24} {words} {what} restored {restored} {took:.1f} s", flush=True)
        print(f"{count} faults: step right {right}, named {called}, answer restored by injection {proved}")


if __name__ == "__main__":
    main(sys.argv[1:])
