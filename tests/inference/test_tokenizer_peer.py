"""Token ids against llama.cpp's own tokenizer, called through the shared library that `xllamacpp` ships."""

from __future__ import annotations

import ctypes
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aprlab.formats import open_model
from aprlab.inference.tokenizer import Qwen2Tokenizer

pytestmark = pytest.mark.peer

Tokenise = Callable[[str, bool], list[int]]

ATOMS = [
    "hello", " world", "  ", "\n", "\r\n", "\t", "don't", "I'LL", "123", "４２", "é", "ß", "日本", "한국", "العربية", "👩‍💻",
    "😀", "__init__", "(self,", "->", "==", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|fim_pad|>", "<|im_",
    "a", "Z", "  \n  ", "...", "!?", "\u200b", "\u00a0", "’s", "ｶ", "ﬀ", "Ω", "x\u0301",
]  # fmt: skip


class _Params(ctypes.Structure):
    """`llama_model_params` by value: longer than the real one, which is read from its beginning."""

    _fields_ = (("bytes", ctypes.c_ubyte * 1024),)


@pytest.fixture(scope="module", params=["tiny", pytest.param("real_05b", marks=pytest.mark.real)])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Qwen2Tokenizer, Tokenise, set[int]]]:
    """Our tokenizer of a file, llama.cpp's of the same file, and the ids that llama.cpp ends at."""
    xllamacpp = pytest.importorskip("xllamacpp")
    path: Path = request.getfixturevalue(request.param)
    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    llama = ctypes.CDLL(str(library))
    llama.llama_model_default_params.restype = _Params
    llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    llama.llama_model_load_from_file.restype = ctypes.c_void_p
    llama.llama_model_free.argtypes = [ctypes.c_void_p]
    llama.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    llama.llama_model_get_vocab.restype = ctypes.c_void_p
    llama.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    llama.llama_vocab_is_eog.restype = ctypes.c_bool
    ids = ctypes.POINTER(ctypes.c_int32)
    llama.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ids, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model
    vocab = llama.llama_model_get_vocab(model)

    def tokenise(text: str, parse_special: bool) -> list[int]:
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 1))()
        count = llama.llama_tokenize(vocab, raw, len(raw), out, len(out), False, parse_special)
        assert count >= 0
        return list(out[:count])

    tokenizer = Qwen2Tokenizer(open_model(path).tokenizer)
    yield tokenizer, tokenise, {id for id in range(tokenizer.vocab_size) if llama.llama_vocab_is_eog(vocab, id)}
    llama.llama_model_free(model)


def test_ids_are_llama_cpps(both: tuple[Qwen2Tokenizer, Tokenise, set[int]]) -> None:
    """On NFC text, since llama.cpp does not normalise."""
    tokenizer, tokenise, _ = both
    rng = random.Random(1)
    special = plain = 0
    for _ in range(1000):
        text = unicodedata.normalize("NFC", "".join(rng.choice(ATOMS) for _ in range(rng.randint(1, 8))))
        whole, split = (tokenizer.encode(text, parse_special=parse) for parse in (True, False))
        assert whole == tokenise(text, True), repr(text)
        assert split == tokenise(text, False), repr(text)
        special += whole != split
        plain += whole == split
    assert special > 100 < plain  # both ways of reading were put to the test


def test_generations_end_where_llama_cpp_ends_them(both: tuple[Qwen2Tokenizer, Tokenise, set[int]]) -> None:
    """But for ``</s>``, an ordinary token of Qwen2's vocabulary, which llama.cpp takes for an end by its spelling alone."""
    tokenizer, _, ends = both
    assert tokenizer.eog <= ends
    assert {tokenizer.token(id) for id in ends - tokenizer.eog} <= {"</s>"}
