"""A server judged by its answers alone: ids, prompt, first step, the steps after it, and how tokens are taken.

The order is that of a request. What is wrong early explains what comes later, so the first cause is the finding. A server has
no values inside: the step of a run is the whole of it, and the catalogue's faults are tried as whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from aprlab.engines.choice import is_small
from aprlab.errors import AprlabError
from aprlab.faults import FAULTS, session_with
from aprlab.inference.session import Session
from aprlab.inference.tokenizer import Qwen2Tokenizer
from aprlab.model.model import Model
from aprlab.onion.foreign_shadow import Judges
from aprlab.onion.server_prompts import prompt_forms
from aprlab.onion.server_run import ExpectedSteps, distance_of, expected_steps, fitting_other
from aprlab.onion.verdict import Finding, known
from aprlab.onion.words import Mechanism
from aprlab.sources.json_http import ServerRefusal
from aprlab.sources.server_answers import AnswerStep, ServerAnswer
from aprlab.sources.servers import ServerSource
from aprlab.tracing.comparisons import log_softmax

ANSWER = 8  # tokens of an answer that are judged
NUMBERS = {"rope_theta": (1e4, 1e5, 5e5, 1e6, 5e6, 8e6, 1e7), "rms_norm_eps": (1e-8, 1e-6, 1e-5, 1e-4, 1e-3)}
_TELLING = 4  # tokens of a text that are hardly equal by chance
_MISSING = (404, 405, 501)  # statuses of a server that has no such door
_TEMPERATURES, _PENALTIES = (0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0), (1.02, 1.05, 1.1, 1.15, 1.18, 1.2, 1.3)


@dataclass
class ServerCase:
    """What is known of a server while it is judged.

    Attributes:
        ids: the prompt as it should be.
        prompt: the user's text, None where ids were asked for.
        answers: by request, ``completions`` and ``chat``.
        facts: for the verdict's evidence.
    """

    source: ServerSource
    model: Model
    ids: list[int]
    prompt: str | None
    session: Session
    judges: Judges
    answers: dict[str, ServerAnswer] = field(default_factory=dict)
    by_ids: bool = True  # the completion's prompt went in as ids
    findings: list[Finding] = field(default_factory=list)
    expected: dict[tuple[int, ...], ExpectedSteps] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    parts_at: int | None = None  # step of the answer

    def after(self, answer: Sequence[int]) -> ExpectedSteps:
        """What the model gives after the prompt and each token of an answer but the last; kept."""
        key = tuple(answer[:-1])
        if key not in self.expected:
            self.expected[key] = expected_steps(self.judges, self.model.config, self.ids, [*answer[:-1], 0])
        return self.expected[key]

    def add(self, code: str, evidence: dict[str, Any] | None = None, *, harmless: bool = False, **parameters: Any) -> None:
        """One finding more."""
        facts = {"source": self.source.name, **(evidence or {})}
        cause = Mechanism(code, parameters)
        self.findings.append(Finding(cause.layer, None, [], cause, facts, harmless=harmless))


def judge_server(
    source: ServerSource, model: Model, ids: list[int], prompt: str | None, threads: int | None = None
) -> ServerCase:
    """Ask a server, and say what of its answers is not the model's.

    Args:
        source: the server.
        model: what it is believed to run.
        ids: prompt ids that are right.
        prompt: the text that they were made of by the file's template, for a request to chat; None without one.
        threads: of the engine that tries faults.

    Raises:
        ServerError, ServerRefusal, UnsupportedError: it cannot be asked, or answers what no such server does.
    """
    session = Session(model, threads=threads)
    case = ServerCase(source, model, ids, prompt, session, Judges(model, source.contract))
    try:
        _ask(case)
        _judge(case)
    finally:
        session.engine.close()
    return case


def _ask(case: ServerCase) -> None:
    source, tokenizer = case.source, case.session.tokenizer
    try:
        case.answers["completions"] = source.complete(case.ids, ANSWER)
    except ServerRefusal as refusal:
        if refusal.status in (400, 422, 500):  # it takes texts alone, or failed over ids
            text = tokenizer.decode(case.ids if tokenizer.first is None else case.ids[1:])
            case.by_ids = False
            case.answers["completions"] = source.complete(text, ANSWER)
        elif refusal.status not in _MISSING or case.prompt is None:
            raise
    if case.prompt is not None:
        try:
            case.answers["chat"] = source.chat([{"role": "user", "content": case.prompt}], ANSWER)
        except ServerRefusal as refusal:
            if refusal.status not in _MISSING or not case.answers:
                raise


def _judge(case: ServerCase) -> None:
    for request, answer in case.answers.items():
        if answer.other_ids:
            id, (theirs, ours) = next(iter(answer.other_ids.items()))
            case.add("tokenizer.server-ids", {"request": request, "ids": len(answer.other_ids)}, id=id,
                     theirs=theirs.decode(errors="replace"), ours=ours.decode(errors="replace"))  # fmt: skip
            return
    for request, answer in case.answers.items():
        if not answer.steps or not all(step.top for step in answer.steps):
            _judge_text(case, request, answer)
        else:
            _judge_steps(case, request, answer)
        if case.findings:
            return
    for request, answer in case.answers.items():
        if answer.prompt_count not in (None, len(case.ids)):  # nothing else differs: the count alone does
            case.add("tokenizer.server-prompt-length", harmless=True, request=request, found=answer.prompt_count,
                     expected=len(case.ids))  # fmt: skip
            return


def followed(steps: Sequence[AnswerStep]) -> list[int]:
    """Ids of an answer up to the first that is not known by its id."""
    ids: list[int] = []
    for step in steps:
        if step.token is None:
            break
        ids.append(step.token)
    return ids


def _judge_steps(case: ServerCase, request: str, answer: ServerAnswer) -> None:
    tokens = followed(answer.steps)
    steps = answer.steps[: len(tokens) + 1]  # what comes after an unknown token has an unknown prompt
    expected = case.after([*tokens, 0][: len(steps)])
    off = [expected.off(n, step.top) for n, step in enumerate(steps)]
    allowed = [expected.allowed(n, step.top) for n, step in enumerate(steps)]
    wrong = [n for n in range(len(steps)) if off[n] > allowed[n]]
    if wrong:
        first = wrong[0]
        figures = {
            "request": request, "step": first, "off": off[first], "allowed": allowed[first], "steps_off": len(wrong),
            "steps": len(steps),
        }  # fmt: skip
        case.parts_at = first
        _explain(case, request, answer, expected, first, figures)
        return
    for n, step in enumerate(steps):
        best = max(step.top.values())
        taken = step.top.get(step.token, -np.inf) if step.token is not None else best
        if best - taken > allowed[n]:
            likelier = max(step.top, key=lambda id, step=step: step.top[id])  # type: ignore[misc]
            case.parts_at = n
            case.add("forward.server-sampling", {"request": request, "nats": best - taken}, step=n, found=step.text,
                     expected=case.session.tokenizer.decode([likelier]))  # fmt: skip
            return


def _explain(
    case: ServerCase, request: str, answer: ServerAnswer, expected: ExpectedSteps, first: int, figures: dict[str, Any]
) -> None:
    """The first cause of a step that is not the model's: prompt, loop, sampling, a fault of the catalogue, the contract."""
    top = answer.steps[first].top
    at_once = first == 0
    right_elsewhere = request == "chat" and "completions" in case.answers  # it was judged before, and found right
    if at_once and _other_prompt(case, request, answer, figures):
        return
    if at_once and right_elsewhere:
        case.add("tokenizer.server-prompt-unknown", figures | _counts(case, answer), request=request)
        return
    form = _scaled(case, followed(answer.steps)[:first], expected.logits[first], top, figures["allowed"])
    if form is not None:
        case.add("forward.server-scaled", figures, form=form)
        return
    its_own = not at_once and _not_its_own(case, answer, expected, first)
    if _known_fault(case, answer, expected, figures, runs_alone=its_own):
        return
    if at_once and _known_number(case, answer, expected, figures):
        return
    if at_once:
        other = fitting_other(case.judges, case.model.config, case.ids, followed(answer.steps), answer.steps)
        if other is not None:
            case.add("forward.contract-differs", figures, harmless=True, steps=["the run"],
                     declared=str(case.source.contract), found=str(other))  # fmt: skip
            return
    case.add("forward.server-decode" if its_own else "forward.server-step", figures, step=first)


def _counts(case: ServerCase, answer: ServerAnswer) -> dict[str, Any]:
    return {"prompt_tokens": answer.prompt_count, "expected_tokens": len(case.ids)}


def _other_prompt(case: ServerCase, request: str, answer: ServerAnswer, figures: dict[str, Any]) -> bool:
    """Whether another prompt gives the first step; the one that does is the finding."""
    if request == "completions" and case.by_ids and answer.prompt_count in (None, len(case.ids)):
        return False  # ids went in, and as many as were sent
    top, best = answer.steps[0].top, (np.inf, "", 0)
    for name, ids in prompt_forms(case.session, case.prompt if request == "chat" else None, case.ids):
        if answer.prompt_count in (None, len(case.ids), len(ids)):
            run = case.session.generate(ids, max_tokens=1, keep_logits=True)
            assert run.logits is not None
            best = min(best, (distance_of(top, log_softmax(run.logits[0])), name, len(ids)))
    off, name, count = best
    if not off <= figures["allowed"]:
        return False
    facts = figures | _counts(case, answer) | {"off_as_found": off, "tokens_as_found": count}
    case.add("tokenizer.server-prompt", facts, request=request, form=name)
    return True


def _scaled(case: ServerCase, before: list[int], logits: np.ndarray, top: dict[int, float], allowed: float) -> str | None:
    """A temperature or a penalty for repeated tokens that makes the model's logits ``(V,)`` the server's figures."""
    found = [(distance_of(top, log_softmax(logits / t)), f"temperature {t:g}") for t in _TEMPERATURES]
    for penalty in _PENALTIES:
        for which, ids in (("of the answer", before), ("of prompt and answer", [*case.ids, *before])):
            seen = np.unique(ids).astype(np.int64)
            changed = logits.copy()
            changed[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            found.append((distance_of(top, log_softmax(changed)), f"a penalty of {penalty:g} for tokens {which}"))
    off, form = min(found)
    return form if off <= allowed else None


def _known_fault(
    case: ServerCase, answer: ServerAnswer, expected: ExpectedSteps, figures: dict[str, Any], *, runs_alone: bool
) -> bool:
    """The fault of the catalogue whose run gives every step; nearest first, those as near are named with it.

    Faults of files come last, and in small models only: the whole file is converted for each.
    """
    runs = [fault.id for fault in FAULTS.values() if fault.run_seam is not None]
    files = [fault.id for fault in FAULTS.values() if fault.run_seam is None and fault.file_seam is not None]
    found = _fitting(case, runs, answer, expected)
    if not found and not runs_alone and is_small(case.model):
        found = _fitting(case, files, answer, expected)
    if not found:
        return False
    off, name, equal = found[0]
    same = [id for other, id, _ in found[1:] if other <= 2 * max(off, 1e-6)]
    facts = figures | {"off_with_the_fault": off}
    if same:
        facts["computes_the_same_as"] = same
    fault = FAULTS[name]
    case.findings.append(Finding(fault.layer, fault.id, [], known(fault), {"source": case.source.name, **facts}, 0.9))
    case.proof = {"with the fault in our engine": {"likeliest token equal": f"{equal} of {len(answer.steps)}", "nats off": off}}
    return True


def _fitting(case: ServerCase, faults: list[str], answer: ServerAnswer, expected: ExpectedSteps) -> list[tuple[float, str, int]]:
    """Distance, id and number of equal tokens of those that give every step, nearest first."""
    found = []
    for id in faults:
        try:
            faulty = session_with(case.session, [id])
        except AprlabError:
            continue
        try:
            off, equal = _as_run(case, faulty, answer, expected)
        except AprlabError:
            continue
        finally:
            faulty.engine.close()
        if off is not None:
            found.append((off, id, equal))
    return sorted(found)


def _as_run(case: ServerCase, run: Session, answer: ServerAnswer, expected: ExpectedSteps) -> tuple[float | None, int]:
    """How far the server is from another run (None: too far), and how many tokens of its answer that run gives.

    At most steps no further than rounding explains, and at none twice as far: what rounding does to the other run is not known.
    """
    tokens = followed(answer.steps)
    for length in dict.fromkeys((1, len(answer.steps))):  # most are told at the first token
        said = run.generate(case.ids, max_tokens=length, keep_logits=True)
        assert said.logits is not None
        rows = list(said.logits)
        same = next((n for n, (a, b) in enumerate(zip(said.tokens, tokens, strict=False)) if a != b), len(rows) - 1)
        tops = [step.top for step in answer.steps[: min(same + 1, len(rows))]]
        off = np.array([distance_of(top, log_softmax(row)) for top, row in zip(tops, rows, strict=False)])
        share = off / np.array([expected.allowed(n, top) for n, top in enumerate(tops)])
        if not (share.max() <= 2 and np.median(share) <= 1):
            return None, 0
    equal = sum(a == b for a, b in zip(said.tokens, tokens, strict=False)) + (len(said.tokens) < len(rows))
    return float(np.sqrt(np.mean(off**2))), equal


def _known_number(case: ServerCase, answer: ServerAnswer, expected: ExpectedSteps, figures: dict[str, Any]) -> bool:
    """Whether another base of the rotation, or another epsilon, gives every step."""
    config, found = case.model.config, []
    for name, values in NUMBERS.items():
        for value in values:
            if value == getattr(config, name):
                continue
            changed: dict[str, Any] = {name: value}
            run = Session(case.session.engine, config=replace(config, **changed), tokenizer=case.session.tokenizer)
            off, equal = _as_run(case, run, answer, expected)
            if off is not None:
                found.append((off, name, value, equal))
    if not found:
        return False
    off, name, value, equal = min(found)
    case.add("forward.server-number", figures | {"off_as_found": off}, field=name, found=value, expected=getattr(config, name))
    case.proof = {"with the fault in our engine": {"likeliest token equal": f"{equal} of {len(answer.steps)}", "nats off": off}}
    return True


def _not_its_own(case: ServerCase, answer: ServerAnswer, expected: ExpectedSteps, step: int) -> bool:
    """Whether the server gives another step where the tokens before it are given as a prompt, and that one is right."""
    if not case.by_ids:
        return False
    again = case.source.complete([*case.ids, *followed(answer.steps)[:step]], 1).steps
    return bool(again) and expected.off(step, again[0].top) <= expected.allowed(step, again[0].top)


# ── text alone ────────────────────────────────────────────────────────────────────────────────────────────────────


def _judge_text(case: ServerCase, request: str, answer: ServerAnswer) -> None:
    """Without log-probabilities: the text, next to the model's; where two tokens are as likely, nothing is said."""
    tokenizer, counts = case.session.tokenizer, _counts(case, answer)
    ours = case.session.generate(case.ids, max_tokens=ANSWER)
    theirs, expected = answer.text.strip(), ours.text.strip()
    if theirs == expected or (expected and theirs.startswith(expected)):
        case.add("forward.server-text-alone", {"request": request, "tokens": len(ours.tokens)}, harmless=True, request=request)
        return
    at = _parting(tokenizer, ours.tokens, theirs)
    rest = theirs[len(tokenizer.decode(ours.tokens[:at]).strip()) :]
    figures: dict[str, Any] = {"request": request, "step": at, "evidence": "text alone"}
    theirs_here = tokenizer.encode(rest)[:1] if rest else sorted(tokenizer.eog)[:1]
    ours_here = ours.tokens[at] if at < len(ours.tokens) else min(tokenizer.eog, default=0)
    if theirs_here:
        row = case.after([*ours.tokens[:at], 0])
        nats = float(row.simulated[at, ours_here] - row.simulated[at, theirs_here[0]])
        figures |= {"nats": nats, "allowed": row.allowed(at, {theirs_here[0]: 0.0, ours_here: 0.0})}
        if nats <= figures["allowed"]:  # a near tie: rounding decides
            case.add("forward.server-text-alone", figures, harmless=True, request=request)
            return
    case.parts_at = at
    forms = prompt_forms(case.session, case.prompt, case.ids) if request == "chat" else []
    for name, ids in forms:
        said = case.session.generate(ids, max_tokens=ANSWER)
        if len(said.tokens) >= _TELLING and theirs.startswith(said.text.strip()):
            case.add("tokenizer.server-prompt", figures | counts, request=request, form=name)
            return
    shown = tokenizer.decode([ours_here])
    case.add("forward.server-text", figures | counts, step=at, found=rest[: max(len(shown), 1)], expected=shown)


def _parting(tokenizer: Qwen2Tokenizer, tokens: Sequence[int], text: str) -> int:
    """The first step after which a text is not that of these tokens any more; their number where it goes on."""
    for step in range(len(tokens)):
        if not text.startswith(tokenizer.decode(tokens[: step + 1]).strip().rstrip("\ufffd")):
            return step
    return len(tokens)


__all__ = ["ANSWER", "ServerCase", "judge_server"]
