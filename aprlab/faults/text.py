"""F. Tokenizer, template, stopping: the numbers are right, the words are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aprlab.conversion.seams import Seams
from aprlab.faults.base import Fault, lines
from aprlab.faults.tensors import change_metadata
from aprlab.inference.tokenizer import NORMAL, Qwen2Tokenizer
from aprlab.model.config import TokenizerData

_TEMPLATE_KEYS = ("chat_template", "tokenizer.chat_template")


def data_with(**changes: Any) -> Callable[[TokenizerData], TokenizerData]:
    return lambda data: replace(data, **changes)


def file_with(**changes: object) -> Callable[[Seams], Seams]:
    """Keys of the tokenizer's part of the metadata; ``pre_type="x"`` sets ``tokenizer.pre_type``."""
    return lambda s: change_metadata(s, **{f"tokenizer.{key}": value for key, value in changes.items()})


def _template(change: Callable[[str], str | None]) -> tuple[Callable[[TokenizerData], TokenizerData], Callable[[Seams], Seams]]:
    """A change of the chat template, in the data and in a file."""

    def data(before: TokenizerData) -> TokenizerData:
        return before if before.chat_template is None else replace(before, chat_template=change(before.chat_template))

    def seams(s: Seams) -> Seams:
        def changed(metadata: dict[str, Any]) -> dict[str, Any]:
            found = s.metadata(metadata)
            after = {key: change(value) if key in _TEMPLATE_KEYS else value for key, value in found.items()}
            return {key: value for key, value in after.items() if value is not None}

        return replace(s, metadata=changed)

    return data, seams


def doubled(template: str) -> str:
    """What the template makes of the messages is given to it once more, as one user's message."""
    again = "{{- turn([{'role': 'user', 'content': turn(messages) | string}]) -}}"
    return "{%- macro turn(messages) -%}" + template + "{%- endmacro -%}" + again


def skipped(template: str) -> str:
    """The last message as it is."""
    return "{{- messages[-1]['content'] }}"


# ChatML as it is wired into many programs: no default system prompt, whatever the model.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

TEMPLATE_LOST = _template(lambda template: None)
TEMPLATE_SKIPPED = _template(skipped)
TEMPLATE_DOUBLED = _template(doubled)
TEMPLATE_HARD_CODED = _template(lambda template: CHATML)


def plain_types(data: TokenizerData) -> TokenizerData:
    """Every token an ordinary one: special tokens are spelled out of pieces when text is read."""
    return replace(data, token_types=[NORMAL] * len(data.token_types))


def write_plain_types(s: Seams) -> Seams:
    def changed(metadata: dict[str, Any]) -> dict[str, Any]:
        found = s.metadata(metadata)
        key = "tokenizer.token_type"
        return {**found, key: [NORMAL] * len(found[key])} if key in found else found

    return replace(s, metadata=changed)


class _SplitSpecials(Qwen2Tokenizer):
    """Text is encoded as plain text, ``<|im_start|>`` and all."""

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        return super().encode(text, parse_special=False)


def split_specials(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    return _as(_SplitSpecials, tokenizer)


class _ByteLevelText(Qwen2Tokenizer):
    """Tokens are printed as the file spells them: Ġ for a space, Ċ for a line's end."""

    def token_bytes(self, id: int) -> bytes:
        return self.token(id).encode()


def byte_level_text(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    return _as(_ByteLevelText, tokenizer)


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt2_words(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    """Text is cut into words as GPT-2 does it: numbers in one piece, with the space before them."""
    return tokenizer.working_as(type(tokenizer), words=GPT2_PATTERN)


LOST_PROMPT = 1  # what many readers take for a beginning of text; in Qwen2 it is a double quote


class _PromptLost(Qwen2Tokenizer):
    """Encoding fails and nobody is told: one token stands for whatever was asked."""

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        return [LOST_PROMPT]


def prompt_lost(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    return _as(_PromptLost, tokenizer)


LLAMA_EOS = 2


def hard_coded_eos(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    """Only Llama's token 2 ends an answer."""
    return tokenizer.working_as(type(tokenizer), eog=frozenset({LLAMA_EOS}))


def _as(kind: type[Qwen2Tokenizer], tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    """A copy of `tokenizer` that does what `kind` does differently, on top of what it does differently itself."""
    mixed = kind if issubclass(kind, type(tokenizer)) else type(kind.__name__, (kind, type(tokenizer)), {})
    return tokenizer.working_as(mixed)


FAULTS = (
    Fault(
        "no-merges", "The merges lost", "tokenizer", "F",
        lines(
            "The converter wrote the vocabulary and forgot the merges.",
            "Text falls apart into single bytes; each is a token the model has hardly ever seen so.",
            "Decoding is right, so printing a round trip shows nothing.",
        ),
        "tokenizer.merges is empty; prompts have as many tokens as bytes.",
        seams=file_with(merges=[]), tokenizer=data_with(merges=[]),
    ),
    Fault(
        "specials-untyped", "Special tokens typed as ordinary ones", "tokenizer", "F",
        lines(
            "The table of token types was not written, or filled with 1.",
            "<|im_start|> in a prompt is spelled out of pieces; <|im_end|> is no end but by its number.",
            "The ids exist, the vocabulary is right.",
        ),
        "All token types 1; ChatML prompts longer, without ids of control tokens.",
        seams=write_plain_types, tokenizer=plain_types,
    ),
    Fault(
        "split-specials", "Special tokens of the prompt encoded as text", "tokenizer", "F",
        lines(
            "The template's output was encoded with special tokens switched off.",
            "The model sees the letters of <|im_start|>, never the token.",
            "The file is right; the prompt printed back is right.",
        ),
        "Prompt ids differ: many for one; no control token among them.",
        prompt=split_specials,
    ),
    Fault(
        "prompt-lost", "The prompt lost: token 1 in its place", "tokenizer", "F",
        lines(
            "The file had no tokenizer to encode with, and the failure was answered with a beginning-of-text token.",
            "It took Llama's, 1, which Qwen2 knows as a double quote; the question never reached the model.",
            "Fluent text about nothing that was asked: it was taken for a file that is 'wrong but coherent'.",
        ),
        "The prompt's ids are [1], whatever is asked; weights, passes and text are right.",
        prompt=prompt_lost,
    ),
    Fault(
        "wrong-pre-tokeniser", "Text cut into words as GPT-2 does it", "tokenizer", "F",
        lines(
            "tokenizer.ggml.pre was not read, and GPT-2's pattern taken.",
            "Numbers of several digits merge, a space sticks to a digit, contractions in capitals fall apart.",
            "English prose comes out the same.",
        ),
        "Ids differ for texts with numbers or line ends; equal for plain words. In a file: pre_type 'gpt-2', refused here.",
        seams=file_with(pre_type="gpt-2"), prompt=gpt2_words, silent=True,
    ),
    Fault(
        "byte-level-text", "Tokens printed as the vocabulary spells them", "tokenizer", "F",
        lines(
            "The byte alphabet of GPT-2 was not turned back into bytes.",
            "Ġ stands for a space, Ċ for a line's end, Ð¸ for и.",
            "The model is right to the last bit: 'ÑģÑĤÐ²Ð¾' in the ticket's output is this.",
        ),
        "Tokens equal, text not.",
        prompt=byte_level_text,
    ),
    Fault(
        "template-lost", "No chat template in the file", "tokenizer", "F",
        lines(
            "The converter did not carry the template over.",
            "A reader without one either refuses (as here) or makes one up.",
            "Tests with raw prompts pass.",
        ),
        "chat_template missing; chat prompts refused.",
        seams=TEMPLATE_LOST[1], tokenizer=TEMPLATE_LOST[0],
    ),
    Fault(
        "template-skipped", "The prompt given without its template", "tokenizer", "F",
        lines(
            "No template was found, so the user's words went in as they were.",
            "An instruct model takes them for a text to go on with, or ends at once.",
            "Answers like '1. What is the difference between a class and…' come from here.",
        ),
        "Prompt ids are the user's words alone.",
        seams=TEMPLATE_SKIPPED[1], tokenizer=TEMPLATE_SKIPPED[0],
    ),
    Fault(
        "template-doubled", "The template applied twice", "tokenizer", "F",
        lines(
            "The caller formatted the prompt, and the library did so again.",
            "A whole conversation stands inside the user's message.",
            "52 tokens instead of 21 upstream, and an answer that is often still right.",
        ),
        "More than twice the control tokens in the prompt.", silent=True,
        seams=TEMPLATE_DOUBLED[1], tokenizer=TEMPLATE_DOUBLED[0],
    ),
    Fault(
        "template-hard-coded", "ChatML whatever the file says", "tokenizer", "F",
        lines(
            "A template wired into the program, for base models too, which know none.",
            "The file's own system prompt is left out.",
            "Instruct models forgive it mostly.",
        ),
        "Prompt ids lack the default system prompt; a base model gets control tokens it was never trained on.",
        silent=True,
        seams=TEMPLATE_HARD_CODED[1], tokenizer=TEMPLATE_HARD_CODED[0],
    ),
    Fault(
        "eos-hard-coded", "EOS is token 2, as Llama has it", "tokenizer", "F",
        lines(
            "The end of an answer was tested against a constant.",
            "The model ends its answer, nobody listens, and it goes on talking to itself.",
            "Every token up to there is right.",
        ),
        "The answer goes on after <|im_end|> up to the limit. In a file: eos_token_id 2.",
        seams=file_with(eos_token_id=LLAMA_EOS), prompt=hard_coded_eos,
    ),
)  # fmt: skip
