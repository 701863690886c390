"""What people read of a certificate: one table, from a code and its parameters to a sentence. Nothing is decided by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {
    "file": "the strict reader takes the file, every scale is a number",
    "layers": "names, spans, types, bytes, config and tokenizer are the source's, and a run agrees",
    "tensors": "every tensor is its source's, or within what its type can hold",
    "prompts": "the same prompt ids and the same ends of an answer",
    "text": "the same next tokens over the shipped text",
    "long context": "the same at the far end of the context that was read",
    "modelfile": "Ollama's prompts are those of the source's template, its answers end as they should",
}

TEMPLATES: dict[str, str] = {
    "verify.file-sound": "{tensors} tensors, {bytes} bytes",
    "verify.file-refused": "{message}",
    "verify.layers-hold": "{verdict}{noted}",
    "verify.layers-differ": "{verdict}: {listed}",
    "verify.tensors-hold": "{tensors} tensors, {equal} of them bit for bit; the worst row is off by {worst_row:.3g} of its norm",
    "verify.tensors-off": "{off} of {of} tensors: {names}",
    "verify.prompts-same": "{prompts} prompts, ends {ends}",
    "verify.prompts-differ": "{names}",
    "verify.text-same": "{positions}: every logit the same",
    "verify.text-near": "{positions}: {kl_words}; top-1 {same_words}; at most {allowed:.2g} nats are allowed",
    "verify.text-off": "{positions}: {kl_words}; top-1 {same_words}; at most {allowed:.2g} nats are allowed",
    "verify.text-unbounded": "{positions}: {kl_words}; top-1 {same_words}; how much is allowed could not be measured",
    "verify.vocabulary-differs": "{expected} rows of vocabulary became {found}",
    "verify.run-refused": "{message}",
    "verify.needs-a-run": "not asked, since it needs a run: {message}",
    "verify.modelfile-same": "{prompts} prompts, all the same ids",
    "verify.modelfile-differs": "{problem_words}",
    "verify.modelfile-refused": "{message}",
    "verify.modelfile-without-template": "no TEMPLATE: Ollama looks for one that is like the file's; which one was not looked at",
    "verify.not-reached": "nothing can be said: the file is refused",
}

PROBLEMS: dict[str, str] = {
    "modelfile.other-weights": "FROM names {found}, not {expected}",
    "modelfile.stop-cuts": "stop {stop!r} cuts answers short",
    "modelfile.stop-of-another-model": "stop {stop!r} is no token of this model",
    "modelfile.no-end": "none of its stops ({stops}) is an end of this model's answers ({ends})",
    "modelfile.not-handled": "{instruction} changes what is run and was not looked at",
    "modelfile.prompt": "{conversation}: from token {position} on the prompt is {found!r}, not {expected!r}",
}


def words(code: str, parameters: Mapping[str, Any]) -> str:
    """The sentence for a code; raises KeyError for an unknown one."""
    shown = dict(parameters)
    if "findings" in shown:
        more = f" and {shown['more']} more" if shown["more"] else ""
        shown["listed"] = "; ".join(f["words"] for f in shown["findings"]) + more or "no finding"
    if "problems" in shown:
        shown["problem_words"] = "; ".join(PROBLEMS[p["code"]].format(**p) for p in shown["problems"])
    if "harmless" in shown:
        shown["noted"] = "".join(f"; harmless: {f['words']}" for f in shown["harmless"][:3])
    if "first" in shown:
        shown["names"] = ", ".join(shown["first"])
    if "kl" in shown:
        beyond = f" from position {shown['from_position']} on" if shown["from_position"] else f" of {shown['of']} in the text"
        shown["positions"] = f"{shown['tokens']} positions{beyond}"
        low, high = shown["kl_interval"]
        shown["kl_words"] = f"KL {shown['kl']:.2g} nats (95 %: {low:.2g} to {high:.2g})"
        low, high = shown["same_interval"]
        shown["same_words"] = f"{shown['same']:.2%} (95 %: {low:.2%} to {high:.2%})"
    return TEMPLATES[code].format(**shown)


__all__ = ["TEMPLATES", "TITLES", "words"]
