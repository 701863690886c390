"""What a forward pass and a tokenizer have to know, as read from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aprlab.errors import UnsupportedError

if TYPE_CHECKING:
    pass



@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the forward pass has to know. Every value was read from the file; none is assumed.

    `rope_type` is ``neox`` (split halves, what Qwen2 uses) or ``norm`` (adjacent pairs). `rms_norm_eps` has no unit,
    `rope_theta` is the base of the rotary frequencies.
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


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """The tokenizer as a file carries it: GPT-2 style byte-level BPE for Qwen2.

    `tokens` and `merges` are in GPT-2's printable byte alphabet; `token_types` are ggml's (1 normal, 3 control, 4 user
    defined, 5 unused, 6 byte). Ids that a file does not carry are None.
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


def require_qwen2(architecture: str, path: Path) -> None:
    """Only Qwen2 is understood; anything else is refused by name."""
    if architecture != "qwen2":
        raise UnsupportedError(
            f"architecture {architecture!r}; only 'qwen2' is handled", code="config.unsupported-architecture", path=path
        )
