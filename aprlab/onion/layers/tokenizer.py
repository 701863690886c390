"""Tokenizer: vocabulary, merges, kinds of tokens, ids that end an answer, the chat template."""

from __future__ import annotations

from typing import Any, ClassVar

from aprlab.formats.raw import MISSING, NEEDED, TOKENIZER_FIELDS, Wrong
from aprlab.inference.tokenizer import CONTROL, PRE_TOKENIZERS
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.layers.layer import Layer
from aprlab.onion.words import Mechanism


class TokenizerLayer(Layer):
    """Against the reference's tokenizer data, or against what every Qwen2 tokenizer has."""

    name: ClassVar[str] = "tokenizer"
    kinds: ClassVar[tuple[str, ...]] = ("tokenizer",)
    shown: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        if case.ref is None:
            return alone(case.file.tokenizer)
        found = []
        for name in TOKENIZER_FIELDS:
            value, expected = case.file.tokenizer[name], case.expected_tokenizer[name]
            if value != expected:
                cause, evidence = difference(name, value, expected)
                quiet = changes_nothing(name, value, expected, case)
                found.append(Deviation("tokenizer", name, value, expected, cause, evidence=evidence, harmless=quiet))
        return found

    def repair(self, draft: Draft, deviation: Deviation) -> None:
        draft.tokenizer[deviation.tensor] = deviation.expected


def changes_nothing(name: str, value: Any, expected: Any, case: FileCase) -> bool:
    """Whether a field that differs, or is missing on one side, is one that no run can notice.

    Two names of one cut are the same. Padding is for batches, which no run here has; a start token counts only where one is
    put in front or the template asks for it; and no start token is put in front where no field says so.
    """
    if name == "pre" and isinstance(value, str) and isinstance(expected, str):
        return value in PRE_TOKENIZERS and PRE_TOKENIZERS[value] == PRE_TOKENIZERS.get(expected)
    if value != MISSING and expected != MISSING:
        return False
    template = case.file.tokenizer["chat_template"]
    asks = isinstance(template, str) and "bos_token" in template
    adds = case.file.tokenizer["add_bos"] is True or case.expected_tokenizer["add_bos"] is True
    match name:
        case "pad_token_id":
            return True
        case "bos_token_id":
            return not asks and not adds
        case "add_bos":
            return not adds
        case _:
            return False


def difference(name: str, value: Any, expected: Any) -> tuple[Mechanism, dict[str, Any]]:
    """What was done to a field, and figures."""

    def cause(mechanism: str, **parameters: Any) -> Mechanism:
        return Mechanism(f"tokenizer.{mechanism}", {"field": name, **parameters})

    if value == MISSING:
        return cause("missing"), {}
    if isinstance(value, Wrong):
        return cause("wrong-kind", found=str(value)), {}
    if expected == MISSING:
        return cause("unexpected"), {}
    if isinstance(value, list) and isinstance(expected, list):
        evidence: dict[str, Any] = {"entries": len(value), "expected_entries": len(expected)}
        if len(value) == len(expected):
            differ = [n for n, (a, b) in enumerate(zip(value, expected, strict=True)) if a != b]
            evidence |= {"differing": len(differ), "first": differ[0]}
            if (shift := rotation(value, expected)) is not None:
                return cause("rotated", by=shift), evidence
            if sorted(map(str, value)) == sorted(map(str, expected)):
                return cause("reordered"), evidence
            return cause("entries-differ", differing=len(differ), of=len(expected)), evidence
        if not value:
            return cause("lost"), evidence
        return cause("cut-off" if value == expected[: len(value)] else "count-differs"), evidence
    if isinstance(value, str) and isinstance(expected, str) and len(expected) > 40:
        return cause("field-differs"), {"characters": len(value), "expected_characters": len(expected)}
    return cause("value-differs", found=value, expected=expected), {}


def rotation(value: list[Any], expected: list[Any]) -> int | None:
    """By how many places `expected` was moved round to give `value`; None where it was not. Linear in their length."""
    count = len(value)
    if not count or count != len(expected):
        return None
    # Knuth, Morris and Pratt: `expected` is sought in two copies of `value`, from the second place on.
    border = [0] * count
    at = 0
    for n in range(1, count):
        while at and expected[n] != expected[at]:
            at = border[at - 1]
        at += expected[n] == expected[at]
        border[n] = at
    at = 0
    for n in range(1, 2 * count - 1):
        item = value[n % count]
        while at and item != expected[at]:
            at = border[at - 1]
        at += item == expected[at]
        if at == count:
            return n - count + 1
    return None


def alone(found: dict[str, Any]) -> list[Deviation]:
    """Without a reference: what no Qwen2 tokenizer can be like."""

    def deviation(name: str, value: Any, expected: Any, code: str, sure: float = 1.0, **parameters: Any) -> Deviation:
        return Deviation("tokenizer", name, value, expected, Mechanism(code, parameters), confidence=sure)

    out = []
    for name in NEEDED:
        if found[name] == MISSING or found[name] == []:
            out.append(deviation(name, found[name], MISSING, "tokenizer.missing-or-empty", field=name))
    for name, value in found.items():
        if isinstance(value, Wrong):
            out.append(deviation(name, str(value), None, "tokenizer.wrong-kind", field=name, found=str(value)))
    if found["chat_template"] == MISSING:
        out.append(deviation("chat_template", MISSING, MISSING, "tokenizer.missing", field="chat_template"))
    if isinstance(found["pre"], str) and found["pre"] not in PRE_TOKENIZERS:
        known = next(iter(PRE_TOKENIZERS))
        out.append(deviation("pre", found["pre"], known, "tokenizer.unknown-pre-tokenizer", found=found["pre"]))
    tokens, kinds = found["tokens"], found["token_types"]
    if isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds):
        marks = [n for n, t in enumerate(tokens) if t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
        ordinary = [tokens[n] for n in marks if kinds[n] != CONTROL]
        if ordinary:
            known_kinds = [CONTROL if n in marks else kind for n, kind in enumerate(kinds)]
            out.append(deviation("token_types", kinds, known_kinds, "tokenizer.specials-ordinary", tokens=ordinary))
        eos, ends = found["eos_token_id"], [n for n, t in enumerate(tokens) if t in ("<|im_end|>", "<|endoftext|>")]
        if eos != MISSING and not isinstance(eos, Wrong) and ends and eos not in ends:
            if isinstance(eos, int) and 0 <= eos < len(tokens):
                wrong = {"code": "tokenizer.ends-elsewhere", "found": eos, "token": tokens[eos]}
            else:
                wrong = {"code": "tokenizer.end-is-no-token", "found": eos}
            out.append(deviation("eos_token_id", eos, ends[-1], sure=0.9, **wrong))
    return out


__all__ = ["TokenizerLayer", "alone", "difference", "rotation"]
