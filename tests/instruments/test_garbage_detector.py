"""The garbage detector on texts that people and broken models wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import page_script

from aprlab.faults.instruments import words_for_garbage
from aprlab.formats import open_model
from aprlab.inference.session import Session
from aprlab.instruments.garbage_detector import LONG, PARTS, SURPRISED, confusion, is_garbage, labelled, surprise

DOCS = Path(__file__).resolve().parents[2] / "docs"
ITEMS = labelled()


@pytest.mark.parametrize(
    "text",
    [
        "türleminÐ¸ÑĩÐµÑģÑĤÐ²Ð¾ gabantha...", "VILLEVILLEVILLEVILLE...", "3,}, helf helf.How helf",
        " helf.How helf.How3,},\nây helf,1.",
        " выпол выпол выпол выпол", "事事事事事事", "", " \n", "\ufffd\ufffd", "[PAD151935][PAD151935]", "<|im_end|>",
    ],
)  # fmt: skip
def test_the_tickets_garbage_is_caught(text) -> None:
    assert is_garbage(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        "4", "information", "2 + 2 equals 4.", "2 + 2 equals 5.", "东京", "2+2等于4。", "日本の首都は東京です。",
        "Привет! Как дела?", "def add(a, b):\n    return a + b", "Whispers of the sea,\nWhispers of the sea",
        "Monday, Tuesday, Wednesday",
        "1000000000000", "naïve café", "👍", "x = [i for i in range(3)]", "the answer is 4 东",
    ],
)  # fmt: skip
def test_answers_are_accepted(text) -> None:
    assert is_garbage(text) == (False, is_garbage(text)[1])


def test_a_character_cut_in_half_at_the_end_does_not_count() -> None:
    assert not is_garbage("日本の首都は東\ufffd")[0]
    assert is_garbage("日本の\ufffd首都")[0]


def test_the_set_is_labelled_once_with_its_sources_and_held_out_enough() -> None:
    assert len({item.text for item in ITEMS}) == len(ITEMS) > 300
    sources = {item.source.split(":")[0] for item in ITEMS}
    assert sources == {"ticket", "catalogue", "written", "embedded", "0.5B", "1.5B"}
    for part, answers in zip(PARTS, (50, 50, 10), strict=True):
        chosen = [item for item in ITEMS if item.part == part]
        assert sum(item.garbage for item in chosen) > 50 and sum(not item.garbage for item in chosen) > answers, part


def test_most_garbage_is_caught_and_hardly_an_answer_accused() -> None:
    for part in PARTS:
        for least, share in ((0, 0.6), (LONG, 0.7)):
            c = confusion([item for item in ITEMS if item.part == part and len(item.text) >= least])
            assert c["caught"] / (c["caught"] + c["missed"]) > share, (part, least, c)
            assert c["accused"] / (c["accused"] + c["accepted"]) < 0.06, (part, least, c)


def test_a_sound_model_is_surprised_by_what_it_would_not_say(tiny) -> None:
    sound, question = Session(open_model(tiny), threads=1), "What is 2+2?"
    answer = sound.generate(question, max_tokens=12).text
    assert not is_garbage(answer, sound, question)[0] and surprise(answer, sound, question) < 1
    words = "The lamp of my uncle walks."
    assert not is_garbage(words)[0], "in form it is an answer"
    assert "nats" in is_garbage(words, sound, question)[1] and surprise(words, sound, question) > SURPRISED


def test_upstreams_words_are_worse_both_ways() -> None:
    theirs, ours = confusion(ITEMS, words_for_garbage), confusion(ITEMS)
    assert theirs["caught"] < 0.5 * ours["caught"] and theirs["accused"] > ours["accused"]


def test_the_page_is_what_the_code_says() -> None:
    page = (DOCS / "garbage.md").read_text(encoding="utf-8")
    assert page == page_script("garbage_page").markdown(), "run: python docs/make/garbage_page.py docs/garbage.md"
