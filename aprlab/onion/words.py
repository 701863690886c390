"""Words for people: one table from codes to sentences, and one function that fills them in.

A code is ``layer.mechanism`` and stable: programs decide by it. The sentences may be reworded at any time, since nothing
in the package reads them. `docs/peel.md` lists this table.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aprlab.errors import AprlabError
from aprlab.faults import FAULTS

# Placeholders are the parameters of a code. `list`, `reprs` and `and` join a list; `plural` is an "s" for several, `singular`
# for one alone; `rows` is an "s" for more than one row number.
TEMPLATES: dict[str, str] = {
    "catalogue.fault": "{title}",
    # ── container
    "container.header-changed": "the header was changed after it was written",
    "container.checksum": "bytes were changed after the file was written: the checksum does not match",
    "container.truncated": "the file is cut off: the index asks for bytes beyond its end",
    "container.length-differs": "the file is shorter or longer than its writer made it",
    "container.index-unsorted": "the index is not sorted",
    "container.misaligned": "data do not start on a multiple of 64 bytes",
    "container.overlap": "bytes of two tensors overlap",
    "container.offset-too-small": "the offset is {bytes} bytes too small: the right bytes are where it should point",
    "container.offset-too-large": "the offset is {bytes} bytes too large: the right bytes are where it should point",
    "container.gap": "tensors are in another order than listed or have gaps between them, which llama.cpp refuses",
    "container.unpadded": "the tensors were written one after the other without padding, which llama.cpp refuses",
    "container.listed-twice": "a tensor is in the index twice",
    "container.tensor-cut-off": "the file ends before the tensor does",
    "container.refused": "{message}",
    "container.unreadable": "{message}",
    # ── naming
    "naming.other-generation": "names of the {found!r} generation, expected {expected!r}",
    "naming.unknown-name": "content under a name that no Qwen2 model has",
    "naming.unknown-tensor": "a tensor that no Qwen2 model has",
    "naming.layers-exchanged": "content of layers {first} and {second} under each other's number",
    "naming.layers-rotated": "content of layers {layers:list} moved on in a circle, each under the next one's number",
    "naming.layers-shifted": "{part}: shifted by {by:+} layer(s)",
    "naming.modules-exchanged": "content of {first} and {second} under each other's name",
    "naming.biases-missing": "Q, K and V biases are not in the file",
    "naming.tensors-missing": "tensors are not in the file",
    "naming.refused": "{message}",
    "naming.other-model": "these are not two files of one model",
    # ── dtype
    "dtype.refused": "{message}",
    "dtype.several-types-fit": "label {label} breaks the size law, and the bytes cannot decide between {types:and}",
    "dtype.no-type-fits": "label {label} with a size that fits no known type",
    "dtype.foreign-code": "{message}",
    "dtype.shared-code": "{type} under byte {label}, which two types have had; the size law decides",
    "dtype.code-of-another-type": "{type} blocks under byte {label} ({means})",
    "dtype.file-rounded": "values of the file are those of the reference rounded to {type}",
    "dtype.reference-rounded": "values of the reference are those of the file rounded to {type}",
    "dtype.decoded": "decoded from {before} and kept as {after}, value for value",
    "dtype.values-on-a-grid": "values kept as {type} are those of blocks: {distinct:.1f} of 32 neighbours differ",
    "dtype.re-encoded": "re-encoded from {before} to {after}",
    "dtype.one-source": "{after} where the reference has {before}: both made from one source, within what the two types lose",
    # ── layout
    "layout.refused": "{message}",
    "layout.dims-reversed": "dims are in the reverse order",
    "layout.dims-differ": "dims are not those of this tensor",
    "layout.transposed": "data transposed, dims left as they were",
    "layout.transposed-back": "data taken for column-major and transposed back",
    "layout.columns-reversed": "columns of every row reversed",
    "layout.rows-reversed": "rows in reverse order",
    "layout.rows-permuted-for-llama": "rows of each head permuted as for Llama (halves to pairs)",
    "layout.rows-permuted-from-llama": "rows of each head permuted back from Llama's order, though never in it",
    "layout.rows-rotated": "rows rotated by {by}",
    "layout.values-rotated": "values rotated by {by}",
    "layout.rows-reordered": "{moved} of {of} rows in another order",
    "layout.heads-reordered": "rows of whole heads in another order: head {heads:list}, of {of}",
    "layout.values-reordered": "{moved} of {of} values in another order",
    "layout.channels-disagree":
        "columns of Q and K do not have the channels of the other layers: rows or columns are in another order",
    "layout.size-differs": "{found} bytes, expected {expected}",
    # ── decode
    "decode.refused": "{message}",
    "decode.scales-exchanged": "d and dmin exchanged in every block",
    "decode.minimum-zero": "the minimum of every block is zero",
    "decode.scale-bits-lost": "scales of the later groups of every block have lost their top bits",
    "decode.one-scale-for-two": "two groups of every pair have one scale",
    "decode.minima-as-scales": "scales of the later groups of every block are minima of the earlier ones",
    "decode.subnormals-raised": "subnormal scales raised to the smallest normal number",
    "decode.marks-missing": "{type} blocks are unlike those of any encoder, and plain text is unlikely",
    "decode.nibbles-exchanged": "the two nibbles of every byte exchanged",
    "decode.subnormals-flushed": "subnormal scales flushed to zero",
    "decode.misread": "{type} decoded with {how}, then kept as {after}",
    "decode.fields-changed-in-every-block": "field{fields:plural} {fields:reprs} changed in every block",
    "decode.fields-changed-in-most-blocks": "field{fields:plural} {fields:reprs} changed in most blocks",
    "decode.products-differ": "products with weights of type {types:list} differ on the same input",
    # ── weights
    "weights.all-zeros": "{part}: all zeros",
    "weights.constant": "{part}: every value is {value:g}, as before any training",
    "weights.bytes-of-another-tensor": "{part}: holds the bytes of {other}",
    "weights.bytes-of-another-layer": "{part} of layer {layer} holds the bytes of layer {other}",
    "weights.layers-shifted": "{part}: shifted by {by:+} layer(s), each holds the bytes of another layer",
    "weights.values-differ": "values differ",
    "weights.field-of-one-block": "field {field!r} of one block changed",
    "weights.range-overwritten": "one range of bytes overwritten",
    "weights.bytes-changed": "{bytes} bytes changed in {blocks} of {of} blocks",
    "weights.bytes-changed-in-one-block": "{bytes} bytes changed in one block",
    "weights.values-changed": "values changed throughout (correlation {correlation:.2f})",
    "weights.values-unlike": "values unlike the reference's throughout",
    "weights.statistics-differ": "values do not have the figures of {table}",
    "weights.not-finite": "values that are not finite numbers in row{rows:rows} {rows}",
    "weights.rows-zero": "row{rows:rows} {rows} all zeros",
    "weights.negated": "values changed: negated throughout",
    "weights.negated-in-rows": "values changed: negated in row{rows:rows} {rows}",
    "weights.scaled": "values changed: × {by} throughout",
    "weights.scaled-in-rows": "values changed: × {by} in row{rows:rows} {rows}",
    "weights.offset": "values changed: {offset:+} throughout",
    "weights.offset-in-rows": "values changed: {offset:+} in row{rows:rows} {rows}",
    "weights.scaled-and-offset": "values changed: × {by} and {offset:+} throughout",
    "weights.scaled-and-offset-in-rows": "values changed: × {by} and {offset:+} in row{rows:rows} {rows}",
    "weights.columns-permuted": "values changed: {moved} of {of} columns in another order, the same in every row",
    "weights.field-scaled": "values changed: {fields:and} of the blocks × {by}",
    "weights.values-changed-in-rows": "values changed in row{rows:rows} {rows}",
    "weights.scales-not-finite": "scales that are not finite numbers",
    "weights.implausible-size": "values of a size that no trained weight has",
    "weights.constant-added": "products differ by one constant vector at every position: a bias",
    # ── config
    "config.missing": "{field} is missing; upstream would assume {default}",
    "config.key-missing": "key {field} is missing",
    "config.key-unexpected": "key {field} is there, and the reference has none",
    "config.conflict": "{field} is given twice: {found}",
    "config.wrong-kind": "{field} is {found}, which this field cannot be",
    "config.context-too-short":
        "context_length {context_length} has no room for the prompt and an answer ({prompt} and {answer} tokens)",
    "config.refused": "{message}",
    "config.value-differs": "{field} is {found!r}, not {expected!r}",
    "config.field-differs": "{field} differs",
    "config.does-not-run": "does not run: {message}",
    # ── tokenizer
    "tokenizer.missing": "{field} is missing",
    "tokenizer.missing-or-empty": "{field} is missing or empty",
    "tokenizer.wrong-kind": "{field} is {found}, which this field cannot be",
    "tokenizer.refused": "{message}",
    "tokenizer.unexpected": "{field} is there, and the reference has none",
    "tokenizer.rotated": "{field} are rotated by {by}",
    "tokenizer.reordered": "{field} are in another order",
    "tokenizer.entries-differ": "{differing} of {of} {field} differ",
    "tokenizer.lost": "{field} are all lost",
    "tokenizer.cut-off": "{field} are cut off",
    "tokenizer.count-differs": "{field} differ in number",
    "tokenizer.field-differs": "{field} differs",
    "tokenizer.value-differs": "{field} is {found!r}, not {expected!r}",
    "tokenizer.unknown-pre-tokenizer": "pre-tokeniser {found!r} is not Qwen2's",
    "tokenizer.specials-ordinary": "{tokens:list} are marked as ordinary text",
    "tokenizer.ends-elsewhere": "eos_token_id {found} is {token!r}",
    "tokenizer.rows-fewer": "{count} rows of vocabulary fewer: {first} to {last} ({tokens:list}) are not in the file",
    "tokenizer.rows-more": "{count} rows of vocabulary more: {first} to {last} ({tokens:list}) are not in the reference",
    "tokenizer.template-without-marks": "the chat template puts no control token into the prompt",
    "tokenizer.template-nests": "the chat template puts one turn into another, as if it had been applied twice",
    "tokenizer.end-is-no-token": "eos_token_id is {found!r}",
    "tokenizer.behaviour-differs": "{what:list} differ from what its data require",
    "tokenizer.server-prompt": "{request}: the server's prompt is another one: {form}",
    "tokenizer.server-prompt-unknown":
        "{request}: the first step is not that of the prompt; to the same ids it is right, no known form of a prompt gives it",
    "tokenizer.server-prompt-length": "{request}: the server counts {found} tokens of the prompt, there are {expected}",
    "tokenizer.server-ids": "ids of the server stand for other bytes: {id} for {theirs!r}, in the model for {ours!r}",
    # ── forward
    "forward.refused": "{message}",
    "forward.not-finite": "{message}",
    "forward.language": "{part}: {nats:.2f} nats per token, at most {allowed:g} are allowed for such a model",
    "forward.language-unknown":
        "{part}: {nats:.2f} nats per token; what a healthy model of this size has is not known",
    "forward.garbage": "{garbage} of {of} answers are garbage",
    "forward.serial": "logits token by token are off by {off:.2g} of their norm from those of one pass",
    "forward.operations-differ": "{operations:list} differ{operations:singular} on the same input",
    "forward.costs-too-much":
        "the run loses more than these types explain: logits {distance} away (at most {allowed}), "
        "KL {kl} nats (at most {kl_allowed})",
    "forward.answer-differs":
        "{differ} of {of} tokens of the answer are other ones, which these types explain: KL {kl} nats (at most {kl_allowed})",
    "forward.step-as-form": "{steps:list} computed as {form}{details}",
    "forward.step-differs": "{steps:list}: not what its inputs give, and no known form gives it",
    "forward.weights-differ": "it runs this file with other weights than are in it, {what}: {wrong} of {products} products are "
    "off, and no known decoder gives those that were tried",
    "forward.products-differ": "{wrong} of {products} products are off, in all layers, and no form gives those that were tried, "
    "though embedding and norms are right: other weights than this model's, or one rounding that no contract has",
    "forward.between-points": "{steps:list}: not what the points before give; it holds several operations",
    "forward.contract-differs": "{steps:list}: the contract is {found!r}, not {declared!r} as declared",
    "forward.printout-agrees": "{tensors} printed tensors agree with this model's: {values} values within their digits and what "
    "rounding does to a run, {sums} sums; nothing else of them was looked at",
    "forward.printout-differs": "{point} (line {line}) is the first printed tensor that is not this model's; {before} before it "
    "agree, and no known form gives what is printed",
    "forward.printout-as-form": "{point} (line {line}) is the first printed tensor that is not this model's, and is what "
    "{form}{details} gives",
    "forward.server-step": "step {step} of the answer is not the model's, and no known fault gives it",
    "forward.server-number": "the server's steps are those of the model with {field} {found:g}, not {expected:g}",
    "forward.server-decode":
        "step {step} of the answer is not the model's, and not what the server itself gives to the same tokens as a prompt: "
        "its cache",
    "forward.server-text": "the answer parts from the model's at token {step}: {found!r}, expected {expected!r}",
    "forward.server-text-alone": "{request}: the server gives no log-probabilities; its text is the model's, which proves little",
    "forward.server-scaled": "log-probabilities are those of the model under {form}",
    "forward.server-sampling":
        "step {step}: {found!r} was taken at temperature 0, and {expected!r} is likelier by its own figures",
    "forward.loop-differs": "the loop feeds other tokens, or at other positions",
    "forward.decoded-again": "weights are decoded again for every product",
    # ── instrument
    "instrument.failed": "instrument {instrument!r} does not distinguish a known pair: all findings are void",
    "instrument.unequal-runs": "equal files gave unequal runs",
    "instrument.other-weights": "it runs other weights than this model's, {what}: {wrong} of {products} products are off; give "
    "the file that it runs as MODEL",
    "instrument.declared-otherwise": "what is declared as {declared} is {found}; declare that, and peel again",
    "instrument.contracts-differ":
        "unlike activation contracts: {first!r} against {second!r}; compare like with like",
}  # fmt: skip


class _Filler(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        match spec:
            case "list":
                return ", ".join(map(str, value))
            case "reprs":
                return ", ".join(map(repr, value))
            case "and":
                return " and ".join(map(str, value))
            case "plural":
                return "s" if len(value) > 1 else ""
            case "rows":
                return "" if str(value).isdigit() else "s"
            case "singular":
                return "s" if len(value) == 1 else ""
            case _:
                return str(super().format_field(value, spec))


_FILLER = _Filler()


def words(code: str, parameters: Mapping[str, Any]) -> str:
    """The sentence for a code; a fault of the catalogue has its title.

    Raises:
        KeyError: unknown code, or a parameter that the sentence needs is not there.
    """
    if code == "catalogue.fault":
        parameters = {**parameters, "title": FAULTS[parameters["fault"]].title}
    return _FILLER.vformat(TEMPLATES[code], (), parameters)


def parameters_of(code: str) -> list[str]:
    """Names of the parameters that the sentence of a code needs, each once, in order."""
    found = [name for _, name, _, _ in _FILLER.parse(TEMPLATES[code]) if name]
    return list(dict.fromkeys("fault" if name == "title" else name for name in found))


def table_of_codes() -> str:
    """All codes with their sentences, as the Markdown table of `docs/peel.md`."""
    lines = ["| code | parameters | words |", "|---|---|---|"]
    for code, template in TEMPLATES.items():
        names = ", ".join(f"`{name}`" for name in parameters_of(code))
        shown = re.sub(r"\{\w+:(plural|singular|rows)\}", "(s)", template)
        shown = re.sub(r"\{(\w+)[^}]*\}", r"{\1}", shown)
        lines.append(f"| `{code}` | {names} | {shown} |")
    return "\n".join(lines)


QUOTED = ("message", "correlation")  # for people, a quoted error or a figure; they do not distinguish causes


@dataclass(frozen=True, eq=False)
class Mechanism:
    """What was done to what: a code with its parameters; printed in words.

    Attributes:
        code: a key of `TEMPLATES`.
        parameters: plain values that the sentence needs, or that distinguish causes.
    """

    code: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.code not in TEMPLATES:
            raise ValueError(f"unknown code {self.code!r}")

    @property
    def layer(self) -> str:
        """The first half of the code."""
        return self.code.partition(".")[0]

    @property
    def key(self) -> tuple[str, Any]:
        """Equal for two mechanisms of one cause; hashable."""
        return self.code, frozen({k: v for k, v in self.parameters.items() if k not in QUOTED})

    @property
    def label(self) -> str:
        """The cause on one line: ``layout.rows-rotated(by=3)``."""
        parts = [f"{k}={_short(v)}" for k, v in self.parameters.items() if k not in QUOTED]
        return f"{self.code}({', '.join(parts)})" if parts else self.code

    def __str__(self) -> str:
        return words(self.code, self.parameters)


def refused(error: AprlabError, code: str) -> Mechanism:
    """What a reader or a run refuses, with the rule that was broken; the message is quoted for people."""
    return Mechanism(code, {"rule": error.code, "message": error.message})


def frozen(value: Any) -> Any:
    """A plain value as a hashable one: lists as tuples, dicts as sorted pairs."""
    if isinstance(value, Mapping):
        return tuple((key, frozen(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return value


def _short(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


__all__ = ["QUOTED", "TEMPLATES", "Mechanism", "frozen", "parameters_of", "refused", "table_of_codes", "words"]
