"""Trains the byte-level BPE of aprlab-tiny: Qwen2's normaliser and pre-tokeniser over the small world's own texts."""

from __future__ import annotations

import json

import corpus
from aprlab.qwen2.tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, UNUSED
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ORDINARY = 832  # bytes and merges
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # as in Qwen: right behind the normal tokens
PADS = 5  # rows without a token, as Qwen has them: the vocabulary is larger than the tokenizer


def train() -> Tokenizer:
    """A trained tokenizer; ids 0..831 normal, then the three specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=ORDINARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus.texts(), trainer)
    if tokenizer.get_vocab_size() != ORDINARY:
        raise SystemExit(f"the texts give only {tokenizer.get_vocab_size()} tokens, {ORDINARY} wanted")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def tables(tokenizer: Tokenizer) -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges) as GGUF keeps them."""
    state = json.loads(tokenizer.to_str())
    by_id = sorted(state["model"]["vocab"].items(), key=lambda pair: pair[1])
    tokens = [token for token, _ in by_id] + list(SPECIALS)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    tokens += [f"[PAD{len(tokens) + n}]" for n in range(PADS)]
    types = [NORMAL] * ORDINARY + [CONTROL] * len(SPECIALS) + [UNUSED] * PADS
    return tokens, types, merges
