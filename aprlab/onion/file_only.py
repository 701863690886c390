"""A model that cannot be run (another architecture, experts, numbers for each layer): what its file alone lets be said.

Names, spans, types, bytes and keys need no forward pass. What does, or needs rules that only Qwen2 has here, is listed as not
looked at, with the reason; a reader of the verdict must not take silence for health.
"""

from __future__ import annotations

from aprlab.errors import AprlabError
from aprlab.model.model import Model
from aprlab.onion import opening
from aprlab.onion.file_case import FileCase
from aprlab.onion.findings import word_alone, word_of
from aprlab.onion.verdict import Finding, Verdict
from aprlab.onion.words import refused

_ALONE = {  # layer -> what is not known of it without a reference
    "naming": "which tensors such a model must have is not known here, and there is no reference",
    "layout": "which shapes such a model must have is not known here, and there is no reference",
    "config": "what its keys must hold is not known here, and there is no reference",
    "tokenizer": "the rules of its tokenizer are not known here, and there is no reference",
}


def judge_file_only(case: FileCase, verdict: Verdict, model: Model | None) -> None:
    """Complete the verdict on a file that cannot be run: the strict reader's word, and what was not looked at.

    Args:
        case: with the deviations of all layers.
        verdict: with the findings made of them; completed in place.
        model: the candidate where it came as an opened model.
    """
    assert case.file.unrun is not None
    if model is None and (error := _refusal(case)) is not None and not _known(error, verdict.findings):
        cause = refused(error, f"{opening.layer_of(error, 'container')}.refused")
        tensors = [error.tensor] if error.tensor is not None else []
        verdict.findings.insert(0, Finding(cause.layer, None, tensors, cause, {"offset": error.offset}))
    unseen = {"forward": f"there is no forward pass for it: {case.file.unrun.message}"}
    if case.ref is None:
        verdict.verdict = word_alone(verdict.findings, "unproved")
        unseen = _ALONE | unseen
    else:
        verdict.verdict = word_of(verdict.findings, comparable=True)
    verdict.not_looked_at = verdict.not_looked_at | unseen


def _refusal(case: FileCase) -> AprlabError | None:
    """What the strict reader refuses."""
    try:
        opening.strictly(case.file)
    except AprlabError as error:
        return error
    return None


def _known(error: AprlabError, findings: list[Finding]) -> bool:
    """Whether the layers have found the cause of a refusal already."""
    layer = opening.layer_of(error, "container")
    bad = [f for f in findings if not f.harmless]
    return any(error.tensor in f.tensors for f in bad) or any(f.layer == layer for f in bad)


__all__ = ["judge_file_only"]
