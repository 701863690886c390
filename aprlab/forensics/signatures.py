"""Every bug has its own voice: what a model says under each fault, how well a fault is known again, and `docs/voices.md`.

python -m aprlab.forensics.signatures record MODEL.gguf data/voices.json --name "0.5B" [--follow] [--prompt P ...]
python -m aprlab.forensics.signatures page data/voices.json docs/voices.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aprlab.errors import AprlabError, UsageError
from aprlab.faults import run_faults, session_with
from aprlab.forensics.ranking import Bench, Ear, Suspect, healthy_session, sweep_up
from aprlab.formats.writing import write_text
from aprlab.inference.session import Session
from aprlab.model.model import Model

PROMPTS = ("What is 2+2?", "What is 3+4?", "What is the capital of France?")


@dataclass(frozen=True, slots=True)
class Known:
    """How often a fault was known again by an answer to another prompt.

    Attributes:
        first, third: times that it came first, or among the first three.
        counted: how often it was tried.
        instead: the fault that came first most often in its place; '' where none did.
    """

    first: int
    third: int
    counted: int
    instead: str = ""


@dataclass
class Voices:
    """What a model says to several prompts under each fault, and how well a voice is known again.

    Attributes:
        prompts: what was asked.
        healthy: the healthy answers, in the order of the prompts.
        said: fault id -> answers, in the order of the prompts.
        why_not: fault id -> why it could not run.
        moved: fault id -> bits by which the distribution of a next token moved at most (see `Suspect.moved`).
        known: fault id -> how well it is known again, by another answer to another prompt; faults that a text cannot
            show are not among them.
        followed: whether the likelihood of the text itself took part in that.
        alone: the shares that came first and among the first three by their answers alone.
    """

    prompts: list[str]
    healthy: list[str]
    said: dict[str, list[str]]
    why_not: dict[str, str]
    moved: dict[str, float]
    known: dict[str, Known] = field(default_factory=dict)
    followed: bool = False
    alone: tuple[float, float] = (0.0, 0.0)

    @property
    def silent(self) -> list[str]:
        """Faults under which every answer is the healthy one: a text gate is blind to them."""
        return [id for id, texts in self.said.items() if texts == self.healthy]

    @property
    def counted(self) -> int:
        """How many times a fault was looked for by another answer of its own."""
        return sum(known.counted for known in self.known.values())

    @property
    def top1(self) -> float:
        """The share of those where it came first."""
        return _rates(self.known)[0]

    @property
    def top3(self) -> float:
        """The share of those where it came among the first three."""
        return _rates(self.known)[1]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("prompts", "healthy", "said", "why_not", "silent", "top1", "top3", "counted", "followed")
        known = {id: [k.first, k.third, k.counted, k.instead] for id, k in self.known.items()}
        moved = {id: bits if math.isfinite(bits) else None for id, bits in self.moved.items()}
        return {name: getattr(self, name) for name in names} | {"alone": list(self.alone), "moved": moved, "known": known}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Voices:
        """What `to_json` gave."""
        names = ("prompts", "healthy", "said", "why_not", "followed")
        moved = {id: math.inf if bits is None else bits for id, bits in data["moved"].items()}
        known = {id: Known(*k) for id, k in data["known"].items()}
        return cls(**{name: data[name] for name in names}, moved=moved, known=known, alone=tuple(data["alone"]))


def _rates(known: dict[str, Known]) -> tuple[float, float]:
    counted = max(sum(k.counted for k in known.values()), 1)
    return sum(k.first for k in known.values()) / counted, sum(k.third for k in known.values()) / counted


def voices(
    model: Model | str | Path | Session,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_tokens: int = 12,
    faults: Iterable[str] | None = None,
    follow: bool = False,
    engine: str = "reference",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Voices:
    """Run every fault on every prompt and measure how specific the voices are.

    Args:
        model: a healthy model.
        prompts: at least two.
        max_tokens: length of each answer.
        faults: ids; all that a run can have without it.
        follow: rank as `forensics` does, by the likelihood of the text, too. That is a pass for each pair of faults and
            prompts: affordable for a tiny model; without it answers alone are compared.
        engine, threads: which engine runs.
        progress: called with each fault's id.
    """
    if len(prompts) < 2:
        raise UsageError(
            "at least two prompts are needed: a voice is known again by another answer", code="forensics.too-few-prompts"
        )
    session = healthy_session(model, engine, threads)
    benches = [Bench.of(session, prompt, max_tokens) for prompt in prompts]
    texts = [bench.healthy.text for bench in benches]
    answers: dict[str, list[Suspect]] = {}
    why_not: dict[str, str] = {}
    for id in run_faults() if faults is None else faults:
        if progress is not None:
            progress(id)
        try:
            broken = session_with(session, [id])
            answers[id] = [bench.hear(broken, (id,)) for bench in benches]
            broken.engine.close()
        except AprlabError as error:
            why_not[id] = error.message
        sweep_up(session.model)

    heard = {id: given for id, given in answers.items() if [a.text for a in given] != texts}
    ears = {
        (id, n): Ear(answer.text, benches[n].surprise(), session.tokenizer)
        for id, given in heard.items()
        for n, answer in enumerate(given)
        if answer.text != texts[n]
    }
    known = {id: _known_again(id, ears, answers, {}) for id in heard}
    alone = _rates(known)
    if follow:
        gains = _gains(session, benches, list(answers), ears)
        known = {id: _known_again(id, ears, answers, gains) for id in heard}
    said = {id: [a.text for a in given] for id, given in answers.items()}
    moved = {id: round(max(a.moved for a in given), 6) for id, given in answers.items()}
    return Voices(list(prompts), texts, said, why_not, moved, known, follow, alone)


Gains = dict[tuple[str, int, str, int], float]  # candidate, its prompt, fault whose text it is, prompt of that


def _gains(session: Session, benches: list[Bench], candidates: list[str], ears: dict[tuple[str, int], Ear]) -> Gains:
    """By how many bits a token each candidate makes each text likelier, as an answer to each other prompt."""
    gains: Gains = {}
    sound = {(prompt, *key): bench.cost(session, ear.saw) for prompt, bench in enumerate(benches) for key, ear in ears.items()}
    for candidate in candidates:
        broken = session_with(session, [candidate])
        for prompt, bench in enumerate(benches):
            for (id, n), ear in ears.items():
                if n != prompt:
                    gains[candidate, prompt, id, n] = sound[prompt, id, n] - bench.cost(broken, ear.saw)
        broken.engine.close()
        sweep_up(session.model)
    return gains


def _known_again(id: str, ears: dict[tuple[str, int], Ear], answers: dict[str, list[Suspect]], gains: Gains) -> Known:
    """Ties count half, rounded down."""
    first = third = counted = 0
    instead: Counter[str] = Counter()
    for (whose, n), ear in ears.items():
        for prompt in range(len(answers[id])) if whose == id else ():
            if prompt == n:
                continue
            scores = {
                other: ear.judge(given[prompt], gains.get((other, prompt, id, n))).score for other, given in answers.items()
            }
            better = [other for other, score in scores.items() if score > scores[id]]
            rank = len(better) + sum(score == scores[id] for other, score in scores.items() if other != id) // 2
            first, third, counted = first + (rank < 1), third + (rank < 3), counted + 1
            if rank:
                instead[max(scores, key=lambda other: (scores[other], other != id))] += 1
    return Known(first, third, counted, instead.most_common(1)[0][0] if instead else "")


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = """\
# Voices

Every bug has its own voice. This page shows what a model says under each fault that a run can have, one fault at a time,
everything else healthy: greedy, through the model's own chat template, activations in float32. It is made from
`data/voices.json` by `python -m aprlab.forensics.signatures page data/voices.json docs/voices.md`; each model's part of
that file by the command under its heading.

**Known again** is how specific a voice is: `forensics` is given one answer of a fault and has to find the fault among
all of them by what they say to *another* prompt. Faults that do not change the answer at hand are not counted, for a text
cannot show them. Two faults that say the very same share the place. `forensics` weighs the answers and the likelihood of
the text itself; the latter needs a pass for each pair of faults, and was measured on the embedded model only.

**Silent** faults change no word of any answer here. A gate on text is blind to them, whatever it compares; what stands in is
the gate on logits (`A-LOGITS` in [kill-matrix.md](kill-matrix.md)). The bits say how far the distribution of a next token
moved at most, while the answer was still the healthy one; 0 is less than a millionth.
"""


def _cell(text: str) -> str:
    """Text as it is, in code marks, on one line; bars would end the table's cell."""
    shown = repr(text)[1:-1].replace("|", "\\|").replace("`", "ˋ")
    return f"`{shown}`" if shown else "*(ends at once)*"


def page(record: dict[str, Any]) -> str:
    """The whole of `docs/voices.md`."""
    head = (
        "model",
        "questions",
        "faults",
        "silent",
        "times",
        "known again, first",
        "among three",
        "by answers alone",
        "among three",
    )
    parts = [HEAD, "## In short\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    heard = {name: Voices.from_json(entry) for name, entry in record["models"].items()}
    for name, v in heard.items():
        both = f"{v.top1:.0%} | {v.top3:.0%}" if v.followed else "– | –"
        alone = " | ".join(f"{share:.0%}" for share in v.alone)
        parts.append(f"| {name} | {len(v.prompts)} | {len(v.said)} | {len(v.silent)} | {v.counted} | {both} | {alone} |")
    parts.append(f"\n{record['note']}\n" if record.get("note") else "")
    for name, v in heard.items():
        entry = record["models"][name]
        parts.append(f"## {name}\n\n`{entry['command']}`, {entry['date']}, engine {entry['engine']}.\n")
        parts.append(f"Silent: {', '.join(f'`{id}` ({_bits(v.moved[id])})' for id in v.silent) or 'none'}.\n")
        parts.append(f"| fault | {' | '.join(v.prompts)} | moved | known again |")
        parts.append("|---|" + "---|" * (len(v.prompts) + 2))
        parts.append(f"| *healthy* | {' | '.join(map(_cell, v.healthy))} | | |")
        for id, texts in v.said.items():
            known = v.known.get(id)
            again = "silent" if id in v.silent else ""
            if known is not None and known.counted:
                again = f"{known.first} of {known.counted}" + (f", else `{known.instead}`" if known.instead else "")
            parts.append(f"| `{id}` | {' | '.join(map(_cell, texts))} | {_bits(v.moved[id])} | {again} |")
        if v.why_not:
            parts.append(f"\nNot to be run with this model: {', '.join(f'`{id}`' for id in v.why_not)}.\n")
    return "\n".join(parts).rstrip() + "\n"


def _bits(bits: float) -> str:
    if not math.isfinite(bits):
        return "not a number"
    return "0" if bits == 0 else f"{bits:.{0 if bits >= 10 else 1}f} bits" if bits >= 1 else f"{bits:.1g} bits"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m aprlab.forensics.signatures")
    verbs = parser.add_subparsers(dest="verb", required=True)
    record = verbs.add_parser("record")
    record.add_argument("model", type=Path)
    record.add_argument("output", type=Path)
    record.add_argument("--name", required=True, help="heading of this part")
    record.add_argument("--prompt", action="append", help="ask this; twice or more")
    record.add_argument("--max-tokens", type=int, default=12)
    record.add_argument("--follow", action="store_true")
    record.add_argument("--engine", default="jit")
    record.add_argument("--threads", type=int, default=None)
    made = verbs.add_parser("page")
    made.add_argument("record", type=Path)
    made.add_argument("output", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.verb == "page":
        write_text(chosen.output, page(json.loads(chosen.record.read_text(encoding="utf-8"))))
        return
    started = time.process_time()
    heard = voices(
        chosen.model, chosen.prompt or PROMPTS, max_tokens=chosen.max_tokens, follow=chosen.follow, engine=chosen.engine,
        threads=chosen.threads, progress=lambda id: print(id, round(time.process_time() - started), flush=True),
    )  # fmt: skip
    asked = "".join(f" --prompt {json.dumps(p)}" for p in chosen.prompt or ())
    command = f"python -m aprlab.forensics.signatures record {chosen.model.name} data/voices.json"
    command += f" --name {json.dumps(chosen.name)} --engine {chosen.engine}"
    command += f" --max-tokens {chosen.max_tokens}{' --follow' if chosen.follow else ''}{asked}"
    known: dict[str, Any] = {"note": "", "models": {}}
    if chosen.output.exists():
        known = json.loads(chosen.output.read_text(encoding="utf-8"))
    known["models"][chosen.name] = {
        "command": command, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "engine": chosen.engine,
        "seconds": round(time.process_time() - started, 1), **heard.to_json(),
    }  # fmt: skip
    write_text(chosen.output, json.dumps(known, ensure_ascii=False, indent=1) + "\n")
    print(f"first {heard.top1:.0%}, among three {heard.top3:.0%}, of {heard.counted}; silent: {', '.join(heard.silent)}")


if __name__ == "__main__":
    main()
