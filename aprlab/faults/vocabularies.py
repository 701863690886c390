"""F, continued. Another model's vocabulary: the pieces are words, the numbers are somebody else's."""

from __future__ import annotations

from dataclasses import replace

from aprlab.faults.base import Fault, lines
from aprlab.inference.tokenizer import NORMAL
from aprlab.model.config import TokenizerData


def renumbered(data: TokenizerData) -> TokenizerData:
    """The same pieces under the numbers of another vocabulary.

    No second model's vocabulary comes with aprlab, so one is made: single characters (a byte-level vocabulary's first 256) and
    special tokens keep their ids, as they do in the GPT-2 family, and the longer pieces are numbered by their spelling instead
    of by when they were merged. Text is cut into the same pieces; only what the model is told, and what it is heard to say,
    differs. With a real foreign vocabulary the cuts differ, too.
    """
    longer = [id for id, (token, kind) in enumerate(zip(data.tokens, data.token_types, strict=True))
              if kind == NORMAL and len(token) > 1]  # fmt: skip
    tokens = list(data.tokens)
    for id, piece in zip(longer, sorted(data.tokens[id] for id in longer), strict=True):
        tokens[id] = piece
    return replace(data, tokens=tokens)


FAULTS = (
    Fault(
        "foreign-tokenizer", "Another model's tokenizer", "tokenizer", "F",
        lines(
            "The file had none, and the tokenizer of another model was found in the cache.",
            "The prompt's ids mean other pieces to this model, and its answer is printed with the wrong pieces.",
            "Encoding and decoding agree with each other, so a round trip of text is perfect.",
        ),
        "Prompt ids differ although the text printed back is the prompt; weights and forward pass are correct.",
        tokenizer=renumbered,
    ),
)  # fmt: skip
