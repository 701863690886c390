"""Oracles: does an answer hold? Each looks at one thing, says yes or no, and why; None where it cannot tell.

What each takes as its argument, and what it can miss, is at its function.
"""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import Any

from aprlab.instruments.garbage_detector import is_garbage
from aprlab.qualification.terms import ASKS

GAP = 0.3  # nats between llama.cpp's first choice and ours that still count as a near tie


@dataclass(slots=True)
class Answer:
    """What came back from a scenario.

    Attributes:
        text, tokens, stop: of the answer.
        prompt_tokens: ids that went in.
        ends: ids that end an answer.
        refused: the message of an error that the project raises on purpose ('' where it answered).
        figures: named numbers of a ``do``.
        peer: what the reference engine said to the same ids: tokens, and its log-probabilities of likely tokens at each step.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stop: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    refused: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    peer: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Word:
    """What an oracle says: `passed` is None where it could not look."""

    oracle: str
    passed: bool | None
    said: str


Judge = Callable[[Answer, Any, Any], tuple[bool | None, str]]


@dataclass(frozen=True, slots=True)
class Oracle:
    """`check` says what is wrong with an argument; `judge` sees answer, argument and prompt; `kinds` are what it fits."""

    name: str
    judge: Judge
    check: Callable[[Any], str]
    kinds: tuple[str, ...]


ORACLES: dict[str, Oracle] = {}


def _oracle(name: str, check: Callable[[Any], str], kinds: tuple[str, ...] = ASKS) -> Callable[[Judge], Judge]:
    def keep(judge: Judge) -> Judge:
        ORACLES[name] = Oracle(name, judge, check, kinds)
        return judge

    return keep


def check(name: Any, argument: Any, kind: str, prompt: Any) -> str:
    """What is wrong with an oracle as a playbook has it, or ''."""
    if name not in ORACLES:
        return f"unknown oracle {name!r}; known: {', '.join(ORACLES)}"
    oracle = ORACLES[name]
    if kind not in oracle.kinds:
        return f"{name} has no use in {kind}; it takes {', '.join(oracle.kinds)}"
    if said := oracle.check(argument):
        return f"{name}: {said}"
    if name == "arithmetic" and isinstance(prompt, str) and Fraction(str(argument)) in _numbers(prompt):
        return f"arithmetic: {argument} is in the question; an echo of it would pass"
    if name == "contains":
        for wanted in [argument] if isinstance(argument, str) else argument:
            if isinstance(prompt, str) and _has(prompt, wanted):
                return f"contains: {wanted!r} is in the question; an echo of it would pass"
    return ""


def judge(name: str, answer: Answer, argument: Any, prompt: Any) -> Word:
    """An oracle's word on an answer. A refusal passes at no oracle but ``refused``."""
    if answer.refused and name != "refused":
        return Word(name, False, f"refused: {answer.refused}")
    passed, said = ORACLES[name].judge(answer, argument, prompt)
    return Word(name, passed, said)


def _is(what: str, *types: type) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        good = isinstance(value, types) and (bool in types or not isinstance(value, bool)) and value != ""
        return "" if good else f"must be {what}, got {value!r}"

    return check


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@_oracle("exact", _is("text", str))
def _exact(answer: Answer, wanted: str, prompt: Any) -> tuple[bool, str]:
    """The answer, without space around it, is this text."""
    return answer.text.strip() == wanted, f"{answer.text.strip()[:60]!r}"


def _some_texts(value: Any) -> str:
    some = [value] if isinstance(value, str) else value
    good = isinstance(some, list) and some and all(isinstance(v, str) and v.strip() for v in some)
    return "" if good else f"must be text or a list of texts, got {value!r}"


@_oracle("contains", _some_texts)
def _contains(answer: Answer, wanted: str | list[str], prompt: Any) -> tuple[bool, str]:
    """One of these is in the answer: as whole words if it consists of letters, upper or lower case.

    A sentence that denies it ("not Paris") passes, too.
    """
    some = [wanted] if isinstance(wanted, str) else wanted
    found = [w for w in some if _has(answer.text, w)]
    return bool(found), repr(found[0]) if found else f"no {' or '.join(map(repr, some))}"


def _has(text: str, wanted: str) -> bool:
    a, b = (unicodedata.normalize("NFKC", t).casefold() for t in (text, wanted))
    if b.isascii() and b.isalnum():
        return re.search(rf"(?<![a-z0-9]){re.escape(b)}(?![a-z0-9])", a) is not None
    return b in a


def _no(value: Any) -> str:
    return "" if value is False else f"must be false, got {value!r}"


@_oracle("garbage", _no)
def _garbage(answer: Answer, wanted: bool, prompt: Any) -> tuple[bool, str]:
    """The answer is not garbage, by `aprlab.instruments.garbage_detector` (whose errors are measured in docs/garbage.md).

    A completion is judged together with its prompt, since it starts in the middle of a sentence.
    """
    bad, why = is_garbage(answer.text)
    if bad and "nothing said" not in why and isinstance(prompt, str) and prompt.endswith((":", "{", "(", "=", "):")):
        bad, why = is_garbage(prompt + answer.text)
    return not bad, why


_ENDS = ("eos", "length", "stop")


def _ends(value: Any) -> str:
    some = value if isinstance(value, list) else [value]
    return "" if some and all(v in _ENDS for v in some) else f"must be one or some of {', '.join(_ENDS)}, got {value!r}"


@_oracle("stop", _ends)
def _stop(answer: Answer, wanted: str | list[str], prompt: Any) -> tuple[bool, str]:
    """How the answer ended."""
    return answer.stop in ([wanted] if isinstance(wanted, str) else wanted), f"ended by {answer.stop}"


@_oracle("refused", _is("part of a message", str))
def _refused(answer: Answer, wanted: str, prompt: Any) -> tuple[bool, str]:
    """The request is refused with a message that contains this text."""
    return wanted in answer.refused, answer.refused or f"answered: {answer.text[:40]!r}"


_SCRIPTS = {"latin": ("LATIN",), "han": ("CJK", "IDEOGRAPHIC"),
            "japanese": ("HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC"), "cyrillic": ("CYRILLIC",)}  # fmt: skip


def _known_script(value: Any) -> str:
    return "" if isinstance(value, str) and value in _SCRIPTS else f"unknown {value!r}; known: {', '.join(_SCRIPTS)}"


@_oracle("script", _known_script)
def _script(answer: Answer, wanted: str, prompt: Any) -> tuple[bool, str]:
    """At least half of the letters are of this script; ``japanese`` also needs one kana."""
    letters = [c for c in answer.text if c.isalpha()]
    names = [unicodedata.name(c, "").split()[0] if unicodedata.name(c, "") else "" for c in letters]
    mine = [n for n in names if n.split("-")[0] in _SCRIPTS[wanted]]
    kana = wanted != "japanese" or any(n.split("-")[0] in ("HIRAGANA", "KATAKANA") for n in names)
    return 2 * len(mine) >= len(letters) > 0 and kana, f"{len(mine)} of {len(letters)} letters are {wanted}"


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────

_DIGITS = 1000  # of a number that is still one; beyond, an answer is a run of digits
_NUMBER = r"(?<![\w.])[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?![\d])"
_PLAIN = {"×": "*", "·": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "times": "*", "plus": "+",
          "minus": "-", "divided by": "/", "multiplied by": "*", "等于": "=", "equals": "=", "is equal to": "=",
          "加": "+", "减": "-", "乘以": "*", "は": "="}  # fmt: skip
# A first number begins at its sign or its first digit: tried at every digit, a long run of them would take quadratic time.
_SUM = re.compile(r"((?:-|(?<!\d))\d+(?:\.\d+)?)\s*([-+*/])\s*(-?\d+(?:\.\d+)?)(?:\s*=\s*(-?\d+(?:\.\d+)?))?")


def _numbers(text: str) -> list[Fraction]:
    found = [n.replace(",", "").replace("−", "-") for n in re.findall(_NUMBER, unicodedata.normalize("NFKC", text))]
    return [Fraction(n) for n in found if len(n) <= _DIGITS]


def _shown(number: Fraction) -> str:
    try:
        return f"{float(number):g}"
    except OverflowError:
        return f"a number of {len(str(abs(int(number))))} digits"


def _finite(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value!r}"
    return _is("a number", int, float)(value)


@_oracle("arithmetic", _finite)
def _arithmetic(answer: Answer, wanted: float, prompt: Any) -> tuple[bool, str]:
    """The last number of the answer is this, and each sum that it spells out is true.

    Numbers of the question, operands and the numbers of a list do not count; a playbook may not ask for a number that
    is in its question.
    """
    text = unicodedata.normalize("NFKC", answer.text)
    if long := re.search(rf"\d{{{_DIGITS + 1},}}", text):
        return False, f"a run of {len(long.group())} digits"
    text = re.sub(r"(?m)^[^\S\n]*\d+[.)]\s", " ", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    for word, sign in _PLAIN.items():
        text = text.replace(word, f" {sign} " if not word.startswith("\\") else sign)
    text = re.sub(r"(?<=\d)\s*[^\W\d_]+\s*(?=[-+*/=]\s*-?\d)", " ", text)  # "3 apples + 2 apples = 5 apples"
    for a, sign, b, result in _SUM.findall(text):
        if result and not _true(Fraction(a), sign, Fraction(b), Fraction(result)):
            return False, f"{a} {sign} {b} = {result} is not so"
    left = _SUM.sub(lambda m: f" {m.group(4) or ''} ", text)
    asked = set(_numbers(prompt)) if isinstance(prompt, str) else set()
    brought = [n for n in _numbers(left) if n not in asked]
    if not brought:
        return False, "no number that the question has not"
    return brought[-1] == Fraction(str(wanted)), f"says {_shown(brought[-1])}"


def _true(a: Fraction, sign: str, b: Fraction, result: Fraction) -> bool:
    if sign == "/":
        return b != 0 and abs(a / b - result) <= Fraction(1, 100)  # rounded quotients are right
    return {"+": a + b, "-": a - b, "*": a * b}[sign] == result


# ── code ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_CODE, _CUTS = 100_000, 200  # characters that are parsed, and shorter versions that are tried
LANGUAGES = ("python", "rust", "javascript")


def _code_argument(value: Any) -> str:
    if not isinstance(value, dict) or "language" not in value or set(value) - {"language", "defines"}:
        return f"must have language, and may have defines, got {value!r}"
    if value["language"] not in LANGUAGES:
        return f"unknown language {value['language']!r}; known: {', '.join(LANGUAGES)}"
    return "" if isinstance(value.get("defines", ""), str) else f"defines: must be a name, got {value['defines']!r}"


@_oracle("code", _code_argument, ("ask", "complete"))
def _code(answer: Answer, wanted: Mapping[str, str], prompt: Any) -> tuple[bool | None, str]:
    """The code parses (Python by `ast`, others by their tree-sitter grammar) and defines something with a body.

    The code is the first fenced block, or everything; after the prompt if that was the beginning of the code. Code that was cut
    off by the limit on tokens may be cut back, line by line, until it parses.
    """
    text, cut = answer.text, answer.stop != "eos"
    if fenced := re.search(r"```[\w+-]*\n(.*?)(```|\Z)", text, re.DOTALL):
        text, cut = fenced.group(1), cut and not fenced.group(2)
    elif isinstance(prompt, str) and _goes_on(prompt):
        text = prompt + text
    parse = _python if wanted["language"] == "python" else _grown
    first = ""
    if len(text) > _CODE:
        return False, f"{len(text)} characters; at most {_CODE} are parsed"
    for part in islice(_shorter(text), _CUTS) if cut else [text]:
        try:
            found = parse(part, wanted["language"])
        except SyntaxError as error:
            first = first or f"line {error.lineno or 1}: {error.msg}"
            continue
        except ImportError as error:
            return None, f"no parser for {wanted['language']}: {error}"
        if named := wanted.get("defines"):
            return named in found, f"defines {', '.join(found) or 'nothing'}"
        return bool(found), f"defines {', '.join(found) or 'nothing'}"
    return False, first


def _goes_on(prompt: str) -> bool:
    return prompt.rstrip().endswith((":", "{", "("))


def _shorter(text: str) -> Iterator[str]:
    """The text, then without its last line, and so on; each also with its open brackets closed."""
    lines = text.split("\n")
    for end in range(len(lines), 0, -1):
        part = "\n".join(lines[:end])
        yield part
        depth: list[str] = []
        for c in part:
            if c in "([{":
                depth.append(")]}"["([{".index(c)])
            elif depth and c == depth[-1]:
                depth.pop()
        if depth:
            yield part + "\n" + "".join(reversed(depth))


def _python(text: str, language: str) -> list[str]:
    """Names of functions and classes that have a body; raises SyntaxError."""
    try:
        tree = ast.parse(text)
    except ValueError as error:  # a NUL character
        raise SyntaxError(str(error)) from None
    except (RecursionError, MemoryError):
        raise SyntaxError("nested too deeply") from None
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and any(not isinstance(part, ast.Pass) and not _only_says(part) for part in node.body)
    ]


def _only_says(statement: ast.stmt) -> bool:
    """A docstring, or an ellipsis."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


_BODIES = {"function_item", "impl_item", "function_declaration", "class_declaration", "method_definition", "arrow_function"}


def _grown(text: str, language: str) -> list[str]:
    """Names of functions and classes that have a body, by tree-sitter; raises SyntaxError, or ImportError without it."""
    import importlib

    import tree_sitter

    grammar = importlib.import_module(f"tree_sitter_{language}")
    tree = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(text.encode())
    found, stack = [], [tree.root_node]
    while stack:
        node = stack.pop()
        if node.type == "ERROR" or node.is_missing:
            raise SyntaxError(f"unexpected {text.encode()[node.start_byte : node.end_byte][:20].decode(errors='replace')!r}",
                              ("", node.start_point[0] + 1, node.start_point[1], ""))  # fmt: skip
        body = node.child_by_field_name("body")
        if node.type in _BODIES and body is not None and body.named_child_count:
            name = node.child_by_field_name("name") or node.child_by_field_name("type")
            found.append(name.text.decode() if name is not None and name.text else node.type)
        stack.extend(reversed(node.children))
    return found


# ── figures, and another engine ───────────────────────────────────────────────────────────────────────────────────


def _bounds(value: Any) -> str:
    keys = set(value) if isinstance(value, dict) else set()
    if "of" not in keys or not keys & {"at_least", "at_most"} or keys - {"of", "at_least", "at_most"}:
        return f"must have of, and at_least or at_most, got {value!r}"
    if not isinstance(value["of"], str):
        return f"of: must be the name of a figure, got {value['of']!r}"
    limits = [value[k] for k in keys - {"of"}]
    return "" if all(type(v) in (int, float) for v in limits) else f"limits are numbers, got {limits}"


@_oracle("figure", _bounds, ("load", "serial", "speed", "memory"))
def _figure(answer: Answer, wanted: Mapping[str, Any], prompt: Any) -> tuple[bool | None, str]:
    """A measured number is within bounds."""
    value = answer.figures.get(wanted["of"])
    if value is None:
        return None, f"{wanted['of']} was not measured"
    good = wanted.get("at_least", value) <= value <= wanted.get("at_most", value)
    return good, f"{wanted['of']} {value:.4g}"


def _agreement_argument(value: Any) -> str:
    good = isinstance(value, dict) and set(value) == {"tokens"} and type(value["tokens"]) is int and value["tokens"] > 0
    return "" if good else f"must have tokens: how many, got {value!r}"


@_oracle("agreement", _agreement_argument)
def _agreement(answer: Answer, wanted: Mapping[str, int], prompt: Any) -> tuple[bool | None, str]:
    """llama.cpp, from the same ids, chooses the same tokens, or nearly: at the first difference it gives this
    answer's token a log-probability within `GAP` of its own choice's. (It rounds activations to 8 bits, so near ties may
    turn out differently. After that the texts differ and are no longer compared.)"""
    if answer.peer is None:
        return None, "llama.cpp was not asked: it is not installed (extra `peer`), or there is no GGUF file for it"
    if "error" in answer.peer:
        return None, f"llama.cpp: {answer.peer['error']}"
    theirs = [_END if t in answer.ends else t for t in answer.peer["tokens"]][: wanted["tokens"]]
    mine = [*answer.tokens, *([_END] if answer.stop == "eos" else [])][: wanted["tokens"]]
    for step, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            likely: dict[int, float] = {}
            for id, value in answer.peer["likely"][step].items():
                token = _END if int(id) in answer.ends else int(id)
                likely[token] = max(value, likely.get(token, -math.inf))
            gap = likely[b] - likely[a] if a in likely and b in likely else math.inf
            return gap <= GAP, f"{step} tokens the same, then a difference that llama.cpp puts at {gap:.2f} nats"
    if not mine or len(mine) != len(theirs):
        return False, f"{len(mine)} tokens, llama.cpp has {len(theirs)}"
    return True, f"{len(mine)} of {len(theirs)} tokens the same"


_END = -1  # any of the tokens that end an answer


__all__ = ["GAP", "LANGUAGES", "ORACLES", "Answer", "Oracle", "Word", "check", "judge"]
