"""transformers as a source: hooks on the modules of a model that is there already, or loaded from a folder or a GGUF file.

Every module that ends in a trace point has a hook; what no module gives is taken on its way into the next one (attention's
result is what goes into `o_proj`), and rotated queries and keys come from the function that rotates, which is wrapped while a run
lasts. Values are written in place, so that the residual stream, which is the same tensor, goes on from them. Nothing of the model
is changed after a run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.architectures import points as all_points
from aprlab.engines.contracts import Contract
from aprlab.errors import AprlabError, UnsupportedError, UsageError
from aprlab.formats import huggingface
from aprlab.model.architecture import architecture_of
from aprlab.model.config import ModelConfig
from aprlab.model.model import Model
from aprlab.sources.base import Abilities, Source
from aprlab.tracing.traces import Point, Trace

NAME = "transformers"
ROTATE = "apply_rotary_pos_emb"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
ATTENTION = ("eager", "sdpa")
# module of a layer -> the point that it ends in; and the points that go into a module
_ENDS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm", "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
_BEGINS = {"self_attn.o_proj": "attn", "post_attention_layernorm": "ffn_inp", "mlp.down_proj": "swiglu"}
_ROTATED = ("q", "k", "q_norm", "k_norm", "q_rope", "k_rope")


def is_live(what: object) -> bool:
    """Whether something is a model of torch; torch itself is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(what, torch.nn.Module)


class TorchSource(Source):
    """A causal language model of transformers: Qwen2, Qwen3 or Llama.

    Args:
        live: the model, e.g. a `Qwen2ForCausalLM`, on any device.
        tokenizer: its tokenizer, for `tokens` alone; None without one.
        contract: what it may round; None: by the type of its parameters and its kind of attention.
        file: where it came from.

    Raises:
        UnsupportedError: an architecture without these modules.
    """

    def __init__(
        self, live: Any, tokenizer: Any = None, *, contract: Contract | None = None, file: str | Path | None = None
    ) -> None:  # fmt: skip
        import transformers

        inner, head = getattr(live, "model", None), getattr(live, "lm_head", None)
        if inner is None or head is None or not hasattr(inner, "layers") or not hasattr(inner, "embed_tokens"):
            said = f"{type(live).__name__} is no causal model with layers, embed_tokens and lm_head"
            raise UnsupportedError(said, code="source.torch-unknown")
        self.live, self.tokenizer = live, tokenizer
        self.name, self.version = NAME, transformers.__version__
        self.file = Path(file if file is not None else str(getattr(live.config, "_name_or_path", "")) or type(live).__name__)
        self.config = _config(live, self.file)
        self.contract = contract if contract is not None else contract_of(live)
        self.can = Abilities(tuple(all_points(self.config)), injection=True)
        pairs = np.arange(self.config.head_dim).reshape(2, -1).T.reshape(-1)
        permuted = "attn_q.weight" in " ".join(architecture_of(self.config.architecture).permuted)
        self._order = pairs if permuted else None  # GGUF has Llama's rotated halves as adjacent pairs

    def _run(self, ids: list[int], wanted: list[str], first: int, inject: Mapping[str, Point]) -> Trace:
        import torch

        watch = TorchWatch(self, set(wanted), inject)
        training, cache = self.live.training, None
        keep = "cache" if "cache" in inspect.signature(self.live.forward).parameters else "past_key_values"  # by version
        self.live.eval()
        try:
            with watch.installed(), torch.no_grad():
                for some in (ids[:first], *([token] for token in ids[first:])):
                    given = torch.tensor([some], device=self.live.device)
                    found = self.live(input_ids=given, use_cache=True, **{keep: cache})
                    cache = getattr(found, keep, None) or found.past_key_values
                    watch.start += len(some)
        except AprlabError:
            raise
        except Exception as error:  # whatever a patched module raises
            said = f"{NAME} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UnsupportedError(said, code="source.torch-failed") from error
        finally:
            self.live.train(training)
        positions, contract = np.arange(len(ids), dtype=np.int64), str(self.contract)
        for name in wanted:
            if sum(map(len, watch.kept[name])) != len(ids):
                said = f"{NAME} shows {name} for {sum(map(len, watch.kept[name]))} of {len(ids)} positions"
                raise UnsupportedError(said, code="source.torch-unknown")
        kept = {name: Point(name, np.concatenate(watch.kept[name]), positions, self.name, contract) for name in wanted}
        origin = {"path": str(self.file), "format": NAME, "version": self.version}
        return Trace(kept, ids, self.name, contract, self.config, origin, first)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text by the tokenizer that came with the model."""
        if self.tokenizer is None:
            raise UsageError("this source was made without a tokenizer", code="source.no-tokenizer")
        return [int(id) for id in self.tokenizer(text)["input_ids"]]

    def ordered(self, point: str, values: np.ndarray) -> np.ndarray:
        """Values ``(P, …)`` of transformers in the order of the point."""
        return values[..., self._order] if self._order is not None and point.split(".")[-1] in _ROTATED else values

    def unordered(self, point: str, values: np.ndarray) -> np.ndarray:
        """The inverse of `ordered`."""
        if self._order is None or point.split(".")[-1] not in _ROTATED:
            return values
        return values[..., np.argsort(self._order)]


class TorchWatch:
    """The hooks of one run.

    Attributes:
        kept: by point, an array for each pass.
        start: position of the first token of the pass that is running.
    """

    def __init__(self, source: TorchSource, wanted: set[str], inject: Mapping[str, Point]) -> None:
        self.source, self.wanted, self.inject = source, wanted, inject
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        self.start, self._layer = 0, 0
        self._shapes = all_points(source.config)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks on every module, the rotation wrapped; all taken away again."""
        live = self.source.live
        with ExitStack() as stack:

            def ends(module: Any, point: str) -> None:
                handle = module.register_forward_hook(lambda m, given, out: self._see(point, out))
                stack.callback(handle.remove)

            def begins(module: Any, point: str) -> None:
                handle = module.register_forward_pre_hook(lambda m, given: self._see(point, given[0]))
                stack.callback(handle.remove)

            ends(live.model.embed_tokens, "embed")
            for n, layer in enumerate(live.model.layers):
                for path, step in _BEGINS.items():
                    begins(layer.get_submodule(path), f"layers.{n}.{step}")
                for path, step in _ENDS.items():
                    if f"layers.{n}.{step}" in self._shapes:
                        ends(layer.get_submodule(path), f"layers.{n}.{step}")
                handle = layer.self_attn.register_forward_pre_hook(lambda m, given, n=n: setattr(self, "_layer", n))
                stack.callback(handle.remove)
                ends(layer, f"layers.{n}.out")
            ends(live.model.norm, "norm")
            ends(live.lm_head, "logits")
            for space in {id(s): s for s in map(_names_of, live.model.layers)}.values():
                stack.callback(space.__setitem__, ROTATE, space[ROTATE])
                space[ROTATE] = self._rotating(space[ROTATE])
            yield

    def _rotating(self, rotate: Callable[..., Any]) -> Callable[..., Any]:
        def rotated(q: Any, k: Any, *args: Any, **more: Any) -> Any:
            found = rotate(q, k, *args, **more)
            for x, step in zip(found, ("q_rope", "k_rope"), strict=True):
                self._see(f"layers.{self._layer}.{step}", x.transpose(1, 2))  # (1, H, T, D)
            return found

        return rotated

    def _see(self, point: str, x: Any) -> None:
        """Write what is injected into a tensor ``(1, T, …)``, and keep what is in it then."""
        x = x[0] if isinstance(x, tuple) else x
        given = self.inject.get(point)
        if given is None and point not in self.wanted:
            return
        shape = self._shapes[point]
        if x.shape[0] != 1 or x[0, 0].numel() != int(np.prod(shape)):
            said = f"{NAME} has {point} as {tuple(x.shape)}, expected (1, positions, {', '.join(map(str, shape))})"
            raise UnsupportedError(said, code="source.torch-unknown")
        count = x.shape[1]
        if given is not None:
            inside = (self.start <= given.positions) & (given.positions < self.start + count)
            self._write(x, given.positions[inside] - self.start, self.source.unordered(point, given.values[inside]))
        if point in self.wanted:
            values = x.detach().float().cpu().numpy().reshape(count, *shape)
            self.kept[point].append(np.ascontiguousarray(self.source.ordered(point, values)))

    @staticmethod
    def _write(x: Any, rows: np.ndarray, values: np.ndarray) -> None:
        import torch

        for row, value in zip(rows.tolist(), values, strict=True):
            x[0, row] = torch.from_numpy(np.ascontiguousarray(value)).reshape(x[0, row].shape).to(x.device, x.dtype)


def _names_of(layer: Any) -> dict[str, Any]:
    """The module's names in which a layer's attention looks up the function that rotates."""
    space: dict[str, Any] = inspect.unwrap(type(layer.self_attn).forward).__globals__
    if ROTATE not in space:
        said = f"{type(layer.self_attn).__name__} does not rotate by {ROTATE}"
        raise UnsupportedError(said, code="source.torch-unknown")
    return space


def contract_of(live: Any) -> Contract:
    """What a model of transformers rounds: values and cache in the type of its parameters, attention by its implementation."""
    kind = str(next(live.parameters()).dtype).removeprefix("torch.")
    known = {torch: ours for ours, torch in DTYPES.items()}
    if kind not in known:
        raise UnsupportedError(f"{NAME} computes in {kind}; known: {', '.join(known)}", code="source.torch-unknown")
    ours, attention = known[kind], getattr(live.config, "_attn_implementation", "eager")
    return Contract(ours, ours, attention != "eager", ours)


def _config(live: Any, file: Path) -> ModelConfig:
    embedding, q = live.model.embed_tokens.weight, live.model.layers[0].self_attn.q_proj.weight
    shapes = {"token_embd.weight": tuple(embedding.shape), "blk.0.attn_q.weight": tuple(q.shape)}
    if live.lm_head.weight is not embedding:
        shapes["output.weight"] = tuple(live.lm_head.weight.shape)
    raw = live.config.to_dict()
    raw.pop("quantization_config", None)  # of the file; the parameters are floats, which `contract_of` checks
    return huggingface.config_of(raw, shapes, file)


def loaded(model: Model, *, folder: str | None = None, dtype: str = "f32", attention: str = "eager") -> TorchSource:
    """transformers over a folder, or over the GGUF file that a model is, which its own loader decodes.

    Raises:
        UsageError: transformers or torch is not installed, an unknown option, a file that it cannot read.
    """
    if dtype not in DTYPES or attention not in ATTENTION:
        said = f"{NAME}: dtype {dtype!r}, attention {attention!r}; known: {', '.join(DTYPES)}; {', '.join(ATTENTION)}"
        raise UsageError(said, code="source.bad-option")
    try:
        import torch
        import transformers
    except ImportError as error:
        said = f"{NAME} needs torch: pip install 'aprlab[torch]': {error}"
        raise UsageError(said, code="source.torch-missing") from None
    path = Path(folder if folder is not None else model.path)
    where, more = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    if more and model.format != "gguf":
        raise UsageError(f"{NAME} reads folders and GGUF files; give folder=", code="source.bad-option", path=path)
    given = {"dtype": getattr(torch, DTYPES[dtype]), "attn_implementation": attention, "local_files_only": True, **more}
    try:
        live = transformers.AutoModelForCausalLM.from_pretrained(where, trust_remote_code=False, **given)
    except Exception as error:  # each version has errors of its own
        said = f"{NAME} does not load it: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(said, code="source.torch-refuses", path=path) from None
    return TorchSource(live, file=path)


__all__ = ["NAME", "TorchSource", "contract_of", "is_live", "loaded"]
