"""What a forward pass and a tokenizer have to know, as read from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aprlab.errors import AprlabError, FormatError
from aprlab.model.rope import RopeScaling, check_scaling

LAYERS_LIMIT = 10_000  # of any config, so that no number in a file makes names without end


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the forward pass has to know. Every value was read from the file; none is assumed.

    `rope_type` is ``neox`` (split halves, as in Qwen) or ``norm`` (adjacent pairs, as in Llama). `rms_norm_eps` has no unit,
    `rope_theta` is the base of the rotary frequencies, `rope_scaling` how they are scaled (None: not at all). As
    `tied_embeddings` says that there is no tensor for the head, `rope_factors` says that there is one that divides the
    frequencies. `sliding_window` is how many positions attention sees, itself included, where that is less than the context.
    """

    architecture: str
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rope_type: str
    rms_norm_eps: float
    tied_embeddings: bool
    rope_scaling: RopeScaling | None = None
    rope_factors: bool = False
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """The tokenizer as a file carries it: byte-level BPE (`model` ``gpt2``), or SentencePiece (``llama``).

    For the first, `tokens` and `merges` are in GPT-2's printable byte alphabet. The second has `scores` (one for each token)
    and no merges, and writes a space as ``▁``; `add_space_prefix` says whether a text begins with one. `token_types` are
    ggml's (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte). What a file does not carry is None.
    """

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    add_bos: bool | None
    chat_template: str | None
    scores: list[float] | None = None
    add_space_prefix: bool | None = None


def check_config(config: ModelConfig, path: Path) -> ModelConfig:
    """What must hold between the numbers, for any container."""
    for name in ("block_count", "embedding_length", "feed_forward_length", "head_count", "head_count_kv", "head_dim"):
        if getattr(config, name) < 1:
            raise FormatError(f"{name} is {getattr(config, name)}; it must be at least 1", code="config.out-of-range", path=path)
    if config.block_count > LAYERS_LIMIT:
        raise FormatError(
            f"block_count is {config.block_count}; at most {LAYERS_LIMIT} are handled", code="config.too-many-layers", path=path
        )
    if config.head_count % config.head_count_kv:
        raise FormatError(
            f"{config.head_count} heads cannot share {config.head_count_kv} key/value heads",
            code="config.heads-not-shared", path=path,
        )  # fmt: skip
    if config.head_dim % 2:
        raise FormatError(
            f"head_dim {config.head_dim} is odd; rotary embedding needs pairs", code="config.odd-head-dim", path=path
        )
    if not (0 < config.rms_norm_eps < 1 and 1 < config.rope_theta < float("inf")):
        raise FormatError(
            f"rms_norm_eps {config.rms_norm_eps} or rope_theta {config.rope_theta} is out of range",
            code="config.out-of-range", path=path,
        )  # fmt: skip
    if config.rope_scaling is not None:
        try:
            check_scaling(config.rope_scaling, config.rope_theta)
        except AprlabError as error:
            error.path = path
            raise
    return config
