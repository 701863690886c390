"""What people read of gates and of the ten stages: one table, from a code and its parameters to a sentence.

Nothing is decided by these words: programs look at the code. A part in square brackets is left out where one of its
parameters is None.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

TEMPLATES: dict[str, str] = {
    # ── gates ───────────────────────────────────────────────────────────────────────────────────────────────────
    "gate.void": "void: {instruments!c} failed",
    "gate.refused": "refused: {message}",
    "gate.needs-a-run": "not asked, since it needs a run: {message}",
    "gate.not-finite": "{message}",
    "gate.answers-same": "{tokens} tokens of {answers} answers are the same",
    "gate.answers-empty": "0 tokens of {answers} answers are the same",
    "gate.answer-differs": "{prompt!r}: {expected!r} ({expected_stop}) became {found!r} ({found_stop})",
    "gate.counts-same": "{expected} tensors of {expected_values} values, {found} of {found_values}",
    "gate.counts-differ": "{expected} tensors of {expected_values} values, {found} of {found_values}",
    "gate.no-garbage": "{answers} answers read like answers",
    "gate.garbage": "{prompt!r}: {text!r}: {reason}",
    "gate.checksums-same": "{tensors} tensors: {other} other, {missing} missing, {unknown} unknown[, first {first}]",
    "gate.checksums-differ": "{tensors} tensors: {other} other, {missing} missing, {unknown} unknown[, first {first}]",
    "gate.tensor-missing": "{tensor} is missing",
    "gate.values-not-finite": "{tensor}: {nan} NaN, {inf} Inf",
    "gate.statistics-same": "{tensors} tensors, none off",
    "gate.statistics-within": "{tensor} ({type}) is off by {off:.3g} of its spread, {allowed:g} allowed",
    "gate.statistics-off": "{tensor} ({type}) is off by {off:.3g} of its spread, {allowed:g} allowed",
    "gate.file-problem": "{message}",
    "gate.size-law": "{tensor}: byte {byte}, {size} bytes as {shape}: {fit!o} would fit",
    "gate.byte-of-another-type": "{tensor}: {type} is labelled with byte {byte}, which is not its own",
    "gate.label-of-another-type": ("{tensor}: labelled {found} {found_shape}, its bytes are {expected} {expected_shape}"),
    "gate.dims-differ": "{tensor}: dims {found}, expected {expected}",
    "gate.layout-holds": "{tensors} tensors obey the size law, each by one type with its own byte",
    "gate.round-trip-same": "{compared} things compared, {same} equal bit for bit[, first difference at {first}]",
    "gate.round-trip-differs": "{compared} things compared, {same} equal bit for bit[, first difference at {first}]",
    "gate.names-lead-back": "{names} names: {unknown} unknown, {missing} missing, {twice} twice[, first {first}]",
    "gate.names-differ": "{names} names: {unknown} unknown, {missing} missing, {twice} twice[, first {first}]",
    "gate.strict-reader-takes": "the strict reader takes it",
    "gate.strict-reader-refuses": "{message}",
    "gate.file-not-sound": "the file is not sound",
    "gate.value-counts-differ": (
        "{tensor}: {expected} values, {expected_nan} NaN, {expected_inf} Inf became {found}, {found_nan}, {found_inf}"
    ),
    "gate.values-changed": "{tensor}: still {type}, but other values",
    "gate.percentile-moved": "{tensor}: percentile {percentile} moved from {expected:.4g} to {found:.4g}",
    "gate.statistics-kept": "{same} of {tensors} tensors hold the same values",
    "gate.ids-differ": "{text!r}: {expected} ids became {found} others",
    "gate.text-differs": "{text!r} comes back as {found!r}",
    "gate.template-unexpected": "there is a chat template that the source does not have",
    "gate.prompt-refused": "{message}",
    "gate.prompt-length-differs": "a prompt of {expected} tokens became {found}",
    "gate.prompt-ids-differ": "a prompt of {tokens} tokens became {tokens} others",
    "gate.ends-differ": "ends of an answer {expected}, then {found}",
    "gate.tokenizer-same": "{texts} texts and a prompt",
    "gate.prompt-tokens-differ": "{prompt!r}: other prompt tokens",
    "gate.logits-same": "{steps} steps, every logit the same",
    "gate.logits-differ": "{prompt!r}, step {step}: off by {off:.3g} of their norm",
    "gate.steps-differ": "{prompt!r}: {expected} steps, then {found}",
    "gate.no-steps": "0 steps, every logit the same",
    "gate.logits-not-finite": "logits that are not finite at position {position}",
    "gate.serial-same": "off by {off:.2g} of their norm at position {position}",
    "gate.serial-differs": "off by {off:.2g} of their norm at position {position}",
    "gate.work-same": "{expected} decoded, then {found}",
    "gate.more-work": "{expected} decoded, then {found}",
    "gate.instruments-hold": "{instruments} instruments",
    "gate.instruments-fail": "{details!j}",
    # ── the ten stages of `check` ───────────────────────────────────────────────────────────────────────────────
    "stage.refused": "{message}",
    "stage.not-finite": "{what} holds values that are not finite",
    "stage.shape": "{tensor} has shape {found}, expected {expected}",
    "stage.far-from-float64": "{what} is off by {off:.2g} of its norm, {allowed:g} is the contract's",
    "stage.tokenizer": "{tokens} tokens, {merges} merges, {texts} texts there and back, a prompt of {prompt}",
    "stage.tokenizer.duplicate-tokens": "{count} tokens are listed twice",
    "stage.tokenizer.no-merges": "there are no merges: every prompt falls apart into bytes",
    "stage.tokenizer.merges-without-token": "{count} merges make no token, first {first!r}",
    "stage.tokenizer.text-changed": "{text!r} comes back as {found!r}",
    "stage.tokenizer.end-no-control": "the end of an answer, {end}, is not a control token",
    "stage.tokenizer.end-ignored": "{end} does not end an answer",
    "stage.tokenizer.no-template": "there is no chat template",
    "stage.tokenizer.no-control-tokens": ("the prompt holds no control token: the template is missing, or split into letters"),
    "stage.tokenizer.question-count": "the question is {count} times in its prompt",
    "stage.tokenizer.turn-count": "the prompt opens {count} turns; expected system, user and assistant",
    "stage.embedding": ("{rows} rows of {columns}, std {std:.3g}; the prompt's rows are what the engine looks up"),
    "stage.embedding.constant-rows": "{count} of {rows} rows are constant",
    "stage.embedding.same-rows": "only {count} rows differ from each other",
    "stage.embedding.large": "values up to {largest:.3g}",
    "stage.positions": "theta {theta:g}, turned as float64 turns it to {off:.1g}, position 0 not at all",
    "stage.positions.rope-type": "rope_type is {found!r}; {architecture} has {expected!r}",
    "stage.positions.theta": "rope_theta is {found:g}; {model} has {expected:g}",
    "stage.positions.epsilon": "rms_norm_eps is {found:g}; {model} has {expected:g}",
    "stage.positions.head-size": "heads of {found}, expected {expected}",
    "stage.projections": "biases everywhere, products of layers {layers!c} as in float64 to {off:.1g}",
    "stage.projections.unbiased": "no biases ({architecture} has none), products of layers {layers!c} as in float64 to {off:.1g}",
    "stage.projections.bias-lost": "{tensor} is all zeros: Qwen2 has biases, and they are lost here",
    "stage.projections.bias-zero": "{tensor} is all zeros",
    "stage.attention": ("{heads} heads on {kv_heads}, causal, as in float64 to {off:.1g}, prefill and decode alike"),
    "stage.attention.head-counts": "other numbers of heads than the config's",
    "stage.feed-forward": "layers {layers!c} as in float64 to {off:.1g}",
    "stage.feed-forward.constant-row": "{tensor}: a row of one value",
    "stage.feed-forward.large": "{tensor}: values up to {largest:.3g}",
    "stage.norms": "{weights} weights, {norms} RMS norms as in float64 to {off:.1g}",
    "stage.norms.no-norm": "{tensor} cannot be a norm's weights: zeros, one value, or not finite",
    "stage.head": "{tensor}, {computed} of {rows} rows as in float64 to {off:.1g}",
    "stage.head.constant-rows": "{count} of {rows} rows of {tensor} are constant",
    "stage.head.embedding-copied": ("output.weight is the embedding's copy, where a model that needs one has its own"),
    "stage.head.flat-logits": "all tokens are equally likely",
    "stage.probabilities": "{answer!r} costs {nats:.2f} nats a token, knowing nothing would cost {even:.2f}",
    "stage.probabilities.surprised": "{answer!r} costs {nats:.2f} nats a token; knowing nothing costs {even:.2f}",
    "stage.sampler": "{answer!r}, then the end; the same when asked again",
    "stage.sampler.garbage": "{answer!r}: {reason}",
    "stage.sampler.no-end": "{answer!r} does not end within {tokens} tokens",
    "stage.sampler.two-answers": "asked twice, the model says two things at temperature 0",
    "stage.sampler.seed-ignored": "one seed gives two answers",
}

_OPTIONAL = re.compile(r"\[([^\]]*)\]")


class ListFormatter(string.Formatter):
    """`str.format` with three ways to write a list: ``!c`` with commas, ``!j`` with semicolons, ``!o`` with "or"."""

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        joint = {"c": ", ", "j": "; ", "o": " or "}.get(conversion or "")
        return super().convert_field(value, conversion) if joint is None else joint.join(map(str, value)) or "nothing"


def words(code: str, parameters: Mapping[str, Any]) -> str:
    """The sentence for a code.

    Args:
        code: a key of `TEMPLATES`.
        parameters: the values that its sentence needs.

    Raises:
        KeyError: the code is not in the table, or a parameter is missing.
    """
    template = _OPTIONAL.sub(lambda part: part[1] if _given(part[1], parameters) else "", TEMPLATES[code])
    return ListFormatter().format(template, **parameters)


def _given(part: str, parameters: Mapping[str, Any]) -> bool:
    return all(parameters[name] is not None for _, name, _, _ in string.Formatter().parse(part) if name)
