"""The bench: one healthy model, what was seen, and the judgement of one set of faults.

Everything that does not depend on the faults is there once: the weights, the healthy answers, and the prompts' keys and values
where a fault leaves the passes alone. A set is heard in stages, the cheapest first: a set whose first step cannot give the
text's first token says no more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aprlab.engines.delegating import BorrowedEngine
from aprlab.errors import AprlabError, NumericError
from aprlab.faults import FAULTS, session_with
from aprlab.faults.text import CHATML
from aprlab.forensics.answer_runs import HealthyRun, collect_after, healthy_session
from aprlab.forensics.answer_scoring import AnswerScorer, Suspect
from aprlab.forensics.likelihood import TextCost, chosen_from, first_step, null_bits, spoken
from aprlab.forensics.outcome import Forensics, ranked
from aprlab.forensics.posterior import posterior
from aprlab.inference.session import Session
from aprlab.model.model import Model
from aprlab.model.vocabulary import BYTE_ALPHABET

# What samplers make of logits that are not numbers: id -> how. The last id of the vocabulary comes on top.
FLOODS = {0: "an argmax by '>'", 38: "top-p within top-k 40", 39: "top-k 40", 49: "top-k 50"}
LAST_ID = "an argmax for which NaN equals everything"
NAN_FAULTS = {"argmax-nan", "nan-sampled"}  # their logits are no numbers, and they bring one sampler along
NOT_FINITE = NumericError("logits are not finite", code="session.logits-not-finite")
FAR = 100, 64  # a first token beyond this part of the vocabulary, and this rank, is one that the first step cannot give


@dataclass(frozen=True)
class Question:
    """What was asked, how, and what was seen.

    Attributes:
        id: a short name.
        prompt: what was asked.
        saw: the answer, as text or as ids.
        template: ``file``, ``chatml-without-system`` or ``none``.
        system: the system message, or None.
        length: tokens of an answer that are compared at most.
    """

    id: str
    prompt: str
    saw: str | tuple[int, ...]
    template: str
    system: str | None
    length: int


@dataclass
class _Heard:
    """A question with what the healthy model makes of it."""

    question: Question
    scorer: AnswerScorer
    sound: TextCost
    null: list[float]  # bits of each token


class FaultBench:
    """See above; `judge` is its work, `outcome` puts what was judged in order."""

    def __init__(
        self, model: Model | str | Path | Session, questions: Sequence[Question], engine: str | None = "auto",
        threads: int | None = None,
    ) -> None:  # fmt: skip
        self.session = healthy_session(model, engine, threads)
        self.questions = {question.id: question for question in questions}
        bare = with_template(self.session, CHATML) if any(q.template == "chatml-without-system" for q in questions) else None
        groups: dict[Any, tuple[HealthyRun, list[_Heard]]] = {}
        for question in questions:
            key = (question.prompt, question.template, question.system, question.length)
            if key not in groups:
                session = bare if bare is not None and question.template == "chatml-without-system" else self.session
                options = {"raw": question.template == "none", "system": question.system}
                groups[key] = HealthyRun.of(session, question.prompt, question.length, **options), []
            run, heard = groups[key]
            saw = question.saw if isinstance(question.saw, str) else list(question.saw)
            surprise = run.surprise()
            scorer = AnswerScorer(saw, surprise, self.session.tokenizer)
            heard.append(_Heard(question, scorer, run.cost(run.session, scorer.saw), null_bits(scorer.saw, surprise)))
        self.groups = list(groups.values())

    # ── one set ───────────────────────────────────────────────────────────────────────────────────────────────────

    def judge(self, faults: tuple[str, ...], ids: Collection[str] | None = None) -> dict[str, Suspect]:
        """What one set of faults makes of each question (of these ids); a session is made once, and answers all of them.

        A set that cannot run says why; that is an answer, too (the reader refuses, NaN, no template).
        """
        sessions: dict[int, Session | AprlabError] = {}
        found: dict[str, Suspect] = {}
        with self._decoded(faults) as (decoded, rest):
            for run, all_heard in self.groups:
                heard = [h for h in all_heard if ids is None or h.question.id in ids]
                if not heard:
                    continue
                started = time.process_time()
                if id(run.session) not in sessions:
                    sessions[id(run.session)] = self._broken(run.session, decoded, rest)
                broken = sessions[id(run.session)]
                if isinstance(broken, AprlabError):
                    said = {h.question.id: Suspect(faults, "", (), None, broken.message) for h in heard}
                else:
                    said = _answers(run, heard, broken, faults)
                spent = (time.process_time() - started) / len(heard)
                found |= {each: replace(suspect, seconds=spent) for each, suspect in said.items()}
            for each in sessions.values():
                if isinstance(each, Session):
                    each.engine.close()
            sessions.clear()
        collect_after(self.session.model)
        return found

    @contextmanager
    def _decoded(self, faults: tuple[str, ...]) -> Iterator[tuple[Session | AprlabError, tuple[str, ...]]]:
        """A session with the faulty decoders among `faults`, and the other faults. Decoding is what a fault costs most, and it is
        the same for every template."""
        decoders = tuple(id for id in faults if FAULTS[id].registry is not None)
        made: Session | AprlabError = self.session
        if decoders:
            try:
                made = session_with(self.session, decoders)
            except AprlabError as error:
                made = error
        yield made, tuple(id for id in faults if id not in decoders)
        if isinstance(made, Session) and made is not self.session:
            made.engine.close()

    def _broken(self, healthy: Session, decoded: Session | AprlabError, rest: tuple[str, ...]) -> Session | AprlabError:
        """A session like `healthy`, over the weights of `decoded`, with the other faults."""
        if isinstance(decoded, AprlabError):
            return decoded
        if decoded is self.session:
            base = healthy
        else:
            template = healthy.model.tokenizer.chat_template
            base = decoded if healthy is self.session else with_template(decoded, template)
        try:
            return session_with(base, rest) if rest or decoded is self.session else base
        except AprlabError as error:
            return error

    # ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────

    def outcome(self, id: str, suspects: Collection[Suspect], seconds: float) -> Forensics:
        """The ranking of what was judged for one question."""
        for run, all_heard in self.groups:
            for heard in all_heard:
                if heard.question.id == id:
                    return self._outcome(run, heard, suspects, seconds)
        raise KeyError(id)

    def _outcome(self, run: HealthyRun, heard: _Heard, suspects: Collection[Suspect], seconds: float) -> Forensics:
        scorer, question, used = heard.scorer, heard.question, self.session.engine
        match = scorer.judge(run.healthy)
        costs = spoken(heard.sound.bits, len(scorer.saw)) if match.prefix == 1 else heard.sound.bits
        healthy = replace(run.healthy, match=match, costs=costs, first_rank=heard.sound.rank)
        text = question.saw if isinstance(question.saw, str) else self.session.tokenizer.decode(scorer.saw)
        tokens = [] if question.saw == "" else scorer.saw
        null, order = sum(heard.null), ranked(suspects)
        belief = posterior(null, healthy, order)
        return Forensics(
            text, tokens, question.prompt, healthy, order, seconds, used.spec, used.asked or used.spec, belief, null
        )


def with_template(session: Session, template: str | None) -> Session:
    """The same model, engine and weights behind another chat template."""
    model = session.model.with_changes(tokenizer=replace(session.model.tokenizer, chat_template=template))
    return Session(BorrowedEngine(session.engine, model), config=session.config, tokenizer=session.tokenizer)


def _answers(run: HealthyRun, heard: list[_Heard], broken: Session, faults: tuple[str, ...]) -> dict[str, Suspect]:
    """What a broken session says to one prompt, judged for each text that was seen."""
    first: list[np.ndarray] = []
    ranks: dict[str, int] = {}

    def at_first(logits: np.ndarray) -> str:
        first.append(logits.copy())
        ranks.update({h.question.id: _nearest_rank(logits, h, broken) for h in heard})
        least = min(ranks.values())
        return "" if least <= max(FAR[1], logits.size // FAR[0]) else f"the text's first token was at rank {least}"

    telling = sorted({token for h in heard for token in h.scorer.telling})
    try:
        said = run.answer_of(broken, faults, telling, at_first)
        found = {}
        for h in heard:
            far = bool(first) and ranks[h.question.id] > max(FAR[1], first[0].size // FAR[0])
            found[h.question.id] = _dropped(h, said, first[0]) if far else _heard_out(run, h, broken, said)
    except AprlabError as error:
        return {h.question.id: not_numbers(run, faults, h, error) for h in heard}
    if set(faults) & NAN_FAULTS:  # of which sampler the text is, is not their business
        floods = {h.question.id: not_numbers(run, faults, h, NOT_FINITE) for h in heard}
        found |= {id: flood for id, flood in floods.items() if flood.match is not None}
    return found


def _nearest_rank(first: np.ndarray, heard: _Heard, broken: Session) -> int:
    """Rank of the text's first token at the first step; of a text also with the blank that a report may have dropped, and as the
    broken tokenizer spells it. Where the likeliest token shows nothing, the text may begin after it: 0."""
    ids = {heard.scorer.saw[0]} if heard.scorer.text != "" else set(broken.tokenizer.eog)
    if heard.scorer.text:
        shown = broken.tokenizer.decode([int(np.argmax(first))]).strip()
        if not shown or heard.scorer.text.startswith("\ufffd"):  # which bytes they were is not known
            return 0
        for text in (heard.scorer.text, " " + heard.scorer.text, bytes_spelled(heard.scorer.text)):
            spelled = broken.tokenizer.encode(text, parse_special=False)
            ids |= set(spelled[broken.tokenizer.first is not None :][:1])
    return min(int((first > first[id]).sum()) for id in ids if id < first.size)


def bytes_spelled(text: str) -> str:
    """A text in the byte-level alphabet (`Ġhelf`), as many programs print tokens, in letters; any other one as it is."""
    if not set(text) <= set(BYTE_ALPHABET):
        return text
    return bytes(BYTE_ALPHABET[c] for c in text).decode(errors="replace")


def _dropped(heard: _Heard, said: Suspect, first: np.ndarray) -> Suspect:
    """A set whose first step cannot give the text: the rest is taken to cost what it costs under the null."""
    cost = first_step(first, heard.scorer.saw, sum(heard.null[1:]))
    cut = said.cut or f"the text's first token was at rank {cost.rank}"
    match = heard.scorer.judge(said, heard.sound.mean - cost.mean)
    return replace(said, match=match, costs=cost.bits, first_rank=cost.rank, cut=cut)


def _heard_out(run: HealthyRun, heard: _Heard, broken: Session, said: Suspect) -> Suspect:
    """An answer that was heard, with the likelihood of the text."""
    if said.cut and said.tokens == run.healthy.tokens:
        cost = heard.sound
    else:
        cost = _cheapest(run, heard, broken)
    match = heard.scorer.judge(said, heard.sound.mean - cost.mean)
    costs = spoken(cost.bits, len(heard.scorer.saw)) if match.prefix == 1 else cost.bits
    return replace(said, match=match, costs=costs, first_rank=cost.rank)


def _cheapest(run: HealthyRun, heard: _Heard, broken: Session) -> TextCost:
    """What the text costs; a tokenizer that prints other words for the same ids may have meant other ids."""
    found = [run.cost(broken, heard.scorer.saw)]
    text, tokenizer = heard.scorer.text, broken.tokenizer
    if text and tokenizer is not run.session.tokenizer and tokenizer.decode(heard.scorer.saw) != text:
        for reading in dict.fromkeys((text, bytes_spelled(text))):
            ids = tokenizer.encode(reading, parse_special=False)
            if ids and tokenizer.decode(ids) == text:
                found.append(run.cost(broken, ids))
    return min(found, key=lambda cost: cost.mean)


def not_numbers(run: HealthyRun, faults: tuple[str, ...], heard: _Heard, error: AprlabError) -> Suspect:
    """A set that could not run. Where its logits are no numbers, programs went on and said one token forever: the flood that fits
    the text best, if one of them is the text's; an answer of healthy tokens is never taken for one."""
    if error.code != "session.logits-not-finite":
        return Suspect(faults, "", (), None, error.message)
    scorer = heard.scorer
    floods = FLOODS | {run.session.config.vocab_size - 1: LAST_ID}
    for id, how in floods.items():
        if set(scorer.saw) == {id} or (scorer.text and _is_flood(run, id, scorer.text)):
            tokens = (id,) * len(scorer.saw)
            said = Suspect(faults, scorer.text or run.session.tokenizer.decode(tokens), tokens, None)
            cut = f"its logits are no numbers; this is what {how} makes of them"
            return replace(said, match=scorer.judge(said), cut=cut, costs=chosen_from(len(floods)), flood=id)
    return Suspect(faults, "", (), None, error.message)


def _is_flood(run: HealthyRun, id: int, text: str) -> bool:
    """Whether a text is one token over and over, which the tokenizer may have cut in longer pieces."""
    piece = run.session.tokenizer.decode([id])
    return bool(piece) and len(text) > len(piece) and text == piece * (len(text) // len(piece))
