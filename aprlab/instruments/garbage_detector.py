"""Is this an answer, or garbage? Judged by the text alone: no model, no list of bad words.

Each rule below looks for one thing that broken models do and answers do not: characters that no text has, one piece
forever, scripts mixed within a word, brackets that close but were never opened, words without grammar. A wrong
but well-formed answer ("2 + 2 equals 5.") is not garbage, and is not called so. How often the rules are right is measured
on `data/garbage.jsonl`; see `docs/garbage.md`.
"""

# ruff: noqa: SIM905
from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from aprlab.errors import FormatError

if TYPE_CHECKING:
    from aprlab.inference.session import Session

# Words that hold sentences together, in the languages that answers come in. Ten words without one of them are no prose.
_GLUE = frozenset(
    # English
    "a an the this that these those it its i you he she we they me him her us them my your his our their who what which when "
    "where why how is are was were be been being am do does did done have has had can could will would shall should may might "
    "must not no yes and or but if then else than so because as of in on at to for from by with without into over under after "
    "before between about up down out off there here all any some each every one two three more most many much other only also "
    "very too just like use used using make made get equals plus minus times "
    # German, French, Spanish, Italian, Portuguese
    "der die das ein eine und oder nicht ist sind war mit von zu im den dem auf für sich es ich sie wir le la les un une des "
    "et ou est sont dans pour pas que qui sur avec du au el los las y o es son en con por para una del se il lo gli di che per "
    "non e da os as um uma não em na no com".split()
)
_DOUBLED = frozenset("that had ha is no very so bye the night knock blah".split())  # which prose may say twice
_CODE = re.compile(
    r"\b(def|return|import|print|function|const|let|var|fn|class|struct|impl|pub|for|while|if|else|elif|async|await|public"
    r"|static|void|int|select|from|where|None|True|False|null|self|console\.log|println!?)\b|=>|->|::|\{\}|\(\)"
    r"| (?:==|\+=|:=) |</\w+>|;\s*$"
    r"|\\[dwsb]\b|\\[dwsb]\{"
    r"|^\s*(#|//|\$ )",
    re.MULTILINE,
)
_MARKS = re.compile(r"<\|[^|<>]{1,40}\|>|\[PAD\d*\]|<pad>|<unk>|</?s>")
_RULES: list[tuple[str, Callable[[str], str]]] = []


def is_garbage(text: str, sound: Session | None = None, prompt: str | None = None) -> tuple[bool, str]:
    """Whether `text` is garbage, and why (or what was checked without result).

    A cut-off last character (one U+FFFD at the very end) does not count: answers end at a limit.

    Args:
        text: what was answered.
        sound: a healthy session of the same model, if there is one: what it would hardly ever say is called garbage, too.
        prompt: what was asked, for `sound`.
    """
    text = text.removesuffix("\ufffd") if text.strip("\ufffd \n") else text
    for name, rule in _RULES:
        if found := rule(text):
            return True, f"{name}: {found}"
    if sound is not None and (nats := surprise(text, sound, prompt or "")) > SURPRISED:
        return True, f"a sound model is surprised: {nats:.1f} nats a token"
    return False, f"none of {len(_RULES)} rules holds"


SURPRISED = 4.0  # nats a token; answers in good order of the tuning part stay below, nine tenths of its garbage are above


def surprise(text: str, sound: Session, prompt: str) -> float:
    """Mean of -log p of the text's tokens as an answer to `prompt`, in nats; infinite where there are no tokens."""
    from aprlab.tracing.comparisons import log_softmax

    head, ids = sound.prompt_tokens(prompt or "\n", raw=sound.wants_raw), sound.tokenizer.encode(text)
    if not ids:
        return float("inf")
    chances = log_softmax(sound.follow(head, ids))[np.arange(len(ids)), ids]
    return float(-chances.mean())


def _rule(name: str) -> Callable[[Callable[[str], str]], Callable[[str], str]]:
    def keep(rule: Callable[[str], str]) -> Callable[[str], str]:
        _RULES.append((name, rule))
        return rule

    return keep


@_rule("nothing said")
def _empty(text: str) -> str:
    return "" if any(c.isalnum() or unicodedata.category(c) == "So" for c in text) else repr(text[:20])


@_rule("no characters")
def _broken(text: str) -> str:
    bad = [c for c in text if c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\r\t")]
    return f"{len(bad)} like {bad[0]!r}" if bad else ""


@_rule("marks of the template or the vocabulary")
def _marks(text: str) -> str:
    found = _MARKS.search(text)
    return found.group() if found else ""


@cache
def _byte_of() -> dict[str, int]:
    from aprlab.model.vocabulary import BYTE_ALPHABET

    return dict(BYTE_ALPHABET)


@_rule("bytes in the vocabulary's spelling")
def _spelling(text: str) -> str:
    """``Ġ`` for a space, ``Ð¸`` for и: runs beyond ASCII that are UTF-8 once each letter is turned back into its byte."""
    if len(found := re.findall(r"(?<=[\x21-\x7eĠĊ])[ĠĊ]|[ĠĊ](?=[\x21-\x7eĠĊ])", text)) >= 2:
        return f"{len(found)} of Ġ and Ċ"
    table = _byte_of()
    for run in re.findall(r"[\u0080-\u0143]{2,}", text):
        if all(c in table for c in run):
            for start in range(min(3, len(run) - 1)):
                raw = bytes(table[c] for c in run[start:])
                decoded = raw.decode(errors="ignore")
                if any(c.isalpha() and len(c.encode()) > 1 for c in decoded) and len(decoded.encode()) * 2 > len(raw):
                    return f"{run!r} is {decoded!r}"
    return ""


@_rule("one piece forever")
def _for_ever(text: str) -> str:
    """A unit of up to 24 characters that follows itself again and again and fills most of the text."""
    body = re.sub(r"\s+", " ", text).strip()
    if stutter := re.search(r"(?<!\S)(\w+)(?: \1(?!\w)){3,}", body):
        return repr(stutter.group()[:40])
    for period in range(1, min(24, len(body) // 3) + 1):
        run = best = 0
        end = 0
        for n, (a, b) in enumerate(zip(body, body[period:], strict=False)):
            run = run + 1 if a == b else 0
            if run > best:
                best, end = run, n + period + 1
        if best < period:
            continue
        unit = body[end - period : end]
        times = best / period + 1
        needed = {1: 9, 2: 6, 3: 5}.get(period, 4)
        if _script(unit[0]) == "CJK":  # each is a word
            needed = min(needed, 6)
        if unit.strip().isdigit():
            needed = 16 if period == 1 else 8
        elif not any(c.isalnum() for c in unit):
            needed = 24 // period + 4  # a line of dashes is a rule under a heading
        if times >= needed and (best + period) >= 0.5 * len(body):
            return f"{unit!r} {times:.0f} times"
    return ""


@_rule("few words over and over")
def _few_words(text: str) -> str:
    words = re.findall(r"\w+", text.lower())
    if len(words) < 10 or _is_code(text):
        return ""
    distinct = len(set(words))
    return f"{distinct} of {len(words)}" if distinct / len(words) <= 0.34 else ""


_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "HANGUL", "ARMENIAN", "GEORGIAN", "BENGALI",
            "TAMIL", "TELUGU", "KHMER", "LAO", "MYANMAR", "ETHIOPIC", "SINHALA", "TIBETAN", "MONGOLIAN")  # fmt: skip


@cache
def _script(c: str) -> str:
    """``LATIN``, ``CJK`` (Han and both kana: Japanese mixes them), another script, or '' for what is no letter."""
    if not c.isalpha():
        return ""
    name = unicodedata.name(c, "")
    if name.startswith(("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KANGXI", "HALFWIDTH KATAKANA")):
        return "CJK"
    if name.startswith(("MICRO", "OHM", "SUPERSCRIPT", "MODIFIER", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "FULLWIDTH")):
        return ""
    return next((s for s in _SCRIPTS if name.startswith(s)), "OTHER")


@_rule("scripts in the middle of each other")
def _salad(text: str) -> str:
    """Letters of another script right behind each other, or after a mere space, where no quotation explains it."""
    counts: dict[str, int] = {}
    for c in text:
        if s := _script(c):
            counts[s] = counts.get(s, 0) + 1
    if len(counts) < 2 and not re.search(r"[。、！？]", text):
        return ""
    cjk, latin = counts.get("CJK", 0), counts.get("LATIN", 0)
    glued = [(a, b) for a, b in pairwise(text) if _script(a) and _script(b) and _script(a) != _script(b)]
    foreign = [(a, b) for a, b in glued if {_script(a), _script(b)} not in ({"LATIN", "CJK"}, {"LATIN", "GREEK"})]
    if foreign:
        return f"{foreign[0][0]}{foreign[0][1]}, {len(foreign)} such places"
    spaced = [m for m in re.finditer(r"(\w) +(\w)", text) if _unlike(m[1], m[2])]
    kinds = {s for s in counts if s != "LATIN"}
    if len(spaced) >= 2 and len(kinds) >= 2:
        return f"{len(kinds) + bool(latin)} scripts in one line"
    if latin > 2 * cjk:
        # Latin text: East Asian characters are set apart in it, in quotation marks or at least behind a space
        inside = re.search(r"[a-z0-9][\u3041-\u30ff\u4e00-\u9fff]|[\u3041-\u30ff\u4e00-\u9fff][a-z]|[A-Za-z0-9)] ?[。、]", text)
        if inside:
            return repr(inside.group())
    elif latin:
        # East Asian text: Latin words in it are names and code, not scraps
        scraps = [w for w in re.findall(r"[A-Za-z]+", text) if w.islower() and w not in _GLUE and len(w) > 1]
        if not _is_code(text) and len(scraps) >= 2 and latin > 0.4 * cjk:
            return f"scraps {', '.join(scraps[:3])}"
    return ""


def _unlike(a: str, b: str) -> bool:
    """Letters of two scripts that do not commonly occur side by side, as Latin and East Asian ones do."""
    pair = {_script(a), _script(b)}
    return len(pair) == 2 and "" not in pair and pair != {"LATIN", "CJK"}


def _is_code(text: str) -> bool:
    """Whether it has the look of code: words and signs of programs, more than one, or fenced."""
    return "```" in text or len(_CODE.findall(text)) >= 2 or bool(re.match(r"\s*[\[{].*[\]}]\s*$", text, re.DOTALL))


@_rule("brackets that close but were never opened")
def _brackets(text: str) -> str:
    plain = re.sub(r"(?m)^\s*\(?[A-Za-z0-9]{1,3}\)|[:;]-?\)|\"[^\"\n]*\"|'[^'\n]*'|\d+\)", "", text)  # 1) and :) and quoted ones
    depth: dict[str, int] = {}
    for c in plain:
        if c in "([{":
            depth[c] = depth.get(c, 0) + 1
        elif c in ")]}":
            opening = "([{"[")]}".index(c)]
            depth[opening] = depth.get(opening, 0) - 1
            if depth[opening] < 0:
                return f"{c!r}"
    return ""


@_rule("signs without words")
def _signs(text: str) -> str:
    """Mostly punctuation and single digits, in a text of some length that is no calculation and no code."""
    body = "".join(text.split())
    if not any(c.isalpha() for c in text) and len(re.findall(r"(?:^|(?<=\s))[.<>](?=\s|$)", text)) >= 2:
        return "signs and digits that stand alone"
    if len(body) < 12 or _is_code(text) or _listed(text):
        return ""
    signs = sum(not c.isalnum() and unicodedata.category(c)[0] in "PS" for c in body)
    if signs / len(body) > 0.45 and not re.fullmatch(r"[\s|:+\-\w.*#_=]+", text):
        return f"{signs} of {len(body)} characters"
    lone = re.findall(r"(?<!\S)[\d.\s+<>-]{12,}$", text)
    return f"{lone[0].strip()!r}" if lone and not re.search(r"[=]|\d{3,}", text) and text.count(".") > 3 else ""


@_rule("words without grammar")
def _grammar(text: str) -> str:
    """Points for what prose does not do; lists, code and other alphabets are left alone."""
    if _is_code(text):
        return ""
    words = re.findall(r"[^\W\d_]+", text)
    latin = [w for w in words if all(_script(c) == "LATIN" for c in w)]
    if not latin or len(latin) < 0.6 * len(words):
        return ""
    points, seen = 0.0, []

    def charge(what: str, count: int, each: float) -> None:
        nonlocal points
        if count:
            points += count * each
            seen.append(f"{count} {what}")

    charge("sentences without a space", len(re.findall(r"[a-z][.,!?;][A-Z][a-z]", text)), 1.0)
    charge("capitals inside words", sum(bool(re.search(r"[a-z]{2}[A-Z][a-z]", w)) for w in latin), 0.7)
    charge("words without a vowel", sum(_no_vowel(w) for w in latin), 0.5)
    beside = re.findall(r"\b([^\W\d_]+) (?=([^\W\d_]+)\b)", text)
    charge("words twice", sum(a.lower() == b.lower() and a.lower() not in _DOUBLED for a, b in beside), 0.8)
    charge("beginnings in the middle", len(re.findall(r"^[.,;:)\]}]\w", text)), 0.7)
    charge("gaps", len(re.findall(r"\w {2,3}\w", text)), 0.4)
    charge("stray signs", len(re.findall(r"[,;:][,;:.!?]|,\}|\s[.,;:]\s|\w[.]{2}\w|\.\.\s?\w", text)), 0.6)
    charge("letters and digits glued", len(re.findall(r"[a-z]{3}\d+[a-z]|[a-z]{4}\d\b", text)), 0.6)
    # Pieces of a vocabulary put side by side without regard: signs of programs in words, cases, endings, invisible signs.
    within = re.findall(r"[a-z]{2}[(\[{\\<|][a-z]|[A-Za-z][\\_]{1,2}[a-z]{3}(?!\w*\()", text)
    charge("signs in the middle of words", len(within), 0.5)
    charge("capitals behind small letters", len(re.findall(r"\b[a-z]{3,}[A-Z]{2,}", text)), 0.6)
    charge("unpronounceable words", sum(_unsayable(w) for w in latin), 0.5)
    hidden = sum(unicodedata.category(c) == "Cf" for c in text) + len(re.findall(r"[A-Za-z][\uff21-\uff5a]", text))
    charge("hidden or wide letters", hidden, 0.6)
    charge("brackets left open", max(0, _left_open(text) - 1), 0.4)
    charge("lines of nothing", len(re.findall(r"\n[ \t]+(?=\n|$)|\r", text)), 0.25)
    charge("phrases again", _again(latin), 0.35)
    charge("letters alone", len(re.findall(r"(?<![\w'’\-+*/=.])[b-hj-z](?![\w'’\-+*/=.)])(?! [=+*/<>-])", text)), 0.35)
    if len(latin) >= 6 and not _listed(text):
        glue = sum(w.lower() in _GLUE for w in latin) / len(latin)
        if glue < 0.12:
            points += 1.0
            seen.append(f"{glue:.0%} of {len(latin)} words hold a sentence together")
    limit = max(1.0, len(latin) / 10)
    return ", ".join(seen) if points >= limit else ""


def _no_vowel(word: str) -> bool:
    plain = unicodedata.normalize("NFD", word)
    return len(word) >= 3 and word.islower() and not re.search(r"[aeiouyæøœı]", plain) and word not in ("nth", "hmm", "pst")


def _unsayable(word: str) -> bool:
    """Six consonants in a row, or a letter three times."""
    plain = unicodedata.normalize("NFD", word.lower())
    return word.lower() not in ("www", "hmmm", "brrr") and bool(re.search(r"[bcdfghjklmnpqrstvwxz]{6}|([a-hj-wyz])\1\1", plain))


def _left_open(text: str) -> int:
    """Brackets that are opened and not closed; answers that are cut off leave one or so."""
    return sum(max(0, text.count(a) - text.count(b)) for a, b in ("()", "[]", "{}"))


def _again(words: list[str]) -> int:
    """Runs of three words that came before, beyond what verse and lists do."""
    runs = [tuple(w.lower() for w in words[n : n + 3]) for n in range(len(words) - 2)]
    return max(0, len(runs) - len(set(runs)) - 2)


def _listed(text: str) -> bool:
    """A list: its items are on lines of their own, or between commas."""
    parts = [p.strip() for p in re.split(r"[\n,;|]+", text) if p.strip()]
    return len(parts) >= 3 and sum(len(p.split()) for p in parts) / len(parts) <= 3.5


# ── the labelled set ──────────────────────────────────────────────────────────────────────────────────────────────

PARTS = ("tuning", "held-out", "fresh")
LONG = 16  # characters: of less, a text alone says little


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text of `data/garbage.jsonl`: whether it is garbage, where it comes from, and which part it belongs to."""

    text: str
    garbage: bool
    source: str
    part: str


def labelled() -> list[Labelled]:
    """The labelled set; raises FormatError for a line that is not one."""
    from aprlab import paths

    path = paths.data_dir() / "garbage.jsonl"
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = Labelled(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise FormatError(f"line {number}: {error}", code="garbage.bad-line", path=path) from None
        if item.part not in PARTS or not isinstance(item.garbage, bool):
            raise FormatError(f"line {number}: part {item.part!r}, garbage {item.garbage!r}", code="garbage.bad-label", path=path)
        found.append(item)
    return found


def confusion(items: Iterable[Labelled], judge: Callable[[str], bool] = lambda text: is_garbage(text)[0]) -> dict[str, int]:
    """How a judge does: ``caught`` and ``missed`` garbage, ``accepted`` answers and those ``accused`` wrongly."""
    counts = {"caught": 0, "missed": 0, "accepted": 0, "accused": 0}
    for item in items:
        called = judge(item.text)
        counts[("caught" if called else "missed") if item.garbage else ("accused" if called else "accepted")] += 1
    return counts
