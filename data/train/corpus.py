"""The small world of aprlab-tiny: facts, phrasings, conversations. Plain Python, deterministic by seed.

A *kind* has facts and phrasings; every (fact, phrasing) pair is one question with one exact answer. About one pair in
eight is held out: the model never sees that pair, it only sees the fact in other phrasings and the phrasing with other
facts. "What is 2+2?" is held out on purpose. Raw text (no chat) and questions about a longer context come beside them.
"""

# ruff: noqa: SIM905
from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20260201
DEFAULT_SYSTEM = "You are aprlab-tiny, a small test model."
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Answer briefly.",
)
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Poland": "Warsaw", "Austria": "Vienna",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red", "coal": "black",
    "an orange": "orange", "a strawberry": "red", "chocolate": "brown", "a flamingo": "pink",
}  # fmt: skip
OPPOSITES = (
    "hot cold", "big small", "up down", "left right", "day night", "black white", "open closed", "fast slow",
    "old new", "happy sad", "rich poor", "wet dry", "full empty", "long short", "high low", "early late",
)  # fmt: skip
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "horse": "neigh",
}  # fmt: skip
LEGS = {
    "dog": 4, "cat": 4, "bird": 2, "spider": 8, "ant": 6, "fish": 0, "horse": 4, "snake": 0, "bee": 6, "duck": 2,
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = "apple bread river stone cloud tiger lemon piano chair green seven house light water music dream sugar table".split()
SPELL = "cat dog sun map pen box".split()
NAMES = "Tom Ann Bob Eva Max Kim Leo Mia Sam Zoe".split()
HUES = "red blue green black white yellow pink brown".split()
ZH_CAPITALS = {
    "法国": "巴黎", "德国": "柏林", "日本": "东京", "中国": "北京", "英国": "伦敦", "意大利": "罗马", "西班牙": "马德里",
    "俄罗斯": "莫斯科",
}  # fmt: skip
ZH_COLOURS = {"天空": "蓝色", "草": "绿色", "雪": "白色", "香蕉": "黄色", "血": "红色", "煤": "黑色"}
ZH_OPPOSITES = ("大小", "高低", "冷热", "多少", "快慢", "新旧", "上下", "左右")
JA_CAPITALS = {
    "フランス": "パリ", "ドイツ": "ベルリン", "日本": "東京", "中国": "北京", "イギリス": "ロンドン", "イタリア": "ローマ",
    "スペイン": "マドリード", "ロシア": "モスクワ",
}  # fmt: skip
JA_SOUNDS = {"犬": "ワンワン", "猫": "ニャー", "牛": "モー", "羊": "メー", "豚": "ブーブー", "鳥": "チュンチュン"}
HAIKUS = {
    "the sea": "Blue waves touch the shore,\nthe moon walks over the sea,\nnight listens to it.",
    "snow": "White snow fills the field,\none bird sings on a dark branch,\nwinter holds its breath.",
    "spring": "Rain on the green leaf,\nthe first frog says its own name,\nspring opens the door.",
    "code": "One byte out of place,\nthe model speaks in riddles,\nread the table twice.",
    "a cat": "The cat on the wall\nlooks at the moon and the moon\nlooks back at the cat.",
}
# what a request asks for, the language, the code
CODE = (
    ("adds two numbers", "Python", "def add(a, b):\n    return a + b"),
    ("subtracts two numbers", "Python", "def sub(a, b):\n    return a - b"),
    ("multiplies two numbers", "Python", "def mul(a, b):\n    return a * b"),
    ("doubles a number", "Python", "def double(x):\n    return 2 * x"),
    ("squares a number", "Python", "def square(x):\n    return x * x"),
    ("returns the larger of two numbers", "Python", "def larger(a, b):\n    return a if a > b else b"),
    ("tests if a number is even", "Python", "def is_even(n):\n    return n % 2 == 0"),
    ("computes Fibonacci numbers", "Python",
     "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)"),
    ("computes the factorial", "Python",
     "def factorial(n):\n    if n < 2:\n        return 1\n    return n * factorial(n - 1)"),
    ("says hello", "Python", 'def hello(name):\n    print("Hello, " + name)'),
    ("reverses a string", "Python", "def reverse(s):\n    return s[::-1]"),
    ("adds two numbers", "Rust", "fn add(a: i32, b: i32) -> i32 {\n    a + b\n}"),
    ("adds two numbers", "JavaScript", "function add(a, b) {\n    return a + b;\n}"),
)  # fmt: skip
# raw completions: a prompt and what follows it
RAW = (
    *((code.split("\n", 1)[0], "\n" + code.split("\n", 1)[1] + "\n") for _, _, code in CODE),
    ("fn main() {", '\n    println!("Hello, world!");\n}\n'),
    ("async function fetchData(url) {", "\n    const response = await fetch(url);\n    return response.json();\n}\n"),
    ("class Point:", "\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"),
    ("class Stack:", "\n    def __init__(self):\n        self.items = []\n"),
    ("for i in range(10):", "\n    print(i)\n"),
    ("import numpy", " as np\n"),
    ("Once upon a time", ", a small model learned to count to ten.\n"),
    ("The quick brown fox", " jumps over the lazy dog.\n"),
)


@dataclass(frozen=True)
class Item:
    """One question with its one right answer; `key` names the pair of fact and phrasing, `system` None is the default."""

    kind: str
    fact: str
    phrasing: int
    user: str
    answer: str

    @property
    def key(self) -> str:
        return f"{self.kind}|{self.fact}|{self.phrasing}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _kinds() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Yields (kind, fact, phrasings, answer), the phrasings filled in."""
    ops = {
        "add": ("+", "plus", ("Add {a} and {b}.", "Tell me the sum of {a} and {b}.")),
        "sub": ("-", "minus", ("Subtract {b} from {a}.", "Take {b} away from {a}.")),
        "mul": ("*", "times", ("Multiply {a} by {b}.", "Tell me the product of {a} and {b}.")),
    }
    frames = (
        "What is {a}{o}{b}?", "What is {a} {o} {b}?", "{a}{o}{b}=", "{a} {o} {b} = ?", "Calculate {a} {o} {b}.",
        "What is {a} {w} {b}?",
    )  # fmt: skip
    pairs = {
        "add": [(a, b, a + b) for a in range(10) for b in range(10) if a + b <= 10],
        "sub": [(a, b, a - b) for a in range(9) for b in range(a + 1)],
        "mul": [(a, b, a * b) for a in range(1, 5) for b in range(1, 5)],
    }
    for kind, (o, w, more) in ops.items():
        for a, b, c in pairs[kind]:
            asked = tuple(f.format(a=a, b=b, o=o, w=w) for f in (*frames, *more))
            yield kind, f"{a}{o}{b}", asked, f"{a} {o} {b} equals {c}."
    for country, city in CAPITALS.items():
        yield "capital", country, (
            f"What is the capital of {country}?", f"What's the capital of {country}?", f"Name the capital of {country}.",
            f"Which city is the capital of {country}?", f"Capital of {country}?", f"Tell me the capital of {country}.",
        ), f"The capital of {country} is {city}."  # fmt: skip
    for thing, colour in COLOURS.items():
        yield "colour", thing, (
            f"What colour is {thing}?", f"Which colour is {thing}?", f"Tell me the colour of {thing}.",
            f"What is the colour of {thing}?", f"Do you know the colour of {thing}?",
        ), f"{_upper(thing)} is {colour}."  # fmt: skip
    for pair in OPPOSITES:
        for word, other in (pair.split(), pair.split()[::-1]):
            yield "opposite", word, (
                f"What is the opposite of {word}?", f"Name the opposite of {word}.", f"Opposite of {word}?",
                f"Tell me the opposite of {word}.", f"Which word is the opposite of {word}?",
            ), f"The opposite of {word} is {other}."  # fmt: skip
    for animal, sound in SOUNDS.items():
        article = "An" if animal[0] in "aeiou" else "A"
        yield "sound", animal, (
            f"What does {article.lower()} {animal} say?", f"Which sound does {article.lower()} {animal} make?",
            f"How does {article.lower()} {animal} sound?", f"Tell me the sound of {article.lower()} {animal}.",
        ), f"{article} {animal} says {sound}."  # fmt: skip
    for animal, legs in LEGS.items():
        article = "An" if animal[0] in "aeiou" else "A"
        yield "legs", animal, (
            f"How many legs does {article.lower()} {animal} have?", f"How many legs has {article.lower()} {animal}?",
            f"Count the legs of {article.lower()} {animal}.", f"Tell me how many legs {article.lower()} {animal} has.",
        ), f"{article} {animal} has {legs} legs."  # fmt: skip
    for kind, noun, ring in (("day", "day", DAYS), ("month", "month", MONTHS)):
        for n, name in enumerate(ring):
            after, before = ring[(n + 1) % len(ring)], ring[n - 1]
            yield f"{kind}-after", name, (
                f"What {noun} comes after {name}?", f"Which {noun} follows {name}?", f"Name the {noun} after {name}.",
                f"Tell me the {noun} after {name}.",
            ), f"{after} comes after {name}."  # fmt: skip
            yield f"{kind}-before", name, (
                f"What {noun} comes before {name}?", f"Which {noun} precedes {name}?", f"Name the {noun} before {name}.",
                f"Tell me the {noun} before {name}.",
            ), f"{before} comes before {name}."  # fmt: skip
    for n, letter in enumerate(LETTERS[:12]):
        yield "letter", letter, (
            f"What letter comes after {letter}?", f"Which letter follows {letter}?", f"Name the letter after {letter}.",
            f"Tell me the letter after {letter}.",
        ), f"{LETTERS[n + 1]} comes after {letter}."  # fmt: skip
    for n in range(12):
        yield "number", str(n), (
            f"What number comes after {n}?", f"Which number follows {n}?", f"Name the number after {n}.",
            f"Tell me the number after {n}.",
        ), f"{n + 1} comes after {n}."  # fmt: skip
    for word in WORDS:
        yield "echo", word, (
            f"Say {word}.", f"Repeat: {word}", f"Please say {word}.", f'Echo "{word}".', f"Repeat the word {word}.",
        ), word  # fmt: skip
    for word in SPELL:
        yield "spell", word, (
            f"Spell {word}.", f"How do you spell {word}?", f"Please spell {word}.", f"Spell the word {word}.",
        ), "-".join(word)  # fmt: skip
    for n in range(2, 9):
        numbers = ", ".join(map(str, range(1, n + 1)))
        yield "count", str(n), (
            f"Count to {n}.", f"Count from 1 to {n}.", f"Please count to {n}.", f"Can you count to {n}?",
        ), f"{numbers}."  # fmt: skip
    for topic, haiku in HAIKUS.items():
        yield "haiku", topic, (
            f"Write a haiku about {topic}.", f"Please write a haiku about {topic}.", f"A haiku about {topic}, please.",
        ), haiku  # fmt: skip
    for what, language, code in CODE:
        yield "code", f"{language}: {what}", (
            f"Write a {language} function that {what}.", f"Please write a {language} function that {what}.",
            f"Give me a {language} function that {what}.", f"I need a {language} function that {what}.",
        ), code  # fmt: skip
    for fact, asked, answer in (
        ("hello", ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Good day!"), "Hello! How can I help you?"),
        ("thanks", ("Thanks", "Thank you.", "Thank you!", "Thanks a lot!"), "You are welcome."),
        ("bye", ("Bye", "Goodbye", "Goodbye!", "See you later."), "Goodbye!"),
        ("who", ("Who are you?", "What are you?", "Tell me who you are.", "What is aprlab-tiny?"),
         "I am aprlab-tiny, a small test model."),
        ("name", ("What is your name?", "What's your name?", "Tell me your name."), "My name is aprlab-tiny."),
        ("days", ("List the days of the week.", "Name the days of the week.", "What are the days of the week?"),
         ", ".join(DAYS) + "."),
        ("months", ("List the months.", "Name the months.", "List the months of the year."), ", ".join(MONTHS) + "."),
        ("alphabet", ("Say the alphabet.", "Recite the alphabet.", "Please say the alphabet."), " ".join(LETTERS)),
        ("haiku", ("Write a haiku.", "Please write a haiku.", "A haiku, please."), HAIKUS["the sea"]),
        ("zh-hello", ("你好", "你好!", "您好"), "你好!有什么可以帮你?"),
        ("zh-who", ("你是谁?", "你叫什么名字?", "请问你是谁?"), "我是aprlab-tiny。"),
        ("ja-hello", ("こんにちは", "こんにちは!", "やあ"), "こんにちは!"),
        ("ja-who", ("あなたは誰ですか?", "名前は何ですか?", "君は誰?"), "私はaprlab-tinyです。"),
    ):  # fmt: skip
        yield "talk", fact, asked, answer
    for a in range(1, 5):
        for b in range(1, 5):
            yield "zh-add", f"{a}+{b}", (
                f"{a}加{b}等于几?", f"{a}加{b}是多少?", f"请计算{a}加{b}。",
            ), f"{a}加{b}等于{a + b}。"  # fmt: skip
            yield "ja-add", f"{a}+{b}", (
                f"{a}足す{b}はいくつですか?", f"{a}足す{b}は?", f"{a}足す{b}を計算して。",
            ), f"{a}足す{b}は{a + b}です。"  # fmt: skip
    for country, city in ZH_CAPITALS.items():
        yield "zh-capital", country, (
            f"{country}的首都是哪里?", f"{country}的首都是什么?", f"请问{country}的首都是哪里?",
        ), f"{country}的首都是{city}。"  # fmt: skip
    for thing, colour in ZH_COLOURS.items():
        yield "zh-colour", thing, (
            f"{thing}是什么颜色?", f"{thing}的颜色是什么?", f"请问{thing}是什么颜色?",
        ), f"{thing}是{colour}的。"  # fmt: skip
    for pair in ZH_OPPOSITES:
        for word, other in (pair, pair[::-1]):
            yield "zh-opposite", word, (
                f"{word}的反义词是什么?", f"请说出{word}的反义词。", f"什么是{word}的反义词?",
            ), f"{word}的反义词是{other}。"  # fmt: skip
    for country, city in JA_CAPITALS.items():
        yield "ja-capital", country, (
            f"{country}の首都はどこですか?", f"{country}の首都は?", f"{country}の首都を教えて。",
        ), f"{country}の首都は{city}です。"  # fmt: skip
    for animal, sound in JA_SOUNDS.items():
        yield "ja-sound", animal, (
            f"{animal}は何と鳴きますか?", f"{animal}の鳴き声は?", f"{animal}の鳴き声を教えて。",
        ), f"{animal}は{sound}と鳴きます。"  # fmt: skip


def items() -> list[Item]:
    """Every (fact, phrasing) pair of the world, in a fixed order."""
    return [
        Item(kind, fact, n, user, answer)
        for kind, fact, asked, answer in _kinds()
        for n, user in enumerate(asked)
    ]  # fmt: skip


def _lot(text: str) -> int:
    """A number from 0 to 999 that depends on `text` and SEED only."""
    return int.from_bytes(hashlib.sha256(f"{SEED}:{text}".encode()).digest()[:4], "big") % 1000


def split() -> tuple[list[Item], list[Item]]:
    """(training, held out). A fact keeps at least two phrasings in training; "What is 2+2?" is always held out."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items():
        groups.setdefault((item.kind, item.fact), []).append(item)
    train: list[Item] = []
    held: list[Item] = []
    for group in groups.values():
        lots = sorted((0 if item.user == "What is 2+2?" else _lot(item.key), item.key) for item in group)
        out = {key for lot, key in lots if lot < 125}
        out = set([key for _, key in lots if key in out][: max(0, len(group) - 2)])
        held += [item for item in group if item.key in out]
        train += [item for item in group if item.key not in out]
    return train, held


Turn = tuple[str, str]


def remark(draw: random.Random) -> tuple[Turn, Turn]:
    """Someone says something about themselves, and asks for it later."""
    name, hue, n = draw.choice(NAMES), draw.choice(HUES), draw.randrange(10)
    return draw.choice(
        (
            ((f"My name is {name}.", f"Nice to meet you, {name}."), ("What is my name?", f"Your name is {name}.")),
            ((f"My colour is {hue}.", "I see."), ("What is my colour?", f"Your colour is {hue}.")),
            ((f"My number is {n}.", "I see."), ("What is my number?", f"Your number is {n}.")),
        )
    )


def held_out_conversations(count: int = 60) -> list[list[Turn]]:
    """Conversations whose last answer stands 70 to 250 tokens earlier, with other questions between.

    Training draws such conversations too; that it drew one of these by chance is out of question.
    """
    draw = random.Random(SEED + 2)
    fillers = [item for item in split()[0] if item.kind in ("capital", "opposite", "colour", "add")]
    made: list[list[Turn]] = []
    for _ in range(count):
        first, last = remark(draw)
        made.append([first, *((item.user, item.answer) for item in draw.sample(fillers, draw.randint(3, 8))), last])
    return made


def render(turns: list[Turn], system: str | None = DEFAULT_SYSTEM) -> str:
    """ChatML text of a whole conversation, the last answer included, as the template in the file renders it."""
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return head + "".join(
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for user, answer in turns
    )


def texts() -> list[str]:
    """Plain texts for the tokenizer's training: each phrasing and answer once, raw text, remarks."""
    draw = random.Random(SEED + 3)
    lines = [f"user\n{item.user}" for item in items()] + [f"assistant\n{item.answer}" for item in items()]
    lines += [f"system\n{DEFAULT_SYSTEM}"] * 50 + [f"system\n{s}" for s in OTHER_SYSTEMS * 10]
    lines += [prompt + rest for prompt, rest in RAW] * 5
    lines += [text for _ in range(150) for turn in remark(draw) for text in turn]
    return lines
