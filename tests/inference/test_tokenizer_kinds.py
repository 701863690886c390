"""Every kind of tokenizer that the architectures use, on languages and code: ids against llama.cpp and `tokenizers`."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from builders import CONFIG
from made import bpe_data, made_model, pieces_data, write_gguf

from aprlab.errors import FormatError, UnsupportedError
from aprlab.formats import open_model
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import TokenizerData
from aprlab.model.vocabulary import PRE_TOKENIZERS

ATOMS = [
    "hello", " world", "  ", "   ", "\n", "\r\n", "\t", "don't", "I'LL", "we've", "123", "1234567", "3.14", "４２", "é", "ß",
    "日本", "한국", "العربية", "हिन्दी", "Ελληνικά", "Привет", "👩‍💻", "😀", "__init__", "(self,", "->", "==", "!=", "//",
    "/* x */", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|im_", "a", "Z", "  \n  ", "...", "!?", "\u00a0", "’s", "MixedCase",
    "HTTPServer", "snake_case", "return", " def ", "x = y + 1;", "$", "+", "^~|", "\n\n", " ",
]  # fmt: skip
ASCII_CASES = [atom for atom in ATOMS if not any(ord(c) > 127 and unicodedata.category(c) in ("Lu", "Mn", "Mc") for c in atom)]
KINDS: dict[str, TokenizerData] = {
    **{pre: bpe_data(pre) for pre in ("qwen2", "deepseek-r1-qwen", "llama-bpe", "smollm", "tekken", "default")},
    "spm": pieces_data(),
    "spm, no space in front": pieces_data(add_space_prefix=False),
}  # fmt: skip


def texts(count: int, atoms: list[str], seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    made = ("".join(rng.choice(atoms) for _ in range(rng.randint(1, 8))) for _ in range(count))
    return [unicodedata.normalize("NFC", text) for text in made]


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_llama_cpps(tmp_path: Path, kind: str) -> None:
    """On NFC text, since llama.cpp does not normalise; for tekken on letters whose case llama.cpp's pattern knows."""
    pytest.importorskip("xllamacpp")
    from peer import llama_vocabulary

    config = replace(CONFIG, block_count=1, architecture="llama", rope_type="norm")
    path = write_gguf(made_model(config, KINDS[kind]), tmp_path / "m.gguf")
    tokenizer = Qwen2Tokenizer(open_model(path).tokenizer)
    with llama_vocabulary(path) as (tokenise, ends):
        for text in texts(400, ASCII_CASES if kind == "tekken" else ATOMS):
            for parse in (True, False):
                assert tokenizer.encode(text, parse_special=parse) == tokenise(text, parse, True), (text, parse)
        assert tokenizer.eog == ends


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(kind: str) -> None:
    tokenizer = Qwen2Tokenizer(KINDS[kind])
    front = " " * (kind == "spm")
    for text in texts(200, [atom for atom in ATOMS if "<" not in atom]):
        ids = tokenizer.encode(text)
        ids = ids[1:] if tokenizer.first is not None else ids
        assert tokenizer.decode(ids) == front + text


def test_each_cut_is_one_of_its_own() -> None:
    """No two kinds cut the same corpus alike, so that one taken for another shows; but for names of the same cut."""
    corpus = " ".join(ATOMS)
    cutters = {kind: Qwen2Tokenizer(bpe_data(kind))._tokenizer.pre_tokenizer for kind in PRE_TOKENIZERS}
    cuts = {kind: tuple(word for word, _ in cutter.pre_tokenize_str(corpus)) for kind, cutter in cutters.items()}
    assert len(set(cuts.values())) == 5
    assert cuts["qwen2"] == cuts["deepseek-r1-qwen"] == cuts["kormo"]
    assert cuts["llama-bpe"] == cuts["llama3"] == cuts["llama-v3"]


def test_a_word_that_is_a_token_is_that_token_where_the_cut_says_so() -> None:
    """Llama 3 and tekken look a word up before they merge; others come to a token by its merges alone."""
    word = "zebra"
    for pre, whole in (("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False)):
        data = bpe_data(pre, add_bos=False)
        data = replace(data, tokens=[*data.tokens, word], token_types=[*data.token_types, 1])
        assert (Qwen2Tokenizer(data).encode(word) == [len(data.tokens) - 1]) is whole, pre


def test_sentencepiece_is_what_tokenizers_makes_of_the_same_scores() -> None:
    """An independent implementation: BPE whose merges are all pairs that give a piece, by the piece's score."""
    tokenizers = pytest.importorskip("tokenizers")
    data = pieces_data(add_bos=False)
    ids = {token: n for n, token in enumerate(data.tokens)}
    pieces = [n for n, kind in enumerate(data.token_types) if kind == 1]
    assert data.scores is not None
    pieces.sort(key=lambda n: -data.scores[n])  # type: ignore[index]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (data.tokens[n] for n in pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges, byte_fallback=True, fuse_unk=True))
    mine = Qwen2Tokenizer(data)
    for text in texts(300, [atom for atom in ATOMS if "<" not in atom], seed=5):
        assert mine.encode(text) == other.encode("▁" + text.replace(" ", "▁")).ids, text


def test_what_is_wrong_with_scores_is_named() -> None:
    with pytest.raises(FormatError, match="tokens, but 3 scores"):
        Qwen2Tokenizer(pieces_data(scores=[0.0] * 3))
    with pytest.raises(FormatError, match="no token for byte 0x00"):
        data = pieces_data()
        Qwen2Tokenizer(replace(data, tokens=["<other>" if t == "<0x00>" else t for t in data.tokens]))
    with pytest.raises(UnsupportedError, match=r"'bert'; handled: 'gpt2' .*'llama'"):
        Qwen2Tokenizer(pieces_data(model="bert"))
