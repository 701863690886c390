"""Model files of the right size and shape with random weights, for everything that does not need a real answer.

`synth` writes a GGUF with the inventory, shapes and type mix of a published Qwen2.5-Coder: reading, converting, checking,
hashing and running it costs what the real file would cost. Blocks are random bits under scales that make the decoded
values as large as trained ones, so that a forward pass stays within the numbers.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import quants
from aprlab.conversion import mixes
from aprlab.conversion.provenance import made_fields, natural_order, with_file_type
from aprlab.errors import UnsupportedError, UsageError
from aprlab.formats import gguf
from aprlab.formats.reading import padding
from aprlab.formats.writing import atomic, check_output, write_all
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.content import Content
from aprlab.model.inventory import shapes as tensor_shapes
from aprlab.model.vocabulary import BYTE_ALPHABET, CONTROL, NORMAL, UNUSED, USER_DEFINED
from aprlab.published import KnownModel, known_model
from aprlab.quants import types
from aprlab.quants.types import TensorType
from aprlab.version import __version__

CHUNK = 1 << 22
CONTEXT = 32768  # positions, of all five

# The 22 tokens that Qwen2.5 adds behind its 151,643 ordinary ones; two may be written by a user.
ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
ORDINARY = 151_643
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Synthesis:
    """What was written: path, bytes, seconds, tensors by type."""

    output: Path
    like: str
    seed: int
    bytes: int
    seconds: float
    by_type: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"output": str(self.output), "like": self.like, "seed": self.seed, "bytes": self.bytes,
                "seconds": self.seconds, "by_type": self.by_type}  # fmt: skip


def config_of(known: KnownModel, *, tied: bool | None = None) -> ModelConfig:
    """The config of a known model's file. `tied` overrides whether it goes without an output.weight.

    Where the file has not been inspected (the 3B), it is assumed to have one, like its smaller siblings.
    """
    numbers = {key: value for key, value in known.config.items() if key != "tied_embeddings"}
    numbers |= {key: float(np.float32(numbers[key])) for key in ("rope_theta", "rms_norm_eps")}  # as GGUF keeps them
    return ModelConfig(
        architecture="qwen2",
        **numbers,
        head_dim=numbers["embedding_length"] // numbers["head_count"],
        context_length=CONTEXT,
        rope_type="neox",
        tied_embeddings=not known.tensors.get("output", True) if tied is None else tied,
    )


def inventory(config: ModelConfig, mix: str = "q4_k_m") -> dict[str, tuple[TensorType, tuple[int, ...]]]:
    """Every tensor of a file of this config and mix, in the order of llama.cpp's converter: name -> type and shape.

    `mix` is one of `mixes.MIXES`, or the name of one type for all matrices.
    """
    unordered = tensor_shapes(config)
    shapes = {name: unordered[name] for name in natural_order(unordered)}
    if mix.lower() in mixes.MIXES:
        kinds = mixes.types_of(shapes, mix.lower())
    else:
        kind = types.by_name(mix)
        kinds = {name: types.F32 if len(s) < 2 else mixes.fitting(kind, s, name) for name, s in shapes.items()}
    return {name: (kinds[name], shape) for name, shape in shapes.items()}


def tokenizer(vocab_size: int) -> TokenizerData:
    """A byte-level vocabulary of Qwen2.5's size: 256 bytes, all pairs, then triples; its added tokens; padding.

    Fewer than 151,665 ids get fewer pairs.
    """
    bytes_ = list(BYTE_ALPHABET)
    ordinary = min(ORDINARY, vocab_size - len(ADDED))
    if ordinary < 256:
        raise UnsupportedError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(ADDED)} added tokens",
            code="synthetic.vocabulary-too-small",
        )  # fmt: skip
    merges = [f"{a} {b}" for a in bytes_ for b in bytes_][: ordinary - 256]
    first = iter(merges[:])
    while len(merges) < ordinary - 256:
        pair = next(first).replace(" ", "")
        merges += [f"{pair} {c}" for c in bytes_][: ordinary - 256 - len(merges)]
    tokens = [*bytes_, *(merge.replace(" ", "") for merge in merges), *ADDED]
    kinds = [NORMAL] * ordinary + [USER_DEFINED if "tool_call" in token else CONTROL for token in ADDED]
    pads = [f"[PAD{n}]" for n in range(len(tokens), vocab_size)]
    end = ordinary + ADDED.index("<|im_end|>")
    return TokenizerData(
        model="gpt2", pre="qwen2", tokens=tokens + pads, token_types=kinds + [UNUSED] * len(pads), merges=merges,
        bos_token_id=ordinary, eos_token_id=end, pad_token_id=ordinary, add_bos=False, chat_template=TEMPLATE,
    )  # fmt: skip


def synth(
    like: str,
    output: str | Path,
    *,
    mix: str = "q4_k_m",
    seed: int = 0,
    tied: bool | None = None,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Synthesis:
    """Write a GGUF with the inventory of the known model `like` and random weights.

    Args:
        like: a name of `data/models.toml`, e.g. ``qwen2.5-coder-7b``.
        output: the file to write; it must not exist unless `force`.
        mix: ``q4_k_m`` (what is published) or another mix, or one type for all matrices.
        seed: the same seed gives the same file, whatever else is asked.
        tied: True leaves output.weight out; None does as the published file.
        progress: called with bytes written since the last call.

    Raises:
        UsageError, UnsupportedError: nothing is left behind.
    """
    return write(config_of(known_model(like), tied=tied), output, like=like, mix=mix, seed=seed, force=force, progress=progress)


def write(
    config: ModelConfig,
    output: str | Path,
    *,
    like: str = "a config",
    mix: str = "q4_k_m",
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Synthesis:
    """The same for any config."""
    started = time.perf_counter()
    output = Path(output)
    check_output(output, [], force=force)
    listed = inventory(config, mix)
    for kind, _ in listed.values():
        if kind in (types.APR_Q4, types.APR_Q8):
            raise UsageError(
                f"{kind.name} is a type of APR's own, which GGUF does not have", code="synthetic.type-not-in-gguf", path=output
            )
    fields = made_fields(config, tokenizer(config.vocab_size), {"name": f"random weights, shaped like {like}"})
    fields = with_file_type(fields, (kind.name for kind, shape in listed.values() if len(shape) > 1), mix)
    fields.append(gguf.Field("general.description", gguf.STRING, f"made by aprlab {__version__} synth, seed {seed}"))
    infos = gguf.layout([(name, kind, shape) for name, (kind, shape) in listed.items()])
    by_type: dict[str, int] = {}
    with atomic(output, force=force) as file:
        size = write_all(file, gguf.pack_header(fields, infos))
        for name, (kind, shape) in listed.items():
            by_type[kind.name] = by_type.get(kind.name, 0) + 1
            for chunk in RandomBlocks(name, kind, shape, seed).chunks():
                size += (written := write_all(file, chunk))
                if progress is not None:
                    progress(written)
            size += write_all(file, bytes(padding(size, gguf.DEFAULT_ALIGNMENT)))
    return Synthesis(output, like, seed, size, time.perf_counter() - started, by_type)


class RandomBlocks(Content):
    """Bytes that are made again each time; they depend on the tensor's name and the seed alone."""

    __slots__ = ("kind", "name", "seed", "shape")

    def __init__(self, name: str, kind: TensorType, shape: tuple[int, ...], seed: int) -> None:
        self.name, self.kind, self.shape, self.seed = name, kind, shape, seed

    @property
    def nbytes(self) -> int:
        return self.kind.nbytes(self.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.whole()[start:stop]

    def whole(self) -> np.ndarray:
        return np.concatenate([np.frombuffer(chunk, np.uint8) for chunk in self.chunks()])

    def chunks(self, step: int = CHUNK) -> Iterator[memoryview]:
        """In the one step that the bytes are made in: another would draw other numbers."""
        name, kind, shape = self.name, self.kind, self.shape
        rng = np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))
        if len(shape) < 2:  # norms around 1, biases around 0
            values = rng.standard_normal(shape, np.float32) * np.float32(0.1) + np.float32(name.endswith("norm.weight"))
            yield quants.quantise(values, kind).reshape(-1).data
            return
        scale, count = Scale(kind, 1 / np.sqrt(shape[-1])), self.nbytes // kind.block_bytes
        step = max(1, CHUNK // kind.block_bytes)
        for start in range(0, count, step):
            yield scale.blocks(min(step, count - start), rng).data


class Scale:
    """Random blocks of one type whose decoded values have mean 0 and a given standard deviation.

    Every bit that is no float is random. The floats, `d` and where there is one the minimum, are found by decoding: with
    d = 1 alone, with the minimum = 1 alone, and then so that the means cancel.
    """

    def __init__(self, kind: TensorType, std: float) -> None:
        self.kind, self.std, self.quant = kind, std, quants.quant(kind)
        layout = self.quant.layout
        self.floats = [name for name in layout.names or () if layout[name].kind == "f"]
        if kind.tensor_bytes or (kind.quantised and "d" not in self.floats) or len(self.floats) > 2:
            raise UnsupportedError(f"random {kind.name} blocks are not handled", code="synthetic.no-random-blocks")
        self.sizes: dict[str, float] = {}
        if kind.quantised:
            sample = self._bits(4096, np.random.default_rng(0)).view(layout).reshape(-1)
            parts = {name: self._decoded(sample, name) for name in self.floats}
            whole = parts.pop("d")
            self.sizes["d"] = 1.0
            for name, part in parts.items():
                self.sizes[name] = -float(whole.mean() / part.mean())
                whole = whole + part * np.float32(self.sizes[name])
            for name in self.sizes:
                self.sizes[name] *= std / float(whole.std())

    def _bits(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random bytes, uint8 (count * block bytes,)."""
        nbytes = count * self.kind.block_bytes
        words = rng.integers(0, 2**64, -(-nbytes // 8), np.uint64)
        return words.view(np.uint8)[:nbytes]

    def _decoded(self, sample: np.ndarray, one: str) -> np.ndarray:
        blocks = sample.copy()
        for name in self.floats:
            blocks[name] = float(name == one)
        return self.quant.decode(blocks.view(np.uint8).reshape(-1, self.kind.block_bytes))

    def blocks(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` blocks, uint8 (count * block bytes,)."""
        if not self.kind.quantised:
            values = rng.standard_normal((1, count), np.float32) * np.float32(self.std)
            return quants.quantise(values, self.kind).reshape(-1)
        raw = self._bits(count, rng)
        fields = raw.view(self.quant.layout)
        spread = rng.random(count, np.float32) * np.float32(0.5) + np.float32(0.75)  # one factor a block: minima still cancel
        if len(self.floats) == 1:  # whole numbers around -1/2: a scale of either sign, as trained blocks have, evens it out
            spread = np.copysign(spread, rng.random(count, np.float32) - np.float32(0.5))
        for name, size in self.sizes.items():
            fields[name] = (spread * np.float32(size)).astype(fields.dtype[name])
        return raw


def counts(config: ModelConfig, mix: str = "q4_k_m") -> dict[str, Any]:
    """What a file of this config holds: parameters (and those outside embedding and output), tensors and bytes by type."""
    listed = inventory(config, mix)
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, (_, shape) in listed.items()}
    tensors: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    for kind, shape in listed.values():
        tensors[kind.name] = tensors.get(kind.name, 0) + 1
        nbytes[kind.name] = nbytes.get(kind.name, 0) + kind.nbytes(shape)
    ends = sum(sizes.get(name, 0) for name in ("token_embd.weight", "output.weight"))
    return {"parameters": sum(sizes.values()), "inner": sum(sizes.values()) - ends, "tensors": tensors, "bytes": nbytes}


__all__ = ["ADDED", "Scale", "Synthesis", "config_of", "counts", "inventory", "synth", "tokenizer", "write"]
