"""Small random models in memory (Qwen2 unless the config says otherwise), for tests that need a model but no file.

No dimension equals another, weights are random and finite, biases are large enough to matter, and several block types
take part, so that a swapped axis, a lost bias or a decoder taken by default shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import quants
from aprlab.model.config import ModelConfig, TokenizerData
from aprlab.model.inventory import shapes
from aprlab.model.model import Model
from aprlab.model.rope import FACTORS
from aprlab.model.tensor import Origin, Tensor
from aprlab.model.vocabulary import BYTE_ALPHABET
from aprlab.quants import types
from aprlab.quants.types import TensorType

CONFIG = ModelConfig(
    architecture="qwen2",
    block_count=3,
    embedding_length=256,
    feed_forward_length=512,
    head_count=6,
    head_count_kv=2,
    head_dim=32,  # so that queries are 192 wide: no multiple of 256, and not the embedding's width
    vocab_size=300,
    context_length=128,
    rope_theta=10_000.0,
    rope_type="neox",
    rms_norm_eps=1e-5,
    tied_embeddings=False,
)

# Taken in turn by the matrices of a model; where a row does not hold whole blocks of 256, `NARROW` stands in.
MIX = (types.Q4_K, types.Q6_K, types.Q5_0, types.Q8_0, types.F16, types.Q5_K, types.Q4_0, types.BF16, types.F32, types.Q4_1)
NARROW = types.Q8_0

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d", "Ġ Ġ", "ĠĠ ĠĠ", "Ã ©"]
SPECIAL = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool_call>": 4, "</tool_call>": 4}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer_data(vocab_size: int = CONFIG.vocab_size, **changes: Any) -> TokenizerData:
    """A byte-level vocabulary: 256 bytes, what `MERGES` makes, ChatML's specials, unused ids up to `vocab_size`."""
    tokens = [*BYTE_ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]
    kinds = [1] * (len(tokens) - len(SPECIAL)) + list(SPECIAL.values())
    unused = range(len(tokens), vocab_size)
    end = tokens.index("<|im_end|>")
    data = TokenizerData(
        model="gpt2",
        pre="qwen2",
        tokens=tokens + [f"[PAD{n}]" for n in unused],
        token_types=kinds + [5] * len(unused),
        merges=list(MERGES),
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokens.index("<|endoftext|>"),
        add_bos=False,
        chat_template=TEMPLATE,
    )
    return replace(data, **changes)


def tensor(name: str, values: np.ndarray, type_: TensorType) -> Tensor:
    """`values` float32, NumPy order, encoded as `type_`."""
    raw = quants.quantise(np.ascontiguousarray(values, np.float32), type_).reshape(-1)
    return Tensor(name, type_, values.shape, raw, Origin(Path("random.gguf"), name, 0))


def random_model(seed: int = 0, config: ModelConfig = CONFIG, mix: Sequence[TensorType] = MIX) -> Model:
    """A model with random weights and whatever `config` says; matrices take their types from `mix` in turn."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    turn = 0
    for name, shape in shapes(config).items():
        if len(shape) == 2:
            values = rng.normal(size=shape) / np.sqrt(shape[1]) * 1.5
            type_ = mix[turn % len(mix)]
            turn += 1
            type_ = type_ if shape[1] % type_.block_elements == 0 else NARROW
        else:
            values = rng.normal(size=shape) + 1.0 if name.endswith("norm.weight") else rng.normal(size=shape) * 0.8
            values = np.linspace(1.0, 8.0, shape[0]) if name == FACTORS else values
            type_ = types.F32
        tensors[name] = tensor(name, values.astype(np.float32), type_)
    return Model(
        path=Path("random.gguf"),
        format="gguf",
        dialect="in memory",
        tensors=tensors,
        metadata={},
        make_config=lambda: config,
        make_tokenizer=lambda: tokenizer_data(config.vocab_size),
    )
