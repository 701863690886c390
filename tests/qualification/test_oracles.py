"""Oracles: each says yes to what holds and no to the nearest thing that does not."""

from __future__ import annotations

import sys

import pytest

from aprlab.qualification import oracles, playbook
from aprlab.qualification.oracles import Answer, judge


def says(name: str, argument: object, text: str, prompt: str = "", stop: str = "eos") -> bool | None:
    return judge(name, Answer(text=text, tokens=[1], stop=stop), argument, prompt).passed


@pytest.mark.parametrize(
    ("text", "wanted", "prompt"),
    [
        ("2 + 2 equals 4.", 4, "What is 2+2?"),
        ("4", 4, "What is 2+2?"),
        ("The answer is \\( 6 \\times 7 = 42 \\).", 42, "What is 6*7?"),
        ("12 × 12 = 144", 144, "What is 12*12?"),
        ("Tom has 3 apples + 2 apples = 5 apples now.", 5, "Tom has 3 apples and buys 2 more."),
        ("He has 5 apples, because he had 3 and bought 2.", 5, "Tom has 3 apples and buys 2 more."),
        ("3加4等于7。", 7, "3加4等于多少？"),
        ("２＋２＝４", 4, "What is 2+2?"),
        ("1. Add them.\n2. The sum is 1,234.", 1234, "What is 1200+34?"),
        ("20/4 equals 5.", 5, "What is 20/4?"),
        ("10 divided by 3 equals 3.33", 3.33, "What is 10/3?"),
        ("15 - 20 = -5", -5, "What is 15-20?"),
    ],
)
def test_arithmetic_takes_right_answers(text: str, wanted: float, prompt: str) -> None:
    word = judge("arithmetic", Answer(text=text, tokens=[1]), wanted, prompt)
    assert word.passed, word.said


@pytest.mark.parametrize(
    ("text", "wanted", "prompt"),
    [
        ("2 + 2 equals 5.", 4, "What is 2+2?"),
        ("2 + 2 equals 14.", 4, "What is 2+2?"),
        ("2+2 is what you ask.", 4, "What is 2+2?"),
        ("3,}, helf helf.How helf", 4, "What is 2+2?"),
        ("", 4, "What is 2+2?"),
        ("1 + 1 = 3, so the answer is 4", 4, "What is 2+2?"),
        ("Not 4, it is 5.", 4, "What is 2+2?"),
        ("4.5", 4, "What is 2+2?"),
        ("-4", 4, "What is 2+2?"),
        ("44", 4, "What is 2+2?"),
        ("v4", 4, "What is 2+2?"),
    ],
)
def test_arithmetic_refuses_wrong_ones(text: str, wanted: float, prompt: str) -> None:
    assert says("arithmetic", wanted, text, prompt) is False


PYTHON = "def add(a, b):\n    return a + b"
RUST = 'fn main() {\n    println!("hi");\n}'
SCRIPT = "async function load(url) {\n  const r = await fetch(url);\n  return r;\n}"


@pytest.mark.parametrize(
    ("language", "text", "prompt", "stop", "good"),
    [
        ("python", PYTHON, "Write it.", "eos", True),
        ("python", f"Sure:\n```python\n{PYTHON}\n```\nIt adds.", "Write it.", "eos", True),
        ("python", f"```python\n{PYTHON}\n    if (a", "Write it.", "length", True),
        ("python", f"```python\n{PYTHON}\n    if (a", "Write it.", "eos", False),
        ("python", "\n    return n\n\nprint(fib(", "def fib(n):", "length", True),
        ("python", "def add(a, b)\n    return a + b", "Write it.", "eos", False),
        ("python", 'def add(a, b):\n    """adds"""', "Write it.", "eos", False),
        ("python", "def add(a, b):\n    pass", "Write it.", "eos", False),
        ("python", "print(1)", "Write it.", "eos", False),
        ("python", "helf helf.How helf", "Write it.", "length", False),
        ("python", "x\x00y", "Write it.", "eos", False),
        ("python", "(" * 500, "Write it.", "eos", False),
        ("rust", RUST, "Write it.", "eos", True),
        ("rust", '\n    println!("hi");\n    let x = vec![1', "fn main() {", "length", True),
        ("rust", "fn main( {\n}", "Write it.", "eos", False),
        ("rust", "fn main() {}", "Write it.", "eos", False),
        ("rust", PYTHON, "Write it.", "eos", False),
        ("javascript", SCRIPT, "Write it.", "eos", True),
        ("javascript", "\n  const r = await fetch(url);\n  if (!r.ok", "async function f(url) {", "length", True),
        ("javascript", "async function f( {", "Write it.", "eos", False),
        ("javascript", "helf helf", "Write it.", "length", False),
    ],
)
def test_code_is_parsed(language: str, text: str, prompt: str, stop: str, good: bool) -> None:
    word = judge("code", Answer(text=text, tokens=[1], stop=stop), {"language": language}, prompt)
    assert word.passed is good, word.said


def test_code_wants_the_name_that_it_wants() -> None:
    assert says("code", {"language": "python", "defines": "add"}, PYTHON) is True
    assert says("code", {"language": "python", "defines": "sub"}, PYTHON) is False
    assert says("code", {"language": "rust", "defines": "main"}, RUST) is True
    assert says("code", {"language": "javascript", "defines": "load"}, SCRIPT) is True


def test_without_a_parser_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tree_sitter_rust", None)
    assert says("code", {"language": "rust"}, RUST) is None


@pytest.mark.parametrize(
    ("name", "argument", "good", "bad"),
    [
        ("exact", "4", " 4\n", "4."),
        ("contains", "Paris", "It is PARIS.", "Parisian"),
        ("contains", ["cat", "kitten"], "A cat!", "A category"),
        ("contains", "東京", "首都は東京です", "首都は东京です"),
        ("garbage", False, "2 + 2 equals 4.", "3,}, helf helf.How helf"),
        ("garbage", False, "私は日本語で、様々な情報を提供します。", "私はhelf日本語でhelf、helf情報"),
        ("script", "han", "法国的首都是巴黎。", "The capital is 巴黎."),
        ("script", "japanese", "こんにちは世界", "法国的首都是巴黎。"),
        ("script", "cyrillic", "Москва", "Moskau"),
        ("script", "latin", "Größe", "123"),
    ],
)
def test_words(name: str, argument: object, good: str, bad: str) -> None:
    assert says(name, argument, good) is True
    assert says(name, argument, bad) is False


def test_a_completion_is_judged_behind_its_prompt() -> None:
    text = "\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n}"
    assert says("garbage", False, text, "fn fib(n) {") is True
    assert says("garbage", False, " helf helf.How helf", "fn fib(n) {") is False


def test_ends_and_refusals() -> None:
    assert says("stop", "eos", "x") is True
    assert says("stop", ["length", "stop"], "x") is False
    refused = Answer(refused="the prompt is empty")
    assert judge("refused", refused, "is empty", "").passed is True
    assert judge("refused", refused, "leave no room", "").passed is False
    assert judge("refused", Answer(text="hello"), "is empty", "").passed is False
    for name, argument in (("exact", ""), ("garbage", False), ("stop", "eos")):
        assert judge(name, refused, argument, "").passed is False, "a refusal passes nowhere else"


def test_figures_lie_within_their_bounds() -> None:
    answer = Answer(figures={"speed": 5.0})
    assert judge("figure", answer, {"of": "speed", "at_least": 5, "at_most": 5}, "").passed is True
    assert judge("figure", answer, {"of": "speed", "at_least": 5.1}, "").passed is False
    assert judge("figure", answer, {"of": "speed", "at_most": 4.9}, "").passed is False
    assert judge("figure", answer, {"of": "weight", "at_most": 4}, "").passed is None


@pytest.mark.parametrize(
    ("name", "argument", "kind", "said"),
    [
        ("script", ["latin"], "ask", "unknown ['latin']"),
        ("script", {"latin": 1}, "ask", "unknown"),
        ("figure", {"of": ["x"], "at_least": 1}, "speed", "must be the name of a figure"),
        ("arithmetic", float("inf"), "ask", "must be a finite number, got inf"),
        ("arithmetic", float("nan"), "ask", "must be a finite number, got nan"),
        ("arithmetic", True, "ask", "must be a number"),
        ("arithmetic", 10**400, "ask", ""),
    ],
)
def test_arguments_that_an_oracle_cannot_use_are_reported(name: str, argument: object, kind: str, said: str) -> None:
    found = oracles.check(name, argument, kind, "What is 2+2?")
    assert found.startswith(f"{name}: ") == bool(said)
    assert said in found


def test_what_is_asked_is_said_once() -> None:
    assert oracles.ORACLES["exact"].kinds is playbook.ASKS


def test_agreement_takes_a_near_tie_and_nothing_more() -> None:
    def agree(tokens: list[int], stop: str = "length", theirs: list[int] | None = None, second: float = -0.9) -> bool | None:
        chosen = theirs or [7, 8, 9]
        likely = [{str(t): -0.7, "5": second} for t in chosen]
        answer = Answer("x", tokens, stop, [1], ends=[2, 3], peer={"tokens": chosen, "likely": likely})
        return judge("agreement", answer, {"tokens": 3}, "").passed

    assert agree([7, 8, 9]) is True
    assert agree([7, 8, 9, 4]) is True, "only so many are compared"
    assert agree([7, 5, 1]) is True, "0.2 nats behind"
    assert agree([7, 5, 1], second=-0.7 - oracles.GAP - 0.01) is False
    assert agree([7, 6, 9]) is False, "not among the likely ones"
    assert agree([7, 8]) is False
    assert agree([]) is False
    assert agree([7, 8], "eos", [7, 8, 2]) is True
    assert agree([7, 8], "eos", [7, 8, 3]) is True
    assert agree([7], "eos", [7, 8, 2]) is False
    for peer, said in ((None, "not installed"), ({"error": "crash"}, "crash")):
        word = judge("agreement", Answer("x", [7], peer=peer), {"tokens": 3}, "")
        assert word.passed is None
        assert said in word.said
