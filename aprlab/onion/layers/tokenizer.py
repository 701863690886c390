"""Tokenizer: vocabulary, merges, kinds of tokens, ids that end an answer, the chat template."""

from __future__ import annotations

from typing import Any, ClassVar

from aprlab.formats.raw import MISSING, TOKENIZER_FIELDS, Wrong, needed
from aprlab.inference.tokenizer import PRE_TOKENIZERS
from aprlab.model.vocabulary import CONTROL, UNUSED
from aprlab.onion.draft import Draft
from aprlab.onion.file_case import Deviation, FileCase
from aprlab.onion.layers._fields import difference, rotation
from aprlab.onion.layers._keys import key_deviations
from aprlab.onion.layers.layer import Layer
from aprlab.onion.template_marks import template_deviations
from aprlab.onion.words import Mechanism


class TokenizerLayer(Layer):
    """Against the reference's tokenizer data, or against what every tokenizer has."""

    name: ClassVar[str] = "tokenizer"
    kinds: ClassVar[tuple[str, ...]] = ("tokenizer",)
    shown: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def suspect(self, case: FileCase) -> list[Deviation]:
        if case.file.unrun is not None:
            return list(key_deviations(case, of_tokenizer=True))
        if case.ref is None:
            return [*alone(case.file.tokenizer), *template_deviations(case.file.tokenizer)]
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
    if name in ("scores", "add_space_prefix") and case.expected_tokenizer["model"] == "gpt2":  # byte-level BPE has no scores
        return name == "scores" or all(side is False or side == MISSING for side in (value, expected))
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


def alone(found: dict[str, Any]) -> list[Deviation]:
    """Without a reference: what no tokenizer of a chat model can be like."""

    def deviation(name: str, value: Any, expected: Any, code: str, sure: float = 1.0, **parameters: Any) -> Deviation:
        return Deviation("tokenizer", name, value, expected, Mechanism(code, parameters), confidence=sure)

    out = []
    for name in needed(found["model"]):
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
            # A converter that types no mark types no padding either: `[PADn]`, llama.cpp's name for rows without a token.
            pads = {n for n, t in enumerate(tokens) if t == f"[PAD{n}]"}
            known_kinds = [CONTROL if n in marks else UNUSED if n in pads else kind for n, kind in enumerate(kinds)]
            out.append(deviation("token_types", kinds, known_kinds, "tokenizer.specials-ordinary", tokens=ordinary))
        eos, ends = found["eos_token_id"], [n for n, t in enumerate(tokens) if t in ("<|im_end|>", "<|endoftext|>")]
        byte_level = found["model"] != "llama"  # SentencePiece's end is </s>, whatever else there is
        if eos != MISSING and not isinstance(eos, Wrong) and ends and eos not in ends and byte_level:
            if isinstance(eos, int) and 0 <= eos < len(tokens):
                wrong = {"code": "tokenizer.ends-elsewhere", "found": eos, "token": tokens[eos]}
            else:
                wrong = {"code": "tokenizer.end-is-no-token", "found": eos}
            out.append(deviation("eos_token_id", eos, ends[-1], sure=0.9, **wrong))
    return out


__all__ = ["TokenizerLayer", "alone", "difference", "rotation"]
