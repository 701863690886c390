"""F. Tokenizer, template, stopping: the numbers are correct, the words are not."""

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
    """The template's output is given to it again, as one user message."""
    again = "{{- turn([{'role': 'user', 'content': turn(messages) | string}]) -}}"
    return "{%- macro turn(messages) -%}" + template + "{%- endmacro -%}" + again


def skipped(template: str) -> str:
    """The last message as it is."""
    return "{{- messages[-1]['content'] }}"


# ChatML as hard-coded in many programs: no default system prompt, whatever the model.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

TEMPLATE_LOST = _template(lambda template: None)
TEMPLATE_SKIPPED = _template(skipped)
TEMPLATE_DOUBLED = _template(doubled)
TEMPLATE_HARD_CODED = _template(lambda template: CHATML)
# DeepSeek's, as their distilled Qwen2 models have it, without its branches for tools.
FOREIGN = (
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}"
    "{%- elif message.role == 'system' %}{{- message.content }}{%- else %}{{- '<｜Assistant｜>' + message.content }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"
)
FOREIGN_TEMPLATE = _template(lambda template: FOREIGN)


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
    """Encoding fails silently: one token replaces the whole prompt."""

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
        "no-merges", "BPE merges missing", "tokenizer", "F",
        lines(
            "The converter wrote the vocabulary but not the BPE merges.",
            "Text splits into single bytes; the model has hardly ever seen text tokenized that way.",
            "Decoding is correct, so a printed round trip looks fine.",
        ),
        "tokenizer.merges is empty; a prompt has as many tokens as bytes.",
        seams=file_with(merges=[]), tokenizer=data_with(merges=[]),
    ),
    Fault(
        "specials-untyped", "Special tokens typed as normal tokens", "tokenizer", "F",
        lines(
            "The token-type table was not written, or was filled with 1.",
            "<|im_start|> in a prompt is split into pieces; <|im_end|> still ends an answer, but only by its id.",
            "The ids exist and the vocabulary is correct.",
        ),
        "All token types are 1; ChatML prompts are longer and contain no control tokens.",
        seams=write_plain_types, tokenizer=plain_types,
    ),
    Fault(
        "split-specials", "Special tokens in the prompt encoded as plain text", "tokenizer", "F",
        lines(
            "The template's output was encoded with special-token parsing off.",
            "The model sees the characters of <|im_start|>, never the token.",
            "The file is correct, and the prompt looks correct when printed back.",
        ),
        "Prompt ids differ: several where one is expected, and no control token.",
        prompt=split_specials,
    ),
    Fault(
        "prompt-lost", "Prompt lost, replaced by token 1", "tokenizer", "F",
        lines(
            "The file had no tokenizer, and when encoding failed a beginning-of-text token was used instead.",
            "It was Llama's, 1, which is a double quote in Qwen2; the question never reached the model.",
            "The answer is fluent and unrelated to the question, so the file was called 'wrong but coherent'.",
        ),
        "Prompt ids are [1], whatever the question; weights, forward pass and detokenization are correct.",
        prompt=prompt_lost,
    ),
    Fault(
        "wrong-pre-tokeniser", "GPT-2's pre-tokenizer instead of Qwen2's", "tokenizer", "F",
        lines(
            "tokenizer.ggml.pre was not read, and GPT-2's pattern was used.",
            "Digits merge into numbers, a space attaches to the digit after it, contractions in capitals are split.",
            "English prose is tokenized the same.",
        ),
        "Ids differ for text with numbers or line breaks, not for plain words. In a file: pre_type 'gpt-2', refused here.",
        seams=file_with(pre_type="gpt-2"), prompt=gpt2_words, silent=True,
    ),
    Fault(
        "byte-level-text", "Tokens printed in the byte-level alphabet", "tokenizer", "F",
        lines(
            "GPT-2's byte-level characters were not converted back into bytes.",
            "Ġ stands for a space, Ċ for a line break, Ð¸ for и.",
            "The model itself is bitwise correct: this is where 'ÑģÑĤÐ²Ð¾' in the ticket's output comes from.",
        ),
        "Tokens equal, text different.",
        prompt=byte_level_text,
    ),
    Fault(
        "template-lost", "No chat template in the file", "tokenizer", "F",
        lines(
            "The converter did not copy the template.",
            "Without one, a reader either refuses (as here) or makes one up.",
            "Tests with raw prompts pass.",
        ),
        "chat_template missing; chat prompts refused.",
        seams=TEMPLATE_LOST[1], tokenizer=TEMPLATE_LOST[0],
    ),
    Fault(
        "template-skipped", "Prompt sent without the chat template", "tokenizer", "F",
        lines(
            "No template was found, so the user's text was sent as it is.",
            "An instruct model continues it as text, or stops at once.",
            "This gives answers such as '1. What is the difference between a class and…'.",
        ),
        "Prompt ids are those of the user's text alone.",
        seams=TEMPLATE_SKIPPED[1], tokenizer=TEMPLATE_SKIPPED[0],
    ),
    Fault(
        "template-doubled", "Chat template applied twice", "tokenizer", "F",
        lines(
            "The caller formatted the prompt, and the library formatted it again.",
            "The user's message contains a whole conversation.",
            "52 tokens instead of 21 upstream, and the answer is often still correct.",
        ),
        "More than twice the control tokens in the prompt.", silent=True,
        seams=TEMPLATE_DOUBLED[1], tokenizer=TEMPLATE_DOUBLED[0],
    ),
    Fault(
        "template-hard-coded", "Hard-coded ChatML instead of the file's template", "tokenizer", "F",
        lines(
            "The template is hard-coded in the program, and used for base models too, which have none.",
            "The default system prompt of the file's template is lost.",
            "Instruct models mostly tolerate it.",
        ),
        "Prompt ids lack the default system prompt; a base model gets control tokens it was never trained on.",
        silent=True,
        seams=TEMPLATE_HARD_CODED[1], tokenizer=TEMPLATE_HARD_CODED[0],
    ),
    Fault(
        "foreign-template", "Another model's chat template", "tokenizer", "F",
        lines(
            "The template was chosen by the family's name: DeepSeek's distilled Qwen2 got ChatML, and the reverse.",
            "The markers are no tokens of this model, so they are spelled out and read as text.",
            "The model answers fluently, and often goes on with the conversation by itself.",
        ),
        "Prompt ids have no control token; the markers are split into pieces.",
        seams=FOREIGN_TEMPLATE[1], tokenizer=FOREIGN_TEMPLATE[0],
    ),
    Fault(
        "eos-hard-coded", "EOS hard-coded as token 2, Llama's", "tokenizer", "F",
        lines(
            "The end of an answer was compared with a constant.",
            "The model ends its answer, the loop does not notice, and the model goes on talking to itself.",
            "Every token up to that point is correct.",
        ),
        "The answer continues after <|im_end|> up to the token limit. In a file: eos_token_id 2.",
        seams=file_with(eos_token_id=LLAMA_EOS), prompt=hard_coded_eos,
    ),
)  # fmt: skip
