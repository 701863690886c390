"""How far the posterior of forensics can be believed: `python docs/make/calibration.py` measures it on made answers.

Answers of faults of the catalogue (greedy, and sampled at temperature 0.7), the same with that fault left out of the catalogue,
answers of the healthy model, and random words. The record is data/calibration.json, the table goes into docs/evidence.md;
`--page` writes the table alone, `--model FILE` measures another model, `--fit` prints the constants of
`aprlab/forensics/posterior.py` that fit best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprlab import paths
from aprlab.errors import AprlabError
from aprlab.faults import run_faults, session_with
from aprlab.forensics.answer_scoring import Suspect
from aprlab.forensics.bench import FaultBench, Question
from aprlab.forensics.posterior import DISCOUNT, RATE, TOLL, Posterior, posterior
from aprlab.formats import open_model
from aprlab.formats.writing import write_json, write_text
from aprlab.inference.sampling import Sampling
from aprlab.inference.session import Session

RECORD = paths.data_dir() / "calibration.json"
PAGE = Path(__file__).resolve().parents[1] / "evidence.md"
BEGIN, END = "<!-- calibration: made by docs/make/calibration.py -->", "<!-- end of calibration -->"
PROMPTS = ("What is 2+2?", "What is the capital of France?", "What is 9-4?")
LENGTH = 8  # tokens of a text
RANDOM = 12  # texts of random words for each prompt
KINDS = {
    "fault": "a fault of the catalogue", "sampled": "the same at temperature 0.7",
    "left out": "its fault left out of the catalogue", "healthy": "the healthy model, greedy and at 0.7", "random": "random words",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """One made text: what made it, and the bench's question about it."""

    kind: str
    truth: str
    question: Question


def made_texts(session: Session, prompts: list[str], faults: list[str]) -> Iterator[Made]:
    """Answers of faults and of the healthy model, and random words; only what differs from the healthy answer."""
    rng = np.random.default_rng(17)
    words = [id for id, kind in enumerate(session.tokenizer.data.token_types) if kind == 1]
    for n, prompt in enumerate(prompts):
        def asked(kind: str, truth: str, text: str, n: int = n, prompt: str = prompt, times: int = 0) -> Made:
            question = Question(f"{kind} {truth} {n} {times}", prompt, text, "file", None, LENGTH + 4)
            return Made(kind, truth, question)

        healthy = session.generate(prompt, max_tokens=LENGTH).text
        warm = session.generate(prompt, max_tokens=LENGTH, sampling=Sampling(0.7, 1.0, n)).text
        yield asked("healthy", "healthy", healthy)
        yield asked("healthy", "healthy", warm, times=1)
        for times in range(RANDOM):
            yield asked("random", "none", session.tokenizer.decode(rng.choice(words, LENGTH)), times=times)
        for id in faults:
            try:
                broken = session_with(session, [id])
                text = broken.generate(prompt, max_tokens=LENGTH).text
                other = broken.generate(prompt, max_tokens=LENGTH, sampling=Sampling(0.7, 1.0, n)).text
            except AprlabError:
                continue
            if text.strip() and text != healthy:
                yield asked("fault", id, text)
            if n == 0 and other.strip() and other not in (healthy, warm, text):
                yield asked("sampled", id, other)


@dataclass(frozen=True)
class Judged:
    """A text with what every set makes of it."""

    made: Made
    null: float
    healthy: float
    suspects: list[Suspect]


def judged(session: Session, made: list[Made], faults: list[str]) -> list[Judged]:
    """Every fault on every text."""
    bench = FaultBench(session, [each.question for each in made])
    tried: dict[str, list[Suspect]] = {each.question.id: [] for each in made}
    for n, id in enumerate(faults, 1):
        for which, suspect in bench.judge((id,)).items():
            tried[which].append(suspect)
        print(f"{n} of {len(faults)} {id} {time.process_time():.0f} s", file=sys.stderr)
    found = []
    for each in made:
        outcome = bench.outcome(each.question.id, tried[each.question.id], 0.0)
        assert outcome.healthy.bits is not None
        found.append(Judged(each, outcome.null_bits, outcome.healthy.bits, tried[each.question.id]))
    return found


def believed(of: Judged, left_out: bool, constants: tuple[float, float, float]) -> tuple[Posterior, float, bool]:
    """(the posterior, the chance that it gives to the truth, whether its answer is true).

    True is the fault itself or one that says the very same (within half a bit a token nothing tells them apart); of a fault that
    is left out, none of these, or a neighbour under which the text is as likely as under the fault itself.
    """
    truth = of.made.truth
    mine = next((s.bits for s in of.suspects if s.faults == (truth,)), None)
    suspects = [s for s in of.suspects if not left_out or s.faults != (truth,)]
    discount, toll, rate = constants
    found = posterior(of.null, of.healthy, suspects, discount=discount, toll=toll, rate=rate)
    if truth == "healthy":
        return found, found.healthy, found.answer == "healthy"
    if truth == "none":
        return found, found.none, found.answer == "none"
    level = {s.faults for s in suspects if s.bits is not None and mine is not None and s.bits <= mine + LENGTH / 2}
    chance = sum(chance for faults, chance in found.sets if faults in level)
    first = found.sets[0][0] if found.sets else ()
    right = found.answer == "fault" and first in level
    if left_out:
        return found, chance + found.none, right or found.answer == "none"
    return found, chance, right


def views(all_judged: list[Judged]) -> list[tuple[str, Judged, bool]]:
    """(kind, text, whether its fault is left out): each answer of a fault is asked about twice."""
    plain = [(each.made.kind, each, False) for each in all_judged]
    return plain + [("left out", each, True) for each in all_judged if each.made.kind == "fault"]


def fitted(all_judged: list[Judged]) -> tuple[float, tuple[float, float, float]]:
    """(mean bits of surprise at the truth, constants), each kind of text weighing the same."""
    asked = views(all_judged)

    def loss(constants: tuple[float, float, float]) -> float:
        by_kind: dict[str, list[float]] = {}
        for kind, each, out in asked:
            by_kind.setdefault(kind, []).append(-float(np.log2(max(believed(each, out, constants)[1], 1e-6))))
        return float(np.mean([np.mean(losses) for losses in by_kind.values()]))

    grid = itertools.product((0.1, 0.2, 0.3, 0.5, 0.7, 1.0), (0.0, 4.0, 8.0, 12.0, 16.0, 24.0), (0.0, 0.15, 0.3, 0.45, 0.6))
    return min((loss(constants), constants) for constants in grid)


def measured(name: str, all_judged: list[Judged], faults: int, constants: tuple[float, float, float]) -> dict[str, Any]:
    """What goes into the record."""
    rows: dict[str, Any] = {}
    sure: list[tuple[float, bool]] = []
    for kind, each, out in views(all_judged):
        found, chance, right = believed(each, out, constants)
        row = rows.setdefault(kind, {"texts": 0, "right": 0, "chance": 0.0, "claimed": 0})
        row["texts"] += 1
        row["right"] += right
        row["chance"] += chance
        row["claimed"] += found.answer in ("fault", "compound")
        sure.append((max(found.healthy, found.fault + found.compound, found.none), right))
    for row in rows.values():
        row["chance"] = round(row["chance"] / row["texts"], 3)
    bins = {}
    for low, high in ((0.0, 0.6), (0.6, 0.8), (0.8, 0.95), (0.95, 1.01)):
        inside = [(p, right) for p, right in sure if low <= p < high]
        if inside:
            bins[f"{low:g}–{min(high, 1):g}"] = [len(inside), round(float(np.mean([p for p, _ in inside])), 3),
                                                round(float(np.mean([right for _, right in inside])), 3)]  # fmt: skip
    return {"model": name, "faults": faults, "constants": list(constants), "kinds": rows, "bins": bins}


def table(record: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = []
    for of in record.values():
        discount, toll, rate = of["constants"]
        lines += [f"**{of['model']}**, {of['faults']} faults, {sum(row['texts'] for row in of['kinds'].values())} texts, "
                  f"discount {discount:g}, toll {toll:g} bits, rate {rate:g}:", "",
                  "| text | how many | answered right | chance given to the truth | a fault was named |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for kind, row in of["kinds"].items():
            share = f"{row['right']} ({row['right'] / row['texts']:.0%})"
            lines.append(f"| {KINDS[kind]} | {row['texts']} | {share} | {row['chance']:.2f} | {row['claimed']} |")
        lines += ["", "| it was sure to | times | on average | and was right in |", "|---|---|---|---|"]
        lines += [f"| {name} | {count} | {mean:.2f} | {share:.0%} |" for name, (count, mean, share) in of["bins"].items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def write_page(record: dict[str, Any]) -> None:
    """Put the tables into docs/evidence.md."""
    text = PAGE.read_text(encoding="utf-8")
    new, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{table(record)}\n{END}", text, flags=re.DOTALL
    )
    assert count == 1, f"{PAGE} has no place for the table"
    write_text(PAGE, new)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--model", type=Path, default=paths.embedded_model())
    parser.add_argument("--engine", default="reference")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--every", type=int, default=1, help="make answers of each N-th fault only")
    given = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if not given.page:
        session = Session(open_model(given.model), engine=given.engine)
        faults = [id for id, fault in run_faults().items() if not fault.silent]
        made = list(made_texts(session, list(PROMPTS[: given.prompts]), faults[:: given.every]))
        all_judged = judged(session, made, faults)
        ran = len({s.faults for each in all_judged for s in each.suspects if s.bits is not None})
        if given.fit:
            print("surprise at the truth in bits, and (DISCOUNT, TOLL, RATE):", *fitted(all_judged))
        record[given.model.stem] = measured(given.model.stem, all_judged, ran, (DISCOUNT, TOLL, RATE))
        write_json(RECORD, record)
    write_page(record)


if __name__ == "__main__":
    main()
