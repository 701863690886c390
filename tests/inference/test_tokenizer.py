"""Tokenizer laws: nothing is lost, specials stay whole or are split as asked, streams give every byte once."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from builders import MERGES, tokenizer_data
from hypothesis import given, settings
from hypothesis import strategies as st

from aprlab.errors import FormatError, UnsupportedError, UsageError
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.config import TokenizerData
from aprlab.model.vocabulary import BYTE_ALPHABET

DATA = tokenizer_data()
TOKENIZER = Qwen2Tokenizer(DATA)
IDS = {token: id for id, token in enumerate(DATA.tokens)}

# any text UTF-8 can carry, with a taste for what the pre-tokeniser and the specials turn on
TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from([*DATA.tokens[-45:], "hello world", "    ", "\r\n", "don't", "<|im_", "é", "é", "👩‍💻", "١٢"]),
    ),
    max_size=6,
).map("".join)


def test_byte_alphabet_is_a_bijection_and_gpt2s() -> None:
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))
    assert len(BYTE_ALPHABET) == 256
    assert {c: BYTE_ALPHABET[c] for c in "Ġ!Ċ~"} == {"Ġ": 0x20, "!": 0x21, "Ċ": 0x0A, "~": 0x7E}
    # the fixture's base vocabulary is in this order: it must not be the same thing twice
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTE_ALPHABET) == set(ByteLevel.alphabet())


@settings(max_examples=300, deadline=None)
@given(TEXT, st.booleans())
def test_decode_undoes_encode(text: str, parse_special: bool) -> None:
    ids = TOKENIZER.encode(text, parse_special=parse_special)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=20))
def test_stream_gives_every_byte_once(ids: list[int]) -> None:
    """Ids 0..255 are single bytes in any order, most of it no UTF-8 at all."""
    raw = b"".join(TOKENIZER.token_bytes(id) for id in ids)
    stream = TOKENIZER.stream()
    pieces = [stream.feed(id) for id in ids]
    assert "".join(pieces) + stream.end() == raw.decode(errors="replace") == TOKENIZER.decode(ids)


def test_stream_holds_a_character_until_it_is_whole() -> None:
    stream = TOKENIZER.stream()
    pieces = [stream.feed(IDS[c]) for c in "ðŁĺĢ"]  # U+1F600 in four bytes
    assert pieces == ["", "", "", "😀"]
    assert stream.end() == ""
    stream.feed(IDS["ð"])
    assert stream.end() == "\ufffd"


def test_merges_are_applied_in_their_order() -> None:
    assert [DATA.tokens[id] for id in TOKENIZER.encode("hello world")] == ["hello", "Ġworld"]
    assert [DATA.tokens[id] for id in TOKENIZER.encode("café")] == ["c", "a", "f", "Ã©"]
    without = Qwen2Tokenizer(replace(DATA, merges=[]))
    assert len(without.encode("hello world")) == 11
    backwards = Qwen2Tokenizer(replace(DATA, merges=MERGES[::-1]))
    assert backwards.encode("hello world") == TOKENIZER.encode("hello world")  # no rivalry among these
    rivals = ["l o", "ll o"]
    assert Qwen2Tokenizer(
        replace(
            DATA, tokens=[*DATA.tokens[:-2], "lo", "llo"], token_types=[*DATA.token_types[:-2], 1, 1], merges=[*rivals, *MERGES]
        )
    ).encode("llo") != TOKENIZER.encode("llo")


def test_words_are_cut_as_qwen2_cuts_them() -> None:
    """Digits one by one, contractions, a space in front of a word, line ends with what is before them."""
    pairs = TOKENIZER._tokenizer.pre_tokenizer.pre_tokenize_str("I'll say 123 x=y!!\n\n  now   ")
    shown = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in pairs]
    assert shown == ["I", "'ll", " say", " ", "1", "2", "3", " x", "=y", "!!\n\n", " ", " now", "   "]


def test_specials_whole_or_as_text() -> None:
    text = "<|im_start|>hi<|im_end|><tool_call>"
    start, end, tool = (IDS[t] for t in ("<|im_start|>", "<|im_end|>", "<tool_call>"))
    whole = TOKENIZER.encode(text)
    assert whole == [start, IDS["h"], IDS["i"], end, tool]
    split = TOKENIZER.encode(text, parse_special=False)
    assert start not in split
    assert end not in split
    assert split[-1] == tool  # user-defined tokens are text of the model's own
    assert TOKENIZER.encode(text) == whole  # the switch leaves nothing behind
    assert TOKENIZER.decode(whole, skip_special=True) == "hi<tool_call>"
    assert TOKENIZER.is_special(start)
    assert not TOKENIZER.is_special(tool)


def test_normalisation_is_nfc() -> None:
    assert TOKENIZER.encode("e\u0301") == TOKENIZER.encode("\u00e9") == [IDS["Ã©"]]


def test_begin_of_text_only_where_the_file_asks() -> None:
    bos = IDS["<|endoftext|>"]
    for add, id, expected in (
        (True, bos, [bos, IDS["a"]]),
        (False, bos, [IDS["a"]]),
        (None, bos, [IDS["a"]]),
        (True, None, [IDS["a"]]),
    ):
        assert Qwen2Tokenizer(replace(DATA, add_bos=add, bos_token_id=id)).encode("a") == expected


def test_end_of_generation() -> None:
    assert TOKENIZER.eog == {IDS["<|im_end|>"], IDS["<|endoftext|>"]}
    assert Qwen2Tokenizer(replace(DATA, eos_token_id=IDS["a"])).eog == TOKENIZER.eog | {IDS["a"]}
    plain = [1 if t == "<|endoftext|>" else kind for t, kind in zip(DATA.tokens, DATA.token_types, strict=True)]
    assert IDS["<|endoftext|>"] not in Qwen2Tokenizer(replace(DATA, token_types=plain)).eog  # spelt so, but no control token


def changed(index: int, token: str) -> list[str]:
    return [*DATA.tokens[:index], token, *DATA.tokens[index + 1 :]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedError, "'bert'"),
        ({"pre": "bloom"}, UnsupportedError, "'bloom'.*qwen2"),
        ({"merges": ["h q"]}, FormatError, "hq"),
        ({"merges": ["hello"]}, FormatError, "merge 0 'hello'"),
        ({"merges": [" a"]}, FormatError, "merge 0"),
        ({"tokens": changed(299, "hello")}, FormatError, "'hello' is listed twice.*299"),
        ({"tokens": changed(3, "§§")}, FormatError, "no token for byte"),
        ({"token_types": [1]}, FormatError, "300 tokens, but 1"),
        ({"eos_token_id": 300}, FormatError, "eos token 300 is outside the vocabulary of 300"),
        ({"bos_token_id": -1}, FormatError, "bos token -1 is outside"),
        ({"pad_token_id": 2**40}, FormatError, "padding token 1099511627776 is outside"),
    ],
)
def test_senseless_data_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Qwen2Tokenizer(replace(DATA, **change))


@pytest.mark.parametrize("id", [-1, 300])
def test_unknown_ids_are_refused(id: int) -> None:
    with pytest.raises(UsageError, match=f"token {id} is outside the vocabulary of 300"):
        TOKENIZER.decode([id])


def test_a_token_that_is_not_bytes_is_refused() -> None:
    data: TokenizerData = replace(DATA, tokens=changed(299, "日"), token_types=[*DATA.token_types[:-1], 1])
    with pytest.raises(FormatError, match="token 299 '日'"):
        Qwen2Tokenizer(data).token_bytes(299)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(UsageError, match="not Unicode"):
        TOKENIZER.encode("a\ud800")


@pytest.mark.parametrize("merges", [["a b"], ["Ġa zz"], ["zz a"]])
def test_a_merge_that_gives_or_takes_no_token_is_one_line(merges: list[str]) -> None:
    data = tokenizer_data(merges=merges)
    with pytest.raises(FormatError, match=r"vocabulary and merges do not fit: Token `(ab|Ġa|zz)` out of vocabulary"):
        Qwen2Tokenizer(data)


def test_a_tokenizer_that_works_in_another_way_shares_the_parts() -> None:
    class Loud(Qwen2Tokenizer):
        def token_bytes(self, id: int) -> bytes:
            return super().token_bytes(id).upper()

    plain = Qwen2Tokenizer(tokenizer_data())
    loud = plain.working_as(Loud, eog=frozenset({1}))
    assert loud.decode(plain.encode("hello")) == "HELLO" and plain.decode(plain.encode("hello")) == "hello"
    assert loud.eog == {1} != plain.eog and loud.data is plain.data
    apart = plain.working_as(Qwen2Tokenizer, words="l")
    assert apart.encode("hello") != plain.encode("hello") == loud.encode("hello")
